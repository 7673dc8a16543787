"""The simulated percentile keeps to what the planner's floors ask of a score, and `ecotone.solve` hands it over."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

import ecotone
from ecotone.cost import predict
from ecotone.planner import Latency, PlannerError, Throughput, solve
from ecotone.planner.floors import percentile_s, queue_floor_s
from ecotone.simulator import Arrivals, ClosedLoop, Periodic, Poisson, simulate
from ecotone.simulator.score import makespan_in, percentile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "planner"))
from dag_worlds import inception_world
from enumeration import World, random_world
from scored import pinch_s

pytestmark = pytest.mark.pure

REQUESTS = 40


def solvable(count: int) -> list[World]:
    found = []
    for seed in range(100):
        world = random_world(seed)
        try:
            solve(world.graph, world.cluster, world.profile, Latency(), num_runners_up=0)
        except PlannerError:
            continue
        found.append(world)
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("load", [0.5, 0.95, 1.4])
def test_no_simulated_percentile_is_below_its_floors(load: float) -> None:
    near = 0
    for world in solvable(6):
        plans = solve(world.graph, world.cluster, world.profile, Latency(), num_runners_up=2)
        for plan in (plans.plan, *(r.plan for r in plans.runners_up)):
            cost = predict(plan, world.graph, world.cluster, world.profile)
            patterns: tuple[Arrivals, ...] = (
                Poisson(rate_per_s=load / cost.bottleneck_s), Periodic(period_s=cost.bottleneck_s / load)
            )  # fmt: skip
            for arrivals in patterns:
                p95 = percentile(arrivals, requests=REQUESTS)
                assert p95.score_in is not None
                value = p95.score_in(world.graph, world.cluster, world.profile)(plan)
                floor = max(cost.latency_s, queue_floor_s(p95.arrivals_s, pinch_s(cost)))
                assert value >= floor * (1 - 1e-9)
                near += value < 1.2 * floor
    assert near > 5


def test_it_is_the_percentile_of_the_report() -> None:
    world = solvable(1)[0]
    plan = solve(world.graph, world.cluster, world.profile, Latency()).plan
    arrivals = Poisson(rate_per_s=50.0)
    report = simulate(plan, world.graph, world.cluster, world.profile, requests=REQUESTS, arrivals=arrivals, seed=3)
    p95 = percentile(arrivals, requests=REQUESTS, seed=3)
    assert p95.score_in is not None
    assert p95.score_in(world.graph, world.cluster, world.profile)(plan) == percentile_s(report.latencies_s)
    assert percentile(ClosedLoop(in_flight=4)).arrivals_s == ()


def test_makespan_of_a_chain_is_its_latency() -> None:
    world = solvable(1)[0]
    found = solve(world.graph, world.cluster, world.profile, Latency())
    assert makespan_in(world.graph, world.cluster, world.profile)(found.plan) == pytest.approx(found.value, rel=0.05)


def test_under_load_the_plan_spreads_the_work() -> None:
    """At a rate that the quickest plan cannot sustain another one has the least percentile, and it is proven or bounded."""
    moved = 0
    for world in solvable(8):
        quick = solve(world.graph, world.cluster, world.profile, Latency(), num_runners_up=0)
        wide = solve(world.graph, world.cluster, world.profile, Throughput(), num_runners_up=0)
        rate = 1.0 / (0.5 * quick.cost.bottleneck_s + 0.5 * wide.value)
        p95 = percentile(Periodic(period_s=1 / rate), requests=REQUESTS)
        assert p95.score_in is not None
        score = p95.score_in(world.graph, world.cluster, world.profile)
        found = solve(world.graph, world.cluster, world.profile, p95, num_runners_up=0, time_limit_s=2.0)
        assert found.value == score(found.plan)
        assert found.bound <= found.value <= min(score(quick.plan), score(wide.plan))
        moved += found.plan != quick.plan
    assert moved > 0


def test_a_plan_that_cannot_run_scores_infinitely() -> None:
    world, other = solvable(2)
    plan = solve(world.graph, world.cluster, world.profile, Latency()).plan
    p95 = percentile(requests=2)
    assert p95.score_in is not None
    assert math.isinf(p95.score_in(other.graph, other.cluster, other.profile)(plan))


def test_ecotone_solve_looks_at_other_orders_and_hands_the_makespan_over() -> None:
    for world in map(inception_world, range(20)):
        plain = ecotone.solve(world.graph, world.cluster, world.profile)
        found = ecotone.solve(world.graph, world.cluster, world.profile, orders=True)
        score = makespan_in(world.graph, world.cluster, world.profile)
        assert not plain.plan.order
        assert found.bound <= found.value * (1 + 1e-9)
        assert score(found.plan) <= score(plain.plan) * (1 + 1e-9)
        assert found.value * (1 - 1e-9) <= score(found.plan) <= 1.03 * found.value  # so the bound holds for it too
        if found.plan.order:
            return
    raise AssertionError("no world gains by another order")
