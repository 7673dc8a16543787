"""assign(workload, cluster, models): one plan for every user at once, whom to refuse where not all fit, and how good that
is.

Three steps. (1) offers.py: what each user may choose from. (2) Users with rates of their own: congestion.py's problem, exact
or by local search, with a proven bound (choosing.py, bounds.py). Where closed users or radio cells take part that form does
not hold: start from everyone's best offer alone, and bound by latencies alone. (3) polishing.py: the choice, channels and
powers are improved under contention.py, which knows order at fair nodes, closed users and interference; what is reported are
its figures. Where a `score` is given (a simulation), the choice of step 2 and that of step 3 are scored, the better is
taken.

Admission: all if they fit; else first slower streams for those with a `least_rate` (one factor for all of them, the greatest
that lets the most weight in), then refusals, lightest weight first. A refusal says what would have been asked too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ecotone import schema
from ecotone.cluster import Cluster
from ecotone.contention import Contention, Standing, visits_of
from ecotone.cost import working_set_bytes
from ecotone.media import Tuning
from ecotone.plan import Plan
from ecotone.plancost import PlanCost
from ecotone.planner.bounds import lower_bound
from ecotone.planner.choosing import Chosen, choose_all
from ecotone.planner.congestion import Congestion, Offer, Party, Queue, Visit
from ecotone.planner.objective import PlannerError
from ecotone.planner.offers import Candidate, Models, model_of, offers_of
from ecotone.planner.polishing import Polished, Seat, polish
from ecotone.workload import Aim, User, Workload

__all__ = ["Assignment", "Refusal", "Score", "UserPlan", "assign", "problem_of"]

SCHEMA, VERSION = "ecotone.assignment", 1
MOST_LOAD = 0.95
_HALVINGS = 7

Score = Callable[[Mapping[str, Plan], Mapping[str, Tuning], Workload], float]
"""What a joint plan costs as simulated: less is better, inf where it does not hold."""
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserPlan:
    """A user that is let in: its plan, the rate that is promised, and what is predicted beside all others.

    `alone_s`: mean latency if it were the only user, under the best plan for that. `tuning`: where its device sends over a
    radio cell. `num_offers`: plans that were weighed for it.
    """

    name: str
    plan: Plan
    cost: PlanCost
    rate_per_s: float
    alone_s: float
    mean_s: float
    p95_s: float
    tuning: Tuning | None = None
    num_offers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A user that does not fit, and what would have been asked too much."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The joint plan. `value` under `aim` (seconds; for worst a factor) as contention.py predicts it; `utilisation`
    likewise.

    `searched`, `bound`: value of the choice in the form that was searched, and a proven lower bound on it there, for these
    users and rates; equal where the choice is proven best. `gap` is what may be between them.
    """

    workload: str
    aim: Aim
    users: tuple[UserPlan, ...]
    refused: tuple[Refusal, ...]
    value: float
    searched: float
    bound: float
    utilisation: dict[str, float]

    @property
    def gap(self) -> float:
        return max(0.0, 1 - self.bound / self.searched) if self.searched > 0 and math.isfinite(self.searched) else 0.0

    @property
    def plans(self) -> dict[str, Plan]:
        return {user.name: user.plan for user in self.users}

    @property
    def tunings(self) -> dict[str, Tuning]:
        """Channel and power by device."""
        return {str(user.plan.source): user.tuning for user in self.users if user.tuning is not None}

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "assignment") -> Assignment:
        """Read an assignment; raises SchemaError naming every violation."""
        return schema.load_json(Assignment, text, SCHEMA, VERSION, where)


def assign(
    workload: Workload,
    cluster: Cluster,
    models: Models,
    *,
    offers: Mapping[str, Sequence[Candidate]] | None = None,
    score: Score | None = None,
    most_load: float = MOST_LOAD,
    time_limit_s: float = 10.0,
    seed: int = 0,
) -> Assignment:
    """Plans for all users of `workload` under its aim; `models`: graph and profile by the name that users give.

    `offers`: what users may choose from, else offers.py finds it. `most_load`: share of a resource that may be promised.
    Raises PlannerError where a user has no plan at all, SchemaError for users that the cluster does not have.
    """
    workload.check(cluster, tuple(models))
    found = dict(offers) if offers is not None else dict(offers_of(workload, cluster, models, time_limit_s=6 * time_limit_s))
    table = _Table(workload, cluster, models, found, most_load)
    if table.is_plain:
        rates, chosen = _let_in(
            workload,
            lambda at, part: choose_all(table.problem(at), seed=seed, time_limit_s=part * time_limit_s),
            lambda found: [bool(offer >= 0) for offer in found.choice],
        )
        end = _polished(table, rates, chosen, time_limit_s)
    else:
        rates, end = _let_in(
            workload,
            lambda at, part: _polished(table, at, _alone(table, at), part * time_limit_s),
            lambda found: [seat.offer >= 0 for seat in found.seats],
        )
    if score is not None:
        seats, standing = _scored(end.game, [end.seats, end.game.tuned(end.start)], score, workload, rates)
        end = replace(end, seats=seats, standing=standing, is_best=end.is_best and seats == end.seats)
    return _assignment(table, workload, rates, end)


@dataclass(frozen=True, slots=True)
class _Polish:
    """What step 3 made of a choice of step 2."""

    chosen: Chosen
    game: Polished
    start: list[Seat]
    seats: list[Seat]
    standing: Standing
    is_best: bool


class _Table:
    """The numbers of the users' offers, for any rates."""

    def __init__(
        self, workload: Workload, cluster: Cluster, models: Models, found: Mapping[str, Sequence[Candidate]], most: float
    ) -> None:
        missing = [u.name for u in workload.users if not found.get(u.name)]
        if missing:
            raise PlannerError(f"workload {workload.name}: nobody offers a plan for {', '.join(missing)}")
        self.workload, self.cluster, self.found, self.most_load = workload, cluster, found, most
        self.contention = Contention(cluster)
        self.queues: dict[str, int] = {}
        self.factors: list[float] = []
        self.visits = {u.name: [self._visits(c.cost) for c in found[u.name]] for u in workload.users}
        self.resident = {u.name: _resident(u, found[u.name], models) for u in workload.users}
        self.is_plain = not any(u.is_closed for u in workload.users) and not cluster.radios

    def _visits(self, cost: PlanCost) -> tuple[Visit, ...]:
        rows = []
        for resource, seconds, share, size in visits_of(cost):
            rows.append(Visit(self._queue(str(resource), 0.5), share, seconds))
            if resource.kind == "link":
                source, _, target = resource.name.partition(">")
                for wire in self.cluster.shared:
                    if wire.carries(source, target):
                        queue = self._queue(f"wire {wire.name}", 1.0)
                        rows.append(Visit(queue, share, size / wire.bandwidth_bytes_per_s))
        return tuple(rows)

    def _queue(self, name: str, factor: float) -> int:
        if name not in self.queues:
            self.queues[name] = len(self.queues)
            self.factors.append(factor)
        return self.queues[name]

    def problem(self, rates: Mapping[str, float]) -> Congestion:
        """congestion.py's form at these rates; closed users count as if alone."""
        parties = []
        for user in self.workload.users:
            candidates = self.found[user.name]
            offers = tuple(
                Offer(alone_s=c.cost.latency_s, visits=v, resident=r)
                for c, v, r in zip(candidates, self.visits[user.name], self.resident[user.name], strict=True)
            )
            deadline = math.inf if user.deadline_s is None else user.deadline_s
            party = Party(
                name=user.name, offers=offers, rate_per_s=rates[user.name], weight=user.weight, deadline_s=deadline
            )  # fmt: skip
            parties.append(party)
        queues = tuple(Queue(n, f) for n, f in zip(self.queues, self.factors, strict=True))
        memory = {str(d.name): d.memory_bytes for d in self.cluster.devices}
        return Congestion(
            parties=tuple(parties), queues=queues, aim=self.workload.aim, most_load=self.most_load, memory_bytes=memory
        )  # fmt: skip


def _resident(user: User, candidates: Sequence[Candidate], models: Models) -> list[tuple[tuple[str, str, int, int], ...]]:
    """(device, what, bytes of weights, bytes of working set) of each stage of each candidate."""
    graph = model_of(user, models)[0]
    working, name = working_set_bytes(graph), graph.content_hash()
    found = []
    for candidate in candidates:
        rows = []
        for s in candidate.plan.stages:
            key = f"{name} {s.start} {s.stop} {s.executor} {s.exit}"
            weights = graph.segment_parameter_bytes(s.start, s.stop, s.exit)
            rows.append((str(s.device), key, int(weights), int(working[s.start : s.stop].max())))
        found.append(tuple(rows))
    return found


def problem_of(
    workload: Workload,
    cluster: Cluster,
    models: Models,
    offers: Mapping[str, Sequence[Candidate]],
    most_load: float = MOST_LOAD,
) -> Congestion:
    """congestion.py's form of a workload at the users' own rates: for oracles, and for users that decide alone."""
    return _Table(workload, cluster, models, offers, most_load).problem({u.name: u.rate_per_s for u in workload.users})


# ---- admission -------------------------------------------------------------------------------------------------------


def _let_in(
    workload: Workload,
    solve: Callable[[Mapping[str, float], float], _Found],
    is_in: Callable[[_Found], Sequence[bool]],
) -> tuple[dict[str, float], _Found]:
    """Rates and what `solve` finds for them: all at their rates, else slower streams, else refusals.

    `solve` is given rates and the part of the time that it may take.
    """
    full = {u.name: u.rate_per_s for u in workload.users}

    def weight(found: _Found) -> float:
        return sum(u.weight for u, has_place in zip(workload.users, is_in(found), strict=True) if has_place)

    chosen = solve(full, 1.0)
    elastic = [u for u in workload.users if 0 < u.least_rate_per_s < u.rate_per_s]
    if not elastic or all(is_in(chosen)):
        return full, chosen

    def at(share: float) -> dict[str, float]:
        return full | {u.name: u.least_rate_per_s + share * (u.rate_per_s - u.least_rate_per_s) for u in elastic}

    best = solve(at(0.0), 1.0)
    most = weight(best)
    if most <= weight(chosen):
        return full, chosen
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        found = solve(at(share), 0.25)
        if weight(found) >= most - 1e-9:
            low, best = share, found
        else:
            high = share
    return at(low), best


def _alone(table: _Table, rates: Mapping[str, float]) -> Chosen:
    """Everyone's best offer alone: where the search begins for closed users and radio cells, and what bounds them."""
    problem = table.problem(rates)
    choice = np.array([int(rows.alone.argmin()) for rows in problem.rows], dtype=np.intp)
    bound = problem.value_of(problem.least)
    return Chosen(choice, bound, bound, False)


def _polished(table: _Table, rates: Mapping[str, float], chosen: Chosen, time_limit_s: float) -> _Polish:
    """Step 3 from a choice of step 2."""
    workload = table.workload
    start = [Seat(offer=int(o), tuning=None) for o in chosen.choice]
    game = Polished(
        users=workload.users, candidates=[table.found[u.name] for u in workload.users], rates=rates, aim=workload.aim,
        contention=table.contention, most_load=table.most_load, memory=table.problem(rates),
    )  # fmt: skip
    return _Polish(chosen, game, start, *polish(game, start, time_limit_s=time_limit_s))


# ---- the result ------------------------------------------------------------------------------------------------------


def _scored(
    game: Polished, contenders: Sequence[list[Seat]], score: Score, workload: Workload, rates: Mapping[str, float]
) -> tuple[list[Seat], Standing]:
    users = tuple(u if u.is_closed else replace(u, rate_per_s=rates[u.name]) for u in workload.users)
    promised = replace(workload, users=users)
    best: tuple[float, list[Seat]] | None = None
    for seats in {tuple(s): s for s in contenders}.values():
        plans = {u.name: c[s.offer].plan for u, c, s in zip(game.users, game.candidates, seats, strict=True) if s.offer >= 0}
        value = score(plans, game.tunings(seats), promised) if plans else math.inf
        if best is None or value < best[0]:
            best = (value, seats)
    assert best is not None
    return best[1], game.standing(best[1])


def _assignment(table: _Table, workload: Workload, rates: Mapping[str, float], end: _Polish) -> Assignment:
    chosen, game, seats, standing = end.chosen, end.game, end.seats, end.standing
    users, refused = [], []
    tunings = game.tunings(seats)
    for index, (user, seat) in enumerate(zip(workload.users, seats, strict=True)):
        if seat.offer < 0:
            refused.append(Refusal(name=user.name, reason=game.refusal(seats, index)))
            continue
        candidate, load = table.found[user.name][seat.offer], standing.user(user.name)
        users.append(
            UserPlan(
                name=user.name, plan=candidate.plan, cost=candidate.cost, rate_per_s=load.rate_per_s,
                alone_s=game.alone_s(index), mean_s=load.mean_s, p95_s=load.p95_s, tuning=tunings.get(str(user.source)),
                num_offers=len(table.found[user.name]),
            )
        )  # fmt: skip
    value = game.value(seats, standing)
    problem, choice = table.problem(rates), np.array([s.offer for s in seats], dtype=np.intp)
    searched = problem.value(choice) if table.is_plain else value
    same = table.is_plain and bool(((choice >= 0) == (chosen.choice >= 0)).all())
    if same:
        bound = chosen.bound
    elif table.is_plain:
        bound = lower_bound(problem, choice >= 0, searched)
    else:
        bound = searched if end.is_best else problem.value_of(np.where(choice >= 0, problem.least, math.nan))
    return Assignment(
        workload=workload.name, aim=workload.aim, users=tuple(users), refused=tuple(refused), value=value,
        searched=searched, bound=min(bound, searched),
        utilisation={str(r): share for r, share in sorted(standing.utilisation.items())},
    )  # fmt: skip
