"""The TUN relay: one process that carries every packet between emulated machines, with delay, jitter, loss, rate and cuts.

For kernels without netem. Run as a script, by path, with nothing but the standard library. First line in:
{"interfaces": [name, ...], "addresses": [IPv4, ...], "seed": 1}; it makes the TUN devices and answers {"ready": true}; the
lab then moves them into namespaces (the descriptors stay here and go on working). Then {"rules": [{"source": 0, "target":
1, ...Rule}]} and {"counters": true}, each answered by one line. The end of input ends it, and the TUN devices with it.

A packet from machine s to machine t (t by destination address, s by the interface it came from) follows the rule of (s, t);
without a rule it is dropped. In this order: cut drops; loss drops by a generator seeded by (seed, s, t); rate keeps the
instant at which the link becomes free, and drops what would wait longer than `queue_s`; then latency and jitter. Jitter is
a Gaussian offset that holds for JITTER_HOLD_S and never reorders: links are first in, first out. Same seed and same order of
packets give the same losses, but the order is up to the kernel: exact repetition belongs to the simulator.

Cost: O(log n) a packet, n packets in flight; about 10 microseconds each, so some 500 Mbit/s at MTU 1500.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import Any

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MAX_PACKET_BYTES = 65600
BURST_PACKETS = 32  # read from one machine before the others have their turn
JITTER_HOLD_S = 0.010


@dataclass(slots=True)
class Rule:
    """One ordered pair: what happens to its packets, and what has. `rate` is in bytes per second, 0 for no limit."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    rate: float = 0.0
    queue_s: float = 0.1
    cut: bool = False
    packets: int = 0
    bytes: int = 0
    lost: int = 0
    overflowed: int = 0
    cut_off: int = 0
    draw: random.Random = field(default_factory=random.Random)
    free_s: float = 0.0
    last_due_s: float = 0.0
    offset_s: float = 0.0
    offset_until_s: float = 0.0

    def due_s(self, size: int, now: float) -> float | None:
        """When a packet of `size` bytes that arrives `now` leaves; None: it is dropped."""
        if self.cut:
            self.cut_off += 1
            return None
        if self.loss and self.draw.random() < self.loss:
            self.lost += 1
            return None
        departure = now
        if self.rate:
            start = max(now, self.free_s)
            if start - now > self.queue_s:
                self.overflowed += 1
                return None
            departure = self.free_s = start + size / self.rate
        if self.jitter_s and now >= self.offset_until_s:
            self.offset_s = self.draw.gauss(0.0, self.jitter_s)
            self.offset_until_s = now + JITTER_HOLD_S
        offset = self.offset_s if self.jitter_s else 0.0
        due = self.last_due_s = max(departure + max(0.0, self.latency_s + offset), self.last_due_s)
        self.packets += 1
        self.bytes += size
        return due

    def change(self, values: dict[str, Any], now: float) -> None:
        """Take new values now; packets on their way keep the time that they were given, later ones may not pass them."""
        for name in ("latency_s", "jitter_s", "loss", "rate", "queue_s"):
            if name in values:
                setattr(self, name, float(values[name]))
        if "cut" in values:
            self.cut = bool(values["cut"])
        self.free_s = min(self.free_s, now + self.queue_s)

    def counters(self) -> dict[str, int]:
        return {
            "packets": self.packets, "bytes": self.bytes, "lost": self.lost, "overflowed": self.overflowed,
            "cut_off": self.cut_off,
        }  # fmt: skip


class Relay:
    """Packets between TUN devices; `serve` runs until its input ends."""

    def __init__(self, interfaces: list[str], addresses: list[str], seed: int):
        self._devices = [open_tun(name) for name in interfaces]
        self._number = {handle: number for number, handle in enumerate(self._devices)}
        self._targets = {socket.inet_aton(text): number for number, text in enumerate(addresses)}
        self._seed = seed
        self.rules: dict[tuple[int, int], Rule] = {}
        self._flight: list[tuple[float, int, int, bytes]] = []
        self._count = 0

    def take(self, source: int, packet: bytes, now: float) -> None:
        """One packet that machine `source` sent."""
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return
        target = self._targets.get(packet[16:20])
        rule = None if target is None else self.rules.get((source, target))
        if target is None or rule is None:
            return
        due = rule.due_s(len(packet), now)
        if due is not None:
            self._count += 1
            heapq.heappush(self._flight, (due, self._count, self._devices[target], packet))

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command of the lab; raises KeyError or ValueError for one that is not understood."""
        if "rules" in command:
            now = time.monotonic()
            for values in command["rules"]:
                pair = (int(values["source"]), int(values["target"]))
                if pair not in self.rules:
                    self.rules[pair] = Rule(draw=random.Random(f"{self._seed}:{pair[0]}:{pair[1]}"))
                self.rules[pair].change(values, now)
            return {"ruled": len(command["rules"])}
        if "counters" in command:
            return {"counters": [[*pair, rule.counters()] for pair, rule in sorted(self.rules.items())]}
        raise ValueError("a command is rules or counters")

    def serve(self, control: int, answer: int) -> None:
        """Carry packets and obey commands until `control` ends."""
        os.set_blocking(control, False)
        poll = select.epoll()
        for handle in (*self._devices, control):
            poll.register(handle, select.EPOLLIN)
        waiting = b""
        while True:
            now = time.monotonic()
            self._deliver(now)
            pause = max(0.0, self._flight[0][0] - now) if self._flight else None
            # epoll counts in milliseconds; select, which knows microseconds, waits on it instead.
            if not select.select([poll], [], [], pause)[0]:
                continue
            for handle, _ in poll.poll(0):
                if handle != control:
                    self._read(handle)
                    continue
                part = os.read(control, 1 << 20)
                if not part:
                    return
                *lines, waiting = (waiting + part).split(b"\n")
                for line in lines:
                    self._answer(line, answer)

    def _read(self, handle: int) -> None:
        source = self._number[handle]
        for _ in range(BURST_PACKETS):
            try:
                packet = os.read(handle, MAX_PACKET_BYTES)
            except OSError:  # nothing more, or the device is not up yet
                return
            self.take(source, packet, time.monotonic())

    def _deliver(self, now: float) -> None:
        while self._flight and self._flight[0][0] <= now:
            _, _, handle, packet = heapq.heappop(self._flight)
            try:
                os.write(handle, packet)
            except OSError:  # the machine's interface is down: the packet is lost, as on a real cable
                continue

    def _answer(self, line: bytes, answer: int) -> None:
        try:
            reply = self.obey(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            reply = {"failed": f"relay: {type(error).__name__}: {error}"}
        os.write(answer, json.dumps(reply).encode() + b"\n")


def open_tun(name: str) -> int:
    """Make the TUN device `name` and return its non-blocking descriptor; raises OSError."""
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(handle, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return handle


def main() -> int:
    """Read the first line, make the devices, serve; 1 where a device cannot be made."""
    first = b""
    while not first.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            return 0
        first += part
    settings = json.loads(first)
    try:
        relay = Relay(settings["interfaces"], settings["addresses"], int(settings["seed"]))
    except OSError as error:
        os.write(1, json.dumps({"failed": f"relay: /dev/net/tun: {error}"}).encode() + b"\n")
        return 1
    with contextlib.suppress(OSError):  # packets go before computing, or delays would be noise
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    os.write(1, b'{"ready": true}\n')
    relay.serve(0, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
