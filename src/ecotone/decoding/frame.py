"""What travels along the chain of stages and back, as values and as bytes: one step, one replay, one result.

    Frame (step)    driver -> stage 0 -> ... -> last stage: orders, rows with their token ids, hidden states
    Frame (replay)  the keeper of a boundary -> the stages that lost their keys, as far as stage `until`
    Result          last stage (of a replay: stage `until`) -> driver: token ids, positions computed, times

Orders change which sequences exist; they travel with the frames, so all stages carry them out in the same order: lockstep.
The bytes are little-endian, versioned, and hold no pickle and no JSON but a request's sampling parameters. A wrong byte
string ends as GenerationFrameError; nothing is allocated beyond what has arrived. Token ids travel on behind the first
stage (4 bytes beside thousands) because the last one needs them: for penalties, grammars, and to judge drafts.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ecotone.decoding.step import Row, Step
from ecotone.units import EcotoneError

__all__ = [
    "Cut", "Fork", "Frame", "FrameRow", "GenerationFrameError", "Kind", "Open", "Order", "Replay", "Result", "RowResult",
    "StageTime", "TokenLogprobs", "build_frame", "build_result", "kind_of", "parse_frame", "parse_result",
]  # fmt: skip

MAGIC, VERSION = b"EGEN", 1
MAX_ORDERS, MAX_ROWS, MAX_PARAMS_BYTES = 1 << 16, 1 << 12, 1 << 20
CODEC_NAMES = ("none", "fp32", "bf16", "int8")  # codes on the wire are positions: append only
_HEAD = struct.Struct("<4sBBBxIIHHIIQ")  # magic, version, kind, codec, epoch, number, until, times, orders, rows, payload
_ROW = struct.Struct("<IIIII")
_TIME = struct.Struct("<HII")
_OPEN, _FORK, _CUT, _REPLAY = struct.Struct("<IIII"), struct.Struct("<III"), struct.Struct("<II"), struct.Struct("<HHIII")
_RESULT_ROW = struct.Struct("<IIIIHB")
_LOGPROB, _TOP = struct.Struct("<fB"), struct.Struct("<If")
_MAX_US = (1 << 32) - 1


class GenerationFrameError(EcotoneError):
    """Bytes that are no frame of generation, or break a cap."""


class Kind(enum.IntEnum):
    STEP = 1
    REPLAY = 2
    RESULT = 3


@dataclass(frozen=True, slots=True)
class Open:
    """To the last stage: `slot` is a request with these sampling parameters, and begins with `tokens`.

    The first `prompt_length` tokens of the whole sequence are the prompt.
    """

    slot: int
    prompt_length: int
    params: bytes
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fork:
    """`target` becomes the first `length` tokens of `source`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Cut:
    """`slot` keeps at most its first `length` tokens; 0 frees it."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Replay:
    """Stage `stage` sends again what it kept of its outputs for positions [start, stop), for stages up to `until`."""

    stage: int
    until: int
    slot: int
    start: int
    stop: int


Order = Open | Fork | Cut | Replay


@dataclass(frozen=True, slots=True)
class FrameRow:
    """`tokens` of `slot` at positions from `start` on; the last `num_logits` ask for logits. Stale once `fence` rose."""

    slot: int
    start: int
    tokens: tuple[int, ...]
    num_logits: int = 0
    fence: int = 0

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    def row(self) -> Row:
        return Row(slot=self.slot, start=self.start, count=len(self.tokens), num_logits=self.num_logits)


@dataclass(frozen=True, slots=True)
class StageTime:
    """What stage `stage` spent on a frame: waiting in its queue, and computing."""

    stage: int
    wait_s: float
    compute_s: float


Payload = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A step (kind STEP) or a replay. `payload`: hidden states of all tokens in `codec`, empty before the first stage."""

    kind: Kind = Kind.STEP
    epoch: int
    number: int
    rows: tuple[FrameRow, ...] = ()
    orders: tuple[Order, ...] = ()
    times: tuple[StageTime, ...] = ()
    codec: str = "none"
    payload: Payload = b""
    until: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    def step(self) -> Step:
        return Step(rows=tuple(row.row() for row in self.rows))


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities: the chosen token's, and (id, logprob) of the most likely, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RowResult:
    """Of one row: positions below `stop` are computed everywhere; `tokens` follow position `start`, one after the other.

    The first of `tokens` is the model's choice after position `start`, where the row's first logits were asked for.
    """

    slot: int
    fence: int
    start: int
    stop: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The end of frame `number`; of a replay when `is_replay`."""

    epoch: int
    number: int
    rows: tuple[RowResult, ...] = ()
    times: tuple[StageTime, ...] = ()
    is_replay: bool = False


# ---- to bytes ------------------------------------------------------------------------------------------------------------


def build_frame(frame: Frame) -> bytearray:
    """The bytes of a frame; its payload is copied once."""
    payload = memoryview(frame.payload)
    out = bytearray(
        _HEAD.pack(
            MAGIC, VERSION, frame.kind, CODEC_NAMES.index(frame.codec), frame.epoch, frame.number, frame.until,
            len(frame.times), len(frame.orders), len(frame.rows), payload.nbytes,
        )
    )  # fmt: skip
    for order in frame.orders:
        _put_order(out, order)
    _put_times(out, frame.times)
    for row in frame.rows:
        out += _ROW.pack(row.slot, row.start, len(row.tokens), row.num_logits, row.fence)
    for row in frame.rows:
        out += _words(row.tokens)
    out += payload
    return out


def build_result(result: Result) -> bytearray:
    """The bytes of a result."""
    out = bytearray(
        _HEAD.pack(
            MAGIC, VERSION, Kind.RESULT, 0, result.epoch, result.number, result.is_replay, len(result.times), 0,
            len(result.rows), 0,
        )
    )  # fmt: skip
    _put_times(out, result.times)
    for row in result.rows:
        out += _RESULT_ROW.pack(row.slot, row.fence, row.start, row.stop, len(row.tokens), bool(row.logprobs))
        out += _words(row.tokens)
        for each in row.logprobs:
            out += _LOGPROB.pack(each.logprob, len(each.top))
            for pair in each.top:
                out += _TOP.pack(*pair)
    return out


def _words(tokens: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


def _put_times(out: bytearray, times: tuple[StageTime, ...]) -> None:
    for time in times:
        out += _TIME.pack(time.stage, _microseconds(time.wait_s), _microseconds(time.compute_s))


def _microseconds(seconds: float) -> int:
    return min(max(round(seconds * 1e6), 0), _MAX_US)


def _put_order(out: bytearray, order: Order) -> None:
    match order:
        case Open(slot, prompt_length, params, tokens):
            out += b"\x01" + _OPEN.pack(slot, prompt_length, len(params), len(tokens)) + params + _words(tokens)
        case Fork(source, target, length):
            out += b"\x02" + _FORK.pack(source, target, length)
        case Cut(slot, length):
            out += b"\x03" + _CUT.pack(slot, length)
        case Replay(stage, until, slot, start, stop):
            out += b"\x04" + _REPLAY.pack(stage, until, slot, start, stop)


# ---- from bytes ----------------------------------------------------------------------------------------------------------


class _Reader:
    """Takes pieces from the front of `view`; raises GenerationFrameError where it ends too soon."""

    def __init__(self, view: memoryview):
        self.view, self.at = view, 0

    def take(self, size: int) -> memoryview:
        end = self.at + size
        if end > len(self.view):
            raise GenerationFrameError(f"frame of {len(self.view)} bytes was cut: {end} were announced")
        piece = self.view[self.at : end]
        self.at = end
        return piece

    def read(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def words(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.take(4 * count))

    def end(self) -> None:
        if self.at != len(self.view):
            raise GenerationFrameError(f"frame of {len(self.view)} bytes is {len(self.view) - self.at} bytes too long")


def kind_of(data: Payload) -> Kind | None:
    """Which kind of frame `data` announces; None where it is none of this version."""
    if len(data) < _HEAD.size or bytes(data[:4]) != MAGIC or data[4] != VERSION:
        return None
    return Kind(data[5]) if data[5] in Kind._value2member_map_ else None


def _head(reader: _Reader) -> tuple[int, ...]:
    version, *rest = reader.read(_HEAD)[1:]
    if bytes(reader.view[:4]) != MAGIC or version != VERSION:
        raise GenerationFrameError(f"no frame of generation, or of another version than {VERSION}; install the same ecotone")
    return tuple(rest)


def parse_frame(data: Payload) -> Frame:
    """The step or replay of `data`, its payload a view of it; raises GenerationFrameError and nothing else."""
    reader = _Reader(memoryview(data))
    kind, codec, epoch, number, until, num_times, num_orders, num_rows, payload_bytes = _head(reader)
    if kind not in (Kind.STEP, Kind.REPLAY) or codec >= len(CODEC_NAMES):
        raise GenerationFrameError(f"frame of kind {kind}, codec {codec} is not known here")
    if num_orders > MAX_ORDERS or num_rows > MAX_ROWS:
        raise GenerationFrameError(f"frame with {num_orders} orders and {num_rows} rows is above the caps")
    orders = tuple(_take_order(reader) for _ in range(num_orders))
    times = _take_times(reader, num_times)
    heads = [reader.read(_ROW) for _ in range(num_rows)]
    rows = tuple(_take_rows(reader, heads))
    payload = reader.take(payload_bytes)
    reader.end()
    return Frame(
        kind=Kind(kind), epoch=epoch, number=number, rows=rows, orders=orders, times=times, codec=CODEC_NAMES[codec],
        payload=payload, until=until,
    )  # fmt: skip


def _take_rows(reader: _Reader, heads: list[tuple[int, ...]]) -> Iterator[FrameRow]:
    seen = set()
    for slot, start, count, num_logits, fence in heads:
        if count < 1 or num_logits > count or slot in seen:
            raise GenerationFrameError(
                f"row of slot {slot} with {count} tokens and {num_logits} logits, or slot given twice"
            )
        seen.add(slot)
        yield FrameRow(slot, start, reader.words(count), num_logits, fence)


def _take_times(reader: _Reader, count: int) -> tuple[StageTime, ...]:
    found = (reader.read(_TIME) for _ in range(count))
    return tuple(StageTime(stage, wait / 1e6, compute / 1e6) for stage, wait, compute in found)


def _take_order(reader: _Reader) -> Order:
    kind = reader.take(1)[0]
    if kind == 1:
        slot, prompt_length, size, count = reader.read(_OPEN)
        if size > MAX_PARAMS_BYTES:
            raise GenerationFrameError(f"sampling parameters of {size} bytes, at most {MAX_PARAMS_BYTES}")
        return Open(slot, prompt_length, bytes(reader.take(size)), reader.words(count))
    if kind == 2:
        return Fork(*reader.read(_FORK))
    if kind == 3:
        return Cut(*reader.read(_CUT))
    if kind == 4:
        return Replay(*reader.read(_REPLAY))
    raise GenerationFrameError(f"order of kind {kind} is not known here")


def parse_result(data: Payload) -> Result:
    """The result of `data`; raises GenerationFrameError and nothing else."""
    reader = _Reader(memoryview(data))
    kind, _, epoch, number, is_replay, num_times, num_orders, num_rows, payload_bytes = _head(reader)
    if kind != Kind.RESULT or num_orders or payload_bytes or num_rows > MAX_ROWS:
        raise GenerationFrameError(f"frame of kind {kind} with {num_rows} rows is no result")
    times = _take_times(reader, num_times)
    rows = tuple(_take_result_row(reader) for _ in range(num_rows))
    reader.end()
    return Result(epoch=epoch, number=number, rows=rows, times=times, is_replay=bool(is_replay))


def _take_result_row(reader: _Reader) -> RowResult:
    slot, fence, start, stop, count, has_logprobs = reader.read(_RESULT_ROW)
    tokens = reader.words(count)
    logprobs = tuple(_take_logprobs(reader) for _ in range(count)) if has_logprobs else ()
    return RowResult(slot, fence, start, stop, tokens, logprobs)


def _take_logprobs(reader: _Reader) -> TokenLogprobs:
    logprob, count = _LOGPROB.unpack(reader.take(_LOGPROB.size))
    return TokenLogprobs(logprob, tuple(_TOP.unpack(reader.take(_TOP.size)) for _ in range(count)))
