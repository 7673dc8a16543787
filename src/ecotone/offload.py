"""What a task costs a device at each point where it may leave it: the tables of the radio cell. Data only.

Point 0 uploads the raw input, points 1 to K - 2 compute a part and upload the compressed tensor there, the last computes
all. The three tables are the published measurements of MAHPPO (arXiv:2205.11854, repository Hao840/MAHPPO: env/data.py):
a Jetson Nano with fixed clocks and a power meter; payload = raw bits / ratio of the autoencoder. `norm_s` and `norm_bytes`
scale the state that a learner sees, as the published environment does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ecotone import schema

__all__ = ["PUBLISHED", "OffloadProfile"]

_RAW_BYTES = 3 * 224 * 224


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadProfile:
    """One model on one kind of device, by point: seconds and watts of the part computed here, bytes sent after it."""

    name: str
    compute_s: tuple[float, ...]
    compute_watt: tuple[float, ...]
    payload_bytes: tuple[float, ...]
    norm_s: float
    norm_bytes: float = float(_RAW_BYTES)

    def __post_init__(self) -> None:
        schema.check(f"offload profile {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        columns = (self.compute_s, self.compute_watt, self.payload_bytes)
        if len({len(c) for c in columns}) != 1 or len(self.compute_s) < 2:
            yield "needs as many seconds as watts and payloads, two points at least"
            return
        if not all(math.isfinite(v) and v >= 0 for column in columns for v in column):
            yield "seconds, watts and payloads must be finite and not negative"
        if self.payload_bytes[-1] != 0 or any(size <= 0 for size in self.payload_bytes[:-1]):
            yield "the last point sends nothing, all others send something"
        if any(seconds <= 0 for seconds in self.compute_s[1:]):
            yield "all points but the first compute something"
        if not (self.norm_s > 0 and self.norm_bytes > 0):
            yield "norms must be above zero"

    @property
    def num_points(self) -> int:
        return len(self.compute_s)


def _published(name: str, rows: tuple[tuple[float, float, float], ...], norm_s: float) -> OffloadProfile:
    seconds, watts, sizes = zip(*((0.0, 0.0, float(_RAW_BYTES)), *rows), strict=True)
    return OffloadProfile(name=name, compute_s=seconds, compute_watt=watts, payload_bytes=sizes, norm_s=norm_s)


PUBLISHED: dict[str, OffloadProfile] = {
    profile.name: profile
    for profile in (
        _published(
            "vgg11",
            ((0.015589, 2.204, 25088), (0.045, 2.6344, 12544), (0.100595, 2.8618, 6272), (0.136817, 3.0338, 3136),
             (0.1893, 2.5795, 0)),
            0.092876,
        ),
        _published(
            "resnet18",
            ((0.004359, 2.2885, 12544), (0.01647, 2.6328, 6272), (0.025477, 2.8815, 3136), (0.03678, 3.013, 3136),
             (0.045887, 2.1454, 0)),
            0.045887,
        ),
        _published(
            "mobilenetv2",
            ((0.005392, 1.8811, 25088), (0.009008, 2.4805, 6272), (0.015418, 2.5565, 3136), (0.024955, 2.2014, 1568),
             (0.052676, 1.4797, 0)),
            0.052676,
        ),
    )
}  # fmt: skip
"""The published models by name: seconds, watts and bytes of points 1 to 5 stand in a row each."""
