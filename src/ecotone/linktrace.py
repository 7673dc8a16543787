"""A link trace: how rate and latency of a link change over time, recorded or generated. Data only.

One small CSV file a trace (see `LinkTrace.load`), read by simulator, laboratory and emulated clusters alike. Steps: a point
holds until the next one; after the last the trace begins again.
"""

from __future__ import annotations

import bisect
import csv
import io
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ecotone import schema
from ecotone.units import EcotoneError

__all__ = ["LinkPoint", "LinkTrace", "load_trace", "shipped_traces"]

SHIPPED = Path(__file__).parent / "assets" / "traces"
HEADER = ("time_s", "bytes_per_s", "latency_s", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPoint:
    """From `time_s` on. A rate of 0 is an outage."""

    time_s: float
    bytes_per_s: float
    latency_s: float
    loss: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTrace:
    """Points in ascending time from 0; `duration_s` is above the last one's time. Raises SchemaError naming violations."""

    name: str
    points: tuple[LinkPoint, ...]
    duration_s: float
    about: str = ""  # where it comes from: generator and seed, or source and licence

    def __post_init__(self) -> None:
        schema.check(f"link trace {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        times = [p.time_s for p in self.points]
        if not times or times[0] != 0:
            yield "must have a first point at time 0"
        if any(b <= a for a, b in itertools.pairwise(times)):
            yield "times must ascend"
        if times and not (math.isfinite(self.duration_s) and self.duration_s > times[-1]):
            yield f"duration {self.duration_s} s must be above the last time, {times[-1]} s"
        for p in self.points:
            if not all(math.isfinite(v) and v >= 0 for v in (p.time_s, p.bytes_per_s, p.latency_s)):
                yield f"at {p.time_s} s: rate {p.bytes_per_s} and latency {p.latency_s} must be finite and not negative"
            if not 0 <= p.loss < 1:
                yield f"at {p.time_s} s: loss {p.loss} must be in [0, 1)"

    def at(self, time_s: float) -> LinkPoint:
        """What holds at `time_s`; the trace repeats."""
        inside = time_s % self.duration_s
        return self.points[bisect.bisect_right(self.points, inside, key=lambda p: p.time_s) - 1]

    @property
    def mean_bytes_per_s(self) -> float:
        """Over the whole trace, outages included."""
        ends = [*(point.time_s for point in self.points[1:]), self.duration_s]
        carried = sum(p.bytes_per_s * (end_s - p.time_s) for p, end_s in zip(self.points, ends, strict=True))
        return carried / self.duration_s

    def to_csv(self) -> str:
        rows = [f"# {self.name}: {self.about}", f"# duration_s = {self.duration_s:g}", ",".join(HEADER)]
        rows += [f"{p.time_s:g},{p.bytes_per_s:g},{p.latency_s:g},{p.loss:g}" for p in self.points]
        return "\n".join(rows) + "\n"

    @staticmethod
    def from_csv(text: str, name: str = "", where: str = "link trace") -> LinkTrace:
        """Read what to_csv writes; `#` lines are remarks, but for `# duration_s = 60`. Raises SchemaError by line."""
        duration_s, about, points, violations = 0.0, "", [], []
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        for _, line in [x for x in lines if x[1].startswith("#")]:
            key, _, value = line.lstrip("# ").partition("=")
            if key.strip() == "duration_s":
                try:
                    duration_s = float(value)
                except ValueError:
                    violations.append(f'"{line}": {value.strip()!r} is no number')
            elif not about:
                about = line.lstrip("# ").partition(": ")[2]
        rows = [x for x in lines if not x[1].startswith("#")]
        if not rows or tuple(c.strip() for c in rows[0][1].split(",")) != HEADER:
            raise schema.SchemaError(where, [f"the first line must be {','.join(HEADER)}"])
        for number, line in rows[1:]:
            try:
                values = [float(v) for v in next(csv.reader(io.StringIO(line)))]
                points.append(LinkPoint(**dict(zip(HEADER, values, strict=True))))
            except ValueError as error:
                violations.append(f"line {number}: {error}; write {','.join(HEADER)} as numbers")
        schema.check(where, violations)
        try:
            return LinkTrace(name=name, points=tuple(points), duration_s=duration_s or _after(points), about=about)
        except schema.SchemaError as error:
            raise schema.SchemaError(where, error.violations) from None

    @staticmethod
    def load(path: str | os.PathLike[str]) -> LinkTrace:
        """Read a CSV file; raises EcotoneError (unreadable) or SchemaError naming every violation."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise EcotoneError(f"link trace {path}: {error}; give the path of a CSV file") from error
        return LinkTrace.from_csv(text, Path(path).stem, f"link trace {path}")


def _after(points: list[LinkPoint]) -> float:
    """A duration where the file states none: the last step lasts as long as the one before it."""
    if len(points) < 2:
        return 1.0
    return 2 * points[-1].time_s - points[-2].time_s


def shipped_traces() -> tuple[str, ...]:
    """Names of the traces that come with Ecotone (see simulator/linkmodels.py for what they are)."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.csv")))


def load_trace(name_or_path: str | os.PathLike[str]) -> LinkTrace:
    """The shipped trace of that name, else the CSV file at that path; raises EcotoneError or SchemaError."""
    text = os.fspath(name_or_path)
    if text in shipped_traces():
        return LinkTrace.load(SHIPPED / f"{text}.csv")
    if not Path(text).exists() and Path(text).suffix != ".csv":
        raise EcotoneError(f"link trace {text!r}: neither a file nor one that is shipped: {', '.join(shipped_traces())}")
    return LinkTrace.load(text)
