"""A node: one device that works for whoever deploys a plan on it. In a process of its own, or as threads (in memory).

Leaving in order: a node that is told to stop tells its askers ("leaving"); they accept nothing more, finish what they
accepted, close their sessions, and answer; then, or when patience ends, the node goes. So SIGTERM loses no accepted request.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

from ecotone import profiling, schema
from ecotone.cluster import Device, Link
from ecotone.codec import ImageSpec
from ecotone.executors.memory import keep_freed_memory
from ecotone.graph import Graph
from ecotone.model import Captured
from ecotone.protocol.message import NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import LinkSettings, WorkerSettings, chunk_bytes_for
from ecotone.runtime.incarnation import next_incarnation
from ecotone.runtime.loading import StoreLoader
from ecotone.runtime.port import Port
from ecotone.runtime.probe import measure_link
from ecotone.runtime.questions import Handler, Questions
from ecotone.runtime.recorder import Recorder, machine_clock
from ecotone.runtime.shell import Shell
from ecotone.runtime.stages import Stages
from ecotone.runtime.store import Store
from ecotone.trust.identity import Identity
from ecotone.wire.shaped import LinkShape, ShapedWire
from ecotone.wire.wire import Wire
from ecotone.wire.zenoh import ZenohSettings, ZenohWire

__all__ = [
    "EXPLAIN", "LEAVING", "LocalNode", "NodeSettings", "Service", "ServiceMaker", "link_settings", "run_node", "shape",
]  # fmt: skip

LEAVING, EXPLAIN = "leaving", "explain"
_SLOW_LINK_BYTES_PER_S = 4e6
_SMALL_BUFFER_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """How a node runs. `links`: the directed links that leave this device, imposed in user space when `emulate`.

    `listen` and `connect` are endpoints (see ecotone.wire.zenoh); `folder` holds its weights, at most `cap_bytes` of them.
    Without `insist` a node starts also where nobody answers at `connect`, and goes on trying. `worker`: None: the default.
    """

    device: Device
    folder: Path
    cluster: str = "local"
    listen: tuple[str, ...] = ("127.0.0.1:0",)
    connect: tuple[str, ...] = ()
    insist: bool = True
    links: tuple[Link, ...] = ()
    emulate: bool = False
    cap_bytes: int = 8 << 30
    identity: Identity | None = None
    multicast: bool = False
    drain_s: float = 20.0
    worker: WorkerSettings | None = None


class Service(Protocol):
    """What a node offers beside stages of captured models, over the same port; see ServiceMaker."""

    @property
    def is_idle(self) -> bool: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def loaded(self) -> list[str]:
        """What it holds, a line each, for people."""
        ...


ServiceMaker = Callable[[Port, Questions, Device, Path, Mapping[NodeId, LinkSettings]], Service]
"""(port, questions, device, folder of its own, settings of the links that leave it): a service, not started."""


class LocalNode:
    """One node over `wire`: machine, shell, store and the questions it answers. `start`, then `leave` or `stop`.

    `services`: made here, started and stopped with the node, which leaves in order only when they are idle.
    """

    def __init__(
        self, device: Device, wire: Wire, store: Store, links: Mapping[NodeId, LinkSettings] | None = None,
        worker: WorkerSettings | None = None, services: Sequence[ServiceMaker] = (),
    ):  # fmt: skip
        self.device, self._store = device, store
        self.port = Port(device.name, wire)
        stages = Stages(device.accelerator, device.threads, device.memory_bytes)
        self._recorder = Recorder()
        machine = Node(NodeId(device.name), next_incarnation(), links=dict(links or {}), worker=worker)
        self._loader = StoreLoader(store, stages)
        self.shell = Shell(self.port, device, machine, stages, self._loader, recorder=self._recorder)
        quick: dict[str, Handler] = {
            "clock": lambda peer, body: {"clock": machine_clock(), "now_s": time.perf_counter()},
            "spans": self._spans,
            "echo": lambda peer, body: None,
            "device": lambda peer, body: schema.write(device),
            EXPLAIN: lambda peer, body: {
                "lines": [*self._loader.loaded(), *(line for s in self.services for line in s.loaded())]
            },
        }
        self.questions = Questions(self.port, quick, {"link": self._link, "profile": self._profile})
        self.services = [
            make(self.port, self.questions, device, store.folder / "services", dict(links or {})) for make in services
        ]

    def start(self) -> None:
        """Open the wire and begin; raises WireError."""
        self.port.start()
        self.shell.start()
        for service in self.services:
            service.start()

    def leave(self, patience_s: float) -> None:
        """Stop once the askers have finished what they accepted, or when `patience_s` have passed."""
        end, tell_again_s = time.monotonic() + patience_s, 0.0
        while not (self.shell.is_idle and all(s.is_idle for s in self.services)) and (now := time.monotonic()) < end:
            if now >= tell_again_s:  # told again, as one telling may be lost
                tell_again_s = now + 1.0
                for peer in sorted(self.port.peers()):
                    self.questions.tell(peer, LEAVING)
            time.sleep(0.01)
        self.stop()

    def stop(self) -> None:
        """Stop now."""
        for service in self.services:
            service.stop()
        self.shell.stop()
        self.port.close()
        self._store.close()

    def _link(self, peer: NodeId, body: dict[str, Any]) -> Any:
        return schema.write(measure_link(self.questions, schema.read(Link, body["link"], "link question")))

    def _profile(self, peer: NodeId, body: dict[str, Any]) -> Any:
        """Measure the model of a loaded plan on this machine, as the device that the asker's cluster file describes."""
        graph = schema.read(Graph, body["graph"], "profile question")
        model = self._loader.stored_model(int(body["session"]), int(body["epoch"]), graph)
        device = replace(self.device, executors=tuple(body["executors"]))
        options = schema.read(profiling.MeasureOptions, body["options"], "profile question")
        image = None if body.get("image") is None else schema.read(ImageSpec, body["image"], "profile question")

        def tell(done: int, total: int, what: str) -> None:
            self.questions.tell(peer, "progress", {"done": done, "total": total, "what": what})

        measured = profiling.profile_device(
            cast(Captured, model), device, cuts=tuple(body["cuts"]), samples=model.samples, options=options,
            image=image, progress=tell,
        )  # fmt: skip
        return measured.to_json()

    def _spans(self, peer: NodeId, body: dict[str, Any]) -> Any:
        return self._recorder.of_session(int(body["session"]), int(body["first_request"]))


def shape(link: Link) -> LinkShape:
    """What the shaping wire needs of a link."""
    return LinkShape(bytes_per_s=link.bandwidth_bytes_per_s, latency_s=link.latency_s)


def link_settings(links: tuple[Link, ...], *, emulate: bool) -> dict[NodeId, LinkSettings]:
    """Protocol settings of the links that leave a node: on slow ones chunks are small, so that control gets through.

    An emulated link may be made far slower while it runs: its chunks stay small enough, its lease long enough, for that.
    """
    return {NodeId(link.target): _settings_of(link.bandwidth_bytes_per_s, emulate) for link in links}


def _settings_of(bandwidth_bytes_per_s: float, emulate: bool) -> LinkSettings:
    if not emulate:
        chunk_bytes = chunk_bytes_for(bandwidth_bytes_per_s)
        return LinkSettings(chunk_bytes=chunk_bytes, bytes_per_s=bandwidth_bytes_per_s)
    chunk_bytes = min(max(chunk_bytes_for(bandwidth_bytes_per_s, 0.02), 32 << 10), 256 << 10)
    return LinkSettings(chunk_bytes=chunk_bytes, lease_s=5.0, bytes_per_s=bandwidth_bytes_per_s)


def open_wire(settings: NodeSettings) -> tuple[ZenohWire, ShapedWire | None]:
    """The network end that `settings` ask for, not started; the second is the same end's shaping, when emulated."""
    slow = any(link.bandwidth_bytes_per_s < _SLOW_LINK_BYTES_PER_S for link in settings.links)
    wire = ZenohWire(
        ZenohSettings(
            node=NodeId(settings.device.name), cluster=settings.cluster, listen=settings.listen, connect=settings.connect,
            identity=settings.identity, multicast=settings.multicast, insist=settings.insist,
            socket_buffer_bytes=_SMALL_BUFFER_BYTES if slow and not settings.emulate else None,
        )
    )  # fmt: skip
    if not settings.emulate:
        return wire, None
    return wire, ShapedWire(wire, links={NodeId(link.target): shape(link) for link in settings.links})


class NodeProcess:
    """A node of `settings` over Zenoh, with what a launcher may change while it runs."""

    def __init__(self, settings: NodeSettings, services: Sequence[ServiceMaker] = ()):
        self._settings = settings
        self._zenoh, self._shaped = open_wire(settings)
        store = Store(settings.folder, settings.cap_bytes)
        links = link_settings(settings.links, emulate=settings.emulate)
        self.node = LocalNode(settings.device, self._shaped or self._zenoh, store, links, settings.worker, services)

    def start(self) -> tuple[str, ...]:
        """Open the network; returns the endpoints that peers can connect to."""
        self.node.start()
        return self._zenoh.listening

    def set_link(self, peer: str, bytes_per_s: float | None, latency_s: float) -> None:
        """Change an emulated link; does nothing on a real network."""
        if self._shaped is not None:
            self._shaped.set_link(NodeId(peer), bytes_per_s, latency_s)

    def leave(self) -> None:
        self.node.leave(self._settings.drain_s)


def run_node(
    settings: NodeSettings,
    on_ready: Callable[[tuple[str, ...]], None] | None = None,
    services: Sequence[ServiceMaker] = (),
) -> None:
    """Be a node until SIGINT or SIGTERM, then drain and return; call from the main thread. Raises WireError, StoreError.

    `on_ready` is told the endpoints. A second signal ends the draining.
    """
    keep_freed_memory()
    stop = stop_on_signals()
    process = NodeProcess(settings, services)
    endpoints = process.start()
    if on_ready is not None:
        on_ready(endpoints)
    stop.wait()
    stop.clear()
    leaving = threading.Thread(target=process.leave, name="leaving", daemon=True)
    leaving.start()
    while leaving.is_alive() and not stop.is_set():
        leaving.join(0.1)


def stop_on_signals() -> threading.Event:
    """An event that SIGINT and SIGTERM set; for the main thread."""
    stop = threading.Event()

    def handle(number: int, where: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop
