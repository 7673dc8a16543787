"""Why this plan: what each part and each choice costs, which budget binds and what more of it would give, what else was
near, and the link rates at which the cut would move.

A *choice* is undone by a requirement (no exits, float32 on the wire, float32 executors, the source alone) and solved again.
A *budget* moves the plan at the least limit under which a better plan exists: the least of that quantity among plans whose
objective is better than today's, found by the same solver with the quantity as its objective. Its shadow price is the price
that the bound put on it (bounded.py): a derivative, where the move is a step.
A *breakpoint* is a factor on all link rates at which the best plan's cuts or devices change. Factors are scanned on a
geometric grid on both sides of 1 until the first change, which bisection then encloses to TOLERANCE; the plans on either
side are those that `solve` gives. A change and its undoing between two neighbours of the grid stay unseen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ecotone.cluster import Cluster
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import LOCAL, Plan
from ecotone.planner.measured import with_measured_links
from ecotone.planner.objective import (
    P95,
    Asked,
    Lexicographic,
    Objective,
    PlannerError,
    Requirement,
    Single,
    exceeds,
    first_of,
    least,
    parse_objective,
    quantity,
    shown,
)
from ecotone.planner.search import Task
from ecotone.planner.solve import NUM_RUNNERS_UP, RunnerUp, Solution, solve
from ecotone.profile import Profile
from ecotone.units import format_quantity

__all__ = ["Breakpoint", "Budget", "Choice", "Explanation", "explain"]

TOLERANCE = 1e-4
GRID = tuple(2.0 ** (i / 2) for i in range(1, 15))
BETTER = 1e-4  # a move is worth telling from so much on


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakpoint:
    """With all link rates times a little less than `factor` the best plan is `slower`, a little more: `faster`."""

    factor: float
    slower: Plan
    faster: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The best plan where a choice is not there to be made, and its value; None where nothing keeps the requirements."""

    without: str
    value: float | None = None
    plan: Plan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit, what the plan uses of it, and the least limit (`moves_at`) under which there is a better plan, with its
    value: None where there is none, or it was not found in time. `per_unit`: its shadow price, 0 where it does not bind.
    """

    name: str
    limit: float
    used: float
    per_unit: float = 0.0
    moves_at: float | None = None
    value: float | None = None
    plan: Plan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The plan's cost by part, its choices and budgets, the plans behind it, and the nearest breakpoint on each side."""

    plan: Plan
    cost: PlanCost
    objective: str
    value: float
    bound: float
    runners_up: tuple[RunnerUp, ...]
    breakpoints: tuple[Breakpoint, ...]
    choices: tuple[Choice, ...] = ()
    budgets: tuple[Budget, ...] = ()
    exit_policy: str = ""

    def lines(self) -> tuple[str, ...]:
        """The explanation as text, one fact a line."""
        return tuple(_lines(self))


def _lines(told: Explanation) -> Iterator[str]:
    name = first_of(told.objective)
    proven = told.bound >= told.value - abs(told.value) * 1e-6
    proof = "proven best" if proven else f"at most {1 - told.bound / told.value:.1%} from best"
    yield f"{told.plan}"
    yield f"{name}: {shown(name, told.value)}, {proof}"
    yield from _parts(told.plan, told.cost, told.exit_policy)
    for choice in told.choices:
        if choice.plan is None or choice.value is None:
            yield f"without {choice.without}: no plan keeps the requirements"
        else:
            yield f"without {choice.without}: {shown(name, choice.value)} ({_by(choice.value, told.value)}): {choice.plan}"
    for budget in told.budgets:
        yield from _about(budget, told, name)
    for other in told.runners_up:
        value = least(name).value(other.cost)
        yield f"instead, {_by(value, told.value)}: {other.plan}"
    for point in told.breakpoints:
        way, plan = ("slower", point.slower) if point.factor < 1 else ("faster", point.faster)
        yield f"with links {_times(point.factor)} times {way} the cut moves: {plan}"


def _times(factor: float) -> str:
    """A factor above 1 (or its inverse) in so many digits that what it has above 1 is seen, as far as TOLERANCE goes."""
    times = max(factor, 1 / factor)
    return f"{times:.{min(5, max(3, 2 - math.floor(math.log10(times - 1))))}g}"


def _by(value: float, best: float) -> str:
    return f"{value / best - 1:+.1%}" if best else "more" if value > 0 else "equal"


def _about(budget: Budget, told: Explanation, name: str) -> Iterator[str]:
    """One budget: used how far, its shadow price, where the plan would move."""
    line = f"{budget.name}: {shown(budget.name, budget.used)} of {shown(budget.name, budget.limit)}"
    if budget.moves_at is not None and budget.value is not None:
        more = f"at {shown(budget.name, budget.moves_at)} the plan would move: {name} {shown(name, budget.value)}"
        yield f"{line} binds; {more} ({_by(budget.value, told.value)}): {budget.plan}"
    elif budget.per_unit > 0:
        yield f"{line}, tight"
    else:
        yield f"{line}, does not bind"
    if budget.per_unit > 0:
        part = abs(budget.limit) / 10 or 1.0
        gain = shown(name, part * budget.per_unit) if name != "throughput" else f"{part * budget.per_unit * 1e3:.3g} ms"
        yield f"{budget.name}: {shown(budget.name, part)} more would save about {gain} at the margin"


def _parts(plan: Plan, cost: PlanCost, policy: str) -> Iterator[str]:
    exits = iter(zip(plan.exit_transfers, cost.exit_transfers, strict=True))
    if policy:
        yield f"exits as {policy}: all figures are means over requests"
    for transfer, stage, planned in zip(cost.transfers, [*cost.stages, None], [*plan.stages, None], strict=True):
        if transfer.source != transfer.target:
            parts = ("encode", transfer.encode_s), ("latency", transfer.latency_s), ("send", transfer.send_s)
            told = ", ".join(f"{n} {format_quantity(s, 's')}" for n, s in (*parts, ("decode", transfer.decode_s)))
            size = format_quantity(transfer.size_bytes, "bytes")
            total = format_quantity(transfer.total_s, "s")
            lost = f", {transfer.loss_points:.3g} points" if transfer.loss_points else ""
            share = f", for {transfer.share:.0%}" if transfer.share < 1 else ""
            ends = f"{transfer.source} > {transfer.target}"
            yield f"{ends}: {size} as {transfer.codec}, {total} ({told}){lost}{share}"
        if stage is None or planned is None:
            continue
        note = ", extrapolated" if stage.extrapolated else ""
        error = f", error {stage.relative_error:.2g}" if stage.relative_error else ""
        share = f", for {stage.share:.0%}" if stage.share < 1 else ""
        where = f"{stage.device}: blocks [{stage.start}, {stage.stop}) by {stage.executor}"
        yield f"{where}, {format_quantity(stage.compute_s, 's')}{error}{share}{note}"
        if planned.exit:
            leaving, priced = next(exits)
            home = (
                "there already" if leaving.codec == LOCAL else f"{format_quantity(priced.total_s, 's')} as {leaving.codec}"
            )
            head = f"head {format_quantity(stage.exit_s, 's')} of it, results to {leaving.target}: {home}"
            yield f"{stage.device}: exit {planned.exit} at {planned.threshold:.3g}: {stage.leaves:.0%} leave; {head}"
    energy = format_quantity(cost.energy_joule, "joule")
    money = f", money {cost.money:.3g}" if cost.money else ""
    server = f", servers busy {format_quantity(cost.server_s, 's')}" if cost.server_s else ""
    lost = f"accuracy lost {cost.accuracy_loss_points:.3g} points, relative error {cost.relative_error:.3g}"
    yield f"energy {energy} (modelled), {lost}{server}{money}"


def explain(
    solution: Solution,
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    require: Iterable[Requirement | str] | None = None,
    *,
    objective: Objective | None = None,
    tie: float = 0.0,
    time_limit_s: float = 10.0,
) -> Explanation:
    """Explain a solution of `solve` on the same graph, cluster and profile; `require` defaults to the solution's own.

    `objective`: that of the solution where its name does not say all (a 95th percentile's score). `tie`: what `solve` was
    given, so that the cut is said to move where that `solve` would move it.
    """
    wanted = parse_objective(solution.objective) if objective is None else objective
    given = tuple(solution.require if require is None else require)
    requirements = tuple(Requirement.parse(r) if isinstance(r, str) else r for r in given)
    until = time.perf_counter() + time_limit_s
    around = _Around(graph, cluster, profile, wanted, requirements, solution, until)
    choices, budgets = tuple(around.choices()), tuple(around.budgets())
    search = _Rates(graph, cluster, profile, wanted, requirements, tie, until)
    found = [point for point in (search.nearest(solution.plan, -1), search.nearest(solution.plan, 1)) if point]
    return Explanation(
        plan=solution.plan, cost=solution.cost, objective=solution.objective, value=solution.value, bound=solution.bound,
        runners_up=solution.runners_up, breakpoints=tuple(found), choices=choices, budgets=budgets,
        exit_policy=solution.exit_policy,
    )  # fmt: skip


class _Around:
    """What the same solver says without a choice, and with another limit."""

    def __init__(
        self, graph: Graph, cluster: Cluster, profile: Profile, objective: Objective,
        require: tuple[Requirement, ...], solution: Solution, until: float,
    ) -> None:  # fmt: skip
        self.world, self.objective, self.require = (graph, cluster, profile), objective, require
        self.solution, self.until = solution, until
        self.first: Single = objective.objectives[0] if isinstance(objective, Lexicographic) else objective

    def _solved(self, objective: Objective, require: Iterable[Requirement | str]) -> Solution | None:
        left = self.until - time.perf_counter()
        if left <= 0:
            return None
        try:
            return solve(*self.world, objective, require, time_limit_s=left, num_runners_up=0, nearest=False, gap=BETTER)
        except PlannerError:
            return None

    def choices(self) -> Iterator[Choice]:
        """Every choice that the plan makes, undone."""
        plan, cluster = self.solution.plan, self.world[1]
        rows: list[tuple[str, str]] = []
        if self.solution.exit_policy:
            rows.append(("exits", "exit=none"))
        if any(t.codec not in (LOCAL, "fp32") for t in plan.edges):
            rows.append(("codecs", "codec=fp32"))
        plain = sorted({s.executor for s in self.world[2].segments if s.executor.endswith(":fp32")})
        if plain and any(s.executor not in plain for s in plan.stages):
            rows.append(("executors below float32", f"executor={','.join(plain)}"))
        if set(plan.devices) != {plan.source} and cluster.source == cluster.sink:
            rows.append(("other devices", f"device={cluster.source}"))
        for name, requirement in rows:
            if time.perf_counter() > self.until:
                return
            kept = [r for r in self.require if r.name != requirement.partition("=")[0]]
            found = self._solved(self.objective, (*kept, requirement))
            yield Choice(
                without=name, value=found.value if found else None, plan=found.plan if found else None
            )  # fmt: skip

    def budgets(self) -> Iterator[Budget]:
        """Every limit, the default one on accuracy included."""
        asked, cost = Asked.of(self.require, self.objective), self.solution.cost
        prices = {p.name: p.per_unit for p in self.solution.shadow_prices}
        score = Task.of(CostModel(*self.world), asked, self.first, self.until).score
        for name in asked.limited:
            if name in ("stages", "memory") or (name == "accuracy_loss" and not self._can_lose()):
                continue
            percentile = score(self.solution.plan) if name == "p95" and score is not None else 0.0
            used = percentile if name == "p95" else quantity(name, cost)
            known = Budget(name=name, limit=asked.limit(name), used=used, per_unit=prices.get(name, 0.0))
            yield self._moved(known, asked.p95) or known

    def _can_lose(self) -> bool:
        table, payloads = self.world[2].accuracy, self.world[2].payloads
        return any(p.disagreement > 0 for p in payloads) or (table is not None and bool(table.cells or table.policies))

    def _moved(self, budget: Budget, p95: P95 | None) -> Budget | None:
        """The least limit under which a plan is better than today's."""
        if budget.name == self.first.name:
            return None
        other = least(budget.name, p95)
        better = self.solution.value - abs(self.solution.value) * BETTER
        limit = 1.0 / better if self.first.name == "throughput" and better > 0 else better
        by = self.first if isinstance(self.first, P95) else None
        kept = [r for r in self.require if r.name not in (budget.name, self.first.name)]
        lifted = Requirement(name="accuracy_loss", limit=100.0)
        extra = [] if budget.name == "accuracy_loss" or any(r.name == "accuracy_loss" for r in kept) else [
            Requirement(name="accuracy_loss", limit=Asked.of(self.require, self.objective).loss_points)
        ]  # fmt: skip
        extra += [lifted] if budget.name == "accuracy_loss" else []
        found = self._solved(other, (*kept, *extra, Requirement(name=self.first.name, limit=limit, by=by)))
        if found is None or not exceeds(found.value, budget.limit):
            return None
        value = self.first.value(found.cost)
        return Budget(
            name=budget.name, limit=budget.limit, used=budget.used, per_unit=budget.per_unit, moves_at=found.value,
            value=value, plan=found.plan,
        )  # fmt: skip


class _Rates:
    """Best plans at scaled link rates. Measured rates are written into the cluster first, so that scaling reaches them."""

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        profile: Profile,
        objective: Objective,
        require: tuple[Requirement, ...],
        tie: float,
        deadline: float,
    ) -> None:
        self.graph, (self.cluster, self.profile) = graph, with_measured_links(graph, cluster, profile)
        self.objective, self.require, self.tie, self.deadline = objective, require, tie, deadline

    def plan(self, factor: float) -> Plan | None:
        """The best plan with all rates times `factor`; None where nothing keeps the requirements."""
        try:
            cluster = self.cluster.scaled_links(factor)
            left = max(0.1, self.deadline - time.perf_counter())
            found = solve(
                self.graph, cluster, self.profile, self.objective, self.require, time_limit_s=left, tie=self.tie,
                num_runners_up=NUM_RUNNERS_UP if self.tie else 0, nearest=False,
            )  # fmt: skip
        except PlannerError:
            return None
        return found.plan

    def nearest(self, today: Plan, side: int) -> Breakpoint | None:
        """The first change going down (side -1) or up (side 1) from today's rates; none where it is not the rates' doing."""
        near, near_plan = 1.0, today
        for step in GRID:
            far = step**side
            far_plan = self.plan(far) if time.perf_counter() < self.deadline else None
            if far_plan is None:
                return None
            if not _alike(far_plan, today):
                break
            near, near_plan = far, far_plan
        else:
            return None
        while abs(far / near - 1) > TOLERANCE:
            middle = (near * far) ** 0.5
            plan = self.plan(middle)
            if plan is None or time.perf_counter() > self.deadline:
                return None
            if _alike(plan, today):
                near, near_plan = middle, plan
            else:
                far, far_plan = middle, plan
        if near == 1.0:  # today's rates already have another plan
            return None
        slower, faster = (far_plan, near_plan) if side < 0 else (near_plan, far_plan)
        return Breakpoint(factor=(near * far) ** 0.5, slower=slower, faster=faster)


def _alike(one: Plan, other: Plan) -> bool:
    return (one.cuts, one.devices) == (other.cuts, other.devices)
