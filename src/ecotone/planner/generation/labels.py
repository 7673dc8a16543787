"""Labels of the search: partial plans as rows of numbers, which of them are beaten, and what is left to pay at least.

A label has blocks done, sums (one per distinct form) and maxima. It is beaten by one of the same place and block that is not
worse in any column, since every form grows with every column. What the rest of a plan costs at least:

    sums:    the programme over (block, place) that may come back to classes, minus prices: each segment pays for its bytes
             and its visit, and what the classes left have to give is credited (Lagrange; any prices give a bound)
    maxima:  the least theta at which the classes left, each as often as it is left, can hold the blocks left
    bytes:   the same with theta = infinity: labels that can never be completed go
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ecotone.planner.generation.problem import FloatArray, Hop, IntArray, Problem

__all__ = ["Forms", "Labels", "Rest", "undominated"]

Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Labels:
    """Rows: block, sums, maxima, and the number of the record that says how it came about."""

    block: IntArray
    sums: FloatArray
    maxima: FloatArray
    record: IntArray

    def take(self, index: IntArray | np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Labels:
        return Labels(self.block[index], self.sums[index], self.maxima[index], self.record[index])

    @staticmethod
    def join(parts: list[Labels]) -> Labels:
        if len(parts) == 1:
            return parts[0]
        return Labels(
            np.concatenate([p.block for p in parts]), np.concatenate([p.sums for p in parts]),
            np.concatenate([p.maxima for p in parts]), np.concatenate([p.record for p in parts]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.block)


class Forms:
    """The view's forms over compact columns: `sums` (distinct combinations) and `maxima` (those used)."""

    def __init__(self, problem: Problem):
        forms, distinct = problem.view.forms, problem.view.sums
        self.used = problem.view.maxima
        self.matrix = np.array(distinct).reshape(len(distinct), 4)
        self.rows = [
            (distinct.index(f.sums) if any(f.sums) else -1, np.array([f.maxima[i] for i in self.used]), f.limit)
            for f in forms
        ]
        self.main = next(index for index, (column, _, limit) in enumerate(self.rows) if limit is None and column >= 0)

    def sums(self, rows: FloatArray) -> FloatArray:
        made: FloatArray = rows @ self.matrix.T
        return made

    def maxima(self, rows: FloatArray) -> FloatArray:
        return rows[..., self.used]

    def start(self, problem: Problem) -> Labels:
        """The one label from which everything begins, with nothing done."""
        block, none = np.zeros(1, dtype=np.int64), np.full(1, -1, dtype=np.int64)
        return Labels(block, np.zeros((1, len(self.matrix))), self.maxima(problem.least_maxima[None, :]), none)

    def value(self, sums: FloatArray, maxima: FloatArray, rest: FloatArray | None = None) -> FloatArray:
        """The objective of each row, inf where a limit is broken; `rest` (row, form): what each form's sum still pays."""
        value = np.zeros(len(sums))
        for index, (column, weights, limit) in enumerate(self.rows):
            form = maxima @ weights if self.used else np.zeros(len(sums))
            if column >= 0:
                form = form + sums[:, column]
                if rest is not None:
                    form = form + rest[:, index]
            is_broken = np.zeros(len(sums), dtype=bool) if limit is None else form > limit * (1 + 1e-9)
            value = np.where(is_broken, np.inf, np.maximum(value, form) if limit is None else value)
        return value


def undominated(labels: Labels) -> Labels:
    """Without labels that another one of the same block is not worse than; of equal ones the first stays."""
    if len(labels) < 2:
        return labels
    columns = np.concatenate([labels.sums, labels.maxima], axis=1)
    order = np.lexsort((*columns.T[::-1], labels.block))
    block, columns = labels.block[order], columns[order]
    starts = np.flatnonzero(np.concatenate([[True], block[1:] != block[:-1]]))
    if columns.shape[1] == 1:
        return labels.take(order[starts])
    keep = np.zeros(len(order), dtype=bool)
    for first, last in zip(starts, [*starts[1:], len(order)], strict=True):
        keep[first:last] = _front(columns[first:last])
    return labels.take(order[keep])


def _front(rows: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of lexicographically sorted rows are on the front."""
    count = len(rows)
    keep = np.ones(count, dtype=bool)
    if count == 1:
        return keep
    if rows.shape[1] == 2:
        keep[1:] = rows[1:, 1] < np.minimum.accumulate(rows[:-1, 1])
        return keep
    for i in range(count):
        if keep[i]:
            keep[i + 1 :] &= (rows[i + 1 :] < rows[i]).any(axis=1)
    return keep


@dataclass(frozen=True, slots=True)
class _Rows:
    """The segments of all classes, sorted by first block and class. `offsets[b]`: where in the rows of block b each of
    `classes[b]` begins."""

    place: IntArray
    last: IntArray
    num_bytes: FloatArray
    sums: FloatArray
    start: IntArray
    offsets: list[IntArray]
    classes: list[IntArray]

    @staticmethod
    def of(problem: Problem, sums: list[FloatArray]) -> _Rows:
        tables = problem.segments
        place = np.concatenate([np.full(len(s.first), k, dtype=np.int64) for k, s in enumerate(tables)])
        first = np.concatenate([s.first for s in tables])
        order = np.lexsort((place, first))
        place, first = place[order], first[order]
        start = np.searchsorted(first, np.arange(problem.num_blocks + 1))
        offsets, classes = [], []
        for block in range(problem.num_blocks):
            own = place[start[block] : start[block + 1]]
            begins = (
                np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1]])) if len(own) else np.zeros(0, dtype=np.int64)
            )
            offsets.append(begins)
            classes.append(own[begins])
        last = np.concatenate([s.last for s in tables])[order]
        num_bytes = np.concatenate([s.num_bytes for s in tables])[order].astype(float)
        return _Rows(place, last, num_bytes, np.concatenate(sums)[order], start, offsets, classes)


class Rest:
    """What completing a label costs at least, by form, block and place."""

    def __init__(self, problem: Problem, forms: Forms):
        self.problem, self.forms = problem, forms
        self._free = problem.free_blocks()
        self._sums = [forms.sums(s.sums) for s in problem.segments]
        self._rows = _Rows.of(problem, self._sums)
        self._hops: dict[int, FloatArray] = {}
        self.plain = [self._programme(column, None)[0] for column, _, _ in forms.rows]
        self.prices = np.zeros((2, len(problem.counts)))  # per byte, per visit
        self.priced = self.plain[forms.main]
        self._by_counts: dict[Counts, tuple[FloatArray, FloatArray]] = {}
        self._most = [self._thresholds(k) for k in range(len(problem.counts))]
        most = [float(s.num_bytes.max()) if len(s.num_bytes) else 0.0 for s in problem.segments]  # no segment takes more
        self._rooms = np.array(most)

    # ---- sums ------------------------------------------------------------------------------------------------------------

    def _programme(self, column: int, prices: FloatArray | None) -> tuple[FloatArray, FloatArray]:
        """Least cost of completing from (place, block), place C for the driver's own start; and of entering each class at
        each block. Column -1: zeros."""
        problem, rows = self.problem, self._rows
        num, places = problem.num_blocks, len(problem.counts)
        least, entered = np.full((places + 1, num + 1), math.inf), np.full((num, places), math.inf)
        if column < 0:
            return np.zeros_like(least), entered
        weights = self.forms.matrix[column]
        hop = self._hop_costs(column)
        cost = self._costs(column, prices)
        least[:places, num] = [math.inf if end is None else float(end.sums @ weights) for end in problem.exit]
        for block in range(num - 1, -1, -1):
            fixed = problem.at(block)
            if fixed is not None:
                entered[block, fixed.place] = float(fixed.sums @ weights) + least[fixed.place, fixed.last]
            elif len(rows.offsets[block]):
                own = slice(rows.start[block], rows.start[block + 1])
                total = cost[own] + least[rows.place[own], rows.last[own]]
                entered[block, rows.classes[block]] = np.minimum.reduceat(total, rows.offsets[block])
            if block:
                least[:places, block] = (hop[:places] + entered[block]).min(axis=1, initial=math.inf)
            else:
                least[places, 0] = (hop[places] + entered[0]).min(initial=math.inf)
        return least, entered

    def _costs(self, column: int, prices: FloatArray | None) -> FloatArray:
        rows = self._rows
        own: FloatArray = rows.sums[:, column]
        if prices is not None:
            own = own + prices[0, rows.place] * rows.num_bytes + prices[1, rows.place]
        return own

    def _used(self, column: int, prices: FloatArray, least: FloatArray, entered: FloatArray) -> FloatArray | None:
        """(bytes, visits) by class of a best path of the programme; None where there is none."""
        if not math.isfinite(least[-1, 0]):
            return None
        rows, hop, cost = self._rows, self._hop_costs(column), self._costs(column, prices)
        used = np.zeros((2, len(self.problem.counts)))
        place, block = len(self.problem.counts), 0
        while block < self.problem.num_blocks:
            place = int((hop[place] + entered[block]).argmin())
            fixed = self.problem.at(block)
            if fixed is not None:
                block = fixed.last
                continue
            own = np.flatnonzero(rows.place[rows.start[block] : rows.start[block + 1]] == place) + rows.start[block]
            row = own[int((cost[own] + least[place, rows.last[own]]).argmin())]
            used[:, place] += rows.num_bytes[row], 1
            block = int(rows.last[row])
        return used

    def _hop_costs(self, column: int) -> FloatArray:
        """Least cost of each hop, by (source, target), the driver's start in the last row."""
        if column not in self._hops:
            self._hops[column] = self._least_hops(column)
        return self._hops[column]

    def _least_hops(self, column: int) -> FloatArray:
        places, weights = len(self.problem.counts), self.forms.matrix[column]

        def least(hops: tuple[Hop | None, ...]) -> float:
            return min((float(hop.sums @ weights) for hop in hops if hop is not None), default=math.inf)

        made = [[least(self.problem.hops[a, b]) for b in range(places)] for a in range(places)]
        return np.array([*made, [least((self.problem.entry[b],)) for b in range(places)]])

    def tighten(self, upper: float, rounds: int = 60) -> None:
        """Raise the bound by subgradient steps on the prices, until it reaches `upper` (the value of a known plan, or inf).

        The first prices are those of the fractional problem: blocks go to the cheapest bytes first, and every class pays
        per byte what it is cheaper than the last one that is needed. Then Polyak's rule, its step halved on stalls.
        """
        limit = np.array(self.problem.counts, dtype=float)
        give = np.stack([limit * self._rooms, limit])
        units = np.maximum(give, 1e-300)  # so that bytes and visits weigh alike
        prices, step, stalled = np.stack([self._fractional(), np.zeros(len(limit))]), 1.0, 0
        best, column = -math.inf, self.forms.rows[self.forms.main][0]
        for _ in range(rounds):
            least, entered = self._programme(column, prices)
            used = self._used(column, prices, least, entered)
            bound = float(least[-1, 0] - (prices * give).sum())
            if bound > best:
                improved = bound > best + 1e-4 * abs(bound)
                best, stalled = bound, 0 if improved else stalled + 1
                self.prices, self.priced = prices.copy(), least
                self._by_counts.clear()
            else:
                stalled += 1
            if stalled >= 4:
                step, stalled = step * 0.5, 0
            if used is None or best >= upper * (1 - 1e-9) or step < 0.02:
                return
            over = (used - give) / units
            over[(prices <= 0) & (over < 0)] = 0.0
            norm = float((over**2).sum())
            if norm < 1e-18:
                return
            aim = upper if math.isfinite(upper) else 1.1 * best
            prices = np.maximum(prices + step * (aim - bound) * over / norm / units, 0.0)

    def _fractional(self) -> FloatArray:
        """Per byte, what each class is cheaper than the last one needed to hold all free blocks."""
        rates, sizes, room = [], [], []
        for sums, segments in zip(self._sums, self.problem.segments, strict=True):
            width = segments.last - segments.first
            longest = int(width.argmax()) if len(width) else -1
            per_block = (
                float(sums[longest, self.forms.rows[self.forms.main][0]]) / int(width[longest]) if len(width) else 0.0
            )
            rates.append(per_block if len(width) else math.inf)
            sizes.append(float(segments.num_bytes[longest]) / int(width[longest]) if len(width) else 1.0)
            room.append(int(width[longest]) if len(width) else 0)
        left, last = float(self._free[0]), 0.0
        for place in sorted(range(len(rates)), key=lambda place: rates[place]):
            if left > 0 and room[place]:
                last = rates[place]
                left -= room[place] * self.problem.counts[place]
        return np.array([max(0.0, last - rate) / max(size, 1e-300) for rate, size in zip(rates, sizes, strict=True)])

    # ---- maxima and bytes ------------------------------------------------------------------------------------------------

    def _thresholds(self, place: int) -> FloatArray:
        """Of one class: by number of blocks, the least maxima of a segment of at least so many; inf where none fits."""
        segments = self.problem.segments[place]
        made = np.full((self.problem.num_blocks + 2, max(len(self.forms.used), 1)), math.inf)
        maxima = self.forms.maxima(segments.maxima) if self.forms.used else np.zeros((len(segments.first), 1))
        np.minimum.at(made, segments.last - segments.first, maxima)
        made = np.minimum.accumulate(made[::-1], axis=0)[::-1]
        made[0] = 0.0
        return made

    def least_maxima(self, counts: Counts) -> tuple[FloatArray, FloatArray]:
        """By number of free blocks left: maxima that `counts` more segments reach at least (inf: they cannot hold them);
        and the credit of equation sums for what `counts` have to give."""
        found = self._by_counts.get(counts)
        if found is None:
            num, columns = self.problem.num_blocks, self._most[0].shape[1]
            table = np.full((num + 1, columns), math.inf)
            table[0] = 0.0
            for column in range(columns):
                steps = [
                    np.repeat(most[1 : num + 1, column], count)
                    for most, count in zip(self._most, counts, strict=True)
                    if count
                ]
                if steps:
                    ordered = np.sort(np.concatenate(steps))[:num]
                    table[1 : len(ordered) + 1, column] = ordered
            left = np.array(counts, dtype=float)
            credit = (self.prices * np.stack([left * self._rooms, left])).sum()
            found = self._by_counts[counts] = (table, np.array(credit))
        return found

    def root(self) -> float:
        """A lower bound on every plan of the problem; inf where it holds none."""
        counts = self.problem.counts
        return float(self.bound(self.forms.start(self.problem), len(counts), counts)[0])

    def range(self, column: int) -> tuple[float, float]:
        """Between what and what maximum `column` (of the forms' compact ones) of any plan lies."""
        table, _ = self.least_maxima(self.problem.counts)
        own = self.forms.used[column]
        highest = [float(s.maxima[:, own].max()) for s in self.problem.segments if len(s.first)]
        hops = [h for hops in self.problem.hops.values() for h in hops] + [*self.problem.entry, *self.problem.exit]
        highest += [float(hop.maxima[own]) for hop in hops if hop is not None]
        low = max(float(table[self._free[0], column]), float(self.problem.least_maxima[own]))
        return low, max([low, *highest])

    def bound(self, labels: Labels, place: int, counts: Counts) -> FloatArray:
        """A lower bound on the objective of every completion of `labels`, which stand on `place` with `counts` left."""
        table, credit = self.least_maxima(counts)
        least = table[self._free[labels.block]]
        is_stuck = np.asarray(np.isinf(least).any(axis=1))
        least = np.where(is_stuck[:, None], 0.0, least)
        rest = np.stack([plain[place, labels.block] for plain in self.plain], axis=1)
        main = self.forms.main
        rest[:, main] = np.maximum(rest[:, main], self.priced[place, labels.block] - credit)
        maxima = np.maximum(labels.maxima, least) if self.forms.used else labels.maxima
        value = self.forms.value(labels.sums, maxima, rest)
        return np.where(is_stuck, math.inf, value)
