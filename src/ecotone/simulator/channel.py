"""One directed link of the virtual world: a server with a rate, three priority queues, and what a script does to it.

A frame is not interrupted; it arrives `latency_s` after its last byte left. Rate and latency may follow a LinkTrace, where a
rate of 0 is an outage: a frame waits until bytes flow again. A link may be blocked for several reasons at once (a cut, a
partition, a dead end), and carries once none is left. Frame faults (lost, repeated, late, damaged) come from a seeded
generator; a damaged frame does not pass the frame check, so it is lost as well.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ecotone.cluster import Link
from ecotone.linktrace import LinkTrace
from ecotone.protocol.message import LinkMessage, NodeId
from ecotone.units import EcotoneError

__all__ = ["Channel", "FrameFaults", "paths", "sent_at"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFaults:
    """Share of frames that are lost, repeated, damaged; and by how much at most a frame is late (which reorders them)."""

    drop: float = 0.0
    duplicate: float = 0.0
    truncate: float = 0.0
    late_s: float = 0.0


class Shared(Protocol):
    """What several links share (medium.py), as one of them sees it."""

    def send(self, pair: tuple[NodeId, NodeId], size_bytes: float, done: Callable[[], None]) -> None: ...
    def drop(self, channel: Channel) -> None: ...
    def changed(self) -> None: ...


@dataclass(slots=True)
class Channel:
    """State of one directed link; the world moves the frames. With a `medium`, that says when a frame has left."""

    latency_s: float
    rate_bytes_per_s: float
    queues: tuple[deque[tuple[LinkMessage, int]], ...] = field(default_factory=lambda: (deque(), deque(), deque()))
    free_s: float = 0.0  # the frame under way has left by then
    is_waking: bool = False  # the world will look here at free_s
    blocks: set[str] = field(default_factory=set)  # why nothing passes
    flight: int = 0  # frames of an earlier flight are lost on their way
    blocked_s: float = -math.inf  # frames that had not left by then are lost
    num_bytes: int = 0
    busy_s: float = 0.0
    faults: FrameFaults | None = None
    random: Callable[[], float] | None = None
    trace: LinkTrace | None = None
    trace_from_s: float = 0.0
    medium: Shared | None = None

    @property
    def is_cut(self) -> bool:
        return bool(self.blocks)

    def block(self, reason: str, now_s: float, *, lose_flying: bool = True) -> None:
        """Nothing passes while `reason` holds; what waits is lost, and what is on its way too unless it is spared."""
        self.blocks.add(reason)
        self.blocked_s, self.free_s, self.is_waking = now_s, now_s, False
        if lose_flying:
            self.flight += 1
        for queue in self.queues:
            queue.clear()
        if self.medium is not None:
            self.medium.drop(self)

    def next_frame(self) -> tuple[LinkMessage, int] | None:
        for queue in self.queues:
            if queue:
                return queue.popleft()
        return None

    def leaves_s(self, size_bytes: int, now_s: float) -> float:
        """When the last byte of a frame that starts now has left; infinite where no byte will flow again."""
        if self.trace is None:
            return now_s + size_bytes / self.rate_bytes_per_s
        return self.trace_from_s + sent_at(self.trace, size_bytes, now_s - self.trace_from_s)

    def arrivals(self, leaves_s: float) -> tuple[float, ...]:
        """When copies of a frame that has left at `leaves_s` arrive: none for a lost one, two for a repeated one."""
        faults, point = self.faults, self.trace.at(leaves_s - self.trace_from_s) if self.trace else None
        latency_s = point.latency_s if point else self.latency_s
        if faults is None and not (point and point.loss):
            return (leaves_s + latency_s,)
        random = self.random
        assert random is not None
        if point and point.loss and random() < point.loss:
            return ()
        if faults is None:
            return (leaves_s + latency_s,)
        if random() < faults.drop + faults.truncate:
            return ()
        first = leaves_s + latency_s + faults.late_s * random()
        if random() < faults.duplicate:
            return first, leaves_s + latency_s + faults.late_s * random()
        return (first,)

    def seed(self, *numbers: int) -> None:
        """Draw the fate of frames from these numbers."""
        self.random = np.random.default_rng(numbers).random


def sent_at(trace: LinkTrace, size_bytes: float, start_s: float) -> float:
    """When `size_bytes` that begin at `start_s` of the trace have left; infinite where the trace carries nothing at all."""
    points, duration_s = trace.points, trace.duration_s
    whole = math.floor(start_s / duration_s)
    now_s, left = start_s - whole * duration_s, float(size_bytes)
    index = bisect.bisect_right(points, now_s, key=lambda p: p.time_s) - 1
    carried = 0.0
    while True:
        rate = points[index].bytes_per_s
        end_s = points[index + 1].time_s if index + 1 < len(points) else duration_s
        if rate > 0 and now_s + left / rate <= end_s:
            return whole * duration_s + now_s + left / rate
        left -= rate * (end_s - now_s)
        carried += rate
        now_s, index = end_s, index + 1
        if index == len(points):
            if carried == 0 and not any(p.bytes_per_s for p in points):
                return math.inf
            now_s, index, whole = 0.0, 0, whole + 1


def paths(names: tuple[NodeId, ...], links: tuple[Link, ...]) -> dict[tuple[NodeId, NodeId], tuple[float, float]]:
    """(latency, rate) of every ordered pair: of its own link, else of the path of least latency (Floyd-Warshall)."""
    best = {(NodeId(k.source), NodeId(k.target)): (k.latency_s, k.bandwidth_bytes_per_s) for k in links}
    direct = dict(best)
    pairs = [(one, other) for one in names for other in names if one != other]
    if all(pair in direct for pair in pairs):
        return {pair: direct[pair] for pair in pairs}
    hops = {NodeId(end) for k in links for end in (k.source, k.target)}
    for middle in sorted(hops):
        for one in sorted(hops):
            for other in sorted(hops):
                first, second = best.get((one, middle)), best.get((middle, other))
                if one != other and first and second and first[0] + second[0] < best.get((one, other), (math.inf, 0.0))[0]:
                    best[one, other] = (first[0] + second[0], min(first[1], second[1]))
    for one, other in pairs:
        if (one, other) not in best:
            raise EcotoneError(f"no path of links leads from {one} to {other}; add a link to the cluster")
    return {pair: direct.get(pair, best[pair]) for pair in pairs}
