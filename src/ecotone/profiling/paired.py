"""How sure a measured loss is: confidence intervals of shares and of paired differences, for decisions that come in samples.

Legend: n decisions; b of them right by the reference and wrong by what is tried, c the other way round (both answer the
same decisions, so all others cancel); delta = (b - c) / n the loss; K samples, m_i decisions of sample i, d_i = b_i - c_i.

 (1) delta in the interval  <=>  |b - c - n delta| <= z sqrt(n (2 q + delta (1 - delta))), q the most likely share of c under
     delta: the score interval of Tango, Statistics in Medicine 17 (1998), 891-908. It is sound at b = c = 0, where an
     interval from the estimated variance, or a bootstrap, would have no width.
 (2) a share k / n alone: Clopper and Pearson, Biometrika 26 (1934), exact.
 (3) Decisions of one sample are alike (one hard frame flips many), so n of them say less than n samples would. The design
     effect  D = Var(clustered) / Var(independent),  Var(clustered) = K / (K - 1) sum (d_i - m_i delta)^2 / n^2,  divides n,
     b and c (Rao and Scott, Biometrics 48 (1992), 577-585), times (t / z)^2 with Student's t of K - 1 degrees, since D is
     an estimate (Korn and Graubard, Survey Methodology 24 (1998), 193-201). D is at least 1, and where a cell has too few
     differing decisions to tell, at least that of the other cells of the table (`floor`).
Coverage of (1) with (3) is checked by simulation in tests/profiling/test_paired.py. Sums only: O(1) memory per cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

__all__ = ["Interval", "Sure", "Tally", "common_effect", "difference_interval", "how_sure", "share_interval"]

ENOUGH = 10  # differing decisions from which a cell's own design effect says something
STEPS = 60  # of bisection: to the last bits of a float in [-1, 1]

Interval = tuple[float, float]


@dataclass(slots=True)
class Tally:
    """Sums over samples: n, b, c of the legend, `differ` decisions unlike the reference's, and what (3) needs."""

    num_samples: int = 0
    num_decisions: int = 0
    lost: int = 0  # b
    gained: int = 0  # c
    differ: int = 0
    right: int = 0  # decisions that count for what is tried
    square_m: float = 0.0  # sum of m_i^2, m_i d_i, d_i^2; then with differing decisions in place of d_i
    cross_d: float = 0.0
    square_d: float = 0.0
    cross_x: float = 0.0
    square_x: float = 0.0

    def add(self, decisions: int, lost: int, gained: int, differ: int, right: int) -> None:
        """One sample of so many `decisions` (at least one)."""
        self.num_samples += 1
        self.num_decisions += decisions
        self.lost, self.gained = self.lost + lost, self.gained + gained
        self.differ, self.right = self.differ + differ, self.right + right
        net = lost - gained
        self.square_m += decisions * decisions
        self.cross_d, self.square_d = self.cross_d + decisions * net, self.square_d + net * net
        self.cross_x, self.square_x = self.cross_x + decisions * differ, self.square_x + differ * differ

    @property
    def loss(self) -> float:
        """delta, as a share."""
        return (self.lost - self.gained) / self.num_decisions

    @property
    def effect_of_loss(self) -> float:
        """D of the loss, as estimated from this cell alone; 1 where it cannot be."""
        independent = self.lost + self.gained - self.num_decisions * self.loss**2
        return self._effect(self.loss, self.square_d, self.cross_d, independent)

    @property
    def effect_of_differing(self) -> float:
        """D of the share that differs."""
        share = self.differ / self.num_decisions
        return self._effect(share, self.square_x, self.cross_x, self.differ - self.num_decisions * share**2)

    def _effect(self, mean: float, squares: float, cross: float, independent: float) -> float:
        if self.num_samples < 2 or independent <= 0:
            return 1.0
        clustered = squares - 2 * mean * cross + mean**2 * self.square_m
        return self.num_samples / (self.num_samples - 1) * max(0.0, clustered) / independent

    def loss_interval(self, confidence: float, floor: float = 1.0) -> tuple[float, Interval]:
        """Design effect used and the interval of the loss, as a share: (1) with (3)."""
        effect = self._used(self.effect_of_loss, self.lost + self.gained, floor, confidence)
        n, b, c = (value / effect for value in (self.num_decisions, self.lost, self.gained))
        return effect, difference_interval(b, c, n, _normal(confidence))

    def differing_interval(self, confidence: float, floor: float = 1.0) -> tuple[float, Interval]:
        """Design effect used and the interval of the share that differs: (2) with (3)."""
        effect = self._used(self.effect_of_differing, self.differ, floor, confidence)
        return effect, share_interval(self.differ / effect, self.num_decisions / effect, confidence)

    def _used(self, own: float, events: int, floor: float, confidence: float) -> float:
        """D with Student's t for z; no more than if all decisions of a sample were one, as for a single sample."""
        most = max(1.0, self.square_m / self.num_decisions)
        if self.num_samples < 2:
            return most
        ratio = _student(confidence, self.num_samples - 1) / _normal(confidence)
        return min(most, max(1.0, own, floor if events < ENOUGH else 1.0) * ratio * ratio)


@dataclass(frozen=True, slots=True)
class Sure:
    """How sure a cell is, as shares: the interval of its loss, the upper end of the share that differs; the effect used."""

    low: float
    high: float
    differ_high: float
    effect: float


def how_sure(tallies: Sequence[Tally], confidence: float, *, is_labelled: bool) -> list[Sure]:
    """For each cell of one table. Without labels the loss is the share that differs, and never below 0."""
    of_loss = common_effect(tallies, lambda tally: tally.effect_of_loss)
    of_differing = common_effect(tallies, lambda tally: tally.effect_of_differing)
    found = []
    for tally in tallies:
        effect, (low, high) = tally.differing_interval(confidence, of_differing)
        differ_high = high
        if is_labelled:
            effect, (low, high) = tally.loss_interval(confidence, of_loss)
        found.append(Sure(low, high, differ_high, effect))
    return found


def common_effect(tallies: Iterable[Tally], of: Callable[[Tally], float]) -> float:
    """The median design effect of the cells that differ often enough to have one; 1 where none does."""
    found = sorted(of(tally) for tally in tallies if tally.differ >= ENOUGH)
    return max(1.0, found[len(found) // 2]) if found else 1.0


def share_interval(count: float, total: float, confidence: float) -> Interval:
    """Clopper-Pearson for `count` of `total` (neither needs to be whole): covers with at least `confidence`."""
    from scipy import special  # half a second to import, which every node would pay at its start

    tail = (1.0 - confidence) / 2
    low = 0.0 if count <= 0 else float(special.betaincinv(count, total - count + 1, tail))
    high = 1.0 if count >= total else float(special.betaincinv(count + 1, total - count, 1.0 - tail))
    return low, high


def difference_interval(lost: float, gained: float, total: float, z: float) -> Interval:
    """Tango's score interval (1) for (lost - gained) / total; the counts need not be whole."""
    estimate = (lost - gained) / total

    def score(delta: float) -> float:
        q = _likeliest_gained(lost, gained, total, delta)
        variance = total * (2 * q + delta * (1 - delta))
        return (lost - gained - total * delta) / math.sqrt(max(variance, 1e-300))

    low = _crossing(lambda delta: score(delta) < z, -1.0, estimate)
    return low, _crossing(lambda delta: score(delta) <= -z, estimate, 1.0)


def _likeliest_gained(lost: float, gained: float, total: float, delta: float) -> float:
    """The share of `gained` of greatest likelihood given the difference: the root of a quadratic."""
    a = 2 * total
    b = -lost - gained + (2 * total - lost + gained) * delta
    c = -gained * delta * (1 - delta)
    return (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)


def _crossing(is_beyond: Callable[[float], bool], low: float, high: float) -> float:
    """Where a monotone condition turns true in [low, high]."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return (low + high) / 2


def _normal(confidence: float) -> float:
    """The two-sided quantile of the normal distribution."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _student(confidence: float, degrees: int) -> float:
    """The two-sided quantile of Student's t."""
    from scipy import special  # see share_interval

    return float(special.stdtrit(degrees, 0.5 + confidence / 2))
