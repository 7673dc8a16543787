"""Which plans `run` and `serve` keep resident, and who chooses among them while they run: --survive, --adapt, a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ecotone.cli.asked import check_movable, parse_objective, parse_require
from ecotone.cli.workflow import (
    Survival,
    Work,
    make_failover,
    make_plan,
    make_profile,
    read_plan_set,
)
from ecotone.cost import predict, resident_bytes
from ecotone.planner.candidates import candidates
from ecotone.planset import PlanSet, Standby
from ecotone.profile import Profile
from ecotone.protocol.controller import Controller, Replan
from ecotone.runtime import Nodes, Session
from ecotone.runtime.adapt import Adaptive
from ecotone.units import EcotoneError

__all__ = ["Asked", "adapting", "chosen_plans", "expected_s", "resident_plans"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says about plans; raises EcotoneError for options that exclude one another."""

    objective: str = "latency"
    require: tuple[str, ...] = ()
    plan_file: Path | None = None
    survival: Survival | None = None
    adapt: bool = False
    arrivals: str = ""

    @staticmethod
    def of(
        objective: str, require: Sequence[str] | None, plan_file: Path | None, survive: str, adapt: bool, arrivals: str = ""
    ) -> Asked:
        if adapt:
            check_movable(objective)
        if survive and plan_file:
            raise EcotoneError("--survive chooses standbys, --plan says which there are; give one of them")
        return Asked(
            objective=objective, require=tuple(require or ()), plan_file=plan_file, survival=Survival.parse(survive),
            adapt=adapt, arrivals=arrivals,
        )  # fmt: skip


def resident_plans(work: Work, nodes: Nodes, asked: Asked) -> tuple[PlanSet, Profile | None]:
    """The set to deploy, and the profile where one was needed: that of the file, or the best one on what was measured.

    With --adapt the plans that are best at other link rates are resident as well, as far as memory goes; with --survive the
    standbys against failures.
    """
    profile = make_profile(work, nodes) if asked.adapt or not asked.plan_file else None
    return chosen_plans(work, profile, asked), profile


def chosen_plans(work: Work, profile: Profile | None, asked: Asked) -> PlanSet:
    """The set that the command line asks for; a profile is needed unless a file names the plans."""
    if asked.plan_file:
        return read_plan_set(asked.plan_file, work)
    assert profile is not None
    if asked.survival:
        plans = make_failover(work, profile, asked.objective, asked.require, asked.survival, asked.arrivals).planset
        return _with_more(work, plans, _candidates(work, profile, asked)) if asked.adapt else plans
    if asked.adapt:
        return _candidates(work, profile, asked)
    return PlanSet(primary=make_plan(work, profile, asked.objective, asked.require, arrivals=asked.arrivals).plan)


def expected_s(work: Work, plans: PlanSet, profile: Profile | None) -> dict[int, float]:
    """Predicted latency of each plan by its place in the set, so that a late run is noticed; {} without profile."""
    if profile is None:
        return {}
    graph = work.captured.graph
    return {i: predict(plan, graph, work.cluster, profile).latency_s for i, plan in enumerate(plans.plans)}


@contextlib.contextmanager
def adapting(work: Work, session: Session, profile: Profile | None, asked: Asked) -> Iterator[None]:
    """While it is open the controller moves `session` among its resident plans, and asks the planner where none fits."""
    if not asked.adapt or profile is None:
        yield
        return
    objective = parse_objective(asked.objective)
    graph = work.captured.graph
    first, *others = session.plans
    plans = PlanSet(primary=first, standbys=tuple(Standby(plan=plan) for plan in others))
    controller = Controller(plans, graph, work.cluster, profile, objective)

    def plan(replan: Replan) -> PlanSet:
        return candidates(graph, work.cluster, replan.profile, objective, parse_require(asked.require), now=replan.now)

    with Adaptive(session, controller, plan=plan):
        yield


def _candidates(work: Work, profile: Profile, asked: Asked) -> PlanSet:
    objective, require = parse_objective(asked.objective), parse_require(asked.require)
    return candidates(work.captured.graph, work.cluster, profile, objective, require)


def _with_more(work: Work, plans: PlanSet, more: PlanSet) -> PlanSet:
    """`plans` and as many of `more` behind them as every device's memory holds."""
    graphs = {work.captured.graph.content_hash(): work.captured.graph}
    room = {device.name: device.memory_bytes for device in work.cluster.devices}
    kept = list(plans.standbys)
    known = {plan.identity() for plan in plans.plans}
    for plan in more.plans:
        held = resident_bytes(graphs, [plans.primary, *(standby.plan for standby in kept), plan])
        if plan.identity() not in known and all(size <= room[device] for device, size in held.items()):
            kept.append(Standby(plan=plan, label="for other link rates"))
    return PlanSet(primary=plans.primary, standbys=tuple(kept))
