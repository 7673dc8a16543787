"""One shard whose prompts and whose decoding are computed by two executors over one cache.

Which executor is fast differs by phase: prompts are bound by arithmetic, decoding by the bytes of weights. Both copies of
the weights are counted in `weight_bytes`. Keys and values need no hand-over: both write the same blocks. A step that mixes
prompts and decoding is split by rows, so that what a row gets does not depend on who shares its step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecotone.decoding.step import FEW_TOKENS, Step
from ecotone.llm.config import DecoderConfig
from ecotone.llm.executors.executor import ShardExecutor, ShardFactory
from ecotone.llm.kv import KvCache
from ecotone.llm.weights import WeightSource
from ecotone.llmplan import Span

__all__ = ["PhasedShard", "PhasedShards"]


@dataclass(frozen=True, slots=True)
class PhasedShards:
    """`prefill` computes rows of more than `few_tokens` tokens, `decode` the others. `id` is "prefill's+decode's"."""

    prefill: ShardFactory
    decode: ShardFactory
    few_tokens: int = FEW_TOKENS

    @property
    def id(self) -> str:
        return f"{self.prefill.id}+{self.decode.id}"

    def available(self, accelerator: str) -> str:
        return self.prefill.available(accelerator) or self.decode.available(accelerator)

    def supports(self, config: DecoderConfig) -> str:
        return self.prefill.supports(config) or self.decode.supports(config)

    def load(
        self, source: WeightSource, span: Span, cache: KvCache, accelerator: str = "cpu", threads: int = 1, context: int = 0
    ) -> PhasedShard:
        """Both shards over `cache`; raises what either raises."""
        made = [part.load(source, span, cache, accelerator, threads, context) for part in (self.prefill, self.decode)]
        return PhasedShard(self.id, made[0], made[1], self.few_tokens)


class PhasedShard:
    """See ShardExecutor. `bits_per_weight` is the decoder's: it decides how fast tokens come."""

    def __init__(self, id: str, prefill: ShardExecutor, decode: ShardExecutor, few_tokens: int):
        self.id, self.prefill, self.decode, self.few_tokens = id, prefill, decode, few_tokens
        self.config, self.span, self.cache = decode.config, decode.span, decode.cache
        self.weight_bytes = prefill.weight_bytes + decode.weight_bytes
        self.bits_per_weight = decode.bits_per_weight

    def forward(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        is_few = [row.count <= self.few_tokens for row in step.rows]
        if all(is_few):
            return self.decode.forward(step, x)
        if not any(is_few):
            return self.prefill.forward(step, x)
        if self.span.num_layers:
            self.cache.extend(step)  # for all rows or for none; the two parts below then find their room again
        parts = torch.split(x, [row.count for row in step.rows])
        counts = [row.num_logits if self.span.head else row.count for row in step.rows]
        made: dict[int, torch.Tensor] = {}
        for executor, wanted in ((self.prefill, False), (self.decode, True)):
            own = [index for index, few in enumerate(is_few) if few == wanted]
            rows = tuple(step.rows[index] for index in own)
            answer = executor.forward(Step(rows=rows), torch.cat([parts[index] for index in own]))
            made |= dict(zip(own, torch.split(answer, [counts[index] for index in own]), strict=True))
        return torch.cat([made[index] for index in range(len(step.rows))])
