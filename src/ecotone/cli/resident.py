"""Which plans `run` and `serve` keep resident, and who chooses among them while they run: --survive, --adapt, a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ecotone.cli.workflow import (
    Survival,
    Work,
    make_failover,
    make_plan,
    make_profile,
    parse_objective,
    read_plan_set,
)
from ecotone.cost import predict, resident_bytes
from ecotone.plan import plan_violations
from ecotone.planner import Requirement
from ecotone.planner.candidates import candidates
from ecotone.planset import PlanSet, Standby
from ecotone.policies.learned import Trained, load_trained
from ecotone.profile import Profile
from ecotone.protocol.controller import Controller, Policy, Replan
from ecotone.runtime import Nodes, Session
from ecotone.runtime.adapt import Adaptive
from ecotone.units import EcotoneError, format_quantity

__all__ = ["Asked", "adapting", "chosen_plans", "expected_s", "resident_plans"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says about plans; raises EcotoneError for options that exclude one another."""

    objective: str = "latency"
    require: tuple[str, ...] = ()
    plan_file: Path | None = None
    survival: Survival | None = None
    adapt: bool = False
    learned: Trained | None = None
    deadline_s: float = 0.0

    @staticmethod
    def of(
        objective: str,
        require: Sequence[str] | None,
        plan_file: Path | None,
        survive: str,
        adapt: bool,
        learned: Path | None = None,
    ) -> Asked:
        if survive and plan_file:
            raise EcotoneError("--survive chooses standbys, --plan says which there are; give one of them")
        trained, deadline_s = (None, 0.0) if learned is None else _learned(learned, require or (), adapt)
        if trained and (plan_file or survive):
            raise EcotoneError("--learned brings its own plans; leave out --plan and --survive")
        return Asked(
            objective=objective, require=tuple(require or ()), plan_file=plan_file, survival=Survival.parse(survive),
            adapt=adapt, learned=trained, deadline_s=deadline_s,
        )  # fmt: skip


def _learned(path: Path, require: Sequence[str], adapt: bool) -> tuple[Trained, float]:
    """The policy of a file, and the deadline that the requirements state."""
    trained = load_trained(path)
    limits = [found.limit for text in require if (found := Requirement.parse(text)).name == "latency"]
    first, last = (format_quantity(seconds, "s") for seconds in trained.about.ranges.deadline_s)
    if not adapt or not limits:
        raise EcotoneError(f"--learned {path}: add --adapt and --require latency=..., trained from {first} to {last}")
    return trained, float(min(limits))


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
    if asked.learned:
        return _checked(asked.learned, work)
    assert profile is not None
    if asked.survival:
        plans = make_failover(work, profile, asked.objective, asked.require, asked.survival).planset
        return _with_more(work, plans, _candidates(work, profile, asked)) if asked.adapt else plans
    if asked.adapt:
        return _candidates(work, profile, asked)
    return PlanSet(primary=make_plan(work, profile, asked.objective, asked.require).plan)


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
    controller: Policy = Controller(plans, graph, work.cluster, profile, objective)
    if asked.learned:
        controller = asked.learned.policy(plans, graph, work.cluster, profile, asked.deadline_s)

    def plan(replan: Replan) -> PlanSet:
        return candidates(graph, work.cluster, replan.profile, objective, asked.require, now=replan.now)

    with Adaptive(session, controller, plan=None if asked.learned else plan):
        yield


def _checked(trained: Trained, work: Work) -> PlanSet:
    """The policy's plans, which must run here and fit into memory together."""
    plans, graph = trained.plan_set(), work.captured.graph
    for plan in plans.plans:
        if wrong := plan_violations(plan, graph, work.cluster):
            raise EcotoneError(f"policy {trained.about.name}: {plan}: " + "; ".join(wrong))
    room = {device.name: device.memory_bytes for device in work.cluster.devices}
    for device, size in resident_bytes({graph.content_hash(): graph}, plans.plans).items():
        if size > room[device]:
            raise EcotoneError(
                f"policy {trained.about.name}: its {len(plans.plans)} plans need {size} bytes on {device}, which has "
                f"{room[device]}; train one with fewer --plans"
            )
    return plans


def _candidates(work: Work, profile: Profile, asked: Asked) -> PlanSet:
    return candidates(work.captured.graph, work.cluster, profile, parse_objective(asked.objective), asked.require)


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
