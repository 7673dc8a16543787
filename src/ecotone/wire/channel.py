"""Whole bodies and letters over a wire, reliably: the link machines of ecotone.protocol joined to frames, threads and clock.

For programs that move bytes without running stages: measuring links, benchmarks, tests. (A node's shell drives the whole
`protocol.Node` in the same way, through the same frames.) A body given to `send_body` is kept until the peer acknowledged
it; a body that arrives is handed out once and weighs on the sender's credit until `release`. Memory is bounded at both ends:
the sender's by `queue_bytes`, the receiver's by the window.

Callbacks come from the wire's threads and the timer's, one at a time, with `lock` held; they must return at once, wait for
no lock that is held while sending, and may call any method, but `send_body` only with timeout_s=0.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ecotone.codec.frame import FrameError
from ecotone.protocol.effects import CancelTimer, Held, LinkChanged, Release, Send, SetTimer, StoreChunk
from ecotone.protocol.events import TimerId
from ecotone.protocol.intake import Receiver
from ecotone.protocol.link import Sender
from ecotone.protocol.message import Ack, BodyId, Chunk, Letter, LetterBody, LinkMessage, LinkOpen, LinkOpened, Void
from ecotone.protocol.notices import BodyArrived, BodyFailed, Item, LetterArrived, PeerLost, PeerReturned
from ecotone.protocol.settings import LinkSettings
from ecotone.wire.framing import from_frame, to_frame
from ecotone.wire.wire import NodeId, PeerDown, PeerUp, Received, Wire, WireError, WireEvent

__all__ = ["Body", "Channel"]

Body = bytes | bytearray | memoryview
_EPOCH_S = 1_735_689_600  # 2025-01-01: incarnations count tenths of seconds since, 32 bits last until 2038


@dataclass(slots=True)
class _Link:
    sender: Sender
    receiver: Receiver
    sending: dict[BodyId, Body] = field(default_factory=dict)
    arriving: dict[BodyId, Body] = field(default_factory=dict)
    queued_bytes: int = 0


class Channel:
    """The reliable end of `wire` at `node`. `incarnation` must grow from one process of this node to the next.

    `on_body(peer, body, content)`: a whole body, once; call `release(peer, body)` when done with it.
    `on_letter(peer, letter)`: in order, once. `on_peer(peer, is_up)`. `on_failed(peer, body, reason)`: it will not arrive.
    `on_restarted(peer)`: it is another process than before, all that it had not acknowledged was dropped. `links`: settings
    of the links to peers that want others than `settings`.
    Headers and letters always carry a checksum, chunks with `checksum`: what ecotone.codec.pack makes has its own.
    """

    def __init__(
        self,
        wire: Wire,
        node: NodeId,
        *,
        on_body: Callable[[NodeId, BodyId, Body], None],
        on_letter: Callable[[NodeId, LetterBody], None] | None = None,
        on_peer: Callable[[NodeId, bool], None] | None = None,
        on_failed: Callable[[NodeId, BodyId, str], None] | None = None,
        on_restarted: Callable[[NodeId], None] | None = None,
        links: Mapping[NodeId, LinkSettings] | None = None,
        settings: LinkSettings | None = None,
        queue_bytes: int = 64 * 1024 * 1024,
        checksum: bool = False,
        incarnation: int | None = None,
    ):
        self.node, self.num_bad_frames = node, 0
        self._wire, self._queue_bytes, self._checksum = wire, queue_bytes, checksum
        self._settings, self._link_settings = settings or LinkSettings(), dict(links or {})
        self._on_restarted = on_restarted
        self._incarnation = incarnation or int((time.time() - _EPOCH_S) * 10)
        self._on_body, self._on_letter, self._on_peer, self._on_failed = on_body, on_letter, on_peer, on_failed
        self._links: dict[NodeId, _Link] = {}
        self._up: set[NodeId] = set()
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._timers: dict[TimerId, float] = {}
        self._due: list[tuple[float, TimerId]] = []
        self._rang = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run_timers, name=f"channel-{node}", daemon=True)

    def start(self) -> None:
        """Open the wire; raises WireError where that fails."""
        self._wire.start(self._receive)
        self._thread.start()

    def send_body(
        self, peer: NodeId, body: BodyId, content: Body, *, timeout_s: float | None = None, background: bool = False
    ) -> None:
        """Queue `content` (not to be changed any more) as `body`, a name never used before.

        Waits while more than `queue_bytes` are queued for `peer`; raises WireError when that lasts longer than `timeout_s`.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        size_bytes = len(content)
        with self._changed:
            link = self._link(peer)
            while link.queued_bytes and link.queued_bytes + size_bytes > self._queue_bytes and not self._closed:
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    raise WireError(f'{link.queued_bytes} bytes wait for "{peer}" already; it takes no more for now')
                self._changed.wait(left_s)
            if self._closed:
                raise WireError(f'node "{self.node}": its channel is closed')
            link.sending[body] = content
            link.queued_bytes += size_bytes
            now_s = time.monotonic()
            self._apply(peer, link, link.sender.offer(body, size_bytes, None, background, now_s), sender=True)

    def send_letter(self, peer: NodeId, letter: LetterBody) -> None:
        """Send a small message, reliably, in order, ahead of all bodies."""
        with self._changed:
            link = self._link(peer)
            self._apply(peer, link, link.sender.post(letter, time.monotonic()), sender=True)

    def release(self, peer: NodeId, body: BodyId) -> None:
        """The consumer is done with a body that came from `peer`: its memory and its credit return."""
        with self._changed:
            link = self._link(peer)
            self._apply(peer, link, link.receiver.free(body, time.monotonic()), sender=False)

    def outstanding_bytes(self, peer: NodeId) -> int:
        """Bytes of bodies for `peer` that it has not acknowledged."""
        with self._changed:
            return self._link(peer).queued_bytes

    def peers(self) -> frozenset[NodeId]:
        """Peers whose link answers now."""
        with self._changed:
            return frozenset(self._up)

    def wait_for(self, peer: NodeId, timeout_s: float) -> None:
        """Return when the link to `peer` answers; raises WireError after `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: peer in self._up, timeout_s):
                raise WireError(f'node "{peer}" did not answer within {timeout_s:g} s; is it up and reachable?')

    def wait_for_life(self, peer: NodeId, incarnation: int, timeout_s: float) -> None:
        """Return when the link goes to that process of `peer`, or a later one; raises WireError after `timeout_s`."""
        with self._changed:
            sender = self._link(peer).sender
            if not self._changed.wait_for(lambda: sender.is_open and sender.peer_incarnation >= incarnation, timeout_s):
                raise WireError(f'node "{peer}" began anew and its link did not within {timeout_s:g} s')

    def greet(self, peer: NodeId) -> None:
        """Ask `peer` for its side of the link now: it may have begun to listen, or to be another one, since it was asked."""
        with self._changed:
            if not self._closed:
                link = self._link(peer)
                self._apply(peer, link, link.sender.connected(time.monotonic()), sender=True)

    def close(self) -> None:
        """Leave; what was not acknowledged is lost. Closing twice does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with self._rang:
            self._rang.notify()
        self._wire.close()

    def _link(self, peer: NodeId) -> _Link:
        link = self._links.get(peer)
        if link is None:
            mine, settings = self._incarnation, self._link_settings.get(peer, self._settings)
            link = self._links[peer] = _Link(Sender(peer, mine, settings), Receiver(peer, mine, settings))
        return link

    def _receive(self, event: WireEvent) -> None:
        payload = memoryview(b"")
        message: LinkMessage | None = None
        if isinstance(event, Received):
            try:
                message, payload = from_frame(event.frame)
            except FrameError:
                self.num_bad_frames += 1
                return
        with self._changed:
            if self._closed:
                return
            link, now_s = self._link(event.peer), time.monotonic()
            if isinstance(event, PeerUp):
                self._apply(event.peer, link, link.sender.connected(now_s), sender=True)
            elif isinstance(event, PeerDown):
                self._apply(event.peer, link, link.sender.disconnected(), sender=True)
            elif message is not None:
                self._take(event.peer, link, message, payload, now_s)

    def _take(self, peer: NodeId, link: _Link, message: LinkMessage, payload: memoryview, now_s: float) -> None:
        link.sender.heard(now_s, hears_us=isinstance(message, Ack | LinkOpened))
        match message:
            case Chunk():
                self._apply(peer, link, link.receiver.take(message, True, now_s), sender=False, payload=payload)
            case Ack():
                self._apply(peer, link, link.sender.acked(message, now_s), sender=True)
            case LinkOpen():
                self._apply(peer, link, link.receiver.opened_by(message), sender=False)
            case LinkOpened():
                self._apply(peer, link, link.sender.opened(message, now_s), sender=True)
            case Void():
                self._apply(peer, link, link.receiver.voided(message, now_s), sender=False)
            case Letter():
                self._apply(peer, link, link.receiver.letter(message, now_s), sender=False)

    def _apply(
        self, peer: NodeId, link: _Link, items: Sequence[Item], *, sender: bool, payload: memoryview = memoryview(b"")
    ) -> None:
        """Carry out what a machine asked for; `sender` says which of the two. Acknowledgements go after the deliveries."""
        later: list[Send] = []
        for item in items:
            match item:
                case Send(message=Chunk() as chunk):
                    content = link.sending.get(chunk.body)
                    if content is not None:
                        view = memoryview(content)[chunk.offset : chunk.offset + chunk.length]
                        self._put(peer, to_frame(chunk, view, checksum=self._checksum), item)
                case Send():
                    later.append(item)
                case SetTimer():
                    self._set_timer(item.timer, item.at_s)
                case CancelTimer():
                    self._timers.pop(item.timer, None)
                case StoreChunk():
                    self._store(link, item, payload)
                case Release(held=Held.BYTES):
                    self._forget(link, item.body, sender=sender)
                case _:
                    self._tell(peer, link, item)
        for item in later:
            self._put(peer, to_frame(item.message), item)

    def _put(self, peer: NodeId, frame: bytearray, item: Send) -> None:
        try:
            self._wire.send(peer, frame, item.priority)
        except WireError:
            return  # lost like any frame on a broken link: the machine sends it again, or learns that the peer is gone

    def _store(self, link: _Link, chunk: StoreChunk, payload: memoryview) -> None:
        if chunk.length == chunk.size_bytes:
            link.arriving[chunk.body] = payload  # the whole body in one frame: no copy
            return
        buffer = link.arriving.get(chunk.body)
        if buffer is None:
            buffer = link.arriving[chunk.body] = memoryview(bytearray(chunk.size_bytes))
        assert isinstance(buffer, memoryview)
        buffer[chunk.offset : chunk.offset + chunk.length] = payload

    def _forget(self, link: _Link, body: BodyId, *, sender: bool) -> None:
        if not sender:
            link.arriving.pop(body, None)
            return
        content = link.sending.pop(body, None)
        if content is not None:
            link.queued_bytes -= len(content)
            self._changed.notify_all()

    def _tell(self, peer: NodeId, link: _Link, item: Item) -> None:
        match item:
            case BodyArrived():
                self._on_body(peer, item.body, link.arriving.pop(item.body))
            case LetterArrived() if self._on_letter is not None:
                self._on_letter(peer, item.content)
            case BodyFailed() if self._on_failed is not None:
                self._on_failed(peer, item.body, item.reason)
            case LinkChanged(state="restarted") if self._on_restarted is not None:
                self._on_restarted(peer)
            case PeerReturned() | PeerLost():
                is_up = isinstance(item, PeerReturned)
                (self._up.add if is_up else self._up.discard)(peer)
                self._changed.notify_all()
                if self._on_peer is not None:
                    self._on_peer(peer, is_up)

    def _set_timer(self, timer: TimerId, at_s: float) -> None:
        self._timers[timer] = at_s
        with self._rang:
            heapq.heappush(self._due, (at_s, timer))
            if self._due[0][0] == at_s:
                self._rang.notify()

    def _run_timers(self) -> None:
        while not self._closed:
            with self._rang:
                wait_s = self._due[0][0] - time.monotonic() if self._due else None
                if wait_s is None or wait_s > 0:
                    self._rang.wait(wait_s)
                    continue
                at_s, timer = heapq.heappop(self._due)
            with self._changed:
                if self._timers.get(timer) != at_s or self._closed:
                    continue  # cancelled or set anew
                del self._timers[timer]
                kind, peer = str(timer[0]), NodeId(str(timer[1]))
                link = self._link(peer)
                if kind == "link":
                    self._apply(peer, link, link.sender.timer_fired(time.monotonic()), sender=True)
                else:
                    self._apply(peer, link, link.receiver.timer_fired(time.monotonic()), sender=False)
