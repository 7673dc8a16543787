"""Frames, results and messages as bytes: what is built is read back, and no bytes whatsoever raise more than one error."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.decoding.frame import (
    CODEC_NAMES,
    Cut,
    Fork,
    Frame,
    FrameRow,
    GenerationFrameError,
    Kind,
    Open,
    Replay,
    Result,
    RowResult,
    StageTime,
    TokenLogprobs,
    build_frame,
    build_result,
    kind_of,
    parse_frame,
    parse_result,
)
from ecotone.decoding.messages import (
    Alive,
    Export,
    ExportPiece,
    Fault,
    Fence,
    Imported,
    KvPiece,
    Peer,
    Probe,
    Release,
    Route,
    Routed,
    ShardState,
    build_kv,
    build_message,
    is_kv,
    parse_kv,
    parse_message,
)
from ecotone.decoding.params import SamplingParams
from ecotone.schema import SchemaError

pytestmark = pytest.mark.pure

WORD = st.integers(0, 2**32 - 1)
SHORT = st.integers(0, 2**16 - 1)
TOKENS = st.lists(WORD, max_size=4).map(tuple)
FLOAT = st.floats(-100, 0, width=32)
ORDERS = st.one_of(
    st.builds(Open, WORD, WORD, st.binary(max_size=9), TOKENS),
    st.builds(Fork, WORD, WORD, WORD),
    st.builds(Cut, WORD, WORD),
    st.builds(Replay, SHORT, SHORT, WORD, WORD, WORD),
)
TIMES = st.builds(StageTime, SHORT, st.integers(0, 10**7).map(lambda us: us / 1e6), st.just(0.25))
ROWS = st.builds(FrameRow, WORD, WORD, st.lists(WORD, min_size=1, max_size=4).map(tuple), st.just(1), WORD)
FRAMES = st.builds(
    Frame, kind=st.sampled_from([Kind.STEP, Kind.REPLAY]), epoch=WORD, number=WORD, until=SHORT,
    rows=st.lists(ROWS, max_size=3, unique_by=lambda r: r.slot).map(tuple), orders=st.lists(ORDERS, max_size=3).map(tuple),
    times=st.lists(TIMES, max_size=3).map(tuple), codec=st.sampled_from(CODEC_NAMES), payload=st.binary(max_size=20),
)  # fmt: skip
LOGPROBS = st.builds(TokenLogprobs, FLOAT, st.lists(st.tuples(WORD, FLOAT), max_size=2).map(tuple))


@st.composite
def row_results(draw: st.DrawFn) -> RowResult:
    tokens = draw(TOKENS)
    logprobs = draw(st.lists(LOGPROBS, min_size=len(tokens), max_size=len(tokens))) if draw(st.booleans()) else []
    return RowResult(draw(WORD), draw(WORD), draw(WORD), draw(WORD), tokens, tuple(logprobs))


RESULTS = st.builds(
    Result, epoch=WORD, number=WORD, rows=st.lists(row_results(), max_size=3).map(tuple),
    times=st.lists(TIMES, max_size=3).map(tuple), is_replay=st.booleans(),
)  # fmt: skip
PEER = Peer(node="a-1", shard=3)
MESSAGES = [
    Route(shard=3, epoch=2, index=1, count=3, before=PEER, after=Peer(node=""), codec="fp32", keep=((1, 64), (2, 3))),
    Routed(shard=3, epoch=2, held=((1, 64, 64),)), Fence(shard=3, raised=((1, 2),)),
    Fault(shard=3, epoch=2, number=9, reason="no room"), Probe(nonce=4),
    Alive(nonce=4, shards=(ShardState(shard=3, epoch=2, received=9, finished=8, works=20, busy_s=0.5),)),
    Export(shard=3, target=PEER, first=0, last=4, codec="raw", move=0, round=1,
           pieces=(ExportPiece(slot=1, start=0, stop=64, parent=2, shared=32),)),
    Imported(shard=3, move=0, round=1, size_bytes=77), Release(shard=3),
]  # fmt: skip
KV = KvPiece(
    shard=3, move=0, round=1, first=0, last=4, codec="raw", piece=ExportPiece(slot=1, start=0, stop=2), is_last=True,
    payload=b"keys",
)  # fmt: skip


@given(FRAMES)
@settings(max_examples=50)
def test_a_frame_is_read_back(frame: Frame) -> None:
    data = build_frame(frame)
    found = parse_frame(data)
    assert replace(found, payload=bytes(found.payload)) == frame
    assert kind_of(data) is frame.kind


@given(RESULTS)
@settings(max_examples=50)
def test_a_result_is_read_back(result: Result) -> None:
    assert parse_result(build_result(result)) == result


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_is_read_back(message) -> None:
    assert parse_message(build_message(message)) == message


def test_a_piece_of_keys_is_read_back() -> None:
    for piece in (KV, replace(KV, piece=None, payload=b"")):
        found = parse_kv(build_kv(piece))
        assert replace(found, payload=bytes(found.payload)) == piece
        assert is_kv(build_kv(piece))
        assert not is_kv(build_message(MESSAGES[0]))


@given(FRAMES, RESULTS, st.data())
@settings(max_examples=40)
def test_bytes_that_were_cut_or_changed_end_as_one_error(frame: Frame, result: Result, data: st.DataObject) -> None:
    for built, parse in ((build_frame(frame), parse_frame), (build_result(result), parse_result)):
        cut = data.draw(st.integers(0, len(built) - 1))
        with pytest.raises(GenerationFrameError):
            parse(built[:cut])
        with pytest.raises(GenerationFrameError):
            parse(built + b"x")
        at = data.draw(st.integers(0, len(built) - 1))
        built[at] ^= data.draw(st.integers(1, 255))
        harmless(parse, built)
        harmless(kind_of, built)


@given(st.sampled_from(MESSAGES), st.data())
@settings(max_examples=50)
def test_messages_that_were_cut_or_changed_end_as_one_error(message, data: st.DataObject) -> None:
    for built, parse in ((bytearray(build_message(message)), parse_message), (build_kv(KV), parse_kv)):
        with pytest.raises(GenerationFrameError):
            parse(built[: data.draw(st.integers(0, len(built) - len(b"keys") - 1))])
        at = data.draw(st.integers(0, len(built) - 1))
        built[at] ^= data.draw(st.integers(1, 255))
        harmless(parse, built)


@given(st.binary(max_size=80))
def test_noise_ends_as_one_error(noise: bytes) -> None:
    for parse in (parse_frame, parse_result, parse_message, parse_kv):
        harmless(parse, noise)
        harmless(parse, b"EGEN\x01\x01\x00\x00" + noise)
        harmless(parse, b"EGMS\x01\x00\x00\x00" + len(noise).to_bytes(4, "little") + noise)


def test_a_head_that_promises_much_allocates_nothing() -> None:
    for field in (18, 20, 24, 28):  # times, orders, rows, bytes of payload
        built = build_frame(Frame(epoch=1, number=1))
        built[field : field + 2] = b"\xff\xff"
        with pytest.raises(GenerationFrameError):
            parse_frame(built)


@given(
    st.builds(
        SamplingParams, max_tokens=st.integers(1, 9), temperature=st.floats(0, 100), stop_tokens=TOKENS,
        seed=st.none() | st.integers(0, 2**64 - 1), stop=st.lists(st.text(min_size=1), max_size=2).map(tuple),
        logprobs=st.none() | st.integers(0, 64),
        logit_bias=st.lists(st.tuples(WORD, st.floats(-1000, 1000)), max_size=2).map(tuple),
    ),
    st.binary(max_size=30),
)  # fmt: skip
@settings(max_examples=30)
def test_sampling_parameters_are_read_back_or_refused(params: SamplingParams, noise: bytes) -> None:
    assert SamplingParams.from_bytes(params.to_bytes()) == params
    for data in (noise, params.to_bytes()[:-1] + noise):
        with contextlib.suppress(SchemaError):
            SamplingParams.from_bytes(data)


def harmless(parse, data) -> None:
    with contextlib.suppress(GenerationFrameError):
        parse(data)
