"""The reliable link: two pure machines per directed pair of nodes, over a wire that may lose, repeat, reorder and die.

Here is the sender; the receiver is in intake.py.

Theory of operation. The *sender* cuts bodies into chunks, numbers them with `seq` and keeps each until acknowledged. Every
plan edge is a *channel* with a credit account of its own: the receiver grants an absolute limit of bytes (freed + window),
so a lost or repeated grant does no harm, and a slow stage holds up its own edge only. That, with bodies of a channel sent
one after the other, makes rings of stages free of deadlock. Credit returns when the consumer frees memory, not on arrival.
Letters (control) have a lane of their own: numbered, in order, without credit, never behind bodies.

Handshake: LinkOpen(sender incarnation) -> LinkOpened(receiver incarnation, next numbers, grants), after every reconnection
and as a probe while nothing is heard. A higher incarnation of the receiver means that it lost its memory: every body here
ends with BodyFailed, letters are sent anew. A higher one of the sender makes the receiver drop half-received bodies.
Incarnations must grow from one process to the next. A window grows to the largest body seen (capped), or nothing would move.

Loss: each sending of a chunk has a number of its own (as QUIC's packets, RFC 9002), and an acknowledgement names the
greatest that came. The wire keeps the order of a priority, so what was sent well before that one and is not here was lost:
it goes again at once. The same numbers tell a chunk that came late from one that was lost and came when it was repeated.
Patience: where nothing newer came, nothing is sent again before the time is over that the outstanding bytes need at the rate
measured (or believed): otherwise a link too thin for a body in a lease would carry nothing but repeats. Then the oldest
chunks go again; when they come, they show what else was lost. If it was only late, waits grow to what it took.

Giving up a body turns its unacknowledged seqs, and one fresh one, into voids: the range closes and the credit returns.
Invariants: bytes held of a channel <= max(window, largest body); each body is reported once by a receiver's incarnation;
a body ends by Release of its bytes at the sender (acknowledged, given up or failed). O(1) per chunk,
but for the choice of the channel, and for a look through what is outstanding while there is a gap.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from ecotone.protocol.effects import CancelTimer, Held, LinkChanged, Release, Send, SetTimer
from ecotone.protocol.events import ErrorKind, TimerId
from ecotone.protocol.message import (
    Ack,
    BodyId,
    Chunk,
    Grant,
    Letter,
    LetterBody,
    LinkOpen,
    LinkOpened,
    LinkSample,
    NodeId,
    Ping,
    Pong,
    Priority,
    Void,
)
from ecotone.protocol.notices import (
    BodyAcked,
    BodyFailed,
    BodySent,
    Item,
    PeerLost,
    PeerReturned,
)
from ecotone.protocol.settings import LinkSettings
from ecotone.protocol.timing import LinkTiming

__all__ = ["Sender"]

Channel = tuple[int, int, int]
_RESEND_CHUNKS = 4
_MOST_LEASES = 32  # between two resends
_REORDERED = 3  # a sending is lost when one so many numbers later came
_MUTE_LIMITS = 4  # as long as silence may a peer ask and not answer: on a thin link answers take their time
_FRAME_LEASES, _QUEUE_LEASES = 32, 64  # patience at most with a frame, and with all that is outstanding, on a thin link
_LETTER_BYTES, _PROBE_BYTES = 1024, 512  # a letter, and what a LinkOpen and its answer may take, about


@dataclass(slots=True)
class _Outgoing:
    body: BodyId
    size_bytes: int
    deadline_s: float | None
    background: bool
    order: int
    offset: int = 0  # bytes given to the wire
    unacked: int = 0  # chunks


@dataclass(slots=True)
class _Sent:
    """A seq not yet acknowledged: a chunk, or a void where `out` is None."""

    body: BodyId
    offset: int
    length: int
    out: _Outgoing | None
    sent_s: float | None  # None: sent more than once, or void
    first_s: float = math.inf  # when it was sent first, where more than once
    number: int = 0  # of its last sending
    is_here: bool = False  # at the receiver, beyond a gap


@dataclass(slots=True)
class _Account:
    """Sender's side of a channel."""

    limit_bytes: int
    sent_bytes: int = 0
    queue: deque[_Outgoing] = field(default_factory=deque)


class Sender:
    """Bodies and letters of this node to `peer`."""

    def __init__(self, peer: NodeId, incarnation: int, settings: LinkSettings) -> None:
        self.peer, self.incarnation, self.settings = peer, incarnation, settings
        self.peer_incarnation = 0
        self.is_up = False  # the wire says so
        self.is_open = False  # the handshake of this connection is done
        self._silent = False
        self._opened_s = self._answered_s = -math.inf  # last LinkOpen of ours, last answer to one of theirs
        self._window = 0
        self._accounts: dict[Channel, _Account] = {}
        self._limits: dict[Channel, int] = {}
        self._bodies: dict[BodyId, _Outgoing] = {}
        self._unacked: dict[int, _Sent] = {}
        self._letters: dict[int, LetterBody] = {}
        self._next_seq = self._next_letter = self._order = 0
        self._heard_s = self._understood_s = self._progress_s = self._waits_s = 0.0
        self._outstanding_bytes = 0
        self._number = 0  # of the last sending
        self._newest = (0, 0)  # greatest numbers that came, of tensors and of weights
        self._resend_wait_s = settings.lease_s
        self._late_s = 0.0  # how long chunks took of late that were thought lost
        self._timer_on = False
        self.timing = LinkTiming(peer)

    @property
    def timer(self) -> TimerId:
        return ("link", self.peer)

    @property
    def num_letters(self) -> int:
        """Letters not yet acknowledged."""
        return len(self._letters)

    @property
    def num_bodies(self) -> int:
        return len(self._bodies)

    def offer(self, body: BodyId, size_bytes: int, deadline_s: float | None, background: bool, now_s: float) -> list[Item]:
        """Queue a body; ends by Release of its bytes, and BodyFailed where it did not arrive."""
        if body in self._bodies:
            return []
        if size_bytes > self.settings.max_body_bytes or size_bytes < 1:
            reason = f"{size_bytes} bytes for {self.peer}: must be 1 to {self.settings.max_body_bytes}; cut elsewhere"
            return [Release(body=body, held=Held.BYTES), BodyFailed(body, ErrorKind.TOO_LARGE, reason)]
        out = _Outgoing(body, size_bytes, deadline_s, background, self._order)
        self._order += 1
        self._bodies[body] = out
        self._account(body[:3]).queue.append(out)
        return self._pump(now_s)

    def post(self, content: LetterBody, now_s: float) -> list[Item]:
        """Send a letter, reliably and in order."""
        number = self._next_letter
        self._next_letter += 1
        self._letters[number] = content
        items: list[Item] = [self._letter(number)] if self.is_open else []
        return items + self._watch(now_s)

    def give_up(self, body: BodyId, now_s: float) -> list[Item]:
        """Drop a body (deadline, cancellation): unsent bytes never go, sent ones are closed by a Void."""
        out = self._bodies.pop(body, None)
        if out is None:
            return []
        items: list[Item] = [Release(body=body, held=Held.BYTES)]
        account = self._accounts[body[:3]]
        if out.offset < out.size_bytes:
            account.queue.remove(out)
        if out.offset == 0:
            return items
        seqs = [seq for seq, sent in self._unacked.items() if sent.out is out]
        for seq in seqs:
            self._unacked[seq].out = self._unacked[seq].sent_s = None
        lengths = [self._unacked[seq].length for seq in seqs]
        fresh = self._next_seq
        self._next_seq += 1
        self._unacked[fresh] = _Sent(body, 0, 0, None, None)
        if self.is_open:
            items.append(self._void(body, (*seqs, fresh), (*lengths, 0)))
        return items + self._pump(now_s)

    def forget(self, session: int, epoch: int | None, now_s: float) -> list[Item]:
        """Drop what is left of an epoch of a session (None: all of them) and its accounts."""
        gone = [c for c in self._accounts if c[0] == session and epoch in (None, c[1])]
        items: list[Item] = []
        for body in [b for b in self._bodies if b[:3] in gone]:
            items += self.give_up(body, now_s)
        for channel in gone:
            del self._accounts[channel]
        for channel in [c for c in self._limits if c[0] == session and epoch in (None, c[1])]:
            del self._limits[channel]
        return items

    def connected(self, now_s: float) -> list[Item]:
        """The wire reaches the peer: open, or resume."""
        self.is_up, self.is_open, self._silent = True, False, False
        self._heard_s = self._understood_s = self._progress_s = now_s
        self.timing.restart(now_s)
        return [self._open(now_s), *self._watch(now_s)]

    def disconnected(self) -> list[Item]:
        """The wire lost the peer: keep everything, send nothing."""
        was_up, self.is_up, self.is_open = self.is_up and not self._silent, False, False
        items: list[Item] = [CancelTimer(timer=self.timer)] if self._timer_on else []
        self._timer_on = False
        if was_up:
            items += [LinkChanged(peer=self.peer, state="down"), PeerLost(self.peer)]
        return items

    def heard(self, now_s: float, *, hears_us: bool) -> None:
        """Something came from the peer; an answer shows that it hears us, unlike what it sends of its own accord."""
        self._heard_s = now_s
        if hears_us:
            self._understood_s = now_s

    def opened(self, message: LinkOpened, now_s: float) -> list[Item]:
        """The receiver's answer: start, resume, or learn that it restarted."""
        if message.sender_incarnation != self.incarnation or message.incarnation < self.peer_incarnation or not self.is_up:
            return []
        lease_s, unanswered_s = self.settings.lease_s, self.timing.unanswered_s(now_s)
        self.timing.open_answered(now_s)
        items: list[Item] = []
        restarted = 0 < self.peer_incarnation < message.incarnation
        if restarted:
            items += self._restarted()
        if message.incarnation != self.peer_incarnation:
            self._limits = {(g.session, g.epoch, g.edge): g.limit_bytes for g in message.grants}
            for channel, account in self._accounts.items():
                account.limit_bytes = self._limits.get(channel, message.window_bytes)
        self.peer_incarnation, self._window = message.incarnation, message.window_bytes
        items += self._acknowledged(message.next_seq, message.next_letter, message.grants, 0.0, now_s)
        was_gone = self._silent or not self.is_open
        if was_gone or unanswered_s >= 1.5 * lease_s:  # it hears us again; what it lacks may still be on a wire that is slow
            may_be_lost = not self.is_open or now_s - self._progress_s >= max(self._outstanding_s(), self._late_s)
            self.is_open, self._silent, self._resend_wait_s = True, False, lease_s
            items += [LinkChanged(peer=self.peer, state="up"), PeerReturned(self.peer)] if was_gone else []
            if may_be_lost:
                self._progress_s = now_s
                items += self._resend(None, now_s)
        return items + self._pump(now_s)

    def acked(self, message: Ack, now_s: float) -> list[Item]:
        """A cumulative acknowledgement with grants; stale ones do no harm."""
        if message.sender_incarnation != self.incarnation or message.incarnation != self.peer_incarnation:
            return []
        tensors, weights = self._newest
        if message.newest > tensors or message.newest_background > weights:
            self._newest = max(tensors, message.newest), max(weights, message.newest_background)
        items = self._acknowledged(message.next_seq, message.next_letter, message.grants, message.delay_s, now_s)
        for start, stop in message.ahead if self._unacked else ():
            for seq in range(max(start, next(iter(self._unacked))), min(stop, self._next_seq)):
                self._unacked[seq].is_here = True
        return items + self._resend_overtaken(bool(message.ahead), now_s) + self._pump(now_s)

    def ping(self, now_s: float) -> list[Item]:
        """Ask for a Pong, to time a round trip; nothing while the link is down."""
        return [self._control(self.timing.ping(now_s))] if self.is_open else []

    def probe(self, size_bytes: int, now_s: float) -> list[Item]:
        """Time the link with `size_bytes` of padding, unless it is down or carries bodies, which time it as well."""
        if not self.is_open or self._unacked:
            return self.ping(now_s)
        return [self._control(self.timing.probe(size_bytes, now_s))]

    def ponged(self, message: Pong, now_s: float) -> list[Item]:
        """The answer to a Ping, of this link or of someone else."""
        padded = self.timing.ponged(message.nonce, not self._unacked, now_s)
        return [] if padded is None else [Send(peer=self.peer, message=padded, priority=Priority.DATA)]

    def sample(self) -> LinkSample | None:
        """What was measured of the link since the last call; None where nothing was."""
        return self.timing.take()

    def timer_fired(self, now_s: float) -> list[Item]:
        """Probe; after a wait without progress resend the oldest; after 1.5 leases of silence say that the peer is lost."""
        self._timer_on = False
        if not self.is_up or not self._waiting():
            return []
        lease_s, rtt_s = self.settings.lease_s, 3 * self.timing.rtt_s
        frame_s = 2 * self._carried_s(min(self.settings.chunk_bytes, self._outstanding_bytes))  # both ways, ahead of ours
        answer_s = frame_s + (self._carried_s(_PROBE_BYTES) or self.timing.num_opens * lease_s / 4)
        items: list[Item] = []
        is_due = self.timing.open_age_s(now_s) >= max(lease_s / 2, rtt_s, min(answer_s, _FRAME_LEASES * lease_s))
        if is_due and not self._would_starve(self._opened_s, now_s):
            items.append(self._open(now_s))
        # Where it asks all the time but never answers, our way to it is cut.
        limit_s = max(1.5 * lease_s, rtt_s, min(answer_s, _FRAME_LEASES * lease_s))
        silent_s, mute_s = (now_s - max(at_s, self._waits_s) for at_s in (self._heard_s, self._understood_s))
        if not self._silent and (silent_s >= limit_s or mute_s >= _MUTE_LIMITS * limit_s):
            self._silent = True
            items += [LinkChanged(peer=self.peer, state="down"), PeerLost(self.peer)]
        patience_s = self._resend_wait_s + max(min(self._outstanding_s(), _QUEUE_LEASES * lease_s), self._late_s)
        if self.is_open and now_s - self._progress_s >= patience_s:
            self._progress_s = now_s
            self._resend_wait_s = min(2 * self._resend_wait_s, _MOST_LEASES * lease_s)
            items += self._resend(_RESEND_CHUNKS, now_s)
        return items + self._watch(now_s, is_again=True)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _account(self, channel: Channel) -> _Account:
        account = self._accounts.get(channel)
        if account is None:
            account = self._accounts[channel] = _Account(self._limits.get(channel, self._window))
        return account

    def _carried_s(self, size_bytes: int) -> float:
        """Seconds in which the link surely carries so much, by what is known of its rate."""
        rate = self.timing.bytes_per_s or self.settings.bytes_per_s
        return 1.5 * size_bytes / rate if rate else 0.0

    def _outstanding_s(self) -> float:
        return self._carried_s(self._outstanding_bytes + _LETTER_BYTES * len(self._letters))

    def _waiting(self) -> bool:
        """Whether an answer is due; a peer that was called lost is asked on, or nobody would learn that it is back."""
        return not self.is_open or self._silent or bool(self._unacked) or bool(self._letters) or bool(self._bodies)

    def _watch(self, now_s: float, *, is_again: bool = False) -> list[Item]:
        if self.is_up and not self._timer_on and self._waiting():
            self._timer_on = True
            if not is_again:
                self._waits_s = now_s
            return [SetTimer(timer=self.timer, at_s=now_s + self.settings.lease_s / 2)]
        return []

    def _restarted(self) -> list[Item]:
        items: list[Item] = [LinkChanged(peer=self.peer, state="restarted")]
        for body in self._bodies:
            items.append(Release(body=body, held=Held.BYTES))
            items.append(BodyFailed(body, ErrorKind.NODE_LOST, f"{self.peer} restarted and lost what it held"))
        letters = list(self._letters.values())
        self._bodies, self._unacked, self._accounts, self._limits = {}, {}, {}, {}
        self._outstanding_bytes, self._newest = 0, (0, 0)
        self._letters = dict(enumerate(letters))
        self._next_seq, self._next_letter = 0, len(letters)
        self.is_open = False
        return items

    def _acknowledged(self, seq: int, letter: int, grants: tuple[Grant, ...], delay_s: float, now_s: float) -> list[Item]:
        items: list[Item] = []
        before = len(self._unacked) + len(self._letters)
        timed: list[tuple[float, int]] = []
        num_closed, took_s = len(self._unacked), 0.0
        while self._unacked and (first := next(iter(self._unacked))) < seq:
            sent = self._unacked.pop(first)
            self._outstanding_bytes -= sent.length
            out = sent.out
            if sent.sent_s is not None:
                timed.append((sent.sent_s, sent.length))
            if out is not None:
                if sent.sent_s is None and sent.number > self._newest_of(out):  # the repeat is under way: it was not lost
                    took_s = max(took_s, now_s - sent.first_s)
                out.unacked -= 1
                if out.unacked == 0 and out.offset == out.size_bytes:
                    del self._bodies[out.body]
                    items += [Release(body=out.body, held=Held.BYTES), BodyAcked(out.body)]
        num_closed -= len(self._unacked)
        if num_closed:
            self.timing.acknowledged(timed if len(timed) == num_closed else (), delay_s, now_s)
        while self._letters and (first := next(iter(self._letters))) < letter:
            del self._letters[first]
        for grant in grants:
            channel = (grant.session, grant.epoch, grant.edge)
            limit = max(grant.limit_bytes, self._limits.get(channel, 0))
            self._limits[channel] = limit
            if channel in self._accounts:
                self._accounts[channel].limit_bytes = max(limit, self._accounts[channel].limit_bytes)
        if len(self._unacked) + len(self._letters) < before:
            self._progress_s = now_s
            self._resend_wait_s = self.settings.lease_s
            # Where a link has become slow, what is sent again only lengthens its queue: wait as long as it takes.
            self._late_s = min(max(took_s, self._late_s / 2), _MOST_LEASES * self.settings.lease_s)
        return items

    def _resend(self, most: int | None, now_s: float) -> list[Item]:
        """Letters, voids and the `most` oldest chunks (None: all) that are not known to be here."""
        items: list[Item] = [self._letter(number) for number in self._letters]
        left = math.inf if most is None else most
        for seq, sent in list(self._unacked.items()):
            if not sent.is_here and (left > 0 or sent.out is None):
                left -= sent.out is not None
                items.append(self._again(seq, sent, now_s))
        return items

    def _resend_overtaken(self, has_gap: bool, now_s: float) -> list[Item]:
        """What was sent so long before something that came that it must be lost; `has_gap`: something beyond one came."""
        latest = min(max(self._newest), self._number) - _REORDERED
        first = next(iter(self._unacked.values()), None)
        if first is None or not self.is_open or (first.number > latest and not has_gap):
            return []  # the common case
        items: list[Item] = []
        for seq, sent in list(self._unacked.items()):
            if sent.out and not sent.is_here and sent.number <= min(self._newest_of(sent.out), self._number) - _REORDERED:
                self._progress_s = now_s
                items.append(self._again(seq, sent, now_s))
        return items

    def _again(self, seq: int, sent: _Sent, now_s: float) -> Send:
        sent.first_s = sent.first_s if sent.sent_s is None else sent.sent_s
        sent.sent_s = None
        return self._chunk(seq, sent, now_s) if sent.out else self._void(sent.body, (seq,), (sent.length,))

    def _newest_of(self, out: _Outgoing) -> int:
        """The greatest number that came of this priority or a lower one, which it would overtake."""
        return self._newest[True] if out.background else max(self._newest)

    def _pump(self, now_s: float) -> list[Item]:
        items: list[Item] = []
        while self.is_open and (account := self._next_account()) is not None:
            out = account.queue[0]
            credit = account.limit_bytes - account.sent_bytes
            length = min(self.settings.chunk_bytes, out.size_bytes - out.offset, credit)
            sent = _Sent(out.body, out.offset, length, out, now_s)
            if not self._unacked:
                self._progress_s = now_s
            self._unacked[self._next_seq] = sent
            self._outstanding_bytes += length
            items.append(self._chunk(self._next_seq, sent, now_s))
            self._next_seq += 1
            out.offset += length
            out.unacked += 1
            account.sent_bytes += length
            if out.offset == out.size_bytes:
                account.queue.popleft()
                items.append(BodySent(out.body))
        return items + self._watch(now_s)

    def _next_account(self) -> _Account | None:
        """The channel whose first body waits longest, tensors before weights, among those with credit."""
        best, key = None, (True, 0)
        for account in self._accounts.values():
            if account.queue and account.limit_bytes > account.sent_bytes:
                mine = (account.queue[0].background, account.queue[0].order)
                if best is None or mine < key:
                    best, key = account, mine
        return best

    def may_answer(self, now_s: float) -> bool:
        """Whether the answer to another LinkOpen leaves the link room for more: they may come faster than it carries."""
        if self._would_starve(self._answered_s, now_s):
            return False
        self._answered_s = now_s
        return True

    def _would_starve(self, last_s: float, now_s: float) -> bool:
        """Whether another control frame so soon after that of `last_s` would keep a thin link from carrying what waits."""
        lease_s, wait_s = self.settings.lease_s, self._carried_s(_PROBE_BYTES)
        is_thin = self._outstanding_bytes > 0 and wait_s > lease_s / 8
        return is_thin and now_s - last_s < min(wait_s, _FRAME_LEASES * lease_s)

    def _open(self, now_s: float) -> Send:
        self._opened_s = now_s
        self.timing.open_sent(now_s)
        return self._control(LinkOpen(incarnation=self.incarnation))

    def _control(self, message: LinkOpen | Ping) -> Send:
        return Send(peer=self.peer, message=message, priority=Priority.CONTROL)

    def _letter(self, number: int) -> Send:
        content = self._letters[number]
        message = Letter(
            sender_incarnation=self.incarnation, incarnation=self.peer_incarnation, number=number, content=content
        )
        return Send(peer=self.peer, message=message, priority=Priority.CONTROL)

    def _void(self, body: BodyId, seqs: tuple[int, ...], lengths: tuple[int, ...]) -> Send:
        mine, theirs = self.incarnation, self.peer_incarnation
        message = Void(sender_incarnation=mine, incarnation=theirs, body=body, seqs=seqs, lengths=lengths)
        return Send(peer=self.peer, message=message, priority=Priority.CONTROL)

    def _chunk(self, seq: int, sent: _Sent, now_s: float) -> Send:
        out = sent.out
        assert out is not None
        deadline_s = out.deadline_s
        self._number += 1
        sent.number = self._number
        message = Chunk(
            sender_incarnation=self.incarnation,
            incarnation=self.peer_incarnation,
            seq=seq,
            body=out.body,
            size_bytes=out.size_bytes,
            offset=sent.offset,
            length=sent.length,
            budget_s=None if deadline_s is None else max(0.0, deadline_s - now_s),
            background=out.background,
            number=sent.number,
        )
        priority = Priority.BACKGROUND if out.background else Priority.DATA
        return Send(peer=self.peer, message=message, priority=priority)
