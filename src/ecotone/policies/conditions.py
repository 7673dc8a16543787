"""Episodes of a device's day: when requests come and by when they are due, how fast link and machines are meanwhile.

A scenario is a small stochastic model with a seed; `episodes(scenario, seed, size)` draws many at once as arrays over a
grid of time. Hidden means that the device is told late or not at all (see Scenario): then it must act on what it remembers.

    stationary   rate, loads and deadline fixed within an episode; requests come one by one; all is observed as it is
    traces       a quarter of the rates of simulator/linkmodels.py: train, cable modem, warehouse, walking away; hidden
    fading       the rate wanders by 6 dB within a third of a second around a mean of its own; hidden
    bursts       cross traffic takes nine tenths of the link for some 0.3 s, every second or so; hidden
    load         the server is shared: alone, or seven times slower, for about a second each; hidden
    queue        requests come as a Poisson process, faster than the slower actions; nothing else is hidden

Learners train on seeds from TRAIN_SEED on, all that is reported is of seeds below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ecotone.policies.actions import FloatArray
from ecotone.simulator import linkmodels
from ecotone.units import EcotoneError

__all__ = ["HIDDEN", "NAMES", "TRAIN_SEED", "Episodes", "Scenario", "episodes", "scenario"]

TRAIN_SEED = 1_000_000
STEP_S = 0.05
_MBIT = 1e6 / 8
_TRACES = ("walking_away", "lte_train", "evening_uplink", "warehouse_wifi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What kind of episode, and what the device sees of it.

    `is_fresh`: the device knows rate and loads as they are; else it learns them from its own requests once they are
    answered, with a relative error of `noise`, and by a probe of the link after `probe_s` without one.
    """

    name: str
    num_requests: int = 200
    period_s: float = 0.1  # between requests, on average
    is_poisson: bool = False
    deadlines_s: tuple[float, ...] = (0.007, 0.010, 0.015, 0.025, 0.040)
    rates_bytes_per_s: tuple[float, float] = (0.3 * _MBIT, 20 * _MBIT)  # of an episode's mean
    device_load: float = 1.5  # at most, where it is drawn
    server_load: float = 7.0
    one_way_s: float = 0.0015
    is_fresh: bool = False
    noise: float = 0.05
    probe_s: float = 0.5
    trace_share: float = 0.25  # of the rates of simulator/linkmodels.py that is ours

    def __post_init__(self) -> None:
        ok = self.num_requests > 0 and self.period_s > 0 and self.deadlines_s and min(self.deadlines_s) > 0
        ok = ok and 0 < self.rates_bytes_per_s[0] <= self.rates_bytes_per_s[1] and self.one_way_s >= 0 and self.noise >= 0
        if not ok or min(self.device_load, self.server_load) < 1 or self.probe_s <= 0:
            raise EcotoneError(f"scenario {self.name}: requests, times and rates must be above zero, loads at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """M episodes of N requests, and one more that is only seen, on a grid of G steps of `step_s`; the last one goes on."""

    scenario: Scenario
    step_s: float
    arrival_s: FloatArray  # (M, N + 1), ascending
    deadline_s: FloatArray  # (M,)
    rate_bytes_per_s: FloatArray  # (M, G), may be 0
    one_way_s: FloatArray  # (M, G)
    device_load: FloatArray  # (M, G)
    server_load: FloatArray  # (M, G)

    def __len__(self) -> int:
        return len(self.deadline_s)


Rng = np.random.Generator


def scenario(name: str) -> Scenario:
    """The scenario of that name (one of NAMES); EcotoneError for another."""
    if name not in _SCENARIOS:
        raise EcotoneError(f"scenario {name!r} is not known; known are {', '.join(NAMES)}")
    return _SCENARIOS[name]


def episodes(of: Scenario, seed: int, size: int) -> Episodes:
    """`size` episodes of a scenario; equal for equal arguments."""
    rng = np.random.default_rng([seed, NAMES.index(of.name)])
    count = (size, of.num_requests + 1)
    gaps = rng.exponential(of.period_s, count) if of.is_poisson else np.full(count, of.period_s)
    arrival = np.cumsum(gaps, axis=1)
    steps = math.ceil((float(arrival[:, -1].max()) + 2.0) / STEP_S)
    low, high = np.log(of.rates_bytes_per_s)
    mean = np.exp(rng.uniform(low, high, (size, 1)))
    deadline = rng.choice(of.deadlines_s, size)
    device = np.repeat(rng.uniform(1.0, of.device_load, (size, 1)), steps, axis=1)
    shape = (size, steps)
    rate, one_way = _LINKS.get(of.name, _steady)(rng, shape, mean, of)
    if of.name == "load":
        server = 1.0 + (of.server_load - 1.0) * _two_states(rng, shape, 1.2, 0.8)
    else:
        server = np.repeat(np.exp(rng.uniform(0.0, math.log(of.server_load) / 2, (size, 1))), steps, axis=1)
    return Episodes(
        scenario=of, step_s=STEP_S, arrival_s=arrival, deadline_s=deadline, rate_bytes_per_s=rate, one_way_s=one_way,
        device_load=device, server_load=server,
    )  # fmt: skip


def _steady(rng: Rng, shape: tuple[int, int], mean: FloatArray, of: Scenario) -> tuple[FloatArray, FloatArray]:
    return np.repeat(mean, shape[1], axis=1), np.full(shape, of.one_way_s)


def _fading(rng: Rng, shape: tuple[int, int], mean: FloatArray, of: Scenario) -> tuple[FloatArray, FloatArray]:
    """Log-normal, 6 dB, correlated over 0.35 s."""
    keeps, spread = math.exp(-STEP_S / 0.35), 6.0 * math.log(10) / 10
    values, noise = np.empty(shape), rng.normal(0.0, spread, shape)
    values[:, 0] = noise[:, 0]
    for i in range(1, shape[1]):
        values[:, i] = keeps * values[:, i - 1] + math.sqrt(1 - keeps**2) * noise[:, i]
    return mean * np.exp(values), np.full(shape, of.one_way_s)


def _bursts(rng: Rng, shape: tuple[int, int], mean: FloatArray, of: Scenario) -> tuple[FloatArray, FloatArray]:
    """On for about 0.3 s with a tenth of the rate, off for about a second; gamma times, so the next burst can be guessed."""
    busy = _two_states(rng, shape, 1.0, 0.3, order=6)
    return mean * np.where(busy > 0, 0.1, 1.0), np.where(busy > 0, 2 * of.one_way_s, of.one_way_s)


def _traces(rng: Rng, shape: tuple[int, int], mean: FloatArray, of: Scenario) -> tuple[FloatArray, FloatArray]:
    """Rate and latency of a model of a link each, from a random moment on."""
    rates, latencies = np.empty(shape), np.empty(shape)
    for i in range(shape[0]):
        trace = linkmodels.make(_TRACES[i % len(_TRACES)], int(rng.integers(1 << 31)))
        at = (np.arange(shape[1]) * STEP_S + rng.uniform(0, trace.duration_s)) % trace.duration_s
        index = np.searchsorted([p.time_s for p in trace.points], at, side="right") - 1
        rates[i] = np.array([p.bytes_per_s for p in trace.points])[index] * of.trace_share
        latencies[i] = np.array([p.latency_s for p in trace.points])[index]
    return rates, np.minimum(latencies, 2 * of.one_way_s)


def _two_states(rng: Rng, shape: tuple[int, int], first_s: float, second_s: float, order: int = 1) -> FloatArray:
    """0 and 1 in turn, each for a gamma time of that mean and `order` (1: exponential), begun at a random moment."""
    duration_s = shape[1] * STEP_S
    count = 2 * math.ceil(2 + 2 * duration_s / (first_s + second_s)) + 20
    means = np.where(np.arange(count) % 2 == 0, first_s, second_s)
    ends = np.cumsum(rng.gamma(order, means / order, (shape[0], count)), axis=1)
    ends -= rng.uniform(0.0, first_s + second_s, (shape[0], 1))
    times = np.arange(shape[1]) * STEP_S
    passed: NDArray[np.int64] = (ends[:, :, None] <= times[None, None, :]).sum(axis=1)
    found: FloatArray = (passed % 2).astype(np.float64)
    return found


_LINKS: dict[str, Callable[[Rng, tuple[int, int], FloatArray, Scenario], tuple[FloatArray, FloatArray]]] = {
    "traces": _traces, "fading": _fading, "bursts": _bursts,
}  # fmt: skip
_PLAIN = Scenario(name="stationary", is_fresh=True, noise=0.0)
_SCENARIOS = {
    one.name: one
    for one in (
        _PLAIN,
        Scenario(name="traces", period_s=0.1),
        Scenario(name="fading", period_s=0.05),
        Scenario(name="bursts", period_s=0.05),
        Scenario(name="load", period_s=0.05),
        replace(_PLAIN, name="queue", period_s=0.02, is_poisson=True, deadlines_s=(0.025, 0.040, 0.080)),
    )
}
NAMES = tuple(_SCENARIOS)
HIDDEN = ("traces", "fading", "bursts", "load")
