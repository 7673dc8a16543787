"""One frame on the wire: a fixed little-endian header, then payload bytes. Built and parsed; nothing is interpreted.

Layout (offsets of the fixed part in `_FIXED`): magic, version, kind, flags, header_bytes, payload_bytes; link_id,
incarnation; plan_epoch; edge, micro_batch, seq; chunk_index, chunk_count, encoded_bytes; budget_us; number; dtype, codec,
ndim; dims; payload_crc32, header_crc32. Every length is held against its cap before anything is allocated: parsing allocates
nothing but the header value, the payload stays a view. Any wrong byte string ends as FrameError and as nothing else.
Shape, dtype and codec may stand in chunk 0; a frontier packed by ecotone.codec.body describes itself, so "body" is usual.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ecotone.codec.checksum import crc32
from ecotone.units import EcotoneError

__all__ = ["MAGIC", "VERSION", "FrameError", "Header", "Kind", "Limits", "build", "chunk_bounds", "parse"]

MAGIC, VERSION = b"ECTN", 3
FLAG_PAYLOAD_CHECKSUM = 1
_FIXED = struct.Struct("<4sBBHII 16sI Q IQQ IIQ Q Q BBB")
_SUMS = struct.Struct("<II")
_MAX_DIMS = 8
# Codes on the wire are positions in these tuples: append only.
DTYPES = ("body", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
CODECS = ("body", "fp32", "fp16", "bf16", "int8", "int6", "int4", "int3", "int2", "jpeg", "png", "webp")
_DTYPE_BYTES = dict(zip(DTYPES, (1, 4, 2, 2, 8, 8, 4, 2, 1, 1, 1), strict=True))

Buffer = bytes | bytearray | memoryview


class FrameError(EcotoneError):
    """A frame is not one, is damaged, or breaks a cap."""


class Kind(enum.IntEnum):
    """What a frame carries."""

    OPEN = 1
    DATA = 2
    ACK = 3  # acknowledgement and grant
    RESUME = 4
    EXPIRED = 5
    ERROR = 6
    CONTROL = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Caps held before allocation: of the header, of one frame's payload, and of the body that chunks make up."""

    header_bytes: int = 4096
    payload_bytes: int = 1 << 20
    encoded_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Fields of one frame. `encoded_bytes` is the size of the whole body, -1: this payload is all of it.

    `micro_batch` is the request id; `budget_us` the time left at sending, as clocks differ; `number` that of this sending,
    which grows where `seq` stays when a frame is sent again.
    """

    kind: Kind
    link_id: bytes = bytes(16)
    incarnation: int = 0
    plan_epoch: int = 0
    edge: int = 0
    micro_batch: int = 0
    seq: int = 0
    chunk_index: int = 0
    chunk_count: int = 1
    encoded_bytes: int = -1
    budget_us: int = 0
    number: int = 0
    dtype: str = "body"
    codec: str = "body"
    dims: tuple[int, ...] = ()


def chunk_bounds(encoded_bytes: int, chunk_bytes: int) -> tuple[tuple[int, int], ...]:
    """Half-open byte ranges of the chunks of a body: all `chunk_bytes` long but the last; an empty body is one chunk."""
    starts = range(0, max(encoded_bytes, 1), chunk_bytes)
    return tuple((start, min(start + chunk_bytes, encoded_bytes)) for start in starts)


def build(header: Header, payload: Buffer = b"", *, checksum: bool = True, limits: Limits | None = None) -> bytearray:
    """One frame as bytes, the payload copied once; raises FrameError for what `parse` would refuse.

    `checksum=False` leaves out the payload's sum, for links where the cipher already authenticates.
    """
    limits = limits or Limits()
    size = len(memoryview(payload).cast("B")) if len(payload) else 0
    encoded = size if header.encoded_bytes < 0 else header.encoded_bytes
    problem = next(_problems(header, encoded, size, limits), None)
    if problem:
        raise FrameError(f"frame not built: {problem}")
    header_bytes = _FIXED.size + 8 * len(header.dims) + _SUMS.size
    frame = bytearray(header_bytes)
    try:
        _FIXED.pack_into(
            frame, 0,
            MAGIC, VERSION, header.kind, FLAG_PAYLOAD_CHECKSUM if checksum else 0, header_bytes, size,
            header.link_id, header.incarnation, header.plan_epoch, header.edge, header.micro_batch, header.seq,
            header.chunk_index, header.chunk_count, encoded, header.budget_us, header.number,
            DTYPES.index(header.dtype), CODECS.index(header.codec), len(header.dims),
        )  # fmt: skip
        struct.pack_into(f"<{len(header.dims)}Q", frame, _FIXED.size, *header.dims)
    except (struct.error, ValueError, TypeError) as error:
        raise FrameError(f"frame not built: a header field does not fit its type: {error}") from None
    struct.pack_into("<I", frame, header_bytes - 8, crc32(payload) if checksum else 0)
    struct.pack_into("<I", frame, header_bytes - 4, crc32(memoryview(frame)[: header_bytes - 4]))
    if size:
        frame += payload  # one copy; assigning to a slice makes two
    return frame


def parse(buffer: Buffer, limits: Limits | None = None) -> tuple[Header, memoryview]:
    """The header and a view of the payload of one whole frame; raises FrameError for anything else, allocates no payload."""
    limits = limits or Limits()
    view = memoryview(buffer)
    if view.itemsize != 1 or view.ndim != 1 or not view.c_contiguous:
        raise FrameError("frame is not one run of bytes; hand over bytes, a bytearray or a plain view of them")
    if len(view) < _FIXED.size + _SUMS.size:
        raise FrameError(f"frame is {len(view)} bytes, shorter than any header; the sender or the link cut it")
    (magic, version, kind, flags, header_bytes, payload_bytes, link_id, incarnation, epoch, edge, micro_batch, seq,
     chunk_index, chunk_count, encoded, budget_us, number, dtype, codec, ndim) = _FIXED.unpack_from(view)  # fmt: skip
    if magic != MAGIC:
        raise FrameError("frame does not start with the magic of Ecotone; the peer speaks another protocol")
    if version != VERSION:
        raise FrameError(f"frame has version {version}, this Ecotone reads {VERSION}; install the same version on both")
    if header_bytes > limits.header_bytes or payload_bytes > limits.payload_bytes:
        raise FrameError(
            f"frame announces {header_bytes} + {payload_bytes} bytes; "
            f"at most {limits.header_bytes} + {limits.payload_bytes} are taken: send smaller chunks"
        )
    if header_bytes + payload_bytes != len(view):
        raise FrameError(
            f"frame announces {header_bytes} + {payload_bytes} bytes, {len(view)} arrived; it was cut or padded"
        )
    if ndim > _MAX_DIMS or header_bytes != _FIXED.size + 8 * ndim + _SUMS.size:
        raise FrameError(f"frame header of {header_bytes} bytes does not fit {ndim} dimensions (at most {_MAX_DIMS})")
    payload_sum, header_sum = _SUMS.unpack_from(view, header_bytes - _SUMS.size)
    if crc32(view[: header_bytes - 4]) != header_sum:
        raise FrameError("frame header is damaged (checksum differs); ask for it again")
    if flags & ~FLAG_PAYLOAD_CHECKSUM or kind not in Kind._value2member_map_:
        raise FrameError(f"frame has kind {kind}, flags {flags:#x}: not known here; install the same version on both")
    if dtype >= len(DTYPES) or codec >= len(CODECS):
        raise FrameError(
            f"frame has dtype code {dtype}, codec code {codec}: not known here; install the same version on both"
        )
    header = Header(
        kind=Kind(kind), link_id=link_id, incarnation=incarnation, plan_epoch=epoch, edge=edge, micro_batch=micro_batch,
        seq=seq, chunk_index=chunk_index, chunk_count=chunk_count, encoded_bytes=encoded, budget_us=budget_us, number=number,
        dtype=DTYPES[dtype], codec=CODECS[codec], dims=struct.unpack_from(f"<{ndim}Q", view, _FIXED.size),
    )  # fmt: skip
    problem = next(_problems(header, encoded, payload_bytes, limits), None)
    if problem:
        raise FrameError(f"frame of request {micro_batch}: {problem}")
    payload = view[header_bytes:]
    if flags & FLAG_PAYLOAD_CHECKSUM and crc32(payload) != payload_sum:
        raise FrameError(
            f"frame of request {micro_batch}, seq {seq}: payload is damaged (checksum differs); ask for it again"
        )
    return header, payload


def _problems(header: Header, encoded: int, size: int, limits: Limits) -> Iterator[str]:
    if len(header.link_id) != 16:
        yield f"link_id must have 16 bytes, has {len(header.link_id)}"
    if header.dtype not in DTYPES or header.codec not in CODECS:
        yield f'dtype {header.dtype!r} or codec {header.codec!r} has no code; write "body" for a self-describing payload'
    if size > limits.payload_bytes or encoded > limits.encoded_bytes:
        yield f"payload {size} of {encoded} bytes is above the caps {limits.payload_bytes} and {limits.encoded_bytes}"
    if len(header.dims) > _MAX_DIMS or any(not 0 <= d < 1 << 64 for d in header.dims):
        yield f"shape must have at most {_MAX_DIMS} dimensions below 2^64"
    elif header.dims and math.prod(header.dims) * _DTYPE_BYTES.get(header.dtype, 1) > limits.encoded_bytes:
        yield f"shape {header.dims} of {header.dtype} is above the cap of {limits.encoded_bytes} bytes"
    if not 0 <= header.chunk_index < header.chunk_count:
        yield f"chunk {header.chunk_index} of {header.chunk_count} does not exist"
    elif not _chunk_fits(header.chunk_index, header.chunk_count, encoded, size, limits.payload_bytes):
        yield f"chunk {header.chunk_index} of {header.chunk_count} with {size} bytes does not fit a body of {encoded} bytes"


def _chunk_fits(index: int, count: int, encoded: int, size: int, cap: int) -> bool:
    """Whether chunk `index` of `size` bytes can come from chunk_bounds(encoded, c) for some c <= cap."""
    if count == 1:
        return size == encoded
    if index < count - 1:
        return (count - 1) * size < encoded <= count * size
    chunk, rest = divmod(encoded - size, count - 1)
    return rest == 0 and 0 < size <= chunk <= cap
