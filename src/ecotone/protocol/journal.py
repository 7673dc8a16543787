"""The asker's journal as bytes: what was accepted, how it ended, what was acknowledged. Format and replay; pure, no file.

Theory. A file is a head and then records, only ever appended. A record counts once it is whole and its sum is right, so a
write that was cut (power, kill -9, full disk) is a *torn tail*: ignored, and cut off before the next write. Sums are seeded
with the file's own salt, so bytes of a request cannot pass for records. A bad record with good ones behind it was not torn
but damaged: that is refused, since going on would forget accepted requests. Damage inside the very last record cannot be
told from a torn tail. Little-endian:

    head    "ECTNJRN\\x01", salt u32, crc32 u32 of both
    record  mark "EJR1", payload bytes u32, crc32 u32 (salted; of the rest of the record), kind u8, number u64, payload

`number` is the request's own number. Replay keeps places of payloads in the file, not their bytes: memory does not grow with
the inputs and results that a journal holds. Written and read by runtime/journal.py; the simulator keeps its own in memory.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ecotone.units import EcotoneError

__all__ = [
    "START_BYTES", "Accepted", "Acknowledged", "Delivered", "Entry", "Failed", "JournalDamaged", "JournalError",
    "JournalState", "Place", "Record", "apply", "compacted", "digest_of", "encode", "head", "payload_of", "replay",
]  # fmt: skip

MAGIC = b"ECTNJRN\x01"
MARK = b"EJR1"
HEAD_BYTES = 16
MAX_PAYLOAD_BYTES = (1 << 30) + (1 << 16)
MAX_ID_BYTES = 512
REMEMBERED_IDS = 65536
"""So many acknowledged request ids stay refused, so that a late repetition does not run again."""
_HEAD, _RECORD = struct.Struct("<8sII"), struct.Struct("<4sIIBQ")
_SUMMED_FROM = 12  # kind, number and payload
_ACCEPTED, _DELIVERED, _FAILED, _ACKNOWLEDGED = 1, 2, 3, 4
_IN, _OUT, _ID = struct.Struct("<dd16sH"), struct.Struct("<Q32s"), struct.Struct("<H")
_NO_DEADLINE = -1.0
START_BYTES = _RECORD.size + _IN.size + MAX_ID_BYTES
"""So much of the beginning of a record is enough for apply()."""


class JournalError(EcotoneError):
    """The journal cannot be used or cannot take more."""


class JournalDamaged(JournalError):
    """The bytes are not a journal, or one that was changed after it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Request `number`, which its asker calls `request_id`; it may take `deadline_s` (None: any time) from `at_s` on.

    `at_s` is the wall clock's time of acceptance: the only clock that lives longer than a process.
    """

    number: int
    request_id: str
    inputs: bytes
    deadline_s: float | None = None
    at_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """It ended with `result`, made by the model with this graph hash (hex) under plan `epoch`."""

    number: int
    result: bytes
    graph_hash: str
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """It ended with an error; `kind` is an ErrorKind value."""

    number: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """Its asker has the outcome: inputs and result may go, the id stays known for a while."""

    number: int
    request_id: str


Record = Accepted | Delivered | Failed | Acknowledged


class Place(NamedTuple):
    """Where a payload lies in the file, and which kind of record it belongs to."""

    offset: int
    size: int
    kind: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that is not acknowledged. `outcome` None: unfinished."""

    number: int
    request_id: str
    digest: bytes
    deadline_s: float | None
    at_s: float
    accepted: Place
    outcome: Place | None = None

    @property
    def is_finished(self) -> bool:
        return self.outcome is not None

    @property
    def size_bytes(self) -> int:
        """What compaction would keep of it, about."""
        if self.outcome is None:
            return _RECORD.size + self.accepted.size
        return 2 * _RECORD.size + _IN.size + len(self.request_id) + self.outcome.size

    def left_s(self, now_s: float) -> float | None:
        """What is left of its deadline at wall clock time `now_s`; a clock that went backwards takes nothing away."""
        return None if self.deadline_s is None else self.deadline_s - max(0.0, now_s - self.at_s)


@dataclass(slots=True)
class JournalState:
    """What a journal says. `end`: where its last good record ends; what lies behind is a torn tail."""

    salt: int = 0
    end: int = 0
    entries: dict[int, Entry] = field(default_factory=dict)
    by_id: dict[str, int] = field(default_factory=dict)
    acknowledged: OrderedDict[str, None] = field(default_factory=OrderedDict)
    next_number: int = 1
    torn_bytes: int = 0
    live_bytes: int = HEAD_BYTES
    """What a compacted journal would take, about."""

    def find(self, request_id: str) -> Entry | None:
        """The request of this id, where it was accepted and not acknowledged."""
        number = self.by_id.get(request_id)
        return None if number is None else self.entries[number]

    @property
    def unfinished(self) -> tuple[Entry, ...]:
        """Accepted requests without an outcome, in the order of their numbers."""
        return tuple(entry for _, entry in sorted(self.entries.items()) if not entry.is_finished)

    def put(self, entry: Entry) -> None:
        """Add or replace a request."""
        self.forget(entry.number)
        self.entries[entry.number] = entry
        self.by_id[entry.request_id] = entry.number
        self.live_bytes += entry.size_bytes

    def forget(self, number: int) -> None:
        """Remove a request, if it is here."""
        entry = self.entries.pop(number, None)
        if entry is not None:
            del self.by_id[entry.request_id]
            self.live_bytes -= entry.size_bytes


def digest_of(inputs: bytes) -> bytes:
    """16 bytes that tell whether two requests of one id have the same inputs."""
    return hashlib.blake2b(inputs, digest_size=16).digest()


def head(salt: int) -> bytes:
    """The head of a new journal; `salt` is a random number below 2**32."""
    return _HEAD.pack(MAGIC, salt, zlib.crc32(MAGIC + salt.to_bytes(4, "little")))


def encode(record: Record, salt: int) -> bytes:
    """One record as bytes; raises JournalError for an id or a payload that is too long."""
    kind, payload = _payload(record)
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise JournalError(f"request {record.number}: {len(payload)} bytes; a journal takes at most {MAX_PAYLOAD_BYTES}")
    return _frame(kind, record.number, payload, salt)


def _frame(kind: int, number: int, payload: bytes | memoryview, salt: int) -> bytes:
    summed = struct.pack("<BQ", kind, number)
    check = zlib.crc32(payload, zlib.crc32(summed, salt))
    return b"".join((MARK, struct.pack("<II", len(payload), check), summed, payload))


def _payload(record: Record) -> tuple[int, bytes]:
    match record:
        case Accepted():
            name = _name(record.request_id)
            deadline_s = _NO_DEADLINE if record.deadline_s is None else record.deadline_s
            fixed = _IN.pack(deadline_s, record.at_s, digest_of(record.inputs), len(name))
            return _ACCEPTED, b"".join((fixed, name, record.inputs))
        case Delivered():
            return _DELIVERED, _OUT.pack(record.epoch, bytes.fromhex(record.graph_hash)) + record.result
        case Failed():
            kind = record.kind.encode()[:64]
            return _FAILED, _ID.pack(len(kind)) + kind + record.reason.encode()[:4096]
        case Acknowledged():
            name = _name(record.request_id)
            return _ACKNOWLEDGED, _ID.pack(len(name)) + name


def _name(request_id: str) -> bytes:
    name = request_id.encode()
    if not 0 < len(name) <= MAX_ID_BYTES:
        raise JournalError(f"request id of {len(name)} bytes: use 1 to {MAX_ID_BYTES}")
    return name


# ---- reading -------------------------------------------------------------------------------------------------------------


def replay(data: bytes | memoryview) -> JournalState:
    """What the whole file says; a torn tail is left out and counted, anything else that is wrong raises JournalDamaged.

    Empty bytes are a journal that was never begun: the state's `end` is 0 and a head must be written first.
    """
    view = memoryview(data).cast("B")
    if len(view) < HEAD_BYTES:
        if bytes(view[: len(MAGIC)]) != MAGIC[: len(view)]:
            raise JournalDamaged("this is no journal of Ecotone (it does not begin as one); give another file")
        return JournalState(torn_bytes=len(view))
    magic, salt, check = _HEAD.unpack_from(view)
    if magic[:7] == MAGIC[:7] and magic != MAGIC:
        raise JournalDamaged(f"the journal has version {magic[7]}, this program reads {MAGIC[7]}; use the one that wrote it")
    if magic != MAGIC or bytes(view[:HEAD_BYTES]) != head(salt) or check != zlib.crc32(view[:12]):
        raise JournalDamaged("this is no journal of Ecotone (its head is not one, or is damaged); give another file")
    state = JournalState(salt=salt, end=HEAD_BYTES)
    while state.end < len(view):
        size = _good_record(view, state.end, salt)
        if size == 0:
            _refuse_if_damaged(view, state.end, salt)
            state.torn_bytes = len(view) - state.end
            break
        apply(state, bytes(view[state.end : state.end + min(size, START_BYTES)]), size)
    return state


def _good_record(view: memoryview, at: int, salt: int) -> int:
    """Bytes of the record that begins at `at`; 0 where none does."""
    if at + _RECORD.size > len(view):
        return 0
    mark, size, check, kind, _ = _RECORD.unpack_from(view, at)
    stop = at + _RECORD.size + size
    if mark != MARK or size > MAX_PAYLOAD_BYTES or stop > len(view):
        return 0
    if zlib.crc32(view[at + _SUMMED_FROM : stop], salt) != check:
        return 0
    return stop - at if _is_sound(kind, view[at + _RECORD.size : stop]) else 0


def _is_sound(kind: int, payload: memoryview) -> bool:
    """Whether a payload has the parts that its kind has; a right sum makes this all but certain."""
    if kind == _ACCEPTED:
        return len(payload) >= _IN.size and len(payload) >= _IN.size + _IN.unpack_from(payload)[3] > _IN.size
    if kind == _DELIVERED:
        return len(payload) >= _OUT.size
    return kind in (_FAILED, _ACKNOWLEDGED) and len(payload) >= _ID.size + _ID.unpack_from(payload)[0]


def _refuse_if_damaged(view: memoryview, at: int, salt: int) -> None:
    """Raise where a good record lies behind the bad bytes at `at`: then they were not torn off but changed."""
    found = bytes(view[at + 1 :])
    position = found.find(MARK)
    while position >= 0:
        if _good_record(view, at + 1 + position, salt):
            raise JournalDamaged(
                f"the journal is damaged at byte {at}: a bad record has good ones behind it (at {at + 1 + position}); "
                "restore the file from a copy, or move it away to begin anew without what it holds"
            )
        position = found.find(MARK, position + 1)


def apply(state: JournalState, start: bytes, size: int) -> None:
    """Take one good record of `size` bytes, of which `start` is the beginning, as appended at `state.end`."""
    _, payload_bytes, _, kind, number = _RECORD.unpack_from(start)
    place = Place(state.end + _RECORD.size, payload_bytes, kind)
    state.end += size
    state.next_number = max(state.next_number, number + 1)
    payload = start[_RECORD.size :]
    if kind == _ACCEPTED:
        deadline_s, at_s, digest, length = _IN.unpack_from(payload)
        name = payload[_IN.size : _IN.size + length].decode("utf-8", "replace")
        if name not in state.by_id and name not in state.acknowledged:
            limit = None if deadline_s == _NO_DEADLINE else deadline_s
            state.put(Entry(number, name, digest, limit, at_s, place))
    elif kind in (_DELIVERED, _FAILED):
        entry = state.entries.get(number)
        if entry is not None and entry.outcome is None:  # the first outcome counts
            state.put(replace(entry, outcome=place))
    else:
        (length,) = _ID.unpack_from(payload)
        name = payload[_ID.size : _ID.size + length].decode("utf-8", "replace")
        state.forget(state.by_id.get(name, 0))
        state.acknowledged[name] = None
        state.acknowledged.move_to_end(name)
        while len(state.acknowledged) > REMEMBERED_IDS:
            state.acknowledged.popitem(last=False)


def payload_of(place: Place, payload: bytes, number: int = 0) -> Record:
    """The record whose payload (all of it, as read from its place) this is; `number` is put into it."""
    if place.kind == _ACCEPTED:
        deadline_s, at_s, _, length = _IN.unpack_from(payload)
        stop = _IN.size + length
        limit = None if deadline_s == _NO_DEADLINE else deadline_s
        name = payload[_IN.size : stop].decode("utf-8", "replace")
        return Accepted(number=number, request_id=name, inputs=payload[stop:], deadline_s=limit, at_s=at_s)
    if place.kind == _DELIVERED:
        epoch, graph_hash = _OUT.unpack_from(payload)
        return Delivered(number=number, result=payload[_OUT.size :], graph_hash=graph_hash.hex(), epoch=epoch)
    (length,) = _ID.unpack_from(payload)
    name = payload[_ID.size : _ID.size + length].decode("utf-8", "replace")
    if place.kind == _ACKNOWLEDGED:
        return Acknowledged(number=number, request_id=name)
    return Failed(number=number, kind=name, reason=payload[_ID.size + length :].decode("utf-8", "replace"))


def compacted(state: JournalState, data: bytes | memoryview, salt: int) -> Iterator[bytes]:
    """The pieces of a new journal (under a new salt) that says what `state`, replayed from `data`, says.

    Of a finished request the inputs go, their digest stays.
    """
    view = memoryview(data).cast("B")
    yield head(salt)
    for name in state.acknowledged:
        yield encode(Acknowledged(number=0, request_id=name), salt)
    last = max(0, state.next_number - 1)
    for number, entry in sorted(state.entries.items()):
        accepted = view[entry.accepted.offset : entry.accepted.offset + entry.accepted.size]
        if entry.outcome is not None:
            accepted = accepted[: _IN.size + _IN.unpack_from(accepted)[3]]
        yield _frame(_ACCEPTED, number, accepted, salt)
        if entry.outcome is not None:
            outcome = entry.outcome
            yield _frame(outcome.kind, number, view[outcome.offset : outcome.offset + outcome.size], salt)
    if last not in state.entries:  # numbers are never used again
        yield _frame(_FAILED, last, _ID.pack(0), salt)
