"""Bayesian change-point detection online (Adams and MacKay 2007), for many series at once: how long since the last change.

Legend: x_1, x_2, ... one series; run length r = samples since the last change; H = 1 / `expected` chance of a change at each
sample; within a run x is normal with unknown mean and variance, prior normal-gamma (mean m, weight k, shape a, scale b), so
that the next x is Student's t.

 (1) p(r+1, x) = p(r) (1 - H) t(x | run r);     p(0, x) = sum_r p(r) H t(x | run r);     then divided by their sum
 (2) after x:  m <- (k m + x) / (k + 1);  b <- b + k (x - m)^2 / (2 (k + 1));  k <- k + 1;  a <- a + 1/2

Only the `longest` run lengths are kept; what is longer counts as that. O(longest) a sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from ecotone.policies.actions import FloatArray

__all__ = ["ChangePoints"]


class ChangePoints:
    """`size` series; `run` (size, R) is the distribution of the run length, `mean` (size, R) that of each run."""

    def __init__(
        self, size: int, mean: float, weight: float, shape: float, scale: float, *, expected: float = 250, longest: int = 64
    ) -> None:
        self._prior, self._hazard, self._longest = (mean, weight, shape, scale), 1.0 / expected, longest
        self.run = np.zeros((size, longest))
        self.run[:, 0] = 1.0
        self._state = [np.full((size, longest), value) for value in self._prior]

    @property
    def mean(self) -> FloatArray:
        """Mean of each run, (size, R)."""
        found: FloatArray = self._state[0]
        return found

    def see(self, x: FloatArray, who: NDArray[np.bool_] | None = None) -> None:
        """The next sample of every series, (size,), or of those in `who` only."""
        if who is not None and not who.all():
            part = ChangePoints.__new__(ChangePoints)
            part._prior, part._hazard, part._longest = self._prior, self._hazard, self._longest
            part.run, part._state = self.run[who], [values[who] for values in self._state]
            part.see(x[who])
            self.run[who] = part.run
            for values, new in zip(self._state, part._state, strict=True):
                values[who] = new
            return
        m, k, a, b = self._state
        value = x[:, None]
        spread = b * (k + 1) / (a * k)
        likelihood = np.exp(
            gammaln(a + 0.5) - gammaln(a) - 0.5 * np.log(2 * np.pi * a * spread)
            - (a + 0.5) * np.log1p((value - m) ** 2 / (2 * a * spread))
        )  # fmt: skip
        joint = self.run * likelihood
        grown = np.concatenate([joint.sum(axis=1, keepdims=True) * self._hazard, joint * (1 - self._hazard)], axis=1)
        grown[:, -2] += grown[:, -1]
        total = np.maximum(grown[:, :-1].sum(axis=1, keepdims=True), 1e-300)
        self.run = grown[:, :-1] / total
        after = ((k * m + value) / (k + 1), k + 1, a + 0.5, b + k * (value - m) ** 2 / (2 * (k + 1)))
        self._state = [
            np.concatenate([np.full((len(x), 1), prior), new[:, :-1]], axis=1)
            for prior, new in zip(self._prior, after, strict=True)
        ]

    def likeliest(self) -> tuple[FloatArray, FloatArray]:
        """The likeliest run length of each series and its mean; a run of 0 has the prior's."""
        rows, best = np.arange(len(self.run)), self.run.argmax(axis=1)
        return best.astype(np.float64), self._state[0][rows, best]
