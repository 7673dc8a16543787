"""Plans and plan sets as dataflow: what the checker says of them, and that running worlds never exceed a printed bound."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.cluster import DeviceId, Link
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planset import PlanSet, Standby
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.actors import fan_in_dataflow, plan_dataflow, require_sound
from ecotone.protocol.dataflow import DataflowReport, UnsoundPlan, check
from ecotone.protocol.message import BodyId, NodeId, attempt_of, request_of
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings
from ecotone.simulator.world import Machine, World

pytestmark = pytest.mark.pure

A = NodeId("a")
RAW_BYTES, BODY_BYTES = 100_000, 70_000
LINK = LinkSettings(chunk_bytes=50_000, window_bytes=150_000, bytes_per_s=1e7)  # room for two bodies and a part
KEPT_ATTEMPT = (1 << 22) - 1


def plan_of(text: str, epoch: int = 0) -> Plan:
    """One stage a letter, from a and back to a; "!" behind a letter: an exit at its end."""
    letters = re.findall(r"(\w)(!?)", text)
    leaving = [i for i, (_, mark) in enumerate(letters) if mark]
    ends = [DeviceId(n) for n in ("a", *(device for device, _ in letters), "a")]
    transfers = tuple(
        Transfer(source=x, target=y, position=i, codec=LOCAL if x == y else "fp32")
        for i, (x, y) in enumerate(pairwise(ends))
    )
    stages = tuple(
        Stage(device=d, start=i, stop=i + 1, exit=f"e{i}" if i in leaving else "") for i, d in enumerate(ends[1:-1])
    )
    exits = tuple(
        Transfer(source=d, target=ends[0], position=len(stages), codec=LOCAL if d == ends[0] else "fp32")
        for d in (ends[1 + i] for i in leaving)
    )
    return Plan(graph_hash="0", stages=stages, transfers=transfers, epoch=epoch, exit_transfers=exits)


def sizes(plan: Plan, edge: int) -> tuple[int, int]:
    return RAW_BYTES, BODY_BYTES


class Measured:
    """A world in which everything that a shell holds is counted after every event, by channel of the dataflow graph."""

    def __init__(
        self, plan_set: PlanSet, *, queue_limit: int, in_flight: int, slow: str = "", leave: tuple[int, ...] = ()
    ) -> None:
        self.plan_set, self.slow = plan_set, slow
        self.plans = dict(zip([p.epoch for p in plan_set.plans], plan_set.plans, strict=True))
        labels = ["primary: ", *(f"{s.label}: " for s in plan_set.standbys)] if plan_set.standbys else [""]
        self.signs = dict(zip(self.plans, labels, strict=True))
        mind = CoordinatorSettings(session=5, queue_limit=30, max_in_flight=in_flight)
        worker = WorkerSettings(queue_limit=queue_limit)
        self.report = require_sound(plan_set, worker=worker, link=LINK, coordinator=mind, sizes=sizes)
        names = [NodeId(d) for d in plan_set.devices]
        machines = {
            n: Machine(Node(n, 1, links=dict.fromkeys(names, LINK), worker=worker, coordinator=mind if n == A else None))
            for n in names
        }
        links = tuple(
            Link(source=DeviceId(x), target=DeviceId(y), latency_s=1e-3, bandwidth_bytes_per_s=1e7)
            for x in names
            for y in names
            if x != y
        )
        self.world = World(machines, links, self.seconds, lambda body: BODY_BYTES, self.took)
        self.leave = leave
        self.world.exit_of = self.exit_of
        self.peaks: Counter[str] = Counter()
        self.ended: Counter[int] = Counter()
        self.world.connect_all()
        standbys = tuple(ev.Resident(plan=s.plan, is_active=s.mode == "active") for s in plan_set.standbys)
        self.world.event(A, ev.DeployRequested(plan=plan_set.primary, standbys=standbys))
        self.let_pass(1.0)

    def seconds(self, body: BodyId, work: str) -> float:
        device = self.plans[body.epoch].stages[body.edge].device if work == "compute" else ""
        return (0.03 if device == self.slow else 0.004) if work == "compute" else 0.002

    def exit_of(self, body: BodyId) -> int | None:
        """Request r leaves at the first exit from stage `leave[r % len(leave)]` on."""
        at = self.leave[request_of(body.request) % len(self.leave)] if self.leave else 99
        return self.plans[body.epoch].exit_edge(body.edge) if body.edge >= at else None

    def took(self, effect: fx.Effect, now_s: float) -> None:
        if isinstance(effect, fx.Deliver | fx.RequestError):
            self.ended[effect.request] += 1

    def let_pass(self, seconds: float) -> None:
        until_s = self.world.now_s + seconds
        self.world.at(until_s, lambda: None)
        self.world.run(lambda: self.count() or self.world.now_s >= until_s, until_s)

    def held(self) -> Iterator[str]:
        """The channel of everything that a shell holds; what lies before the acknowledgement is in either of two."""
        for name, machine in self.world.machines.items():
            for body in machine.tensors:
                sign, plan = self.signs[body.epoch], self.plans[body.epoch]
                transfer = plan.edges[body.edge]
                if attempt_of(body.request) == KEPT_ATTEMPT:
                    yield f"{sign}kept boundary {body.edge}"
                elif transfer.target != name:
                    yield f"{sign}to encode {body.edge}"
                else:
                    yield "results" if body.edge >= len(plan.stages) else f"{sign}inputs {body.edge}"
            for body in machine.bodies:
                is_here = self.plans[body.epoch].edges[body.edge].target == name
                what = "under way or arrived" if is_here else "encoded or not acknowledged"
                yield f"{self.signs[body.epoch]}{what} {body.edge}"

    def count(self) -> bool:
        for channel, number in Counter(self.held()).items():
            self.peaks[channel] = max(self.peaks[channel], number)
        return False

    def bound(self, channel: str) -> int:
        if channel == "results":  # of whichever plan, before and after the merge
            found = [b.tokens for b in self.report.bounds if "results" in b.channel or b.channel == "held for order"]
            return max(found)
        if "encoded or not acknowledged" in channel:
            parts = ("encoded", "not acknowledged")
            return sum(self.report.bound(channel.replace("encoded or not acknowledged", p)).tokens for p in parts)
        return self.report.bound(channel).tokens

    def check(self) -> None:
        over = {c: (n, self.bound(c)) for c, n in self.peaks.items() if n > self.bound(c)}
        assert not over, over


whole_plans = ["b", "bb", "abcb", "bab", "ab", "abc", "cb", "aab"]
plans = st.sampled_from([*whole_plans, "b!b", "b!c!b", "b!cb", "a!bc", "ab!c", "a!b!c!b", "aa!b", "b!a!c"])
leaving = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=80, deadline=None)
@given(plans, st.integers(1, 3), st.integers(1, 6), st.sampled_from("abc"), leaving)
def test_no_queue_of_a_running_plan_exceeds_its_bound(
    devices: str, queue_limit: int, in_flight: int, slow: str, leave: tuple[int, ...]
) -> None:
    plan_set = PlanSet(primary=plan_of(devices))
    one = Measured(plan_set, queue_limit=queue_limit, in_flight=in_flight, slow=slow, leave=leave)
    for request in range(25):
        one.world.event(A, ev.Submit(request=request))
    one.let_pass(60.0)
    assert one.ended == Counter(dict.fromkeys(range(25), 1))
    one.check()


def test_bounds_are_reached_so_they_are_not_idle_talk() -> None:
    # The tail is slow: everything before it fills up, each queue to its bound (and the merge of results stays empty).
    one = Measured(PlanSet(primary=plan_of("abc")), queue_limit=1, in_flight=20, slow="c")
    for request in range(25):
        one.world.event(A, ev.Submit(request=request))
    one.let_pass(60.0)
    whole = ("inputs 1", "inputs 2", "under way or arrived 1", "under way or arrived 2")
    assert {c: one.peaks[c] for c in whole} == {c: one.bound(c) for c in whole}
    for channel in ("to encode 1", "to encode 2"):  # a place more is for work on a run that has ended; none has
        assert one.peaks[channel] == one.bound(channel) - 1


def sets() -> st.SearchStrategy[PlanSet]:
    others = st.lists(
        st.tuples(
            st.sampled_from(["a", "aa", "aaaa", "abbb", "abcb", "cccc", "acca", "a!bcb", "a!ccb!b", "a!a", "ab!bb"]),
            st.sampled_from(["passive", "active"]),
        ),
        min_size=1,
        max_size=3,
        unique_by=lambda pair: pair[0],
    )

    def make(pairs: list[tuple[str, str]], primary: str) -> PlanSet:
        standbys = [
            Standby(plan=plan_of(devices, epoch=i + 1), mode="active" if mode == "active" else "passive", label=f"other {i}")
            for i, (devices, mode) in enumerate(pairs)
        ]
        return PlanSet(primary=plan_of(primary), standbys=tuple(standbys))

    return st.builds(make, others, st.sampled_from(["abbc", "a!bbc", "a!bb!c", "a!b!b!c"]))


@settings(max_examples=100, deadline=None)
@given(
    sets(),
    st.integers(1, 2),
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from("bc"), st.integers(0, 20)), max_size=3),
    leaving,
)
def test_no_queue_of_a_set_exceeds_its_bound_while_nodes_die_and_return(
    plan_set: PlanSet, queue_limit: int, in_flight: int, deaths: list[tuple[str, int]], leave: tuple[int, ...]
) -> None:
    one = Measured(plan_set, queue_limit=queue_limit, in_flight=in_flight, leave=leave)
    for request in range(20):
        one.world.event(A, ev.Submit(request=request))
    for number, (victim, wait) in enumerate(deaths):
        name = NodeId(victim)
        if name not in one.world.machines:
            continue
        one.let_pass(0.01 * wait)
        one.world.kill(name, 0.02)
        one.let_pass(0.01 * wait)
        links = dict.fromkeys(one.world.machines, LINK)
        one.world.restart(name, Node(name, number + 2, links=links, worker=WorkerSettings(queue_limit=queue_limit)))
    one.let_pass(60.0)
    assert one.ended == Counter(dict.fromkeys(range(20), 1))
    one.check()


# ---- what the checker says of plans ------------------------------------------------------------------------------------


def tokens(report: DataflowReport) -> dict[str, int]:
    return {b.channel: b.tokens for b in report.bounds}


def test_bounds_of_a_plan_follow_from_its_limits() -> None:
    mind = CoordinatorSettings(session=0, queue_limit=9, max_in_flight=20)
    report = require_sound(plan_of("ab"), worker=WorkerSettings(queue_limit=2), link=LINK, coordinator=mind, sizes=sizes)
    found = tokens(report)
    assert found["waiting requests"] == 9
    assert found["inputs kept"] == 9 + 20  # waiting, and in flight
    assert found["inputs 0"] == 20 + 1  # the window alone, and a stage at work on a run that has ended
    assert found["to encode 1"] == 2 + 1  # slots, and one in work of an ended run
    assert found["encoded 1"] == 2
    assert found["under way or arrived 1"] == 3  # two whole ones and a part of the next
    assert found["inputs 1"] == 2 + 1  # waiting, and being computed
    assert found["results"] == found["held for order"] == 20
    assert report.bound("under way or arrived 1").size_bytes == 150_000  # that is the credit
    # At b: 3 inputs, 3 outputs to encode, 2 encoded, 150 kB arrived and 150 kB not acknowledged.
    assert report.bytes_by_place["b"] == 3 * RAW_BYTES + 3 * RAW_BYTES + 2 * BODY_BYTES + 2 * 150_000


def test_every_failure_that_leaves_a_plan_is_a_setting() -> None:
    plan_set = PlanSet(
        primary=plan_of("abc"),
        standbys=(
            Standby(plan=plan_of("abb", 1), label="without c"),
            Standby(plan=plan_of("aaa", 2), label="local"),
            Standby(plan=plan_of("add", 3), mode="active", label="twin"),
        ),
    )
    (subgraph,) = plan_dataflow(plan_set).subgraphs
    on = {s.name: {name.split(":")[0] for name, rate in s.rates if rate} for s in subgraph.settings}
    assert on["all nodes answer"] == {"primary", "twin"}
    assert on["b lost"] == {"local", "twin"}
    assert on["c lost"] == {"without c", "twin"}
    assert on["d lost"] == {"primary"}
    assert on["b, d lost"] == {"local"}
    assert check(plan_dataflow(plan_set)).is_sound


def test_every_way_to_leave_is_a_setting_and_all_of_them_are_sound() -> None:
    (subgraph,) = plan_dataflow(plan_of("b!c!b")).subgraphs
    on = {
        s.name: {name for name, rate in s.rates if rate and name.startswith(("inputs", "results"))}
        for s in subgraph.settings
    }
    assert on == {
        "all nodes answer": {"inputs 0", "inputs 1", "inputs 2", "results"},
        "all nodes answer, leaves after stage 0": {"inputs 0", "results 4"},
        "all nodes answer, leaves after stage 1": {"inputs 0", "inputs 1", "results 5"},
    }  # fmt: skip
    twins = (
        Standby(plan=plan_of("a!cb", 1), mode="active", label="twin"),
        Standby(plan=plan_of("a!aa", 2), label="local"),
    )
    graph = plan_dataflow(PlanSet(primary=plan_of("a!b!c"), standbys=twins))
    ways = [s.name for s in graph.subgraphs[0].settings]
    assert sum(name.startswith("all nodes answer") for name in ways) == 3 * 2  # where each of the two may be left
    assert check(graph).is_sound


def test_a_queue_without_room_is_refused_by_the_name_of_the_loop() -> None:
    with pytest.raises(UnsoundPlan, match=r"deadlock: loop link 1, a>b -> encode 1 on a -> stage 0 on a.*slots 1"):
        require_sound(plan_of("abcb"), worker=WorkerSettings(queue_limit=0))
    with pytest.raises(UnsoundPlan, match=r"deadlock.*window"):
        require_sound(plan_of("a"), coordinator=CoordinatorSettings(session=0, max_in_flight=0))


def test_a_fan_in_with_missing_branches_is_sound_and_bounded_by_its_open_frames() -> None:
    report = check(fan_in_dataflow(4, max_open=6, least_present=1, token_bytes=1000))
    assert report.is_sound, report
    assert report.num_settings == 2**4 - 1
    assert set(tokens(report).values()) == {6}
    assert sum(b.size_bytes for b in report.bounds) == 4 * 6 * 1000
