"""Which plans are kept resident: against enumeration of all plans of a small world over a fine grid of rates."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.cost import CostModel, resident_bytes
from ecotone.graph import Block, Graph, Parameter, Tensor, TensorIndex
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner import Latency, PlannerError
from ecotone.planner.candidates import candidates
from ecotone.profile import Profile, SegmentTime

pytestmark = pytest.mark.pure

SIZES = (400_000, 200_000, 60_000, 20_000, 4_000)
SECONDS = {"a": (0.02, 0.03, 0.05, 0.10), "b": (0.002, 0.003, 0.005, 0.010)}
WEIGHTS = 1_000_000
A, B = DeviceId("a"), DeviceId("b")


def world(memory_bytes: int = 1 << 30) -> tuple[Graph, Cluster, Profile]:
    tensors = tuple(Tensor(name=f"t{i}", shape=(n // 4,), dtype="float32", producer=i - 1) for i, n in enumerate(SIZES))
    parameters = tuple(Parameter(name=f"w{i}", size_bytes=WEIGHTS) for i in range(4))
    blocks = tuple(
        Block(name=f"b{i}", inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),), parameters=(i,), flop=1.0)
        for i in range(4)
    )
    graph = Graph(
        name="narrowing", blocks=blocks, tensors=tensors, parameters=parameters, inputs=(TensorIndex(0),),
        outputs=(TensorIndex(4),),
    )  # fmt: skip
    links = tuple(Link(source=s, target=t, latency_s=0.002, bandwidth_bytes_per_s=2e6) for s, t in ((A, B), (B, A)))
    devices = tuple(Device(name=n, memory_bytes=memory_bytes) for n in (A, B))
    cluster = Cluster(name="two", devices=devices, links=links, source=A, sink=A)
    segments = tuple(
        SegmentTime(device=DeviceId(d), executor="torch:fp32", start=i, stop=j, median_s=sum(SECONDS[d][i:j]),
                    spread_s=0.0, memory_bytes=0)
        for d in SECONDS for i in range(4) for j in range(i + 1, 5)
    )  # fmt: skip
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name="two", num_blocks=4, cuts=tuple(range(5)), segments=segments
    )
    return graph, cluster, profile


def single_cuts(graph: Graph) -> list[Plan]:
    """Every plan of this world that can be best: a, then b from a cut on (b is faster on every block)."""
    plans = []
    for cut in range(5):
        placed = [(d, i, j) for d, i, j in ((A, 0, cut), (B, cut, 4)) if i < j]
        ends = [A, *(d for d, _, _ in placed), A]
        at = [0, *(j for _, _, j in placed)]
        transfers = tuple(
            Transfer(source=s, target=t, position=p, codec=LOCAL if s == t else "fp32")
            for (s, t), p in zip(pairwise(ends), at, strict=True)
        )
        stages = tuple(Stage(device=d, start=i, stop=j) for d, i, j in placed)
        plans.append(Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers))
    return plans


def best(graph: Graph, cluster: Cluster, profile: Profile, plans: list[Plan]) -> np.ndarray:
    factors = np.geomspace(1 / 100, 4, 200)
    models = [CostModel(graph, cluster.scaled_links(float(f)), profile) for f in factors]
    return np.array([min(m.predict(p).latency_s for p in plans) for m in models])


def test_the_kept_plans_are_the_envelope_over_the_rates() -> None:
    graph, cluster, profile = world()
    kept = list(candidates(graph, cluster, profile, Latency()).plans)
    everywhere = best(graph, cluster, profile, single_cuts(graph))
    assert (best(graph, cluster, profile, kept) <= everywhere * 1.02).all()
    assert kept[0] == min(single_cuts(graph), key=lambda p: CostModel(graph, cluster, profile).predict(p).latency_s)


def test_fewer_plans_lose_little_on_the_mean_and_keep_the_one_without_links() -> None:
    graph, cluster, profile = world()
    kept = candidates(graph, cluster, profile, Latency(), most=3).plans
    assert len(kept) == 3
    assert any(plan.devices == (A,) for plan in kept)


def test_the_first_is_the_best_of_today() -> None:
    graph, cluster, profile = world()
    today = replace(cluster, links=tuple(replace(k, bandwidth_bytes_per_s=1e4) for k in cluster.links))
    assert candidates(graph, cluster, profile, Latency(), now=today).primary.devices == (A,)


def test_all_of_them_fit_together() -> None:
    """8 MB of memory hold two sets of the 4 MB of weights at most, so not every candidate's stages fit on a device."""
    graph, cluster, profile = world(memory_bytes=8_500_000)
    kept = candidates(graph, cluster, profile, Latency()).plans
    held = resident_bytes({graph.content_hash(): graph}, kept)
    assert all(size <= 8_500_000 for size in held.values())
    assert len(kept) < len(candidates(*world(), Latency()).plans)


def test_what_no_plan_keeps_is_refused() -> None:
    with pytest.raises(PlannerError, match="latency"):
        candidates(*world(), Latency(), ("latency=1us",))
