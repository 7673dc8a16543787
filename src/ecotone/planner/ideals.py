"""Every way to run a model up to some point: its ideals (sets of blocks closed under "comes before"), and the best chain.

A plan in any topological order is a chain of ideals, each stage being what one machine adds to the ideal before it. Where
times add up over blocks, the best chain is a shortest path over (ideal, machine): exact for any number of stages, devices
revisited, any link matrix, any additive objective (Tarnawski et al. 2020 for pipelines). With C(I, m) the least value of
having computed I, the last block on m, and x(I; d, e) a crossing of I's frontier in its best codec:
    start(I, m) = min over n on other devices of  C(I, n) + x(I; d_n, d_m) + o_m
    C(I + v, m) = min over v of  min(C(I, m), start(I, m)) + t(m, v)
O(ideals (D^2 K + M width)), vectorised over ideals of one size. A chain has L + 1 ideals, r parallel rows of s blocks
(s + 1)^r, so they are counted first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import FloatArray
from ecotone.graph import Graph
from ecotone.planner.blockwise import Prices

__all__ = ["Chained", "Lattice", "Programme", "lattice_of"]

Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Chained:
    """A plan as a chain of ideals: `stages` are (machine, its blocks, ascending), `value` is what they add up to."""

    stages: tuple[tuple[int, tuple[int, ...]], ...]
    value: float

    @property
    def order(self) -> tuple[int, ...]:
        """All blocks, stage by stage."""
        return tuple(block for _, blocks in self.stages for block in blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Ideals of one size to those of the next: ideal `source[i]` and block `block[i]` make ideal `target[i]` (ascending)."""

    source: Index
    block: Index
    target: Index


@dataclass(frozen=True, slots=True, eq=False)
class Lattice:
    """All ideals by size: `ideals[s]` as bits of blocks, their frontiers (n, N), and the steps from size s to s + 1."""

    ideals: tuple[tuple[int, ...], ...]
    frontiers: tuple[NDArray[np.bool_], ...]
    steps: tuple[Steps, ...]

    @property
    def num_ideals(self) -> int:
        return sum(len(layer) for layer in self.ideals)


def lattice_of(graph: Graph, most: int) -> Lattice | None:
    """The ideals of a graph; None where they are more than `most`."""
    count = graph.num_blocks
    needs = [0] * count
    after: list[list[int]] = [[] for _ in range(count)]
    for v, block in enumerate(graph.blocks):
        for maker in {graph.tensors[t].producer for t in block.inputs} - {-1}:
            needs[v] |= 1 << maker
            after[maker].append(v)
    ready = sum(1 << v for v in range(count) if not needs[v])
    layer, steps, total = {0: ready}, [], 1
    layers: list[tuple[int, ...]] = [(0,)]
    for _ in range(count):
        found: dict[int, int] = {}
        rows: list[tuple[int, int, int]] = []
        for number, (ideal, ready) in enumerate(layer.items()):
            for v in _members(ready):
                grown = ideal | 1 << v
                if grown not in found:
                    found[grown] = ready ^ 1 << v | sum(1 << w for w in after[v] if not needs[w] & ~grown)
                    total += 1
                    if total > most:
                        return None
                rows.append((number, v, grown))
        place = {ideal: i for i, ideal in enumerate(found)}
        table = np.array([(i, v, place[grown]) for i, v, grown in rows], dtype=np.intp)
        table = table[np.argsort(table[:, 2], kind="stable")]
        steps.append(Steps(table[:, 0], table[:, 1], table[:, 2]))
        layers.append(tuple(found))
        layer = found
    return Lattice(tuple(layers), tuple(frontiers_of(graph, rows) for rows in layers), tuple(steps))


def _members(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def frontiers_of(graph: Graph, ideals: tuple[int, ...]) -> NDArray[np.bool_]:
    """Tensors that cross behind each ideal: made (or a model input) and still needed, (n, N)."""
    count, width = len(ideals), graph.num_blocks
    packed = b"".join(ideal.to_bytes((width + 7) // 8, "little") for ideal in ideals)
    octets = np.frombuffer(packed, np.uint8).reshape(count, -1)
    inside = np.unpackbits(octets, axis=1, bitorder="little")[:, :width].astype(np.bool_)
    read = np.zeros((width, len(graph.tensors)), dtype=np.float32)
    for v, block in enumerate(graph.blocks):
        read[v, list(block.inputs)] = 1.0
    needed = (~inside).astype(np.float32) @ read > 0
    needed[:, list(graph.outputs)] = True
    producer = np.array([t.producer for t in graph.tensors], dtype=np.intp)
    made = inside[:, np.maximum(producer, 0)] | (producer < 0)
    empty = ~inside.any(axis=1)
    needed[np.ix_(empty, np.array(graph.inputs, dtype=np.intp))] = True  # all inputs cross where nothing was computed
    found: NDArray[np.bool_] = made & needed
    return found


class Programme:
    """The shortest paths over a lattice at some prices: from the inputs to each state, and from each state to the end."""

    def __init__(self, prices: Prices, lattice: Lattice) -> None:
        self.prices, self.lattice = prices, lattice
        tables = prices.tables
        self.device, self.machines = tables.device, np.arange(len(tables.device))
        self.crossing = [prices.crossings(rows) for rows in lattice.frontiers]  # (n, D, D)
        own = np.arange(tables.num_devices)
        for end in (0, -1):
            self.crossing[end][:, own, own] = 0.0
        self.last = len(lattice.ideals) - 1
        self.alive = [rows @ tables.raw for rows in lattice.frontiers]  # bytes that cross behind each ideal
        graph = tables.graph
        self.made = np.array([sum(graph.tensors[t].size_bytes for t in b.outputs) for b in graph.blocks], dtype=np.float64)
        self._forward()
        self._backward()

    def _forward(self) -> None:
        enter = self.crossing[0][:, self.prices.tables.source, self.device] + self.prices.fixed
        self.done: list[FloatArray] = [np.full((1, len(self.device)), math.inf)]  # C
        self.begun: list[FloatArray] = [enter]  # start
        self.before: list[Index] = [np.full((1, len(self.device)), -1)]  # the machine that a start comes from
        self.step: list[Index] = [np.full((1, len(self.device)), -1)]  # the step by which C was reached
        for size, steps in enumerate(self.lattice.steps):
            ready = np.minimum(self.done[size], self.begun[size])
            reached = ready[steps.source] + self.prices.block[:, steps.block].T  # (E, M)
            first = np.searchsorted(steps.target, np.arange(len(self.lattice.ideals[size + 1])))
            least = np.minimum.reduceat(reached, first, axis=0)
            is_least = reached == least[steps.target]
            number = np.where(is_least, np.arange(len(reached))[:, None], len(reached))
            self.done.append(least)
            self.step.append(np.minimum.reduceat(number, first, axis=0))
            through = least[:, :, None] + self.onward(size + 1)
            begun, before = through.min(axis=1), through.argmin(axis=1)
            self.begun.append(begun)
            self.before.append(before)

    def onward(self, size: int) -> FloatArray:
        """x(I; d_m, d_n) + o_n for every two machines, (n, M, M); inf on one device: stages of one device do not adjoin."""
        found: FloatArray = self.crossing[size][:, self.device[:, None], self.device[None, :]] + self.prices.fixed
        found[:, self.device[:, None] == self.device[None, :]] = math.inf
        return found

    def _backward(self) -> None:
        leave = self.crossing[-1][:, self.device, self.prices.tables.sink]
        self.rest: list[FloatArray] = [leave]  # from having computed I on m, in reverse order while building
        self.more: list[FloatArray] = [np.full_like(leave, math.inf)]  # from computing one more block on m
        self.next_step: list[Index] = [np.full(leave.shape, -1)]
        self.follower: list[Index] = [np.full(leave.shape, -1)]  # the machine that goes on; -1: this one
        for size in range(self.last - 1, -1, -1):
            steps = self.lattice.steps[size]
            onward = self.prices.block[:, steps.block].T + self.rest[-1][steps.target]
            order = np.argsort(steps.source, kind="stable")
            first = np.searchsorted(steps.source[order], np.arange(len(self.lattice.ideals[size])))
            more = np.minimum.reduceat(onward[order], first, axis=0)
            is_least = onward == more[steps.source]
            number = np.where(is_least, np.arange(len(onward))[:, None], len(onward))[order]
            self.next_step.append(np.minimum.reduceat(number, first, axis=0))
            through = self.onward(size) + more[:, None, :]
            other, follower = through.min(axis=2), through.argmin(axis=2)
            self.rest.append(np.minimum(more, other))
            self.follower.append(np.where(other < more, follower, -1))
            self.more.append(more)
        for table in (self.rest, self.more, self.next_step, self.follower):
            table.reverse()

    def best(self) -> Chained | None:
        """The best chain of all; None where there is none."""
        total = (self.done[-1] + self.rest[-1])[0]
        machine = int(total.argmin())
        if not math.isfinite(total[machine]):
            return None
        return self._chained(self._head(self.last, 0, machine), float(total[machine]))

    def best_few(self, count: int) -> list[Chained]:
        """Up to `count` chains, ascending: each the best with a crossing behind some ideal that none before it crosses."""
        best = self.best()
        if best is None:
            return []
        found: dict[tuple[tuple[int, tuple[int, ...]], ...], Chained] = {best.stages: best}
        rows: list[tuple[float, int, int, int, int]] = []
        for size in range(1, self.last):
            through = self.done[size][:, :, None] + self.onward(size) + self.more[size][:, None, :]
            flat = through.reshape(len(through), -1)
            for i, pair in enumerate(flat.argmin(axis=1).tolist()):
                if math.isfinite(flat[i, pair]):
                    rows.append((float(flat[i, pair]), size, i, *divmod(pair, len(self.device))))
        whole = self.begun[0][0] + self.more[0][0]
        rows += [(float(v), 0, 0, -1, m) for m, v in enumerate(whole) if math.isfinite(v)]
        for value, size, ideal, machine, follower in sorted(rows):
            if len(found) >= count:
                break
            head = self._head(size, ideal, machine) if size else []
            chained = self._chained([*head, *self._tail(size, ideal, follower)], value)
            found.setdefault(chained.stages, chained)
        return sorted(found.values(), key=lambda c: c.value)

    def _head(self, size: int, ideal: int, machine: int) -> list[tuple[int, int]]:
        """(machine, block) up to having computed an ideal on a machine; a stage's first block has the machine as -1 - m."""
        row: list[tuple[int, int]] = []
        while size:
            step = int(self.step[size][ideal, machine])
            steps, size = self.lattice.steps[size - 1], size - 1
            ideal, block = int(steps.source[step]), int(steps.block[step])
            if self.begun[size][ideal, machine] <= self.done[size][ideal, machine]:
                row.append((-1 - machine, block))
                machine = int(self.before[size][ideal, machine])
            else:
                row.append((machine, block))
        return row[::-1]

    def _tail(self, size: int, ideal: int, machine: int) -> list[tuple[int, int]]:
        """The same from starting a stage on a machine behind an ideal."""
        row, starts = [], True
        while size < self.last:
            step = int(self.next_step[size][ideal, machine])
            steps = self.lattice.steps[size]
            row.append((-1 - machine if starts else machine, int(steps.block[step])))
            size, ideal, starts = size + 1, int(steps.target[step]), False
            follower = int(self.follower[size][ideal, machine])
            if follower >= 0 and size < self.last:
                machine, starts = follower, True
        return row

    def _chained(self, row: list[tuple[int, int]], value: float) -> Chained:
        stages: list[tuple[int, list[int]]] = []
        for machine, block in row:
            if machine < 0:
                stages.append((-1 - machine, []))
            stages[-1][1].append(block)
        return Chained(tuple((m, tuple(sorted(blocks))) for m, blocks in stages), value)
