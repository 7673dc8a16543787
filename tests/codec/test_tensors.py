"""Codecs of tensors: sizes, the stated bound, what must come back exactly, and strange tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone import codec
from ecotone.codec import CodecError
from ecotone.codec.quantise import LAMBERT

pytestmark = pytest.mark.torch

ALL = tuple(c.name for c in codec.catalogue() if not c.is_image)
QUANTISED = tuple(c for c in ALL if c.startswith("int"))
PLAIN = tuple(c for c in ALL if "+" not in c)
FLOATS = ("float32", "float16", "bfloat16", "float64")
SHAPES = st.lists(st.integers(0, 7), max_size=5).map(tuple)


def through(x: torch.Tensor, name: str) -> torch.Tensor:
    return codec.decode(codec.encode(x, name), name, tuple(x.shape), str(x.dtype).removeprefix("torch."))


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    return float((x.double() - y.double()).abs().max()) if x.numel() else 0.0


@settings(max_examples=2000)
@given(
    name=st.sampled_from(ALL), shape=SHAPES, kind=st.sampled_from(FLOATS), seed=st.integers(0, 10**6),
    scale=st.floats(-120, 100), offset=st.sampled_from((0.0, 0.0, 1.0, -3.0, 1000.0)), relu=st.booleans(),
)  # fmt: skip
def test_error_stays_within_the_stated_bound(
    name: str, shape: tuple[int, ...], kind: str, seed: int, scale: float, offset: float, relu: bool
) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset) * 2.0**scale
    x = (x.relu() if relu else x).to(getattr(torch, kind))
    if x.numel() and not torch.isfinite(x).all():
        x = torch.zeros_like(x)
    assert error(x, through(x, name)) <= codec.error_bound(x, name)


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    name=st.sampled_from(ALL),
)
def test_any_finite_floats(values: list[float], name: str) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert error(x, through(x, name)) <= codec.error_bound(x, name)


def test_the_bound_is_tight() -> None:
    """Half a step of the grid is reached within 5 % on a dense sample: the bound says something."""
    x = torch.linspace(-1, 3, 20001)
    for name, bits in (("int8", 8), ("int6", 6), ("int4", 4), ("int3", 3), ("int2", 2)):
        bound = codec.error_bound(x, name)
        assert 4 / (2**bits - 1) / 2 <= bound <= 4 / (2**bits - 1) / 2 * 1.02
        assert error(x, through(x, name)) >= 0.95 * bound


@pytest.mark.parametrize("name", QUANTISED)
def test_zero_is_exact_and_rounding_is_unbiased(name: str) -> None:
    x = torch.rand(4, 8, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.3] = 0.0
    y = through(x, name)
    assert (y[x == 0] == 0).all()
    if "clip" not in name:
        inner = x.abs() < 0.3  # away from the ends of the range, where an even grid is one-sided
        step = 2 * codec.error_bound(x, name)
        assert abs(float((y - x)[inner].mean())) < 0.01 * step


@pytest.mark.parametrize("name", [n for n in QUANTISED if "clip" not in n])
def test_decoded_values_are_coded_again_without_loss(name: str) -> None:
    """Same codes again; values agree to the rounding of the recomputed step."""
    x = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(5)).relu()
    once = through(x, name)
    twice = through(once, name)
    assert error(once, twice) <= 2e-3 * float(once.max())


@pytest.mark.parametrize(
    ("name", "bits"),
    [("fp32", 32), ("fp16", 16), ("bf16", 16), ("int8", 8), ("int6", 6), ("int4", 4), ("int3", 3), ("int2", 2)],
)
def test_sizes_are_exact(name: str, bits: int) -> None:
    x = torch.randn(2, 16, 10, 10)
    groups = 2 if name.startswith("int") else 0
    assert len(codec.encode(x, name)) == 1 + 6 * groups + 2 * 16 * 10 * 10 * bits // 8
    if groups:
        assert len(codec.encode(x, name + "c")) == 1 + 6 * 2 * 16 + 2 * 16 * 10 * 10 * bits // 8


@pytest.mark.parametrize("name", PLAIN)
def test_entropy_stage_changes_size_only(name: str) -> None:
    x = torch.randn(1, 8, 40, 40, generator=torch.Generator().manual_seed(3)).relu()
    plain = through(x, name)
    methods = ("zstd", "deflate", "rans") if name.startswith(("int", "topk")) else ("zstd", "deflate")
    for method in methods:
        assert torch.equal(through(x, f"{name}+{method}"), plain)
        less = len(codec.encode(x, name)) - len(codec.encode(x, f"{name}+{method}"))
        assert less > 0 or (name.startswith("topk") and less >= 0)  # positions and values of a few are as short as they get
    noise = torch.rand(1, 4001)
    for method in methods:
        assert len(codec.encode(noise, f"{name}+{method}")) <= len(codec.encode(noise, name))


def test_rans_is_smaller_than_zstd_where_neighbours_are_alike() -> None:
    coarse = torch.randn(1, 24, 14, 14, generator=torch.Generator().manual_seed(3))
    x = torch.nn.functional.interpolate(coarse, scale_factor=4.0, mode="bilinear").relu()
    for base in ("int8", "int4", "int4c", "int3", "int3clip", "topk:25"):
        assert len(codec.encode(x, base + "+rans")) < 0.95 * len(codec.encode(x, base + "+zstd"))


def test_int4_zstd_comes_close_to_the_entropy() -> None:
    x = torch.randn(1, 32, 64, 64, generator=torch.Generator().manual_seed(3)).relu()
    codes = torch.round(x / (x.max() / 15))
    share = torch.bincount(codes.long().reshape(-1), minlength=16).double() / x.numel()
    entropy_bits = float(-(share[share > 0] * share[share > 0].log2()).sum())
    assert 8 * len(codec.encode(x, "int4+zstd")) / x.numel() < 1.05 * entropy_bits + 0.02


def test_ranges_belong_to_one_item_of_the_batch() -> None:
    x = torch.randn(3, 4, 6, 6)
    alone = through(x[:1], "int4")
    x[1] *= 1000
    assert torch.equal(through(x, "int4")[:1], alone)


def test_per_channel_ranges_follow_the_channels() -> None:
    x = torch.randn(2, 4, 8, 8) * torch.tensor([1e-3, 1.0, 50.0, 1e4]).reshape(1, 4, 1, 1)
    relative = ((through(x, "int8c") - x).abs().amax((2, 3)) / x.abs().amax((2, 3))).max()
    assert relative < 0.006 < ((through(x, "int8") - x).abs().amax((2, 3)) / x.abs().amax((2, 3))).max()
    tokens = torch.randn(2, 9, 5) * torch.tensor([1e-3, 1.0, 50.0, 1e4, 1.0])
    assert ((through(tokens, "int8c") - tokens).abs().amax(1) / tokens.abs().amax(1)).max() < 0.006


def test_clipping_helps_below_four_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    laplace = torch.distributions.Laplace(0.0, 1.0)
    torch.manual_seed(4)
    for x in (laplace.sample((1, 50_000)), torch.randn(1, 50_000, generator=generator).relu()):
        for bits in (2, 3):
            clipped, plain = (float(((through(x, n) - x) ** 2).mean()) for n in (f"int{bits}clip", f"int{bits}"))
            assert clipped < 0.8 * plain


def test_lambert_constants() -> None:
    for bits, value in LAMBERT.items():
        assert value * math.exp(value) == pytest.approx(3 * 4**bits, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_clip_is_where_the_error_is_least(bits: int) -> None:
    """Scale times Lambert's W against a search: alpha of least E(rounding) + E(clipping) for a Laplace density of scale 1.

    Rounding: a step of 2 alpha / 2**bits, squared, over 12. Clipping: the integral of (x - alpha)**2 exp(-x) from alpha on,
    which is 2 exp(-alpha). One-sided: half the step for the same alpha, so the search is that of bits + 1.
    """

    def searched(levels: int) -> float:
        alphas = torch.linspace(0.5, 12, 23001, dtype=torch.float64)
        error = (2 * alphas / levels).square() / 12 + 2 * torch.exp(-alphas)
        return float(alphas[error.argmin()])

    assert LAMBERT[bits] == pytest.approx(searched(2**bits), abs=1e-3)
    assert LAMBERT[bits + 1] == pytest.approx(searched(2 ** (bits + 1)), abs=1e-3)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["laplace", "relu", "gelu"])
def test_the_clip_that_fit_chooses_is_near_the_best_of_a_search(kind: str, bits: int, share: float) -> None:
    """On samples, with the real quantiser: no clip of a fine grid has a squared error much below the analytic one.

    The formula counts 2**bits steps, a grid of 2**bits levels has one step less: hence some slack.
    """
    torch.manual_seed(6)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, 40_000)) * 3
    if kind == "relu":
        x = x.abs() * (torch.rand(x.shape) < share)
    elif kind == "gelu":
        x = torch.nn.functional.gelu(x.abs() * torch.where(torch.rand(x.shape) < share, 1.0, -1.0))
    ours = float((through(x, f"int{bits}clip") - x).square().mean())
    low = 0.0 if kind == "relu" else float(x.min())
    ends = [float(x.max()) * i / 60 for i in range(4, 61)]
    tried = [x.clamp(-end if kind == "laplace" else low, end) for end in ends]
    best = min(float((through(t, f"int{bits}") - x).square().mean()) for t in tried)
    assert ours < 1.35 * best


def test_clipping_each_channel_helps_where_channels_differ() -> None:
    torch.manual_seed(7)
    x = torch.distributions.Laplace(0.0, 1.0).sample((1, 6, 50, 50)).relu() * torch.logspace(-1, 1, 6).reshape(1, 6, 1, 1)
    error = {name: float(((through(x, name) - x) / x.std((2, 3), keepdim=True)).square().mean()) for name in QUANTISED}
    for bits in (2, 3):
        assert error[f"int{bits}cclip"] < 0.8 * min(error[f"int{bits}c"], error[f"int{bits}clip"])


@pytest.mark.parametrize("name", ALL)
def test_strange_tensors(name: str) -> None:
    tiny = torch.tensor([1e-45, -1e-40, 3e-39])
    huge = torch.tensor([3.4e38, -3.4e38, 1.0, 0.0])
    for x in (
        torch.empty(0), torch.empty(2, 0, 3), torch.empty(0, 3, 4, 4), torch.tensor(2.5), torch.tensor(-0.0), tiny, huge,
        torch.full((2, 3, 4, 4), 7.25), torch.full((5,), -1e-3), torch.full((3, 4), 65504.0), 1000 + 1e-3 * torch.randn(64),
        torch.randn(6, 5, 4, 3).transpose(0, 3), torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),
        torch.randn(40)[::3], torch.randn(1, 5).expand(7, 5), torch.randn(3, 3, requires_grad=True),
    ):  # fmt: skip
        y = through(x, name)
        assert error(x.detach(), y) <= codec.error_bound(x, name)
        assert y.is_contiguous()
        assert not y.requires_grad
        y.add_(1)  # it owns memory that may be written


@pytest.mark.parametrize("name", ALL)
def test_constants_are_exact_in_quantisers(name: str) -> None:
    if name in QUANTISED:
        for value in (0.0, 1.0, -3.7, 1e-20, 1e20):
            x = torch.full((2, 3, 5, 5), value)
            assert torch.equal(through(x, name), x)


@pytest.mark.parametrize("name", ALL)
def test_nan_and_infinity_come_back(name: str) -> None:
    for special in (math.nan, math.inf, -math.inf):
        x = torch.tensor([[1.0, special, -2.0, 0.0]])
        y = through(x, name)
        torch.testing.assert_close(y, x, equal_nan=True, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["int64", "int32", "int16", "int8", "uint8", "bool"])
def test_what_is_not_floating_point_is_kept(name: str, kind: str) -> None:
    x = (torch.arange(-300, 300) ** 3).to(getattr(torch, kind)).reshape(3, 200)
    assert torch.equal(through(x, name), x)


@pytest.mark.parametrize("name", QUANTISED)
def test_no_codec_makes_a_tensor_larger(name: str) -> None:
    for shape in ((), (1,), (3,), (50, 1), (7, 3), (2, 3, 2), (2, 8, 1, 1)):
        x = torch.randn(shape)
        assert len(codec.encode(x, name)) <= 1 + 4 * x.numel()
        assert error(x, through(x, name)) <= codec.error_bound(x, name)


def test_tensors_that_are_not_dense_are_named() -> None:
    for x in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        with pytest.raises(CodecError, match="cannot be sent"):
            codec.encode(x, "int8")


def test_half_precision_saturates() -> None:
    x = torch.tensor([1e6, -1e6, 2.0])
    assert through(x, "fp16").tolist() == [65504.0, -65504.0, 2.0]
    assert codec.error_bound(x, "fp16") >= 1e6 - 65504


@pytest.mark.parametrize("name", ALL)
def test_damaged_payloads_give_codec_errors_only(name: str) -> None:
    x = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(8)).relu()
    good, random = codec.encode(x, name), np.random.default_rng(9)
    for trial in range(120):
        bad = bytearray(good)
        if trial % 3 == 0:
            bad = bad[: random.integers(0, len(bad))]
        elif trial % 3 == 1:
            bad += bytes(random.integers(1, 20))
        else:
            for at in random.integers(0, len(bad), 3):
                bad[at] = random.integers(0, 256)
        try:
            y = codec.decode(bad, name, (1, 4, 12, 12), "float32")
        except CodecError:
            continue
        assert trial % 3 == 2  # a changed byte may give another tensor (the body's checksum finds it); lengths never fit
        assert y.shape == x.shape


@pytest.mark.parametrize(
    "name",
    [
        "int5",
        "int8clip",
        "int8cclip",
        "int4clipc",
        "fp8",
        "jpeg:0",
        "jpeg:101",
        "jpeg",
        "png:9",
        "int4+lz4",
        "fp16+rans",
        "",
        "none",
        "int4\n",
        "INT4",
        "topk",
        "topk:0",
        "topk:100",
        "topk:0.05",
        "avif:lossless",
        "learned:x",
        "learned:x@12345678",
        "learned:X@0123456789abcdef",
        "learned:x@0123456789abcdefg",
    ],
)
def test_unknown_ids_are_named(name: str) -> None:
    with pytest.raises(CodecError) as caught:
        codec.info(name)
    assert "\n" not in str(caught.value).replace("int4\n", "")


def test_catalogue_is_consistent() -> None:
    names = [c.name for c in codec.catalogue()]
    assert len(names) == len(set(names))
    assert {*codec.CANDIDATES, *codec.IMAGE_CANDIDATES} <= {*names}
    assert all(codec.info(c.name) == c for c in codec.catalogue())
    with pytest.raises(CodecError, match="complex64"):
        codec.encode(torch.zeros(2, dtype=torch.complex64), "int8")
