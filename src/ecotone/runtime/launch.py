"""The nodes of a cluster, as an asker sees them: processes started here, threads in memory, or machines that run already.

`launch` plays an emulated cluster on this computer: one process per device but the source, each with its slowdown, and
user-space rates and latencies on every directed link, also on those that leave the source. The asker's own end of the
wire lives here and outlives sessions, so plans and models can change while the node processes stay.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import tempfile
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ecotone import schema
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.protocol.message import NodeId
from ecotone.protocol.settings import WorkerSettings
from ecotone.runtime.children import Child
from ecotone.runtime.errors import NodeUnreachable
from ecotone.runtime.node import LocalNode, NodeSettings, ServiceMaker, link_settings, open_wire, shape
from ecotone.runtime.port import GUEST, Port
from ecotone.runtime.questions import Questions
from ecotone.runtime.store import Store
from ecotone.trust.identity import Identity, membership
from ecotone.units import EcotoneError
from ecotone.wire.memory import Network
from ecotone.wire.shaped import ShapedWire
from ecotone.wire.wire import Wire

__all__ = ["NODE_PROGRAM", "Nodes", "attach", "in_memory", "launch"]

NODE_PROGRAM = "ecotone.runtime.node_main"


class Nodes:
    """The nodes of `cluster` and the asker's end of the wire. A context manager: leaving it ends what was started."""

    def __init__(
        self, cluster: Cluster, wire: Wire, shaped: ShapedWire | None, children: dict[DeviceId, Child], name: str = ""
    ):
        self.cluster, self.children = cluster, children
        self.addresses: dict[DeviceId, str] = {}
        self._shaped = shaped
        self._closing = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._threads: dict[DeviceId, tuple[LocalNode, ShapedWire | None]] = {}
        self._root = Path("unused")
        self._imposed: dict[tuple[DeviceId, DeviceId], Link] = {}  # links that are shaped now
        self._program = NODE_PROGRAM
        self.port = Port(name or cluster.source, wire)
        self.questions = Questions(self.port, {"echo": lambda peer, body: None})

    @property
    def pids(self) -> dict[DeviceId, int]:
        """Process id of each node process started here."""
        return {name: child.pid for name, child in self.children.items()}

    def set_link(self, link: Link) -> None:
        """Give the emulated directed link a new rate and latency, live; raises EcotoneError on a real network."""
        if not self.cluster.emulate:
            raise EcotoneError(f"link {link.source}>{link.target} is real: only the links of an emulated cluster can be set")
        rate = link.bandwidth_bytes_per_s if math.isfinite(link.bandwidth_bytes_per_s) else None
        with self._lock:
            if link.source == self.cluster.source:
                if self._shaped is not None:
                    self._shaped.set_link(NodeId(link.target), rate, link.latency_s)
            elif link.source in self.children:
                change = {"peer": link.target, "bytes_per_s": rate, "latency_s": link.latency_s}
                self.children[link.source].ask({"link": change}, 10.0)
            elif link.source in self._threads and (shaped := self._threads[link.source][1]) is not None:
                shaped.set_link(NodeId(link.target), rate, link.latency_s)
            self._imposed[link.source, link.target] = link
            self.cluster = self.cluster.with_link(link)

    def set_links(self, links: tuple[Link, ...]) -> None:
        """set_link for each."""
        for link in links:
            self.set_link(link)

    def restart(self, device: DeviceId | str, deadline_s: float = 90.0) -> None:
        """Start the ended process of `device` again: same name, address and weight store, the links as they are now.

        Returns when it answers; raises ChildError or NodeUnreachable, and EcotoneError where it is not ours or still runs.
        """
        name = DeviceId(device)
        child = self.children.get(name)
        if child is None or child.is_alive:
            why = "was not started here" if child is None else "still runs; kill or terminate it first"
            raise EcotoneError(f"node {device} {why}")
        child.close()
        others = {key: address for key, address in self.addresses.items() if key != name}
        begun = self.children[name] = _start_child(self.cluster.device(name), self._program)
        begun.ask(None, deadline_s)
        links = tuple(link for link in self._imposed.values() if link.source == name)
        settings = _child_settings(self.cluster, name, self._root, links)
        settings |= {"listen": [self.addresses[name]], "connect": list(others.values())}
        begun.ask({"settings": settings}, deadline_s)
        self.wait_for(frozenset([name]), deadline_s)

    def wait_for(self, devices: frozenset[DeviceId], deadline_s: float) -> None:
        """Return when the nodes of `devices` can be reached; raises NodeUnreachable, saying why a process here died."""
        others = frozenset(NodeId(name) for name in devices if name != self.cluster.source)
        for name in sorted(others):
            child = self.children.get(DeviceId(name))
            if child is not None and not child.is_alive:
                raise NodeUnreachable(f"node {name} has ended; {child.last_words()}")
        self.port.wait_for(others, deadline_s)

    def close(self) -> None:
        """End the node processes and threads started here, and the asker's wire. Twice is no error."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def launch(
    cluster: Cluster, *, folder: Path | None = None, deadline_s: float = 90.0, unshaped: bool = False,
    program: str = NODE_PROGRAM,
) -> Nodes:  # fmt: skip
    """Start the devices of an emulated `cluster`, but the source, as processes of this computer; ready when it returns.

    `folder` keeps their weight stores (a temporary one by default). `unshaped`: links are as they are until set_link.
    `program`: the module that each process runs, with the services that nodes shall offer.
    Raises ChildError or WireError in bounded time, leaving no process behind.
    """
    if not cluster.emulate:
        raise EcotoneError(
            f'cluster {cluster.name}: it is not emulated: start "ecotone up" on each device, or set emulate = true'
        )
    closing = contextlib.ExitStack()
    with contextlib.ExitStack() as undo:
        undo.callback(closing.close)
        root = folder or Path(
            closing.enter_context(tempfile.TemporaryDirectory(prefix="ecotone-", ignore_cleanup_errors=True))
        )
        children = _start_children(cluster, closing, program)
        addresses = _open_children(cluster, children, root, deadline_s, unshaped)
        settings = NodeSettings(
            device=cluster.device(cluster.source), folder=root / "asker", cluster=cluster.name, emulate=True,
            connect=tuple(addresses.values()), links=() if unshaped else links_from(cluster, cluster.source),
        )  # fmt: skip
        wire, shaped = open_wire(settings)
        nodes = Nodes(cluster, shaped or wire, shaped, children)
        nodes.addresses, nodes._closing, nodes._root = addresses, closing, root
        nodes._program = program
        nodes._imposed = {} if unshaped else {(link.source, link.target): link for link in cluster.links}
        nodes.port.start()
        closing.callback(nodes.port.close)
        nodes.wait_for(frozenset(children), deadline_s)
        undo.pop_all()
    return nodes


def in_memory(
    cluster: Cluster, *, folder: Path | None = None, network: Network | None = None, worker: WorkerSettings | None = None,
    services: Sequence[ServiceMaker] = (),
) -> Nodes:  # fmt: skip
    """The same nodes as threads of this process over an in-memory network: for tests and a first look."""
    closing = contextlib.ExitStack()
    root = folder or Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="ecotone-", ignore_cleanup_errors=True)))
    network = network or Network()

    def join(name: DeviceId) -> tuple[Wire, ShapedWire | None]:
        wire = network.join(NodeId(name))
        if not cluster.emulate:
            return wire, None
        shaped = ShapedWire(wire, links={NodeId(k.target): shape(k) for k in links_from(cluster, name)})
        return shaped, shaped

    wire, shaped = join(cluster.source)
    nodes = Nodes(cluster, wire, shaped, {})
    nodes._closing = closing
    closing.callback(network.close)
    for device in cluster.devices:
        if device.name != cluster.source:
            ends = join(device.name)
            links = link_settings(links_from(cluster, device.name), emulate=cluster.emulate)
            node = LocalNode(device, ends[0], Store(root / device.name), links, worker, services)
            node.start()
            closing.callback(node.stop)
            nodes._threads[device.name] = (node, ends[1])
    nodes.port.start()
    closing.callback(nodes.port.close)
    nodes.wait_for(frozenset(d.name for d in cluster.devices), 10.0)
    return nodes


def attach(
    cluster: Cluster, *, identity: Identity | None = None, multicast: bool = False, connect: tuple[str, ...] = (),
    deadline_s: float = 10.0, needed: Collection[DeviceId] | None = None, guest: bool = False,
) -> Nodes:  # fmt: skip
    """Nodes that run already (`ecotone up`): at the addresses that the cluster file gives, or discovered.

    Of an emulated cluster (a laboratory without root) the links that leave the asker are imposed here.

    `identity`: this machine's membership of the cluster of that name, where it has one, unless another is given. `needed`:
    the devices that must answer, all by default; the others may come later. `guest`: only to ask questions, beside an asker
    that may be at work under the source's name.
    Raises WireError or NodeUnreachable, naming the node, within about `deadline_s`.
    """
    source = cluster.device(cluster.source)
    identity = identity or membership(cluster.name)
    known = tuple(d.address for d in cluster.devices if d.address and (d.name != source.name or guest))
    device = replace(source, name=DeviceId(f"{GUEST}{secrets.token_hex(4)}")) if guest else source
    settings = NodeSettings(
        device=device, folder=Path("unused"), cluster=cluster.name, connect=connect or known, identity=identity,
        multicast=multicast, links=links_from(cluster, source.name), emulate=cluster.emulate, insist=needed is None,
    )  # fmt: skip
    wire, shaped = open_wire(settings)
    nodes = Nodes(cluster, shaped or wire, shaped, {}, device.name)
    nodes._closing.callback(nodes.port.close)
    try:
        nodes.port.start()
        nodes.wait_for(frozenset(needed if needed is not None else (d.name for d in cluster.devices)), deadline_s)
    except EcotoneError:
        nodes.close()
        raise
    return nodes


def links_from(cluster: Cluster, source: DeviceId) -> tuple[Link, ...]:
    """The directed links that leave `source`."""
    return tuple(link for link in cluster.links if link.source == source)


def _start_children(cluster: Cluster, closing: contextlib.ExitStack, program: str) -> dict[DeviceId, Child]:
    children: dict[DeviceId, Child] = {}
    for device in cluster.devices:
        if device.name != cluster.source:
            children[device.name] = _start_child(device, program)
    closing.callback(_close_children, children)
    return children


def _start_child(device: Device, program: str) -> Child:
    threads = str(device.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return Child(device.name, ("-m", program), environment)


def _close_children(children: dict[DeviceId, Child]) -> None:
    closers = [threading.Thread(target=child.close, daemon=True) for child in children.values()]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(30.0)


def _open_children(
    cluster: Cluster, children: dict[DeviceId, Child], root: Path, deadline_s: float, unshaped: bool
) -> dict[DeviceId, str]:
    """Tell each process in turn where those before it listen; loading, the slow part, goes on in all at once."""
    addresses: dict[DeviceId, str] = {}
    for name, child in children.items():
        child.ask(None, deadline_s)
        links = () if unshaped else links_from(cluster, name)
        settings = _child_settings(cluster, name, root, links) | {"connect": list(addresses.values())}
        answer = child.ask({"settings": settings}, deadline_s)
        addresses[name] = str(answer["listening"][0])
    return addresses


def _child_settings(cluster: Cluster, name: DeviceId, root: Path, links: tuple[Link, ...]) -> dict[str, Any]:
    """What node_main is told, but for whom to connect to."""
    return {
        "device": schema.write(cluster.device(name)),
        "links": schema.write(links),
        "folder": str(root / name), "cluster": cluster.name, "listen": ["127.0.0.1:0"],
        "emulate": True, "cap_bytes": 8 << 30,
    }  # fmt: skip
