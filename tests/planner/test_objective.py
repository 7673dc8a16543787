"""Objectives and requirements as text and back, and what of a plan's cost they read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joint_enumeration import flat, joint_world

from ecotone.planner import Latency, Lexicographic, PlannerError, Requirement, parse_objective, solve
from ecotone.planner.objective import OBJECTIVES, REQUIREMENTS, Asked, alone_percentile_s, missed, quantity, shown

pytestmark = pytest.mark.pure


def test_every_objective_is_read_by_name_and_every_one_is_a_requirement() -> None:
    for objective in OBJECTIVES:
        assert parse_objective(objective.name) == objective
        assert objective.name in REQUIREMENTS


def test_several_in_order_with_tolerances() -> None:
    found = parse_objective("server~5%, latency")
    assert isinstance(found, Lexicographic)
    assert [(o.name, t) for o, t in found.levels] == [("server", 0.05), ("latency", 0.0)]
    assert found.name == "server~5%,latency"
    assert parse_objective(found.name) == found


@pytest.mark.parametrize(
    "text", ["", "speed", "latency,", "latency,latency", "server~latency", "server~-5%,latency", "server~5"]
)
def test_what_is_no_objective_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(PlannerError) as caught:
        parse_objective(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["latency=50 ms", "p95=80 ms", "server=20 ms", "money=0.001", "energy=2 J", "bytes=100 kB", "memory=2 GB", "stages=3",
     "accuracy_loss=0.5", "error=0.05", "throughput=20/s", "codec=fp32,int8", "exit=none,x0", "device=a", "executor=t:fp32"],
)  # fmt: skip
def test_requirements_survive_text(text: str) -> None:
    assert str(Requirement.parse(text)) == text


@given(
    values=st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
    name=st.sampled_from(["energy", "money", "server", "error"]),
)
def test_the_strictest_counts(values: list[float], name: str) -> None:
    asked = Asked.of([Requirement(name=name, limit=v) for v in values])
    assert asked.limit(name) == min(values)
    assert asked.with_limit(name, 0.001).limit(name) == 0.001
    assert name not in asked.without_limit(name).limited


def test_accuracy_is_bounded_unless_it_is_what_is_made_least() -> None:
    assert Asked.of(()).loss_points == 1.0
    assert Asked.of(["error=0.1"]).limit("accuracy_loss") > 1e9
    assert Asked.of((), parse_objective("accuracy_loss")).limit("accuracy_loss") > 1e9
    assert Asked.of((), parse_objective("latency,accuracy_loss")).limit("accuracy_loss") > 1e9
    assert Asked.of(["accuracy_loss=0.2"], parse_objective("accuracy_loss")).loss_points == 0.2


def test_what_is_said_of_quantities() -> None:
    assert shown("throughput", 0.05) == "20/s"
    assert shown("money", 0.00123) == "0.00123"
    assert shown("server", 0.02) == "20 ms"
    assert missed("throughput", 0.05, 0.025) == "throughput=40/s fails: the best is 20/s (50 % below it)"
    with pytest.raises(PlannerError, match="p95"):
        quantity("p95", None)  # type: ignore[arg-type]


def test_percentile_alone_by_hand_of_enumeration() -> None:
    """Against the ways through a plan and their shares, sorted: the first at which 95 % are through."""
    checked = 0
    for seed in range(60):
        world = joint_world(seed)
        if not world.policies or not len(flat(world)["latency"]):
            continue
        try:
            cost = solve(world.graph, world.cluster, world.profile, Latency(), num_runners_up=0).cost
        except PlannerError:
            continue
        ways, total, out = [], 0.0, list(cost.exit_transfers)
        for stage, transfer in zip(cost.stages, cost.transfers, strict=False):
            total += transfer.total_s + stage.compute_s
            if stage.leaves > 0:
                ways.append((total + out.pop(0).total_s, stage.leaves))
        ways.append((total + cost.transfers[-1].total_s, 1 - sum(s for _, s in ways)))
        through = 0.0
        for seconds, share in sorted(ways):
            through += share
            if through >= 0.95 - 1e-9:
                assert alone_percentile_s(cost) == pytest.approx(seconds)
                break
        checked += bool(cost.exit_transfers)
    assert checked > 3
