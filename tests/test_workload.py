"""Workloads and shared media as a person writes them: what is read, what is refused, and with which words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.media import RadioCell, Sender, SharedWire
from ecotone.schema import SchemaError
from ecotone.units import EcotoneError
from ecotone.workload import User, Workload

pytestmark = pytest.mark.pure

USERS = """
schema = "ecotone.workload"
version = 1
name = "gate"
aim = "worst"

[[user]]
name = "north"
source = "cam0"
model = "net.py:net"
rate = "90 /min"
weight = 2
deadline = "200 ms"
require = ["accuracy_loss=0.5"]

[[user]]
name = "south"
source = "cam1"
sink = "edge"
in_flight = 2
"""

CLUSTER = """
schema = "ecotone.cluster"
version = 1
name = "gate"

[[device]]
name = "cam0"
memory = "1 GB"

[[device]]
name = "cam1"
memory = "1 GB"

[[device]]
name = "edge"
memory = "8 GB"

[[device]]
name = "cloud"
memory = "64 GB"

[[radio]]
name = "cell"
receiver = "edge"
latency = "2 ms"
num_channels = 2
width = "1 MHz"
noise = "1 nW"

[[radio.sender]]
device = "cam0"
distance = "50 m"

[[radio.sender]]
device = "cam1"
distance = "20 m"
max_watt = "100 mW"

[[link]]
source = "edge"
target = "cam0"
latency = "2 ms"
bandwidth = "20 Mbit/s"
duplex = false

[[link]]
source = "edge"
target = "cloud"
latency = "10 ms"
bandwidth = "50 Mbit/s"

[[shared]]
name = "uplink"
bandwidth = "60 Mbit/s"
links = ["*>cloud"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "file.toml"
    path.write_text(text)
    return path


def test_a_workload_file_is_read(tmp_path: Path) -> None:
    workload = Workload.load(written(tmp_path, USERS))
    north, south = workload.users
    assert workload.aim == "worst"
    assert (north.rate_per_s, north.weight, north.deadline_s) == (1.5, 2.0, 0.2)
    assert (north.ends, south.ends) == (("cam0", "cam0"), ("cam1", "edge"))
    assert south.is_closed
    assert not north.is_closed
    assert Workload.from_json(workload.to_json()) == workload


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('rate = "90 /min"', "", r'either rate = "5 /s".* or in_flight = 1'),
        ('rate = "90 /min"', 'rate = "90"', r'"90" has no unit; write for example "5 /s"'),
        ('rate = "90 /min"', 'rate = "1 /s"\nleast_rate = "2 /s"', "least_rate 2 /s is above its rate 1 /s"),
        ("in_flight = 2", 'in_flight = 2\nrate = "1 /s"', "either rate"),
        ("weight = 2", "weight = 0", "weight 0.0 must be above zero"),
        ('source = "cam1"', 'source = "cam0"', "north, south share the source cam0"),
        ('name = "south"', 'name = "north"', "user north is given twice"),
        ('deadline = "200 ms"', 'deadline = "200"', "has no unit"),
        ("version = 1", "version = 2", 'must begin with schema = "ecotone.workload" and version = 1'),
        ('aim = "worst"', 'aim = "best"', "must be one of 'mean', 'worst', 'fair'"),
        ("in_flight = 2", "in_flight = 2\nspeed = 3", "speed is not known; known are"),
        ("[[user]]", "[[user", "not TOML"),
    ],
)
def test_a_workload_that_makes_no_sense_is_refused_with_a_remedy(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(EcotoneError, match=words) as found:
        Workload.load(written(tmp_path, USERS.replace(old, new)))
    assert "\n" not in str(found.value)


def test_a_workload_names_devices_of_its_cluster(tmp_path: Path) -> None:
    workload, cluster = Workload.load(written(tmp_path, USERS)), Cluster.load(written(tmp_path, CLUSTER))
    workload.check(cluster, ("net.py:net", ""))
    with pytest.raises(SchemaError, match=r"user north: model 'net.py:net' is not given"):
        workload.check(cluster, ("a", "b"))
    other = Workload(name="w", users=(User(name="x", source=DeviceId("roof"), rate_per_s=1.0),))
    with pytest.raises(SchemaError, match="no device 'roof' in cluster gate"):
        other.check(cluster)
    assert workload.cluster_for("south", cluster).sink == "edge"
    with pytest.raises(EcotoneError, match="no user 'west'; users are north, south"):
        workload.user("west")


# ---- shared media ----------------------------------------------------------------------------------------------------


def test_uplinks_of_a_radio_are_links_with_the_rate_that_they_have_alone(tmp_path: Path) -> None:
    cluster = Cluster.load(written(tmp_path, CLUSTER))
    link = cluster.link("cam0", "edge")
    assert link is not None
    assert link.latency_s == 0.002
    assert 8 * link.bandwidth_bytes_per_s == pytest.approx(12_965_964.61, abs=0.01)  # MAHPPO's check value: 50 m, 1 W
    near = cluster.link("cam1", "edge")
    assert near is not None
    assert 8 * near.bandwidth_bytes_per_s == pytest.approx(1e6 * math.log2(1 + 0.1 / 20**3 / 1e-9))
    assert cluster.link("edge", "cam1") is None
    assert Cluster.from_json(cluster.to_json()) == cluster
    wire = cluster.shared[0]
    assert wire.carries("edge", "cloud")
    assert not wire.carries("cloud", "edge")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('device = "cam1"', 'device = "roof"', "device 'roof'"),
        ('device = "cam1"', 'device = "cam0"', "sender cam0 is given twice"),
        ('distance = "20 m"', 'distance = "20"', 'write for example "50 m"'),
        ('distance = "20 m"', 'distance = "0 m"', "must be above zero"),
        ("duplex = false", "duplex = true", "link cam0>edge is given twice"),
        ('links = ["*>cloud"]', 'links = ["cloud"]', 'write "source>target"'),
        ('links = ["*>cloud"]', 'links = ["cam1>cloud"]', "shared wire uplink carries no link"),
        ('links = ["*>cloud"]', 'links = ["cam0>edge"]', "which belongs to a radio"),
        ('name = "uplink"', 'name = "cell"', "cell names two radios or shared wires"),
        ("num_channels = 2", "num_channels = 0", "needs a channel"),
    ],
)
def test_media_that_make_no_sense_are_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(EcotoneError, match=words) as found:
        Cluster.load(written(tmp_path, CLUSTER.replace(old, new)))
    assert "\n" not in str(found.value)


def test_a_radio_without_its_links_is_refused() -> None:
    devices = tuple(Device(name=DeviceId(n), memory_bytes=1) for n in "abc")
    radio = RadioCell(name="r", receiver="c", sender=(Sender(device="a", distance_m=10.0),))
    with pytest.raises(SchemaError, match="a radio has the uplink a>c, but there is no such link"):
        Cluster(name="x", devices=devices, links=(), source=DeviceId("a"), sink=DeviceId("a"), radios=(radio,))
    link = Link(
        source=DeviceId("a"), target=DeviceId("c"), latency_s=0.0, bandwidth_bytes_per_s=radio.alone_bytes_per_s("a")
    )
    two = (radio, RadioCell(name="s", receiver="c", sender=radio.sender))
    with pytest.raises(SchemaError, match="link a>c belongs to two radios"):
        Cluster(name="x", devices=devices, links=(link,), source=DeviceId("a"), sink=DeviceId("a"), radios=two)


def test_a_star_stands_for_any_device() -> None:
    wire = SharedWire(name="w", bandwidth_bytes_per_s=1.0, links=("*>edge", "edge > *"))
    assert [wire.carries(*pair) for pair in (("a", "edge"), ("edge", "b"), ("a", "b"))] == [True, True, False]
