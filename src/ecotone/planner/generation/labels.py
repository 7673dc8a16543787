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
        forms = problem.view.forms
        distinct = list(dict.fromkeys(form.sums for form in forms if any(form.sums)))
        self.used = [i for i in range(2) if any(form.maxima[i] for form in forms)]
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

    def value(self, sums: FloatArray, maxima: FloatArray, rest: FloatArray | None = None) -> FloatArray:
        """The objective of each row, inf where a limit is broken; `rest` (row, form): what each form's sum still pays."""
        value = np.zeros(len(sums))
        for index, (column, weights, limit) in enumerate(self.rows):
            form = maxima @ weights if self.used else np.zeros(len(sums))
            if column >= 0:
                form = form + sums[:, column]
                if rest is not None:
                    form = form + rest[:, index]
            if limit is None:
                value = np.maximum(value, form)
            else:
                value = np.where(form > limit * (1 + 1e-9), np.inf, value)
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


class Rest:
    """What completing a label costs at least, by form, block and place."""

    def __init__(self, problem: Problem, forms: Forms, rounds: int = 40):
        self.problem, self.forms = problem, forms
        self._free = problem.free_blocks()
        self._sums = [forms.sums(s.sums) for s in problem.segments]
        self.plain = [self._programme(column, None)[0] for column, _, _ in forms.rows]
        self.prices = np.zeros((2, len(problem.counts)))  # per byte, per visit
        self.priced = self.plain[forms.main]
        self._by_counts: dict[Counts, tuple[FloatArray, FloatArray]] = {}
        self._most = [self._thresholds(k) for k in range(len(problem.counts))]
        self._rooms = [
            float(s.num_bytes.max()) if len(s.num_bytes) else 0.0 for s in problem.segments
        ]  # no segment takes more
        if rounds and len(problem.counts) > 1:
            self._raise(rounds)

    # ---- sums ------------------------------------------------------------------------------------------------------------

    def _programme(self, column: int, prices: FloatArray | None) -> tuple[FloatArray, list[tuple[int, int]]]:
        """Least cost of completing from (place, block), places C for the driver's own start; and a best path's segments
        (class, row). Column -1: zeros."""
        problem = self.problem
        num, places = problem.num_blocks, len(problem.counts)
        least = np.full((places + 1, num + 1), math.inf)
        if column < 0:
            return np.zeros_like(least), []
        hop = self._least_hops(column)
        weights = self.forms.matrix[column]
        for place in range(places):
            end = problem.exit[place]
            least[place, num] = math.inf if end is None else float(end.sums @ weights)
        choice: dict[tuple[int, int], int] = {}
        target: dict[tuple[int, int], int] = {}
        for block in range(num - 1, -1, -1):
            fixed = problem.at(block)
            entered = np.full(places, math.inf)
            if fixed is not None:
                entered[fixed.place] = float(fixed.sums @ weights) + least[fixed.place, fixed.last]
            else:
                for place, segments in enumerate(problem.segments):
                    rows = slice(segments.start[block], segments.start[block + 1])
                    if rows.start == rows.stop:
                        continue
                    cost = self._sums[place][rows, column] + least[place, segments.last[rows]]
                    if prices is not None:
                        cost = cost + prices[0, place] * segments.num_bytes[rows] + prices[1, place]
                    best = int(cost.argmin())
                    entered[place], choice[place, block] = cost[best], rows.start + best
            for source in range(places + 1):
                if (source == places) == (block == 0):
                    total = hop[source] + entered
                    best = int(total.argmin())
                    least[source, block], target[source, block] = total[best], best
        return least, self._walk(choice, target) if math.isfinite(least[places, 0]) else []

    def _walk(self, choice: dict[tuple[int, int], int], target: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
        place, block, path = len(self.problem.counts), 0, []
        while block < self.problem.num_blocks:
            place = target[place, block]
            fixed = self.problem.at(block)
            if fixed is not None:
                block = fixed.last
            else:
                row = choice[place, block]
                path.append((place, row))
                block = int(self.problem.segments[place].last[row])
        return path

    def _least_hops(self, column: int) -> FloatArray:
        places, weights = len(self.problem.counts), self.forms.matrix[column]

        def least(hops: tuple[Hop | None, ...]) -> float:
            return min((float(hop.sums @ weights) for hop in hops if hop is not None), default=math.inf)

        made = [[least(self.problem.hops[a, b]) for b in range(places)] for a in range(places)]
        return np.array([*made, [least((self.problem.entry[b],)) for b in range(places)]])

    def _raise(self, rounds: int) -> None:
        """Subgradient steps on the prices, towards a plan that keeps bytes and visits (Polyak's rule, halved on stalls)."""
        problem, forms = self.problem, self.forms
        column = forms.rows[forms.main][0]
        limit = np.array(problem.counts, dtype=float)
        room = np.array(self._rooms)
        least, path = self._programme(column, None)
        best = float(least[-1, 0])
        scale = best if best > 0 else 1.0
        prices, step, stalled = np.zeros((2, len(limit))), 1.0, 0
        for _ in range(rounds):
            if not path:
                return
            used = np.zeros((2, len(limit)))
            for place, row in path:
                used[0, place] += problem.segments[place].num_bytes[row]
                used[1, place] += 1
            gradient = used - np.stack([limit * room, limit])
            units = np.stack([np.maximum(limit * room, 1.0), limit])  # so that bytes and visits weigh alike
            over = gradient / units
            norm = float((over**2).sum())
            if norm == 0 or not (over > 1e-12).any():
                break
            prices = np.maximum(prices + step * 0.2 * scale * over / norm / units, 0.0)
            least, path = self._programme(column, prices)
            bound = float(least[-1, 0] - (prices * np.stack([limit * room, limit])).sum())
            if bound > best:
                best, stalled = bound, 0
                self.prices, self.priced = prices.copy(), least
            else:
                stalled += 1
                step *= 0.5 if stalled % 3 == 0 else 1.0

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
            credit = (self.prices * np.stack([left * np.array(self._rooms), left])).sum()
            found = self._by_counts[counts] = (table, np.array(credit))
        return found

    def bound(self, labels: Labels, place: int, counts: Counts) -> FloatArray:
        """A lower bound on the objective of every completion of `labels`, which stand on `place` with `counts` left."""
        table, credit = self.least_maxima(counts)
        least = table[self._free[labels.block]]
        is_stuck = np.isinf(least).any(axis=1)
        least = np.where(is_stuck[:, None], 0.0, least)
        rest = np.stack([plain[place, labels.block] for plain in self.plain], axis=1)
        main = self.forms.main
        rest[:, main] = np.maximum(rest[:, main], self.priced[place, labels.block] - credit)
        maxima = np.maximum(labels.maxima, least) if self.forms.used else labels.maxima
        value = self.forms.value(labels.sums, maxima, rest)
        return np.where(is_stuck, math.inf, value)
