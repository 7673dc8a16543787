"""Plans of language models against the enumeration of every plan; classes, refusals, replanning, and what never happens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from generation_worlds import World, best, random_world

from ecotone.cluster import Cluster, Device, DeviceId, KindLink, Link
from ecotone.decoding.step import FEW_TOKENS as STEP_FEW_TOKENS
from ecotone.llmcost import LlmCostModel, Shape
from ecotone.llmplan import llm_plan_violations
from ecotone.llmprofile import FEW_TOKENS, Curve, ExecutorFacts, LayerPart, LlmProfile, PartTime
from ecotone.planner.generation import Asked, LlmSolution, choose_plan, replan_without
from ecotone.planner.objective import PlannerError

pytestmark = pytest.mark.pure

OBJECTIVES = ("tpot", "ttft", "request", "throughput")
MEGABYTE = 1_000_000


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", [1, 2, 3, 5, 9, 12])
def test_value_and_bound_are_those_of_the_enumeration(seed: int, objective: str) -> None:
    world = random_world(seed, objective, tight=seed % 2 == 1, limits=seed % 3 == 0)
    expected = best(world)
    if math.isinf(expected):
        with pytest.raises(PlannerError):
            choose_plan(world.profile, world.cluster, world.asked, explain=False)
        return
    found = choose_plan(world.profile, world.cluster, world.asked)
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.is_proven
    assert not found.cost.violations
    assert not list(world.asked.missed(found.cost))
    weights = [stage.weight_bytes for stage in found.cost.stages]
    assert not llm_plan_violations(found.plan, world.cluster, weights)
    assert LlmSolution.from_json(found.to_json()) == found


def home(layers: int, counts: dict[str, int], memory: dict[str, int], speed: dict[str, float], latency_s: float) -> World:
    """Kinds of machines, links alike by kind; a layer takes 10 MB and 10 ms / speed."""
    parts = (("0", 1.0, 10), ("embedding", 0.01, 5), ("head", 1.0, 5))
    times = tuple(
        PartTime(
            device=kind, executor=executor, part=part, weight_bytes=int(size * MEGABYTE * share),
            prefill=Curve(fixed_s=1e-3 * work / speed[kind], token_s=1e-4 * work / speed[kind]),
            decode=Curve(fixed_s=1e-2 * work * share / speed[kind], token_s=1e-3 * work / speed[kind]),
        )
        for kind in counts
        for executor, share in (("native:int8", 1.0), ("native:int4", 0.6))
        for part, work, size in parts
    )  # fmt: skip
    facts = tuple(
        ExecutorFacts(executor=name, kv_bytes_per_token=1024, loss=loss)
        for name, loss in (("native:int8", 0.001), ("native:int4", 0.03))
    )
    profile = LlmProfile(
        model_hash="home", width=512, max_positions=8192, kinds=(LayerPart(part="0"),), layers=("0",) * layers, times=times,
        executors=facts, codec_losses={},
    )  # fmt: skip
    devices = tuple(
        Device(name=DeviceId(f"{kind}{i}"), kind=kind, memory_bytes=memory[kind] * MEGABYTE)
        for kind, count in counts.items()
        for i in range(count)
    )
    links = tuple(
        KindLink(source_kind=a, target_kind=b, latency_s=latency_s, bandwidth_bytes_per_s=1e7)
        for a in counts
        for b in counts
    )
    cluster = Cluster(name="home", devices=devices, links=(), kind_links=links, source=devices[0].name, sink=devices[0].name)
    return World(profile, cluster, Asked(shape=Shape(prompt=64, answer=32), objective="tpot"))


def without_classes(world: World) -> World:
    """The same devices, each measured under its own name: nobody is alike."""
    devices = world.cluster.spelled_out().devices
    times = tuple(replace(t, device=d.name) for d in devices for t in world.profile.times if t.device == d.kind)
    return replace(world, profile=replace(world.profile, times=times))


@pytest.mark.parametrize("objective", ["tpot", "throughput"])
def test_classes_change_nothing_but_the_effort(objective: str) -> None:
    counts, memory, speed = {"a": 3, "b": 3}, {"a": 35, "b": 60}, {"a": 1.0, "b": 0.4}
    world = home(9, counts, memory, speed, 1e-3)
    asked = replace(world.asked, objective=objective, shape=Shape(prompt=64, answer=32, concurrency=3))
    one = choose_plan(world.profile, world.cluster, asked)
    other = without_classes(world)
    two = choose_plan(other.profile, other.cluster, asked)
    assert one.value == pytest.approx(two.value, rel=1e-9)
    assert one.is_proven
    assert two.is_proven


def test_fifteen_machines_of_three_kinds_are_proven() -> None:
    counts, memory, speed = {"a": 12, "b": 2, "c": 1}, {"a": 70, "b": 35, "c": 55}, {"a": 1.0, "b": 0.5, "c": 5.0}
    world = home(60, counts, memory, speed, 2e-3)
    found = choose_plan(world.profile, world.cluster, world.asked)
    assert found.is_proven
    assert "c0" in found.plan.devices  # the fast one
    assert not set(found.plan.devices) & {"b0", "b1"}  # the slow ones are not needed


def test_one_device_is_an_answer() -> None:
    world = home(6, {"a": 2, "b": 1}, {"a": 500, "b": 500}, {"a": 1.0, "b": 1.2}, 5e-3)
    found = choose_plan(world.profile, world.cluster, replace(world.asked, executors=("native:int8",)))
    assert found.plan.devices == ("b0",)  # faster than the driver by more than the way there and back
    assert len(found.plan.stages) == 1


def test_the_driver_may_hold_the_ends_apart() -> None:
    """A fast device without room for a table: embedding and head stay with the driver, one before and one after it."""
    world = home(4, {"a": 1, "c": 1}, {"a": 22, "c": 42}, {"a": 0.05, "c": 10.0}, 1e-4)
    slim = tuple(replace(t, decode=Curve()) if t.part in ("head", "embedding") else t for t in world.profile.times)
    profile = replace(world.profile, times=slim)
    found = choose_plan(profile, world.cluster, replace(world.asked, executors=("native:int8",)))
    assert [stage.device for stage in found.plan.stages] == ["a0", "c0", "a0"]
    assert [stage.span.num_layers for stage in found.plan.stages] == [0, 4, 0]


def test_a_model_that_fits_nowhere_says_by_how_much_and_what_helps() -> None:
    world = home(20, {"a": 2}, {"a": 90}, {"a": 1.0}, 1e-3)
    with pytest.raises(PlannerError) as caught:
        choose_plan(world.profile, world.cluster, world.asked)
    told = str(caught.value)
    assert "fits nowhere: needs 21" in told  # 20 layers of 10 MB, tables of 10 MB, keys
    assert "has 180 MB" in told
    assert "native:int4 (a loss of" in told
    assert "more memory on a0" in told
    assert choose_plan(world.profile, world.cluster, replace(world.asked, max_loss=0.05)).cost.is_feasible


def test_a_shorter_context_is_named_where_it_would_do() -> None:
    world = home(8, {"a": 1}, {"a": 100}, {"a": 1.0}, 1e-3)
    asked = replace(world.asked, shape=Shape(prompt=64, answer=32, context=8000))
    with pytest.raises(PlannerError, match=r"a context of [0-9]+ tokens instead of 8000") as caught:
        choose_plan(world.profile, world.cluster, asked)
    shorter = int(str(caught.value).split("a context of ")[1].split()[0])
    assert choose_plan(world.profile, world.cluster, replace(asked, shape=replace(asked.shape, context=shorter)))


def test_a_limit_that_cannot_be_kept_is_named_with_its_best_value() -> None:
    world = home(6, {"a": 2}, {"a": 500}, {"a": 1.0}, 1e-3)
    best_tpot = choose_plan(world.profile, world.cluster, world.asked).value
    asked = replace(world.asked, objective="request", tpot_s=best_tpot * 0.9)
    with pytest.raises(PlannerError, match="time per token fails: the best is"):
        choose_plan(world.profile, world.cluster, asked)
    with pytest.raises(PlannerError, match="the model takes at most 8192"):
        choose_plan(world.profile, world.cluster, replace(world.asked, shape=Shape(prompt=9000)))


def test_after_a_loss_only_the_lost_span_moves() -> None:
    world = home(12, {"a": 4, "b": 2}, {"a": 45, "b": 80}, {"a": 1.0, "b": 0.5}, 1e-3)
    before = choose_plan(world.profile, world.cluster, world.asked).plan
    lost = next(stage for stage in before.stages if stage.device != before.driver)
    after = replan_without([lost.device], before, world.profile, world.cluster, world.asked)
    kept = {(stage.device, stage.span, stage.executor) for stage in before.stages if stage.device != lost.device}
    new = {(stage.device, stage.span, stage.executor) for stage in after.plan.stages} - kept
    assert len(new) == len(after.plan.stages) - len(kept)  # all of the kept ones are there
    assert sum(span.num_layers for _, span, _ in new) == lost.span.num_layers
    assert sorted(after.moved) == sorted(f"{span.describe()} to {device}" for device, span, _ in new)
    assert lost.device not in after.plan.devices
    assert after.plan.epoch == before.epoch + 1
    assert not after.cost.violations
    with pytest.raises(PlannerError, match=f"driver {before.driver} is lost"):
        replan_without([before.driver], before, world.profile, world.cluster, world.asked)


def test_what_is_left_may_be_too_little() -> None:
    world = home(9, {"a": 3}, {"a": 42}, {"a": 1.0}, 1e-3)
    before = choose_plan(world.profile, world.cluster, replace(world.asked, executors=("native:int8",))).plan
    lost = [device for device in before.devices if device != before.driver]
    with pytest.raises(PlannerError, match=r"fits nowhere: needs .* has 42 MB"):
        replan_without(lost, before, world.profile, world.cluster, world.asked)


def test_sticky_replanning_is_the_best_of_its_kind() -> None:
    """Enumerated: the lost middle span goes to each living device in turn, whole or in two; the rest stays."""
    world = home(8, {"a": 3, "b": 2}, {"a": 40, "b": 300}, {"a": 2.0, "b": 0.3}, 2e-3)
    asked = replace(world.asked, executors=("native:int8",))
    before = choose_plan(world.profile, world.cluster, asked).plan
    lost = next(stage for stage in before.stages if stage.device != before.driver)
    after = replan_without([lost.device], before, world.profile, world.cluster, asked, gap=0.0)
    model = LlmCostModel(world.profile, world.cluster, asked.shape)
    tried = []
    for device in world.cluster.devices:
        if device.name == lost.device:
            continue
        stages = tuple(replace(s, device=device.name) if s is lost else s for s in before.stages)
        local = [
            replace(s, codec="none" if i + 1 == len(stages) or stages[i + 1].device == s.device else "fp32")
            for i, s in enumerate(stages)
        ]
        cost = model.predict(replace(before, stages=tuple(local)))
        if cost.is_feasible:
            tried.append(cost.tpot_s)
    assert tried
    assert after.value <= min(tried) * (1 + 1e-9)


def test_devices_without_measurement_or_link_are_left_out_by_name() -> None:
    world = home(4, {"a": 2}, {"a": 26}, {"a": 1.0}, 1e-3)
    stranger = Device(name=DeviceId("x"), kind="x", memory_bytes=10**9)
    far = Device(name=DeviceId("far"), kind="a", memory_bytes=10**9)
    one_way = Link(source=DeviceId("far"), target=DeviceId("a0"), latency_s=0, bandwidth_bytes_per_s=1e9)
    names = [d.name for d in world.cluster.devices]
    cluster = replace(
        world.cluster.spelled_out(), devices=(*world.cluster.devices, stranger, far),
        links=(*world.cluster.links_among(names), one_way),
    )  # fmt: skip
    asked = replace(world.asked, executors=("native:int8",))
    found = choose_plan(world.profile, cluster, asked)
    assert set(found.plan.devices) <= {"a0", "a1"}
    with pytest.raises(PlannerError, match=r"x was not measured.*far has no link to and from the driver a0"):
        choose_plan(world.profile, replace(cluster, devices=tuple(d for d in cluster.devices if d.name != "a1"),
            links=tuple(k for k in cluster.links if "a1" not in (k.source, k.target))), asked)  # fmt: skip


def test_decoding_means_the_same_number_of_tokens_everywhere() -> None:
    assert FEW_TOKENS == STEP_FEW_TOKENS
