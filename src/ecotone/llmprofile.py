"""What was measured of one language model: seconds, bytes and loss of its parts, by device and shard executor.

A part is the embedding, the head, or a kind of layer; layers of one kind cost the same. Time is a curve per phase, fitted
to measurements (ecotone.llm.profile_build): fixed + per token + per pair of a token and a position that it attends to.
Few tokens (decoding, windows of drafts) and many (chunks of prompts) have a curve each. Rates and latencies of links are
the cluster's. Times are of a device's name or of its kind. Standard library only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ecotone import schema
from ecotone.cluster import Device

__all__ = [
    "EMBEDDING", "FEW_TOKENS", "FRAME", "HEAD", "Curve", "ExecutorFacts", "LayerPart", "LlmProfile", "Measured", "PartTime",
    "attended",
]  # fmt: skip

SCHEMA, VERSION = "ecotone.llmprofile", 1
EMBEDDING, HEAD, FRAME = "embedding", "head", "frame"
"""Parts that are no layer. FRAME: what a stage spends on a frame besides computing (packing, queues); may be missing."""
FEW_TOKENS = 8
"""Rows of up to so many tokens are computed by the executor for decoding (ecotone.decoding.step has the same)."""


def attended(count: int, context: float, window: int) -> float:
    """Pairs (token, position seen) of `count` tokens behind `context`: sum of min(context + i, window) for i = 1 to count.

    Equation (1) of llmcost.py; `window` 0: everything before is seen.
    """
    growing = count if not window else max(0, min(count, math.floor(window - context)))
    return growing * context + growing * (growing + 1) / 2 + (count - growing) * window


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds of a step: fixed_s + token_s * tokens + pair_s * pairs (see `attended`)."""

    fixed_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0

    def __post_init__(self) -> None:
        ok = all(math.isfinite(v) and v >= 0 for v in (self.fixed_s, self.token_s, self.pair_s))
        schema.check("curve", [] if ok else ["seconds must be finite and not negative"])

    def at_s(self, tokens: float, pairs: float) -> float:
        return self.fixed_s + self.token_s * tokens + self.pair_s * pairs

    def scaled(self, factor: float) -> Curve:
        return Curve(fixed_s=self.fixed_s * factor, token_s=self.token_s * factor, pair_s=self.pair_s * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTime:
    """One part by one executor on `device` (a name, or a kind): its curve for many tokens and for few, and its weights.

    `residual`: the largest |curve - measured| / measured over what was timed; 0 where the curve was stated.
    """

    device: str
    executor: str
    part: str
    prefill: Curve
    decode: Curve
    weight_bytes: int = 0
    residual: float = 0.0

    def __post_init__(self) -> None:
        ok = self.weight_bytes >= 0 and math.isfinite(self.residual) and self.residual >= 0
        schema.check(f"{self.part} by {self.executor} on {self.device}", [] if ok else ["bytes or residual out of range"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorFacts:
    """Of one executor: bytes of keys and values per token and layer; what answers lose if the whole model runs by it.

    `loss`: more nats per token on held-out text than in float32. `is_assumed`: by rule of thumb, not measured.
    """

    executor: str
    kv_bytes_per_token: int
    loss: float = 0.0
    is_assumed: bool = False

    def __post_init__(self) -> None:
        ok = self.kv_bytes_per_token > 0 and math.isfinite(self.loss) and self.loss >= 0
        schema.check(f"executor {self.executor}", [] if ok else ["bytes of keys or loss out of range"])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPart:
    """A kind of layer: `part` names it, `window` tokens are seen (0: all before)."""

    part: str
    window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One executor as a device has it: "a+b" is a's curve for prompts, b's for decoding, and both copies of the weights."""

    prefill: dict[str, Curve]
    decode: dict[str, Curve]
    weight_bytes: dict[str, int]
    kv_bytes_per_token: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class LlmProfile:
    """`layers`: the kind of every layer, in order. `codec_losses`: as ExecutorFacts.loss, of one crossing in that codec.

    `model_hash`: of the model (LlmPlan has it too). `max_positions`: the longest context that the model can take.
    """

    model_hash: str
    width: int
    max_positions: int
    kinds: tuple[LayerPart, ...]
    layers: tuple[str, ...]
    times: tuple[PartTime, ...]
    executors: tuple[ExecutorFacts, ...]
    codec_losses: dict[str, float]
    model: str = ""
    machine: str = ""
    versions: dict[str, str] | None = None

    def __post_init__(self) -> None:
        schema.check("profile of a language model", self._violations())

    def _violations(self) -> Iterator[str]:
        known = [kind.part for kind in self.kinds]
        if self.width < 1 or self.max_positions < 1 or not self.layers:
            yield f"width {self.width}, positions {self.max_positions} and layers {len(self.layers)} must be positive"
        for part in sorted(set(self.layers) - set(known)):
            yield f"layers name kind {part!r}; kinds are {', '.join(known)}"
        if len(set(known)) < len(known) or {EMBEDDING, HEAD, FRAME} & set(known):
            yield "kinds of layers must have names of their own"
        if any(not math.isfinite(loss) or loss < 0 for loss in self.codec_losses.values()):
            yield "losses of codecs must be finite and not negative"
        facts = [fact.executor for fact in self.executors]
        for name in sorted({time.executor for time in self.times} - set(facts)):
            yield f"times name executor {name}, of which nothing else is stated"
        counted = Counter((time.device, time.executor, time.part) for time in self.times)
        for device, executor, part in sorted(key for key, times in counted.items() if times > 1):
            yield f"{part} by {executor} on {device} is given twice"
        for part in sorted({t.part for t in self.times} - {*known, EMBEDDING, HEAD, FRAME}):
            yield f"times name part {part!r}; parts are {', '.join([*known, EMBEDDING, HEAD, FRAME])}"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def windows(self) -> dict[str, int]:
        return {kind.part: kind.window for kind in self.kinds}

    @cached_property
    def _by_device(self) -> dict[str, dict[str, dict[str, PartTime]]]:
        found: dict[str, dict[str, dict[str, PartTime]]] = {}
        for time in self.times:
            found.setdefault(time.device, {}).setdefault(time.executor, {})[time.part] = time
        return found

    @cached_property
    def _facts(self) -> dict[str, ExecutorFacts]:
        return {fact.executor: fact for fact in self.executors}

    def executors_of(self, device: Device) -> tuple[str, ...]:
        """Single executors that were measured on `device`, by its name or else its kind."""
        return tuple(self._of(device))

    def measured(self, device: Device, executor: str) -> Measured | None:
        """What `device` does by `executor` ("a" or "a+b"); None where that was not measured."""
        prefill, _, decode = executor.partition("+")
        rows = self._of(device)
        first, second = rows.get(prefill), rows.get(decode or prefill)
        if first is None or second is None:
            return None
        both = [part for part in second if part in first and part != FRAME]
        twice = bool(decode)
        facts = self._facts[decode or prefill]
        return Measured(
            prefill={part: first[part].prefill for part in [*both, *([FRAME] if FRAME in first else [])]},
            decode={part: second[part].decode for part in [*both, *([FRAME] if FRAME in second else [])]},
            weight_bytes={part: second[part].weight_bytes + twice * first[part].weight_bytes for part in both},
            kv_bytes_per_token=facts.kv_bytes_per_token,
            loss=max(self._facts[prefill].loss, facts.loss),
        )

    def key_of(self, device: Device) -> str:
        """Under which name `device` was measured: its own, or its kind's."""
        return device.name if device.name in self._by_device else device.kind

    def _of(self, device: Device) -> dict[str, dict[str, PartTime]]:
        return self._by_device.get(self.key_of(device), {})

    def with_devices_of(self, other: LlmProfile) -> LlmProfile:
        """This profile with what `other`, of the same model, knows of devices; where both know one, `other` counts."""
        new = {time.device for time in other.times}
        facts = {fact.executor: fact for fact in (*self.executors, *other.executors)}
        times = (*(time for time in self.times if time.device not in new), *other.times)
        return replace(self, times=times, executors=tuple(facts.values()))

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "profile") -> LlmProfile:
        """Read a profile; raises SchemaError naming every violation."""
        return schema.load_json(LlmProfile, text, SCHEMA, VERSION, where)
