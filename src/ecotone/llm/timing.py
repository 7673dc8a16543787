"""How long one shard executor takes for each kind of layer, the embedding and the head, by phase, batch and context.

What a planner adds up: layers that differ in window, rope or experts are measured once each. A prompt is a chunk of
tokens of one sequence behind `context` tokens; decoding is one token of each of `rows` sequences behind `context`; a
window of drafts is several. Seconds are the least of a few runs, on an otherwise idle machine.

A part is timed as it runs in a stage: behind others whose weights took its place in the processor's caches. Timed again and
again by itself, a layer of 11 MB is read from a cache of 32 MB, and a token seems to take 0.4 of what it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ecotone.decoding.step import Row, Step
from ecotone.llm.config import DecoderConfig, LayerConfig
from ecotone.llm.executors.executor import ShardExecutor, ShardFactory
from ecotone.llm.kv import BLOCK_TOKENS, KvCache
from ecotone.llm.weights import WeightSource
from ecotone.llmplan import Span

__all__ = ["WAY", "Load", "ShardTime", "layer_kinds", "measure"]

REPEATS = 5
WAY = 2
"""Another number when times are taken in another way: kept profiles of a former one are not read."""
_MOST_OTHER_BYTES = 1 << 28  # more than any processor caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`count` tokens of each of `rows` sequences, each behind `context` tokens."""

    rows: int
    count: int
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTime:
    """One measurement: `part` is "embedding", "head" or the index of a layer that stands for its kind."""

    executor: str
    part: str
    load: Load
    step_s: float
    weight_bytes: int


DECODE = tuple(Load(rows=r, count=1, context=c) for r in (1, 4) for c in (128, 1024))
WINDOW = (Load(rows=1, count=4, context=128),)
PREFILL = (Load(rows=1, count=128, context=0), Load(rows=1, count=512, context=0), Load(rows=1, count=128, context=896))


def layer_kinds(config: DecoderConfig) -> dict[LayerConfig, int]:
    """The first layer of every kind."""
    found: dict[LayerConfig, int] = {}
    for index, layer in enumerate(config.layers):
        found.setdefault(layer, index)
    return found


def measure(
    factory: ShardFactory,
    source: WeightSource,
    cache_dtype: torch.dtype,
    loads: Sequence[Load] = (*DECODE, *WINDOW, *PREFILL),
    accelerator: str = "cpu",
    threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[ShardTime, ...]:
    """Load each part of the model alone and time it under each of `loads` that its positions allow.

    Raises what `factory.load` raises. Takes the time of all steps REPEATS + 1 times, and of filling the cache once each.
    """
    config = source.config
    spans = {str(index): Span(start=index, stop=index + 1) for index in layer_kinds(config).values()}
    spans |= {"embedding": Span(start=0, stop=0, embedding=True), "head": Span(start=0, stop=0, head=True)}
    made, other_bytes = [], 0
    for part, span in spans.items():
        fitting = [load for load in loads if load.context + load.count <= config.max_positions]
        tokens = max((load.rows * (load.context + load.count + BLOCK_TOKENS) for load in fitting), default=BLOCK_TOKENS)
        cap_bytes = tokens * config.kv_bytes_per_token(1, cache_dtype.itemsize) + (1 << 12)
        cache = KvCache(config, span, cap_bytes, cache_dtype, accelerator)
        shard = factory.load(source, span, cache, accelerator, threads)
        if span.num_layers:
            other_bytes = min((config.num_layers - 1) * shard.weight_bytes, _MOST_OTHER_BYTES)
        others = torch.zeros(other_bytes // 4 if accelerator == "cpu" else 0)
        for load in fitting:
            seconds = _least_s(shard, load, others, clock)
            made.append(
                ShardTime(executor=factory.id, part=part, load=load, step_s=seconds, weight_bytes=shard.weight_bytes)
            )
    return tuple(made)


def _least_s(shard: ShardExecutor, load: Load, others: torch.Tensor, clock: Callable[[], float]) -> float:
    """`others` stands for the weights of the other layers."""
    for slot in shard.cache.tables.slots():
        shard.cache.tables.free(slot)
    if load.context and shard.span.num_layers:
        for slot in range(load.rows):
            shard.forward(Step(rows=(Row(slot=slot, start=0, count=load.context),)), _input(shard, load.context))
    logits = 0 if not shard.span.head else 1 if load.count > load.rows else load.count
    rows = tuple(Row(slot=s, start=load.context, count=load.count, num_logits=logits) for s in range(load.rows))
    step, x = Step(rows=rows), _input(shard, load.rows * load.count)
    shard.forward(step, x)
    times = []
    for _ in range(REPEATS):
        others.sum()
        before = clock()
        shard.forward(step, x)
        times.append(clock() - before)
    return min(times)


def _input(shard: ShardExecutor, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if shard.span.embedding:
        return torch.randint(0, shard.config.vocabulary, (count,), generator=generator)
    return torch.randn(count, shard.config.width, generator=generator)
