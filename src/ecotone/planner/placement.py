"""Any block on any machine, tensors sent straight to where they are read: a mixed-integer programme, and its makespan.

This is *not* what a Plan says: a plan is a chain of stages whose frontiers are handed on (docs/decisions/0002), and the
runtime carries out plans only. A Placement is for comparison: how much less traffic, and how much overlap of branches on
different machines, a runtime with direct sends could have; and, `relaxed`, a lower bound on every plan in every order.
Legend: y[v, m] block v on machine m; z[t, d, e] tensor t goes from d to e; a[d, e] anything does; u[m] anything runs on m.
    least  sum t(m, v) y + sum x(t; d, e) z + sum once(d, e) a + sum o_m u
    where  sum_m y[v, m] = 1;   sum_d z[t, d, e] >= y[w, e] for each reader w;   z[t, d, e] <= y[maker, d];   results reach
           the sink;   a >= z;   u >= y;   sum_v weights y <= memory of each device
Relaxed, for a bound on plans: a tensor may be relayed, so x is the cheapest way over several links, in whatever codec is the
smallest; latency and fixed costs count once for each device that is entered, at its cheapest link. HiGHS through scipy, with
its own proven bound. The makespan is that of a list schedule: each block as soon as its machine and its inputs are there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ecotone.cluster import DeviceId
from ecotone.cost import FloatArray
from ecotone.planner.blockwise import Prices, alone
from ecotone.planner.choices import UNMEASURED_CODEC
from ecotone.planner.objective import PlannerError

__all__ = ["Placement", "least_placement", "makespan_s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The machine of each block (an index into Blockwise.device) and its device; value and proven lower bound.

    The runtime cannot carry this out: see the file's docstring.
    """

    machines: tuple[int, ...]
    devices: tuple[DeviceId, ...]
    value: float
    bound: float


def least_placement(prices: Prices, time_limit_s: float, *, relaxed: bool = False) -> Placement:
    """The placement of least value found within the limit, with a bound; raises PlannerError where none is possible."""
    programme = _Programme(prices, relaxed)
    programme.state()
    found = milp(
        programme.cost(), constraints=programme.constraint(), integrality=programme.integrality(),
        bounds=Bounds(0.0, 1.0), options={"time_limit": max(0.05, time_limit_s), "mip_rel_gap": 1e-9},
    )  # fmt: skip
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else -math.inf
    if found.x is None:
        if found.status == 2:
            raise PlannerError("no placement keeps memory and links, even with direct sends")
        return Placement(machines=(), devices=(), value=math.inf, bound=max(0.0, bound))
    blocks = prices.tables.graph.num_blocks
    chosen = found.x[: blocks * programme.num_machines].reshape(blocks, -1).argmax(axis=1)
    names = [d.name for d in prices.tables.model.cluster.devices]
    machines = tuple(int(m) for m in chosen)
    devices = tuple(names[int(prices.tables.device[m])] for m in machines)
    return Placement(machines=machines, devices=devices, value=float(found.fun), bound=min(float(found.fun), bound))


@dataclass(slots=True)
class _Rows:
    """Constraint rows in the making: sum of coefficients >= least (and <= most)."""

    cells: list[tuple[int, int, float]] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)

    def add(self, coefficients: Iterator[tuple[int, float]], least: float, most: float = math.inf) -> None:
        row = len(self.least)
        self.cells += [(row, column, value) for column, value in coefficients]
        self.least.append(least)
        self.most.append(most)


class _Programme:
    """Columns: y by block and machine, z by tensor and pair of devices, a by pair, u by machine."""

    def __init__(self, prices: Prices, relaxed: bool) -> None:
        self.prices, self.tables, self.relaxed = prices, prices.tables, relaxed
        self.graph, self.rows = prices.tables.graph, _Rows()
        self.num_machines, self.num_devices = len(self.tables.device), self.tables.num_devices
        self.on = [[m for m in range(self.num_machines) if self.tables.device[m] == d] for d in range(self.num_devices)]
        self.once, self.each = self._transfers()
        blocks, tensors, count = self.graph.num_blocks, len(self.graph.tensors), self.num_devices
        self.first_z = blocks * self.num_machines
        self.first_a = self.first_z + tensors * count * count
        self.first_u = self.first_a + count * count
        self.width = self.first_u + self.num_machines

    def _transfers(self) -> tuple[FloatArray, FloatArray]:
        """What each pair of devices costs once, (D, D), and for each tensor, (N, D, D); inf where not linked."""
        tables, count = self.tables, self.num_devices
        once, each = np.full((count, count), math.inf), np.full((len(tables.raw), count, count), math.inf)
        for k, name in enumerate(tables.codecs):
            if not self.relaxed and name != UNMEASURED_CODEC:
                continue
            coded = alone(tables.graph, name)
            floor = np.where(np.isfinite(coded), coded, 0.0) if self.relaxed else None
            for d, e in itertools.permutations(range(count), 2):
                fixed, by_tensor = self.prices.by_tensor(k, d, e, floor)
                once[d, e] = min(once[d, e], fixed)
                if math.isfinite(fixed):
                    each[:, d, e] = np.minimum(each[:, d, e], by_tensor)
        own = np.arange(count)
        once[own, own], each[:, own, own] = 0.0, 0.0
        if self.relaxed:
            once[:] = np.where(np.eye(count, dtype=np.bool_), math.inf, once).min(axis=0)[None, :]
            once[own, own] = 0.0
            for f in range(count):  # Floyd and Warshall
                each = np.minimum(each, each[:, :, f, None] + each[:, None, f, :])
        return once, each

    def y(self, block: int, device: int, factor: float = 1.0) -> Iterator[tuple[int, float]]:
        yield from ((block * self.num_machines + m, factor) for m in self.on[device])

    def z(self, tensor: int, d: int, e: int) -> int:
        return self.first_z + (tensor * self.num_devices + d) * self.num_devices + e

    def a(self, d: int, e: int) -> int:
        return self.first_a + d * self.num_devices + e

    def cost(self) -> FloatArray:
        """The objective; what is impossible is bounded away by `state`."""
        total = np.zeros(self.width)
        total[: self.first_z] = np.where(np.isfinite(self.prices.block), self.prices.block, 0.0).T.ravel()
        total[self.first_z : self.first_a] = np.where(np.isfinite(self.each), self.each, 0.0).ravel()
        fixed = np.where(np.isfinite(self.once), self.once, 0.0)
        if self.relaxed:
            fixed = np.where(np.arange(self.num_devices)[:, None] == 0, fixed.max(axis=0), 0.0)  # row 0: entered at all
        total[self.first_a : self.first_u] = fixed.ravel()
        total[self.first_u :] = self.prices.fixed
        return total

    def integrality(self) -> FloatArray:
        whole = np.zeros(self.width)
        whole[: self.first_z] = 1
        return whole

    def constraint(self) -> LinearConstraint:
        rows, columns, values = zip(*self.rows.cells, strict=True)
        matrix = csr_array((values, (rows, columns)), shape=(len(self.rows.least), self.width))
        return LinearConstraint(matrix, self.rows.least, self.rows.most)

    def state(self) -> None:
        """All constraints."""
        graph, devices = self.graph, range(self.num_devices)
        readers: list[set[int]] = [set() for _ in graph.tensors]
        for v, block in enumerate(graph.blocks):
            self.rows.add(((v * self.num_machines + m, 1.0) for m in range(self.num_machines)), 1.0, 1.0)
            for m in range(self.num_machines):
                self.rows.add(iter([(self.first_u + m, 1.0), (v * self.num_machines + m, -1.0)]), 0.0)
                if math.isinf(self.prices.block[m, v]):
                    self.rows.add(iter([(v * self.num_machines + m, 1.0)]), 0.0, 0.0)
            for tensor in block.inputs:
                readers[tensor].add(v)
        for t, tensor_ in enumerate(graph.tensors):
            for e in devices:
                sources = [(self.z(t, d, e), 1.0) for d in devices]
                for reader in sorted(readers[t]):
                    self.rows.add(iter([*sources, *self.y(reader, e, -1.0)]), 0.0)
                if t in graph.outputs and e == self.tables.sink:
                    self.rows.add(iter(sources), 1.0)
                for d in devices:
                    self._sent(t, tensor_.producer, d, e)
        weight = self.tables.least_weight if self.relaxed else self.tables.weight
        for d in devices:
            weights = ((c, f * float(weight[v])) for v in range(graph.num_blocks) for c, f in self.y(v, d))
            self.rows.add(weights, -math.inf, float(self.tables.capacity[d]))

    def _sent(self, tensor: int, maker: int, d: int, e: int) -> None:
        column = self.z(tensor, d, e)
        possible = math.isfinite(self.each[tensor, d, e]) and (maker >= 0 or d == self.tables.source)
        if not possible:
            self.rows.add(iter([(column, 1.0)]), 0.0, 0.0)
            return
        if maker >= 0:
            self.rows.add(iter([(column, -1.0), *self.y(maker, d)]), 0.0)
        if d != e:
            self.rows.add(iter([(self.a(0 if self.relaxed else d, e), 1.0), (column, -1.0)]), 0.0)


def makespan_s(prices: Prices, placement: Placement) -> float:
    """Seconds until the results are at the sink: one block at a time per device, one tensor at a time per link.

    Prices are those of latency. Blocks start as soon as they can, the earliest first; a tensor is sent once to each device
    that reads it, as soon as it is made. An upper bound on the best schedule of this placement.
    """
    tables, graph, count = prices.tables, prices.tables.graph, prices.tables.num_devices
    codec = tables.codecs.index(UNMEASURED_CODEC)
    where = [int(tables.device[m]) for m in placement.machines]
    wanted: list[set[int]] = [set() for _ in graph.tensors]
    for v, block in enumerate(graph.blocks):
        for tensor in block.inputs:
            wanted[tensor].add(where[v])
    for tensor in graph.outputs:
        wanted[tensor].add(tables.sink)
    arrival = np.full((len(graph.tensors), count), math.inf)
    link_free, device_free, begun = np.zeros((count, count)), np.zeros(count), set()

    def made(tensor: int, device: int, at_s: float) -> None:
        arrival[tensor, device] = at_s
        for target in sorted(wanted[tensor] - {device}):
            once, each = prices.by_tensor(codec, device, target)
            start_s = max(at_s, link_free[device, target])
            link_free[device, target] = start_s + each[tensor]
            arrival[tensor, target] = start_s + each[tensor] + once

    for tensor in graph.inputs:
        made(tensor, tables.source, 0.0)
    left = set(range(graph.num_blocks))
    while left:
        starts = []
        for v in left:
            ready = max((arrival[t, where[v]] for t in graph.blocks[v].inputs), default=0.0)
            starts.append((max(float(ready), float(device_free[where[v]])), v))
        start_s, v = min(starts)
        if math.isinf(start_s):
            return math.inf
        machine = placement.machines[v]
        once = 0.0 if machine in begun else float(prices.fixed[machine])
        begun.add(machine)
        device_free[where[v]] = stop_s = start_s + once + float(prices.block[machine, v])
        for tensor in graph.blocks[v].outputs:
            made(tensor, where[v], stop_s)
        left.remove(v)
    return float(max(arrival[t, tables.sink] for t in graph.outputs))
