"""Frames: what is built parses back; anything else ends as FrameError and never as an allocation of what it announces."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.codec import frame
from ecotone.codec.checksum import crc32
from ecotone.codec.frame import FrameError, Header, Kind, Limits, build, chunk_bounds, parse

pytestmark = pytest.mark.torch  # the package of codecs loads torch

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    Header,
    kind=st.sampled_from(Kind),
    link_id=st.binary(min_size=16, max_size=16),
    incarnation=U32,
    plan_epoch=U64,
    edge=U32,
    micro_batch=U64,
    seq=U64,
    budget_us=U64,
    number=U64,
    dtype=st.sampled_from(frame.DTYPES),
    codec=st.sampled_from(frame.CODECS),
    dims=st.lists(st.integers(0, 9), max_size=8).map(tuple),
)


def sample(payload: bytes = b"payload", **fields: object) -> bytearray:
    return build(Header(kind=Kind.DATA, **fields), payload)  # type: ignore[arg-type]


@given(header=HEADERS, payload=st.binary(max_size=300), checksum=st.booleans())
def test_round_trip(header: Header, payload: bytes, checksum: bool) -> None:
    built = build(header, payload, checksum=checksum)
    found, view = parse(bytes(built))
    assert bytes(view) == payload
    for name in Header.__dataclass_fields__:
        want = len(payload) if name == "encoded_bytes" else getattr(header, name)
        assert getattr(found, name) == want, name


def test_layout_is_the_documented_one() -> None:
    built = sample(b"xyz", edge=7, seq=9, dims=(2, 3))
    assert built[:8] == b"ECTN" + bytes([3, Kind.DATA]) + struct.pack("<H", 1)
    assert struct.unpack_from("<II", built, 8) == (len(built) - 3, 3)
    fixed = 4 + 1 + 1 + 2 + 4 + 4 + 16 + 4 + 8 + 4 + 8 + 8 + 4 + 4 + 8 + 8 + 8 + 1 + 1 + 1
    assert len(built) == fixed + 2 * 8 + 4 + 4 + 3
    assert struct.unpack_from("<QQ", built, fixed) == (2, 3)


def test_checksum_is_the_crc32_of_everyone() -> None:
    assert crc32(b"123456789") == 0xCBF43926  # the check value that the algorithm is published with
    assert crc32(memoryview(b"56789"), crc32(b"1234")) == 0xCBF43926


@given(size=st.integers(0, 5000), chunk=st.integers(1, 1024))
def test_chunks_cover_the_body_and_parse(size: int, chunk: int) -> None:
    body = bytes(i % 251 for i in range(size))
    bounds = chunk_bounds(size, chunk)
    parsed = []
    for index, (start, stop) in enumerate(bounds):
        header = Header(kind=Kind.DATA, chunk_index=index, chunk_count=len(bounds), encoded_bytes=size)
        parsed.append(parse(build(header, body[start:stop]))[1])
    assert b"".join(parsed) == body
    assert all(len(view) == chunk for view in parsed[:-1])


@settings(max_examples=1000)
@given(noise=st.binary(max_size=400))
def test_noise_gives_frame_errors_only(noise: bytes) -> None:
    for data in (noise, b"ECTN" + noise, b"ECTN\x01\x02" + noise):
        with pytest.raises(FrameError):
            parse(data)


@settings(max_examples=1500)
@given(data=st.data())
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    good = sample(b"p" * 40, dims=(4, 5), plan_epoch=3)
    at, value = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 255))
    changed = bytearray(good)
    changed[at] = value
    if changed == good:
        parse(changed)
    else:
        with pytest.raises(FrameError):
            parse(changed)


def test_views_that_are_not_plain_bytes_are_refused() -> None:
    good = bytes(sample())
    for view in (memoryview(good + good)[::2], memoryview(np.zeros(300, np.float32))):
        with pytest.raises(FrameError):
            parse(view)


def test_truncated_and_padded_frames_are_refused() -> None:
    good = sample()
    for size in range(len(good)):
        with pytest.raises(FrameError):
            parse(good[:size])
    with pytest.raises(FrameError, match="arrived"):
        parse(good + b"\0")


def forge(**changes: int) -> bytearray:
    """A frame with valid checksums whose fixed part has been altered: what a hostile peer can send."""
    names = (
        "magic", "version", "kind", "flags", "header_bytes", "payload_bytes", "link_id", "incarnation", "epoch", "edge",
        "micro_batch", "seq", "chunk_index", "chunk_count", "encoded_bytes", "budget_us", "number", "dtype", "codec", "ndim",
    )  # fmt: skip
    good = sample(b"p" * 16, dims=(4, 4))
    values = dict(zip(names, frame._FIXED.unpack_from(good), strict=True)) | changes
    dims = values.pop("dims", 0)
    frame._FIXED.pack_into(good, 0, *(values[name] for name in names))
    if dims:
        struct.pack_into("<Q", good, frame._FIXED.size, dims)
    end = len(good) - 16
    struct.pack_into("<I", good, end - 4, zlib.crc32(good[: end - 4]))
    return good


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"version": 1}, "version 1"),
        ({"kind": 99}, "kind 99"),
        ({"flags": 3}, "flags 0x3"),
        ({"header_bytes": 2**32 - 1}, "at most"),
        ({"payload_bytes": 2**32 - 1}, "at most"),
        ({"header_bytes": 104}, "arrived"),
        ({"ndim": 9}, "dimensions"),
        ({"ndim": 255}, "dimensions"),
        ({"dtype": 77}, "dtype code 77"),
        ({"codec": 77}, "codec code 77"),
        ({"chunk_index": 1}, "chunk 1 of 1"),
        ({"chunk_count": 0}, "chunk 0 of 0"),
        ({"chunk_count": 2}, "does not fit"),
        ({"encoded_bytes": 2**63}, "caps"),
        ({"encoded_bytes": 17}, "does not fit"),
        ({"dims": 2**63}, "above the cap"),
    ],
)
def test_forged_fields_are_named(changes: dict[str, int], said: str) -> None:
    if not said:
        parse(forge())
        return
    with pytest.raises(FrameError, match=said):
        parse(forge(**changes))


def test_parsing_allocates_no_payload() -> None:
    good = sample(bytes(1 << 20), encoded_bytes=1 << 20)
    bad = forge(payload_bytes=(1 << 20) - 7, encoded_bytes=1 << 29)
    parse(good)
    tracemalloc.start()
    try:
        parse(good)
        with pytest.raises(FrameError):
            parse(bad)
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("index", "count", "encoded", "size"),
    [
        (1, 2, 10, 6),
        (2, 3, 10, 3),
        (1, 2, 10, 0),
        (1, 2, 5000, 10),
        (0, 2, 10, 4),
        (0, 2, 10, 10),
        (0, 3, 10, 3),
        (1, 3, 0, 0),
    ],
)
def test_chunks_that_cannot_belong_to_their_body_are_refused(index: int, count: int, encoded: int, size: int) -> None:
    header = Header(kind=Kind.DATA, chunk_index=index, chunk_count=count, encoded_bytes=encoded)
    with pytest.raises(FrameError, match="does not fit"):
        build(header, bytes(size), limits=Limits(payload_bytes=4096))


def test_what_parse_refuses_is_not_built() -> None:
    for wrong in (
        {"link_id": b"short"},
        {"edge": -1},
        {"edge": 2**32},
        {"dtype": "float8"},
        {"dims": (1,) * 9},
        {"dims": (-1,)},
        {"chunk_index": 2, "chunk_count": 2},
    ):
        with pytest.raises(FrameError, match="not built"):
            sample(**wrong)
    with pytest.raises(FrameError, match="caps"):
        build(Header(kind=Kind.DATA), bytes(11), limits=Limits(payload_bytes=10))
