"""World 1 of generation: the driver and the stages of ecotone.decoding on a virtual clock, with scripted faults.

A node computes one thing at a time; a directed link is a server in order, with latency and rate. The model is made of hashes
(hashmodel.py), so the text of every request can be told in advance, and the seconds that computing takes are stated. Faults:
a node dies (its links go down a moment later), stops and goes on, becomes slow, a link carries nothing for a while, a node
joins, one step fails. Everything that the machines ask for is carried out here, nothing is decided but where lost stages go:
to the first node that lives and holds fewest.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ecotone.decoding.engine import Engine
from ecotone.decoding.frame import Frame, Result
from ecotone.decoding.messages import Alive, KvPiece, Message, Peer, Probe, Release
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import Draft, Drafter, SpeculationPolicy
from ecotone.decoding.stage import Came, Finished, SendFrame, SendKv, SendResult, Stage, StageEffect, StartWork, Tell
from ecotone.decoding.words import (
    Cancel,
    Drafted,
    Effect,
    Emit,
    Ended,
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
    StageRef,
    Submit,
    Tick,
    Tokens,
    WakeAt,
    WantDrafts,
    WantPipeline,
)
from ecotone.decoding.work import Done, ExportWork, ImportWork, StepWork
from ecotone.simulator.hashmodel import HashShard

__all__ = ["DRIVER", "Answer", "Generation", "LinkTime", "SpanSpec", "StageTimes"]

DRIVER = "driver"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds for a step: fixed, per row token in short rows, per token in long ones, of each layer."""

    fixed_s: float = 0.0
    token_s: float = 0.0
    long_token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTime:
    latency_s: float = 0.0
    bytes_per_s: float = 1e9


@dataclass(frozen=True, slots=True)
class SpanSpec:
    """Layers [first, last) on `node`."""

    node: str
    first: int
    last: int
    num_blocks: int = 4096


@dataclass(slots=True)
class Answer:
    """What a request has got so far. `times_s`: when each token came."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    ended: Ended | None = None
    ended_s: float = 0.0
    submitted_s: float = 0.0
    prompt_length: int = 0


@dataclass(slots=True)
class _Node:
    name: str
    stages: dict[int, Stage] = field(default_factory=dict)
    shards: dict[int, HashShard] = field(default_factory=dict)
    queue: deque[tuple[int, StartWork]] = field(default_factory=deque)
    is_busy: bool = False
    is_alive: bool = True
    is_stopped: bool = False
    held: list[Callable[[], None]] = field(default_factory=list)  # what happened while it was stopped
    slow: float = 1.0
    num_failing: int = 0  # steps to come that end in an error
    is_told: bool = True  # the driver knows whether it lives
    life: int = 0


class Generation:
    """A world with `nodes` besides the driver. Call `begin`, `submit`, script faults with `at`, then `run`."""

    def __init__(
        self,
        nodes: Sequence[str],
        settings: Settings,
        *,
        times: StageTimes | Callable[[SpanSpec], StageTimes] = StageTimes(),
        link: LinkTime = LinkTime(),
        links: Mapping[tuple[str, str], LinkTime] | None = None,
        policy: SpeculationPolicy | None = None,
        drafter: Drafter | None = None,
        draft_s: float = 0.0,
        load_s: float = 0.5,
        detect_s: float = 0.01,
        boundary_bytes: int = 1 << 24,
        vocabulary: int = 1000,
    ):
        self.now_s, self.engine = 0.0, Engine(settings, policy)
        self.settings, self.vocabulary = settings, vocabulary
        self.answers: dict[int, Answer] = {}
        self.reports: list[Resharded] = []
        self.wanted: list[WantPipeline] = []
        self.num_events = 0
        self.computed: dict[int, int] = {}  # tokens times layers by shard, of those that are gone as well
        self._drafter, self._draft_s, self._load_s, self._detect_s = drafter, draft_s, load_s, detect_s
        self._boundary_bytes = boundary_bytes
        self._times: Callable[[SpanSpec], StageTimes] = (lambda _: times) if isinstance(times, StageTimes) else times
        self._link, self._links = link, dict(links or {})
        self._free_s: dict[tuple[str, str], float] = defaultdict(float)
        self._cut_until_s: dict[tuple[str, str], float] = defaultdict(float)
        self.nodes = {name: _Node(name) for name in (DRIVER, *nodes)}
        self._specs: dict[int, SpanSpec] = {}
        self._loaded: dict[int, str] = {}  # shard -> node, as long as somebody may need it
        self._moving: tuple[StageRef, ...] = ()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order, self._shards, self._requests = itertools.count(), itertools.count(1), itertools.count(1)
        self._wake = 0

    # ---- what a test says ------------------------------------------------------------------------------------------------

    def begin(self, spans: Sequence[SpanSpec]) -> None:
        """Load these stages and start."""
        self.reshard(spans)

    def reshard(self, spans: Sequence[SpanSpec]) -> None:
        """Move to these spans; those that are there already stay as they are."""
        alive = [s for s in self.engine.stages if self._is_there(s)]
        kept = {(s.peer.node, s.first, s.last): s for s in alive}
        stages = tuple(kept.get((span.node, span.first, span.last)) or self._load(span) for span in spans)
        self._moving = _with_codecs(stages)
        self._tell(Reshard(self._moving))

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, *, at_s: float | None = None, priority: int = 0,
        deadline_s: float | None = None,
    ) -> int:  # fmt: skip
        """Hand a request in, now or at a time; its number."""
        number = next(self._requests)
        event = Submit(request=number, prompt=tuple(prompt), params=params, priority=priority, deadline_s=deadline_s)

        self.answers[number] = Answer(prompt_length=len(prompt))

        def go() -> None:
            self.answers[number].submitted_s = self.now_s
            self._tell(event)

        self.at(self.now_s if at_s is None else at_s, go)
        return number

    def cancel(self, request: int) -> None:
        self._tell(Cancel(request))

    def at(self, at_s: float, do: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._heap, (at_s, next(self._order), do))

    def kill(self, name: str) -> None:
        """The node is gone, with all it holds; the driver sees its link go down shortly after."""
        node = self.nodes[name]
        if node.is_alive:
            node.is_alive = False
            node.life += 1
            self._gather(node)
            node.stages, node.shards, node.queue, node.held = {}, {}, deque(), []
            node.is_busy = node.is_stopped = node.is_told = False
            self.at(self.now_s + self._detect_s, lambda: self._tell_down(node))

    def start(self, name: str) -> None:
        """A node comes, or comes back, empty."""
        node = self.nodes.setdefault(name, _Node(name))
        self._tell_down(node)
        node.is_alive = True
        self._tell(NodeUp(name))

    def fail(self, name: str) -> None:
        """The node's next step ends in an error, and changes nothing."""
        self.nodes[name].num_failing += 1

    def stop(self, name: str, for_s: float) -> None:
        """The node does nothing for a while and says nothing; its links stay up."""
        node = self.nodes[name]
        if node.is_alive and not node.is_stopped:
            node.is_stopped, life = True, node.life
            self.at(self.now_s + for_s, lambda: self._resume(node, life))

    def cut(self, source: str, target: str, for_s: float) -> None:
        """The directed link carries nothing for a while; nobody is told."""
        self._cut_until_s[source, target] = self.now_s + for_s

    def run(self, until_s: float = 1e6, most_events: int = 10**9) -> None:
        """Go on until every request has ended, nothing is to happen, `until_s`, or so many events since the beginning."""
        while self._heap and self._heap[0][0] <= until_s and self.num_events < most_events:
            if self.answers and all(a.ended for a in self.answers.values()) and not self._is_expecting():
                return
            self.now_s, _, do = heapq.heappop(self._heap)
            self.num_events += 1
            do()

    def steps(self, span: tuple[int, int]) -> int:
        """Tokens times layers that shards of this span have computed, over all nodes."""
        for node in self.nodes.values():
            self._gather(node)
        return sum(
            count
            for shard, count in self.computed.items()
            if (s := self._specs[shard]).first == span[0] and s.last == span[1]
        )

    def _is_expecting(self) -> bool:
        return self.now_s < self._busy_until_s

    _busy_until_s = 0.0

    def hold_until(self, at_s: float) -> None:
        """Do not end the run before this time even where all requests have ended."""
        self._busy_until_s = max(self._busy_until_s, at_s)
        self.at(at_s, lambda: None)

    # ---- loading ---------------------------------------------------------------------------------------------------------

    def _load(self, span: SpanSpec) -> StageRef:
        shard, node = next(self._shards), self.nodes[span.node]
        node.stages[shard] = Stage(shard, span.first, span.last, boundary_bytes=self._boundary_bytes)
        node.shards[shard] = HashShard(span.first, span.last, span.num_blocks, self.vocabulary, self.settings.block_tokens)
        self._specs[shard], self._loaded[shard] = span, span.node
        layers = span.last - span.first
        return StageRef(
            peer=Peer(node=span.node, shard=shard), first=span.first, last=span.last, makes="hash",
            num_blocks=span.num_blocks if layers else 0, block_bytes=8 * self.settings.block_tokens * layers,
            boundary_bytes_per_token=8,
        )  # fmt: skip

    def _replace_lost(self, wanted: WantPipeline) -> None:
        """Put lost stages on living nodes, empty ones first; on a lost one that answers again where there is no other."""
        answering = [n for n in self.nodes.values() if n.is_alive and not n.is_stopped and n.name != DRIVER]
        alive = [n for n in answering if n.name not in wanted.lost] or answering
        if not alive:
            self._tell(PipelineFailed(wanted.attempt, "no node is left"))
            return
        made = []
        for stage in wanted.stages:
            if self._is_there(stage) and stage.peer.node not in wanted.lost:
                made.append(stage)
                continue
            spare = min(alive, key=lambda n: (len(n.stages), n.name))
            made.append(self._load(replace(self._specs[stage.peer.shard], node=spare.name)))
        self._tell(PipelineReady(wanted.attempt, _with_codecs(tuple(made))))
        needed = {stage.peer.shard for stage in (*self.engine.stages, *self._moving)}
        self._release(shard for shard in self._loaded if shard not in needed)

    def _is_there(self, stage: StageRef) -> bool:
        node = self.nodes[stage.peer.node]
        return node.is_alive and stage.peer.shard in node.stages

    def _release(self, shards: Iterable[int]) -> None:
        for shard in list(shards):
            node = self._loaded.pop(shard, None)
            if node is not None:
                self._send(DRIVER, Peer(node=node, shard=shard), Release(shard=shard), 200)

    # ---- the driver ------------------------------------------------------------------------------------------------------

    def _tell_down(self, node: _Node) -> None:
        if not node.is_told:
            node.is_told = True
            self._tell(NodeDown(node.name))

    def _tell(self, event: Event) -> None:
        for effect in self.engine.handle(event, self.now_s):
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Emit(to, frame):
                self._send(DRIVER, to, frame, 40 * len(frame.rows) + 8 * frame.num_tokens)
            case Say(to, message):
                self._send(DRIVER, to, message, 200)
            case Tokens():
                answer = self.answers[effect.request]
                assert effect.position == answer.prompt_length + len(answer.tokens), "tokens are missing, or told twice"
                assert answer.ended is None, "tokens after the end"
                answer.tokens += effect.tokens
                answer.times_s += [self.now_s] * len(effect.tokens)
            case Ended():
                assert self.answers[effect.request].ended is None, "a request ended twice"
                self.answers[effect.request].ended, self.answers[effect.request].ended_s = effect, self.now_s
            case WantDrafts(asks):
                assert self._drafter is not None
                found = self._drafter.draft(asks)
                spent_s = self._draft_s * max((len(tokens) for tokens in found), default=0)
                drafts = tuple(
                    Draft(request=ask.request, ticket=ask.ticket, tokens=tuple(tokens), seconds=self._draft_s * len(tokens))
                    for ask, tokens in zip(asks, found, strict=True)
                )
                self.at(self.now_s + spent_s, lambda: self._tell(Drafted(drafts)))
            case WantPipeline():
                self.wanted.append(effect)
                self.at(self.now_s + self._load_s, lambda: self._replace_lost(effect))
            case Resharded():
                in_force = {stage.peer for stage in self.engine.stages}
                assert not in_force & set(effect.unused), "a shard in force was called unused"
                self.reports.append(effect)
                self._moving = ()
                self._release(peer.shard for peer in effect.unused)
            case WakeAt(at_s):
                self._wake += 1
                wake = self._wake
                self.at(max(at_s, self.now_s), lambda: self._tell(Tick()) if wake == self._wake else None)

    # ---- nodes -----------------------------------------------------------------------------------------------------------

    def _arrive(self, sender: str, to: Peer, item: Frame | Result | Message | KvPiece, life: int) -> None:
        node = self.nodes[to.node]
        if not node.is_alive or node.life != life:
            return
        if node.is_stopped:
            node.held.append(lambda: self._arrive(sender, to, item, life))
            return
        if to.shard == 0 and to.node == DRIVER:
            self._tell(ResultCame(item) if isinstance(item, Result) else Heard(sender, item))  # type: ignore[arg-type]
        elif isinstance(item, Probe):
            states = tuple(stage.state(self.now_s) for stage in node.stages.values())
            self._send(node.name, Peer(node=DRIVER), Alive(nonce=item.nonce, shards=states), 200)
        elif isinstance(item, Release):
            self._gather(node)
            node.stages.pop(item.shard, None)
            node.shards.pop(item.shard, None)
        elif to.shard in node.stages:
            self._apply(node, to.shard, node.stages[to.shard].handle(Came(item), self.now_s))  # type: ignore[arg-type]

    def _apply(self, node: _Node, shard: int, effects: Sequence[StageEffect]) -> None:
        for effect in effects:
            match effect:
                case StartWork():
                    node.queue.append((shard, effect))
                    self._compute(node)
                case SendFrame(to, frame):
                    to = to if to.node else Peer(node=DRIVER)
                    self._send(node.name, to, frame, 40 * len(frame.rows) + len(frame.payload))
                case SendResult(result):
                    self._send(node.name, Peer(node=DRIVER), result, 100)
                case SendKv(to, piece):
                    self._send(node.name, to, piece, 100 + len(piece.payload))
                case Tell(message):
                    self._send(node.name, Peer(node=DRIVER), message, 200)

    def _compute(self, node: _Node) -> None:
        if node.is_busy or not node.queue:
            return
        shard, effect = node.queue.popleft()
        if shard not in node.shards:
            self._compute(node)
            return
        if node.num_failing and isinstance(effect.work, StepWork):
            node.num_failing -= 1
            done = Done(work=effect.work, error="the step failed, as it was told to")
        else:
            done = node.shards[shard].do(effect.work)
        seconds = self._seconds(shard, done) * node.slow
        node.is_busy, life = True, node.life
        self.at(self.now_s + seconds, lambda: self._finished(node, shard, replace(done, seconds=seconds), life))

    def _finished(self, node: _Node, shard: int, done: Done, life: int) -> None:
        if node.life != life or not node.is_alive:
            return
        if node.is_stopped:
            node.held.append(lambda: self._finished(node, shard, done, life))
            return
        node.is_busy = False
        if shard in node.stages:
            self._apply(node, shard, node.stages[shard].handle(Finished(done), self.now_s))
        self._compute(node)

    def _seconds(self, shard: int, done: Done) -> float:
        span = self._specs[shard]
        times, layers = self._times(span), span.last - span.first
        match done.work:
            case StepWork(rows=rows) if rows:
                few = sum(len(row.tokens) for row in rows if len(row.tokens) <= 8)
                many = sum(len(row.tokens) for row in rows) - few
                return layers * (times.fixed_s + few * times.token_s + many * times.long_token_s)
            case ExportWork() | ImportWork():
                return 1e-4
        return 0.0

    def _resume(self, node: _Node, life: int) -> None:
        if node.life == life and node.is_stopped:
            node.is_stopped = False
            held, node.held = node.held, []
            for go_on in held:
                go_on()

    def _gather(self, node: _Node) -> None:
        for shard, held in node.shards.items():
            self.computed[shard] = held.num_computed

    # ---- links -----------------------------------------------------------------------------------------------------------

    def _send(self, source: str, to: Peer, item: Frame | Result | Message | KvPiece, size_bytes: int) -> None:
        target = self.nodes[to.node]
        life = target.life
        if source == to.node:
            self.at(self.now_s, lambda: self._arrive(source, to, item, life))
            return
        ends = (source, to.node)
        link = self._links.get(ends, self._link)
        begin_s = max(self.now_s, self._free_s[ends], self._cut_until_s[ends])
        self._free_s[ends] = begin_s + size_bytes / link.bytes_per_s
        self.at(self._free_s[ends] + link.latency_s, lambda: self._arrive(source, to, item, life))


def _with_codecs(stages: tuple[StageRef, ...]) -> tuple[StageRef, ...]:
    return tuple(replace(stage, codec="fp32" if index + 1 < len(stages) else "none") for index, stage in enumerate(stages))
