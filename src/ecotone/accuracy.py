"""What a plan's choices do to the answers, as measured on a calibration set: the table A(cut, codec, exits, variant).

Losses are in points: percent of decisions, of the reference (the whole model, unsplit, in float32) less the cell. With
labels a decision counts when it is right, without when it agrees with the reference. Each loss has a confidence interval of
the paired difference; `fitted_points` is the loss made monotone along the codec's ladder (more bits never lose more), which
is what the planner reads. Data only, made by ecotone.profiling; how losses compose over a plan is equation 11 of cost.py.
A Composition holds that rule against what a whole plan was measured to lose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ecotone import schema

__all__ = ["NOWHERE", "AccuracyTable", "Cell", "Composition", "Crossing", "ExitPolicy"]

SCHEMA, VERSION = "ecotone.accuracy", 1
NOWHERE = -1
"""The position of a cell in which nothing crosses a link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The frontier at `position` crosses in `codec`; requests leave by `policy` ("": no exits); of the model `variant`.

    `variant`: the content hash of another graph with the same inputs and outputs; "": the table's own.
    """

    position: int = NOWHERE
    codec: str = "none"
    policy: str = ""
    variant: str = ""
    num_decisions: int
    points: float  # percent right (labelled) or alike (not labelled)
    loss_points: float  # as measured; below 0 where the cell happens to be better
    low_points: float  # confidence interval of the loss
    high_points: float
    fitted_points: float  # monotone, never below 0
    disagreement: float = 0.0  # share of decisions unlike the reference's
    disagreement_high: float = 1.0  # upper end of its confidence interval
    num_samples: int = 0  # decisions of one sample are not independent: see design_effect
    design_effect: float = 1.0  # how many times wider the variance is than that of as many independent decisions

    def __post_init__(self) -> None:
        values = (self.points, self.loss_points, self.low_points, self.high_points, self.fitted_points, self.design_effect)
        ok = all(math.isfinite(v) for v in values) and self.num_decisions > 0
        ok = ok and self.low_points <= self.high_points and self.fitted_points >= 0
        ok = ok and 0 <= self.disagreement <= self.disagreement_high <= 1
        where = f"accuracy at {self.position} in {self.codec}"
        schema.check(where, [] if ok else ["points must be finite, low at most high, and decisions above zero"])

    @property
    def key(self) -> tuple[int, str, str, str]:
        return (self.position, self.codec, self.policy, self.variant)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitPolicy:
    """Thresholds for some exits of the graph, in order of position, and what they do on the calibration set.

    `shares[i]`: of all requests, how many leave at `exits[i]`; the rest, 1 - sum, go to the end. `loss_points` as in a Cell.
    """

    name: str
    exits: tuple[str, ...]
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    loss_points: float
    low_points: float = 0.0
    high_points: float = 0.0
    num_samples: int = 0

    def __post_init__(self) -> None:
        schema.check(f"exit policy {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        if not self.name or not self.exits:
            yield "needs a name and at least one exit"
        if not len(self.exits) == len(self.thresholds) == len(self.shares):
            yield "exits, thresholds and shares must be equally many"
        if any(s < 0 for s in self.shares) or sum(self.shares) > 1 + 1e-9:
            yield f"shares {self.shares} must not be negative, nor above 1 together"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """The frontier at `position` goes over a link in `codec`."""

    position: int
    codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """Several crossings one after another: what the table predicts (equation 11 of cost.py), and what was measured."""

    crossings: tuple[Crossing, ...]
    policy: str = ""
    predicted_points: float
    loss_points: float
    low_points: float
    high_points: float
    num_decisions: int
    disagreement: float = 0.0
    disagreement_high: float = 1.0

    def __post_init__(self) -> None:
        values = (self.predicted_points, self.loss_points, self.low_points, self.high_points)
        ok = all(math.isfinite(v) for v in values) and self.low_points <= self.high_points and self.num_decisions > 0
        ok = ok and 0 <= self.disagreement <= self.disagreement_high <= 1 and self.crossings != ()
        schema.check("composed accuracy", [] if ok else ["needs crossings, decisions, finite points and low at most high"])

    @property
    def is_safe(self) -> bool:
        """The plan lost no more than was predicted."""
        return self.loss_points <= self.predicted_points

    @property
    def is_refuted(self) -> bool:
        """The plan surely lost more than was predicted: the whole confidence interval lies above."""
        return self.low_points > self.predicted_points

    def __str__(self) -> str:
        return " ".join(f"{c.position}:{c.codec}" for c in self.crossings) + (f" under {self.policy}" if self.policy else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyTable:
    """Cells of one graph on one calibration set. `key`: hash of all that it depends on; it is reused while that is equal."""

    graph_hash: str
    data_hash: str
    is_labelled: bool
    reference_points: float  # of the whole model in float32; 100 where not labelled
    cells: tuple[Cell, ...]
    policies: tuple[ExitPolicy, ...] = ()
    confidence: float = 0.95
    key: str = ""
    num_samples: int = 0
    compositions: tuple[Composition, ...] = ()
    _by_key: dict[tuple[int, str, str, str], Cell] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._by_key.update({cell.key: cell for cell in self.cells})
        twice = len(self.cells) - len(self._by_key)
        schema.check("accuracy table", [f"{twice} cells are given twice"] if twice else [])

    def cell(self, position: int, codec: str, policy: str = "", variant: str = "") -> Cell | None:
        """The cell, or None where it was not measured."""
        return self._by_key.get((position, codec, policy, variant))

    def policy(self, name: str) -> ExitPolicy | None:
        """The exit policy of that name, or None."""
        return next((p for p in self.policies if p.name == name), None)

    def crossing_points(self, position: int, codec: str, policy: ExitPolicy | None = None) -> float | None:
        """Points that a crossing loses beside what `policy` loses, fitted (equation 11); None where it was not measured."""
        cell = self.cell(position, codec, policy.name) if policy else None
        if cell is not None and policy is not None:
            return max(0.0, cell.fitted_points - max(0.0, policy.loss_points))
        cell = self.cell(position, codec)
        return cell.fitted_points if cell else None

    def sure_points(self, position: int, codec: str, policy: ExitPolicy | None = None) -> float | None:
        """As `crossing_points`, by the upper end of the interval: what it loses at most, as far as the samples tell."""
        cell = self.cell(position, codec, policy.name) if policy else None
        if cell is not None and policy is not None:
            return max(0.0, max(cell.fitted_points, cell.high_points) - max(0.0, policy.loss_points))
        cell = self.cell(position, codec)
        return max(cell.fitted_points, cell.high_points) if cell else None

    def differing(self, crossings: tuple[Crossing, ...], policy: str = "", variant: str = "") -> float | None:
        """The largest share of decisions that these crossings change, upper ends of the intervals; None: not measured.

        As measured of exactly this composition, else what is measured without crossings and what each of them adds.
        """
        whole = self.composition(crossings, policy) if not variant else None
        if whole is not None:
            return whole.disagreement_high
        alone = self.cell(NOWHERE, "none", policy, variant)
        if alone is None:
            return None
        total = alone.disagreement_high
        for crossing in crossings:
            under = self.cell(crossing.position, crossing.codec, policy, variant)
            cell = under or self.cell(crossing.position, crossing.codec, "", variant)
            if cell is None:
                return None
            total += max(0.0, cell.disagreement_high - (alone.disagreement_high if under else 0.0))
        return min(1.0, total)

    def composition(self, crossings: tuple[Crossing, ...], policy: str = "") -> Composition | None:
        """What was measured of exactly these crossings, or None."""
        return next((c for c in self.compositions if (c.crossings, c.policy) == (crossings, policy)), None)

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "accuracy table") -> AccuracyTable:
        """Read a table; raises SchemaError naming every violation."""
        return schema.load_json(AccuracyTable, text, SCHEMA, VERSION, where)
