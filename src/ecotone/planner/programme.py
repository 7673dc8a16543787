"""The shortest path over (position, place): exact for any additive objective without budgets, a bound under prices on them.

With G[p, e] the least until place e holds the frontier at cut p, F[q, e] until e has computed up to q, E the exit's move:
    F[q, e] = min over p < q, x of  G[p, e] + T_x,e(p, q) + E[q, e]       G[p, e] = min over d, k of  F[p, d] + X_k(p; d, e)
so a stage is priced whole and its times need not add up; devices may be come back to; at exits G[p, e] <= F[p, e], as a
device may go on by itself. O(X P^2 D + K P D^2), one slice of positions at a time, vectorised.

A price pi >= 0 on every budget column is added to whatever uses it; the least priced path less sum(pi) is then below every
path that keeps the budgets (Lagrange), and pi = 0 is the plain programme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import FloatArray
from ecotone.planner.chain import Path
from ecotone.planner.network import Held, Network
from ecotone.planner.unreached import reached

__all__ = ["Programme", "Remaining"]

Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Remaining:
    """Least still to go from `start[p, e]` (e holds the frontier at p) and `end[q, e]` (e computed up to q, exit included);
    what comes next there: the stage's `stop` and `executor`, the crossing's `target` and `codec`, the exit's `leave`."""

    start: FloatArray  # (P, D)
    end: FloatArray  # (P, D)
    stop: Index
    executor: Index
    target: Index
    codec: Index
    leave: Index
    first: FloatArray  # (D,) to bring the inputs from the source and then all the rest

    @property
    def least(self) -> float:
        return float(self.first.min())


class Programme:
    """The dense programme of a network under prices (columns,)."""

    def __init__(self, network: Network) -> None:
        self.network, self.chain = network, network.chain
        self.count, self.size = network.chain.num_devices, network.chain.num_positions
        self.no_prices = np.zeros(network.num_columns)
        self._free = network.chain.free

    def _own(self, price: FloatArray, index: int) -> FloatArray:
        return price[index * self.count : (index + 1) * self.count]

    def _priced_held(self, price: FloatArray) -> list[tuple[Held, FloatArray]]:
        rows = [(one, self._own(price, b)) for b, one in enumerate(self.network.held)]
        return [(one, own) for one, own in rows if own.any()]

    def _priced_totals(self, price: FloatArray) -> list[tuple[Any, float]]:
        first = len(self.network.held) * self.count
        rows = zip(self.network.totals, price[first:].tolist(), strict=True)
        return [(total.amount, one) for total, one in rows if one > 0]

    def stage_row(self, price: FloatArray, p: int) -> FloatArray:
        """(X, D, P - p - 1) priced stages that start at p."""
        row = self.network.stage[:, :, p, p + 1 :]
        for table, one in self._priced_totals(price):
            row = row + one * _row(table.stage, p)
        for held, own in self._priced_held(price):
            if held.stage is not None:
                row = row + own[:, None].astype(row.dtype) * _row(held.stage, p)
        return row

    def crossings(self, price: FloatArray) -> FloatArray:
        """(P, K, D, D) priced crossings; staying is not among them."""
        table = self.network.crossing
        for amount, one in self._priced_totals(price):
            table = table + one * amount.crossing
        for held, own in self._priced_held(price):
            if held.sender is not None:
                table = table + held.sender * own[:, None]
            if held.receiver is not None:
                table = table + held.receiver * own
            if held.arrive is not None:
                table = np.concatenate([table[:-1] + held.arrive * own, table[-1:]])
        return table

    def leaves(self, price: FloatArray) -> FloatArray | None:
        """(P, K, D) priced transfers of exits; None without exits."""
        table = self.network.leaving
        if table is None:
            return None
        for amount, one in self._priced_totals(price):
            table = table + one * amount.leaving
        for held, own in self._priced_held(price):
            if held.leaver is not None:
                table = table + held.leaver * own
            if held.taker is not None:
                table = table + held.taker * own[self.chain.sink]
        return table

    def arriving(self, price: FloatArray) -> FloatArray:
        """(D,) what it costs to begin at home, on the source itself."""
        found = np.zeros(self.count)
        for held, own in self._priced_held(price):
            if held.arrive is not None:
                found = found + held.arrive * own
        return found

    def _least(self, price: FloatArray) -> tuple[FloatArray, Index, FloatArray, Index]:
        """Least priced crossings (P, D, D) with staying, their codecs, least priced leaves (P, D), their codecs."""
        crossings = self.crossings(price)
        codec, crossing = crossings.argmin(axis=1), crossings.min(axis=1)
        own = np.arange(self.count)
        for at in np.nonzero(self._free)[0]:
            staying = self.arriving(price) if at == 0 else np.zeros(self.count)
            better = staying <= crossing[at, own, own]
            crossing[at, own, own] = np.where(better, staying, crossing[at, own, own])
            codec[at, own, own] = np.where(better, -1, codec[at, own, own])
        leaves = self.leaves(price)
        if leaves is None:
            return crossing, codec, np.zeros((self.size, self.count)), np.zeros((self.size, self.count), dtype=np.intp)
        return crossing, codec, leaves.min(axis=1), leaves.argmin(axis=1)

    def backward(self, price: FloatArray) -> Remaining:
        """Least priced cost to go from everywhere, and what comes next."""
        crossing, codec, leaving, leave = self._least(price)
        size, count, own = self.size, self.count, np.arange(self.count)
        start, end = np.full((size, count), math.inf), np.full((size, count), math.inf)
        stop, executor, target, option = (np.zeros((size, count), dtype=np.intp) for _ in range(4))
        sink = self.chain.sink
        end[-1], target[-1], option[-1] = crossing[-1][:, sink], sink, codec[-1][:, sink]
        for p in range(size - 2, -1, -1):
            row = self.stage_row(price, p)
            through = (row.min(axis=0) if len(row) > 1 else row[0]) + end[p + 1 :].T
            best = through.shape[1] - 1 - through[:, ::-1].argmin(axis=1)  # of equal ones the longest
            start[p], stop[p] = through[own, best], best + p + 1
            if len(row) > 1:
                executor[p] = row[:, own, best].argmin(axis=0)
            if p:
                onward = crossing[p] + start[p][None, :]
                target[p] = np.where(onward[own, own] <= onward.min(axis=1), own, onward.argmin(axis=1))
                end[p] = onward[own, target[p]] + leaving[p]
                option[p] = codec[p, own, target[p]]
        first = crossing[0, self.chain.source] + start[0] + self.network.fixed
        option[0] = codec[0, self.chain.source]  # by target: there is no stage before it
        return Remaining(start, end, stop, executor, target, option, leave, first)

    def forward(self, price: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Least priced cost so far: (P, D) until a place holds the frontier; (P, D) until it has computed, exit included."""
        crossing, _, leaving, _ = self._least(price)
        size, count = self.size, self.count
        held, done = np.full((size, count), math.inf), np.full((size, count), math.inf)
        held[0] = crossing[0, self.chain.source]
        for p in range(size - 1):
            if p:
                done[p] += leaving[p]
                held[p] = (done[p][:, None] + crossing[p]).min(axis=0)
            row = self.stage_row(price, p)
            computed = held[p][:, None] + (row.min(axis=0) if len(row) > 1 else row[0])
            np.minimum(done[p + 1 :], computed.T, out=done[p + 1 :])
        return held, done

    def path(self, remaining: Remaining, first: int | None = None) -> Path | None:
        """The best path in options, or the best that starts on place `first`; None where there is none."""
        source = self.chain.source
        stays = remaining.first[source] <= remaining.least
        device = first if first is not None else source if stays else int(remaining.first.argmin())
        if not math.isfinite(remaining.first[device]):
            return None
        stages, executors, leaves, codecs = [], [], [], [int(remaining.codec[0, device])]
        p = 0
        while p < self.size - 1:
            q = int(remaining.stop[p, device])
            stages.append((device, p, q))
            executors.append(int(remaining.executor[p, device]))
            leaves.append(int(remaining.leave[q, device]))
            codecs.append(int(remaining.codec[q, device]))
            p, device = q, int(remaining.target[q, device])
        return Path(tuple(stages), tuple(codecs), tuple(executors), tuple(leaves))

    def real(self, path: Path) -> Path:
        """A path in options as one in executors and codecs of the chain."""
        network, chain = self.network, self.chain
        ends, at = [chain.source, *(d for d, _, _ in path.stages), chain.sink], [0, *(b for _, _, b in path.stages)]
        executors = tuple(network.executor(x, s) for x, s in zip(path.executors, path.stages, strict=True))
        codecs = tuple(network.codec(k, at[i], ends[i], ends[i + 1]) for i, k in enumerate(path.codecs))
        return Path(path.stages, codecs, executors, path.leaves)

    def next_paths(self, known: Sequence[Path], count: int) -> list[Path]:
        """Up to `count` further paths, each the best that has a stage which none before has. Without prices; in options.

        Stages that nobody reaches make no path another one.
        """
        table, best = self.backward(self.no_prices), self.network.stage.min(axis=0)
        held, _ = self.forward(self.no_prices)
        through = held.T[:, :, None] + best + table.end.T[:, None, :]
        through[:, reached(self.chain) :] = math.inf
        found: list[Path] = []
        for path in known:
            for stage in path.stages:
                through[stage] = math.inf
        while len(found) < count:
            device, p, q = (int(i) for i in np.unravel_index(int(through.argmin()), through.shape))
            if not math.isfinite(through[device, p, q]):
                break
            path = self._by(device, p, q, held, table)
            for stage in path.stages:
                through[stage] = math.inf
            found.append(path)
        return found

    def _by(self, device: int, p: int, q: int, held: FloatArray, table: Remaining) -> Path:
        """The best path that has stage [p, q) on `device`: the best head, then the best tail. Without prices."""
        crossing, codec, leaving, leave = self._least(self.no_prices)
        stages, codecs = [(device, p, q)], []
        at, to = p, device
        while at > 0:  # who held the frontier before, and since where
            sender = int((self._done(at, held) + leaving[at] + crossing[at, :, to]).argmin())
            codecs.append(int(codec[at, sender, to]))
            begin = int((held[:at, sender] + self.network.stage[:, sender, :at, at].min(axis=0)).argmin())
            stages.append((sender, begin, at))
            at, to = begin, sender
        codecs.append(int(codec[0, self.chain.source, to]))
        stages, codecs = stages[::-1], codecs[::-1]
        at, to = q, device
        while at < self.size - 1:
            codecs.append(int(table.codec[at, to]))
            to = int(table.target[at, to])
            stages.append((to, at, int(table.stop[at, to])))
            at = stages[-1][2]
        codecs.append(int(table.codec[at, to]))
        executors = [int(self.network.stage[(slice(None), *stage)].argmin()) for stage in stages]
        leaves = [int(leave[stop, place]) for place, _, stop in stages]
        return Path(tuple(stages), tuple(codecs), tuple(executors), tuple(leaves))

    def _done(self, q: int, held: FloatArray) -> FloatArray:
        """(D,) least until each place has computed up to q, exit not included."""
        best: FloatArray = (held[:q].T + self.network.stage[:, :, :q, q].min(axis=0)).min(axis=1)
        return best


def _row(table: FloatArray, p: int) -> FloatArray:
    """The slice of a stage table that starts at p, axes of length 1 kept."""
    start = table[:, :, p if table.shape[2] > 1 else 0]
    return start[:, :, p + 1 :] if table.shape[3] > 1 else start
