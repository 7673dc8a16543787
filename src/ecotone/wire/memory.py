"""The in-memory network: named ends of one process, joined by one queue, with faults by script.

It is the twin of the Zenoh engine for tests and tiny demonstrations. One queue carries every frame in the order in which
it was sent; a script may lose, repeat or hold back each one, links can be cut and nodes killed. Nothing here reads a clock:
the same calls give the same deliveries. With `threaded=False` nothing moves until `pump`. It knows no rates or delays in
seconds: wrap an end in `ecotone.wire.shaped` for those.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ecotone.wire.wire import Frame, Handler, NodeId, PeerDown, PeerUp, Priority, Received, WireError, WireEvent

__all__ = ["Fate", "MemoryWire", "Network", "Passage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Frame `number` (from 0, per directed pair) on its way from `source` to `target`."""

    source: NodeId
    target: NodeId
    number: int
    frame: Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of a frame: `copies` arrive (0: lost), behind `held` later ones of the same pair, or when none come."""

    copies: int = 1
    held: int = 0


Script = Callable[[Passage], Fate]
DELIVERED = Fate()


class MemoryWire:
    """One end of a Network; see Wire."""

    def __init__(self, network: Network, node: NodeId):
        self._network, self._node = network, node

    def start(self, handler: Handler) -> None:
        """Begin to receive; every node that started before is announced, and this one to them."""
        self._network._start(self._node, handler)

    def send(self, peer: NodeId, frame: Frame, priority: Priority) -> None:
        """Queue `frame` for `peer`; see Wire.send. Priorities change nothing here: the queue is always empty soon."""
        self._network._send(self._node, peer, frame)

    def close(self) -> None:
        """Leave the network; the others see PeerDown. Closing twice does nothing."""
        self._network.kill(self._node)


class Network:
    """The medium that joins MemoryWire ends; every method may be called from any thread."""

    def __init__(self, *, threaded: bool = True, script: Script | None = None):
        self._script = script
        self._lock = threading.RLock()
        self._filled = threading.Condition(self._lock)
        self._handlers: dict[NodeId, Handler] = {}
        self._known: set[NodeId] = set()
        self._severed: set[tuple[NodeId, NodeId]] = set()
        self._numbers: dict[tuple[NodeId, NodeId], int] = {}
        self._queue: deque[tuple[NodeId, WireEvent]] = deque()
        self._held: list[tuple[tuple[NodeId, NodeId], int, Fate, Frame]] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="memory-network", daemon=True)
            self._thread.start()

    def join(self, node: NodeId) -> MemoryWire:
        """A new end named `node`; the same name may join again after it was killed (a restart)."""
        with self._lock:
            if node in self._handlers:
                raise WireError(f'memory network: node "{node}" has joined already; give each end its own name')
            self._known.add(node)
        return MemoryWire(self, node)

    def cut(self, first: NodeId, second: NodeId, *, one_way: bool = False) -> None:
        """Lose every frame between the two, those under way too, and tell both; `one_way` severs first -> second only."""
        with self._lock:
            for source, target in ((first, second), (second, first))[: 1 if one_way else 2]:
                if (source, target) not in self._severed:
                    self._severed.add((source, target))
                    self._post(target, PeerDown(source))

    def heal(self, first: NodeId, second: NodeId) -> None:
        """Undo `cut` in both directions."""
        with self._lock:
            for source, target in ((first, second), (second, first)):
                if (source, target) in self._severed:
                    self._severed.discard((source, target))
                    if source in self._handlers:
                        self._post(target, PeerUp(source))

    def kill(self, node: NodeId) -> None:
        """End `node` at once: it hears nothing more, and the others see PeerDown."""
        with self._lock:
            if self._handlers.pop(node, None) is not None:
                self._queue = deque((to, event) for to, event in self._queue if to != node)
                for other in self._handlers:
                    self._post(other, PeerDown(node))

    def pump(self, limit: int | None = None) -> int:
        """Deliver what is queued, and what the handlers send meanwhile, up to `limit` events; returns how many."""
        count = 0
        while limit is None or count < limit:
            with self._lock:
                found = self._take()
            if found is None:
                break
            handler, event = found
            handler(event)
            count += 1
        return count

    def close(self) -> None:
        """End every node and the delivery thread."""
        with self._lock:
            self._closed = True
            self._handlers.clear()
            self._queue.clear()
            self._filled.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._closed and not self._queue and not self._held:
                    self._filled.wait()
                if self._closed:
                    return
            self.pump()

    def _start(self, node: NodeId, handler: Handler) -> None:
        with self._lock:
            if node in self._handlers:
                raise WireError(f'memory network: node "{node}" has started already')
            for other in self._handlers:
                if (node, other) not in self._severed:
                    self._post(other, PeerUp(node))
            before = tuple(self._handlers)
            self._handlers[node] = handler
            for other in before:
                if (other, node) not in self._severed:
                    self._post(node, PeerUp(other))

    def _send(self, source: NodeId, target: NodeId, frame: Frame) -> None:
        with self._lock:
            if source not in self._handlers:
                raise WireError(f'memory network: "{source}" is closed or not started')
            if target not in self._known:
                raise WireError(f'memory network: "{source}" knows no node "{target}"; known are {sorted(self._known)}')
            pair = (source, target)
            number = self._numbers.get(pair, 0)
            self._numbers[pair] = number + 1
            fate = DELIVERED
            if self._script is not None:
                fate = self._script(Passage(source=source, target=target, number=number, frame=frame))
            if fate.held:
                self._held.append((pair, number + fate.held, fate, frame))
            else:
                self._carry(pair, fate, frame)
            self._free(pair, number)
            self._filled.notify_all()

    def _free(self, pair: tuple[NodeId, NodeId], number: int) -> None:
        for entry in [entry for entry in self._held if entry[0] == pair and entry[1] <= number]:
            self._held.remove(entry)
            self._carry(pair, entry[2], entry[3])

    def _carry(self, pair: tuple[NodeId, NodeId], fate: Fate, frame: Frame) -> None:
        for _ in range(fate.copies):
            self._post(pair[1], Received(pair[0], frame))

    def _post(self, target: NodeId, event: WireEvent) -> None:
        if target in self._handlers:
            self._queue.append((target, event))
            self._filled.notify_all()

    def _take(self) -> tuple[Handler, WireEvent] | None:
        while self._queue or self._held:
            if not self._queue:  # nothing later will come to free what is held back
                pair, _, fate, frame = self._held.pop(0)
                self._carry(pair, fate, frame)
                continue
            target, event = self._queue.popleft()
            lost = isinstance(event, Received) and (event.peer, target) in self._severed
            if not lost and target in self._handlers:
                return self._handlers[target], event
        return None
