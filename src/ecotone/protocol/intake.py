"""The receiver of the reliable link (theory of operation: link.py): credit accounts, duplicates, order of letters.

It never holds bytes: StoreChunk tells the shell where they go, `free` says that the consumer let go of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ecotone.protocol.effects import Held, Release, Send, SetTimer, StoreChunk
from ecotone.protocol.events import TimerId
from ecotone.protocol.message import (
    BLOB_EDGE,
    Ack,
    BodyId,
    Chunk,
    Grant,
    Letter,
    LetterBody,
    LinkOpen,
    LinkOpened,
    NodeId,
    Priority,
    Void,
)
from ecotone.protocol.notices import BodyArrived, Item, LetterArrived
from ecotone.protocol.settings import LinkSettings

__all__ = ["BLOB_NUMBER_MASK", "Receiver"]

BLOB_NUMBER_MASK = (1 << 20) - 1
"""Low bits of a blob body's request number: the number that the wanting shell gave; above them the node's rank."""

Channel = tuple[int, int, int]
_MOST_RANGES = 32  # in one acknowledgement
_MAX_AHEAD = 1 << 16  # seqs beyond the first gap that a receiver remembers


@dataclass(slots=True)
class _Intake:
    """Receiver's side of a channel."""

    window_bytes: int
    received_bytes: int = 0
    freed_bytes: int = 0
    granted_bytes: int = 0

    @property
    def limit_bytes(self) -> int:
        return self.freed_bytes + self.window_bytes


@dataclass(slots=True)
class _Incoming:
    size_bytes: int
    got_bytes: int = 0


class Receiver:
    """Bodies and letters of `peer` to this node."""

    def __init__(self, peer: NodeId, incarnation: int, settings: LinkSettings) -> None:
        self.peer, self.incarnation, self.settings = peer, incarnation, settings
        self.sender_incarnation = 0
        self._next_seq = self._next_letter = 0
        self._ahead: set[int] = set()
        self._letters_ahead: dict[int, LetterBody] = {}
        self._intakes: dict[Channel, _Intake] = {}
        self._partial: dict[BodyId, _Incoming] = {}
        self._held: dict[BodyId, int] = {}
        self._refused: dict[BodyId, None] = {}
        self._chunks_to_ack = 0
        self._came_s = 0.0  # the last chunk
        self._newest = [0, 0]  # greatest number of a sending, of tensors and of weights
        self._dirty: set[Channel] = set()
        self._timer_on = False

    @property
    def timer(self) -> TimerId:
        return ("ack", self.peer)

    @property
    def held_bytes(self) -> int:
        """Bytes of bodies, whole or not, that the shell holds for this link."""
        return sum(self._held.values()) + sum(p.got_bytes for p in self._partial.values())

    def opened_by(self, message: LinkOpen) -> list[Item]:
        """The peer (re)connected, restarted, or asks whether we live: answer with all we know."""
        items: list[Item] = []
        if message.incarnation < self.sender_incarnation:
            return items
        if message.incarnation > self.sender_incarnation:
            items += self._reset(message.incarnation)
        self._chunks_to_ack = 0
        grants = tuple(self._grant(channel) for channel in self._intakes)
        reply = LinkOpened(
            sender_incarnation=self.sender_incarnation,
            incarnation=self.incarnation,
            next_seq=self._next_seq,
            next_letter=self._next_letter,
            window_bytes=self.settings.window_bytes,
            grants=grants,
        )
        return [*items, Send(peer=self.peer, message=reply, priority=Priority.CONTROL)]

    def is_new(self, chunk: Chunk) -> bool:
        """Whether this chunk has not been seen and may be taken."""
        return (
            self._is_mine(chunk.sender_incarnation, chunk.incarnation)
            and self._is_open_seq(chunk.seq)
            and 0 <= chunk.offset <= chunk.offset + chunk.length <= chunk.size_bytes <= self.settings.max_body_bytes
            and (chunk.body not in self._partial or self._partial[chunk.body].size_bytes == chunk.size_bytes)
        )

    def take(self, chunk: Chunk, wanted: bool, now_s: float) -> list[Item]:
        """One chunk; with `wanted` False (old epoch, cancelled, parked out) its seq closes and its credit returns."""
        is_mine = self._is_mine(chunk.sender_incarnation, chunk.incarnation)
        if is_mine and chunk.number > self._newest[chunk.background]:
            self._newest[chunk.background] = chunk.number
        if not self.is_new(chunk):
            return self._ack(now_s) if is_mine else []
        body, length = chunk.body, chunk.length
        intake = self._intake(body[:3])
        if intake.received_bytes + length > intake.limit_bytes:
            return []  # beyond the credit: a peer that does not keep the protocol
        intake.window_bytes = max(intake.window_bytes, chunk.size_bytes)
        self._close(chunk.seq)
        intake.received_bytes += length
        self._chunks_to_ack += 1
        self._came_s = now_s
        items: list[Item] = []
        whole = False
        if not wanted or body in self._refused:
            items += self._refuse(body, length)
        elif body[2] == BLOB_EDGE:
            local = body._replace(request=body.request & BLOB_NUMBER_MASK)
            items.append(StoreChunk(body=local, offset=chunk.offset, length=length, size_bytes=chunk.size_bytes))
            self._freed(body, length)
            whole = self._count(chunk)
        else:
            items.append(StoreChunk(body=body, offset=chunk.offset, length=length, size_bytes=chunk.size_bytes))
            whole = self._count(chunk)
            if whole:
                self._held[body] = chunk.size_bytes
        if whole:
            items.append(BodyArrived(self.peer, body, chunk.size_bytes, chunk.budget_s))
        # The end of a blob is told at once: the asker holds the file open. Others share acknowledgements, which cost as much
        # as small bodies do.
        return items + self._ack_soon(now_s, whole and body[2] == BLOB_EDGE)

    def voided(self, message: Void, now_s: float) -> list[Item]:
        """The sender gave a body up: close its seqs, return their credit, free what had come."""
        if not self._is_mine(message.sender_incarnation, message.incarnation) or len(message.seqs) != len(message.lengths):
            return []
        body = message.body
        for seq, length in zip(message.seqs, message.lengths, strict=True):
            if self._is_open_seq(seq) and length >= 0:
                self._close(seq)
                self._intake(body[:3]).received_bytes += length
                self._freed(body, length)
        items: list[Item] = []
        partial = self._partial.pop(body, None)
        if partial is not None and body[2] != BLOB_EDGE:
            self._freed(body, partial.got_bytes)
            items.append(Release(body=body, held=Held.BYTES))
        return items + self._ack(now_s)

    def letter(self, message: Letter, now_s: float) -> list[Item]:
        """One letter; reports it and those that waited for it, in order, each once."""
        if not self._is_mine(message.sender_incarnation, message.incarnation):
            return []
        if message.number < self._next_letter:
            return self._ack(now_s)
        if message.number < self._next_letter + _MAX_AHEAD // 64:
            self._letters_ahead[message.number] = message.content
        items: list[Item] = []
        while self._next_letter in self._letters_ahead:
            items.append(LetterArrived(self.peer, self._letters_ahead.pop(self._next_letter)))
            self._next_letter += 1
        return items + self._ack_soon(now_s, False)

    def free(self, body: BodyId, now_s: float) -> list[Item]:
        """The consumer freed a whole body: its credit returns."""
        size_bytes = self._held.pop(body, None)
        if size_bytes is None:
            return []
        intake = self._freed(body, size_bytes)
        return self._ack_soon(now_s, 2 * (intake.limit_bytes - intake.granted_bytes) >= intake.window_bytes)

    def drop(self, body: BodyId, now_s: float) -> list[Item]:
        """The request of this body was cancelled: free what is here, refuse what still comes."""
        items = self._refuse(body, 0) if body in self._partial else []
        return items + self.free(body, now_s)

    def forget(self, session: int, epoch: int | None) -> list[Item]:
        """Drop accounts and half bodies of an epoch of a session (None: all of them)."""
        gone = {c for c in self._intakes if c[0] == session and epoch in (None, c[1])}
        partial = [b for b in self._partial if b[:3] in gone]
        for body in partial:
            del self._partial[body]
        for body in [b for b in self._held if b[:3] in gone]:
            del self._held[body]
        for channel in gone:
            del self._intakes[channel]
        self._dirty -= gone
        return [Release(body=b, held=Held.BYTES) for b in partial if b.edge != BLOB_EDGE]

    def timer_fired(self, now_s: float) -> list[Item]:
        """The short timer of delayed acknowledgements."""
        self._timer_on = False
        return self._ack(now_s)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _is_mine(self, sender_incarnation: int, incarnation: int) -> bool:
        return sender_incarnation == self.sender_incarnation and incarnation == self.incarnation

    def _is_open_seq(self, seq: int) -> bool:
        return self._next_seq <= seq < self._next_seq + _MAX_AHEAD and seq not in self._ahead

    def _close(self, seq: int) -> None:
        self._ahead.add(seq)
        while self._next_seq in self._ahead:
            self._ahead.remove(self._next_seq)
            self._next_seq += 1

    def _reset(self, incarnation: int) -> list[Item]:
        """A new process at the other end: half bodies go; whole ones stay with the consumer and weigh on the new account."""
        items: list[Item] = [Release(body=b, held=Held.BYTES) for b in self._partial if b.edge != BLOB_EDGE]
        self.sender_incarnation = incarnation
        self._next_seq = self._next_letter = 0
        self._newest = [0, 0]
        self._ahead, self._letters_ahead, self._partial, self._refused = set(), {}, {}, {}
        for channel, intake in self._intakes.items():
            intake.received_bytes = 0
            intake.freed_bytes = -sum(size for body, size in self._held.items() if body[:3] == channel)
        return items

    def _intake(self, channel: Channel) -> _Intake:
        intake = self._intakes.get(channel)
        if intake is None:
            window = self.settings.window_bytes
            intake = self._intakes[channel] = _Intake(window, granted_bytes=window)
        return intake

    def _freed(self, body: BodyId, length: int) -> _Intake:
        intake = self._intake(body[:3])
        intake.freed_bytes += length
        self._dirty.add(body[:3])
        return intake

    def _count(self, chunk: Chunk) -> bool:
        incoming = self._partial.setdefault(chunk.body, _Incoming(chunk.size_bytes))
        incoming.got_bytes += chunk.length
        if incoming.got_bytes < incoming.size_bytes:
            return False
        del self._partial[chunk.body]
        return True

    def _refuse(self, body: BodyId, length: int) -> list[Item]:
        self._refused[body] = None
        if len(self._refused) > 4096:
            del self._refused[next(iter(self._refused))]
        partial = self._partial.pop(body, None)
        self._freed(body, length + (partial.got_bytes if partial else 0))
        return [Release(body=body, held=Held.BYTES)] if partial else []

    def _ack_soon(self, now_s: float, at_once: bool) -> list[Item]:
        if at_once or self._ahead or self._chunks_to_ack >= self.settings.ack_every_chunks:
            return self._ack(now_s)
        if self._timer_on:
            return []
        self._timer_on = True
        return [SetTimer(timer=self.timer, at_s=now_s + self.settings.ack_delay_s)]

    def _ack(self, now_s: float) -> list[Item]:
        delay_s = now_s - self._came_s if self._chunks_to_ack else 0.0
        self._chunks_to_ack = 0
        for channel, intake in self._intakes.items():
            if intake.limit_bytes > intake.granted_bytes:
                self._dirty.add(channel)
        grants = tuple(self._grants(self._dirty))
        self._dirty = set()
        message = Ack(
            sender_incarnation=self.sender_incarnation,
            incarnation=self.incarnation,
            next_seq=self._next_seq,
            next_letter=self._next_letter,
            grants=grants,
            delay_s=max(0.0, delay_s),
            newest=self._newest[False],
            newest_background=self._newest[True],
            ahead=_ranges(self._ahead)[:_MOST_RANGES] if self._ahead else (),
        )
        return [Send(peer=self.peer, message=message, priority=Priority.CONTROL)]

    def _grants(self, channels: set[Channel]) -> Iterator[Grant]:
        for channel in sorted(channels):
            yield self._grant(channel)

    def _grant(self, channel: Channel) -> Grant:
        intake = self._intakes[channel]
        intake.granted_bytes = intake.limit_bytes
        session, epoch, edge = channel
        return Grant(session=session, epoch=epoch, edge=edge, limit_bytes=intake.limit_bytes)


def _ranges(seqs: set[int]) -> tuple[tuple[int, int], ...]:
    """Ascending half-open ranges that hold just `seqs`."""
    found: list[tuple[int, int]] = []
    for seq in sorted(seqs):
        if found and found[-1][1] == seq:
            found[-1] = (found[-1][0], seq + 1)
        else:
            found.append((seq, seq + 1))
    return tuple(found)
