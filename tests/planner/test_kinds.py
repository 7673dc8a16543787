"""Devices by class: links by kind, planning over classes against planning over every device, handing devices out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from enumeration import chain_graph

from ecotone.accuracy import AccuracyTable, Cell
from ecotone.cluster import Cluster, Device, DeviceId, KindLink, Link, Power
from ecotone.cost import CostModel, predict
from ecotone.graph import Graph
from ecotone.plan import plan_violations
from ecotone.planner import Latency, PlannerError, Throughput, kinds, solve, what_if
from ecotone.planner.kinds import hand_out, places
from ecotone.planner.measured import with_measured_links
from ecotone.planner.objective import parse_objective
from ecotone.profile import CodecCost, LinkFit, Payload, Profile, SegmentTime
from ecotone.schema import SchemaError

pytestmark = pytest.mark.pure

WATCH = {"torch:fp32": (1.0, 0.0), "vino:int8": (0.5, 0.03)}


def world(
    seed: int, counts: tuple[int, ...], blocks: int, *, share: float = 10.0, spread: float = 10.0
) -> tuple[Graph, Cluster, Profile]:
    """One camera and devices of several kinds, links by kind; a device holds `share` of the weights."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(10_000, 100_000, blocks).tolist()
    graph = chain_graph(rng.integers(200, 4000, blocks + 1).tolist(), weights)
    kind_of = [0, *(k for k, n in enumerate(counts, 1) for _ in range(n))]
    room = [int(share * sum(weights) * rng.uniform(0.8, 1.2)) + 40_000 for _ in range(len(counts) + 1)]
    devices = tuple(
        Device(
            name=DeviceId(f"d{i}"), kind=f"k{k}", memory_bytes=room[k], tier="end" if k == 0 else "edge",
            power=Power(busy_watt=2.0 + k), price_money_per_s=float(k),
        )
        for i, k in enumerate(kind_of)
    )  # fmt: skip
    names = sorted({d.kind for d in devices})
    links = tuple(
        KindLink(
            source_kind=a, target_kind=b, latency_s=float(rng.uniform(1e-4, 1e-3)),
            bandwidth_bytes_per_s=float(1e7 * spread ** rng.uniform(-0.5, 0.5)), price_money_per_byte=1e-7,
        )
        for a, b in itertools.product(names, repeat=2)
    )  # fmt: skip
    cluster = Cluster(
        name="w", devices=devices, links=(), kind_links=links, source=DeviceId("d0"), sink=DeviceId("d0")
    )  # fmt: skip
    work = rng.uniform(1e-3, 5e-3, blocks)
    segments, codecs = [], []
    for kind in names:
        name, speed = next(d.name for d in devices if d.kind == kind), rng.uniform(0.5, 4.0)
        for executor, (gain, error) in WATCH.items():
            segments += [
                SegmentTime(
                    device=name,
                    executor=executor,
                    start=a,
                    stop=b,
                    spread_s=0.0,
                    memory_bytes=0,
                    relative_error=error,
                    median_s=float(work[a:b].sum() / speed * gain) + 1e-4,
                )
                for a, b in itertools.combinations(range(blocks + 1), 2)
                if a == 0 or b == blocks
            ]
        codecs += [
            CodecCost(
                device=name, codec=c, encode_fixed_s=1e-5, decode_fixed_s=1e-5,
                encode_s_per_raw_byte=float(rng.uniform(2e-10, 2e-9)), decode_s_per_raw_byte=1e-9,
            )
            for c in ("fp32", "int8")
        ]  # fmt: skip
    payloads = tuple(
        Payload(position=p, codec=c, size_bytes=graph.frontier_bytes(p) * s)
        for p in range(blocks + 1)
        for c, s in (("fp32", 1.0), ("int8", 0.25))
    )
    losses = rng.uniform(0.0, 0.6, blocks + 1)
    cells = tuple(
        Cell(
            position=p, codec="int8", num_decisions=100, points=90.0, loss_points=float(v), low_points=0.0, high_points=1.0,
            fitted_points=float(v),
        )
        for p, v in enumerate(losses)
    )  # fmt: skip
    table = AccuracyTable(
        graph_hash=graph.content_hash(), data_hash="d", is_labelled=True, reference_points=90.0, cells=cells
    )  # fmt: skip
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name="w", num_blocks=blocks, cuts=tuple(range(blocks + 1)),
        segments=tuple(segments), codecs=tuple(codecs), payloads=payloads, accuracy=table,
    )  # fmt: skip
    return graph, cluster, profile


def test_a_named_link_comes_before_that_of_the_kinds() -> None:
    _, cluster, _ = world(0, (3,), 2)
    by_kind = cluster.link("d1", "d2")
    assert by_kind is not None
    assert (by_kind.source, by_kind.target) == ("d1", "d2")
    named = replace(by_kind, latency_s=0.5)
    assert cluster.with_link(named).link("d1", "d2") == named
    assert cluster.with_link(named).link("d2", "d1") == cluster.link("d2", "d1")
    assert cluster.link("d1", "d1") is None
    spelled = cluster.with_link(named).spelled_out()
    assert len(spelled.links) == 4 * 3
    assert not spelled.kind_links
    for a, b in itertools.permutations(("d0", "d1", "d2", "d3"), 2):
        assert spelled.link(a, b) == cluster.with_link(named).link(a, b)
    assert {(k.source, k.target) for k in cluster.links_among(("d0", "d2"))} == {("d0", "d2"), ("d2", "d0")}
    assert Cluster.from_json(cluster.to_json()) == cluster


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: replace(c, kind_links=(*c.kind_links, c.kind_links[0])), "is given twice"),
        (lambda c: replace(c, kind_links=(replace(c.kind_links[0], source_kind="moon"),)), "kind 'moon'"),
    ],
)
def test_links_of_unknown_kinds_are_refused(change, said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        change(world(0, (2,), 2)[1])


def test_in_a_file_links_stand_by_kind(tmp_path: Path) -> None:
    text = """
    schema = "ecotone.cluster"
    version = 1
    name = "fleet"
    [[device]]
    name = "camera"
    kind = "camera"
    memory = "1 GB"
    [[device]]
    name = "pi1"
    kind = "pi"
    memory = "4 GB"
    [[device]]
    name = "pi2"
    kind = "pi"
    memory = "4 GB"
    [[link]]
    source_kind = "camera"
    target_kind = "pi"
    latency = "2 ms"
    bandwidth = "40 Mbit/s"
    [[link]]
    source_kind = "pi"
    target_kind = "pi"
    latency = "1 ms"
    bandwidth = "100 Mbit/s"
    """
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    cluster = Cluster.load(file)
    assert cluster.link("camera", "pi2") == Link(
        source=DeviceId("camera"), target=DeviceId("pi2"), latency_s=2e-3, bandwidth_bytes_per_s=5e6
    )  # fmt: skip
    assert cluster.link("pi2", "camera") is not None
    assert cluster.link("pi1", "pi2") is not None
    file.write_text(text.replace('target_kind = "pi"\n    latency = "2 ms"', 'target = "pi1"\n    latency = "2 ms"'))
    with pytest.raises(SchemaError, match="give source and target, or source_kind and target_kind"):
        Cluster.load(file)
    file.write_text(text.replace('"40 Mbit/s"', '"0 bit/s"'))
    with pytest.raises(SchemaError, match="bandwidth 0"):
        Cluster.load(file)


def test_a_measured_link_stands_for_its_kinds() -> None:
    graph, cluster, profile = world(0, (3, 2), 2)
    fit = LinkFit(source=DeviceId("d1"), target=DeviceId("d4"), latency_s=0.007, bandwidth_bytes_per_s=3e6)
    model = CostModel(graph, cluster, replace(profile, links=(fit,)))
    for a, b in itertools.product(("d1", "d2", "d3"), ("d4", "d5")):
        link = model.link(a, b)
        assert link is not None
        assert (link.latency_s, link.bandwidth_bytes_per_s) == (0.007, 3e6)
    assert model.link("d4", "d1") == cluster.link("d4", "d1")
    written, without = with_measured_links(graph, cluster, replace(profile, links=(fit,)))
    assert without.links == ()
    changed = written.link("d3", "d5")
    assert changed is not None
    assert (changed.latency_s, changed.price_money_per_byte) == (0.007, 1e-7)


def test_alike_devices_are_one_place() -> None:
    graph, cluster, profile = world(0, (20, 15), 2)
    found = places(CostModel(graph, cluster, profile))
    assert [len(group) for group in found] == [1, 20, 15]
    odd = replace(cluster.devices[3], memory_bytes=5)
    other = replace(cluster, devices=(*cluster.devices[:3], odd, *cluster.devices[4:]))
    assert sorted(len(group) for group in places(CostModel(graph, other, profile))) == [1, 1, 15, 19]
    link = cluster.link("d5", "d6")
    assert link is not None
    named = cluster.with_link(replace(link, latency_s=1.0))
    assert sorted(len(group) for group in places(CostModel(graph, named, profile))) == [1, 1, 1, 15, 18]
    few = world(0, (2, 3), 2)
    assert all(len(group) == 1 for group in places(CostModel(*few)))
    assert {n for group in places(CostModel(graph, cluster, profile), ["d1", "d30"]) for n in group} == {"d0", "d1", "d30"}


@pytest.mark.parametrize("objective", ["latency", "throughput", "bytes", "server,latency", "money"])
@pytest.mark.parametrize("share", [10.0, 0.45])
def test_classes_and_single_devices_agree(monkeypatch: pytest.MonkeyPatch, objective: str, share: float) -> None:
    """Where no plan needs more devices of a kind than there are, planning over classes is exact: the same value."""
    for seed in range(2):
        problem = world(seed, (3, 3), 4, share=share)
        values = []
        for apart in (0, 100):
            monkeypatch.setattr(kinds, "MOST_APART", apart)
            try:
                found = solve(*problem, parse_objective(objective), ("error=0.1",), num_runners_up=1)
            except PlannerError as error:
                values.append((math.inf, str(error)[:12]))
                continue
            assert plan_violations(found.plan, problem[0], problem[1]) == ()
            assert predict(found.plan, *problem) == found.cost
            assert found.bound <= found.value * (1 + 1e-9)
            values.append((found.value, "plan"))
        assert values[0][0] == pytest.approx(values[1][0], rel=1e-6), (seed, values)


def test_a_path_that_needs_more_devices_than_there_are_is_packed_or_refused() -> None:
    """Stages of 3 on devices of 7 bytes, two of a class: four stages fit, neighbours apart; a fifth does not."""
    members = ((DeviceId("s"),), (DeviceId("a"), DeviceId("b")))
    weights = np.full((7, 7), 3.0)
    working, room = np.ones((7, 7)), np.array([100.0, 7.0])
    stages = tuple((1, i, i + 1) for i in range(4))
    found = hand_out(stages, (False,) * 5, members, weights, working, room)
    assert found == ("a", "b", "a", "b")
    assert hand_out((*stages, (1, 4, 5)), (False,) * 6, members, weights, working, room) is None
    local = hand_out(stages, (False, True, False, False, False), members, weights, working, room)
    assert local == ("a", "a", "b", "a")[: len(local or ())] or local is None


def test_many_devices_of_few_kinds() -> None:
    """80 blocks, 251 devices of 6 kinds, memory for a tenth of the weights: budgets kept, a bound near the value."""
    problem = world(3, (50, 50, 50, 50, 50), 80, share=0.1, spread=30.0)
    graph, cluster, _ = problem
    found = solve(*problem, Latency(), ("accuracy_loss=1", "error=0.2"), time_limit_s=8.0, num_runners_up=0, gap=0.05)
    assert plan_violations(found.plan, graph, cluster) == ()
    assert predict(found.plan, *problem) == found.cost
    assert found.cost.accuracy_loss_points <= 1 + 1e-9
    assert found.cost.relative_error <= 0.2 + 1e-9
    assert len(found.plan.devices) > 8
    assert 0 < found.bound <= found.value
    assert found.gap <= 0.1
    room = {d.name: d.memory_bytes for d in cluster.devices}
    assert all(d.memory_bytes <= room[d.device] for d in found.cost.devices)
    wide = solve(*problem, Throughput(), time_limit_s=2.0, num_runners_up=0)
    assert 0 < wide.bound <= wide.value <= found.cost.bottleneck_s * (1 + 1e-9)


@pytest.mark.parametrize("change", ["link=1kbit/s", "d1-d2=1kbit/s", "latency=2s"])
def test_another_world_reaches_links_by_kind(change: str) -> None:
    problem = world(0, (2, 2), 3)
    near = [k for k in problem[1].kind_links if "k0" not in (k.source_kind, k.target_kind)]
    assert near
    only = ("device=d1,d2", "stages=2", "memory=10GB")
    over = solve(*problem, Throughput(), only, num_runners_up=0).plan
    assert {(t.source, t.target) for t in over.transfers} & {("d1", "d2"), ("d2", "d1")}
    found = what_if(*problem, over, change, Latency())
    assert found.today is not None
    assert found.today.latency_s > 0.5
