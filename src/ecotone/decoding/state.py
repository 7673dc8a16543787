"""What the parts of the driver share: requests, frames in flight, the pipeline, the ledger of keys. Plain data.

`engine.py` takes events, `dispatch.py` sends frames, `watch.py` finds what is stuck, `transition.py` changes the pipeline.
"""

from __future__ import annotations

import enum
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ecotone.decoding.frame import Frame, FrameRow, Kind, Open, Order
from ecotone.decoding.ledger import Ledger
from ecotone.decoding.messages import Peer
from ecotone.decoding.pace import Pace
from ecotone.decoding.requests import Flight, Request
from ecotone.decoding.words import Drop, Effect, Emit, Ended, Ending, Settings, StageRef

__all__ = ["Mode", "State", "key_seed"]


class Mode(enum.Enum):
    """STRANDED: no pipeline. ROUTING: stages are being told their places. DRAINING: nothing new is sent before a move."""

    STRANDED = "stranded"
    ROUTING = "routing"
    RUNNING = "running"
    DRAINING = "draining"


@dataclass(slots=True)
class State:
    settings: Settings
    ledger: Ledger
    pace: Pace
    mode: Mode = Mode.STRANDED
    epoch: int = 0
    pipeline: tuple[StageRef, ...] = ()
    requests: dict[int, Request] = field(default_factory=dict)
    by_slot: dict[int, Request] = field(default_factory=dict)
    waiting: list[Request] = field(default_factory=list)
    flights: dict[int, Flight] = field(default_factory=dict)
    out: list[Effect] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    now_s: float = 0.0
    progress_s: float = 0.0  # when a frame last came back, or the first of those in flight was sent
    replays: set[int] = field(default_factory=set)  # slots whose keys are being rebuilt
    next_slot: int = 1
    next_number: int = 1
    next_order: int = 1

    def launch(
        self,
        kind: str,
        rows: Sequence[FrameRow],
        parts: Sequence[tuple[int, int, int, int]] = (),
        orders: Sequence[Order] = (),
    ) -> int:
        """Send a frame into the pipeline, with the ledger's orders in front; returns its number."""
        number = self.next_number
        self.next_number += 1
        orders = (*self.ledger.orders, *orders)
        self.ledger.orders.clear()
        frame = Frame(epoch=self.epoch, number=number, rows=tuple(rows), orders=orders)
        opened = tuple(self.by_slot[o.slot].number for o in orders if isinstance(o, Open) and o.slot in self.by_slot)
        if not self.flights:
            self.progress_s = self.now_s
        most_bytes = max((stage.boundary_bytes_per_token for stage in self.pipeline), default=0)
        self.flights[number] = Flight(
            number, kind, self.now_s, frame.num_tokens, tuple(parts), opened, frame.num_tokens * max(most_bytes, 4),
            len(self.flights) + 1,
        )  # fmt: skip
        self.out.append(Emit(self.pipeline[0].peer, frame))
        self.counts[f"frames_{kind}"] += 1
        return number

    def replay_ids(self, rows: Sequence[FrameRow], until: int) -> None:
        """Send tokens to be computed again by the stages up to `until`; not awaited."""
        frame = Frame(kind=Kind.REPLAY, epoch=self.epoch, number=self.next_number, rows=tuple(rows), until=until)
        self.out.append(Emit(self.pipeline[0].peer, frame))

    def nodes(self) -> tuple[str, ...]:
        """The nodes of the pipeline, the first stage's first."""
        return tuple(dict.fromkeys(stage.peer.node for stage in self.pipeline))

    def stage_peers(self) -> tuple[Peer, ...]:
        return tuple(stage.peer for stage in self.pipeline)

    def end(self, request: Request, ending: Ending, reason: str = "") -> None:
        """The request is over; what of its keys is confirmed stays to be found."""
        del self.requests[request.number]
        if request in self.waiting:
            self.waiting.remove(request)
        if request.slot:
            del self.by_slot[request.slot]
            self.ledger.finish(request.slot)
        self.out.append(Drop(request.number))
        self.out.append(Ended(request.number, ending, reason, max(request.cached, 0)))
        self.counts[f"ended_{ending.value}"] += 1

    def put_back(self, request: Request) -> None:
        """Take a request out of the pipeline; it waits, in front, to be computed again from its token ids."""
        if request.slot:
            self.by_slot.pop(request.slot, None)
            if request.slot in self.ledger.sequences:
                pieces = self.ledger.sequences[request.slot].pieces
                request.compute_again([p for p in pieces if sum(p) < len(request.tokens)])
                self.ledger.drop(request.slot)
        request.forget_flight()
        request.slot = request.sent = 0
        if request not in self.waiting:
            self.waiting.append(request)
            self.waiting.sort(key=lambda r: (r.priority, r.order))


def key_seed(stages: Sequence[StageRef], settings: Settings) -> bytes:
    """What tells keys apart that were made differently: weights, executors layer by layer, context, lossy links.

    Two pipelines that cut an exact model elsewhere have the same one: their keys are interchangeable.
    """
    makes: list[tuple[str, int]] = []
    for stage in stages:
        if stage.has_layers:
            former = makes.pop() if makes and makes[-1][0] == stage.makes else (stage.makes, 0)
            makes.append((stage.makes, former[1] + stage.last - stage.first))
    lossy = [(stage.last, stage.codec) for stage in stages if stage.codec not in ("none", "fp32")]
    text = repr((settings.model, settings.context, makes, lossy))
    return hashlib.blake2b(text.encode(), digest_size=32).digest()
