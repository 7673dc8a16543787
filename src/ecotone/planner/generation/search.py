"""The exact search: labels over (devices left by class, place, block), layer by layer in the number of stages.

A stage is appended to every label that stands: hop to a class that has a device left, then each of its segments from that
block. Labels that are beaten (labels.py), that cannot be completed, or whose bound is no better than the best plan known
are dropped; what is left unbeaten at the end of the chain is best. A first sweep keeps `BEAM` labels per layer and gives a
good plan to begin with. When time is over, the least bound of what is not yet extended is the proven bound.

With one form (time per token) a state holds one label, and this is the dynamic programme over (block, counts, class) of
EdgeShard's A made exact with memory: O(N^2 * C * product of (count + 1)); with maxima a state holds a front.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from ecotone.planner.generation.bounds import Rest
from ecotone.planner.generation.labels import Counts, Forms, Labels, undominated
from ecotone.planner.generation.problem import Fixed, FloatArray, Hop, IntArray, Problem

__all__ = ["EQUAL", "Found", "Placed", "sweep"]

BEAM = 300
EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class Placed:
    """One stage of a path: class, blocks, option of the class or the fixed stage, and the codec in which its input came."""

    place: int
    first: int
    last: int
    option: int
    codec: str
    fixed: Fixed | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """`path` None: no plan of less than the value given at the start. `bound`: no plan of this view has less."""

    value: float
    bound: float
    path: tuple[Placed, ...] | None


def sweep(problem: Problem, rest: Rest, best: float, deadline: float, *, exact: bool, gap: float = EQUAL) -> Found:
    """The plan of least value below `best` by more than a share of `gap`: of a narrow beam, or of all plans. Deterministic
    while time does not run out (`deadline`, time.perf_counter)."""
    made = _Sweep(problem, rest.forms, rest, best, deadline, 0 if exact else BEAM, gap)
    made.run()
    return made.found()


@dataclass(slots=True)
class _Records:
    """How labels came about: parent record, and what was appended. In pieces, as they were made."""

    starts: list[int] = field(default_factory=list)
    pieces: list[tuple[IntArray, int, IntArray, IntArray, IntArray, str, Fixed | None]] = field(default_factory=list)
    count: int = 0

    def add(
        self,
        parent: IntArray,
        place: int,
        first: IntArray,
        last: IntArray,
        option: IntArray,
        codec: str,
        fixed: Fixed | None,
    ) -> IntArray:
        made = np.arange(self.count, self.count + len(parent), dtype=np.int64)
        self.starts.append(self.count)
        self.pieces.append((parent, place, first, last, option, codec, fixed))
        self.count += len(parent)
        return made

    def path(self, record: int) -> tuple[Placed, ...]:
        found: list[Placed] = []
        while record >= 0:
            index = int(np.searchsorted(self.starts, record, side="right")) - 1
            parent, place, first, last, option, codec, fixed = self.pieces[index]
            row = record - self.starts[index]
            found.append(Placed(place, int(first[row]), int(last[row]), int(option[row]), codec, fixed))
            record = int(parent[row])
        return tuple(reversed(found))


class _Sweep:
    """One pass; `beam` 0: exact, else at most so many labels per layer."""

    def __init__(self, problem: Problem, forms: Forms, rest: Rest, best: float, deadline: float, beam: int, gap: float):
        self.problem, self.forms, self.rest, self.deadline, self.beam = problem, forms, rest, deadline, beam
        self.gap = gap
        self.value = best
        self.path: tuple[Placed, ...] | None = None
        self.open_bound = math.inf  # of labels that were dropped for no proven reason
        self.records = _Records()
        self.segment_sums = [forms.sums(s.sums) for s in problem.segments]
        self.segment_maxima = [forms.maxima(s.maxima) for s in problem.segments]

    def found(self) -> Found:
        return Found(self.value, min(self.value, self.open_bound), self.path)

    def run(self) -> None:
        problem = self.problem
        places = len(problem.counts)
        layer: dict[Counts, dict[int, list[Labels]]] = {}
        self._settle(layer, problem.counts, places, self.forms.start(problem))
        while layer:
            if self.beam:
                layer = self._narrowed(layer)
            following: dict[Counts, dict[int, list[Labels]]] = {}
            late = False
            for counts, standing in layer.items():
                late = late or time.perf_counter() > self.deadline
                if late:
                    self._give_up(counts, standing)
                else:
                    self._extend(counts, standing, following)
            layer = following
            if late:
                for counts, standing in layer.items():
                    self._give_up(counts, standing)
                return

    # ---- one step --------------------------------------------------------------------------------------------------------

    def _extend(
        self, counts: Counts, standing: dict[int, list[Labels]], following: dict[Counts, dict[int, list[Labels]]]
    ) -> None:
        """Append every possible segment to the labels of one state."""
        merged = {place: undominated(Labels.join(parts)) for place, parts in standing.items()}
        for target, count in enumerate(counts):
            if not count or not len(self.problem.segments[target].first):
                continue
            arrived = [piece for place, labels in merged.items() for piece in self._arrive(labels, place, target)]
            if not arrived:
                continue
            left = (*counts[:target], count - 1, *counts[target + 1 :])
            for codec in dict.fromkeys(codec for codec, _ in arrived):
                labels = undominated(Labels.join([piece for own, piece in arrived if own == codec]))
                self._append(labels, target, left, codec, following)

    def _arrive(self, labels: Labels, place: int, target: int) -> list[tuple[str, Labels]]:
        """The labels after the hop from `place` to `target`, by codec."""
        if place == len(self.problem.counts):
            entry = self.problem.entry[target]
            return [] if entry is None else [("", self._hopped(labels, entry))]
        return [(hop.codec, self._hopped(labels, hop)) for hop in self.problem.hops[place, target]]

    def _hopped(self, labels: Labels, hop: Hop) -> Labels:
        maxima = np.maximum(labels.maxima, self.forms.maxima(hop.maxima[None, :]))
        return Labels(labels.block, labels.sums + self.forms.sums(hop.sums[None, :]), maxima, labels.record)

    def _append(
        self, labels: Labels, target: int, left: Counts, codec: str, following: dict[Counts, dict[int, list[Labels]]]
    ) -> None:
        segments = self.problem.segments[target]
        begin, end = segments.start[labels.block], segments.start[labels.block + 1]
        widths = end - begin
        total = int(widths.sum())
        if not total:
            return
        owner = np.repeat(np.arange(len(labels)), widths)
        row = np.arange(total) - np.repeat(np.cumsum(widths) - widths, widths) + begin[owner]
        made = Labels(
            segments.last[row], labels.sums[owner] + self.segment_sums[target][row],
            np.maximum(labels.maxima[owner], self.segment_maxima[target][row]), row,
        )  # fmt: skip
        good = self.rest.bound(made, target, left) < self._to_beat()
        if not good.any():
            return
        made, owner = made.take(good), owner[good]
        # `record` carries the row and the owner through the front, and only what is left of it gets a record
        marked = Labels(made.block, made.sums, made.maxima, np.arange(len(made), dtype=np.int64))
        front = undominated(marked)
        row, owner = made.record[front.record], owner[front.record]
        record = self.records.add(
            labels.record[owner], target, segments.first[row], segments.last[row], segments.option[row], codec, None
        )
        self._settle(following, left, target, Labels(front.block, front.sums, front.maxima, record))

    def _settle(self, into: dict[Counts, dict[int, list[Labels]]], counts: Counts, place: int, labels: Labels) -> None:
        """Pass fixed stages that begin where labels stand, complete those at the end, and keep the others."""
        pending = [(place, labels)]
        while pending:
            place, labels = pending.pop()
            is_done = labels.block == self.problem.num_blocks
            if is_done.any():
                self._complete(labels.take(is_done), place)
                labels = labels.take(~is_done)
            for fixed in self.problem.fixed:
                standing = labels.block == fixed.first
                if not standing.any():
                    continue
                for codec, moved in self._arrive(labels.take(standing), place, fixed.place):
                    pending.append((fixed.place, self._passed(moved, fixed, codec)))
                labels = labels.take(~standing)
            if len(labels):
                into.setdefault(counts, {}).setdefault(place, []).append(labels)

    def _passed(self, labels: Labels, fixed: Fixed, codec: str) -> Labels:
        count = len(labels)
        last = np.full(count, fixed.last, dtype=np.int64)
        none = np.full(count, -1, dtype=np.int64)
        record = self.records.add(labels.record, fixed.place, labels.block, last, none, codec, fixed)
        return Labels(last, labels.sums + self.forms.sums(fixed.sums[None, :]), labels.maxima, record)

    def _complete(self, labels: Labels, place: int) -> None:
        back = self.problem.exit[place]
        if back is None:
            return
        done = self._hopped(labels, back)
        value = self.forms.value(done.sums, done.maxima)
        best = int(value.argmin())
        if value[best] < self._to_beat():
            self.value = float(value[best])
            self.path = self.records.path(int(done.record[best]))

    def _to_beat(self) -> float:
        return self.value * (1 - self.gap) if math.isfinite(self.value) else math.inf

    # ---- what is dropped without proof -----------------------------------------------------------------------------------

    def _give_up(self, counts: Counts, standing: dict[int, list[Labels]]) -> None:
        for place, parts in standing.items():
            for labels in parts:
                bound = self.rest.bound(labels, place, counts)
                self.open_bound = min(self.open_bound, float(bound.min()))

    def _narrowed(self, layer: dict[Counts, dict[int, list[Labels]]]) -> dict[Counts, dict[int, list[Labels]]]:
        """The `beam` labels of least bound of a layer, a few of every block among them."""
        flat = [(counts, place, labels) for counts, own in layer.items() for place, parts in own.items() for labels in parts]
        bounds = [self.rest.bound(labels, place, counts) for counts, place, labels in flat]
        blocks = np.concatenate([labels.block for _, _, labels in flat])
        every: FloatArray = np.concatenate(bounds)
        if len(every) <= self.beam:
            return layer
        rank = np.empty(len(every), dtype=np.int64)
        order = np.lexsort((every, blocks))
        starts = np.flatnonzero(np.concatenate([[True], blocks[order][1:] != blocks[order][:-1]]))
        within = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
        rank[order] = within
        kept = np.zeros(len(every), dtype=bool)
        kept[np.lexsort((every, rank))[: self.beam]] = True
        if (~kept).any():
            self.open_bound = min(self.open_bound, float(every[~kept].min()))
        made: dict[Counts, dict[int, list[Labels]]] = {}
        at = 0
        for counts, place, labels in flat:
            own = kept[at : at + len(labels)]
            at += len(labels)
            if own.any():
                made.setdefault(counts, {}).setdefault(place, []).append(labels.take(own))
        return made
