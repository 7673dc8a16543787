"""Pictures at cut 0: exact where the rules say so, near where they say near, and hostile files refused."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ecotone import codec
from ecotone.codec import CodecError, ImageSpec

pytestmark = pytest.mark.torch

SPEC = ImageSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
LOSSLESS = ("pixels", "png", "webp:lossless")
LOSSY = ("jpeg:95", "jpeg:50", "webp:80")


def picture(items: int = 2, channels: int = 3, height: int = 40, width: int = 56) -> torch.Tensor:
    """A smooth 8-bit picture in [0, 1], so that lossy codecs have something to work on."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 5, width), indexing="ij")
    waves = [torch.sin(x * (c + 1) + n) * torch.cos(y + c) for n in range(items) for c in range(channels)]
    return ((torch.stack(waves).reshape(items, channels, height, width) + 1) * 127.5).round() / 255


def normalise(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor(SPEC.mean).reshape(3, 1, 1)) / torch.tensor(SPEC.std).reshape(3, 1, 1)


@pytest.mark.parametrize("name", LOSSLESS)
def test_eight_bit_pictures_come_back_exactly(name: str) -> None:
    x = picture()
    assert torch.equal(codec.unpack(codec.pack([("x", x)], name))[0] * 255, (x * 255).round())
    z = normalise(x)
    torch.testing.assert_close(codec.unpack(codec.pack([("z", z)], name, image=SPEC))[0], z, rtol=0, atol=2e-6)
    grey = picture(channels=1)
    torch.testing.assert_close(codec.unpack(codec.pack([("g", grey)], name))[0], grey, rtol=0, atol=1e-6)
    single = picture(items=1)[0]
    torch.testing.assert_close(codec.unpack(codec.pack([("s", single)], name))[0], single, rtol=0, atol=1e-6)


@settings(max_examples=60)
@given(
    name=st.sampled_from((*LOSSLESS, *LOSSY)),
    seed=st.integers(0, 999),
    scale=st.sampled_from((0.01, 1.0, 300.0)),
    spec=st.booleans(),
)
def test_bound(name: str, seed: int, scale: float, spec: bool) -> None:
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(seed)) * scale
    image = SPEC if spec else None
    y = codec.decode(codec.encode(x, name, image=image), name, (2, 3, 9, 7), "float32")
    assert float((x - y).abs().max()) <= codec.error_bound(x, name, image=image)


def test_own_range_of_a_normalised_picture_is_half_a_step() -> None:
    z = normalise(picture())
    bound = codec.error_bound(z, "png")
    assert bound == pytest.approx(float(z.max() - z.min()) / 510, rel=1e-3)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_pictures_are_near_and_small(name: str) -> None:
    x = picture(height=128, width=128)
    body = codec.pack([("x", x)], name)
    assert len(body) < 0.1 * x.numel()
    assert float((codec.unpack(body)[0] - x).abs().mean()) < 0.02


def test_pixels_take_a_byte_each() -> None:
    x = picture(items=2)
    assert x.numel() < len(codec.encode(x, "pixels")) < x.numel() + 100


def test_quality_orders_size() -> None:
    x = picture(height=128, width=128)
    sizes = [len(codec.encode(x, f"jpeg:{q}")) for q in (30, 60, 90, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_tensors_beside_the_picture_travel_as_they_are() -> None:
    x, mask, scale = picture(), torch.arange(5), torch.randn(4)
    got = codec.unpack(codec.pack([("x", x), ("mask", mask), ("scale", scale)], "jpeg:90"))
    assert torch.equal(got[1], mask)
    assert torch.equal(got[2], scale)


def test_half_precision_pictures() -> None:
    x = picture().half()
    assert codec.unpack(codec.pack([("x", x)], "png"))[0].dtype == torch.float16


def test_bad_pictures_and_specs_are_named() -> None:
    with pytest.raises(CodecError, match="finite"):
        codec.encode(torch.full((1, 3, 4, 4), math.nan), "png")
    for mean, std in (((0.0,), (0.0,)), ((0.0,), (1.0, 1.0)), ((0.0, 1.0), (1.0, 1.0)), ((math.inf,), (1.0,))):
        with pytest.raises(CodecError, match="image"):
            ImageSpec(mean=mean, std=std)
    with pytest.raises(CodecError, match="3 means for 1"):
        codec.encode(picture(channels=1), "png", image=SPEC)


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_damaged_files_give_codec_errors_only(name: str) -> None:
    good = codec.encode(picture(items=1), name)
    for step in range(0, len(good), max(1, len(good) // 150)):
        for bad in (good[:step], good[:step] + bytes([good[step] ^ 0x5A]) + good[step + 1 :], good + bytes(step + 1)):
            try:
                y = codec.decode(bad, name, (1, 3, 40, 56), "float32")
            except CodecError:
                continue
            assert y.shape == (1, 3, 40, 56)


def test_a_larger_file_than_the_tensor_is_not_decoded() -> None:
    good = codec.encode(picture(items=1), "png")
    file = io.BytesIO()
    Image.new("RGB", (9000, 9000)).save(file, "PNG")
    bomb = good[: 1 + 5 + 24] + len(file.getvalue()).to_bytes(4, "little") + file.getvalue()
    with pytest.raises(CodecError, match="9000"):
        codec.decode(bomb, "png", (1, 3, 40, 56), "float32")
    with pytest.raises(CodecError):  # a WebP where a PNG was announced
        codec.decode(codec.encode(picture(items=1), "webp:80"), "png", (1, 3, 40, 56), "float32")
