"""The front against all plans enumerated, what a coarse step promises, and the ends of the search."""

from __future__ import annotations

import math

import pytest
from enumeration import Priced, World, every_plan, random_world

from ecotone.planner import Front, Latency, Objective, PlannerError, Throughput, pareto

pytestmark = pytest.mark.pure


def feasible(world: World, *, once: bool = False) -> list[Priced]:
    room = {d.name: d.memory_bytes for d in world.cluster.devices}
    return [
        p
        for p in every_plan(world, once=once)
        if all(n <= room[d] for d, n in p.memory.items()) and 100 * p.disagreement <= 1 + 1e-9
    ]


def exact_front(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Pairs that no other betters, ascending in the first."""
    kept: list[tuple[float, float]] = []
    for value, other in sorted(pairs):
        if not kept or other < kept[-1][1] * (1 - 1e-9):
            kept.append((value, other))
    return kept


def front(world: World, objective: Objective, axis: str, **more: float) -> Front | None:
    try:
        return pareto(world.graph, world.cluster, world.profile, objective, axis, most_points=500, **more)  # type: ignore[arg-type]
    except PlannerError:
        return None


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("axis", ["bytes", "accuracy_loss", "throughput"])
def test_with_a_step_near_zero_it_is_the_front_of_all_plans(seed: int, axis: str) -> None:
    world = random_world(seed, tight=seed % 2 == 0)
    of = {
        "bytes": lambda p: p.size_bytes,
        "accuracy_loss": lambda p: 100 * p.disagreement,
        "throughput": lambda p: p.bottleneck_s,
    }[axis]
    wanted = exact_front([(p.latency_s, of(p)) for p in feasible(world)])
    found = front(world, Latency(), axis, step=1e-7)
    assert (found is None) == (not wanted)
    if found is not None:
        assert found.is_complete
        assert all(point.is_proven for point in found.points)
        assert [point.value for point in found.points] == pytest.approx([value for value, _ in wanted], rel=1e-6)
        assert [point.other for point in found.points] == pytest.approx([other for _, other in wanted], rel=1e-6)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("objective", [Latency(), Throughput()])
def test_a_coarse_step_leaves_no_plan_unmatched(seed: int, objective: Objective) -> None:
    """For each plan there is a point no worse under the objective, with at most 1 / (1 - step) of its bytes."""
    world, step = random_world(seed), 0.3
    found = front(world, objective, "bytes", step=step)
    for plan in feasible(world, once=objective.name == "throughput"):
        assert found is not None
        value = plan.latency_s if objective.name == "latency" else plan.bottleneck_s
        assert any(
            point.value <= value * (1 + 1e-6) and point.other * (1 - step) <= plan.size_bytes + 1e-6
            for point in found.points
        )


def test_points_ascend_and_read_back() -> None:
    world = next(w for w in map(random_world, range(50)) if (f := front(w, Latency(), "bytes")) and len(f.points) > 2)
    found = front(world, Latency(), "bytes")
    assert found is not None
    values, others = [p.value for p in found.points], [p.other for p in found.points]
    assert values == sorted(values)
    assert others == sorted(others, reverse=True)
    assert Front.from_json(found.to_json()) == found


def test_few_points_are_said_to_be_incomplete() -> None:
    world = next(w for w in map(random_world, range(50)) if (f := front(w, Latency(), "bytes")) and len(f.points) > 2)
    found = pareto(world.graph, world.cluster, world.profile, Latency(), "bytes", most_points=1)
    assert len(found.points) == 1
    assert not found.is_complete


@pytest.mark.parametrize(
    ("axis", "step", "said"),
    [
        ("latency", 0.05, "cannot be traded"),
        ("price", 0.05, "these can: "),
        ("bytes", 0.0, "between 0 and 1"),
        ("bytes", math.nan, "between 0 and 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(axis: str, step: float, said: str) -> None:
    world = random_world(1)
    with pytest.raises(PlannerError, match=said):
        pareto(world.graph, world.cluster, world.profile, Latency(), axis, step=step)


def test_where_no_plan_keeps_the_requirements_it_says_so() -> None:
    world = random_world(1)
    with pytest.raises(PlannerError, match="latency=1 ns"):
        pareto(world.graph, world.cluster, world.profile, Latency(), "bytes", ("latency=1ns",))
