"""The one interface behind every shard executor, and what a shard says of itself.

A shard executor holds the packed weights of a span and works on the shard's KvCache. Several may share one cache: one
for prompts, one for decoding (`phases.py`). An executor's id is "name:precision" ("torch:fp32", "native:int4").
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from ecotone.decoding.step import Step
from ecotone.llm.config import DecoderConfig
from ecotone.llm.kv import KvCache
from ecotone.llm.weights import WeightSource
from ecotone.llmplan import Span
from ecotone.units import EcotoneError

__all__ = ["Continues", "ShardError", "ShardExecutor", "ShardFactory"]


class ShardError(EcotoneError):
    """A shard executor is unknown or missing here, or cannot prepare or run a span."""


class ShardExecutor(Protocol):
    """Runs steps of one span. Not thread-safe: one step at a time, from one thread.

    `weight_bytes` is what the packed weights take in memory, `bits_per_weight` the average over matrices, scales included.
    """

    @property
    def id(self) -> str: ...

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def span(self) -> Span: ...

    @property
    def cache(self) -> KvCache: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def bits_per_weight(self) -> float: ...

    def forward(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        """Compute `step`: room in the cache is made first, and every row's tokens are in the cache afterwards.

        `x`: token ids (T,) where the span embeds, else hidden states (T, width), any float type. Returns float32 logits
        (step.num_logits, vocabulary) where the span has the head, else hidden states (T, width), float32.
        Raises KvCacheFull or SlotError before anything is computed; the shard stays usable.
        """
        ...


@runtime_checkable
class Continues(Protocol):
    """A shard executor of a whole model that can also guess several tokens in one call."""

    def continue_greedily(self, slot: int, start: int, token: int, count: int, vocabulary: int) -> list[int]:
        """The `count` tokens that follow `token`, which is at position `start` of `slot`: each the most likely id below
        `vocabulary` after those before it. Positions up to start + count - 1 are in the cache then. Raises KvCacheFull.
        """
        ...


class ShardFactory(Protocol):
    """One kind of executor. `id` is "name:precision"."""

    @property
    def id(self) -> str: ...

    def available(self, accelerator: str) -> str:
        """ "" when this executor works for `accelerator` ("cpu", "cuda", "mps"), else the reason and the remedy."""
        ...

    def supports(self, config: DecoderConfig) -> str:
        """ "" when every option of `config` is computed, else which is not."""
        ...

    def load(
        self, source: WeightSource, span: Span, cache: KvCache, accelerator: str = "cpu", threads: int = 1, context: int = 0
    ) -> ShardExecutor:
        """Read and pack the weights of `span`. `context`: the longest sequence to come (0: the model's own maximum).

        Raises ShardError where the executor cannot, ModelError where the weights are wrong.
        """
        ...
