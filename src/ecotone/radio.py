"""Uplinks that share radio channels: what each sender gets while others send on the same channel. Pure formulas.

The channel of MAHPPO (arXiv:2205.11854). Legend: N senders; W width of a channel in Hz; p_i transmit power in W; d_i
distance in m; gain g_i = d_i^-exponent; n noise in W, the same on every channel. Interference is treated as noise:

 (1) rate_i = W log2(1 + p_i g_i / (n + sum over other senders j on the same channel of p_j g_j))   bit/s;  here / 8, bytes/s

Units named `hz`, `m`, `watt` are SI. O(N + channels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone import schema

__all__ = ["Radio"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Radio:
    """`num_channels` equal channels of one receiver; defaults are the constants of the published environment."""

    num_channels: int = 2
    width_hz: float = 1e6
    path_loss_exponent: float = 3.0
    noise_watt: float = 1e-9

    def __post_init__(self) -> None:
        numbers = (self.width_hz, self.path_loss_exponent, self.noise_watt)
        ok = self.num_channels >= 1 and all(math.isfinite(v) and v > 0 for v in numbers)
        schema.check("radio", [] if ok else ["needs a channel, and width, exponent and noise above zero"])

    def rates_bytes_per_s(
        self,
        distance_m: FloatArray,
        power_watt: FloatArray,
        channel: NDArray[np.intp],
        sending: NDArray[np.bool_],
    ) -> FloatArray:
        """Equation 1 for N senders at once, all arrays (N,); 0 for those that do not send. Distances are above zero."""
        received = np.where(sending, power_watt * distance_m**-self.path_loss_exponent, 0.0)
        total = np.bincount(channel, weights=received, minlength=self.num_channels)
        others = np.maximum(total[channel] - received, 0.0)
        rate: FloatArray = self.width_hz * np.log2(1.0 + received / (self.noise_watt + others)) / 8
        return rate
