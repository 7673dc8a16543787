"""Link emulation in user space: a wrapper round any wire that gives each directed link a rate and a latency.

A frame of b bytes sent on an idle link arrives latency + b / rate later. Frames of one priority keep their order; a frame of
a higher priority overtakes queued ones at once and the one being serialised at its next slice (5 ms of the link's time),
as packets do on a router with priority queues. Nothing is dropped for length: the sender's credit bounds the queue.

The link is computed, not stepped: each lane keeps the instant at which its link becomes free, so a thread that wakes late
sends late by that much once and the error does not add up; between two events the thread sleeps. A small frame that
needs less than AT_ONCE_S on an idle link without latency goes at once. `set_link` acts on the
frame under way. What it does not imitate: loss, jitter, TCP's slow start, and the sharing of one radio by several peers.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ecotone.units import EcotoneError
from ecotone.wire.wire import Frame, Handler, NodeId, PeerDown, Priority, Wire, WireError, WireEvent

__all__ = ["UNSHAPED", "LinkShape", "ShapedWire"]

SLICE_S = 0.005
AT_ONCE_S = 1e-4
SLICE_MIN_BYTES = 1500
SLICE_MAX_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkShape:
    """One direction of a link: `bytes_per_s` (None is unlimited) and `latency_s`."""

    bytes_per_s: float | None = None
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_s is not None and not (math.isfinite(self.bytes_per_s) and self.bytes_per_s > 0):
            raise EcotoneError(f"shaped link: bytes_per_s is {self.bytes_per_s}, must be positive, or None for no limit")
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise EcotoneError(f"shaped link: latency_s is {self.latency_s}, must be 0 or more")


UNSHAPED = LinkShape()


@dataclass(slots=True)
class _Waiting:
    frame: Frame
    priority: Priority
    since_s: float  # when it could begin at the earliest
    left_bytes: float


@dataclass(slots=True)
class _Lane:
    """The link to one peer. `current` has been on the link since `began_s`; the link yields to others at `yields_s`."""

    shape: LinkShape
    queues: dict[Priority, deque[_Waiting]] = field(default_factory=lambda: {priority: deque() for priority in Priority})
    current: _Waiting | None = None
    began_s: float = 0.0
    yields_s: float = math.inf
    free_s: float = 0.0
    last_due_s: float = 0.0
    flying: int = 0

    def finish_s(self) -> float:
        """When the frame on the link has been serialised; never, when there is none."""
        if self.current is None:
            return math.inf
        rate = self.shape.bytes_per_s
        return self.began_s + (self.current.left_bytes / rate if rate else 0.0)

    def idle(self) -> bool:
        return self.current is None and not self.flying

    def passes(self, num_bytes: int) -> bool:
        """Whether a frame on this idle link would arrive sooner than a thread wakes to send it; it takes its time then."""
        rate, now_s = self.shape.bytes_per_s, time.monotonic()
        if rate is None or self.shape.latency_s or max(self.free_s - now_s, 0.0) + num_bytes / rate > AT_ONCE_S:
            return False
        self.free_s = self.last_due_s = max(self.free_s, now_s) + num_bytes / rate
        return True


class ShapedWire:
    """A Wire that sends through `inner`, shaping what this node sends; the other direction is shaped by the peer's end."""

    def __init__(self, inner: Wire, *, links: Mapping[NodeId, LinkShape] | None = None, default: LinkShape = UNSHAPED):
        self._inner, self._shapes, self._default = inner, dict(links or {}), default
        self._lanes: dict[NodeId, _Lane] = {}
        self._flight: list[tuple[float, int, NodeId, Frame, Priority]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._handler: Handler | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, handler: Handler) -> None:
        """Start the inner wire and the thread that sends frames when they are due."""
        self._handler = handler
        self._thread = threading.Thread(target=self._run, name="shaped-wire", daemon=True)
        self._thread.start()
        self._inner.start(self._receive)

    def send(self, peer: NodeId, frame: Frame, priority: Priority) -> None:
        """Queue `frame` on the link to `peer`; raises WireError at once only where the link has no rate and no latency."""
        with self._changed:
            if self._closed:
                raise WireError("shaped wire: it is closed")
            lane = self._lane(peer)
            direct = lane.idle() and (lane.shape == UNSHAPED or lane.passes(len(frame)))
            if not direct:
                self._enqueue(lane, peer, frame, priority)
        if direct:
            self._inner.send(peer, frame, priority)

    def set_link(self, peer: NodeId, bytes_per_s: float | None, latency_s: float) -> None:
        """Change the link to `peer` now; the part of a frame that is already on the link keeps the time that it took."""
        shape = LinkShape(bytes_per_s=bytes_per_s, latency_s=latency_s)
        with self._changed:
            lane, now = self._lane(peer), time.monotonic()
            self._advance(lane, peer, now)
            if lane.current is not None:
                passed = (now - lane.began_s) * (lane.shape.bytes_per_s or math.inf) if now > lane.began_s else 0.0
                lane.current.left_bytes = max(0.0, lane.current.left_bytes - passed)
                lane.began_s = max(lane.began_s, now)
                lane.yields_s = min(lane.yields_s, now) if lane.yields_s < math.inf else math.inf
            self._shapes[peer] = lane.shape = shape
            self._changed.notify()

    def close(self) -> None:
        """Close the inner wire; frames not yet due are lost. Closing twice does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._inner.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def _lane(self, peer: NodeId) -> _Lane:
        if peer not in self._lanes:
            self._lanes[peer] = _Lane(shape=self._shapes.get(peer, self._default))
        return self._lanes[peer]

    def _receive(self, event: WireEvent) -> None:
        if isinstance(event, PeerDown):  # what was on the link is lost with it
            with self._changed:
                self._lanes.pop(event.peer, None)
                self._flight = [entry for entry in self._flight if entry[2] != event.peer]
                heapq.heapify(self._flight)
        if self._handler is not None:
            self._handler(event)

    def _enqueue(self, lane: _Lane, peer: NodeId, frame: Frame, priority: Priority) -> None:
        now = time.monotonic()
        self._advance(lane, peer, now)
        lane.queues[priority].append(_Waiting(frame, priority, now, float(len(frame))))
        current, rate = lane.current, lane.shape.bytes_per_s
        if current is not None and current.priority > priority and rate:
            slice_s = min(max(rate * SLICE_S, SLICE_MIN_BYTES), SLICE_MAX_BYTES) / rate
            boundary_s = lane.began_s + math.ceil(max(now - lane.began_s, 0.0) / slice_s) * slice_s
            if boundary_s < lane.finish_s():
                lane.yields_s = min(lane.yields_s, boundary_s)
        self._advance(lane, peer, now)
        self._changed.notify()

    def _advance(self, lane: _Lane, peer: NodeId, now: float) -> None:
        """Bring `lane` up to `now`: frames that were serialised by then go into flight, the next ones begin."""
        while True:
            if lane.current is None:
                found = next((queue for _, queue in sorted(lane.queues.items()) if queue), None)
                if found is None:
                    return
                lane.current = found.popleft()
                lane.began_s = max(lane.free_s, lane.current.since_s)
            finish_s = lane.finish_s()
            if min(finish_s, lane.yields_s) > now:
                return
            current, lane.current = lane.current, None
            if lane.yields_s < finish_s:
                current.left_bytes -= (lane.yields_s - lane.began_s) * (lane.shape.bytes_per_s or 0.0)
                current.since_s = lane.free_s = max(lane.yields_s, lane.began_s)
                lane.queues[current.priority].appendleft(current)
            else:
                lane.free_s = finish_s
                lane.last_due_s = max(lane.last_due_s, finish_s + lane.shape.latency_s)
                heapq.heappush(self._flight, (lane.last_due_s, next(self._order), peer, current.frame, current.priority))
                lane.flying += 1
            lane.yields_s = math.inf

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                for peer, lane in self._lanes.items():
                    self._advance(lane, peer, now)
                ready = self._ready(now)
                if not ready:
                    self._changed.wait(self._sleep_s(now))
                    continue
            for peer, frame, priority in ready:
                try:
                    self._inner.send(peer, frame, priority)
                except WireError:
                    continue  # the peer or the wire went away meanwhile: a frame in flight is lost with it
                finally:
                    with self._changed:
                        if peer in self._lanes:
                            self._lanes[peer].flying = max(0, self._lanes[peer].flying - 1)

    def _ready(self, now: float) -> list[tuple[NodeId, Frame, Priority]]:
        found = []
        while self._flight and self._flight[0][0] <= now:
            _, _, peer, frame, priority = heapq.heappop(self._flight)
            found.append((peer, frame, priority))
        return found

    def _sleep_s(self, now: float) -> float | None:
        upcoming = [min(lane.finish_s(), lane.yields_s) for lane in self._lanes.values()]
        next_s = min([*upcoming, self._flight[0][0] if self._flight else math.inf])
        return None if next_s == math.inf else max(0.0, next_s - now)
