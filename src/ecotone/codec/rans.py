"""Range asymmetric numeral systems (rANS) with static tables: many states side by side, each step one row of numpy.

Theory (Duda, 1311.2540). A table gives symbol s the slots [c(s), c(s) + f(s)) of 2**P. A state x in [2**12, 2**28) takes a
symbol by x' = x + (x // f) * (2**P - f) + c, after giving its low 16 bits away where x >= f * 2**16; reading undoes the
steps in reverse. Symbol t of lane l is number l * steps + t of the message: a lane is a stretch of it, so the symbol before
and the symbol one row above lie in the same lane and may choose the table (see Context). Integers only: the same bytes on
every machine. A lane costs about 20 bits beyond the information, a step some microseconds: what both cost together on a slow
link is least where the lanes grow with the root of the message. O(n) in 2 to 4 sqrt(n) numpy steps.

Bytes: the lanes' last states (the low 16 bits of each, then their upper 12, two in three bytes), then 16-bit words in the
order of reading. Nothing here says how many symbols there are or which tables were used: see histogram.py and learned.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ecotone.codec.catalogue import CodecError

__all__ = ["PRECISION", "TOTAL", "Context", "Tables", "arrange", "decode", "encode", "lanes_of", "write"]

PRECISION = 12
TOTAL = 1 << PRECISION
LOW, WORD = 1 << 12, 16
MAX_LANES = 1024
Array = np.ndarray


class Tables:
    """Frequencies [tables, symbols] that add up to 2**PRECISION in each row; 0 where a symbol cannot be written."""

    def __init__(self, frequencies: Array):
        self.frequency = np.ascontiguousarray(frequencies, np.int64)
        if self.frequency.ndim != 2 or not 1 <= self.frequency.shape[1] <= 256 or not len(self.frequency):
            raise CodecError(f"rans: frequencies of shape {self.frequency.shape}, needed are rows of 1 to 256 symbols")
        if (self.frequency < 0).any() or (self.frequency.sum(axis=1) != TOTAL).any():
            raise CodecError(f"rans: the frequencies of a table do not add up to {TOTAL}")
        self.start = np.cumsum(self.frequency, axis=1) - self.frequency

    @staticmethod
    def of_weights(weights: Array) -> Tables:
        """Shares in proportion to `weights` [tables, symbols], at least one slot where the weight is above 0.

        A table without any weight gives all to symbol 0. Integers only: both ends make the same tables.
        """
        weight = np.array(weights, np.int64)
        weight[:, 0] += weight.sum(axis=1) == 0
        present = weight > 0
        room = TOTAL - present.sum(axis=1, keepdims=True)
        found = present + weight * room // weight.sum(axis=1, keepdims=True)
        found[np.arange(len(found)), weight.argmax(axis=1)] += TOTAL - found.sum(axis=1)
        return Tables(found)

    @cached_property
    def slots(self) -> tuple[Array, Array, Array]:
        """Per table and slot, flat: the symbol (u8), its frequency and the slot's place in it (both int64)."""
        rows, width = self.frequency.shape
        flat = self.frequency.reshape(-1)
        symbol = np.repeat(np.tile(np.arange(width, dtype=np.uint8), rows), flat)
        offset = np.tile(np.arange(TOTAL), rows) - np.repeat(self.start.reshape(-1), flat)
        return symbol, np.repeat(flat, flat), offset


@dataclass(frozen=True, slots=True)
class Context:
    """The table of a symbol is `base` (of its lane and step) + class_of[near(before) + near(one row above)].

    `near` [symbols] says how far a symbol is from the usual one, 0 for that, 255 at most; `stride` symbols are one row. In
    the first row of a lane the symbol before counts twice, and before the first symbol of a lane all was usual.
    """

    near: Array
    class_of: Array  # of the sum: 2 * near.max() + 1 entries at least
    stride: int


def lanes_of(count: int) -> int:
    """How many states share a message: the largest power of two up to sqrt(count) / 2, part of the format."""
    return min(1 << max(math.isqrt(count) // 2, 1).bit_length() - 1, MAX_LANES)


def encode(symbols: Array, tables: Tables, rows: Array | None = None) -> bytes:
    """The bytes of flat uint8 `symbols`; `rows`: the table of each (None: 0). Raises CodecError.

    The last lanes are filled up with symbol 0 of table 0.
    """
    grid, row = arrange(symbols, rows)
    return write(grid, row, tables)


def arrange(symbols: Array, rows: Array | None = None, context: Context | None = None) -> tuple[Array, Array]:
    """Flat uint8 `symbols` as [steps, lanes], filled up with symbol 0, and the table of each: `rows` + that of `context`."""
    lanes = lanes_of(symbols.size)
    steps = -(-symbols.size // lanes)
    grid = _grid(symbols, lanes, steps, np.uint8)
    row = np.zeros((steps, lanes), np.uint32) if rows is None else _grid(rows, lanes, steps, np.uint32)
    if context is not None:
        row += _classes(grid, context)
    return grid, row


def write(grid: Array, row: Array, tables: Tables) -> bytes:
    """The bytes of arranged symbols; raises CodecError for a symbol that has no place in its table."""
    at = row * np.uint32(tables.frequency.shape[1])
    at += grid
    frequency, start = (table.astype(np.uint32).reshape(-1).take(at) for table in (tables.frequency, tables.start))
    if frequency.size and not frequency.all():
        raise CodecError("rans: a symbol has no place in its table")
    lanes, gain = grid.shape[1], np.uint32(TOTAL) - frequency
    words, given = np.empty(at.shape, np.uint16), np.empty(at.shape, np.bool_)
    x, part, bits = np.full(lanes, LOW, np.uint32), np.empty(lanes, np.uint32), np.full(lanes, WORD, np.uint32)
    for f, g, c, word, gives in zip(frequency[::-1], gain[::-1], start[::-1], words[::-1], given[::-1], strict=True):
        np.right_shift(x, bits, out=part)
        np.greater_equal(part, f, out=gives)
        np.copyto(word, x, casting="unsafe")
        np.copyto(x, part, where=gives)
        np.floor_divide(x, f, out=part)
        np.multiply(part, g, out=part)
        np.add(x, part, out=x)
        np.add(x, c, out=x)
    return _states(x) + words[given].astype("<u2").tobytes()


def decode(data: memoryview, count: int, tables: Tables, rows: Array | None = None, context: Context | None = None) -> Array:
    """The `count` symbols again, uint8; raises CodecError for bytes that encode does not write with these tables."""
    lanes = lanes_of(count)
    steps = -(-count // lanes)
    size = 2 * lanes + (3 * lanes + 1) // 2
    if len(data) < size or (len(data) - size) % 2:
        raise CodecError(f"rans: {len(data)} bytes do not hold {lanes} states and whole words; the payload was cut")
    x = _from_states(data[:size], lanes)
    words = np.frombuffer(data[size:], "<u2").astype(np.int64)
    base = None if rows is None else _grid(rows, lanes, steps, np.int64) * TOTAL
    grid = np.empty((steps, lanes), np.uint8)
    taken = _read(x, words, grid, tables.slots, base, context)
    if taken != len(words) or (x != LOW).any():
        raise CodecError("rans: the payload does not end where its symbols do; it is damaged, send it again")
    return np.ascontiguousarray(grid.T).reshape(-1)[:count]


def _read(
    x: Array, words: Array, grid: Array, slots: tuple[Array, Array, Array], base: Array | None, context: Context | None
) -> int:
    """Fill `grid` step by step; how many words were taken. The states in `x` end at LOW where all is well."""
    symbol, frequency, offset = slots
    slot, part, lanes = np.empty_like(x), np.empty_like(x), len(x)
    mask, shift, low = (np.full(lanes, number, np.int64) for number in (TOTAL - 1, PRECISION, LOW))
    is_low = np.empty(lanes, np.bool_)
    near = None if context is None else _Near(context, lanes)
    taken = 0
    for step, row in enumerate(grid):
        np.bitwise_and(x, mask, out=slot)
        if base is not None:
            np.add(slot, base[step], out=slot)
        if near is not None:
            np.add(slot, near.tables(step), out=slot)
        symbol.take(slot, out=row, mode="clip")
        np.right_shift(x, shift, out=x)
        np.multiply(x, frequency.take(slot, out=part, mode="clip"), out=x)
        np.add(x, offset.take(slot, out=part, mode="clip"), out=x)
        if near is not None:
            near.saw(step, row)
        hungry = np.less(x, low, out=is_low).nonzero()[0]
        if hungry.size:
            piece = words[taken : taken + hungry.size]
            taken += hungry.size
            if piece.size < hungry.size:
                raise CodecError("rans: the payload ends before its symbols do; it was cut")
            x[hungry] = (x[hungry] << WORD) + piece
    return taken


class _Near:
    """What the reader keeps of the symbols it saw, lane by lane, to find the tables of the next step."""

    def __init__(self, context: Context, lanes: int):
        self._near = context.near.astype(np.int64)
        self._offset = context.class_of.astype(np.int64) * TOTAL
        self._ring = np.zeros((context.stride, lanes), np.int64)  # the last row of each lane
        self._before = np.zeros(lanes, np.int64)
        self._sum, self._index, self._tables = (
            np.empty_like(self._before),
            np.empty(lanes, np.intp),
            np.empty_like(self._before),
        )

    def tables(self, step: int) -> Array:
        """Where the table of each lane starts among all slots."""
        stride = len(self._ring)
        np.add(self._before, self._ring[step % stride] if step >= stride else self._before, out=self._sum)
        return self._offset.take(self._sum, out=self._tables, mode="clip")

    def saw(self, step: int, symbols: Array) -> None:
        """Keep the symbols of a step."""
        self._before = self._ring[step % len(self._ring)]
        np.copyto(self._index, symbols)
        self._near.take(self._index, out=self._before, mode="clip")


def _states(x: Array) -> bytes:
    """Low 16 bits of each state, then the upper 12 of all, two in three bytes."""
    upper = np.zeros(len(x) + len(x) % 2, np.uint32)
    upper[: len(x)] = x >> np.uint32(WORD)
    pairs = upper[0::2] | upper[1::2] << np.uint32(12)
    packed = pairs.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    return x.astype("<u2").tobytes() + packed[: (3 * len(x) + 1) // 2]


def _from_states(data: memoryview, lanes: int) -> Array:
    packed = np.zeros((-(-lanes // 2), 4), np.uint8)
    tail = np.frombuffer(data[2 * lanes :], np.uint8)
    packed[:, :3] = np.pad(tail, (0, -len(tail) % 3)).reshape(-1, 3)
    pairs = packed.view("<u4")[:, 0].astype(np.int64)
    upper = np.stack((pairs & 0xFFF, pairs >> 12), axis=1).reshape(-1)[:lanes]
    x = np.frombuffer(data[: 2 * lanes], "<u2").astype(np.int64) + (upper << WORD)
    if x.size and x.min() < LOW:
        raise CodecError("rans: a state is out of range; the payload is damaged")
    return x


def _grid(values: Array, lanes: int, steps: int, kind: type) -> Array:
    """`values` as [steps, lanes], contiguous, filled up with 0."""
    full: Array = np.zeros(lanes * steps, kind)
    full[: values.size] = values
    return np.ascontiguousarray(full.reshape(lanes, steps).T)


def _classes(grid: Array, context: Context) -> Array:
    """The class that each symbol's neighbours choose, [steps, lanes]."""
    near = context.near.astype(np.uint8).take(grid)
    both = np.zeros(grid.shape, np.uint16)
    both[1:] = near[:-1]
    first, rest = both[: context.stride], both[context.stride :]
    rest += near[: len(rest)]
    first += first
    return context.class_of.astype(np.uint32).take(both)
