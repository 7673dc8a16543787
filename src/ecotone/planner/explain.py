"""Why this plan: what each stage and link costs, the next best plans, and the link rates at which the cut would move.

A breakpoint is a factor on all link rates at which the best plan's cuts or devices change. Factors are scanned on a
geometric grid on both sides of 1 until the first change, which bisection then encloses to TOLERANCE; the plans on either
side are those that `solve` gives. A change and its undoing between two neighbours of the grid stay unseen.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ecotone.cluster import Cluster
from ecotone.cost import PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.measured import with_measured_links
from ecotone.planner.objective import Objective, PlannerError, Requirement, parse_objective
from ecotone.planner.solve import RunnerUp, Solution, solve
from ecotone.profile import Profile
from ecotone.units import format_quantity

__all__ = ["Breakpoint", "Explanation", "explain"]

TOLERANCE = 1e-4
GRID = tuple(2.0 ** (i / 2) for i in range(1, 15))


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakpoint:
    """With all link rates times a little less than `factor` the best plan is `slower`, a little more: `faster`."""

    factor: float
    slower: Plan
    faster: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The plan's cost by part, the plans behind it, and the nearest breakpoint on each side of today's rates, if any."""

    plan: Plan
    cost: PlanCost
    objective: str
    value: float
    bound: float
    runners_up: tuple[RunnerUp, ...]
    breakpoints: tuple[Breakpoint, ...]

    def lines(self) -> tuple[str, ...]:
        """The explanation as text, one fact a line."""
        proof = (
            "proven best"
            if self.bound >= self.value * (1 - 1e-6)
            else f"at most {1 - self.bound / self.value:.1%} from best"
        )
        rows = [f"{self.plan}", f"{self.objective}: {format_quantity(self.value, 's')}, {proof}", *_parts(self.cost)]
        for other in self.runners_up:
            value = other.cost.latency_s if self.objective == "latency" else other.cost.bottleneck_s
            rows.append(f"instead, +{value / self.value - 1:.1%}: {other.plan}")
        for point in self.breakpoints:
            way, plan = ("slower", point.slower) if point.factor < 1 else ("faster", point.faster)
            rows.append(f"with links {max(point.factor, 1 / point.factor):.3g} times {way} the cut moves: {plan}")
        return tuple(rows)


def _parts(cost: PlanCost) -> list[str]:
    rows = []
    for transfer, stage in zip(cost.transfers, [*cost.stages, None], strict=True):
        if transfer.source != transfer.target:
            parts = ("encode", transfer.encode_s), ("latency", transfer.latency_s), ("send", transfer.send_s)
            shown = ", ".join(f"{n} {format_quantity(s, 's')}" for n, s in (*parts, ("decode", transfer.decode_s)))
            size = format_quantity(transfer.size_bytes, "bytes")
            total = format_quantity(transfer.total_s, "s")
            rows.append(f"{transfer.source} > {transfer.target}: {size} as {transfer.codec}, {total} ({shown})")
        if stage is not None:
            note = ", extrapolated" if stage.extrapolated else ""
            where = f"{stage.device}: blocks [{stage.start}, {stage.stop}) by {stage.executor}"
            rows.append(f"{where}, {format_quantity(stage.compute_s, 's')}{note}")
    energy = format_quantity(cost.energy_joule, "joule")
    rows.append(f"energy {energy} (modelled), decisions changed {cost.accuracy_loss_points:.3g} points")
    return rows


def explain(
    solution: Solution,
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    require: Iterable[Requirement | str] | None = None,
    *,
    time_limit_s: float = 10.0,
) -> Explanation:
    """Explain a solution of `solve` on the same graph, cluster and profile; `require` defaults to the solution's own."""
    objective: Objective = parse_objective(solution.objective)
    wanted = solution.require if require is None else tuple(require)
    search = _Rates(graph, cluster, profile, objective, wanted, time.perf_counter() + time_limit_s)
    found = [point for point in (search.nearest(solution.plan, -1), search.nearest(solution.plan, 1)) if point]
    return Explanation(
        plan=solution.plan, cost=solution.cost, objective=solution.objective, value=solution.value, bound=solution.bound,
        runners_up=solution.runners_up, breakpoints=tuple(found),
    )  # fmt: skip


class _Rates:
    """Best plans at scaled link rates. Measured rates are written into the cluster first, so that scaling reaches them."""

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        profile: Profile,
        objective: Objective,
        require: tuple[Requirement | str, ...],
        deadline: float,
    ) -> None:
        self.graph, (self.cluster, self.profile) = graph, with_measured_links(graph, cluster, profile)
        self.objective, self.require, self.deadline = objective, require, deadline

    def plan(self, factor: float) -> Plan | None:
        """The best plan with all rates times `factor`; None where nothing keeps the requirements."""
        try:
            cluster = self.cluster.scaled_links(factor)
            left = max(0.1, self.deadline - time.perf_counter())
            found = solve(
                self.graph, cluster, self.profile, self.objective, self.require, time_limit_s=left, num_runners_up=0
            )
        except PlannerError:
            return None
        return found.plan

    def nearest(self, today: Plan, side: int) -> Breakpoint | None:
        """The first change going down (side -1) or up (side 1) from today's rates."""
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
        slower, faster = (far_plan, near_plan) if side < 0 else (near_plan, far_plan)
        return Breakpoint(factor=(near * far) ** 0.5, slower=slower, faster=faster)


def _alike(one: Plan, other: Plan) -> bool:
    return (one.cuts, one.devices) == (other.cuts, other.devices)
