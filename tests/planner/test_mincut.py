"""The minimum cut against enumeration of every placement on two machines, and against flows that can be told by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from dag_worlds import enumerated, random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.planner.mincut import FlowNetwork, Parcel, TwoTier, least_two_tier, two_tier_value
from ecotone.planner.objective import PlannerError

pytestmark = pytest.mark.pure


def test_equals_enumeration_of_all_placements() -> None:
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        problem = random_problem(rng)
        least = enumerated(problem)
        try:
            found = least_two_tier(problem)
        except PlannerError:
            assert math.isinf(least)
            refused += 1
            continue
        assert found.value == pytest.approx(least, rel=1e-9)
        assert found.bound == pytest.approx(least, rel=1e-9)
        assert two_tier_value(problem, found.first) == found.value
    assert refused


def test_values_agree_with_the_oracle_on_every_placement() -> None:
    """The oracle prices all sets at once; here one block list is allowed at a time, the others cost infinity."""
    rng = np.random.default_rng(99)
    for _ in range(20):
        problem = random_problem(rng)
        count = min(6, len(problem.first))
        for bits in range(1 << count):
            chosen = {v for v in range(len(problem.first)) if v >= count or bits >> v & 1}
            pinned = replace(
                problem,
                first=tuple(c if v in chosen else math.inf for v, c in enumerate(problem.first)),
                second=tuple(math.inf if v in chosen else c for v, c in enumerate(problem.second)),
            )
            assert two_tier_value(problem, chosen) == pytest.approx(enumerated(pinned))


def test_a_tensor_is_paid_once_not_by_edge() -> None:
    """One tensor, three readers on the second machine: 5 once. Priced by edge it would be 15, and staying (12) would win."""
    fan = Parcel(maker=0, readers=(1, 2, 3), send=5.0)
    ends = tuple(Parcel(maker=v, readers=(), send=0.0, is_result=True) for v in (1, 2, 3))
    problem = TwoTier(first=(0.0, 4.0, 4.0, 4.0), second=(20.0, 1.0, 1.0, 1.0), parcels=(fan, *ends), relayed=False)
    found = least_two_tier(problem)
    assert found.first == {0}
    assert found.value == pytest.approx(8.0)
    by_edge = tuple(replace(fan, readers=(r,)) for r in fan.readers)
    assert least_two_tier(replace(problem, parcels=(*by_edge, *ends))).first == {0, 1, 2, 3}


def test_nothing_returns() -> None:
    """Block 1 would be cheap on the second and block 2 on the first; but 2 reads 1, so 2 follows or 1 stays."""
    row = (
        Parcel(maker=-1, readers=(0,), send=1.0), Parcel(maker=0, readers=(1,), send=1.0),
        Parcel(maker=1, readers=(2,), send=1.0), Parcel(maker=2, readers=(), send=0.0, is_result=True),
    )  # fmt: skip
    problem = TwoTier(first=(1.0, 10.0, 1.0), second=(10.0, 1.0, 6.0), parcels=row)
    found = least_two_tier(problem)
    assert found.first == {0}
    assert found.value == pytest.approx(1 + 1 + 1 + 6)
    assert two_tier_value(problem, {0, 2}) == math.inf


def test_what_is_paid_once_is_paid_once() -> None:
    """Latency 3 for the frontier of two tensors, not for each; all local where it does not pay."""
    two = (
        Parcel(maker=-1, readers=(0,), send=9.0), Parcel(maker=0, readers=(1, 2), send=1.0),
        Parcel(maker=1, readers=(3,), send=1.0), Parcel(maker=2, readers=(3,), send=1.0),
        Parcel(maker=3, readers=(), send=0.0, is_result=True),
    )  # fmt: skip
    problem = TwoTier(first=(1.0, 1.0, 1.0, 20.0), second=(5.0, 5.0, 5.0, 1.0), parcels=two, send_fixed=3.0, home_fixed=2.0)
    assert least_two_tier(problem).value == pytest.approx(3 + 3 + 1 + 1 + 1 + 2)
    assert least_two_tier(problem).first == {0, 1, 2}
    far = replace(problem, send_fixed=16.0)
    assert least_two_tier(far).first == {0, 1, 2, 3}
    assert least_two_tier(far).value == pytest.approx(23.0)


def test_a_chain_is_cut_where_the_best_of_all_cuts_is() -> None:
    """Neurosurgeon's sum over every cut of a row of blocks."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        count = int(rng.integers(2, 30))
        first, second = rng.uniform(0, 3, count), rng.uniform(0, 1, count)
        send, fixed, home = rng.uniform(0, 5, count), float(rng.uniform(0, 2)), float(rng.uniform(0, 2))
        row = [Parcel(maker=v - 1, readers=(v,), send=float(send[v])) for v in range(count)]
        row.append(Parcel(maker=count - 1, readers=(), send=0.0, is_result=True, home=home))
        problem = TwoTier(
            first=tuple(first.tolist()), second=tuple(second.tolist()), parcels=tuple(row), send_fixed=fixed
        )  # fmt: skip
        cuts = [first[:p].sum() + fixed + send[p] + second[p:].sum() + home for p in range(count)]
        assert least_two_tier(problem).value == pytest.approx(min(*cuts, first.sum()))


@settings(max_examples=25)
@given(
    edges=st.lists(
        st.tuples(st.integers(0, 7), st.integers(0, 7), st.floats(0.0, 1e9, allow_subnormal=True)), min_size=1, max_size=40
    )
)
def test_flow_equals_the_least_cut_whatever_the_capacities(edges: list[tuple[int, int, float]]) -> None:
    network = FlowNetwork(8)
    for tail, head, capacity in edges:
        if tail != head:
            network.edge(tail, head, capacity)
    flow, side = network.cut(0, 7)

    def capacity_of(chosen: int) -> float:
        return sum(c for a, b, c in edges if chosen >> a & 1 and not chosen >> b & 1)

    least = min(capacity_of(1 | bits << 1) for bits in range(1 << 6))
    found = capacity_of(sum(1 << v for v in range(8) if side[v]))
    assert side[0]
    assert not side[7]
    assert found == pytest.approx(least, rel=1e-9, abs=1e-6)
    assert flow == pytest.approx(least, rel=1e-9, abs=1e-6)


def test_a_block_that_runs_nowhere_is_refused() -> None:
    problem = TwoTier(
        first=(math.inf,), second=(math.inf,), parcels=(Parcel(maker=0, readers=(), send=0.0, is_result=True),)
    )  # fmt: skip
    with pytest.raises(PlannerError, match="no placement"):
        least_two_tier(problem)
