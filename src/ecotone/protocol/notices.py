"""What the machines inside one node say to one another: never leaves `Node.handle`. Not messages, not effects.

Worker and coordinator speak of letters and bodies; the links (see link.py) carry them. A letter or body to the node itself
does not touch a link.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecotone.protocol.effects import Effect
from ecotone.protocol.events import ErrorKind
from ecotone.protocol.message import BodyId, LetterBody, NodeId

__all__ = [
    "Begin", "BodyAcked", "BodyArrived", "BodyFailed", "BodySent", "DropRequest", "Finish", "Forget", "FreeBody", "GiveUp",
    "Item", "LetterArrived", "Notice", "PeerLost", "PeerRestarted", "PeerReturned", "Post", "Reached",
    "Transmit",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Post:
    """To the links: send this letter."""

    peer: NodeId
    content: LetterBody


@dataclass(frozen=True, slots=True)
class Transmit:
    """To the links: send this body, whose bytes the shell holds; `deadline_s` on the local clock."""

    peer: NodeId
    body: BodyId
    size_bytes: int
    deadline_s: float | None = None
    background: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """To the links: the body is not wanted any more, whatever of it has been sent."""

    peer: NodeId
    body: BodyId


@dataclass(frozen=True, slots=True)
class FreeBody:
    """To the links: the consumer freed the bytes of a body that had arrived from `peer`; its credit returns."""

    peer: NodeId
    body: BodyId


@dataclass(frozen=True, slots=True)
class Forget:
    """To the links: no body of this epoch of the session will be sent or wanted again; None: of any epoch."""

    session: int
    epoch: int | None


@dataclass(frozen=True, slots=True)
class BodySent:
    """From a sender: the last byte was given to the wire (not yet acknowledged)."""

    body: BodyId


@dataclass(frozen=True, slots=True)
class BodyAcked:
    """From a sender: the peer has all of the body; its bytes are released here."""

    body: BodyId


@dataclass(frozen=True, slots=True)
class BodyFailed:
    """From a sender: the body will not arrive."""

    body: BodyId
    kind: ErrorKind
    reason: str


@dataclass(frozen=True, slots=True)
class BodyArrived:
    """From a receiver: all bytes of the body are here; `budget_s` is left for its request."""

    peer: NodeId
    body: BodyId
    size_bytes: int
    budget_s: float | None


@dataclass(frozen=True, slots=True)
class LetterArrived:
    """From a receiver, or from this node itself: a letter."""

    peer: NodeId
    content: LetterBody


@dataclass(frozen=True, slots=True)
class PeerLost:
    """From a link: the wire lost the peer, or it is silent with bytes outstanding."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class PeerReturned:
    """From a link: the peer answers (again)."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class PeerRestarted:
    """From the node: another incarnation of the peer answers; it has no memory of what was."""

    peer: NodeId


@dataclass(frozen=True, slots=True)
class Begin:
    """Coordinator to worker: the tensors of `body` are here (the inputs, or those of a boundary of an earlier run).

    `tell`: edges whose tensors, once computed here, are told with Reached, ascending. `is_awaited`: another run waits for
    them, so that they are made even where this run's link is busy.
    """

    body: BodyId
    deadline_s: float | None
    tell: tuple[int, ...] = ()
    is_awaited: bool = False


@dataclass(frozen=True, slots=True)
class Reached:
    """Worker to coordinator: the tensors of this body, asked for by Begin, are here now."""

    body: BodyId


@dataclass(frozen=True, slots=True)
class DropRequest:
    """Coordinator to worker: release the outputs of a request that has already ended otherwise."""

    body: BodyId


@dataclass(frozen=True, slots=True)
class Finish:
    """Coordinator to node: say Closed once all letters are acknowledged."""


Notice = (
    Post | Transmit | GiveUp | FreeBody | Forget | BodySent | BodyAcked | BodyFailed | BodyArrived | LetterArrived
    | PeerLost | PeerReturned | PeerRestarted | Begin | Reached | DropRequest | Finish
)  # fmt: skip
Item = Effect | Notice
