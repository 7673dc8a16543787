"""The one verb: `choose_plan(profile, cluster, asked) -> LlmSolution`, exact with its bound, or the reason why nothing fits.

Searched together: which devices, in which order, where the cuts are, which executor (or pair of them) runs each part, in
which codec each hop crosses, whether the driver holds the embedding or the head apart from its layers, how the prompt is cut
and how requests are dealt into frames. A device is one contiguous stage, the driver up to three. "One device" is an answer.
After a loss, `replan_without` keeps every stage that lives where it is and places only the lost spans again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecotone import schema
from ecotone.cluster import Cluster
from ecotone.llmcost import LlmCost, LlmCostModel
from ecotone.llmplan import LOCAL, LlmPlan, LlmStage, Span
from ecotone.llmprofile import LlmProfile
from ecotone.planner.generation.asked import Asked, value_of, views
from ecotone.planner.generation.branching import explore
from ecotone.planner.generation.problem import Fixed, Problem, World
from ecotone.planner.generation.refusal import reason
from ecotone.planner.generation.search import Found, Placed
from ecotone.planner.objective import PlannerError

__all__ = ["LlmSolution", "choose_plan", "find", "replan_without"]

SCHEMA, VERSION = "ecotone.llmsolution", 1
PROVEN_GAP = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmSolution:
    """`value` is what the objective makes least (seconds; of throughput seconds per token), `bound` a proven lower bound on
    it. `cost.chunk_tokens` is the size of chunks that the times hold for. `moved`: blocks of a kept plan that lie elsewhere.
    """

    plan: LlmPlan
    cost: LlmCost
    asked: Asked
    value: float
    bound: float
    moved: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        """(value - bound) / value: by what share a better plan could still be better."""
        return max(0.0, (self.value - self.bound) / self.value) if self.value > 0 else 0.0

    @property
    def is_proven(self) -> bool:
        return self.gap <= PROVEN_GAP

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "solution") -> LlmSolution:
        """Read a solution; raises SchemaError naming every violation."""
        return schema.load_json(LlmSolution, text, SCHEMA, VERSION, where)


def choose_plan(
    profile: LlmProfile,
    cluster: Cluster,
    asked: Asked,
    *,
    time_limit_s: float = 20.0,
    gap: float = 0.0,
    explain: bool = True,
) -> LlmSolution:
    """The best plan for what is asked. Raises PlannerError saying what is missing, by how much, and what would help.

    `gap`: a plan that is proven to be within this share of the best will do; a prediction is good to a few percent.
    `explain` False: the error is short, and no time goes into what would help.
    """
    return _chosen(profile, cluster, asked, (), time_limit_s, gap, explain)


def replan_without(
    lost: Sequence[str],
    plan: LlmPlan,
    profile: LlmProfile,
    cluster: Cluster,
    asked: Asked,
    *,
    time_limit_s: float = 2.0,
    gap: float = 0.01,
) -> LlmSolution:
    """The best plan on what is left of `cluster` in which every stage of `plan` on a living device stays as it is.

    Only spans that lay on `lost` devices move: to devices that are free, or beside what a device holds, if it has room.
    Where nothing fits so, a plan that may move everything is taken; `moved` says what moves. `asked.shape` should be the
    one that `plan` was made for. Raises PlannerError where no plan is left, or the driver is lost.
    """
    gone = set(lost)
    if plan.driver in gone:
        raise PlannerError(f"the driver {plan.driver} is lost, and with it the requests; start again from another device")
    left = _without(cluster, gone)
    asked = replace(asked, driver=plan.driver)
    kept = tuple(replace(stage, codec=LOCAL) for stage in plan.stages if stage.device not in gone)
    try:
        made = _chosen(profile, left, asked, kept, time_limit_s, gap, False)
    except PlannerError:
        made = _chosen(profile, left, asked, (), time_limit_s, gap, True)
    return replace(made, plan=made.plan.with_epoch(plan.epoch + 1), moved=tuple(_moved(plan, made.plan)))


def _moved(before: LlmPlan, after: LlmPlan) -> Iterator[str]:
    """Stages of `after` that `before` did not have on that device."""
    stood = {(stage.device, stage.span, stage.executor) for stage in before.stages}
    for stage in after.stages:
        if (stage.device, stage.span, stage.executor) not in stood:
            yield f"{stage.span.describe()} to {stage.device}"


def _without(cluster: Cluster, gone: set[str]) -> Cluster:
    devices = tuple(device for device in cluster.devices if device.name not in gone)
    if not devices:
        raise PlannerError("every device is lost")
    names = {device.name for device in devices}
    kinds = {device.kind for device in devices}
    return replace(
        cluster, devices=devices, source=cluster.source if cluster.source in names else devices[0].name,
        sink=cluster.sink if cluster.sink in names else devices[0].name,
        links=tuple(link for link in cluster.links if {link.source, link.target} <= names),
        kind_links=tuple(link for link in cluster.kind_links if {link.source_kind, link.target_kind} <= kinds),
        radios=(), shared=(),
    )  # fmt: skip


def _chosen(
    profile: LlmProfile,
    cluster: Cluster,
    asked: Asked,
    kept: Sequence[LlmStage],
    time_limit_s: float,
    gap: float,
    explain: bool,
) -> LlmSolution:
    if asked.shape.longest > profile.max_positions:
        most = profile.max_positions
        raise PlannerError(
            f"a context of {asked.shape.longest} tokens is asked, the model takes at most {most}; ask for less"
        )
    found = find(profile, cluster, asked, kept, time_limit_s, gap)
    if found is None:
        told = reason(profile, cluster, asked, find) if explain else "nothing that fits keeps what is asked"
        raise PlannerError(f"no plan: {told}")
    plan, bound = found
    cost = LlmCostModel(profile, cluster, asked.shape).predict(plan)
    value = value_of(asked, cost)
    return LlmSolution(plan=plan, cost=cost, asked=asked, value=value, bound=min(bound, value))


def find(
    profile: LlmProfile,
    cluster: Cluster,
    asked: Asked,
    kept: Sequence[LlmStage] = (),
    time_limit_s: float = 20.0,
    gap: float = 0.0,
) -> tuple[LlmPlan, float] | None:
    """The best plan and the bound on its value; None where there is none. `kept` stages stay as they are.

    Raises PlannerError where none was found in time, though one may exist.
    """
    deadline = time.perf_counter() + time_limit_s
    world = World(LlmCostModel(profile, cluster, asked.shape), asked, kept)
    if not world.classes:
        return None
    found = explore(_tries(world, asked), deadline, gap)
    if found.best is None and math.isfinite(found.bound):
        raise PlannerError(
            f"no plan was found within {time_limit_s:g} s, though one may exist; give more time or ask for less"
        )
    if found.best is None:
        return None
    return _plan(world, *found.best), found.bound


def _tries(world: World, asked: Asked) -> Iterator[Problem]:
    """Every View with every way in which the driver may hold the ends apart."""
    limit_loss = _may_lose(world, asked)
    for view in views(asked, limit_loss=limit_loss):
        bare = Problem(world, view)
        kept = [bare.fix(stage) for stage in world.kept]
        if any(stage is None for stage in kept):
            return
        base = [stage for stage in kept if stage is not None]
        ends = [()] if any(f.first == 0 for f in base) else [(), *((f,) for f in _ends(bare, 0, 1))]
        last = bare.num_blocks
        others = [()] if any(f.last == last for f in base) else [(), *((f,) for f in _ends(bare, last - 1, last))]
        for one in ends:
            for other in others:
                fixed = [*one, *base, *other]
                if _is_room(world, fixed):
                    yield bare.with_fixed(fixed) if fixed else bare


def _may_lose(world: World, asked: Asked) -> bool:
    """Whether some plan might lose more than is allowed."""
    executors = max((m.loss for options in world.options for m in options.values()), default=0.0)
    codecs = max((world.profile.codec_losses.get(codec, 0.0) for codec in asked.codecs), default=0.0)
    return executors + codecs * (len(world.cluster.devices) + 2) > asked.max_loss


def _ends(problem: Problem, first: int, last: int) -> Iterator[Fixed]:
    """The embedding or the head on the driver, a stage of its own, by every executor that no other one beats."""
    place = problem.driver_place
    if place is None:
        return
    world = problem.world
    made = []
    for executor in world.options[place]:
        fixed = problem.fix(world.stage(world.driver, first, last, executor))
        if fixed is not None:
            row = problem.columns(fixed.sums[None, :], fixed.maxima[None, :])[0]
            made.append((np.array([*row, float(fixed.num_bytes)]), fixed))
    for index, (row, fixed) in enumerate(made):
        beaten = any(
            (other <= row).all() and ((other < row).any() or i < index) for i, (other, _) in enumerate(made) if i != index
        )
        if not beaten:
            yield fixed


def _is_room(world: World, fixed: Sequence[Fixed]) -> bool:
    """Whether what is fixed fits where it stands."""
    held: dict[int, int] = {}
    for stage in fixed:
        held[stage.place] = held.get(stage.place, 0) + stage.num_bytes
    return all(used <= world.classes[place][0].memory_bytes for place, used in held.items())


def _plan(world: World, problem: Problem, found: Found) -> LlmPlan:
    assert found.path is not None
    left = [list(group) for group in world.classes]
    stages: list[LlmStage] = []
    for placed in found.path:
        stages.append(_stage(world, problem, placed, left))
    for index, placed in enumerate(found.path[1:]):
        is_local = stages[index].device == stages[index + 1].device
        stages[index] = replace(stages[index], codec=LOCAL if is_local else placed.codec)
    stages = _joined(stages, world.kept)
    shape = world.asked.shape
    return LlmPlan(
        model_hash=world.profile.model_hash, num_layers=world.profile.num_layers, driver=world.driver,
        stages=tuple(stages), context=shape.longest, max_slots=shape.slots,
    )  # fmt: skip


def _joined(stages: Sequence[LlmStage], kept: Sequence[LlmStage]) -> list[LlmStage]:
    """An end that the driver holds "apart" beside its layers by the same executor is one stage with them. What is kept of a
    former plan stays as it is."""
    untouched = {(stage.device, stage.span) for stage in kept}
    made: list[LlmStage] = []
    for stage in stages:
        last = made[-1] if made else None
        is_alike = last is not None and (last.device, last.executor) == (stage.device, stage.executor)
        if last is None or not is_alike or {(s.device, s.span) for s in (last, stage)} & untouched:
            made.append(stage)
            continue
        span = Span(start=last.span.start, stop=stage.span.stop, embedding=last.span.embedding, head=stage.span.head)
        made[-1] = replace(stage, span=span, kv_bytes=last.kv_bytes + stage.kv_bytes)
    return made


def _stage(world: World, problem: Problem, placed: Placed, left: list[list]) -> LlmStage:  # type: ignore[type-arg]
    if placed.fixed is not None:
        return placed.fixed.stage
    device = left[placed.place].pop(0) if len(left[placed.place]) > 1 else left[placed.place][0]
    return world.stage(device.name, placed.first, placed.last, problem.names[placed.place][placed.option])
