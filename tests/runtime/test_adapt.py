"""A policy beside a real session, in memory: what it decides is carried out, and the session outlives it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from small_nets import cluster, even, lines, plan

from ecotone.planset import PlanSet, Standby
from ecotone.protocol.controller import Decision, Expect, Planned, ProbeLink, Replan, Seen, Switch, Tick
from ecotone.protocol.effects import Observed
from ecotone.protocol.settings import WorkerSettings
from ecotone.runtime import Session, deploy, in_memory
from ecotone.runtime.adapt import Adaptive

pytestmark = pytest.mark.torch


class Scripted:
    """Answers each Tick with the next of `answers`; keeps what it saw."""

    name = "scripted"

    def __init__(self, *answers: Callable[[], Decision]) -> None:
        self.answers, self.seen = list(answers), list[Seen]()
        self.planned = threading.Event()
        self.observed = threading.Event()

    def handle(self, event: Seen, now_s: float) -> tuple[Decision, ...]:
        self.seen.append(event)
        if isinstance(event, Planned) and any(isinstance(e, Planned) for e in self.seen[:-1]):
            self.planned.set()
        if isinstance(event, Observed):
            self.observed.set()
        return (self.answers.pop(0)(),) if isinstance(event, Tick) and self.answers else ()

    def explanation(self) -> tuple[str, ...]:
        return ("because the script says so",)


def opened() -> tuple[Session, torch.Tensor, torch.Tensor]:
    """A session with two resident plans: over both devices, and on the first alone."""
    captured, x = lines()
    world = cluster("a", "b")
    plans = PlanSet(
        primary=even(captured.graph, "a", "b"),
        standbys=(Standby(plan=plan(captured.graph, ("a", captured.graph.num_blocks))),),
    )
    nodes = in_memory(world)
    session = deploy(plans, captured, nodes, worker=WorkerSettings(report_s=0.01))
    return session, x, session(x)


def closed(session: Session) -> None:
    session.close()
    session.nodes.close()


def test_switch_probe_and_expectation_are_carried_out() -> None:
    session, x, expected = opened()
    try:
        first, second = session.plans
        policy = Scripted(
            lambda: Switch(epoch=second.epoch, reason="script"),
            lambda: ProbeLink(peer="b", size_bytes=8192),  # type: ignore[arg-type]
            lambda: Expect(epoch=second.epoch, expected_s=0.01),
        )
        with Adaptive(session, policy, tick_s=0.0) as adaptive:
            assert session.submit((x,)).result(20) is not None
            adaptive.tick()
            future = session.submit((x,))
            assert torch.equal(future.result(20), expected)
            assert future.epoch == second.epoch
            adaptive.tick()
            adaptive.tick()
            assert policy.observed.wait(10)
            assert (adaptive.num_switches, adaptive.num_probes) == (1, 1)
            assert session.explain() == ["because the script says so"]
        assert session.explain() != ["because the script says so"]
        assert isinstance(policy.seen[0], Planned)
        assert {p.epoch for p in policy.seen[0].plans.plans} == {first.epoch, second.epoch}
    finally:
        closed(session)


def test_replan_is_planned_and_deployed_off_the_hot_path() -> None:
    session, x, expected = opened()
    try:
        captured = session.captured
        other = PlanSet(primary=plan(captured.graph, ("b", captured.graph.num_blocks)))
        asked = threading.Event()

        def planner(replan: Replan) -> PlanSet:
            assert asked.wait(10)  # requests end while the planner is at work
            return other

        policy = Scripted(lambda: Replan(now=session.nodes.cluster, profile=None, reason="script"))  # type: ignore[arg-type]
        with Adaptive(session, policy, plan=planner, tick_s=0.0) as adaptive:
            adaptive.tick()
            assert torch.equal(session.submit((x,)).result(20), expected)
            asked.set()
            assert policy.planned.wait(20)
            future = session.submit((x,))
            assert torch.equal(future.result(20), expected)
            assert session.plan.devices == ("b",)
    finally:
        closed(session)


def test_a_fault_of_the_policy_ends_the_adapting_only(capsys: pytest.CaptureFixture[str]) -> None:
    session, x, expected = opened()

    def fail() -> Decision:
        raise ValueError("out of ideas")

    try:
        adaptive = Adaptive(session, Scripted(fail), tick_s=0.0).start()
        adaptive.tick()
        end = time.monotonic() + 10
        while not adaptive.fault and time.monotonic() < end:
            pass
        assert "out of ideas" in adaptive.fault
        assert torch.equal(session.submit((x,)).result(20), expected)
        adaptive.stop()
        assert "out of ideas" in capsys.readouterr().err
    finally:
        closed(session)
