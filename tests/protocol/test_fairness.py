"""Shares of a node among sessions: the claim of fairness.py on random turns, two askers at one node, and who is let in."""

from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import A, B, C, plan

from ecotone.cluster import DeviceId, Link
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.fairness import Shares
from ecotone.protocol.message import BodyId, Deploy, NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, WorkerSettings
from ecotone.simulator.world import Machine, World

pytestmark = pytest.mark.pure


def deploy(session: int, epoch: int = 0, weight: float = 1.0, load: float = 0.0) -> Deploy:
    return Deploy(session=session, epoch=epoch, plan_json="", weight=weight, load=load)


def let_in(weights: list[float]) -> tuple[Shares, dict[tuple[int, int], str]]:
    shares, epochs = Shares(), {}
    for session, weight in enumerate(weights):
        assert shares.admit(deploy(session, weight=weight), epochs) == ""
        epochs[session, 0] = f"plan of {session}"
    return shares, epochs


def take_turn(shares: Shares, epochs: dict[tuple[int, int], str], has_work: set[int], seconds: float) -> int:
    session = next(s for (s, _), _ in shares.order("processor", epochs) if s in has_work)
    shares.picked("processor", session)
    shares.charge("processor", session, seconds)
    return session


TURNS = st.lists(st.tuples(st.floats(0.001, 1.0), st.sets(st.integers(0, 3))), min_size=1, max_size=120)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), TURNS, TURNS, st.data())
def test_whoever_has_work_gets_its_share_to_within_a_turn_each(
    weights: list[float], before: list[tuple[float, set[int]]], turns: list[tuple[float, set[int]]], data: st.DataObject
) -> None:
    """After any history, over any interval in which some sessions always have work, for every two of them."""
    shares, epochs = let_in(weights)
    everyone = set(range(len(weights)))
    busy = data.draw(st.sets(st.sampled_from(sorted(everyone)), min_size=1))
    longest = dict.fromkeys(everyone, 0.0)
    for seconds, idle in before:
        has_work = everyone - idle
        if has_work:
            session = take_turn(shares, epochs, has_work, seconds)
            longest[session] = max(longest[session], seconds)
    used = dict.fromkeys(everyone, 0.0)
    for seconds, idle in turns:
        session = take_turn(shares, epochs, (everyone - idle) | busy, seconds)
        longest[session], used[session] = max(longest[session], seconds), used[session] + seconds
        for i, j in combinations(sorted(busy), 2):
            apart = abs(used[i] / weights[i] - used[j] / weights[j])
            assert apart <= longest[i] / weights[i] + longest[j] / weights[j] + 1e-9


def test_time_that_was_not_used_is_not_saved_up() -> None:
    shares, epochs = let_in([1.0, 1.0])
    for _ in range(100):
        assert take_turn(shares, epochs, {0}, 1.0) == 0
    turns = [take_turn(shares, epochs, {0, 1}, 1.0) for _ in range(10)]
    assert turns.count(0) == turns.count(1) == 5


def test_a_session_that_comes_late_does_not_push_the_others_aside() -> None:
    shares, epochs = let_in([1.0])
    for _ in range(100):
        take_turn(shares, epochs, {0}, 1.0)
    assert shares.admit(deploy(1), epochs) == ""
    epochs[1, 0] = "late"
    turns = [take_turn(shares, epochs, {0, 1}, 1.0) for _ in range(10)]
    assert turns.count(0) in (4, 5, 6)


def test_weights_are_shares_and_nobody_starves() -> None:
    shares, epochs = let_in([8.0, 1.0])
    turns = [take_turn(shares, epochs, {0, 1}, 0.01) for _ in range(90)]
    assert (turns.count(0), turns.count(1)) == (80, 10)
    served = [i for i, session in enumerate(turns) if session == 1]
    assert max(b - a for a, b in pairwise(served)) <= 9


def test_one_session_is_served_in_the_order_of_its_plans() -> None:
    shares = Shares()
    epochs = {}
    for epoch in (3, 5, 4):
        shares.admit(deploy(7, epoch), epochs)
        epochs[7, epoch] = str(epoch)
        shares.charge("processor", 7, 1.0)
    assert [key for key, _ in shares.order("processor", epochs)] == [(7, 3), (7, 5), (7, 4)]


# ---- admission -------------------------------------------------------------------------------------------------------


def test_loads_that_do_not_fit_are_refused_with_the_figures() -> None:
    shares, epochs = Shares(max_load=0.9), {}
    assert shares.admit(deploy(1, 0, load=0.5), epochs) == ""
    epochs[1, 0] = "a"
    reason = shares.admit(deploy(2, 0, load=0.45), epochs)
    assert reason == (
        "would be at 95%, 45% by this session, and promises at most 90%; ask for a lower rate or plan without it"
    )
    assert shares.admit(deploy(2, 0, load=0.4), epochs) == ""
    epochs[2, 0] = "b"
    assert shares.admit(deploy(1, 1, load=0.5), epochs) == ""  # another plan of a session replaces the former
    epochs[1, 1] = "a again"
    assert shares.admit(deploy(3, 0), epochs) == "", "what is not declared is not counted"
    del epochs[2, 0]
    assert shares.admit(deploy(4, 0, load=0.4), epochs) == "", "what has gone makes room"


def test_so_many_sessions_and_no_more() -> None:
    shares, epochs = Shares(max_sessions=2), {}
    for session in (1, 2):
        assert shares.admit(deploy(session), epochs) == ""
        epochs[session, 0] = ""
    assert shares.admit(deploy(3), epochs).startswith("serves 2 sessions already, at most 2")
    assert shares.admit(deploy(2, 1), epochs) == ""


@pytest.mark.parametrize(("weight", "load"), [(0.0, 0.0), (-1.0, 0.0), (1e9, 0.0), (1.0, -0.1)])
def test_shares_that_make_no_sense_are_refused(weight: float, load: float) -> None:
    assert "must be above zero" in Shares().admit(deploy(1, weight=weight, load=load), {})


# ---- two askers and a node -------------------------------------------------------------------------------------------


class TwoAskers:
    """Nodes a and b ask, c computes: `seconds` of each asker's stage there, by session."""

    def __init__(self, weights: dict[int, float], seconds: dict[int, float], **worker: float) -> None:
        self.ends: dict[int, list[float]] = {1: [], 2: []}
        self.deployed: dict[int, str] = {}
        self.seconds = seconds
        machines = {C: Machine(Node(C, 1, worker=WorkerSettings(**worker)))}  # type: ignore[arg-type]
        for name, session in ((A, 1), (B, 2)):
            mind = CoordinatorSettings(session=session, queue_limit=1000, max_in_flight=8, weight=weights[session])
            machines[name] = Machine(Node(name, 1, coordinator=mind))
        links = tuple(
            Link(source=DeviceId(x), target=DeviceId(y), latency_s=1e-4, bandwidth_bytes_per_s=1e8)
            for x in "abc" for y in "abc" if x != y
        )  # fmt: skip
        self.world = World(machines, links, self._timing, lambda body: 1000, self._told(1))
        self.world.programs[B] = self._told(2)
        self.world.connect_all()

    def _timing(self, body: BodyId, work: str) -> float:
        return self.seconds[body.session] if work == "compute" else 1e-5

    def _told(self, session: int):
        def took(effect: fx.Effect, now_s: float) -> None:
            if isinstance(effect, fx.Deliver):
                self.ends[session].append(now_s)
            elif isinstance(effect, fx.DeployEnded):
                self.deployed[session] = effect.error

        return took

    def deploy(self, name: NodeId, load: float = 0.0) -> None:
        own = plan("c", 0)
        ends = tuple(
            dataclasses.replace(t, **{k: DeviceId(name) for k in ("source", "target") if getattr(t, k) == "a"})
            for t in own.transfers
        )
        own = dataclasses.replace(own, transfers=ends)
        self.world.event(name, ev.DeployRequested(plan=own, loads=((C, load),)))
        self.world.run(lambda: len(self.deployed) == 2, self.world.now_s + 1.0)

    def flood(self, num: int, until_s: float) -> None:
        for number in range(1, num + 1):
            for name in (A, B):
                self.world.event(name, ev.Submit(request=number))
        self.world.run(lambda: False, self.world.now_s + until_s)


@pytest.mark.parametrize(
    ("weights", "seconds"),
    [
        ({1: 1.0, 2: 1.0}, {1: 0.010, 2: 0.010}),
        ({1: 3.0, 2: 1.0}, {1: 0.010, 2: 0.010}),
        ({1: 1.0, 2: 1.0}, {1: 0.002, 2: 0.020}),
    ],
)
def test_two_askers_get_seconds_of_a_node_by_weight(weights: dict[int, float], seconds: dict[int, float]) -> None:
    """Both flood it: over 1 s the seconds that each got are as the weights, to within the turns that the claim allows."""
    two = TwoAskers(weights, seconds)
    two.deploy(A)
    two.deploy(B)
    assert two.deployed == {1: "", 2: ""}
    start_s = two.world.now_s
    two.flood(600, 1.0)
    used = {s: seconds[s] * sum(t - start_s <= 0.9 for t in two.ends[s]) for s in (1, 2)}
    apart = abs(used[1] / weights[1] - used[2] / weights[2])
    slack = 2 * sum(seconds[s] / weights[s] for s in (1, 2))  # results still on their way at the two ends of the window
    assert used[1] > 0 < used[2]
    assert apart <= slack


def test_a_node_that_promised_enough_refuses_the_second_asker() -> None:
    two = TwoAskers({1: 1.0, 2: 1.0}, {1: 0.01, 2: 0.01}, max_load=0.8)
    two.deploy(A, load=0.5)
    two.deploy(B, load=0.5)
    assert two.deployed[1] == ""
    assert two.deployed[2].startswith("c: would be at 100%, 50% by this session, and promises at most 80%")
