"""Costs of plans with exits against an enumeration of where a request can leave, each way added up by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.accuracy import AccuracyTable, Cell, ExitPolicy
from ecotone.cluster import Cluster, Device, DeviceId, Link, Power
from ecotone.cost import CostError, CostModel, predict
from ecotone.graph import Block, Exit, Graph, Parameter, Tensor, TensorIndex
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner.exiting import leaving_early
from ecotone.planner.objective import PlannerError
from ecotone.profile import CodecCost, ExitTime, Profile, SegmentTime

pytestmark = pytest.mark.pure

NAMES = "abc"
RATE, LATENCY_S, CODING_S = 1e6, 0.003, 0.0007


@dataclass(frozen=True)
class World:
    graph: Graph
    cluster: Cluster
    profile: Profile
    plan: Plan
    block_s: dict[str, float]
    head_s: dict[str, float]
    size_bytes: list[int]
    policy: ExitPolicy


def graph_of(sizes: list[int], exits: list[int]) -> Graph:
    tensors = tuple(Tensor(name=f"t{i}", shape=(n,), dtype="float32", producer=i - 1) for i, n in enumerate(sizes))
    blocks = tuple(
        Block(name=f"b{i}", inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),), flop=1.0, parameters=(i,))
        for i in range(len(sizes) - 1)
    )
    weights = [Parameter(name=f"w{i}", size_bytes=100 + i) for i in range(len(blocks))]
    places = []
    for position in exits:
        weights.append(Parameter(name=f"h{position}", size_bytes=7))
        own = (len(weights) - 1,)
        places.append(Exit(name=f"e{position}", position=position, flop=0.5, parameters=own, working_bytes=11))
    return Graph(
        name="chain", blocks=blocks, tensors=tensors, inputs=(TensorIndex(0),), outputs=(TensorIndex(len(blocks)),),
        parameters=tuple(weights), exits=tuple(places),
    )  # fmt: skip


@st.composite
def worlds(draw: st.DrawFn) -> World:
    length = draw(st.integers(2, 6))
    exits = sorted(draw(st.sets(st.integers(1, length - 1), min_size=1, max_size=3)))
    sizes = [draw(st.integers(1, 4000)) for _ in range(length + 1)]
    graph = graph_of(sizes, exits)
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=2)) | {length})
    devices = [DeviceId(draw(st.sampled_from(NAMES))) for _ in cuts]
    ends = [DeviceId("a"), *devices, DeviceId("a")]
    transfers = tuple(
        Transfer(source=x, target=y, position=p, codec=LOCAL if x == y else "fp32")
        for x, y, p in zip(ends, ends[1:], [0, *cuts], strict=False)
    )
    stages = tuple(Stage(device=d, start=a, stop=b) for d, a, b in zip(devices, [0, *cuts], cuts, strict=False))
    plain = Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)
    left, shares = 1.0, []
    for _ in exits:
        shares.append(round(left * draw(st.floats(0, 1)), 6))
        left -= shares[-1]
    policy = ExitPolicy(
        name="drawn", exits=tuple(f"e{p}" for p in exits), thresholds=tuple(draw(st.floats(0, 1)) for _ in exits),
        shares=tuple(shares), loss_points=0.4,
    )  # fmt: skip
    block_s = {n: draw(st.floats(1e-4, 0.1)) for n in NAMES}
    head_s = {n: draw(st.floats(0, 0.05)) for n in NAMES}
    cluster, profile = measured(graph, policy, block_s, head_s)
    return World(graph, cluster, profile, leaving_early(plain, graph, policy), block_s, head_s, sizes, policy)


def measured(
    graph: Graph, policy: ExitPolicy, block_s: dict[str, float], head_s: dict[str, float]
) -> tuple[Cluster, Profile]:
    power = Power(idle_watt=0.5, busy_watt=4.0, send_joule_per_byte=1e-6)
    devices = tuple(
        Device(name=DeviceId(n), memory_bytes=10**9, power=power, price_money_per_s=float(i))
        for i, n in enumerate(NAMES)
    )  # fmt: skip
    links = tuple(
        Link(
            source=DeviceId(x), target=DeviceId(y), latency_s=LATENCY_S, bandwidth_bytes_per_s=RATE,
            price_money_per_byte=1e-5,
        )
        for x in NAMES for y in NAMES if x != y
    )  # fmt: skip
    length = graph.num_blocks
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name="c", num_blocks=length, cuts=tuple(range(length + 1)),
        segments=tuple(
            SegmentTime(
                device=DeviceId(n), executor="torch:fp32", start=a, stop=b, median_s=(b - a) * block_s[n], spread_s=0,
                memory_bytes=0,
            )
            for n in NAMES for a in range(length) for b in range(a + 1, length + 1)
        ),
        codecs=tuple(
            CodecCost(
                device=DeviceId(n), codec="fp32", encode_fixed_s=CODING_S, encode_s_per_raw_byte=0,
                decode_fixed_s=CODING_S, decode_s_per_raw_byte=0,
            )
            for n in NAMES
        ),
        exits=tuple(
            ExitTime(device=DeviceId(n), executor="torch:fp32", exit=e.name, median_s=head_s[n])
            for n in NAMES for e in graph.exits
        ),
        accuracy=AccuracyTable(
            graph_hash=graph.content_hash(), data_hash="", is_labelled=True, reference_points=80.0, cells=(),
            policies=(policy,),
        ),
    )  # fmt: skip
    return Cluster(name="c", devices=devices, links=links, source=DeviceId("a"), sink=DeviceId("a")), profile


@dataclass
class Way:
    """One way through the plan, added up."""

    share: float
    total_s: float
    busy_s: dict[str, float]
    sent: dict[tuple[str, str], float]


def ways(world: World) -> list[Way]:
    """Every outcome with its probability: leaves at exit 0, 1, ..., or goes to the end."""
    found, length = [], world.graph.num_blocks
    leaving = [s.exit for s in world.plan.stages if s.exit]
    assert leaving == list(world.policy.exits)
    for outcome in (*leaving, ""):
        share = world.policy.shares[leaving.index(outcome)] if outcome else 1 - sum(world.policy.shares)
        way = Way(share, 0.0, dict.fromkeys(NAMES, 0.0), {})
        here, position = "a", 0
        for stage in world.plan.stages:
            cross(way, here, stage.device, world.size_bytes[position])
            here, position = stage.device, stage.stop
            took = (stage.stop - stage.start) * world.block_s[here] + (world.head_s[here] if stage.exit else 0.0)
            way.busy_s[here] += took
            way.total_s += took
            if stage.exit == outcome != "":
                break
        cross(way, here, "a", world.size_bytes[length])
        found.append(way)
    return found


def cross(way: Way, source: str, target: str, elements: int) -> None:
    if source == target:
        return
    size = 4 * elements
    way.sent[source, target] = way.sent.get((source, target), 0.0) + size
    way.busy_s[source] += CODING_S
    way.busy_s[target] += CODING_S
    way.total_s += 2 * CODING_S + LATENCY_S + size / RATE


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_every_mean_is_that_of_the_ways_through_the_plan(world: World) -> None:
    cost, every = predict(world.plan, world.graph, world.cluster, world.profile), ways(world)
    latency = sum(w.share * w.total_s for w in every)
    busy = {n: sum(w.share * w.busy_s[n] for w in every) for n in NAMES}
    sent: dict[tuple[str, str], float] = {}
    for way in every:
        for pair, size in way.sent.items():
            sent[pair] = sent.get(pair, 0.0) + way.share * size
    assert cost.latency_s == pytest.approx(latency)
    part = {d.device for d in cost.devices}
    assert {d.device: d.busy_s for d in cost.devices} == pytest.approx({n: busy[n] for n in part})
    assert {(k.source, k.target): k.size_bytes for k in cost.links} == pytest.approx(sent)
    assert cost.bottleneck_s == pytest.approx(max([*busy.values(), *(size / RATE for size in sent.values())]))
    energy = {
        n: 4.0 * busy[n] + 0.5 * max(0.0, latency - busy[n]) + 1e-6 * sum(v for (s, _), v in sent.items() if s == n)
        for n in part
    }
    assert {d.device: d.energy_joule for d in cost.devices} == pytest.approx(energy)
    assert cost.server_s == pytest.approx(busy["b"] + busy["c"])
    assert cost.money == pytest.approx(busy["b"] + 2 * busy["c"] + 1e-5 * sum(sent.values()))
    assert cost.longest_s == pytest.approx(max(w.total_s for w in every))
    assert cost.accuracy_loss_points == pytest.approx(0.4)
    reach, shares = 1.0, iter(world.policy.shares)
    for stage, placed in zip(cost.stages, world.plan.stages, strict=True):
        assert stage.share == pytest.approx(reach, abs=1e-9)
        reach -= stage.leaves
        assert stage.leaves == pytest.approx(min(next(shares), stage.share) if placed.exit else 0.0, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_weights_of_heads_lie_where_their_stages_run(world: World) -> None:
    cost = predict(world.plan, world.graph, world.cluster, world.profile)
    for device in cost.devices:
        own = [s for s in world.plan.stages if s.device == device.device]
        blocks = {i for s in own for i in range(s.start, s.stop)}
        weights = sum(100 + i for i in blocks) + 7 * sum(bool(s.exit) for s in own)
        live = [4 * (world.size_bytes[i] + world.size_bytes[i + 1]) for i in blocks]
        assert device.memory_bytes == weights + max([*live, *(11 for s in own if s.exit)], default=0)


def test_a_loss_measured_under_the_policy_replaces_that_of_the_crossing_alone() -> None:
    graph = graph_of([10, 10, 10], [1])
    policy = ExitPolicy(name="p", exits=("e1",), thresholds=(0.7,), shares=(0.5,), loss_points=0.5)
    cluster, profile = measured(graph, policy, dict.fromkeys(NAMES, 0.01), dict.fromkeys(NAMES, 0.001))
    cells = [
        Cell(
            position=1, codec="fp32", policy=name, num_decisions=100, points=80 - loss, loss_points=loss, low_points=0,
            high_points=3, fitted_points=loss,
        )
        for name, loss in (("", 1.5), ("p", 0.9))
    ]  # fmt: skip
    assert profile.accuracy is not None
    profile = replace(profile, accuracy=replace(profile.accuracy, cells=tuple(cells)))
    plan = leaving_early(
        Plan(
            graph_hash=graph.content_hash(),
            stages=(Stage(device=DeviceId("a"), start=0, stop=1), Stage(device=DeviceId("b"), start=1, stop=2)),
            transfers=(
                Transfer(source=DeviceId("a"), target=DeviceId("a"), position=0, codec=LOCAL),
                Transfer(source=DeviceId("a"), target=DeviceId("b"), position=1),
                Transfer(source=DeviceId("b"), target=DeviceId("a"), position=2),
            ),
        ),
        graph, policy,
    )  # fmt: skip
    # Under the policy the whole loses 0.9 points; half of the requests never cross, so that is less than 0.5 + 1.5.
    assert predict(plan, graph, cluster, profile).loss_points == pytest.approx(0.9)


def test_thresholds_that_were_not_calibrated_and_heads_not_measured_are_named() -> None:
    graph = graph_of([10, 10, 10], [1])
    policy = ExitPolicy(name="p", exits=("e1",), thresholds=(0.7,), shares=(0.5,), loss_points=0.5)
    cluster, profile = measured(graph, policy, dict.fromkeys(NAMES, 0.01), dict.fromkeys(NAMES, 0.001))
    here = DeviceId("a")
    plain = Plan(
        graph_hash=graph.content_hash(), stages=(Stage(device=here, start=0, stop=2),),
        transfers=(
            Transfer(source=here, target=here, position=0, codec=LOCAL),
            Transfer(source=here, target=here, position=2, codec=LOCAL),
        ),
    )  # fmt: skip
    other = leaving_early(plain, graph, replace(policy, thresholds=(0.8,)))
    with pytest.raises(CostError, match=r"exits e1 at 0\.8 were not calibrated"):
        predict(other, graph, cluster, profile)
    chosen = leaving_early(plain, graph, policy)
    with pytest.raises(CostError, match=r"exit e1 by torch:fp32 on a was not measured"):
        CostModel(graph, cluster, replace(profile, exits=())).predict(chosen)
    with pytest.raises(PlannerError, match=r"exit 'e9' is not one of the model's: e1 at 1"):
        leaving_early(plain, graph, replace(policy, exits=("e9",)))


def test_a_plan_that_leaves_early_keeps_the_work_and_splits_stages_where_exits_stand() -> None:
    graph = graph_of([10] * 7, [2, 4])
    policy = ExitPolicy(name="p", exits=("e2", "e4"), thresholds=(0.7, 0.6), shares=(0.5, 0.2), loss_points=0.5)
    a, b = DeviceId("a"), DeviceId("b")
    plain = Plan(
        graph_hash=graph.content_hash(), stages=(Stage(device=a, start=0, stop=3), Stage(device=b, start=3, stop=6)),
        transfers=(
            Transfer(source=a, target=a, position=0, codec=LOCAL), Transfer(source=a, target=b, position=3, codec="int8"),
            Transfer(source=b, target=a, position=6, codec="fp16"),
        ),
    )  # fmt: skip
    found = leaving_early(plain, graph, policy)
    assert [(s.device, s.start, s.stop, s.exit, s.threshold) for s in found.stages] == [
        ("a", 0, 2, "e2", 0.7), ("a", 2, 3, "", 0.0), ("b", 3, 4, "e4", 0.6), ("b", 4, 6, "", 0.0),
    ]  # fmt: skip
    assert [t.codec for t in found.transfers] == [LOCAL, LOCAL, "int8", LOCAL, "fp16"]
    assert [(t.source, t.target, t.codec) for t in found.exit_transfers] == [("a", "a", LOCAL), ("b", "a", "fp16")]
    assert [found.exit_edge(i) for i in range(4)] == [5, None, 6, None]
    assert [found.exit_at(edge) for edge in range(7)] == [""] * 5 + ["e2", "e4"]
