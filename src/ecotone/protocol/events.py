"""What happens to a node: the only inputs of its machine, immutable. A shell (simulator, runtime) makes them.

`Node.handle(event, now_s)` takes one; `now_s` is the shell's monotonic clock in seconds, and the only clock there is.
Bodies and tensors are named by BodyId; edge i is that of Plan.edges, stage i reads edge i and writes edge i + 1, or the
edge of its exit where the request leaves.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ecotone.plan import Plan
from ecotone.protocol.message import BlobRange, BodyId, LinkMessage, NodeId, StagePart

__all__ = [
    "BlobsMissing", "CancelRequest", "CloseRequested", "Computed", "Decoded", "DeployRequested", "Encoded", "ErrorKind",
    "Event", "Expect", "MessageReceived", "PeerDown", "PeerUp", "Prefer", "PrepareFailed", "Prepared", "ProbeLink",
    "RecordFailed", "Recorded", "Resident", "Submit", "TimerFired", "TimerId", "WorkFailed",
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
    FAILED = "failed"  # a stage, codec or message failed, under every plan that could be tried
    UNRECORDED = "unrecorded"  # refused: the journal could not take it (disk full)
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
    """Compute(body) is done in `seconds`: stage body.edge made the tensors of edge body.edge + 1.

    `exited`: it was sure enough at the stage's exit, and made those of Plan.exit_edge(body.edge) instead.
    """

    body: BodyId
    seconds: float = 0.0
    exited: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Encode(body) is done in `seconds`: the shell holds `size_bytes` encoded bytes of it."""

    body: BodyId
    size_bytes: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Decode(body) is done in `seconds`: the shell holds the tensors of that edge."""

    body: BodyId
    seconds: float = 0.0


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
class Resident:
    """One plan of a set, with the parts of all its stages and its predicted latency (0: unknown).

    `boundary_bytes`: of the tensors that leave the source, kept for a re-run where another plan shares what came before.
    `loads`: shares of nodes' processors that requests at their declared rate take under this plan.
    """

    plan: Plan
    parts: tuple[StagePart, ...] = ()
    is_active: bool = False  # a twin: every request runs under it as well, the first result counts
    expected_s: float = 0.0
    boundary_bytes: int = 0
    loads: tuple[tuple[NodeId, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployRequested:
    """The asker wants `plan` to be in force, and `standbys` resident beside it; all epochs ascend, above those before.

    `parts`: of every stage of the plan. In force means that new requests run under the first plan of (plan, *standbys)
    whose nodes all answer; see Prefer. The deployment ends well when `plan` is ready on all its nodes; a standby is told
    with DeployEnded of its own epoch: with an error when it fails (left out) or is late, without one when it is ready (or
    joins late). `pause`: memory does not hold old and new together, so first hold new requests back, drain and retire the
    old set, then deploy; where that fails no set is in force, accepted requests wait, and the asker deploys another (the
    old one again, under new epochs).
    """

    plan: Plan
    parts: tuple[StagePart, ...] = ()
    standbys: tuple[Resident, ...] = ()
    expected_s: float = 0.0
    boundary_bytes: int = 0
    loads: tuple[tuple[NodeId, float], ...] = ()
    pause: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefer:
    """From now on new requests run under this epoch of the resident set where its nodes answer: a switch without loading."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """As things are now a run under `epoch` should take `expected_s`: patience goes by that, no longer by runs of late."""

    epoch: int
    expected_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """The asker wants request `request` (its own number below 2**40, never reused) answered within `deadline_s` from now.

    The shell keeps the inputs (`size_bytes`, for the memory cap) under the number until the request ends; the machine says
    with Bind which BodyId they get. `is_recorded`: it stands in the journal already (an asker that came back).
    """

    request: int
    deadline_s: float | None = None
    size_bytes: int = 0
    is_recorded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Record(request) is done: the request survives the end of this process."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFailed:
    """Record(request) cannot be done, and why (disk full)."""

    request: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLink:
    """Time the idle link to `peer` with a Ping of `size_bytes` of padding (capped); the next report has the sample."""

    peer: NodeId
    size_bytes: int


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
    | BlobsMissing | ProbeLink | DeployRequested | Prefer | Expect | Submit | Recorded | RecordFailed | CancelRequest
    | CloseRequested
)  # fmt: skip
