"""The best chain of ideals for a given row of machines, by one minimum cut; and a search over rows, for large lattices.

With the machines of the stages given in order, each block has one label, its stage, that never falls along a path. Node
(v, s), s = 1 .. S - 1, is on the source's side where v is done by stage s:
 1. (v, s) -> (v, s - 1) of capacity t(m_s, v), with (v, S) the source and (v, 0) the sink: the one such edge that is cut
    says the stage. (v, s - 1) -> (v, s) without limit: what is done stays done.
 2. u before w: (w, s) -> (u, s) without limit.
 3. Tensor t at boundary s crosses where its maker is done and a reader is not (a result always): one node for its
    readers, as in mincut.py, so it is paid once per boundary that it crosses.
What a row costs whatever the blocks (latencies, fixed costs, both ends) is added. So each row is exact in polynomial time
for any additive objective; with two machines it is DADS. Where a cut leaves a stage empty (to pass by a machine may be
cheap, but is no plan), one block after the other is forced into it: branch and bound, a block without blocks before it for
the first stage, without blocks behind it for the last. Rows of up to `most_stages` stages are tried in the order of a quick
bound until that reaches the best answer. Memory is not looked at.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecotone.cost import FloatArray
from ecotone.graph import Graph
from ecotone.planner.blockwise import Prices
from ecotone.planner.ideals import Chained, frontiers_of
from ecotone.planner.mincut import FlowNetwork
from ecotone.planner.objective import PlannerError

__all__ = ["Row", "RowSearch", "best_of_rows", "cut_row"]

Forced = tuple[tuple[int, int], ...]
"""Pairs of a block and the stage that it must be in."""


@dataclass(frozen=True, slots=True)
class Row:
    """The best chain for some machines in a row (None: none, or none below the limit given), and its lower bound."""

    machines: tuple[int, ...]
    chained: Chained | None
    bound: float


@dataclass(frozen=True, slots=True)
class RowSearch:
    """The best chains found, ascending, and a lower bound on every chain of at most so many stages."""

    found: tuple[Chained, ...]
    bound: float


def best_of_rows(prices: Prices, most_stages: int, deadline: float, keep: int = 8) -> RowSearch:
    """The best chains over rows of machines of at most `most_stages` stages, until time.perf_counter() is `deadline`."""
    search = _Rows(prices)
    queue: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    for row in _rows(prices, most_stages):
        for codecs in search.codecs_of(row):
            quick = search.quick_bound(row, codecs)
            if math.isfinite(quick):
                heapq.heappush(queue, (quick, row, codecs))
    found: dict[tuple[tuple[int, tuple[int, ...]], ...], Chained] = {}
    best, bound = math.inf, math.inf
    while queue:
        quick, row, codecs = heapq.heappop(queue)
        if quick >= best or time.perf_counter() > deadline:
            bound = min(bound, quick)
            break
        cut = search.best(row, codecs, best)
        bound = min(bound, cut.bound)
        if cut.chained is not None:
            best = min(best, cut.chained.value)
            known = found.setdefault(cut.chained.stages, cut.chained)
            if cut.chained.value < known.value:
                found[cut.chained.stages] = cut.chained
    chains = sorted(found.values(), key=lambda c: c.value)[:keep]
    return RowSearch(tuple(chains), min(bound, best))


def cut_row(prices: Prices, row: Sequence[int]) -> Row:
    """The best chain of stages on these machines in this order, over all codecs."""
    search, best = _Rows(prices), Row(tuple(row), None, math.inf)
    for codecs in search.codecs_of(best.machines):
        found = search.best(best.machines, codecs, best.chained.value if best.chained else math.inf)
        best = replace(best, chained=found.chained or best.chained, bound=min(best.bound, found.bound))
    return best


def _rows(prices: Prices, most_stages: int) -> Iterator[tuple[int, ...]]:
    """Rows of machines, neighbours on unlike devices that are linked."""
    device, linked = prices.tables.device, np.isfinite(prices.tables.latency)
    for length in range(1, most_stages + 1):
        for row in itertools.product(range(len(device)), repeat=length):
            if all(linked[device[a], device[b]] for a, b in itertools.pairwise(row)):
                yield row


class _Rows:
    """What all rows of one problem share."""

    def __init__(self, prices: Prices) -> None:
        self.prices, self.tables = prices, prices.tables
        self.graph: Graph = prices.tables.graph
        count = self.graph.num_blocks
        ends = prices.crossings(frontiers_of(self.graph, (0, (1 << count) - 1)))
        own = np.arange(prices.tables.num_devices)
        ends[:, own, own] = 0.0
        self.enter, self.leave = ends[0, prices.tables.source], ends[1, :, prices.tables.sink]
        self.readers: list[list[int]] = [[] for _ in self.graph.tensors]
        for v, block in enumerate(self.graph.blocks):
            for tensor in block.inputs:
                self.readers[tensor].append(v)
        read = {t for t in range(len(self.readers)) if self.readers[t]}
        blocks = list(enumerate(self.graph.blocks))
        self.first = [v for v, b in blocks if all(self.graph.tensors[t].producer < 0 for t in b.inputs)]
        self.final = [v for v, b in blocks if not read & set(b.outputs)]
        self.least = [prices.block[m] for m in range(len(prices.tables.device))]
        self._taken_apart: dict[tuple[int, int, int], tuple[float, FloatArray]] = {}

    def by_tensor(self, codec: int, a: int, b: int) -> tuple[float, FloatArray]:
        """Prices.by_tensor, remembered; a and b are devices."""
        if (codec, a, b) not in self._taken_apart:
            self._taken_apart[codec, a, b] = self.prices.by_tensor(codec, a, b)
        return self._taken_apart[codec, a, b]

    def codecs_of(self, row: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Codecs of the inner boundaries: those that no other is better than, once and for every tensor."""
        options = []
        for a, b in itertools.pairwise(int(self.tables.device[m]) for m in row):
            costs = [(k, *self.by_tensor(k, a, b)) for k in range(len(self.tables.codecs))]
            usable = [c for c in costs if math.isfinite(c[1]) and np.isfinite(c[2]).any()]
            kept: list[tuple[int, float, FloatArray]] = []
            for k, once, each in sorted(usable, key=lambda c: (c[1], float(np.where(np.isfinite(c[2]), c[2], 0).sum()))):
                if not any(o <= once and (e <= each).all() for _, o, e in kept):
                    kept.append((k, once, each))
            options.append([k for k, _, _ in kept])
        yield from itertools.product(*options)

    def once(self, row: tuple[int, ...], codecs: tuple[int, ...]) -> float:
        """What the row costs whatever the blocks."""
        device = [int(self.tables.device[m]) for m in row]
        total = float(self.enter[device[0]] + self.leave[device[-1]] + sum(self.prices.fixed[m] for m in row))
        hops = zip(itertools.pairwise(device), codecs, strict=True)
        return total + sum(self.by_tensor(k, a, b)[0] for (a, b), k in hops)

    def quick_bound(self, row: tuple[int, ...], codecs: tuple[int, ...]) -> float:
        """Every block on the cheapest machine of the row, nothing to carry."""
        return self.once(row, codecs) + float(np.min([self.least[m] for m in dict.fromkeys(row)], axis=0).sum())

    def best(self, row: tuple[int, ...], codecs: tuple[int, ...], upper: float, forced: Forced = ()) -> Row:
        """The best chain of a row below `upper`, with blocks forced into stages."""
        found, empty = self.cut(row, codecs, forced)
        if found.chained is not None or found.bound >= upper:
            better = found.chained is not None and found.chained.value < upper
            return found if better else replace(found, chained=None)
        candidates = self.first if empty == 1 else self.final if empty == len(row) else range(self.graph.num_blocks)
        best, bound = None, math.inf
        for v in candidates:
            if all(v != block for block, _ in forced):
                other = self.best(row, codecs, upper, (*forced, (v, empty)))
                bound = min(bound, other.bound)
                if other.chained is not None:
                    best, upper = other.chained, other.chained.value
        return Row(row, best, bound)

    def cut(self, row: tuple[int, ...], codecs: tuple[int, ...], forced: Forced) -> tuple[Row, int]:
        """The minimum cut of one row, and the first stage that it leaves empty (0: none)."""
        count, stages = self.graph.num_blocks, len(row)
        once = self.once(row, codecs)
        if stages == 1:
            value = once + float(self.prices.block[row[0]].sum())
            return Row(row, Chained(((row[0], tuple(range(count))),), value), value), 0
        network = FlowNetwork(count * (stages - 1) + 2)
        source, sink = count * (stages - 1), count * (stages - 1) + 1

        def node(v: int, s: int) -> int:
            return sink if s == 0 else source if s == stages else (s - 1) * count + v

        pinned = dict(forced)
        for v, block in enumerate(self.graph.blocks):
            for s in range(1, stages + 1):
                cost = float(self.prices.block[row[s - 1], v]) if pinned.get(v, s) == s else math.inf
                network.edge(node(v, s), node(v, s - 1), cost)
                if 1 < s < stages:
                    network.edge(node(v, s - 1), node(v, s), math.inf)
            for u in {self.graph.tensors[t].producer for t in block.inputs} - {-1}:
                for s in range(1, stages):
                    network.edge(node(v, s), node(u, s), math.inf)
        devices = [int(self.tables.device[m]) for m in row]
        for s, (codec, pair) in enumerate(zip(codecs, itertools.pairwise(devices), strict=True), 1):
            self._carry(network, [node(v, s) for v in range(count)], source, sink, self.by_tensor(codec, *pair)[1])
        try:
            flow, side = network.cut(source, sink)
        except PlannerError:
            return Row(row, None, math.inf), 0
        return self._read(row, [[side[node(v, s)] for v in range(count)] for s in range(1, stages)], once + flow)

    def _carry(self, network: FlowNetwork, nodes: list[int], source: int, sink: int, each: FloatArray) -> None:
        """Rule 3 at one boundary; `nodes[v]`: whether block v is done before it."""
        for t, tensor in enumerate(self.graph.tensors):
            readers = [nodes[r] for r in self.readers[t]] + ([sink] if t in self.graph.outputs else [])
            maker = source if tensor.producer < 0 else nodes[tensor.producer]
            network.once(maker, readers, float(each[t]))

    def _read(self, row: tuple[int, ...], done: list[list[bool]], bound: float) -> tuple[Row, int]:
        """The chain that a cut says, priced with the best codecs, or the first stage that is empty."""
        count = self.graph.num_blocks
        ideals = [0, *(sum(1 << v for v in range(count) if one[v]) for one in done), (1 << count) - 1]
        for stage, (a, b) in enumerate(itertools.pairwise(ideals), 1):
            if a == b:
                return Row(row, None, bound), stage
        blocks = [tuple(v for v in range(count) if (b & ~a) >> v & 1) for a, b in itertools.pairwise(ideals)]
        devices = [int(self.tables.device[m]) for m in row]
        inner = self.prices.crossings(frontiers_of(self.graph, tuple(ideals[1:-1])))
        value = float(self.enter[devices[0]] + self.leave[devices[-1]])
        value += sum(float(inner[i, a, b]) for i, (a, b) in enumerate(itertools.pairwise(devices)))
        chain = tuple(zip(row, blocks, strict=True))
        value += sum(float(self.prices.fixed[m] + self.prices.block[m, list(own)].sum()) for m, own in chain)
        return Row(row, Chained(chain, value), min(bound, value)), 0
