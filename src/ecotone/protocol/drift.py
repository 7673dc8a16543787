"""Does what is served still agree with the reference as often as when it was calibrated? A test that may look every time.

Some requests are answered a second time by the reference (the whole model, unsplit); x_t in [0, 1] is the share of decisions
of the t-th of them that differ. Under the null the mean of x_t, given all before, is at most rho_t: what the table says of
the plan that answered (the upper end of its interval). Drift is when it is higher; `margin` says how much higher it must be
to be found fast. Theory of operation:

 (1) L_k,t = 1 - f_k + f_k x_t / rho_t       a bet of the share f_k of the wealth; its mean under the null is at most 1
 (2) R_k,t = (R_k,t-1 + 1) L_k,t,   R_t = mean over k of R_k,t,   R_0 = 0       alarm as soon as R_t >= A

R_t - t is a supermartingale under the null, since E[R_t | past] <= R_t-1 + 1. So at the alarm time T, by optional stopping,
E[T] >= E[R_T] >= A: without drift an alarm comes at the earliest every A comparisons on average, however dependent the x_t
and whatever the stopping (the Shiryaev-Roberts e-detector of Shin, Ramdas and Rinaldo, arXiv 2203.03532; wealth as
evidence: Ville 1939). After a change with E[log L_k] = g > 0 it comes after about log(A K) / g. The f_k are K powers of 1/2
from 0.9 down to the share that is best where x_t is 0 or 1 and has mean rho + margin (Kelly); large ones find a change of
many small shares within a few comparisons.

Once drift was raised the same bets run on 1 - x_t against "the mean is at least rho_t + margin", with `returns_apart` for
A: while it still drifts by that much it is taken back at most so often; then all is as at first. Pure; O(K) per comparison.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from ecotone import schema

__all__ = ["Drift", "DriftSettings", "DriftWatch", "Returned"]

LARGEST_BET = 0.9
RECENT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftSettings:
    """`margin`: how much more disagreement is worth finding; `alarms_apart`, `returns_apart`: A of the file's docstring.

    `least_rate`: no plan is held to less, since kernels of other machines round otherwise and turn a tie.
    """

    margin: float = 0.02
    alarms_apart: float = 10_000.0
    returns_apart: float = 1000.0
    least_rate: float = 0.002

    def __post_init__(self) -> None:
        ok = 0 < self.margin < 1 and 0 < self.least_rate < 1 and self.alarms_apart > 1 and self.returns_apart > 1
        schema.check(
            "drift settings", [] if ok else ["margin and least_rate must lie in (0, 1), alarms and returns above 1 apart"]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """More decisions differ than was calibrated: `observed` share over the `num_compared` requests since about the change.

    `expected`: the largest share that was calibrated for the plan in force; `after`: comparisons before the change.
    """

    expected: float
    observed: float
    num_compared: int
    after: int

    def __str__(self) -> str:
        return (
            f"drift: {self.observed:.2%} of decisions differ from the whole model over the last {self.num_compared} "
            f"compared requests, at most {self.expected:.2%} were expected; calibrate again on inputs of today"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """What drifted is back within what was calibrated, over the `num_compared` requests since about then."""

    expected: float
    observed: float
    num_compared: int

    def __str__(self) -> str:
        return f"drift is over: {self.observed:.2%} of decisions differ over the last {self.num_compared} compared requests"


class _Detector:
    """Equations 1 and 2 for values in [0, 1] whose mean is at most some bound under the null."""

    def __init__(self, margin: float, threshold: float) -> None:
        count = 1 + max(0, math.ceil(math.log2(LARGEST_BET / margin)))
        self._bets = [LARGEST_BET / 2**k for k in range(count)]
        self._wealth = [0.0] * count
        self._threshold = threshold
        self._trend = 0.0  # log evidence since the likeliest change: its last zero is that change
        self.total, self.count = 0.0, 0  # of what was seen since

    def seen(self, value: float, bound: float) -> bool:
        """Whether the evidence is in."""
        gains = [1.0 - bet + bet * value / bound for bet in self._bets]
        self._wealth = [(wealth + 1.0) * gain for wealth, gain in zip(self._wealth, gains, strict=True)]
        if self._trend <= 0.0:
            self._trend, self.total, self.count = 0.0, 0.0, 0
        self._trend += math.log(sum(gains) / len(gains))
        self.total, self.count = self.total + value, self.count + 1
        return sum(self._wealth) / len(self._wealth) >= self._threshold


class DriftWatch:
    """Told each comparison, says Drift once it is there and Returned once it is over."""

    def __init__(self, settings: DriftSettings | None = None) -> None:
        self.settings = settings or DriftSettings()
        self.num_compared = 0
        self.drift: Drift | None = None  # the one that is not over
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._rate = self.settings.least_rate
        self._detector = self._for_drift()

    def _for_drift(self) -> _Detector:
        return _Detector(self.settings.margin, self.settings.alarms_apart)

    @property
    def expected(self) -> float:
        """The largest share that the plan of the last comparison may have."""
        return self._rate

    @property
    def recent(self) -> float:
        """The share that differs over the last comparisons; 0 before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    def seen(self, share: float, rate: float) -> Drift | Returned | None:
        """`share` of the decisions of one request differ; `rate` was calibrated for its plan. Both in [0, 1]."""
        if not (0 <= share <= 1 and 0 <= rate <= 1):
            raise ValueError(f"share {share} and rate {rate} must lie in [0, 1]")
        self.num_compared += 1
        self._recent.append(share)
        # A rate so near to 1 that nothing above it could be told apart says nothing either.
        self._rate = rate = min(max(rate, self.settings.least_rate), 1.0)
        if self.drift is None:
            if not self._detector.seen(share, rate):
                return None
            count = self._detector.count
            mean = self._detector.total / count
            self.drift = Drift(expected=rate, observed=mean, num_compared=count, after=self.num_compared - count)
            self._detector = _Detector(self.settings.margin, self.settings.returns_apart)
            return self.drift
        if not self._detector.seen(1.0 - share, max(1.0 - rate - self.settings.margin, 1e-9)):
            return None
        mean, count = 1.0 - self._detector.total / self._detector.count, self._detector.count
        self.drift, self._detector = None, self._for_drift()
        return Returned(expected=rate, observed=mean, num_compared=count)
