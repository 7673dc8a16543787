"""The machines of a laboratory without root: node processes of this computer whose wire and lanes imitate links and speed.

The same verbs as with namespaces, and what differs is said in REMARKS. A cut is a link so slow that nothing arrives:
connections stay, so nobody sees a peer go down, only its silence. Each node ends with the supervisor.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ecotone import schema
from ecotone.lab.commands import LabError
from ecotone.lab.machines import cluster_toml, member_cluster
from ecotone.lab.network import LinkNow
from ecotone.lab.state import LabState, process_id, save_state
from ecotone.runtime.children import Child, ChildError
from ecotone.runtime.launch import links_from

__all__ = ["CUT_BYTES_PER_S", "REMARKS", "UserMachines"]

CUT_BYTES_PER_S = 1e-3
START_S = 90.0
REMARKS = (
    "processes of this computer instead of machines: no namespaces, loopback without TLS",
    "jitter and loss of links are not imitated, traces give rate and latency only",
    "a slower machine waits after computing (its slowdown) instead of getting less CPU; memory is not limited",
    "a cut holds messages back while connections stay: nobody sees a peer go down, only its silence",
    "links that leave the source are shaped in the asker's own process, so verbs act on them only from the Python interface",
)


class UserMachines:
    """Node processes with shaped wires; the same methods as KernelMachines."""

    def __init__(self, state: LabState):
        ports = _free_ports(len(state.machines))
        machines = tuple(replace(machine, port=port) for machine, port in zip(state.machines, ports, strict=True))
        self.state = replace(state, machines=machines)
        self._children: dict[str, Child] = {}
        self._links: dict[tuple[str, str], LinkNow] = {}
        self._stopped: set[str] = set()
        self._killed: set[str] = set()

    def build(self, links: Iterable[LinkNow]) -> None:
        """Start a node for every device but the source; raises ChildError."""
        self._links = {(link.source, link.target): link for link in links}
        cluster = member_cluster(self.state)
        devices = tuple(
            replace(device, slowdown=old.slowdown)
            for device, old in zip(cluster.devices, self.state.cluster.devices, strict=True)
        )
        cluster = replace(cluster, devices=devices, emulate=True)
        schema.write_aside(Path(self.state.folder) / "cluster.toml", cluster_toml(cluster))
        for device in cluster.devices:
            if device.name != cluster.source:
                self._spawn(device.name)
        for name in self._children:
            self._configure(name)

    def start(self, device: str) -> None:
        """Start the node of `device` again, where it was."""
        if self._child(device).is_alive:
            raise LabError(f'machine "{device}" is up already; kill it first')
        self._spawn(device)
        self._configure(device)
        for link in self._links.values():
            if link.source == device:
                self._tell(link)

    def poll(self) -> dict[str, str]:
        """What each machine is: up, stopped or ended: why."""
        found = {}
        for name, child in self._children.items():
            up = "stopped" if name in self._stopped else "up"
            why = "killed" if name in self._killed else child.last_words()
            found[name] = up if child.is_alive else f"ended: {why}"
        return found

    def signal(self, device: str, number: int) -> None:
        """Send the node of `device` a signal; raises LabError."""
        child = self._child(device)
        if not child.is_alive:
            raise LabError(f'machine "{device}" is not running; ecotone lab restart {device}')
        if number == signal.SIGKILL:
            child.kill()
            self._killed.add(device)
            self._note(device)
        else:
            os.kill(child.pid, number)
        (self._stopped.add if number == signal.SIGSTOP else self._stopped.discard)(device)
        if number == signal.SIGCONT:  # what changed while it could not listen
            for link in self._links.values():
                if link.source == device:
                    self._tell(link)

    def slow(self, device: str, slowdown: float) -> None:
        raise LabError(
            f'machine "{device}": without root its speed cannot be changed while it runs; set slowdown in the file'
        )

    def set_links(self, links: Iterable[LinkNow]) -> None:
        """Change links that leave nodes; those of the source are the asker's own to change."""
        for link in links:
            self._links[link.source, link.target] = link
            if link.source in self._children and self._children[link.source].is_alive and link.source not in self._stopped:
                self._tell(link)

    def counters(self) -> dict[tuple[str, str], dict[str, int]]:
        return {}

    @property
    def slowdowns(self) -> dict[str, float]:
        return {str(device.name): device.slowdown for device in self.state.cluster.devices}

    def close(self) -> None:
        for child in self._children.values():
            if child.is_alive:
                child.kill()

    def _child(self, device: str) -> Child:
        self.state.machine(device)
        if device not in self._children:
            raise LabError(
                f'"{device}" is the source: it has no node, commands run there (ecotone lab exec {device} -- ...)'
            )
        return self._children[device]

    def _spawn(self, device: str) -> None:
        threads = str(self.state.cluster.device(device).threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._killed.discard(device)
        self._children[device] = Child(device, ("-m", "ecotone.runtime.node_main"), environment)
        self._note(device)

    def _configure(self, device: str) -> None:
        """Give the process its settings; the nodes that run already are those it connects to."""
        machine, child = self.state.machine(device), self._children[device]
        child.ask(None, START_S)
        connect = [f"127.0.0.1:{self.state.machine(n).port}" for n in self._alive() if n != device]
        settings = {
            "device": schema.write(self.state.cluster.device(device)),
            "links": schema.write(links_from(self.state.cluster, machine.device)),
            "folder": str(Path(self.state.cache) / device), "cluster": self.state.cluster.name,
            "listen": [f"127.0.0.1:{machine.port}"], "connect": connect, "emulate": True, "cap_bytes": 8 << 30,
            "insist": False,
        }  # fmt: skip
        end = time.monotonic() + 5.0
        while True:
            try:
                child.ask({"settings": settings}, START_S)
                return
            except ChildError:  # the port of one that was killed may be in use for a moment
                if time.monotonic() > end:
                    raise
                self._spawn(device)
                child = self._children[device]
                child.ask(None, START_S)

    def _alive(self) -> list[str]:
        return [name for name, child in self._children.items() if child.is_alive]

    def _tell(self, link: LinkNow) -> None:
        rate = link.bytes_per_s if link.passes else CUT_BYTES_PER_S
        change = {"peer": link.target, "bytes_per_s": rate, "latency_s": link.latency_s}
        self._children[link.source].ask({"link": change}, 10.0)

    def _note(self, device: str) -> None:
        child = self._children[device]
        self.state = self.state.with_process(device, process_id(child.pid) if child.is_alive else None)
        save_state(self.state)


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago: chosen together, so that none comes twice."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
