"""The one verb: the best plan of a graph on a cluster, with a proven bound, or the requirement that no plan keeps.

Chosen together: where the model is cut, which device runs each part by which executor, in which codec each crossing travels,
and which exit policy (the profile's, or none) is followed; under every requirement at once. How: search.py. Several
objectives in order are so many searches, each under what the ones before reached; a last one takes the quickest of plans
that are equal under an objective other than time. A plan may be one device. Deterministic while time does not run out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ecotone import schema
from ecotone.cluster import Cluster
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.chain import Chain
from ecotone.planner.network import bare
from ecotone.planner.objective import (
    P95,
    Asked,
    Latency,
    Lexicographic,
    Objective,
    PlannerError,
    Requirement,
    Single,
    Throughput,
)
from ecotone.planner.programme import Programme
from ecotone.planner.refusal import reason
from ecotone.planner.search import Found, Task, broken, chains_of, kept_together, reasons_against, search, search_all
from ecotone.planner.throughput import classes_of
from ecotone.profile import Profile

__all__ = ["TIE", "Level", "RunnerUp", "ShadowPrice", "Solution", "solve"]

SCHEMA, VERSION = "ecotone.solution", 1
NUM_RUNNERS_UP = 3
TIE = 0.02  # for `tie`: about half of the median error of a prediction (benchmarks/split_latency.py)
_PROVEN_GAP = 1e-6
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """Another plan that keeps every requirement, and its cost."""

    plan: Plan
    cost: PlanCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One of several objectives in order: what was reached, and a proven lower bound on it under the levels before."""

    objective: str
    value: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowPrice:
    """What one unit more of a limited quantity would take off the bound, at the limit as it is (a derivative)."""

    name: str
    per_unit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The answer: `value` is what the objective minimises (seconds of latency or of bottleneck, joules, bytes, ...; of
    several the first), `bound` a proven lower bound on it; equal where the plan is proven best. `runners_up` ascend in
    value, each unlike the better ones. `levels`: of several objectives in order. `exit_policy`: "" without exits.
    """

    plan: Plan
    cost: PlanCost
    objective: str
    value: float
    bound: float
    require: tuple[str, ...] = ()
    runners_up: tuple[RunnerUp, ...] = ()
    levels: tuple[Level, ...] = ()
    exit_policy: str = ""
    shadow_prices: tuple[ShadowPrice, ...] = ()

    @property
    def gap(self) -> float:
        """(value - bound) / value: by what share a better plan could still be better."""
        if self.value == self.bound:
            return 0.0
        return max(0.0, (self.value - self.bound) / abs(self.value)) if self.value else math.inf

    @property
    def is_proven(self) -> bool:
        return self.gap <= _PROVEN_GAP

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "solution") -> Solution:
        """Read a solution; raises SchemaError naming every violation."""
        return schema.load_json(Solution, text, SCHEMA, VERSION, where)


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
    gap: float = 0.0,
    nearest: bool = True,
) -> Solution:
    """The best plan under `objective` that keeps all of `require` ("latency=50ms", see objective.Requirement).

    `tie`: plans whose values are within this share of the best count as equal (a prediction is good to a few percent), and
    of those the one that crosses the fewest links is taken; the solution's gap then says what was given up, at most `tie`.
    `gap`: a plan that is proven to be within this share of the best will do. Raises PlannerError naming the requirement that
    fails, by how much, and the nearest plan (looked for unless `nearest` is False); or what was never measured.
    """
    requirements = tuple(Requirement.parse(r) if isinstance(r, str) else r for r in require)
    until = time.perf_counter() + time_limit_s
    asked, model = Asked.of(requirements, objective), CostModel(graph, cluster, profile)
    levels = objective.levels if isinstance(objective, Lexicographic) else ((objective, 0.0),)
    task = Task.of(model, asked, levels[0][0], _share(until, len(levels)), gap)
    found = _first(model, task)
    if found.path is None:
        none_exists = math.isinf(found.bound)
        told = "no plan keeps what was asked" if none_exists else f"no plan found within {time_limit_s:g} s"
        told = reason(model, task, proven=none_exists, time_limit_s=time_limit_s) if nearest else told
        raise PlannerError(told)
    reached, found, last = _descend(model, found, task, levels, until)
    plan = found.chain.plan(found.path) if found.path is not None else None
    assert plan is not None
    chosen = RunnerUp(plan=plan, cost=model.predict(plan))
    runners_up = _runners_up(found, replace(last, deadline=until), num_runners_up)
    value = reached[0].value
    if tie > 0:
        others = (*runners_up, *_here_only(found.chain, task))
        equal = [o for o in (chosen, *others) if task.value(o.plan, o.cost) <= value + abs(value) * tie]
        first = chosen
        chosen = min(equal, key=lambda o: (len(o.plan.cuts), last.value(o.plan, o.cost)))
        rest = {o.plan: o for o in (first, *runners_up) if o.plan != chosen.plan}
        runners_up = tuple(rest.values())[:num_runners_up]
    policy = model.policy_of(chosen.plan)
    return Solution(
        plan=chosen.plan, cost=chosen.cost, objective=objective.name, value=task.value(chosen.plan, chosen.cost),
        bound=min(value, reached[0].bound), require=tuple(str(r) for r in requirements), runners_up=runners_up,
        levels=reached if len(levels) > 1 else (), exit_policy=policy.name if policy else "",
        shadow_prices=tuple(ShadowPrice(name=n, per_unit=v) for n, v in found.prices),
    )  # fmt: skip


def _share(until: float, count: int) -> float:
    """The end of the next of `count` equal parts of the time until `until`."""
    now = time.perf_counter()
    return now + max(0.0, until - now) / count


def _first(model: CostModel, task: Task) -> Found:
    """The best over exit policies; executors that were not measured on a segment are let in only where nothing else is."""
    chains = chains_of(model, task.asked)
    found = search_all(chains, task)
    if found.path is None and math.isinf(found.bound) and any(c.left_out for c in chains):
        free = search_all(chains_of(model, task.asked, guesses=True), task)
        found = free if free.path is not None else found
    return found


def _descend(
    model: CostModel, found: Found, task: Task, levels: Sequence[tuple[Single, float]], until: float
) -> tuple[tuple[Level, ...], Found, Task]:
    """The further objectives, each under what those before it reached; last the quickest of what is left."""
    reached, best, now = [_level(found, task)], found, task
    rows = [*levels[1:]]
    if not any(isinstance(o, Latency | Throughput | P95) for o, _ in levels):
        rows.append((Latency(), 0.0))
    tolerance = levels[0][1]
    for i, (objective, following) in enumerate(rows):
        last = reached[-1]
        limit = last.value + abs(last.value) * max(tolerance, _EQUAL)
        asked = now.asked.with_limit(last.objective, limit)
        if time.perf_counter() > until:
            break
        after = Task.of(model, asked, objective, _share(until, len(rows) - i), task.gap)
        other = search_all(chains_of(model, asked), after)
        if other.path is None:
            break
        now = after
        best = replace(other, prices=best.prices)
        reached.append(_level(other, now))
        tolerance = following
    return tuple(reached[: len(levels)]), best, now


def _level(found: Found, task: Task) -> Level:
    return Level(objective=task.objective.name, value=found.value, bound=found.bound)


def _here_only(chain: Chain, task: Task) -> tuple[RunnerUp, ...]:
    """The plan without any crossing, where source and sink are one device that can run it all under the requirements."""
    if chain.source != chain.sink or chain.exits or not math.isfinite(chain.stage[chain.source, 0, -1]):
        return ()
    path = chain.with_fastest_codecs(((chain.source, 0, chain.num_positions - 1),))
    if path is None or broken(chain, task.asked, path, task.score):
        return ()
    plan = chain.plan(path)
    return (RunnerUp(plan=plan, cost=chain.model.predict(plan)),)


def _runners_up(found: Found, task: Task, count: int) -> tuple[RunnerUp, ...]:
    """Without coupling: the programme's next paths. Else the best plans without one of the devices used."""
    chain, best, model = found.chain, found.path, found.chain.model
    if best is None or count < 1:
        return ()
    plans = list(found.others)
    if not (found.coupled or isinstance(task.objective, Throughput | P95)):
        programme = Programme(bare(chain, task.objective.name))
        for path in map(programme.real, programme.next_paths([best], 3 * count)):
            plans.append(chain.plan(kept_together(chain, task, path)))
    else:
        used = {d for d, _, _ in best.stages}
        alike = [next((d for d in group if d in used), None) for group in classes_of(chain)]
        for device in [d for d in alike if d is not None][:count]:
            less = chain.without(chain.members[device], ())
            if time.perf_counter() < task.deadline and math.isfinite(less.stage.min()):
                other = search(less, task).path
                plans += [chain.plan(other)] if other is not None else []
    made = [RunnerUp(plan=plan, cost=model.predict(plan)) for plan in dict.fromkeys(plans)]
    made = [r for r in made if not reasons_against(model, task.asked, r.plan, r.cost, task.score)]
    made = [r for r in made if r.plan != chain.plan(best)]
    return tuple(sorted(made, key=lambda r: task.value(r.plan, r.cost))[:count])
