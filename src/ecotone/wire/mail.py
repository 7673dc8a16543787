"""Messages of any size between nodes: each arrives once and in the order of sending, per pair of nodes. And urgent ones.

A message is a body of a Channel behind a head (sender's incarnation, stream, number): bodies of a lossy link may be
complete out of order, so what comes early waits here, and holds its sender's credit meanwhile. A stream ends when the peer
turns out to be another process; the next one begins at number 0. Urgent messages go at once, ahead of everything,
unordered, and may be lost: for probes and the like, which are asked again. Background messages are ordered among themselves
and yield to the others.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ecotone.protocol.message import BodyId, NodeId, Priority
from ecotone.protocol.settings import LinkSettings
from ecotone.wire.channel import Body, Channel
from ecotone.wire.wire import Handler, PeerUp, Received, Wire, WireError, WireEvent

__all__ = ["Mail"]

_HEAD = struct.Struct("<IIQ")
_URGENT, _HELLO = b"URGE", b"HELO"
_FOREGROUND, _BACKGROUND = 1, 2
_ACK_CHUNKS, _ACK_DELAY_S = 32, 0.025  # an acknowledgement costs as much processor time as a small message


def _lazy(settings: LinkSettings) -> LinkSettings:
    """Nobody waits for an acknowledgement of mail, so many messages share one."""
    return replace(settings, ack_every_chunks=_ACK_CHUNKS, ack_delay_s=_ACK_DELAY_S)


@dataclass(slots=True)
class _Incoming:
    life: tuple[int, int] = (0, 0)
    next: int = 0
    early: dict[int, tuple[BodyId, memoryview]] = field(default_factory=dict)


class Mail:
    """The end of `node` over `wire`. Callbacks are those of a Channel: they put what they are told into an inbox and return.

    `on_message(peer, content)`, `on_urgent(peer, content)`: content is a view that nobody else writes to. `on_peer(peer,
    is_up)`; `on_restarted(peer)`: what it knew is gone. `incarnation` grows from one process of this node to the next.
    """

    def __init__(
        self,
        wire: Wire,
        node: NodeId,
        incarnation: int,
        *,
        on_message: Callable[[NodeId, memoryview], None],
        on_urgent: Callable[[NodeId, memoryview], None],
        on_peer: Callable[[NodeId, bool], None],
        on_restarted: Callable[[NodeId], None] | None = None,
        links: Mapping[NodeId, LinkSettings] | None = None,
        queue_bytes: int = 1 << 31,
    ):
        self._wire, self._incarnation = wire, incarnation
        self._on_message, self._on_restarted = on_message, on_restarted
        self._streams: dict[NodeId, int] = {}
        self._numbers: dict[tuple[NodeId, int], int] = {}
        self._bodies = 0
        self._incoming: dict[tuple[NodeId, int], _Incoming] = {}
        self._channel = Channel(
            _Split(wire, on_urgent, self._greet), node, on_body=self._arrived, on_peer=on_peer, on_restarted=self._restarted,
            links={peer: _lazy(link) for peer, link in (links or {}).items()}, settings=_lazy(LinkSettings()),
            queue_bytes=queue_bytes, incarnation=incarnation,
        )  # fmt: skip

    def start(self) -> None:
        """Open the wire, and tell peers that were there before that this end listens now; raises WireError."""
        self._channel.start()

    def send(self, peer: NodeId, content: Body, *, background: bool = False) -> None:
        """Queue a message; never waits. Raises WireError where far too much waits for the peer already, or when closed."""
        lane = _BACKGROUND if background else _FOREGROUND
        with self._channel.lock:
            number = self._numbers.get((peer, lane), 0)
            head = _HEAD.pack(self._incarnation, self._streams.get(peer, 1), number)
            self._bodies += 1
            body = BodyId(self._incarnation, 0, lane, self._bodies)
            self._channel.send_body(peer, body, head + content, timeout_s=0, background=background)
            self._numbers[peer, lane] = number + 1

    def urge(self, peer: NodeId, content: Body) -> None:
        """Send at once, or lose it."""
        with contextlib.suppress(WireError):
            self._wire.send(peer, bytearray(_URGENT + content), Priority.CONTROL)

    def peers(self) -> frozenset[NodeId]:
        return self._channel.peers()

    def wait_for(self, peer: NodeId, timeout_s: float) -> None:
        """Return when the link to `peer` answers; raises WireError after `timeout_s`."""
        self._channel.wait_for(peer, timeout_s)

    def queued_bytes(self, peer: NodeId) -> int:
        """What `peer` has not acknowledged."""
        return self._channel.outstanding_bytes(peer)

    def wait_for_life(self, peer: NodeId, incarnation: int, timeout_s: float) -> None:
        """Return when what is sent goes to that process of `peer`, or a later one: what was sent to a former one before its
        end was noticed is dropped then. Raises WireError."""
        self._channel.wait_for_life(peer, incarnation, timeout_s)

    def close(self) -> None:
        self._channel.close()

    def _greet(self, peer: NodeId) -> None:
        self._channel.greet(peer)

    def _restarted(self, peer: NodeId) -> None:
        self._streams[peer] = self._streams.get(peer, 1) + 1
        for lane in (_FOREGROUND, _BACKGROUND):
            self._numbers.pop((peer, lane), None)
        if self._on_restarted is not None:
            self._on_restarted(peer)

    def _arrived(self, peer: NodeId, body: BodyId, content: Body) -> None:
        view = memoryview(content)
        if len(view) < _HEAD.size or body.edge not in (_FOREGROUND, _BACKGROUND):
            self._channel.release(peer, body)
            return
        incarnation, stream, number = _HEAD.unpack_from(view)
        incoming = self._incoming.setdefault((peer, body.edge), _Incoming())
        if (incarnation, stream) > incoming.life:
            incoming.life, incoming.next = (incarnation, stream), 0
            for early, _ in incoming.early.values():
                self._channel.release(peer, early)
            incoming.early.clear()
        if (incarnation, stream) < incoming.life or number < incoming.next or number in incoming.early:
            self._channel.release(peer, body)
            return
        incoming.early[number] = body, view[_HEAD.size :]
        while (found := incoming.early.pop(incoming.next, None)) is not None:
            incoming.next += 1
            self._channel.release(peer, found[0])  # what is done with it is bounded by whoever sends: answers are awaited
            self._on_message(peer, found[1])


class _Split:
    """A wire of which urgent messages are taken out. Ends that begin to listen say hello, or what the other end asked before
    would be asked again only after half a lease."""

    def __init__(
        self, wire: Wire, on_urgent: Callable[[NodeId, memoryview], None], on_hello: Callable[[NodeId], None]
    ):  # fmt: skip
        self._wire, self._on_urgent, self._on_hello = wire, on_urgent, on_hello
        self.send, self.close = wire.send, wire.close

    def start(self, handler: Handler) -> None:
        def take(event: WireEvent) -> None:
            if isinstance(event, Received) and bytes(event.frame[:4]) in (_URGENT, _HELLO):
                if bytes(event.frame[:4]) == _HELLO:
                    self._on_hello(event.peer)
                else:
                    self._on_urgent(event.peer, memoryview(event.frame)[4:])
                return
            handler(event)
            if isinstance(event, PeerUp):
                with contextlib.suppress(WireError):
                    self._wire.send(event.peer, bytearray(_HELLO), Priority.CONTROL)

        self._wire.start(take)
