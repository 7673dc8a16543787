"""What was measured: segments on devices, links, codecs, executors' errors. Data only; made by ecotone.profiling.

A profile is a file, reused while the graph, the cluster's devices and the software versions stay the same. Times on an
emulated device are already stretched. Prediction from these numbers is cost.py's work, not this file's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ecotone import schema
from ecotone.accuracy import AccuracyTable
from ecotone.cluster import DeviceId

__all__ = ["CodecCost", "ExecutorFailure", "ExitTime", "LinkFit", "Payload", "Profile", "SegmentTime"]

SCHEMA, VERSION = "ecotone.profile", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTime:
    """Blocks [start, stop) run by `executor` ("openvino:bf16") on `device`: median and spread (half the middle 80 %)."""

    device: DeviceId
    executor: str
    start: int
    stop: int
    median_s: float
    spread_s: float
    memory_bytes: int  # high-water mark above the idle process, weights included
    relative_error: float = 0.0  # L2 against eager float32 of the same segment on the same inputs
    num_runs: int = 0

    def __post_init__(self) -> None:
        schema.check(f"segment [{self.start}, {self.stop}) on {self.device} by {self.executor}", self._violations())

    def _violations(self) -> Iterator[str]:
        if not 0 <= self.start <= self.stop:
            yield "start and stop must be 0 <= start <= stop"
        if not _sane(self.median_s, self.spread_s, self.relative_error) or self.memory_bytes < 0:
            yield "times, memory and error must be finite and not negative"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitTime:
    """The head of exit `exit` by `executor` on `device`, confidence and decision included, above the segment before it."""

    device: DeviceId
    executor: str
    exit: str
    median_s: float
    relative_error: float = 0.0

    def __post_init__(self) -> None:
        ok = _sane(self.median_s, self.relative_error)
        schema.check(f"exit {self.exit} on {self.device}", [] if ok else ["time and error must be finite, not negative"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorFailure:
    """An executor that could not run a segment here, and why; the planner passes it over."""

    device: DeviceId
    executor: str
    start: int
    stop: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFit:
    """A directed link measured over Ecotone's own wire, fitted as latency + bytes / bandwidth."""

    source: DeviceId
    target: DeviceId
    latency_s: float
    bandwidth_bytes_per_s: float
    relative_residual: float = 0.0  # median |fit - measured| / measured over the sizes sent

    def __post_init__(self) -> None:
        ok = _sane(self.latency_s, self.relative_residual) and self.bandwidth_bytes_per_s > 0
        schema.check(f"link {self.source}>{self.target}", [] if ok else ["latency and rate must be finite, above zero"])


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecCost:
    """Seconds of a codec on a device: fixed + per *uncompressed* byte, for encoding and for decoding."""

    device: DeviceId
    codec: str
    encode_fixed_s: float
    encode_s_per_raw_byte: float
    decode_fixed_s: float
    decode_s_per_raw_byte: float

    def __post_init__(self) -> None:
        ok = _sane(self.encode_fixed_s, self.encode_s_per_raw_byte, self.decode_fixed_s, self.decode_s_per_raw_byte)
        schema.check(f"codec {self.codec} on {self.device}", [] if ok else ["costs must be finite and not negative"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The frontier at `position` under `codec`: bytes on the wire (mean over the samples) and what it does to the answer.

    `relative_error` is L2 of the model's outputs against the uncompressed run; `disagreement` is the share of decisions
    (arg-max) that change, in [0, 1]. Both come from real inputs through the real codec.
    """

    position: int
    codec: str
    size_bytes: float
    relative_error: float = 0.0
    disagreement: float = 0.0
    num_samples: int = 0

    def __post_init__(self) -> None:
        ok = _sane(self.size_bytes, self.relative_error) and 0 <= self.disagreement <= 1 and self.position >= 0
        schema.check(f"payload at {self.position} by {self.codec}", [] if ok else ["size, error or share out of range"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything measured of one graph on one cluster. `cuts` are the positions worth cutting at, 0 and L among them."""

    graph_hash: str
    cluster_name: str
    num_blocks: int
    cuts: tuple[int, ...]
    segments: tuple[SegmentTime, ...]
    links: tuple[LinkFit, ...] = ()
    codecs: tuple[CodecCost, ...] = ()
    payloads: tuple[Payload, ...] = ()
    failures: tuple[ExecutorFailure, ...] = ()
    exits: tuple[ExitTime, ...] = ()
    accuracy: AccuracyTable | None = None  # where it is there, its losses count instead of the payloads' disagreement
    key: str = ""  # hash of model, devices, samples and versions: the file is reused while it stays the same
    samples_hash: str = ""  # of the samples that were timed
    versions: dict[str, str] | None = None
    machine: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        schema.check("profile", self._violations())

    def _violations(self) -> Iterator[str]:
        if list(self.cuts) != sorted(set(self.cuts)) or not {0, self.num_blocks} <= set(self.cuts):
            yield f"cuts must ascend and hold 0 and {self.num_blocks}"
        if any(c < 0 or c > self.num_blocks for c in self.cuts):
            yield f"cuts must lie in [0, {self.num_blocks}]"
        for segment in self.segments:
            if segment.stop > self.num_blocks:
                yield f"segment [{segment.start}, {segment.stop}) ends beyond block {self.num_blocks}"
        for payload in self.payloads:
            if payload.position > self.num_blocks:
                yield f"payload at {payload.position} lies beyond block {self.num_blocks}"
        if self.accuracy is not None and self.accuracy.graph_hash != self.graph_hash:
            yield "the accuracy table is of another graph"

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "profile") -> Profile:
        """Read a profile; raises SchemaError naming every violation."""
        return schema.load_json(Profile, text, SCHEMA, VERSION, where)


def _sane(*values: float) -> bool:
    return all(math.isfinite(v) and v >= 0 for v in values)
