"""The 95th percentile: its floors by hand and by a queue walked step by step, the search against every plan scored."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joint_enumeration import joint_world
from scored import small_worlds

from ecotone.cost import CostModel
from ecotone.planner import P95, Latency, PlannerError, Requirement, solve
from ecotone.planner.floors import largest_load_s, percentile_s, queue_floor_s, reached_by_the_tail, sure_tail

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


def test_the_best_of_every_plan_scored() -> None:
    for world, p95, plans in small_worlds(12):
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
    for world, p95, plans in small_worlds(6):
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
