"""Graph, cluster, profile and plan as documents: round trips, and checkers that name every violation at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.graph import Block, Graph, Parameter, Tensor, TensorIndex
from ecotone.plan import Plan, Stage, Transfer, plan_violations
from ecotone.profile import LinkFit, Payload, Profile, SegmentTime
from ecotone.schema import SchemaError
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure

GOOD = """
schema = "ecotone.cluster"
version = 1
name = "home"
source = "camera"
emulate = true
[[device]]
name = "camera"
memory = "512 MB"
slowdown = 10
tier = "end"
power = { idle = "1.5 W", busy = "4 W", send_joule_per_byte = 8e-8 }
[[device]]
name = "box"
memory = "8 GB"
[[link]]
source = "camera"
target = "box"
latency = "5 ms"
bandwidth = "40 Mbit/s"
duplex = false
[[link]]
source = "box"
target = "camera"
latency = "5 ms"
bandwidth = "80 Mbit/s"
duplex = false
"""


def skip_graph() -> Graph:
    """x -> b0 -> t1 -> b1 -> t2 -> b2(t1, t2) -> t3: the skip t1 crosses cuts 1 and 2."""
    names = [("x", -1, 100), ("t1", 0, 50), ("t2", 1, 20), ("t3", 2, 10)]
    tensors = tuple(Tensor(name=n, shape=(size,), dtype="float32", producer=p) for n, p, size in names)
    reads = [(0,), (1,), (1, 2)]
    blocks = tuple(
        Block(
            name=f"b{i}",
            inputs=tuple(map(TensorIndex, r)),
            outputs=(TensorIndex(i + 1),),
            flop=10.0 * (i + 1),
            parameters=(0,) if i else (1,),
        )
        for i, r in enumerate(reads)
    )
    parameters = (Parameter(name="shared", size_bytes=400), Parameter(name="first", size_bytes=40))
    ends = {"inputs": (TensorIndex(0),), "outputs": (TensorIndex(3),)}
    return Graph(name="skip", blocks=blocks, tensors=tensors, parameters=parameters, **ends)


def two_device_plan(graph: Graph, cut: int, codec: str = "int8") -> Plan:
    a, b = DeviceId("camera"), DeviceId("box")
    stages = (Stage(device=a, start=0, stop=cut), Stage(device=b, start=cut, stop=graph.num_blocks))
    transfers = (
        Transfer(source=a, target=a, position=0, codec="none"),
        Transfer(source=a, target=b, position=cut, codec=codec),
        Transfer(source=b, target=a, position=graph.num_blocks, codec="fp32"),
    )
    return Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)


def load(tmp_path: Path, text: str) -> Cluster:
    (tmp_path / "c.toml").write_text(text)
    return Cluster.load(tmp_path / "c.toml")


def test_cluster_file(tmp_path: Path) -> None:
    text = GOOD
    cluster = load(tmp_path, text)
    up, down = cluster.link("camera", "box"), cluster.link("box", "camera")
    assert up is not None
    assert down is not None
    assert (up.bandwidth_bytes_per_s, down.bandwidth_bytes_per_s) == (5e6, 1e7)
    assert up.transfer_s(5e6) == pytest.approx(1.005)
    camera = cluster.device("camera")
    assert (camera.memory_bytes, camera.power.busy_watt, camera.power.send_joule_per_byte) == (512_000_000, 4.0, 8e-8)
    assert cluster.sink == cluster.source == "camera"
    assert Cluster.from_json(cluster.to_json()) == cluster


def test_cluster_names_every_violation_at_once(tmp_path: Path) -> None:
    text = (
        GOOD.replace('"512 MB"', '"512"')
        .replace("slowdown = 10", "slowdown = 0.5\ncolour = 3")
        .replace('"40 Mbit/s"', '"40 Mb"')
    )
    with pytest.raises(SchemaError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    for part in ("512", "has no unit", "colour is not known", "ambiguous", "40 Mbit/s"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('source = "camera"\nemulate', 'source = "kamera"\nemulate', "source 'kamera' is not a device"),
        ('name = "box"', 'name = "camera"', "device camera is given twice"),
        ('target = "box"', 'target = "bax"', "a link names device 'bax'"),
        ("duplex = false\n[[link]]", "[[link]]", "link box>camera is given twice"),
        ("emulate = true", "", "slowdown is for emulated clusters"),
        ("version = 1", "version = 9", "version = 1"),
        ('memory = "8 GB"', 'memory = "0 GB"', "memory must be above zero"),
        ('latency = "5 ms"', 'latency = "-5 ms"', "finite and not negative"),
        ("[[link]]", "[[link", "not TOML"),
        ("duplex = false", 'duplex = "no"', "duplex must be bool"),
    ],
)
def test_wrong_cluster_files(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(EcotoneError, match=r"cluster file .*c\.toml") as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert says in str(caught.value)


def test_missing_cluster_file_and_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(EcotoneError, match="give the path"):
        Cluster.load(tmp_path / "none.toml")
    device = Device(name=DeviceId("a"), memory_bytes=1)
    cluster = Cluster(name="c", devices=(device,), links=(), source=device.name, sink=device.name)
    with pytest.raises(EcotoneError, match=r"no device 'b'; devices are a"):
        cluster.device("b")


def test_link_changes() -> None:
    a, b = (Device(name=DeviceId(n), memory_bytes=1) for n in "ab")
    link = Link(source=a.name, target=b.name, latency_s=0.1, bandwidth_bytes_per_s=100.0)
    cluster = Cluster(name="c", devices=(a, b), links=(link,), source=a.name, sink=a.name)
    slow = cluster.scaled_links(1 / 8).link("a", "b")
    assert slow is not None
    assert slow.bandwidth_bytes_per_s == 12.5
    assert cluster.with_link(slow).link("a", "b") == slow


def test_frontiers_carry_what_is_needed_later() -> None:
    graph = skip_graph()
    assert [graph.frontier(p) for p in range(4)] == [(0,), (1,), (1, 2), (3,)]
    assert [graph.frontier_bytes(p) for p in range(4)] == [400, 200, 280, 40]
    assert graph.single_tensor_cuts() == (1,)
    assert graph.segment_parameter_bytes(0, 3) == 440  # the shared parameter once
    assert graph.segment_parameter_bytes(1, 3) == 400
    assert graph.segment_flop(0, 3) == 60.0


def test_graph_round_trip_and_hash() -> None:
    graph = skip_graph()
    again = Graph.from_json(graph.to_json())
    assert again == graph
    assert again.content_hash() == graph.content_hash()
    assert again.frontier(2) == (1, 2)


def test_graph_checker_names_what_is_wrong() -> None:
    document = json.loads(skip_graph().to_json())
    document["blocks"][0]["inputs"] = [2]
    document["blocks"][1]["flop"] = -1
    document["outputs"] = [9]
    with pytest.raises(SchemaError) as caught:
        Graph.from_json(json.dumps(document))
    for part in ("reads t2 before it is made", "flop must be finite", "not there"):
        assert part in str(caught.value)


def test_plan_round_trip_and_epoch() -> None:
    plan = two_device_plan(skip_graph(), 1)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.with_epoch(3) != plan
    assert plan.with_epoch(3).identity() == plan.identity()
    assert plan.devices == ("camera", "box")
    assert plan.cuts == (1, 3)
    assert str(plan) == "camera -> camera[0:1] torch:fp32 -> (int8) box[1:3] torch:fp32 -> (fp32) camera"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["stages"][1].update(start=2), "stage 1 starts at block 2"),
        (lambda d: d["transfers"][1].update(target="camera"), "does not lead into stage 1"),
        (lambda d: d["transfers"][0].update(codec="int8"), 'codec must be "none"'),
        (lambda d: d["transfers"].pop(), "need 3 transfers, there are 2"),
        (lambda d: d.update(stages=[]), "has no stage"),
        (lambda d: d.update(epoch=-1), "epoch is negative"),
        (lambda d: d.update(schema="other"), "schema is 'other'"),
        (lambda d: d.update(version=2), "this Ecotone reads 1"),
    ],
)
def test_broken_plans(change: object, says: str) -> None:
    document = json.loads(two_device_plan(skip_graph(), 1).to_json())
    change(document)  # type: ignore[operator]
    with pytest.raises(SchemaError) as caught:
        Plan.from_json(json.dumps(document))
    assert says in str(caught.value)


def test_plan_checked_against_graph_and_cluster(tmp_path: Path) -> None:
    graph = skip_graph()
    cluster = load(tmp_path, GOOD)
    plan = two_device_plan(graph, 1)
    assert plan_violations(plan, graph, cluster) == ()
    tiny = Device(name=DeviceId("box"), memory_bytes=100, executors=("openvino:bf16",))
    poor = Cluster(
        name="poor", devices=(cluster.devices[0], tiny), links=(), source=cluster.source, sink=cluster.sink, emulate=True
    )
    found = " ".join(plan_violations(plan, graph, poor))
    for part in ("no such link", "may not use executor torch:fp32", "needs 400 bytes of weights on box"):
        assert part in found


def test_profile_round_trip_and_checks() -> None:
    device = DeviceId("camera")
    segment = SegmentTime(
        device=device, executor="torch:fp32", start=0, stop=3, median_s=0.01, spread_s=0.001, memory_bytes=9
    )
    payload = Payload(position=1, codec="int8", size_bytes=60.0, disagreement=0.01)
    profile = Profile(
        graph_hash="h", cluster_name="home", num_blocks=3, cuts=(0, 1, 3), segments=(segment,), payloads=(payload,)
    )
    assert Profile.from_json(profile.to_json()) == profile
    document = json.loads(profile.to_json())
    document["cuts"] = [0, 5]
    with pytest.raises(SchemaError, match="cuts must ascend"):
        Profile.from_json(json.dumps(document))
    with pytest.raises(SchemaError, match="finite"):
        LinkFit(source=device, target=DeviceId("b"), latency_s=float("nan"), bandwidth_bytes_per_s=1.0)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda s: st.lists(s) | st.dictionaries(st.text(max_size=9), s),
    )
)
def test_documents_of_noise_give_only_schema_errors(document: object) -> None:
    for cls in (Graph, Plan, Profile, Cluster):
        with pytest.raises(SchemaError):
            cls.from_json(json.dumps(document))


@given(st.data())
def test_mutated_plans_give_a_plan_or_a_schema_error(data: st.DataObject) -> None:
    text = two_device_plan(skip_graph(), 1).to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    broken = text[:at] + data.draw(st.text(max_size=3)) + text[at + data.draw(st.integers(0, 4)) :]
    try:
        plan: Plan | None = Plan.from_json(broken)
    except SchemaError:
        plan = None
    assert plan is None or plan.stages
