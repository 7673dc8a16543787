"""Attention of a ragged step over the paged cache in PyTorch, on any device: gather blocks, then one fused call.

Rows with the same number of tokens are computed together, padded to the longest context among them; a window's rows
gather only the blocks that it reaches. O(tokens x context) per layer; the gather copies each block that is read once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from ecotone.decoding.step import Step
from ecotone.llm.config import DecoderConfig
from ecotone.llm.kv import BLOCK_TOKENS, KvCache

__all__ = ["StepAttention"]


@dataclass(slots=True)
class _Group:
    """Rows of equal length for one window: flat tokens (B * n), block tables (B, blocks), what is seen (B, 1, n, L)."""

    tokens: torch.Tensor
    tables: torch.Tensor
    seen: torch.Tensor
    num_rows: int


@dataclass(slots=True)
class StepAttention:
    """Everything about a step that does not change from layer to layer. Make it after the cache was extended."""

    config: DecoderConfig
    cache: KvCache
    step: Step
    _groups: dict[int, list[_Group]] = field(default_factory=dict)
    _blocks: torch.Tensor | None = None
    _places: torch.Tensor | None = None

    def attend(self, layer: int, window: int, q_TND: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor) -> torch.Tensor:
        """Keep keys and values of `layer` (counted within the span), then attend: (T, N * D)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self._blocks is None:
            self._blocks, self._places = self.cache.indices(self.step.rows)
        keys[self._blocks, :, self._places] = k_THD.to(keys.dtype)
        values[self._blocks, :, self._places] = v_THD.to(values.dtype)
        if window not in self._groups:
            self._groups[window] = self._grouped(window)
        groups = self._groups[window]
        made = [self._group(group, keys, values, q_TND) for group in groups]
        if len(made) == 1:
            return made[0]
        whole = torch.empty(q_TND.shape[0], made[0].shape[1], dtype=made[0].dtype, device=made[0].device)
        for group, part in zip(groups, made, strict=True):
            whole[group.tokens] = part
        return whole

    def _grouped(self, window: int) -> list[_Group]:
        by_count: dict[int, list[int]] = {}
        for index, row in enumerate(self.step.rows):
            by_count.setdefault(row.count, []).append(index)
        return [self._one_group(window, count, indices) for count, indices in by_count.items()]

    def _one_group(self, window: int, count: int, indices: list[int]) -> _Group:
        device = self.cache.keys[0].device
        rows, offsets = [self.step.rows[i] for i in indices], self.step.offsets
        firsts = [max(0, r.start - window + 1) // BLOCK_TOKENS if window else 0 for r in rows]
        lists = [
            self.cache.tables.table(r.slot)[first : self.cache.tables.blocks_for(r.stop)]
            for r, first in zip(rows, firsts, strict=True)
        ]
        longest = max(map(len, lists))
        tables = torch.tensor([blocks + blocks[-1:] * (longest - len(blocks)) for blocks in lists], device=device)
        starts = torch.tensor([r.start for r in rows], device=device)
        at_B1n1 = (starts[:, None] + torch.arange(count, device=device))[:, None, :, None]
        bases = torch.tensor(firsts, device=device)[:, None] * BLOCK_TOKENS
        key_B11L = (bases + torch.arange(longest * BLOCK_TOKENS, device=device))[:, None, None, :]
        seen = key_B11L <= at_B1n1
        if window:
            seen &= key_B11L > at_B1n1 - window
        tokens = torch.tensor([t for i in indices for t in range(offsets[i], offsets[i + 1])], device=device)
        return _Group(tokens=tokens, tables=tables, seen=seen, num_rows=len(rows))

    def _group(self, group: _Group, keys: torch.Tensor, values: torch.Tensor, q_TND: torch.Tensor) -> torch.Tensor:
        config, rows = self.config, group.num_rows
        q = q_TND if len(group.tokens) == q_TND.shape[0] else q_TND[group.tokens]
        q = q.view(rows, -1, config.num_heads, config.head_size).transpose(1, 2)
        k, v = (self._gathered(pool, group).to(q.dtype) for pool in (keys, values))
        shared = config.num_heads // config.num_kv_heads
        if config.attention_softcap:
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
            scores = torch.tanh((q @ k.transpose(-1, -2)).float() * config.scale / config.attention_softcap)
            scores = (scores * config.attention_softcap).masked_fill(~group.seen, float("-inf"))
            made = scores.softmax(-1).to(q.dtype) @ v
        else:
            made = F.scaled_dot_product_attention(q, k, v, group.seen, scale=config.scale, enable_gqa=shared > 1)
        return made.transpose(1, 2).reshape(-1, config.query_size)

    def _gathered(self, pool: torch.Tensor, group: _Group) -> torch.Tensor:
        """(B, H, L, D) of the rows' blocks, one copy."""
        rows = group.num_rows
        picked = pool.transpose(0, 1)[:, group.tables.flatten()]
        return picked.reshape(self.config.num_kv_heads, rows, -1, self.config.head_size).transpose(0, 1)
