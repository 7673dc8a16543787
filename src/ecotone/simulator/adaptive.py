"""A policy at the asker of a simulation: the shell of protocol/controller.py on the virtual clock. Decides nothing.

What the asker's machine tells its program goes to the policy as it is; a Tick comes before each request and every `tick_s`.
Switch becomes the event Prefer, ProbeLink itself, and Replan a deployment of the planner's answer after `planning_s`. The
policy's clock is 0 at the first request, as is that of traces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ecotone.cluster import Cluster
from ecotone.graph import Graph
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.controller import (
    Decision,
    Expect,
    Keep,
    Planned,
    PlanningFailed,
    Policy,
    ProbeLink,
    Replan,
    Seen,
    Switch,
    Tick,
)
from ecotone.protocol.message import NodeId
from ecotone.simulator.program import Program
from ecotone.simulator.simulation import Report, Times, simulate
from ecotone.units import EcotoneError

__all__ = ["Adapted", "simulate_adaptive"]

Plan = Callable[[Replan], PlanSet]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """What came of it: the report, every decision but Keep with its time, and the explanation at the end."""

    report: Report
    decisions: tuple[tuple[float, Decision], ...]
    num_kept: int
    explanation: tuple[str, ...]

    @property
    def num_switches(self) -> int:
        return sum(isinstance(decision, Switch) for _, decision in self.decisions)


@dataclass(slots=True)
class _Shell:
    policy: Policy
    plan: Plan | None
    tick_s: float
    planning_s: float
    program: Program = field(init=False)
    times: Times = field(init=False)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)
    num_kept: int = 0
    wanted: PlanSet | None = None  # being deployed

    def attend(self, program: Program, times: Times) -> None:
        """The first set is resident: begin."""
        self.program, self.times = program, times
        program.on_effect, program.before_submit = self.took, self.tick
        self.see(Planned(plans=program.plans))
        program.world.at(program.world.now_s + self.tick_s, self.tick_again)

    @property
    def now_s(self) -> float:
        return self.program.world.now_s - self.program.world.origin_s

    def took(self, effect: fx.Effect, _: float) -> None:
        """In the middle of the machine's effects: the policy's answer must wait until all are carried out."""
        if isinstance(effect, fx.Observed | fx.LinkChanged | fx.Preferred | fx.Rerouted | fx.DeployEnded):
            self.program.world.at(self.program.world.now_s, self.see, effect)

    def tick(self) -> None:
        self.see(Tick())

    def tick_again(self) -> None:
        self.tick()
        if not self.program.is_done:
            self.program.world.at(self.program.world.now_s + self.tick_s, self.tick_again)

    def see(self, event: Seen) -> None:
        if isinstance(event, fx.DeployEnded) and self.wanted is not None and event.epoch == self.wanted.primary.epoch:
            event = PlanningFailed(reason=event.error) if event.error else Planned(plans=self.wanted)
            self.wanted = None
        for decision in self.policy.handle(event, self.now_s):
            self.carry_out(decision)

    def carry_out(self, decision: Decision) -> None:
        world, name = self.program.world, self.program.name
        if isinstance(decision, Keep):
            self.num_kept += 1
            return
        self.decisions.append((self.now_s, decision))
        match decision:
            case Switch(epoch=epoch):
                world.event(name, ev.Prefer(epoch=epoch))
            case Expect(epoch=epoch, expected_s=expected_s):
                world.event(name, ev.Expect(epoch=epoch, expected_s=expected_s))
            case ProbeLink(peer=peer, size_bytes=size_bytes):
                world.event(name, ev.ProbeLink(peer=NodeId(peer), size_bytes=size_bytes))
            case Replan():
                world.at(world.now_s + self.planning_s, self.planned, decision)

    def planned(self, asked: Replan) -> None:
        """The planner's answer is here: deploy it, unless it is what is resident."""
        try:
            if self.plan is None:
                raise EcotoneError("nobody plans here")
            found = self.plan(asked)
        except EcotoneError as error:
            self.see(PlanningFailed(reason=str(error)))
            return
        resident = {plan.identity() for plan in self.program.plans.plans}
        if {plan.identity() for plan in found.plans} == resident:
            self.see(PlanningFailed(reason="the same plans are best"))
            return
        newest = max(self.times.costs)
        self.wanted = found.with_epochs(newest + 1)
        self.times.add(*self.wanted.plans)
        self.program.expected_s.update({p.epoch: self.times.costs[p.epoch].longest_s for p in self.wanted.plans})
        self.program.deploy(self.wanted)


def simulate_adaptive(
    plans: PlanSet,
    policy: Policy,
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    *,
    plan: Plan | None = None,
    tick_s: float = 0.1,
    planning_s: float = 0.5,
    **simulated: Any,
) -> Adapted:
    """`simulate` of `plans` under `policy`; `plan` answers Replan after `planning_s`. Further arguments: see simulate."""
    shell = _Shell(policy, plan, tick_s, planning_s)
    report = simulate(plans, graph, cluster, profile, attend=shell.attend, **simulated)
    return Adapted(
        report=report, decisions=tuple(shell.decisions), num_kept=shell.num_kept, explanation=tuple(policy.explanation())
    )
