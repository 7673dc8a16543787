"""What is built on `solve` takes exits, executors and all objectives: plan sets, standbys, fronts, other worlds, JSON."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
from joint_enumeration import Joint, flat, joint_world, least_value

from ecotone.cost import CostModel, resident_bytes
from ecotone.plan import plan_violations
from ecotone.planner import (
    Latency,
    PlannerError,
    Requirement,
    Solution,
    assume,
    choose,
    pareto,
    parse_objective,
    solve,
    what_if,
)
from ecotone.planner.candidates import candidates
from ecotone.planner.objective import quantity

pytestmark = pytest.mark.pure


@functools.cache
def with_policies(count: int) -> list[Joint]:
    """Worlds where results are wanted at the source, with exits that the best plan takes."""
    found = []
    for seed in range(2000):
        world = joint_world(seed, num_devices=3, tight=False)
        if world.cluster.source != world.cluster.sink or not world.policies:
            continue
        try:
            best = solve(world.graph, world.cluster, world.profile, Latency(), num_runners_up=0, nearest=False)
        except PlannerError:
            continue
        if best.exit_policy and set(best.plan.devices) != {best.plan.source}:
            found.append(world)
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("objective", ["latency", "throughput", "server,latency", "energy"])
def test_standbys_of_plans_with_exits(objective: str) -> None:
    """Every plan of the set can run and be priced, they fit together, and the primary is as good as the best plan."""
    kinds = set()
    for world in with_policies(2):
        cluster, wanted = assume(world.cluster, 3600.0), parse_objective(objective)
        problem = (world.graph, cluster, world.profile)
        best = solve(*problem, wanted, num_runners_up=0)
        found = choose(*problem, wanted, time_limit_s=3.0)
        kinds.add(found.topology)
        model = CostModel(*problem)
        first = objective.partition(",")[0]
        for plan in found.planset.plans:
            assert plan_violations(plan, world.graph, cluster) == ()
            assert model.predict(plan).latency_s > 0
        lead = quantity(first, model.predict(found.planset.primary))
        if objective in ("server,latency", "energy"):
            assert lead <= best.value + abs(best.value) * 2e-4 + 1e-12
        else:
            assert lead >= best.value * (1 - 1e-9)
        held = resident_bytes({world.graph.content_hash(): world.graph}, found.planset.plans)
        room = {d.name: d.memory_bytes for d in cluster.devices}
        assert all(size <= room[d] for d, size in held.items())
        assert found.expected_s >= found.bound_s - 1e-12
        assert any("stays" in line or "fails" in line or "first:" in line for line in found.lines())
    assert kinds - {"none"}


@pytest.mark.parametrize("objective", ["latency", "server,latency", "bytes", "money"])
def test_candidates_for_other_rates(objective: str) -> None:
    for world in with_policies(2):
        problem = (world.graph, world.cluster, world.profile)
        kept = candidates(*problem, parse_objective(objective), time_limit_s=0.7)
        best = solve(*problem, parse_objective(objective), num_runners_up=0)
        model = CostModel(*problem)
        first = objective.partition(",")[0]
        assert quantity(first, model.predict(kept.primary)) == pytest.approx(best.value, rel=1e-6, abs=1e-12)
        for plan in kept.plans:
            model.predict(plan)
            assert plan_violations(plan, world.graph, world.cluster) == ()


@pytest.mark.parametrize(("objective", "axis"), [("latency", "server"), ("energy", "latency"), ("bytes", "money")])
def test_the_front_of_any_two(objective: str, axis: str) -> None:
    """With a step near zero: that of all plans enumerated."""
    several = 0
    for seed in range(5):
        world = joint_world(seed)
        rows = flat(world)
        good = rows["accuracy_loss"] <= 1 + 1e-9
        pairs = sorted(zip(rows[objective][good].tolist(), rows[axis][good].tolist(), strict=True))
        wanted: list[tuple[float, float]] = []
        for value, other in pairs:
            if not wanted or other < wanted[-1][1] * (1 - 1e-6) - 1e-12:
                wanted.append((value, other))
        if not wanted:
            continue
        found = pareto(
            world.graph, world.cluster, world.profile, parse_objective(objective), axis, step=1e-7, most_points=200
        )  # fmt: skip
        assert found.is_complete
        values, others = zip(*wanted, strict=True)
        assert [p.value for p in found.points] == pytest.approx(values, rel=1e-6, abs=1e-12)
        assert [p.other for p in found.points] == pytest.approx(others, rel=1e-6, abs=1e-12)
        several += len(wanted) > 2
    assert several > 0


def test_another_limit_is_another_world() -> None:
    checked = 0
    for seed in range(7):
        world = joint_world(seed)
        problem = (world.graph, world.cluster, world.profile)
        expected = least_value(world, "latency", {"accuracy_loss": 3.0})
        try:
            today = solve(*problem, Latency(), ("accuracy_loss=0.4",), num_runners_up=0)
        except PlannerError:
            continue
        found = what_if(*problem, today.plan, "accuracy_loss=3", Latency(), ("accuracy_loss=0.4",))
        assert found.best is not None
        assert found.best.value == pytest.approx(expected, rel=1e-6)
        assert found.today == today.cost
        assert found.breaks == ()
        tighter = what_if(*problem, today.plan, "exit=none", Latency(), ("accuracy_loss=0.4",))
        if tighter.best is not None:
            assert tighter.best.exit_policy == ""
            checked += bool(today.exit_policy)
        strict = what_if(*problem, today.plan, f"energy={today.cost.energy_joule * 0.9:.12f}J", Latency())
        assert strict.best is None or any(line.startswith("energy=") for line in strict.breaks)
    assert checked > 0


def test_a_solution_with_levels_prices_and_exits_survives_json() -> None:
    for world in with_policies(3):
        require = [Requirement(name="error", limit=0.05), Requirement(name="accuracy_loss", limit=0.9)]
        try:
            found = solve(world.graph, world.cluster, world.profile, parse_objective("server~10%,latency"), require)
        except PlannerError:
            continue
        assert Solution.from_json(found.to_json()) == found


def test_an_exit_between_the_cuts_parts_a_stage_and_nothing_else() -> None:
    """The profile cuts at the ends alone; an exit inside still parts the source's stage, but nothing crosses there."""
    seen = 0
    for world in with_policies(3):
        ends = (0, world.graph.num_blocks)
        thin = replace(world.profile, cuts=ends)
        found = solve(world.graph, world.cluster, thin, Latency(), num_runners_up=0)
        assert all(t.position in ends for t in found.plan.edges if not t.is_local)
        seen += bool(found.exit_policy)
        assert math.isfinite(found.value)
    assert seen > 0
