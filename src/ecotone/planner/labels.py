"""Label-setting over a list of moves: partial paths in order of position, each with its value and the columns it has used.

A label is dropped when a column passes its limit, when its value + prices of what it used + the priced least still to go
- sum(prices) reaches the best value known, or when another label at the same place is no worse in everything (value,
columns, working sets, places used; where the network allows that). At most `width` labels are kept per (position, place),
best bound first; the least bound among those cut off limits what may have been missed. A sweep that cuts none off has seen
everything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import BoolArray, FloatArray
from ecotone.planner.arcs import Moves
from ecotone.planner.chain import Path
from ecotone.planner.objective import SLACK
from ecotone.planner.sparse import Sparse

__all__ = ["Sweep"]

_DOMINANCE_GROUP, _DOMINANCE_KEPT = 96, 512
_CHUNK = 2_000_000  # pairs of a label and a move looked at together
_EPSILON = 1e-12

Index = NDArray[np.intp]


@dataclass(slots=True)
class _Labels:
    """Parallel arrays; `trace` (n, 4) says where a label comes from (see Sweep._trace)."""

    device: Index
    value: FloatArray
    used: FloatArray  # (n, columns)
    peak: FloatArray  # (n, D), or (n, 0) where working sets are no matter
    seen: NDArray[np.uint64]
    load: FloatArray  # (n,) of the device that computes now
    trace: Index

    def pick(self, index: Index) -> _Labels:
        return _Labels(
            self.device[index], self.value[index], self.used[index], self.peak[index], self.seen[index], self.load[index],
            self.trace[index],
        )  # fmt: skip


class Sweep:
    """One pass over the moves of `ahead`, which says what is still to go. `best()` is the value to beat as it stands,
    `offer` takes a path in options that ends below it."""

    def __init__(
        self, ahead: Sparse, width: int, deadline: float, best: Callable[[], float], offer: Callable[[Path], object]
    ) -> None:
        programme = ahead.programme
        self.programme, self.network, self.chain = programme, programme.network, programme.chain
        self.price, self.table, self.arcs, self.width, self.deadline = ahead.price, ahead, ahead.arcs, width, deadline
        self.best, self.offer = best, offer
        self.offset = float(self.price.sum())
        self.missed = self.arcs.missed
        self.count, self.size = programme.count, programme.size
        self.limits = self.network.limits * (1.0 + SLACK)
        self.num_held = len(self.network.held)
        self.waiting: list[list[tuple[FloatArray, int, Index, Index]]] = [[] for _ in range(self.size)]
        self.starts: list[_Labels | None] = [None] * self.size
        self.arrivals: list[_Labels | None] = [None] * self.size

    def run(self) -> float | None:
        """The least bound among what was cut off (inf: nothing was), or None when time ran out."""
        begin = _Labels(
            np.array([self.chain.source]), np.array([self.network.fixed]), np.zeros((1, self.network.num_columns)),
            np.zeros((1, self.count if self.network.peak is not None else 0)), np.zeros(1, dtype=np.uint64),
            np.zeros(1), np.full((1, 4), -1, dtype=np.intp),
        )  # fmt: skip
        self._send(0, begin)
        for p in range(self.size):
            if self.waiting[p]:
                self._arrive(p)
                self.waiting[p] = []
            if self.starts[p] is not None and p < self.size - 1:
                self._compute(p)
            if time.perf_counter() > self.deadline:
                return None
        return self.missed

    def _pairs(self, p: int, labels: _Labels, first: Index) -> list[tuple[Index, Index]]:
        """(label, move) for every move from (p, the label's place), in chunks."""
        at = p * self.count + labels.device
        begin, length = first[at], first[at + 1] - first[at]
        found, low = [], 0
        sums = np.concatenate([[0], np.cumsum(length)])
        while low < len(length):
            high = max(low + 1, int(np.searchsorted(sums, sums[low] + _CHUNK, side="right")) - 1)
            own = length[low:high]
            rows = np.repeat(np.arange(low, high), own)
            moves = np.arange(len(rows)) - np.repeat(sums[low:high] - sums[low], own) + np.repeat(begin[low:high], own)
            found.append((rows, moves))
            low = high
        return found

    def _priced(self, labels: _Labels) -> FloatArray:
        found: FloatArray = labels.value + labels.used @ self.price - self.offset
        return found

    def _compute(self, p: int) -> None:
        """Extend every label at p by every stage it could compute; survivors wait at their stop, as references only."""
        labels, stages = self.starts[p], self.arcs.stages
        assert labels is not None
        priced, limit, held = self._priced(labels), self._below(), self.num_held * self.count
        for rows, moves in self._pairs(p, labels, stages.first):
            bound = priced[rows] + stages.priced[moves] + self.table.end[stages.stop[moves], stages.device[moves]]
            good = np.nonzero(bound < limit)[0]
            rows, moves, bound = rows[good], moves[good], bound[good]
            fits = labels.load[rows] + stages.run[moves] <= 1.0 + SLACK
            for b in range(self.num_held):
                column = b * self.count + stages.device[moves]
                after = labels.used[rows, column] + stages.held[moves, b]
                if b == 0 and self.network.peak is not None:
                    after = after + np.maximum(labels.peak[rows, stages.device[moves]], stages.peak[moves])
                fits &= after <= self.limits[column]
            for r in range(len(self.network.totals)):
                fits &= labels.used[rows, held + r] + stages.total[moves, r] <= self.limits[held + r]
            rows, moves, bound = rows[fits], moves[fits], bound[fits]
            order = np.argsort(stages.stop[moves], kind="stable")
            rows, moves, bound = rows[order], moves[order], bound[order]
            stops, begins = np.unique(stages.stop[moves], return_index=True)
            for stop, low, high in zip(stops.tolist(), begins, [*begins, len(moves)][1:], strict=True):
                self.waiting[stop].append((bound[low:high], p, rows[low:high], moves[low:high]))

    def _below(self) -> float:
        best = self.best()
        return best - abs(best) * _EPSILON if math.isfinite(best) else best

    def _arrive(self, q: int) -> None:
        """Make the labels that computed up to q, the best of each place, and send them on (or finish)."""
        bound = np.concatenate([b for b, _, _, _ in self.waiting[q]])
        start = np.concatenate([np.full(len(b), p) for b, p, _, _ in self.waiting[q]])
        who = np.concatenate([w for _, _, w, _ in self.waiting[q]])
        move = np.concatenate([m for _, _, _, m in self.waiting[q]])
        kept = self._widest(self.arcs.stages.device[move], bound, bound < self._below())
        if not len(kept):
            return
        labels = self._make(start[kept], who[kept], move[kept])
        if self.arcs.leaves is not None and self.chain.free[q] and q < self.size - 1:
            left = self._moved(q, labels, self.arcs.leaves, self.table.before_leave[q], leaving=True)
            if left is None:
                return
            labels = left
        labels = labels.pick(self._undominated(labels)) if q < self.size - 1 else labels
        self.arrivals[q] = labels
        if q == self.size - 1:
            self._finish(q, labels)
        else:
            self._send(q, labels)

    def _make(self, start: Index, who: Index, move: Index) -> _Labels:
        stages, device = self.arcs.stages, self.arcs.stages.device[move]
        rows = np.arange(len(who))
        value, used = np.zeros(len(who)), np.zeros((len(who), self.network.num_columns))
        peak = np.zeros((len(who), self.count if self.network.peak is not None else 0))
        seen, load = np.zeros(len(who), dtype=np.uint64), np.zeros(len(who))
        for p in np.unique(start):
            own, before = np.nonzero(start == p)[0], self.starts[p]
            assert before is not None
            value[own], used[own], peak[own], seen[own], load[own] = (
                before.value[who[own]], before.used[who[own]], before.peak[who[own]], before.seen[who[own]],
                before.load[who[own]],
            )  # fmt: skip
        value += stages.value[move]
        for b in range(self.num_held):
            used[rows, b * self.count + device] += stages.held[move, b]
        used[:, self.num_held * self.count :] += stages.total[move]
        if self.network.peak is not None:
            peak[rows, device] = np.maximum(peak[rows, device], stages.peak[move])
        trace = np.stack([start, who, stages.option[move], np.zeros(len(who), dtype=np.intp)], axis=1)
        return _Labels(device, value, used, peak, seen, load + stages.run[move], trace)

    def _moved(self, p: int, labels: _Labels, moves: Moves, ahead: FloatArray, *, leaving: bool) -> _Labels | None:
        """The labels after every move from their place, the best of each place; None where none is left.

        `ahead` (D,): the priced least still to go after it. `trace` of a crossing: the label's row, its codec.
        """
        priced, limit, found = self._priced(labels), self._below(), []
        for rows, move in self._pairs(p, labels, moves.first):
            bound = priced[rows] + moves.priced[move] + ahead[moves.target[move]]
            good = np.nonzero(bound < limit)[0]
            found.append((rows[good], move[good], bound[good]))
        rows, move, bound = (np.concatenate(c) for c in zip(*found, strict=True))
        used, index = labels.used[rows], np.arange(len(rows))
        sender = labels.device[rows]
        for b in range(self.num_held):
            used[index, b * self.count + sender] += moves.sender[move, b]
            used[index, b * self.count + moves.other[move]] += moves.receiver[move, b]
        used[:, self.num_held * self.count :] += moves.total[move]
        load = labels.load[rows] + moves.run[move, 0]
        fits = np.asarray((used <= self.limits).all(axis=1)) & (load <= 1.0 + SLACK)
        kept = self._widest(moves.target[move], bound, fits)
        if not len(kept):
            return None
        rows, move, load = rows[kept], move[kept], load[kept]
        if not leaving:  # another device begins
            load = np.where(moves.option[move] < 0, load, moves.run[move, 1])
        if leaving:
            trace = labels.trace[rows].copy()
            trace[:, 3] = moves.option[move]
        else:
            trace = np.stack([rows, moves.option[move], rows, rows], axis=1)
        return _Labels(
            moves.target[move], labels.value[rows] + moves.value[move], used[kept], labels.peak[rows],
            labels.seen[rows] | moves.bit[move], load, trace,
        )  # fmt: skip

    def _send(self, p: int, labels: _Labels) -> None:
        """Send labels at p to every place in every codec; the best per place become the starts at p."""
        found = self._moved(p, labels, self.arcs.crossings, self.table.start[p], leaving=False)
        if found is not None:
            self.starts[p] = found.pick(self._undominated(found))

    def _finish(self, q: int, labels: _Labels) -> None:
        """Offer the complete paths, the least first."""
        moves = self.arcs.crossings
        for rows, move in self._pairs(q, labels, moves.first):
            value = labels.value[rows] + moves.value[move]
            for i in np.argsort(value, kind="stable"):
                if not value[i] < self._below() or time.perf_counter() > self.deadline:
                    break
                self.offer(self._trace(q, int(rows[i]), int(moves.option[move[i]])))

    def _trace(self, q: int, row: int, codec: int) -> Path:
        """Back from an arrival at q: a start's trace is (row of the arrival there, codec); an arrival's (start, row of the
        start, executor, leave)."""
        stages, executors, leaves, codecs = [], [], [], [codec]
        stop = q
        while True:
            arrival = self.arrivals[stop]
            assert arrival is not None
            start, who, executor, leave = (int(v) for v in arrival.trace[row])
            stages.append((int(arrival.device[row]), start, stop))
            executors.append(executor)
            leaves.append(leave)
            begun = self.starts[start]
            assert begun is not None
            row, option = int(begun.trace[who, 0]), int(begun.trace[who, 1])
            codecs.append(option)
            stop = start
            if stop == 0:
                break
        return Path(tuple(stages[::-1]), tuple(codecs[::-1]), tuple(executors[::-1]), tuple(leaves[::-1]))

    def _widest(self, device: Index, bound: FloatArray, good: BoolArray) -> Index:
        """Indices of the `width` best of each place among the good ones, by bound; notes the best bound cut off."""
        index = np.nonzero(good)[0]
        order = index[np.lexsort((index, bound[index], device[index]))]
        sorted_device = device[order]
        rank = np.arange(len(order)) - np.searchsorted(sorted_device, sorted_device)
        over = order[rank >= self.width]
        if len(over):
            self.missed = min(self.missed, float(bound[over].min()))
        return order[rank < self.width]

    def _undominated(self, labels: _Labels) -> Index:
        """Indices of labels that no other of the same place beats in everything; all where that must not be said.

        Each is compared with those of its group and with up to _DOMINANCE_KEPT of lesser value that were kept before.
        """
        if not self.network.dominance or len(labels.device) < 2:
            return np.arange(len(labels.device))
        rows = np.concatenate([labels.value[:, None], labels.used, labels.peak, labels.load[:, None]], axis=1)
        kept = []
        for d in np.unique(labels.device):
            group = np.nonzero(labels.device == d)[0]
            own = rows[group]
            own = own[:, (own != own[0]).any(axis=0)]
            order = np.argsort(labels.value[group], kind="stable")
            alive = self._undominated_of(own[order], labels.seen[group][order])
            kept.append(np.sort(group[order[alive]]))
        return np.concatenate(kept)

    @staticmethod
    def _undominated_of(rows: FloatArray, seen: NDArray[np.uint64]) -> Index:
        """Of rows in order of value those that none beats; of equal ones the first."""
        alive = np.zeros(0, dtype=np.intp)
        for low in range(0, len(rows), _DOMINANCE_GROUP):
            part = np.arange(low, min(low + _DOMINANCE_GROUP, len(rows)))
            before = alive[:_DOMINANCE_KEPT]
            if len(before):
                beaten = (rows[before][:, None, :] <= rows[part][None, :, :]).all(axis=2)
                beaten &= (seen[before][:, None] & ~seen[part][None, :]) == 0
                part = part[~beaten.any(axis=0)]
            beats = (rows[part][:, None, :] <= rows[part][None, :, :]).all(axis=2)
            beats &= (seen[part][:, None] & ~seen[part][None, :]) == 0
            earlier = np.arange(len(part))[:, None] < np.arange(len(part))[None, :]
            alive = np.concatenate([alive, part[~(beats & (earlier | ~beats.T)).any(axis=0)]])
        return alive
