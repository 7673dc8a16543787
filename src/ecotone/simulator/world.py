"""World 1: nodes on a virtual clock. It carries out the effects of ecotone.protocol and decides nothing itself.

A device is a processor (one Compute at a time, as the worker asks) and a coder beside it, both with times from the cost
model. Links are in channel.py; nodes without a link between them talk over the quickest path (control only, in a sane plan).
Events of one instant happen in the order in which they were made, so a run is a function of its inputs and seed.

What scripts do to it: end, stop (SIGSTOP) and restart processes, block and spoil links, slow devices down, bend clocks, let
work, preparation and journals fail. The wire notices the end of a process and a cut (PeerDown after `detect_s`); it does not
notice a stopped process or a link that is dead in one direction. An effect that asks for what the shell does not hold is
noted in `violations`: a protocol error.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ecotone.cluster import Link
from ecotone.linktrace import LinkTrace
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import BLOB_EDGE, BodyId, Chunk, Letter, LinkMessage, NodeId, Ping
from ecotone.protocol.node import Node
from ecotone.simulator.channel import Channel, FrameFaults, paths
from ecotone.trace import Kind, Span

__all__ = ["FRAME_BYTES", "Condition", "Machine", "Timing", "Work", "World"]

FRAME_BYTES = 128  # header of every frame
_LETTER_BYTES = 512
_CARRY_OUT = {
    fx.Send: "_send",
    fx.StoreChunk: "_store",
    fx.Release: "_release",
    fx.SetTimer: "_set_timer",
    fx.CancelTimer: "_cancel_timer",
    fx.Compute: "_compute",
    fx.Encode: "_encode",
    fx.Decode: "_decode",
    fx.Prepare: "_prepare",
    fx.Bind: "_bind",
    fx.Alias: "_alias",
    fx.Deliver: "_hand_out",
    fx.Output: "_hand_out",
    fx.Record: "_record",
    fx.Unload: "_skip",
    fx.OpenBlob: "_skip",
    fx.LinkChanged: "_skip",
}
Timing = Callable[[BodyId, str], float]
"""Seconds of "compute", "encode" or "decode" of a body."""
Work = Callable[[fx.Effect, float], None]
"""What the asker's program does with Record (durable now), Accepted, Deliver, RequestError, DeployEnded, Observed, ..."""
_Action = Callable[..., None]


@dataclass(slots=True)
class Condition:
    """The state of a device that outlives its processes. Its clock reads `offset_s + drift * time`."""

    factor: float = 1.0  # its work takes so many times longer
    drift: float = 1.0
    offset_s: float = 0.0
    prepare_s: float = 0.0
    prepare_error: str = ""
    record_s: float = 0.0
    record_error: str = ""
    failing: frozenset[str] = frozenset()  # kinds of work that raise
    is_garbling: bool = False  # what it sends does not decode


@dataclass(slots=True)
class Machine:
    """A device with its node, and what its shell holds."""

    node: Node
    is_alive: bool = True
    condition: Condition = field(default_factory=Condition)
    tensors: set[BodyId] = field(default_factory=set)
    bodies: set[BodyId] = field(default_factory=set)
    garbled: set[BodyId] = field(default_factory=set)
    timers: dict[ev.TimerId, int] = field(default_factory=dict)
    busy_s: float = 0.0
    since_s: dict[BodyId, float] = field(default_factory=dict)  # inputs wait since
    is_stalled: bool = False
    stalled_since_s: float = 0.0
    stalled_s: float = 0.0  # in all, until the last time that it went on
    backlog: list[tuple[_Action, tuple[Any, ...]]] = field(default_factory=list)


class World:
    """`machines` by name; `links` directed; `timing` gives seconds; `size_bytes` of an encoded body; `asker` its program.

    `programs` may name one for further askers. `seed` draws the fate of frames. `channels`: where not all nodes talk to all,
    those between which there are any; a link may belong to a medium that it shares (medium.py).
    """

    def __init__(
        self,
        machines: dict[NodeId, Machine],
        links: tuple[Link, ...],
        timing: Timing,
        size_bytes: Callable[[BodyId], int],
        asker: Work,
        *,
        trace: bool = True,
        seed: int = 0,
        channels: dict[tuple[NodeId, NodeId], Channel] | None = None,
    ) -> None:
        self.machines, self._timing, self._size_bytes, self._asker = machines, timing, size_bytes, asker
        self.programs: dict[NodeId, Work] = {}
        self.now_s, self.num_events, self.seed = 0.0, 0, seed
        self.spans: list[Span] | None = [] if trace else None
        self.violations: list[str] = []
        self.origin_s = 0.0
        self.fault_of: Callable[[BodyId, str], str] = lambda body, work: ""  # why this work fails, "" when it does not
        self.exit_of: Callable[[BodyId], int | None] = lambda body: None  # the edge over which it leaves after its stage
        self._heap: list[tuple[float, int, _Action, tuple[Any, ...]]] = []
        self._order = 0
        self._timer_id = 0
        self._carry_out: dict[type, _Action] = {kind: getattr(self, name) for kind, name in _CARRY_OUT.items()}
        self._departed: dict[BodyId, float] = {}
        self.channels = channels or {pair: Channel(*value) for pair, value in paths(tuple(machines), links).items()}

    def at(self, time_s: float, action: _Action, *args: Any) -> None:
        """Do `action(*args)` at `time_s` of the virtual clock."""
        self._order += 1
        heapq.heappush(self._heap, (time_s, self._order, action, args))

    def run(self, is_done: Callable[[], bool], until_s: float) -> None:
        """Let time pass until `is_done`, nothing is left to happen, or `until_s`."""
        heap, pop = self._heap, heapq.heappop
        while heap and not is_done():
            if heap[0][0] > until_s:
                return
            self.now_s, _, action, args = pop(heap)
            self.num_events += 1
            action(*args)

    def count_anew(self) -> None:
        """Begin counting events, bytes and busy links."""
        self.num_events = 0
        for channel in self.channels.values():
            channel.num_bytes, channel.busy_s = 0, 0.0

    def connect_all(self) -> None:
        """Every node sees every other."""
        for source, target in self.channels:
            self.event(source, ev.PeerUp(peer=target))

    def event(self, name: NodeId, event: ev.Event) -> None:
        """Hand an event to a node now, and carry out what it answers; one that is stopped takes it when it goes on."""
        machine = self.machines[name]
        if not machine.is_alive:
            return
        if machine.is_stalled:
            machine.backlog.append((self._to_process, (name, machine, event)))
            return
        condition = machine.condition
        for effect in machine.node.handle(event, condition.offset_s + condition.drift * self.now_s):
            self._carry_out.get(type(effect), self._tell)(name, machine, effect)

    def _to_process(self, name: NodeId, machine: Machine, event: ev.Event) -> None:
        if self.machines[name] is machine:
            self.event(name, event)

    def do(self, name: NodeId, action: _Action, *args: Any) -> None:
        """Let the program of this node act: now, when its process goes on, or never where it is dead."""
        machine = self.machines[name]
        if machine.is_stalled:
            machine.backlog.append((action, args))
        elif machine.is_alive:
            action(*args)

    # ---- scripted faults: processes ---------------------------------------------------------------------------------

    def kill(self, name: NodeId, detect_s: float) -> None:
        """The node's process ends at once, its peers notice after `detect_s`; frames that have left still arrive."""
        self.machines[name].is_alive = False
        for other in self._peers(name):
            self.channels[name, other].block(f"{name} is dead", self.now_s, lose_flying=False)
            self.channels[other, name].block(f"{name} is dead", self.now_s)
            self.at(self.now_s + detect_s, self._notice, other, name)

    def restart(self, name: NodeId, node: Node) -> None:
        """A new process with an empty memory on the same device, reachable at once where links carry."""
        self.machines[name] = Machine(node, condition=self.machines[name].condition)
        for other in self._peers(name):
            for pair in ((name, other), (other, name)):
                self.channels[pair].blocks.discard(f"{name} is dead")
            self._reconnect(name, other)

    def stall(self, name: NodeId) -> None:
        """The process is stopped (SIGSTOP): events queue up, work and sending stand still, its clock goes on."""
        machine = self.machines[name]
        if not machine.is_stalled:
            machine.is_stalled, machine.stalled_since_s = True, self.now_s

    def resume(self, name: NodeId) -> None:
        """The process goes on and takes what has queued up, in order."""
        machine = self.machines[name]
        if not (machine.is_stalled and machine.is_alive):
            return
        machine.is_stalled = False
        machine.stalled_s += self.now_s - machine.stalled_since_s
        backlog, machine.backlog = machine.backlog, []
        for action, args in backlog:
            action(*args)
        for other in self._peers(name):
            self._wake(name, other, self.channels[name, other])

    def _peers(self, name: NodeId) -> list[NodeId]:
        return [other for other in self.machines if (name, other) in self.channels]

    def set_clock(self, name: NodeId, *, step_s: float = 0.0, drift: float | None = None) -> None:
        """The clock jumps by `step_s` (below 0: backwards), and runs `drift` times as fast from now on."""
        condition = self.machines[name].condition
        reads_s = condition.offset_s + condition.drift * self.now_s + step_s
        condition.drift = condition.drift if drift is None else drift
        condition.offset_s = reads_s - condition.drift * self.now_s

    # ---- scripted faults: links -------------------------------------------------------------------------------------

    def set_link(self, source: NodeId, target: NodeId, latency_s: float, rate_bytes_per_s: float) -> None:
        """Another latency and rate for frames that leave from now on."""
        channel = self.channels[source, target]
        channel.latency_s, channel.rate_bytes_per_s, channel.trace = latency_s, rate_bytes_per_s, None
        if channel.medium is not None:
            channel.medium.changed()
        self._unblock_forever(source, target, channel)

    def follow(self, source: NodeId, target: NodeId, trace: LinkTrace) -> None:
        """The link follows `trace` from now on; its time 0 is now."""
        channel = self.channels[source, target]
        channel.trace, channel.trace_from_s = trace, self.now_s
        self._seed(source, target)
        self._unblock_forever(source, target, channel)

    def spoil(self, source: NodeId, target: NodeId, faults: FrameFaults | None) -> None:
        """Frames that leave from now on are lost, repeated, late or damaged by chance; None: no more."""
        self.channels[source, target].faults = faults
        if faults is not None:
            self._seed(source, target)

    def _seed(self, source: NodeId, target: NodeId) -> None:
        if self.channels[source, target].random is None:
            names = list(self.machines)
            self.channels[source, target].seed(self.seed, names.index(source), names.index(target))

    def _unblock_forever(self, source: NodeId, target: NodeId, channel: Channel) -> None:
        if math.isinf(channel.free_s) and channel.medium is None:
            channel.free_s, channel.is_waking = self.now_s, False
            self._wake(source, target, channel)

    def cut(self, source: NodeId, target: NodeId, detect_s: float, reason: str = "cut") -> None:
        """Lose all frames both ways; each end notices after `detect_s`."""
        for one, other in ((source, target), (target, source)):
            self.channels[one, other].block(reason, self.now_s)
            self.at(self.now_s + detect_s, self._notice, one, other)

    def cut_one_way(self, source: NodeId, target: NodeId) -> None:
        """Lose all frames from `source` to `target`; nobody is told."""
        self.channels[source, target].block("one way", self.now_s)

    def partition(self, names: Iterable[NodeId], detect_s: float) -> None:
        """Cut all links between `names` and the rest."""
        inside = set(names)
        for one, other in self.channels:
            if one in inside and other not in inside:
                self.cut(one, other, detect_s, "partition")

    def heal(self, source: NodeId, target: NodeId) -> None:
        """The link carries again both ways, unless an end is dead; cuts and partitions between the two are over."""
        were_cut = False
        for pair in ((source, target), (target, source)):
            blocks = self.channels[pair].blocks
            were_cut = were_cut or bool(blocks & {"cut", "partition"})
            blocks.difference_update(("cut", "partition", "one way"))
        if were_cut:
            self._reconnect(source, target)

    def heal_all(self) -> None:
        """Every cut and partition is over."""
        for one, other in self.channels:
            if one < other:
                self.heal(one, other)

    def _reconnect(self, source: NodeId, target: NodeId) -> None:
        for one, other in ((source, target), (target, source)):
            if self.machines[other].is_alive and not self.channels[one, other].blocks - {"one way"}:
                self.event(one, ev.PeerDown(peer=other))
                self.event(one, ev.PeerUp(peer=other))

    def _notice(self, one: NodeId, other: NodeId) -> None:
        if self.channels[one, other].blocks - {"one way"}:
            self.event(one, ev.PeerDown(peer=other))

    # ---- effects ----------------------------------------------------------------------------------------------------

    def _tell(self, name: NodeId, machine: Machine, effect: fx.Effect) -> None:
        self.programs.get(name, self._asker)(effect, self.now_s)

    def _skip(self, name: NodeId, machine: Machine, effect: fx.Effect) -> None:
        pass

    def _store(self, name: NodeId, machine: Machine, effect: fx.StoreChunk) -> None:
        machine.bodies.add(effect.body)

    def _release(self, name: NodeId, machine: Machine, effect: fx.Release) -> None:
        if effect.held is fx.Held.TENSORS:
            machine.tensors.discard(effect.body)
        else:
            machine.bodies.discard(effect.body)
            machine.garbled.discard(effect.body)

    def _set_timer(self, name: NodeId, machine: Machine, effect: fx.SetTimer) -> None:
        self._timer_id += 1
        machine.timers[effect.timer] = self._timer_id
        condition = machine.condition
        wait_s = (effect.at_s - condition.offset_s) / condition.drift - self.now_s
        self.at(self.now_s + max(wait_s, 0.0), self._timer_due, name, machine, effect.timer, self._timer_id)

    def _timer_due(self, name: NodeId, machine: Machine, timer: ev.TimerId, number: int) -> None:
        if machine.timers.get(timer) != number or self.machines[name] is not machine:
            return
        if machine.is_stalled:
            machine.backlog.append((self._timer_due, (name, machine, timer, number)))
            return
        del machine.timers[timer]
        self.event(name, ev.TimerFired(timer=timer))

    def _cancel_timer(self, name: NodeId, machine: Machine, effect: fx.CancelTimer) -> None:
        machine.timers.pop(effect.timer, None)

    def _prepare(self, name: NodeId, machine: Machine, effect: fx.Prepare) -> None:
        condition, session, epoch = machine.condition, effect.session, effect.epoch
        done: ev.Event = ev.Prepared(session=session, epoch=epoch)
        if condition.prepare_error:
            done = ev.PrepareFailed(session=session, epoch=epoch, reason=condition.prepare_error)
        self._later(machine, condition.prepare_s, self._to_process, name, machine, done)

    def _bind(self, name: NodeId, machine: Machine, effect: fx.Bind) -> None:
        machine.tensors.add(effect.body)
        machine.since_s[effect.body] = self.now_s

    def _alias(self, name: NodeId, machine: Machine, effect: fx.Alias) -> None:
        if self._holds(name, machine.tensors, effect.source, "aliases"):
            machine.tensors.add(effect.target)
            machine.since_s[effect.target] = self.now_s

    def _hand_out(self, name: NodeId, machine: Machine, effect: fx.Deliver | fx.Output) -> None:
        self._holds(name, machine.tensors, effect.body, "hands out")
        machine.tensors.discard(effect.body)
        self._tell(name, machine, effect)

    def _record(self, name: NodeId, machine: Machine, effect: fx.Record) -> None:
        self._later(machine, machine.condition.record_s, self._recorded, name, machine, effect)

    def _recorded(self, name: NodeId, machine: Machine, effect: fx.Record) -> None:
        reason = machine.condition.record_error
        if reason:
            self.event(name, ev.RecordFailed(request=effect.request, reason=reason))
            return
        self._tell(name, machine, effect)
        self.event(name, ev.Recorded(request=effect.request))

    def _compute(self, name: NodeId, machine: Machine, effect: fx.Compute) -> None:
        self._holds(name, machine.tensors, effect.body, "computes on")
        self._work(name, machine, effect.body, "compute")

    def _encode(self, name: NodeId, machine: Machine, effect: fx.Encode) -> None:
        self._holds(name, machine.tensors, effect.body, "encodes")
        self._work(name, machine, effect.body, "encode")

    def _decode(self, name: NodeId, machine: Machine, effect: fx.Decode) -> None:
        self._holds(name, machine.bodies, effect.body, "decodes")
        self._work(name, machine, effect.body, "decode")

    def _holds(self, name: NodeId, held: set[BodyId], body: BodyId, verb: str) -> bool:
        if body not in held:
            self.violations.append(f"{name} {verb} {tuple(body)}, which it does not hold")
        return body in held

    def _work(self, name: NodeId, machine: Machine, body: BodyId, kind: Kind) -> None:
        took_s, start_s = self._timing(body, kind) * machine.condition.factor, self.now_s
        ready_s = machine.since_s.pop(body, start_s)
        if kind == "compute":
            machine.busy_s += took_s
            if ready_s < start_s:
                self.span(ready_s, name, body, "wait")
        self._later(machine, took_s, self._finish, name, machine, body, kind, start_s, took_s)

    def _finish(self, name: NodeId, machine: Machine, body: BodyId, kind: Kind, start_s: float, took_s: float) -> None:
        reason = self.fault_of(body, kind)
        if kind in machine.condition.failing:
            reason = "told to"
        elif kind == "decode" and body in machine.garbled:
            reason = "garbage"
        if self.machines[name] is not machine:
            return
        done: ev.Event
        if reason:
            done = ev.WorkFailed(body=body, work=kind, reason=reason)
        elif kind == "encode":
            machine.bodies.add(body)
            done = ev.Encoded(body=body, size_bytes=self._size_bytes(body), seconds=took_s)
        elif kind == "decode":
            self._keep(machine, body)
            done = ev.Decoded(body=body, seconds=took_s)
        else:
            exit_edge = self.exit_of(body)
            self._keep(machine, body._replace(edge=body.edge + 1 if exit_edge is None else exit_edge))
            done = ev.Computed(body=body, seconds=took_s, exited=exit_edge is not None)
        if not reason:
            self.span(start_s, name, body, kind)
        self.event(name, done)

    def _keep(self, machine: Machine, made: BodyId) -> None:
        machine.tensors.add(made)
        machine.since_s[made] = self.now_s

    def _later(self, machine: Machine, delay_s: float, action: _Action, *args: Any) -> None:
        """Do `action` after the process ran for `delay_s`: not while it is stopped, nor once it is dead."""
        due_s = self.now_s + delay_s
        self.at(due_s, self._due, machine, due_s - machine.stalled_s, action, args)

    def _due(self, machine: Machine, run_s: float, action: _Action, args: tuple[Any, ...]) -> None:
        if not machine.is_alive:
            return
        if machine.is_stalled:
            machine.backlog.append((self._due, (machine, run_s, action, args)))
        elif run_s + machine.stalled_s > self.now_s + 1e-12:
            self.at(run_s + machine.stalled_s, self._due, machine, run_s, action, args)
        else:
            action(*args)

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

    def _send(self, source: NodeId, machine: Machine, effect: fx.Send) -> None:
        target, message = effect.peer, effect.message
        channel = self.channels.get((source, target))
        if channel is None or channel.blocks:
            return
        size_bytes = FRAME_BYTES
        if type(message) is Chunk:
            size_bytes += message.length
            if self.spans is not None and message.offset == 0:
                self._departed.setdefault(message.body, self.now_s)
        elif type(message) is Letter:
            size_bytes += _LETTER_BYTES
        elif type(message) is Ping:
            size_bytes += message.size_bytes
        channel.queues[effect.priority].append((message, size_bytes))
        self._wake(source, target, channel)

    def _wake(self, source: NodeId, target: NodeId, channel: Channel) -> None:
        """Give the wire what waits: at once where it is free, else when it will be."""
        if channel.is_waking:
            return
        if channel.free_s <= self.now_s:
            self._transmit(source, target, channel)
        elif any(channel.queues) and not math.isinf(channel.free_s):
            channel.is_waking = True
            self.at(channel.free_s, self._transmit, source, target, channel)

    def _transmit(self, source: NodeId, target: NodeId, channel: Channel) -> None:
        channel.is_waking = False
        if self.machines[source].is_stalled or channel.free_s > self.now_s:
            return
        frame = channel.next_frame()
        if frame is None:
            return
        message, size_bytes = frame
        if channel.medium is not None:
            channel.free_s, channel.num_bytes = math.inf, channel.num_bytes + size_bytes
            left = partial(self._left, source, target, channel, message, channel.flight, self.now_s)
            channel.medium.send((source, target), size_bytes, left)
            return
        leaves_s = channel.free_s = channel.leaves_s(size_bytes, self.now_s)
        channel.num_bytes += size_bytes
        channel.busy_s += leaves_s - self.now_s if math.isfinite(leaves_s) else 0.0
        if math.isfinite(leaves_s):
            for arrives_s in channel.arrivals(leaves_s):
                self.at(arrives_s, self._arrive, source, target, channel, message, channel.flight, self.now_s, leaves_s)
        self._wake(source, target, channel)

    def _left(
        self, source: NodeId, target: NodeId, channel: Channel, message: LinkMessage, flight: int, from_s: float
    ) -> None:
        """The last byte of a frame over a shared medium has left."""
        channel.free_s = self.now_s
        channel.busy_s += self.now_s - from_s
        for arrives_s in channel.arrivals(self.now_s):
            self.at(arrives_s, self._arrive, source, target, channel, message, flight, from_s, self.now_s)
        self._wake(source, target, channel)

    def _arrive(
        self,
        source: NodeId,
        target: NodeId,
        channel: Channel,
        message: LinkMessage,
        flight: int,
        from_s: float,
        leaves_s: float,
    ) -> None:
        if channel.flight != flight or from_s < channel.blocked_s < leaves_s:
            return
        if type(message) is Chunk:
            if self.spans is not None and message.offset + message.length == message.size_bytes:
                self._note_transfer(source, target, message)
            if self.machines[source].condition.is_garbling:
                self.machines[target].garbled.add(message.body)
        self.event(target, ev.MessageReceived(peer=source, message=message))

    def _note_transfer(self, source: NodeId, target: NodeId, chunk: Chunk) -> None:
        start_s = self._departed.pop(chunk.body, None)
        if start_s is not None and chunk.body.edge != BLOB_EDGE:
            self.span(start_s, source, chunk.body, "transfer", target)
