"""Who decides in a radio cell without learning, and how all of them are measured: local, raw, round robin, greedy, static.

    Fixed           one action for ever: all here, all raw at full power, or the best found (planner/uplink.py)
    RoundRobin      one point for all, full power, device i on channel (i + slot) mod C
    Greedy          each slot the action of best reward in this slot alone, by simulating it: devices in turn choose among
                    points, channels and powers while the others' choices stand, `rounds` times
    Trained         actors of hybrid.py, sampled as published or at their likeliest
A decision is (points, channels, power shares), arrays (E, N), as environment.CellVectorEnv takes them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ecotone.policies.actions import FloatArray
from ecotone.policies.cells import IntArray
from ecotone.policies.environment import CellVectorEnv, watts_of
from ecotone.policies.hybrid import Actors

__all__ = [
    "CellRule", "Costs", "Decision", "Fixed", "Greedy", "RoundRobin", "Trained", "local", "measure", "raw", "share_of",
]  # fmt: skip

Decision = tuple[IntArray, IntArray, FloatArray]
State = NDArray[np.float32]


class CellRule(Protocol):
    """Decides a slot for all copies."""

    def decide(self, env: CellVectorEnv, state: State) -> Decision: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Per task, means over episodes; the mean reward of a slot; tasks done an episode.

    `seconds` as published: whole slots of all devices until the last queue is empty. `own_seconds`: of a device that works.
    """

    seconds: float
    own_seconds: float
    joule: float
    reward: float
    finished: float

    def saved(self, of: Costs) -> tuple[float, float, float]:
        """Relative savings against `of`: seconds, own seconds, joules."""
        return 1 - self.seconds / of.seconds, 1 - self.own_seconds / of.own_seconds, 1 - self.joule / of.joule


def measure(env: CellVectorEnv, rule: CellRule, *, seed: int, max_slots: int = 4000) -> Costs:
    """One episode of every copy of `env` from `seed`; seconds are inf where one does not end within `max_slots`."""
    state, _ = env.reset(seed=seed)
    size, count = env.num_envs, 0
    going, slots, sums = np.ones(size, dtype=np.bool_), np.zeros(size), np.zeros((4, size))
    while going.any() and count < max_slots:
        state, reward, ended, cut, about = env.step(rule.decide(env, state))
        slots += going
        per_copy = (reward, *(about[name].sum(axis=1) for name in ("joule", "busy_s", "finished")))
        sums += going * np.stack(per_copy)
        going = going & ~(ended | cut)
        count += 1
    rewards, joule, busy, finished = sums.sum(axis=1).tolist()
    seconds = math.inf if going.any() else float(slots.sum()) * env.cells.slot_s * env.cells.num_devices / finished
    return Costs(
        seconds=seconds, own_seconds=busy / finished, joule=joule / finished, reward=rewards / float(slots.sum()),
        finished=finished / size,
    )  # fmt: skip


def share_of(watts: FloatArray, max_watt: float, decades: float) -> FloatArray:
    """The power shares that environment.watts_of turns into `watts`."""
    ratio = np.maximum(np.asarray(watts, dtype=np.float64) / max_watt, 1e-300)
    return np.clip(1.0 + np.log10(ratio) / decades, 0.0, 1.0) if decades else ratio


class Fixed:
    """Points, channels and watts of each device, (N,); what lies below the environment's least power takes that."""

    def __init__(self, points: tuple[int, ...], channels: tuple[int, ...], watts: tuple[float, ...]) -> None:
        self.points, self.channels, self.watts = np.array(points), np.array(channels), np.array(watts)

    def decide(self, env: CellVectorEnv, state: State) -> Decision:
        shape = (env.num_envs, env.cells.num_devices)
        share = share_of(self.watts, env.cells.max_watt, env.decades)
        return (
            np.broadcast_to(self.points, shape), np.broadcast_to(self.channels, shape), np.broadcast_to(share, shape)
        )  # fmt: skip


def local(num_devices: int, num_points: int) -> Fixed:
    """Everything on the devices."""
    return Fixed((num_points - 1,) * num_devices, (0,) * num_devices, (1e-10,) * num_devices)


def raw(num_devices: int, num_channels: int, max_watt: float) -> Fixed:
    """Every input uploaded at full power, channels shared out in turn."""
    channels = tuple(i % num_channels for i in range(num_devices))
    return Fixed((0,) * num_devices, channels, (max_watt,) * num_devices)


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """All leave at `point` with full power; channels go round."""

    point: int

    def decide(self, env: CellVectorEnv, state: State) -> Decision:
        shape = (env.num_envs, env.cells.num_devices)
        channels = (np.arange(shape[1]) + env.cells.slot[:, None]) % env.cells.radio.num_channels
        return np.full(shape, self.point), channels, np.ones(shape)


class Greedy:
    """See the file's docstring; for few copies, since each slot of each copy is simulated N * `rounds` times."""

    def __init__(self, rounds: int = 2, levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)) -> None:
        """`levels`: the power shares tried."""
        self._rounds, self._levels = rounds, levels

    def decide(self, env: CellVectorEnv, state: State) -> Decision:
        chosen = [self._one(env, row) for row in range(env.num_envs)]
        return tuple(np.stack(part) for part in zip(*chosen, strict=True))  # type: ignore[return-value]

    def _one(self, env: CellVectorEnv, row: int) -> tuple[IntArray, IntArray, FloatArray]:
        cells, count = env.cells, env.cells.num_devices
        points, channels = np.full(count, cells.num_points - 1), np.arange(count) % cells.radio.num_channels
        share = np.ones(count)
        options = np.array(list(itertools.product(range(cells.num_points), range(cells.radio.num_channels), self._levels)))
        for _, i in itertools.product(range(self._rounds), range(count)):
            many = [np.repeat(x[None], len(options), axis=0) for x in (points, channels, share)]
            for column, part in enumerate(many):
                part[:, i] = options[:, column]
            found = cells.repeated(row, len(options)).step(many[0], many[1], watts_of(many[2], cells.max_watt, env.decades))
            best = int(env.rewards(found).argmax())
            points[i], channels[i], share[i] = (part[best, i] for part in many)
        return points, channels, share


@dataclass(frozen=True, slots=True)
class Trained:
    """Trained actors."""

    actors: Actors
    sample: bool = True

    def decide(self, env: CellVectorEnv, state: State) -> Decision:
        return self.actors.decide(state, self.sample)
