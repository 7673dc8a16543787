"""The one verb: the best plan of a graph on a cluster, with a proven bound, or the requirement that no plan keeps.

Exact first: the latency programme, or the throughput bisection, without what couples stages. Where its answer keeps every
requirement it is the optimum. Where a budget binds (memory of a revisited device, changed decisions, error, energy, bytes,
rate), memory.py searches under it, anytime; throughput under such budgets is a bisection over thresholds of that search.
Executors: per device and segment the fastest within the error allowed to one stage; where a bound on the plan's whole
error is asked, stricter limits per stage are tried too (no proof over executors is claimed beyond these limits). A plan
may be one device. Deterministic while the time limit does not cut in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ecotone import schema
from ecotone.cluster import Cluster
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan, plan_violations
from ecotone.planner.budgets import budgets_of
from ecotone.planner.chain import Chain, Path, build
from ecotone.planner.latency import best_path, next_paths
from ecotone.planner.memory import least_latency
from ecotone.planner.objective import SLACK, Asked, Latency, Objective, PlannerError, Requirement
from ecotone.planner.refusal import reason
from ecotone.planner.throughput import classes_of, least_bottleneck
from ecotone.profile import Profile
from ecotone.units import format_quantity

__all__ = ["TIE", "RunnerUp", "Solution", "broken", "search", "solve"]

SCHEMA, VERSION = "ecotone.solution", 1
NUM_RUNNERS_UP = 3
TIE = 0.02  # for `tie`: about half of the median error of a prediction (benchmarks/split_latency.py)
_THRESHOLD_GAP = 1e-7
_PROVEN_GAP = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """Another plan that keeps every requirement, and its cost."""

    plan: Plan
    cost: PlanCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The answer: `value` is what the objective minimises (seconds of latency or of bottleneck), `bound` a proven lower
    bound on it; equal where the plan is proven best. `runners_up` ascend in value, each unlike the better ones.
    """

    plan: Plan
    cost: PlanCost
    objective: str
    value: float
    bound: float
    require: tuple[str, ...] = ()
    runners_up: tuple[RunnerUp, ...] = ()

    @property
    def gap(self) -> float:
        """(value - bound) / value: by what share a better plan could still be better."""
        return max(0.0, (self.value - self.bound) / self.value) if self.value > 0 else 0.0

    @property
    def is_proven(self) -> bool:
        return self.gap <= _PROVEN_GAP

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "solution") -> Solution:
        """Read a solution; raises SchemaError naming every violation."""
        return schema.load_json(Solution, text, SCHEMA, VERSION, where)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to: no path where none was found, and a proven lower bound on the value of any."""

    path: Path | None
    value: float
    bound: float
    chain: Chain
    coupled: bool  # budgets bind, so the plain programmes do not give runners-up


def solve(
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    objective: Objective,
    require: Iterable[Requirement | str] = (),
    *,
    time_limit_s: float = 10.0,
    num_runners_up: int = NUM_RUNNERS_UP,
    tie: float = 0.0,
) -> Solution:
    """The best plan under `objective` that keeps all of `require` ("latency=50ms", see objective.Requirement).

    `tie`: plans whose values are within this share of the best count as equal (a prediction is good to a few percent), and
    of those the one that crosses the fewest links is taken; the solution's gap then says what was given up, at most `tie`.
    Raises PlannerError naming the requirement that fails and by how much, or what was never measured.
    """
    requirements = tuple(Requirement.parse(r) if isinstance(r, str) else r for r in require)
    deadline = time.perf_counter() + time_limit_s
    asked, model = Asked.of(requirements), CostModel(graph, cluster, profile)
    found = _over_executors(model, asked, objective, deadline)
    if found.path is None:
        proven = math.isinf(found.bound)
        raise PlannerError(reason(found.chain, asked, objective, proven=proven, time_limit_s=time_limit_s))
    plan = found.chain.plan(found.path)
    cost = model.predict(plan)
    value = objective.value(cost)
    runners_up = _runners_up(found, asked, objective, deadline, num_runners_up)
    chosen = RunnerUp(plan=plan, cost=cost)
    if tie > 0:
        others = (*runners_up, *_here_only(found.chain, asked))
        equal = [o for o in (chosen, *others) if objective.value(o.cost) <= value * (1 + tie)]
        chosen = min(equal, key=lambda o: (len(o.plan.cuts), objective.value(o.cost)))
        rest = {o.plan: o for o in (RunnerUp(plan=plan, cost=cost), *runners_up) if o.plan != chosen.plan}
        runners_up = tuple(rest.values())[:num_runners_up]
    return Solution(
        plan=chosen.plan, cost=chosen.cost, objective=objective.name, value=objective.value(chosen.cost),
        bound=min(value, found.bound), require=tuple(str(r) for r in requirements), runners_up=runners_up,
    )  # fmt: skip


def _here_only(chain: Chain, asked: Asked) -> tuple[RunnerUp, ...]:
    """The plan without any crossing, where source and sink are one device that can run it all under the requirements."""
    if chain.source != chain.sink or not math.isfinite(chain.stage[chain.source, 0, -1]):
        return ()
    path = Path(stages=((chain.source, 0, len(chain.cuts) - 1),), codecs=(-1, -1))
    if broken(chain, asked, path):
        return ()
    plan = chain.plan(path)
    return (RunnerUp(plan=plan, cost=chain.model.predict(plan)),)


def broken(chain: Chain, asked: Asked, path: Path) -> tuple[str, ...]:
    """Every reason why a path is no answer: what it breaks of the plan's checker, of memory and of the requirements."""
    model, plan = chain.model, chain.plan(path)
    cost = model.predict(plan)
    found = list(plan_violations(plan, model.graph, model.cluster))
    limit = {d.name: c for d, c in zip(model.cluster.devices, chain.capacity, strict=True)}
    for device in cost.devices:
        if device.memory_bytes > limit[device.device] * (1 + SLACK):
            need, has = (format_quantity(v, "bytes") for v in (device.memory_bytes, limit[device.device]))
            found.append(f"memory: {device.device} needs {need} and may use {has}")
    return (*found, *asked.violations(cost))


def _over_executors(model: CostModel, asked: Asked, objective: Objective, deadline: float) -> Found:
    """The best over limits on one stage's error, where the whole plan's error is bounded; one search otherwise."""
    chain = build(model, asked)
    best = search(chain, asked, objective, deadline)
    if not (math.isfinite(asked.error) and best.coupled):
        return best
    for limit in np.unique(chain.stage_error[np.isfinite(chain.stage)])[::-1][1:]:
        if time.perf_counter() > deadline:
            break
        strict = build(model, replace(asked, stage_error=float(limit)))
        other = search(strict, asked, objective, deadline)
        if other.value < best.value:
            best = replace(other, bound=min(best.bound, other.bound))
    return best


def search(chain: Chain, asked: Asked, objective: Objective, deadline: float) -> Found:
    """The best path of a chain under what was asked, until `deadline` of the performance counter."""
    if isinstance(objective, Latency):
        path, value = best_path(chain)
        if path is None:
            return Found(None, math.inf, math.inf, chain, False)
        if not broken(chain, asked, path):
            return Found(path, value, value, chain, False)
        found = least_latency(chain, budgets_of(chain, asked), _accept(chain, asked), deadline, limit_s=asked.latency_s)
        return Found(found.path, found.value, max(found.bound, value), chain, True)
    widest = least_bottleneck(chain, deadline)
    if widest.path is None and math.isinf(widest.bound):
        return Found(None, math.inf, math.inf, chain, False)
    if widest.path is not None and not broken(chain, asked, widest.path):
        return Found(widest.path, widest.value, widest.bound, chain, False)
    if widest.bound > asked.bottleneck_s * (1 + SLACK):
        return Found(None, math.inf, math.inf, chain, True)
    return _by_threshold(chain, asked, widest.bound, deadline)


def _accept(chain: Chain, asked: Asked) -> Callable[[Path], bool]:
    return lambda path: not broken(chain, asked, path)


def _by_threshold(chain: Chain, asked: Asked, lower: float, deadline: float) -> Found:
    """Least bottleneck under coupled budgets: bisection, each step a search for any path whose loads keep a threshold."""
    accept, model = _accept(chain, asked), chain.model

    def any_path(limit: float) -> tuple[Path | None, bool]:
        limited = chain.limited(limit)
        budgets = budgets_of(limited, replace(asked, bottleneck_s=limit), once=True)
        found = least_latency(limited, budgets, accept, deadline, limit_s=asked.latency_s, any_will_do=True)
        return found.path, found.path is None and math.isinf(found.bound)

    path, none_exists = any_path(asked.bottleneck_s)
    if path is None:
        return Found(None, math.inf, math.inf if none_exists else lower, chain, True)
    value, floor = model.predict(chain.plan(path)).bottleneck_s, lower
    while value > floor * (1 + _THRESHOLD_GAP) and time.perf_counter() < deadline:
        middle = (value + floor) / 2
        other, none_exists = any_path(middle)
        if other is not None:
            path, value = other, model.predict(chain.plan(other)).bottleneck_s
            continue
        floor = middle
        lower = max(lower, middle) if none_exists else lower
    return Found(path, value, min(value, lower), chain, True)


def _runners_up(found: Found, asked: Asked, objective: Objective, deadline: float, count: int) -> tuple[RunnerUp, ...]:
    """Latency without coupling: the programme's next paths. Else the best plans without one of the devices used."""
    chain, best = found.chain, found.path
    if best is None or count < 1:
        return ()
    paths: list[Path] = []
    if isinstance(objective, Latency) and not found.coupled:
        paths = [p for p in next_paths(chain, [best], 3 * count) if not broken(chain, asked, p)]
    else:
        used = {d for d, _, _ in best.stages}
        alike = [next((d for d in group if d in used), None) for group in classes_of(chain)]
        for device in [d for d in alike if d is not None][:count]:
            stage = chain.stage.copy()
            stage[device] = math.inf
            if time.perf_counter() < deadline and np.isfinite(stage).any():
                other = search(replace(chain, stage=stage), asked, objective, deadline).path
                paths += [other] if other is not None else []
    plans = dict.fromkeys(chain.plan(p) for p in paths)
    made = [RunnerUp(plan=plan, cost=chain.model.predict(plan)) for plan in plans]
    return tuple(sorted(made, key=lambda r: objective.value(r.cost))[:count])
