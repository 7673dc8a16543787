"""The network of kernel machines: one namespace each, tied by our TUN relay, or by a bridge where the kernel can delay.

Rates are the kernel's in both: htb on each machine's interface, one class for each machine it talks to. The sender feels a
full link at once (its TCP stops at about a millisecond of queue), and what still waits is bounded by QUEUE_S of the link's
time. Delay, jitter, loss and cuts are rules of the relay (relay.py), or leaves of the class: netem, or blackhole for a cut.
Machines without a link of the cluster file cannot talk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ecotone.cluster import Link
from ecotone.lab.commands import ip, run, tc, try_run
from ecotone.lab.relaying import RelayProcess
from ecotone.lab.state import LabState, Machine

__all__ = ["LinkNow", "Network", "root_interfaces", "stopped"]

QUEUE_S = 0.1
"""What may wait for a link, in seconds of that link's time; at least MIN_QUEUE_PACKETS."""
MIN_QUEUE_PACKETS = 10
UNLIMITED = 1.25e9  # bytes per second: what matches no class of ours (ARP) is not slowed


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkNow:
    """A directed link as it is now. `is_cut` by a verb, `is_out` by the trace's outage; a rate of 0 is an outage too."""

    source: str
    target: str
    bytes_per_s: float
    latency_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    is_cut: bool = False
    is_out: bool = False
    trace: str = ""

    @staticmethod
    def of(link: Link) -> LinkNow:
        return LinkNow(
            source=link.source, target=link.target, bytes_per_s=link.bandwidth_bytes_per_s, latency_s=link.latency_s,
            jitter_s=link.jitter_s, loss=link.loss,
        )  # fmt: skip

    @property
    def passes(self) -> bool:
        return not self.is_cut and not self.is_out


class Network:
    """Namespaces and links of one laboratory. `build`, then `set_links`; what it made is found again by the state file."""

    def __init__(self, state: LabState, *, netem: bool):
        self._state, self._netem = state, netem
        self._machines = {str(machine.device): machine for machine in state.machines}
        self._relay: RelayProcess | None = None
        self._leaves: dict[tuple[str, str], str] = {}

    def build(self, links: Iterable[LinkNow]) -> None:
        """Make namespaces, interfaces and shapes; raises LabError, leaving the rest to whoever cleans up."""
        machines = self._state.machines
        for machine in machines:
            if machine.namespace:
                ip(f"netns add {machine.namespace}")
        if self._state.fabric == "relay":
            addresses = [machine.address for machine in machines]
            self._relay = RelayProcess([machine.interface for machine in machines], addresses, self._state.seed)
        else:
            self._build_bridge()
        for machine in machines:
            if machine.namespace and self._state.fabric == "relay":
                ip(f"link set {machine.interface} netns {machine.namespace}")
            self._open(machine)
        known = {(link.source, link.target): link for link in links}
        for machine in machines:
            tc(machine.namespace, self._classes(machine, known))
        self._rule(known.values())

    def set_links(self, links: Iterable[LinkNow]) -> None:
        """Change links now; two calls must not overlap. Raises LabError."""
        changed = list(links)
        by_source: dict[str, list[str]] = {}
        for link in changed:
            by_source.setdefault(link.source, []).extend(self._changes(link))
        for source, lines in by_source.items():
            tc(self._machines[source].namespace, lines)
        self._rule(changed)

    def counters(self) -> dict[tuple[str, str], dict[str, int]]:
        """Packets and bytes that passed, and what was dropped and why, of each directed link."""
        if self._relay is not None:
            names = [machine.device for machine in self._state.machines]
            return {(names[s], names[t]): counts for s, t, counts in self._relay.counters()}
        found: dict[tuple[str, str], dict[str, int]] = {}
        for machine in self._state.machines:
            place = ["-n", machine.namespace] if machine.namespace else []
            told = try_run(["tc", *place, "-s", "-j", "class", "show", "dev", machine.interface])
            for entry in json.loads(told) if isinstance(told, str) and told.strip() else []:
                for other in self._state.machines:
                    if entry.get("handle") == f"1:{_minor(other)}":
                        found[machine.device, other.device] = _class_counters(entry)
        return found

    @property
    def is_alive(self) -> bool:
        return self._relay is None or self._relay.is_alive

    def close(self) -> None:
        """End the relay, and its TUN devices with it; the rest is cleaned up by the state file."""
        if self._relay is not None:
            self._relay.close()

    def _build_bridge(self) -> None:
        hub = self._state.hub
        ip(f"netns add {hub}")
        run(["ip", "-n", hub, "link", "add", "hub", "type", "bridge"])
        run(["ip", "-n", hub, "link", "set", "hub", "up"])
        for machine in self._state.machines:
            there = f"eh{machine.interface[2:]}"
            ip(f"link add {machine.interface} type veth peer name {there}", f"link set {there} netns {hub}")
            if machine.namespace:
                ip(f"link set {machine.interface} netns {machine.namespace}")
            run(["ip", "-n", hub, "link", "set", there, "master", "hub", "up"])

    def _open(self, machine: Machine) -> None:
        place = ["-n", machine.namespace] if machine.namespace else []
        length = self._state.subnet.rpartition("/")[2]
        lines = [
            f"addr add {machine.address}/{length} dev {machine.interface}",
            f"link set {machine.interface} mtu {self._state.mtu}",
            f"link set {machine.interface} up",
        ]
        if machine.namespace:
            lines.append("link set lo up")
        run(["ip", *place, "-batch", "-"], "\n".join(lines) + "\n")

    def _classes(self, machine: Machine, links: dict[tuple[str, str], LinkNow]) -> Iterable[str]:
        """The lines of tc that give an interface its classes."""
        device = f"dev {machine.interface}"
        yield f"qdisc add {device} root handle 1: htb default ffff"
        yield f"class add {device} parent 1: classid 1:ffff htb rate {_bits(UNLIMITED)} quantum {self._state.mtu}"
        for other in self._state.machines:
            if other.device == machine.device:
                continue
            link = links.get((machine.device, other.device))
            rate = link.bytes_per_s if link is not None else UNLIMITED
            yield f"class add {device} parent 1: classid 1:{_minor(other)} {self._htb(rate)}"
            leaf = self._leaf(link)
            self._leaves[machine.device, other.device] = leaf
            yield f"qdisc add {device} parent 1:{_minor(other)} handle {_minor(other)}: {leaf}"
            match = f"u32 match ip dst {other.address}/32 flowid 1:{_minor(other)}"
            yield f"filter add {device} parent 1: protocol ip prio 1 {match}"

    def _changes(self, link: LinkNow) -> Iterable[str]:
        """The lines of tc that bring a class and its leaf to `link`; only what differs."""
        here, there = self._machines[link.source], self._machines[link.target]
        device, minor = f"dev {here.interface}", _minor(there)
        if link.bytes_per_s > 0:
            yield f"class change {device} parent 1: classid 1:{minor} {self._htb(link.bytes_per_s)}"
        leaf, before = self._leaf(link), self._leaves[link.source, link.target]
        if leaf != before:
            verb = "change" if leaf.split()[0] == before.split()[0] else "replace"
            yield f"qdisc {verb} {device} parent 1:{minor} handle {minor}: {leaf}"
            self._leaves[link.source, link.target] = leaf

    def _htb(self, bytes_per_s: float) -> str:
        burst = max(2 * self._state.mtu, round(bytes_per_s * 0.001))
        quantum = max(self._state.mtu, 1500)
        return f"htb rate {_bits(bytes_per_s)} burst {burst}b cburst {burst}b quantum {quantum}"

    def _leaf(self, link: LinkNow | None) -> str:
        """The queue of a class. With the relay all but the rate happens there."""
        if link is None:
            return "blackhole"
        queue = max(round(link.bytes_per_s * QUEUE_S), MIN_QUEUE_PACKETS * self._state.mtu)
        if self._relay is not None:
            return f"bfifo limit {queue}"
        if not link.passes:
            return "blackhole"
        if not self._netem or not (link.latency_s or link.jitter_s or link.loss):
            return f"bfifo limit {queue}"
        packets = round((queue + link.bytes_per_s * link.latency_s) / self._state.mtu) + MIN_QUEUE_PACKETS
        words = [f"netem limit {packets} delay {link.latency_s * 1e3:.3f}ms"]
        if link.jitter_s:
            words.append(f"{link.jitter_s * 1e3:.3f}ms distribution normal")
        if link.loss:
            words.append(f"loss {link.loss * 100:.4f}%")
        return " ".join(words)

    def _rule(self, links: Iterable[LinkNow]) -> None:
        if self._relay is not None:
            number = {str(machine.device): machine.number for machine in self._state.machines}
            self._relay.set_rules(
                {
                    "source": number[link.source], "target": number[link.target], "latency_s": link.latency_s,
                    "jitter_s": link.jitter_s, "loss": link.loss, "cut": not link.passes,
                }
                for link in links
            )  # fmt: skip


def stopped(link: LinkNow) -> LinkNow:
    """`link` with a rate of 0 written as what it is: an outage at the last rate."""
    return replace(link, is_out=True) if link.bytes_per_s <= 0 else link


def root_interfaces(state: LabState) -> tuple[str, ...]:
    """Interfaces of ours that may be in this namespace: the source's, and those not yet moved when something failed."""
    names = [name for m in state.machines if m.interface for name in (m.interface, f"eh{m.interface[2:]}")]
    return tuple(name for name in names if (Path("/sys/class/net") / name).exists())


def _minor(machine: Machine) -> str:
    return f"{machine.number + 16:x}"


def _bits(bytes_per_s: float) -> str:
    return f"{max(8, round(bytes_per_s * 8))}bit"


def _class_counters(entry: dict[str, Any]) -> dict[str, int]:
    stats = entry.get("stats", entry)
    return {"packets": int(stats.get("packets", 0)), "bytes": int(stats.get("bytes", 0)), "lost": int(stats.get("drops", 0))}
