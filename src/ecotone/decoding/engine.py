"""The driver: requests in, tokens out, over a pipeline of stages that may change under way. A pure machine.

Theory of operation. Every event is taken by `handle`, which answers with effects; the clock is an argument. A request
waits, is admitted to a slot, has its prompt computed in chunks, then its tokens one by one or with drafts. Frames travel
stage by stage and come back as results from the last stage. Only a result of the present epoch and the request's present
fence counts, and only for the next position: so every token is told once and in order, whatever is sent twice, comes late
or was guessed. A draft in flight that differs from the token that came raises the fence: what was sent behind it is stale.

The parts: `dispatch.py` (what is sent), `ledger.py` (keys and prefixes), `watch.py` (what is stuck), `transition.py` (how a
pipeline begins, heals and moves), `pace.py` (how fast it is). They share `state.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecotone.decoding.dispatch import Dispatcher
from ecotone.decoding.frame import Result, RowResult
from ecotone.decoding.ledger import Ledger
from ecotone.decoding.messages import Fault, Fence
from ecotone.decoding.pace import Pace
from ecotone.decoding.requests import Flight, Request
from ecotone.decoding.speculation import SpeculationPolicy
from ecotone.decoding.state import Mode, State
from ecotone.decoding.transition import Transition
from ecotone.decoding.watch import Watch
from ecotone.decoding.words import (
    Cancel,
    Drafted,
    Effect,
    Ended,
    Ending,
    Event,
    Heard,
    NodeDown,
    NodeUp,
    PipelineFailed,
    PipelineReady,
    Reshard,
    ResultCame,
    Say,
    Settings,
    StageRef,
    Stop,
    Submit,
    Tick,
    Tokens,
    WakeAt,
)

__all__ = ["Engine", "Measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the driver knows of itself at one moment; counters since it began."""

    mode: str
    epoch: int
    num_waiting: int
    num_active: int
    num_flying: int
    num_cached_sequences: int
    free_blocks: int
    total_blocks: int
    loop_s: float
    stage_s: float
    network_s: float
    wait_s: float
    frame_s: float
    stage_times_s: tuple[float, ...]
    depth: int
    acceptance: float
    counts: dict[str, int]


class Engine:
    """`policy` None: no drafts are asked for. It begins without a pipeline: send Reshard when its stages are loaded."""

    def __init__(self, settings: Settings, policy: SpeculationPolicy | None = None):
        ledger = Ledger(0, settings.block_tokens, reuse=settings.reuse_prefixes)
        self._state = State(settings, ledger, Pace(()))
        self._dispatcher = Dispatcher(self._state, policy)
        self._transition = Transition(self._state)
        self._watch = Watch(self._state, self._transition.lose)
        self._wake_s: float | None = None
        self._blank_faults = 0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """What `event` makes necessary, in order."""
        state = self._state
        state.now_s = now_s
        match event:
            case ResultCame():
                self._result(event.result)
            case Submit():
                self._submit(event)
            case Cancel():
                self._end(event.request, Ending.CANCELLED)
            case Stop():
                self._end(event.request, Ending.STOP)
            case Drafted():
                self._dispatcher.drafting.answered(event.drafts)
            case Heard():
                self._heard(event)
            case NodeUp() | NodeDown():
                self._watch.node(event.node, is_up=isinstance(event, NodeUp))
                if isinstance(event, NodeUp):
                    self._transition.node_up(event.node)
            case PipelineReady():
                self._transition.ready(event)
            case PipelineFailed():
                self._transition.failed(event)
            case Reshard():
                self._transition.reshard(event.stages)
            case Tick():
                self._wake_s = None
        self._deadlines()
        self._watch.run()
        self._transition.run()
        self._dispatcher.run()
        self._set_alarm()
        made, state.out = state.out, []
        return made

    @property
    def stages(self) -> tuple[StageRef, ...]:
        """The stages in force, or those that are being told their places, or that were when some were lost."""
        return self._state.pipeline

    def measured(self) -> Measured:
        """A snapshot, for people and metrics."""
        state, pace = self._state, self._state.pace
        counts, judged = dict(state.counts), max(state.counts["drafts_judged"], 1)
        counts["evicted_blocks"] = state.ledger.num_evicted_blocks
        return Measured(
            mode=state.mode.value, epoch=state.epoch, num_waiting=len(state.waiting), num_active=len(state.by_slot),
            num_flying=len(state.flights), num_cached_sequences=state.ledger.num_cached,
            free_blocks=state.ledger.num_free_blocks, total_blocks=state.ledger.tables.num_blocks, loop_s=pace.loop_s(1),
            stage_s=pace.stage_s(1), network_s=pace.network_s, wait_s=pace.wait_s, frame_s=pace.frame_s,
            stage_times_s=tuple(line.at(1) for line in pace.few), depth=pace.depth(1),
            acceptance=state.counts["drafts_accepted"] / judged, counts=counts,
        )  # fmt: skip

    # ---- requests --------------------------------------------------------------------------------------------------------

    def _submit(self, event: Submit) -> None:
        state = self._state
        refusal = self._refusal(event)
        if refusal:
            state.out.append(Ended(event.request, *refusal))
            state.counts[f"ended_{refusal[0].value}"] += 1
            return
        request = Request(
            number=event.request, prompt_length=len(event.prompt), tokens=list(event.prompt), params=event.params,
            order=state.next_order, priority=event.priority, deadline_s=event.deadline_s,
        )  # fmt: skip
        state.next_order += 1
        state.requests[event.request] = request
        state.waiting.append(request)
        state.waiting.sort(key=lambda r: (r.priority, r.order))
        state.counts["requests"] += 1

    def _refusal(self, event: Submit) -> tuple[Ending, str] | None:
        state, settings = self._state, self._state.settings
        length, ledger = len(event.prompt), self._state.ledger
        if not event.prompt or event.request in state.requests:
            return Ending.FAILED, "a request needs a number of its own and at least one token"
        outside = next((t for t in event.prompt if t < 0 or 0 < settings.vocabulary <= t), None)
        if outside is not None:
            return Ending.FAILED, f"token id {outside} in the prompt; they are from 0 to {settings.vocabulary - 1}"
        if length >= settings.context:
            text = (
                f"the prompt has {length} tokens, the context {settings.context}; at most {settings.context - 1} leave room"
            )
            return Ending.TOO_LONG, f"{text} for an answer"
        if state.pipeline and ledger.tables.blocks_for(length + 1) > ledger.tables.num_blocks:
            room = ledger.tables.num_blocks * ledger.block_tokens
            return Ending.TOO_LONG, f"the prompt has {length} tokens, the smallest stage has memory for {room}"
        if len(state.waiting) >= settings.queue_limit:
            return Ending.BUSY, f"{len(state.waiting)} requests wait already; try again later"
        return None

    def _end(self, number: int, ending: Ending, reason: str = "") -> None:
        request = self._state.requests.get(number)
        if request is not None:
            self._recall(request)
            self._state.end(request, ending, reason)

    def _recall(self, request: Request) -> None:
        """Have stages skip what is in flight of a request, unless another request builds on those very rows."""
        state = self._state
        if not request.flying or not request.slot or state.mode is not Mode.RUNNING:
            return
        if not state.ledger.is_built_upon(request.slot):
            self._raise_fence(request)

    def _raise_fence(self, request: Request) -> None:
        raised = ((request.slot, request.fence + 1),)
        for peer in self._state.stage_peers():
            self._state.out.append(Say(peer, Fence(shard=peer.shard, raised=raised)))

    def _deadlines(self) -> None:
        now_s = self._state.now_s
        late = [r for r in self._state.requests.values() if r.deadline_s is not None and r.deadline_s <= now_s]
        for request in late:
            self._end(request.number, Ending.DEADLINE, "its deadline came before its end")

    # ---- results ---------------------------------------------------------------------------------------------------------

    def _result(self, result: Result) -> None:
        state = self._state
        if result.epoch != state.epoch or state.mode is Mode.STRANDED:
            state.counts["late_results"] += 1
            return
        if result.is_replay:
            self._watch.progressed()
            self._transition.replayed(result)
            return
        flight = state.flights.pop(result.number, None)
        if flight is None:
            return
        if flight.kind != "order" and len(result.rows) == len(flight.parts):
            state.pace.add(
                result.times, flight.num_tokens, flight.kind != "prefill", state.now_s - flight.sent_s, came_s=state.now_s,
                beside=flight.beside, is_draft=flight.kind == "draft",
            )  # fmt: skip
            if flight.kind == "decode" and flight.beside > 1 and len(state.by_slot) == 1:
                state.pace.behind(flight.num_tokens, flight.beside - 1, state.now_s - flight.sent_s)
        elif flight.kind != "order":
            state.pace.skipped()
        self._watch.progressed()
        if flight.kind != "order":
            self._blank_faults = 0
        by_slot = {row.slot: row for row in result.rows}
        for number, fence, start, _ in flight.parts:
            request = state.requests.get(number)
            if request is not None and request.slot and request.fence == fence:
                row = by_slot.get(request.slot)
                self._settle(request, flight, start, row if row is not None and row.fence == fence else None)

    def _settle(self, request: Request, flight: Flight, start: int, row: RowResult | None) -> None:
        """One row of a frame that counts came back; None: it was skipped, which only a fault explains."""
        state = self._state
        request.flying.discard(flight.number)
        if row is None:
            return
        state.ledger.confirm(request.slot, row.stop)
        first, told = len(request.tokens), 0
        ending = None
        for index, token in enumerate(row.tokens):
            if row.start + 1 + index != len(request.tokens):
                continue
            ending = self._commit(request, token)
            if ending is Ending.STOP:
                break
            told += 1
            if ending is not None:
                break
        state.counts["tokens"] += told
        if told:
            self._dispatcher.drafting.told(request, told, is_drafts=flight.kind == "draft")
            skipped = len(row.tokens) - told if len(row.logprobs) == len(row.tokens) else 0
            logprobs = row.logprobs[: len(row.logprobs) - skipped]
            state.out.append(Tokens(request.number, first, tuple(request.tokens[first : first + told]), logprobs))
        if ending is not None:
            self._recall(request)
            state.end(request, ending)

    def _commit(self, request: Request, token: int) -> Ending | None:
        """The next token is settled; the request's end where this is it."""
        state, params = self._state, request.params
        request.is_dry, request.is_suspect, request.faults = False, False, 0
        if token in params.stop_tokens and request.num_generated >= params.min_tokens:
            return Ending.STOP
        request.tokens.append(token)
        if request.drafts:
            is_right = request.drafts.pop(0) == token
            self._dispatcher.drafting.judged(request, is_right, was_sent=True)
            if not is_right:
                if request.flying:
                    self._raise_fence(request)
                request.forget_flight()
                request.sent = len(request.tokens) - 1
                state.ledger.roll_back(request.slot, request.sent)
        elif request.proposal:
            is_right = request.proposal.pop(0) == token
            self._dispatcher.drafting.judged(request, is_right, was_sent=False)
            if not is_right:
                request.forget_drafts()
        if request.num_generated >= params.max_tokens or len(request.tokens) >= state.settings.context:
            return Ending.LENGTH
        return None

    # ---- nodes -----------------------------------------------------------------------------------------------------------

    def _heard(self, event: Heard) -> None:
        self._watch.heard(event.node)
        if isinstance(event.message, Fault):
            self._fault(event.message)
        else:
            self._watch.message(event.node, event.message)
            self._transition.message(event.message)

    def _fault(self, fault: Fault) -> None:
        """A stage could not compute a frame: begin the epoch anew. Whoever was in it goes alone until its next token.

        A request that was alone in frames that failed, some in a row, is at fault. Where no request was in it, twice
        without a result between, the stage is: it counts as lost.
        """
        state = self._state
        self._transition.import_failed(fault.shard, fault.reason)
        flight = state.flights.get(fault.number)
        if fault.epoch != state.epoch or state.mode is Mode.STRANDED:
            return
        state.counts["faults"] += 1
        suspects = {number for number, *_ in flight.parts} | {*flight.opened} if flight else set()
        self._blank_faults += not suspects
        if self._blank_faults >= state.settings.most_faults:
            self._blank_faults = 0
            nodes = tuple(s.peer.node for s in state.pipeline if s.peer.shard == fault.shard)
            self._transition.lose(nodes, f"its stage fails: {fault.reason}")
            return
        for number in sorted(suspects):
            request = state.requests.get(number)
            if request is not None:
                request.is_suspect = True
                request.faults += len(suspects) == 1
                if request.faults >= state.settings.most_faults:
                    self._end(number, Ending.FAILED, fault.reason)
        self._transition.again(fault.reason)

    def _wakes(self) -> tuple[float | None, ...]:
        return self._watch.wake_s(), self._transition.wake_s(), self._dispatcher.drafting.wake_s()

    def _set_alarm(self) -> None:
        state = self._state
        times = [r.deadline_s for r in state.requests.values() if r.deadline_s is not None]
        times += [at_s for at_s in self._wakes() if at_s is not None]
        wake_s = min(times, default=None)
        if wake_s is not None and (self._wake_s is None or wake_s < self._wake_s or self._wake_s <= state.now_s):
            self._wake_s = wake_s
            state.out.append(WakeAt(wake_s))
