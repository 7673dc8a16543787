"""M devices at once, each with its requests in order: one decision a request, three queues (device, link, server).

Legend: request i of device m comes at a and is due at a + D. Its decision falls at t = max(a, device free): requests wait
their turn at the device. With action (h, B, t, b, z) of actions.py and loads u, rate r as the episode has them:

 (1) device until   d = t + u_d(t) h;   nothing crosses: the request is done at d
 (2) link until     l = the moment when the link has carried B bytes since max(d, link free)
 (3) server until   s = max(l + a(l), server free) + u_s h_s;   done at  s + a + b / r + u_d z
 (4) reward         accuracy where  latency = done - a <= D,  else  -min(k (latency / D - 1), worst)

So a decision changes later ones through the queues alone. The device learns of link and server when an answer is there, or
by a probe; `outcomes` is the truth, for oracles. O(M) numpy work a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone.policies.actions import ActionTable, FloatArray
from ecotone.policies.belief import HIGHEST, LOWEST, Belief, Ranges
from ecotone.policies.conditions import Episodes, Scenario

__all__ = ["Clocks", "Outcome", "Reward", "Stream", "ranges_of"]

_PENDING = 64  # answers under way that are remembered, a device


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """Equation 4's constants; published without numbers."""

    k: float = 1.0
    worst: float = 4.0


@dataclass(frozen=True, slots=True)
class Clocks:
    """When device, link and server are free again, (M, ...)."""

    device_s: FloatArray
    link_s: FloatArray
    server_s: FloatArray


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an action leads to: the clocks after it, its latency and reward, and what it showed of link and server."""

    after: Clocks
    latency_s: FloatArray
    reward: FloatArray
    sent_s: FloatArray  # seconds on the link


def ranges_of(scenarios: Sequence[Scenario]) -> Ranges:
    """Ranges that fit all of `scenarios`."""
    every = tuple(scenarios)
    rates, deadlines = [r for of in every for r in of.rates_bytes_per_s], [d for of in every for d in of.deadlines_s]
    return Ranges(
        rate_bytes_per_s=(min(rates), max(rates)), deadline_s=(min(deadlines) / 1.25, max(deadlines) * 1.25),
        round_trip_s=8 * max(of.one_way_s for of in every), load=max(max(of.device_load, of.server_load) for of in every),
        queue=10.0, age_s=2 * max(of.probe_s for of in every),
    )  # fmt: skip


class Stream:
    """`episodes` played with the actions of `table`: `observe`, `step`, until `is_done`. `seed`: of measurement errors."""

    def __init__(
        self,
        table: ActionTable,
        episodes: Episodes,
        reward: Reward | None = None,
        ranges: Ranges | None = None,
        seed: int = 0,
    ) -> None:
        self.table, self.episodes = table, episodes
        self.reward, self.ranges = reward or Reward(), ranges or ranges_of((episodes.scenario,))
        size = len(episodes)
        self._rows = np.arange(size)
        steps = episodes.rate_bytes_per_s
        self._carried = np.concatenate([np.zeros((size, 1)), np.cumsum(steps * episodes.step_s, axis=1)], axis=1)
        self._stride = float(self._carried.max()) * 1.01 + 1.0
        self._flat = (self._carried[:, :-1] + self._rows[:, None] * self._stride).ravel()
        self._last_rate = np.maximum(steps[:, -1], np.maximum(steps.mean(axis=1), 1.0))
        self._rng = np.random.default_rng([seed, size])
        self.index = 0
        zero = np.zeros(size)
        self.clocks = Clocks(zero, zero.copy(), zero.copy())
        self.now_s = episodes.arrival_s[:, 0].copy()
        self.belief = Belief(size, self._at(steps, self.now_s), self._at(episodes.one_way_s, self.now_s))
        self._due_s = np.full((size, _PENDING), np.inf)  # when the answer is there
        self._shown = np.zeros((size, _PENDING, 3))  # rate, one way, server load; rate 0: local
        self._look()

    # ---- the truth -----------------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        return self.index >= self.episodes.scenario.num_requests

    def _at(self, grid: FloatArray, when_s: FloatArray) -> FloatArray:
        """Values of a (M, G) grid at times (M, ...)."""
        column = np.clip((when_s / self.episodes.step_s).astype(np.intp), 0, grid.shape[1] - 1)
        rows = self._rows.reshape(-1, *(1,) * (when_s.ndim - 1))
        found: FloatArray = grid[rows, column]
        return found

    def _carry(self, start_s: FloatArray, size_bytes: FloatArray) -> FloatArray:
        """When the link has carried `size_bytes` since `start_s`, both (M, ...): the integral of the rate, turned round."""
        step_s, grid = self.episodes.step_s, self.episodes.rate_bytes_per_s
        rows = np.broadcast_to(self._rows.reshape(-1, *(1,) * (start_s.ndim - 1)), start_s.shape)
        last = grid.shape[1] - 1
        column = np.clip((start_s / step_s).astype(np.intp), 0, last)
        inside_s = start_s - column * step_s
        rate = np.where(column == last, self._last_rate[rows], grid[rows, column])
        target = self._carried[rows, column] + inside_s * rate + size_bytes
        within = np.minimum(target, self._carried[rows, last])
        place = np.searchsorted(self._flat, (within + rows * self._stride).ravel(), side="right").reshape(rows.shape) - 1
        place = np.clip(place - rows * grid.shape[1], 0, last)
        rate = np.where(place == last, self._last_rate[rows], grid[rows, place])
        finish = place * step_s + (target - self._carried[rows, place]) / np.maximum(rate, 1e-9)
        found: FloatArray = np.where(size_bytes > 0, np.maximum(finish, start_s), start_s)
        return found

    def outcomes(self, actions: NDArray[np.intp], clocks: Clocks | None = None, index: int | None = None) -> Outcome:
        """What `actions` (M, ...) would lead to for request `index`; `clocks` (M, ...) broadcast against them."""
        now = self.clocks if clocks is None else clocks
        table, episodes = self.table, self.episodes
        shape = np.broadcast_shapes(actions.shape, now.device_s.shape)
        actions = np.broadcast_to(actions, shape)
        wide = (-1, *(1,) * (len(shape) - 1))
        arrival = episodes.arrival_s[:, self.index if index is None else index].reshape(wide)
        begin = np.broadcast_to(np.maximum(arrival, now.device_s), shape)
        device_load = self._at(episodes.device_load, begin)
        computed = begin + device_load * table.head_s[actions]
        crosses = table.crosses[actions]
        link_start = np.maximum(computed, now.link_s)
        link_end = self._carry(link_start, table.up_bytes[actions])
        one_way = self._at(episodes.one_way_s, link_end)
        served = np.maximum(link_end + one_way, now.server_s)
        served = served + self._at(episodes.server_load, served) * table.tail_s[actions]
        back = self._carry(served, table.down_bytes[actions]) + one_way + device_load * table.back_s[actions]
        latency = np.where(crosses, back, computed) - arrival
        deadline = episodes.deadline_s.reshape(wide)
        late = -np.minimum(self.reward.k * (latency / deadline - 1.0), self.reward.worst)
        after = Clocks(computed, np.where(crosses, link_end, now.link_s), np.where(crosses, served, now.server_s))
        reward = np.where(latency <= deadline, table.accuracy[actions], late)
        return Outcome(after, latency, reward, link_end - link_start)

    # ---- what the device sees ------------------------------------------------------------------------------------------

    @property
    def waited_s(self) -> FloatArray:
        found: FloatArray = self.now_s - self.episodes.arrival_s[:, self.index]
        return found

    @property
    def queue(self) -> FloatArray:
        """Requests that have come and have no answer yet, this one apart."""
        waiting = (self.episodes.arrival_s[:, self.index + 1 :] <= self.now_s[:, None]).sum(axis=1)
        under_way = (np.isfinite(self._due_s) & (self._due_s > self.now_s[:, None])).sum(axis=1)
        found: FloatArray = (waiting + under_way).astype(np.float64)
        return found

    def observe(self) -> NDArray[np.float32]:
        """Features of the present request, (M, F), within [LOWEST, HIGHEST]."""
        raw = self.belief.features(self.ranges, self.now_s, self.episodes.deadline_s, self.queue, self.waited_s)
        return np.clip(raw, LOWEST, HIGHEST)

    def step(self, actions: NDArray[np.intp]) -> Outcome:
        """Decide the present request of every device; `actions` (M,)."""
        found = self.outcomes(actions)
        self._remember(actions, found)
        load = self._at(self.episodes.device_load, self.now_s)
        self.clocks = found.after
        self.index += 1
        self.now_s = np.maximum(self.episodes.arrival_s[:, self.index], self.clocks.device_s)
        self.belief.loads(self._rows, device=load)
        self._look()
        return found

    def _remember(self, actions: NDArray[np.intp], found: Outcome) -> None:
        """What will be known once the answer is there."""
        slot = self.index % _PENDING
        crosses, episodes = self.table.crosses[actions], self.episodes
        done = self.episodes.arrival_s[:, self.index] + found.latency_s
        rate = self.table.up_bytes[actions] / np.maximum(found.sent_s, 1e-9) * self._error()
        load = self._at(episodes.server_load, found.after.server_s - self.table.tail_s[actions]) * self._error()
        self._due_s[:, slot] = done
        self._shown[:, slot, 0] = np.where(crosses, rate, 0.0)
        self._shown[:, slot, 1] = self._at(episodes.one_way_s, found.after.link_s)
        self._shown[:, slot, 2] = load

    def _error(self) -> FloatArray:
        return np.exp(self._rng.normal(0.0, self.episodes.scenario.noise, len(self._rows)))

    def _look(self) -> None:
        """Take what has become known by now: everything, or the answers that came and a probe where none did."""
        episodes, of = self.episodes, self.episodes.scenario
        if of.is_fresh:
            known = (episodes.rate_bytes_per_s, episodes.one_way_s, episodes.device_load, episodes.server_load)
            rate, one_way, device, server = (self._at(grid, self.now_s) for grid in known)
            self.belief.know(rate, one_way, device, server, self.now_s)
            self._due_s[self._due_s <= self.now_s[:, None]] = np.inf
            return
        while True:
            slot = self._due_s.argmin(axis=1)
            rows = np.flatnonzero(self._due_s[self._rows, slot] <= self.now_s)
            if not len(rows):
                break
            shown, due = self._shown[rows, slot[rows]], self._due_s[rows, slot[rows]]
            self._due_s[rows, slot[rows]] = np.inf
            away = shown[:, 0] > 0
            self.belief.link(rows[away], shown[away, 0], shown[away, 1], due[away])
            self.belief.loads(rows[away], server=shown[away, 2])
        late = np.flatnonzero(self.now_s - self.belief.timed_s > of.probe_s)
        if len(late):
            rate = self._at(episodes.rate_bytes_per_s, self.now_s) * self._error()
            self.belief.link(late, rate[late], self._at(episodes.one_way_s, self.now_s)[late], self.now_s[late])
