"""The 95th percentile: its floors by hand and by a queue walked step by step, the search against every plan scored."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joint_enumeration import Joint, every_joint_plan, joint_world, plan_of

from ecotone.cluster import Cluster
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner import P95, Latency, PlannerError, Requirement, Score, solve
from ecotone.planner.floors import largest_load_s, percentile_s, queue_floor_s, reached_by_the_tail, sure_tail
from ecotone.planner.objective import alone_percentile_s
from ecotone.profile import Profile

pytestmark = pytest.mark.pure


def test_percentile_is_a_sample_that_95_percent_keep() -> None:
    assert percentile_s([float(i) for i in range(1, 101)]) == 95.0
    assert percentile_s([3.0, 1.0, 2.0]) == 3.0
    assert percentile_s([float(i) for i in range(1, 21)]) == 19.0  # 19 of 20 are at most 19
    assert math.isinf(percentile_s([1.0] * 10 + [math.inf]))
    assert math.isinf(percentile_s([]))


GAPS = st.lists(st.floats(0, 2), min_size=1, max_size=40)


@given(gaps=GAPS, busy=st.floats(0.01, 2), ahead=st.floats(0, 1), after=st.floats(0, 1))
def test_a_single_server_queue_is_never_below_its_floor(gaps: list[float], busy: float, ahead: float, after: float) -> None:
    """Requests pass something else, then the server, then something else again: at least the floor, and it when alone."""
    arrivals = np.cumsum(gaps).tolist()
    free, latencies = 0.0, []
    for at in arrivals:
        free = max(free, at + ahead) + busy
        latencies.append(free + after - at)
    floor = queue_floor_s(arrivals, busy)
    assert percentile_s(latencies) >= floor * (1 - 1e-9)
    if ahead == after == 0:
        assert percentile_s(latencies) == pytest.approx(floor)


@given(gaps=GAPS, value=st.floats(0.01, 5))
def test_what_loads_more_is_not_better(gaps: list[float], value: float) -> None:
    arrivals = np.cumsum(gaps).tolist()
    load = largest_load_s(arrivals, value)
    assert queue_floor_s(arrivals, load) >= value * (1 - 1e-9)
    assert queue_floor_s(arrivals, load * 0.999) < value


def test_pieces_that_the_tail_alone_reaches_do_not_count() -> None:
    share = np.array([1.0, 0.5, 0.06, 0.05, 0.0])
    assert (share * reached_by_the_tail(share)).tolist() == pytest.approx([1, 1, 1, 0, 0])
    assert (share * reached_by_the_tail(share, 0.5)).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("requests", [20, 100, 400])
def test_a_sample_drawn_by_chance_goes_on_often_enough(requests: int) -> None:
    """At the sure tail more than 5 % go on in all of 20,000 samples; at half of it not."""
    tail = sure_tail(requests)
    rng = np.random.default_rng(1)
    assert 0.05 < tail < 1
    assert (rng.binomial(requests, tail, 20_000) > 0.05 * requests).all()
    assert not (rng.binomial(requests, tail / 2, 20_000) > 0.05 * requests).all()


def pinch_s(cost: PlanCost) -> float:
    """The most that a request keeps any one processor, coder or link."""
    work: dict[tuple, float] = {}
    for stage in cost.stages:
        work[stage.device, "p"] = work.get((stage.device, "p"), 0.0) + stage.compute_s
    for t in cost.transfers:
        work[t.source, "c"] = work.get((t.source, "c"), 0.0) + t.encode_s
        work[t.target, "c"] = work.get((t.target, "c"), 0.0) + t.decode_s
    return max([*work.values(), *(k.busy_s for k in cost.links)])


def made_up(arrivals: list[float]) -> P95:
    """A score that keeps what is asked of one: the floors, and up to a third more by a hash of all but the executors."""

    def score_in(graph: Graph, cluster: Cluster, profile: Profile) -> Score:
        model = CostModel(graph, cluster, profile)

        def score(plan: Plan) -> float:
            cost = model.predict(plan)
            floor = alone_percentile_s(cost)
            if not plan.exit_transfers:
                floor = max(floor, queue_floor_s(arrivals, pinch_s(cost)))
            bare = replace(plan, stages=tuple(replace(s, executor="any") for s in plan.stages))
            return floor * (1 + zlib.crc32(bare.identity().encode()) % 1000 / 3000)

        return score

    return P95(score_in=score_in, arrivals_s=tuple(arrivals))


def small_worlds(count: int) -> list[tuple[Joint, P95, list[Plan]]]:
    found = []
    for seed in range(1000):
        world = joint_world(seed, num_devices=2)
        tables = [t for t in every_joint_plan(world) if not t.over_memory]
        if not tables or sum(t.values["latency"].size for t in tables) > 300:
            continue
        rng = np.random.default_rng(seed)
        usual = min(float(t.values["latency"].min()) for t in tables)
        arrivals = np.cumsum(rng.exponential(usual * float(rng.choice([0.3, 0.7, 2.0])), 40)).tolist()
        plans = [
            plan_of(world, t, index)
            for t in tables
            for index in zip(*np.nonzero(t.values["accuracy_loss"] <= 1 + 1e-9), strict=True)
        ]
        found.append((world, made_up(arrivals if seed % 4 else []), plans))
        if len(found) == count:
            break
    return found


def test_the_best_of_every_plan_scored() -> None:
    for world, p95, plans in small_worlds(25):
        score = p95.score_in(world.graph, world.cluster, world.profile) if p95.score_in else None
        assert score is not None
        expected = min((score(plan) for plan in plans), default=math.inf)
        try:
            found = solve(world.graph, world.cluster, world.profile, p95, num_runners_up=0, nearest=False)
        except PlannerError:
            assert math.isinf(expected)
            continue
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert found.bound <= found.value
        assert found.is_proven
        assert score(found.plan) == pytest.approx(found.value)


def test_a_required_percentile_is_kept_by_the_quickest_plan_that_keeps_it() -> None:
    for world, p95, plans in small_worlds(12):
        assert p95.score_in is not None
        score, model = (
            p95.score_in(world.graph, world.cluster, world.profile),
            CostModel(world.graph, world.cluster, world.profile),
        )
        values = sorted(score(plan) for plan in plans)
        limit = values[len(values) // 3]
        expected = min(model.predict(p).latency_s for p in plans if score(p) <= limit * (1 + 1e-9))
        require = [Requirement(name="p95", limit=limit, by=p95)]
        found = solve(world.graph, world.cluster, world.profile, Latency(), require, num_runners_up=0)
        assert found.value == pytest.approx(expected, rel=1e-6)
        assert score(found.plan) <= limit * (1 + 1e-9)
        none = [Requirement(name="p95", limit=values[0] * 0.9, by=p95)]
        with pytest.raises(PlannerError, match=r"p95=|memory"):
            solve(world.graph, world.cluster, world.profile, Latency(), none)


def test_without_a_simulation_it_says_so() -> None:
    world = joint_world(3)
    with pytest.raises(PlannerError, match="needs a simulation"):
        solve(world.graph, world.cluster, world.profile, P95())
    with pytest.raises(PlannerError, match="needs a simulation"):
        solve(world.graph, world.cluster, world.profile, Latency(), ["p95=80ms"])
