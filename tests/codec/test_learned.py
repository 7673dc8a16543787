"""Learned codecs: integers on the wire, layers as torch has them, no bias, and files and payloads that are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_codecs import random_codec, random_file, random_spec
from torch import nn

from ecotone import codec
from ecotone.codec import CodecError
from ecotone.codec.learned import MAX_HEADER_BYTES, write_learned

pytestmark = pytest.mark.torch

CODINGS = ("prior", "int8", "int8+zstd", "int6+rans")


@pytest.fixture
def held() -> Iterator[codec.LearnedCodec]:
    made = random_codec()
    with codec.holding([made]):
        yield made


def through(x: torch.Tensor, made: codec.LearnedCodec) -> torch.Tensor:
    return codec.unpack(codec.pack([("x", x)], made.id))[0]


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3), height=st.integers(1, 13), width=st.integers(1, 13), stride=st.sampled_from((1, 2, 4)),
    wider=st.sampled_from((0, 2)), hidden=st.sampled_from((0, 7)), coding=st.sampled_from(CODINGS),
    nonnegative=st.booleans(), kind=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
)  # fmt: skip
def test_what_arrives_is_the_decoder_of_the_rounded_latents(
    batch: int,
    height: int,
    width: int,
    stride: int,
    wider: int,
    hidden: int,
    coding: str,
    nonnegative: bool,
    kind: torch.dtype,
) -> None:
    """Against the same layers as torch modules, from the description: pad, convolve, round, convolve, shuffle."""
    spec = random_spec(
        stride=stride, kernel=stride + wider, hidden=hidden, coding=coding, is_nonnegative=nonnegative, scale=0.5
    )
    made = codec.read_learned(random_file(spec))
    weights = safetensors.torch.load(made.data)
    x = torch.randn(batch, 6, height, width, generator=torch.Generator().manual_seed(1)).to(kind)

    down = nn.Conv2d(6, 5, stride + wider, stride, wider // 2)
    layers: list[nn.Module] = [nn.Conv2d(5, hidden or 6 * stride**2, 3 if hidden else 1, padding=1 if hidden else 0)]
    if hidden:
        layers += [nn.ReLU(), nn.Conv2d(hidden, 6 * stride**2, 1)]
    for module, name in ((down, "down"), (layers[0], "up"), (layers[-1], "out" if hidden else "up")):
        module.load_state_dict({part: weights[f"{name}.{part}"].float() for part in ("weight", "bias")})
    with torch.no_grad():
        y = down(nn.functional.pad(x.float() / spec.scale, (0, -width % stride, 0, -height % stride)))
        if coding == "prior":
            lowest, frequency = (weights[name].numpy().astype(int) for name in ("lowest", "frequencies"))
            highest = lowest + (frequency > 0).sum(axis=1) - 1
            y = y.round().clamp(*(torch.from_numpy(v).float().reshape(1, 5, 1, 1) for v in (lowest, highest)))
        else:
            y = codec.decode(codec.encode(y, coding), coding, tuple(y.shape), "float32")
        made_of = nn.Sequential(*layers)(y)
        if hidden:
            made_of = made_of + torch.einsum("om,nmhw->nohw", weights["skip.weight"][:, :, 0, 0].float(), y)
        wanted = nn.PixelShuffle(stride)(made_of)[:, :, :height, :width] * spec.scale
        wanted = (wanted.relu() if nonnegative else wanted).to(kind)
    with codec.holding([made]):
        assert codec.position_of(made.id) == 3
        got = through(x, made)
        assert float((got.double() - x.double()).abs().max()) <= codec.error_bound(x, made.id)
    assert got.dtype == kind
    assert got.is_contiguous()
    torch.testing.assert_close(got.float(), wanted.float(), rtol=1e-2 if kind != torch.float32 else 1e-4, atol=1e-3)


def test_sequences() -> None:
    made = random_codec(is_sequence=True, stride=1, kernel=1, hidden=0)
    x = torch.randn(2, 9, 6)
    with codec.holding([made]):
        together = through(x, made)
        assert together.shape == x.shape
        for item, step in ((0, 0), (1, 5)):  # a linear layer on the channels: every step by itself
            torch.testing.assert_close(through(x[item, step : step + 1], made), together[item, step : step + 1])


def test_integers_survive_other_floats_at_the_receiver(held: codec.LearnedCodec) -> None:
    """What the wire carries does not depend on the receiver's arithmetic: a decoder in float64 differs by rounding only."""
    x = torch.randn(1, 6, 16, 16)
    exact = {name: tensor.double() for name, tensor in held._weights.items()}
    body = codec.encode(x, held.id)
    assert body == codec.encode(x.clone(), held.id)
    other = codec.read_learned(held.data)
    other._weights = exact  # type: ignore[assignment]
    symbols = held.latents(x).round().clamp(-12, 12)
    mine, theirs = (codec.learned.up(symbols.to(w["up.weight"].dtype), w, held.spec) for w in (held._weights, exact))
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def mahppo_quantiser(y: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """As 2205.11854's public code does it: levels of one range for the batch, round(x - 1/2), decoded without the half."""
    low, step = y.min(), (y.max() - y.min()) / 2**bits
    return ((y - low) / step - 0.5).round() * step + low


@pytest.mark.parametrize("bits", [4, 8])
def test_the_quantiser_of_the_plain_autoencoder_has_no_bias(bits: int) -> None:
    """MAHPPO's is half a level low on average; ours, mid-tread and rounding to the nearest, is not."""
    y = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(2)) * 5 - 1
    step = 5 / 2**bits
    theirs = float((mahppo_quantiser(y, bits) - y).mean()) / step
    ours = float((codec.decode(codec.encode(y, f"int{bits}"), f"int{bits}", tuple(y.shape), "float32") - y).mean()) / step
    assert theirs == pytest.approx(-0.5, abs=0.03)
    assert abs(ours) < 0.03


def test_the_range_is_that_of_one_item() -> None:
    made = random_codec(coding="int8")
    x = torch.randn(2, 6, 8, 8)
    with codec.holding([made]):
        alone = through(x[:1], made)
        x[1] *= 1000
        torch.testing.assert_close(through(x, made)[:1], alone)


def test_rate_is_what_the_tables_say(held: codec.LearnedCodec) -> None:
    x = 0.3 * torch.randn(1, 6, 64, 64)
    symbols = (held.latents(x).round() - torch.from_numpy(held._lowest).float().reshape(1, -1, 1, 1)).clamp(min=0)
    symbols = symbols.minimum(torch.from_numpy(held._greatest).float().reshape(1, -1, 1, 1)).long()[0].reshape(5, -1).numpy()
    share = held._tables.frequency / 4096
    bits = -sum(np.log2(share[latent, row]).sum() for latent, row in enumerate(symbols))
    assert bits <= 8 * len(codec.encode(x, held.id)) <= 1.01 * bits + 28 * 32 + 8


def test_values_that_are_not_finite_travel_as_they_are(held: codec.LearnedCodec) -> None:
    x = torch.randn(1, 6, 4, 4)
    for special in (float("nan"), float("inf")):
        x[0, 1, 2, 3] = special
        torch.testing.assert_close(through(x, held), x, equal_nan=True, rtol=0, atol=0)
    big = torch.full((1, 6, 4, 4), 1e30)  # finite, but beyond all tables: clipped
    assert torch.isfinite(through(big, held)).all()
    words = torch.arange(96).reshape(1, 6, 4, 4)
    assert torch.equal(codec.unpack(codec.pack([("i", words)], held.id))[0], words)


@pytest.mark.parametrize("shape", [(1, 5, 8, 8), (1, 7, 8, 8), (6,), (6, 6), (), (1, 1, 6, 8, 8)])
def test_a_tensor_that_does_not_fit_is_named(held: codec.LearnedCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(CodecError, match="channels"):
        codec.encode(torch.ones(shape), held.id)
    with pytest.raises(CodecError, match="channels"):
        codec.decode(bytes(40), held.id, shape, "float32")


def test_codecs_are_known_as_long_as_they_are_held() -> None:
    made, x = random_codec(seed=5), torch.randn(1, 6, 4, 4)
    with pytest.raises(CodecError, match="weights are not here"):
        codec.encode(x, made.id)
    codec.hold(made)
    codec.hold(codec.read_learned(made.data))
    body = codec.encode(x, made.id)
    codec.release(made)
    assert codec.encode(x, made.id) == body
    with pytest.raises(CodecError, match="not here"):
        codec.encode(x, made.id.replace("random", "other"))
    codec.release(made)
    with pytest.raises(CodecError, match="not here"):
        codec.decode(body, made.id, (1, 6, 4, 4), "float32")


def test_a_changed_file_has_another_id() -> None:
    assert random_codec().id == random_codec().id
    assert len({random_codec(seed).id for seed in range(4)}) == 4
    made = random_codec()
    spec = dataclasses.replace(made.spec, disagreement=0.01)
    assert codec.read_learned(random_file(spec)).id != made.id


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 3), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4),
    cut=st.booleans(), coding=st.sampled_from(CODINGS),
)  # fmt: skip
def test_hostile_payloads(seed: int, changes: list[tuple[float, int]], cut: bool, coding: str) -> None:
    made, x = random_codec(seed, coding=coding), torch.randn(1, 6, 20, 20, generator=torch.Generator().manual_seed(seed))
    with codec.holding([made]):
        bad = bytearray(codec.encode(x, made.id))
        for place, change in changes:
            bad[int(place * (len(bad) - 1))] ^= change
        if cut:
            bad = bad[: int(changes[0][0] * len(bad))]
        try:
            y = codec.decode(bad, made.id, (1, 6, 20, 20), "float32")
        except CodecError:
            return
        assert y.shape == x.shape


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4), cut=st.booleans())
def test_hostile_files(changes: list[tuple[float, int]], cut: bool) -> None:
    good = random_file(random_spec())
    bad = bytearray(good)
    for place, change in changes:
        bad[int(place**3 * (len(bad) - 1))] ^= change
    if cut:
        bad = bad[: int(changes[0][0] * len(bad))]
    try:
        made = codec.read_learned(bytes(bad))
    except CodecError:
        return
    assert made.id != random_codec().id or bytes(bad) == good


def _with(spec_changes: dict[str, object] | None = None, drop: str = "", **tensors: torch.Tensor) -> bytes:
    """A file whose metadata or tensors were changed behind write_learned's back."""
    data = random_file(random_spec())
    size = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["ecotone"]) | (spec_changes or {})
    loaded = safetensors.torch.load(data) | tensors
    loaded.pop(drop, None)
    return safetensors.torch.save(loaded, {"ecotone": json.dumps(document)})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no learned codec"),
        (b"\xff" * 40, "no learned codec"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + bytes(100), "header"),
        (safetensors.torch.save({"t": torch.zeros(3)}), "no learned codec"),
        (_with({"version": 99}), "version"),
        (_with({"latents": 4}), "must be"),
        (_with({"latents": 4000}), "no bottleneck"),
        (_with({"stride": 3}), "kernel"),
        (_with({"coding": "zip"}), "coding"),
        (_with({"scale": 0.0}), "scale"),
        (_with({"is_sequence": True}), "sequences"),
        (_with({"name": "UPPER/../x"}), "name"),
        (_with({"more": 1}), "more"),
        (_with(drop="up.bias"), "needed are"),
        (_with(extra=torch.zeros(2)), "needed are"),
        (_with(**{"up.bias": torch.full((7,), float("nan"), dtype=torch.float16)}), "not finite"),
        (_with(**{"up.bias": torch.zeros(7)}), "must be"),
        (_with(frequencies=torch.zeros(5, 24, dtype=torch.int16)), "add up"),
        (_with(frequencies=torch.full((4, 1), 4096, dtype=torch.int16)), "each of 5"),
        (_with(frequencies=torch.tensor([[0, 4096]] * 5, dtype=torch.int16)), "gap"),
    ],
)
def test_files_that_are_none(data: bytes, says: str) -> None:
    with pytest.raises(CodecError, match=says) as caught:
        codec.read_learned(data, "bottleneck x.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_weights_are_float16_and_come_back() -> None:
    spec = random_spec()
    data = random_file(spec)
    made = codec.read_learned(data)
    raw = safetensors.torch.load(data)
    again = write_learned(made.spec, {n: raw[n] for n in spec.shapes()}, raw["frequencies"].numpy(), raw["lowest"].numpy())
    assert again == data
