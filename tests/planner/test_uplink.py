"""The best fixed action of a radio cell: least powers against the formula and perturbation, groups against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ecotone.offload import PUBLISHED
from ecotone.planner.objective import PlannerError
from ecotone.planner.uplink import CellAction, Uplink, best_static, least_powers, model_actions
from ecotone.radio import Radio
from ecotone.simulator.cell import Cell, run_static

pytestmark = pytest.mark.pure


def mean_rate(i: int, power: np.ndarray, duty: np.ndarray, gain: np.ndarray, radio: Radio) -> float:
    """Equation 2 written out with radio.py's rates, bytes/s."""
    others, total = [j for j in range(len(power)) if j != i], 0.0
    for on in itertools.product((False, True), repeat=len(others)):
        share = math.prod(duty[j] if o else 1 - duty[j] for j, o in zip(others, on, strict=True))
        sending = np.zeros(len(power), dtype=bool)
        sending[i] = True
        sending[others] = on
        distance = gain ** (-1 / radio.path_loss_exponent)
        total += share * radio.rates_bytes_per_s(distance, power, np.zeros(len(power), dtype=np.intp), sending)[i]
    return total


@pytest.mark.parametrize("seed", range(20))
def test_least_powers_meet_every_need_and_none_can_be_less(seed: int) -> None:
    random, radio = np.random.default_rng(seed), Radio(num_channels=1)
    size = int(random.integers(1, 5))
    gain, duty = random.uniform(20, 80, size) ** -3, random.uniform(0.1, 0.6, size)
    need = random.uniform(0.05, 0.6, size) * 1e6 / size
    powers, can = least_powers(need[None], duty[None], gain[None], np.ones((1, size)), radio)
    if not can[0]:
        return
    power = powers[0]
    rates = np.array([mean_rate(i, power, duty, gain, radio) for i in range(size)])
    assert rates == pytest.approx(need, rel=1e-2)
    # A solution that is less anywhere does not exist: from any other feasible point the iteration's map never falls below.
    for _ in range(20):
        other = power * np.exp(0.2 * random.standard_normal(size))
        if all(mean_rate(i, other, duty, gain, radio) >= need[i] for i in range(size)):
            assert (other >= power * (1 - 1e-2)).all()


def test_least_powers_of_one_sender_are_shannon_s() -> None:
    powers, can = least_powers(np.array([[1.25e5]]), np.array([[0.5]]), np.array([[50.0**-3]]), np.array([[1.0]]), Radio())
    assert can[0]
    assert powers[0, 0] == pytest.approx((2**1.0 - 1) * 1e-9 * 50**3)  # 1 Mbit/s in 1 MHz: SNR 1


def test_needs_that_no_power_meets_are_refused() -> None:
    need = np.full((1, 3), 1.25e6)
    assert not least_powers(need, np.full((1, 3), 0.9), np.full((1, 3), 50.0**-3), np.ones((1, 3)), Radio())[1][0]


@pytest.mark.parametrize("unlike", [False, True])
def test_the_model_s_best_is_that_of_enumeration(unlike: bool) -> None:
    """Every point and channel for each of three devices, each channel priced alone, for the planner's period."""
    distances = (50.0, 30.0, 70.0) if unlike else (50.0,) * 3
    uplinks = [Uplink(profile=PUBLISHED["resnet18"], distance_m=d) for d in distances]
    radio = Radio(num_channels=2)
    found = model_actions(uplinks, radio, most=1)[0]
    profile, period_s, best = PUBLISHED["resnet18"], found.seconds, math.inf
    for points in itertools.product(range(6), repeat=3):
        for channels in itertools.product(range(2), repeat=3):
            joule = sum(profile.compute_s[p] * profile.compute_watt[p] for p in points)
            if any(profile.compute_s[p] > period_s for p in points):
                continue
            for channel in range(2):
                group = [i for i in range(3) if points[i] < 5 and channels[i] == channel]
                if not group:
                    continue
                spare = np.array([period_s - profile.compute_s[points[i]] for i in group])
                need = np.array([profile.payload_bytes[points[i]] for i in group]) / spare
                gain = np.array([distances[i] ** -3.0 for i in group])
                arrays = need[None], (spare / period_s)[None], gain[None], np.ones((1, len(group)))
                power, can = least_powers(*arrays, radio)
                joule += float((power[0] * spare).sum()) if can[0] else math.inf
            best = min(best, joule / 3)
    assert found.joule == pytest.approx(best, rel=1e-6)


def score_of(cell: Cell):
    def score(action: CellAction, limit_s: float) -> tuple[float, float]:
        most = math.ceil(min(limit_s, 0.3) * 200 / 0.5)
        tally = run_static(cell, action.points, action.channels, action.powers, max_slots=most)
        return (tally.s_per_task, tally.joule_per_task) if tally.is_done else (math.inf, math.inf)

    return score


@pytest.mark.parametrize(
    ("name", "ms", "mj", "num_scores"), [("resnet18", 40.0, 49.7, 80), ("mobilenetv2", 25.0, 33.0, 300)]
)  # the best static row known before, by random trials and hill climbing: ms + mJ
def test_the_best_static_action_is_at_least_as_good_as_the_one_known(
    name: str, ms: float, mj: float, num_scores: int
) -> None:
    cell = Cell(PUBLISHED[name])
    uplinks = [Uplink(profile=PUBLISHED[name])] * 5
    found = best_static(uplinks, cell.radio, score_of(cell), num_scores=num_scores)
    assert 1e3 * found.value(1.0) <= ms + mj
    assert (found.seconds, found.joule) == score_of(cell)(found, 1.0)
    here = run_static(cell, 5, 0, 1.0)
    assert found.value(1.0) < here.s_per_task + here.joule_per_task


def test_the_same_seed_finds_the_same_action() -> None:
    cell, uplinks = Cell(PUBLISHED["vgg11"], num_devices=2), [Uplink(profile=PUBLISHED["vgg11"])] * 2
    one, other = (best_static(uplinks, cell.radio, score_of(cell), num_scores=20, seed=3) for _ in range(2))
    assert one == other


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(PlannerError, match="without devices"):
        best_static([], Radio(), lambda action, limit: (0.0, 0.0))
