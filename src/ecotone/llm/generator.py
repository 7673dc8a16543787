"""The driver of a language model over machines: prompts in, text out, while its stages come and go. Thread-safe.

Theory of operation. One loop thread owns the engine of decoding/engine.py: it takes what was asked, what arrived and what
time brings from an inbox, and carries out the engine's effects. Loading (minutes) runs in a thread of its own, drafting in
another: both answer by the inbox. Whoever asked gets pieces of text by a callback from the loop, which must return at once.
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
from typing import Protocol, TypeVar

from ecotone.cluster import Cluster, DeviceId
from ecotone.decoding.answer import OnPiece, Piece
from ecotone.decoding.engine import Engine, Measured
from ecotone.decoding.frame import Result
from ecotone.decoding.messages import KvPiece
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import Draft, DraftAsk, Drafter, SpeculationPolicy
from ecotone.decoding.succession import succeed
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
from ecotone.llm.host import Item
from ecotone.llm.pipeline import Pipeline, Progress
from ecotone.llm.service import GenerationService
from ecotone.llmplan import LlmPlan
from ecotone.units import EcotoneError

__all__ = ["Answer", "Generator", "Replan"]

T = TypeVar("T")
Replan = Callable[[LlmPlan, frozenset[DeviceId]], LlmPlan]
"""(plan in force, devices that answer) -> the plan to go on with; raises EcotoneError where there is none."""
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
        self._service, self._pipeline, self._cluster, self._first_plan = service, pipeline, cluster, plan
        self._make_answer, self._drafter, self._replan = make_answer, drafter, replan or self._succeed
        self._engine = Engine(settings, policy if drafter is not None else None)
        self.settings = settings
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count(1)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._wake_s: float | None = None
        self._up_again: dict[str, float] = {}
        self._moves: list[Future[Resharded]] = []
        self._moving = threading.Lock()
        self._asks: queue.SimpleQueue[tuple[DraftAsk, ...] | int | None] = queue.SimpleQueue()
        self._is_closed = self._has_stages = False
        self.losses: list[WantPipeline] = []
        self._threads = [threading.Thread(target=self._run, name="llm-driver", daemon=True)]
        if drafter is not None:
            self._threads.append(threading.Thread(target=self._draft, name="llm-drafter", daemon=True))

    # ---- life ------------------------------------------------------------------------------------------------------------

    def start(self, progress: Progress | None = None) -> None:
        """Load the stages and begin; raises EcotoneError where a stage cannot be loaded, having let the others go."""
        if self._service.on_item is not None:
            raise EcotoneError("this process drives a language model already; close its generator first")
        stages = self._pipeline.load(self._first_plan, progress=progress)
        self._service.on_item, self._service.on_peer = self._arrived, self._peer
        self._service.on_restarted = self._restarted
        for thread in self._threads:
            thread.start()
        self._tell(Reshard(stages))

    def close(self) -> None:
        """End what is asked as cancelled, and let the stages go. Twice is no error."""
        if self._is_closed:
            return
        self._is_closed = True
        for number in list(self._asked):
            self.cancel(number)
        self._asks.put(None)
        self._inbox.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(10.0)
        self._service.on_item = self._service.on_peer = self._service.on_restarted = None
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
        return self._pipeline.plan or self._first_plan

    def reshard(self, plan: LlmPlan, progress: Progress | None = None, deadline_s: float = 600.0) -> Resharded:
        """Move to `plan` while requests go on; what became of it. Raises EcotoneError where a stage cannot be loaded."""
        with self._moving:
            before = self.plan
            stages = self._pipeline.load(plan, progress=progress)
            future: Future[Resharded] = Future()
            self._inbox.put(partial(self._begin_move, stages, future))
            try:
                report = future.result(deadline_s)
            except TimeoutError:
                raise EcotoneError(f"the move has not ended after {deadline_s:g} s; requests go on where they are") from None
            if report.error:
                self._pipeline.plan = before
            return report

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
        for effect in self._engine.handle(event, time.monotonic()):
            self._carry_out(effect)

    def _ask_loop(self, question: Callable[[], T]) -> T:
        future: Future[T] = Future()
        self._inbox.put(lambda: future.set_result(question()))
        return future.result(10.0)

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
            case WantDrafts(asks):
                self._asks.put(asks)
            case Drop(request):
                self._asks.put(request)
            case WantPipeline():
                self._has_stages = False
                self.losses.append(effect)
                threading.Thread(target=self._find_stages, args=(effect,), name="llm-find", daemon=True).start()
            case Resharded():
                self._moved(effect)

    def _give(self, tokens: Tokens) -> None:
        asked = self._asked.get(tokens.request)
        if asked is None:
            return
        piece = asked.answer.take(tokens)
        if piece is not None:
            asked.on_piece(piece)
        if asked.answer.is_stopped:
            self._tell(Stop(tokens.request))  # not now: the engine's other effects go out first, in order

    def _end(self, ended: Ended) -> None:
        asked = self._asked.pop(ended.request, None)
        piece = asked.answer.take(ended) if asked is not None else None
        if asked is not None and piece is not None:
            asked.on_piece(piece)

    def _crash(self, reason: str) -> None:
        for number in list(self._asked):
            self._end(Ended(number, Ending.FAILED, reason))

    # ---- nodes -----------------------------------------------------------------------------------------------------------

    def _arrived(self, node: str, item: Item) -> None:
        if isinstance(item, Result):
            self._tell(ResultCame(item))
        elif not isinstance(item, KvPiece) and hasattr(item, "__slots__"):
            self._tell(Heard(node, item))  # type: ignore[arg-type]

    def _peer(self, node: str, is_up: bool) -> None:
        if not is_up:
            self._tell(NodeDown(node))
        elif self._up_again.get(node, 0.0) <= time.monotonic():
            self._tell(NodeUp(node))

    def _restarted(self, node: str) -> None:
        """Another process than before: its shards are gone, however short it was away."""
        patience_s = self.settings.grace_s + _RESTART_S
        self._up_again[node] = time.monotonic() + patience_s
        self._tell(NodeDown(node))
        timer = threading.Timer(patience_s, self._tell, (NodeUp(node),))
        timer.daemon = True
        timer.start()

    def _find_stages(self, wanted: WantPipeline) -> None:
        """In a thread: load what takes the place of what is lost."""
        try:
            lost = frozenset(DeviceId(name) for name in wanted.lost)
            alive = frozenset(DeviceId(name) for name in self._service.peers()) - lost
            names = frozenset(device.name for device in self._cluster.devices)
            stages = self._pipeline.load(self._replan(self.plan, alive & names), lost=lost)
        except EcotoneError as error:
            self._tell(PipelineFailed(wanted.attempt, str(error)))
            return
        except Exception as error:  # a fault of ours must not leave requests without an answer
            traceback.print_exc(file=sys.stderr)
            self._tell(PipelineFailed(wanted.attempt, f"{type(error).__name__}: {error}"))
            return
        self._tell(PipelineReady(wanted.attempt, stages))

    def _succeed(self, plan: LlmPlan, alive: frozenset[DeviceId]) -> LlmPlan:
        return succeed(plan, self._cluster, alive, [loaded.weight_bytes for loaded in self._pipeline.loaded])

    # ---- moving ----------------------------------------------------------------------------------------------------------

    def _begin_move(self, stages: tuple[object, ...], future: Future[Resharded]) -> None:
        self._moves.append(future)
        self._handle(Reshard(stages))  # type: ignore[arg-type]

    def _moved(self, report: Resharded) -> None:
        threading.Thread(target=self._pipeline.release, args=(report.unused,), name="llm-release", daemon=True).start()
        if self._moves:
            self._moves.pop(0).set_result(report)

    # ---- drafts ----------------------------------------------------------------------------------------------------------

    def _draft(self) -> None:
        """In a thread: answer what asks for drafts."""
        assert self._drafter is not None
        while (item := self._asks.get()) is not None:
            if isinstance(item, int):
                self._drafter.end(item)
                continue
            begin_s = time.perf_counter()
            try:
                found = self._drafter.draft(item)
            except Exception:  # no drafts is an answer; the text does not depend on them
                traceback.print_exc(file=sys.stderr)
                found = [()] * len(item)
            seconds = (time.perf_counter() - begin_s) / len(item)
            drafts = tuple(
                Draft(request=ask.request, ticket=ask.ticket, tokens=tuple(tokens), seconds=seconds)
                for ask, tokens in zip(item, found, strict=True)
            )
            self._tell(Drafted(drafts))
