"""A node's one place on the wire: it sorts what arrives, so that shells and questions share one connection.

Frames with the link id QUESTION are questions and answers outside the protocol (profiling, link probes, traces: see
questions.py); everything else belongs to the machine whose shell is attached. Peers that are up are remembered and told to a
shell that is attached later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from ecotone.codec.frame import MAGIC, VERSION, Kind
from ecotone.protocol.message import NodeId, Priority
from ecotone.runtime.errors import NodeUnreachable
from ecotone.units import EcotoneError
from ecotone.wire.wire import Frame, Handler, PeerDown, PeerUp, Received, Wire, WireError, WireEvent

__all__ = ["GUEST", "QUESTION", "Port"]

QUESTION = b"ecotone.question"
TAG_BYTES = 4
GUEST = "guest."
"""Peers whose names begin so only ask questions: no machine is told of them."""
_LINK_ID = slice(16, 32)  # of the frame header: see ecotone.codec.frame
_VERSION_AT, _KIND_AT = len(MAGIC), len(MAGIC) + 1


class Listener(Protocol):
    def on_wire(self, event: WireEvent) -> None: ...


class Port:
    """Owns `wire` for the node `name`. `attach` a shell to receive protocol frames; `on_question` gets QUESTION frames."""

    def __init__(self, name: str, wire: Wire):
        self.name, self.wire = NodeId(name), wire
        self.on_question: Callable[[NodeId, Frame], None] | None = None
        self._listener: Listener | None = None
        self._peers: set[NodeId] = set()
        self._foreign: dict[NodeId, int] = {}
        self._unheard: dict[NodeId, Received] = {}  # the last LinkOpen that came while no shell was attached
        self._branches: dict[bytes, _Branch] = {}
        self._changed = threading.Condition()

    def start(self) -> None:
        """Open the wire; raises WireError where that fails."""
        self.wire.start(self._handle)

    def attach(self, listener: Listener) -> None:
        """Give `listener` what arrives from now on, first that the known peers are up; one at a time (EcotoneError)."""
        with self._changed:
            if self._listener is not None:
                raise EcotoneError(f"node {self.name}: a session is open already; close it first")
            self._listener = listener
            peers, unheard = sorted(self._peers), dict(self._unheard)
            self._unheard.clear()
        for peer in peers:
            if not peer.startswith(GUEST):
                listener.on_wire(PeerUp(peer))
                if peer in unheard:  # or the peer would say it again only after half a lease
                    listener.on_wire(unheard[peer])

    def detach(self, listener: Listener) -> None:
        with self._changed:
            if self._listener is listener:
                self._listener = None

    def send(self, peer: NodeId, frame: Frame, priority: Priority) -> bool:
        """Queue `frame`; False where the peer is unknown or gone (the link machine resends what matters)."""
        try:
            self.wire.send(peer, frame, priority)
        except WireError:
            return False
        return True

    def peers(self) -> frozenset[NodeId]:
        """Peers that can be reached now."""
        with self._changed:
            return frozenset(self._peers)

    def foreign(self, peers: Iterable[NodeId]) -> str:
        """Which of `peers` speak another version of the wire, for a person; "" where none is known to."""
        found = [f"node {p} speaks version {self._foreign[p]} of the wire" for p in sorted(peers) if p in self._foreign]
        return f"{', '.join(found)}, this program {VERSION}; install the same version of ecotone on both" if found else ""

    def wait_for(self, peers: frozenset[NodeId], deadline_s: float) -> None:
        """Return when all `peers` can be reached; raises NodeUnreachable naming the missing ones after `deadline_s`."""
        end = time.monotonic() + deadline_s
        with self._changed:
            while not peers <= self._peers:
                left = end - time.monotonic()
                if left <= 0:
                    missing = ", ".join(sorted(peers - self._peers))
                    raise NodeUnreachable(
                        f"node {missing} did not answer within {deadline_s:g} s; is it up (ecotone up), its address right?"
                    )
                self._changed.wait(left)

    def branch(self, tag: bytes) -> Wire:
        """A wire of its own for frames that begin with `tag` (4 bytes), over this one; guests do not see it.

        Raises EcotoneError where the tag is taken. Closing it leaves this one open.
        """
        if len(tag) != TAG_BYTES or tag == MAGIC or tag in self._branches:
            raise EcotoneError(f"node {self.name}: frames cannot be told apart by {tag!r}")
        made = self._branches[tag] = _Branch(self, tag)
        return made

    def drop_branch(self, tag: bytes) -> None:
        """Forget a branch; nothing where there is none."""
        self._branches.pop(tag, None)

    def close(self) -> None:
        self.wire.close()

    def _handle(self, event: WireEvent) -> None:
        if isinstance(event, Received):
            frame = event.frame
            branch = self._branches.get(bytes(frame[:TAG_BYTES]))
            if branch is not None:
                branch.receive(event)
                return
            if len(frame) > _VERSION_AT and frame[_VERSION_AT] != VERSION and frame[:_VERSION_AT] == MAGIC:
                self._foreign[event.peer] = frame[_VERSION_AT]
                return
            if frame[_LINK_ID] == QUESTION:
                if self.on_question is not None:
                    self.on_question(event.peer, frame)
                return
        else:
            with self._changed:
                if isinstance(event, PeerUp):
                    self._peers.add(event.peer)
                    self._foreign.pop(event.peer, None)
                elif isinstance(event, PeerDown):
                    self._peers.discard(event.peer)
                    self._unheard.pop(event.peer, None)
                self._changed.notify_all()
        if event.peer.startswith(GUEST):
            return
        if not isinstance(event, Received):
            for branch in tuple(self._branches.values()):
                branch.receive(event)
        listener = self._listener
        if listener is not None:
            listener.on_wire(event)
        elif isinstance(event, Received) and len(event.frame) > _KIND_AT and event.frame[_KIND_AT] == Kind.OPEN:
            self._unheard[event.peer] = event


class _Branch:
    """A Wire over a port; see Port.branch."""

    def __init__(self, port: Port, tag: bytes):
        self._port, self._tag = port, tag
        self._handler: Handler | None = None

    def start(self, handler: Handler) -> None:
        """Tell `handler` of the peers that are known and of all that comes."""
        peers = self._port.peers()
        self._handler = handler
        for peer in sorted(peers):
            if not peer.startswith(GUEST):
                handler(PeerUp(peer))

    def send(self, peer: NodeId, frame: Frame, priority: Priority) -> None:
        self._port.wire.send(peer, self._tag + frame, priority)

    def receive(self, event: WireEvent) -> None:
        handler = self._handler
        if handler is None or event.peer.startswith(GUEST):
            return
        if isinstance(event, Received):
            event = Received(event.peer, memoryview(event.frame)[TAG_BYTES:])  # type: ignore[arg-type]
        handler(event)

    def close(self) -> None:
        self._handler = None
        self._port.drop_branch(self._tag)
