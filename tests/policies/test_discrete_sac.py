"""The learners find what is known to be best on a tiny decision process, and say what they need."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from ecotone.policies.discrete_sac import DqnSettings, SacSettings, learning_parts, train_dqn, train_sac
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch
spaces = pytest.importorskip("gymnasium", reason="the extra `learn` is not installed").spaces
pytest.importorskip("torchrl", reason="the extra `learn` is not installed")


class Corridor:
    """Two rooms, three actions; in room 0: stay for 0.3, go to room 1 for 0, or nothing; in room 1: 1 and back to room 0.

    With gamma 0.9 going pays 0.9 / (1 - 0.81) = 4.7, staying 0.3 / 0.1 = 3; with gamma 0 staying does. Cut off every 8
    steps, which must not count as an end.
    """

    def __init__(self, copies: int = 16) -> None:
        self.num_envs = copies
        self.single_observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self.single_action_space = spaces.Discrete(3)
        self.room, self.time = np.zeros(copies, dtype=int), 0

    def observe(self) -> np.ndarray[Any, Any]:
        return np.eye(2, dtype=np.float32)[self.room]

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        self.room, self.time = np.arange(self.num_envs) % 2, 0
        return self.observe(), {}

    def step(self, actions: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        reward = np.where(self.room == 1, 1.0, np.where(actions == 0, 0.3, 0.0))
        self.room = np.where(self.room == 1, 0, (actions == 1).astype(int))
        self.time += 1
        never = np.zeros(self.num_envs, dtype=bool)
        return self.observe(), reward, never, np.full(self.num_envs, self.time == 8), {}


def choice(network: torch.nn.Module) -> int:
    with torch.no_grad():
        return int(network(torch.tensor([[1.0, 0.0]])).argmax())


SMALL: dict[str, Any] = {
    "updates": 200, "steps_per_update": 4, "warm_up": 256, "batch": 64, "buffer": 4000, "hidden": (16,), "rate": 5e-3,
    "tau": 0.05,
}  # fmt: skip


@pytest.mark.parametrize(("gamma", "best"), [(0.9, 1), (0.0, 0)])
def test_both_learners_weigh_what_follows(gamma: float, best: int) -> None:
    assert choice(train_sac(Corridor(), SacSettings(gamma=gamma, entropy=0.2, **SMALL))) == best  # type: ignore[arg-type]
    if gamma:
        assert choice(train_dqn(Corridor(), DqnSettings(gamma=gamma, **SMALL))) == best  # type: ignore[arg-type]


def test_equal_seeds_give_equal_weights_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    few = SMALL | {"updates": 100, "batch": 16}
    first, again, other = (
        train_sac(Corridor(), SacSettings(seed=seed, **few), lambda done, of, _: told.append((done, of)))  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    )
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert told == [(100, 100)] * 3


def test_without_torchrl_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrl.objectives", None)
    with pytest.raises(EcotoneError, match=r"ecotone\[learn\]"):
        learning_parts("torchrl.objectives")
