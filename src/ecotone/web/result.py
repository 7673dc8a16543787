"""What a demonstration found, as plain data: the contenders, the plan, the curve over cuts, before and after the link slows.

Made by `ecotone demo`, written as report.json, drawn by report.py and picture.py. No measuring and no drawing here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ecotone import schema

__all__ = ["Act", "Contender", "CurvePoint", "LinkPart", "Machine", "PlanPart", "Result", "Wire"]

SCHEMA, VERSION = "ecotone.demo-report", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A device as the cluster file states it; `gflop_per_s` is what the profile measured for the whole network there."""

    name: str
    tier: str = ""
    slowdown: float = 1.0
    whole_network_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """A directed link during one act."""

    source: str
    target: str
    latency_s: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPart:
    """Blocks [start, stop) on `device` by `executor`; seconds predicted and measured (0: not), share of the FLOP."""

    device: str
    start: int
    stop: int
    executor: str
    flop_share: float
    predicted_s: float
    measured_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPart:
    """The frontier at `position` crosses from `source` to `target` in `codec`; local ones are left out."""

    source: str
    target: str
    position: int
    codec: str
    size_bytes: float
    raw_bytes: float
    predicted_s: float
    measured_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One plan that was run. `kind`: "device", "jpeg", "fixed", "ecotone", "stale" (the first act's plan, kept).

    `same_as` names the contender whose measurement this one shares, because both are the same plan. Energy is modelled.
    """

    kind: str
    name: str
    words: str
    latency_median_s: float
    latency_p95_s: float
    throughput_per_s: float
    bytes_per_frame: float
    accuracy: float
    energy_joule: float
    predicted_latency_s: float
    predicted_throughput_per_s: float
    predicted_bytes: float
    num_frames: int
    same_as: str = ""
    stages: tuple[PlanPart, ...] = ()
    links: tuple[LinkPart, ...] = ()

    def __post_init__(self) -> None:
        schema.check(f"contender {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        numbers = (self.latency_median_s, self.latency_p95_s, self.throughput_per_s, self.bytes_per_frame)
        if not all(math.isfinite(v) and v >= 0 for v in (*numbers, self.predicted_latency_s, self.energy_joule)):
            yield "times, rates, bytes and energy must be finite and not negative"
        if not 0 <= self.accuracy <= 1:
            yield f"accuracy is {self.accuracy}, must lie in [0, 1]"

    @property
    def prediction_error(self) -> float:
        """Predicted over measured latency, less one."""
        return self.predicted_latency_s / self.latency_median_s - 1 if self.latency_median_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Predicted latency when only `first` and `second` share the work and the cut lies at `position`, in the best codec."""

    first: str
    second: str
    position: int
    codec: str
    latency_s: float
    size_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """Everything under one state of the links; `headline` says in words what was found."""

    title: str
    headline: str
    links: tuple[Wire, ...]
    contenders: tuple[Contender, ...]
    curve: tuple[CurvePoint, ...]

    def contender(self, kind: str) -> Contender | None:
        """The contender of that kind, or None."""
        return next((c for c in self.contenders if c.kind == kind), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The whole demonstration. `num_blocks` is L, so positions run from 0 to L."""

    network: str
    num_blocks: int
    flop: float
    parameter_bytes: int
    block_names: tuple[str, ...]
    machines: tuple[Machine, ...]
    source: str
    sink: str
    emulated: bool
    reference_accuracy: float  # of the whole network, float32, no codec, on the same frames
    num_frames: int
    acts: tuple[Act, ...]
    conclusion: str
    seconds: dict[str, float]  # by phase: capture, profile, plan, run
    context: dict[str, str]  # machine, versions, seed

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "demo report") -> Result:
        """Read a report; raises SchemaError naming every violation."""
        return schema.load_json(Result, text, SCHEMA, VERSION, where)
