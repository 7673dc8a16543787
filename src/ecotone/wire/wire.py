"""The narrow interface to a network: start, send, close. Engines behind it: memory (tests), Zenoh, a shaped wrapper.

A wire carries whole frames between nodes named by NodeId. It may lose what is in flight when a peer or link dies: credit,
numbering, acknowledgement and resume lie above it, in ecotone.protocol. Sending never waits for the peer's consumer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ecotone.protocol.message import NodeId, Priority

__all__ = ["Frame", "NodeId", "PeerDown", "PeerUp", "Priority", "Received", "Wire", "WireEvent"]

Frame = bytes | bytearray


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


class Wire(Protocol):
    """One node's end. `start` gives the handler, called from the engine's threads: it must return at once."""

    def start(self, handler: Callable[[WireEvent], None]) -> None: ...

    def send(self, peer: NodeId, frame: Frame, priority: Priority) -> None:
        """Queue `frame`; the caller does not write to it again. Raises WireError for an unknown peer or a closed wire."""
        ...

    def close(self) -> None: ...
