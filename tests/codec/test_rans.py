"""rANS and the histogram stage: against a scalar reference, near the entropy, and no byte string that breaks them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.codec import CodecError, histogram, rans
from ecotone.codec.rans import TOTAL, Context, Tables

pytestmark = pytest.mark.torch

SEEDS = st.integers(0, 10**6)


def tables(random: np.random.Generator, rows: int, width: int) -> Tables:
    return Tables.of_weights(np.floor(random.exponential(20, (rows, width))).astype(np.int64) + 1)


def reference(symbols: list[int], used: list[int], frequency: list[list[int]]) -> bytes:
    """rANS one symbol at a time, from the format as written in rans.py, with Python's own integers."""
    lanes = rans.lanes_of(len(symbols))
    steps = -(-len(symbols) // lanes)
    padded, rows = (values + [0] * (lanes * steps - len(values)) for values in (symbols, used))
    states, words = [1 << 12] * lanes, {}
    for step in reversed(range(steps)):
        for lane in range(lanes):
            table, symbol = frequency[rows[lane * steps + step]], padded[lane * steps + step]
            f, c = table[symbol], sum(table[:symbol])
            if states[lane] >= f << 16:
                words[step, lane] = states[lane] & 0xFFFF
                states[lane] >>= 16
            states[lane] = states[lane] // f * TOTAL + c + states[lane] % f
    upper = [state >> 16 for state in states] + [0] * (lanes % 2)
    packed = b"".join((a | b << 12).to_bytes(3, "little") for a, b in zip(upper[::2], upper[1::2], strict=True))
    low = b"".join((state & 0xFFFF).to_bytes(2, "little") for state in states)
    return low + packed[: (3 * lanes + 1) // 2] + b"".join(words[key].to_bytes(2, "little") for key in sorted(words))


@settings(max_examples=60)
@given(seed=SEEDS, count=st.integers(0, 1500), width=st.integers(1, 40), rows=st.integers(1, 5))
def test_the_bytes_are_those_of_the_scalar_reference(seed: int, count: int, width: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    table, used = tables(random, rows, width), random.integers(0, rows, count)
    symbols = random.integers(0, width, count).astype(np.uint8)
    data = rans.encode(symbols, table, used)
    assert data == reference(symbols.tolist(), used.tolist(), table.frequency.tolist())
    assert np.array_equal(rans.decode(memoryview(data), count, table, used), symbols)


@settings(max_examples=60)
@given(seed=SEEDS, count=st.integers(0, 4000), width=st.integers(1, 20), stride=st.integers(1, 70))
def test_neighbours_choose_the_same_tables_on_both_sides(seed: int, count: int, width: int, stride: int) -> None:
    random = np.random.default_rng(seed)
    near = random.permutation(width)
    context = Context(near, random.integers(0, 4, 2 * width - 1), stride)
    table, symbols = tables(random, 4, width), random.integers(0, width, count).astype(np.uint8)
    grid, row = rans.arrange(symbols, None, context)
    for lane in range(min(grid.shape[1], 3)):  # what the docstring of Context says, one symbol at a time
        for step in range(min(len(grid), 90)):
            before = int(near[grid[step - 1, lane]]) if step else 0
            above = int(near[grid[step - stride, lane]]) if step >= stride else before
            assert row[step, lane] == context.class_of[before + above]
    data = rans.write(grid, row, table)
    assert np.array_equal(rans.decode(memoryview(data), count, table, None, context), symbols)


@pytest.mark.parametrize("count", [5_000, 40_000, 400_000])
def test_size_is_near_the_information(count: int) -> None:
    random = np.random.default_rng(1)
    table = Tables.of_weights(np.array([[2000, 900, 500, 300, 200, 100, 50, 46]]))
    share = table.frequency[0] / TOTAL
    symbols = random.choice(8, count, p=share).astype(np.uint8)
    bits = -float(np.log2(share[symbols]).sum())
    size = 8 * len(rans.encode(symbols, table))
    assert bits <= size <= 1.002 * bits + 28 * rans.lanes_of(count)  # what the states hold is worth something, but not all


def test_steps_stay_few() -> None:
    for count in (0, 1, 15, 16, 784, 50_000, 300_000):
        lanes = rans.lanes_of(count)
        assert lanes == 2 ** int(math.log2(lanes))
        assert lanes == 1 or 2 * math.sqrt(count) <= count / lanes < 4.2 * math.sqrt(count)
    assert rans.lanes_of(10**8) == rans.MAX_LANES


@given(weights=st.lists(st.lists(st.integers(0, 10**6), min_size=6, max_size=6), min_size=1, max_size=4))
def test_tables_of_weights(weights: list[list[int]]) -> None:
    table = Tables.of_weights(np.array(weights))
    assert (table.frequency.sum(axis=1) == TOTAL).all()
    for row, given_row in zip(table.frequency.tolist(), weights, strict=True):
        for frequency, weight in zip(row, given_row, strict=True):
            assert frequency > 0 or weight == 0
        if sum(given_row):
            assert max(abs(f - TOTAL * w / sum(given_row)) for f, w in zip(row, given_row, strict=True)) <= 6


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.full((2, 2), TOTAL), np.array([[TOTAL + 1, -1]]), np.zeros((0, 4))])
def test_tables_that_are_none(bad: np.ndarray) -> None:
    with pytest.raises(CodecError, match="rans"):
        Tables(bad)


def test_a_symbol_without_a_place_is_named() -> None:
    table = Tables.of_weights(np.array([[1, 0, 1]]))
    with pytest.raises(CodecError, match="no place"):
        rans.encode(np.array([0, 1], np.uint8), table)


@settings(max_examples=80)
@given(
    seed=SEEDS, count=st.integers(1, 6000), num_symbols=st.sampled_from((4, 8, 16, 17, 64, 256)), stride=st.integers(0, 60),
    spread=st.floats(0.05, 50),
)  # fmt: skip
def test_histograms_give_the_codes_again(seed: int, count: int, num_symbols: int, stride: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    codes = np.clip(np.abs(random.normal(0, spread, count)), 0, num_symbols - 1).astype(np.uint8)
    data = histogram.compress(codes, num_symbols, stride)
    assert np.array_equal(histogram.decompress(memoryview(data), count, num_symbols, stride), codes)


def test_classes_pay_where_neighbours_foretell() -> None:
    """Quiet stretches of zeros, busy ones of 8 even codes: half of 3 bits where a neighbour tells which, else one more."""
    random = np.random.default_rng(2)
    busy = np.repeat(np.arange(400) % 2, 200)
    codes = (random.integers(1, 9, busy.size) * busy).astype(np.uint8)
    size = 8 * len(histogram.compress(codes, 9, 1000)) / codes.size
    shuffled = 8 * len(histogram.compress(random.permutation(codes), 9, 1000)) / codes.size
    assert 1.5 < size < 1.65 < 2.5 < shuffled < 2.56


def test_levels_cost_little_against_exact_shares() -> None:
    random = np.random.default_rng(3)
    codes = np.minimum(random.geometric(0.3, 30_000) - 1, 15).astype(np.uint8)
    share = np.bincount(codes) / codes.size
    entropy = -float((share[share > 0] * np.log2(share[share > 0])).sum())
    own = 8 * 20 + 28 * rans.lanes_of(codes.size)  # the table and the states
    assert 8 * len(histogram.compress(codes, 16, 1)) < 1.003 * entropy * codes.size + own


@settings(max_examples=300)
@given(data=st.binary(max_size=200), count=st.integers(1, 900), num_symbols=st.sampled_from((4, 16, 256)))
def test_noise_gives_codes_or_codec_errors(data: bytes, count: int, num_symbols: int) -> None:
    try:
        codes = histogram.decompress(memoryview(data), count, num_symbols, 8)
    except CodecError:
        return
    assert codes.size == count


@settings(max_examples=200)
@given(
    seed=SEEDS, changes=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3), cut=st.booleans()
)
def test_damage_gives_codes_or_codec_errors(seed: int, changes: list[tuple[float, int]], cut: bool) -> None:
    random = np.random.default_rng(seed)
    codes = np.minimum(random.geometric(0.4, 2000) - 1, 15).astype(np.uint8)
    bad = bytearray(histogram.compress(codes, 16, 20))
    for place, change in changes:
        bad[math.floor(place * (len(bad) - 1))] ^= change
    if cut:
        bad = bad[: math.floor(changes[0][0] * len(bad))]
    try:
        found = histogram.decompress(memoryview(bad), codes.size, 16, 20)
    except CodecError:
        return
    assert found.size == codes.size
    assert not cut


def test_announced_sizes_are_not_trusted() -> None:
    """A head that announces more levels than there are bytes, or deflated levels that are a bomb."""
    for data in (b"\x00\x00\xff\xff", b"\x02\x00\x05\x00" + bytes(5), b"\x03\x10\x00\x00", b"\x08\x00\x00\x00"):
        with pytest.raises(CodecError):
            histogram.decompress(memoryview(data), 10, 16, 4)
