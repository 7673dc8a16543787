"""Executors run one shard of a decoder fast on one device; one file each behind `executor.ShardFactory`.

The list below is the registry: there are no plug-ins. "a+b" is a for prompts and b for decoding over one cache.
"""

from __future__ import annotations

import torch

from ecotone.llm.config import DecoderConfig
from ecotone.llm.executors.executor import ShardError, ShardExecutor, ShardFactory
from ecotone.llm.executors.native_shard import NativeShards
from ecotone.llm.executors.openvino_shard import OpenVinoShards
from ecotone.llm.executors.phases import PhasedShards
from ecotone.llm.executors.torch_shard import TorchShards

__all__ = ["IDS", "ShardError", "ShardExecutor", "ShardFactory", "by_id", "cache_dtype", "catalogue"]

_ALL: tuple[ShardFactory, ...] = (
    *(TorchShards(f"torch:{precision}") for precision in ("fp32", "bf16", "int8", "int4")),
    *(NativeShards(f"native:{precision}") for precision in ("fp32", "bf16", "int8", "int4")),
    *(OpenVinoShards(f"openvino:{precision}") for precision in ("fp32", "bf16", "int8", "int4")),
)
IDS = tuple(factory.id for factory in _ALL)


def by_id(id: str) -> ShardFactory:
    """The executor called `id`, or "prefill's+decode's"; raises ShardError naming those that there are."""
    if "+" in id:
        prefill, _, decode = id.partition("+")
        return PhasedShards(by_id(prefill), by_id(decode))
    for factory in _ALL:
        if factory.id == id:
            return factory
    raise ShardError(f"shard executor {id!r} is unknown; known: {', '.join(IDS)}")


def catalogue(config: DecoderConfig, accelerator: str) -> dict[str, str]:
    """Every executor with "" where it can run `config` on `accelerator`, else the reason why not."""
    return {factory.id: factory.available(accelerator) or factory.supports(config) for factory in _ALL}


def cache_dtype(id: str) -> torch.dtype:
    """What the key-value cache of a shard by executor `id` holds: float32 beside float32 weights, else bfloat16."""
    return torch.float32 if id.endswith(":fp32") else torch.bfloat16
