"""World 1: nodes on a virtual clock. It carries out the effects of ecotone.protocol and decides nothing itself.

A device is a processor (one Compute at a time, as the worker asks) and a coder beside it, both with times from the cost
model. A directed link is a server with a rate: three priority queues, a frame is not interrupted, and it arrives `latency_s`
after its last byte left. Nodes without a link between them talk over the quickest path (control only, in a sane plan).
Events of one instant happen in the order in which they were made, so a run is a function of its inputs and seed.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ecotone.cluster import Link
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import BLOB_EDGE, BodyId, Chunk, Letter, LinkMessage, NodeId
from ecotone.protocol.node import Node
from ecotone.trace import Kind, Span
from ecotone.units import EcotoneError

__all__ = ["FRAME_BYTES", "Machine", "Timing", "Work", "World"]

FRAME_BYTES = 128  # header of every frame
_LETTER_BYTES = 512
Timing = Callable[[BodyId, str], float]
"""Seconds of "compute", "encode" or "decode" of a body."""
Work = Callable[[fx.Effect, float], None]
"""What the asker's program does with Accepted, Deliver, RequestError, DeployEnded, Closed."""


@dataclass(slots=True)
class Machine:
    """A device with its node, and what its shell holds."""

    node: Node
    is_alive: bool = True
    tensors: set[BodyId] = field(default_factory=set)
    bodies: set[BodyId] = field(default_factory=set)
    timers: dict[ev.TimerId, int] = field(default_factory=dict)
    busy_s: float = 0.0
    since_s: dict[BodyId, float] = field(default_factory=dict)  # inputs wait since


@dataclass(slots=True)
class _Channel:
    """One directed link."""

    latency_s: float
    rate_bytes_per_s: float
    queues: tuple[deque[tuple[LinkMessage, int]], ...] = field(default_factory=lambda: (deque(), deque(), deque()))
    is_busy: bool = False
    is_cut: bool = False
    generation: int = 0  # frames on their way when the link is cut are lost
    num_bytes: int = 0
    busy_s: float = 0.0


class World:
    """`machines` by name; `links` directed; `timing` gives seconds; `size_bytes` of an encoded body; `asker` its program."""

    def __init__(
        self,
        machines: dict[NodeId, Machine],
        links: tuple[Link, ...],
        timing: Timing,
        size_bytes: Callable[[BodyId], int],
        asker: Work,
        *,
        trace: bool = True,
    ) -> None:
        self.machines, self._timing, self._size_bytes, self._asker = machines, timing, size_bytes, asker
        self.now_s, self.num_events = 0.0, 0
        self.spans: list[Span] | None = [] if trace else None
        self.origin_s = 0.0
        self.fault_of: Callable[[BodyId, str], str] = lambda body, work: ""  # why this work fails, "" when it does not
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._timer_id = 0
        self._departed: dict[BodyId, float] = {}
        self.channels = {pair: _Channel(*value) for pair, value in _paths(tuple(machines), links).items()}

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do `action` at `time_s` of the virtual clock."""
        self._order += 1
        heapq.heappush(self._heap, (time_s, self._order, action))

    def run(self, is_done: Callable[[], bool], until_s: float) -> None:
        """Let time pass until `is_done`, nothing is left to happen, or `until_s`."""
        heap = self._heap
        while heap and not is_done():
            time_s, _, action = heapq.heappop(heap)
            if time_s > until_s:
                return
            self.now_s = time_s
            self.num_events += 1
            action()

    def connect_all(self) -> None:
        """Every node sees every other."""
        for source, target in self.channels:
            self.event(source, ev.PeerUp(peer=target))

    def event(self, name: NodeId, event: ev.Event) -> None:
        """Hand an event to a node now, and carry out what it answers."""
        machine = self.machines[name]
        if machine.is_alive:
            for effect in machine.node.handle(event, self.now_s):
                self._carry_out(name, machine, effect, event)

    # ---- scripted faults --------------------------------------------------------------------------------------------

    def set_link(self, source: NodeId, target: NodeId, latency_s: float, rate_bytes_per_s: float) -> None:
        """Another latency and rate for frames that leave from now on."""
        channel = self.channels[source, target]
        channel.latency_s, channel.rate_bytes_per_s = latency_s, rate_bytes_per_s

    def cut(self, source: NodeId, target: NodeId, detect_s: float) -> None:
        """Lose all frames both ways; each end notices after `detect_s`."""
        for one, other in ((source, target), (target, source)):
            channel = self.channels[one, other]
            channel.is_cut = True
            channel.generation += 1
            for queue in channel.queues:
                queue.clear()
            self.at(self.now_s + detect_s, lambda one=one, other=other: self._notice_cut(one, other))  # type: ignore[misc]

    def _notice_cut(self, one: NodeId, other: NodeId) -> None:
        if self.channels[one, other].is_cut:
            self.event(one, ev.PeerDown(peer=other))

    def heal(self, source: NodeId, target: NodeId) -> None:
        """The link carries again, both ways."""
        for one, other in ((source, target), (target, source)):
            self.channels[one, other].is_cut = False
            self.event(one, ev.PeerDown(peer=other))
            self.event(one, ev.PeerUp(peer=other))

    def kill(self, name: NodeId, detect_s: float) -> None:
        """The node's process ends at once; its peers notice after `detect_s`."""
        self.machines[name].is_alive = False
        for other in self.machines:
            if other != name:
                self.cut(name, other, detect_s)

    def restart(self, name: NodeId, node: Node) -> None:
        """A new process with an empty memory, reachable at once."""
        self.machines[name] = Machine(node)
        for other in self.machines:
            if other != name:
                self.heal(name, other)

    # ---- effects ----------------------------------------------------------------------------------------------------

    def _carry_out(self, name: NodeId, machine: Machine, effect: fx.Effect, cause: ev.Event) -> None:
        match effect:
            case fx.Send(peer=peer, message=message, priority=priority):
                self._send(name, peer, message, int(priority))
            case fx.StoreChunk(body=body):
                machine.bodies.add(body)
            case fx.Release(body=body, held=held):
                (machine.tensors if held is fx.Held.TENSORS else machine.bodies).discard(body)
            case fx.SetTimer(timer=timer, at_s=at_s):
                self._timer_id += 1
                machine.timers[timer] = self._timer_id
                self.at(max(at_s, self.now_s), _Timer(self, name, machine, timer, self._timer_id))
            case fx.CancelTimer(timer=timer):
                machine.timers.pop(timer, None)
            case fx.Compute(body=body):
                self._work(name, machine, body, "compute", ev.Computed(body=body))
            case fx.Encode(body=body):
                size = self._size_bytes(body)
                self._work(name, machine, body, "encode", ev.Encoded(body=body, size_bytes=size))
            case fx.Decode(body=body):
                self._work(name, machine, body, "decode", ev.Decoded(body=body))
            case fx.Prepare(session=session, epoch=epoch):
                self.at(self.now_s, lambda: self.event(name, ev.Prepared(session=session, epoch=epoch)))
            case fx.Bind(body=body):
                machine.tensors.add(body)
                machine.since_s[body] = self.now_s
            case fx.Alias(source=source, target=target):
                if source in machine.tensors:
                    machine.tensors.add(target)
                    machine.since_s[target] = self.now_s
            case fx.Deliver(body=body) | fx.Output(body=body):
                machine.tensors.discard(body)
                self._asker(effect, self.now_s)
            case fx.Unload() | fx.OpenBlob() | fx.LinkChanged():
                pass
            case _:
                self._asker(effect, self.now_s)

    def _work(self, name: NodeId, machine: Machine, body: BodyId, kind: Kind, done: ev.Event) -> None:
        took_s, start_s = self._timing(body, kind), self.now_s
        ready_s = machine.since_s.pop(body, start_s)
        if kind == "compute":
            machine.busy_s += took_s
            if ready_s < start_s:
                self.span(ready_s, name, body, "wait")

        def finish() -> None:
            reason = self.fault_of(body, kind)
            if reason and self.machines[name] is machine:
                self.event(name, ev.WorkFailed(body=body, work=kind, reason=reason))
                return
            if kind == "encode":
                machine.bodies.add(body)
            else:
                made = body._replace(edge=body.edge + 1) if kind == "compute" else body
                machine.tensors.add(made)
                machine.since_s[made] = self.now_s
            self.span(start_s, name, body, kind)
            if self.machines[name] is machine:
                self.event(name, done)

        self.at(start_s + took_s, finish)

    def span(self, start_s: float, name: NodeId, body: BodyId, kind: Kind, peer: str = "") -> None:
        """Note that `kind` of `body` began at `start_s` and ends now."""
        if self.spans is not None:
            span = Span(
                start_s=start_s - self.origin_s,
                stop_s=self.now_s - self.origin_s,
                device=name,
                request=body.request,
                stage=body.edge,
                kind=kind,
                epoch=body.epoch,
                peer=peer,
            )
            self.spans.append(span)

    # ---- links ------------------------------------------------------------------------------------------------------

    def _send(self, source: NodeId, target: NodeId, message: LinkMessage, priority: int) -> None:
        channel = self.channels.get((source, target))
        if channel is None or channel.is_cut:
            return
        size_bytes = FRAME_BYTES
        if isinstance(message, Chunk):
            size_bytes += message.length
            if message.offset == 0:
                self._departed.setdefault(message.body, self.now_s)
        elif isinstance(message, Letter):
            size_bytes += _LETTER_BYTES
        channel.queues[priority].append((message, size_bytes))
        if not channel.is_busy:
            self._transmit(source, target, channel)

    def _transmit(self, source: NodeId, target: NodeId, channel: _Channel) -> None:
        queue = next((q for q in channel.queues if q), None)
        if queue is None:
            channel.is_busy = False
            return
        channel.is_busy = True
        message, size_bytes = queue.popleft()
        took_s, generation, latency_s = size_bytes / channel.rate_bytes_per_s, channel.generation, channel.latency_s
        channel.num_bytes += size_bytes
        channel.busy_s += took_s

        def arrive() -> None:
            if channel.generation == generation:
                if isinstance(message, Chunk) and message.offset + message.length == message.size_bytes:
                    self._note_transfer(source, target, message)
                self.event(target, ev.MessageReceived(peer=source, message=message))

        def leave() -> None:
            self.at(self.now_s + latency_s, arrive)
            self._transmit(source, target, channel)

        self.at(self.now_s + took_s, leave)

    def _note_transfer(self, source: NodeId, target: NodeId, chunk: Chunk) -> None:
        start_s = self._departed.pop(chunk.body, None)
        if start_s is not None and chunk.body.edge != BLOB_EDGE:
            self.span(start_s, source, chunk.body, "transfer", target)


class _Timer:
    """A set timer: fires unless it was cancelled or replaced."""

    __slots__ = ("machine", "name", "number", "timer", "world")

    def __init__(self, world: World, name: NodeId, machine: Machine, timer: ev.TimerId, number: int) -> None:
        self.world, self.name, self.machine, self.timer, self.number = world, name, machine, timer, number

    def __call__(self) -> None:
        if self.machine.timers.get(self.timer) == self.number and self.world.machines[self.name] is self.machine:
            del self.machine.timers[self.timer]
            self.world.event(self.name, ev.TimerFired(timer=self.timer))


def _paths(names: tuple[NodeId, ...], links: tuple[Link, ...]) -> dict[tuple[NodeId, NodeId], tuple[float, float]]:
    """(latency, rate) of every ordered pair: of its own link, else of the path of least latency (Floyd-Warshall)."""
    best = {(NodeId(k.source), NodeId(k.target)): (k.latency_s, k.bandwidth_bytes_per_s) for k in links}
    direct = dict(best)
    hops = {NodeId(end) for k in links for end in (k.source, k.target)}
    for middle in sorted(hops):
        for one in sorted(hops):
            for other in sorted(hops):
                first, second = best.get((one, middle)), best.get((middle, other))
                if one != other and first and second and first[0] + second[0] < best.get((one, other), (math.inf, 0.0))[0]:
                    best[one, other] = (first[0] + second[0], min(first[1], second[1]))
    pairs = [(one, other) for one in names for other in names if one != other]
    for one, other in pairs:
        if (one, other) not in best:
            raise EcotoneError(f"no path of links leads from {one} to {other}; add a link to the cluster")
    return {pair: direct.get(pair, best[pair]) for pair in pairs}
