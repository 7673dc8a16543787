"""Bit-packing: exact sizes, exact round trips, against a bit-by-bit oracle for the widths that divide a byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.codec.bits import pack_bits, packed_bytes, unpack_bits

pytestmark = pytest.mark.torch

WIDTHS = st.sampled_from((8, 6, 4, 3, 2, 1))


@given(bits=WIDTHS, count=st.integers(0, 300), seed=st.integers(0, 99))
def test_round_trip_in_exactly_b_bits(bits: int, count: int, seed: int) -> None:
    padded = -(-count // 8) * 8
    codes = np.random.default_rng(seed).integers(0, 1 << bits, padded).astype(np.uint8)
    before = codes.copy()
    packed = pack_bits(codes, bits)
    assert packed.size == packed_bytes(count, bits) == padded * bits // 8
    assert (codes == before).all()
    assert (unpack_bits(packed, bits, count) == codes).all()


@given(bits=st.sampled_from((8, 4, 2, 1)), seed=st.integers(0, 99))
def test_neighbours_lie_side_by_side_low_bits_first(bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, 64).astype(np.uint8)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert pack_bits(codes, bits).tobytes() == number.to_bytes(8 * bits, "little")


def test_six_bits_cost_six() -> None:
    for bits in (8, 6, 4, 3, 2):
        assert 8 * packed_bytes(1_000_000, bits) / 1_000_000 == bits
