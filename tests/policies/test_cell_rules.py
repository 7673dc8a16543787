"""Rules of the radio cell: costs by hand, against the one cell, and the greedy one against every action of a slot."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ecotone.offload import PUBLISHED
from ecotone.policies.cell_rules import Fixed, Greedy, RoundRobin, Trained, local, measure, raw, share_of
from ecotone.policies.cells import Cells
from ecotone.policies.environment import CellVectorEnv, watts_of
from ecotone.policies.hybrid import Actors
from ecotone.simulator.cell import Cell, run_static

pytestmark = pytest.mark.torch
pytest.importorskip("gymnasium", reason="the extra `learn` is not installed")


def env(model: str = "resnet18", copies: int = 1, devices: int = 5, tasks: float = 200.0, **knobs: object) -> CellVectorEnv:
    cells = Cells(PUBLISHED[model], num_copies=copies, num_devices=devices, mean_tasks=tasks)
    return CellVectorEnv(cells, is_test=True, limit=0, **knobs)  # type: ignore[arg-type]


def test_local_costs_are_the_published_ones() -> None:
    """200 tasks of 45.887 ms end in slot 19 of 0.5 s: 47.5 ms a task as published, 98.446 mJ."""
    costs = measure(env(), local(5, 6), seed=0)
    assert costs.seconds == pytest.approx(0.0475)
    assert costs.own_seconds == pytest.approx(0.045887)
    assert costs.joule == pytest.approx(0.045887 * 2.1454)
    assert costs.finished == 1000
    assert costs.saved(costs) == (0.0, 0.0, 0.0)


def test_fixed_actions_cost_what_the_one_cell_says() -> None:
    points, channels, watts = (1, 2, 1, 5, 2), (0, 1, 1, 0, 0), (1.0, 0.3, 0.01, 1e-3, 0.05)
    found = measure(env("mobilenetv2"), Fixed(points, channels, watts), seed=0)
    expected = run_static(Cell(PUBLISHED["mobilenetv2"]), points, channels, watts)
    assert found.seconds == pytest.approx(expected.s_per_task)
    assert found.joule == pytest.approx(expected.joule_per_task)


def test_shares_and_watts_are_inverse() -> None:
    watts = np.array([1e-3, 0.02, 0.5, 2.0])
    for decades in (0.0, 4.0):
        assert watts_of(share_of(watts, 2.0, decades), 2.0, decades) == pytest.approx(watts)
    assert share_of(np.array([1e-9]), 1.0, 4.0) == 0.0


def test_channels_go_round() -> None:
    one = env(copies=2)
    one.reset(seed=0)
    first = RoundRobin(2).decide(one, one._observe())
    one.step(first)
    second = RoundRobin(2).decide(one, one._observe())
    assert first[1].tolist() == [[0, 1, 0, 1, 0]] * 2
    assert second[1].tolist() == [[1, 0, 1, 0, 1]] * 2
    assert (first[0] == 2).all()
    assert (first[2] == 1.0).all()


def test_raw_upload_of_many_never_ends_in_time() -> None:
    costs = measure(env(), raw(5, 2, 1.0), seed=0, max_slots=30)
    assert costs.seconds == float("inf")
    assert costs.own_seconds > 0.5


def test_greedy_with_two_devices_is_the_best_pair_it_can_reach() -> None:
    """No single change of a device improves the slot (a Nash point), and the state was not touched by trying."""
    one = env(devices=2, tasks=40, decades=4.0)
    one.reset(seed=0)
    before = one.cells.state()
    greedy = Greedy(rounds=4, levels=(1.0, 0.5))
    points, channels, share = greedy.decide(one, one._observe())
    assert np.array_equal(before, one.cells.state())

    def reward(p: list[int], c: list[int], s: list[float]) -> float:
        trial = one.cells.repeated(0, 1)
        return float(one.rewards(trial.step(np.array([p]), np.array([c]), watts_of(np.array([s]), 1.0, 4.0)))[0])

    chosen = reward(points[0].tolist(), channels[0].tolist(), share[0].tolist())
    for i, p, c, s in itertools.product(range(2), range(6), range(2), (1.0, 0.5)):
        other = [points[0].tolist(), channels[0].tolist(), share[0].tolist()]
        for part, value in zip(other, (p, c, s), strict=True):
            part[i] = value
        assert reward(*other) <= chosen + 1e-12


def test_actors_decide_sampled_or_at_their_likeliest() -> None:
    one = env(copies=3)
    one.reset(seed=0)
    actors = Actors(20, 5, 6, 2, hidden=8)
    certain = [Trained(actors, sample=False).decide(one, one._observe()) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*certain, strict=True))
    points, channels, share = Trained(actors).decide(one, one._observe())
    assert points.shape == channels.shape == share.shape == (3, 5)
    assert ((share > 0) & (share < 1)).all()
