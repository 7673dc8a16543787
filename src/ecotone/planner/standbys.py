"""The plans that a plan set is chosen from, and the least cost that any plan has in each state of failure.

For the main model: the best plan and the next best; the best plan of every state that a failure of a plan in the pool leads
to; for each of them the best that goes on from the same head on the source (its boundary tensor serves both), the local
fallback (same head, the tail on the source as a stage of its own), and the whole model on the source. For each variant
(a smaller model, an earlier exit, a path round a device): its best plan of every state, and the local one.
A standby keeps the limits on accuracy, error, codecs, executors and devices, not those on time, bytes and energy: a late
answer is better than none.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecotone.cluster import Cluster
from ecotone.cost import CostModel, FloatArray, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.chain import Chain, Path, build
from ecotone.planner.failures import Element, States, states_of
from ecotone.planner.objective import Asked, Latency, Score, Throughput, exceeds
from ecotone.planner.search import Found, Task, chains_of, search, search_all
from ecotone.planner.solve import Solution
from ecotone.profile import Profile

__all__ = ["Candidate", "Ground", "Pool", "Variant", "gather"]

MAX_POOL = 24
MAX_OF_VARIANT = 3
_ROOMY = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Another model for the same inputs and outputs, measured on the same cluster; `loss_points` of accuracy less."""

    name: str
    graph: Graph
    profile: Profile
    loss_points: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan of the pool. `value_s`: what the objective minimises plus the price of the accuracy that it gives up."""

    plan: Plan
    cost: PlanCost
    value_s: float
    loss_points: float = 0.0
    variant: str = ""
    keeps_limits: bool = True

    @property
    def may_lead(self) -> bool:
        """Not cut on one device without need (an exit is one), as only a fallback is that shares a head."""
        return all(a.device != b.device or a.exit for a, b in itertools.pairwise(self.plan.stages))

    @property
    def is_local(self) -> bool:
        """Computed by the source alone."""
        return set(self.plan.devices) == {self.plan.source}


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The candidates, the plain plan first; `elements` that any of them needs, and their states; `least_s` (S,): no plan
    has less in that state (inf: none runs).
    """

    candidates: tuple[Candidate, ...]
    elements: tuple[Element, ...]
    states: States
    least_s: FloatArray


class Ground:
    """One model on the cluster, as tables; answers which plan is best while some elements are down."""

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        profile: Profile,
        objective: Latency | Throughput,
        asked: Asked,
        elements: Sequence[Element],
        deadline: float,
    ) -> None:
        self.model = CostModel(graph, cluster, profile)
        self.objective, self.deadline, self.elements = objective, deadline, tuple(elements)
        inf = math.inf
        self.asked = replace(
            asked, latency_s=inf, bottleneck_s=inf, size_bytes=inf, energy_joule=inf, stages=inf, server_s=inf, money=inf,
            p95_s=inf,
        )  # fmt: skip
        self.chains = chains_of(self.model, self.asked)
        self.task = Task.of(self.model, self.asked, objective, deadline)
        self.limits = {d.name: min(float(d.memory_bytes), asked.memory_bytes) for d in cluster.devices}
        self._found: dict[frozenset[int], tuple[Found, frozenset[int]]] = {}
        self._roomy: dict[str, Chain] = {}
        self._percentile: Score | None = None

    def best(self, down: frozenset[int]) -> Found:
        """The best path while `down` are down; that of a state with fewer down where it still runs.

        After the deadline no path, and the bound of a state with fewer down: taking something away makes nothing faster.
        """
        return self._look(down)[0]

    def _look(self, down: frozenset[int]) -> tuple[Found, frozenset[int]]:
        """The same with the elements that its path needs."""
        if down in self._found:
            return self._found[down]
        before = None
        for element in down:
            before, needs = self._look(down - {element})
            if element not in needs:
                self._found[down] = (before, needs)
                return before, needs
        if before is not None and time.perf_counter() > self.deadline:
            found = replace(before, path=None, value=math.inf)
        else:
            found = search_all([self._without(chain, down) for chain in self.chains], self.task)
        plan = found.plan
        hit = frozenset(i for i, e in enumerate(self.elements) if plan is not None and e.hits(plan))
        self._found[down] = (found, hit)
        return found, hit

    def best_plans(self, survive: int) -> list[Plan]:
        """The best plan without failures, and of every state of up to `survive` failures that lead from one to the next."""
        reached, plans = [frozenset[int]()], []
        for down in reached:  # grows
            found, needs = self._look(down)
            if found.plan is None:
                continue
            plans.append(found.plan)
            after = [down | {i} for i in sorted(needs) if len(down) < survive]
            reached += [state for state in after if state not in reached]
        return list(dict.fromkeys(plans))

    def after_head(self, plan: Plan, down: Iterable[int]) -> Plan | None:
        """The best plan that begins with the same stage on the source and avoids the elements `down`; of the same exits."""
        head, whole = plan.stages[0], self._chain_of(plan)
        if head.device != plan.source or len(plan.stages) < 2 or whole is None or head.stop not in whole.cuts:
            return None
        chain = self._without(whole, down)
        if head.executor not in chain.executors:
            return None
        begun = chain.beginning_with(chain.source, chain.cuts.index(head.stop), head.executor)
        return search(begun, self.task).plan

    def local_tail(self, plan: Plan) -> Plan | None:
        """The same head, then all the rest on the source, whatever memory it takes (the set is checked as a whole); the
        whole model where the head is not on the source. None where nothing measured covers it."""
        kept = 0
        while kept < len(plan.stages) - 1 and plan.stages[kept].device == plan.source:
            kept += 1
        if not kept:
            return self.whole_local()
        chain = self._roomy_chain(self._policy(plan))
        if any(s.stop not in chain.cuts or s.executor not in chain.executors for s in plan.stages[:kept]):
            return None
        head = [(chain.source, chain.cuts.index(s.start), chain.cuts.index(s.stop)) for s in plan.stages[:kept]]
        executors = [chain.executors.index(s.executor) for s in plan.stages[:kept]]
        tail = _on_source(chain, head[-1][2])
        if not all(math.isfinite(chain.stage[s]) for s in tail) or not math.isfinite(
            chain.best[-1, chain.source, chain.sink]
        ):
            return None
        executors += [int(chain.executor[s]) for s in tail]
        codecs = (*((-1,) * (len(head) + len(tail))), int(chain.choice[-1, chain.source, chain.sink]))
        return replace(chain.plan(Path((*head, *tail), codecs, tuple(executors))), epoch=plan.epoch)

    def whole_local(self) -> Plan | None:
        """The whole model on the source, whatever memory it takes: the exits that are best there, or none."""
        found = []
        for each in self.chains:
            chain = self._roomy_chain(each.policy.name if each.policy else "")
            path = chain.with_fastest_codecs(_on_source(chain, 0))
            found += [chain.plan(path)] if path is not None else []
        return min(found, key=lambda p: self.task.value(p, self.model.predict(p)), default=None)

    def keeps_p95(self, asked: Asked, plan: Plan) -> bool:
        """Whether a limit on the 95th percentile is kept, where there is one."""
        if not math.isfinite(asked.p95_s):
            return True
        if self._percentile is None:
            self._percentile = Task.of(self.model, asked, self.objective, self.deadline).score
        return self._percentile is None or not exceeds(self._percentile(plan), asked.p95_s)

    def _policy(self, plan: Plan) -> str:
        policy = self.model.policy_of(plan)
        return policy.name if policy else ""

    def _chain_of(self, plan: Plan) -> Chain | None:
        name = self._policy(plan)
        return next((c for c in self.chains if (c.policy.name if c.policy else "") == name), None)

    def _without(self, chain: Chain, down: Iterable[int]) -> Chain:
        gone = [self.elements[i] for i in down]
        devices = [e.devices[0] for e in gone if not e.is_link]
        pairs = [e.devices for e in gone if e.is_link]
        return chain.without(devices, [p for a, b in pairs for p in ((a, b), (b, a))])

    def _roomy_chain(self, policy: str) -> Chain:
        if policy not in self._roomy:
            model = self.model
            devices = tuple(replace(d, memory_bytes=_ROOMY) for d in model.cluster.devices)
            roomy = CostModel(model.graph, replace(model.cluster, devices=devices), model.profile)
            table = model.profile.accuracy
            asked = replace(self.asked, memory_bytes=math.inf)
            self._roomy[policy] = build(roomy, asked, table.policy(policy) if table and policy else None)
        return self._roomy[policy]


def _on_source(chain: Chain, start: int) -> tuple[tuple[int, int, int], ...]:
    """Stages from `start` to the end on the source, parted where exits are."""
    at = [start, *(e.position for e in chain.exits if e.position > start), chain.num_positions - 1]
    return tuple((chain.source, a, b) for a, b in itertools.pairwise(at))


def gather(
    plain: Solution,
    main: Ground,
    asked: Asked,
    variants: Sequence[tuple[Variant, Ground]],
    survive: int,
    point_s: float,
) -> Pool:
    """The pool round the best plan `plain`, at most MAX_POOL plans; `point_s`: seconds that a point of accuracy is worth."""
    made: list[Candidate] = []
    for variant, ground in variants:
        own = itertools.islice(_unlike(_variant_plans(ground, survive)), MAX_OF_VARIANT)
        made += [_candidate(plan, ground, asked, variant, point_s) for plan in own]
    plans = itertools.islice(_unlike(_main_plans(plain, main, survive)), max(1, MAX_POOL - len(made)))
    candidates = (*(_candidate(plan, main, asked, None, point_s) for plan in plans), *made)
    best = [p for g in (main, *(g for _, g in variants)) for p in g.best_plans(survive)]
    used = [i for i, e in enumerate(main.elements) if any(e.hits(p) for p in (*best, *(c.plan for c in candidates)))]
    elements = tuple(main.elements[i] for i in used)
    states = states_of(elements, survive, [e for e in main.elements if e not in elements])
    least = np.full(len(states.down), math.inf)
    for price, ground in ((0.0, main), *((v.loss_points * point_s, g) for v, g in variants)):
        bounds = [ground.best(frozenset(used[i] for i in down)).bound + price for down in states.down]
        least = np.minimum(least, bounds)
    for candidate in candidates:
        needs = frozenset(i for i, e in enumerate(elements) if e.hits(candidate.plan))
        stands = np.array([not needs & down for down in states.down])
        least = np.minimum(least, np.where(stands, candidate.value_s, math.inf))
    return Pool(candidates, elements, states, least)


def _main_plans(plain: Solution, main: Ground, survive: int) -> Iterator[Plan | None]:
    later = main.best_plans(survive)
    first = [plain.plan, *later[:1]]
    yield from (*first, main.local_tail(plain.plan), main.whole_local(), *later)
    everything = main.best(frozenset(i for i, e in enumerate(main.elements) if e.hits(plain.plan)))
    yield everything.plan
    near = [r.plan for r in plain.runners_up]
    for plan in dict.fromkeys((*first, *later, *near)):
        hit = [i for i, e in enumerate(main.elements) if e.hits(plan)]
        yield main.local_tail(plan)
        yield from (main.after_head(plan, down) for down in (*({i} for i in hit), hit))
    yield from near


def _variant_plans(ground: Ground, survive: int) -> Iterator[Plan | None]:
    yield ground.whole_local()
    yield from ground.best_plans(survive)


def _unlike(plans: Iterable[Plan | None]) -> Iterator[Plan]:
    seen: set[Plan] = set()
    for plan in plans:
        if plan is not None and plan not in seen:
            seen.add(plan)
            yield plan


def _candidate(plan: Plan, ground: Ground, asked: Asked, variant: Variant | None, point_s: float) -> Candidate:
    cost = ground.model.predict(plan)
    loss = variant.loss_points if variant else 0.0
    return Candidate(
        plan=plan, cost=cost, value_s=ground.task.value(plan, cost) + point_s * loss, loss_points=loss,
        variant=variant.name if variant else "",
        keeps_limits=variant is None and not asked.violations(cost) and ground.keeps_p95(asked, plan),
    )  # fmt: skip
