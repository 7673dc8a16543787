"""What less of one quantity costs in another: the front of plans of which none is better in both.

The epsilon-constraint method (Haimes, Lasdon, Wismer, 1971): the best plan under the objective, then the best of those with
at most (1 - step) of its bytes (or energy, error, ...), and so on until no plan is left. For every plan that keeps the
requirements the front has one that is no worse under the objective and at most 1 / (1 - step) of it in the other quantity;
with a `step` near zero it is exact. Each point is proven as far as its own solution is. One `solve` a point.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ecotone import schema
from ecotone.cluster import Cluster
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.objective import P95, Asked, Lexicographic, Objective, PlannerError, Requirement, quantity
from ecotone.planner.search import Task
from ecotone.planner.solve import solve
from ecotone.profile import Profile

__all__ = ["AXES", "Front", "Point", "check_axis", "pareto"]

SCHEMA, VERSION = "ecotone.front", 1
STEP = 0.05
MOST_POINTS = 40

AXES = (
    "latency", "p95", "throughput", "bytes", "energy", "server", "money", "accuracy_loss", "accuracy_loss_sure", "error",
    "memory", "stages",
)  # fmt: skip
"""What may be traded, less is better, by the name of its requirement; throughput as seconds of the bottleneck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A plan of the front: `value` under the objective (seconds), `other` along the axis, and whether it is proven."""

    plan: Plan
    cost: PlanCost
    value: float
    other: float
    is_proven: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Points ascending in value, descending in the other quantity. `is_complete`: nothing further down is unsearched."""

    objective: str
    axis: str
    step: float
    points: tuple[Point, ...]
    is_complete: bool

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "front") -> Front:
        """Read a front; raises SchemaError naming every violation."""
        return schema.load_json(Front, text, SCHEMA, VERSION, where)


def pareto(
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    objective: Objective,
    axis: str,
    require: Iterable[Requirement | str] = (),
    *,
    step: float = STEP,
    most_points: int = MOST_POINTS,
    time_limit_s: float = 60.0,
    p95: P95 | None = None,
) -> Front:
    """The front of `objective` against `axis` (see AXES) among plans that keep `require`.

    `p95`: how the 95th percentile is found, where it is the axis. Raises PlannerError where no plan keeps them, for an
    unknown axis, or one that is the objective itself.
    """
    check_axis(axis, objective)
    if not 0 < step < 1:
        raise PlannerError(f"step {step} of a front must be between 0 and 1")
    requirements = tuple(Requirement.parse(r) if isinstance(r, str) else r for r in require)
    deadline = time.perf_counter() + time_limit_s
    score = None
    if axis == "p95":
        model = CostModel(graph, cluster, profile)
        score = Task.of(model, Asked.of((), p95), p95 or P95(), deadline).score
    points: list[Point] = []
    limit: tuple[Requirement, ...] = ()
    is_complete = False
    while len(points) < most_points and (left_s := deadline - time.perf_counter()) > 0:
        try:
            found = solve(
                graph, cluster, profile, objective, (*requirements, *limit), time_limit_s=left_s, num_runners_up=0,
                nearest=not points,
            )  # fmt: skip
        except PlannerError:
            if not points:
                raise
            is_complete = time.perf_counter() < deadline  # else nothing was found for want of time
            break
        other = score(found.plan) if score is not None else quantity(axis, found.cost)
        points.append(Point(plan=found.plan, cost=found.cost, value=found.value, other=other, is_proven=found.is_proven))
        if other <= 0:
            is_complete = True
            break
        limit = (_below(axis, other, step, p95),)
    return Front(objective=objective.name, axis=axis, step=step, points=_undominated(points), is_complete=is_complete)


def check_axis(axis: str, objective: Objective) -> None:
    """Raises PlannerError where `axis` cannot be traded against `objective`."""
    names = [o.name for o in (objective.objectives if isinstance(objective, Lexicographic) else (objective,))]
    if axis not in AXES or axis in names:
        others = ", ".join(name for name in AXES if name not in names)
        raise PlannerError(f"{axis!r} cannot be traded against {objective.name}; these can: {others}")


def _below(axis: str, value: float, step: float, p95: P95 | None) -> Requirement:
    """At most (1 - step) of `value`."""
    less = value * (1 - step)
    return Requirement(name=axis, limit=1.0 / less if axis == "throughput" else less, by=p95 if axis == "p95" else None)


def _undominated(points: Iterable[Point]) -> tuple[Point, ...]:
    """Of points with the same value only the one with the least of the other."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.value, p.other)):
        if not kept or point.other < kept[-1].other:
            kept.append(point)
    return tuple(kept)
