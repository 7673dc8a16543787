"""What driver and stages say beside frames: routes, fences, probes, migration of keys. Immutable values, and their bytes.

A *shard* is one loaded span on one node, numbered by the driver and never again used for another. A *route* puts shards in
a chain for one epoch. Fences and probes are looked at as soon as they come, before what is queued; all else waits its turn.
Rare messages are JSON checked against their dataclass. Keys and values travel as a KvPiece: JSON head, raw payload.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, cast

from ecotone import schema
from ecotone.decoding.frame import GenerationFrameError, Payload

__all__ = [
    "Alive", "Export", "ExportPiece", "Fault", "Fence", "Imported", "KvPiece", "Message", "Peer", "Probe", "Release",
    "Route", "Routed", "ShardState", "build_kv", "build_message", "is_kv", "parse_kv", "parse_message",
]  # fmt: skip

MAGIC, KV_MAGIC, VERSION = b"EGMS", b"EGKV", 1
MAX_MESSAGE_BYTES = 16 << 20
_HEAD = struct.Struct("<4sBxxxI")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A shard on a node; shard 0 is the driver itself."""

    node: str
    shard: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Driver to a stage: be stage `index` of `count` in `epoch`, take from `before` and send to `after` in `codec`.

    `keep`: (slot, length) of the sequences that go on; all else is freed. Answered by Routed.
    """

    shard: int
    epoch: int
    index: int
    count: int
    before: Peer
    after: Peer
    codec: str
    keep: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """(slot, length, kept) of every sequence of `keep` that is here: tokens held, positions whose outputs are kept."""

    shard: int
    epoch: int
    held: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Driver to a stage: rows of (slot, fence) with a lower fence are stale, queued ones as well."""

    shard: int
    raised: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Stage to driver: frame `number` of `epoch` could not be computed."""

    shard: int
    epoch: int
    number: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Driver to a node: how far are the shards? Answered at once by Alive."""

    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """Steps of `epoch` received and finished so far (the greatest numbers), pieces of work done since the shard was loaded,
    and seconds that the present one has taken."""

    shard: int
    epoch: int
    received: int
    finished: int
    works: int
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    nonce: int
    shards: tuple[ShardState, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPiece:
    """Positions [start, stop) of `slot`, which shares its first `shared` tokens with `parent` where that is not 0."""

    slot: int
    start: int
    stop: int
    parent: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Driver to a stage: send keys and values of layers [first, last) to shard `target`, in `codec`: `move` of `round`."""

    shard: int
    target: Peer
    first: int
    last: int
    codec: str
    move: int
    round: int
    pieces: tuple[ExportPiece, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Target of a move to driver: all pieces of this round are in the cache. `size_bytes` of them came."""

    shard: int
    move: int
    round: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Driver to a node: this shard is not needed any more."""

    shard: int


Message = Route | Routed | Fence | Fault | Probe | Alive | Export | Imported | Release
_KINDS = {kind.__name__: kind for kind in (Route, Routed, Fence, Fault, Probe, Alive, Export, Imported, Release)}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvPiece:
    """Keys, then values, of layers [first, last) and positions [start, stop) of `slot`, for shard `shard`, in `codec`.

    `piece` None in place of a range: nothing was to be sent. `is_last` of its move and round.
    """

    shard: int
    move: int
    round: int
    first: int
    last: int
    codec: str
    piece: ExportPiece | None = None
    is_last: bool = False
    payload: Payload = b""


def build_message(message: Message) -> bytes:
    """The bytes of a message."""
    document = {"message": type(message).__name__} | schema.write(message)
    text = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    return _HEAD.pack(MAGIC, VERSION, len(text)) + text


def parse_message(data: Payload) -> Message:
    """The message of `data`; raises GenerationFrameError and nothing else."""
    document, _ = _document(data, MAGIC)
    kind = _KINDS.get(str(document.pop("message", None)))
    if kind is None:
        raise GenerationFrameError("a message of generation of a kind that is not known here; install the same ecotone")
    return cast(Message, _checked(kind, document))


def is_kv(data: Payload) -> bool:
    return bytes(data[:4]) == KV_MAGIC


def build_kv(piece: KvPiece) -> bytearray:
    """The bytes of a piece; its payload is copied once."""
    document = schema.write(piece)
    del document["payload"]
    text = json.dumps(document, separators=(",", ":")).encode()
    return bytearray(_HEAD.pack(KV_MAGIC, VERSION, len(text)) + text) + piece.payload


def parse_kv(data: Payload) -> KvPiece:
    """The piece of `data`, its payload a view of it; raises GenerationFrameError and nothing else."""
    document, rest = _document(data, KV_MAGIC)
    if "payload" in document:
        raise GenerationFrameError("a piece of keys names its payload twice")
    found = cast(KvPiece, _checked(KvPiece, document | {"payload": b""}))
    return KvPiece(
        shard=found.shard, move=found.move, round=found.round, first=found.first, last=found.last, codec=found.codec,
        piece=found.piece, is_last=found.is_last, payload=rest,
    )  # fmt: skip


def _document(data: Payload, magic: bytes) -> tuple[dict[str, Any], memoryview]:
    view = memoryview(data)
    if len(view) < _HEAD.size:
        raise GenerationFrameError(f"a message of {len(view)} bytes is too short")
    found, version, size = _HEAD.unpack_from(view)
    if found != magic or version != VERSION or size > MAX_MESSAGE_BYTES or _HEAD.size + size > len(view):
        raise GenerationFrameError(f"no message of generation, one of another version than {VERSION}, or one that was cut")
    try:
        document = json.loads(bytes(view[_HEAD.size : _HEAD.size + size]))
    except (ValueError, RecursionError) as error:
        raise GenerationFrameError(f"a message of generation is not JSON: {str(error)[:80]}") from None
    if not isinstance(document, dict):
        raise GenerationFrameError("a message of generation is no table")
    return document, view[_HEAD.size + size :]


def _checked(kind: type, document: dict[str, Any]) -> object:
    try:
        return schema.read(kind, document, f"message {kind.__name__}")
    except schema.SchemaError as error:
        raise GenerationFrameError(str(error)[:400]) from None
    except (RecursionError, OverflowError):
        raise GenerationFrameError(f"message {kind.__name__} is nested too deeply or holds a number too large") from None
