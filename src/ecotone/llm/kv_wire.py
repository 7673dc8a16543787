"""Keys and values on their way to another shard: raw, or compressed without loss; both give back the very same bits.

    raw    as they lie in the cache
    zstd   bytes of equal significance together, then Zstandard: exponents of neighbours are alike

A head names type and shape, and the receiver checks them against its own before it allocates anything.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
import zstandard

from ecotone.decoding.frame import Payload
from ecotone.units import EcotoneError

__all__ = ["KV_CODECS", "pack_kv", "unpack_kv"]

KV_CODECS = ("raw", "zstd")
_HEAD = struct.Struct("<BBIIII")  # codec, dtype, layers, key-value heads, tokens, head size
_DTYPES = (torch.float32, torch.bfloat16)
_LEVEL = 1


def pack_kv(keys_LHTD: torch.Tensor, values_LHTD: torch.Tensor, codec: str) -> bytes:
    """The bytes of keys, then values, each (layers, key-value heads, tokens, head size)."""
    if codec not in KV_CODECS:
        raise EcotoneError(f"keys have no codec {codec!r}; there are {', '.join(KV_CODECS)}")
    dtype = keys_LHTD.dtype
    head = _HEAD.pack(KV_CODECS.index(codec), _DTYPES.index(dtype), *keys_LHTD.shape)
    both = torch.stack([keys_LHTD, values_LHTD]).cpu().contiguous()
    raw = both.view(torch.uint8).flatten().numpy()
    if codec == "zstd":
        planes = np.ascontiguousarray(raw.reshape(-1, dtype.itemsize).T)
        return head + zstandard.ZstdCompressor(level=_LEVEL).compress(planes.data)
    return head + raw.tobytes()


def unpack_kv(payload: Payload, layers: int, heads: int, tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, values) of what `pack_kv` made; raises EcotoneError where they are not of the shape that is expected."""
    view = memoryview(payload)
    if len(view) < _HEAD.size:
        raise EcotoneError("keys that were cut short")
    codec, kind, *shape = _HEAD.unpack_from(view)
    if codec >= len(KV_CODECS) or kind >= len(_DTYPES) or tuple(shape) != (layers, heads, tokens, size):
        raise EcotoneError(f"keys of shape {tuple(shape)} came, {(layers, heads, tokens, size)} expected")
    dtype = _DTYPES[kind]
    num_bytes = 2 * layers * heads * tokens * size * dtype.itemsize
    rest = view[_HEAD.size :]
    if KV_CODECS[codec] == "zstd":
        try:
            planes = zstandard.ZstdDecompressor().decompress(rest, max_output_size=num_bytes)
        except zstandard.ZstdError as error:
            raise EcotoneError(f"keys cannot be decompressed: {error}") from None
        if len(planes) != num_bytes:
            raise EcotoneError(f"keys of {len(planes)} bytes came, {num_bytes} expected")
        raw = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, -1).T).reshape(-1)
    else:
        if len(rest) != num_bytes:
            raise EcotoneError(f"keys of {len(rest)} bytes came, {num_bytes} expected")
        raw = np.frombuffer(bytearray(rest), np.uint8)
    both = torch.from_numpy(raw).view(dtype).view(2, layers, heads, tokens, size)
    return both[0], both[1]
