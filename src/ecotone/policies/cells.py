"""Many copies of simulator/cell.py at once, as arrays, so that a learner sees thousands of slots a second. Same rules.

Legend: E copies, N devices, arrays (E, N). Every copy goes from its own event to its own next one; a slot ends when the
slowest copy has come to the slot's end. The tests hold it to Cell, slot by slot. Beyond Cell: a `World` that changes between
slots, for learners to find their way in: devices that walk, gains that fade, tasks that come in batches.
O(N) numpy operations on E numbers an event; about 100 events a slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone.offload import OffloadProfile
from ecotone.policies.actions import FloatArray
from ecotone.radio import Radio
from ecotone.simulator.cell import MIN_WATT, TEST_DISTANCE_M
from ecotone.units import EcotoneError

__all__ = ["STILL", "Cells", "Slots", "World"]

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
_IDLE, _COMPUTES, _UPLOADS = range(3)
_DONE_S = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What changes from slot to slot.

    Devices walk towards random places; gains fade by `fading_db` and keep `fading_keeps` of that to the next slot; batches
    of Poisson(`batch`) tasks come to each device. `slots`: an episode ends there (0: when all queues are empty).
    """

    walk_m_per_s: float = 0.0
    fading_db: float = 0.0
    fading_keeps: float = 0.7
    batches_per_s: float = 0.0
    batch: float = 20.0
    slots: int = 0

    def __post_init__(self) -> None:
        ok = min(self.walk_m_per_s, self.fading_db, self.batches_per_s, self.slots) >= 0 and self.batch > 0
        if not ok or not 0 <= self.fading_keeps < 1 or (self.batches_per_s and not self.slots):
            raise EcotoneError("world: nothing may be negative, fading_keeps below 1; with batches say how many slots")


STILL = World()


@dataclass(frozen=True, slots=True)
class Slots:
    """What came of a slot: tasks finished, joules spent, seconds not idle, (E, N); which copies are done, (E,)."""

    finished: IntArray
    joule: FloatArray
    busy_s: FloatArray
    is_done: BoolArray


class Cells:
    """`num_copies` cells; constants by default the published ones, as in Cell. `reset` first."""

    def __init__(
        self,
        profile: OffloadProfile,
        radio: Radio | None = None,
        *,
        num_copies: int,
        num_devices: int = 5,
        slot_s: float = 0.5,
        max_watt: float = 1.0,
        mean_tasks: float = 200.0,
        distance_m: tuple[float, float] = (1.0, 100.0),
        world: World = STILL,
    ) -> None:
        if num_copies < 1 or num_devices < 1 or not (slot_s > 0 and max_watt > MIN_WATT and mean_tasks > 0):
            raise EcotoneError("cells: needs copies and devices, and slot, power and tasks above zero")
        self.profile, self.radio, self.world = profile, radio or Radio(), world
        self.num_copies, self.num_devices, self.num_points = num_copies, num_devices, profile.num_points
        self.slot_s, self.max_watt, self.mean_tasks, self.distance_range_m = slot_s, max_watt, mean_tasks, distance_m
        self._compute, self._watt = np.array(profile.compute_s), np.array(profile.compute_watt)
        self._payload = np.array(profile.payload_bytes)
        shape = (num_copies, num_devices)
        self.total, self.left = np.ones(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self.distance_m, self._goal_m = np.full(shape, TEST_DISTANCE_M), np.full(shape, TEST_DISTANCE_M)
        self._fading = np.zeros(shape)  # natural logarithm of the gain's factor
        self.point, self.channel = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        self.power, self.compute_s, self.send_bytes = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._phase = np.full(shape, _IDLE)
        self.slot = np.zeros(num_copies, dtype=np.int64)
        self._rng = np.random.default_rng(0)

    # ---- episodes ------------------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None, rows: BoolArray | None = None, *, test: bool = False) -> None:
        """New episodes in copies `rows` (E,), all by default; `seed` begins the random numbers anew.

        As Cell.reset, `test` included, but the random numbers are drawn for all copies together.
        """
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        chosen = np.ones(self.num_copies, dtype=np.bool_) if rows is None else rows
        shape, random = (int(chosen.sum()), self.num_devices), self._rng
        low, high = self.distance_range_m
        distance, goal = random.uniform(low, high, shape), random.uniform(low, high, shape)
        tasks = np.maximum(1, random.poisson(self.mean_tasks, shape))
        point, channel = random.integers(self.num_points, size=shape), random.integers(self.radio.num_channels, size=shape)
        power = random.uniform(MIN_WATT, self.max_watt, shape)
        if test:
            distance, tasks = np.full(shape, TEST_DISTANCE_M), np.full(shape, round(self.mean_tasks))
            point, channel, power = np.full(shape, self.num_points - 1), np.zeros_like(channel), np.full(shape, MIN_WATT)
        self.distance_m[chosen], self._goal_m[chosen] = distance, goal
        self._fading[chosen] = random.normal(0.0, 1.0, shape) * self.world.fading_db * math.log(10) / 10
        self.total[chosen], self.left[chosen] = tasks, tasks
        self.point[chosen], self.channel[chosen], self.power[chosen] = point, channel, power
        self.slot[chosen] = 0
        self._take_up(np.broadcast_to(chosen[:, None], self.left.shape))

    def _take_up(self, who: BoolArray) -> None:
        self.compute_s[who], self.send_bytes[who] = self._compute[self.point[who]], self._payload[self.point[who]]
        self._phase[who] = np.where(self.point[who] > 0, _COMPUTES, _UPLOADS)

    def repeated(self, row: int, count: int) -> Cells:
        """`count` copies of copy `row` as it is now, in a world that stands still: to try actions on."""
        found = Cells(
            self.profile, self.radio, num_copies=count, num_devices=self.num_devices, slot_s=self.slot_s,
            max_watt=self.max_watt, mean_tasks=self.mean_tasks, distance_m=self.distance_range_m,
        )  # fmt: skip
        for name in ("total", "left", "distance_m", "_fading", "point", "channel", "compute_s", "send_bytes", "_phase"):
            setattr(found, name, np.repeat(getattr(self, name)[row : row + 1], count, axis=0))
        return found

    def state(self) -> FloatArray:
        """Per device, (E, N, 4): share of tasks left, seconds to compute and bytes to send over their norms, distance."""
        low, high = self.distance_range_m
        far = (self.distance_m - low) / (high - low) if high > low else np.zeros_like(self.distance_m)
        share = self.left / self.total
        seconds, size = self.compute_s / self.profile.norm_s, self.send_bytes / self.profile.norm_bytes
        return np.stack((share, seconds, size, far), axis=-1)

    @property
    def channel_occupancy(self) -> FloatArray:
        """(E, N, C): what others upload on each channel, in fifths of a decade over the noise."""
        own = self.power * self._gain() * (self._phase == _UPLOADS)
        heard = own[:, :, None] * (self.channel[:, :, None] == np.arange(self.radio.num_channels))
        others = heard.sum(axis=1, keepdims=True) - heard
        found: FloatArray = np.log10(1.0 + np.maximum(others, 0.0) / self.radio.noise_watt) / 5.0
        return found

    # ---- a slot --------------------------------------------------------------------------------------------------------

    def step(self, points: IntArray, channels: IntArray, powers: FloatArray) -> Slots:
        """One slot of every copy under actions (E, N), as Cell.step; then the world changes."""
        self.power = np.clip(powers, MIN_WATT, self.max_watt)
        shape, received = self.left.shape, self.power * self._gain()
        finished, joule, busy = np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape)
        rest_s = np.full((self.num_copies, 1), self.slot_s)
        while True:
            computes, sends = self._phase == _COMPUTES, self._phase == _UPLOADS
            rate = self._rates(received * sends)
            ends = np.where(computes, self.compute_s, math.inf)
            np.divide(self.send_bytes, rate, out=ends, where=sends & (rate > 0))
            wait = np.minimum(ends.min(axis=1, keepdims=True), rest_s)
            spent = wait * (computes | sends)
            busy += spent
            joule += spent * np.where(computes, self._watt[self.point], self.power)
            self.compute_s -= wait * computes
            self.send_bytes -= wait * rate
            live = rest_s > 0
            computed = computes & (self.compute_s < _DONE_S) & live
            sent = sends & (self.send_bytes < rate * _DONE_S) & live
            rest_s = rest_s - wait
            self._go_on(computed, sent, finished, points, channels)
            if not rest_s.any():
                break
        self.slot += 1
        self._change(points, channels)
        done = self.slot >= self.world.slots if self.world.slots else ~self.left.any(axis=1)
        return Slots(finished, joule, busy, np.asarray(done, dtype=np.bool_))

    def _go_on(self, computed: BoolArray, sent: BoolArray, finished: IntArray, points: IntArray, channels: IntArray) -> None:
        """What has been computed is uploaded or done, what has been sent is done; who is done begins the next task."""
        self.compute_s[computed], self.send_bytes[sent] = 0.0, 0.0
        onward = computed & (self.send_bytes > 0)
        self._phase[onward] = _UPLOADS
        done = sent | (computed & ~onward)
        finished += done
        self.left -= done
        self._phase[done] = _IDLE
        again = done & (self.left > 0)
        self.point[again], self.channel[again] = points[again], channels[again]
        self._take_up(again)

    def _gain(self) -> FloatArray:
        found: FloatArray = self.distance_m**-self.radio.path_loss_exponent * np.exp(self._fading)
        return found

    def _rates(self, own: FloatArray) -> FloatArray:
        """Equation 1 of radio.py for every copy, from received watts: bytes per second, 0 for those that do not upload."""
        heard = np.zeros_like(own)
        for c in range(self.radio.num_channels):
            on = self.channel == c
            heard += on * (own * on).sum(axis=1, keepdims=True)
        ratio = own / (self.radio.noise_watt + np.maximum(heard - own, 0.0))
        return np.log1p(ratio) * (self.radio.width_hz / (8 * math.log(2)))

    def _change(self, points: IntArray, channels: IntArray) -> None:
        """Between two slots: walk, fade, new tasks."""
        world, random, shape = self.world, self._rng, self.left.shape
        if world.walk_m_per_s:
            step = world.walk_m_per_s * self.slot_s
            gap = self._goal_m - self.distance_m
            there = np.abs(gap) <= step
            self.distance_m = np.where(there, self._goal_m, self.distance_m + np.sign(gap) * step)
            self._goal_m = np.where(there, random.uniform(*self.distance_range_m, shape), self._goal_m)
        if world.fading_db:
            spread = world.fading_db * math.log(10) / 10 * math.sqrt(1 - world.fading_keeps**2)
            self._fading = world.fading_keeps * self._fading + random.normal(0.0, spread, shape)
        if world.batches_per_s:
            count = random.poisson(world.batches_per_s * self.slot_s, shape) * random.poisson(world.batch, shape)
            begins = (count > 0) & (self.left == 0)
            self.left += count
            self.total = np.maximum(self.total, self.left)
            self.point[begins], self.channel[begins] = points[begins], channels[begins]
            self._take_up(begins)
