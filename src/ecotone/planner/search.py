"""The best path of a chain under an objective and requirements, and the best over chains, one for every exit policy.

Exact first: the programme (or the throughput bisection) without what couples stages. Where its answer keeps every
requirement it is the optimum. Where a budget binds (memory of a device that is come back to, points lost, error, energy,
bytes, server seconds, money, rate), bounded.py searches under it, anytime; throughput under such budgets, or with exits, is
a bisection over thresholds of that search. A 95th percentile is searched by its floors (floors.py) and judged by its score.
Exit policies are few: each is a chain, those of least bound first; one whose bound is not below the best is passed over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ecotone.cost import CostModel, PlanCost
from ecotone.plan import Plan, plan_violations
from ecotone.planner.bounded import Bounded, least
from ecotone.planner.chain import Chain, Path, build
from ecotone.planner.floors import largest_load_s, queue_floor_s
from ecotone.planner.network import Network, bare, make
from ecotone.planner.objective import (
    NO_EXIT,
    P95,
    SLACK,
    Asked,
    PlannerError,
    Score,
    Single,
    Throughput,
    exceeds,
    missed,
)
from ecotone.planner.programme import Programme
from ecotone.planner.throughput import least_bottleneck, relaxed_bottleneck
from ecotone.planner.unreached import gathered
from ecotone.units import format_quantity

__all__ = ["Found", "Task", "broken", "chains_of", "kept_together", "reasons_against", "search", "search_all"]

MANY_POSITIONS, COARSE_POSITIONS = 300, 120
COARSE_SHARE, COARSE_GAP = 0.3, 2e-3
_THRESHOLD_GAP, _NEARLY = 1e-7, 0.02
_SINGLE = 2e-7  # share by which sums of single precision may be off


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a search came to: no path where none was found, and a proven lower bound on the value of any.

    `prices`: per limited quantity what one unit more of it would take off the bound.
    """

    path: Path | None
    value: float
    bound: float
    chain: Chain
    coupled: bool  # budgets bind, so the plain programmes do not give runners-up
    prices: tuple[tuple[str, float], ...] = ()
    others: tuple[Plan, ...] = ()  # the best found with other exit policies

    @property
    def plan(self) -> Plan | None:
        return None if self.path is None else self.chain.plan(self.path)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One objective under limits, until `deadline` of the performance counter or a proven `gap`; `score` for a p95."""

    asked: Asked
    objective: Single
    deadline: float
    gap: float = 0.0
    score: Score | None = None
    limit: float = math.inf  # only values below it are of use

    @staticmethod
    def of(model: CostModel, asked: Asked, objective: Single, deadline: float, gap: float = 0.0) -> Task:
        """With the score of the model's world; raises PlannerError where one is needed and not there."""
        score = None
        if isinstance(objective, P95) or math.isfinite(asked.p95_s):
            given = objective if isinstance(objective, P95) else asked.p95
            if given is None or given.score_in is None:
                raise PlannerError("p95 needs a simulation: ask ecotone.solve, or give P95(score_in=...)")
            score = _once_each(given.score_in(model.graph, model.cluster, model.profile))
        return Task(asked, objective, deadline, gap, score)

    def value(self, plan: Plan, cost: PlanCost) -> float:
        """Of a plan under the objective."""
        if isinstance(self.objective, P95) and self.score is not None:
            return self.score(plan)
        return self.objective.value(cost)


def _once_each(score: Score) -> Score:
    """The same, with what it said of a plan remembered: a simulation is dear."""
    known: dict[str, float] = {}

    def remembered(plan: Plan) -> float:
        key = plan.identity()
        if key not in known:
            known[key] = score(plan)
        return known[key]

    return remembered


def chains_of(model: CostModel, asked: Asked, *, guesses: bool = False) -> list[Chain]:
    """A chain without exits, and one for every exit policy that the limits leave room for; raises PlannerError."""
    table = model.profile.accuracy
    policies = table.policies if table else ()
    unknown = set(asked.exits) - {NO_EXIT} - {p.name for p in policies}
    if unknown:
        known = ", ".join([NO_EXIT, *(p.name for p in policies)])
        raise PlannerError(f"exit={sorted(unknown)[0]}: no such exit policy; known are {known}")
    found = [] if asked.exits and NO_EXIT not in asked.exits else [build(model, asked, guesses=guesses)]
    for policy in policies:
        keeps = not exceeds(policy.loss_points, asked.loss_points) and not exceeds(policy.high_points, asked.sure_points)
        if (not asked.exits or policy.name in asked.exits) and keeps:
            found.append(build(model, asked, policy, guesses=guesses))
    if not found:
        wanted = [p for p in policies if p.name in asked.exits]
        losses, sure = min(p.loss_points for p in wanted), min(p.high_points for p in wanted)
        told = missed("accuracy_loss", losses, asked.loss_points)
        if not exceeds(losses, asked.loss_points):
            told = missed("accuracy_loss_sure", sure, asked.sure_points)
        raise PlannerError(f"no plan: {told} with the exits asked for")
    return found


def broken(chain: Chain, asked: Asked, path: Path, score: Score | None = None) -> tuple[str, ...]:
    """Every reason why a path is no answer: what it breaks of the plan's checker, of memory and of the requirements."""
    try:
        plan = chain.plan(path)
    except PlannerError as error:
        return (str(error),)
    cost = chain.model.predict(plan)
    return reasons_against(chain.model, asked, plan, cost, score)


def reasons_against(
    model: CostModel, asked: Asked, plan: Plan, cost: PlanCost, score: Score | None = None
) -> tuple[str, ...]:
    """The same of a plan and its cost; the score is asked last, and only of a plan that keeps all else."""
    found = list(plan_violations(plan, model.graph, model.cluster))
    for device in cost.devices:
        limit = min(float(model.devices[device.device].memory_bytes), asked.memory_bytes)
        if exceeds(device.memory_bytes, limit):
            need, has = (format_quantity(v, "bytes") for v in (device.memory_bytes, limit))
            found.append(f"memory: {device.device} needs {need} and may use {has}")
    found += asked.violations(cost)
    if not found and math.isfinite(asked.p95_s) and score is not None:
        seconds = score(plan)
        found += [missed("p95", seconds, asked.p95_s)] if exceeds(seconds, asked.p95_s) else []
    return tuple(found)


def _judge(chain: Chain, task: Task) -> Callable[[Path], float]:
    """The true value of a path, inf where it is no answer."""

    def judge(path: Path) -> float:
        try:
            plan = chain.plan(path)
        except PlannerError:
            return math.inf
        cost = chain.model.predict(plan)
        if reasons_against(chain.model, task.asked, plan, cost, task.score):
            return math.inf
        return task.value(plan, cost)

    return judge


def search_all(chains: Iterable[Chain], task: Task) -> Found:
    """The best over chains; the bound is that of all of them."""
    every = list(chains)
    if len(every) == 1:
        return search(every[0], task)
    rough = sorted(((_rough_bound(chain, task), i) for i, chain in enumerate(every)))
    best: Found | None = None
    bound, plans = math.inf, []
    for floor, i in rough:
        limit = min(task.limit, best.value if best is not None else math.inf)
        if floor >= limit:
            bound = min(bound, floor)
            continue
        if time.perf_counter() > task.deadline and best is not None and best.path is not None:
            bound = min(bound, floor)
            continue
        found = search(every[i], replace(task, limit=limit))
        bound = min(bound, max(found.bound, floor))
        plans += [found.plan] if found.plan is not None else []
        if best is None or found.value < best.value:
            best = found
    if best is None:  # no policy has a path, or none below the limit
        return Found(None, math.inf, math.inf, every[rough[0][1]], False)
    return replace(best, bound=min(bound, best.value), others=tuple(p for p in plans if p is not None and p != best.plan))


def _rough_bound(chain: Chain, task: Task) -> float:
    """A quick lower bound on the value of any path."""
    if isinstance(task.objective, Throughput):
        return relaxed_bottleneck(chain)
    network = bare(chain, task.objective.name)
    return _rounded(network, Programme(network).backward(np.zeros(0)).least)


def _rounded(network: Network, bound: float) -> float:
    """A sum of single-precision tables may be above the true one by so much."""
    return bound if network.stage.dtype == np.float64 else bound - abs(bound) * _SINGLE


def search(chain: Chain, task: Task) -> Found:
    """The best path of a chain; what nobody reaches of it is kept together (unreached.py)."""
    found = _search(chain, task)
    if found.path is None:
        return found
    path, value = gathered(chain, found.path, found.value, _judge(chain, task))
    return replace(found, path=path, value=value, bound=min(found.bound, value))


def kept_together(chain: Chain, task: Task, path: Path) -> Path:
    """The same, with what nobody reaches of it on one device where the requirements allow that."""
    judge = _judge(chain, task)
    return gathered(chain, path, judge(path), judge)[0]


def _search(chain: Chain, task: Task) -> Found:
    if isinstance(task.objective, Throughput):
        return _widest(chain, task)
    name, asked = task.objective.name, task.asked
    limit = min(task.limit, asked.limit(name) * (1 + SLACK))
    plain = bare(chain, name)
    programme = Programme(plain)
    table = programme.backward(programme.no_prices)
    path = programme.path(table)
    if path is None:
        return Found(None, math.inf, math.inf, chain, False)
    real, bound = programme.real(path), _rounded(plain, table.least)
    if bound > limit + abs(limit) * SLACK:
        return Found(None, math.inf, math.inf, chain, False)
    judge = _judge(chain, task)
    value = judge(real)
    if value <= bound + abs(bound) * max(SLACK, task.gap, 0.0 if plain.stage.dtype == np.float64 else 1e-6):
        return Found(real, value, min(bound, value), chain, False)
    if isinstance(task.objective, P95):
        return _percentile(chain, task, real if math.isfinite(value) else None, value, bound)
    network = make(chain, asked, name)
    start = _coarse(chain, task, limit) if chain.num_positions > MANY_POSITIONS else None
    found = least(network, judge, task.deadline, limit=limit, gap=task.gap, start=start)
    best = Found(found.path, found.value, max(_rounded(network, found.bound), bound), chain, True, _prices(network, found))
    if value < best.value and value <= limit + abs(limit) * SLACK:  # judged above its floor, and still the best
        best = replace(best, path=real, value=value)
    return replace(best, bound=min(best.bound, best.value)) if best.path is not None else best


def _coarse(chain: Chain, task: Task, limit: float) -> Bounded:
    """The answer and the prices of the chain with fewer cuts: quick to get, and near."""
    step = math.ceil(chain.num_positions / COARSE_POSITIONS)
    thin = chain.thinned(step)
    network = make(thin, task.asked, task.objective.name)
    until = time.perf_counter() + COARSE_SHARE * (task.deadline - time.perf_counter())
    found = least(network, _judge(thin, task), until, limit=limit, gap=max(task.gap, COARSE_GAP))
    path = None if found.path is None else chain.at_cuts_of(thin, found.path)
    return replace(found, path=path, bound=-math.inf)


def _prices(network: Network, found: Bounded) -> tuple[tuple[str, float], ...]:
    """Per total and per place's memory: value per unit of the quantity."""
    rows, count = [], network.chain.num_devices
    for b, held in enumerate(network.held):
        if held.name == "memory":
            own = found.price[b * count : (b + 1) * count]
            names = [d.name for d in network.chain.devices]
            rooms = network.chain.capacity
            rows += [(f"memory of {n}", float(v / c)) for n, v, c in zip(names, own, rooms, strict=True) if v > 0]
    totals = zip(network.totals, found.price[len(network.held) * count :], strict=True)
    rows += [(t.name, float(v / t.scale)) for t, v in totals if v > 0 and t.scale > 0 and math.isfinite(t.limit)]
    return tuple(rows)


def _widest(chain: Chain, task: Task) -> Found:
    """Least bottleneck, each device one row of stages at most."""
    asked, accept = task.asked, _judge(chain, task)
    limit = min(task.limit, asked.bottleneck_s * (1 + SLACK))
    if chain.exits:
        lower = relaxed_bottleneck(chain)
    else:
        widest = least_bottleneck(chain, task.deadline)
        lower = widest.bound
        if widest.path is None and math.isinf(widest.bound):
            return Found(None, math.inf, math.inf, chain, False)
        if widest.path is not None and math.isfinite(accept(widest.path)):
            return Found(widest.path, widest.value, widest.bound, chain, False)
    if lower > limit:
        return Found(None, math.inf, math.inf, chain, True)
    return _by_threshold(chain, task, lower, limit)


def _by_threshold(chain: Chain, task: Task, lower: float, limit: float) -> Found:
    """Least bottleneck under coupled budgets: bisection, each step a search for any path whose loads keep a threshold.

    Where exits of a class's device and its next transfer share its link to the sink, no column adds them up: there a step
    that finds nothing proves nothing.
    """
    proves = not (chain.is_class.any() and chain.exits)

    def any_path(threshold: float) -> tuple[Path | None, float, bool]:
        within = replace(task.asked, bottleneck_s=min(threshold, task.asked.bottleneck_s))
        network = make(chain, within, "latency", once=True)
        judge = _judge(chain, replace(task, asked=within))
        found = least(network, judge, task.deadline, limit=within.latency_s, any_will_do=True)
        value = judge(found.path) if found.path is not None else math.inf
        return found.path, value, proves and found.path is None and math.isinf(found.bound)

    path, value, none_exists = any_path(limit)
    if path is None:
        return Found(None, math.inf, math.inf if none_exists else lower, chain, True)
    floor, was_last = lower, False
    while value > floor + abs(floor) * max(_THRESHOLD_GAP, task.gap) and time.perf_counter() < task.deadline:
        is_last = value <= floor * (1 + _NEARLY) and not was_last  # is there any that is better at all?
        middle = value * (1 - 10 * SLACK) if is_last else (value + floor) / 2
        other, reached, none_exists = any_path(middle)
        was_last = is_last
        if other is not None and reached < value:
            path, value = other, reached
            continue
        floor = middle
        lower = max(lower, middle) if none_exists else lower
    return Found(path, value, min(value, lower), chain, True)


def _percentile(chain: Chain, task: Task, path: Path | None, value: float, bound: float) -> Found:
    """Least score: paths in the order of their floor, judged one by one until no floor is below the best score.

    Plans that load anything so much that its queue alone is worse than the best score are left out (floors.py, equation 2):
    with queues the plan of least latency is seldom the best, so that of least bottleneck is judged first too.
    """
    judge, objective = _judge(chain, task), task.objective
    assert isinstance(objective, P95)
    arrivals = objective.arrivals_s if not chain.exits else ()
    if len(arrivals):
        # the processor and the coder of a device share its load: the greater has at least half of it
        bound = max(bound, queue_floor_s(arrivals, relaxed_bottleneck(chain) / 2))
        wide = _widest(chain, replace(task, objective=Throughput(), limit=math.inf, deadline=_half(task.deadline)))
        other = judge(wide.path) if wide.path is not None else math.inf
        if other < value:
            path, value = wide.path, other
    limit = min(value, task.limit, task.asked.p95_s * (1 + SLACK))
    pinch = largest_load_s(arrivals, limit) if len(arrivals) else math.inf
    network = make(chain, task.asked, "p95", pinch_s=pinch)
    found = least(network, judge, task.deadline, limit=limit, gap=task.gap)
    lower = max(bound, min(_rounded(network, found.bound), limit))
    if found.path is not None and found.value < value:
        path, value = found.path, found.value
    if path is None or value > task.limit:
        return Found(None, math.inf, math.inf if math.isinf(found.bound) else lower, chain, True)
    return Found(path, value, min(lower, value), chain, True, _prices(network, found))


def _half(deadline: float) -> float:
    now = time.perf_counter()
    return now + (deadline - now) / 2
