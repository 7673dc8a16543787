"""One fault at a time, each with what must follow (docs/faults.md), on worlds small enough to count by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from worlds import chain, cluster_of, plan_of, profile_of

from ecotone.cluster import DeviceId, Link
from ecotone.linktrace import LinkPoint, LinkTrace
from ecotone.planset import PlanSet, Standby
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings
from ecotone.simulator import (
    BendClock,
    ClosedLoop,
    CutLink,
    CutOneWay,
    Fault,
    FillDisk,
    FollowTrace,
    GarbleNode,
    HealAll,
    KillNode,
    Partition,
    Periodic,
    Replan,
    Report,
    RestartNode,
    ResumeNode,
    SetLink,
    SetPrepare,
    SlowDevice,
    SpoilLink,
    SpoilWork,
    StallNode,
    Switch,
    simulate,
)
from ecotone.simulator.channel import Channel, FrameFaults, sent_at
from ecotone.simulator.world import Machine, World
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure

A, B, C = (DeviceId(n) for n in "abc")
GRAPH = chain(3)
PROFILE = profile_of(GRAPH, {n: [s] * 3 for n, s in zip("abc", (0.010, 0.020, 0.005), strict=True)}, coding_s=0.001)
PLANS = PlanSet(
    primary=plan_of(GRAPH, "abb"),
    standbys=(Standby(plan=plan_of(GRAPH, "acc", epoch=1)), Standby(plan=plan_of(GRAPH, "aaa", epoch=2))),
)


def run(*script: Fault, record: bool = False, plans: PlanSet = PLANS, **options: object) -> Report:
    """30 requests every 40 ms through b, with c and the asker itself standing by."""
    chosen: dict = {"requests": 30, "arrivals": Periodic(period_s=0.04), "until_s": 200.0} | options
    mind = CoordinatorSettings(session=1, record=record)
    return simulate(plans, GRAPH, cluster_of("abc"), PROFILE, script=script, coordinator=mind, **chosen)


def check(report: Report, *, errors: int = 0) -> None:
    assert report.num_unended == 0
    assert report.num_duplicated == 0
    assert not report.violations
    assert sum(bool(o.error) for o in report.outcomes) == errors
    assert sorted(o.request for o in report.outcomes) == list(range(len(report.outcomes)))


FAULTS: dict[str, tuple[Fault, ...]] = {
    "a killed machine": (KillNode(at_s=0.3, device=B),),
    "a killed machine that comes back": (KillNode(at_s=0.3, device=B), RestartNode(at_s=0.6, device=B)),
    "a killed machine, seen late": (KillNode(at_s=0.3, device=B, detect_s=5.0),),
    "a stopped machine": (StallNode(at_s=0.3, device=B),),
    "a stopped machine that goes on": (StallNode(at_s=0.3, device=B), ResumeNode(at_s=0.8, device=B)),
    "the asker stopped for a while": (StallNode(at_s=0.3, device=A), ResumeNode(at_s=0.8, device=A)),
    "a cut link": (CutLink(at_s=0.3, source=A, target=B),),
    "a way there that is dead": (CutOneWay(at_s=0.3, source=A, target=B),),
    "a way back that is dead": (CutOneWay(at_s=0.3, source=B, target=A),),
    "a partition that heals": (Partition(at_s=0.3, devices=(B, C)), HealAll(at_s=0.9)),
    "both servers killed": (KillNode(at_s=0.3, device=B), KillNode(at_s=0.5, device=C)),
    "a slow machine": (SlowDevice(at_s=0.3, device=B, factor=20.0), SlowDevice(at_s=0.9, device=B, factor=1.0)),
    "a link of 1 kbit/s": tuple(
        SetLink(at_s=0.3, link=Link(source=one, target=other, latency_s=0.001, bandwidth_bytes_per_s=125.0))
        for one, other in ((A, B), (B, A))
    ),
    "frames lost, late, repeated and damaged": tuple(
        SpoilLink(at_s=0.2, source=one, target=other, drop=0.2, duplicate=0.2, truncate=0.1, late_s=0.02)
        for one, other in ((A, B), (B, A))
    ),
    "an outage in a trace": (
        FollowTrace(
            at_s=0.3,
            source=A,
            target=B,
            trace=LinkTrace(
                name="gap",
                points=(
                    LinkPoint(time_s=0, bytes_per_s=0, latency_s=0.001),
                    LinkPoint(time_s=2, bytes_per_s=1e8, latency_s=0.001),
                ),
                duration_s=100,
            ),
        ),
    ),
    "garbage from a machine": (GarbleNode(at_s=0.3, device=B),),
    "work that raises": (SpoilWork(at_s=0.3, device=B, kinds=("compute",)),),
    "an encoder that raises": (SpoilWork(at_s=0.3, device=B, kinds=("encode",)),),
    "clocks that go backwards": tuple(BendClock(at_s=0.3, device=d, step_s=-3600.0) for d in (A, B, C)),
    "clocks that drift": (BendClock(at_s=0.1, device=A, drift=1.01), BendClock(at_s=0.1, device=B, drift=0.99)),
    "a restarted machine that loads slowly": (
        SetPrepare(at_s=0.0, device=B, takes_s=0.5),
        KillNode(at_s=0.3, device=B),
        RestartNode(at_s=0.4, device=B),
    ),
    "a restarted machine of another version": (
        SetPrepare(at_s=0.0, device=B, error="another version"),
        KillNode(at_s=0.3, device=B),
        RestartNode(at_s=0.4, device=B),
    ),
    "a new plan while its machine dies": (
        Replan(
            at_s=0.3,
            plan=PlanSet(primary=plan_of(GRAPH, "cbb", epoch=7), standbys=(Standby(plan=plan_of(GRAPH, "aac", epoch=8)),)),
        ),
        KillNode(at_s=0.301, device=B),
    ),
    "a switch during a failover": (KillNode(at_s=0.3, device=B), Switch(at_s=0.32, epoch=1), Switch(at_s=0.4, epoch=0)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_with_standbys_nothing_is_lost(name: str) -> None:
    report = run(*FAULTS[name])
    check(report)
    assert report.completion_order == tuple(range(30)), "in order"


@pytest.mark.parametrize("name", [n for n in FAULTS if "restarted" not in n])
def test_nothing_is_lost_with_an_active_twin_either(name: str) -> None:
    twin, alone = PLANS.standbys
    check(run(*FAULTS[name], plans=replace(PLANS, standbys=(replace(twin, mode="active"), alone))))


def test_the_asker_comes_back_with_its_journal() -> None:
    script = (KillNode(at_s=0.31, device=A), RestartNode(at_s=0.7, device=A))
    report = run(*script, record=True)
    check(report)
    with pytest.raises(EcotoneError, match=r"kills the asker a.*--recorded"):
        run(*script)


def test_the_asker_comes_back_while_its_first_choice_is_dead() -> None:
    check(run(KillNode(at_s=0.3, device=B), KillNode(at_s=0.31, device=A), RestartNode(at_s=0.7, device=A), record=True))


def test_a_full_disk_refuses_by_name_and_what_was_accepted_is_answered() -> None:
    report = run(FillDisk(at_s=0.3, device=A), FillDisk(at_s=0.6, device=A, is_full=False), record=True)
    refused = [o for o in report.outcomes if o.error]
    assert {o.error for o in refused} == {"unrecorded"}
    assert all("no space left" in o.reason for o in refused)
    assert all(0.3 <= o.submitted_s < 0.6 for o in refused)
    assert 6 <= len(refused) <= 8, "one every 40 ms"
    check(report, errors=len(refused))


def test_without_any_plan_left_requests_end_by_name_after_patience() -> None:
    alone = PlanSet(primary=PLANS.primary)
    report = run(KillNode(at_s=0.3, device=B), plans=alone)
    lost = [o for o in report.outcomes if o.error]
    assert {o.error for o in lost} == {"node-lost"}
    assert all("b" in o.reason for o in lost)
    assert max(o.ended_s for o in lost) < 0.3 + 0.05 + 2 * 5.0 + 1.2, "node_timeout_s is 5 s"
    assert report.num_unended == 0


def test_deadlines_hold_while_machines_are_stopped() -> None:
    alone = PlanSet(primary=PLANS.primary)
    report = run(StallNode(at_s=0.3, device=B), plans=alone, deadline_s=0.5)
    late = [o for o in report.outcomes if o.error]
    assert late
    assert {o.error for o in late} <= {"deadline", "node-lost"}
    assert all(o.latency_s == pytest.approx(0.5) for o in late), "no sooner: b might go on in time"


def test_a_clock_that_goes_backwards_does_not_move_deadlines() -> None:
    alone = PlanSet(primary=PLANS.primary)
    script = (StallNode(at_s=0.3, device=B), *(BendClock(at_s=0.4, device=d, step_s=-3600.0) for d in (A, B)))
    report = run(*script, plans=alone, deadline_s=0.5)
    assert all(o.latency_s <= 0.501 for o in report.outcomes)
    assert report.num_unended == 0


def test_a_stopped_process_loses_its_time_and_nothing_else() -> None:
    # b computes 40 ms of each request; stopped for one second in the middle, with nobody else to do it.
    alone = PlanSet(primary=PLANS.primary)
    calm = run(plans=alone, requests=1, arrivals=ClosedLoop())
    held = run(
        StallNode(at_s=0.03, device=B), ResumeNode(at_s=1.03, device=B), plans=alone, requests=1, arrivals=ClosedLoop()
    )
    assert held.outcomes[0].latency_s == pytest.approx(calm.outcomes[0].latency_s + 1.0, abs=0.01)


def test_a_script_must_name_machines_of_the_cluster() -> None:
    with pytest.raises(EcotoneError, match="fault 1: unknown device 'moon'; devices are a, b, c"):
        run(KillNode(at_s=0.3, device=DeviceId("moon")))


# ---- a link, by hand -----------------------------------------------------------------------------------------------------

STEPS = LinkTrace(
    name="steps",
    points=(
        LinkPoint(time_s=0, bytes_per_s=100, latency_s=0.1),
        LinkPoint(time_s=1, bytes_per_s=0, latency_s=0.1),
        LinkPoint(time_s=3, bytes_per_s=10, latency_s=0.2),
    ),
    duration_s=4,
)


@pytest.mark.parametrize(
    ("size_bytes", "start_s", "expected_s"),
    [
        (50, 0.0, 0.5),
        (100, 0.0, 1.0),
        (105, 0.0, 3.5),  # 100 in the first second, none in two, the rest at 10 a second
        (5, 1.5, 3.5),
        (20, 3.0, 4.1),  # 10 until the end, then the trace begins again
        (110, 3.0, 5.0),
        (50, 8.5, 9.0),  # the third time round
    ],
)
def test_a_frame_waits_for_its_bytes_in_a_trace(size_bytes: int, start_s: float, expected_s: float) -> None:
    assert sent_at(STEPS, size_bytes, start_s) == pytest.approx(expected_s)


def test_a_trace_without_any_byte_carries_nothing() -> None:
    dead = LinkTrace(name="dead", points=(LinkPoint(time_s=0, bytes_per_s=0, latency_s=0.1),), duration_s=1)
    assert sent_at(dead, 1, 0.3) == float("inf")


def test_spoiled_frames_come_by_the_stated_shares() -> None:
    channel = Channel(0.01, 1e6)
    channel.faults = FrameFaults(drop=0.2, truncate=0.1, duplicate=0.25, late_s=0.5)
    channel.seed(1, 2)
    times = [channel.arrivals(1.0) for _ in range(4000)]
    lost = sum(not copies for copies in times) / 4000
    repeated = sum(len(copies) == 2 for copies in times) / 4000
    assert lost == pytest.approx(0.3, abs=0.03)
    assert repeated == pytest.approx(0.7 * 0.25, abs=0.03)
    assert all(1.01 <= t <= 1.51 for copies in times for t in copies)


def test_two_cuts_of_one_link_need_both_to_end() -> None:
    world = _world("abc")
    world.partition([NodeId("b")], 0.1)
    world.kill(NodeId("b"), 0.1)
    world.heal_all()
    assert world.channels[NodeId("a"), NodeId("b")].is_cut, "b is dead"
    world.restart(NodeId("b"), Node(NodeId("b"), 2))
    assert not world.channels[NodeId("a"), NodeId("b")].is_cut


def _world(names: str) -> World:
    machines = {NodeId(n): Machine(Node(NodeId(n), 1)) for n in names}
    return World(machines, cluster_of(names).links, lambda body, work: 0.001, lambda body: 1000, lambda e, t: None)


# ---- two coordinators ----------------------------------------------------------------------------------------------------


class TwoAskers:
    """a and b ask c, each with a plan of its own, epochs and request numbers alike."""

    def __init__(self, sessions: tuple[int, int]) -> None:
        self.graph = chain(1)
        self.ends: dict[str, list[tuple[int, str]]] = {"a": [], "b": []}
        self.deployed: dict[str, str] = {}
        links = {NodeId(n): LinkSettings() for n in "abc"}
        minds = {n: CoordinatorSettings(session=s) for n, s in zip("ab", sessions, strict=True)}
        machines = {NodeId(n): Machine(Node(NodeId(n), 1, links=links, coordinator=minds.get(n))) for n in ("a", "b", "c")}
        self.world = World(machines, cluster_of("abc").links, self.seconds, lambda body: 1000, lambda e, t: None)
        for name in "ab":
            self.world.programs[NodeId(name)] = lambda effect, now_s, name=name: self.took(name, effect)
        self.world.connect_all()

    def seconds(self, body: BodyId, work: str) -> float:
        return 0.01

    def took(self, name: str, effect: fx.Effect) -> None:
        match effect:
            case fx.Deliver(request=request):
                self.ends[name].append((request, "result"))
            case fx.RequestError(request=request, kind=kind):
                self.ends[name].append((request, kind.value))
            case fx.DeployEnded(error=error):
                self.deployed[name] = error

    def go(self) -> None:
        for name in "ab":
            plan = plan_of(self.graph, "c", source=name)
            self.world.event(NodeId(name), ev.DeployRequested(plan=plan))
            self.world.run(lambda: False, self.world.now_s + 0.5)
        for number in range(5):
            for name in "ab":
                self.world.event(NodeId(name), ev.Submit(request=number))
        self.world.run(lambda: False, self.world.now_s + 20)


def test_two_coordinators_share_a_machine_each_gets_its_own_results() -> None:
    both = TwoAskers((1, 2))
    both.go()
    for name in "ab":
        assert sorted(both.ends[name]) == [(n, "result") for n in range(5)]
    assert not both.world.violations


def test_two_coordinators_of_one_session_the_second_is_refused_by_name() -> None:
    both = TwoAskers((1, 1))
    both.go()
    assert both.deployed["a"] == ""
    assert "belongs to another asker" in both.deployed["b"]
    assert sorted(both.ends["a"]) == [(n, "result") for n in range(5)]
    assert {kind for _, kind in both.ends["b"]} == {"closed"}
