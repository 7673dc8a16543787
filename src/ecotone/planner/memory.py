"""Least latency under budgets that couple stages: Lagrangian bound, then label-setting of growing width. Anytime.

The problem is a shortest path with resources, NP-hard. Two parts:
 1. *Bound*: with a price pi >= 0 on every budget column, the latency programme on priced times, less sum(pi), is a lower
    bound for every pi; subgradient steps raise it (Held and Karp), and every path met on the way that fits is an answer.
    Local search over the order of devices (orders.py) gives more answers.
 2. *Labels*: partial paths in order of position, each with seconds and columns used. A label is dropped when a column
    passes 1, when seconds + prices used + priced time still to go - sum(pi) reaches the best answer, or when another
    label at the same place is no worse in everything. At most `width` labels are kept per (position, device), best bound
    first; the least bound among those cut off limits what may have been missed. A pass that cuts none off is a proof.
    Widths grow fourfold.
The answer's bound is the greater of the two. The same input gives the same answer unless the time limit interrupts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import BoolArray, FloatArray
from ecotone.planner.budgets import Budgets, fits, usage
from ecotone.planner.chain import Chain, Path
from ecotone.planner.latency import Remaining, remaining
from ecotone.planner.objective import SLACK
from ecotone.planner.orders import improve_order

__all__ = ["Constrained", "least_latency"]

FIRST_WIDTH, LAST_WIDTH = 4, 4096
FIRST_PRICE_STEPS = 40  # before the first pass; four times as many before each further one
_SHRINK, _PATIENCE = 0.6, 12
_REORDER_SHARE = 0.4  # of the time that is left
_GOOD_GAP = 1e-9
_DOMINANCE_GROUP = 96

Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Constrained:
    """The best path found (None: none), its seconds, and a proven lower bound on any path (inf: there is none)."""

    path: Path | None
    value: float
    bound: float

    @property
    def is_proven(self) -> bool:
        return self.bound >= self.value * (1 - 1e-9) or math.isinf(self.bound)


def least_latency(
    chain: Chain,
    budgets: Budgets,
    accept: Callable[[Path], bool],
    deadline: float,
    *,
    limit_s: float = math.inf,
    any_will_do: bool = False,
) -> Constrained:
    """Least latency of a path that keeps `budgets` and that `accept` (the exact check) takes, below `limit_s`.

    Stops at time.perf_counter() `deadline`, when the answer is proven, or with `any_will_do` at the first answer.
    """
    search = _Search(chain, budgets, accept, deadline, limit_s)
    width, steps = FIRST_WIDTH, FIRST_PRICE_STEPS
    search.raise_bound(steps)
    while search.bound < search.value * (1 - _GOOD_GAP) and width <= LAST_WIDTH:
        if time.perf_counter() > deadline or (any_will_do and search.path is not None):
            break
        missed = search.sweep(width)
        if missed is None:
            break
        search.bound = max(search.bound, min(missed, search.value))
        if math.isinf(missed):
            break
        width, steps = 4 * width, 4 * steps
        search.raise_bound(steps)
        search.reorder()
    if search.path is None:
        none_exists = search.bound >= search.value * (1 - _GOOD_GAP)
        return Constrained(None, math.inf, math.inf if none_exists else search.bound)
    return Constrained(search.path, search.value, min(search.bound, search.value))


class _Search:
    """State of one call: prices, potentials, the best answer so far. `value` starts at the limit, so that it prunes."""

    def __init__(self, chain: Chain, budgets: Budgets, accept: Callable[[Path], bool], deadline: float, limit_s: float):
        self.chain, self.budgets, self.accept, self.deadline = chain, budgets, accept, deadline
        self.path: Path | None = None
        self.value = limit_s * (1 + 1e-9) if math.isfinite(limit_s) else math.inf
        self.bound = 0.0
        self.columns = budgets.num_device * chain.num_devices + budgets.num_total
        if budgets.needs_codecs:
            self.times = chain.transfer
        else:  # one column: the fastest codec of every crossing
            self.times = np.where(chain.choice >= 0, chain.best, math.inf)[:, None]
        self.price, self.step = np.zeros(self.columns), 1.0
        self.potential = self._priced(self.price)[0]

    def _codec(self, p: int, d: int, e: int, option: int) -> int:
        return option if self.budgets.needs_codecs else int(self.chain.choice[p, d, e])

    def _priced(self, price: FloatArray) -> tuple[Remaining, FloatArray, Index]:
        """Time still to go with priced budgets; priced transfers (P, D, D) and the option that each takes (-1: local)."""
        count, budgets = self.chain.num_devices, self.budgets
        stage, times = self.chain.stage.copy(), self.times
        for b in range(budgets.num_device):
            own = price[b * count : (b + 1) * count]
            stage += own[:, None, None] * budgets.device_stage[b]
            encode, decode = budgets.device_encode[b], budgets.device_decode[b]
            if encode is not None and decode is not None:
                times = times + (encode * own)[:, :, :, None] + (decode * own)[:, :, None, :]
        for r in range(budgets.num_total):
            one = float(price[budgets.num_device * count + r])
            stage += one * budgets.total_stage[r]
            if budgets.needs_codecs:
                times = times + one * budgets.total_transfer[r]
        option, transfer = times.argmin(axis=1), times.min(axis=1)
        own_index = np.arange(count)
        for end in (0, self.chain.num_positions - 1):
            transfer[end, own_index, own_index], option[end, own_index, own_index] = 0.0, -1
        return remaining(stage, transfer, self.chain.sink), transfer, option

    def raise_bound(self, steps: int) -> None:
        """Part 1: subgradient steps on the prices, keeping the best bound, its prices and every path that fits."""
        price, step, stale = self.price.copy(), self.step, 0
        chain = self.chain
        for _ in range(steps):
            table, transfer, option = self._priced(price)
            totals = transfer[0, chain.source] + table.start[0]
            first = int(totals.argmin())
            if not math.isfinite(totals[first]):
                self.bound = math.inf
                return
            path = self._path(table.path(first), option)
            columns = usage(chain, self.budgets, path)
            self.offer(path, columns)
            bound = float(totals[first] - price.sum())
            if bound > self.bound * (1 + 1e-7) or (bound == self.bound and price.any()):
                self.bound, self.price, self.potential, stale = bound, price.copy(), table, 0
            else:
                stale += 1
            if stale >= _PATIENCE:
                self.step = step = step * _SHRINK
                stale, price = 0, self.price.copy()
                continue
            slope = columns - 1.0
            slope[(price <= 0) & (slope < 0)] = 0.0
            length = float((slope**2).sum())
            if length < 1e-18 or step < 1e-3 or self.bound >= self.value * (1 - _GOOD_GAP):
                break
            if time.perf_counter() > self.deadline:
                break
            goal = self.value if math.isfinite(self.value) else 1.5 * max(self.bound, 1e-9)
            price = np.maximum(0.0, price + step * max(goal - bound, 1e-3 * abs(goal)) / length * slope)

    def _path(self, stages: tuple[tuple[int, int, int], ...], option: Index) -> Path:
        ends = [self.chain.source, *(d for d, _, _ in stages), self.chain.sink]
        at = [0, *(stop for _, _, stop in stages)]
        found = [
            -1
            if option[p, ends[i], ends[i + 1]] < 0
            else self._codec(p, ends[i], ends[i + 1], option[p, ends[i], ends[i + 1]])
            for i, p in enumerate(at)
        ]
        return Path(stages, tuple(int(c) for c in found))

    def offer(self, path: Path, columns: FloatArray) -> bool:
        """Keep `path` if it fits, the exact check takes it, and it is better than the best so far."""
        if not fits(columns):
            return False
        seconds = path_seconds(self.chain, path)
        if seconds >= self.value * (1 - 1e-12) or not self.accept(path):
            return False
        self.path, self.value = path, seconds
        return True

    def reorder(self) -> None:
        """Local search over orders of devices, from the best path and from the cheapest path at the best prices."""
        table, transfer, _ = self._priced(self.price)
        first = int((transfer[0, self.chain.source] + table.start[0]).argmin())
        paths = [table.path(first), *([self.path.stages] if self.path is not None else [])]
        starts = [tuple(dict.fromkeys(d for d, _, _ in stages)) for stages in reversed(paths)]
        now = time.perf_counter()
        found = improve_order(self.chain, starts, now + _REORDER_SHARE * (self.deadline - now))
        if found is not None:
            self.offer(found, usage(self.chain, self.budgets, found))

    def sweep(self, width: int) -> float | None:
        """Part 2: one pass; the least bound among labels cut off (inf: none was, a proof), or None when time ran out."""
        return _Sweep(self, width).run()


def path_seconds(chain: Chain, path: Path) -> float:
    """Latency of a path from the tables."""
    ends = [chain.source, *(d for d, _, _ in path.stages), chain.sink]
    at = [0, *(stop for _, _, stop in path.stages)]
    seconds = sum(float(chain.stage[s]) for s in path.stages)
    return seconds + sum(
        float(chain.transfer[p, c, ends[i], ends[i + 1]])
        for i, (p, c) in enumerate(zip(at, path.codecs, strict=True))
        if c >= 0
    )


@dataclass(slots=True)
class _Labels:
    """Labels that hold the frontier of one position, each about to compute on `device`: parallel arrays."""

    device: Index
    seconds: FloatArray
    used: FloatArray  # (n, columns)
    peak: FloatArray  # (n, D)
    parent: Index  # (n, 4): node of the stage before, its position, codec option, node's own number


class _Sweep:
    def __init__(self, search: _Search, width: int) -> None:
        self.search, self.chain, self.budgets, self.width = search, search.chain, search.budgets, width
        self.offset = float(search.price.sum())
        self.missed = math.inf
        self.waiting: list[list[tuple[FloatArray, int, Index]]] = [[] for _ in range(self.chain.num_positions)]
        self.starts: list[_Labels | None] = [None] * self.chain.num_positions

    def run(self) -> float | None:
        self._begin()
        for p in range(self.chain.num_positions):
            if p and self.waiting[p]:
                self._arrive(p)
                self.waiting[p] = []
            if self.starts[p] is not None and p < self.chain.num_positions - 1:
                self._compute(p)
            if time.perf_counter() > self.search.deadline:
                return None
        return self.missed

    def _begin(self) -> None:
        count = self.chain.num_devices
        nowhere = np.zeros((1, self.search.columns))
        held = _Labels(
            np.array([self.chain.source]), np.zeros(1), nowhere, np.zeros((1, count)), np.full((1, 3), -1, dtype=np.intp)
        )
        self._send(0, held, np.array([-1]), np.array([-1]), local=True)

    def _compute(self, p: int) -> None:
        """Extend every label at p by every stage it could compute; survivors wait at their stop, as references only."""
        labels, budgets, search = self.starts[p], self.budgets, self.search
        assert labels is not None
        count, device = self.chain.num_devices, labels.device
        rows = np.arange(len(device))
        seconds = labels.seconds[:, None] + self.chain.stage[device, p, p + 1 :]
        bound = seconds + (labels.used @ search.price)[:, None] + search.potential.end[p + 1 :, device].T - self.offset
        good = np.isfinite(seconds)
        for b in range(budgets.num_device):
            column = b * count + device
            add = budgets.device_stage[b][device, p, p + 1 :]
            bound = bound + search.price[column][:, None] * add
            after = labels.used[rows, column][:, None] + add
            if b == 0 and budgets.peak is not None:
                after = after + np.maximum(labels.peak[rows, device][:, None], budgets.peak[device, p, p + 1 :])
            good &= after <= 1.0 + SLACK
        for r in range(budgets.num_total):
            column_index = budgets.num_device * count + r
            add = budgets.total_stage[r][device, p, p + 1 :]
            bound = bound + search.price[column_index] * add
            good &= labels.used[:, column_index][:, None] + add <= 1.0 + SLACK
        good &= bound < search.value * (1 - 1e-12)
        stops, who = np.nonzero(good.T)
        edges = np.searchsorted(stops, np.arange(good.shape[1] + 1))
        values = bound.T[stops, who]
        for q in np.unique(stops):
            part = slice(edges[q], edges[q + 1])
            self.waiting[p + 1 + int(q)].append((values[part], p, who[part]))

    def _arrive(self, q: int) -> None:
        """Make the labels that computed up to q, the best of each device, and send them on (or finish)."""
        bound = np.concatenate([values for values, _, _ in self.waiting[q]])
        start = np.concatenate([np.full(len(values), p) for values, p, _ in self.waiting[q]])
        who = np.concatenate([index for _, _, index in self.waiting[q]])
        device = np.concatenate([self.starts[p].device[index] for _, p, index in self.waiting[q]])  # type: ignore[union-attr]
        kept = self._best(device, bound, bound < self.search.value * (1 - 1e-12))
        bound, start, who, device = bound[kept], start[kept], who[kept], device[kept]
        if not len(kept):
            return
        labels = self._make(q, start, who, device)
        if q == self.chain.num_positions - 1:
            self._finish(q, labels, start, who, bound)
        else:
            alive = self._undominated(labels)
            self._send(q, _pick(labels, alive), start[alive], who[alive], local=False)

    def _make(self, q: int, start: Index, who: Index, device: Index) -> _Labels:
        budgets, count = self.budgets, self.chain.num_devices
        seconds, rows = np.zeros(len(who)), np.arange(len(who))
        used, peak = np.zeros((len(who), self.search.columns)), np.zeros((len(who), count))
        for p in np.unique(start):
            rows_of, before = np.nonzero(start == p)[0], self.starts[p]
            assert before is not None
            seconds[rows_of], used[rows_of], peak[rows_of] = (
                before.seconds[who[rows_of]], before.used[who[rows_of]], before.peak[who[rows_of]],
            )  # fmt: skip
        seconds += self.chain.stage[device, start, q]
        for b in range(budgets.num_device):
            used[rows, b * count + device] += budgets.device_stage[b][device, start, q]
        for r in range(budgets.num_total):
            used[:, budgets.num_device * count + r] += budgets.total_stage[r][device, start, q]
        if budgets.peak is not None:
            peak[rows, device] = np.maximum(peak[rows, device], budgets.peak[device, start, q])
        return _Labels(device, seconds, used, peak, np.empty((len(who), 0), dtype=np.intp))

    def _onward(self, q: int, labels: _Labels, target: Index, option: Index, rows: Index) -> tuple[FloatArray, FloatArray]:
        """Seconds and columns after sending labels `rows` to `target` in codec `option` (-1: local)."""
        budgets, count = self.budgets, self.chain.num_devices
        remote = option >= 0
        device, used = labels.device[rows], labels.used[rows].copy()
        codec = np.where(remote, option, 0)
        seconds = labels.seconds[rows] + np.where(remote, self.search.times[q, codec, device, target], 0.0)
        index = np.arange(len(rows))
        for b in range(budgets.num_device):
            encode, decode = budgets.device_encode[b], budgets.device_decode[b]
            if encode is not None and decode is not None:
                used[index, b * count + device] += np.where(remote, encode[q, codec, device], 0.0)
                used[index, b * count + target] += np.where(remote, decode[q, codec, target], 0.0)
        if budgets.needs_codecs:
            for r in range(budgets.num_total):
                used[:, budgets.num_device * count + r] += np.where(
                    remote, budgets.total_transfer[r][q, codec, device, target], 0.0
                )
        return seconds, used

    def _send(self, q: int, labels: _Labels, start: Index, who: Index, *, local: bool) -> None:
        """Send labels at q to every device in every codec option; the best per device become the starts at q."""
        search = self.search
        onward = labels.seconds[:, None, None] + search.times[q][:, labels.device].transpose(1, 0, 2)
        rough = onward + (labels.used @ search.price)[:, None, None] + search.potential.start[q][None, None, :] - self.offset
        rows, option, target = np.nonzero(np.isfinite(onward) & (rough < search.value * (1 - 1e-12)))
        if local:  # the source itself computes first
            rows, option, target = np.append(rows, 0), np.append(option, -1), np.append(target, labels.device[0])
        seconds, used = self._onward(q, labels, target, option, rows)
        bound = seconds + used @ search.price + search.potential.start[q, target] - self.offset
        good = (used <= 1.0 + SLACK).all(axis=1) & (bound < search.value * (1 - 1e-12))
        kept = self._best(target, bound, good)
        if not len(kept):
            return
        rows, option, target = rows[kept], option[kept], target[kept]
        parent = np.stack([start[rows], who[rows], option], axis=1)
        found = _Labels(target, seconds[kept], used[kept], labels.peak[rows], parent)
        self.starts[q] = _pick(found, self._undominated(found))

    def _finish(self, q: int, labels: _Labels, start: Index, who: Index, bound: FloatArray) -> None:
        search, sink = self.search, self.chain.sink
        codecs = np.arange(search.times.shape[1])
        rows = np.repeat(np.arange(len(bound)), len(codecs))
        option = np.tile(codecs, len(bound))
        home = labels.device[rows] == sink
        option[home] = -1
        rows, option = rows[~home | (np.tile(codecs, len(bound)) == 0)], option[~home | (np.tile(codecs, len(bound)) == 0)]
        seconds, _ = self._onward(q, labels, np.full(len(rows), sink), option, rows)
        good = np.isfinite(seconds)
        for i in np.argsort(np.where(good, seconds, math.inf), kind="stable"):
            if not good[i] or seconds[i] >= search.value:
                break
            path = self._trace(q, int(labels.device[rows[i]]), int(start[rows[i]]), int(who[rows[i]]), int(option[i]))
            search.offer(path, usage(self.chain, self.budgets, path))

    def _trace(self, q: int, device: int, start: int, who: int, option: int) -> Path:
        stages: list[tuple[int, int, int]] = []
        codecs = [option if option < 0 else self.search._codec(q, device, self.chain.sink, option)]
        stop = q
        while start >= 0:
            labels = self.starts[start]
            assert labels is not None
            device = int(labels.device[who])
            stages.append((device, start, stop))
            before, parent, choice = (int(v) for v in labels.parent[who])
            held = self.starts[before]
            sender = self.chain.source if held is None or start == 0 else int(held.device[parent])
            codecs.append(choice if choice < 0 else self.search._codec(start, sender, device, choice))
            stop, start, who = start, (before if start > 0 else -1), parent
        return Path(tuple(reversed(stages)), tuple(reversed(codecs)))

    def _best(self, device: Index, bound: FloatArray, good: BoolArray) -> Index:
        """Indices of the `width` best of each device among the good ones, by bound; notes the best bound cut off."""
        index = np.nonzero(good)[0]
        order = index[np.lexsort((index, bound[index], device[index]))]
        sorted_device = device[order]
        rank = np.arange(len(order)) - np.searchsorted(sorted_device, sorted_device)
        over = order[rank >= self.width]
        if len(over):
            self.missed = min(self.missed, float(bound[over].min()))
        return order[rank < self.width]

    def _undominated(self, labels: _Labels) -> Index:
        """Indices of labels that no other of the same device beats in seconds, columns and working sets."""
        everything = np.arange(len(labels.device))
        if not self.budgets.dominance:
            return everything
        keep = np.ones(len(everything), dtype=np.bool_)
        rows = np.concatenate([labels.seconds[:, None], labels.used, labels.peak], axis=1)
        for d in np.unique(labels.device):
            group = everything[labels.device == d]
            for low in range(0, len(group), _DOMINANCE_GROUP):
                part = group[low : low + _DOMINANCE_GROUP]
                beats = (rows[part][:, None, :] <= rows[part][None, :, :]).all(axis=2)
                earlier = np.arange(len(part))[:, None] < np.arange(len(part))[None, :]
                keep[part] = ~(beats & (earlier | ~beats.T)).any(axis=0)
        return everything[keep]


def _pick(labels: _Labels, index: Index) -> _Labels:
    return _Labels(labels.device[index], labels.seconds[index], labels.used[index], labels.peak[index], labels.parent[index])
