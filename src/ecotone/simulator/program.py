"""The program at the asker: submits requests, keeps their journal, notes every end. It outlives the asker's process.

Its durable state is the journal (requests whose Record was done, and those whose end it noted) and its own list of what to
ask for. When the asker restarts it deploys the plans again under a new session and submits what is unanswered: under the
same numbers, with the rest of their time, and `is_recorded` for what the journal holds. It counts ends over all of its
processes, so a request that is answered before and after a restart shows as two ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ecotone.plan import Plan
from ecotone.planset import PlanSet
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.node import Node
from ecotone.simulator.faults import Fault, KillNode, Replan, RestartNode, inflict
from ecotone.simulator.world import World

__all__ = ["Ask", "End", "Loads", "Program", "as_set", "deploy_event", "with_epochs_from"]

Loads = tuple[tuple[NodeId, float], ...]
"""Shares of nodes' processors that requests at their declared rate take."""
MakeNode = Callable[[NodeId, int, int], Node]
"""A new process: name, incarnation, session (of the asker's coordinator)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request that the program makes `at_s` after its start; None: as soon as an earlier one ends (a closed loop)."""

    at_s: float | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a request ended, in world time; `error` is an ErrorKind value, or "" with a result of plan `epoch`.

    `exit`: at which it left, "" where it went to the end.
    """

    at_s: float
    error: str = ""
    epoch: int = -1
    reason: str = ""
    exit: str = ""


@dataclass(slots=True)
class Program:
    """`asks` in order; `in_flight` bounds a closed loop. `plans` are deployed first, and again after a restart.

    `expected_s` predicts a plan's latency, `loads` declares shares of processors, by epoch. Times here are the world's.
    """

    name: NodeId
    asks: Sequence[Ask]
    plans: PlanSet
    make: MakeNode
    in_flight: int = 1
    expected_s: dict[int, float] = field(default_factory=dict)
    loads: dict[int, Loads] = field(default_factory=dict)
    world: World = field(init=False)
    session: int = 1
    incarnation: int = 1  # the newest process of any node
    is_up: bool = True
    is_deployed: bool = False
    is_serving: bool = False  # this process has a plan in force: new requests are made
    error: str = ""  # why the first deployment failed
    submitted_s: dict[int, float] = field(default_factory=dict)
    accepted_s: dict[int, float] = field(default_factory=dict)
    journal: set[int] = field(default_factory=set)
    ends: dict[int, list[End]] = field(default_factory=dict)
    rerouted: list[tuple[float, fx.Rerouted]] = field(default_factory=list)
    preferred: list[tuple[float, fx.Preferred]] = field(default_factory=list)
    deployed: list[tuple[float, fx.DeployEnded]] = field(default_factory=list)
    on_effect: Callable[[fx.Effect, float], None] | None = None
    before_submit: Callable[[], None] | None = None
    known: dict[int, Plan] = field(default_factory=dict)  # every plan that was ever deployed, by epoch
    is_closed: bool = False
    is_over: bool = False  # the rest of the script does not happen
    _due: list[int] = field(default_factory=list)  # to be asked for once there is a plan in force
    _loop: deque[int] = field(default_factory=deque)  # of the closed loop, not yet asked for

    @property
    def is_done(self) -> bool:
        return len(self.ends) == len(self.asks)

    def begin(self) -> None:
        """Start asking: time 0 of the asks is now."""
        origin_s = self.world.origin_s = self.world.now_s
        for number, ask in enumerate(self.asks):
            if ask.at_s is None:
                self._loop.append(number)
            else:
                self.world.at(origin_s + ask.at_s, self._ask, number)
        for _ in range(min(self.in_flight, len(self._loop))):
            self.world.at(origin_s, self._ask, self._loop.popleft())

    def stop(self) -> None:
        """Ask for nothing more in the closed loop."""
        self._loop.clear()

    def deploy(self, plans: PlanSet) -> None:
        """Bring a set of plans into force."""
        self.plans = plans
        self.known |= {plan.epoch: plan for plan in plans.plans}
        self.world.event(self.name, deploy_event(plans, self.expected_s, self.loads))

    def inflict(self, fault: Fault) -> None:
        """Let a fault of the script happen now."""
        if self.is_over:
            return
        match fault:
            case KillNode(device=device, detect_s=detect_s):
                if NodeId(device) == self.name:
                    self.is_up = self.is_serving = False
                if self.world.machines[NodeId(device)].is_alive:
                    self.world.kill(NodeId(device), detect_s)
            case RestartNode(device=device):
                self._restart(NodeId(device))
            case Replan(plan=plan):
                if self.is_up:
                    self.world.do(self.name, self.deploy, as_set(plan))
            case _:
                inflict(self.world, fault, self.name)

    def _restart(self, name: NodeId) -> None:
        if self.world.machines[name].is_alive:
            return
        self.incarnation += 1
        if name != self.name:
            self.world.restart(name, self.make(name, self.incarnation, 0))
            return
        self.session += 1
        self.world.restart(name, self.make(name, self.incarnation, self.session))
        self.is_up, self.is_serving = True, False
        self.deploy(self.plans)
        unended = [number for number in sorted(self.submitted_s) if number not in self.ends]
        self._due = [number for number in unended if number not in self.journal] + self._due
        for number in unended:
            if number in self.journal:
                self._submit(number)

    def _serve(self) -> None:
        self.is_serving = True
        due, self._due = self._due, []
        for number in due:
            self.world.at(self.world.now_s, self._ask, number)

    def _ask(self, number: int) -> None:
        if self.is_serving:
            self.world.do(self.name, self._submit, number)
        else:
            self._due.append(number)

    def _submit(self, number: int) -> None:
        if self.before_submit is not None:
            self.before_submit()
        now_s, deadline_s = self.world.now_s, self.asks[number].deadline_s
        first_s = self.submitted_s.setdefault(number, now_s)
        left_s = None if deadline_s is None else max(0.0, first_s + deadline_s - now_s)
        self.world.event(self.name, ev.Submit(request=number, deadline_s=left_s, is_recorded=number in self.journal))

    def took(self, effect: fx.Effect, now_s: float) -> None:
        """What the asker's machine tells its program."""
        match effect:
            case fx.Record(request=request):
                self.journal.add(request)
            case fx.Accepted(request=request):
                self.accepted_s.setdefault(request, now_s)
            case fx.Deliver(request=request, body=body):
                self.world.span(now_s, self.name, body._replace(request=request), "result")
                self._end(request, End(at_s=now_s, epoch=body.epoch, exit=self.known[body.epoch].exit_at(body.edge)))
            case fx.RequestError(request=request, kind=kind, reason=reason):
                self.world.span(now_s, self.name, BodyId(self.session, 0, 0, request), "error")
                self._end(request, End(at_s=now_s, error=kind.value, reason=reason))
            case fx.Rerouted():
                self.rerouted.append((now_s, effect))
            case fx.Preferred():
                self.preferred.append((now_s, effect))
            case fx.DeployEnded(epoch=epoch, error=error):
                self.deployed.append((now_s, effect))
                if not error and not self.is_serving:
                    self._serve()
                if epoch == self.plans.primary.epoch:
                    self.error = self.error or ("" if self.is_deployed else error)
                    self.is_deployed = True
            case fx.Closed():
                self.is_closed = True
        if self.on_effect is not None:
            self.on_effect(effect, now_s)

    def _end(self, number: int, end: End) -> None:
        self.ends.setdefault(number, []).append(end)
        if len(self.ends[number]) == 1 and self._loop and self.asks[number].at_s is None:
            self.world.at(self.world.now_s, self._ask, self._loop.popleft())


def as_set(plan: Plan | PlanSet) -> PlanSet:
    """A plan alone is a set without standbys."""
    return plan if isinstance(plan, PlanSet) else PlanSet(primary=plan)


def deploy_event(
    plans: PlanSet, expected_s: Mapping[int, float], loads: Mapping[int, Loads] | None = None
) -> ev.DeployRequested:
    """The event that asks for a set, epochs as they are."""
    known, primary = loads or {}, plans.primary
    standbys = tuple(
        ev.Resident(
            plan=s.plan, is_active=s.mode == "active", expected_s=expected_s.get(s.plan.epoch, 0.0),
            loads=known.get(s.plan.epoch, ()),
        )
        for s in plans.standbys
    )  # fmt: skip
    return ev.DeployRequested(
        plan=primary, standbys=standbys, expected_s=expected_s.get(primary.epoch, 0.0), loads=known.get(primary.epoch, ())
    )


def with_epochs_from(plans: PlanSet, first: int) -> PlanSet:
    """The set as it is where its epochs ascend from `first` on, else with new ones."""
    epochs = [plan.epoch for plan in plans.plans]
    ascending = all(a < b for a, b in pairwise(epochs)) and epochs[0] >= first
    return plans if ascending else plans.with_epochs(first)
