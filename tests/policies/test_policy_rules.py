"""Rules of the on-demand world: against enumeration, and in the shapes that their papers promise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import small_world as world
from scipy.stats import t as student

from ecotone.policies.actions import ActionTable
from ecotone.policies.changepoint import ChangePoints
from ecotone.policies.conditions import Episodes, Scenario, episodes, scenario
from ecotone.policies.rules import (
    EdgentDynamic,
    EdgentStatic,
    Fixed,
    Greedy,
    Resolving,
    best_static,
    clairvoyant,
    play,
    static_rewards,
)
from ecotone.policies.stream import Stream

pytestmark = pytest.mark.torch  # rules can hold a network, so the file loads torch


def test_change_points_against_every_way_to_cut_the_series() -> None:
    """The posterior of the run length from all 2^n sequences of changes, each segment by its product of predictives."""
    prior, expected = (0.0, 1.0, 1.0, 1.0), 5.0
    samples = [0.1, -0.2, 5.0, 5.2, 4.9, 5.1]

    def segment(values: list[float]) -> float:
        m, k, a, b = prior
        density = 1.0
        for x in values:
            density *= student.pdf(x, 2 * a, loc=m, scale=math.sqrt(b * (k + 1) / (a * k)))
            b += k * (x - m) ** 2 / (2 * (k + 1))
            m, k, a = (k * m + x) / (k + 1), k + 1, a + 0.5
        return density

    weights = np.zeros(len(samples) + 1)
    for changes in itertools.product((0, 1), repeat=len(samples)):
        chance, run = 1.0, []
        for x, changed in zip(samples, changes, strict=True):
            run.append(x)
            chance *= 1 / expected if changed else 1 - 1 / expected
            if changed:
                chance, run = chance * segment(run), []
        weights[len(run)] += chance * segment(run)
    found = ChangePoints(2, *prior, expected=expected, longest=16)
    for x in samples:
        found.see(np.array([x, 0.0]), np.array([True, False]))
    assert found.run[0, : len(weights)] == pytest.approx(weights / weights.sum())
    assert found.run[1, 0] == 1.0
    run, mean = found.likeliest()
    assert run[0] == 4  # the change was before the third sample
    assert mean[0] == pytest.approx(sum(samples[2:]) / 5)  # the prior's mean weighs as one sample


def steady(rate: float, deadline_s: float, count: int = 3) -> Episodes:
    """One episode of requests far apart at a rate that stays."""
    of = Scenario(name="stationary", num_requests=count, one_way_s=0.002, is_fresh=True, noise=0.0, period_s=1.0)
    grid = np.full((1, 100), rate)
    ones = np.ones_like(grid)
    return Episodes(
        scenario=of, step_s=0.05, arrival_s=np.arange(1.0, count + 2.0)[None], deadline_s=np.array([deadline_s]),
        rate_bytes_per_s=grid, one_way_s=0.002 * ones, device_load=ones, server_load=ones,
    )  # fmt: skip


def edgent(table: ActionTable, rate: float, deadline_s: float) -> tuple[str, int]:
    chosen = int(play(EdgentStatic(), table, steady(rate, deadline_s)).actions[0, 0])
    return table.exits[chosen], table.cuts[chosen]


@pytest.mark.parametrize("rate", [3e4, 1e5, 1e6, 1e7])
def test_edgent_takes_the_deepest_exit_that_some_cut_makes_in_time(rate: float) -> None:
    """Enumerated from the table: int8 is its uncompressed form here; too tight a deadline leaves the fastest plan."""
    table = world.table()
    latency = table.latency_s(rate, 0.002, 1.0, 1.0)
    whole = [i for i, codec in enumerate(table.codecs) if codec != "int4"]
    for deadline_s in (0.004, 0.008, 0.012, 0.02, 0.04, 0.08):
        best = {e: min((i for i in whole if table.exits[i] == e), key=lambda i: latency[i]) for e in ("", "early")}
        in_time = [e for e in ("", "early") if latency[best[e]] <= deadline_s]
        expected = best[in_time[0]] if in_time else min(whole, key=lambda i: latency[i])
        assert edgent(table, rate, deadline_s) == (table.exits[expected], table.cuts[expected])


def test_a_loose_deadline_gives_the_whole_network_and_a_tight_one_an_early_exit() -> None:
    table = world.table()
    assert edgent(table, 3e4, 1.0)[0] == ""
    assert edgent(table, 3e4, 0.015) == ("early", -1)


def test_the_map_is_read_again_when_the_bandwidth_changes_and_only_then() -> None:
    """Fast for 20 requests, then slow: dynamic equals itself on a constant trace, and leaves the server behind."""
    table, calm = world.table(), steady(1e7, 0.05, count=40)
    constant = play(EdgentDynamic(), table, calm).actions[0]
    assert len(set(constant.tolist())) == 1
    falling = replace(calm, rate_bytes_per_s=np.repeat([[1e7, 3e3]], 500, axis=1), step_s=0.021 * 2)
    found = play(EdgentDynamic(), table, falling)
    assert table.cuts[found.actions[0, 0]] >= 0
    assert table.cuts[found.actions[0, -1]] == -1
    static = play(EdgentStatic(), table, falling)
    assert found.mean_reward > static.mean_reward


def test_best_static_is_the_best_of_all_played_one_by_one() -> None:
    table = world.table()
    test = episodes(replace(scenario("fading"), num_requests=20, deadlines_s=(0.02, 0.05)), 5, 8)
    alone = np.stack([play(Fixed(i, {}), table, test).reward.mean(axis=1) for i in range(len(table))], axis=1)
    assert static_rewards(table, test) == pytest.approx(alone)
    best = best_static(table, test)
    for deadline_s in (0.02, 0.05):
        own = alone[test.deadline_s == deadline_s].mean(axis=0)
        assert own[best.by_deadline[deadline_s]] == pytest.approx(own.max())


def test_solving_again_is_the_oracle_where_all_is_known_and_nothing_waits() -> None:
    table, test = world.table(), episodes(replace(scenario("stationary"), num_requests=10), 7, 16)
    assert play(Resolving(), table, test).mean_reward == pytest.approx(play(Greedy(), table, test).mean_reward)


def test_greedy_is_the_largest_reward_of_the_next_request() -> None:
    table, test = world.table(), episodes(replace(scenario("load"), num_requests=6), 1, 8)
    stream, rule = Stream(table, test), Greedy()
    rule.begin(stream)
    while not stream.is_done:
        chosen = rule.decide(stream)
        every = np.stack([stream.outcomes(np.full(8, i)).reward for i in range(len(table))])
        assert stream.step(chosen).reward == pytest.approx(every.max(axis=0))


def test_clairvoyance_is_enumeration_on_a_short_day() -> None:
    """All 4^4 schedules of four requests that queue up, on a copy of the table with four actions."""
    full = world.table()
    kept = [i for i, codec in enumerate(full.codecs) if codec != "int4"][:4]
    few = replace(
        full, plans=tuple(full.plans[i] for i in kept), exits=tuple(full.exits[i] for i in kept),
        depths=tuple(full.depths[i] for i in kept), cuts=tuple(full.cuts[i] for i in kept),
        codecs=tuple(full.codecs[i] for i in kept),
        **{n: getattr(full, n)[kept] for n in ("head_s", "up_bytes", "tail_s", "down_bytes", "back_s", "accuracy")},
    )  # fmt: skip
    of = replace(scenario("queue"), num_requests=4, period_s=0.008, deadlines_s=(0.03, 0.07))
    test = episodes(of, 2, 6)
    schedules = np.array(list(itertools.product(range(4), repeat=4)))
    best = np.full(6, -math.inf)
    for schedule in schedules:
        stream, total = Stream(few, test), np.zeros(6)
        for number in schedule:
            total += stream.step(np.full(6, number)).reward
        best = np.maximum(best, total / 4)
    assert clairvoyant(few, test, buckets=32, step_s=0.002) == pytest.approx(best, abs=1e-9)
    assert (clairvoyant(few, test) <= best + 1e-9).all()
    assert (clairvoyant(few, test) >= play(Greedy(), few, test).reward.mean(axis=1) - 1e-9).all()
