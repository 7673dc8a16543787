"""Sending that does not wait: a queue and a thread per peer in front of an engine whose `put` may block on a slow link.

Control always goes at once, in the caller's thread. So does a small frame to a peer whose link kept up so far, because a
change of threads costs more than the frame. Everything else waits its turn in the peer's queue, in order within its
priority, the more urgent first. The queue has no limit of its own: the protocol's credit bounds what is under way.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ecotone.wire.wire import Frame, NodeId, Priority, WireError

__all__ = ["Outbox"]

Put = Callable[[NodeId, Frame, Priority], None]
DIRECT_BYTES = 64 * 1024
SLOW_PUT_S = 0.002


@dataclass(slots=True)
class _Lane:
    queues: dict[Priority, deque[Frame]] = field(default_factory=lambda: {priority: deque() for priority in Priority})
    busy: bool = False  # somebody is in `put`
    slow: bool = False  # the last `put` had to wait
    thread: threading.Thread | None = None
    filled: threading.Condition = field(default_factory=threading.Condition)


class Outbox:
    """Frames on their way to `put`; every method may be called from any thread."""

    def __init__(self, put: Put):
        self._put = put
        self._lock = threading.Lock()
        self._lanes: dict[NodeId, _Lane] = {}
        self._closed = False

    def send(self, peer: NodeId, frame: Frame, priority: Priority) -> None:
        """Hand `frame` to `put`, now or in turn; what `put` raises is raised only where it is called now."""
        if priority is Priority.CONTROL:
            self._put(peer, frame, priority)
            return
        lane = self._lane(peer)
        with lane.filled:
            direct = not lane.busy and not lane.slow and len(frame) <= DIRECT_BYTES and not any(lane.queues.values())
            if direct:
                lane.busy = True
            else:
                lane.queues[priority].append(frame)
                if lane.thread is None:
                    lane.thread = threading.Thread(target=self._run, args=(peer, lane), name=f"outbox-{peer}", daemon=True)
                    lane.thread.start()
                lane.filled.notify()
        if direct:
            self._deliver(peer, lane, frame, priority)

    def forget(self, peer: NodeId) -> None:
        """Drop what waits for `peer`: it is gone, and the protocol will send again what matters."""
        with self._lock:
            lane = self._lanes.get(peer)
        if lane is not None:
            with lane.filled:
                for queue in lane.queues.values():
                    queue.clear()

    def close(self) -> None:
        """Drop everything and end the threads."""
        with self._lock:
            self._closed = True
            lanes = tuple(self._lanes.values())
        for lane in lanes:
            with lane.filled:
                lane.filled.notify_all()

    def _lane(self, peer: NodeId) -> _Lane:
        lane = self._lanes.get(peer)
        if lane is None:
            with self._lock:
                lane = self._lanes.setdefault(peer, _Lane())
        return lane

    def _deliver(self, peer: NodeId, lane: _Lane, frame: Frame, priority: Priority) -> None:
        began_s = time.monotonic()
        try:
            self._put(peer, frame, priority)
        finally:
            with lane.filled:
                lane.busy = False
                lane.slow = len(frame) <= DIRECT_BYTES and time.monotonic() - began_s > SLOW_PUT_S
                if any(lane.queues.values()):
                    lane.filled.notify()

    def _run(self, peer: NodeId, lane: _Lane) -> None:
        while True:
            with lane.filled:
                while not self._closed and (lane.busy or not any(lane.queues.values())):
                    lane.filled.wait()
                if self._closed:
                    return
                priority, queue = next((p, q) for p, q in sorted(lane.queues.items()) if q)
                frame = queue.popleft()
                lane.busy = True
            try:
                self._deliver(peer, lane, frame, priority)
            except WireError:
                continue  # the peer or the session is gone: lost with what was under way
