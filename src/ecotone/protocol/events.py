"""What happens to a node: the only inputs of its machine, immutable. A shell (simulator, runtime) makes them.

`Node.handle(event, now_s)` takes one; `now_s` is the shell's monotonic clock in seconds, and the only clock there is.
Bodies and tensors are named by BodyId; edge i is transfer i of the plan, stage i reads edge i and writes edge i + 1.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ecotone.plan import Plan
from ecotone.protocol.message import BlobRange, BodyId, LinkMessage, NodeId, StagePart

__all__ = [
    "BlobsMissing", "CancelRequest", "CloseRequested", "Computed", "Decoded", "DeployRequested", "Encoded", "ErrorKind",
    "Event", "MessageReceived", "PeerDown", "PeerUp", "PrepareFailed", "Prepared", "Submit", "TimerFired", "TimerId",
    "WorkFailed",
]  # fmt: skip

TimerId = tuple[str, ...] | tuple[str | int, ...]
"""Names a timer; opaque to shells."""


class ErrorKind(enum.StrEnum):
    """Why a request did not end with its result."""

    BUSY = "busy"  # refused: the queue is full
    CLOSED = "closed"  # refused: the session drains or has no plan
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    NODE_LOST = "node-lost"
    FAILED = "failed"  # a stage, codec or message failed
    TOO_LARGE = "too-large"


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageReceived:
    """A frame from `peer`, decoded. For a Chunk the shell keeps the payload at hand until `handle` returns."""

    peer: NodeId
    message: LinkMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerUp:
    """The wire reaches `peer` (again)."""

    peer: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDown:
    """The wire lost `peer`."""

    peer: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class TimerFired:
    """A timer that SetTimer asked for is due."""

    timer: TimerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """Compute(body) is done: stage body.edge made the tensors of edge body.edge + 1."""

    body: BodyId


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Encode(body) is done: the shell holds `size_bytes` encoded bytes of it."""

    body: BodyId
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Decode(body) is done: the shell holds the tensors of that edge."""

    body: BodyId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkFailed:
    """Compute, Encode or Decode of `body` raised; `work` is "compute", "encode" or "decode"."""

    body: BodyId
    work: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Prepare is done: segments loaded, executors warm."""

    session: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareFailed:
    """Prepare cannot succeed."""

    session: int
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobsMissing:
    """Prepare lacks content; `blobs` are numbered 0.. by the shell, each with the offset it already has."""

    session: int
    epoch: int
    blobs: tuple[BlobRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployRequested:
    """The asker wants `plan` to be in force; its epoch must be above all before. `parts`: of every stage of the plan."""

    plan: Plan
    parts: tuple[StagePart, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """The asker wants request `request` (its own number, never reused) answered within `deadline_s` from now.

    The shell keeps the inputs under the number; the machine says with Bind which BodyId they get.
    """

    request: int
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequest:
    """The asker no longer wants `request`."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseRequested:
    """Accept nothing more. With `drain`, finish what was accepted, then say Closed; else end it with errors at once."""

    drain: bool = True


Event = (
    MessageReceived | PeerUp | PeerDown | TimerFired | Computed | Encoded | Decoded | WorkFailed | Prepared | PrepareFailed
    | BlobsMissing | DeployRequested | Submit | CancelRequest | CloseRequested
)  # fmt: skip
