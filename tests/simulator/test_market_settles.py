"""Users that choose for themselves: moves end, nobody can do better alone, and what is lost against the joint optimum."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ecotone.planner.choosing import choose_all
from ecotone.planner.congestion import Congestion
from ecotone.simulator.market import _Fair, offered, settle

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "planner"))
from crowds import crowd

pytestmark = pytest.mark.pure


def own_costs(problem: Congestion, choice: np.ndarray, user: int) -> tuple[np.ndarray, np.ndarray]:
    """For each offer of a user: its own latency, and the joint value, inf where loads do not fit."""
    seconds, fits = problem.alternatives(choice, user)
    values = np.where(fits, [problem.value_of(row) for row in seconds], math.inf)
    return np.where(fits, seconds[:, user], math.inf), values


@pytest.mark.parametrize("seed", range(6))
def test_with_prices_every_move_makes_the_joint_value_less_and_none_is_left(seed: int) -> None:
    problem = crowd(np.random.default_rng(seed), 12, 4, 2, rate=8.0)
    found = settle(problem, seed=seed)
    assert found.is_quiet
    assert not problem.violations(found.choice)
    assert (found.choice >= 0).all()
    assert len(found.trail) == found.num_moves
    for (before, value), (after, less) in pairwise(found.trail):
        assert after in (before, before + 1)
        assert after > before or less < value  # a user comes in, or one moves
    for user in range(12):
        _, values = own_costs(problem, found.choice, user)
        assert problem.value(found.choice) <= values.min() * (1 + 1e-5), "a Nash equilibrium of the potential"


@pytest.mark.parametrize("seed", range(4))
def test_alike_selfish_users_end_where_nobody_can_do_better_for_himself(seed: int) -> None:
    """Alike on every queue: Rosenthal's potential is there, so moves end."""
    problem = crowd(np.random.default_rng(seed), 10, 3, 2, rate=6.0, alike=True)
    found = settle(problem, is_selfish=True, seed=seed)
    assert found.is_quiet
    for user in range(10):
        seconds, _ = own_costs(problem, found.choice, user)
        assert problem.latencies(found.choice)[user] <= seconds.min() * (1 + 1e-5)


def test_prices_come_close_to_the_optimum_and_selfishness_need_not() -> None:
    """Against the proven optimum of small problems: the mean loss over eight of them, and never better than the optimum."""
    losses: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(8):
        problem = crowd(np.random.default_rng(seed), 6, 4, 2, rate=10.0)
        best = choose_all(problem)
        assert best.is_exact
        for is_selfish, found in losses.items():
            end = settle(problem, is_selfish=is_selfish, seed=seed)
            assert end.is_quiet
            found.append(problem.value(end.choice) / best.value - 1)
    assert min(losses[False] + losses[True]) >= -1e-9
    assert np.mean(losses[False]) <= 0.01
    assert np.mean(losses[False]) <= np.mean(losses[True])
    assert max(losses[True]) >= 0.05  # one of them shows what prices are for


def test_nothing_is_promised_twice_where_messages_are_late() -> None:
    """More users than the servers take, all at once: loads never pass the limit, and those that find no place know it."""
    base = crowd(np.random.default_rng(3), 20, 3, 2, rate=40.0)
    parties = tuple(
        type(p)(name=p.name, offers=p.offers[1:], rate_per_s=p.rate_per_s, weight=p.weight) for p in base.parties
    )  # nobody can stay at home
    problem = Congestion(parties=parties, queues=base.queues)
    found = settle(problem, seed=1, delay_s=0.05)
    assert found.is_quiet
    assert 0 < (found.choice >= 0).sum() < 20
    assert not problem.violations(found.choice)


@pytest.mark.parametrize("loss", [0.05, 0.2])
def test_lost_messages_leave_keepers_and_choosers_agreed(loss: float) -> None:
    problem = crowd(np.random.default_rng(5), 10, 4, 2, rate=8.0)
    fair = _Fair(problem, False, 0.01, loss, np.random.default_rng(2), 200)
    found = fair.run(120.0)
    assert found.is_quiet
    for queue, keeper in fair.keepers.items():
        expected = {
            name: chooser.offers[chooser.offer].parts[queue]
            for name, chooser in fair.choosers.items()
            if chooser.offer >= 0 and queue in chooser.offers[chooser.offer].parts
        }
        assert {name: part for name, (part, _) in keeper.parts.items()} == expected
    assert not problem.violations(found.choice)


def test_offers_of_a_chooser_add_up_to_the_joint_form() -> None:
    problem = crowd(np.random.default_rng(7), 3, 4, 2)
    for user in range(3):
        rows = problem.rows[user]
        for o, offer in enumerate(offered(problem, user)):
            assert sum(p.load for p in offer.parts.values()) == pytest.approx(rows.load[o].sum())
            assert offer.alone_s == rows.alone[o]


def test_the_same_seed_settles_alike() -> None:
    problem = crowd(np.random.default_rng(9), 8, 3, 2, rate=8.0)
    one, other = settle(problem, seed=4), settle(problem, seed=4)
    assert one.choice.tolist() == other.choice.tolist()
    assert one.trail == other.trail
