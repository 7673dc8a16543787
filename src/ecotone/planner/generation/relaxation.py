"""The relaxed programme over (block, place), which may come back to a class, and prices that make its bound tight.

Lagrange: each segment pays for its bytes and for its visit, each form with a limit for its sum, and what the classes and the
limits have to give is credited; any prices that are not negative give a lower bound. The first prices are those of the
fractional problem, then Polyak's rule towards the value of a known plan. O(rounds * segments).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ecotone.planner.generation.labels import Counts, Forms
from ecotone.planner.generation.problem import FloatArray, Hop, IntArray, Problem

__all__ = ["Relaxation"]

ROUNDS = 60


class Relaxation:
    """Of one problem. Prices are one vector: per byte and class, per visit and class, per limit."""

    def __init__(self, problem: Problem, forms: Forms):
        self.problem, self.forms = problem, forms
        self._main = forms.rows[forms.main][0]
        limited = [(column, limit) for column, _, limit in forms.rows if limit is not None and column >= 0]
        self._limited = [column for column, _ in limited]
        self._limits = np.array([limit for _, limit in limited])
        tables = problem.segments
        self._num = len(tables)
        self._rooms = np.array([float(s.num_bytes.max()) if len(s.num_bytes) else 0.0 for s in tables])
        self._sort()
        size = len(forms.matrix)
        self._end = np.array([np.full(size, math.inf) if hop is None else self._columns(hop.sums) for hop in problem.exit])
        rows = [*([problem.hops[a, b] for b in range(self._num)] for a in range(self._num))]
        self._hops = self._stacked([*rows, [() if hop is None else (hop,) for hop in problem.entry]])
        self._fixed = {fixed.first: self._columns(fixed.sums) for fixed in problem.fixed}

    def _columns(self, sums: FloatArray) -> FloatArray:
        made: FloatArray = self.forms.sums(sums[None, :])[0]
        return made

    def _sort(self) -> None:
        """The segments of all classes in one table, sorted by first block and class."""
        tables = self.problem.segments
        place = np.concatenate([np.full(len(s.first), k, dtype=np.int64) for k, s in enumerate(tables)])
        first = np.concatenate([s.first for s in tables])
        order = np.lexsort((place, first))
        self._place, first = place[order], first[order]
        self._last = np.concatenate([s.last for s in tables])[order]
        self._bytes = np.concatenate([s.num_bytes for s in tables])[order].astype(float)
        self._sums = np.concatenate([self.forms.sums(s.sums) for s in tables])[order]
        self._start = np.searchsorted(first, np.arange(self.problem.num_blocks + 1))
        self._offsets: list[IntArray] = []  # where in the rows of a block each of `_classes` begins
        self._classes: list[IntArray] = []
        for block in range(self.problem.num_blocks):
            own = self._place[self._start[block] : self._start[block + 1]]
            begins = np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1]])[: len(own)])
            self._offsets.append(begins)
            self._classes.append(own[begins])

    def _stacked(self, rows: Sequence[Sequence[tuple[Hop, ...]]]) -> FloatArray:
        """(source, target, codec, column) of all hops, inf where there is none; the driver's start in the last row."""
        most = max([1, *(len(hops) for row in rows for hops in row)])
        made = np.full((len(rows), self._num, most, len(self.forms.matrix)), math.inf)
        for a, row in enumerate(rows):
            for b, hops in enumerate(row):
                for c, hop in enumerate(hops):
                    made[a, b, c] = self._columns(hop.sums)
        return made

    # ---- one run ---------------------------------------------------------------------------------------------------------

    def plain(self, column: int) -> FloatArray:
        """Least cost of completing from (place, block) in one column, place C for the driver's own start; -1: zeros."""
        if column < 0:
            return np.zeros((self._num + 1, self.problem.num_blocks + 1))
        mix = np.zeros(len(self.forms.matrix))
        mix[column] = 1.0
        return self._run(mix, np.zeros(len(self._last)))[0]

    def _run(self, mix: FloatArray, extra: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """(least by place and block, by block and class entered, cost of rows, cost of hops), columns weighed by `mix`."""
        problem, num, places = self.problem, self.problem.num_blocks, self._num
        cost = _mixed(self._sums, mix) + extra
        hop = _mixed(self._hops, mix).min(axis=2)
        least, entered = np.full((places + 1, num + 1), math.inf), np.full((num, places), math.inf)
        least[:places, num] = _mixed(self._end, mix)
        for block in range(num - 1, -1, -1):
            fixed = problem.at(block)
            if fixed is not None:
                entered[block, fixed.place] = float(self._fixed[block] @ mix) + least[fixed.place, fixed.last]
            elif len(self._offsets[block]):
                own = slice(self._start[block], self._start[block + 1])
                total = cost[own] + least[self._place[own], self._last[own]]
                entered[block, self._classes[block]] = np.minimum.reduceat(total, self._offsets[block])
            if block:
                least[:places, block] = (hop[:places] + entered[block]).min(axis=1, initial=math.inf)
            else:
                least[places, 0] = (hop[places] + entered[0]).min(initial=math.inf)
        return least, entered, cost, hop

    def _used(self, mix: FloatArray, run: tuple[FloatArray, FloatArray, FloatArray, FloatArray]) -> FloatArray | None:
        """What a best path of a run uses of everything that is priced; None where there is no path."""
        least, entered, cost, hop = run
        if not math.isfinite(least[-1, 0]):
            return None
        used, sums = np.zeros((2, self._num)), np.zeros(len(mix))
        place, block = self._num, 0
        while block < self.problem.num_blocks:
            target = int((hop[place] + entered[block]).argmin())
            sums += self._hops[place, target, int(_mixed(self._hops[place, target], mix).argmin())]
            place, fixed = target, self.problem.at(block)
            if fixed is not None:
                sums += self._fixed[block]
                block = fixed.last
                continue
            begin = self._start[block]
            own = np.flatnonzero(self._place[begin : self._start[block + 1]] == place) + begin
            row = own[int((cost[own] + least[place, self._last[own]]).argmin())]
            used[:, place] += self._bytes[row], 1
            sums += self._sums[row]
            block = int(self._last[row])
        sums += self._end[place]
        return np.concatenate([used.ravel(), sums[self._limited]])

    # ---- prices ----------------------------------------------------------------------------------------------------------

    def no_prices(self) -> FloatArray:
        return np.zeros(2 * self._num + len(self._limited))

    def credit(self, prices: FloatArray, counts: Counts) -> float:
        """What is credited for `counts` devices."""
        left = np.array(counts, dtype=float)
        return float(prices[: 2 * self._num] @ np.concatenate([left * self._rooms, left]))

    def limits_left(self, prices: FloatArray, sums: FloatArray) -> FloatArray | float:
        """What is credited for what labels of these `sums` have left of the limits."""
        if not self._limited:
            return 0.0
        made: FloatArray = (self._limits * (1 + 1e-9) - sums[:, self._limited]) @ prices[2 * self._num :]
        return made

    def tightened(self, upper: float) -> tuple[FloatArray, FloatArray]:
        """(prices, least cost by place and block under them): the best found on the way to a bound of `upper`."""
        limit = np.array(self.problem.counts, dtype=float)
        give = np.concatenate([limit * self._rooms, limit, self._limits])
        units = np.where(give > 0, give, 1.0)  # so that bytes, visits and limits weigh alike
        prices, step, stalled = np.concatenate([self._fractional(), np.zeros(len(limit) + len(self._limits))]), 1.0, 0
        best, found = -math.inf, (self.no_prices(), self.plain(self._main))
        for _ in range(ROUNDS):
            mix, extra = self._priced(prices)
            run = self._run(mix, extra)
            bound = float(run[0][-1, 0] - prices @ give)
            is_better = bound > best + 1e-4 * abs(bound)
            if bound > best:
                best, found = bound, (prices.copy(), run[0])
            stalled = 0 if is_better else stalled + 1
            if stalled >= 4:
                step, stalled = step * 0.5, 0
            used = self._used(mix, run)
            if used is None or best >= upper * (1 - 1e-9) or step < 0.02:
                break
            over = (used - give) / units
            over[(prices <= 0) & (over < 0)] = 0.0
            norm = float((over**2).sum())
            if norm < 1e-18:
                break
            aim = upper if math.isfinite(upper) else 1.1 * best
            prices = np.maximum(prices + step * (aim - bound) * over / norm / units, 0.0)
        return found

    def _priced(self, prices: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(weights of the columns, what each row pays for bytes and its visit)."""
        mix = np.zeros(len(self.forms.matrix))
        mix[self._main] = 1.0
        np.add.at(mix, self._limited, prices[2 * self._num :])
        return mix, prices[self._place] * self._bytes + prices[self._num + self._place]

    def _fractional(self) -> FloatArray:
        """Per byte, what each class is cheaper than the last one needed to hold all free blocks."""
        rates: list[float] = []
        sizes: list[float] = []
        room: list[int] = []
        for place, segments in enumerate(self.problem.segments):
            if not len(segments.first):
                rates, sizes, room = [*rates, math.inf], [*sizes, 1.0], [*room, 0]
                continue
            width = segments.last - segments.first
            longest = int(width.argmax())
            blocks = int(width[longest])
            rates.append(float(self._columns(segments.sums[longest])[self._main]) / blocks)
            sizes.append(float(segments.num_bytes[longest]) / blocks)
            room.append(blocks * self.problem.counts[place])
        left, last = int(self.problem.free_blocks()[0]), 0.0
        for place in sorted(range(len(rates)), key=lambda place: rates[place]):
            if left > 0 and room[place]:
                last = rates[place]
                left -= room[place]
        return np.array([max(0.0, last - rate) / max(size, 1e-300) for rate, size in zip(rates, sizes, strict=True)])


def _mixed(rows: FloatArray, mix: FloatArray) -> FloatArray:
    """rows . mix over the last axis, where inf stays inf."""
    made: FloatArray = np.where(np.isinf(rows[..., 0]), math.inf, np.where(np.isinf(rows), 0.0, rows) @ mix)
    return made
