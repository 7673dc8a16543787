"""A choice of offers for all users: exact where there are few, else greedy and local search; whom to refuse where not all
fit.

Order of what counts: first the weight of the users that are let in (the sum; ties by value), then the value (congestion.py,
equation 3). Exact: branch and bound over users; a node's bound has those decided at the loads so far, which only grow, and
each of the others at its best offer as things are. Local search: users in turn take the best offer beside the others' (a
step never makes things worse, so it ends: the guide is a potential), refused ones try to get in, alone or in place of a
lighter one; from several orders. Exact up to a time limit; the local search is O(passes * N * offers * N).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from ecotone.planner.bounds import lower_bound
from ecotone.planner.congestion import SLACK, Congestion, FloatArray, IntArray

__all__ = ["Chosen", "choose_all", "improve"]

_BETTER = 1 - 1e-9
_MOST_NODES = 100_000
_EXACT_PRODUCT = 1e7  # of numbers of offers: above it branch and bound is not begun


@dataclass(frozen=True, slots=True)
class Chosen:
    """`choice` (N,), -1 where refused; `bound`: no choice that lets the same users in has a lower value."""

    choice: IntArray
    value: float
    bound: float
    is_exact: bool

    @property
    def gap(self) -> float:
        return max(0.0, 1 - self.bound / self.value) if self.value > 0 and math.isfinite(self.value) else 0.0


def choose_all(problem: Congestion, *, seed: int = 0, num_starts: int = 4, time_limit_s: float = 5.0) -> Chosen:
    """The best choice found, exact where the time suffices to prove it."""
    deadline = time.perf_counter() + time_limit_s
    random, count = np.random.default_rng(seed), len(problem.parties)
    heavy_first = np.argsort(-problem.weight, kind="stable")
    best, key = np.full(count, -1, dtype=np.intp), (math.inf, math.inf)
    for start in range(num_starts):
        order = heavy_first if start == 0 else random.permutation(count)
        choice = improve(problem, _greedy(problem, order), order, deadline)
        if _key(problem, choice) < key:
            best, key = choice, _key(problem, choice)
        if time.perf_counter() > deadline:
            break
    product = math.prod(float(len(p.offers) + 1) for p in problem.parties)
    if product <= _EXACT_PRODUCT:
        search = _Exact(problem, best, key, deadline)
        search.branch(0, np.full(count, -1, dtype=np.intp))
        if search.is_done:
            return Chosen(search.best, search.key[1], search.key[1], True)
        best, key = search.best, search.key
    return Chosen(best, key[1], lower_bound(problem, best >= 0, key[1]), False)


def _key(problem: Congestion, choice: IntArray) -> tuple[float, float]:
    """Weight refused, then value: less is better."""
    return round(float(problem.weight[choice < 0].sum()), 9), problem.value(choice)


def _guide(problem: Congestion, choice: IntArray) -> float:
    return float(problem.guides(problem.latencies(choice)[None])[0]) if (choice >= 0).any() else math.inf


def _greedy(problem: Congestion, order: IntArray) -> IntArray:
    choice = np.full(len(problem.parties), -1, dtype=np.intp)
    for user in order.tolist():
        choice[user] = _best_offer(problem, choice, user)[0]
    return choice


def _best_offer(problem: Congestion, choice: IntArray, user: int) -> tuple[int, float]:
    """The offer of least value beside what the others chose, -1 where none fits."""
    seconds, fits = problem.alternatives(choice, user)
    values = np.where(fits, problem.guides(seconds), math.inf)
    for offer in np.argsort(values, kind="stable").tolist():
        if not math.isfinite(values[offer]):
            break
        if not problem.memory_bytes:
            return offer, float(values[offer])
        other = choice.copy()
        other[user] = offer
        if not problem.too_big(other):
            return offer, float(values[offer])
    return -1, math.inf


def improve(problem: Congestion, choice: IntArray, order: IntArray, deadline: float = math.inf) -> IntArray:
    """Users in turn change to what makes the guide least, until nobody does or time is over; refused ones try to get in."""
    choice, value = choice.copy(), _guide(problem, choice)
    changed = True
    while changed and time.perf_counter() < deadline:
        changed = False
        for user in order.tolist():
            if choice[user] < 0:
                let_in = _let_in(problem, choice, user)
                if let_in is not None:
                    choice, changed = let_in, True
                    value = _guide(problem, choice)
                continue
            offer, new = _best_offer(problem, choice, user)
            if offer >= 0 and new < value * _BETTER:
                choice[user], value, changed = offer, new, True
    return choice


def _let_in(problem: Congestion, choice: IntArray, user: int) -> IntArray | None:
    """The choice with this refused user let in, alone or in place of one that weighs less; None where none fits."""
    offer, _ = _best_offer(problem, choice, user)
    if offer >= 0:
        other = choice.copy()
        other[user] = offer
        return other
    lighter = np.flatnonzero((choice >= 0) & (problem.weight < problem.weight[user] * (1 - 1e-9)))
    for out in lighter[np.argsort(problem.weight[lighter], kind="stable")].tolist():
        other = choice.copy()
        other[out] = -1
        offer, _ = _best_offer(problem, other, user)
        if offer >= 0:
            other[user] = offer
            return other
    return None


@dataclass(slots=True)
class _Exact:
    """Branch and bound, depth first, users with the fewest offers first."""

    problem: Congestion
    best: IntArray
    key: tuple[float, float]
    deadline: float
    num_nodes: int = 0
    is_done: bool = True
    order: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = sorted(range(len(self.problem.parties)), key=lambda u: (-self.problem.weight[u], u))

    def branch(self, depth: int, choice: IntArray) -> None:
        problem = self.problem
        self.num_nodes += 1
        if self.num_nodes > _MOST_NODES or time.perf_counter() > self.deadline:
            self.is_done = False
            return
        if depth == len(self.order):
            key = _key(problem, choice)
            if key < (self.key[0], self.key[1] * _BETTER) and not problem.violations(choice):
                self.best, self.key = choice.copy(), key
            return
        user = self.order[depth]
        nodes = []
        for offer in range(-1, len(problem.parties[user].offers)):
            choice[user] = offer
            bound = self._bound(depth + 1, choice)
            if bound is not None:
                nodes.append((bound, offer))
        for bound, offer in sorted(nodes):
            if bound >= (self.key[0], self.key[1] * _BETTER) or not self.is_done:
                break
            choice[user] = offer
            self.branch(depth + 1, choice)
        choice[user] = -1

    def _bound(self, depth: int, choice: IntArray) -> tuple[float, float] | None:
        """Weight refused and value at least, whatever the users not yet decided do; None where it cannot be."""
        problem, decided = self.problem, self.order[:depth]
        refused = float(sum(problem.weight[u] for u in decided if choice[u] < 0))
        load, moment = problem.totals(choice)
        if (load[:-1] > problem.most_load * (1 + SLACK)).any() or (problem.memory_bytes and problem.too_big(choice)):
            return None
        latency = problem.latencies(choice)
        here = choice >= 0
        late = problem.tails(choice, latency)[here] > problem.deadline[here] * (1 + SLACK)
        if late.any():
            return None
        for u in self.order[depth:]:
            latency[u] = self._least(u, load, moment)
            if math.isinf(latency[u]):
                refused, latency[u] = refused + float(problem.weight[u]), math.nan
        return round(refused, 9), self._value_bound(latency, refused)

    def _least(self, user: int, load: FloatArray, moment: FloatArray) -> float:
        rows, most = self.problem.rows[user], self.problem.most_load * (1 + SLACK)
        loads, moments = load[rows.queue] + rows.load, moment[rows.queue] + rows.m
        delay = self.problem.factor[rows.queue] * moments / np.maximum(1 - loads, 1e-12)
        seconds = rows.alone + (rows.a * delay).sum(axis=1)
        seconds[(loads > most).any(axis=1)] = math.inf
        return float(seconds.min())

    def _value_bound(self, latency: FloatArray, refused: float) -> float:
        """Users that may yet be refused would change the mean's weights: then only a bound for the same weight holds."""
        return self.problem.value_of(latency)
