"""The programme over a list of moves instead of all of them: the same bound under prices, for what survived (arcs.py).

A move that is not in the list cannot be on a path below the value that the list was made for, so the least priced path of
the list, or that value if it is less, is a bound for all paths. With a few hundred moves of many millions left, a step of
the prices takes milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import FloatArray
from ecotone.planner.arcs import Arcs, Moves, Stages, repriced
from ecotone.planner.chain import Path
from ecotone.planner.programme import Programme

__all__ = ["Sparse"]

Index = NDArray[np.intp]


@dataclass(slots=True)
class Sparse:
    """Under `price`: least still to go from `start[p, e]` and `end[q, e]` as in programme.Remaining, and in all."""

    programme: Programme
    arcs: Arcs
    price: FloatArray
    start: FloatArray  # (P, D)
    end: FloatArray  # (P, D)
    before_leave: FloatArray  # (P, D): end without the exit's transfer
    least: float

    @staticmethod
    def of(programme: Programme, arcs: Arcs, price: FloatArray) -> Sparse:
        """The programme over `arcs` under other prices."""
        arcs = repriced(programme, arcs, price)
        size, count = programme.size, programme.count
        start, end, crossed = (np.full((size, count), math.inf) for _ in range(3))
        nothing = np.zeros(count)
        for p in _positions(programme, arcs):
            _stages(start, arcs.stages, p, count, end)
            _over(crossed[p], arcs.crossings, p, count, start[p] if p < size - 1 else nothing)
            if arcs.leaves is not None and programme.chain.free[p] and 0 < p < size - 1:
                _over(end[p], arcs.leaves, p, count, crossed[p])
            else:
                end[p] = crossed[p]
        first = crossed[0, programme.chain.source] + programme.network.fixed
        return Sparse(programme, arcs, price, start, end, crossed, float(first))

    def path(self) -> Path | None:
        """The least path in options; None where there is none."""
        if not math.isfinite(self.least):
            return None
        count, size, arcs = self.programme.count, self.programme.size, self.arcs
        stages: list[tuple[int, int, int]] = []
        codecs: list[int] = []
        executors: list[int] = []
        leaves: list[int] = []
        p, device = 0, self.programme.chain.source
        while True:
            ahead = self.start[p] if p < size - 1 else np.zeros(count)
            move = _best(arcs.crossings, p * count + device, ahead)
            codecs.append(int(arcs.crossings.option[move]))
            if p == size - 1:
                return Path(tuple(stages), tuple(codecs), tuple(executors), tuple(leaves))
            device = int(arcs.crossings.target[move])
            low, high = arcs.stages.first[p * count + device], arcs.stages.first[p * count + device + 1]
            ways = arcs.stages.priced[low:high] + self.end[arcs.stages.stop[low:high], device]
            stage = int(low + ways.argmin())
            stop = int(arcs.stages.stop[stage])
            stages.append((device, p, stop))
            executors.append(int(arcs.stages.option[stage]))
            leave = 0
            if arcs.leaves is not None and self.programme.chain.free[stop] and stop < size - 1:
                leave = int(arcs.leaves.option[_best(arcs.leaves, stop * count + device, self.before_leave[stop])])
            leaves.append(leave)
            p = stop


def _positions(programme: Programme, arcs: Arcs) -> list[int]:
    """Positions that have moves, the last first."""
    count = programme.count
    first = arcs.stages.first[::count], arcs.crossings.first[::count]
    has = (np.diff(first[0]) > 0) | (np.diff(first[1]) > 0)
    return [int(p) for p in np.nonzero(has)[0][::-1]]


def _over(found: FloatArray, moves: Moves, p: int, count: int, ahead: FloatArray) -> None:
    """Into `found` (D,): the least over the moves from every place at p, and what lies ahead of their target."""
    low, high = int(moves.first[p * count]), int(moves.first[(p + 1) * count])
    if high > low:
        device = np.repeat(np.arange(count), np.diff(moves.first[p * count : (p + 1) * count + 1]))
        np.minimum.at(found, device, moves.priced[low:high] + ahead[moves.target[low:high]])


def _stages(start: FloatArray, stages: Stages, p: int, count: int, end: FloatArray) -> None:
    low, high = int(stages.first[p * count]), int(stages.first[(p + 1) * count])
    if high > low:
        device = stages.device[low:high]
        np.minimum.at(start[p], device, stages.priced[low:high] + end[stages.stop[low:high], device])


def _best(moves: Moves, at: int, ahead: FloatArray) -> int:
    low, high = int(moves.first[at]), int(moves.first[at + 1])
    return low + int((moves.priced[low:high] + ahead[moves.target[low:high]]).argmin())
