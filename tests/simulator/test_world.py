"""Whole deployments under random scripts: every accepted request ends once, and nothing is left anywhere afterwards."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import chain, cluster_of, plan_of

from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings
from ecotone.simulator.world import Machine, World

pytestmark = pytest.mark.pure

A = NodeId("a")
NAMES = [NodeId(n) for n in "abc"]


class Deployment:
    """Three nodes in a row, a plan over them with a ring (a, b, c, b), and a program that counts the ends."""

    def __init__(self, stages: str = "abcb", **bounds: int) -> None:
        self.graph = chain(len(stages))
        self.plan = plan_of(self.graph, stages)
        link = LinkSettings(chunk_bytes=50_000, window_bytes=100_000)
        mind = CoordinatorSettings(session=5, queue_limit=20, max_in_flight=4, ordered=True)
        machines = {
            n: Machine(
                Node(
                    n,
                    1,
                    links=dict.fromkeys(NAMES, link),
                    worker=WorkerSettings(queue_limit=1),
                    coordinator=mind if n == A else None,
                )
            )
            for n in NAMES
        }
        self.world = World(machines, cluster_of("abc", rate=1e7).links, self.seconds, lambda body: 70_000, self.took)
        self.faulty: set[tuple[int, int]] = set()  # (request, edge)
        self.world.fault_of = lambda body, work: "told to" if (body.request, body.edge) in self.faulty else ""
        self.ends: dict[int, list[str]] = {}
        self.accepted: set[int] = set()
        self.deployed: list[tuple[int, str]] = []
        self.is_closed = False
        self.world.connect_all()
        self.do(ev.DeployRequested(plan=self.plan))
        self.let_pass(1.0)
        assert self.deployed == [(0, "")]

    def seconds(self, body: BodyId, work: str) -> float:
        return 0.004 + 0.003 * ((body.request + body.edge) % 3) if work == "compute" else 0.001

    def took(self, effect: fx.Effect, now_s: float) -> None:
        match effect:
            case fx.Accepted(request=request):
                self.accepted.add(request)
            case fx.Deliver(request=request):
                self.ends.setdefault(request, []).append("result")
            case fx.RequestError(request=request, kind=kind):
                self.ends.setdefault(request, []).append(kind.value)
            case fx.DeployEnded(epoch=epoch, error=error):
                self.deployed.append((epoch, error))
            case fx.Closed():
                self.is_closed = True

    def do(self, event: ev.Event) -> None:
        self.world.event(A, event)

    def let_pass(self, seconds: float) -> None:
        until_s = self.world.now_s + seconds
        self.world.at(until_s, lambda: None)
        self.world.run(lambda: self.world.now_s >= until_s, until_s)

    def check_nothing_left(self) -> None:
        for name, machine in self.world.machines.items():
            node = machine.node
            assert not machine.tensors, f"{name} still holds tensors {machine.tensors}"
            assert not machine.bodies, f"{name} still holds bytes {machine.bodies}"
            assert node.held_bytes == 0
            assert node.worker.num_queued == 0
            assert not machine.timers, f"{name} still waits for {machine.timers}"


actions = st.lists(
    st.tuples(
        st.sampled_from(["submit"] * 5 + ["hurry", "cancel", "wait", "wait", "replan", "cut", "heal", "fail"]),
        st.integers(0, 9),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(actions)
def test_every_accepted_request_ends_once_and_nothing_stays_behind(script: list[tuple[str, int]]) -> None:
    one = Deployment()
    count = epoch = 0
    for action, n in script:
        if action in ("submit", "hurry"):
            one.do(ev.Submit(request=count, deadline_s=0.02 * n if action == "hurry" else None))
            count += 1
        elif action == "cancel" and count:
            one.do(ev.CancelRequest(request=n % count))
        elif action == "wait":
            one.let_pass(0.01 * n)
        elif action == "replan":
            epoch += 1
            one.do(ev.DeployRequested(plan=plan_of(one.graph, "abab" if n % 2 else "cbab", epoch=epoch)))
        elif action == "cut":
            one.world.cut(NAMES[n % 3], NAMES[(n + 1) % 3], 0.05)
        elif action == "heal":
            one.world.heal(NAMES[n % 3], NAMES[(n + 1) % 3])
        elif action == "fail" and count:
            one.faulty.add((n % count, n % 4))
    for i in range(3):
        if one.world.channels[NAMES[i], NAMES[(i + 1) % 3]].is_cut:
            one.world.heal(NAMES[i], NAMES[(i + 1) % 3])
    one.let_pass(60.0)
    assert set(one.ends) == set(range(count))
    assert all(len(ends) == 1 for ends in one.ends.values())
    one.do(ev.CloseRequested(drain=True))
    one.let_pass(10.0)
    assert one.is_closed
    one.check_nothing_left()


def test_a_draining_close_loses_no_accepted_request() -> None:
    one = Deployment()
    for request in range(15):
        one.do(ev.Submit(request=request))
    one.do(ev.CloseRequested(drain=True))
    one.do(ev.Submit(request=99))
    one.let_pass(10.0)
    assert {r: e for r, e in one.ends.items() if r != 99} == {r: ["result"] for r in range(15)}
    assert one.ends[99] == ["closed"]
    assert one.is_closed
    one.check_nothing_left()


def test_an_abrupt_close_ends_everything_by_name() -> None:
    one = Deployment()
    for request in range(10):
        one.do(ev.Submit(request=request))
    one.let_pass(0.03)
    one.do(ev.CloseRequested(drain=False))
    one.let_pass(10.0)
    assert one.is_closed
    assert set(one.ends) == set(range(10))
    assert {e for ends in one.ends.values() for e in ends} <= {"closed", "result"}
    one.check_nothing_left()


def test_asking_again_neither_runs_nor_answers_twice() -> None:
    one = Deployment()
    for _ in range(3):
        one.do(ev.Submit(request=1))
    one.let_pass(5.0)
    one.do(ev.Submit(request=1))
    one.let_pass(5.0)
    assert one.ends == {1: ["result"]}
