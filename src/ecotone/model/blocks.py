"""Where to cut a flat graph: the positions between operators that are worth a planner's time.

Every heavy operator (convolution, matrix product, attention, recurrent net) starts a unit, and cheap operators join the
unit before them: of all places between two heavy operators the one with the fewest bytes crossing is taken, the latest
among those nearly equal; so a convolution keeps its norm and activation, a pooling layer joins what it shrinks, and a
pre-norm goes with what it feeds. Then two kinds of cut go: those round a unit too small to matter, and those where more
bytes cross than at both neighbours unless the merged block would be big. Linear in nodes, quadratic in units.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Item", "choose_cuts"]

NEARLY_EQUAL = 1.05
SMALL_SHARE = 1 / 250  # of the whole cost: not worth a position of its own
BIG_SHARE = 1 / 25  # of the whole cost: worth a position even where many bytes cross


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One operator in topological order. `reads` are item numbers, or -1-i for input i of the model."""

    heavy: bool
    cost: float  # FLOP plus weighted memory traffic
    reads: tuple[int, ...]
    size_bytes: float  # of its result, weighted; infinite where the result cannot cross a cut
    has_batch: bool  # the result's shape tells the batch


def choose_cuts(
    items: Sequence[Item], inputs: Sequence[Item], results: Sequence[int], *, need_batch: bool
) -> tuple[int, ...]:
    """Positions strictly between 0 and len(items), ascending: block k is items[cuts[k-1]:cuts[k]].

    `inputs` describes the model's inputs, `results` the item numbers (or -1-i) that it returns; with `need_batch` a
    position counts only where some tensor that crosses tells the batch.
    """
    crossing = _crossing_bytes(items, inputs, results, need_batch)
    heavy = [number for number, item in enumerate(items) if item.heavy]
    cuts = []
    for before, after in itertools.pairwise(heavy):
        legal = [k for k in range(before + 1, after + 1) if crossing[k] < float("inf")]
        if legal:
            least = min(crossing[k] for k in legal)
            cuts.append(max(k for k in legal if crossing[k] <= least * NEARLY_EQUAL))
    prefix = [0.0]
    for item in items:
        prefix.append(prefix[-1] + item.cost)
    return tuple(_thin([0, *cuts, len(items)], crossing, prefix)[1:-1])


def _crossing_bytes(items: Sequence[Item], inputs: Sequence[Item], results: Sequence[int], need_batch: bool) -> list[float]:
    """Per position 0..len(items), the weighted bytes of what crosses; infinite where a cut is not possible."""
    count = len(items)
    last = dict.fromkeys(range(-len(inputs), count), -1)
    for number, item in enumerate(items):
        for value in item.reads:
            last[value] = number
    for value in results:
        last[value] = count
    change, barred, telling = [0.0] * (count + 2), [0] * (count + 2), [0] * (count + 2)
    for value, end in last.items():
        item, first = (items[value], value + 1) if value >= 0 else (inputs[-1 - value], 0)
        if end < first:
            continue
        possible = item.size_bytes < float("inf")
        for position, sign in ((first, 1), (end + 1, -1)):
            change[position] += sign * item.size_bytes if possible else 0.0
            barred[position] += 0 if possible else sign
            telling[position] += sign * item.has_batch
    crossing: list[float] = []
    sums = (itertools.accumulate(change), itertools.accumulate(barred), itertools.accumulate(telling))
    for size, bars, tellers in zip(*sums, strict=True):
        crossing.append(size if bars == 0 and (tellers > 0 or not need_batch) else float("inf"))
    del crossing[count + 1 :]
    return crossing


def _thin(cuts: list[int], crossing: Sequence[float], prefix: Sequence[float]) -> list[int]:
    """Remove cuts that no plan would miss; the two ends stay."""
    total = prefix[-1] or 1.0
    while len(cuts) > 2:
        costs = [prefix[b] - prefix[a] for a, b in itertools.pairwise(cuts)]
        small = min(range(len(costs)), key=costs.__getitem__)
        if costs[small] < total * SMALL_SHARE:
            sides = [k for k in (small, small + 1) if 0 < k < len(cuts) - 1]
            del cuts[max(sides, key=lambda k: crossing[cuts[k]])]
            continue
        wide = [
            k
            for k in range(1, len(cuts) - 1)
            if _is_ridge(k, cuts, crossing) and costs[k - 1] + costs[k] <= total * BIG_SHARE
        ]
        if not wide:
            break
        del cuts[max(wide, key=lambda k: crossing[cuts[k]])]
    return cuts


def _is_ridge(k: int, cuts: Sequence[int], crossing: Sequence[float]) -> bool:
    here, before, after = (crossing[cuts[i]] for i in (k, k - 1, k + 1))
    return here >= before and here >= after and (here > before or here > after)
