"""What is left to pay at least to complete a partial plan: the bounds by which labels are dropped.

sums:    the relaxed programme (relaxation.py), which may come back to classes, with prices for what a plan may not use
maxima:  the least theta at which the classes left, each as often as it is left, can hold the blocks left
bytes:   the same with theta = infinity: labels that can never be completed go
"""

from __future__ import annotations

import math

import numpy as np

from ecotone.planner.generation.labels import Counts, Forms, Labels
from ecotone.planner.generation.problem import FloatArray, Problem
from ecotone.planner.generation.relaxation import Relaxation

__all__ = ["Rest"]


class Rest:
    """What completing a label costs at least, by form, block and place."""

    def __init__(self, problem: Problem, forms: Forms):
        self.problem, self.forms = problem, forms
        self._free = problem.free_blocks()
        self._relaxed = Relaxation(problem, forms)
        self.plain = [self._relaxed.plain(column) for column, _, _ in forms.rows]
        self._prices, self._priced = self._relaxed.no_prices(), self.plain[forms.main]
        self._by_counts: dict[Counts, tuple[FloatArray, float]] = {}
        self._most = [self._thresholds(k) for k in range(len(problem.counts))]

    def tighten(self, upper: float) -> None:
        """Raise the bound until it reaches `upper`, the value of a known plan (inf: of none), or gains little."""
        self._prices, self._priced = self._relaxed.tightened(upper)
        self._by_counts.clear()

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

    def least_maxima(self, counts: Counts) -> tuple[FloatArray, float]:
        """By number of free blocks left: maxima that `counts` more segments reach at least (inf: they cannot hold them);
        and what is credited for what `counts` have to give."""
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
            found = self._by_counts[counts] = (table, self._relaxed.credit(self._prices, counts))
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
        credits = credit + self._relaxed.limits_left(self._prices, labels.sums)
        rest[:, main] = np.maximum(rest[:, main], self._priced[place, labels.block] - credits)
        maxima = np.maximum(labels.maxima, least) if self.forms.used else labels.maxima
        value = self.forms.value(labels.sums, maxima, rest)
        return np.where(is_stuck, math.inf, value)
