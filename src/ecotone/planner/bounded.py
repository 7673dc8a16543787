"""The least path under budgets: Lagrangian bound, then label-setting of growing width over what survives it. Anytime.

The problem is a shortest path with resources, NP-hard. Three parts, repeated with more work each time:
 1. *Bound*: with a price >= 0 on every budget column the programme (programme.py) gives a lower bound; subgradient steps
    raise it (Held and Karp), and every path met on the way that fits is an answer.
 2. *Answers*: the stages of the paths met, with all executors and codecs, are searched by labels: cut and placement near the
    best, choices exact. Where memory binds, local search over the order of devices (orders.py) gives further stages.
 3. *Labels* (labels.py) over the moves that survive the bound (arcs.py). A sweep that cuts none off is a proof; else what it
    cut off bounds what it may have missed. Widths grow fourfold.
A finished path is judged from outside: `judge` gives its true value, never below the network's own (energy with all idle
watts, a percentile by simulation), inf where the exact check refuses it. The same input gives the same answer unless the
time limit interrupts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ecotone.cost import FloatArray
from ecotone.planner.arcs import arcs_of, surviving
from ecotone.planner.chain import Path
from ecotone.planner.labels import Sweep
from ecotone.planner.network import Network, fits, usage, value_of
from ecotone.planner.orders import improve_order
from ecotone.planner.programme import Programme, Remaining
from ecotone.planner.sparse import Sparse

__all__ = ["Bounded", "least"]

FIRST_WIDTH, LAST_WIDTH = 4, 4096
FIRST_PRICE_STEPS = 40  # before the first sweep; four times as many before each further one
NARROW = 0.25  # of the gap: by so much less is the best value before moves are sorted out again
SMALL, SMALL_WIDTH, SMALL_STEPS = 1000, 256, 6  # of so few stages the labels are soon all looked at
ANSWER_WIDTH = 64
MOST_MET = 40  # paths whose stages are searched for an answer
_SHRINK, _PATIENCE = 0.6, 12
_NEAR_STEP = 0.3
_REORDER_SHARE = 0.4  # of the time that is left
_GOOD_GAP, _EPSILON = 1e-9, 1e-12


def _less(value: float, share: float) -> float:
    """`value` less that share of it; inf stays."""
    return value - abs(value) * share if math.isfinite(value) else value


@dataclass(frozen=True, slots=True, eq=False)
class Bounded:
    """The best path found (None: none), its value, a proven lower bound on any path (inf: there is none), and the price of
    every column: by how much the bound would fall if its limit rose by as much as it is."""

    path: Path | None
    value: float
    bound: float
    price: FloatArray


def least(
    network: Network,
    judge: Callable[[Path], float],
    deadline: float,
    *,
    limit: float = math.inf,
    any_will_do: bool = False,
    gap: float = 0.0,
    start: Bounded | None = None,
) -> Bounded:
    """The path of least value that keeps the budgets and that `judge` takes, at most `limit`; in executors and codecs.

    Stops at time.perf_counter() `deadline`, when the answer is proven to a share `gap`, or with `any_will_do` at the first.
    `start`: an answer (not the bound) and prices to begin with.
    """
    search = _Search(network, judge, deadline, limit, max(gap, _GOOD_GAP))
    if start is not None:
        search.begin_with(start)
    width, steps = (SMALL_WIDTH, SMALL_STEPS) if search.is_small else (FIRST_WIDTH, FIRST_PRICE_STEPS)
    search.raise_bound(steps)
    while not search.is_done and width <= LAST_WIDTH:
        if time.perf_counter() > deadline or (any_will_do and search.path is not None):
            break
        search.answer()
        search.reorder()
        if search.is_done or (any_will_do and search.path is not None):
            break
        search.narrow()
        search.raise_within(steps)
        missed = search.sweep(width)
        if missed is None:
            break
        search.bound = max(search.bound, min(missed, search.value))
        if math.isinf(missed):
            break
        width, steps = 4 * width, 4 * steps
        if search.path is None:
            search.raise_bound(steps)
    if network.chain.is_class.any():  # what another one was dropped for may be refused for its devices alone
        search.bound = min(search.bound, search.refused)
    if search.path is None:
        none_exists = search.bound >= _less(search.value, _GOOD_GAP)
        return Bounded(None, math.inf, math.inf if none_exists else search.bound, search.price)
    return Bounded(search.path, search.value, min(search.bound, search.value), search.price)


class _Search:
    """State of one call: prices, what is still to go, the best answer. `value` starts at the limit, so that it prunes."""

    def __init__(
        self, network: Network, judge: Callable[[Path], float], deadline: float, limit: float, gap: float
    ) -> None:  # fmt: skip
        self.network, self.judge, self.deadline, self.gap = network, judge, deadline, gap
        self.programme = Programme(network)
        self.path: Path | None = None
        self.stages: tuple[tuple[int, int, int], ...] = ()  # of the best path
        self.value = -_less(-limit, 1e-9) + 1e-15  # what just reaches the limit will do, a limit of 0 too
        self.bound = -math.inf
        self.limits = network.limits
        self.is_small = network.stage.size < 4 * SMALL and int(np.isfinite(network.stage).sum()) <= SMALL
        self.price, self.step = self.programme.no_prices, 1.0
        self.table: Remaining | None = None
        self.ahead: Sparse | None = None  # what survived, and what is still to go along it
        self.below = math.inf  # the value that it survived
        crossing = network.crossing[np.isfinite(network.crossing) & (network.crossing > 0)]
        self.unit = float(np.median(crossing)) if len(crossing) else 1.0  # of the objective: the first stride of a price
        self.met: dict[tuple[tuple[int, int, int], ...], None] = {}  # stages of paths met, the latest last
        self.answered: set[tuple[tuple[int, int, int], ...]] = set()
        self.judged: dict[Path, float] = {}
        self.refused = math.inf  # the least value of a path that fits and that the judge refused

    def begin_with(self, start: Bounded) -> None:
        """Take over an answer and prices; what is known of the way to the prices is that they are near."""
        if start.path is not None and start.value < self.value:
            self.path, self.value, self.stages = start.path, start.value, start.path.stages
            self.met[start.path.stages] = None
        if len(start.price) == len(self.price):
            self.price, self.step = start.price, _NEAR_STEP

    @property
    def is_done(self) -> bool:
        return self.bound >= _less(self.value, self.gap)

    def raise_bound(self, steps: int) -> None:
        """Part 1: subgradient steps on the prices over all moves."""
        kept: dict[str, Remaining] = {}

        def evaluate(price: FloatArray) -> tuple[float, Path | None]:
            kept["now"] = self.programme.backward(price)
            return kept["now"].least, self.programme.path(kept["now"])

        def keep(price: FloatArray) -> None:
            self.price, self.table = price, kept["now"]

        self._ascend(steps, self.price, math.inf, evaluate, keep)

    def raise_within(self, steps: int) -> None:
        """The same over the moves that survived: much quicker, and a bound up to the value that they survived."""
        assert self.ahead is not None
        kept, ceiling = {"now": self.ahead}, min(self.below, self.ahead.arcs.missed)

        def evaluate(price: FloatArray) -> tuple[float, Path | None]:
            kept["now"] = Sparse.of(self.programme, kept["now"].arcs, price)
            return kept["now"].least, kept["now"].path()

        def keep(price: FloatArray) -> None:
            self.ahead = kept["now"]

        self._ascend(steps, self.ahead.price, ceiling, evaluate, keep)

    def _ascend(
        self, steps: int, price: FloatArray, ceiling: float,
        evaluate: Callable[[FloatArray], tuple[float, Path | None]], keep: Callable[[FloatArray], None],
    ) -> None:  # fmt: skip
        """Keep the best bound, its prices and every path that fits; no bound above `ceiling` is claimed."""
        best, best_price, step, stale = -math.inf, price, self.step, 0
        for _ in range(steps):
            reached, path = evaluate(price)
            if path is None:
                self.bound = max(self.bound, ceiling)
                return
            columns = usage(self.network, path)
            self._meet(path.stages)
            self.offer(path, columns)
            bound = reached - float(price.sum())
            if bound > best + abs(best) * 1e-7 or math.isinf(best):
                best, best_price, stale = bound, price.copy(), 0
                keep(best_price)
                self.bound = max(self.bound, min(bound, ceiling))
            else:
                stale += 1
            if stale >= _PATIENCE:
                self.step = step = step * _SHRINK
                stale, price = 0, best_price.copy()
                continue
            slope = np.where(np.isfinite(self.limits), columns - 1.0, 0.0)
            slope[(price <= 0) & (slope < 0)] = 0.0
            length = float((slope**2).sum())
            if length < 1e-18 or step < 1e-3 or self.is_done or time.perf_counter() > self.deadline:
                return
            goal = self.value if math.isfinite(self.value) else max(1.5 * best, best + self.unit)
            price = np.maximum(0.0, price + step * max(goal - bound, 1e-3 * abs(goal)) / length * slope)

    def _meet(self, stages: tuple[tuple[int, int, int], ...]) -> None:
        self.met.pop(stages, None)
        self.met[stages] = None
        if len(self.met) > MOST_MET:
            del self.met[next(iter(self.met))]

    def offer(self, path: Path, columns: FloatArray | None = None) -> bool:
        """Keep `path` (in options) if it fits, the judge takes it, and it is better than the best so far."""
        value = value_of(self.network, path)
        if not value < _less(self.value, _EPSILON):
            return False
        if not fits(self.network, usage(self.network, path) if columns is None else columns):
            return False
        real = self.programme.real(path)
        if real not in self.judged:
            self.judged[real] = self.judge(real)
        judged = self.judged[real]
        self.refused = min(self.refused, value if math.isinf(judged) else math.inf)
        if not max(judged, value) < _less(self.value, _EPSILON):
            return False
        self.path, self.value, self.stages = real, max(judged, value), path.stages
        return True

    def answer(self) -> None:
        """Part 2: all choices along the stages met, and across them where they share a place."""
        if not set(self.met) <= self.answered:
            self.answered |= set(self.met)
            self._within(self.met)

    def reorder(self) -> None:
        """Local search over orders of devices, from the best path and from the cheapest path at the best prices."""
        if not (self.network.held and self.network.held[0].name == "memory") or self.table is None:
            return
        path = self.programme.path(self.table)
        paths = [self.stages, *([path.stages] if path is not None else [])]
        starts = [tuple(dict.fromkeys(d for d, _, _ in stages)) for stages in paths if stages]
        now = time.perf_counter()
        found = improve_order(self.network, starts, now + _REORDER_SHARE * (self.deadline - now))
        if found is not None and found not in self.answered:
            self.answered.add(found)
            self._within([found])

    def _within(self, rows: Iterable[tuple[tuple[int, int, int], ...]]) -> None:
        """Labels over the moves between the stages of some paths alone."""
        chain, network = self.network.chain, self.network
        stages = sorted({(p, d, q) for row in rows for d, p, q in row})
        options = range(len(network.stage))
        moves = [(p, d, x, q) for p, d, q in stages for x in options if math.isfinite(network.stage[x, d, p, q])]
        hops: set[tuple[int, int, int]] = set()
        for row in rows:
            ends, at = [chain.source, *(d for d, _, _ in row), chain.sink], [0, *(q for _, _, q in row)]
            hops |= {(p, ends[i], ends[i + 1]) for i, p in enumerate(at)}
        codecs = range(network.crossing.shape[1])
        crossings = [(p, k, d, e) for p, d, e in sorted(hops) for k in codecs if math.isfinite(network.crossing[p, k, d, e])]
        self._sweep_over(_columns(moves), _columns(crossings))

    def _sweep_over(self, stages: tuple[np.ndarray, ...], crossings: tuple[np.ndarray, ...]) -> None:
        arcs = arcs_of(self.programme, self.price, stages, crossings)
        ahead = Sparse.of(self.programme, arcs, self.price)
        Sweep(ahead, ANSWER_WIDTH, self.deadline, lambda: self.value, self.offer).run()

    def narrow(self) -> None:
        """The moves that survive the best bound over all; made anew once the best value has come down much."""
        assert self.table is not None
        if self.ahead is None or self.below - self.value > NARROW * (self.below - self.bound):
            self.below = self.value
            arcs = surviving(self.programme, self.price, self.table, self.value)
            self.ahead, self.step = Sparse.of(self.programme, arcs, self.price), max(self.step, _NEAR_STEP)

    def sweep(self, width: int) -> float | None:
        """Part 3: one pass; the least bound among what was cut off (inf: nothing, a proof), or None when time ran out."""
        assert self.ahead is not None
        return Sweep(self.ahead, width, self.deadline, lambda: self.value, self.offer).run()


def _columns(rows: list[tuple[int, int, int, int]]) -> tuple[np.ndarray, ...]:
    table = np.array(rows, dtype=np.intp).reshape(-1, 4)
    return tuple(table[:, i] for i in range(4))
