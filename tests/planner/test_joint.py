"""Cut, placement, executors, codecs and exits together, against enumeration of every plan under objectives and budgets."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from enumeration import chain_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from joint_enumeration import LIMITED, OBJECTIVES, Joint, flat, joint_world, least_value, random_limits

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.cost import predict
from ecotone.plan import plan_violations
from ecotone.planner import PlannerError, Requirement, Solution, Throughput, baselines, parse_objective, solve
from ecotone.planner.objective import least, quantity
from ecotone.profile import CodecCost, Payload, Profile, SegmentTime

pytestmark = pytest.mark.pure

NUM_WORLDS = 12


def answer(world: Joint, objective: str, require: list[Requirement]) -> Solution | None:
    try:
        return solve(world.graph, world.cluster, world.profile, least(objective), require, num_runners_up=0, nearest=False)
    except PlannerError:
        return None


def check(world: Joint, found: Solution | None, expected: float, limits: dict[str, float]) -> None:
    """The least value, by a plan that can run and keeps what was asked, with a bound that is not above it."""
    if math.isinf(expected):
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert found.bound <= found.value + 1e-12
    assert found.is_proven
    assert plan_violations(found.plan, world.graph, world.cluster) == ()
    assert predict(found.plan, world.graph, world.cluster, world.profile) == found.cost
    room = {d.name: d.memory_bytes for d in world.cluster.devices}
    assert all(d.memory_bytes <= room[d.device] for d in found.cost.devices)
    for name, limit in limits.items():
        assert quantity(name, found.cost) <= limit * (1 + 1e-8) + 1e-12, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_enumeration_under_random_budgets(objective: str) -> None:
    refused = 0
    for seed in range(NUM_WORLDS):
        world = joint_world(seed)
        require, limits = random_limits(world, objective, seed)
        expected = least_value(world, objective, limits)
        refused += math.isinf(expected)
        check(world, answer(world, objective, require), expected, limits)
    assert 0 < refused < NUM_WORLDS * 0.7  # both answers occur


def test_exits_executors_and_codecs_are_really_chosen() -> None:
    """What the worlds above are for: every sort of choice is made somewhere, and given up somewhere for a budget."""
    seen: set[str] = set()
    for seed in (*range(12), 28, 35):
        world = joint_world(seed)
        more = [] if seed % 2 else [Requirement(name="error", limit=0.02)]
        found = answer(world, "latency", [*random_limits(world, "latency", seed)[0], *more])
        if found is None:
            continue
        seen |= {s.executor for s in found.plan.stages} | {t.codec for t in found.plan.edges}
        seen |= {"exit"} if found.exit_policy else {"no exit"}
        seen |= {"split device"} if any(a.device == b.device for a, b in _neighbours(found)) else set()
        seen |= {"come back to"} if len(set(found.plan.devices)) < len(_runs(found)) else set()
    assert seen >= {"ort:int8", "torch:fp32", "vino:bf16", "fp32", "int8", "int4", "exit", "no exit", "split device"}
    assert "come back to" in seen


def _neighbours(found: Solution) -> list:
    return list(zip(found.plan.stages, found.plan.stages[1:], strict=False))


def _runs(found: Solution) -> list[str]:
    devices = [s.device for s in found.plan.stages]
    return [d for i, d in enumerate(devices) if i == 0 or devices[i - 1] != d]


@pytest.mark.parametrize("seed", range(5))
def test_a_looser_budget_and_another_option_never_make_it_worse(seed: int) -> None:
    """Relaxing each requirement by a tenth, and giving one executor, codec or policy back, one at a time."""
    world = joint_world(seed)
    for objective in ("latency", "energy", "server"):
        require, _ = random_limits(world, objective, seed)
        tight = answer(world, objective, require)
        for i, one in enumerate(require):
            factor = 0.9 if one.name == "throughput" else 1.1
            looser = [*require[:i], replace(one, limit=one.limit * factor), *require[i + 1 :]]
            loose = answer(world, objective, looser)
            if tight is not None:
                assert loose is not None
                assert loose.value <= tight.value * (1 + 1e-9) + 1e-12
        for kind in ("exit=none", "codec=fp32", "executor=torch:fp32"):
            fewer = answer(world, objective, [*require, Requirement.parse(kind)])
            if fewer is not None:
                assert tight is not None
                assert tight.value <= fewer.value * (1 + 1e-9) + 1e-12


@settings(max_examples=8)
@given(seed=st.integers(500, 5000), objective=st.sampled_from(("latency", "energy", "bytes")))
def test_order_of_devices_links_and_tables_does_not_matter(seed: int, objective: str) -> None:
    world = joint_world(seed)
    require, limits = random_limits(world, objective, seed)
    first = answer(world, objective, require)
    rng = np.random.default_rng(seed)

    def turned(items: tuple) -> tuple:
        return tuple(items[i] for i in rng.permutation(len(items)))

    cluster = replace(world.cluster, devices=turned(world.cluster.devices), links=turned(world.cluster.links))
    profile = replace(world.profile, segments=turned(world.profile.segments), payloads=turned(world.profile.payloads))
    second = answer(replace(world, cluster=cluster, profile=profile), objective, require[::-1])
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert second.value == pytest.approx(first.value, rel=1e-6, abs=1e-12)
    check(world, first, least_value(world, objective, limits), limits)


@pytest.mark.parametrize(("first", "second"), [("server", "latency"), ("accuracy_loss", "energy"), ("bytes", "money")])
def test_two_objectives_in_order(first: str, second: str) -> None:
    """The least of the first, and among plans that reach it (here within 5 %) the least of the second: by enumeration."""
    for seed in range(8):
        world = joint_world(seed)
        limits = {} if "accuracy_loss" in (first, second) else {"accuracy_loss": 1.0}
        one = least_value(world, first, limits)
        if math.isinf(one):
            continue
        for share in (0.0, 0.05):
            allowed = one + abs(one) * share + 1e-12
            other = least_value(world, second, {**limits, first: allowed})
            wanted = parse_objective(f"{first}~{share * 100:g}%,{second}" if share else f"{first},{second}")
            found = solve(world.graph, world.cluster, world.profile, wanted, num_runners_up=0)
            assert quantity(first, found.cost) <= allowed + abs(allowed) * 1e-8 + 1e-12
            assert quantity(second, found.cost) == pytest.approx(other, rel=1e-6, abs=1e-12), (seed, share)
            assert [level.objective for level in found.levels] == [first, second]
            assert found.levels[0].value == pytest.approx(one, rel=1e-6, abs=1e-12)


def test_among_equal_plans_the_quickest() -> None:
    """Without a word about time: all plans on one device send no bytes, and the quickest of them is the answer."""
    for seed in range(10):
        world = joint_world(seed)
        rows = flat(world)
        good = rows["accuracy_loss"] <= 1.0 + 1e-9
        if not good.any():
            continue
        least_bytes = rows["bytes"][good].min()
        quickest = rows["latency"][good & (rows["bytes"] <= least_bytes * (1 + 1e-9))].min()
        found = solve(world.graph, world.cluster, world.profile, parse_objective("bytes"), num_runners_up=0)
        assert found.value == pytest.approx(least_bytes, abs=1e-9)
        assert found.cost.latency_s == pytest.approx(quickest, rel=1e-6)


def test_right_sizing_gives_up_accuracy_only_as_the_deadline_asks() -> None:
    """Edgent: the least loss within a deadline; a loose one loses nothing, a tighter one more, none below the quickest."""
    moved = 0
    for seed in range(8):
        world = joint_world(seed)
        rows = flat(world)
        if not len(rows["latency"]):
            continue
        losses = []
        for share in (0.0, 0.2, 0.5, 1.0):
            deadline = float(np.quantile(rows["latency"], share))
            expected = least_value(world, "accuracy_loss", {"latency": deadline})
            found = answer(world, "accuracy_loss", [Requirement(name="latency", limit=deadline)])
            check(world, found, expected, {"latency": deadline})
            assert found is not None
            losses.append(found.value)
        assert losses == sorted(losses, reverse=True)
        moved += losses[0] > losses[-1] + 1e-9
        assert answer(world, "accuracy_loss", [Requirement(name="latency", limit=rows["latency"].min() * 0.99)]) is None
    assert moved > 1


def test_runners_up_keep_the_requirements_and_ascend() -> None:
    seen = 0
    for seed in range(10):
        world = joint_world(seed)
        require, limits = random_limits(world, "latency", seed)
        try:
            found = solve(world.graph, world.cluster, world.profile, least("latency"), require, nearest=False)
        except PlannerError:
            continue
        values = [found.value, *(r.cost.latency_s for r in found.runners_up)]
        assert values == sorted(values)
        for other in found.runners_up:
            assert other.plan != found.plan
            assert all(quantity(n, other.cost) <= v * (1 + 1e-8) + 1e-12 for n, v in limits.items())
            seen += 1
    assert seen > 4


def test_one_after_another_is_never_better() -> None:
    worse = 0
    for seed in range(10):
        world, problem = joint_world(seed), ("accuracy_loss=1", "error=0.1")
        try:
            plan = baselines.place("sequential", world.graph, world.cluster, world.profile, problem)
        except PlannerError:
            continue
        ours = answer(world, "latency", [Requirement.parse(r) for r in problem])
        assert ours is not None
        cost = predict(plan, world.graph, world.cluster, world.profile)
        assert plan_violations(plan, world.graph, world.cluster) == ()
        assert cost.accuracy_loss_points <= 1 + 1e-9
        assert cost.relative_error <= 0.1 + 1e-9
        assert cost.latency_s >= ours.value * (1 - 1e-9)
        worse += cost.latency_s > ours.value * 1.001
    assert worse > 3


def test_limits_are_those_of_the_enumeration() -> None:
    """Of the quantities that may be limited each is limited somewhere above."""
    names = {r.name for seed in range(NUM_WORLDS) for r in random_limits(joint_world(seed), "latency", seed)[0]}
    assert names == set(LIMITED)


def test_a_smaller_codec_that_loses_too_much_does_not_hide_a_larger_one() -> None:
    """One block, 14 ms here or 1.4 ms there; the inputs take 4 ms plain, 1 ms as int8 (0.3 points a crossing)."""
    graph = chain_graph([1000, 1], [10])
    here, there = (Device(name=DeviceId(n), memory_bytes=10**6) for n in ("here", "there"))
    links = tuple(
        Link(source=a.name, target=b.name, latency_s=0.0, bandwidth_bytes_per_s=1e6)
        for a, b in ((here, there), (there, here))
    )
    cluster = Cluster(name="two", devices=(here, there), links=links, source=here.name, sink=here.name)
    shares = {"fp32": (1.0, 0.0), "int8": (0.25, 0.003), "int4": (0.125, 0.02)}
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name="two", num_blocks=1, cuts=(0, 1),
        segments=tuple(
            SegmentTime(
                device=d.name, executor="torch:fp32", start=0, stop=1, median_s=s, spread_s=0.0, memory_bytes=0
            )
            for d, s in ((here, 14e-3), (there, 1.4e-3))
        ),
        codecs=tuple(
            CodecCost(
                device=d.name, codec=c, encode_fixed_s=0.0, decode_fixed_s=0.0, encode_s_per_raw_byte=0.0,
                decode_s_per_raw_byte=0.0,
            )
            for d in (here, there) for c in shares
        ),
        payloads=tuple(
            Payload(position=p, codec=c, size_bytes=size * share, disagreement=lost, num_samples=9)
            for p, size in enumerate((4000, 4)) for c, (share, lost) in shares.items()
        ),
    )  # fmt: skip
    for limit, bottleneck_s in ((0.0, 4e-3), (0.6, 1.4e-3), (9.0, 1.4e-3)):
        found = solve(graph, cluster, profile, Throughput(), [f"accuracy_loss={limit}"])
        assert found.value == pytest.approx(bottleneck_s)
        assert found.is_proven


def test_stages_of_one_device_parted_by_an_exit_share_its_memory_in_a_stream_too() -> None:
    world = joint_world(39)
    require, limits = random_limits(world, "throughput", 39)
    check(world, answer(world, "throughput", require), least_value(world, "throughput", limits), limits)
