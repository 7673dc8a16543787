"""A radio cell in slots: N devices with a queue of equal tasks each share the channels of one receiver.

The environment of MAHPPO (arXiv:2205.11854; repository Hao840/MAHPPO: env/), rule by rule:
1. A device works one task at a time: compute up to its point, then upload at the rate of radio.py's equation 1; point 0
   uploads at once, the last point only computes. The task ends with its upload (or with its computing at the last point).
2. Time goes from event to event (an end of computing or of an upload, or the end of the slot); rates are those of the
   devices that upload just then.
3. An action takes effect in its power at once, in point and channel with the next task.
4. Energy: compute watts while computing, transmit watts while uploading, nothing while idle. What comes after the upload
   is free. An episode ends when every queue is empty.
State and reward are its `state` and `slot_reward`. Beyond the published rules: `fading` and `add_tasks` let gains and
queues change between slots (hidden state for learners). Not the simulator of plans (simulation.py): no protocol, no
faults. O(N) per event; plain floats, since N is small and an array of five is slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ecotone.offload import OffloadProfile
from ecotone.radio import Radio
from ecotone.units import EcotoneError

__all__ = ["Cell", "SlotResult", "Tally", "run_static", "slot_reward"]

FloatArray = NDArray[np.float64]
_IDLE, _COMPUTES, _UPLOADS = range(3)
_DONE_S = 1e-10  # what would end so soon has ended
MIN_WATT = 1e-10
TEST_DISTANCE_M = 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotResult:
    """What came of a slot, arrays (N,): tasks finished, tasks left, joules spent, seconds not idle."""

    finished: NDArray[np.int64]
    left: NDArray[np.int64]
    joule: FloatArray
    busy_s: FloatArray
    slot_s: float
    is_done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Sums over slots. Time counts whole slots of all devices, idle ones too, as published."""

    num_devices: int
    num_slots: int = 0
    seconds: float = 0.0
    joule: float = 0.0
    finished: int = 0
    reward: float = 0.0
    is_done: bool = False

    def __add__(self, result: SlotResult) -> Tally:
        return Tally(
            num_devices=self.num_devices, num_slots=self.num_slots + 1,
            seconds=self.seconds + result.slot_s * self.num_devices,
            joule=self.joule + float(result.joule.sum()), finished=self.finished + int(result.finished.sum()),
            reward=self.reward + slot_reward(result), is_done=result.is_done,
        )  # fmt: skip

    @property
    def s_per_task(self) -> float:
        return self.seconds / self.finished if self.finished else math.inf

    @property
    def joule_per_task(self) -> float:
        return self.joule / self.finished if self.finished else math.inf


def slot_reward(result: SlotResult, energy_weight: float = 1.0) -> float:
    """The published reward of a slot: -(slot + weight * mean joules) / max(mean tasks finished, 0.8)."""
    finished = max(float(result.finished.mean()), 0.8)
    return -(result.slot_s + energy_weight * float(result.joule.mean())) / finished


class Cell:
    """`profiles`: one for all, or one per device. Call `reset` first; one `step` is one slot.

    `mean_tasks`, `distance_m` (least, greatest), `max_watt` and `slot_s` are the published constants by default.
    """

    def __init__(
        self,
        profiles: OffloadProfile | Sequence[OffloadProfile],
        radio: Radio | None = None,
        *,
        num_devices: int = 5,
        slot_s: float = 0.5,
        max_watt: float = 1.0,
        mean_tasks: float = 200.0,
        distance_m: tuple[float, float] = (1.0, 100.0),
    ) -> None:
        many = (profiles,) * num_devices if isinstance(profiles, OffloadProfile) else tuple(profiles)
        if not many or len({p.num_points for p in many}) != 1:
            raise EcotoneError("cell: needs at least one device, and profiles with equally many points")
        if not (slot_s > 0 and max_watt > MIN_WATT and mean_tasks > 0 and 0 < distance_m[0] <= distance_m[1]):
            raise EcotoneError("cell: slot, power, tasks and distances must be above zero, the least distance first")
        self.profiles, self.radio, self.num_devices = many, radio or Radio(), len(many)
        self.num_points = many[0].num_points
        self.slot_s, self.max_watt, self.mean_tasks, self.distance_range_m = slot_s, max_watt, mean_tasks, distance_m
        self.training_slots = int(mean_tasks * 0.15 / slot_s)  # a training episode is cut off there
        self._none = [0] * self.num_devices
        self.distance_m = [TEST_DISTANCE_M] * self.num_devices
        self.total, self.left = [1] * self.num_devices, list(self._none)
        self.fade([1.0] * self.num_devices)
        self._start([self.num_points - 1] * self.num_devices, list(self._none), [MIN_WATT] * self.num_devices)

    def reset(self, seed: int, *, test: bool = False, num_tasks: int | None = None) -> FloatArray:
        """A new episode and its first state, shape (N, 4).

        Tasks are Poisson, distances and the first action uniform, all from `seed`; with `test` as published: tasks exactly
        `mean_tasks` (or `num_tasks`), 50 m, and the first task runs here. Fading is 1 again.
        """
        if num_tasks is not None and num_tasks < 1:
            raise EcotoneError(f"cell: {num_tasks} tasks, needs at least one")
        count, random = self.num_devices, np.random.default_rng(seed)
        low, high = self.distance_range_m
        distance = random.uniform(low, high, count)
        tasks = np.maximum(1, random.poisson(self.mean_tasks, count))
        points, channels = random.integers(self.num_points, size=count), random.integers(self.radio.num_channels, size=count)
        powers = random.uniform(MIN_WATT, self.max_watt, count)
        if test:
            distance, tasks = np.full(count, TEST_DISTANCE_M), np.full(count, round(self.mean_tasks))
            points, channels = np.full(count, self.num_points - 1), np.zeros(count, dtype=np.int64)
            powers = np.full(count, MIN_WATT)
        self.distance_m = distance.tolist()
        self.total = tasks.tolist() if num_tasks is None else [num_tasks] * count
        self.left = list(self.total)
        self.fade([1.0] * count)
        self._start(points.tolist(), channels.tolist(), powers.tolist())
        return self.state()

    def fade(self, fading: ArrayLike) -> None:
        """Multiply every device's gain by its entry of `fading` from now on (not cumulative)."""
        factors = np.broadcast_to(np.asarray(fading, dtype=np.float64), self.num_devices)
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise EcotoneError("cell: fading must be finite and above zero")
        exponent = self.radio.path_loss_exponent
        self._path_loss = [d**exponent / f for d, f in zip(self.distance_m, factors.tolist(), strict=True)]

    def add_tasks(self, counts: ArrayLike) -> None:
        """Put more tasks into the queues; an idle device begins at once."""
        for i, count in enumerate(self._whole(counts, 1 << 40, "tasks")):
            self.total[i] += count
            self.left[i] += count
            if count and self._phase[i] == _IDLE:
                self._begin(i)

    def state(self) -> FloatArray:
        """Per device: share of tasks left, seconds to compute and bytes to send of its task over their norms, distance."""
        low, high = self.distance_range_m
        rows = []
        for i, profile in enumerate(self.profiles):
            seconds, size = self._compute_s[i] / profile.norm_s, self._send_bytes[i] / profile.norm_bytes
            far = (self.distance_m[i] - low) / (high - low) if high > low else 0.0
            rows.append((self.left[i] / self.total[i], seconds, size, far))
        return np.array(rows)

    @property
    def is_done(self) -> bool:
        return not any(self.left)

    def step(self, points: ArrayLike, channels: ArrayLike, powers: ArrayLike) -> SlotResult:
        """One slot under an action, arrays (N,): point in [0, K), channel in [0, C), watts in [1e-10, max_watt]."""
        self._next_point = self._whole(points, self.num_points, "point")
        self._next_channel = self._whole(channels, self.radio.num_channels, "channel")
        watts = np.broadcast_to(np.asarray(powers, dtype=np.float64), self.num_devices)
        if not ((watts >= MIN_WATT) & (watts <= self.max_watt)).all():
            raise EcotoneError(f"cell: powers {watts.tolist()} must lie in [{MIN_WATT:g}, {self.max_watt:g}] W")
        self._power = watts.tolist()
        self._finished, self._joule = list(self._none), [0.0] * self.num_devices
        self._busy_s, passed_s, rates = [0.0] * self.num_devices, 0.0, self._rates()
        while passed_s + (wait_s := self._next_end_s(rates)) < self.slot_s:
            self._pass(wait_s, rates)
            passed_s += wait_s
            rates = self._rates()
        self._pass(self.slot_s - passed_s, rates)
        return SlotResult(
            finished=np.array(self._finished), left=np.array(self.left), joule=np.array(self._joule),
            busy_s=np.array(self._busy_s), slot_s=self.slot_s, is_done=self.is_done,
        )  # fmt: skip

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _whole(self, values: ArrayLike, below: int, what: str) -> list[int]:
        found = np.broadcast_to(np.asarray(values), self.num_devices)
        whole: list[int] = found.astype(np.int64).tolist()
        if any(not 0 <= v < below for v in whole) or (found != whole).any():
            raise EcotoneError(f"cell: {what} {found.tolist()} must be whole numbers in [0, {below})")
        return whole

    def _start(self, points: list[int], channels: list[int], powers: list[float]) -> None:
        self._point, self._channel, self._power = points, channels, powers
        self._next_point, self._next_channel = list(points), list(channels)
        self._phase, self._compute_s, self._send_bytes = list(self._none), [0.0] * len(points), [0.0] * len(points)
        for i, left in enumerate(self.left):
            if left:
                self._take_up(i)

    def _begin(self, i: int) -> None:
        self._point[i], self._channel[i] = self._next_point[i], self._next_channel[i]
        self._take_up(i)

    def _take_up(self, i: int) -> None:
        point, profile = self._point[i], self.profiles[i]
        self._compute_s[i], self._send_bytes[i] = profile.compute_s[point], profile.payload_bytes[point]
        self._phase[i] = _COMPUTES if point else _UPLOADS

    def _rates(self) -> list[float]:
        """Bytes per second of every device that uploads now: equation 1 of radio.py."""
        heard, noise = [0.0] * self.radio.num_channels, self.radio.noise_watt
        received = [0.0] * self.num_devices
        for i, phase in enumerate(self._phase):
            if phase == _UPLOADS:
                received[i] = self._power[i] / self._path_loss[i]
                heard[self._channel[i]] += received[i]
        rates, width = received, self.radio.width_hz
        for i, phase in enumerate(self._phase):
            if phase == _UPLOADS:
                own = received[i]
                rates[i] = width * math.log2(1.0 + own / (max(heard[self._channel[i]] - own, 0.0) + noise)) / 8
        return rates

    def _next_end_s(self, rates: list[float]) -> float:
        wait_s = self.slot_s
        for i, phase in enumerate(self._phase):
            if phase == _COMPUTES:
                wait_s = min(wait_s, self._compute_s[i])
            elif phase == _UPLOADS and rates[i] > 0:
                wait_s = min(wait_s, self._send_bytes[i] / rates[i])
        return wait_s

    def _pass(self, wait_s: float, rates: list[float]) -> None:
        for i, phase in enumerate(self._phase):
            if phase == _IDLE:
                continue
            self._busy_s[i] += wait_s
            if phase == _COMPUTES:
                self._joule[i] += self.profiles[i].compute_watt[self._point[i]] * wait_s
                self._compute_s[i] -= wait_s
                if self._compute_s[i] < _DONE_S:
                    self._compute_s[i] = 0.0
                    if self._send_bytes[i] > 0:
                        self._phase[i] = _UPLOADS
                    else:
                        self._finish(i)
            else:
                self._joule[i] += self._power[i] * wait_s
                self._send_bytes[i] -= rates[i] * wait_s
                if self._send_bytes[i] < rates[i] * _DONE_S:
                    self._send_bytes[i] = 0.0
                    self._finish(i)

    def _finish(self, i: int) -> None:
        self._finished[i] += 1
        self.left[i] -= 1
        if self.left[i]:
            self._begin(i)
        else:
            self._phase[i] = _IDLE


def run_static(
    cell: Cell, points: ArrayLike, channels: ArrayLike, powers: ArrayLike, *, seed: int = 0, max_slots: int = 4000
) -> Tally:
    """The published test episode under one fixed action; `is_done` is False where `max_slots` did not suffice."""
    cell.reset(seed, test=True)
    tally = Tally(num_devices=cell.num_devices)
    while not tally.is_done and tally.num_slots < max_slots:
        tally += cell.step(points, channels, powers)
    return tally
