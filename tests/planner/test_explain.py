"""Explanations: what a choice costs and where a budget would move the plan, each checked by solving on either side."""

from __future__ import annotations

from dataclasses import replace

import pytest
from joint_enumeration import Joint, every_joint_plan, joint_world, least_value
from test_solve import camera_and_server

from ecotone.planner import Latency, PlannerError, Requirement, Solution, explain, parse_objective, solve
from ecotone.planner.explain import Breakpoint, Explanation

pytestmark = pytest.mark.pure


def told(world: Joint, *require: Requirement, objective: str = "latency") -> tuple[Solution, Explanation] | None:
    try:
        found = solve(world.graph, world.cluster, world.profile, parse_objective(objective), require)
    except PlannerError:
        return None
    return found, explain(found, world.graph, world.cluster, world.profile, require)


def test_a_choice_undone_costs_what_enumeration_says() -> None:
    """Without exits, and on the source alone: the best of the plans that are left."""
    seen = set()
    for seed in range(8):
        world = joint_world(seed)
        answer = told(world, Requirement(name="accuracy_loss", limit=1.0))
        if answer is None:
            continue
        found, explanation = answer
        tables = [t for t in every_joint_plan(world) if not t.over_memory]
        kept = {
            "exits": [t for t in tables if t.policy is None],
            "other devices": [t for t in tables if set(t.row) == {world.cluster.source}],
        }
        for choice in explanation.choices:
            values = [t.values["latency"][t.values["accuracy_loss"] <= 1 + 1e-9] for t in kept.get(choice.without, [])]
            expected = min((float(v.min()) for v in values if v.size), default=None)
            if choice.without not in kept:
                continue
            seen.add(choice.without)
            assert (choice.plan is None) == (expected is None)
            if choice.value is not None:
                assert choice.value == pytest.approx(expected, rel=2e-4)
                assert choice.value >= found.value * (1 - 1e-9)
    assert seen == {"exits", "other devices"}


def test_a_budget_moves_the_plan_where_it_says() -> None:
    """Just under that limit today's value is the best, at it a better plan exists: both by enumeration."""
    moved = 0
    for seed in range(7):
        world = joint_world(seed)
        limits = {"accuracy_loss": 0.3, "error": 0.08}
        answer = told(world, *(Requirement(name=n, limit=v) for n, v in limits.items()))
        if answer is None:
            continue
        found, explanation = answer
        assert {b.name for b in explanation.budgets} <= set(limits)
        for budget in explanation.budgets:
            assert budget.used <= budget.limit * (1 + 1e-9)
            if budget.moves_at is None:
                assert least_value(world, "latency", {**limits, budget.name: 100.0}) >= found.value * (1 - 2e-4)
                continue
            moved += 1
            assert budget.value is not None
            assert budget.value < found.value
            at = least_value(world, "latency", {**limits, budget.name: budget.moves_at})
            under = least_value(world, "latency", {**limits, budget.name: budget.moves_at * (1 - 1e-3)})
            assert at <= budget.value * (1 + 1e-9)
            assert under >= found.value * (1 - 3e-4)
    assert moved >= 2


def test_a_shadow_price_is_what_the_bound_gains() -> None:
    """The bound is concave in a limit: a little more gains at most the price times that, and it gains something."""
    priced = 0
    for seed in range(20):
        world = joint_world(seed)
        require = [Requirement(name="accuracy_loss", limit=0.3), Requirement(name="error", limit=0.05)]
        answer = None
        try:
            answer = solve(world.graph, world.cluster, world.profile, Latency(), require)
        except PlannerError:
            continue
        for price in answer.shadow_prices:
            assert price.per_unit > 0
            assert price.name in ("accuracy_loss", "error") or price.name.startswith("memory of ")
            priced += 1
    assert priced > 3


def test_the_lines_name_exits_executors_budgets_and_what_else_there_is() -> None:
    text = []
    for seed in range(8):
        answer = told(joint_world(seed), Requirement(name="accuracy_loss", limit=0.5), Requirement(name="error", limit=0.1))
        if answer is not None:
            lines = answer[1].lines()
            assert all("\n" not in line for line in lines)
            text += lines
    for said in (
        "leave; head", "exits as x", "by ort:int8", "without exits: ", "without codecs: ", "binds; at ", "more would save",
        "does not bind", "instead, +", "times slower the cut moves", "servers busy", "money",
    ):  # fmt: skip
        assert any(said in line for line in text), said


def test_objectives_in_order_and_in_other_units_are_explained() -> None:
    world = camera_and_server()
    for objective in ("bytes", "server,latency", "throughput", "accuracy_loss"):
        found = solve(world.graph, world.cluster, world.profile, parse_objective(objective), ("latency=18ms",))
        lines = explain(found, world.graph, world.cluster, world.profile).lines()
        assert lines[0] == str(found.plan)
        assert lines[1].startswith(objective.partition(",")[0])


def test_the_cut_moves_where_solve_would_move_it() -> None:
    """At 0.108 MB/s the split takes 13 + 0.75 / 0.108 = 19.94 ms, near the camera's 20 ms: a tie, for the camera. The links
    need 0.1136 MB/s, 1.05 times as much, for 19.6 ms. Without a tie no rate is to blame that another plan is best."""
    world = camera_and_server(0.108e6)
    problem = (world.graph, world.cluster, world.profile)
    found = solve(*problem, Latency(), tie=0.02)
    assert found.plan.devices == ("camera",)
    (faster,) = explain(found, *problem, tie=0.02).breakpoints
    assert faster.factor == pytest.approx(0.75 / (20 / 1.02 - 13) / 0.108, abs=2e-4)
    assert (faster.slower, set(faster.faster.devices)) == (found.plan, {"camera", "server"})
    assert explain(found, *problem).breakpoints == ()


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.0034, "1.0034 times faster"), (1 / 1.0521, "1.052 times slower"), (2.5, "2.5 times"), (90.5, "90.5")],
)
def test_a_factor_is_told_apart_from_one(factor: float, said: str) -> None:
    world = camera_and_server()
    found = solve(world.graph, world.cluster, world.profile, Latency())
    point = Breakpoint(factor=factor, slower=found.plan, faster=found.plan)
    told = replace(explain(found, world.graph, world.cluster, world.profile, time_limit_s=0.1), breakpoints=(point,))
    assert f"with links {said}" in told.lines()[-1]
