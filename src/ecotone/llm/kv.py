"""The key-value cache of one shard: one pool of blocks per layer, shared by every executor that works on the shard.

A block holds 32 positions: tensors are (blocks, key-value heads, 32, head size), the layout that OpenVINO's paged
attention reads too, so a prompt computed there is decoded by another executor without a copy. Blocks are taken and
given back by `blocks.BlockTables`. Keys are stored rotated. The cache leaves the shard only by `export`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ecotone.decoding.blocks import BlockTables, KvCacheFull, SlotError
from ecotone.decoding.step import Row, Step
from ecotone.llm.config import DecoderConfig
from ecotone.llmplan import Span
from ecotone.units import EcotoneError, format_quantity

__all__ = ["BLOCK_TOKENS", "KvCache", "KvCacheFull", "SlotError"]

BLOCK_TOKENS = 32


class KvCache:
    """Keys and values of layers [span.start, span.stop), at most `cap_bytes` in all.

    `keys` and `values` are lists of one tensor per layer of the span. Memory is reserved at once and, on a CPU, touched
    only as blocks are used.
    """

    def __init__(
        self, config: DecoderConfig, span: Span, cap_bytes: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        self.config, self.span, self.dtype = config, span, dtype
        block_bytes = config.kv_bytes_per_token(max(span.num_layers, 1), dtype.itemsize) * BLOCK_TOKENS
        num_blocks = cap_bytes // block_bytes
        if num_blocks < 1:
            need, have = format_quantity(block_bytes, "bytes"), format_quantity(cap_bytes, "bytes")
            raise EcotoneError(f"key-value cache of {have} holds no block; {span.describe()} needs at least {need}")
        shape = (num_blocks, config.num_kv_heads, BLOCK_TOKENS, config.head_size)
        # Zeros, not whatever was there: masked positions are multiplied by zero, which leaves a NaN a NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(span.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(span.num_layers)]
        self.tables = BlockTables(num_blocks, BLOCK_TOKENS)
        self.capacity_bytes = num_blocks * block_bytes

    @property
    def num_free_tokens(self) -> int:
        """Tokens that surely fit still, whatever slots they belong to."""
        return self.tables.num_free * BLOCK_TOKENS

    def extend(self, step: Step | Sequence[Row]) -> None:
        """Make room for the rows (rolling back where they start below a slot's length); raises KvCacheFull, SlotError."""
        self._copy(self.tables.extend(step.rows if isinstance(step, Step) else step))

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            for pool in (*self.keys, *self.values):
                pool[target] = pool[source]

    def indices(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """(block, place in the block) of every token of `rows`, flat; for writing."""
        blocks = [self.tables.table(r.slot)[p // BLOCK_TOKENS] for r in rows for p in range(r.start, r.stop)]
        places = [p % BLOCK_TOKENS for r in rows for p in range(r.start, r.stop)]
        device = self.keys[0].device
        return torch.tensor(blocks, device=device), torch.tensor(places, device=device)

    def export(self, slot: int, layers: Sequence[int], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of (keys, values) of positions [start, stop): (layers, key-value heads, stop - start, head size).

        `layers` are numbered as in the model. Raises SlotError where the slot does not hold those positions.
        """
        if not 0 <= start <= stop <= self.tables.length(slot):
            text = f"slot {slot} holds {self.tables.length(slot)} tokens"
            raise SlotError(f"{text}; positions [{start}, {stop}) cannot be exported")
        mine = [self._own(layer) for layer in layers]
        first = start // BLOCK_TOKENS
        blocks = torch.tensor(self.tables.table(slot)[first : self.tables.blocks_for(stop)], dtype=torch.long)
        offset = start - first * BLOCK_TOKENS

        def gather(pools: list[torch.Tensor]) -> torch.Tensor:
            shape = (self.config.num_kv_heads, stop - start, self.config.head_size)
            made = torch.empty(len(mine), *shape, dtype=self.dtype, device=pools[0].device if pools else "cpu")
            for index, layer in enumerate(mine):
                made[index] = pools[layer][blocks].transpose(0, 1).flatten(1, 2)[:, offset : offset + stop - start]
            return made

        return gather(self.keys), gather(self.values)

    def import_(
        self, slot: int, layers: Sequence[int], start: int, keys_LHTD: torch.Tensor, values_LHTD: torch.Tensor,
        *, for_all: bool = False,
    ) -> None:  # fmt: skip
        """Write what `export` gave at positions from `start` on; the slot then holds at least those tokens.

        Layers may come one call after the other, each with the same positions. `for_all`: blocks that other slots share are
        written for them too, since they hold the same tokens; else the slot gets its own. Raises KvCacheFull, SlotError.
        """
        expected = (len(layers), self.config.num_kv_heads, keys_LHTD.shape[2], self.config.head_size)
        if tuple(keys_LHTD.shape) != expected or tuple(values_LHTD.shape) != expected:
            raise SlotError(
                f"slot {slot}: keys {tuple(keys_LHTD.shape)} and values {tuple(values_LHTD.shape)} are not {expected}"
            )
        stop, held = start + expected[2], self.tables.length(slot)
        mine = [self._own(layer) for layer in layers]
        if expected[2] == 0:
            return
        if start > held:
            raise SlotError(f"slot {slot} holds {held} tokens; importing from position {start} would leave a gap")
        if stop > held:
            self.extend([Row(slot=slot, start=held, count=stop - held)])
        if not for_all:
            self._copy(self.tables.make_private(slot, start, stop))
        blocks, places = self.indices([Row(slot=slot, start=start, count=expected[2])])
        for index, layer in enumerate(mine):
            self.keys[layer][blocks, :, places] = keys_LHTD[index].transpose(0, 1).to(self.keys[layer])
            self.values[layer][blocks, :, places] = values_LHTD[index].transpose(0, 1).to(self.values[layer])

    def _own(self, layer: int) -> int:
        if not self.span.start <= layer < self.span.stop:
            raise SlotError(f"layer {layer} is not among {self.span.describe()}")
        return layer - self.span.start
