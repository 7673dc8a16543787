"""What measuring one device gives, as data: options in, measurement out; JSON, so that a node can send its own.

`MeasureOptions` is part of a profile's key: other options make another profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ecotone import schema
from ecotone.accuracy import AccuracyTable, ExitPolicy
from ecotone.cluster import Device, DeviceId
from ecotone.graph import Graph
from ecotone.model import Captured
from ecotone.profile import CodecCost, ExecutorFailure, ExitTime, SegmentTime
from ecotone.profiling.crossings import ExitRun
from ecotone.profiling.cuts import candidate_cuts

__all__ = ["AccuracyOptions", "DeviceMeasurement", "MeasureOptions", "Progress"]

SCHEMA, VERSION = "ecotone.measurement", 1

Progress = Callable[[int, int, str], None]
"""progress(done, total, what): called after each step; `total` is an estimate that may shrink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How to measure.

    `executors`: the ids to try; empty: those the device allows, else the usual ones that work there. After one pass over
    the whole model the `keep` best of different accuracy within `max_error` are measured at every cut. `codecs`: ids,
    empty: the usual ones. `cuts`: measure at these positions; empty: at the `max_cuts` most promising ones. `isolate`: run
    segments in a process whose death is survived.
    """

    executors: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    max_cuts: int = 20
    cuts: tuple[int, ...] = ()
    max_error: float = 0.2
    keep: int = 2
    rounds: int = 11
    screening_rounds: int = 7
    max_samples: int = 4
    seed: int = 0
    isolate: bool = True
    step_timeout_s: float = 180.0

    def __post_init__(self) -> None:
        wrong = []
        if min(self.max_cuts, self.keep, self.rounds, self.screening_rounds, self.max_samples) < 1:
            wrong.append("max_cuts, keep, rounds, screening_rounds and max_samples must be at least 1")
        if self.max_error < 0 or self.step_timeout_s <= 0:
            wrong.append("max_error must not be negative and step_timeout_s must be above zero")
        schema.check("measure options", wrong)

    def cuts_of(self, graph: Graph, also: Iterable[int] = ()) -> tuple[int, ...]:
        """The positions to measure at, ascending, with 0 and L round them; `also` where `cuts` names none."""
        length = graph.num_blocks
        inner = {c for c in self.cuts if 0 < c < length}
        return (0, *sorted(inner), length) if self.cuts else candidate_cuts(graph, self.max_cuts, also)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyOptions:
    """What the accuracy table holds beside cuts and codecs. `limit`: at most so many samples (None: all, 0: no table).

    `given`: a table made elsewhere, such as that of exit policies alone; held where none is measured. The others as for
    `measure_accuracy`. No part of a profile's key: the table has its own.
    """

    limit: int | None = None
    names: tuple[str, ...] = ()
    policies: tuple[ExitPolicy, ...] = ()
    exits: tuple[ExitRun, ...] = ()
    variants: tuple[Captured, ...] = ()
    confidence: float = 0.95
    given: AccuracyTable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMeasurement:
    """All that was measured on `device`: real seconds of the machine that measured (`slowdown` 1), or stretched ones."""

    device: DeviceId
    segments: tuple[SegmentTime, ...] = ()
    codecs: tuple[CodecCost, ...] = ()
    failures: tuple[ExecutorFailure, ...] = ()
    exits: tuple[ExitTime, ...] = ()
    slowdown: float = 1.0

    def for_device(self, device: Device) -> DeviceMeasurement:
        """The same as of `device`: its name, and every time stretched by its slowdown over the one already in here."""
        factor = device.slowdown / self.slowdown
        segments = [
            replace(s, device=device.name, median_s=s.median_s * factor, spread_s=s.spread_s * factor) for s in self.segments
        ]
        codecs = [
            CodecCost(
                device=device.name,
                codec=c.codec,
                encode_fixed_s=c.encode_fixed_s * factor,
                encode_s_per_raw_byte=c.encode_s_per_raw_byte * factor,
                decode_fixed_s=c.decode_fixed_s * factor,
                decode_s_per_raw_byte=c.decode_s_per_raw_byte * factor,
            )
            for c in self.codecs
        ]
        failures = [replace(f, device=device.name) for f in self.failures]
        exits = [replace(e, device=device.name, median_s=e.median_s * factor) for e in self.exits]
        return DeviceMeasurement(
            device=device.name,
            segments=tuple(segments),
            codecs=tuple(codecs),
            failures=tuple(failures),
            exits=tuple(exits),
            slowdown=device.slowdown,
        )

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "measurement") -> DeviceMeasurement:
        """Read a measurement; raises SchemaError naming every violation."""
        return schema.load_json(DeviceMeasurement, text, SCHEMA, VERSION, where)
