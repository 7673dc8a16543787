"""The narrow interface to a network: start, send, close. Engines behind it: memory (tests), Zenoh, a shaped wrapper.

A wire carries whole frames between nodes named by NodeId. It may lose what is in flight when a peer or link dies: credit,
numbering, acknowledgement and resume lie above it, in ecotone.protocol. Sending never waits for the peer's consumer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ecotone.protocol.message import NodeId, Priority
from ecotone.units import EcotoneError

__all__ = ["Frame", "Handler", "NodeId", "PeerDown", "PeerUp", "Priority", "Received", "Wire", "WireError", "WireEvent"]

Frame = bytes | bytearray


class WireError(EcotoneError):
    """A network end could not be opened or used: an address in use, an endpoint that does not answer, a closed wire."""


@dataclass(frozen=True, slots=True)
class Received:
    """`frame` arrived from `peer`."""

    peer: NodeId
    frame: Frame


@dataclass(frozen=True, slots=True)
class PeerUp:
    """`peer` can be reached."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class PeerDown:
    """`peer` was lost (closed, crashed, frozen beyond the lease, or the link was cut)."""

    peer: NodeId


WireEvent = Received | PeerUp | PeerDown
Handler = Callable[[WireEvent], None]


class Wire(Protocol):
    """One node's end. `start` gives the handler, called from the engine's threads: it must return at once."""

    def start(self, handler: Handler) -> None: ...

    def send(self, peer: NodeId, frame: Frame, priority: Priority) -> None:
        """Queue `frame`; the caller does not write to it again. Raises WireError for an unknown peer or a closed wire.

        Success means "queued", never "arrived": a frame to a peer that was lost is lost too, in silence.
        """
        ...

    def close(self) -> None: ...
