"""The one file of formulas for language models: time, rate, memory and loss of a plan under stated requests.

Legend: P prompt and A answer tokens, n requests at a time; d width; K chunks of a prompt, q = P/K tokens each; stages s on
devices j; alpha, beta latency and rate of a directed link; e bytes per number of a codec, o its further bytes per token.

    (1)  pairs(m, c, w) = sum over i = 1..m of min(c + i, w)                    m tokens behind c, window w (llmprofile.py)
    (2)  few[s](r)   = F + sum over parts of fixed + token*r + pair*r*pairs(1, c, w)         r rows, c = P + A/2 (LLM-PQ)
    (3)  many[s](K)  = F + sum over parts of fixed + (token*P + pair*pairs(P, 0, w))/K   the mean chunk; without the head
    (4)  hop(b)      = alpha + b/beta, of which b/beta occupies the link
    (5)  b(m tokens) = frame + 4m (ids: to the first stage);  frame + m*(4 + d*e + o) (on);  frame + 32*rows (back)
    (6)  T(r)        = sum of few[s](r) + sum of hop(b(r)), from the driver and straight back to it: time per token at r = 1
    (7)  tau(r)      = max over devices of the sum of their few[s](r), and over links of their occupancy
    (8)  ttft(K)     = sum of many[s] + head(1) + sum of hop(b(q)) + (K-1) * max over devices and links: sends overlap
    (9)  tokens/s    = n / max(G*tau(r), T(r)),  r = ceil(n/G): no bubbles, n requests dealt into the best number G of frames
    (10) with bubbles  n / (T(1) + (n-1)*tau(1))    (EdgeShard, arXiv 2405.14371)
    (11) request     = ttft + (A-1) * T(1)
    (12) memory[j]   = weights (both copies of "a+b") + keys and values + outputs kept for replay (decoding/boundary.py)
    (13) loss        = sum over layers and head of the executor's loss / (N+1) + sum over crossings of the codec's

Not in here: the work of packing bf16 or int8, buffers of a step, links that share a medium, prompts that others wait behind.
Layers are measured alone, so what a call costs is counted per layer, where a real stage pays it once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from ecotone.cluster import Cluster, DeviceId, Link
from ecotone.llmplan import CODECS, LOCAL, LlmPlan, LlmStage, Span
from ecotone.llmprofile import EMBEDDING, FEW_TOKENS, FRAME, HEAD, Curve, LlmProfile, Measured, attended
from ecotone.schema import check
from ecotone.units import EcotoneError

__all__ = [
    "BLOCK_TOKENS", "BOUNDARY_CAP_BYTES", "CHUNKS", "HopCost", "LlmCost", "LlmCostModel", "MemoryUse", "Shape", "StageCost",
    "bubbles_per_s", "frames_of", "no_bubbles_per_s",
]  # fmt: skip

BLOCK_TOKENS = 32  # keys are kept in blocks of so many tokens (llm/kv.py)
BOUNDARY_CAP_BYTES = 1 << 28  # what a stage keeps at most of its outputs (decoding/stage.py)
CHUNKS = (32, 64, 128, 256, 512, 1024, 2048)  # sizes of chunks that the engine uses (decoding/pace.py)
FRAME_BYTES, ID_BYTES, RESULT_ROW_BYTES = 128, 4, 32
EXACT_BYTES = CODECS["fp32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is asked of the model: `prompt` tokens in, `answer` tokens out, `concurrency` requests at a time.

    `context`: tokens of the longest sequence, 0: prompt + answer. `max_slots`: sequences with room for their keys, 0: as
    many as `concurrency`.
    """

    prompt: int = 512
    answer: int = 128
    concurrency: int = 1
    context: int = 0
    max_slots: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if self.prompt < 1 or self.answer < 1 or self.concurrency < 1 or self.context < 0 or self.max_slots < 0:
            wrong.append("prompt, answer and concurrency must be positive, context and slots not negative")
        elif 0 < self.context < self.prompt + self.answer:
            wrong.append(f"a context of {self.context} does not hold {self.prompt} + {self.answer} tokens")
        check("requests", wrong)

    @property
    def longest(self) -> int:
        return self.context or self.prompt + self.answer

    @property
    def slots(self) -> int:
        return self.max_slots or self.concurrency

    @property
    def kept_tokens(self) -> int:
        """Tokens whose keys have room at once, in whole blocks."""
        return math.ceil(self.longest / BLOCK_TOKENS) * BLOCK_TOKENS * self.slots

    @property
    def depth(self) -> float:
        """c of equation (2)."""
        return self.prompt + self.answer / 2

    def chunks(self, most: int = CHUNKS[-1]) -> tuple[int, ...]:
        """Sizes of chunks worth looking at: the engine's that part this prompt, and the prompt whole where it may be."""
        whole = (self.prompt,) if self.prompt <= most else ()
        return (*(size for size in CHUNKS if size < self.prompt and size <= most), *whole)

    def num_chunks(self, chunk: int) -> int:
        return math.ceil(self.prompt / chunk)


def frames_of(concurrency: int) -> tuple[tuple[int, int], ...]:
    """(rows, frames) worth looking at: each number of rows in a frame with the fewest frames that hold all requests."""
    found: dict[int, int] = {}
    for frames in range(1, concurrency + 1):
        found.setdefault(math.ceil(concurrency / frames), frames)
    return tuple(found.items())


def no_bubbles_per_s(concurrency: int, frames: int, tau_s: float, loop_s: float) -> float:
    """Equation (9): tokens per second where each frame starts its next token when its own last one is back."""
    return concurrency / max(frames * tau_s, loop_s)


def bubbles_per_s(concurrency: int, tau_s: float, loop_s: float) -> float:
    """Equation (10): tokens per second where all frames finish a token before the next one starts."""
    return concurrency / (loop_s + (concurrency - 1) * tau_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """Of one stage: seconds for one token of one request, for a chunk of the prompt, and its bytes."""

    device: DeviceId
    decode_s: float
    chunk_s: float
    weight_bytes: int
    kv_bytes: int
    boundary_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HopCost:
    """Of one way over a link: bytes of a decoding frame of one row and of a chunk, and seconds with latency."""

    source: DeviceId
    target: DeviceId
    codec: str
    decode_bytes: float
    decode_s: float
    chunk_bytes: float
    chunk_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    device: DeviceId
    used_bytes: int
    has_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmCost:
    """A plan's figures. `violations`: why it cannot run; its times hold as if it could (inf where a link is missing).

    `chunk_tokens`, `num_chunks`: how the prompt is cut for `ttft_s`. `rows`, `frames`: how requests are dealt for
    `tokens_per_s`. `tpot_s` is T and `tau_s` tau of a frame of one row; `bubbles_per_s` is equation (10).
    """

    ttft_s: float
    tpot_s: float
    request_s: float
    tokens_per_s: float
    chunk_tokens: int
    num_chunks: int
    rows: int
    frames: int
    tau_s: float
    bubbles_per_s: float
    loss: float
    stages: tuple[StageCost, ...]
    hops: tuple[HopCost, ...]
    memory: tuple[MemoryUse, ...]
    violations: tuple[str, ...] = ()

    @property
    def is_feasible(self) -> bool:
        return not self.violations


class LlmCostModel:
    """Prices plans of one profile on one cluster under one Shape. Lookups are kept, so one object prices many plans."""

    def __init__(self, profile: LlmProfile, cluster: Cluster, shape: Shape):
        self.profile, self.cluster, self.shape = profile, cluster, shape
        self._measured: dict[tuple[str, str], Measured | None] = {}
        self.devices = {device.name: device for device in cluster.devices}

    # ---- parts -----------------------------------------------------------------------------------------------------------

    def measured(self, device: str, executor: str) -> Measured | None:
        key = (device, executor)
        if key not in self._measured:
            self._measured[key] = self.profile.measured(self.devices[DeviceId(device)], executor)
        return self._measured[key]

    def few_s(self, curve: Curve, part: str, rows: int) -> float:
        """Equation (2), one part."""
        pairs = attended(1, self.shape.depth, self.profile.windows[part]) if part in self.profile.windows else 0.0
        return curve.at_s(rows, rows * pairs)

    def many_s(self, measured: Measured, part: str, chunk: int) -> float:
        """Equation (3), one part; of the head one row, which only the last chunk asks for. Short prompts are decoded."""
        prompt, count = self.shape.prompt, self.shape.num_chunks(chunk)
        curve = measured.decode[part] if prompt <= FEW_TOKENS else measured.prefill[part]
        if part == HEAD:
            return curve.at_s(1, 0.0)
        pairs = attended(prompt, 0, self.profile.windows[part]) if part in self.profile.windows else 0.0
        return curve.at_s(prompt / count, pairs / count)

    def parts_of(self, span: Span) -> Iterator[str]:
        yield from [EMBEDDING] if span.embedding else []
        yield from self.profile.layers[span.start : span.stop]
        yield from [HEAD] if span.head else []

    def kv_bytes(self, device: str, executor: str, num_layers: int) -> int:
        """Bytes for the keys and values of all sequences that have room."""
        found = self.measured(device, executor)
        if found is None:
            raise EcotoneError(f"executor {executor} was not measured on {device}; profile it")
        return num_layers * found.kv_bytes_per_token * self.shape.kept_tokens

    def boundary_bytes(self, span: Span) -> int:
        """Outputs kept for whoever is lost behind this stage: counted in float32, whatever crosses."""
        if span.head or not span.num_layers:
            return 0
        return min(math.ceil(self.shape.kept_tokens * self.profile.width * EXACT_BYTES), BOUNDARY_CAP_BYTES)

    # ---- links -----------------------------------------------------------------------------------------------------------

    def state_bytes(self, tokens: float, codec: str) -> float:
        """Equation (5), hidden states."""
        own = self.profile.width * CODECS[codec] + (4 if codec == "int8" else 0)
        return FRAME_BYTES + tokens * (ID_BYTES + own)

    def ids_bytes(self, tokens: float) -> float:
        """Equation (5), from the driver."""
        return FRAME_BYTES + tokens * ID_BYTES

    def result_bytes(self, rows: int) -> float:
        """Equation (5), back to the driver."""
        return FRAME_BYTES + rows * RESULT_ROW_BYTES

    # ---- plans -----------------------------------------------------------------------------------------------------------

    def predict(self, plan: LlmPlan, chunk: int = 0) -> LlmCost:
        """Everything about `plan`, its prompt cut into chunks of `chunk` tokens (0: the size that gives the first token
        soonest). Raises EcotoneError where a stage's executor was not measured on its device at all."""
        return _Priced(self, plan).cost(chunk)


class _Priced:
    """One plan under the model: what the formulas sum and maximise over."""

    def __init__(self, model: LlmCostModel, plan: LlmPlan):
        self.model, self.plan, self.shape = model, plan, model.shape
        self.missing: list[str] = []
        self.measured = [self._measured(stage) for stage in plan.stages]
        ends = [plan.driver, *(stage.device for stage in plan.stages), plan.driver]
        last = len(ends) - 2
        self.hops: list[tuple[int, Link | None, DeviceId, DeviceId]] = [
            (index, model.cluster.link(one, other), one, other)
            for index, (one, other) in enumerate(pairwise(ends))
            if one != other
        ]
        self.last = last

    def _measured(self, stage: LlmStage) -> Measured:
        if stage.device not in self.model.devices:
            raise EcotoneError(f"cluster {self.model.cluster.name} has no device {stage.device!r}, which the plan names")
        found = self.model.measured(stage.device, stage.executor)
        missing = "" if found is None else next((p for p in self.model.parts_of(stage.span) if p not in found.decode), "")
        if found is None or missing:
            of = f"{missing} " if missing else ""
            raise EcotoneError(f"{of}by {stage.executor} was not measured on {stage.device}; profile it or plan without it")
        return found

    def few_s(self, index: int, rows: int) -> float:
        found, span = self.measured[index], self.plan.stages[index].span
        own = found.decode[FRAME].at_s(rows, 0.0) if FRAME in found.decode else 0.0
        return own + sum(self.model.few_s(found.decode[part], part, rows) for part in self.model.parts_of(span))

    def many_s(self, index: int, chunk: int) -> tuple[float, float]:
        """(without the head, the head)."""
        found, span = self.measured[index], self.plan.stages[index].span
        tokens = self.shape.prompt / self.shape.num_chunks(chunk)
        own = found.prefill[FRAME].at_s(tokens, 0.0) if FRAME in found.prefill else 0.0
        parts = [part for part in self.model.parts_of(span) if part != HEAD]
        head = self.model.many_s(found, HEAD, chunk) if span.head else 0.0
        return own + sum(self.model.many_s(found, part, chunk) for part in parts), head

    def hop_bytes(self, index: int, tokens: float, rows: int) -> float:
        if index == 0:
            return self.model.ids_bytes(tokens)
        return self.model.result_bytes(rows) if index > self.last - 1 else self.model.state_bytes(tokens, self.codec(index))

    def codec(self, index: int) -> str:
        return LOCAL if index in (0, self.last) else self.plan.stages[index - 1].codec

    def hop_s(self, link: Link | None, size_bytes: float) -> tuple[float, float]:
        """(with latency, occupancy)."""
        if link is None:
            return math.inf, math.inf
        return link.transfer_s(size_bytes), size_bytes / link.bandwidth_bytes_per_s

    def decode(self, rows: int) -> tuple[float, float]:
        """(T, tau) of equations (6) and (7)."""
        busy: dict[DeviceId, float] = {}
        for index, stage in enumerate(self.plan.stages):
            busy[stage.device] = busy.get(stage.device, 0.0) + self.few_s(index, rows)
        hops = [self.hop_s(link, self.hop_bytes(index, rows, rows)) for index, link, _, _ in self.hops]
        return sum(busy.values()) + sum(t for t, _ in hops), max([*busy.values(), *(occupied for _, occupied in hops)])

    def first(self, chunk: int) -> float:
        """Equation (8)."""
        count = self.shape.num_chunks(chunk)
        busy: dict[DeviceId, float] = {}
        heads = 0.0
        for index, stage in enumerate(self.plan.stages):
            body, head = self.many_s(index, chunk)
            busy[stage.device], heads = busy.get(stage.device, 0.0) + body, heads + head
        tokens = self.shape.prompt / count
        hops = [self.hop_s(link, self.hop_bytes(index, tokens, 1)) for index, link, _, _ in self.hops]
        slowest = max([*busy.values(), *(occupied for _, occupied in hops)])
        behind = (count - 1) * slowest if count > 1 else 0.0
        return sum(busy.values()) + heads + sum(t for t, _ in hops) + behind

    def cost(self, chunk: int) -> LlmCost:
        shape = self.shape
        sizes = (chunk,) if chunk else shape.chunks()
        ttft_s, chunk = min(((self.first(size), size) for size in sizes), key=lambda pair: pair[0])
        loop_s, tau_s = self.decode(1)
        dealt = []
        for rows, frames in frames_of(shape.concurrency):
            loop, tau = self.decode(rows)
            dealt.append((no_bubbles_per_s(shape.concurrency, frames, tau, loop), rows, frames))
        rate, rows, frames = max(dealt, key=lambda found: found[0])
        memory = tuple(self.memory())
        return LlmCost(
            ttft_s=ttft_s, tpot_s=loop_s, request_s=ttft_s + (shape.answer - 1) * loop_s, tokens_per_s=rate,
            chunk_tokens=chunk, num_chunks=shape.num_chunks(chunk), rows=rows, frames=frames, tau_s=tau_s,
            bubbles_per_s=bubbles_per_s(shape.concurrency, tau_s, loop_s), loss=self.loss(),
            stages=tuple(self.stages(chunk)), hops=tuple(self.hop_costs(chunk)), memory=memory,
            violations=tuple(self.violations(memory)),
        )  # fmt: skip

    def stages(self, chunk: int) -> Iterator[StageCost]:
        for index, stage in enumerate(self.plan.stages):
            weights = sum(self.measured[index].weight_bytes[part] for part in self.model.parts_of(stage.span))
            yield StageCost(
                device=stage.device, decode_s=self.few_s(index, 1), chunk_s=sum(self.many_s(index, chunk)),
                weight_bytes=weights, kv_bytes=stage.kv_bytes, boundary_bytes=self.model.boundary_bytes(stage.span),
            )  # fmt: skip

    def hop_costs(self, chunk: int) -> Iterator[HopCost]:
        tokens = self.shape.prompt / self.shape.num_chunks(chunk)
        for index, link, source, target in self.hops:
            one, many = self.hop_bytes(index, 1, 1), self.hop_bytes(index, tokens, 1)
            codec = "token ids" if index in (0, self.last) else self.codec(index)
            yield HopCost(
                source=source, target=target, codec=codec, decode_bytes=one, decode_s=self.hop_s(link, one)[0],
                chunk_bytes=many, chunk_s=self.hop_s(link, many)[0],
            )  # fmt: skip

    def memory(self) -> Iterator[MemoryUse]:
        """Equation (12), with the keys that the plan states; standbys hold weights too."""
        used: dict[DeviceId, int] = {}
        own = list(self.stages(self.shape.prompt))
        for stage in own:
            total = stage.weight_bytes + stage.kv_bytes + stage.boundary_bytes
            used[stage.device] = used.get(stage.device, 0) + total
        for standby in self.plan.standbys:
            held = own[standby.stage]
            used[standby.device] = used.get(standby.device, 0) + held.weight_bytes + held.kv_bytes + held.boundary_bytes
        for device, total in used.items():
            yield MemoryUse(device=device, used_bytes=total, has_bytes=self.model.devices[device].memory_bytes)

    def loss(self) -> float:
        """Equation (13)."""
        each = self.model.profile.num_layers + 1
        own = sum(
            m.loss * (s.span.num_layers + s.span.head) / each for m, s in zip(self.measured, self.plan.stages, strict=True)
        )
        return own + sum(self.model.profile.codec_losses.get(stage.codec, 0.0) for stage in self.plan.stages)

    def violations(self, memory: tuple[MemoryUse, ...]) -> Iterator[str]:
        for use in memory:
            if use.used_bytes > use.has_bytes:
                yield f"needs {use.used_bytes} bytes on {use.device}, which has {use.has_bytes}"
        for _, link, source, target in self.hops:
            if link is None:
                yield f"sends from {source} to {target}, but the cluster has no such link"
        for device in self.plan.devices:
            for pair in ((self.plan.driver, device), (device, self.plan.driver)):
                if device != self.plan.driver and self.model.cluster.link(*pair) is None:
                    yield f"needs a link from {pair[0]} to {pair[1]}, which the cluster has not"
        for index, stage in enumerate(self.plan.stages):
            allowed = self.model.devices[stage.device].executors
            if allowed and stage.executor not in allowed:
                yield f"device {stage.device} may not use executor {stage.executor}"
            if stage.kv_bytes < self.model.kv_bytes(stage.device, stage.executor, stage.span.num_layers):
                room = f"{self.shape.slots} x {self.shape.longest} tokens"
                yield f"stage {index} has {stage.kv_bytes} bytes for keys, too few for {room}"
