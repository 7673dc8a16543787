"""Packed matrices on disk, so that a shard is packed once per machine: by content, form and version.

Kept in the executors' cache (checksummed, capped, least recently used goes first). The key holds a hash of the float
weights, so another checkpoint never gets these bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ecotone.executors.cache import executor_store, key_of
from ecotone.llm.recipes import Recipe
from ecotone.llm.weights import WeightSource, content_key

__all__ = ["packed"]

VERSION = 1
WORTH_BYTES = 1 << 22  # below, packing takes less time than a look at the disk


def packed(source: WeightSource, recipe: Recipe, form: str, pack: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`pack(source.read(recipe))`, a flat uint8 tensor, from disk where it was packed before."""
    weight = source.read(recipe)
    if weight.nbytes < WORTH_BYTES:
        return pack(weight)
    store, key = executor_store(), key_of("llm", VERSION, form, content_key([weight]))
    kept = store.get(key)
    if kept:
        return torch.frombuffer(bytearray(kept), dtype=torch.uint8)
    made = pack(weight)
    store.put(key, bytes(made.numpy().data))
    return made
