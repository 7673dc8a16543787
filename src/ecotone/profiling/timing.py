"""Times that predict a run: one execution after a pause with cold caches, in turn with everything else, medians of rounds.

A request finds its device idle or fresh from other work: its weights are not in cache. A hot loop measures something up
to 1.7 times faster. So before each timed run a buffer larger than the caches is swept and the thread sleeps a moment,
which together cost what a long idle time costs (3 ms: 8 % less). The garbage collector is off while the clock runs.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

__all__ = ["Sweep", "collector_off", "median_and_spread", "timed_s"]

SWEEP_BYTES = 48 << 20
PAUSE_S = 0.02


class Sweep:
    """Makes the caches cold: reads and writes a buffer of `size_bytes`, then sleeps `pause_s`."""

    def __init__(self, size_bytes: int = SWEEP_BYTES, pause_s: float = PAUSE_S) -> None:
        self.buffer = torch.zeros(size_bytes // 4)
        self.pause_s = pause_s

    def __call__(self) -> None:
        self.buffer.add_(1.0)
        time.sleep(self.pause_s)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection inside."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def timed_s(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def median_and_spread(times: Sequence[float]) -> tuple[float, float]:
    """Median, and half the width of the middle 80 %, of at least one time."""
    ordered = sorted(times)
    last = len(ordered) - 1

    def at(share: float) -> float:
        low = int(share * last)
        high = min(low + 1, last)
        return ordered[low] + (share * last - low) * (ordered[high] - ordered[low])

    return statistics.median(ordered), (at(0.9) - at(0.1)) / 2
