"""The best plan of a model with branches over all orders of its blocks: `solve_dag(graph, cluster, profile, ...)`.

`solve` is exact for the order that the capture fixed. Here orders are found first, on times block by block (blockwise.py):
 1. Where the ideals of the graph are few enough, the best chains of ideals (ideals.py), exact for any number of stages;
    where memory binds, by labels over the same lattice (ideals_in_memory.py).
 2. Else the best chain of up to MOST_STAGES stages, row of machines by row, one minimum cut each (rows.py), and a bound
    on all plans by the mixed-integer programme of direct sends (placement.py).
 3. Each order found becomes a graph and a profile of its own (reordering.py), on which `solve` gives the plan under all
    requirements, with every codec and budget; the best wins, the captured order among them.
 4. With a `score` the best few plans are compared by that instead: seconds with overlap, which only a simulation gets right.
A graph whose blocks stand in one row has L + 1 ideals and one order, so there the answer is that of `solve`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ecotone.cluster import Cluster
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.blockwise import ADDITIVE, Blockwise, Prices, bits_of, blockwise, prices
from ecotone.planner.ideals import Chained, Lattice, Programme, frontiers_of, lattice_of
from ecotone.planner.ideals_in_memory import least_in_memory
from ecotone.planner.objective import SLACK, Asked, Objective, PlannerError, Requirement, Score
from ecotone.planner.placement import least_placement
from ecotone.planner.reordering import profile_in_order, same_cuts
from ecotone.planner.rows import best_of_rows
from ecotone.planner.solve import NUM_RUNNERS_UP, RunnerUp, Solution, solve
from ecotone.profile import Payload, Profile

__all__ = ["DagSolution", "Scored", "solve_dag"]

MOST_IDEALS = 40_000
MOST_STAGES = 3
MOST_DEVICES = 16  # above it orders are sought among the most promising of them, without a bound
NUM_ORDERS = 6
MOST_IDLE_SETS = 64  # sets of devices that take part, for energy
NOTHING_GAINED = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A candidate: what the objective says of it, and the score (nan where none was asked)."""

    plan: Plan
    value: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DagSolution:
    """A Solution, and the world it is of: `graph` and `profile` in the order of blocks that its plan cuts.

    `solution.bound` is a lower bound over all orders (0: none is proven). `captured`: the best in the order of the
    capture, None where that keeps no requirement. `method`: "chain" (one order only), "ideals", "rows", or "captured" (no
    other could be sought, or there are exit policies); `num_ideals` 0: not counted.
    """

    solution: Solution
    graph: Graph
    profile: Profile
    method: str
    num_ideals: int
    captured: Solution | None
    candidates: tuple[Scored, ...] = ()

    @property
    def plan(self) -> Plan:
        return self.solution.plan

    @property
    def cost(self) -> PlanCost:
        return self.solution.cost

    @property
    def value(self) -> float:
        return self.solution.value

    @property
    def bound(self) -> float:
        return self.solution.bound

    @property
    def order(self) -> tuple[int, ...]:
        """Of the captured blocks; () as captured."""
        return self.graph.order

    @property
    def gain(self) -> float:
        """By what share this is below the best plan of the captured order."""
        before = self.captured.value if self.captured else math.inf
        return 1 - self.value / before if 0 < before < math.inf else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _World:
    """One order of the blocks, and its solution."""

    graph: Graph
    profile: Profile
    solution: Solution


def solve_dag(
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    objective: Objective,
    require: Iterable[Requirement | str] = (),
    *,
    score: Score | None = None,
    time_limit_s: float = 20.0,
    tie: float = 0.0,
    num_runners_up: int = NUM_RUNNERS_UP,
    gap: float = 0.0,
    guess: bool = False,
    most_ideals: int = MOST_IDEALS,
) -> DagSolution:
    """The best plan under `objective` that keeps all of `require`, in whatever order of the blocks.

    `score` decides among the best few plans; another order than the captured one must be better, by the share `tie`. The
    bound is on the objective: also on a score that is never below it, as the seconds of one request on a chain of stages
    are. `num_runners_up`, `gap` as in `solve`. `guess`: lossy codecs also cross where their effect was not measured but that
    of the same tensors was; such a plan is to be measured before it is used. Raises PlannerError as `solve` does.
    """
    deadline = time.perf_counter() + time_limit_s
    search = _Search(graph, cluster, profile, objective, tuple(require), deadline, tie, num_runners_up, gap)
    lattice = lattice_of(graph, most_ideals)
    is_chain = lattice is not None and lattice.num_ideals == graph.num_blocks + 1
    has_policies = bool(graph.exits and profile.accuracy and profile.accuracy.policies)
    captured, refusal = search.captured(1.0 if is_chain or has_policies else 0.5)
    if lattice is not None and is_chain:
        if captured is None:
            raise refusal or PlannerError("no plan")
        return search.answer("chain", lattice.num_ideals, [captured], captured.solution.bound, score)
    if has_policies:  # means over exits do not add up over blocks
        if captured is None:
            raise refusal or PlannerError("no plan")
        return search.answer("captured", 0, [captured], 0.0, score)
    near = _near(CostModel(graph, cluster, profile), captured.solution if captured else None)
    try:
        tables = blockwise(CostModel(graph, near, profile), search.asked, guess=guess)
    except PlannerError:  # no executor that runs every block by itself
        if captured is None:
            raise
        return search.answer("captured", 0, [captured], 0.0, score)
    if lattice is not None:
        chains, bound = _over_lattice(tables, objective.name, lattice, deadline)
    else:
        chains, bound = _over_rows(tables, objective.name, deadline)
    worlds = [captured] if captured else []
    worlds += search.orders(tables, chains, guess)
    if not worlds:
        raise refusal or PlannerError("no plan keeps the requirements in any order of the blocks")
    if captured is not None:
        bound = min(bound, captured.solution.bound)
    bound = bound if near is cluster else 0.0
    method, count = ("ideals", lattice.num_ideals) if lattice else ("rows", 0)
    return search.answer(method, count, worlds, bound, score)


def _near(model: CostModel, captured: Solution | None) -> Cluster:
    """The devices among which orders are sought: all, or MOST_DEVICES, those in use first, then the fastest of each kind."""
    cluster = model.cluster
    if len(cluster.devices) <= MOST_DEVICES:
        return cluster
    plans = [captured.plan, *(r.plan for r in captured.runners_up)] if captured else []
    chosen = dict.fromkeys([cluster.source, cluster.sink, *(d for plan in plans for d in plan.devices)])
    rows, taken = [], Counter[str]()
    for seconds, _, device in sorted((_whole_s(model, d.name), i, d) for i, d in enumerate(cluster.devices)):
        if math.isfinite(seconds):
            rows.append((taken[device.kind], seconds, device.name))
            taken[device.kind] += bool(device.kind)
    chosen |= dict.fromkeys(name for _, _, name in sorted(rows))
    names = set(itertools.islice(chosen, MOST_DEVICES))
    links = tuple(k for k in cluster.links if {k.source, k.target} <= names)
    return replace(cluster, devices=tuple(d for d in cluster.devices if d.name in names), links=links)


def _whole_s(model: CostModel, device: str) -> float:
    times = (model.stage_times(device, e) for e in model.executors(device))
    return min((t.seconds(0, model.graph.num_blocks)[0] for t in times if t), default=math.inf)


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A plan of one order: its best, or a runner-up in its place."""

    world: _World
    solution: Solution


class _Search:
    """What one call works with."""

    def __init__(
        self, graph: Graph, cluster: Cluster, profile: Profile, objective: Objective,
        require: tuple[Requirement | str, ...], deadline: float, tie: float, num_runners_up: int, gap: float,
    ) -> None:  # fmt: skip
        self.graph, self.cluster, self.profile = graph, cluster, profile
        self.objective, self.require, self.deadline, self.tie = objective, require, deadline, tie
        self.num_runners_up, self.gap = num_runners_up, gap
        self.asked = Asked.of(require, objective)

    def captured(self, share: float) -> tuple[_World | None, PlannerError | None]:
        """The best plan in the order that the graph has, sought for a share of the time; or why there is none."""
        try:
            return _World(self.graph, self.profile, self._solve(self.graph, self.profile, share)), None
        except PlannerError as error:
            return None, error

    def _solve(self, graph: Graph, profile: Profile, share: float = 1.0) -> Solution:
        left = max(0.5, share * (self.deadline - time.perf_counter()))
        return solve(
            graph, self.cluster, profile, self.objective, self.require, time_limit_s=left, tie=self.tie, gap=self.gap,
            num_runners_up=self.num_runners_up, nearest=graph is self.graph,
        )  # fmt: skip

    def orders(self, tables: Blockwise, chains: Iterable[Chained], guess: bool) -> list[_World]:
        """The best plan of each order that `chains` name, cut where they are and where the captured order is."""
        cuts: dict[tuple[int, ...], set[int]] = {}
        for chained in chains:
            sizes = itertools.accumulate(len(blocks) for _, blocks in chained.stages)
            cuts.setdefault(chained.order, set()).update(sizes)
        worlds = []
        for order, places in itertools.islice(cuts.items(), 2 * NUM_ORDERS):
            if order == tuple(range(self.graph.num_blocks)):
                continue
            other = self.graph.reordered(order)
            chosen = {*places, *same_cuts(self.graph, other, self.profile.cuts)}
            profile = profile_in_order(self.graph, other, self.cluster, self.profile, chosen)
            if guess:
                profile = replace(profile, payloads=(*profile.payloads, *_guesses(tables, other, profile)))
            try:
                worlds.append(_World(other, profile, self._solve(other, profile)))
            except PlannerError:  # this order keeps no requirement
                continue
            if time.perf_counter() > self.deadline:
                break
        return worlds

    def answer(self, method: str, num_ideals: int, worlds: list[_World], bound: float, score: Score | None) -> DagSolution:
        """The best of some worlds, the captured one first among them where it has a plan; by their scores where asked.

        For a score the runners-up of every order compete too: overlap may make a plan of a greater sum the quicker one.
        """
        first = worlds[0]
        captured = first.solution if first.graph is self.graph else None
        rows = [_Candidate(w, w.solution) for w in worlds]
        if score:
            rows += [_Candidate(w, self._second(w.solution, r)) for w in worlds for r in w.solution.runners_up]
        ranked = sorted(rows, key=lambda c: c.solution.value)[: NUM_ORDERS * (2 if score else 1)]
        values = [score(c.solution.plan) if score else c.solution.value for c in ranked]
        least = min(values)
        best = ranked[values.index(least)]
        own = next((v for c, v in zip(ranked, values, strict=True) if c.solution is captured), math.inf)
        if captured is not None and not least < own - abs(own) * max(self.tie, NOTHING_GAINED):
            best = rows[0]
        scored = tuple(
            Scored(plan=c.solution.plan, value=c.solution.value, score=value if score else math.nan)
            for c, value in zip(ranked, values, strict=True)
        )
        return DagSolution(
            solution=replace(best.solution, bound=min(bound, best.solution.value)), graph=best.world.graph,
            profile=best.world.profile, method=method, num_ideals=num_ideals, captured=captured, candidates=scored,
        )  # fmt: skip

    def _second(self, solution: Solution, other: RunnerUp) -> Solution:
        """A runner-up as the answer, what was the answer among its runners-up."""
        rest = (RunnerUp(plan=solution.plan, cost=solution.cost), *(r for r in solution.runners_up if r is not other))
        value = self.objective.value(other.cost)
        return replace(solution, plan=other.plan, cost=other.cost, value=value, runners_up=rest)


def _over_lattice(tables: Blockwise, objective: str, lattice: Lattice, deadline: float) -> tuple[list[Chained], float]:
    """The best chains of ideals, those that fit memory first, and a bound on every plan; 0 where none is proven."""
    chains: list[Chained] = []
    every, is_exact = _prices(tables, objective)
    bound = math.inf
    for each in every:
        programme = Programme(each, lattice)
        found = programme.best_few(NUM_ORDERS)
        least = found[0].value if found else math.inf
        if found and not _fits(tables, found[0]):
            upper = min((c.value for c in found if _fits(tables, c)), default=math.inf)
            now = time.perf_counter()
            kept = least_in_memory(programme, now + 0.5 * max(0.2, deadline - now), upper * (1 + SLACK))
            if np.array_equal(tables.weight, tables.least_weight):  # else what is shared was counted twice: no bound
                least = max(least, min(kept.bound, upper))
            found += [kept.chained] if kept.chained else []
        chains += found
        bound = min(bound, least)
    chains.sort(key=lambda c: (not _fits(tables, c), c.value))
    if objective != "latency":  # a limit on latency may decide
        chains = chains[:NUM_ORDERS] + Programme(prices(tables, "latency"), lattice).best_few(NUM_ORDERS // 2)
    return chains, bound if is_exact else 0.0


def _over_rows(tables: Blockwise, objective: str, deadline: float) -> tuple[list[Chained], float]:
    """The same where the lattice is too large: rows of machines for the chains, direct sends for the bound."""
    chains: list[Chained] = []
    every, is_exact = _prices(tables, objective)
    bound = math.inf
    for i, each in enumerate(every):
        now = time.perf_counter()
        share = max(0.1, (deadline - now) / (len(every) - i))
        chains += best_of_rows(each, MOST_STAGES, now + 0.5 * share).found
        try:
            bound = min(bound, least_placement(each, 0.3 * share, relaxed=True).bound)
        except PlannerError:  # nothing keeps memory, with these devices
            continue
    return sorted(chains, key=lambda c: (not _fits(tables, c), c.value)), bound if is_exact else 0.0


def _prices(tables: Blockwise, objective: str) -> tuple[list[Prices], bool]:
    """Sets of prices of which the least over all is the objective's, and whether that is so.

    For energy one for each set of devices that may take part, as far as idle watts tell them apart. Objectives that do not
    add up over blocks get those of latency, and so does energy with too many sets all idle watts at once: for orders only.
    """
    if objective not in ADDITIVE:
        return [prices(tables, "latency")], False
    if objective != "energy":
        return [prices(tables, objective)], True
    ends = {tables.source, tables.sink}
    power = [d.power for d in tables.model.cluster.devices]
    idle = [d for d in sorted({int(m) for m in tables.device} - ends) if power[d].idle_watt > 0]
    if 1 << len(idle) > MOST_IDLE_SETS:
        return [prices(tables, objective, idle)], False
    chosen = (c for size in range(len(idle) + 1) for c in itertools.combinations(idle, size))
    return [prices(tables, objective, c) for c in chosen], True


def _fits(tables: Blockwise, chained: Chained) -> bool:
    """Whether every device holds its blocks' weights and its largest set of live tensors (shared weights once)."""
    graph, done = tables.graph, 0
    used: dict[int, set[int]] = {}
    peak = np.zeros(tables.num_devices)
    for machine, blocks in chained.stages:
        device = int(tables.device[machine])
        for v in blocks:
            alive = float((frontiers_of(graph, (done,)) @ tables.raw)[0])
            made = sum(graph.tensors[t].size_bytes for t in graph.blocks[v].outputs)
            peak[device] = max(peak[device], alive + made)
            used.setdefault(device, set()).update(graph.blocks[v].parameters)
            done |= 1 << v
    held = {d: sum(graph.parameters[p].size_bytes for p in own) for d, own in used.items()}
    return all(size + peak[d] <= tables.capacity[d] * (1 + SLACK) for d, size in held.items())


def _guesses(tables: Blockwise, other: Graph, profile: Profile) -> Iterator[Payload]:
    """Payloads for cuts of another order where none was measured: bytes by tensor, the worst effect of any captured cut."""
    model, known = tables.model, {(p.position, p.codec) for p in profile.payloads}
    for cut in profile.cuts:
        frontier = other.frontier(cut)
        row = np.zeros((1, len(other.tensors)), dtype=np.bool_)
        row[0, list(frontier)] = True
        sizes = tables.sizes(row)[0]
        near = [p for p in model.profile.cuts if set(model.graph.frontier(p)) & set(frontier)]
        for k, codec in enumerate(tables.codecs):
            if (cut, codec) in known or not math.isfinite(sizes[k]):
                continue
            rows = [model.payload(p, codec) for p in near if math.isfinite(tables.size[bits_of(model.graph.frontier(p))][k])]
            found = [p for p in rows if p is not None]
            worst = max((p.disagreement for p in found), default=0.0)
            error = max((p.relative_error for p in found), default=0.0)
            yield Payload(position=cut, codec=codec, size_bytes=float(sizes[k]), relative_error=error, disagreement=worst)
