"""How fast the pipeline is, from what every frame brings back: seconds per stage by tokens, and what the network adds.

Per stage and kind of frame (few tokens: decoding; many: prompts) the time is fitted as a + b*tokens, old frames fading
out. From that follow the loop time T of a frame (without waiting), the slowest device's part tau, the depth T/tau that
fills the pipeline, and the size of chunks in which a prompt is computed soonest. Computing is not all that a frame takes:
messages are built, sent and read, perhaps on the same processors. So how closely frames follow one another is measured too,
on those that came further apart than they were sent, or later than alone: these the pipeline held up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ecotone.decoding.frame import StageTime

__all__ = ["Line", "Pace", "Slope"]

FADE = 0.95
_HELD_UP, _TOGETHER, _CROWDED = 1.15, 0.5, 0.4
_FORGOTTEN = 0.9995  # of what crowding costs, per frame: or what was dear once would never be tried again
_LEAST_SPREAD = 0.01  # squared deviation of x by its squared mean


@dataclass(slots=True)
class Line:
    """y = a + b*x, a and b not negative, by least squares with weights that fade; b as of when x last varied enough to tell.

    Where x never varied: constant if `is_flat`, else proportional.
    """

    is_flat: bool
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    told: float | None = None  # the slope, when x last varied

    def add(self, x: float, y: float) -> None:
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, FADE * getattr(self, name) + value)
        spread = self.xx - self.x * self.x / self.weight
        if spread > _LEAST_SPREAD * self.x * self.x / self.weight:
            self.told = max((self.xy - self.x * self.y / self.weight) / spread, 0.0)

    @property
    def slope(self) -> float:
        """Seconds per token; never negative."""
        if not self.weight:
            return 0.0
        if self.told is not None:
            return min(self.told, self.y / self.x)  # what was told long ago, of slow frames, may not exceed what is seen now
        return 0.0 if self.is_flat else self.y / self.x

    def at(self, x: float) -> float:
        """Predicted seconds; 0 where nothing was measured."""
        if not self.weight:
            return 0.0
        slope = self.slope
        return max((self.y - slope * self.x) / self.weight, 0.0) + slope * x


@dataclass(slots=True)
class Slope:
    """What y surely grows by where x grows by one: two standard errors below the slope of least squares, at least 0.

    It is forgotten where x varies no more: a link's rate of long ago says nothing of now.
    """

    value: float = 0.0
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y), ("yy", y * y)):
            setattr(self, name, FADE * getattr(self, name) + value)
        spread = self.xx - self.x * self.x / self.weight
        if self.weight < 4 or spread <= _LEAST_SPREAD * self.x * self.x / self.weight:
            self.value *= FADE
            return
        slope = (self.xy - self.x * self.y / self.weight) / spread
        rest = self.yy - self.y * self.y / self.weight - slope * slope * spread
        self.value = max(slope - 2 * math.sqrt(max(rest, 0.0) / (self.weight - 2) / spread), 0.0)


@dataclass(slots=True)
class Pace:
    """Of a pipeline whose stage i runs on device `devices[i]`.

    `stale_s`: by what each frame that became stale in flight holds up the one sent behind it, beyond tau/2 for all of them.
    """

    devices: Sequence[str]
    few: list[Line] = field(init=False)
    many: list[Line] = field(init=False)
    network_s: float = 0.0  # what links and messages add to a frame of one token
    network_row_s: Slope = field(default_factory=Slope)  # to one of a token more
    wait_s: float = 0.0
    gap_s: float = 0.0  # the longest time without a result of late
    num_frames: int = 0
    rows_seen: int = 1
    stale_s: float = 0.0
    _beyond_s: float = 0.0  # frame_s, before what is less than nothing is left out
    _num_spaced: int = 0
    _num_behind: int = 0
    _last: tuple[float, float] | None = None  # when the frame before was sent, and came
    _known: dict[tuple[int, bool], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.few = [Line(is_flat=True) for _ in self.devices]
        self.many = [Line(is_flat=False) for _ in self.devices]

    def add(
        self, times: Sequence[StageTime], tokens: int, is_few: bool, total_s: float, *,
        came_s: float | None = None, beside: int = 1, is_draft: bool = False,
    ) -> None:  # fmt: skip
        """A frame of `tokens` came back after `total_s`, at `came_s`; `beside`: frames in flight once it was sent.

        `is_draft`: it was sent behind others of its request, and may have waited for them.
        """
        lines = self.few if is_few else self.many
        self._known.clear()
        for time in times:
            if time.stage < len(lines):
                lines[time.stage].add(tokens, time.compute_s)
        wait_s = sum(time.wait_s for time in times)
        network_s = max(total_s - wait_s - sum(time.compute_s for time in times), 0.0)
        share = max(0.1, 1.0 / (self.num_frames + 1))
        if is_few:
            if came_s is not None:
                self._space(tokens, came_s - total_s, came_s, beside)
            if beside == 1:
                self.network_row_s.add(tokens, network_s)
            self._beyond_s *= _FORGOTTEN
            self.stale_s *= _FORGOTTEN
            more_s = network_s - (tokens - 1) * self.network_row_s.value - self.network_s
            if beside > 1 and more_s > 0 and self.num_frames:
                more_s *= 0.0 if is_draft else _CROWDED  # among others a frame waits in places that nobody tells of
            self.network_s += share * more_s
            self.wait_s += share * (wait_s - self.wait_s)
            self.num_frames += 1
            self.rows_seen = max(self.rows_seen, tokens)

    def behind(self, tokens: int, num_stale: int, total_s: float) -> None:
        """A frame came back after `total_s` that was sent behind `num_stale` frames that had become stale, and no others."""
        excess_s = total_s - self.loop_s(tokens) - self.stage_s(1) / 2
        self._num_behind += 1
        share = max(0.1, 1.0 / (self._num_behind + 2))
        most_s = self.stage_s(1) + self.frame_s  # more is a link that became slow
        self.stale_s += share * (min(max(excess_s, 0.0) / num_stale, most_s) - self.stale_s)

    def skipped(self) -> None:
        """A frame came back that took no time, being stale."""
        self._last = None

    def _space(self, tokens: int, sent_s: float, came_s: float, beside: int) -> None:
        """Compare with the frame before, where both were in flight together."""
        last, self._last = self._last, (sent_s, came_s)
        loop_s = self.loop_s(tokens)
        if last is None or sent_s >= last[1] or not self.num_frames:
            return
        if sent_s - last[0] <= _TOGETHER * loop_s / beside or came_s - sent_s >= _HELD_UP * loop_s:
            self._num_spaced += 1
            share = max(0.05, 1.0 / (self._num_spaced + 4))
            self._beyond_s += share * (came_s - last[1] - self.stage_s(tokens) - self._beyond_s)

    @property
    def frame_s(self) -> float:
        """By what frames follow one another beyond tau, where the pipeline is full."""
        return max(self._beyond_s, 0.0)

    def stage_s(self, tokens: int, *, is_few: bool = True) -> float:
        """tau: what the slowest device needs for a frame of so many tokens."""
        return self._predicted(tokens, is_few)[0]

    def loop_s(self, tokens: int, *, is_few: bool = True) -> float:
        """T: a frame there and back, alone."""
        return self._predicted(tokens, is_few)[1] + self.network_s + self.network_row_s.value * (tokens - 1) * is_few

    def row_s(self) -> float:
        """What one more token in a short frame adds on the slowest device."""
        return max(self.stage_s(2) - self.stage_s(1), 0.0)

    def depth(self, tokens: int) -> int:
        """Frames of `tokens` that fill the pipeline; its number of devices before anything was measured."""
        tau = self.stage_s(tokens)
        if not tau:
            return len(set(self.devices))
        return max(1, math.ceil(self.loop_s(tokens) / tau - 0.25))

    def chunk(self, tokens: int, most_s: float, least: int, most: int, first: int) -> int:
        """Tokens of the next chunk of a prompt with `tokens` to go: `first` before anything was measured.

        With D devices, C chunks take (C + D - 1) * (a + b*tokens/C): least at C = sqrt((D - 1)*b*tokens/a). A chunk takes no
        longer than `most_s` on the slowest device, whatever that costs the prompt, since others wait behind it.
        """
        slowest = max(self.many, key=lambda line: line.at(256), default=None)
        if slowest is None or not slowest.weight:
            return first
        rate, fixed = slowest.slope, slowest.at(0)
        chunks = math.sqrt((len(set(self.devices)) - 1) * rate * tokens / fixed) if fixed > 0 else most
        best = tokens / max(chunks, 1.0)
        if rate > 0:
            best = min(best, max(most_s - fixed, 0.0) / rate)
        size = least
        while size * 2 <= min(best, most):  # powers of two: the same prompt is cut alike from one day to the next
            size *= 2
        return size

    def _predicted(self, tokens: int, is_few: bool) -> tuple[float, float]:
        """Seconds of the slowest device, and of all; remembered until the next frame comes back."""
        if (tokens, is_few) in self._known:
            return self._known[tokens, is_few]
        found: dict[str, float] = {}
        for device, line in zip(self.devices, self.few if is_few else self.many, strict=True):
            found[device] = found.get(device, 0.0) + line.at(tokens)
        self._known[tokens, is_few] = max(found.values(), default=0.0), sum(found.values())
        return self._known[tokens, is_few]
