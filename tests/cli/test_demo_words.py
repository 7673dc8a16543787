"""The demo's plans, curve and sentences, on a made-up profile whose answers can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ecotone.cli.demo_words import conclusion, curve, headline, one_cut, plan_in_words
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.cost import predict
from ecotone.graph import Block, Graph, Tensor, TensorIndex
from ecotone.plan import Plan, plan_violations
from ecotone.profile import CodecCost, Payload, Profile, SegmentTime
from ecotone.web.result import Act, Contender

pytestmark = pytest.mark.torch  # ecotone.cli loads torch

CAMERA, SERVER = DeviceId("camera"), DeviceId("server")
BYTES = (40_000, 80_000, 4_000, 400)  # of the input, after block 0, 1 and 2


def graph() -> Graph:
    tensors = tuple(Tensor(name=f"t{i}", shape=(n // 4,), dtype="float32", producer=i - 1) for i, n in enumerate(BYTES))
    blocks = tuple(
        Block(name=f"b{i}", inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),), flop=(1e6, 2e6, 7e6)[i])
        for i in range(3)
    )
    return Graph(name="three", blocks=blocks, tensors=tensors, inputs=(TensorIndex(0),), outputs=(TensorIndex(3),))


def cluster(rate: float = 1e6, latency: float = 0.001) -> Cluster:
    devices = (Device(name=CAMERA, memory_bytes=10**9, slowdown=10), Device(name=SERVER, memory_bytes=10**9))
    links = tuple(
        Link(source=a, target=b, latency_s=latency, bandwidth_bytes_per_s=rate)
        for a, b in ((CAMERA, SERVER), (SERVER, CAMERA))
    )
    return Cluster(name="two", devices=devices, links=links, source=CAMERA, sink=CAMERA, emulate=True)


def profile(codecs: tuple[str, ...] = ("fp32", "jpeg:90", "int4")) -> Profile:
    """Blocks take 1, 2 and 7 ms on the server, ten times that on the camera; nothing else costs time."""
    upto = (0.0, 0.001, 0.003, 0.010)
    segments = tuple(
        SegmentTime(
            device=device, executor="torch:fp32", start=a, stop=b, median_s=slow * (upto[b] - upto[a]), spread_s=0,
            memory_bytes=1,
        )
        for device, slow in ((CAMERA, 10.0), (SERVER, 1.0))
        for a in range(3)
        for b in range(a + 1, 4)
    )  # fmt: skip
    payloads = [Payload(position=p, codec="fp32", size_bytes=BYTES[p]) for p in range(4)]
    payloads += [Payload(position=p, codec="int4", size_bytes=BYTES[p] / 8, disagreement=0.004) for p in (1, 2)]
    payloads += [Payload(position=0, codec="jpeg:90", size_bytes=6_000, disagreement=0.002)]
    free = {"encode_fixed_s": 0.0, "encode_s_per_raw_byte": 0.0, "decode_fixed_s": 0.0, "decode_s_per_raw_byte": 0.0}
    costs = tuple(CodecCost(device=d, codec=c, **free) for d in (CAMERA, SERVER) for c in codecs)
    return Profile(
        graph_hash=graph().content_hash(), cluster_name="two", num_blocks=3, cuts=(0, 1, 2, 3), segments=segments,
        codecs=costs, payloads=tuple(payloads),
    )  # fmt: skip


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_one_cut_is_a_plan_that_can_run(position: int) -> None:
    plan = one_cut(graph(), cluster(), SERVER, position, "int4", ("torch:fp32", "torch:fp32"))
    assert plan_violations(plan, graph(), cluster()) == ()
    assert len(plan.stages) == (1 if position in (0, 3) else 2)


def test_the_curve_is_what_the_formula_says() -> None:
    points = curve(graph(), cluster(), profile(), 0.01)
    answer = 0.001 + BYTES[3] / 1e6  # the way back
    expected = [
        ("jpeg:90", 0.001 + 6_000 / 1e6 + 0.010 + answer),
        ("int4", 0.010 + 0.001 + 10_000 / 1e6 + 0.009 + answer),
        ("int4", 0.030 + 0.001 + 500 / 1e6 + 0.007 + answer),
        ("none", 0.100),
    ]
    assert [p.position for p in points] == [0, 1, 2, 3]
    assert [p.latency_s for p in points] == pytest.approx([latency for _, latency in expected])
    assert [p.codec for p in points[:3]] == [codec for codec, _ in expected[:3]]


def test_the_curve_leaves_out_what_changes_too_many_decisions() -> None:
    points = curve(graph(), cluster(), profile(), 0.001)
    assert {p.codec for p in points[:3]} == {"fp32"}


def contender(kind: str, latency: float, **more: object) -> Contender:
    plain = Contender(
        kind=kind, name=kind, words="", latency_median_s=latency, latency_p95_s=latency, throughput_per_s=1,
        bytes_per_frame=1000, accuracy=0.8, energy_joule=1, predicted_latency_s=latency, predicted_throughput_per_s=1,
        predicted_bytes=1000, num_frames=3,
    )  # fmt: skip
    return replace(plain, **more)


def plan(position: int, codec: str = "int4") -> Plan:
    return one_cut(graph(), cluster(), SERVER, position, codec, ("torch:fp32", "torch:fp32"))


def test_a_win_a_tie_and_a_loss_are_named_as_such() -> None:
    ours = contender("ecotone", 0.1)
    assert "100 ms, 2.00 times faster than the best of the others (jpeg, 200 ms)" in headline(
        [contender("device", 0.3), contender("jpeg", 0.2), ours], plan(2)
    )
    assert "as fast as the best of the others (jpeg" in headline([contender("jpeg", 0.101), ours], plan(2))
    assert "jpeg was faster here (50.0 ms)" in headline([contender("jpeg", 0.05), ours], plan(2))


def test_where_the_jpeg_is_best_the_headline_says_so() -> None:
    words = headline([contender("jpeg", 0.1), contender("ecotone", 0.1, same_as="jpeg")], plan(0, "jpeg:90"))
    assert "the plan that jpeg has, too" in words
    assert "Best is sending the picture as jpeg:90 to server, which does all the work: 100 ms" in words
    assert "So an image codec is the best plan here: cutting the network would not pay." in words
    assert "picture" not in headline([contender("jpeg", 0.1), contender("ecotone", 0.1)], plan(2))


def test_the_conclusion_says_whether_the_cut_moved() -> None:
    acts = [
        Act(title="", headline="", links=(), contenders=(contender("ecotone", 0.1),), curve=()),
        Act(title="", headline="", links=(), contenders=(contender("stale", 0.4), contender("ecotone", 0.2)), curve=()),
    ]
    moved = conclusion((plan(1), plan(3)), acts, 8.0)
    assert "as they are, cutting at block 1 between camera and server: 100 ms." in moved
    assert "8 times slower, running everything on camera: 200 ms, where the first plan would need 400 ms." in moved
    assert "still the same plan: 200 ms" in conclusion((plan(1), plan(1)), acts, 8.0)


def test_plan_in_words() -> None:
    assert plan_in_words(plan(2)) == "camera 0 to 2, int4 to server 2 to 3"
    assert plan_in_words(plan(0, "jpeg:90")) == "jpeg:90 to server 0 to 3"
    assert predict(plan(3), graph(), cluster(), profile()).latency_s == pytest.approx(0.1)
