"""The box of contenders: every policy with the plans that it needs resident, behind one verb, `contender(name, ...)`.

    device_only, server_only_raw, server_only_jpeg, fixed_cut, best_fixed_cut     one plan for ever (planner/baselines.py)
    neurosurgeon       every `period_s` the best single cut in float32 at the latest measured rate (ASPLOS 2017)
    dynamic_split      before each request the best natural bottleneck at the mean of the last ten rates (arXiv:2205.11269)
    oracle             knows the trace: before each request the plan that ends first; among the plans of ecotone
    ecotone            protocol/controller.py over planner/candidates.py
    deadline           before each request the most accurate plan that will be in time, by the controller's eyes
    learned            a trained policy among the plans of its file; both need to know the deadline

All run in the same runtime and simulator (see controller.Policy), so all that keep several plans also get its failover. The
best static plan in hindsight is no policy: measure each of `statics` and take the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.linktrace import LinkTrace
from ecotone.plan import Plan
from ecotone.planner.baselines import place
from ecotone.planner.candidates import candidates
from ecotone.planner.objective import Asked, Latency, PlannerError, Requirement
from ecotone.planset import PlanSet, Standby
from ecotone.policies.deadline import DeadlinePolicy
from ecotone.policies.oracle import Oracle
from ecotone.policies.rates import Prices, Rates
from ecotone.profile import Profile
from ecotone.protocol.controller import (
    Controller,
    ControllerSettings,
    Decision,
    Keep,
    Planned,
    Policy,
    Seen,
    Switch,
    Tick,
)
from ecotone.protocol.effects import Preferred
from ecotone.units import EcotoneError

__all__ = ["NAMES", "WITH_DEADLINE", "Contender", "DynamicSplit", "Neurosurgeon", "Static", "contender", "statics"]

Require = Iterable[Requirement | str]
_STATIC = {"device_only", "server_only_raw", "server_only_jpeg", "fixed_cut", "best_fixed_cut"}
NAMES = (
    "device_only", "server_only_raw", "server_only_jpeg", "fixed_cut", "best_fixed_cut", "neurosurgeon", "dynamic_split",
    "oracle", "ecotone",
)  # fmt: skip
WITH_DEADLINE = ("deadline", "learned")
FACTORS = tuple(float(f) for f in np.geomspace(1 / 128, 4, 19))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A policy with the plans that it needs resident, the first of them in force at first."""

    name: str
    plans: PlanSet
    policy: Policy


class HasPlans(Protocol):
    """A trained policy (see learned.py) as this file, which knows no tensors, sees it."""

    def plan_set(self) -> PlanSet: ...

    def policy(self, plans: PlanSet, graph: Graph, cluster: Cluster, profile: Profile, deadline_s: float) -> Policy: ...


def contender(
    name: str,
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    require: Require = (),
    *,
    traces: Mapping[tuple[DeviceId, DeviceId], LinkTrace] | None = None,
    settings: ControllerSettings | None = None,
    deadline_s: float | None = None,
    trained: HasPlans | None = None,
) -> Contender:
    """The contender of that name; `traces` of directed links are for the oracle only. Raises PlannerError, EcotoneError.

    `deadline_s` is for those of WITH_DEADLINE, `trained` for "learned"; "deadline" takes its plans as well where given.
    """
    asked = tuple(require)
    if name in WITH_DEADLINE:
        return _with_deadline(name, graph, cluster, profile, asked, deadline_s, trained)
    if name in _STATIC:
        loose = ("error=1e9", "codec=jpeg:90,fp32") if name == "server_only_jpeg" else ("error=1e9",)
        rule = {"fixed_cut": "fixed_int8_middle"}.get(name, name)
        plan = place(rule, graph, cluster, profile, asked if name == "best_fixed_cut" else loose)
        return Contender(name=name, plans=PlanSet(primary=plan), policy=Static(name))
    if name == "neurosurgeon":
        plans = _over_rates(lambda c: place(name, graph, c, profile, _LOSSLESS), cluster)
        return Contender(name=name, plans=plans, policy=Neurosurgeon(graph, cluster, profile))
    if name == "dynamic_split":
        plans = _set(natural_bottlenecks(graph, cluster, profile))
        return Contender(name=name, plans=plans, policy=DynamicSplit(graph, cluster, profile))
    if name not in NAMES:
        raise EcotoneError(f"policy {name!r} is not known; known are {', '.join((*NAMES, *WITH_DEADLINE))}")
    plans = candidates(graph, cluster, profile, Latency(), asked)
    if name == "oracle":
        return Contender(name=name, plans=plans, policy=Oracle(graph, cluster, profile, traces or {}))
    return Contender(name=name, plans=plans, policy=Controller(plans, graph, cluster, profile, Latency(), settings))


def _with_deadline(
    name: str,
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    require: tuple[Requirement | str, ...],
    deadline_s: float | None,
    trained: HasPlans | None,
) -> Contender:
    if deadline_s is None or (name == "learned" and trained is None):
        raise EcotoneError(f"policy {name} needs a deadline" + (" and a trained policy" if name == "learned" else ""))
    plans = trained.plan_set() if trained else candidates(graph, cluster, profile, Latency(), require)
    if name == "learned" and trained is not None:
        return Contender(name=name, plans=plans, policy=trained.policy(plans, graph, cluster, profile, deadline_s))
    return Contender(name=name, plans=plans, policy=DeadlinePolicy(plans, graph, cluster, profile, deadline_s))


def statics(graph: Graph, cluster: Cluster, profile: Profile, require: Require = ()) -> dict[str, Plan]:
    """Every plan that could be the best static one: the named baselines that exist here, and the candidates of ecotone.

    Only those that keep `require`: a baseline that breaks it is no competitor.
    """
    requirements = tuple(require)
    asked, model = Asked.of(requirements), CostModel(graph, cluster, profile)
    found: dict[str, Plan] = {}
    for name in sorted(_STATIC):
        try:
            plan = contender(name, graph, cluster, profile, requirements).plans.primary
        except PlannerError:
            continue
        if not asked.violations(model.predict(plan)):
            found[name] = plan
    for i, plan in enumerate(candidates(graph, cluster, profile, Latency(), requirements).plans):
        if plan not in found.values():
            found[f"candidate_{i}"] = plan
    return found


_LOSSLESS = ("error=1e9", "codec=fp32,pixels")


def _set(plans: Iterable[Plan]) -> PlanSet:
    first, *others = dict.fromkeys(plans)
    return PlanSet(primary=first, standbys=tuple(Standby(plan=plan) for plan in others))


def _over_rates(rule: Callable[[Cluster], Plan], cluster: Cluster) -> PlanSet:
    """What `rule` gives at today's rates, and at any of a grid of rates."""
    return _set([rule(cluster), *(rule(cluster.scaled_links(f)) for f in FACTORS)])


def natural_bottlenecks(graph: Graph, cluster: Cluster, profile: Profile) -> tuple[Plan, ...]:
    """Device-server plans cut where the frontier is smaller than the input and than all before, and both ends; lossless.

    The strict prefix minima of arXiv:2205.11269, by block; found by asking the planner for each rate would miss those that
    are never best, so they are built from the cut positions. The first is the best at today's rates.
    """
    model = CostModel(graph, cluster, profile)
    smallest, positions = math.inf, []
    for position in profile.cuts[:-1]:
        size = graph.frontier_bytes(position)
        if size < smallest:
            smallest = size
            positions.append(position)
    raw = place("server_only_raw", graph, cluster, profile, _LOSSLESS)
    here = place("device_only", graph, cluster, profile, _LOSSLESS)
    plans = [raw, here]
    for position in positions[1:]:
        head, tail = replace(here.stages[0], stop=position), replace(raw.stages[-1], start=position)
        crossing = replace(raw.transfers[0], position=position, codec="fp32")
        plans.append(replace(here, stages=(head, tail), transfers=(here.transfers[0], crossing, raw.transfers[-1])))
    return tuple(sorted(plans, key=lambda plan: model.predict(plan).latency_s))


class Static:
    """Never moves."""

    def __init__(self, name: str) -> None:
        self.name = name

    def handle(self, event: Seen, now_s: float) -> tuple[Decision, ...]:
        """Keep, whatever happens."""
        return (Keep(reason="static"),) if isinstance(event, Tick) else ()

    def explanation(self) -> tuple[str, ...]:
        return (f"{self.name}: one plan for ever",)


class _ByRate:
    """What Neurosurgeon and dynamic split share: measured rates, prices, and the plan taken last."""

    def __init__(self, graph: Graph, cluster: Cluster, profile: Profile, window: int, probe_s: float) -> None:
        self.rates, self.prices = Rates(cluster, window, probe_s), Prices(graph, cluster, profile)
        self.asked = 0

    def see(self, event: Seen, now_s: float) -> None:
        self.rates.see(event, now_s)
        if isinstance(event, Planned):
            self.prices.take(event.plans)
            self.asked = event.plans.primary.epoch
        elif isinstance(event, Preferred):
            self.asked = event.epoch

    def choose(self, now_s: float) -> tuple[Decision, ...]:
        best, probes = self.prices.best(self.rates.now()), self.rates.probes(now_s, self.prices.uses(self.asked))
        if best is None or best == self.asked:
            return (Keep(reason="the best at the measured rate"), *probes)
        self.asked = best
        return (Switch(epoch=best, reason="the best at the measured rate"), *probes)

    def explained(self) -> list[str]:
        return [f"{a} > {b}: {8e-6 / s:.3g} Mbit/s" for (a, b), (s, _) in self.rates.now().items()]


class Neurosurgeon:
    """Plans again every `period_s` from the latest measured rate, without hysteresis; probes as often."""

    name = "neurosurgeon"

    def __init__(self, graph: Graph, cluster: Cluster, profile: Profile, period_s: float = 1.0) -> None:
        self._state, self._period_s, self._planned_s = _ByRate(graph, cluster, profile, 1, period_s), period_s, -math.inf

    def handle(self, event: Seen, now_s: float) -> tuple[Decision, ...]:
        """A decision each period, at the next tick."""
        self._state.see(event, now_s)
        if not isinstance(event, Tick) or now_s - self._planned_s < self._period_s:
            return ()
        self._planned_s = now_s
        return self._state.choose(now_s)

    def explanation(self) -> tuple[str, ...]:
        return (f"plan {self._state.asked}: the best single cut at the latest rates", *self._state.explained())


class DynamicSplit:
    """Before each request the natural bottleneck that is best at the mean of the last `window` measured rates."""

    name = "dynamic_split"

    def __init__(self, graph: Graph, cluster: Cluster, profile: Profile, window: int = 10, probe_s: float = 0.25) -> None:
        self._state = _ByRate(graph, cluster, profile, window, probe_s)

    def handle(self, event: Seen, now_s: float) -> tuple[Decision, ...]:
        """A decision at each tick."""
        self._state.see(event, now_s)
        return self._state.choose(now_s) if isinstance(event, Tick) else ()

    def explanation(self) -> tuple[str, ...]:
        return (f"plan {self._state.asked}: the best natural bottleneck at the mean rates", *self._state.explained())
