"""The worlds of learned policies as Gymnasium environments: `OnDemandVectorEnv` (SAC-d), `CellVectorEnv` (MAHPPO).

Both are vector environments of many copies at once (no automatic reset: the learner resets who ended, by "reset_mask"), and
`One` makes an ordinary environment of a single copy, so any learner that speaks Gymnasium's interface can be tried. Ends are
marked as the interface asks: `terminated` where nothing can follow (a cell whose queues are empty), `truncated` where only
the episode's time is up (the learner should count on more). Random numbers come from TRAIN_SEED on: see conditions.py.
Gymnasium is part of the extra `learn`; importing this file needs it not, making an environment does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.policies.actions import ActionTable, FloatArray
from ecotone.policies.belief import FEATURES, HIGHEST, LOWEST, Ranges
from ecotone.policies.cells import BoolArray, Cells, IntArray, Slots
from ecotone.policies.conditions import TRAIN_SEED, Scenario, episodes
from ecotone.policies.stream import Reward, Stream, ranges_of
from ecotone.units import EcotoneError

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError:  # checked where one is made
    gymnasium = None  # type: ignore[assignment]

_Vector: Any = object if gymnasium is None else VectorEnv
_Single: Any = object if gymnasium is None else gymnasium.Env

__all__ = ["CellVectorEnv", "OnDemandVectorEnv", "One", "watts_of"]

MOST = 4.0  # no number of a cell's state is above


def _needs_gymnasium() -> None:
    if gymnasium is None:
        raise EcotoneError("environments and training need Gymnasium; pip install 'ecotone[learn]'")


class OnDemandVectorEnv(_Vector):  # type: ignore[misc]
    """Streams of requests (stream.py) in scenarios taken in turn, `num_envs` episodes of the same one at a time.

    Observation: belief.FEATURES. Action: index into `table`. Reward: equation 4 of stream.py. All copies end together.
    """

    def __init__(
        self,
        table: ActionTable,
        scenarios: Sequence[Scenario],
        num_envs: int,
        *,
        reward: Reward | None = None,
        ranges: Ranges | None = None,
    ) -> None:
        _needs_gymnasium()
        if not scenarios or num_envs < 1:
            raise EcotoneError("an environment needs at least one scenario and one copy")
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.table, self.scenarios, self.num_envs = table, tuple(scenarios), num_envs
        self.reward = reward or Reward()
        self.ranges = ranges or ranges_of(self.scenarios)
        self.single_observation_space = spaces.Box(LOWEST, HIGHEST, (len(FEATURES),), np.float32)
        self.single_action_space = spaces.Discrete(len(table))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._turn = 0
        self.stream: Stream | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """New episodes of the next scenario, for all copies."""
        super().reset(seed=seed, options=options)
        if seed is not None:
            self._turn = 0
        of, self._turn = self.scenarios[self._turn % len(self.scenarios)], self._turn + 1
        drawn = int(self.np_random.integers(TRAIN_SEED, 1 << 31))
        self.stream = Stream(self.table, episodes(of, drawn, self.num_envs), self.reward, self.ranges, seed=drawn)
        return self.stream.observe(), {}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """Decide one request of every copy."""
        if self.stream is None or self.stream.is_done:
            raise EcotoneError("the episodes are over; call reset first")
        found = self.stream.step(np.asarray(actions, dtype=np.intp))
        never, ends = np.zeros(self.num_envs, dtype=np.bool_), np.full(self.num_envs, self.stream.is_done)
        hit = found.latency_s <= self.stream.episodes.deadline_s
        return self.stream.observe(), found.reward, never, ends, {"latency_s": found.latency_s, "hit": hit}


def watts_of(share: FloatArray, max_watt: float, decades: float) -> FloatArray:
    """Transmit watts for shares in [0, 1]: `decades` below `max_watt` at 0, proportional where decades is 0."""
    found: FloatArray = max_watt * (10.0 ** (-decades * (1.0 - share)) if decades else share)
    return found


class CellVectorEnv(_Vector):  # type: ignore[misc]
    """Copies of a radio cell (cells.py); one joint action a slot: points, channels and power shares of the N devices.

    Observation: the published state of all devices, 4 N numbers, and with `sees_channels` N C more: what each device hears
    of the others on each channel. Reward: -(slot + weight * mean joules) / max(mean tasks finished, 0.8), as published.
    """

    def __init__(
        self,
        cells: Cells,
        *,
        energy_weight: float = 1.0,
        decades: float = 4.0,
        sees_channels: bool = False,
        limit: int | None = None,
        is_test: bool = False,
    ) -> None:
        """`limit`: slots after which an episode is truncated, by default the published share of its expected length."""
        _needs_gymnasium()
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.cells, self.num_envs, self.energy_weight, self.decades = cells, cells.num_copies, energy_weight, decades
        self.sees_channels, self.is_test = sees_channels, is_test
        self.limit = int(cells.mean_tasks * 0.15 / cells.slot_s) if limit is None else limit
        count, channels = cells.num_devices, cells.radio.num_channels
        width = count * (4 + (channels if sees_channels else 0))
        self.single_observation_space = spaces.Box(0.0, MOST, (width,), np.float32)
        self.single_action_space = spaces.Tuple(
            (
                spaces.MultiDiscrete([cells.num_points] * count),
                spaces.MultiDiscrete([channels] * count),
                spaces.Box(0.0, 1.0, (count,), np.float32),
            )
        )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _observe(self) -> NDArray[np.float32]:
        parts = [self.cells.state().reshape(self.num_envs, -1)]
        if self.sees_channels:
            parts.append(self.cells.channel_occupancy.reshape(self.num_envs, -1))
        return np.clip(np.concatenate(parts, axis=1), 0.0, MOST).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """New episodes, for the copies of options["reset_mask"] where that is given."""
        super().reset(seed=seed, options=options)
        drawn = TRAIN_SEED + seed if seed is not None else None
        self.cells.reset(drawn, (options or {}).get("reset_mask"), test=self.is_test)
        return self._observe(), {}

    def rewards(self, found: Slots) -> FloatArray:
        """The published reward of a slot, (E,)."""
        finished = np.maximum(found.finished.mean(axis=1), 0.8)
        reward: FloatArray = -(self.cells.slot_s + self.energy_weight * found.joule.mean(axis=1)) / finished
        return reward

    def step(
        self, actions: tuple[IntArray, IntArray, FloatArray]
    ) -> tuple[NDArray[np.float32], FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """One slot of every copy; actions are arrays (E, N) of points, channels and power shares."""
        points, channels, share = actions
        watts = watts_of(np.asarray(share, dtype=np.float64), self.cells.max_watt, self.decades)
        found = self.cells.step(np.asarray(points), np.asarray(channels), watts)
        reward = self.rewards(found)
        goes_on = bool(self.cells.world.slots)  # new tasks may come
        empty = np.zeros(self.num_envs, dtype=np.bool_) if goes_on else np.asarray(~self.cells.left.any(axis=1))
        over = np.asarray(self.cells.slot >= self.limit) if self.limit else found.is_done
        about = {"finished": found.finished, "joule": found.joule, "busy_s": found.busy_s}
        return self._observe(), reward, empty, np.asarray((over | found.is_done) & ~empty), about


class One(_Single):  # type: ignore[misc]
    """A vector environment of one copy as an ordinary environment."""

    def __init__(self, vector: OnDemandVectorEnv | CellVectorEnv) -> None:
        _needs_gymnasium()
        if vector.num_envs != 1:
            raise EcotoneError(f"an ordinary environment has one copy, this has {vector.num_envs}")
        self.vector = vector
        self.observation_space, self.action_space = vector.single_observation_space, vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed, options=options)
        observation, about = self.vector.reset(seed=seed)
        return observation[0], about

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        many = tuple(np.asarray(part)[None] for part in action) if isinstance(action, tuple) else np.asarray([action])
        observation, reward, ended, cut, about = self.vector.step(many)  # type: ignore[arg-type]
        return observation[0], float(reward[0]), bool(ended[0]), bool(cut[0]), {k: v[0] for k, v in about.items()}
