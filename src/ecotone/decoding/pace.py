"""How fast the pipeline is, from what every frame brings back: seconds per stage by tokens, and what the network adds.

Per stage and kind of frame (few tokens: decoding; many: prompts) the time is fitted as a + b*tokens, old frames fading
out. From that follow the loop time T of a frame (without waiting), the slowest device's part tau, the depth T/tau that
fills the pipeline, and the size of chunks in which a prompt is computed soonest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ecotone.decoding.frame import StageTime

__all__ = ["Line", "Pace"]

FADE = 0.95
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
class Pace:
    """Of a pipeline whose stage i runs on device `devices[i]`."""

    devices: Sequence[str]
    few: list[Line] = field(init=False)
    many: list[Line] = field(init=False)
    network_s: float = 0.0
    wait_s: float = 0.0
    gap_s: float = 0.0  # the longest time without a result of late
    num_frames: int = 0
    rows_seen: int = 1
    _known: dict[tuple[int, bool], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.few = [Line(is_flat=True) for _ in self.devices]
        self.many = [Line(is_flat=False) for _ in self.devices]

    def add(self, times: Sequence[StageTime], tokens: int, is_few: bool, total_s: float) -> None:
        """A frame of `tokens` came back after `total_s`."""
        lines = self.few if is_few else self.many
        self._known.clear()
        for time in times:
            if time.stage < len(lines):
                lines[time.stage].add(tokens, time.compute_s)
        wait_s = sum(time.wait_s for time in times)
        network_s = max(total_s - wait_s - sum(time.compute_s for time in times), 0.0)
        share = max(0.1, 1.0 / (self.num_frames + 1))
        if is_few:
            self.network_s += share * (network_s - self.network_s)
            self.wait_s += share * (wait_s - self.wait_s)
            self.num_frames += 1
            self.rows_seen = max(self.rows_seen, tokens)

    def stage_s(self, tokens: int, *, is_few: bool = True) -> float:
        """tau: what the slowest device needs for a frame of so many tokens."""
        return self._predicted(tokens, is_few)[0]

    def loop_s(self, tokens: int, *, is_few: bool = True) -> float:
        """T: a frame there and back, alone."""
        return self._predicted(tokens, is_few)[1] + self.network_s

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
