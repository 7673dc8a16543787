"""Which plans `run` and `serve` keep resident, and who chooses among them while they run: --survive, --adapt, a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ecotone.cli.asked import check_movable, parse_objective, parse_require
from ecotone.cli.console import err
from ecotone.cli.orders import in_best_order
from ecotone.cli.workflow import (
    Survival,
    Work,
    make_failover,
    make_plan,
    make_profile,
    read_plan_set,
)
from ecotone.cost import CostModel, predict, resident_bytes
from ecotone.plan import Plan, plan_violations
from ecotone.planner.candidates import candidates
from ecotone.planner.objective import Asked as Limits
from ecotone.planner.reordering import world_of
from ecotone.planset import PlanSet, Standby
from ecotone.policies.learned import Trained, load_trained
from ecotone.profile import Profile
from ecotone.protocol.controller import Controller, Policy, Replan
from ecotone.runtime import Nodes, Session
from ecotone.runtime.adapt import Adaptive
from ecotone.runtime.shadow import Shadow
from ecotone.units import EcotoneError, format_quantity

__all__ = ["Asked", "adapting", "chosen_plans", "expected_s", "resident_plans", "shadowing"]

EXECUTOR_ALLOWANCE = 0.01  # share of decisions that bfloat16 or int8 units may change


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says about plans; raises EcotoneError for options that exclude one another."""

    objective: str = "latency"
    require: tuple[str, ...] = ()
    plan_file: Path | None = None
    survival: Survival | None = None
    adapt: bool = False
    profile_file: Path | None = None
    shadow: float = 0.0
    arrivals: str = ""
    policy: Trained | None = None
    deadline_s: float = 0.0

    @staticmethod
    def of(
        objective: str,
        require: Sequence[str] | None,
        plan_file: Path | None,
        survive: str,
        adapt: bool,
        profile_file: Path | None = None,
        shadow: float = 0.0,
        arrivals: str = "",
        policy: Path | None = None,
    ) -> Asked:
        if adapt:
            check_movable(objective)
        if not 0 <= shadow <= 1:
            raise EcotoneError(f"--shadow {shadow:g}: give a share of the requests from 0 to 1, for example 0.01")
        if survive and plan_file:
            raise EcotoneError("--survive chooses standbys, --plan says which there are; give one of them")
        trained, deadline_s = (None, 0.0) if policy is None else _trained(policy, require or (), adapt)
        if trained and (plan_file or survive):
            raise EcotoneError("--policy brings its own plans; leave out --plan and --survive")
        return Asked(
            objective=objective, require=tuple(require or ()), plan_file=plan_file, survival=Survival.parse(survive),
            adapt=adapt, profile_file=profile_file, shadow=shadow, arrivals=arrivals, policy=trained,
            deadline_s=deadline_s,
        )  # fmt: skip


def _trained(path: Path, require: Sequence[str], adapt: bool) -> tuple[Trained, float]:
    """The policy of a file, and the deadline that the requirements state."""
    trained = load_trained(path)
    limits = [found.limit for found in parse_require(require) if found.name == "latency"]
    first, last = (format_quantity(seconds, "s") for seconds in trained.about.ranges.deadline_s)
    if not adapt or not limits:
        raise EcotoneError(f"--policy {path}: add --adapt and --require latency=..., trained from {first} to {last}")
    return trained, float(min(limits))


def resident_plans(work: Work, nodes: Nodes, asked: Asked) -> tuple[PlanSet, Profile | None]:
    """The set to deploy, and the profile where one was needed: that of the file, or the best one on what was measured.

    With --adapt the plans that are best at other link rates are resident as well, as far as memory goes; with --survive the
    standbys against failures.
    """
    if asked.plan_file:
        plans = read_plan_set(asked.plan_file, work)
        is_needed = asked.adapt or asked.profile_file
        return plans, make_profile(work, nodes, path=asked.profile_file) if is_needed else None
    measured = make_profile(work, nodes, path=asked.profile_file)
    if asked.policy:  # trained for the blocks in the order of their file
        return _checked(asked.policy, work), measured
    profile = in_best_order(work, nodes, measured, asked.objective, asked.require, arrivals=asked.arrivals)
    return chosen_plans(work, profile, asked), profile


def chosen_plans(work: Work, profile: Profile, asked: Asked) -> PlanSet:
    """The set that the command line asks for, chosen on a profile."""
    if asked.survival:
        plans = make_failover(work, profile, asked.objective, asked.require, asked.survival, asked.arrivals).planset
        return _with_more(work, plans, _candidates(work, profile, asked)) if asked.adapt else plans
    if asked.adapt:
        return _candidates(work, profile, asked)
    return PlanSet(primary=make_plan(work, profile, asked.objective, asked.require, arrivals=asked.arrivals).plan)


def expected_s(work: Work, plans: PlanSet, profile: Profile | None) -> dict[int, float]:
    """Seconds of the longest way through each plan by its place in the set, to notice a late run; {} without profile."""
    if profile is None:
        return {}
    found = {}
    for i, plan in enumerate(plans.plans):
        graph, measured = world_of(plan.order, work.captured.graph, work.cluster, profile)
        found[i] = predict(plan, graph, work.cluster, measured).longest_s
    return found


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
    if asked.policy:
        controller = asked.policy.policy(plans, graph, work.cluster, profile, asked.deadline_s)

    def plan(replan: Replan) -> PlanSet:
        return candidates(graph, work.cluster, replan.profile, objective, parse_require(asked.require), now=replan.now)

    with Adaptive(session, controller, plan=None if asked.policy else plan):
        yield


@contextlib.contextmanager
def shadowing(work: Work, session: Session, profile: Profile | None, asked: Asked) -> Iterator[Shadow | None]:
    """While it is open a share of the results is held against the whole model; drift is said on standard error.

    A plan may differ as much as the accuracy table says of it. Where there is none, or it does not hold the plan, as much as
    was asked for; and executors below float32, which the table does not know, get EXECUTOR_ALLOWANCE more.
    """
    if not asked.shadow:
        yield None
        return
    model = CostModel(work.captured.graph, work.cluster, profile) if profile else None
    limit = min(1.0, Limits.of(parse_require(asked.require, asked.arrivals)).loss_points / 100)

    def expected(plan: Plan) -> float:
        found = model.expected_disagreement(plan) if model else None
        allowed = any(not stage.executor.endswith(":fp32") for stage in plan.stages) * EXECUTOR_ALLOWANCE
        return min(1.0, (limit if found is None else found) + allowed)

    first = session.plan
    calibrated = model is not None and model.expected_disagreement(first) is not None
    source = (
        "calibrated" if calibrated else "nothing was calibrated: profile with --samples, give --profile; by what was asked"
    )
    err.print(f"[dim]shadow: at most {expected(first):.2%} of decisions may differ ({source})", soft_wrap=True)

    def say(notice: object) -> None:
        err.print(f"[yellow]{notice}", soft_wrap=True, highlight=False)

    with Shadow(session, asked.shadow, expected, on_notice=say) as shadow:
        yield shadow


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
