"""Measuring nodes that are real as far as the runtime knows: they profile themselves from what they were sent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_nets import cluster, convolutions, even

from ecotone.cost import predict
from ecotone.profiling import MeasureOptions
from ecotone.runtime import in_memory, launch, measure, measure_links

pytestmark = pytest.mark.torch

OPTIONS = MeasureOptions(
    executors=("torch:fp32",), codecs=("fp32", "int8"), rounds=2, screening_rounds=1, max_cuts=3, isolate=False
)


def test_real_nodes_measure_themselves_and_the_profile_prices_every_plan(tmp_path: Path) -> None:
    captured, _ = convolutions()
    world = cluster("a", "b", emulate=False)
    seen: list[str] = []
    with in_memory(world) as nodes:
        profile = measure(
            captured, nodes, options=OPTIONS, progress=lambda done, total, what: seen.append(what), path=tmp_path / "p.json"
        )
    spans = {(s.device, s.start, s.stop) for s in profile.segments}
    assert {(d, a, b) for d, a, b in spans if d == "a"} == {("a", a, b) for d, a, b in spans if d == "b"}
    assert {(k.source, k.target) for k in profile.links} == {("a", "b"), ("b", "a")}
    assert any(what.startswith("b: ") for what in seen)
    length = captured.graph.num_blocks
    at_cuts = even(captured.graph, "a", "b", codec="int8")
    assert predict(at_cuts, captured.graph, world, profile).latency_s > 0
    assert {0, length} <= set(profile.cuts)


@pytest.mark.loopback
def test_a_link_is_measured_as_it_is_shaped() -> None:
    """2 MB/s and 20 ms, in user space: the fit must find them again within what a busy computer adds."""
    stated = cluster("a", "b", rate=2e6, latency_s=0.02)
    with launch(stated) as nodes:
        nodes.cluster = replace(nodes.cluster, name="test")
        for fit in measure_links(nodes):
            assert 0.018 <= fit.latency_s <= 0.04
            assert 1.5e6 <= fit.bandwidth_bytes_per_s <= 2.1e6
