"""A directed link from timed messages: latency + bytes / bandwidth. The fit alone; sending is the runtime's work.

Weighted least squares on the medians per size, weights 1 / median^2, so that small messages (which show the latency) count
as much as large ones (which show the rate). Closed form, O(samples).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ecotone.cluster import DeviceId
from ecotone.profile import LinkFit
from ecotone.units import EcotoneError

__all__ = ["LINK_PROBE_SIZES", "LinkSample", "fit_line", "fit_link", "probe_sizes"]

LINK_PROBE_SIZES = (1_000, 16_000, 64_000, 256_000, 1_000_000)
FASTEST_BYTES_PER_S = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSample:
    """One message: its bytes on the wire and the seconds from handing it over to its delivery at the other end."""

    size_bytes: int
    seconds: float


def probe_sizes(bandwidth_bytes_per_s: float, budget_s: float = 2.0, rounds: int = 3) -> tuple[int, ...]:
    """The sizes that `rounds` rounds can send within `budget_s` at this rate (a guess), at least the two smallest."""
    kept: list[int] = []
    for size in LINK_PROBE_SIZES:
        if len(kept) >= 2 and rounds * (sum(kept) + size) > budget_s * bandwidth_bytes_per_s:
            break
        kept.append(size)
    return tuple(kept)


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b), neither negative, of y ~ a + b * x with the least sum of squared *relative* errors; all y above zero."""
    weights = [1 / (y * y) for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    joint = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = joint / spread if spread > 0 else 0.0
    if slope <= 0:
        return mean_y, 0.0
    if mean_y - slope * mean_x >= 0:
        return mean_y - slope * mean_x, slope
    square = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
    return 0.0, sum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / square


def fit_link(source: str, target: str, samples: Sequence[LinkSample]) -> LinkFit:
    """Latency and bandwidth of `source`>`target`; raises EcotoneError for samples of fewer than two sizes or bad times."""
    sizes = sorted({sample.size_bytes for sample in samples})
    where = f"link {source}>{target}"
    if len(sizes) < 2 or any(not sample.seconds > 0 or sample.size_bytes < 0 for sample in samples):
        raise EcotoneError(f"{where}: cannot be fitted; give messages of at least two sizes, each with seconds above zero")
    points = [(float(s), statistics.median(m.seconds for m in samples if m.size_bytes == s)) for s in sizes]
    latency, slope = fit_line(points)
    residuals = [abs(latency + slope * x - y) / y for x, y in points]
    return LinkFit(
        source=DeviceId(source),
        target=DeviceId(target),
        latency_s=latency,
        bandwidth_bytes_per_s=1 / slope if slope > 1 / FASTEST_BYTES_PER_S else FASTEST_BYTES_PER_S,
        relative_residual=statistics.median(residuals),
    )
