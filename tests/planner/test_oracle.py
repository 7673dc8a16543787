"""The planner against enumeration of every plan, with devices and links shuffled, asymmetric and missing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from enumeration import World, best, random_world

from ecotone.cluster import Cluster
from ecotone.cost import predict
from ecotone.plan import plan_violations
from ecotone.planner import Latency, Objective, PlannerError, Solution, Throughput, solve, throughput

pytestmark = pytest.mark.pure

NUM_WORLDS = 300
PART = 50


def answer(world: World, objective: Objective, require: tuple[str, ...] = ()) -> Solution | None:
    try:
        return solve(world.graph, world.cluster, world.profile, objective, require, num_runners_up=0)
    except PlannerError:
        return None


def check(world: World, found: Solution | None, expected: float) -> None:
    if math.isinf(expected):
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.is_proven
    assert plan_violations(found.plan, world.graph, world.cluster) == ()
    assert predict(found.plan, world.graph, world.cluster, world.profile) == found.cost
    room = {d.name: d.memory_bytes for d in world.cluster.devices}
    assert all(d.memory_bytes <= room[d.device] for d in found.cost.devices)


@pytest.mark.parametrize("part", range(NUM_WORLDS // PART))
@pytest.mark.parametrize(
    ("objective", "tight"), [(Latency(), False), (Latency(), True), (Throughput(), False), (Throughput(), True)]
)
def test_equals_enumeration(objective: Objective, tight: bool, part: int) -> None:
    for seed in range(part * PART, (part + 1) * PART):
        world = random_world(seed, tight=tight)
        check(world, answer(world, objective), best(world, objective.name))


@pytest.mark.parametrize("tight", [False, True])
def test_enumeration_has_both_answers_and_refusals(tight: bool) -> None:
    values = [best(random_world(seed, tight=tight), "latency") for seed in range(40)]
    assert any(math.isinf(v) for v in values)
    assert sum(math.isfinite(v) for v in values) >= 15


def test_throughput_under_a_latency_requirement() -> None:
    for seed in range(30):
        world = random_world(seed)
        least = best(world, "latency")
        if math.isinf(least):
            continue
        limit = 1.2 * least
        found = answer(world, Throughput(), (f"latency={limit * 1e6:.9f}us",))
        check(world, found, best(world, "throughput", latency_s=limit))


def test_latency_under_a_loss_of_zero() -> None:
    for seed in range(60):
        world = random_world(seed)
        check(world, answer(world, Latency(), ("accuracy_loss=0",)), best(world, "latency", loss_points=0.0))


@pytest.mark.parametrize("objective", [Latency(), Throughput()])
def test_order_of_devices_does_not_matter(objective: Objective) -> None:
    for seed in range(40):
        world = random_world(seed, tight=seed % 2 == 0)
        first = answer(world, objective)
        order = np.random.default_rng(seed).permutation(len(world.cluster.devices))
        turned = replace(
            world.cluster, devices=tuple(world.cluster.devices[i] for i in order), links=world.cluster.links[::-1]
        )
        assert isinstance(turned, Cluster)
        second = answer(replace(world, cluster=turned), objective)
        assert (first is None) == (second is None)
        if first is not None and second is not None:
            assert second.value == pytest.approx(first.value, rel=1e-6)


def test_same_input_same_plan() -> None:
    for seed in range(20):
        world = random_world(seed, tight=True)
        assert answer(world, Latency()) == answer(world, Latency())


def test_throughput_without_the_class_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers where devices are too many and unlike: bisection over the label search, from a relaxed bound."""
    monkeypatch.setattr(throughput, "LARGEST_TABLE", 0)
    for seed in range(15):
        world = random_world(seed, tight=seed % 2 == 0)
        check(world, answer(world, Throughput()), best(world, "throughput"))


@pytest.mark.parametrize("objective", [Latency(), Throughput()])
def test_a_tie_goes_to_fewer_crossings_and_costs_no_more_than_it_says(objective: Objective) -> None:
    """Against the exact answer: within the share, never more crossings; and where one device is within it, one device."""
    moved = 0
    for seed in range(120):
        world = random_world(seed)
        exact = answer(world, objective)
        if exact is None:
            continue
        settled = solve(world.graph, world.cluster, world.profile, objective, tie=0.3)
        assert settled.value <= exact.value * 1.3 + 1e-12
        assert settled.bound == pytest.approx(exact.value, rel=1e-6)
        assert settled.gap <= 0.3
        assert len(settled.plan.cuts) <= len(exact.plan.cuts)
        assert plan_violations(settled.plan, world.graph, world.cluster) == ()
        assert all(r.plan != settled.plan for r in settled.runners_up)
        moved += settled.plan != exact.plan
    assert moved > 3
