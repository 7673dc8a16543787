"""Bodies of frontiers: every tensor comes back under its name; damage and disagreement end as CodecError, within the cap."""

from __future__ import annotations

import resource
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone import codec
from ecotone.codec import CodecError
from ecotone.graph import Tensor as TensorSpec

pytestmark = pytest.mark.torch

NAMES = tuple(c.name for c in codec.catalogue() if not c.is_image)
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)


@dataclass
class Spec:
    name: str
    shape: tuple[int, ...]
    dtype: str


def frontier() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("features", torch.randn(1, 6, 9, 9, generator=generator).relu()),
        ("mask", torch.rand(1, 9, generator=generator) > 0.5),
        ("tokens", torch.arange(12).reshape(1, 12)),
        ("größe", torch.tensor(3.0)),
    ]


@settings(max_examples=300)
@given(
    name=st.sampled_from(NAMES), seed=st.integers(0, 10**6),
    tensors=st.lists(
        st.tuples(st.text(max_size=9), st.lists(st.integers(0, 5), max_size=4), st.sampled_from(KINDS)), max_size=5,
    ),
)  # fmt: skip
def test_round_trip(name: str, seed: int, tensors: list[tuple[str, list[int], torch.dtype]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    sent = [(label, (torch.randn(shape, generator=generator) * 9).to(kind)) for label, shape, kind in tensors]
    got = codec.unpack(bytes(codec.pack(sent, name)))
    assert len(got) == len(sent)
    for (_, x), y in zip(sent, got, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert not x.numel() or float((x.double() - y.double()).abs().max()) <= codec.error_bound(x, name)


def test_expected_specs_are_held() -> None:
    body = codec.pack(frontier(), "int8")
    right = [Spec(n, tuple(t.shape), str(t.dtype)[6:]) for n, t in frontier()]
    assert len(codec.unpack(body, right)) == 4
    for index, change in (
        (0, {"name": "other"}), (0, {"shape": (1, 6, 9, 8)}), (1, {"dtype": "uint8"}), (3, {"shape": (1,)}),
        (2, {"shape": ()}),
    ):  # fmt: skip
        wrong = [Spec(s.name, s.shape, s.dtype) for s in right]
        for key, value in change.items():
            setattr(wrong[index], key, value)
        with pytest.raises(CodecError, match="the plan expects"):
            codec.unpack(body, wrong)
    with pytest.raises(CodecError, match="the plan expects 3"):
        codec.unpack(body, right[:3])


def test_dynamic_dimensions_may_differ() -> None:
    spec = TensorSpec(name="x", shape=(1, 4), dtype="float32", producer=-1, dynamic_dims=(0,))
    assert codec.unpack(codec.pack([("x", torch.zeros(5, 4))], "fp32"), [spec])[0].shape == (5, 4)
    with pytest.raises(CodecError):
        codec.unpack(codec.pack([("x", torch.zeros(5, 3))], "fp32"), [spec])


def test_header_overhead_is_small() -> None:
    assert len(codec.pack([("x", torch.zeros(1000))], "fp32")) <= 4000 + 64


@pytest.mark.parametrize("name", ["fp32", "int4+zstd", "int3c+deflate", "bf16+zstd"])
def test_every_cut_and_every_changed_byte_is_found(name: str) -> None:
    good = codec.pack([("x", torch.randn(1, 2, 6, 6)), ("i", torch.arange(3))], name)
    for size in range(len(good)):
        with pytest.raises(CodecError):
            codec.unpack(good[:size])
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        with pytest.raises(CodecError):
            codec.unpack(bad)
    with pytest.raises(CodecError):
        codec.unpack(good + b"\0")


@settings(max_examples=1000)
@given(noise=st.binary(max_size=300))
def test_noise_gives_codec_errors_only(noise: bytes) -> None:
    for data in (noise, b"ECB1" + noise):
        with pytest.raises(CodecError):
            codec.unpack(data)


def resign(body: bytearray) -> bytearray:
    """Make checksums right again after a change of header or payload: what a hostile peer sends."""
    _, count, _, header_bytes = struct.unpack_from("<4sHHI", body)
    at, start = 12, header_bytes
    for _ in range(count):
        if at + 18 > header_bytes - 4:
            break
        label, _, name, ndim, _, size, _ = struct.unpack_from("<HBBBBQI", body, at)
        struct.pack_into("<I", body, at + 14, zlib.crc32(body[start : start + min(size, 1 << 24)]))
        at, start = at + 18 + 8 * ndim + label + name, start + size
    if 16 <= header_bytes <= len(body):
        struct.pack_into("<I", body, header_bytes - 4, zlib.crc32(body[: header_bytes - 4]))
    return body


@settings(max_examples=1500)
@given(data=st.data(), name=st.sampled_from(("fp32", "int8", "int4+zstd", "int2c+deflate", "fp16+zstd")))
def test_hostile_bodies_with_right_checksums(data: st.DataObject, name: str) -> None:
    """Mutations signed again: an error of ours, or tensors within the cap; nothing else."""
    body = codec.pack([("x", torch.linspace(-1, 1, 96).reshape(1, 4, 4, 6)), ("b", torch.tensor([True, False]))], name)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at] = data.draw(st.sampled_from((0, 1, 2, 4, 8, 127, 128, 255)))
    try:
        tensors = codec.unpack(resign(body), limit_bytes=1 << 16)
    except CodecError:
        return
    assert sum(t.numel() * t.element_size() for t in tensors) <= 1 << 16


def hostile(shape: tuple[int, ...], codec_id: str, payload: bytes) -> bytearray:
    label, name = b"x", codec_id.encode()
    entry = struct.pack("<HBBBBQI", 1, 0, len(name), len(shape), 0, len(payload), zlib.crc32(payload))
    entry += struct.pack(f"<{len(shape)}Q", *shape) + label + name
    head = struct.pack("<4sHHI", b"ECB1", 1, 0, 12 + len(entry) + 4) + entry
    return bytearray(head + struct.pack("<I", zlib.crc32(head)) + payload)


@pytest.mark.parametrize(
    ("shape", "codec_id"),
    [
        ((2**62, 2**62, 2**62), "fp32"), ((2**63,), "int2+zstd"), ((0, 2**63), "fp32"), ((2**40, 0), "int8c"),
        ((1 << 29,), "int2"), ((1, 3, 2**20, 2**20), "png"), ((1, 1, 1, 1, 1, 1, 1, 1), "jpeg:90"),
        ((1 << 27,), "int2+deflate"), ((4,), "int5"), ((4,), "none"),
    ],
)  # fmt: skip
def test_bombs_are_refused_before_they_allocate(shape: tuple[int, ...], codec_id: str) -> None:
    payload = b"\0" + zlib.compress(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            codec.unpack(hostile(shape, codec_id, payload))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_zip_bombs_stop_at_the_announced_size() -> None:
    zeros = bytes(64 << 20)
    table = np.ones(1, "<f4").tobytes() + np.zeros(1, "<i2").tobytes()
    for codec_id, bomb in (("int8+zstd", zstandard.compress(zeros)), ("int8+deflate", zlib.compress(zeros, 9)[2:-4])):
        tracemalloc.start()
        try:
            with pytest.raises(CodecError):
                codec.unpack(hostile((100,), codec_id, b"\0" + table + bomb))
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_a_valid_body_above_the_limit_is_refused() -> None:
    """A constant tensor of 4 MiB is a few bytes on the wire: only the cap on what it unfolds to stops it."""
    body = codec.pack([("x", torch.zeros(1 << 20))], "int8+zstd")
    assert len(body) < 1000
    assert codec.unpack(body, limit_bytes=4 << 20)[0].numel() == 1 << 20
    with pytest.raises(CodecError, match="at most"):
        codec.unpack(body, limit_bytes=(4 << 20) - 1)


def test_threads_share_nothing() -> None:
    """Compute and encode threads call at once; contexts of zstd serve one thread at a time."""
    sent = [[("x", torch.randn(1, 8, 40, 40, generator=torch.Generator().manual_seed(i)).relu())] for i in range(8)]
    alone = [codec.pack(tensors, "int4+zstd") for tensors in sent]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            bodies = list(pool.map(lambda tensors: codec.pack(tensors, "int4+zstd"), sent))
            assert bodies == alone
            for got, body in zip(pool.map(codec.unpack, bodies), alone, strict=True):
                assert torch.equal(got[0], codec.unpack(body)[0])


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(CodecError, match="dimensions"):
        codec.pack([("x", torch.zeros((1,) * 9))], "fp32")
    with pytest.raises(CodecError, match="int9"):
        codec.pack(frontier(), "int9")
    with pytest.raises(CodecError, match="picture"):
        codec.pack(frontier(), "jpeg:90")
    assert codec.unpack(codec.pack([], "int8"), []) == []
