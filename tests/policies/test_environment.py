"""The environments keep Gymnasium's rules, mark their ends as they are, and say what is missing where it is."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import small_world as world

from ecotone.offload import PUBLISHED
from ecotone.policies import environment
from ecotone.policies.cells import Cells, World
from ecotone.policies.conditions import NAMES, scenario
from ecotone.policies.environment import CellVectorEnv, OnDemandVectorEnv, One, watts_of
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch
gymnasium = pytest.importorskip("gymnasium", reason="the extra `learn` is not installed")


def on_demand(copies: int = 1) -> OnDemandVectorEnv:
    return OnDemandVectorEnv(world.table(), [replace(scenario(n), num_requests=12) for n in NAMES], copies)


def cell(copies: int = 1, **knobs: object) -> CellVectorEnv:
    return CellVectorEnv(Cells(PUBLISHED["resnet18"], num_copies=copies, mean_tasks=30), **knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [on_demand, cell, lambda: cell(sees_channels=True)])
def test_gymnasiums_own_checker_has_nothing_to_say(make: object) -> None:
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(One(make()), skip_render_check=True)  # type: ignore[operator]


def test_a_stream_is_cut_off_and_a_cell_ends() -> None:
    """Requests go on for ever; a cell whose queues are empty does not, unless its episode's time is up before."""
    env = on_demand(3)
    env.reset(seed=1)
    for i in range(12):
        _, _, terminated, truncated, _ = env.step(np.zeros(3, dtype=np.int64))
        assert not terminated.any()
        assert truncated.all() == (i == 11)
    with pytest.raises(EcotoneError, match="reset"):
        env.step(np.zeros(3, dtype=np.int64))
    ends = {}
    for limit in (1, 100):
        cells = cell(2, limit=limit)
        cells.reset(seed=2)
        terminated = truncated = np.zeros(2, dtype=bool)
        for _ in range(100):
            if (terminated | truncated).any():
                break
            _, _, terminated, truncated, _ = cells.step((np.full((2, 5), 5), np.zeros((2, 5), dtype=int), np.ones((2, 5))))
        assert not (terminated & truncated).any()
        ends[limit] = (bool(terminated.any()), bool(truncated.any()))
    assert ends == {1: (False, True), 100: (True, False)}


def test_the_reward_of_a_slot_is_the_published_one() -> None:
    """All local: 10 tasks of 45.887 ms in 0.5 s each, energy 2.1454 W * 0.5 s each."""
    env = CellVectorEnv(Cells(PUBLISHED["resnet18"], num_copies=1), is_test=True, energy_weight=2.0)
    env.reset(seed=0)
    local = (np.full((1, 5), 5), np.zeros((1, 5), dtype=int), np.zeros((1, 5)))
    reward = env.step(local)[1]
    assert reward[0] == pytest.approx(-(0.5 + 2.0 * 2.1454 * 0.5) / 10)


def test_a_changing_cell_is_only_ever_cut_off() -> None:
    cells = Cells(PUBLISHED["vgg11"], num_copies=2, mean_tasks=2, world=World(batches_per_s=0.1, slots=4))
    env = CellVectorEnv(cells, limit=0)
    env.reset(seed=0)
    for slot in range(4):
        _, _, terminated, truncated, _ = env.step((np.zeros((2, 5), int), np.zeros((2, 5), int), np.ones((2, 5))))
        assert not terminated.any()
        assert truncated.all() == (slot == 3)


def test_power_shares_are_decades_or_proportional() -> None:
    share = np.array([0.0, 0.5, 1.0])
    assert watts_of(share, 2.0, 4.0) == pytest.approx([2e-4, 2e-2, 2.0])
    assert watts_of(share, 2.0, 0.0) == pytest.approx([0.0, 1.0, 2.0])


def test_without_gymnasium_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gymnasium", None)
    with pytest.raises(EcotoneError, match=r"ecotone\[learn\]"):
        on_demand()
    with pytest.raises(EcotoneError, match=r"ecotone\[learn\]"):
        cell()
