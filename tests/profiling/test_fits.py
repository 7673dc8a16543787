"""Fits and statistics against lines and orders that were made by hand or by numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.graph import Block, Graph, Tensor, TensorIndex
from ecotone.profiling.cuts import candidate_cuts
from ecotone.profiling.link import LINK_PROBE_SIZES, LinkSample, fit_line, fit_link, probe_sizes
from ecotone.profiling.timing import median_and_spread
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

rates = st.floats(1e4, 1e10)
latencies = st.floats(1e-5, 1.0)


def line(latency: float, rate: float) -> list[LinkSample]:
    return [LinkSample(size_bytes=s, seconds=latency + s / rate) for s in LINK_PROBE_SIZES]


@given(latencies, rates)
def test_exact_line_is_found(latency, rate):
    fit = fit_link("a", "b", line(latency, rate))
    # Either term may drown in the rounding of the other: compare where the line was sampled.
    for size in LINK_PROBE_SIZES:
        assert fit.latency_s + size / fit.bandwidth_bytes_per_s == pytest.approx(latency + size / rate, rel=1e-6)
    assert fit.relative_residual < 1e-6


@given(latencies, rates, st.integers(0, 2**32 - 1))
def test_noise_and_outliers_move_it_little(latency, rate, seed):
    random = np.random.default_rng(seed)
    samples = [
        LinkSample(size_bytes=m.size_bytes, seconds=m.seconds * (30 if i == 0 else random.uniform(0.98, 1.02)))
        for m in line(latency, rate)
        for i in range(5)  # one of five is 30 times too slow
    ]
    fit = fit_link("a", "b", samples)
    for size in LINK_PROBE_SIZES:
        assert fit.latency_s + size / fit.bandwidth_bytes_per_s == pytest.approx(latency + size / rate, rel=0.15)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(1e-6, 10)), min_size=2, max_size=8))
def test_line_is_never_negative_and_never_worse_than_its_neighbours(points):
    a, b = fit_line(points)
    assert a >= 0
    assert b >= 0

    def loss(a: float, b: float) -> float:
        return sum(((a + b * x - y) / y) ** 2 for x, y in points)

    for factor_a, factor_b in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)):
        assert loss(a, b) <= loss(a * factor_a, b * factor_b) + 1e-9 * (1 + loss(a, b))


@pytest.mark.parametrize("samples", [[], line(0.1, 1e6)[:1], [LinkSample(size_bytes=s, seconds=0.0) for s in (1, 2)]])
def test_samples_that_fit_nothing(samples):
    with pytest.raises(EcotoneError, match="link a>b: cannot be fitted"):
        fit_link("a", "b", samples)


@given(st.floats(1e3, 1e12))
def test_probe_stays_within_its_budget(rate):
    sizes = probe_sizes(rate, budget_s=2.0, rounds=3)
    assert len(sizes) >= 2
    assert len(sizes) == 2 or 3 * sum(sizes) <= 2.0 * rate


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30))
def test_median_and_spread_as_numpy(times):
    median, spread = median_and_spread(times)
    assert median == pytest.approx(np.median(times))
    assert spread == pytest.approx((np.quantile(times, 0.9) - np.quantile(times, 0.1)) / 2, abs=1e-9)


def chain(sizes: list[int]) -> Graph:
    tensors = tuple(Tensor(name=f"t{i}", shape=(s,), dtype="float32", producer=i - 1) for i, s in enumerate(sizes))
    blocks = tuple(
        Block(name=f"b{i}", inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),), flop=float(i % 7))
        for i in range(len(sizes) - 1)
    )
    return Graph(
        name="chain", blocks=blocks, tensors=tensors, inputs=(TensorIndex(0),), outputs=(TensorIndex(len(sizes) - 1),)
    )


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=80), st.integers(1, 24))
def test_cuts_are_within_limits_and_hold_the_cheapest_frontier(sizes, limit):
    graph = chain(sizes)
    cuts = candidate_cuts(graph, limit)
    inner = cuts[1:-1]
    assert cuts[0] == 0
    assert cuts[-1] == graph.num_blocks
    assert list(cuts) == sorted(set(cuts))
    assert len(inner) == min(limit, graph.num_blocks - 1)
    below = [s for s in sizes[1:-1] if s < sizes[0]]
    if below and inner:
        assert min(sizes[p] for p in inner) == min(below)
