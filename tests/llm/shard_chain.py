"""A pipeline of shards in one process: what an engine does with them, without the network."""

from __future__ import annotations

import torch

from ecotone.decoding.step import Row, Step
from ecotone.llm.executors.executor import ShardExecutor, ShardFactory
from ecotone.llm.kv import KvCache
from ecotone.llm.weights import WeightSource
from ecotone.llmplan import Span


def spans(num_layers: int, cut: int | None) -> list[Span]:
    """One span for all (None), or two with the border before layer `cut`."""
    if cut is None:
        return [Span(start=0, stop=num_layers, embedding=True, head=True)]
    return [Span(start=0, stop=cut, embedding=True), Span(start=cut, stop=num_layers, head=True)]


class Chain:
    def __init__(
        self, factory: ShardFactory, source: WeightSource, cut: int | None = None, context: int = 256,
        dtype: torch.dtype = torch.float32, cap_bytes: int = 1 << 20,
    ):  # fmt: skip
        parts = spans(source.config.num_layers, cut)
        caches = [KvCache(source.config, part, cap_bytes, dtype) for part in parts]
        self.shards: list[ShardExecutor] = [
            factory.load(source, part, cache, context=context) for part, cache in zip(parts, caches, strict=True)
        ]

    def run(self, rows: list[Row], ids: torch.Tensor) -> torch.Tensor:
        x = ids
        for shard in self.shards:
            x = shard.forward(Step(rows=tuple(rows)), x)
        return x

    def greedy(self, prompt: torch.Tensor, count: int, slot: int = 0) -> list[int]:
        """Token by token from `prompt`."""
        made = [int(self.run([Row(slot=slot, start=0, count=len(prompt), num_logits=1)], prompt).argmax())]
        for position in range(len(prompt), len(prompt) + count - 1):
            made.append(
                int(self.run([Row(slot=slot, start=position, count=1, num_logits=1)], torch.tensor(made[-1:])).argmax())
            )
        return made


def ragged(chain: Chain, sequences: list[torch.Tensor], chunks: list[int]) -> list[torch.Tensor]:
    """Logits of every position of every sequence, all fed together in chunks of cycling sizes."""
    done, made, turn = [0] * len(sequences), [[] for _ in sequences], 0
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        rows, parts = [], []
        for slot, sequence in enumerate(sequences):
            count = min(chunks[(turn + slot) % len(chunks)], len(sequence) - done[slot])
            if count > 0:
                rows.append(Row(slot=slot, start=done[slot], count=count, num_logits=count))
                parts.append(sequence[done[slot] : done[slot] + count])
        logits = chain.run(rows, torch.cat(parts)).split([row.count for row in rows])
        for row, part in zip(rows, logits, strict=True):
            made[row.slot].append(part)
            done[row.slot] += row.count
        turn += 1
    return [torch.cat(parts) for parts in made]
