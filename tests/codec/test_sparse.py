"""Top-k codecs: what stays is what a sort says, within the stated bound; positions in the shorter form; hostile bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone import codec
from ecotone.codec import CodecError
from ecotone.codec.catalogue import recipe
from ecotone.codec.quantise import layout
from ecotone.codec.sparse import encode_sparse

pytestmark = pytest.mark.torch

NAMES = tuple(f"topk:{share}{stage}" for share in ("50", "10", "1", "0.5") for stage in ("", "+zstd", "+deflate", "+rans"))
GAPS = 2  # of the flags


def through(x: torch.Tensor, name: str) -> torch.Tensor:
    return codec.decode(codec.encode(x, name), name, tuple(x.shape), "float32")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_stay_and_the_rest_is_zero(name: str, signed: bool) -> None:
    x = torch.randn(3, 5, 30, 20, generator=torch.Generator().manual_seed(1))
    x = x if signed else x.abs()
    y = through(x, name)
    kept = round(recipe(name).keep * x[0].numel())
    for item, decoded in zip(x.reshape(3, -1), y.reshape(3, -1), strict=True):
        order = item.abs().argsort(descending=True)
        assert torch.count_nonzero(decoded) == kept
        assert (decoded[order[kept:]] == 0).all()
        step = (item.abs().max() - item.abs()[order[kept - 1]]) / (7 if signed else 15)
        assert (decoded - item)[order[:kept]].abs().max() <= 0.51 * step + 1e-6
        assert (decoded[order[:kept]].sign() == item[order[:kept]].sign()).all()
    assert float((x - y).abs().max()) <= codec.error_bound(x, name)


@settings(max_examples=300)
@given(
    name=st.sampled_from(NAMES), shape=st.lists(st.integers(1, 9), max_size=4).map(tuple), seed=st.integers(0, 10**6),
    zeros=st.floats(0, 1), ties=st.booleans(), scale=st.floats(-110, 90),
)  # fmt: skip
def test_bound_and_zeros(name: str, shape: tuple[int, ...], seed: int, zeros: float, ties: bool, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x.round() if ties else x
    x = (x * (torch.rand(shape, generator=generator) >= zeros)) * 2.0**scale
    y = through(x, name)
    assert float((x.double() - y.double()).abs().max()) <= codec.error_bound(x, name)
    assert (y[x == 0] == 0).all()


def test_positions_take_the_shorter_form() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 20_000, generator=generator).numpy().reshape(-1)
    where = layout((1, 20_000), False)
    for share, is_gaps in (("50", False), ("25", False), ("5", True), ("1", True), ("0.1", True)):
        written = encode_sparse(x, where, recipe(f"topk:{share}"), 1)
        assert written is not None
        assert bool(written[0] & GAPS) == is_gaps
        kept = round(float(share) / 100 * 20_000)
        assert len(written) <= 1 + 8 + 12 + kept // 2 + 1 + min(20_000 // 8, kept + 20_000 // 255)


def test_long_gaps_and_the_ends() -> None:
    x = torch.zeros(1, 3000)
    for places in ([0], [2999], [0, 2999], [254], [255], [256], [510], [511], [765, 1021], [0, 1, 2]):
        y = x.clone()
        y[0, places] = torch.arange(1.0, len(places) + 1)
        for name in ("topk:1", "topk:1+zstd", "topk:1+rans"):
            assert (through(y, name) > 0).nonzero()[:, 1].tolist() == places


def test_nothing_to_keep() -> None:
    for x in (torch.zeros(2, 40), torch.full((1, 50), 1e-40)):
        for name in NAMES:
            assert float((through(x, name) - x).abs().max()) <= codec.error_bound(x, name) <= 1e-30


@pytest.mark.parametrize("name", ["topk:10", "topk:10+zstd", "topk:10+rans"])
def test_hostile_payloads(name: str) -> None:
    x = torch.randn(2, 4, 20, 20, generator=torch.Generator().manual_seed(8))
    good, random = codec.encode(x, name), np.random.default_rng(9)
    for trial in range(400):
        bad = bytearray(good)
        if trial % 4 == 0:
            bad = bad[: random.integers(0, len(bad))]
        for at in random.integers(0, min(len(bad), 60) or 1, 3):
            if len(bad) > at:
                bad[at] = random.integers(0, 256)
        try:
            y = codec.decode(bad, name, (2, 4, 20, 20), "float32")
        except CodecError:
            continue
        assert y.shape == x.shape


def test_announced_counts_are_capped_before_anything_is_made() -> None:
    table = np.array([0.5, 0.5, 0.1, 0.1], "<f4").tobytes()
    head = b"\0\2" + table + (2**32 - 1).to_bytes(4, "little") * 3
    with pytest.raises(CodecError, match="announces more"):
        codec.decode(head + bytes(16), "topk:10", (2, 100), "float32")
