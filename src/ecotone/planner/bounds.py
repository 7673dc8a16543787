"""How good a joint assignment can be at best: a lower bound by linear programmes with cuts.

Of the value  sum_u w_u T_u = sum x w t + sum_r c_r A_r M_r / (1 - L_r)  (congestion.py, w summing to 1; A = sum x w a and so
on, x a choice's indicator) the product A M is what is not convex. By Cauchy and Schwarz  A M >= G^2,  G = sum x sqrt(w a m),
with equality where a and m are proportional, as with alike users. So

 (1) value >= min over fractional x of  sum x w t + sum_r c_r G_r^2 / (1 - L_r),        L_r <= most_load,

which is convex: G^2 / (1 - L) is bounded below by its tangents  2 g G - g^2 (1 - L),  g = G0 / (1 - L0),  any g. Tangents
are added at each solution until the programme's value and the true relaxation agree, as a rule in five to ten rounds. Worst
and fair aims are bounded by sums:

 (2) worst:  max_u T_u / T0_u >= sum v_u T_u / T0_u  for weights v summing to 1. A worst of tau rules out all offers that
             alone take more than tau T0_u; the least tau that (1) does not contradict, for some v moved towards the worst
             users
 (3) fair:   log T >= the chord of log between T0_u and the greatest T_u that a best choice can have: what the user could
             have by itself (Congestion.fallbacks), or beyond which the value is worse than a known one

A bound, not an optimum: gaps are stated. HiGHS (scipy); O(rounds) programmes of N offers and Q queues.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack, vstack

from ecotone.planner.congestion import Congestion

__all__ = ["lower_bound"]

FloatArray = NDArray[np.float64]
_ROUNDS, _CLOSE, _KEPT = 25, 1e-3, 4
_TILTS, _HALVINGS = 3, 10  # of equation 2


class _Relaxation:
    """Equation 1 for the users of `here`; tangents are kept, so that other weights begin from them anew."""

    def __init__(self, problem: Congestion, here: NDArray[np.bool_]) -> None:
        self.problem = problem
        self.users = np.flatnonzero(here)
        counts = [len(problem.rows[u].alone) for u in self.users]
        self.owner = np.repeat(np.arange(len(counts)), counts)
        self.alone = np.concatenate([problem.rows[u].alone for u in self.users])
        self.queue, self.a, self.m, self.load = (
            np.concatenate([getattr(problem.rows[u], name) for u in self.users]) for name in ("queue", "a", "m", "load")
        )
        self.num_offers, self.num_queues = len(self.alone), len(problem.queues)
        self.floor = self.alone + self._own_waits()
        self._slopes: list[FloatArray] = []  # of tangents, for weights of mean `_scale`
        self._scale = 1.0

    def _own_waits(self) -> FloatArray:
        """Seconds that each offer waits for its own user alone."""
        load, moment = (np.zeros((self.num_offers, self.num_queues + 1)) for _ in range(2))
        rows = np.arange(self.num_offers)[:, None]
        np.add.at(load, (rows, self.queue), self.load)
        np.add.at(moment, (rows, self.queue), self.m)
        delay = np.take_along_axis(self.problem.delays(load, moment), self.queue, axis=1)
        waits: FloatArray = np.where(self.a > 0, self.a * delay, 0.0).sum(axis=1)
        return waits

    def _matrix(self, values: FloatArray) -> csr_array:
        """(Q, offers): the entry of a queue in an offer, visits to one queue added up."""
        flat = self.queue.ravel()
        kept = flat < self.num_queues
        columns = np.repeat(np.arange(self.num_offers), self.queue.shape[1])[kept]
        shape = (self.num_queues, self.num_offers)
        return csr_array((values.ravel()[kept], (flat[kept], columns)), shape=shape)

    def solve(self, weight: FloatArray, allowed: NDArray[np.bool_] | None = None) -> tuple[float, FloatArray]:
        """A lower bound of sum weight * T, and the mean latencies of its fractional choice; `weight` by user of `users`.

        `allowed`: which offers may be chosen; inf where none fits.
        """
        problem = self.problem
        root = np.sqrt(weight[self.owner][:, None] * self.a * self.m)
        factor = np.array([q.factor for q in problem.queues])
        grown, loads = self._matrix(root), self._matrix(self.load)
        used = np.flatnonzero(np.asarray(loads.sum(axis=1)).ravel() > 0)
        grown, loads, factor = grown[used], loads[used], factor[used]
        count = len(used)
        ones = csr_array((np.ones(self.num_offers), (self.owner, np.arange(self.num_offers))))
        empty = csr_array((ones.shape[0], count))
        cost = np.concatenate([weight[self.owner] * self.alone, np.ones(count)])
        rows, right = [hstack([loads, csr_array((count, count))])], [np.full(count, problem.most_load)]

        def add_tangent(slope: FloatArray) -> None:
            """c (2 g G - g^2 (1 - L)) <= t, g = `slope`."""
            cut = grown.multiply((2 * factor * slope)[:, None]) + loads.multiply((factor * slope**2)[:, None])
            rows.append(hstack([csr_array(cut), csr_array(-np.eye(count))]))
            right.append(factor * slope**2)

        for slope in self._slopes[-_KEPT:]:
            add_tangent(slope[used] * math.sqrt(float(weight.mean() / self._scale)))
        most = np.ones(self.num_offers) if allowed is None else allowed.astype(np.float64)
        limits = np.stack([np.zeros(self.num_offers + count), np.concatenate([most, np.full(count, np.inf)])], axis=1)
        best, x = 0.0, np.zeros(self.num_offers)
        for _ in range(_ROUNDS):
            found = linprog(
                cost, A_ub=vstack(rows, format="csr"), b_ub=np.concatenate(right), A_eq=hstack([ones, empty], format="csr"),
                b_eq=np.ones(ones.shape[0]), bounds=limits, method="highs",
            )  # fmt: skip
            if found.status != 0:
                return (math.inf, x) if found.status == 2 else (best, x)
            best, x = max(best, float(found.fun)), found.x[: self.num_offers]
            total, load = grown @ x, np.minimum(loads @ x, 1 - 1e-9)
            true = factor * total**2 / (1 - load)
            if float(true.sum() - found.x[self.num_offers :].sum()) <= _CLOSE * max(best, 1e-12):
                break
            slope = np.zeros(self.num_queues)
            slope[used] = total / (1 - load)
            add_tangent(slope[used])
            self._slopes.append(slope)
        self._scale = float(weight.mean())
        return best, self._latencies(x)

    def _latencies(self, x: FloatArray) -> FloatArray:
        load, moment = np.zeros(self.num_queues + 1), np.zeros(self.num_queues + 1)
        np.add.at(load, self.queue, self.load * x[:, None])
        np.add.at(moment, self.queue, self.m * x[:, None])
        delay = self.problem.delays(load, moment)
        seconds = self.alone + np.where(self.a > 0, self.a * delay[self.queue], 0.0).sum(axis=1)
        found: FloatArray = np.bincount(self.owner, x * seconds, len(self.users)).astype(np.float64)
        return found


def lower_bound(problem: Congestion, here: NDArray[np.bool_], known: float, *, time_limit_s: float = 5.0) -> float:
    """A proven lower bound of the value over all choices of the users of `here`; `known`: the value of one of them.

    0 for nobody; inf where not even fractions of offers fit the loads. When the time is over the bound so far is returned.
    """
    if not here.any():
        return 0.0
    relaxation, least = _Relaxation(problem, here), problem.least[here]
    weight = problem.weight[here] / problem.weight[here].sum()
    if problem.aim == "mean":
        return relaxation.solve(weight)[0]
    if problem.aim == "fair":
        return _fair(relaxation, weight, least, known)
    return _worst(relaxation, least, known, time.perf_counter() + time_limit_s)


def _worst(relaxation: _Relaxation, least: FloatArray, known: float, deadline: float) -> float:
    """Equation 2 by bisection: what is contradicted is a bound."""
    low, high = 1.0, known
    if not math.isfinite(known):
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _is_contradicted(relaxation, least, middle):
            low = middle
        else:
            high = middle
        if high - low <= _CLOSE * high or time.perf_counter() > deadline:
            break
    return low


def _is_contradicted(relaxation: _Relaxation, least: FloatArray, worst: float) -> bool:
    """True where no choice has everyone within `worst` of its best, by some weights."""
    allowed = relaxation.floor <= worst * least[relaxation.owner]
    tilt = np.full(len(least), 1 / len(least))
    for _ in range(_TILTS):
        bound, latency = relaxation.solve(tilt / least, allowed)
        if bound > worst:
            return True
        ratio = latency / least
        if ratio.max() <= worst:
            return False
        tilt = tilt * np.minimum(ratio / ratio.max(), 1.0) ** 2
        tilt /= tilt.sum()
    return False


def _fair(relaxation: _Relaxation, weight: FloatArray, least: FloatArray, known: float) -> float:
    """Equation 3: the sum of chords."""
    fallback = relaxation.problem.fallbacks()[relaxation.users]
    with np.errstate(over="ignore"):
        spare = math.log(known) - float((weight * np.log(least)).sum()) if math.isfinite(known) else math.inf
        most = np.minimum(fallback, least * np.exp(np.maximum(spare, 0.0) / weight))
    wide = (most > least * (1 + 1e-9)) & np.isfinite(most)
    slope = np.where(wide, np.log(np.where(wide, most, 2 * least) / least) / np.where(wide, most - least, 1.0), 0.0)
    allowed = relaxation.floor <= (most * (1 + 1e-9))[relaxation.owner]
    bound, _ = relaxation.solve(weight * slope, allowed)
    constant = float((weight * (np.log(least) - slope * least)).sum())
    return min(known, math.exp(constant + bound)) if math.isfinite(bound) else known
