"""One shard whose prompts and whose decoding are computed by two executors over one cache.

Which executor is fast differs by phase: prompts are bound by arithmetic, decoding by the bytes of weights. Both copies of
the weights are counted in `weight_bytes`. Keys and values need no hand-over: both write the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ecotone.llm.config import DecoderConfig
from ecotone.llm.executors.executor import ShardExecutor, ShardFactory
from ecotone.llm.kv import KvCache
from ecotone.llm.step import Span, Step
from ecotone.llm.weights import WeightSource

__all__ = ["PhasedShard", "PhasedShards"]

FEW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class PhasedShards:
    """`prefill` computes steps of more than `few_tokens` tokens, `decode` the others. `id` is "prefill's+decode's"."""

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
        return (self.decode if step.num_tokens <= self.few_tokens else self.prefill).forward(step, x)
