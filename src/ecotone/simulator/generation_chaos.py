"""Runs a scene of generation and judges it: was a text changed, a request lost or stuck, anything left behind?

changed   a text that is not the model's (a prefix of it where the request was cancelled or late), or an unfit end
lost      an end NODE_LOST or FAILED, though nodes lived that could have gone on (all nodes were never gone for long)
stuck     no end, a deadline that was missed, or a world that goes round without end
left      slots, blocks, boundaries or shards that stay once all requests have ended, against what the driver counts

The text of every request is known in advance (hashmodel.py), since no key may matter but those of the request itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from ecotone.decoding.frame import Cut
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import FixedPolicy, SpeculationPolicy
from ecotone.decoding.words import Ending, Settings
from ecotone.simulator.generation import DRIVER, Generation, LinkTime, SpanSpec, StageTimes
from ecotone.simulator.generation_scene import Ask, Fault, GenerationScene, draw_generation_scene
from ecotone.simulator.hashmodel import POISON, HashDrafter, hash_text
from ecotone.simulator.shrink import shortest

__all__ = ["GenerationVerdict", "run_generation_scene", "run_generation_seed", "shrink_generation_scene"]

_MOST_EVENTS, _PATIENCE_S, _STRAND_S = 300_000, 400.0, 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationVerdict:
    changed: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    stuck: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    endings: tuple[tuple[str, int], ...] = ()
    num_events: int = 0
    counts: tuple[tuple[str, int], ...] = ()

    @property
    def ways(self) -> tuple[str, ...]:
        """In which ways it failed."""
        return tuple(way for way in ("changed", "lost", "stuck", "left") if getattr(self, way))

    def __str__(self) -> str:
        return "; ".join(f"{way}: {', '.join(getattr(self, way))}" for way in self.ways) or "good"


def run_generation_seed(seed: int) -> GenerationVerdict:
    """Draw, run and judge the scene of this seed."""
    return run_generation_scene(draw_generation_scene(seed))


def run_generation_scene(scene: GenerationScene, policy: SpeculationPolicy | None = None) -> GenerationVerdict:
    """Run a scene to its end and judge it. `policy` in place of the scene's fixed window."""
    world = _build(scene, policy)
    world.begin(scene.spans)
    for ask in scene.asks:
        _submit(world, ask)
    for fault in scene.faults:
        world.at(fault.at_s, partial(_inflict, world, fault))
    last_s = max([0.0, *(f.at_s + f.for_s for f in scene.faults), *(a.at_s for a in scene.asks)])
    world.hold_until(last_s)
    broken = ""
    try:
        world.run(last_s + _PATIENCE_S, _MOST_EVENTS)
        left = _leftovers(world) if all(a.ended for a in world.answers.values()) else ()
    except AssertionError as error:
        broken, left = str(error) or "an assertion failed", ()
    found = [*_judge(scene, world)]
    return GenerationVerdict(
        changed=tuple(t for way, t in found if way == "changed") + ((broken,) if broken else ()),
        lost=tuple(t for way, t in found if way == "lost"),
        stuck=tuple(t for way, t in found if way == "stuck"),
        left=left,
        endings=tuple(sorted(Counter(a.ended.ending.value for a in world.answers.values() if a.ended).items())),
        num_events=world.num_events,
        counts=tuple(sorted(world.engine.measured().counts.items())),
    )


def _build(scene: GenerationScene, policy: SpeculationPolicy | None) -> Generation:
    if policy is None and scene.window is not None:
        policy = FixedPolicy(window=scene.window, most_requests=2)
    texts = {number: _whole(scene, ask) for number, ask in enumerate(scene.asks, 1)}
    token_s = dict(scene.token_s)
    times = {name: StageTimes(fixed_s=scene.fixed_s, token_s=s, long_token_s=s / 4) for name, s in token_s.items()}
    far = LinkTime(latency_s=scene.latency_s * scene.far, bytes_per_s=scene.bytes_per_s / scene.far)
    ends = (DRIVER, *scene.nodes, "n")
    return Generation(
        scene.nodes,
        Settings(
            context=scene.context, max_slots=scene.max_slots, block_tokens=scene.block_tokens, chunk_tokens=16,
            least_chunk_tokens=8, most_chunk_tokens=64, reuse_prefixes=scene.reuse, strand_s=_STRAND_S,
            default_rate_bytes_per_s=scene.bytes_per_s / scene.far,
        ),
        times=lambda span: times.get(span.node, StageTimes(fixed_s=scene.fixed_s, token_s=1e-3, long_token_s=1e-3)),
        link=LinkTime(latency_s=scene.latency_s, bytes_per_s=scene.bytes_per_s),
        links={pair: far for end in ends for pair in ((scene.nodes[0], end), (end, scene.nodes[0]))},
        policy=policy, drafter=HashDrafter(texts, scene.accuracy, scene.seed) if policy else None, draft_s=scene.draft_s,
        load_s=scene.load_s, detect_s=scene.detect_s, boundary_bytes=scene.boundary_bytes, vocabulary=scene.vocabulary,
    )  # fmt: skip


def _submit(world: Generation, ask: Ask) -> None:
    number = world.submit(ask.prompt, ask.params, at_s=ask.at_s, priority=ask.priority, deadline_s=ask.deadline_s)
    if ask.cancel_s is not None:
        world.at(ask.cancel_s, lambda: world.cancel(number))


def _inflict(world: Generation, fault: Fault) -> None:
    node = world.nodes.get(fault.node)
    match fault.kind:
        case "kill":
            world.kill(fault.node)
        case "stop":
            world.stop(fault.node, fault.for_s)
        case "cut":
            world.cut(fault.node, fault.to, fault.for_s)
        case "fail":
            world.fail(fault.node)
        case "start" if node is None or not node.is_alive:
            world.start(fault.node)
        case "slow" if node is not None:
            node.slow = fault.factor
            world.at(world.now_s + fault.for_s, partial(setattr, node, "slow", 1.0))
        case "reshard" if all(world.nodes[s.node].is_alive and not world.nodes[s.node].is_stopped for s in fault.spans):
            world.reshard(fault.spans)


def _whole(scene: GenerationScene, ask: Ask) -> tuple[int, ...]:
    count = min(ask.params.max_tokens, scene.context - len(ask.prompt))
    return (*ask.prompt, *hash_text(ask.prompt, scene.num_layers, scene.vocabulary, count))


# ---- the oracle ----------------------------------------------------------------------------------------------------------


def _judge(scene: GenerationScene, world: Generation) -> Iterator[tuple[str, str]]:
    rooms = [s.num_blocks for spans in (scene.spans, *(f.spans for f in scene.faults)) for s in spans if s.last > s.first]
    for number, ask in enumerate(scene.asks, 1):
        answer, whole = world.answers[number], _whole(scene, ask)
        text, stop = list(whole[len(ask.prompt) :]), ask.params.stop_tokens
        is_stopped = any(token in stop for token in text)
        if is_stopped:
            text = text[: next(i for i, token in enumerate(text) if token in stop)]
        if answer.tokens != text[: len(answer.tokens)]:
            yield "changed", f"request {number} has another text"
        if answer.ended is None:
            yield "stuck", f"request {number} of {ask.at_s} s has no end by {world.now_s:.1f} s"
            continue
        ending = answer.ended.ending
        if ask.params.seed == POISON:
            if ending in (Ending.STOP, Ending.LENGTH):
                yield "changed", f"request {number} ended {ending.value}, though no stage can open it"
            continue
        if ending in (Ending.NODE_LOST, Ending.FAILED):
            if ending is Ending.FAILED or not _may_be_lost(scene):
                yield "lost", f"request {number}: {answer.ended.reason}"
            continue
        is_whole = answer.tokens == text
        is_tight = -(-(len(whole) + 1) // scene.block_tokens) > min(rooms)
        fits = {
            Ending.STOP: is_whole and is_stopped,
            Ending.LENGTH: (is_whole and not is_stopped) or is_tight,
            Ending.CANCELLED: ask.cancel_s is not None,
            Ending.DEADLINE: ask.deadline_s is not None,
            Ending.TOO_LONG: is_tight,
        }
        if not fits.get(ending, False):
            yield "changed", f"request {number} ended {ending.value} after {len(answer.tokens)} of {len(text)} tokens"
        if ask.deadline_s is not None and answer.ended_s > max(ask.deadline_s, ask.at_s) + 1e-6:
            yield "stuck", f"request {number} ended {answer.ended_s - ask.deadline_s:.3f} s after its deadline"


def _may_be_lost(scene: GenerationScene) -> bool:
    """Whether all nodes were gone, by kills and stops, for about as long as the driver waits for one."""
    gone = dict.fromkeys(scene.nodes, 0.0)  # until when
    for fault in scene.faults:
        if fault.kind == "kill":
            back = [f.at_s for f in scene.faults if f.kind == "start" and f.node == fault.node and f.at_s >= fault.at_s]
            gone[fault.node] = max(gone[fault.node], min(back, default=float("inf")))
        elif fault.kind == "stop":
            gone[fault.node] = max(gone[fault.node], fault.at_s + fault.for_s)
    joined = [f.at_s for f in scene.faults if f.kind == "start" and f.node not in gone]
    return min([*gone.values(), *joined]) > _STRAND_S / 2


def _leftovers(world: Generation) -> tuple[str, ...]:
    """Let the world come to rest with one more request, and hold what machines have against what the driver counts."""
    for node in list(world.nodes.values()):
        node.num_failing = 0
        if not node.is_alive:
            world.start(node.name)
    last = world.submit((1, 2, 3), SamplingParams(max_tokens=2, temperature=0.0))
    world.hold_until(world.now_s + 100.0)
    world.run(world.now_s + 300.0, world.num_events + _MOST_EVENTS)
    ended = world.answers[last].ended
    if ended is None or ended.ending is not Ending.LENGTH:
        return (f"one more request ends {ended.ending.value if ended else 'never'}: {ended.reason if ended else ''}",)
    return tuple(_held(world))


def _held(world: Generation) -> Iterator[str]:
    state = world.engine._state
    if state.requests or state.by_slot or state.waiting or state.flights or state.replays:
        yield f"the driver has requests {list(state.requests)}, frames {list(state.flights)}, rebuilds {state.replays}"
    lengths = {slot: state.ledger.tables.length(slot) for slot in state.ledger.tables.slots()}
    if set(lengths) != set(state.ledger.sequences):
        yield f"the ledger's tables are of {sorted(lengths)}, its sequences {sorted(state.ledger.sequences)}"
    cuts = {o.slot: o.length for o in state.ledger.orders if isinstance(o, Cut)}
    wanted = {stage.peer.shard for stage in state.pipeline}
    for node in world.nodes.values():
        for shard, stage in node.stages.items():
            where = f"shard {shard} on {node.name}"
            if shard not in wanted:
                yield f"{where} is in no pipeline"
                continue
            held = {s: min(n, cuts.get(s, n)) for s, n in stage.lengths.items()}
            held = {s: n for s, n in held.items() if n}
            if held != lengths and (stage.has_layers or set(held) - set(lengths)):
                yield f"{where} holds {held}, the ledger counts {lengths}"
            tables = node.shards[shard].tables
            if stage.has_layers and {s: tables.length(s) for s in tables.slots()} != stage.lengths:
                yield f"{where}: its tables differ from its lengths"
            known = (
                set(stage.lengths) if stage.has_layers else {*stage.lengths, *lengths}
            )  # without keys it need not hold any
            extra = (set(stage.boundary.slots()) | stage.slots_known()) - known
            if extra or not stage.is_idle:
                yield f"{where} knows of slots {sorted(extra)}, idle: {stage.is_idle}"
            if node.shards[shard].tail.slots() and set(node.shards[shard].tail.slots()) - set(cuts):
                yield f"{where} would choose for slots {sorted(node.shards[shard].tail.slots())}"


# ---- the shortest scene --------------------------------------------------------------------------------------------------


def shrink_generation_scene(scene: GenerationScene) -> GenerationScene:
    """The shortest scene found that fails in one of the ways in which `scene` does: faults, then requests, are dropped."""
    ways = set(run_generation_scene(scene).ways)

    def fails(other: GenerationScene) -> bool:
        return bool(ways & set(run_generation_scene(other).ways))

    former = None
    while scene != former:
        former = scene
        scene = replace(scene, faults=_fewest(scene.faults, partial(_fails_with_faults, scene, fails)))
        scene = replace(scene, asks=_fewest(scene.asks, partial(_fails_with_asks, scene, fails)))
        for simpler in _simpler(scene):
            if simpler != scene and fails(simpler):
                scene = simpler
                break
    return scene


def _fails_with_faults(scene: GenerationScene, fails: Callable[[GenerationScene], bool], faults: tuple[Fault, ...]) -> bool:
    return fails(replace(scene, faults=faults))


def _fails_with_asks(scene: GenerationScene, fails: Callable[[GenerationScene], bool], asks: tuple[Ask, ...]) -> bool:
    return bool(asks) and fails(replace(scene, asks=asks))


def _fewest(items: Sequence[T], fails: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    return tuple(shortest(items, lambda kept: fails(tuple(kept))))


def _simpler(scene: GenerationScene) -> Iterator[GenerationScene]:
    yield replace(scene, window=None)
    yield replace(scene, reuse=False)
    yield replace(scene, far=1.0)
    yield replace(scene, max_slots=16)
    yield replace(scene, boundary_bytes=1 << 24)
    yield replace(scene, accuracy=1.0, draft_s=0.0)
    yield replace(scene, spans=tuple(_roomy(s) for s in scene.spans))
    yield replace(scene, spans=tuple(s for s in scene.spans if s.last > s.first))
    yield replace(scene, idle=scene.idle[:-1])
    for index, ask in enumerate(scene.asks):
        plain = replace(ask, deadline_s=None, cancel_s=None, priority=0, at_s=0.0)
        for other in (plain, replace(ask, prompt=ask.prompt[: len(ask.prompt) // 2] or ask.prompt)):
            yield replace(scene, asks=(*scene.asks[:index], other, *scene.asks[index + 1 :]))


def _roomy(span: SpanSpec) -> SpanSpec:
    return replace(span, num_blocks=1000)
