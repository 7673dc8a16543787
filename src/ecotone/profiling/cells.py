"""One pass over a calibration set: what every cut, codec, exit policy and variant does to the decisions, and to the bytes.

O(samples * (1 + sum over cuts of the share of the model behind it * codecs)) runs; memory: one batch and a few sums per
cell. Bytes are those of the first SIZE_SAMPLES samples: a mean needs no more, and lossless coders take half of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ecotone import schema
from ecotone.accuracy import NOWHERE, AccuracyTable, Cell, ExitPolicy
from ecotone.codec import ImageSpec
from ecotone.model import Captured
from ecotone.plan import LOCAL
from ecotone.profile import Payload
from ecotone.profiling.codecs import PayloadSums
from ecotone.profiling.crossings import Answer, Crossings, ExitRun, batches
from ecotone.profiling.judge import Judge, leaving
from ecotone.profiling.labels import ChanceTest, Labels
from ecotone.profiling.ladders import fitted_losses, is_exact, value_codec
from ecotone.profiling.measurement import Progress
from ecotone.profiling.paired import Sure, Tally, how_sure
from ecotone.profiling.samples import Samples

__all__ = ["Calibration", "Setup", "Sums", "check_labels", "measured"]

SCHEMA, VERSION = "ecotone.calibration", 1
SIZE_SAMPLES = 16

Place = tuple[int, str, str, str]  # position, codec (without its lossless coder), policy, variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The accuracy table, and the payloads that the same pass gave."""

    table: AccuracyTable
    payloads: tuple[Payload, ...]

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "calibration") -> Calibration:
        """Read a calibration; raises SchemaError naming every violation."""
        return schema.load_json(Calibration, text, SCHEMA, VERSION, where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured: `captured` at `cuts` under `codecs` and `policies`, and each variant at cuts of its own."""

    captured: Captured
    cuts: tuple[int, ...]
    codecs: tuple[str, ...]
    policies: tuple[ExitPolicy, ...] = ()
    exits: tuple[ExitRun, ...] = ()
    variants: tuple[tuple[Captured, tuple[int, ...]], ...] = ()
    image: ImageSpec | None = None
    confidence: float = 0.95


def check_labels(setup: Setup, samples: Samples, labels: Labels, progress: Progress | None = None) -> None:
    """One run of the whole model per sample, so that wrong labels are found before the long pass; raises LabelError."""
    crossings = Crossings(setup.captured, (), ())
    chance, index = ChanceTest(), 0
    for group in batches(samples, crossings.batch):
        for outputs in crossings.run(0, crossings.length, group):
            chance.add(*labels.paired(index, outputs))
            index += 1
        if progress:
            progress(index, len(samples), "checking labels")
    chance.check()


def measured(setup: Setup, samples: Samples, labels: Labels | None, progress: Progress | None = None) -> Sums:
    """Every cell on every sample, as sums."""
    sums = Sums(setup)
    main = Crossings(setup.captured, setup.cuts, setup.codecs, image=setup.image, exits=setup.exits)
    others = [Crossings(variant, cuts, setup.codecs, image=setup.image) for variant, cuts in setup.variants]
    size = min([main.batch, *(other.batch for other in others)])
    index = 0
    for group in batches(samples, size):
        kept, answers = main.clean(group)
        judges = [Judge(index + i, answer.outputs, labels) for i, answer in enumerate(answers)]
        with_sizes = index < SIZE_SAMPLES
        sums.add((NOWHERE, LOCAL), "", judges, answers)
        for sent in main.sent(kept, answers, with_sizes):
            sums.add((sent.cut, sent.values), "", judges, sent.answers)
            sums.payloads.add(sent, answers)
        for other in others:
            kept, own = other.clean(group)
            name = other.graph.content_hash()
            sums.add((NOWHERE, LOCAL), name, judges, own)
            for sent in other.sent(kept, own, with_sizes=False):
                sums.add((sent.cut, sent.values), name, judges, sent.answers)
        index += len(group)
        if progress:
            progress(index, len(samples), f"accuracy, sample {index}")
    return sums


@dataclass(slots=True)
class Sums:
    """Tallies of every cell, and how often each policy's exits are taken."""

    setup: Setup
    tallies: dict[Place, Tally] = field(default_factory=dict)
    leaves: dict[tuple[str, str], int] = field(default_factory=dict)
    payloads: PayloadSums = field(init=False)

    def __post_init__(self) -> None:
        self.payloads = PayloadSums(self.setup.codecs)

    def add(self, place: tuple[int, str], variant: str, judges: Sequence[Judge], answers: Sequence[Answer]) -> None:
        """A batch of answers with the frontier sent at `place`; policies are those of the main model's exits."""
        for judge, answer in zip(judges, answers, strict=True):
            judge.add_to(self._tally(place, "", variant), answer.outputs)
            for policy in () if variant else self.setup.policies:
                name, outputs = leaving(answer, policy.exits, policy.thresholds)
                judge.add_to(self._tally(place, policy.name, ""), outputs)
                if place[0] == NOWHERE:
                    self.leaves[policy.name, name] = self.leaves.get((policy.name, name), 0) + 1

    def _tally(self, place: tuple[int, str], policy: str, variant: str) -> Tally:
        return self.tallies.setdefault((*place, policy, variant), Tally())

    def cells(self, *, is_labelled: bool) -> tuple[Cell, ...]:
        """One cell per codec asked for, with its interval and its fitted loss."""
        known = {place: tally for place, tally in self.tallies.items() if tally.num_decisions}
        sure = how_sure(list(known.values()), self.setup.confidence, is_labelled=is_labelled)
        on_ladders = {
            ((position, policy, variant), values): (tally.loss, float(tally.num_decisions))
            for (position, values, policy, variant), tally in known.items()
            if position != NOWHERE
        }
        fitted = fitted_losses(on_ladders)
        found = []
        for (place, tally), own in zip(known.items(), sure, strict=True):
            position, values, policy, variant = place
            loss = max(0.0, tally.loss) if position == NOWHERE else fitted[(position, policy, variant), values]
            cell = _cell(place, tally, own, loss)
            names = [LOCAL] if position == NOWHERE else [name for name in self.setup.codecs if value_codec(name) == values]
            found += [replace(cell, codec=name) for name in names]
        return tuple(sorted(found, key=lambda cell: (cell.variant, cell.policy, cell.position)))

    def policies(self, cells: Sequence[Cell]) -> Iterator[ExitPolicy]:
        """The policies with the shares and losses of these samples."""
        for policy in self.setup.policies:
            cell = next(c for c in cells if (c.position, c.policy, c.variant) == (NOWHERE, policy.name, ""))
            count = self.tallies[NOWHERE, LOCAL, policy.name, ""].num_samples
            total = sum(number for (name, _), number in self.leaves.items() if name == policy.name)
            shares = tuple(self.leaves.get((policy.name, name), 0) / total for name in policy.exits)
            yield replace(
                policy, shares=shares, loss_points=cell.loss_points, low_points=cell.low_points,
                high_points=cell.high_points, num_samples=count,
            )  # fmt: skip


def _cell(place: Place, tally: Tally, sure: Sure, fitted: float) -> Cell:
    position, values, policy, variant = place
    if not policy and not variant and (position == NOWHERE or is_exact(values)):
        sure = Sure(0.0, 0.0, 0.0, 1.0)  # by construction, not by measurement
    return Cell(
        position=position, codec=values, policy=policy, variant=variant, num_decisions=tally.num_decisions,
        points=100.0 * tally.right / tally.num_decisions, loss_points=100.0 * tally.loss,
        low_points=100.0 * sure.low, high_points=100.0 * sure.high, fitted_points=100.0 * fitted,
        disagreement=tally.differ / tally.num_decisions, disagreement_high=sure.differ_high,
        num_samples=tally.num_samples, design_effect=sure.effect,
    )  # fmt: skip
