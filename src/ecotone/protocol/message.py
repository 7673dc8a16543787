"""What nodes say to one another, as immutable values. How they become bytes is ecotone.codec.frame and ecotone.wire.

Two layers. *Link messages* (LinkOpen, LinkOpened, Chunk, Void, Letter, Ack, Ping, Pong) are frames: the wire may lose,
repeat or reorder them. *Letters* are what worker and coordinator say: they travel inside the Letter frame, reliably and in
order, never behind tensors. A *body* is one encoded frontier of one request, cut into Chunks; its bytes stay with the shell.
Times are budgets left at sending (clocks differ): seconds, None for no deadline.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple, NewType

__all__ = [
    "BLOB_EDGE", "PROBE_LIMIT_BYTES",
    "Ack", "Blob", "BlobRange", "BodyId", "Cancel", "Chunk", "CloseSession", "Deploy", "DeployFailed", "Grant",
    "Letter", "LetterBody", "LinkMessage", "LinkOpen", "LinkOpened", "LinkSample", "NodeId", "NodeReport", "Ping", "Pong",
    "Priority", "Ready", "RequestFailed", "RequestFinished", "Retire", "StagePart", "Void", "Want", "WorkSample",
    "attempt_of", "request_of", "run_of",
]  # fmt: skip

NodeId = NewType("NodeId", str)

BLOB_EDGE = -1
"""The edge number of weights and programs; their `request` is the number that the wanting node gave the blob."""

PROBE_LIMIT_BYTES = 1 << 18
"""Padding of a Ping at most."""


class Priority(enum.IntEnum):
    """Control overtakes tensors on every link."""

    CONTROL = 0
    DATA = 1
    BACKGROUND = 2  # weights


class BodyId(NamedTuple):
    """One frontier of one run of a request: edge `edge` (of Plan.edges) of plan `epoch` of `session` (random, 63 bits).

    `request` is the number of the *run*: see run_of. The first run of a request has the request's own number.
    """

    session: int
    epoch: int
    edge: int
    request: int


_REQUEST_BITS = 40


def run_of(request: int, attempt: int) -> int:
    """The number under which attempt 0, 1, ... of a request travels: no two runs share a BodyId, so none can be confused."""
    return attempt << _REQUEST_BITS | request


def request_of(run: int) -> int:
    """The request (below 2**40) that a run belongs to."""
    return run & ((1 << _REQUEST_BITS) - 1)


def attempt_of(run: int) -> int:
    """Which attempt of its request a run is: 0 for the first."""
    return run >> _REQUEST_BITS


# ---- link messages: one frame each ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOpen:
    """Sender to receiver, after every (re)connection, repeated until answered. `incarnation`: the sender's."""

    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """On channel (session, epoch, edge) the sender may have sent `limit_bytes` in all since the channel began: absolute."""

    session: int
    epoch: int
    edge: int
    limit_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOpened:
    """Receiver to sender. `next_seq`, `next_letter`: all below were received of `sender_incarnation`.

    `window_bytes` is the first limit of every channel that `grants` does not name.
    """

    sender_incarnation: int
    incarnation: int
    next_seq: int
    next_letter: int
    window_bytes: int
    grants: tuple[Grant, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Bytes [offset, offset + length) of `body`, which has `size_bytes`; the payload itself travels behind this header.

    `number` counts sendings, from 1: a chunk that is sent again keeps its `seq` and gets a new number.
    """

    sender_incarnation: int
    incarnation: int  # the receiver's, as the sender knows it
    seq: int
    body: BodyId
    size_bytes: int
    offset: int
    length: int
    budget_s: float | None = None  # time left for the request at sending
    background: bool = False  # weights: lowest priority
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Void:
    """`body` was given up (deadline, cancellation): `seqs` close as if received, their `lengths` return as credit."""

    sender_incarnation: int
    incarnation: int
    body: BodyId
    seqs: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """Receiver to sender: every chunk below `next_seq` and letter below `next_letter` is here; new absolute grants.

    `delay_s`: how long this acknowledgement was held back after the last chunk came, so that the sender can time the link.
    `newest`, `newest_background`: the greatest numbers of sendings that came, of tensors and of weights. `ahead`: half-open
    ranges of seqs from `next_seq` on that are here as well, ascending, the first few of them.
    """

    sender_incarnation: int
    incarnation: int
    next_seq: int
    next_letter: int
    grants: tuple[Grant, ...] = ()
    delay_s: float = 0.0
    newest: int = 0
    newest_background: int = 0
    ahead: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Asks for a Pong with the same nonce: health, and round trips. Padded with `size_bytes`, it measures an idle link."""

    nonce: int
    size_bytes: int = 0  # at most PROBE_LIMIT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """The answer to Ping, with how much work waits at the node."""

    nonce: int
    num_queued: int = 0
    num_sessions: int = 0


# ---- letters: reliable, in order, small ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """Content by hash: hex sha256 and size. `name`: the tensor's name in the segment, "" for the program."""

    sha256: str
    size_bytes: int
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePart:
    """What a node needs to run stage `stage` of the plan: its program and its weights, by content hash."""

    stage: int
    program: Blob
    weights: tuple[Blob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deploy:
    """Asker to node: take part in this plan. `plan_json` is Plan.to_json(); `parts` are the stages of that node only.

    `weight`: the session's share of the node beside other sessions; `load`: the share of the node's processor that requests
    at their declared rate will take (0: not declared).
    """

    session: int
    epoch: int
    plan_json: str
    parts: tuple[StagePart, ...] = ()
    weight: float = 1.0
    load: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRange:
    """Send me this blob from `offset` on, as body (session, epoch, BLOB_EDGE, number)."""

    number: int
    sha256: str
    size_bytes: int
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """Node to asker: content that its store lacks."""

    session: int
    epoch: int
    blobs: tuple[BlobRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Node to asker: the segments of this epoch are loaded and warm."""

    session: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployFailed:
    """Node to asker: cannot take part, and why."""

    session: int
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retire:
    """Asker to node: nothing of this epoch will come any more; unload it."""

    session: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseSession:
    """Asker to node: the session is over; forget all of it."""

    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Asker to node: drop everything of this request."""

    session: int
    epoch: int
    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFinished:
    """Sink to asker: the outputs are at the sink, as the tensors of `edge`: the last of the plan, or an exit's."""

    session: int
    epoch: int
    request: int
    edge: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """Any node to asker: this request cannot end well. `kind` is an ErrorKind value of ecotone.protocol.events."""

    session: int
    epoch: int
    request: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkSample:
    """Mean seconds of `count` runs of `work` ("compute", "encode", "decode") on stage or transfer `index` of `epoch`."""

    epoch: int
    work: str
    index: int
    seconds: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSample:
    """What left for `peer`: `size_bytes` in `seconds` while something was outstanding, acknowledgement included.

    `rtt_s`: the least recent round trip of a small frame, 0 where none was timed. rate = size / (seconds - rtt).
    """

    peer: NodeId
    size_bytes: int
    seconds: float
    rtt_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """Worker to asker, now and then while something is new: what the controller sees of a node."""

    session: int
    work: tuple[WorkSample, ...] = ()
    links: tuple[LinkSample, ...] = ()
    num_queued: int = 0


LetterBody = (
    Deploy | Want | Ready | DeployFailed | Retire | CloseSession | Cancel | RequestFinished | RequestFailed | NodeReport
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """Frame that carries one letter; `number` counts the letters of this sender's incarnation to this receiver."""

    sender_incarnation: int
    incarnation: int
    number: int
    content: LetterBody


LinkMessage = LinkOpen | LinkOpened | Chunk | Void | Letter | Ack | Ping | Pong
