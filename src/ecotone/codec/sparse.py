"""Sparse codecs "topk:SHARE" (as in SLICER, 2511.11608): the largest magnitudes of an item in 4 bits each, the rest zero.

Legend: t the least magnitude kept and T the greatest of an item; a value is coded on L + 1 even levels over [t, T]: 16 of
them where nothing kept is negative, else 8 and a sign. Stated bound: max(the greatest magnitude dropped, (T - t) / L * (1/2
+ 2**-9) + T * 2**-22). All values equal to t stay, zeros never.

Positions are a bitmap, or the gaps between what was kept in bytes (255: go on); each is squeezed by the entropy stage, and
the shorter one is sent. Under "+rans", where that is shorter still, there are no positions: dropped is one of 17 symbols,
whose neighbours foretell it.

Payload: flags u8 (1: signs, 2: gaps, 4: symbols), t and step of each item (float32); then kept u32, bytes of positions u32,
bytes of gaps u32, positions, values, or the symbols as histogram.py writes them. O(n).
"""

from __future__ import annotations

import struct

import numpy as np

from ecotone.codec import entropy, histogram
from ecotone.codec.bits import pack_bits, packed_bytes, unpack_bits
from ecotone.codec.catalogue import CodecError, Entropy, Recipe
from ecotone.codec.quantise import DELTA, HUGE, TINY, Layout

__all__ = ["decode_sparse", "encode_sparse", "sparse_bound"]

_HEAD = struct.Struct("<III")
_SIGNED, _GAPS, _RANS = 1, 2, 4
_BITS, _SYMBOLS = 4, 17
_GO_ON = 255
Array = np.ndarray


def encode_sparse(x: Array, where: Layout, parts: Recipe, stride: int) -> bytes | None:
    """The payload of flat float32 `x` (not empty); None where a value is not finite or beyond 2**100."""
    fitted = _fit(x, where, parts.keep)
    if fitted is None:
        return None
    mask, least, step, signed = fitted
    group = _groups(mask, where)
    level = np.rint((np.abs(x[mask]) - least[group]) / step[group])
    codes = np.clip(level, 0, _levels(signed)).astype(np.uint8)
    if signed:
        codes |= np.signbit(x[mask]).astype(np.uint8) << 3
    table = np.concatenate((least, step)).astype("<f4").tobytes()
    flags, written = _positions(mask, codes, parts)
    if parts.entropy == "rans":
        symbols = np.zeros(x.size, np.uint8)
        symbols[mask] = codes + 1
        flags, written = min(
            (flags, written), (_RANS, histogram.compress(symbols, _SYMBOLS, stride)), key=lambda w: len(w[1])
        )
    return bytes((signed | flags,)) + table + written


def decode_sparse(content: memoryview, where: Layout, parts: Recipe, stride: int) -> Array:
    """The values again, flat float32; raises CodecError for anything that encode_sparse does not write."""
    count, start = where.rows * where.width, 1 + 8 * where.rows
    if len(content) < start:
        raise CodecError(f"codec {parts.name}: {len(content)} bytes do not hold {where.rows} items; the payload was cut")
    flags, written = content[0], content[start:]
    least, step = np.frombuffer(content[1:start], "<f4").reshape(2, -1)
    if not (least.min() >= 0 and least.max() <= HUGE and step.min() > 0 and step.max() <= HUGE):
        raise CodecError(f"codec {parts.name}: a magnitude is out of range; the payload is damaged")
    if flags > (_RANS + _SIGNED if parts.entropy == "rans" else _GAPS + _SIGNED) or (flags & _RANS and flags & _GAPS):
        raise CodecError(f"codec {parts.name}: the payload has flags {flags}, which no encoder writes; it is damaged")
    if flags & _RANS:
        symbols = histogram.decompress(written, count, _SYMBOLS, stride)
        mask = symbols > 0
        codes = symbols[mask] - np.uint8(1)
    else:
        mask, codes = _kept(written, bool(flags & _GAPS), count, parts)
    group = _groups(mask, where)
    values = np.zeros(count, np.float32)
    if flags & _SIGNED:
        magnitude = least[group] + step[group] * (codes & 7)
        values[mask] = np.where(codes & 8, -magnitude, magnitude)
    else:
        values[mask] = least[group] + step[group] * codes
    return values


def sparse_bound(x: Array, where: Layout, parts: Recipe) -> float | None:
    """The stated bound on |decoded - x|; None where encode_sparse refuses `x`."""
    fitted = _fit(x, where, parts.keep)
    if fitted is None:
        return None
    mask, _, step, _ = fitted
    dropped = np.where(mask, np.float32(0), np.abs(x))
    rounding = float(step.max()) * (0.5 + DELTA) + float(np.abs(x).max()) * 2.0**-22 if mask.any() else 0.0
    return max(float(dropped.max()), rounding)


def _fit(x: Array, where: Layout, keep: float) -> tuple[Array, Array, Array, bool] | None:
    """What stays (flat), the least kept magnitude and the step of each item, and whether anything kept is negative."""
    size = np.abs(x).reshape(where.rows, where.width)
    top = size.max(axis=1)
    if not top.max() < HUGE:  # NaN compares false
        return None
    rank = where.width - max(1, min(where.width, round(keep * where.width)))
    least = np.partition(size, rank, axis=1)[:, rank]
    mask = (size >= least[:, None]) & (size >= np.float32(TINY))
    least = np.where(mask, size, np.float32(np.inf)).min(axis=1)
    least = np.where(np.isfinite(least), least, np.float32(0))
    signed = bool((x[mask.reshape(-1)] < 0).any())
    step = np.maximum((top - least) / np.float32(_levels(signed)), top * np.float32(2.0**-12))
    return mask.reshape(-1), least, np.where(top < TINY, np.float32(1), step).astype(np.float32), signed


def _levels(signed: bool) -> int:
    return 7 if signed else 15


def _groups(mask: Array, where: Layout) -> Array:
    """The item of every kept value, in order."""
    return np.repeat(np.arange(where.rows), np.count_nonzero(mask.reshape(where.rows, where.width), axis=1))


def _positions(mask: Array, codes: Array, parts: Recipe) -> tuple[int, bytes]:
    """Positions in the shorter form and values behind them; the first is the flag of the form."""
    bitmap, gaps = np.packbits(mask, bitorder="little"), _gaps(mask)
    forms = [_shorter(positions, parts) for positions in (bitmap, gaps)]
    flag, size = (_GAPS, gaps.size) if len(forms[1]) < len(forms[0]) else (0, 0)
    positions = forms[flag // _GAPS]
    values = _shorter(pack_bits(np.pad(codes, (0, -codes.size % 8)), _BITS), parts)
    return flag, _HEAD.pack(codes.size, len(positions), size) + positions + values


def _kept(written: memoryview, is_gaps: bool, count: int, parts: Recipe) -> tuple[Array, Array]:
    """Which values stay, and their codes, from positions and values."""
    if len(written) < _HEAD.size:
        raise CodecError(f"codec {parts.name}: the payload ends before its positions; it was cut")
    kept, size, num_gaps = _HEAD.unpack_from(written)
    stop = _HEAD.size + size
    if kept > count or stop > len(written) or num_gaps > count // _GO_ON + kept:
        raise CodecError(f"codec {parts.name}: the payload announces more than the tensor holds; it is damaged")
    positions = _longer(written[_HEAD.size : stop], parts, num_gaps if is_gaps else -(-count // 8))
    mask = _from_gaps(positions, kept, count) if is_gaps else np.unpackbits(positions, count=count, bitorder="little") > 0
    if mask is None or np.count_nonzero(mask) != kept:
        raise CodecError(f"codec {parts.name}: the positions do not give {kept} values; the payload is damaged")
    codes = unpack_bits(_longer(written[stop:], parts, packed_bytes(kept, _BITS)), _BITS, kept)[:kept]
    return mask, codes


def _gaps(mask: Array) -> Array:
    """Zeros before each kept value, as bytes: a gap of 255 and more is 255 and the rest again."""
    at = mask.nonzero()[0]
    gap = np.diff(at, prepend=-1) - 1
    full = gap // _GO_ON
    out = np.full(int(full.sum()) + gap.size, _GO_ON, np.uint8)
    out[np.cumsum(full + 1) - 1] = gap % _GO_ON
    return out


def _from_gaps(gaps: Array, kept: int, count: int) -> Array | None:
    ends = gaps != _GO_ON
    if np.count_nonzero(ends) != kept or (gaps.size and not ends[-1]):
        return None
    at = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(kept)
    if kept and at[-1] >= count:
        return None
    mask = np.zeros(count, np.bool_)
    mask[at] = True
    return mask


def _shorter(data: Array, parts: Recipe) -> bytes:
    """`data` squeezed where that is shorter: as many bytes as `data` has mean that it was not."""
    squeezed = entropy.compress(data, _for_bytes(parts)) if parts.entropy and data.size else b""
    return squeezed if 0 < len(squeezed) < data.size else data.tobytes()


def _longer(stated: memoryview, parts: Recipe, size: int) -> Array:
    if len(stated) == size:
        return np.frombuffer(stated, np.uint8)
    if len(stated) > size or not parts.entropy:
        raise CodecError(f"codec {parts.name}: {len(stated)} bytes stand for {size}; the payload was cut or padded")
    return entropy.decompress(stated, _for_bytes(parts), size)


def _for_bytes(parts: Recipe) -> Entropy:
    return "zstd" if parts.entropy == "rans" else parts.entropy
