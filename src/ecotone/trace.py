"""What happened: spans of work of one run, simulated or measured, as data that the console, reports and tests read.

Times are seconds since the first request of the run. A span belongs to one request at one device; `stage` is the stage for
compute and wait, the transfer for encode, transfer and decode, and the number of stages for a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ecotone import schema

__all__ = ["Span", "Trace"]

SCHEMA, VERSION = "ecotone.trace", 1

Kind = Literal["compute", "encode", "transfer", "decode", "wait", "result", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """[start_s, stop_s) of `kind` for `request` at `device`; a transfer names where it goes in `peer`."""

    start_s: float
    stop_s: float
    device: str
    request: int
    stage: int
    kind: Kind
    epoch: int = 0
    peer: str = ""
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Spans in order of their ends. `origin` is "simulated" or "measured"."""

    origin: str
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        schema.check("trace", self._violations())

    def _violations(self) -> Iterator[str]:
        if self.origin not in ("simulated", "measured"):
            yield f'origin is {self.origin!r}, must be "simulated" or "measured"'
        for i, span in enumerate(self.spans):
            if not (math.isfinite(span.start_s) and math.isfinite(span.stop_s) and span.start_s <= span.stop_s):
                yield f"span {i} starts at {span.start_s} and stops at {span.stop_s}"

    def of(self, kind: Kind, device: str = "") -> tuple[Span, ...]:
        """Spans of one kind, of one device where one is named."""
        return tuple(s for s in self.spans if s.kind == kind and device in ("", s.device))

    def busy_s(self, device: str) -> float:
        """Seconds that `device` computed."""
        return sum(s.stop_s - s.start_s for s in self.of("compute", device))

    @property
    def completion_order(self) -> tuple[int, ...]:
        """Requests in the order of their results."""
        return tuple(s.request for s in self.spans if s.kind == "result")

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "trace") -> Trace:
        """Read a trace; raises SchemaError naming every violation."""
        return schema.load_json(Trace, text, SCHEMA, VERSION, where)
