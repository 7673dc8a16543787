"""Link traces from small stochastic models with a seed: how rate and latency change on five kinds of link in the field.

The traces in assets/traces are what `make(name, SHIPPED_SEED)` gives; they are kept for evaluation, so whatever is tuned is
tuned on other seeds. What is not modelled: single packets, TCP, several of our own streams in one cell. Sources by letter:

(a) Rate of 802.11 by signal to noise: the usual thresholds of MCS 0 to 7 in 20 MHz with one stream, and the two DSSS rates
    below them; about 60 % of the PHY rate is goodput (Bianchi 2000 and everyday measurement).
(b) Path loss by the log-distance law, exponent 2.8 (indoor 2.4 GHz: ITU-R P.1238), 40 dB at 1 m. Shadowing is normal in dB
    and autoregressive over the way walked: Gudmundson 1991, 5 m indoors, 50 m along a track.
(c) Uplink of LTE: the truncated Shannon bound of 3GPP TR 36.942 annex A, 0.4 log2(1 + SNR), at most 2 bit/s/Hz, nothing
    below -10 dB; path loss 37.6 log10(distance), shadowing 6 dB (TR 36.814, macro cell).
(d) A handover that works interrupts for some 50 ms (TR 36.881), less than a step; one in four fails here, which costs 1 to
    3 s for a new connection.
(e) Flows that come and go (M/M/infinity) share a bottleneck alike; a full buffer adds delay (Gettys and Nichols 2012).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ecotone.linktrace import LinkPoint, LinkTrace
from ecotone.units import EcotoneError

__all__ = ["NAMES", "SHIPPED_SEED", "make"]

SHIPPED_SEED = 20260
STEP_S, DURATION_S = 0.25, 60.0
_MBIT = 1e6 / 8
_WIFI = (
    (-2.0, 1.0), (1.0, 2.0), (3.0, 6.5), (5.0, 13.0), (9.0, 19.5), (11.0, 26.0), (15.0, 39.0), (18.0, 52.0), (20.0, 58.5),
    (25.0, 65.0),
)  # fmt: skip
_GOODPUT = 0.6
FloatArray = NDArray[np.float64]
_Series = tuple[FloatArray, FloatArray]  # bytes per second and seconds of latency, by step
_NUM_STEPS = round(DURATION_S / STEP_S)


def make(name: str, seed: int) -> LinkTrace:
    """The trace of model `name` (one of NAMES) for `seed`: 60 s in steps of 0.25 s. Raises EcotoneError for another name."""
    if name not in _MODELS:
        raise EcotoneError(f"link model {name!r} is not known; known are {', '.join(NAMES)}")
    number = NAMES.index(name)
    rates, latencies = _MODELS[name](np.random.default_rng([seed, number]))
    values = [(float(f"{r:.3g}"), float(f"{t:.3g}")) for r, t in zip(rates, latencies, strict=True)]
    firsts = [0] + [i for i, (one, other) in enumerate(itertools.pairwise(values), 1) if one != other]
    points = tuple(LinkPoint(time_s=i * STEP_S, bytes_per_s=values[i][0], latency_s=values[i][1]) for i in firsts)
    about = f"written by ecotone.simulator.linkmodels.make, seed {seed}"
    return LinkTrace(name=name, points=points, duration_s=DURATION_S, about=about)


def _stable_wifi(rng: np.random.Generator) -> _Series:
    """Beside the access point: 40 Mbit/s, a few percent up and down within seconds, 2 ms."""
    wobble = _wandering(rng, spread=0.04, keeps=math.exp(-STEP_S / 2.0))
    return 40 * _MBIT * np.exp(wobble), np.full(_NUM_STEPS, 0.002)


def _walking_away(rng: np.random.Generator) -> _Series:
    """From 3 m to 87 m at 1.4 m/s (a, b): 39 Mbit/s of goodput at first, beyond some 70 m 1 Mbit/s or none."""
    speed = 1.4
    distance = 3.0 + speed * STEP_S * np.arange(_NUM_STEPS)
    shadow = _wandering(rng, spread=4.0, keeps=math.exp(-speed * STEP_S / 5.0))
    return _wifi(55.0 - 28.0 * np.log10(distance) + shadow)


def _lte_train(rng: np.random.Generator) -> _Series:
    """At 50 m/s past base stations every 1.2 km, 100 m off the track (b, c, d), the cell shared with others, one tunnel."""
    speed, spacing, offset = 50.0, 1200.0, 100.0
    along = rng.uniform(0, spacing) + speed * STEP_S * np.arange(_NUM_STEPS)
    cell = np.round(along / spacing).astype(int)
    distance = np.hypot(along - cell * spacing, offset)
    snr = 26.0 - 37.6 * np.log10(distance / offset) + _wandering(rng, spread=6.0, keeps=math.exp(-speed * STEP_S / 50.0))
    share = 1.0 / (1.0 + _population(rng, mean=1.5, stay_s=4.0))
    rates = 10e6 / 8 * np.minimum(2.0, 0.4 * np.log2(1 + 10 ** (snr / 10))) * share * (snr >= -10)
    for change in np.flatnonzero(np.diff(cell)) + 1:
        lost_s = rng.uniform(1.0, 3.0) if rng.uniform() < 0.25 else 0.0
        rates[change : change + round(lost_s / STEP_S)] = 0.0
    tunnel_s, begins_s = rng.uniform(1.0, 4.0), rng.uniform(5.0, DURATION_S - 5.0)
    rates[round(begins_s / STEP_S) : round((begins_s + tunnel_s) / STEP_S)] = 0.0
    return rates, np.where(snr < 5, 0.04, 0.02)


def _evening_uplink(rng: np.random.Generator) -> _Series:
    """20 Mbit/s of a cable modem, shared with the flows of a street; a backup in the house comes and goes (e)."""
    flows = _population(rng, mean=2.0, stay_s=6.0)
    backup = _two_states(rng, first_s=10.0, second_s=8.0)
    weight = 1.0 + flows + 8.0 * backup  # a backup opens many connections
    return 20 * _MBIT / weight, np.minimum(0.010 + 0.004 * (weight - 1.0), 0.06)


def _warehouse_wifi(rng: np.random.Generator) -> _Series:
    """A vehicle among metal racks: some 4 s in sight of the access point, then some 3 s behind a rack, 22 dB less (a)."""
    hidden = _two_states(rng, first_s=4.0, second_s=3.0)
    return _wifi(24.0 - 22.0 * hidden + _wandering(rng, spread=2.0, keeps=math.exp(-STEP_S / 1.0)))


_MODELS: dict[str, Callable[[np.random.Generator], _Series]] = {
    "stable_wifi": _stable_wifi,
    "walking_away": _walking_away,
    "lte_train": _lte_train,
    "evening_uplink": _evening_uplink,
    "warehouse_wifi": _warehouse_wifi,
}
NAMES = tuple(_MODELS)


def _wifi(snr: FloatArray) -> _Series:
    """Goodput by signal to noise in dB (a), 0 below the lowest rate; repeated frames make a weak link late."""
    index = np.searchsorted([threshold for threshold, _ in _WIFI], snr, side="right") - 1
    phy = np.where(index >= 0, np.array([rate for _, rate in _WIFI])[np.maximum(index, 0)], 0.0)
    return phy * _GOODPUT * _MBIT, np.where(snr < 5, 0.010, np.where(snr < 15, 0.004, 0.002))


def _wandering(rng: np.random.Generator, *, spread: float, keeps: float) -> FloatArray:
    """A stationary autoregressive series of that standard deviation; `keeps` is its correlation from step to step."""
    values = np.empty(_NUM_STEPS)
    values[0] = rng.normal(0.0, spread)
    for i in range(1, _NUM_STEPS):
        values[i] = keeps * values[i - 1] + rng.normal(0.0, spread * math.sqrt(1 - keeps**2))
    return values


def _population(rng: np.random.Generator, *, mean: float, stay_s: float) -> FloatArray:
    """How many are there, who come at random and stay `stay_s` on average (M/M/infinity), in its steady state."""
    values = np.empty(_NUM_STEPS)
    present = int(rng.poisson(mean))
    for i in range(_NUM_STEPS):
        values[i] = present
        present -= int(rng.binomial(present, 1 - math.exp(-STEP_S / stay_s)))
        present += int(rng.poisson(mean * STEP_S / stay_s))
    return values


def _two_states(rng: np.random.Generator, *, first_s: float, second_s: float) -> FloatArray:
    """0 and 1 in turn, each for an exponential time of that mean; begins in the first with its steady share."""
    values = np.empty(_NUM_STEPS)
    state = int(rng.uniform() >= first_s / (first_s + second_s))
    until = rng.exponential((first_s, second_s)[state])
    for i in range(_NUM_STEPS):
        while i * STEP_S >= until:
            state = 1 - state
            until += rng.exponential((first_s, second_s)[state])
        values[i] = state
    return values
