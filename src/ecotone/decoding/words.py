"""What happens to the driver, what it asks its shell to do, and the settings it keeps to. Immutable values.

Times are seconds of the driver's own monotonic clock. Requests are numbered by the shell, from 1, never twice.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from ecotone.decoding.frame import Frame, Result, TokenLogprobs
from ecotone.decoding.messages import Message, Peer
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import Draft, DraftAsk

__all__ = [
    "Cancel", "Drafted", "Drop", "Effect", "Emit", "Ended", "Ending", "Event", "Heard", "NodeDown", "NodeUp",
    "PipelineFailed",
    "PipelineReady", "Reshard", "Resharded", "ResultCame", "Say", "Settings", "StageRef", "Stop", "Submit", "Tick", "Tokens",
    "WakeAt", "WantDrafts", "WantPipeline",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRef:
    """A loaded stage: layers [first, last) in shard `peer`, with room for `num_blocks` blocks of keys (0: none needed).

    `makes`: what decides its numbers, that is executor, precision of keys, context; part of the key of a prefix.
    `codec`: of its outputs. `block_bytes`: of one block over all its layers.
    """

    peer: Peer
    first: int
    last: int
    num_blocks: int = 0
    codec: str = "none"
    makes: str = ""
    block_bytes: int = 0
    boundary_bytes_per_token: int = 0

    @property
    def has_layers(self) -> bool:
        return self.last > self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Bounds and patience of the driver.

    `context`: tokens of the longest sequence. `queue_limit`: requests that wait at most; more are refused. `chunk_s`: a
    prompt's chunk holds others up so long at most. `quiet_s`: without a result for so long (or three times the longest
    wait of late) the stages are probed; one that says nothing for `silent_s` is lost, one that works on one thing for
    `stall_s` (or ten times what it should take) too, and one that a frame does not reach within `reach_s`. A node whose
    link went down is lost after `grace_s`. Without a pipeline for `strand_s` requests fail. `rates`: believed bytes per
    second by (from, to), for what takes long on thin links; `model`: names weights and adapter in the keys of prefixes.
    `vocabulary`: token ids are below it; 0: not known here.
    """

    context: int
    max_slots: int = 16
    queue_limit: int = 256
    block_tokens: int = 32
    reuse_prefixes: bool = True
    chunk_s: float = 0.1
    chunk_tokens: int = 128
    least_chunk_tokens: int = 32
    most_chunk_tokens: int = 2048
    most_flights: int = 64
    quiet_s: float = 0.5
    silent_s: float = 1.0
    probe_s: float = 0.25
    stall_s: float = 30.0
    reach_s: float = 3.0
    grace_s: float = 0.25
    route_s: float = 5.0
    strand_s: float = 60.0
    most_faults: int = 2
    model: str = ""
    vocabulary: int = 0
    rates: Mapping[tuple[str, str], float] = field(default_factory=dict)
    default_rate_bytes_per_s: float = 1e9
    kv_codec: str = "raw"


class Ending(enum.Enum):
    """How a request ends; all but the first two are errors."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    BUSY = "busy"
    TOO_LONG = "too-long"
    NODE_LOST = "node-lost"
    FAILED = "failed"


# ---- events --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A request: token ids in, at least one. Lower `priority` goes first. `deadline_s` on the driver's clock."""

    request: int
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    request: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Whoever reads the text found a stop string: the request ends well."""

    request: int


@dataclass(frozen=True, slots=True)
class ResultCame:
    result: Result


@dataclass(frozen=True, slots=True)
class Heard:
    node: str
    message: Message


@dataclass(frozen=True, slots=True)
class Drafted:
    drafts: tuple[Draft, ...]


@dataclass(frozen=True, slots=True)
class NodeUp:
    node: str


@dataclass(frozen=True, slots=True)
class NodeDown:
    node: str


@dataclass(frozen=True, slots=True)
class PipelineReady:
    """The answer to WantPipeline `attempt`: these stages are loaded. Stages that were not lost are among them unchanged."""

    attempt: int
    stages: tuple[StageRef, ...]


@dataclass(frozen=True, slots=True)
class PipelineFailed:
    """The other answer: nothing can be had now. The driver asks again when a node comes up, or after a while."""

    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Reshard:
    """Move to these loaded stages without dropping a request. Answered by Resharded."""

    stages: tuple[StageRef, ...]


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of the last WakeAt has come."""


Event = (
    Submit | Cancel | Stop | ResultCame | Heard | Drafted | NodeUp | NodeDown | PipelineReady | PipelineFailed | Reshard
    | Tick
)  # fmt: skip


# ---- effects -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Emit:
    """Send a frame to a stage."""

    to: Peer
    frame: Frame


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to a stage, or to a node."""

    to: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens of a request, each told once and in order; `position` of the first in the whole sequence."""

    request: int
    position: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over, once; `cached` of its prompt's tokens were not computed again."""

    request: int
    ending: Ending
    reason: str = ""
    cached: int = 0


@dataclass(frozen=True, slots=True)
class WantDrafts:
    """Answer with Drafted, now or later."""

    asks: tuple[DraftAsk, ...]


@dataclass(frozen=True, slots=True)
class Drop:
    """The drafter may forget this request."""

    request: int


@dataclass(frozen=True, slots=True)
class WantPipeline:
    """Those of `stages` that are on nodes `lost` are gone: load others, answer with PipelineReady or PipelineFailed.

    `stages` are the driver's own at this moment: those of a move too, once they have taken their places.
    """

    attempt: int
    lost: tuple[str, ...]
    reason: str = ""
    stages: tuple[StageRef, ...] = ()


@dataclass(frozen=True, slots=True)
class Resharded:
    """A move ended. `choice`: "migrate" or "recompute" and its expected time; `pause_s`: nothing was sent so long."""

    error: str
    choice: str = ""
    pause_s: float = 0.0
    moved_bytes: int = 0
    rounds: int = 0
    unused: tuple[Peer, ...] = ()


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send Tick at this time; the newest one counts."""

    at_s: float


Effect = Emit | Say | Tokens | Ended | WantDrafts | Drop | WantPipeline | Resharded | WakeAt
