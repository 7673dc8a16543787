"""What a node's machine asks its shell to do, immutable; carried out in the order given. The shell decides nothing.

Per BodyId the shell may hold `tensors` and `bytes`; it keeps both until Release says otherwise. Compute, Encode and Decode
run beside the machine and answer with an event; the machine gives at most one Compute and one of Encode and Decode at a
time to a node, so a thread each is enough. All other effects are done at once.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ecotone.plan import Plan
from ecotone.protocol.events import ErrorKind, TimerId
from ecotone.protocol.message import Blob, BodyId, LinkMessage, NodeId, NodeReport, Priority, StagePart

__all__ = [
    "Accepted", "Alias", "Bind", "CancelTimer", "Closed", "Compute", "Decode", "Deliver", "DeployEnded", "Effect", "Encode",
    "Held", "LinkChanged", "Observed", "OpenBlob", "Output", "Preferred", "Prepare", "Record", "Release", "RequestError",
    "Rerouted", "Send", "SetTimer", "StoreChunk", "Unload",
]  # fmt: skip


class Held(enum.Enum):
    """What a shell holds of a body."""

    TENSORS = "tensors"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Give `message` to the wire. For a Chunk the payload is bytes [offset, offset + length) of its body."""

    peer: NodeId
    message: LinkMessage
    priority: Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreChunk:
    """Keep the payload of the Chunk just handed in at `offset` of the body's bytes (allocate `size_bytes` when new).

    Comes only in the answer to that Chunk's MessageReceived; without it the payload is dropped. For BLOB_EDGE the bytes go
    to the content store: blob number body.request, at its own offset + `offset`, freed at once.
    """

    body: BodyId
    offset: int
    length: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Free what is held of `body`; nothing held is no error. Work in progress on it is not disturbed, its result dropped."""

    body: BodyId
    held: Held


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Run stage body.edge on the tensors of `body`; answer Computed(body) or WorkFailed."""

    body: BodyId


@dataclass(frozen=True, slots=True, kw_only=True)
class Encode:
    """Encode the tensors of `body` with `codec`; answer Encoded(body, size_bytes) or WorkFailed."""

    body: BodyId
    codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Decode the bytes of `body` with `codec`; answer Decoded(body) or WorkFailed."""

    body: BodyId
    codec: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTimer:
    """Answer TimerFired(timer) at `at_s` of the shell's clock; replaces a timer of that name."""

    timer: TimerId
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelTimer:
    """Forget the timer, if set."""

    timer: TimerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """Load and warm the node's stages of `plan`; answer Prepared, BlobsMissing or PrepareFailed. Comes again after blobs."""

    session: int
    epoch: int
    plan: Plan
    parts: tuple[StagePart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """Forget the segments of this epoch."""

    session: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBlob:
    """At the asker: let the bytes of `body` be content `blob` from `offset` on, until Release(body, BYTES)."""

    body: BodyId
    blob: Blob
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """At the asker: the inputs of `request` now are the tensors of `body` (edge 0)."""

    request: int
    body: BodyId


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """The tensors held of `source` now are held of `target` as well (no copy); each is released on its own."""

    source: BodyId
    target: BodyId


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """At the asker: write `request` with its inputs where they survive this process; answer Recorded or RecordFailed."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """`request` is accepted: it will end with exactly one Deliver or RequestError."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """`request` has its result: the tensors of `body` (edge k or an exit's). They are the asker's; no Release follows."""

    request: int
    body: BodyId


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestError:
    """`request` ends (or is refused: BUSY, CLOSED) with an error. Its inputs, if still unbound, may be freed."""

    request: int
    kind: ErrorKind
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """At a sink that is not the asker: the tensors of `body` are final outputs; they are the sink's now."""

    body: BodyId


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployEnded:
    """At the asker: plan `epoch` is in force (`error` empty), or was given up and the former one stays."""

    epoch: int
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """At the asker: every accepted request has ended and every node was told; the process may exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkChanged:
    """For logs and the controller: the tensor link to `peer` is up or down, or the peer restarted."""

    peer: NodeId
    state: str  # "up", "down", "restarted"; at the asker also "silent" (to pings), "heard" (again)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerouted:
    """At the asker, for logs: `request` runs again, under `epoch`, and why; its former run goes on or is lost."""

    request: int
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferred:
    """At the asker: new requests run under `epoch` from now on (asked for by Prefer, or nodes went or came back)."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """At the asker, for the controller: what node `peer` measured lately."""

    peer: NodeId
    report: NodeReport


Effect = (
    Send | StoreChunk | Release | Compute | Encode | Decode | SetTimer | CancelTimer | Prepare | Unload | OpenBlob | Bind
    | Alias | Record | Accepted | Deliver | RequestError | Rerouted | Output | DeployEnded | Preferred | Closed
    | LinkChanged | Observed
)  # fmt: skip
