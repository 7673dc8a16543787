"""Messages to frames and back; hostile bytes end as FrameError and as nothing else."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.codec.frame import FrameError, Header, Kind, Limits, build
from ecotone.protocol import message as msg
from ecotone.wire.framing import from_frame, to_frame

pytestmark = pytest.mark.pure

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
bodies = st.builds(msg.BodyId, st.integers(0, 2**63 - 1), u64, st.integers(-1, 2**31 - 1), u64)
grants = st.lists(
    st.builds(msg.Grant, session=u64, epoch=u64, edge=st.integers(-1, 2**31 - 1), limit_bytes=u64), max_size=5
).map(tuple)
blobs = st.builds(msg.Blob, sha256=st.text(max_size=64), size_bytes=u64, name=st.text(max_size=20))
numbers = st.integers(0, 2**63 - 1)
letters = st.one_of(
    st.builds(
        msg.Deploy,
        session=numbers,
        epoch=numbers,
        plan_json=st.text(max_size=200),
        parts=st.lists(
            st.builds(msg.StagePart, stage=u32, program=blobs, weights=st.lists(blobs, max_size=3).map(tuple)), max_size=3
        ).map(tuple),
    ),
    st.builds(msg.Ready, session=numbers, epoch=numbers),
    st.builds(msg.RequestFailed, session=numbers, epoch=numbers, request=numbers, kind=st.text(), reason=st.text()),
    st.builds(msg.Cancel, session=numbers, epoch=numbers, request=numbers),
)
controls = st.one_of(
    st.builds(msg.LinkOpen, incarnation=u32),
    st.builds(
        msg.LinkOpened,
        sender_incarnation=u32,
        incarnation=u32,
        next_seq=u64,
        next_letter=u64,
        window_bytes=u64,
        grants=grants,
    ),
    st.builds(
        msg.Ack,
        sender_incarnation=u32,
        incarnation=u32,
        next_seq=u64,
        next_letter=u64,
        grants=grants,
        delay_s=st.integers(0, 10**9).map(lambda us: us / 1e6),
        newest=u64,
        newest_background=u64,
        ahead=st.lists(st.tuples(u64, u64), max_size=5).map(tuple),
    ),
    st.builds(msg.Letter, sender_incarnation=u32, incarnation=u32, number=u64, content=letters),
    st.builds(msg.Ping, nonce=numbers, size_bytes=st.integers(0, msg.PROBE_LIMIT_BYTES)),
    st.builds(msg.Pong, nonce=numbers, num_queued=u32, num_sessions=u32),
    st.builds(
        lambda inc, body, pairs: msg.Void(
            sender_incarnation=inc,
            incarnation=inc,
            body=body,
            seqs=tuple(seq for seq, _ in pairs),
            lengths=tuple(length for _, length in pairs),
        ),
        u32,
        bodies,
        st.lists(st.tuples(u64, u64), max_size=5),
    ),
)


@st.composite
def chunks(draw: st.DrawFn) -> tuple[msg.Chunk, bytes]:
    payload = draw(st.binary(max_size=2000))
    offset, after = draw(st.integers(0, 2**29)), draw(st.integers(0, 2**28))
    chunk = msg.Chunk(
        sender_incarnation=draw(u32),
        incarnation=draw(u32),
        seq=draw(u64),
        body=draw(bodies),
        size_bytes=offset + len(payload) + after,
        offset=offset,
        length=len(payload),
        budget_s=draw(st.none() | st.integers(1, 10**9).map(lambda us: us / 1e6)),
        background=draw(st.booleans()),
        number=draw(u64),
    )
    return chunk, payload


@given(controls)
def test_control_messages_come_back_equal(message: msg.LinkMessage) -> None:
    assert from_frame(bytes(to_frame(message)))[0] == message


@given(chunks(), st.booleans())
def test_chunks_come_back_equal_with_their_bytes(sample: tuple[msg.Chunk, bytes], checksum: bool) -> None:
    chunk, payload = sample
    found, view = from_frame(bytes(to_frame(chunk, payload, checksum=checksum)))
    assert found == chunk
    assert bytes(view) == payload


def _tolerant(frame: bytes) -> None:
    try:
        message, payload = from_frame(frame)
    except FrameError:
        return
    assert isinstance(message, msg.LinkMessage)
    assert len(payload) <= len(frame)


@given(st.binary(max_size=400))
def test_noise_ends_as_frame_error(noise: bytes) -> None:
    with pytest.raises(FrameError):
        from_frame(noise)


@given(controls | chunks().map(lambda sample: sample), st.data())
def test_a_changed_or_cut_frame_is_a_message_or_a_frame_error(sample: object, data: st.DataObject) -> None:
    frame = to_frame(*sample) if isinstance(sample, tuple) else to_frame(sample)  # type: ignore[arg-type]
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    _tolerant(bytes(frame))
    _tolerant(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


@given(st.sampled_from(Kind), st.binary(min_size=16, max_size=16), st.binary(max_size=300), st.integers(0, 3), u64)
def test_sound_frames_with_hostile_content_are_messages_or_frame_errors(
    kind: Kind, link_id: bytes, payload: bytes, ndim: int, value: int
) -> None:
    header = Header(kind=kind, link_id=link_id, seq=value, micro_batch=value, dims=(value % 1000,) * ndim)
    _tolerant(bytes(build(header, payload)))


@pytest.mark.parametrize(
    "document",
    [
        b"[]",
        b"{}",
        b'{"message": "Chunk"}',
        b'{"message": 3}',
        b'{"message": "Ready", "session": "x", "epoch": 1}',
        b'{"message": "Ready", "session": 1, "epoch": 1, "more": 2}',
        b"[" * 100_000,
        b'{"message": "Ready", "session": 1e999, "epoch": 1}',
        b'{"message": "Ready", "session": ' + b"9" * 5000 + b', "epoch": 1}',
        b"\xff\xfe",
    ],
)
def test_control_documents_are_checked(document: bytes) -> None:
    with pytest.raises(FrameError):
        from_frame(build(Header(kind=Kind.CONTROL), document))


def test_the_size_of_a_body_is_capped_before_anything_is_allocated() -> None:
    link_id = struct.pack("<QII", 1, 1, 2**31 - 1)
    frame = build(Header(kind=Kind.DATA, link_id=link_id, dims=(0,)), b"x")
    with pytest.raises(FrameError, match="above the cap"):
        from_frame(frame)
    with pytest.raises(FrameError, match="outside a body"):
        from_frame(build(Header(kind=Kind.DATA, link_id=struct.pack("<QII", 1, 1, 5), dims=(5,)), b"x"))


def test_a_ping_is_padded_by_what_it_says_and_capped() -> None:
    small, padded = (to_frame(msg.Ping(nonce=1, size_bytes=n)) for n in (0, 50_000))
    assert len(padded) - len(small) == 50_000 + len("50000") - len("0")
    with pytest.raises(FrameError, match="padding"):
        to_frame(msg.Ping(nonce=1, size_bytes=msg.PROBE_LIMIT_BYTES + 1))
    for size in (-1, msg.PROBE_LIMIT_BYTES + 1):
        with pytest.raises(FrameError, match="padding"):
            from_frame(build(Header(kind=Kind.CONTROL), b'{"message": "Ping", "nonce": 1, "size_bytes": %d}' % size))


@pytest.mark.parametrize(("delay_s", "read_s"), [(-1.0, 0.0), (1e-7, 0.0), (0.0049, 0.0049), (1e30, 3600.0)])
def test_the_delay_of_an_acknowledgement_is_carried_in_microseconds_within_bounds(delay_s: float, read_s: float) -> None:
    ack = msg.Ack(sender_incarnation=1, incarnation=1, next_seq=0, next_letter=0, delay_s=delay_s)
    found = from_frame(to_frame(ack))[0]
    assert isinstance(found, msg.Ack)
    assert found.delay_s == read_s


def test_a_damaged_payload_is_found_where_the_sum_is_sent() -> None:
    chunk = msg.Chunk(
        sender_incarnation=1, incarnation=1, seq=0, body=msg.BodyId(1, 1, 0, 1), size_bytes=3, offset=0, length=3
    )
    frame = to_frame(chunk, b"abc")
    frame[-1] ^= 1
    assert zlib.crc32(b"abc") != zlib.crc32(frame[-3:])
    with pytest.raises(FrameError, match="damaged"):
        from_frame(frame)


def test_what_does_not_fit_is_not_framed() -> None:
    chunk = msg.Chunk(
        sender_incarnation=1, incarnation=1, seq=0, body=msg.BodyId(1, 1, 0, 1), size_bytes=3, offset=2, length=3
    )
    with pytest.raises(FrameError, match="outside"):
        to_frame(chunk, b"abc")
    with pytest.raises(FrameError):
        to_frame(msg.LinkOpen(incarnation=2**40))
    with pytest.raises(FrameError):
        to_frame(msg.Letter(sender_incarnation=1, incarnation=1, number=0, content=msg.Ready(session=1, epoch=1)),
                 limits=Limits(payload_bytes=5))  # fmt: skip
