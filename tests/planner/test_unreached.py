"""Where everyone leaves at an exit: what is behind it stays together, and costs what enumeration says it does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from joint_enumeration import Joint, every_joint_plan, joint_world, least_value

from ecotone.accuracy import ExitPolicy
from ecotone.plan import Plan
from ecotone.planner import PlannerError, Requirement, Solution, solve
from ecotone.planner.objective import least

pytestmark = pytest.mark.pure


def everyone_leaves(seed: int, *, tight: bool) -> Joint | None:
    """A joint world whose policies let everyone leave, in turn at the first exit or at the last; None without policies."""
    world = joint_world(seed, num_devices=3, tight=tight)
    if not world.policies or world.profile.accuracy is None:
        return None

    def emptied(policy: ExitPolicy, i: int) -> ExitPolicy:
        at = 0 if (seed + i) % 2 else len(policy.exits) - 1
        shares = [share if j < at else 0.0 for j, share in enumerate(policy.shares)]
        shares[at] = 1.0 - math.fsum(shares)
        return replace(policy, shares=tuple(shares))

    policies = tuple(emptied(p, i) for i, p in enumerate(world.policies))
    table = replace(world.profile.accuracy, policies=policies)
    return replace(world, policies=policies, profile=replace(world.profile, accuracy=table), tables=[])


WORLDS = {tight: [w for seed in range(24) if (w := everyone_leaves(seed, tight=tight))] for tight in (False, True)}


def answer(world: Joint, objective: str, *require: Requirement, num: int = 0) -> Solution | None:
    try:
        return solve(world.graph, world.cluster, world.profile, least(objective), require, num_runners_up=num, nearest=False)
    except PlannerError:
        return None


@pytest.mark.parametrize("objective", ["latency", "energy", "throughput", "accuracy_loss"])
@pytest.mark.parametrize("tight", [False, True])
def test_the_value_is_that_of_enumeration(objective: str, tight: bool) -> None:
    gathered = 0
    for world in WORLDS[tight][:5]:
        limits = {"error": 0.09} | ({} if objective == "accuracy_loss" else {"accuracy_loss": 1.0})
        found = answer(world, objective, *(Requirement(name=n, limit=v) for n, v in limits.items()))
        expected = least_value(world, objective, limits)
        assert (found is None) == math.isinf(expected)
        if found is not None:
            assert found.value == pytest.approx(expected, rel=1e-6, abs=1e-12)
            assert found.is_proven
            gathered += bool(found.exit_policy)
    assert gathered


def test_the_fewest_stages_of_plans_that_are_as_quick() -> None:
    seen = 0
    for world in WORLDS[False]:
        found = answer(world, "latency")
        if found is None or not found.exit_policy:
            continue
        equal = [
            len(table.row)
            for table in every_joint_plan(world)
            if not table.over_memory
            and ((table.values["latency"] <= found.value * (1 + 1e-9)) & (table.values["accuracy_loss"] <= 1 + 1e-9)).any()
        ]
        assert len(found.plan.stages) == min(equal)
        seen += 1
    assert seen > 3


def behind(plan: Plan, world: Joint) -> set[str]:
    """Devices of what nobody reaches, and of the exit before it."""
    left, found = 1.0, set()
    shares = {e: s for p in world.policies for e, s in zip(p.exits, p.shares, strict=True) if _is_of(plan, p)}
    for stage in plan.stages:
        left -= shares.get(stage.exit, 0.0)
        found |= {stage.device} if left < 1e-9 else set()
    return found


def _is_of(plan: Plan, policy: ExitPolicy) -> bool:
    return {(s.exit, s.threshold) for s in plan.stages if s.exit} == set(zip(policy.exits, policy.thresholds, strict=True))


def test_runners_up_differ_in_what_somebody_reaches() -> None:
    several = 0
    for world in WORLDS[False]:
        found = answer(world, "latency", num=4)
        if found is None:
            continue
        plans = [found.plan, *(r.plan for r in found.runners_up)]
        assert all(len(behind(plan, world)) < 2 for plan in plans)
        several += len(plans) > 2 and bool(found.exit_policy)
    assert several
