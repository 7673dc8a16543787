"""Good plans under tight memory by local search over the order of devices; a source of answers, never of bounds.

With the order of devices given, each once, the best cuts follow exactly: a stage either fits its device or not, so one
pass of the programme along the order finds them, O(k P^2), with the best executor and codec everywhere. The search replaces,
inserts, removes, swaps and moves devices, first improvement in a fixed order, and recomputes the pass only from the first
change on. Not for exits, which part the stages of one device, nor for classes of devices.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import FloatArray
from ecotone.planner.network import Network

__all__ = ["improve_order"]

Order = tuple[int, ...]


def improve_order(network: Network, starts: list[Order], deadline: float) -> tuple[tuple[int, int, int], ...] | None:
    """The stages of the best path met from the orders `starts` until no neighbour is better or time.perf_counter() is
    `deadline`; None where there is none, or the chain has exits or classes."""
    if network.chain.exits or network.chain.is_class.any():
        return None
    search = _Orders(network)
    best: Order | None = None
    value = math.inf
    for start in starts:
        order, seconds = search.descend(start, deadline)
        if seconds < value:
            best, value = order, seconds
    return search.stages(best) if best is not None else None


class _Orders:
    def __init__(self, network: Network) -> None:
        self.chain = network.chain
        stage, self.best = network.stage.min(axis=0), network.crossing.min(axis=1)
        self.usable = [d for d in range(self.chain.num_devices) if np.isfinite(stage[d]).any()]
        # (D, P, P) with the stop first: the minimum over starts then runs along memory
        self.by_stop = np.ascontiguousarray(stage.transpose(0, 2, 1))
        for end, device in ((0, self.chain.source), (-1, self.chain.sink)):
            self.best[end, device, device] = 0.0

    def descend(self, order: Order, deadline: float) -> tuple[Order, float]:
        """First improvement until none is left."""
        tables = self._tables(order, 0, [])
        value = self._total(order, tables)
        better = True
        while better and time.perf_counter() < deadline:
            better = False
            for other in self._neighbours(order):
                same = next(
                    (i for i, (a, b) in enumerate(zip(order, other, strict=False)) if a != b), min(len(order), len(other))
                )
                found = self._tables(other, same, tables[:same], value)
                seconds = self._total(other, found) if len(found) == len(other) else math.inf
                if seconds < value * (1 - 1e-12):
                    order, tables, value, better = other, found, seconds, True
                    break
                if time.perf_counter() > deadline:
                    break
        return order, value

    def _neighbours(self, order: Order) -> Iterator[Order]:
        count, unused = len(order), [d for d in self.usable if d not in order]
        for i in range(count):
            if count > 1:
                yield (*order[:i], *order[i + 1 :])
            for d in unused:
                yield (*order[:i], d, *order[i + 1 :])
        for i, d in itertools.product(range(count + 1), unused):
            yield (*order[:i], d, *order[i:])
        for i, j in itertools.combinations(range(count), 2):
            swapped = list(order)
            swapped[i], swapped[j] = order[j], order[i]
            yield tuple(swapped)
        for i, j in itertools.permutations(range(count), 2):
            rest = (*order[:i], *order[i + 1 :])
            yield (*rest[:j], order[i], *rest[j:])
        for i, j in itertools.combinations(range(count), 2):
            if j - i > 1:
                yield (*order[:i], *reversed(order[i : j + 1]), *order[j + 1 :])

    def _tables(self, order: Order, first: int, tables: list[FloatArray], limit: float = math.inf) -> list[FloatArray]:
        """Least seconds until stage i of the order has computed up to each cut: one (P,) table per stage."""
        found = list(tables)
        for i in range(first, len(order)):
            held = self._held(order, i, found)
            done = (self.by_stop[order[i]] + held[None, :]).min(axis=1)
            if not done.min() < limit:
                break
            found.append(done)
        return found

    def _held(self, order: Order, i: int, tables: list[FloatArray]) -> FloatArray:
        if i:
            held: FloatArray = tables[i - 1] + self.best[:, order[i - 1], order[i]]
            return held
        held = np.full(self.chain.num_positions, math.inf)
        held[0] = self.best[0, self.chain.source, order[0]]
        return held

    def _total(self, order: Order, tables: list[FloatArray]) -> float:
        if len(tables) < len(order):
            return math.inf
        return float(tables[-1][-1] + self.best[-1, order[-1], self.chain.sink])

    def stages(self, order: Order) -> tuple[tuple[int, int, int], ...] | None:
        """The stages of an order at its best cuts; None where it cannot be."""
        tables = self._tables(order, 0, [])
        if not math.isfinite(self._total(order, tables)):
            return None
        stages: list[tuple[int, int, int]] = []
        stop = self.chain.num_positions - 1
        for i in range(len(order) - 1, -1, -1):
            computed: NDArray[np.float64] = self.by_stop[order[i], stop] + self._held(order, i, tables)
            start = int(computed.argmin())
            stages.append((order[i], start, stop))
            stop = start
        return tuple(reversed(stages))
