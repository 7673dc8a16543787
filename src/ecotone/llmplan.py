"""A plan for a language model: which device holds which layers by which executor, and in which codec hidden states cross.

A value: frozen, comparable, JSON in one place. Stages stand in the order in which a token passes them. A device may hold
several: an embedding before and a head after layers that lie elsewhere are stages of their own, and so is a span that was
taken over from a lost device. The driver is the device that schedules; token ids go from it to the first stage and from
the last stage straight back to it. What crosses between two stages is `codec` of the former; LOCAL on one device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ecotone import schema
from ecotone.cluster import Cluster, DeviceId

__all__ = ["CODECS", "EXACT", "LOCAL", "LlmPlan", "LlmStage", "Span", "Standby", "llm_plan_violations"]

SCHEMA, VERSION = "ecotone.llmplan", 1
LOCAL, EXACT = "none", "fp32"
CODECS = {EXACT: 4.0, "bf16": 2.0, "int8": 1.0}
"""Codec of hidden states -> bytes per number; int8 also sends one float32 scale per token. Only EXACT changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Layers [start, stop), with the embedding before them and the final norm and head after them where flagged.

    A span without layers that only embeds, or only makes logits, is a span too.
    """

    start: int
    stop: int
    embedding: bool = False
    head: bool = False

    def __post_init__(self) -> None:
        wrong = [] if 0 <= self.start <= self.stop else [f"layers [{self.start}, {self.stop})"]
        if self.start == self.stop and not self.embedding and not self.head:
            wrong.append("holds nothing")
        schema.check("span", wrong)

    @property
    def num_layers(self) -> int:
        return self.stop - self.start

    def describe(self) -> str:
        """For people: "embedding + layers [0, 4) + head"."""
        layers = [f"layers [{self.start}, {self.stop})"] if self.num_layers else []
        return " + ".join(["embedding"] * self.embedding + layers + ["head"] * self.head)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmStage:
    """`span` on `device` by shard executor `executor` (ecotone.llm.executors), with `kv_bytes` for keys and values.

    `codec`: in which its hidden states leave; LOCAL where they do not leave the device, and on the last stage.
    """

    device: DeviceId
    span: Span
    executor: str
    kv_bytes: int = 0
    codec: str = LOCAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """`device` holds the weights of stage `stage` too, loaded and unused until the stage's own device is lost."""

    device: DeviceId
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmPlan:
    """`model_hash` names the model (ecotone.llm.source gives it); `num_layers` are all of its layers.

    `context`: tokens of the longest sequence, prompt and answer together. `max_slots`: sequences worked on at a time.
    `epoch` orders the plans of one session.
    """

    model_hash: str
    num_layers: int
    driver: DeviceId
    stages: tuple[LlmStage, ...]
    context: int
    max_slots: int = 16
    standbys: tuple[Standby, ...] = ()
    epoch: int = 0

    def __post_init__(self) -> None:
        schema.check("plan of a language model", self._violations())

    def _violations(self) -> Iterator[str]:
        if not self.stages:
            yield "has no stage"
            return
        if self.context < 1 or self.max_slots < 1 or self.epoch < 0:
            yield f"context {self.context}, slots {self.max_slots} and epoch {self.epoch} must be positive (epoch: or 0)"
        first, last = self.stages[0].span, self.stages[-1].span
        if not first.embedding or first.start != 0:
            yield "its first stage must begin with the embedding and layer 0"
        if not last.head or last.stop != self.num_layers:
            yield f"its last stage must end with layer {self.num_layers} and the head"
        for index, (one, other) in enumerate(pairwise(self.stages)):
            if one.span.stop != other.span.start:
                yield f"stage {index} ends at layer {one.span.stop}, the next starts at {other.span.start}"
            if one.span.head or other.span.embedding:
                yield f"stages {index} and {index + 1}: only the first embeds and only the last has the head"
            if (one.device == other.device) != (one.codec == LOCAL):
                yield f'stage {index}: codec must be "{LOCAL}" exactly where the next stage is on the same device'
        yield from self._bad_stages()

    def _bad_stages(self) -> Iterator[str]:
        for index, stage in enumerate(self.stages):
            if stage.codec != LOCAL and stage.codec not in CODECS:
                yield f"stage {index}: codec {stage.codec!r} is not one of {', '.join(CODECS)}"
            if stage.kv_bytes < 0 or (stage.span.num_layers and not stage.kv_bytes):
                yield f"stage {index}: {stage.kv_bytes} bytes for keys and values"
        if self.stages[-1].codec != LOCAL:
            yield f'the last stage sends token ids, so its codec must be "{LOCAL}"'
        for standby in self.standbys:
            if not 0 <= standby.stage < len(self.stages):
                yield f"standby {standby.device} is for stage {standby.stage}, which does not exist"
            elif self.stages[standby.stage].device == standby.device:
                yield f"standby {standby.device} holds stage {standby.stage} already"

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """Devices that compute, in order of first use; without standbys."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def hops(self) -> tuple[tuple[DeviceId, DeviceId], ...]:
        """(from, to) of every way over a link that a token takes: driver to first stage, between stages, and back."""
        ends = (self.driver, *(stage.device for stage in self.stages), self.driver)
        return tuple((one, other) for one, other in pairwise(ends) if one != other)

    @property
    def is_exact(self) -> bool:
        """Whether hidden states cross every link unchanged."""
        return all(stage.codec in (LOCAL, EXACT) for stage in self.stages)

    def with_epoch(self, epoch: int) -> LlmPlan:
        return replace(self, epoch=epoch)

    def identity(self) -> str:
        """Hex sha256 of what the plan does: equal for equal plans of different epochs."""
        document = schema.write(self.with_epoch(0))
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "plan") -> LlmPlan:
        """Read a plan; raises SchemaError naming every violation."""
        return schema.load_json(LlmPlan, text, SCHEMA, VERSION, where)

    def __str__(self) -> str:
        parts = [f"{self.driver} ->"]
        for stage in self.stages:
            crossing = "" if stage.codec == LOCAL else f" ({stage.codec})"
            parts.append(f"{stage.device}[{stage.span.describe()}] {stage.executor}{crossing} ->")
        return " ".join([*parts, self.driver])


def llm_plan_violations(plan: LlmPlan, cluster: Cluster, weight_bytes: Sequence[int] = ()) -> tuple[str, ...]:
    """Every reason why `plan` cannot run on `cluster`; empty when it can.

    `weight_bytes` of each stage (ecotone.llm.recipes), where given, are held with `kv_bytes` against the devices' memory.
    """
    return tuple(_against(plan, cluster, weight_bytes))


def _against(plan: LlmPlan, cluster: Cluster, weight_bytes: Sequence[int]) -> Iterator[str]:
    known = {device.name: device for device in cluster.devices}
    held = [(stage.device, index) for index, stage in enumerate(plan.stages)]
    held += [(standby.device, standby.stage) for standby in plan.standbys]
    for name in dict.fromkeys([plan.driver, *(name for name, _ in held)]):
        if name not in known:
            yield f"names device {name!r}; devices are {', '.join(known)}"
    for name in plan.devices:  # every stage also hears the driver and tells it what it sees
        for pair in ((plan.driver, name), (name, plan.driver)):
            if name != plan.driver and cluster.link(*pair) is None:
                yield f"needs a link from {pair[0]} to {pair[1]}, which the cluster has not"
    for one, other in plan.hops:
        if plan.driver not in (one, other) and cluster.link(one, other) is None:
            yield f"sends from {one} to {other}, but the cluster has no such link"
    for name, index in held:
        device = known.get(name)
        if device and device.executors and plan.stages[index].executor not in device.executors:
            yield f"device {name} may not use executor {plan.stages[index].executor}"
    for name in dict.fromkeys(name for name, _ in held) if weight_bytes else ():
        need = sum(weight_bytes[index] + plan.stages[index].kv_bytes for device, index in held if device == name)
        if name in known and need > known[name].memory_bytes:
            yield f"needs {need} bytes for weights and keys on {name}, which has {known[name].memory_bytes} bytes of memory"
