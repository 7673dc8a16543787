"""Plans of language models: their own shape, JSON both ways, and what a cluster has against them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.llmplan import LOCAL, LlmPlan, LlmStage, Span, Standby, llm_plan_violations
from ecotone.schema import SchemaError

pytestmark = pytest.mark.pure

A, B, C = DeviceId("a"), DeviceId("b"), DeviceId("c")


def stage(device: DeviceId, start: int, stop: int, codec: str = LOCAL, **ends: bool) -> LlmStage:
    return LlmStage(device=device, span=Span(start=start, stop=stop, **ends), executor="x:fp32", kv_bytes=8, codec=codec)


def plan(*stages: LlmStage, **more: object) -> LlmPlan:
    return LlmPlan(model_hash="m", num_layers=6, driver=A, stages=stages, context=64, **more)  # type: ignore[arg-type]


ROUND = plan(
    stage(A, 0, 0, "fp32", embedding=True), stage(B, 0, 4, "int8"), stage(C, 4, 6, "fp32"), stage(A, 6, 6, head=True),
    standbys=(Standby(device=A, stage=1),),
)  # fmt: skip


def cluster(*links: tuple[DeviceId, DeviceId], memory_bytes: int = 1000) -> Cluster:
    devices = tuple(Device(name=name, memory_bytes=memory_bytes) for name in (A, B, C))
    made = tuple(Link(source=s, target=t, latency_s=0.0, bandwidth_bytes_per_s=1e6) for s, t in links)
    return Cluster(name="k", devices=devices, links=made, source=A, sink=A)


def test_a_plan_survives_json() -> None:
    assert LlmPlan.from_json(ROUND.to_json()) == ROUND
    assert ROUND.identity() == ROUND.with_epoch(7).identity() != replace(ROUND, context=65).identity()


def test_what_crosses_links() -> None:
    assert ROUND.hops == ((A, B), (B, C), (C, A))
    assert ROUND.devices == (A, B, C)
    assert not ROUND.is_exact


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ((), "no stage"),
        ((stage(A, 0, 6, head=True),), "begin with the embedding"),
        ((stage(A, 0, 6, embedding=True),), "end with layer 6 and the head"),
        ((stage(A, 0, 3, "fp32", embedding=True), stage(B, 4, 6, head=True)), "next starts at 4"),
        ((stage(A, 0, 3, embedding=True), stage(B, 3, 6, head=True)), "codec must be"),
        ((stage(A, 0, 3, "fp32", embedding=True), stage(A, 3, 6, head=True)), "codec must be"),
        ((stage(A, 0, 3, "zip", embedding=True), stage(B, 3, 6, head=True)), "'zip' is not one of"),
        ((stage(A, 0, 3, "fp32", embedding=True, head=True), stage(B, 3, 6, head=True)), "only the first embeds"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(stages: tuple[LlmStage, ...], complaint: str) -> None:
    with pytest.raises(SchemaError, match=complaint):
        plan(*stages)


def test_a_standby_is_for_another_stage() -> None:
    whole = stage(A, 0, 6, embedding=True, head=True)
    for standby, complaint in ((Standby(device=A, stage=0), "already"), (Standby(device=B, stage=1), "does not exist")):
        with pytest.raises(SchemaError, match=complaint):
            plan(whole, standbys=(standby,))


def test_the_cluster_must_have_the_links_and_the_memory() -> None:
    every = [(s, t) for s in (A, B, C) for t in (A, B, C) if s != t]
    assert llm_plan_violations(ROUND, cluster(*every), (10, 20, 20, 10)) == ()
    missing = llm_plan_violations(ROUND, cluster(*(pair for pair in every if pair not in ((B, C), (C, A)))))
    assert any("sends from b to c" in text for text in missing)
    assert any("link from c to a" in text for text in missing)
    (tight,) = llm_plan_violations(ROUND, cluster(*every, memory_bytes=63), (10, 20, 20, 10))
    assert "needs 64 bytes" in tight  # 10 + 8, 10 + 8 and, as standby, 20 + 8
    assert " a, " in tight
