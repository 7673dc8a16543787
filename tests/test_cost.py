"""Every formula of cost.py against numbers worked out by hand, and interpolation against times that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.cluster import Cluster, Device, DeviceId, Link, Power
from ecotone.cost import (
    CostError,
    CostModel,
    StageTimes,
    packed_bytes,
    predict,
    resident_bytes,
    stage_s,
    transfer_s,
    working_set_bytes,
)
from ecotone.graph import Block, Graph, Parameter, Tensor, TensorIndex
from ecotone.plan import Plan, Stage, Transfer
from ecotone.profile import CodecCost, LinkFit, Payload, Profile, SegmentTime

pytestmark = pytest.mark.pure
A, B = DeviceId("a"), DeviceId("b")


def index(*values: int) -> tuple[TensorIndex, ...]:
    return tuple(TensorIndex(v) for v in values)


def skip_graph() -> Graph:
    """x -> b0 -> y -> b1 -> z -> b2(z, y) -> w; y lives on across b1. Blocks 0 and 2 share weight 0 (1000 bytes)."""
    tensors = (
        Tensor(name="x", shape=(1, 10), dtype="float32", producer=-1),
        Tensor(name="y", shape=(1, 4, 5), dtype="float32", producer=0),
        Tensor(name="z", shape=(3,), dtype="int64", producer=1), Tensor(name="w", shape=(2,), dtype="float32", producer=2),
    )  # fmt: skip
    blocks = (
        Block(name="b0", inputs=index(0), outputs=index(1), flop=1.0, parameters=(0,)),
        Block(name="b1", inputs=index(1), outputs=index(2), flop=3.0, parameters=(1,)),
        Block(name="b2", inputs=index(2, 1), outputs=index(3), flop=2.0, parameters=(0,)),
    )
    weights = (Parameter(name="shared", size_bytes=1000), Parameter(name="own", size_bytes=30))
    return Graph(name="skip", blocks=blocks, tensors=tensors, inputs=index(0), outputs=index(3), parameters=weights)


def segment(device: str, start: int, stop: int, seconds: float, error: float = 0.0) -> SegmentTime:
    return SegmentTime(
        device=DeviceId(device), executor="torch:fp32", start=start, stop=stop, median_s=seconds, spread_s=0, memory_bytes=0,
        relative_error=error,
    )  # fmt: skip


def world(*, emulate: bool = False) -> tuple[Graph, Cluster, Profile]:
    graph = skip_graph()
    power = Power(idle_watt=1.0, busy_watt=5.0, send_joule_per_byte=1e-3)
    devices = (Device(name=A, memory_bytes=10**6, power=power), Device(name=B, memory_bytes=10**6))
    links = tuple(Link(source=s, target=t, latency_s=0.01, bandwidth_bytes_per_s=1000.0) for s, t in ((A, B), (B, A)))
    cluster = Cluster(name="c", devices=devices, links=links, source=A, sink=A, emulate=emulate)
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name="c", num_blocks=3, cuts=(0, 1, 2, 3),
        segments=(
            segment("a", 0, 1, 0.1, 0.01), segment("b", 1, 3, 0.05, 0.02), segment("a", 2, 3, 0.3), segment("b", 1, 2, 0.02),
        ),
        links=(LinkFit(source=A, target=B, latency_s=0.02, bandwidth_bytes_per_s=500.0),),
        codecs=(
            CodecCost(device=A, codec="int8", encode_fixed_s=0.001, encode_s_per_raw_byte=1e-5, decode_fixed_s=0,
                      decode_s_per_raw_byte=0),
            CodecCost(device=B, codec="int8", encode_fixed_s=0, encode_s_per_raw_byte=0, decode_fixed_s=0.002,
                      decode_s_per_raw_byte=2e-5),
        ),
        payloads=(Payload(position=1, codec="int8", size_bytes=25.0, relative_error=0.03, disagreement=0.004),),
    )  # fmt: skip
    return graph, cluster, profile


def there_and_back(graph: Graph) -> Plan:
    stages = (Stage(device=A, start=0, stop=1), Stage(device=B, start=1, stop=3))
    transfers = (
        Transfer(source=A, target=A, position=0, codec="none"), Transfer(source=A, target=B, position=1, codec="int8"),
        Transfer(source=B, target=A, position=3, codec="fp32"),
    )  # fmt: skip
    return Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)


def test_a_plan_by_hand() -> None:
    graph, cluster, profile = world()
    cost = predict(there_and_back(graph), graph, cluster, profile)
    # y: 20 floats, 80 raw bytes. encode 0.001 + 8e-4, decode 0.002 + 1.6e-3; measured link 0.02 + 25 / 500.
    # Back over the stated link: 0.01 + 8 / 1000.
    there = 0.0018 + 0.02 + 0.05 + 0.0036
    assert cost.transfers[1].total_s == pytest.approx(there)
    assert cost.transfers[0].total_s == 0
    assert cost.latency_s == pytest.approx(0.1 + there + 0.05 + 0.018)
    busy = {d.device: d.busy_s for d in cost.devices}
    assert busy == pytest.approx({"a": 0.1018, "b": 0.0536})
    assert cost.bottleneck_s == pytest.approx(0.1018)
    assert {(k.source, k.target): k.busy_s for k in cost.links} == pytest.approx({("a", "b"): 0.05, ("b", "a"): 0.008})
    assert cost.size_bytes == pytest.approx(33.0)
    assert cost.disagreement == pytest.approx(0.004)
    assert cost.relative_error == pytest.approx(0.01 + 0.02 + 0.03)
    assert cost.energy_joule == pytest.approx(5 * 0.1018 + (cost.latency_s - 0.1018) + 25e-3)  # b has no watts


def test_shared_weights_of_one_device_count_once() -> None:
    graph, cluster, profile = world()
    stages = (Stage(device=A, start=0, stop=1), Stage(device=B, start=1, stop=2), Stage(device=A, start=2, stop=3))
    transfers = (
        Transfer(source=A, target=A, position=0, codec="none"), Transfer(source=A, target=B, position=1),
        Transfer(source=B, target=A, position=2), Transfer(source=A, target=A, position=3, codec="none"),
    )  # fmt: skip
    cost = predict(Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers), graph, cluster, profile)
    # Live during b0: x 40 + y 80; b1: y 80 + z 24; b2: z 24 + y 80 + w 8.
    assert {d.device: d.memory_bytes for d in cost.devices} == {"a": 1000 + 120, "b": 30 + 104}
    assert working_set_bytes(graph).tolist() == [120, 104, 112]


def test_an_emulated_cluster_uses_the_stated_link() -> None:
    graph, cluster, profile = world(emulate=True)
    assert transfer_s(profile, "a", "b", 1, "fp32", graph=graph, cluster=cluster) == pytest.approx(0.01 + 80 / 1000)
    assert transfer_s(profile, "a", "a", 1, "fp32", graph=graph, cluster=cluster) == 0


def test_a_device_of_the_same_kind_shares_times_by_slowdown() -> None:
    graph, cluster, profile = world(emulate=True)
    twins = tuple(replace(d, kind="pi") for d in cluster.devices)
    slow = Device(name=DeviceId("c"), memory_bytes=10, kind="pi", slowdown=3.0)
    cluster = replace(cluster, devices=(twins[0], replace(twins[1], kind=""), slow))
    assert stage_s(profile, "c", "torch:fp32", 0, 1, graph=graph, cluster=cluster) == pytest.approx(0.3)


def test_what_was_never_measured_is_named() -> None:
    graph, cluster, profile = world()
    plan = there_and_back(graph)
    with pytest.raises(CostError, match=r"onnxruntime:fp32 on a"):
        stage_s(profile, "a", "onnxruntime:fp32", 0, 1, graph=graph, cluster=cluster)
    with pytest.raises(CostError, match="codec jpeg:90 at position 1"):
        transfer_s(profile, "a", "b", 1, "jpeg:90", graph=graph, cluster=cluster)
    with pytest.raises(CostError, match="no link from a to b"):
        predict(plan, graph, replace(cluster, links=cluster.links[1:]), profile)


@pytest.mark.parametrize(
    ("position", "codec", "size"),
    [(1, "fp32", 80), (1, "fp16", 40), (1, "bf16", 40), (1, "int8", 28), (1, "int3", 16), (1, "int4c", 10 + 32),
     (2, "fp16", 40 + 24), (1, "int9", None), (1, "int4+zstd", None), (1, "png", None)],
)  # fmt: skip
def test_packed_bytes(position: int, codec: str, size: float | None) -> None:
    assert packed_bytes(skip_graph(), position, codec) == size


blocks = st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=12)


@given(blocks, st.floats(0.0, 1e-3), st.data())
def test_prefixes_and_suffixes_give_every_segment(times: list[float], fixed: float, data: st.DataObject) -> None:
    """Times that truly are o + sum of blocks come back exactly from 2 L - 1 measured segments, o at most the least."""
    upto = np.concatenate([[0.0], np.cumsum(times)])
    last = len(times)
    spans = [(0, b) for b in range(1, last + 1)] + [(a, last) for a in range(1, last)]
    model = StageTimes([segment("a", a, b, fixed + upto[b] - upto[a]) for a, b in spans], np.arange(last + 1.0))
    start = data.draw(st.integers(0, last - 1))
    stop = data.draw(st.integers(start + 1, last))
    seconds, extrapolated = model.seconds(start, stop)
    assert seconds == pytest.approx(fixed + upto[stop] - upto[start], rel=1e-9, abs=1e-12)
    assert not extrapolated


@given(st.lists(st.floats(0, 1), min_size=3, max_size=10))
def test_noise_never_makes_a_longer_prefix_cheaper(noisy: list[float]) -> None:
    last = len(noisy)
    model = StageTimes([segment("a", 0, b + 1, t) for b, t in enumerate(noisy)], np.arange(last + 1.0))
    table, _ = model.table(range(last + 1))
    finite = table[1:, 1:][np.triu_indices(last, 1)]
    assert (finite >= 0).all()


def test_between_measured_cuts_the_share_of_flop_decides_and_is_flagged() -> None:
    graph, cluster, profile = world()
    profile = replace(profile, segments=(segment("a", 0, 3, 0.6),), cuts=(0, 3))
    model = CostModel(graph, cluster, profile)
    found = model.stage(Stage(device=A, start=1, stop=2))
    assert found.compute_s == pytest.approx(0.3)  # 3 of 6 FLOP
    assert found.extrapolated
    assert not model.stage(Stage(device=A, start=0, stop=3)).extrapolated


def test_a_measured_segment_is_used_as_it_is() -> None:
    graph, cluster, profile = world()
    profile = replace(
        profile,
        segments=(segment("a", 0, 3, 0.6), segment("a", 0, 1, 0.2), segment("a", 1, 3, 0.5), segment("a", 1, 2, 7.0)),
    )
    assert stage_s(profile, "a", "torch:fp32", 1, 2, graph=graph, cluster=cluster) == 7.0


def test_resident_bytes_of_a_set_by_hand() -> None:
    """Weights: blocks 0 and 2 share 1000, block 1 has 30. Working sets by block: x + y = 40 + 80; y + z = 80 + 24;
    y + z + w = 80 + 24 + 8. The local tail reuses the head that is there; a whole-model stage is compiled apart."""
    graph = skip_graph()
    split = there_and_back(graph)
    local = Transfer(source=A, target=A, position=0, codec="none")
    fallback = Plan(
        graph_hash=graph.content_hash(), stages=(split.stages[0], Stage(device=A, start=1, stop=3)),
        transfers=(local, replace(local, position=1), replace(local, position=3)),
    )  # fmt: skip
    whole = Plan(
        graph_hash=graph.content_hash(), stages=(Stage(device=A, start=0, stop=3, executor="openvino:fp32"),),
        transfers=(local, replace(local, position=3)),
    )  # fmt: skip
    graphs = {graph.content_hash(): graph}
    assert resident_bytes(graphs, [split]) == {A: 1000 + 120, B: 1030 + 112}
    assert resident_bytes(graphs, [split, fallback, split.with_epoch(7)]) == {A: 1000 + 1030 + 120, B: 1030 + 112}
    assert resident_bytes(graphs, [split, whole]) == {A: 1000 + 1030 + 120, B: 1030 + 112}
    with pytest.raises(CostError, match="is not among the graphs given"):
        resident_bytes({}, [split])


def test_resident_bytes_of_one_plan_is_its_predicted_memory() -> None:
    graph, cluster, profile = world()
    plan = there_and_back(graph)
    one = resident_bytes({graph.content_hash(): graph}, [plan])
    assert one == {d.device: d.memory_bytes for d in predict(plan, graph, cluster, profile).devices}
