"""The driver of a language model over machines: prompts in, text out, while its stages come and go. Thread-safe.

Theory of operation. One loop thread owns the engine of decoding/engine.py: it takes what was asked, what arrived and what
time brings from an inbox, and carries out the engine's effects. Loading (minutes) runs in threads of its own, drafting that
takes time in another (draft_room.py): all answer by the inbox. Whoever asked gets pieces of text by a callback from the
loop, which must return at once.

Machines come and go (llm/placement.py): after a loss stages are loaded elsewhere; a machine that says that it is leaving is
moved away from, keys and all, and then goes; where a planner decides, it is asked again when a machine comes.
"""

from __future__ import annotations

import itertools
import queue
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from ecotone.cluster import Cluster
from ecotone.decoding.answer import OnPiece, Piece
from ecotone.decoding.engine import Engine, Measured
from ecotone.decoding.frame import Frame, Result
from ecotone.decoding.messages import KvPiece
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import Drafter, SpeculationPolicy
from ecotone.decoding.words import (
    Cancel,
    Drafted,
    Drop,
    Effect,
    Emit,
    Ended,
    Ending,
    Event,
    Heard,
    NodeDown,
    NodeUp,
    PipelineFailed,
    PipelineReady,
    Reshard,
    Resharded,
    ResultCame,
    Say,
    Settings,
    Stop,
    Submit,
    Tick,
    Tokens,
    WakeAt,
    WantDrafts,
    WantPipeline,
)
from ecotone.llm.draft_room import DraftRoom
from ecotone.llm.host import Item
from ecotone.llm.pipeline import Pipeline, Progress, Stages
from ecotone.llm.placement import Placement, Replan
from ecotone.llm.service import GenerationService
from ecotone.llmplan import LlmPlan
from ecotone.protocol.message import NodeId
from ecotone.runtime.node import LEAVING
from ecotone.units import EcotoneError

__all__ = ["Answer", "Generator"]

T = TypeVar("T")
_RESTART_S = 0.1


class Answer(Protocol):
    """Makes pieces of what one request gets (llm/answers.py)."""

    @property
    def is_stopped(self) -> bool: ...

    def take(self, effect: Tokens | Ended) -> Piece | None: ...


@dataclass(slots=True)
class _Asked:
    on_piece: OnPiece
    answer: Answer


class Generator:
    """Drives the stages that `pipeline` loads for `plan`. `start` loads them; `close` lets them go.

    `make_answer(params)`: an assembler of text per request. `replan`: who decides after a loss and when machines join
    (default: decoding/succession.py). `policy` and `drafter`: speculation, or none.
    """

    def __init__(
        self,
        service: GenerationService,
        pipeline: Pipeline,
        plan: LlmPlan,
        cluster: Cluster,
        settings: Settings,
        make_answer: Callable[[SamplingParams], Answer],
        *,
        policy: SpeculationPolicy | None = None,
        drafter: Drafter | None = None,
        replan: Replan | None = None,
    ):
        self._service, self._pipeline, self._first_plan = service, pipeline, plan
        self._placement = Placement(service, pipeline, plan, cluster, replan)
        self._make_answer = make_answer
        self._engine = Engine(settings, policy if drafter is not None else None)
        self.settings = settings
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count(1)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._wake_s: float | None = None
        self._up_again: dict[str, float] = {}
        self._stages: Stages = ()  # that the engine took last
        self._moves: list[tuple[Stages, Future[Resharded]]] = []
        self._moving = threading.Lock()
        self._moved_away: set[str] = set()  # nodes that moves away from are under way
        self._is_closed = self._is_attached = self._has_stages = False
        self.losses: list[WantPipeline] = []
        self.moves: list[Resharded] = []
        self._thread = threading.Thread(target=self._run, name="llm-driver", daemon=True)
        self._drafts = None if drafter is None else DraftRoom(drafter, lambda drafts: self._tell(Drafted(drafts)))

    # ---- life ------------------------------------------------------------------------------------------------------------

    def start(self, progress: Progress | None = None) -> None:
        """Load the stages and begin; raises EcotoneError where a stage cannot be loaded, having let the others go."""
        if self._service.on_item is not None:
            raise EcotoneError("this process drives a language model already; close its generator first")
        stages = self._pipeline.load(self._first_plan, progress=progress)
        self._is_attached = True
        self._service.on_item, self._service.on_peer = self._arrived, self._peer
        self._service.on_restarted = self._restarted
        self._service.questions.on(LEAVING, self._leaves)
        self._thread.start()
        if self._drafts is not None:
            self._drafts.start()
        self._inbox.put(partial(self._begin_move, stages, Future()))

    def close(self) -> None:
        """End what is asked as cancelled, and let the stages go. Twice is no error."""
        if self._is_closed:
            return
        self._is_closed = True
        for number in list(self._asked):
            self.cancel(number)
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(10.0)
        if self._drafts is not None:
            self._drafts.close(10.0)
        for number in list(self._asked):  # asked just now
            self._end(Ended(number, Ending.FAILED, "the generator is closed"))
        for _, future in self._moves:
            if not future.done():
                future.set_exception(EcotoneError("the generator was closed"))
        if self._is_attached:
            self._service.on_item = self._service.on_peer = self._service.on_restarted = None
            self._service.questions.on(LEAVING, None)
        self._pipeline.close()

    # ---- asking ----------------------------------------------------------------------------------------------------------

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, on_piece: OnPiece, *, priority: int = 0,
        deadline_s: float | None = None,
    ) -> int:  # fmt: skip
        """Ask for an answer to `prompt` (token ids); its number. `deadline_s`: seconds from now.

        Every request ends with a piece that has an ending, whatever happens; errors are endings too.
        """
        number = next(self._numbers)
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(63))
        self._asked[number] = _Asked(on_piece, self._make_answer(params))
        if self._is_closed:
            self._end(Ended(number, Ending.FAILED, "the generator is closed"))
            return number
        until_s = None if deadline_s is None else time.monotonic() + deadline_s
        event = Submit(request=number, prompt=tuple(prompt), params=params, priority=priority, deadline_s=until_s)
        self._tell(event)
        return number

    def cancel(self, request: int) -> None:
        """End a request that is not wanted any more; nothing where it has ended."""
        self._tell(Cancel(request))

    def measured(self) -> Measured:
        """What the engine knows of itself now."""
        return self._ask_loop(self._engine.measured)

    @property
    def is_running(self) -> bool:
        """Whether stages are there for what is asked now; while lost ones are replaced requests wait."""
        return not self._is_closed and self._has_stages

    @property
    def plan(self) -> LlmPlan:
        """The plan in force."""
        return self._placement.plan

    def reshard(self, plan: LlmPlan, progress: Progress | None = None, deadline_s: float = 600.0) -> Resharded:
        """Move to `plan` while requests go on; what became of it. Raises EcotoneError where a stage cannot be loaded."""
        with self._moving:
            stages = self._pipeline.load(plan, progress=progress)
            future: Future[Resharded] = Future()
            self._inbox.put(partial(self._begin_move, stages, future))
            try:
                return future.result(deadline_s)
            except TimeoutError:
                raise EcotoneError(f"the move has not ended after {deadline_s:g} s; requests go on where they are") from None

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            now_s = time.monotonic()
            wait_s = None if self._wake_s is None else self._wake_s - now_s
            if wait_s is not None and wait_s <= 0:
                self._wake_s = None
                job: Callable[[], None] | None = partial(self._handle, Tick())
            else:
                try:
                    job = self._inbox.get(timeout=wait_s)
                except queue.Empty:
                    continue
            if job is None:
                return
            try:
                job()
            except Exception as error:  # a fault of ours: say so loudly, end the requests, do not hang
                traceback.print_exc(file=sys.stderr)
                self._crash(f"the driver failed inside: {type(error).__name__}: {error}")

    def _tell(self, event: Event) -> None:
        self._inbox.put(partial(self._handle, event))

    def _handle(self, event: Event) -> None:
        if isinstance(event, Reshard | PipelineReady):
            self._has_stages = True
        effects = self._engine.handle(event, time.monotonic())
        if self._engine.stages is not self._stages:
            self._stages = self._engine.stages
            self._pipeline.settle(self._stages)
            self._aside(self._pipeline.tidy)
        for effect in effects:
            self._carry_out(effect)

    def _aside(self, job: Callable[[], None]) -> None:
        """Do what takes time in a thread of its own."""
        threading.Thread(target=job, name="llm-aside", daemon=True).start()

    def _ask_loop(self, question: Callable[[], T]) -> T:
        future: Future[T] = Future()
        self._inbox.put(lambda: future.set_result(question()))
        try:
            return future.result(10.0)
        except TimeoutError:
            raise EcotoneError("the generator is closed") from None

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Emit(to, frame):
                self._service.send(to.node, self._service.name, to.shard, frame)
            case Say(to, message):
                self._service.send(to.node, self._service.name, to.shard, message)
            case Tokens():
                self._give(effect)
            case Ended():
                self._end(effect)
            case WakeAt(at_s):
                self._wake_s = at_s
            case WantDrafts(asks) if self._drafts is not None:
                if drafts := self._drafts.ask(asks):
                    self._tell(Drafted(drafts))  # not now: what arrived meanwhile comes first
            case Drop(request) if self._drafts is not None:
                self._drafts.end(request)
            case WantPipeline():
                self._has_stages = False
                self.losses.append(effect)
                self._placement.lost(effect.lost)
                self._aside(partial(self._find_stages, effect))
            case Resharded():
                self._moved(effect)

    def _give(self, tokens: Tokens) -> None:
        asked = self._asked.get(tokens.request)
        if asked is None:
            return
        try:
            piece = asked.answer.take(tokens)
            if piece is not None:
                asked.on_piece(piece)
        except Exception as error:  # of one asker: the others go on
            traceback.print_exc(file=sys.stderr)
            self._end(Ended(tokens.request, Ending.FAILED, f"what takes the text failed: {type(error).__name__}: {error}"))
            self._tell(Cancel(tokens.request))
            return
        if asked.answer.is_stopped:
            self._tell(Stop(tokens.request))  # not now: the engine's other effects go out first, in order

    def _end(self, ended: Ended) -> None:
        asked = self._asked.pop(ended.request, None)
        if asked is None:
            return
        try:
            piece = asked.answer.take(ended)
            if piece is not None:
                asked.on_piece(piece)
        except Exception:  # of one asker: the others go on
            traceback.print_exc(file=sys.stderr)

    def _crash(self, reason: str) -> None:
        for number in list(self._asked):
            self._end(Ended(number, Ending.FAILED, reason))

    # ---- nodes -----------------------------------------------------------------------------------------------------------

    def _arrived(self, node: str, item: Item) -> None:
        if isinstance(item, Result):
            self._tell(ResultCame(item))
        elif not isinstance(item, KvPiece | Frame):  # those are for shards
            self._tell(Heard(node, item))

    def _peer(self, node: str, is_up: bool) -> None:
        if not is_up:
            self._tell(NodeDown(node))
            return
        self._placement.came(node)
        if self._up_again.get(node, 0.0) <= time.monotonic():
            self._tell(NodeUp(node))
        self._aside(partial(self._came, node))

    def _restarted(self, node: str) -> None:
        """Another process than before: its shards are gone, however short it was away."""
        self._placement.began_anew(node)
        patience_s = self.settings.grace_s + _RESTART_S
        if all(stage.peer.node != node for stage in self._stages):
            return
        self._up_again[node] = time.monotonic() + patience_s
        self._tell(NodeDown(node))
        timer = threading.Timer(patience_s, self._tell, (NodeUp(node),))
        timer.daemon = True
        timer.start()

    def _find_stages(self, wanted: WantPipeline) -> None:
        """In a thread: load what takes the place of what is lost."""
        try:
            stages = self._placement.after_loss()
        except EcotoneError as error:
            self._tell(PipelineFailed(wanted.attempt, str(error)))
        except Exception as error:  # a fault of ours must not leave requests without an answer
            traceback.print_exc(file=sys.stderr)
            self._tell(PipelineFailed(wanted.attempt, f"{type(error).__name__}: {error}"))
        else:
            self._inbox.put(partial(self._found, wanted.attempt, stages))

    def _found(self, attempt: int, stages: Stages) -> None:
        self._handle(PipelineReady(attempt, stages))
        self._forget_unless_taken(stages)

    def _forget_unless_taken(self, stages: Stages) -> None:
        if self._stages != stages:
            self._pipeline.drop(stages)
            self._aside(self._pipeline.tidy)

    # ---- moving ----------------------------------------------------------------------------------------------------------

    def _begin_move(self, stages: Stages, future: Future[Resharded]) -> None:
        if self._pipeline.is_whole(stages):
            self._moves.append((stages, future))
            self._handle(Reshard(stages))
        else:
            self._pipeline.drop(stages)
            future.set_exception(EcotoneError("a machine was lost while stages were being loaded for a move"))

    def _moved(self, report: Resharded) -> None:
        if self._moves:
            stages, future = self._moves.pop(0)
            self._forget_unless_taken(stages)
            if report.choice != "begin":
                self.moves.append(report)
            future.set_result(report)

    def _leaves(self, peer: NodeId, body: dict[str, Any]) -> None:
        """A node says, again and again, that it is leaving: it goes when it holds no shard any more."""
        node = str(peer)
        self._placement.leaves(node)
        plan = self.plan
        is_needed = node in plan.devices or any(standby.device == node for standby in plan.standbys)
        if is_needed and node not in self._moved_away:
            self._moved_away.add(node)
            self._aside(partial(self._move_away, node))

    def _move_away(self, node: str) -> None:
        self._move_to_replanned(f"node {node} is leaving")
        self._moved_away.discard(node)

    def _came(self, node: str) -> None:
        """In a thread: a node's link is up (again)."""
        self._pipeline.tidy()
        if self._placement.is_planned:
            self._move_to_replanned(f"node {node} came")

    def _move_to_replanned(self, why: str) -> None:
        """Move to what the planner makes of the machines that are there, unless that is what there is."""
        try:
            plan = self._placement.replanned()
            if not self._is_closed and plan.identity() != self.plan.identity():
                self.reshard(plan)
        except EcotoneError as error:
            self.moves.append(Resharded(f"{why}: {error}"))
