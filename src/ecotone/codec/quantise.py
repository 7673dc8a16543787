"""Uniform mid-tread quantisation: float32 <-> codes below 2**b, one range per item or per channel of an item.

Legend: a group shares one step s and one integer zero point z; L = 2**b - 1; level = s * (code - z), so zero is always a
level and comes back exactly (half of a ReLU tensor). s = max((hi - lo) / (L - DELTA), max|x| / 2**12), the second for
tensors that hardly vary (the error stays below 2**-13 of the value, as fp16's does); z = floor(1/2 + DELTA/2 - lo/s), so
that lo and hi both round into [0, L]: DELTA covers every rounding of float32, hence no clamping pass. Rounding is to the
nearest: |error| <= s * (1/2 + 2**-9) + max|x| * 2**-22, unbiased. Groups below 2**-100 become zero; a tensor with a value
that is not finite or above 2**100 is refused (None) and travels as it is.
Clipping (QuantPipe, 2211.04515): the alpha of least squared error, alpha**2 / (3 * 4**b) for rounding + 2 B**2 exp(-alpha /
B) for what is cut off a Laplace density of scale B, hence alpha = B * W(3 * 4**b), W of Lambert; B = sqrt(var / 2), round
the mean. One-sided tensors (after ReLU, nearly after GeLU) put all levels on one side: alpha = B * W(3 * 4**(b + 1)). Zeros
cost nothing here, so B = sqrt(sum of x**2 / (2 * number above zero)); where half are, that is QuantPipe's sqrt(mean of
x**2). Speed: a few numpy passes over slabs that stay in the cache; rounding and conversion are one addition of 1.5 * 2**23,
which leaves the code in the low byte of the float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["Grid", "Layout", "dequantise", "fit", "layout", "quantise"]

_Picker = Callable[[np.ndarray], np.ndarray]
SLAB = 1 << 16  # elements: 256 KiB of floats, inside the second-level cache
DELTA = 2.0**-9
TINY, HUGE = 2.0**-100, 2.0**100
MAGIC = 1.5 * 2.0**23
# W(3 * 4**b), the principal branch of Lambert's function; solved again by the tests.
LAMBERT = {2: 2.830683, 3: 3.897229, 4: 5.028640, 5: 6.204766}
ONE_SIDED = 0.1  # |lo| up to this share of hi still counts as one-sided (GeLU's dip)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a contiguous tensor falls into groups: `rows` x `width` values, groups either rows or columns of an item."""

    items: int
    rows: int  # of one item when `by_column`, of all items otherwise
    width: int
    by_column: bool

    @property
    def num_groups(self) -> int:
        return self.items * self.width if self.by_column else self.rows


@dataclass(frozen=True, slots=True)
class Grid:
    """Step and zero point of every group: float32 and int16, flat."""

    step: np.ndarray
    zero: np.ndarray


def layout(shape: tuple[int, ...], per_channel: bool) -> Layout:
    """Groups of `shape`: dimension 0 counts items from two dimensions on; channels are dimension 1 of (N, C, H, W, ..)
    and the last one of (N, T, C). Vectors and matrices have no channels to speak of: one range per item.
    """
    items = shape[0] if len(shape) >= 2 else 1
    if per_channel and len(shape) == 3:
        return Layout(items, shape[1], shape[2], True)
    rows = items * shape[1] if per_channel and len(shape) >= 4 else items
    return Layout(items, rows, math.prod(shape) // max(rows, 1), False)


def fit(x: np.ndarray, where: Layout, bits: int, clip: bool) -> tuple[Grid, float] | None:
    """The grid for flat float32 `x` and the bound on |decoded - x|; None where a value is not finite or beyond 2**100."""
    if where.num_groups == 1 and not clip:
        return _fit_one(float(x.min()), float(x.max()), bits)
    view = _grouped(x, where)
    lo, hi = view.min(axis=1).reshape(-1), view.max(axis=1).reshape(-1)
    top = np.maximum(np.abs(lo), np.abs(hi)).astype(np.float64)
    if not top.max() < HUGE:  # NaN compares false
        return None
    low, high = lo.astype(np.float64), hi.astype(np.float64)
    excess = 0.0
    if clip:
        low, high = _clipped(view, low, high, bits)
        excess = float(max((low - lo).max(), (hi - high).max(), 0.0))
        top = np.maximum(np.abs(low), np.abs(high))
    step = np.maximum((high - low) / ((1 << bits) - 1 - DELTA), top * 2.0**-12)
    step = np.where(top < TINY, 1.0, step).astype(np.float32)
    zero = np.floor(0.5 + DELTA / 2 - low / step)
    bound = np.where(top < TINY, top, step.astype(np.float64) * (0.5 + DELTA) + top * 2.0**-22)
    return Grid(step, zero.astype(np.int16)), float(bound.max()) + excess


def _fit_one(low: float, high: float, bits: int) -> tuple[Grid, float] | None:
    """`fit` for a single group, in plain floats: the arrays of one element below would cost more than a small tensor."""
    top = max(abs(low), abs(high))
    if not (top < HUGE and low == low):
        return None
    if top < TINY:
        return Grid(np.ones(1, np.float32), np.zeros(1, np.int16)), top
    step = np.array([max((high - low) / ((1 << bits) - 1 - DELTA), top * 2.0**-12)], np.float32)
    rounded = float(step[0])
    zero = np.array([math.floor(0.5 + DELTA / 2 - low / rounded)], np.int16)
    return Grid(step, zero), rounded * (0.5 + DELTA) + top * 2.0**-22


def quantise(x: np.ndarray, where: Layout, grid: Grid, bits: int, clip: bool) -> np.ndarray:
    """Codes of flat float32 `x`, uint8, padded with zeros to a multiple of 8."""
    codes = np.empty(-(-x.size // 8) * 8, np.uint8)
    codes[x.size :] = 0
    inverse = np.float32(1.0) / grid.step
    bias = grid.zero.astype(np.float32) + np.float32(MAGIC)
    scratch = np.empty(min(SLAB, x.size), np.float32)
    for start, stop, shape, pick in _slabs(where):
        flat = scratch[: stop - start] if stop - start <= SLAB else np.empty(stop - start, np.float32)
        slab = flat.reshape(shape)
        np.multiply(x[start:stop].reshape(shape), pick(inverse), out=slab)
        np.add(slab, pick(bias), out=slab)
        if clip:
            np.clip(slab, np.float32(MAGIC), np.float32(MAGIC + (1 << bits) - 1), out=slab)
        np.copyto(codes[start:stop], flat.view(np.int32), casting="unsafe")
    return codes


def dequantise(codes: np.ndarray, where: Layout, grid: Grid, size: int) -> np.ndarray:
    """Flat float32 values of the first `size` codes."""
    values = np.empty(size, np.float32)
    zero = grid.zero.astype(np.float32)
    has_zero = bool(grid.zero.any())  # seldom after ReLU
    for start, stop, shape, pick in _slabs(where):
        slab = values[start:stop].reshape(shape)
        np.copyto(slab, codes[start:stop].reshape(shape))
        if has_zero:
            np.subtract(slab, pick(zero), out=slab)
        np.multiply(slab, pick(grid.step), out=slab)
    return values


def _grouped(x: np.ndarray, where: Layout) -> np.ndarray:
    """Dimension 1 runs inside a group."""
    return x.reshape((where.items, where.rows, where.width) if where.by_column else (where.rows, where.width))


def _clipped(view: np.ndarray, lo: np.ndarray, hi: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    top = np.maximum(np.abs(lo), np.abs(hi))
    safe = top.max() < 2.0**60 and top.min() > 2.0**-50  # squares stay inside float32, whose sums numpy does pairwise
    kind = np.float32 if safe else np.float64
    square = np.square(view, dtype=kind).mean(axis=1).reshape(-1).astype(np.float64)
    mean = view.mean(axis=1, dtype=kind).reshape(-1).astype(np.float64)
    one_sided = (lo >= -ONE_SIDED * hi) & (hi > 0)
    spread = np.sqrt(np.maximum(square - mean * mean, 0.0) / 2)
    alpha = LAMBERT[bits] * spread
    above = np.count_nonzero(view > 0, axis=1).reshape(-1) / view.shape[1]
    beta = np.sqrt(square / np.maximum(2 * above, 1 / view.shape[1]))
    high = np.where(one_sided, LAMBERT[bits + 1] * beta, mean + alpha)
    low = np.where(one_sided, lo, mean - alpha)
    return np.maximum(lo, np.minimum(low, hi)), np.minimum(hi, np.maximum(high, lo))


def _slabs(where: Layout) -> Iterator[tuple[int, int, tuple[int, ...], _Picker]]:
    """Flat ranges of at most about SLAB elements, their shape, and what picks their groups' constants."""
    rows, width = where.rows, where.width
    pick: _Picker
    if where.by_column:
        block = max(1, SLAB // width)
        for item in range(where.items):
            pick = _Pick(slice(item * width, (item + 1) * width), (1, width))
            for row in range(0, rows, block):
                count = min(block, rows - row)
                start = (item * rows + row) * width
                yield start, start + count * width, (count, width), pick
    elif width >= SLAB or rows == 1:
        for row in range(rows):
            pick = _Pick(slice(row, row + 1), (1,)) if rows > 1 else _same
            for start in range(row * width, (row + 1) * width, SLAB):
                stop = min(start + SLAB, (row + 1) * width)
                yield start, stop, (stop - start,), pick
    else:
        block = SLAB // width
        for row in range(0, rows, block):
            count = min(block, rows - row)
            pick = _Pick(slice(row, row + count), (count, 1))
            yield row * width, (row + count) * width, (count, width), pick


def _same(constants: np.ndarray) -> np.ndarray:
    return constants


@dataclass(frozen=True, slots=True)
class _Pick:
    groups: slice
    shape: tuple[int, ...]

    def __call__(self, constants: np.ndarray) -> np.ndarray:
        return constants[self.groups].reshape(self.shape)
