"""The drift test against its promises: alarms without drift are rare, real drift is found, and it ends."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator

import pytest

from ecotone.protocol.drift import Drift, DriftSettings, DriftWatch, Returned
from ecotone.schema import SchemaError

pytestmark = pytest.mark.pure

RATE = 0.02
Shares = Callable[[random.Random], Iterator[float]]


def binary(mean: float) -> Shares:
    """One decision a request."""

    def draw(dice: random.Random) -> Iterator[float]:
        while True:
            yield float(dice.random() < mean)

    return draw


def maps(mean: float, decisions: int = 49, correlation: float = 0.05) -> Shares:
    """Many decisions a request, alike within it."""
    spread = (1 - correlation) / correlation

    def draw(dice: random.Random) -> Iterator[float]:
        while True:
            hard = dice.betavariate(mean * spread, (1 - mean) * spread)
            yield sum(dice.random() < hard for _ in range(decisions)) / decisions

    return draw


def constant(mean: float) -> Shares:
    def draw(dice: random.Random) -> Iterator[float]:
        while True:
            yield mean

    return draw


def spiteful(mean: float) -> Shares:
    """Dependent on all before: bursts as long as they pay, each with the largest mean that the null allows."""

    def draw(dice: random.Random) -> Iterator[float]:
        last = 0.0
        while True:
            size = 1.0 if last else 0.3
            last = size if dice.random() < mean / size else 0.0
            yield last

    return draw


def until_alarm(shares: Iterator[float], settings: DriftSettings, rate: float = RATE, limit: int = 100_000) -> int:
    watch = DriftWatch(settings)
    for number, share in zip(range(1, limit + 1), shares, strict=False):
        if isinstance(watch.seen(share, rate), Drift):
            return number
    return limit


@pytest.mark.parametrize("draw", [binary, maps, constant, spiteful])
def test_false_alarms_are_as_far_apart_as_promised(draw):
    """With the mean at the very edge of the null the mean time to an alarm is at least A (and the bound is nearly sharp)."""
    apart, rounds = 150.0, 200
    settings = DriftSettings(margin=0.05, alarms_apart=apart)
    times = [until_alarm(draw(RATE)(random.Random(seed)), settings) for seed in range(rounds)]
    error = statistics.stdev(times) / math.sqrt(rounds) if draw is not constant else 0.0
    assert statistics.mean(times) >= apart - 2.6 * error
    assert statistics.mean(times) <= 8 * apart  # else the test above could not fail


def test_below_the_calibrated_rate_hardly_anything_is_raised():
    settings = DriftSettings(alarms_apart=1000.0)
    alarms = sum(until_alarm(maps(RATE / 3)(random.Random(seed)), settings, limit=2000) < 2000 for seed in range(20))
    assert alarms == 0


def divergence(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@pytest.mark.parametrize("after", [0.05, 0.1, 0.3, 0.9])
def test_drift_is_found_nearly_as_soon_as_by_one_who_knows_it(after):
    """Oracle: no test with such rare false alarms finds a change faster than log(A) / KL on average (Lorden 1971), and who
    knows both rates reaches that. Not knowing the second one costs at most a factor and a few comparisons."""
    settings = DriftSettings(margin=0.03, alarms_apart=5000.0)
    delays = [until_alarm(binary(after)(random.Random(seed)), settings) for seed in range(60)]
    best = math.log(settings.alarms_apart) / divergence(after, RATE)
    assert statistics.mean(delays) <= 1.6 * best + 5


def test_a_long_quiet_time_does_not_blunt_it():
    delays = []
    for seed in range(20):
        dice, watch = random.Random(seed), DriftWatch()
        quiet, loud = maps(RATE / 2)(dice), maps(0.1)(dice)
        for _ in range(1500):
            assert watch.seen(next(quiet), RATE) is None
        count = 1
        while not isinstance(found := watch.seen(next(loud), RATE), Drift):
            count += 1
        delays.append(count)
        assert found.expected == RATE
        assert found.observed > RATE
        assert found.num_compared <= count + 30  # the change is dated to about where it was
        assert found.after == watch.num_compared - found.num_compared
    assert statistics.mean(delays) < 40
    assert max(delays) < 120


def test_many_small_shares_are_found_within_a_few_comparisons():
    """49 tiles of which a tenth differ, where a fiftieth may: as good as certain after a handful of frames."""
    assert until_alarm(constant(0.1)(random.Random(0)), DriftSettings()) <= 12


def test_it_is_said_once_and_taken_back_when_it_is_over():
    dice, watch = random.Random(3), DriftWatch()
    loud, quiet = maps(0.2)(dice), maps(RATE / 2)(dice)
    notices = [watch.seen(next(loud), RATE) for _ in range(300)]
    assert [type(n) for n in notices if n is not None] == [Drift]
    assert watch.drift in notices
    back = [watch.seen(next(quiet), RATE) for _ in range(2000)]
    (returned,) = [n for n in back if n is not None]
    assert isinstance(returned, Returned)
    assert returned.observed < RATE
    assert watch.drift is None
    again = [watch.seen(next(loud), RATE) for _ in range(50)]
    assert [type(n) for n in again if n is not None] == [Drift]


def test_what_drifted_does_not_return_while_it_drifts():
    """At the edge, mean rate + margin, `Returned` comes once in `returns_apart` comparisons at most."""
    settings = DriftSettings(margin=0.05, returns_apart=1000.0)
    returned = 0
    for seed in range(20):
        dice, watch = random.Random(seed), DriftWatch(settings)
        for share, _ in zip(binary(RATE + 0.05)(dice), range(1500), strict=False):
            returned += isinstance(watch.seen(share, RATE), Returned)
    assert returned <= 20 * 1500 / 1000


def test_each_plan_is_held_to_its_own_rate():
    """A coarse plan may differ more often: with its own rate that is no drift, with that of the fine plan it is."""
    settings = DriftSettings(alarms_apart=2000.0)
    dice = random.Random(0)
    pairs = [(0.002, 0.004), (0.05, 0.1)] * 300
    watch = DriftWatch(settings)
    assert not any(watch.seen(next(maps(mean)(dice)), rate) for mean, rate in pairs)
    watch = DriftWatch(settings)
    assert any(watch.seen(next(maps(mean)(dice)), 0.004) for mean, _ in pairs)


def test_words_and_bounds():
    watch = DriftWatch()
    assert watch.recent == 0
    for _ in range(20):
        watch.seen(0.5, 0.0)
    assert watch.expected == watch.settings.least_rate
    assert watch.recent == 0.5
    assert "50.00% of decisions differ" in str(watch.drift)
    assert DriftWatch().seen(1.0, 1.0) is None  # a plan that may change all says nothing
    for share, rate in ((-0.1, 0.1), (0.1, 1.1), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="must lie in"):
            watch.seen(share, rate)
    for wrong in ({"margin": 0.0}, {"alarms_apart": 1.0}, {"least_rate": 1.0}):
        with pytest.raises(SchemaError, match="drift settings"):
            DriftSettings(**wrong)
