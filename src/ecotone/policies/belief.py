"""What a device knows when a request comes: rate, loads and queue as last seen, as numbers near [0, 1] for a network.

The same object serves the training world (M devices at once) and the controller of a real one (M = 1), so that a policy is
run on what it was trained on. Legend: x_k the k-th sample of log rate; last = x_k; mean += g (x_k - mean);
var += g ((x_k - mean)^2 - var); loads as log of (observed / profiled) time, smoothed by g.

Features, in order of FEATURES: the seven of SAC-d (rate and its trend, round trip, loads of device and server, deadline,
queue), and three of ours, which matter where things are hidden: how long this request has waited, how old the knowledge of
the link is, and how much the rate has wandered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecotone import schema
from ecotone.policies.actions import FloatArray

__all__ = ["FEATURES", "Belief", "Ranges"]

FEATURES = (
    "rate", "trend", "round_trip", "device_load", "server_load", "deadline", "queue", "waited", "age", "spread",
)  # fmt: skip
LOWEST, HIGHEST = -1.0, 2.0
_LEAST_RATE = 1.0  # bytes per second: what an outage counts as


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """What the features are divided by, and where a policy was trained. Rates and deadlines in logarithms."""

    rate_bytes_per_s: tuple[float, float]
    deadline_s: tuple[float, float]
    round_trip_s: float
    load: float
    queue: float
    age_s: float

    def __post_init__(self) -> None:
        ok = 0 < self.rate_bytes_per_s[0] < self.rate_bytes_per_s[1] and 0 < self.deadline_s[0] <= self.deadline_s[1]
        numbers = (*self.rate_bytes_per_s, *self.deadline_s, self.round_trip_s, self.load, self.queue, self.age_s)
        ok = ok and all(math.isfinite(x) and x > 0 for x in numbers) and self.load > 1
        schema.check("ranges of a policy", [] if ok else ["must be finite, above zero and ascending; the load above 1"])


class Belief:
    """Of M devices. All arrays (M,); `gain` of the averages."""

    def __init__(self, size: int, rate_bytes_per_s: ArrayLike, one_way_s: ArrayLike, gain: float = 0.3) -> None:
        """`rate_bytes_per_s`, `one_way_s`: what is believed before anything is seen."""
        self.gain = gain
        self.last = np.log(np.maximum(np.broadcast_to(np.asarray(rate_bytes_per_s, dtype=np.float64), (size,)), _LEAST_RATE))
        self.mean = self.last.copy()
        self.var = np.zeros(size)
        self.one_way_s = np.array(np.broadcast_to(np.asarray(one_way_s, dtype=np.float64), (size,)))
        self.device, self.server = np.zeros(size), np.zeros(size)  # logarithms
        self.timed_s = np.full(size, -math.inf)

    def link(self, rows: NDArray[np.intp], rate_bytes_per_s: ArrayLike, one_way_s: ArrayLike, now_s: ArrayLike) -> None:
        """A transfer or probe of devices `rows` was timed."""
        x = np.log(np.maximum(np.asarray(rate_bytes_per_s, dtype=np.float64), _LEAST_RATE))
        is_first = ~np.isfinite(self.timed_s[rows])
        gap = np.where(is_first, 0.0, x - self.mean[rows])
        self.mean[rows] = np.where(is_first, x, self.mean[rows] + self.gain * gap)
        self.var[rows] += self.gain * (gap**2 - self.var[rows])
        self.last[rows], self.one_way_s[rows], self.timed_s[rows] = x, one_way_s, now_s

    def loads(self, rows: NDArray[np.intp], device: ArrayLike | None = None, server: ArrayLike | None = None) -> None:
        """Observed over profiled times of devices `rows`, of those machines that are given."""
        for known, value in ((self.device, device), (self.server, server)):
            if value is not None:
                known[rows] += self.gain * (np.log(np.asarray(value, dtype=np.float64)) - known[rows])

    def know(
        self, rate: FloatArray, one_way_s: FloatArray, device: FloatArray, server: FloatArray, now_s: FloatArray
    ) -> None:
        """All of it is told, as it is."""
        self.last = np.log(np.maximum(rate, _LEAST_RATE))
        self.mean, self.var = self.last.copy(), np.zeros_like(self.last)
        self.one_way_s, self.device, self.server = one_way_s, np.log(device), np.log(server)
        self.timed_s = now_s.copy()

    def features(
        self, ranges: Ranges, now_s: FloatArray, deadline_s: FloatArray, queue: FloatArray, waited_s: FloatArray
    ) -> NDArray[np.float32]:
        """(M, len(FEATURES)) as of FEATURES; not cut off, see `inside`."""
        low, high = np.log(ranges.rate_bytes_per_s)
        first, last = np.log(ranges.deadline_s)
        age = np.where(np.isfinite(self.timed_s), now_s - self.timed_s, ranges.age_s)
        columns = (
            (self.last - low) / (high - low),
            (self.last - self.mean) / 2.0,
            2 * self.one_way_s / ranges.round_trip_s,
            self.device / math.log(ranges.load),
            self.server / math.log(ranges.load),
            (np.log(deadline_s) - first) / max(last - first, 1e-9),
            queue / ranges.queue,
            waited_s / deadline_s,
            age / ranges.age_s,
            np.sqrt(self.var) / 2.0,
        )
        return np.stack(columns, axis=-1).astype(np.float32)
