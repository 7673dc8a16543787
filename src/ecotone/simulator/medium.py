"""What several links of the virtual world share: frames under way whose rates change as others start and end.

A frame that starts, ends or is lost changes the rates of all that are under way at once; each keeps the bytes that it has
sent. Two kinds: wires of a stated capacity (max-min fair shares, by progressive filling: all rise together, one stops where
its link or a wire it passes is full), and a radio cell (radio.py, equation 1, with everyone's channel and power). A medium
decides nothing about frames: the world starts them one at a time on each link. O(frames under way * wires) a change.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ecotone.cluster import Cluster
from ecotone.media import RadioCell, SharedWire, Tuning
from ecotone.protocol.message import NodeId
from ecotone.simulator.channel import Channel
from ecotone.units import EcotoneError

__all__ = ["Airwaves", "Medium", "Wires", "default_tunings", "fair_rates", "media_of"]

Pair = tuple[NodeId, NodeId]


class Clock(Protocol):
    """The part of a world that a medium needs."""

    now_s: float

    def at(self, time_s: float, action: Callable[..., None], *args: Any) -> None: ...


@dataclass(slots=True)
class _Flow:
    left_bytes: float
    done: Callable[[], None]
    rate: float = 0.0


class Medium(ABC):
    """`pairs`: the links that share it. Subclasses say `rates` (bytes/s) of links that send at the same time."""

    def __init__(self, name: str, pairs: Iterable[Pair]) -> None:
        self.name, self.pairs = name, tuple(pairs)
        self.busy_s = 0.0  # some frame under way
        self._flows: dict[Pair, _Flow] = {}
        self._changed_s = 0.0
        self._version = 0
        self._clock: Clock
        self._channels: dict[Pair, Channel]

    def join(self, clock: Clock, channels: Mapping[Pair, Channel]) -> None:
        """Take these links of a world over."""
        self._clock = clock
        self._channels = {pair: channels[pair] for pair in self.pairs if pair in channels}
        for channel in self._channels.values():
            channel.medium = self

    @abstractmethod
    def rates(self, sending: Sequence[Pair]) -> Sequence[float]:
        """Bytes per second of each of these, while they all send."""

    def send(self, pair: Pair, size_bytes: float, done: Callable[[], None]) -> None:
        """A frame starts on this link, which is idle; `done` once its last byte has left."""
        self._pass_time()
        self._flows[pair] = _Flow(size_bytes, done)
        self._go_on()

    def drop(self, channel: Channel) -> None:
        """The frame under way on this link, if any, is lost."""
        gone = [pair for pair, own in self._channels.items() if own is channel and pair in self._flows]
        if gone:
            self._pass_time()
            del self._flows[gone[0]]
            self._go_on()

    def changed(self) -> None:
        """A link has another rate of its own."""
        self._pass_time()
        self._go_on()

    def _pass_time(self) -> None:
        passed_s = self._clock.now_s - self._changed_s
        self._changed_s = self._clock.now_s
        if self._flows:
            self.busy_s += passed_s
        for flow in self._flows.values():
            flow.left_bytes = max(0.0, flow.left_bytes - flow.rate * passed_s)

    def _go_on(self) -> None:
        self._version += 1
        if not self._flows:
            return
        pairs = list(self._flows)
        wait_s, first = math.inf, []
        for pair, rate in zip(pairs, self.rates(pairs), strict=True):
            flow = self._flows[pair]
            flow.rate = rate
            own_s = flow.left_bytes / rate if rate > 0 else math.inf
            if own_s < wait_s:
                wait_s, first = own_s, [pair]
            elif own_s == wait_s:
                first.append(pair)
        if math.isfinite(wait_s):
            self._clock.at(self._clock.now_s + wait_s, self._due, self._version, tuple(first))

    def _due(self, version: int, pairs: tuple[Pair, ...]) -> None:
        if version != self._version:
            return
        self._pass_time()
        ended = [self._flows.pop(pair) for pair in pairs]
        self._go_on()
        for flow in ended:
            flow.done()


class Wires(Medium):
    """All shared wires of a cluster together, since a link may pass several: max-min fair shares."""

    def __init__(self, wires: Sequence[SharedWire], pairs: Iterable[Pair]) -> None:
        self._capacity = [w.bandwidth_bytes_per_s for w in wires]
        carried = {pair: [i for i, w in enumerate(wires) if w.carries(*pair)] for pair in pairs}
        self._wires = {pair: found for pair, found in carried.items() if found}
        super().__init__(", ".join(w.name for w in wires), self._wires)

    def rates(self, sending: Sequence[Pair]) -> Sequence[float]:
        own = [self._channels[pair].rate_bytes_per_s for pair in sending]
        return fair_rates(own, [self._wires[pair] for pair in sending], self._capacity)


def fair_rates(own: Sequence[float], passes: Sequence[Sequence[int]], capacity: Sequence[float]) -> list[float]:
    """Max-min fair rates of flows with rates of their `own`, each of which passes some wires of `capacity` (by number)."""
    rate, spare = [0.0] * len(own), list(capacity)
    rising = list(range(len(own)))
    while rising:
        sharers = [0] * len(spare)
        for flow in rising:
            for wire in passes[flow]:
                sharers[wire] += 1
        rises = [room / n if n else math.inf for room, n in zip(spare, sharers, strict=True)]
        step = max(0.0, min(min(rises, default=math.inf), min(own[flow] - rate[flow] for flow in rising)))
        for flow in rising:
            rate[flow] += step
            for wire in passes[flow]:
                spare[wire] -= step
        full = {wire for wire, rise in enumerate(rises) if rise <= step * (1 + 1e-12)}
        rising = [f for f in rising if rate[f] < own[f] * (1 - 1e-12) and full.isdisjoint(passes[f])]
    return rate


class Airwaves(Medium):
    """A radio cell: everyone's rate under the interference of those that send on the same channel just then."""

    def __init__(self, cell: RadioCell, tunings: Mapping[str, Tuning]) -> None:
        super().__init__(cell.name, [(NodeId(a), NodeId(b)) for a, b in cell.links])
        self._width_hz, self._noise_watt = cell.width_hz, cell.noise_watt
        self._channel, self._heard_watt = {}, {}
        for sender, pair in zip(cell.sender, self.pairs, strict=True):
            tuning = tunings[sender.device]
            if not (0 <= tuning.channel < cell.num_channels and 0 < tuning.watt <= sender.max_watt * (1 + 1e-9)):
                where = f"radio {cell.name}: {sender.device}"
                limit = f"channel must be below {cell.num_channels}, power at most {sender.max_watt:g} W"
                raise EcotoneError(f"{where} on channel {tuning.channel} with {tuning.watt:g} W: {limit}")
            self._channel[pair] = tuning.channel
            self._heard_watt[pair] = tuning.watt * sender.distance_m**-cell.path_loss_exponent

    def rates(self, sending: Sequence[Pair]) -> Sequence[float]:
        total: dict[int, float] = {}
        for pair in sending:
            channel = self._channel[pair]
            total[channel] = total.get(channel, 0.0) + self._heard_watt[pair]
        found = []
        for pair in sending:
            own = self._heard_watt[pair]
            noise = self._noise_watt + max(total[self._channel[pair]] - own, 0.0)
            found.append(self._width_hz * math.log2(1.0 + own / noise) / 8)
        return found


def default_tunings(cell: RadioCell) -> dict[str, Tuning]:
    """Channels in turn, everyone at full power: what a cell does without a plan."""
    return {s.device: Tuning(channel=i % cell.num_channels, watt=s.max_watt) for i, s in enumerate(cell.sender)}


def media_of(cluster: Cluster, pairs: Iterable[Pair], tunings: Mapping[str, Tuning] | None = None) -> tuple[Medium, ...]:
    """The media of a cluster that any of these links passes; `tunings` by sender, the default where one is missing.

    Raises EcotoneError for a tuning that its cell does not have, or a link that follows a trace and shares a medium.
    """
    known = set(pairs)
    media: list[Medium] = []
    if cluster.shared:
        media.append(Wires(cluster.shared, sorted(known)))
    for cell in cluster.radios:
        chosen = default_tunings(cell) | {
            d: t for d, t in (tunings or {}).items() if any(s.device == d for s in cell.sender)
        }
        media.append(Airwaves(cell, chosen))
    media = [medium for medium in media if known.intersection(medium.pairs)]
    for link in cluster.links:
        for medium in media:
            if link.trace and (NodeId(link.source), NodeId(link.target)) in medium.pairs:
                what = f"link {link.source}>{link.target} follows a trace and is part of {medium.name}"
                raise EcotoneError(f"{what}; a simulation has either")
    return tuple(media)
