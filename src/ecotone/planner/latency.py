"""Least latency of a chain over K unlike devices: exact dynamic programme, any link matrix, devices revisitable.

With G[p, e] the least time until device e holds the frontier at cut p, and F[q, e] until e has computed up to q:
    F[q, e] = min over p < q of  G[p, e] + T_e(p, q)          G[p, e] = min over d of  F[p, d] + x(p; d, e)
so a stage is priced whole and its times need not add up. O(P^2 D + P D^2), vectorised over stages and devices. It keeps
no budget that couples stages (memory of a revisited device, sums of error): see memory.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import FloatArray
from ecotone.planner.chain import Chain, Path

__all__ = ["Remaining", "best_path", "next_paths", "remaining"]


@dataclass(frozen=True, slots=True, eq=False)
class Remaining:
    """Least seconds to go from `start[p, e]` (e holds the frontier at p) and from `end[q, e]` (e computed up to q)."""

    start: FloatArray  # (P, D)
    end: FloatArray  # (P, D)
    stop: NDArray[np.intp]  # (P, D): where the next stage ends
    target: NDArray[np.intp]  # (P, D): where the next transfer goes

    def path(self, first: int) -> tuple[tuple[int, int, int], ...]:
        """The best stages when device `first` starts."""
        stages, p, device = [], 0, first
        while p < len(self.start) - 1:
            q = int(self.stop[p, device])
            stages.append((device, p, q))
            p, device = q, int(self.target[q, device])
        return tuple(stages)


def remaining(stage: FloatArray, transfer: FloatArray, sink: int) -> Remaining:
    """Backward programme over `stage` (D, P, P) and `transfer` (P, D, D), both inf where impossible."""
    count, size = stage.shape[0], stage.shape[1]
    start, end = np.full((size, count), math.inf), np.full((size, count), math.inf)
    stop, target = np.zeros((size, count), dtype=np.intp), np.zeros((size, count), dtype=np.intp)
    own = np.arange(count)
    end[-1], target[-1] = transfer[-1][:, sink], sink
    for p in range(size - 2, -1, -1):
        through = stage[:, p, p + 1 :] + end[p + 1 :].T
        best = through.argmin(axis=1)
        start[p], stop[p] = through[own, best], best + p + 1
        if p:
            onward = transfer[p] + start[p][None, :]
            target[p] = onward.argmin(axis=1)
            end[p] = onward[own, target[p]]
    return Remaining(start, end, stop, target)


def best_path(chain: Chain) -> tuple[Path | None, float]:
    """The path of least latency and its seconds; (None, inf) where no path exists."""
    table = remaining(chain.stage, chain.best, chain.sink)
    totals = chain.best[0, chain.source] + table.start[0]
    first = int(totals.argmin())
    if not math.isfinite(totals[first]):
        return None, math.inf
    return chain.with_fastest_codecs(table.path(first)), float(totals[first])


def next_paths(chain: Chain, known: Sequence[Path], count: int) -> list[Path]:
    """Up to `count` further paths, each the best one that has a stage which no path before it has. O(P^2 D) each."""
    table = remaining(chain.stage, chain.best, chain.sink)
    before, origin, came = _elapsed(chain)
    through = before.T[:, :, None] + chain.stage + table.end.T[:, None, :]
    found: list[Path] = []
    for path in known:
        for stage in path.stages:
            through[stage] = math.inf
    while len(found) < count:
        device, p, q = (int(i) for i in np.unravel_index(int(through.argmin()), through.shape))
        if not math.isfinite(through[device, p, q]):
            break
        stages = (*_head(origin, came, device, p), (device, p, q))
        if q < chain.num_positions - 1:
            follower = int(table.target[q, device])
            stages += _tail(table, follower, q)
        path_or_none = chain.with_fastest_codecs(stages)
        for stage in stages:
            through[stage] = math.inf
        if path_or_none is not None:
            found.append(path_or_none)
    return found


def _elapsed(chain: Chain) -> tuple[FloatArray, NDArray[np.intp], NDArray[np.intp]]:
    """Forward programme: G (P, D), the stage start behind F (P, D) and the device that G comes from (P, D)."""
    size, count = chain.num_positions, chain.num_devices
    held, done = np.full((size, count), math.inf), np.full((size, count), math.inf)
    origin, came = np.zeros((size, count), dtype=np.intp), np.zeros((size, count), dtype=np.intp)
    own = np.arange(count)
    held[0] = chain.best[0, chain.source]
    for q in range(1, size):
        computed = held[:q] + chain.stage[:, :q, q].T
        origin[q] = computed.argmin(axis=0)
        done[q] = computed[origin[q], own]
        arrived = done[q][:, None] + chain.best[q]
        came[q] = arrived.argmin(axis=0)
        held[q] = arrived[came[q], own]
    return held, origin, came


def _head(origin: NDArray[np.intp], came: NDArray[np.intp], device: int, p: int) -> tuple[tuple[int, int, int], ...]:
    stages: list[tuple[int, int, int]] = []
    while p > 0:
        device = int(came[p, device])
        start = int(origin[p, device])
        stages.append((device, start, p))
        p = start
    return tuple(reversed(stages))


def _tail(table: Remaining, device: int, p: int) -> tuple[tuple[int, int, int], ...]:
    stages = []
    while p < len(table.start) - 1:
        q = int(table.stop[p, device])
        stages.append((device, p, q))
        p, device = q, int(table.target[q, device])
    return tuple(stages)
