"""Protocol messages <-> frames: each LinkMessage is one frame of ecotone.codec.frame, whose header this file fills in.

    Chunk      DATA     payload: the chunk; link_id: session, sender's incarnation, size of the body; dims: (offset,)
    Ack        ACK      seq = next_seq, micro_batch = next_letter, budget_us = delay; payload: grants
    LinkOpen   OPEN     header only
    LinkOpened RESUME   as Ack; payload: window, grants
    Void       EXPIRED  payload: (seq, length) pairs
    Letter     CONTROL  payload: JSON of the letter, checked against its dataclass
    Ping, Pong CONTROL  payload: JSON likewise; a Ping's padding is blanks behind it, PROBE_LIMIT_BYTES at most

Hot messages are binary, rare ones JSON. What a peer sends ends as a message or as FrameError, never as another error,
and never allocates more than the frame holds. Whether the numbers make sense is the link's business.
"""

from __future__ import annotations

import json
import struct
from typing import cast

from ecotone import schema
from ecotone.codec.frame import FrameError, Header, Kind, Limits, build, parse
from ecotone.protocol.message import (
    PROBE_LIMIT_BYTES,
    Ack,
    BodyId,
    Cancel,
    Chunk,
    CloseSession,
    Deploy,
    DeployFailed,
    Grant,
    Letter,
    LetterBody,
    LinkMessage,
    LinkOpen,
    LinkOpened,
    NodeReport,
    Ping,
    Pong,
    Ready,
    RequestFailed,
    RequestFinished,
    Retire,
    Void,
    Want,
)
from ecotone.wire.wire import Frame

__all__ = ["LIMITS", "from_frame", "to_frame"]

LIMITS = Limits()
_LINK = struct.Struct("<QII")  # session, sender's incarnation, size of a chunk's body
_GRANT = struct.Struct("<QQiQ")
_PAIR = struct.Struct("<QQ")
_WINDOW = struct.Struct("<Q")
_LETTERS = {
    kind.__name__: kind
    for kind in (Deploy, Want, Ready, DeployFailed, Retire, CloseSession, Cancel, RequestFinished, RequestFailed, NodeReport)
}
_SIGNALS: dict[str, type[Ping] | type[Pong]] = {"Ping": Ping, "Pong": Pong}
_EDGE_MASK = 0xFFFFFFFF
_MAX_DELAY_S = 3600.0
_BACKGROUND = 1 << 31  # the top bit of the last field of link_id, whose other bits are the body's size


def to_frame(
    message: LinkMessage, payload: Frame | memoryview = b"", *, checksum: bool = True, limits: Limits = LIMITS
) -> bytearray:
    """The frame of `message`; `payload` is a Chunk's bytes and copied once. Raises FrameError for what cannot be framed.

    `checksum=False` leaves the payload's sum out, for bodies that carry their own (ecotone.codec.pack) or links under TLS.
    """
    if isinstance(message, Chunk):
        if len(payload) != message.length:
            raise FrameError(f"chunk of {message.length} bytes given {len(payload)} bytes of payload")
        return build(_chunk_header(message, limits), payload, checksum=checksum, limits=limits)
    try:
        header, content = _control(message)
    except struct.error as error:
        raise FrameError(f"{type(message).__name__} does not fit its frame: {error}") from None
    return build(header, content, limits=limits)


def from_frame(frame: Frame | memoryview, limits: Limits = LIMITS) -> tuple[LinkMessage, memoryview]:
    """The message of one frame and, for a Chunk, a view of its payload (else empty); raises FrameError alone."""
    header, payload = parse(frame, limits)
    session, sender, size_flag = _LINK.unpack(header.link_id)
    if header.kind is Kind.DATA:
        return _read_chunk(header, payload, session, sender, size_flag, limits), payload
    try:
        return _read_control(header, payload, session, sender), memoryview(b"")
    except struct.error:
        raise FrameError(f"{header.kind.name} frame of {len(payload)} bytes has a payload of the wrong size") from None


def _link(session: int, sender_incarnation: int, size_flag: int = 0) -> bytes:
    try:
        return _LINK.pack(session, sender_incarnation, size_flag)
    except struct.error as error:
        raise FrameError(f"session {session} or incarnation {sender_incarnation} does not fit its field: {error}") from None


def _chunk_header(chunk: Chunk, limits: Limits) -> Header:
    problem = _misfit(chunk.offset, chunk.length, chunk.size_bytes, limits)
    if problem:
        raise FrameError(f"chunk of request {chunk.body.request}: {problem}")
    body = chunk.body
    return Header(
        kind=Kind.DATA,
        link_id=_link(body.session, chunk.sender_incarnation, chunk.size_bytes | (_BACKGROUND if chunk.background else 0)),
        incarnation=chunk.incarnation,
        plan_epoch=body.epoch,
        edge=body.edge & _EDGE_MASK,
        micro_batch=body.request,
        seq=chunk.seq,
        budget_us=0 if chunk.budget_s is None else max(1, round(chunk.budget_s * 1e6)),
        dims=(chunk.offset,),
        number=chunk.number,
    )


def _read_chunk(header: Header, payload: memoryview, session: int, sender: int, size_flag: int, limits: Limits) -> Chunk:
    size_bytes = size_flag & ~_BACKGROUND
    if len(header.dims) != 1 or header.chunk_count != 1:
        raise FrameError(f"chunk frame of request {header.micro_batch} has fields that are not known here")
    problem = _misfit(header.dims[0], len(payload), size_bytes, limits)
    if problem:
        raise FrameError(f"chunk frame of request {header.micro_batch}: {problem}")
    return Chunk(
        sender_incarnation=sender,
        incarnation=header.incarnation,
        seq=header.seq,
        body=_body(header, session),
        size_bytes=size_bytes,
        offset=header.dims[0],
        length=len(payload),
        budget_s=header.budget_us / 1e6 if header.budget_us else None,
        background=size_flag >= _BACKGROUND,
        number=header.number,
    )


def _misfit(offset: int, length: int, size_bytes: int, limits: Limits) -> str:
    if not 0 <= size_bytes <= min(limits.encoded_bytes, _BACKGROUND - 1):
        return f"a body of {size_bytes} bytes is above the cap of {limits.encoded_bytes}; cut the model elsewhere"
    if not 0 <= offset <= offset + length <= size_bytes:
        return f"bytes [{offset}, {offset + length}) lie outside a body of {size_bytes} bytes"
    return ""


def _body(header: Header, session: int) -> BodyId:
    edge = header.edge - (1 << 32) if header.edge >= 1 << 31 else header.edge
    return BodyId(session, header.plan_epoch, edge, header.micro_batch)


def _control(message: LinkMessage) -> tuple[Header, bytes]:
    match message:
        case Ack():
            return (
                Header(
                    kind=Kind.ACK,
                    link_id=_link(0, message.sender_incarnation),
                    incarnation=message.incarnation,
                    seq=message.next_seq,
                    micro_batch=message.next_letter,
                    budget_us=round(min(max(message.delay_s, 0.0), _MAX_DELAY_S) * 1e6),
                    number=message.newest,
                    plan_epoch=message.newest_background,
                    edge=len(message.grants),
                ),
                _grants(message.grants) + b"".join(_PAIR.pack(*each) for each in message.ahead),
            )
        case LinkOpen():
            return Header(kind=Kind.OPEN, link_id=_link(0, message.incarnation)), b""
        case LinkOpened():
            header = Header(
                kind=Kind.RESUME,
                link_id=_link(0, message.sender_incarnation),
                incarnation=message.incarnation,
                seq=message.next_seq,
                micro_batch=message.next_letter,
            )
            return header, _WINDOW.pack(message.window_bytes) + _grants(message.grants)
        case Void():
            header = Header(
                kind=Kind.EXPIRED,
                link_id=_link(message.body.session, message.sender_incarnation),
                incarnation=message.incarnation,
                plan_epoch=message.body.epoch,
                edge=message.body.edge & _EDGE_MASK,
                micro_batch=message.body.request,
            )
            return header, b"".join(map(_PAIR.pack, message.seqs, message.lengths))
        case Letter():
            header = Header(
                kind=Kind.CONTROL,
                link_id=_link(0, message.sender_incarnation),
                incarnation=message.incarnation,
                seq=message.number,
            )
            return header, _document(message.content)
        case Ping(size_bytes=size_bytes):
            if not 0 <= size_bytes <= PROBE_LIMIT_BYTES:
                raise FrameError(f"a Ping of {size_bytes} bytes: padding must be 0 to {PROBE_LIMIT_BYTES} bytes")
            return Header(kind=Kind.CONTROL), _document(message) + b" " * size_bytes
        case Pong():
            return Header(kind=Kind.CONTROL), _document(message)
    raise FrameError(f"{type(message).__name__} is no message of a link")


def _document(content: object) -> bytes:
    return json.dumps({"message": type(content).__name__} | schema.write(content), allow_nan=False).encode()


def _grants(grants: tuple[Grant, ...]) -> bytes:
    return b"".join(_GRANT.pack(grant.session, grant.epoch, grant.edge, grant.limit_bytes) for grant in grants)


def _read_grants(payload: memoryview) -> tuple[Grant, ...]:
    return tuple(
        Grant(session=session, epoch=epoch, edge=edge, limit_bytes=limit)
        for session, epoch, edge, limit in _GRANT.iter_unpack(payload)
    )


def _read_control(header: Header, payload: memoryview, session: int, sender: int) -> LinkMessage:
    match header.kind:
        case Kind.ACK:
            return Ack(
                sender_incarnation=sender,
                incarnation=header.incarnation,
                next_seq=header.seq,
                next_letter=header.micro_batch,
                grants=_read_grants(payload[: header.edge * _GRANT.size]),
                ahead=tuple(_PAIR.iter_unpack(payload[header.edge * _GRANT.size :])),
                delay_s=min(header.budget_us / 1e6, _MAX_DELAY_S),
                newest=header.number,
                newest_background=header.plan_epoch,
            )
        case Kind.OPEN:
            return LinkOpen(incarnation=sender)
        case Kind.RESUME:
            (window_bytes,) = _WINDOW.unpack_from(payload)
            return LinkOpened(
                sender_incarnation=sender,
                incarnation=header.incarnation,
                next_seq=header.seq,
                next_letter=header.micro_batch,
                window_bytes=window_bytes,
                grants=_read_grants(payload[_WINDOW.size :]),
            )
        case Kind.EXPIRED:
            pairs = tuple(_PAIR.iter_unpack(payload))
            return Void(
                sender_incarnation=sender,
                incarnation=header.incarnation,
                body=_body(header, session),
                seqs=tuple(seq for seq, _ in pairs),
                lengths=tuple(length for _, length in pairs),
            )
        case Kind.CONTROL:
            return _read_document(header, payload, sender)
    raise FrameError(f"frame of kind {header.kind.name} is not used between nodes")


def _read_document(header: Header, payload: memoryview, sender: int) -> LinkMessage:
    try:
        document = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"control frame is not JSON: {str(error)[:100]}") from None
    kind = document.pop("message", None) if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in _LETTERS | _SIGNALS:
        raise FrameError(f"control frame of kind {str(kind)[:40]!r} is not known; install the same version on both")
    try:
        if kind in _SIGNALS:
            signal = schema.read(_SIGNALS[kind], document, f"control frame {kind}")
            if isinstance(signal, Ping) and not 0 <= signal.size_bytes <= PROBE_LIMIT_BYTES:
                raise FrameError(f"a Ping announces {signal.size_bytes} bytes of padding, at most {PROBE_LIMIT_BYTES}")
            return signal
        content = cast(LetterBody, schema.read(_LETTERS[kind], document, f"control frame {kind}"))
    except schema.SchemaError as error:
        raise FrameError(str(error)[:400]) from None
    except (RecursionError, OverflowError):
        raise FrameError(f"control frame {kind} is nested too deeply or holds a number too large") from None
    return Letter(sender_incarnation=sender, incarnation=header.incarnation, number=header.seq, content=content)
