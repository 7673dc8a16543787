"""Baselines of language-model planning: none beats ours, EdgeShard's two programmes equal enumeration on their own model."""

from __future__ import annotations

import itertools
import math

import pytest
from generation_worlds import World, random_world
from test_generation import home

from ecotone.llmcost import LlmCostModel
from ecotone.llmplan import LlmPlan
from ecotone.planner.generation import baselines, choose_plan, value_of
from ecotone.planner.objective import PlannerError

pytestmark = pytest.mark.pure


def cost_of(world: World, plan: LlmPlan):  # type: ignore[no-untyped-def]
    return LlmCostModel(world.profile, world.cluster, world.asked.shape).predict(plan)


@pytest.mark.parametrize("seed", range(40, 52))
def test_none_is_better_than_ours(seed: int) -> None:
    world = random_world(seed, ("tpot", "throughput", "request")[seed % 3], tight=seed % 2 == 0)
    try:
        ours = choose_plan(world.profile, world.cluster, world.asked, explain=False).value
    except PlannerError:
        ours = math.inf
    for name in baselines.NAMES:
        try:
            plan = baselines.place(name, world.profile, world.cluster, world.asked)
        except PlannerError:
            continue
        cost = cost_of(world, plan)
        is_once = len(plan.devices) == len(plan.stages)  # EdgeShard A may come back to a device
        if not cost.violations and is_once:
            assert value_of(world.asked, cost) >= ours * (1 - 1e-9), name


def test_rules_cut_as_published() -> None:
    world = home(12, {"a": 1, "b": 1, "c": 1}, {"a": 60, "b": 120, "c": 50}, {"a": 1.0, "b": 0.5, "c": 3.0}, 1e-3)
    layers = {}
    for name in ("proportional", "even", "water_filling"):
        plan = baselines.place(name, world.profile, world.cluster, world.asked)
        layers[name] = {stage.device: stage.span.num_layers for stage in plan.stages}
    assert layers["proportional"] == {"a0": 4, "b0": 8}  # two of them hold the weights: 60 : 120
    assert layers["even"] == {"a0": 4, "b0": 4, "c0": 4}
    assert layers["water_filling"]["a0"] > 4  # twice as fast as b0, up to its memory
    with pytest.raises(PlannerError, match="is not known"):
        baselines.place("luck", world.profile, world.cluster, world.asked)


def test_edgeshard_latency_is_enumerated_and_breaks_memory() -> None:
    """A's own sum over every assignment of blocks to machines, the first on the source; its best does not look at memory."""
    world = home(5, {"a": 1, "b": 1, "c": 1}, {"a": 30, "b": 30, "c": 30}, {"a": 1.0, "b": 0.5, "c": 3.0}, 1e-3)
    plan = baselines.place("edgeshard_latency", world.profile, world.cluster, world.asked)
    model = LlmCostModel(world.profile, world.cluster, world.asked.shape)
    blocks = ["embedding", *world.profile.layers, "head"]
    names = [device.name for device in world.cluster.devices]

    def total(places: tuple[str, ...]) -> float:
        seconds = 0.0
        for index, (part, name) in enumerate(zip(blocks, places, strict=True)):
            found = model.measured(name, "native:int8")
            assert found is not None
            seconds += model.few_s(found.decode[part], part, 1)
            if index and places[index - 1] != name:
                seconds += model.state_bytes(1, "fp32") / 1e7
        return seconds

    least = min(total((names[0], *rest)) for rest in itertools.product(names, repeat=len(blocks) - 1))
    own: list[str] = []
    for stage in plan.stages:
        own += [stage.device] * (stage.span.num_layers + stage.span.embedding + stage.span.head)
    assert total(tuple(own)) == pytest.approx(least)
    assert "needs" in "; ".join(cost_of(world, plan).violations)


def test_edgeshard_throughput_is_enumerated() -> None:
    """B's own bottleneck over every contiguous cut and order, the first stage on the source, memory kept per stage."""
    world = home(6, {"a": 1, "b": 1, "c": 1}, {"a": 40, "b": 45, "c": 36}, {"a": 1.0, "b": 0.5, "c": 3.0}, 1e-3)
    asked = world.asked
    plan = baselines.place("edgeshard_throughput", world.profile, world.cluster, asked)
    model = LlmCostModel(world.profile, world.cluster, asked.shape)
    sent = model.state_bytes(1, "fp32") / 1e7

    def bottleneck(stages: list[tuple[str, int, int]]) -> float:
        made = baselines._Baseline(baselines.World(model, asked), asked)
        worst = sent if len(stages) > 1 else 0.0
        for name, first, last in stages:
            device = world.cluster.device(name)
            fitting = [s for s in made.stages(device, first, last) if made._bytes(s) <= device.memory_bytes]
            worst = max(worst, min((made._few(s) for s in fitting), default=math.inf))
        return worst

    names, num = [device.name for device in world.cluster.devices], 8
    every = []
    for count in (1, 2, 3):
        for order in itertools.permutations(names, count):
            for cuts in itertools.combinations(range(1, num), count - 1):
                ends = (0, *cuts, num)
                if order[0] == names[0]:
                    every.append(bottleneck([(n, ends[i], ends[i + 1]) for i, n in enumerate(order)]))
    own, at = [], 0
    for stage in plan.stages:
        size = stage.span.num_layers + stage.span.embedding + stage.span.head
        own.append((str(stage.device), at, at + size))
        at += size
    assert bottleneck(own) == pytest.approx(min(every))
