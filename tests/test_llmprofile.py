"""Profiles of language models: the sum behind `attended`, what is refused, pairs of executors, and formulas played out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.llmcost import LlmCostModel, Shape, frames_of
from ecotone.llmplan import LlmPlan, LlmStage, Span
from ecotone.llmprofile import Curve, ExecutorFacts, LayerPart, LlmProfile, PartTime, attended
from ecotone.schema import SchemaError

pytestmark = pytest.mark.pure


@given(st.integers(1, 60), st.integers(0, 100), st.integers(0, 80))
def test_pairs_are_the_sum_over_tokens(count: int, context: int, window: int) -> None:
    seen = [min(context + i, window) if window else context + i for i in range(1, count + 1)]
    assert attended(count, context, window) == sum(seen)


@given(st.integers(1, 64))
def test_frames_hold_all_requests_and_no_number_of_rows_is_left_out(n: int) -> None:
    dealt = dict(frames_of(n))
    assert all(rows * frames >= n > rows * (frames - 1) for rows, frames in dealt.items())
    assert set(dealt) == {-(-n // frames) for frames in range(1, n + 1)}


def profile() -> LlmProfile:
    times = tuple(
        PartTime(
            device=kind, executor=executor, part=part, weight_bytes=100 * (index + 1), residual=0.1,
            prefill=Curve(fixed_s=1e-3, token_s=1e-4 * (index + 1)), decode=Curve(fixed_s=2e-3 * (index + 1)),
        )
        for kind in ("slow", "fast")
        for index, executor in enumerate(("a:fp32", "b:int8"))
        for part in ("embedding", "0", "head")
    )  # fmt: skip
    facts = tuple(
        ExecutorFacts(executor=e, kv_bytes_per_token=b, loss=v) for e, b, v in (("a:fp32", 8, 0), ("b:int8", 4, 0.02))
    )
    return LlmProfile(
        model_hash="m", width=16, max_positions=512, kinds=(LayerPart(part="0"),), layers=("0",) * 6, times=times,
        executors=facts, codec_losses={"int8": 0.01},
    )  # fmt: skip


def test_it_reads_what_it_wrote_and_names_what_is_wrong() -> None:
    made = profile()
    assert LlmProfile.from_json(made.to_json()) == made
    with pytest.raises(SchemaError, match="layers name kind '7'"):
        replace(made, layers=("7",))
    with pytest.raises(SchemaError, match="given twice"):
        replace(made, times=(*made.times, made.times[0]))
    with pytest.raises(SchemaError, match="of which nothing else is stated"):
        replace(made, executors=made.executors[:1])
    with pytest.raises(SchemaError, match="not JSON"):
        LlmProfile.from_json("{")


def test_a_pair_of_executors_has_a_curve_and_a_copy_of_each() -> None:
    device = Device(name=DeviceId("x"), kind="slow", memory_bytes=1)
    one, two, both = (profile().measured(device, e) for e in ("a:fp32", "b:int8", "a:fp32+b:int8"))
    assert one
    assert two
    assert both
    assert both.prefill == one.prefill
    assert both.decode == two.decode
    assert both.weight_bytes["0"] == one.weight_bytes["0"] + two.weight_bytes["0"]
    assert (both.kv_bytes_per_token, both.loss) == (two.kv_bytes_per_token, 0.02)
    assert profile().measured(device, "c:fp32") is None


def test_formulas_are_what_chunks_and_frames_do_when_played() -> None:
    """Equations (8) and (9): chunks and frames pass stages and links event by event, each doing one thing at a time."""
    devices = tuple(Device(name=DeviceId(n), kind=k, memory_bytes=10**9) for n, k in (("p", "slow"), ("q", "fast")))
    links = tuple(
        Link(source=a, target=b, latency_s=0.004, bandwidth_bytes_per_s=5e5)
        for a, b in ((devices[0].name, devices[1].name), (devices[1].name, devices[0].name))
    )
    cluster = Cluster(name="two", devices=devices, links=links, source=devices[0].name, sink=devices[0].name)
    made = replace(profile(), times=tuple(t for t in profile().times if t.executor == "a:fp32"))
    stages = (
        LlmStage(
            device=devices[0].name, span=Span(start=0, stop=2, embedding=True), executor="a:fp32", kv_bytes=1, codec="fp32"
        ),
        LlmStage(device=devices[1].name, span=Span(start=2, stop=6, head=True), executor="a:fp32", kv_bytes=1),
    )
    shape = Shape(prompt=256, answer=8, concurrency=6)
    plan = LlmPlan(model_hash="m", num_layers=6, driver=devices[0].name, stages=stages, context=264)
    model = LlmCostModel(made, cluster, shape)
    cost = model.predict(plan, 64)
    one, two, hop = cost.stages[0].chunk_s, cost.stages[1].chunk_s, cost.hops[0]
    head_s = 1e-3 + 1e-4
    occupied, free = hop.chunk_s - 0.004, [0.0, 0.0, 0.0]
    for _ in range(cost.num_chunks):
        free[0] += one
        free[1] = max(free[0], free[1]) + occupied
        free[2] = max(free[1] + 0.004, free[2]) + two - head_s
    assert free[2] + head_s + cost.hops[1].chunk_s == pytest.approx(cost.ttft_s, rel=1e-9)
    assert cost.num_chunks == 4
    # decoding: six requests in frames of `rows`, each starting over when it is back
    few = [0.002 * 3, 0.002 * 5]  # embedding and two layers; four layers and the head
    way_s, back_s = 0.004 + model.state_bytes(cost.rows, "fp32") / 5e5, 0.004 + model.result_bytes(cost.rows) / 5e5
    free, ready = [0.0, 0.0, 0.0], [0.0] * cost.frames
    for _ in range(200):
        for frame in range(cost.frames):
            free[0] = max(ready[frame], free[0]) + few[0]
            free[1] = max(free[0], free[1]) + way_s - 0.004
            free[2] = max(free[1] + 0.004, free[2]) + few[1]
            ready[frame] = free[2] + back_s
    assert 200 * 6 / max(ready) == pytest.approx(cost.tokens_per_s, rel=0.02)
    assert cost.tokens_per_s >= cost.bubbles_per_s
    assert cost.tpot_s == pytest.approx(sum(few) + cost.hops[0].decode_s + cost.hops[1].decode_s)
