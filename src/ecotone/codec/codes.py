"""Flat float32 values <-> the payload of a quantiser: steps and zero points of all groups, then codes, packed or squeezed.

What tensors.py writes for int ids and learned.py for the latents of a plain autoencoder. The codes of an entropy stage are
left packed where that is shorter, which the mode byte says.
"""

from __future__ import annotations

import math

import numpy as np

from ecotone.codec import entropy, histogram, quantise
from ecotone.codec.bits import pack_bits, packed_bytes, unpack_bits
from ecotone.codec.catalogue import CodecError, Recipe

__all__ = ["RAW", "STORED", "decode_codes", "encode_codes", "table_bytes"]

RAW, STORED = 1, 2  # mode bits: words of the tensor's own dtype; the entropy stage was left out
ZERO_CAP = 1 << 13  # no encoder goes beyond 2**12 + 255
Shape = tuple[int, ...]


def table_bytes(shape: Shape, parts: Recipe) -> int:
    """Bytes of steps and zero points."""
    return 6 * quantise.layout(shape, parts.per_channel).num_groups


def encode_codes(x: np.ndarray, shape: Shape, parts: Recipe) -> list[bytes | memoryview] | None:
    """The payload of flat float32 `x` (not empty), mode byte first; None where a value is not finite or beyond 2**100."""
    where = quantise.layout(shape, parts.per_channel)
    fitted = quantise.fit(x, where, parts.bits, parts.clip)
    if fitted is None:
        return None
    grid = fitted[0]
    codes = quantise.quantise(x, where, grid, parts.bits, parts.clip)
    table: list[bytes | memoryview] = [grid.step.astype("<f4").tobytes(), grid.zero.astype("<i2").tobytes()]
    mode = 0
    if parts.entropy:
        squeezed = _squeeze(codes, x.size, shape, parts)
        if len(squeezed) < packed_bytes(x.size, parts.bits):
            return [b"\0", *table, squeezed]
        mode = STORED
    return [bytes((mode,)), *table, pack_bits(codes, parts.bits).data]


def decode_codes(content: memoryview, parts: Recipe, mode: int, shape: Shape) -> np.ndarray:
    """The values again, flat; `content` is the payload behind its mode byte. Raises CodecError."""
    where, count = quantise.layout(shape, parts.per_channel), math.prod(shape)
    table, plain = 6 * where.num_groups, not parts.entropy or bool(mode & STORED)
    if len(content) < table or (plain and len(content) != table + packed_bytes(count, parts.bits)):
        raise CodecError(f"codec {parts.name}: {len(content)} bytes do not hold {shape}; the payload was cut or padded")
    step = np.frombuffer(content[: 4 * where.num_groups], "<f4")
    zero = np.frombuffer(content[4 * where.num_groups : table], "<i2")
    if not (step.min() > 0 and step.max() <= 2 * quantise.HUGE and zero.min() >= -ZERO_CAP and zero.max() <= ZERO_CAP):
        raise CodecError(f"codec {parts.name}: a step or zero point is out of range; it is damaged")
    if plain:
        codes = unpack_bits(np.frombuffer(content[table:], np.uint8), parts.bits, count)
    else:
        codes = _unsqueeze(content[table:], count, shape, parts)
    return quantise.dequantise(codes, where, quantise.Grid(step, zero), count)


def _squeeze(codes: np.ndarray, count: int, shape: Shape, parts: Recipe) -> bytes:
    if parts.entropy == "rans":
        return histogram.compress(codes[:count], 1 << parts.bits, shape[-1] if shape else 1)
    return entropy.compress(pack_bits(codes, _width(parts)), parts.entropy)


def _unsqueeze(content: memoryview, count: int, shape: Shape, parts: Recipe) -> np.ndarray:
    if parts.entropy == "rans":
        return histogram.decompress(content, count, 1 << parts.bits, shape[-1] if shape else 1)
    width = _width(parts)
    return unpack_bits(entropy.decompress(content, parts.entropy, packed_bytes(count, width)), width, count)


def _width(parts: Recipe) -> int:
    """Bits per code under zstd and deflate: they remove unused bits better than splitting 6 and 3 does."""
    return {6: 8, 3: 4}.get(parts.bits, parts.bits)
