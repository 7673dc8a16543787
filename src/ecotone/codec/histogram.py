"""The entropy stage "+rans": codes of one tensor with the histogram that was counted on them, neighbours taken into account.

A code is written with the table of its class: how far its neighbours before and above are from the usual code (the commonest
one), in powers of two. Activations are smooth, so that this saves a further 5 to 15 % of what a Huffman coder makes of them;
where the tensor is too small to pay for several tables, one is used. A table is stated by levels: share 2**((level - 49) /
4), 0 for a code that does not occur; from these both ends make the same frequencies, in integers.

Payload: flags u8 (1: classes, 2: levels deflated), the usual code u8, bytes of levels u16, levels, then rans.py's bytes.
"""

from __future__ import annotations

import math
import struct

import numpy as np

from ecotone.codec import rans
from ecotone.codec.bits import pack_bits, packed_bytes, unpack_bits
from ecotone.codec.catalogue import CodecError
from ecotone.codec.entropy import compress as squeeze
from ecotone.codec.entropy import decompress as unsqueeze
from ecotone.codec.rans import Context, Tables

__all__ = ["compress", "decompress"]

_HEAD = struct.Struct("<BBH")
_CLASSES, _DEFLATED = 1, 2
MAX_CLASSES = 8
TOP = 49  # the level of a code that is all there is: 4 * 12 + 1
_LEVEL_BITS = 6
_WEIGHT = np.array(
    [0, *(math.isqrt(math.isqrt(16**4 << k)) for k in range(TOP))], np.int64
)  # 16 * 2**(k / 4), exactly floored
Array = np.ndarray


def compress(codes: Array, num_symbols: int, stride: int) -> bytes:
    """Flat uint8 `codes` below `num_symbols` (at least one), `stride` of them in a row."""
    usual = int(np.bincount(codes, minlength=1).argmax())
    context, classes = _context(num_symbols, usual, stride)
    grid, row = rans.arrange(codes, None, context)
    joint = np.bincount((row * np.uint32(num_symbols) + grid).reshape(-1), minlength=classes * num_symbols)
    counts = joint.reshape(classes, num_symbols)
    whole = counts.sum(axis=0, keepdims=True)
    flags = _CLASSES if _cost_bits(counts) < _cost_bits(whole) else 0
    if not flags:
        counts, row = whole, np.zeros_like(row)
    levels = _levels(counts)
    stated = pack_bits(np.pad(levels.reshape(-1), (0, -levels.size % 8)), _LEVEL_BITS).tobytes()
    deflated = squeeze(levels.reshape(-1), "deflate")
    if len(deflated) < len(stated):
        flags, stated = flags | _DEFLATED, deflated
    body = rans.write(grid, row, Tables.of_weights(_WEIGHT[levels]))
    return _HEAD.pack(flags, usual, len(stated)) + stated + body


def decompress(data: memoryview, count: int, num_symbols: int, stride: int) -> Array:
    """The `count` codes again; raises CodecError for anything that compress does not write."""
    if len(data) < _HEAD.size:
        raise CodecError("rans: the payload is shorter than its head; it was cut")
    flags, usual, size = _HEAD.unpack_from(data)
    if flags > _CLASSES + _DEFLATED or usual >= num_symbols or size > len(data) - _HEAD.size:
        raise CodecError("rans: the payload's head is damaged; send it again")
    context, classes = _context(num_symbols, usual, stride) if flags & _CLASSES else (None, 1)
    stated, wanted = data[_HEAD.size : _HEAD.size + size], classes * num_symbols
    if flags & _DEFLATED:
        levels = unsqueeze(stated, "deflate", wanted)
    elif size == packed_bytes(wanted, _LEVEL_BITS):
        levels = unpack_bits(np.frombuffer(stated, np.uint8), _LEVEL_BITS, wanted)[:wanted]
    else:
        raise CodecError(f"rans: {size} bytes are no levels of {wanted} codes; the payload is damaged")
    if levels.max() > TOP:
        raise CodecError(f"rans: a level is above {TOP}; the payload is damaged")
    tables = Tables.of_weights(_WEIGHT[levels.reshape(classes, num_symbols)])
    return rans.decode(data[_HEAD.size + size :], count, tables, None, context)


def _levels(counts: Array) -> Array:
    total = counts.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = TOP + np.rint(4 * np.log2(counts / np.maximum(total, 1)))
    return np.where(counts > 0, np.maximum(level, 1), 0).astype(np.uint8)


def _cost_bits(counts: Array) -> float:
    """Bits that the codes and their table take, about."""
    total = counts.sum(axis=1, keepdims=True)
    share = counts[counts > 0] / np.broadcast_to(total, counts.shape)[counts > 0]
    return float(-(counts[counts > 0] * np.log2(share)).sum()) + 5.0 * np.count_nonzero(counts)


def _context(num_symbols: int, usual: int, stride: int) -> tuple[Context, int]:
    """The classes by neighbours and how many there are: the sum of both distances in powers of two."""
    near = np.abs(np.arange(num_symbols) - usual)
    sums = range(2 * int(near.max()) + 1)
    class_of = np.array([min(distance.bit_length(), MAX_CLASSES - 1) for distance in sums])
    return Context(near, class_of, max(stride, 1)), int(class_of[-1]) + 1
