"""The parts of the laboratory that only compute: relay rules, links under verbs and traces, quotas, where groups are."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_worlds import cluster

from ecotone.cluster import Cluster
from ecotone.lab import LabError, groups
from ecotone.lab.links import Links, next_step_s
from ecotone.lab.machines import cluster_toml
from ecotone.lab.relay import Relay, Rule
from ecotone.linktrace import LinkPoint, LinkTrace
from ecotone.schema import SchemaError

pytestmark = pytest.mark.pure

STEPS = LinkTrace(
    name="steps",
    points=(
        LinkPoint(time_s=0, bytes_per_s=1000, latency_s=0.1),
        LinkPoint(time_s=2, bytes_per_s=0, latency_s=0.1),
        LinkPoint(time_s=3, bytes_per_s=500, latency_s=0.2, loss=0.1),
    ),
    duration_s=5.0,
)
WORLD = cluster(("a", "b", 1e6, 0.01), ("b", "c", 2e6, 0.02))


@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(40, 1500)), max_size=50), st.floats(1e3, 1e7), st.floats(0, 0.1))
def test_a_rule_is_a_queue_and_a_delay(arrivals: list[tuple[float, int]], rate: float, latency_s: float) -> None:
    """Against the textbook: departure = max(arrival, departure before) + size / rate; nothing waits beyond the queue."""
    rule = Rule(latency_s=latency_s, rate=rate, queue_s=0.1)
    now = free = 0.0
    for gap, size in arrivals:
        now += gap
        due = rule.due_s(size, now)
        if free - now > 0.1:
            assert due is None
            continue
        free = max(now, free) + size / rate
        assert due == pytest.approx(free + latency_s)
    assert rule.packets + rule.overflowed == len(arrivals)


def test_loss_and_jitter_follow_the_seed_and_never_reorder() -> None:
    def dues(seed: int) -> list[float | None]:
        rule = Rule(latency_s=0.05, jitter_s=0.005, loss=0.25, draw=random.Random(seed))
        return [rule.due_s(100, number * 0.02) for number in range(2000)]

    assert dues(1) == dues(1) != dues(2)
    arrived = [due for due in dues(1) if due is not None]
    assert arrived == sorted(arrived)
    # 2000 draws of 0.25: standard deviation 19; five of them.
    assert abs(2000 - len(arrived) - 500) < 97
    delays = [due - number * 0.02 for number, due in enumerate(dues(1)) if due is not None]
    assert statistics.fmean(delays) == pytest.approx(0.05, abs=0.001)
    assert statistics.pstdev(delays) == pytest.approx(0.005, rel=0.1)


def test_a_cut_counts_and_a_packet_without_a_rule_goes_nowhere() -> None:
    rule = Rule()
    rule.change({"cut": True}, 0.0)
    assert rule.due_s(100, 1.0) is None
    assert rule.counters()["cut_off"] == 1
    relay = Relay([], ["10.0.0.1", "10.0.0.2"], 0)
    relay.take(0, b"\x45" + bytes(15) + bytes((10, 0, 0, 2)), 0.0)
    with pytest.raises(ValueError, match="rules or counters"):
        relay.obey({"format": "disk"})


def test_links_follow_verbs_and_traces() -> None:
    links = Links(WORLD, {})
    both = links.pairs("a", "b")
    assert both == [("a", "b"), ("b", "a")]
    links.trace(both, STEPS, 100.0, 100.0)
    seen = []
    for time_s in (100.0, 101.0, 102.5, 103.0, 105.0, 107.0):
        links.follow(time_s)
        now = links.now["a", "b"]
        seen.append((now.bytes_per_s, now.is_out, now.loss))
    # The rate that an outage interrupts is kept beside it; after 5 s the trace begins again.
    assert seen == [
        (1000, False, 0),
        (1000, False, 0),
        (1000, True, 0),
        (500, False, 0.1),
        (1000, False, 0),
        (1000, True, 0),
    ]
    links.cut(links.pairs("b", ""))
    assert {pair for pair, link in links.now.items() if link.is_cut} == {("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")}
    links.heal(both)
    assert not links.now["a", "b"].is_cut
    links.change([("a", "b")], {"bytes_per_s": 0})
    assert links.now["a", "b"].is_out
    assert links.now["a", "b"].trace == ""
    links.change([("a", "b")], {"bytes_per_s": 700})
    assert links.now["a", "b"].passes
    assert links.now["a", "b"].bytes_per_s == 700


def test_what_no_link_can_be_is_refused() -> None:
    links = Links(WORLD, {})
    for values in ({"bytes_per_s": -1}, {"loss": 1.0}, {"latency_s": float("nan")}, {"colour": 1.0}):
        with pytest.raises(LabError):
            links.change([("a", "b")], values)
    with pytest.raises(LabError, match="no link a>c in cluster trio; links are a>b"):
        links.pairs("a", "c")
    with pytest.raises(LabError, match='no device "d"; devices are a, b, c'):
        links.pairs("a", "d")
    with pytest.raises(SchemaError, match=r"rate -5\.0 .* must be finite and not negative"):
        LinkTrace.from_csv("time_s,bytes_per_s,latency_s,loss\n0,-5,0.1,0\n1,5,0.1,0\n")


@given(st.floats(0, 1000))
def test_the_next_step_is_the_first_change(passed_s: float) -> None:
    following = next_step_s(STEPS, 50.0, 50.0 + passed_s)
    assert following > 50.0 + passed_s or following == pytest.approx(50.0 + passed_s)
    middle = (passed_s + following - 50.0) / 2
    assert STEPS.at(middle) == STEPS.at(passed_s) or following - 50.0 - passed_s < 1e-6


def test_the_cluster_file_of_those_inside_reads_back(tmp_path: Path) -> None:
    world = replace(WORLD, links=tuple(replace(k, jitter_s=0.001, loss=0.01) for k in WORLD.links))
    (tmp_path / "inside.toml").write_text(cluster_toml(world))
    assert Cluster.load(tmp_path / "inside.toml") == world


@pytest.mark.parametrize(("share", "quota", "period"), [(1.0, 10000, 10000), (0.25, 2500, 10000), (0.05, 1000, 20000)])
def test_a_quota_is_a_share_of_a_short_period(share: float, quota: int, period: int) -> None:
    """10 ms, but the kernel takes no quota under 1 ms."""
    assert groups.cpu_values(share) == (quota, period)


def test_groups_of_version_1_are_made_below_our_own(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory" / "box").mkdir(parents=True)
    mounts = "".join(
        f"{number} 1 0:{number} / {tmp_path}/{name} rw - cgroup cgroup rw,{options}\n"
        for number, (name, options) in enumerate([("cpu", "cpu,cpuacct"), ("memory", "memory")])
    )
    found = groups.find_controllers(mounts, "2:cpu,cpuacct:/\n1:memory:/box\n0::/\n")
    assert found == groups.Controllers(version=1, cpu=tmp_path / "cpu", memory=tmp_path / "memory" / "box")
    assert found.folders("x", "0") == (tmp_path / "cpu/x/0", tmp_path / "memory/box/x/0")


def test_groups_of_version_2_are_made_where_controllers_are_handed_down(tmp_path: Path) -> None:
    for folder, handed in ((tmp_path, "cpu memory"), (tmp_path / "user", "")):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.controllers").write_text("cpu memory pids")
        (folder / "cgroup.subtree_control").write_text(handed)
    (tmp_path / "user" / "cgroup.controllers").write_text("pids")
    mounts = f"1 1 0:1 / {tmp_path} rw - cgroup2 cgroup2 rw\n"
    found = groups.find_controllers(mounts, "0::/user\n")
    assert found == groups.Controllers(version=2, cpu=tmp_path, memory=tmp_path)
    group = tmp_path / "dev"
    group.mkdir()
    (group / "cpu.max").touch()
    (group / "memory.max").touch()
    groups.set_cpu(group, 0.25)
    groups.set_memory(group, 10**9)
    assert (group / "cpu.max").read_text() == "2500 10000"
    assert (group / "memory.max").read_text() == "1000000000"
    groups.set_cpu(group, None)
    assert (group / "cpu.max").read_text() == "max 10000"


def test_without_controllers_there_are_no_groups() -> None:
    assert groups.find_controllers("", "") == groups.Controllers()
