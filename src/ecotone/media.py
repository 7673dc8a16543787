"""What several links of a cluster share: a wire of one capacity, or the channels of a radio receiver. Data only.

A `[[shared]]` wire: links that pass it at one time divide its capacity, each at most its own rate (max-min fair). A
`[[radio]]` cell: its senders' uplinks have no rate of their own; each follows from power, distance, channel and who else is
sending (radio.py, equation 1). Which channel and power a sender takes is part of a joint plan (planner/assignment.py), so
the link that stands for an uplink in the cluster has the rate that the sender has alone at full power.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ecotone import schema
from ecotone.radio import Radio

__all__ = ["RadioCell", "Sender", "SharedWire", "Tuning"]

LEAST_WATT = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What a sender of a cell transmits on, and how loud."""

    channel: int
    watt: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """A device that sends over a radio cell, and how far from the receiver it is."""

    device: str
    distance_m: float
    max_watt: float = 1.0

    def __post_init__(self) -> None:
        ok = all(math.isfinite(v) and v > 0 for v in (self.distance_m, self.max_watt)) and self.max_watt >= LEAST_WATT
        schema.check(f"radio sender {self.device}", [] if ok else ["distance and max_watt must be above zero"])


@dataclass(frozen=True, slots=True, kw_only=True)
class RadioCell:
    """Uplinks of `sender`s to `receiver` over `num_channels` channels; the numbers are those of Radio.

    `latency_s` of every uplink. The way back from the receiver is an ordinary link.
    """

    name: str
    receiver: str
    sender: tuple[Sender, ...]
    latency_s: float = 0.0
    num_channels: int = 2
    width_hz: float = 1e6
    path_loss_exponent: float = 3.0
    noise_watt: float = 1e-9

    def __post_init__(self) -> None:
        schema.check(f"radio {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        names = [s.device for s in self.sender]
        if not names:
            yield "has no sender; add [[radio.sender]] with device and distance"
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield f"sender {name} is given twice"
        if self.receiver in names:
            yield f"{self.receiver} is both receiver and sender"
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            yield f"latency {self.latency_s} must be finite and not negative"
        try:
            _ = self.radio
        except schema.SchemaError as error:
            yield from error.violations

    @property
    def radio(self) -> Radio:
        return Radio(
            num_channels=self.num_channels, width_hz=self.width_hz, path_loss_exponent=self.path_loss_exponent,
            noise_watt=self.noise_watt,
        )  # fmt: skip

    @property
    def links(self) -> tuple[tuple[str, str], ...]:
        """The directed links of its uplinks, in the order of its senders."""
        return tuple((s.device, self.receiver) for s in self.sender)

    def alone_bytes_per_s(self, device: str, watt: float | None = None) -> float:
        """The rate of a sender while nobody else sends, at full power or `watt`."""
        sender = next(s for s in self.sender if s.device == device)
        power = sender.max_watt if watt is None else watt
        distance, watts = np.array([sender.distance_m]), np.array([power])
        rates = self.radio.rates_bytes_per_s(distance, watts, np.zeros(1, dtype=np.intp), np.ones(1, dtype=np.bool_))
        return float(rates[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWire:
    """`links` ("camera>edge"; "*" stands for any device at that end) pass one wire of `bandwidth_bytes_per_s`."""

    name: str
    bandwidth_bytes_per_s: float
    links: tuple[str, ...]

    def __post_init__(self) -> None:
        schema.check(f"shared wire {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        if not (math.isfinite(self.bandwidth_bytes_per_s) and self.bandwidth_bytes_per_s > 0):
            yield f"bandwidth {self.bandwidth_bytes_per_s} must be finite and above zero"
        if not self.links:
            yield 'names no link; write for example links = ["camera>edge", "*>cloud"]'
        for text in self.links:
            if text.count(">") != 1 or not all(part.strip() for part in text.split(">")):
                yield f'link "{text}" is not understood; write "source>target", with * for any device'

    def carries(self, source: str, target: str) -> bool:
        """Whether the directed link passes this wire."""
        ends = [tuple(part.strip() for part in text.split(">")) for text in self.links]
        return any(a in ("*", source) and b in ("*", target) for a, b in ends)
