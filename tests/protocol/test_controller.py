"""The controller as a pure machine: reports in, decisions out; what it should choose is worked out by hand.

World: a device `a` (one block takes 100 ms) and a server `b` (10 ms) with a link of stated 10 ms latency. Plan 1 runs the
block on b (400 kB there, 400 kB back), plan 2 on a. So plan 1 takes 10 ms + 20 ms + 800 kB / rate, plan 2 100 ms: they break
even where 800 kB take 70 ms, at 11.4 MB/s.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.graph import Block, Graph, Tensor, TensorIndex
from ecotone.plan import LOCAL as NONE
from ecotone.plan import Plan, Stage, Transfer
from ecotone.planset import PlanSet, Standby
from ecotone.profile import Profile, SegmentTime
from ecotone.protocol.controller import (
    Controller,
    ControllerSettings,
    Decision,
    Expect,
    Keep,
    Planned,
    PlanningFailed,
    ProbeLink,
    Replan,
    Switch,
    Tick,
)
from ecotone.protocol.effects import LinkChanged, Observed, Preferred
from ecotone.protocol.message import LinkSample, NodeId, NodeReport, WorkSample

pytestmark = pytest.mark.pure

REMOTE, LOCAL = 1, 2
FRONTIER_BYTES = 400_000
LATENCY_S, EVEN = 0.010, 2 * FRONTIER_BYTES / 0.070


def placed(graph: Graph, device: str) -> Plan:
    """The one block on `device`, float32 there and back."""
    codec, at = NONE if device == "a" else "fp32", DeviceId(device)
    transfers = (
        Transfer(source=DeviceId("a"), target=at, position=0, codec=codec),
        Transfer(source=at, target=DeviceId("a"), position=1, codec=codec),
    )
    return Plan(graph_hash=graph.content_hash(), stages=(Stage(device=at, start=0, stop=1),), transfers=transfers)


def world(
    rate: float = 40e6, seconds: tuple[float, float] = (0.100, 0.010), preferred: str = "ba"
) -> tuple[PlanSet, Graph, Cluster, Profile]:
    shape = (FRONTIER_BYTES // 4,)
    tensors = tuple(Tensor(name=f"t{i}", shape=shape, dtype="float32", producer=i - 1) for i in range(2))
    block = Block(name="b", inputs=(TensorIndex(0),), outputs=(TensorIndex(1),), flop=1.0)
    graph = Graph(name="one", blocks=(block,), tensors=tensors, inputs=(TensorIndex(0),), outputs=(TensorIndex(1),))
    names = (DeviceId("a"), DeviceId("b"))
    links = tuple(
        Link(source=one, target=other, latency_s=LATENCY_S, bandwidth_bytes_per_s=rate)
        for one, other in (names, names[::-1])
    )
    devices = tuple(Device(name=name, memory_bytes=1 << 30) for name in names)
    cluster = Cluster(name="two", devices=devices, links=links, source=names[0], sink=names[0])
    segments = tuple(
        SegmentTime(device=n, executor="torch:fp32", start=0, stop=1, median_s=s, spread_s=0.0, memory_bytes=0)
        for n, s in zip(names, seconds, strict=True)
    )
    profile = Profile(graph_hash=graph.content_hash(), cluster_name="two", num_blocks=1, cuts=(0, 1), segments=segments)
    first, second = (placed(graph, device) for device in preferred)
    return PlanSet(primary=first, standbys=(Standby(plan=second),)).with_epochs(REMOTE), graph, cluster, profile


def controller(settings: ControllerSettings | None = None, rate: float = 40e6) -> Controller:
    return Controller(*world(rate), settings=settings)


def link(rate: float, *, size: int = FRONTIER_BYTES, rtt_s: float = 2 * LATENCY_S, source: str = "a") -> Observed:
    """A report of `source`: `size` bytes left for the other one at `rate`."""
    other = NodeId("b" if source == "a" else "a")
    sample = LinkSample(peer=other, size_bytes=size, seconds=size / rate + rtt_s, rtt_s=rtt_s)
    return Observed(peer=NodeId(source), report=NodeReport(session=1, links=(sample,)))


def work(seconds: float, *, device: str = "a", epoch: int = LOCAL) -> Observed:
    sample = WorkSample(epoch=epoch, work="compute", index=0, seconds=seconds, count=1)
    return Observed(peer=NodeId(device), report=NodeReport(session=1, work=(sample,)))


def switches(decisions: tuple[Decision, ...]) -> list[int]:
    return [d.epoch for d in decisions if isinstance(d, Switch)]


def test_prices_are_those_of_the_cost_model() -> None:
    made = controller()
    assert made.value_s(REMOTE, 0.0) == pytest.approx(0.010 + 2 * LATENCY_S + 2 * FRONTIER_BYTES / 40e6)
    assert made.value_s(LOCAL, 0.0) == pytest.approx(0.100)


def test_a_fall_is_found_with_one_sample_of_each_direction() -> None:
    made = controller()
    assert switches(made.handle(link(1e6), 1.0)) == [LOCAL]


def test_a_rise_is_found_by_the_third_probe() -> None:
    """One of 32 kB in 0.8 ms is trusted to 1 ms only: 18 MB/s at least, so 8 and then 16 MB/s after equation 4: 80 ms."""
    made = controller()
    made.handle(link(1e6), 1.0)
    made.handle(link(1e6, source="b"), 1.0)
    made.handle(Preferred(epoch=LOCAL, reason="asked for"), 1.0)
    probes = [d for d in made.handle(Tick(), 4.0) if isinstance(d, ProbeLink)]
    assert [p.peer for p in probes] == [DeviceId("b")]
    assert 4096 <= probes[0].size_bytes <= 32768
    assert not made.handle(Tick(), 4.1)  # not again so soon
    assert not switches(made.handle(link(40e6, size=32768), 4.2))
    assert not switches(made.handle(link(40e6, size=32768), 4.5))  # 19 % better: to be seen twice
    found = made.handle(link(40e6, size=32768), 4.8)  # b > a is stale: it takes the factor of a > b
    assert switches(found) == [REMOTE]


def test_a_small_gain_must_be_seen_twice() -> None:
    """At 10 MB/s plan 1 takes 110 ms: 9 % worse than plan 2, above `gain` and below `at_once`."""
    made = controller(ControllerSettings(fall_gain=1.0, jitter_s=0.0))
    made.handle(link(40e6), 0.8)
    made.handle(link(10e6, source="b"), 0.9)
    first = made.handle(link(10e6), 1.0)
    assert not switches(first)
    assert any(isinstance(d, Keep) for d in first)
    assert switches(made.handle(link(10e6), 1.5)) == [LOCAL]


def test_a_gain_below_the_threshold_moves_nothing() -> None:
    made = controller(ControllerSettings(fall_gain=1.0, jitter_s=0.0))
    for now_s in np.arange(1.0, 20.0, 0.5).tolist():
        assert not switches(made.handle(link(EVEN / 1.03), now_s) + made.handle(link(EVEN / 1.03, source="b"), now_s))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.8, 1.3, 2.0]))
def test_no_flapping_under_noise(seed: int, off: float) -> None:
    """Samples that scatter by 10 % round a rate that is clearly on one side: at most one switch, and then none."""
    rng, made = np.random.default_rng(seed), controller()
    moved = []
    for i in range(200):
        rate = EVEN * off * float(np.exp(rng.normal(0, 0.1)))
        moved += switches(made.handle(link(rate), 0.5 * i) + made.handle(link(rate, source="b"), 0.5 * i + 0.01))
    assert moved == ([LOCAL] if off < 1 else [])


@pytest.mark.parametrize("factor", [0.02, 0.1, 0.5])
def test_a_step_is_found_within_two_reports(factor: float) -> None:
    made = controller()
    for i in range(10):
        assert not switches(made.handle(link(40e6), 0.1 * i))
    found = [switches(made.handle(link(EVEN * factor, source=s), 2.0 + i)) for i, s in enumerate("ab")]
    assert [LOCAL] in found


def test_a_short_sample_is_believed_to_the_jitter_only() -> None:
    """2 kB in 1.4 ms say that 0.4 to 2.4 ms passed: 0.83 to 5 MB/s. The belief, 40 MB/s, moves towards 5, not beyond."""
    made = controller(ControllerSettings(fall_gain=1.0))
    made.handle(link(2000 / 1.4e-3, size=2000), 1.0)
    assert made.links[DeviceId("a"), DeviceId("b")].bytes_per_s == pytest.approx(5e6)


def test_a_lost_node_is_no_candidate_and_comes_back() -> None:
    made = controller()
    assert switches(made.handle(LinkChanged(peer=NodeId("b"), state="down"), 1.0)) == [LOCAL]
    assert not switches(made.handle(work(0.100), 1.5))
    assert switches(made.handle(link(40e6), 2.0)) == [REMOTE]


def test_where_the_coordinator_moved_on_the_device_is_doubted_until_heard() -> None:
    made = controller()
    assert switches(made.handle(Preferred(epoch=LOCAL, reason="b does not answer"), 1.0)) == [LOCAL]
    assert not switches(made.handle(work(0.100), 1.2))  # nothing heard of b: stay
    assert any("does not answer" in line for line in made.explanation())
    assert switches(made.handle(link(40e6), 1.4)) == [REMOTE]


def test_a_loaded_server_is_left_and_its_factor_said() -> None:
    """The server takes 20 times as long as profiled: plan 1 then takes 240 ms."""
    made = controller()
    moved: list[int] = []
    for i in range(20):
        moved += switches(made.handle(work(0.200, device="b", epoch=REMOTE), 0.1 * i))
    assert moved == [LOCAL]
    factors = [line for line in made.explanation() if line.startswith("b takes")]
    assert float(factors[0].split()[2]) > 5


def test_drift_of_a_device_asks_the_planner_once() -> None:
    made = controller()
    asked: list[Replan] = []
    for i in range(40):
        asked += [d for d in made.handle(work(0.160), 0.1 * i) if isinstance(d, Replan)]
    assert len(asked) == 1
    slower = {s.device: s.median_s for s in asked[0].profile.segments}
    assert slower[DeviceId("a")] > 1.25 * 0.100
    assert slower[DeviceId("b")] == pytest.approx(0.010)
    made.handle(PlanningFailed(reason="the same plans are best"), 5.0)
    assert "planning failed" in " ".join(made.explanation())


def test_a_new_set_is_taken_over() -> None:
    made = controller()
    plans, *_ = world()
    again = plans.with_epochs(7)
    made.handle(Planned(plans=again), 1.0)
    assert {p.epoch for p in made.plans} == {7, 8}
    assert switches(made.handle(link(1e6), 2.0)) == [8]


def test_the_coordinator_is_told_what_to_expect_when_that_changes() -> None:
    made = controller()
    told = [d for d in made.handle(link(40e6), 1.0) if isinstance(d, Expect)]
    assert [d.expected_s for d in told] == [pytest.approx(0.050, rel=0.05)]
    assert not [d for d in made.handle(link(40e6), 2.0) if isinstance(d, Expect)]
    assert [d.epoch for d in made.handle(link(20e6), 3.0) if isinstance(d, Expect)] == [REMOTE]


def test_no_probe_where_the_plan_in_force_uses_the_link_or_none_could_win() -> None:
    assert not controller().handle(Tick(), 10.0)
    faster_device = world(seconds=(0.001, 0.010), preferred="ab")
    assert not Controller(*faster_device).handle(Tick(), 10.0)


def test_reports_of_strangers_and_nonsense_change_nothing() -> None:
    made = controller()
    before = made.value_s(REMOTE, 1.0)
    for odd in (link(float("inf")), link(1e6, size=0)):
        made.handle(odd, 1.0)
    made.handle(Observed(peer=NodeId("stranger"), report=NodeReport(session=1)), 1.0)
    made.handle(work(1.0, epoch=99), 1.0)
    assert made.value_s(REMOTE, 1.0) == pytest.approx(before, rel=0.2)


def test_the_explanation_says_what_would_make_it_move() -> None:
    lines = controller().explanation()
    assert lines[0].startswith("plan 1 in force: a -> (fp32) b[0:1]")
    assert any("plan 2 would take 100 ms" in line for line in lines)
    # From 50 ms at 40 MB/s plan 2 wins by 5 % once plan 1 takes 105.3 ms: links 3.8 times slower (found on a grid: 4).
    assert any("times slower it would be plan 2" in line for line in lines)
