"""One stage of a chain: takes frames in order, drops what is stale, has its shard compute, sends on. A pure machine.

Theory of operation. Frames of a stage come from one neighbour over one ordered link. Each gives one piece of work, done in
that order; the answer goes to the next stage, from the last one straight to the driver. A row whose fence is below the
greatest seen for its slot is left out when its turn comes (a Fence may have overtaken it), and the frame goes on without
it: every step that enters the chain leaves it as one result. Replays are never stale: they are of settled tokens, on which
cached prefixes may rest. The last stage also leaves out what follows a draft that
was refused, without waiting for the driver to say so.

A route begins an epoch: frames of former ones are dropped, those of later ones parked, sequences are cut to what the
driver knows to be computed everywhere. What a stage with layers sent on is kept (boundary.py); the order Replay has it
sent again.
Keys are exported to other shards between steps, and imported by a shard that is in no route yet. An import counts
per layer, since the layers of one shard may come from several.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ecotone.decoding.boundary import Boundary
from ecotone.decoding.frame import Cut, Fork, Frame, FrameRow, Kind, Open, Replay, Result, RowResult, StageTime
from ecotone.decoding.messages import (
    Export,
    Fault,
    Fence,
    Imported,
    KvPiece,
    Message,
    Peer,
    Route,
    Routed,
    ShardState,
)
from ecotone.decoding.work import Done, ExportWork, ImportWork, StepWork, TrimWork, Work

__all__ = [
    "Came",
    "Finished",
    "SendFrame",
    "SendKv",
    "SendResult",
    "Stage",
    "StageEffect",
    "StageEvent",
    "StartWork",
    "Tell",
]

MAX_PARKED, MAX_REPLAY_TOKENS = 256, 512


@dataclass(frozen=True, slots=True)
class Came:
    """A frame, a message or a piece of keys for this shard arrived."""

    item: Frame | Message | KvPiece


@dataclass(frozen=True, slots=True)
class Finished:
    """The work asked for has ended."""

    done: Done


StageEvent = Came | Finished


@dataclass(frozen=True, slots=True)
class StartWork:
    work: Work


@dataclass(frozen=True, slots=True)
class SendFrame:
    to: Peer
    frame: Frame


@dataclass(frozen=True, slots=True)
class SendResult:
    """To the driver."""

    result: Result


@dataclass(frozen=True, slots=True)
class SendKv:
    to: Peer
    piece: KvPiece


@dataclass(frozen=True, slots=True)
class Tell:
    """To the driver."""

    message: Message


StageEffect = StartWork | SendFrame | SendResult | SendKv | Tell


@dataclass(frozen=True, slots=True)
class _Queued:
    item: Frame | Route | Export | KvPiece
    came_s: float


class Stage:
    """The machine of one shard, which holds layers [first, last). `handle` one event after the other, from any thread."""

    def __init__(self, shard: int, first: int, last: int, *, boundary_bytes: int = 1 << 28):
        self.shard, self._layers = shard, (first, last)
        self.boundary = Boundary(boundary_bytes)
        self.lengths: dict[int, int] = {}
        self._route: Route | None = None
        self._coming = 0  # epoch of a route that waits for work to end
        self._queue: deque[_Queued] = deque()
        self._parked: list[Frame] = []
        self._fences: dict[int, int] = {}
        self._newest = 0  # the greatest slot of which rows were computed
        self._expected: dict[int, tuple[int, int, int]] = {}  # slot -> fence, position, token: what the tail chose last
        self._imports: dict[int, dict[tuple[int, int], int]] = {}  # slot -> layers -> length
        self._imported_bytes = 0
        self._working: tuple[Work, Frame | None, float, float] | None = None  # work, its frame, came, began
        self._exports: deque[ExportWork] = deque()
        self._turn = False
        self._received = self._finished = self._works = 0

    @property
    def epoch(self) -> int:
        return self._route.epoch if self._route else 0

    @property
    def has_layers(self) -> bool:
        return self._layers[0] < self._layers[1]

    @property
    def is_idle(self) -> bool:
        return self._working is None and not self._queue and not self._exports

    def slots_known(self) -> set[int]:
        """Slots of which anything is remembered, be it only a fence."""
        return {*self.lengths, *self._fences, *self._expected, *self._imports}

    def state(self, now_s: float) -> ShardState:
        """For the answer to a probe."""
        busy_s = now_s - self._working[3] if self._working else 0.0
        return ShardState(
            shard=self.shard, epoch=self.epoch, received=self._received, finished=self._finished, works=self._works,
            busy_s=max(busy_s, 0.0),
        )  # fmt: skip

    def handle(self, event: StageEvent, now_s: float) -> list[StageEffect]:
        """What `event` makes necessary, in order."""
        if isinstance(event, Finished):
            return [*self._ended(event.done, now_s), *self._go_on(now_s)]
        item = event.item
        match item:
            case Fence():
                for slot, fence in item.raised:
                    if slot in self.lengths or slot > self._newest:  # else it was freed: the message came late
                        self._fences[slot] = max(fence, self._fences.get(slot, 0))
            case Route() if item.epoch > max(self.epoch, self._coming):
                self._coming = item.epoch
                self._queue = deque(q for q in self._queue if not isinstance(q.item, Frame | Route))
                self._queue.appendleft(_Queued(item, now_s))
            case Frame():
                self._take_frame(item, now_s)
            case Export() | KvPiece():
                self._queue.append(_Queued(item, now_s))
        return self._go_on(now_s)

    # ---- in --------------------------------------------------------------------------------------------------------------

    def _take_frame(self, frame: Frame, now_s: float) -> None:
        current = self._coming or self.epoch
        if frame.epoch == current and not self._coming:
            if frame.kind is Kind.STEP:
                self._received = max(self._received, frame.number)
            self._queue.append(_Queued(frame, now_s))
        elif frame.epoch >= current and len(self._parked) < MAX_PARKED:
            self._parked.append(frame)

    def _go_on(self, now_s: float) -> list[StageEffect]:
        """Begin work until some is outstanding or nothing waits."""
        effects: list[StageEffect] = []
        while self._working is None:
            if self._queue and not (self._exports and self._turn):
                self._turn = True  # the next piece of an export, where one waits
                queued = self._queue.popleft()
                effects += self._begin(queued.item, queued.came_s, now_s)
            elif self._exports:
                self._turn, work = False, self._exports.popleft()
                if work.piece.stop > self.lengths.get(work.piece.slot, 0):  # cut since it was asked for
                    effects += self._exported(work, Done(work=work, error="it is not there any more"))
                else:
                    effects.append(self._start(work, None, now_s, now_s))
            else:
                break
        return effects

    def _begin(self, item: Frame | Route | Export | KvPiece, came_s: float, now_s: float) -> list[StageEffect]:
        match item:
            case Frame():
                return self._begin_frame(item, came_s, now_s)
            case Route():
                former, self._route = self._route, item
                if former is not None and _bytes_of(former.codec) != _bytes_of(item.codec):
                    self.boundary.keep_only({})  # what is kept is in the former codec
                return [self._start(TrimWork(keep=self._kept(item)), None, came_s, now_s)]
            case Export():
                return self._begin_export(item)
            case KvPiece() if self._route is not None:
                return []  # of a move that went on without it, or was given up
            case KvPiece():
                if item.piece is None:
                    return self._imported(item)
                return [self._start(ImportWork(piece=item), None, came_s, now_s)]

    def _start(self, work: Work, frame: Frame | None, came_s: float, now_s: float) -> StartWork:
        self._working = (work, frame, came_s, now_s)
        return StartWork(work)

    # ---- routes ----------------------------------------------------------------------------------------------------------

    def _kept(self, route: Route) -> tuple[tuple[int, int], ...]:
        """What to keep, no longer than what is here on every layer."""
        for slot in self._imports:
            self.lengths[slot] = self._import_length(slot)
        self._imports = {}
        wanted = dict(route.keep)
        return tuple((slot, min(have, wanted[slot])) for slot, have in self.lengths.items() if wanted.get(slot))

    def _routed(self, keep: tuple[tuple[int, int], ...], now_s: float) -> list[StageEffect]:
        route = self._route
        assert route is not None
        self.lengths = {slot: length for slot, length in keep if length}
        self.boundary.keep_only(dict(route.keep))
        self._fences, self._expected = {}, {}
        self._received = self._finished = 0
        if self._coming > route.epoch:
            return []
        self._coming = 0
        held = tuple((slot, length, self.boundary.length(slot)) for slot, length in self.lengths.items())
        parked, self._parked = self._parked, []
        for frame in parked:
            if frame.epoch >= self.epoch:
                self._take_frame(frame, now_s)
        return [Tell(Routed(shard=self.shard, epoch=route.epoch, held=held))]

    # ---- steps -----------------------------------------------------------------------------------------------------------

    def _begin_frame(self, frame: Frame, came_s: float, now_s: float) -> list[StageEffect]:
        route = self._route
        if route is None or frame.epoch != route.epoch:
            return []
        effects: list[StageEffect] = []
        if frame.kind is Kind.STEP:
            effects += self._replays(frame, route)
        is_last = route.index == route.count - 1
        rows, payload = self._fresh(frame, is_last) if frame.kind is Kind.STEP else (frame.rows, frame.payload)
        orders = tuple(o for o in frame.orders if isinstance(o, Fork | Cut) or (is_last and isinstance(o, Open)))
        frame = replace(frame, rows=rows)
        if not rows and not orders:
            return effects + self._pass_on(frame, b"", (), now_s - came_s, 0.0)
        work = StepWork(
            epoch=frame.epoch, number=frame.number, orders=orders, rows=rows, codec=frame.codec, payload=payload,
            answer_codec=route.codec, is_first=route.index == 0, is_last=is_last,
        )  # fmt: skip
        return [*effects, self._start(work, frame, came_s, now_s)]

    def _fresh(self, frame: Frame, is_last: bool) -> tuple[tuple[FrameRow, ...], bytes | bytearray | memoryview]:
        """The rows that are not stale, and their part of the payload."""
        keep = [self._is_fresh(row, is_last) for row in frame.rows]
        if all(keep):
            return frame.rows, frame.payload
        rows = tuple(row for row, kept in zip(frame.rows, keep, strict=True) if kept)
        view, at, parts = memoryview(frame.payload), 0, []
        each = len(view) // max(frame.num_tokens, 1)
        for row, kept in zip(frame.rows, keep, strict=True):
            size = each * len(row.tokens)
            parts += [view[at : at + size]] if kept else []
            at += size
        return rows, b"".join(parts)

    def _is_fresh(self, row: FrameRow, is_last: bool) -> bool:
        newest = self._fences.get(row.slot, 0)
        if row.fence < newest:
            return False
        if is_last and row.slot in self._expected:
            fence, position, token = self._expected[row.slot]
            if fence == row.fence and position == row.start and token != row.tokens[0]:
                self._fences[row.slot] = row.fence + 1
                return False
        self._fences[row.slot] = row.fence
        return True

    def _replays(self, frame: Frame, route: Route) -> list[StageEffect]:
        """Send kept outputs again, for the sequences that the frame's orders name, side by side."""
        wanted = [o for o in frame.orders if isinstance(o, Replay) and o.stage == route.index]
        pending = [(o, deque(self.boundary.pieces(o.slot, o.start, o.stop))) for o in wanted]
        effects: list[StageEffect] = []
        while pending := [(order, pieces) for order, pieces in pending if pieces]:
            until, payload = pending[0][0].until, bytearray()
            rows: list[FrameRow] = []
            for order, pieces in pending:
                if order.until == until and sum(len(row.tokens) for row in rows) < MAX_REPLAY_TOKENS:
                    piece = pieces.popleft()
                    rows.append(FrameRow(order.slot, piece.start, piece.tokens))
                    payload += piece.payload
            made = Frame(
                kind=Kind.REPLAY, epoch=frame.epoch, number=frame.number, rows=tuple(rows), codec=route.codec,
                payload=payload, until=until,
            )  # fmt: skip
            effects.append(SendFrame(route.after, made))
        return effects

    def _ended(self, done: Done, now_s: float) -> list[StageEffect]:
        assert self._working is not None
        work, frame, came_s, began_s = self._working
        self._working = None
        self._works += 1
        match work:
            case TrimWork():
                return self._routed(work.keep, now_s)
            case ExportWork():
                return self._exported(work, done)
            case ImportWork():
                return self._imported(work.piece, done.error)
            case StepWork():
                assert frame is not None
                return self._stepped(work, frame, done, began_s - came_s)

    def _stepped(self, work: StepWork, frame: Frame, done: Done, wait_s: float) -> list[StageEffect]:
        route = self._route
        assert route is not None
        if done.error:
            return [Tell(Fault(shard=self.shard, epoch=frame.epoch, number=frame.number, reason=done.error))]
        self._carry_out(work.orders)
        for row in work.rows:
            self.lengths[row.slot] = row.stop
            self._newest = max(self._newest, row.slot)
        if self._coming:
            return []  # of an epoch that is over: the driver forgot it
        self._keep(work, done)
        if work.is_last:
            self._judge(work.rows, done.results)
        return self._pass_on(frame, done.payload, done.results, wait_s, done.seconds)

    def _carry_out(self, orders: Iterable[Open | Fork | Cut]) -> None:
        for order in orders:
            match order:
                case Fork(source, target, length):
                    if target not in self.lengths:
                        self.lengths[target] = length
                    self.boundary.fork(source, target, length)
                case Cut(slot, length):
                    if length and slot in self.lengths:
                        self.lengths[slot] = min(length, self.lengths[slot])
                    elif not length:
                        self.lengths.pop(slot, None)
                        self._fences.pop(slot, None)
                        self._expected.pop(slot, None)
                    self.boundary.cut(slot, length)

    def _keep(self, work: StepWork, done: Done) -> None:
        if work.is_last or not done.payload or not self.has_layers:
            return
        view, at = memoryview(done.payload), 0
        each = len(view) // sum(len(row.tokens) for row in work.rows)
        for row in work.rows:
            size = each * len(row.tokens)
            self.boundary.add(row.slot, row.start, row.tokens, view[at : at + size])
            at += size

    def _judge(self, rows: tuple[FrameRow, ...], results: tuple[RowResult, ...]) -> None:
        for row, found in zip(rows, results, strict=True):
            if found.tokens:
                self._expected[row.slot] = (row.fence, found.stop, found.tokens[-1])
                if found.stop < row.stop:  # a draft was refused: what comes of this fence is stale
                    self._fences[row.slot] = max(row.fence + 1, self._fences.get(row.slot, 0))

    def _pass_on(
        self,
        frame: Frame,
        payload: bytes | bytearray | memoryview,
        results: tuple[RowResult, ...],
        wait_s: float,
        work_s: float,
    ) -> list[StageEffect]:
        route = self._route
        assert route is not None
        if frame.kind is Kind.STEP:
            self._finished = max(self._finished, frame.number)
        times = (*frame.times, StageTime(route.index, max(wait_s, 0.0), work_s))
        is_replay = frame.kind is Kind.REPLAY
        if route.index == route.count - 1 or (is_replay and route.index >= frame.until):
            rows = tuple(RowResult(r.slot, r.fence, r.start, r.stop) for r in frame.rows) if is_replay else results
            made = Result(epoch=frame.epoch, number=frame.number, rows=rows, times=times, is_replay=is_replay)
            return [SendResult(made)]
        codec = route.codec if frame.rows else "none"
        return [SendFrame(route.after, replace(frame, times=times, codec=codec, payload=payload))]

    # ---- moving keys -----------------------------------------------------------------------------------------------------

    def _begin_export(self, export: Export) -> list[StageEffect]:
        pieces = [p for p in export.pieces if p.stop <= self.lengths.get(p.slot, 0)]
        if not pieces:
            return [SendKv(export.target, self._kv(export, None, True))]
        self._exports += [ExportWork(export=export, piece=piece) for piece in pieces]
        return []

    def _exported(self, work: ExportWork, done: Done) -> list[StageEffect]:
        export = work.export
        is_last = not any(e.export is export for e in self._exports)
        piece = self._kv(export, None if done.error else work.piece, is_last, done.payload)
        return [SendKv(export.target, piece)] if is_last or not done.error else []

    def _kv(self, export: Export, piece: object, is_last: bool, payload: bytes | bytearray | memoryview = b"") -> KvPiece:
        return KvPiece(
            shard=export.target.shard, move=export.move, round=export.round, first=export.first, last=export.last,
            codec=export.codec, piece=piece, is_last=is_last, payload=payload,  # type: ignore[arg-type]
        )  # fmt: skip

    def _imported(self, came: KvPiece, error: str = "") -> list[StageEffect]:
        if error:
            return [Tell(Fault(shard=self.shard, epoch=self.epoch, number=0, reason=error))]
        self._imported_bytes += len(came.payload)
        piece = came.piece
        if piece is not None:
            held = self._imports.setdefault(piece.slot, {})
            layers = (came.first, came.last)
            if piece.parent and layers not in held:
                held[layers] = piece.shared
            if held.get(layers, 0) >= piece.start:
                held[layers] = piece.stop
        if not came.is_last:
            return []
        size, self._imported_bytes = self._imported_bytes, 0
        return [Tell(Imported(shard=self.shard, move=came.move, round=came.round, size_bytes=size))]

    def _import_length(self, slot: int) -> int:
        """Positions whose keys are here on every layer."""
        first, last = self._layers
        found = self._imports[slot]
        covered = {layer: length for (a, b), length in found.items() for layer in range(a, b)}
        return min((covered.get(layer, 0) for layer in range(first, last)), default=0)


def _bytes_of(codec: str) -> str:
    """Codecs with the same bytes: a successor on this very device takes exact ones as they were sent over the link."""
    return "fp32" if codec == "none" else codec
