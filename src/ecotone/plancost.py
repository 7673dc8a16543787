"""What a plan is predicted to cost per request, part by part: the values that cost.py's equations give. Data only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ecotone import schema
from ecotone.cluster import DeviceId

__all__ = ["DeviceCost", "LinkCost", "PlanCost", "StageCost", "TransferCost"]

SCHEMA, VERSION = "ecotone.cost", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage: seconds of compute, its error against eager float32, bytes of weights and of live activations.

    `exit_s`: of those seconds, the head of the exit at its end. `share` of all requests reach it, `leaves` end there.
    """

    device: DeviceId
    executor: str
    start: int
    stop: int
    compute_s: float
    relative_error: float
    weight_bytes: int
    working_bytes: int
    extrapolated: bool = False
    exit: str = ""
    exit_s: float = 0.0
    share: float = 1.0
    leaves: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCost:
    """One transfer by its four parts, all zero where it is local; `share` of all requests take it."""

    source: DeviceId
    target: DeviceId
    position: int
    codec: str
    size_bytes: float = 0.0
    encode_s: float = 0.0
    latency_s: float = 0.0
    send_s: float = 0.0
    decode_s: float = 0.0
    disagreement: float = 0.0
    relative_error: float = 0.0
    loss_points: float = 0.0
    sure_points: float = 0.0
    share: float = 1.0

    @property
    def total_s(self) -> float:
        """Equation 5."""
        return self.encode_s + self.latency_s + self.send_s + self.decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCost:
    """A device that takes part: seconds busy per request, memory, modelled energy per request."""

    device: DeviceId
    busy_s: float
    memory_bytes: int
    energy_joule: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCost:
    """A directed link that carries something: bytes and seconds of occupancy per request."""

    source: DeviceId
    target: DeviceId
    size_bytes: float
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCost:
    """What a plan is predicted to cost per request, in the mean where it has exits; energy is modelled, not metered."""

    latency_s: float
    bottleneck_s: float
    energy_joule: float
    disagreement: float
    relative_error: float
    stages: tuple[StageCost, ...]
    transfers: tuple[TransferCost, ...]
    devices: tuple[DeviceCost, ...]
    links: tuple[LinkCost, ...]
    loss_points: float = 0.0
    sure_points: float = 0.0  # by the upper ends of the intervals: equation 11
    server_s: float = 0.0
    money: float = 0.0
    exit_transfers: tuple[TransferCost, ...] = ()

    @property
    def edges(self) -> tuple[TransferCost, ...]:
        """By number, as Plan.edges."""
        return (*self.transfers, *self.exit_transfers)

    @property
    def longest_s(self) -> float:
        """Seconds of the longest way through the plan, alone: to the end, or out at an exit over a slow link."""
        longest, total, exits = 0.0, 0.0, iter(self.exit_transfers)
        for stage, transfer in zip(self.stages, self.transfers, strict=False):
            total += transfer.total_s + stage.compute_s
            if stage.exit:
                longest = max(longest, total + next(exits).total_s)
        return max(longest, total + self.transfers[-1].total_s)

    @property
    def throughput_per_s(self) -> float:
        return 1.0 / self.bottleneck_s if self.bottleneck_s > 0 else math.inf

    @property
    def size_bytes(self) -> float:
        """Bytes over all links."""
        return sum(link.size_bytes for link in self.links)

    @property
    def accuracy_loss_points(self) -> float:
        return self.loss_points

    @property
    def extrapolated(self) -> bool:
        """True where any stage time comes from equation 3."""
        return any(stage.extrapolated for stage in self.stages)

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "cost") -> PlanCost:
        """Read a cost; raises SchemaError naming every violation."""
        return schema.load_json(PlanCost, text, SCHEMA, VERSION, where)
