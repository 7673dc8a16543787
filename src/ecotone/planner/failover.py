"""Which plans stay resident beside the best one, so that a failure costs least: T1, T2 and variants by expected cost.

Topologies (Edge-PRUNE, arXiv:2206.08152; variants after CONTINUER, arXiv:2206.05267; the local answer after SPINN,
arXiv:2008.06402). A set holds a primary and up to `max_standbys` standbys, each of a kind: "local" (T1: the source computes
all; where its head is the primary's, that tensor serves both), "passive" (T2b: runs once the primary is lost), "active"
(T2a: every request runs under both), "variant". Every set out of the pool of standbys.py is priced by equation 1 of
expectation.py; sets that do not fit the memory of a device (cost.resident_bytes: T1 needs the tail's weights on the source),
break a limit, or recover too late fall out; the least expected cost wins, and among sets within TIE of it the one of fewest
plans, then of fewest active ones, then of least memory. Exact over the pool, by enumeration while time lasts; `bound_s` is
below every set of any plans: each state of failure served by its own best plan, nothing paid for the steps between.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ecotone import schema
from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import resident_bytes
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.expectation import Detection, Expectation, Weights
from ecotone.planner.failures import elements_of
from ecotone.planner.objective import (
    P95,
    SLACK,
    Asked,
    Latency,
    Lexicographic,
    Objective,
    PlannerError,
    Requirement,
    Throughput,
)
from ecotone.planner.solve import Solution, solve
from ecotone.planner.standbys import Candidate, Ground, Pool, Variant, gather
from ecotone.planset import PlanSet, Standby
from ecotone.profile import Profile
from ecotone.units import format_quantity

__all__ = ["KINDS", "Considered", "FailoverSolution", "FailureEffect", "Memory", "choose"]

SCHEMA, VERSION = "ecotone.failover", 1
KINDS = ("none", "local", "passive", "active", "variant")
TIE = 1e-4
MISSING = "no such plan was measured, or it is the plan that is there already"
MAX_SURVIVE = 3
NEAR = 1.05  # topologies that combine kinds are told of where they are nearly as good
NUM_NEAR = 8  # plans near the best that may be primary


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureEffect:
    """What one failure does: `served_by` (empty: nobody), its value then, and the slowest result of a request that it hit.

    `recover_s` is None where nobody answers. `added_s`: share of the expected cost, per request.
    """

    element: str
    mtbf_s: float
    mttr_s: float
    served_by: str
    degraded_s: float
    added_s: float
    recover_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that all plans of the set hold on a device, and what it has."""

    device: DeviceId
    need_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """The best set of a topology ("local", "local + passive", ...); or why none can be, in `reason`."""

    topology: str
    primary: str = ""
    expected_s: float | None = None
    overhead_fraction: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverSolution:
    """The set to deploy. `value_s`: the objective without failures (twins counted), `plain_s` that of `plain`, the plan that
    is best while nothing fails; `expected_s` equation 1 of the set, `plain_expected_s` of that plan alone; `bound_s`: no
    set is below.
    """

    planset: PlanSet
    topology: str
    objective: str
    plain: Plan
    plain_s: float
    plain_expected_s: float
    value_s: float
    expected_s: float
    bound_s: float
    effects: tuple[FailureEffect, ...]
    memory: tuple[Memory, ...]
    considered: tuple[Considered, ...]
    weights: Weights
    detection: Detection
    survive: int = 1

    @property
    def overhead_fraction(self) -> float:
        """What the topology costs while nothing fails: value / plain - 1."""
        return self.value_s / self.plain_s - 1.0 if self.plain_s > 0 else 0.0

    @property
    def gap(self) -> float:
        """By what share of the expected cost any other set could still be better."""
        return max(0.0, 1.0 - self.bound_s / self.expected_s) if self.expected_s > 0 else 0.0

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "failover") -> FailoverSolution:
        """Read a solution; raises SchemaError naming every violation."""
        return schema.load_json(FailoverSolution, text, SCHEMA, VERSION, where)

    def lines(self) -> tuple[str, ...]:
        """The choice as text, one fact a line: the set, what each failure costs, memory, what was rejected and why."""
        return tuple(_lines(self))


@dataclass(frozen=True, slots=True)
class _Set:
    order: tuple[int, ...]
    twin: int | None
    kinds: tuple[str, ...]  # of each standby
    expected_s: float

    @property
    def topology(self) -> str:
        return " + ".join(k for k in KINDS if k in self.kinds) or "none"


def choose(
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    objective: Objective | None = None,
    require: Iterable[Requirement | str] = (),
    *,
    variants: Sequence[Variant] = (),
    topologies: frozenset[str] = frozenset(KINDS),
    survive: int = 1,
    weights: Weights = Weights(),
    detection: Detection = Detection(),
    max_standbys: int = 2,
    recover_s: float = math.inf,
    separate_uplinks: bool = False,
    time_limit_s: float = 10.0,
    tie: float = 0.0,
) -> FailoverSolution:
    """The plan set of least expected cost per request under the failure rates that `cluster` states (see failures.py).

    `topologies`: kinds that a standby may be of; without "none" a primary that can fail must have a standby. `survive`: how
    many elements may be down at once. `recover_s`: limit on the time from any single failure to the slowest result that it
    delays. `separate_uplinks`: bodies for two devices leave the source side by side. `tie`: as in solve, for the plain plan.
    Raises PlannerError naming why there is no such set. The primary keeps all of `require`. What a failure costs is time:
    under an objective other than latency or throughput the primary is as good as the best plan, and sets are priced by
    latency.
    """
    unknown = topologies - set(KINDS)
    if not 1 <= survive <= MAX_SURVIVE:
        raise PlannerError(f"survive={survive}: from 1 to {MAX_SURVIVE} failures at once can be planned for")
    if unknown or not topologies:
        raise PlannerError(f"topologies: {', '.join(sorted(unknown)) or 'none given'}; known are {', '.join(KINDS)}")
    wanted = objective if objective is not None else Latency()
    asked = Asked.of(tuple(require))
    deadline = time.perf_counter() + time_limit_s
    plain = solve(
        graph, cluster, profile, wanted, tuple(require), time_limit_s=time_limit_s / 2, num_runners_up=NUM_NEAR, tie=tie
    )
    if not isinstance(wanted, Latency | Throughput):
        asked, wanted = _as_good_as(plain, wanted, asked), Latency()
    elements = elements_of(cluster)
    main = Ground(graph, cluster, profile, wanted, asked, elements, deadline)
    grounds = [(v, Ground(v.graph, cluster, v.profile, wanted, asked, elements, deadline)) for v in variants]
    pool = gather(plain, main, asked, grounds, survive, weights.point_s)
    sums = Expectation(
        pool.candidates, pool.elements, pool.states, wanted, weights, detection, separate_uplinks=separate_uplinks
    )
    graphs = {graph.content_hash(): graph} | {v.graph.content_hash(): v.graph for v in variants}
    limits = {name: int(limit) for name, limit in main.limits.items()}
    search = _Choice(sums, asked, topologies, max_standbys, recover_s, graphs, limits, deadline)
    chosen, considered = search.best()
    return search.solution(chosen, considered, plain.plan, wanted.value(plain.cost), pool, survive)


def _as_good_as(plain: Solution, wanted: Objective, asked: Asked) -> Asked:
    """Limits that hold the primary to what the plain plan reaches under objectives that are not what failures cost."""
    singles = wanted.objectives if isinstance(wanted, Lexicographic) else (wanted,)
    asked = replace(asked, p95=next((o for o in singles if isinstance(o, P95)), asked.p95))
    reached = {level.objective: level.value for level in plain.levels} or {plain.objective: plain.value}
    for name, value in reached.items():
        asked = asked.with_limit(name, value * (1 + TIE))
    return asked


class _Choice:
    """Enumerates the sets of a pool and keeps the best one that may be."""

    def __init__(
        self, sums: Expectation, asked: Asked, topologies: frozenset[str], max_standbys: int, recover_s: float,
        graphs: Mapping[str, Graph], limits: Mapping[DeviceId, int], deadline: float,
    ) -> None:  # fmt: skip
        self.sums, self.asked, self.topologies = sums, asked, topologies
        self.max_standbys, self.limit_s, self.graphs, self.limits = max_standbys, recover_s, graphs, limits
        self.deadline = deadline

    def best(self) -> tuple[_Set, tuple[Considered, ...]]:
        """The chosen set, and the best of every topology that was looked at."""
        sets = sorted(self._sets(), key=lambda s: (s.expected_s, len(s.order), s.order))
        feasible: dict[str, _Set] = {}
        reasons: dict[str, str] = {}
        equal: list[_Set] = []
        for candidate in sets:
            name = candidate.topology
            is_near = not equal or candidate.expected_s <= equal[0].expected_s * (1 + TIE)
            if name in feasible and not (is_near and self._allowed(candidate)):
                continue
            reason = self._reason(candidate)
            if reason:
                reasons.setdefault(name, reason)
                continue
            feasible.setdefault(name, candidate)
            if is_near and self._allowed(candidate):
                equal.append(candidate)
        if not equal:
            raise PlannerError(f"no plan set: {self._refusal(reasons)}")
        chosen = min(equal, key=self._simplicity)
        feasible[chosen.topology] = chosen
        return chosen, tuple(self._considered(feasible, reasons))

    def _sets(self) -> Iterator[_Set]:
        """Every set, those of few plans first, until the deadline: each of one standby or none is looked at in any case."""
        candidates = self.sums.candidates
        leading = [i for i, c in enumerate(candidates) if not c.variant and c.keeps_limits and c.may_lead]
        for count in range(self.max_standbys + 1):
            for first in leading:
                others = [i for i, c in enumerate(candidates) if i != first and self._may_follow(candidates[first], c)]
                others.sort(key=lambda i: (candidates[i].value_s, i))
                for rest in itertools.combinations(others, count):
                    if count > 1 and time.perf_counter() > self.deadline:
                        return
                    yield from self._modes((first, *rest))

    def _modes(self, order: tuple[int, ...]) -> Iterator[_Set]:
        """The set with all standbys passive, then with each that can be a twin as one; no standby without a use."""
        if set(order) - {order[0]} - set(self.sums.serving(order).tolist()):
            return
        candidates = self.sums.candidates
        kinds = tuple(_kind(candidates[i]) for i in order)
        yield _Set(order, None, kinds[1:], self.sums.seconds(order))
        for place, kind in enumerate(kinds[1:]):
            spare = self.sums.hits[order[0]] & ~self.sums.hits[order[place + 1]]
            if kind == "passive" and not candidates[order[0]].is_local and spare.any():
                mixed = (*kinds[1 : place + 1], "active", *kinds[place + 2 :])
                twin = order[place + 1]
                yield _Set(order, twin, mixed, self.sums.seconds(order, twin))

    @staticmethod
    def _may_follow(primary: Candidate, other: Candidate) -> bool:
        """A plan that is better than the primary, and may lead, would be primary itself."""
        may_lead = not other.variant and other.keeps_limits and other.may_lead
        return other.value_s >= primary.value_s or not may_lead

    def _allowed(self, candidate: _Set) -> bool:
        if not candidate.kinds:
            return "none" in self.topologies or not self.sums.hits[candidate.order[0]].any()
        return set(candidate.kinds) <= self.topologies

    def _reason(self, candidate: _Set) -> str:
        """Why this set cannot be; empty where it can."""
        plans = [self.sums.candidates[i].plan for i in candidate.order]
        if candidate.order != (0,):  # the plain plan is what solve answers: it fits
            for device, need in resident_bytes(self.graphs, plans).items():
                if need > self.limits[device]:
                    amounts = (format_quantity(v, "bytes") for v in (self.limits[device], need))
                    return "{} has {}, the plans together need {}".format(device, *amounts)
        if candidate.twin is not None:
            broken = self._twin_breaks(candidate.order[0], candidate.twin)
            if broken:
                return broken
        if math.isfinite(self.limit_s):
            for step, before, after in self._single(candidate):
                element = self.sums.states.steps[step][1]
                slowest = self.sums.recover_s(element, before, after, candidate.twin)
                if slowest > self.limit_s * (1 + SLACK):
                    took = "nobody answers" if math.isinf(slowest) else f"answers come {format_quantity(slowest, 's')} later"
                    return f"when {self.sums.elements[element]} fails {took}, asked {format_quantity(self.limit_s, 's')}"
        return ""

    def _twin_breaks(self, first: int, second: int) -> str:
        pair, costs = self.sums.twin(first, second), [self.sums.candidates[i].cost for i in (first, second)]
        rows = (
            ("latency", min(pair.first_s, pair.second_s), self.asked.latency_s, "s"),
            ("bytes", sum(c.size_bytes for c in costs), self.asked.size_bytes, "bytes"),
            ("energy", sum(c.energy_joule for c in costs), self.asked.energy_joule, "joule"),
        )
        for name, value, limit, unit in rows:
            if value > limit * (1 + SLACK):
                return f"{name} of both together is {format_quantity(value, unit)}, asked {format_quantity(limit, unit)}"
        return ""

    def _single(self, candidate: _Set) -> Iterator[tuple[int, int, int]]:
        """(step, plan before, plan after) of every single failure that the set feels; plan -1: nobody answers."""
        sums, serving = self.sums, self.sums.serving(candidate.order)
        watched = (candidate.order[0], *(() if candidate.twin is None else (candidate.twin,)))
        for step, (state, element, after) in enumerate(sums.states.steps):
            if state == 0 and any(sums.hits[p, element] for p in watched):
                yield step, int(serving[0]), int(serving[after])

    def _simplicity(self, candidate: _Set) -> tuple[float, ...]:
        """Among sets of equal cost: fewest plans, fewest twins, least memory, fewest stages."""
        plans = [self.sums.candidates[i].plan for i in candidate.order]
        stages, held = sum(len(p.stages) for p in plans), sum(resident_bytes(self.graphs, plans).values())
        return len(plans), candidate.twin is not None, held, stages, candidate.expected_s

    def _refusal(self, reasons: Mapping[str, str]) -> str:
        asked = [k for k in KINDS if k in self.topologies and (k != "none" or k in reasons)]
        return "; ".join(f"{name}: {reasons.get(name, MISSING)}" for name in asked)

    def _considered(self, feasible: Mapping[str, _Set], reasons: Mapping[str, str]) -> Iterator[Considered]:
        for name in dict.fromkeys((*sorted(feasible, key=lambda n: feasible[n].expected_s), *reasons, *KINDS[:4])):
            found = feasible.get(name)
            if found is None:
                reason = reasons.get(name, MISSING)
                yield Considered(topology=name, reason=reason)
                continue
            plain = self.sums.candidates[0].value_s
            overhead = self._value(found) / plain - 1.0 if plain > 0 else 0.0
            reason = "" if self._allowed(found) else "not asked for"
            first = str(self.sums.candidates[found.order[0]].plan)
            yield Considered(
                topology=name, primary=first, expected_s=found.expected_s, overhead_fraction=overhead, reason=reason
            )

    def _value(self, candidate: _Set) -> float:
        if candidate.twin is not None:
            return self.sums.twin(candidate.order[0], candidate.twin).value_s
        return self.sums.candidates[candidate.order[0]].value_s

    def solution(
        self, chosen: _Set, considered: tuple[Considered, ...], plain: Plan, plain_s: float, pool: Pool, survive: int
    ) -> FailoverSolution:
        """The chosen set with all that explains it."""
        sums, candidates = self.sums, self.sums.candidates
        standbys = tuple(
            Standby(
                plan=candidates[i].plan, mode="active" if i == chosen.twin else "passive", label=_label(candidates[i], kind)
            )
            for i, kind in zip(chosen.order[1:], chosen.kinds, strict=True)
        )
        planset = PlanSet(primary=candidates[chosen.order[0]].plan, standbys=standbys)
        least = [min(v, sums.weights.lost_s) for v in pool.least_s]
        held = resident_bytes(self.graphs, planset.plans)
        return FailoverSolution(
            planset=planset, topology=chosen.topology, objective=sums.objective.name, plain=plain, plain_s=plain_s,
            plain_expected_s=sums.seconds((0,)), value_s=self._value(chosen), expected_s=chosen.expected_s,
            bound_s=min(chosen.expected_s, float(sums.states.probability @ least)),
            effects=tuple(self._effects(chosen)),
            memory=tuple(Memory(device=d, need_bytes=n, limit_bytes=self.limits[d]) for d, n in held.items()),
            considered=considered, weights=sums.weights, detection=sums.detection, survive=survive,
        )  # fmt: skip

    def _effects(self, chosen: _Set) -> Iterator[FailureEffect]:
        sums = self.sums
        labels = {i: _label(sums.candidates[i], k) for i, k in zip(chosen.order[1:], chosen.kinds, strict=True)}
        labels[chosen.order[0]] = "the plan itself" if chosen.twin is None else "the other twin"
        value, states = self._value(chosen), sums.states
        for step, before, after in self._single(chosen):
            _, element, state = states.steps[step]
            one, degraded = sums.elements[element], float(sums.value[after])
            slowest = sums.recover_s(element, before, after, chosen.twin)
            change = 0.0 if chosen.twin is not None else float(sums.steps_s[int(one.is_link), before, after])
            yield FailureEffect(
                element=str(one), mtbf_s=one.mtbf_s, mttr_s=one.mttr_s, served_by=labels[after] if after >= 0 else "",
                degraded_s=degraded, recover_s=slowest if math.isfinite(slowest) else None,
                added_s=float(states.probability[state]) * (degraded - value) + float(states.rate_per_s[step]) * change,
            )  # fmt: skip


def _kind(candidate: Candidate) -> str:
    return "variant" if candidate.variant else "local" if candidate.is_local else "passive"


def _label(candidate: Candidate, kind: str) -> str:
    if kind == "local":
        return f"local fallback on {candidate.plan.source}"
    remote = ", ".join(d for d in candidate.plan.devices if d != candidate.plan.source) or str(candidate.plan.source)
    return {
        "variant": f"{candidate.variant} on {', '.join(candidate.plan.devices)}",
        "active": f"twin on {remote}",
        "passive": f"standby on {remote}",
    }[kind]


def _lines(found: FailoverSolution) -> Iterator[str]:
    def quantity(value: float, unit: str = "s") -> str:
        return format_quantity(value, unit)

    yield f"topology: {found.topology}, up to {found.survive} failure{'s' if found.survive != 1 else ''} at once"
    yield f"first: {found.planset.primary}"
    for standby in found.planset.standbys:
        yield f"{standby.mode} {standby.label}: {standby.plan}"
    overhead = f"{found.overhead_fraction:+.2%} against the plan alone"
    yield f"without failure: {found.objective} {quantity(found.value_s)}, {overhead}"
    alone = f"the plan alone {quantity(found.plain_expected_s)}, no set is below {quantity(found.bound_s)}"
    yield f"expected with failures: {quantity(found.expected_s)} a request; {alone}"
    for effect in found.effects:
        rate = f"{effect.element} fails every {_duration(effect.mtbf_s)} for {_duration(effect.mttr_s)}"
        if effect.recover_s is None:
            yield f"{rate}: nobody answers ({quantity(effect.added_s)} a request)"
        else:
            then = f"answered by {effect.served_by} at {quantity(effect.degraded_s)}"
            yield f"{rate}: {then}, those it hits within {quantity(effect.recover_s)} ({quantity(effect.added_s)} a request)"
    for memory in found.memory:
        yield f"{memory.device} holds {quantity(memory.need_bytes, 'bytes')} of {quantity(memory.limit_bytes, 'bytes')}"
    for other in found.considered:
        if other.expected_s is None:
            yield f"{other.topology} rejected: {other.reason}"
        elif other.topology != found.topology and (other.topology in KINDS or other.expected_s <= found.expected_s * NEAR):
            share = other.expected_s / found.expected_s - 1.0 if found.expected_s > 0 else 0.0
            notes = [] if other.primary == str(found.planset.primary) else [f"first {other.primary}"]
            notes += [f"without failure {other.overhead_fraction or 0.0:+.2%}", *([other.reason] if other.reason else [])]
            yield f"{other.topology} instead: expected {quantity(other.expected_s)} ({share:+.2%}); {'; '.join(notes)}"


def _duration(seconds: float) -> str:
    """Long times as people say them: "8 h", "1.5 min"."""
    for size, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.4g} {name}"
    return format_quantity(seconds, "s")
