"""The best chain of ideals where memory of the devices binds: labels over the lattice, the programme's rest as their bound.

A device holds the weights of all its blocks and the largest set of live tensors while any of them runs, so what it has
used must be remembered: a shortest path with resources, NP-hard. A label is a partial chain (ideal, machine, value, bytes
used and largest working set per device). It is dropped when a device is full, when value + the least rest without memory
reaches the best answer, or when another label at the same place is no worse in everything. At most `width` labels are
kept per place; the least bound among those cut off limits what may have been missed, and a pass that cuts none off is a
proof. Widths grow. Weights that two blocks of one device share are counted twice here: safe, at times too careful; the
finished plan's check counts them once.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import FloatArray
from ecotone.planner.ideals import Chained, Programme
from ecotone.planner.objective import SLACK

__all__ = ["InMemory", "least_in_memory"]

FIRST_WIDTH, LAST_WIDTH = 8, 2048
_GROUP = 128

Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class InMemory:
    """The best chain that fits (None: none found) and a proven lower bound on any that fits (inf: there is none)."""

    chained: Chained | None
    bound: float


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """Parallel arrays; `parent` and `block`: the label one block before, `starts`: that block begins a stage."""

    ideal: Index
    machine: Index
    value: FloatArray
    used: FloatArray  # (n, D)
    peak: FloatArray  # (n, D)
    parent: Index
    block: Index
    starts: NDArray[np.bool_]

    def pick(self, index: Index) -> _Labels:
        return _Labels(*(getattr(self, name)[index] for name in self.__slots__))


def least_in_memory(programme: Programme, deadline: float, upper: float = math.inf) -> InMemory:
    """The best chain below `upper` whose devices all hold what they are given, until time.perf_counter() is `deadline`."""
    best, bound, width = None, 0.0, FIRST_WIDTH
    while width <= LAST_WIDTH and time.perf_counter() < deadline:
        found, missed, is_done = _Sweep(programme, width, deadline, upper).run()
        if found is not None:
            best, upper = found, found.value
        if is_done:
            bound = max(bound, min(missed, upper))
            if missed >= upper:
                break
        width *= 8
    return InMemory(best, bound)


class _Sweep:
    """One pass at one width."""

    def __init__(self, programme: Programme, width: int, deadline: float, upper: float) -> None:
        self.programme, self.width, self.deadline, self.upper = programme, width, deadline, upper
        self.tables, self.missed = programme.prices.tables, math.inf
        self.history: list[_Labels] = []

    def run(self) -> tuple[Chained | None, float, bool]:
        """The best chain, the least bound among labels cut off (inf: none), and whether the pass came to its end."""
        programme = self.programme
        labels = self._grown(0, self._first())
        for size in range(1, programme.last):
            if time.perf_counter() > self.deadline:
                return None, math.inf, False
            self.history.append(labels)
            labels = self._grown(size, self._ready(size, labels))
        self.history.append(labels)
        total = labels.value + programme.rest[-1][0, labels.machine]
        good = np.nonzero(total < self.upper)[0]
        if not len(good):
            return None, self.missed, True
        label = int(good[total[good].argmin()])
        return self._chained(label, float(total[label])), self.missed, True

    def _first(self) -> _Labels:
        begun = self.programme.begun[0][0]
        machine = np.nonzero(np.isfinite(begun))[0]
        nothing, count = np.zeros((len(machine), self.tables.num_devices)), len(machine)
        return _Labels(
            np.zeros(count, np.intp), machine, begun[machine], nothing, nothing.copy(), np.full(count, -1),
            np.full(count, -1), np.ones(count, np.bool_),
        )  # fmt: skip

    def _ready(self, size: int, labels: _Labels) -> _Labels:
        """Labels that go on where they are, and that hand over to another machine."""
        programme, count = self.programme, len(labels.value)
        more = programme.more[size]
        onward = labels.value[:, None] + programme.onward(size)[labels.ideal, labels.machine]  # (n, M)
        who, machine = np.nonzero(onward + more[labels.ideal] < self.upper)
        here = np.nonzero(labels.value + more[labels.ideal, labels.machine] < self.upper)[0]
        rows = np.concatenate([here, who])
        found = labels.pick(rows)
        found.machine[len(here) :] = machine
        found.value[len(here) :] = onward[who, machine]
        found.starts[:] = np.arange(len(rows)) >= len(here)
        found.parent[:] = rows
        assert count or not len(rows)
        return self._kept(found, found.value + more[found.ideal, found.machine])

    def _grown(self, size: int, ready: _Labels) -> _Labels:
        """Every label with every block that may come next, if the device holds it."""
        programme, tables, steps = self.programme, self.tables, self.programme.lattice.steps[size]
        order = np.argsort(steps.source, kind="stable")
        edges = np.searchsorted(steps.source[order], np.arange(len(programme.lattice.ideals[size]) + 1))
        counts = edges[ready.ideal + 1] - edges[ready.ideal]
        rows = np.repeat(np.arange(len(ready.value)), counts)
        offset = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        step = order[edges[ready.ideal[rows]] + offset]
        found = ready.pick(rows)
        device, block, index = tables.device[found.machine], steps.block[step], np.arange(len(rows))
        alive = programme.alive[size][found.ideal] + programme.made[block]
        found.used[index, device] += tables.weight[block]
        found.peak[index, device] = np.maximum(found.peak[index, device], alive)
        value = found.value + programme.prices.block[found.machine, block]
        target = steps.target[step]
        bound = value + programme.rest[size + 1][target, found.machine]
        room = tables.capacity[device] * (1 + SLACK)
        good = np.nonzero((found.used[index, device] + found.peak[index, device] <= room) & (bound < self.upper))[0]
        grown = _Labels(
            target, found.machine, value, found.used, found.peak, found.parent, block, found.starts
        ).pick(good)  # fmt: skip
        return self._kept(grown, bound[good])

    def _kept(self, labels: _Labels, bound: FloatArray) -> _Labels:
        """Without what is dominated at its place, and at most `width` a place, the least bounds first."""
        if not len(bound):
            return labels
        place = labels.ideal * len(self.tables.device) + labels.machine
        order = np.lexsort((bound, place))
        rows = np.concatenate([labels.value[:, None], labels.used, labels.peak], axis=1)[order]
        edges = np.nonzero(np.concatenate([[True], np.diff(place[order]) != 0, [True]]))[0]
        keep = []
        for low, high in itertools.pairwise(edges.tolist()):
            alive = _undominated(rows[low:high]) + low
            if len(alive) > self.width:
                self.missed = min(self.missed, float(bound[order[alive[self.width :]]].min()))
            keep.append(alive[: self.width])
        return labels.pick(order[np.concatenate(keep)])

    def _chained(self, label: int, value: float) -> Chained:
        stages: list[tuple[int, list[int]]] = []
        for labels in reversed(self.history):
            machine, block = int(labels.machine[label]), int(labels.block[label])
            if not stages or stages[-1][0] < 0:
                stages.append((machine, []))
            stages[-1][1].append(block)
            if labels.starts[label]:
                stages.append((-1, []))
            label = int(labels.parent[label])
        chain = tuple((machine, tuple(reversed(blocks))) for machine, blocks in reversed(stages) if blocks)
        return Chained(chain, value)


def _undominated(rows: FloatArray) -> Index:
    """Indices of rows that no other beats in every column; groups of _GROUP, as they come."""
    if len(rows) == 1:
        return np.zeros(1, dtype=np.intp)
    keep = np.ones(len(rows), dtype=np.bool_)
    for low in range(0, len(rows), _GROUP):
        part = rows[low : low + _GROUP]
        beats = (part[:, None, :] <= part[None, :, :]).all(axis=2)
        earlier = np.arange(len(part))[:, None] < np.arange(len(part))[None, :]
        keep[low : low + _GROUP] = ~(beats & (earlier | ~beats.T)).any(axis=0)
    return np.nonzero(keep)[0]
