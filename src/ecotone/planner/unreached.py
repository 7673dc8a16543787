"""The part of a plan that no request reaches: where everyone leaves at an exit, what lies behind it costs no time.

All places and cuts behind such an exit take as long (memory, errors and points lost still count), so a search takes any of
them. Of these, one that stays where the exit is is taken, parted at further exits alone; where that breaks a requirement
(memory), one on another of the devices that had a part of it. One judgement for each of these devices at most.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ecotone.cost import FloatArray
from ecotone.planner.chain import Chain, Path

__all__ = ["gathered", "reached"]

NOBODY = 1e-12  # shares are sums of floats


def reached(chain: Chain) -> int:
    """The first position (index) behind which no request goes on; the last one where some request always does."""
    return min((e.position for e in chain.exits if chain.share[e.position] <= NOBODY), default=chain.num_positions - 1)


def gathered(chain: Chain, path: Path, value: float, judge: Callable[[Path], float]) -> tuple[Path, float]:
    """`path` with what nobody reaches on one device, and its value by `judge`, not above `value`; or both as they were.

    `path` is in executors and codecs of the chain.
    """
    head = [stop for _, _, stop in path.stages].index(reached(chain)) + 1
    tail = path.stages[head:]
    if not tail:
        return path, value
    for place in dict.fromkeys((path.stages[head - 1][0], *(d for d, _, _ in tail))):
        other = _with_tail(chain, path, head, place)
        if other is None or len(other.stages) > len(path.stages):
            continue
        found = judge(other)
        if found <= value + abs(value) * NOBODY:
            return other, min(found, value)
    return path, value


def _with_tail(chain: Chain, path: Path, head: int, place: int) -> Path | None:
    """The first `head` stages as they are, and all behind them on `place`; None where that is impossible.

    Nothing there takes time: of the executors that of the exit, or else the most exact, of the codecs those that lose least.
    """
    leaving = chain.leaving
    assert leaving is not None
    here, _, start = path.stages[head - 1]
    stops = [*(e.position for e in chain.exits if e.position > start), chain.num_positions - 1]
    stages = [(place, a, b) for a, b in zip((start, *stops), stops, strict=False)]
    executors = path.executors or tuple(int(chain.executor[s]) for s in path.stages)
    leaves = path.leaves or tuple(int(leaving.seconds[b, :, d].argmin()) for d, _, b in path.stages)

    def crossing(at: int, source: int, target: int) -> int | None:
        possible = chain.transfer[at, :, source, target]
        return -1 if source == target else _least(possible, chain.loss[at], chain.sure_loss[at], chain.codec_error[at])

    def leave(at: int) -> int | None:
        lost = (table[at, :, place] for table in (leaving.loss, leaving.sure_loss, leaving.error))
        return _least(leaving.seconds[at, :, place], *lost)

    def executor(stage: tuple[int, int, int]) -> int | None:
        possible = chain.seconds[(slice(None), *stage)]
        error = chain.error[:, place, *((stage[1], stage[2]) if chain.error.shape[-1] > 1 else (0, 0))]
        own = executors[head - 1]
        return own if place == here and np.isfinite(possible[own]) else _least(possible, error)

    more = [executor(stage) for stage in stages]
    after = [leave(stop) for stop in stops]
    codecs = [crossing(start, here, place), *(-1 for _ in stops[1:]), crossing(chain.num_positions - 1, place, chain.sink)]
    found = [n for n in (*more, *after, *codecs) if n is not None]
    if len(found) < len(more) + len(after) + len(codecs):
        return None
    n = len(stages)
    return Path(
        (*path.stages[:head], *stages), (*path.codecs[:head], *found[2 * n :]), (*executors[:head], *found[:n]),
        (*leaves[:head], *found[n : 2 * n]),
    )  # fmt: skip


def _least(possible: FloatArray, *keys: FloatArray) -> int | None:
    """The index of least keys, the first counts most, among finite entries of `possible`; None where none is."""
    index = [i for i in range(len(possible)) if np.isfinite(possible[i])]
    return min(index, key=lambda i: tuple(float(key[i]) for key in keys), default=None)
