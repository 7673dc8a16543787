"""Hidden states and keys as bytes: exact ones give back the same bits, lossy ones err as stated, noise is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.llm.hidden import pack_hidden, unpack_hidden
from ecotone.llm.kv_wire import KV_CODECS, pack_kv, unpack_kv
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch


def states(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Values over many magnitudes, with the odd ones among them."""
    generator = torch.Generator().manual_seed(seed)
    x_TW = torch.randn(tokens, width, generator=generator) * torch.logspace(-20, 20, width)
    x_TW[0, 0], x_TW[-1, -1] = 0.0, -0.0
    return x_TW


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=40)
def test_hidden_states_come_back(tokens: int, width: int, seed: int, offset: int) -> None:
    x_TW = states(tokens, width, seed)
    for codec in ("none", "fp32", "bf16", "int8"):
        packed = pack_hidden(x_TW, codec)
        moved = memoryview(bytes(offset) + bytes(packed))[offset:]  # a view that begins anywhere, as frames give
        made = unpack_hidden(moved, codec, tokens, width)
        assert made.dtype == torch.float32
        if codec in ("none", "fp32"):
            assert made.view(torch.int32).equal(x_TW.view(torch.int32))
        elif codec == "bf16":
            assert len(packed) == 2 * tokens * width
            assert made.equal(x_TW.to(torch.bfloat16).float())
        else:
            assert len(packed) == (4 + width) * tokens
            step_T1 = x_TW.abs().amax(dim=1, keepdim=True) / 127
            assert ((made - x_TW).abs() <= 0.5001 * step_T1 + 1e-30).all()
        for part in range(tokens):  # each token stands for itself: rows may be left out on the way
            each = len(packed) // tokens
            one = unpack_hidden(bytes(packed)[part * each : (part + 1) * each], codec, 1, width)
            assert one[0].equal(made[part])


@given(st.binary(max_size=300), st.sampled_from(["none", "fp32", "bf16", "int8", "zip"]), st.integers(1, 4))
def test_hidden_states_of_another_size_are_refused(noise: bytes, codec: str, tokens: int) -> None:
    each = {"none": 32, "fp32": 32, "bf16": 16, "int8": 12}.get(codec)
    if each is not None and len(noise) == tokens * each:
        assert unpack_hidden(noise, codec, tokens, 8).shape == (tokens, 8)
    else:
        with pytest.raises(EcotoneError, match="bytes of hidden states"):
            unpack_hidden(noise, codec, tokens, 8)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 8]), st.booleans(), st.integers(0, 9))
@settings(max_examples=40)
def test_keys_come_back_bit_for_bit(layers: int, heads: int, tokens: int, size: int, is_half: bool, seed: int) -> None:
    shape, dtype = (layers, heads, tokens, size), torch.bfloat16 if is_half else torch.float32
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31 - 1, (2, *shape, 2 if not is_half else 1), generator=generator)
    both = bits[..., 0].to(torch.int16 if is_half else torch.int32).view(dtype)  # not-a-numbers and all
    for codec in KV_CODECS:
        keys, values = unpack_kv(pack_kv(both[0], both[1], codec), layers, heads, tokens, size)
        raw = torch.int16 if is_half else torch.int32
        assert keys.dtype == dtype
        assert keys.view(raw).equal(both[0].view(raw))
        assert values.view(raw).equal(both[1].view(raw))


def test_keys_of_a_model_take_less_room_compressed() -> None:
    keys = torch.randn(2, 2, 64, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    raw, packed = pack_kv(keys, keys, "raw"), pack_kv(keys, keys, "zstd")
    assert len(packed) < 0.9 * len(raw)


@given(st.data())
@settings(max_examples=150)
def test_damaged_keys_are_refused_or_have_the_shape(data: st.DataObject) -> None:
    keys = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    content = bytearray(pack_kv(keys, keys, data.draw(st.sampled_from(KV_CODECS))))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    with contextlib.suppress(EcotoneError):
        found, _ = unpack_kv(content, 1, 2, 5, 4)
        assert found.shape == (1, 2, 5, 4)
    with pytest.raises(EcotoneError):
        unpack_kv(content, 1, 2, 6, 4)
