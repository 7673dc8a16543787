"""How a pipeline begins, heals and moves: one procedure for all three.

    lost or asked for -> [stages are loaded by the shell] -> Route to every stage -> Routed from all -> rebuild -> run

With each route the epoch rises: frames and results of former ones count no more. The driver goes back to what is
*confirmed* (computed by all stages, as their results say), every stage is told to keep exactly that, and says what it has.
Where a stage has less, its keys are rebuilt, by the first of these that can be:

    replay   the stage before the gap kept what it sent: it sends that again, only the gap computes
    ids      nothing with keys stands before the gap: the tokens are sent again, only the gap computes
    again    otherwise the whole sequence is computed again from its tokens, row by row as it was

Requests go on behind their own rebuilding, in the same pipeline: nothing waits for all of it. A loss during any of this
begins the same anew with what is left: what a rebuilt stage already has, it says. A move copies keys first, in rounds,
while requests go on (migration.py); then the same procedure finds nothing missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ecotone.decoding.boundary import joined
from ecotone.decoding.frame import Fork, FrameRow, Open, Order, Replay, Result
from ecotone.decoding.ledger import Sequence
from ecotone.decoding.messages import Imported, Message, Peer, Route, Routed
from ecotone.decoding.migration import Migration
from ecotone.decoding.pace import Pace
from ecotone.decoding.state import Mode, State, key_seed
from ecotone.decoding.words import (
    Ending,
    PipelineFailed,
    PipelineReady,
    Resharded,
    Say,
    StageRef,
    WantPipeline,
)

__all__ = ["Transition"]

_RETRY_S = 2.0
_REPLAY_ROWS, _REPLAY_TOKENS = 64, 512


@dataclass(slots=True)
class _Routing:
    """Waits for the answers of `missing` shards. `held`: shard -> slot -> (tokens, positions whose outputs are kept)."""

    missing: set[int]
    until_s: float
    held: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class _Rebuild:
    """Positions [start, stop) of a sequence are missing on stages [first, last]; `parent`, `shared` as in Ledger.sharing."""

    mine: Sequence
    parent: int
    shared: int
    first: int
    last: int
    start: int


class Transition:
    """Changes the pipeline of `state`."""

    def __init__(self, state: State):
        self._state = state
        self._routing: _Routing | None = None
        self._migration: Migration | None = None
        self._lost: set[str] = set()
        self._attempt = 0
        self._stranded_s: float | None = None  # since when
        self._retry_s: float | None = None
        self._pause_s: float | None = None  # since when nothing is sent, for a move
        self._report: Resharded | None = None  # told when the move has ended
        self._why = ""  # no stages could be had

    # ---- what begins one -------------------------------------------------------------------------------------------------

    def lose(self, nodes: tuple[str, ...], reason: str) -> None:
        """Stages on these nodes are gone; nothing where that is known: what is being loaded in their place comes."""
        state = self._state
        if not set(nodes) & set(state.nodes()) - self._lost:
            return
        state.counts["losses"] += 1
        why = f"node {', '.join(nodes)} was lost"
        self._abandon_move(why)
        if self._report is not None:  # of stages that were just taking their places
            state.out.append(Resharded(f"the move was given up: {why}"))  # which are unused is with whoever mends it
            self._report = None
        self._lost |= set(nodes)
        self._strand(reason)

    def again(self, reason: str) -> None:
        """Begin an epoch anew with the same stages."""
        self._abandon_move(reason)
        self._retreat()
        self._route(self._state.pipeline)

    def reshard(self, stages: tuple[StageRef, ...]) -> None:
        """Move to `stages`, or begin with them."""
        state = self._state
        self._abandon_move("another move was asked for", stages)
        if not state.pipeline:
            self._report = Resharded("", "begin")
            self._route(stages)
        elif state.mode is Mode.STRANDED:
            self._report = Resharded("", "recompute")
            self._attempt += 1
            self._route(stages)
        else:
            self._migration = Migration(state, stages)

    def ready(self, event: PipelineReady) -> None:
        """Stages in place of lost ones are loaded."""
        if event.attempt == self._attempt and self._state.mode is Mode.STRANDED:
            self._route(event.stages)

    def failed(self, event: PipelineFailed) -> None:
        if event.attempt == self._attempt and self._state.mode is Mode.STRANDED:
            self._retry_s = self._state.now_s + _RETRY_S
            self._why = event.reason

    def node_up(self, node: str) -> None:
        """Somebody came who may help."""
        now_s, settings = self._state.now_s, self._state.settings
        if self._state.mode is Mode.STRANDED:
            self._retry_s = now_s if self._retry_s is not None else None
            if self._stranded_s is not None and now_s >= self._stranded_s + settings.strand_s:
                self._stranded_s = now_s  # requests were refused; now there is hope again

    def message(self, message: Message) -> None:
        if isinstance(message, Routed) and self._routing is not None and message.epoch == self._state.epoch:
            self._routing.missing.discard(message.shard)
            self._routing.held[message.shard] = {slot: (length, kept) for slot, length, kept in message.held}
        elif isinstance(message, Imported) and self._migration is not None:
            self._migration.imported(message)

    def replayed(self, result: Result) -> None:
        """Rows of a replay were computed by the last stage that needed them."""
        state = self._state
        state.counts["replayed_tokens"] += sum(row.stop - row.start for row in result.rows)
        for row in result.rows:
            mine = state.ledger.sequences.get(row.slot)
            if mine is None or row.stop >= mine.confirmed:
                state.replays.discard(row.slot)

    # ---- what time brings ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Go on as far as possible."""
        state = self._state
        if self._routing is not None:
            if not self._routing.missing:
                self._routed()
            elif state.now_s >= self._routing.until_s:
                late = [s.peer.node for s in state.pipeline if s.peer.shard in self._routing.missing]
                self.lose(tuple(dict.fromkeys(late)), f"it did not take its place within {state.settings.route_s:g} s")
        if state.mode is Mode.STRANDED and state.pipeline:
            self._wait_stranded()
        if self._migration is not None and state.mode in (Mode.RUNNING, Mode.DRAINING):
            self._move()

    def import_failed(self, shard: int, reason: str) -> None:
        """A shard that keys are being copied to could not take them: go on without, what is missing is rebuilt."""
        if self._migration is not None and any(peer.shard == shard for peer in self._migration.unused()):
            self._migration.end_copying(reason)

    def wake_s(self) -> float | None:
        times = [self._routing.until_s] if self._routing is not None else []
        times += [self._migration.late_s] if self._migration is not None else []
        if self._state.mode is Mode.STRANDED and self._stranded_s is not None:
            times += [self._retry_s] if self._retry_s is not None else []
            times += [self._stranded_s + self._state.settings.strand_s] if self._state.requests else []
        return min(times, default=None)

    def _wait_stranded(self) -> None:
        state = self._state
        if self._stranded_s is None:
            return
        if self._retry_s is not None and state.now_s >= self._retry_s:
            self._ask_for_stages("trying again")
        if state.now_s >= self._stranded_s + state.settings.strand_s:
            for request in list(state.requests.values()):
                reason = (
                    f"node {', '.join(sorted(self._lost))} was lost and nothing took its place: {self._why or 'no answer'}"
                )
                state.end(request, Ending.NODE_LOST, reason)

    # ---- to another epoch ------------------------------------------------------------------------------------------------

    def _strand(self, reason: str) -> None:
        state = self._state
        self._retreat()
        state.mode, self._routing = Mode.STRANDED, None
        self._stranded_s = self._stranded_s if self._stranded_s is not None else state.now_s
        self._ask_for_stages(reason)

    def _ask_for_stages(self, reason: str) -> None:
        self._attempt += 1
        self._retry_s = None
        self._state.out.append(WantPipeline(self._attempt, tuple(sorted(self._lost)), reason, self._state.pipeline))

    def _retreat(self) -> None:
        """Back to what is confirmed; frames in flight count no more."""
        state = self._state
        state.flights.clear()
        state.replays.clear()
        state.ledger.to_confirmed()
        for request in list(state.by_slot.values()):
            mine = state.ledger.sequences.get(request.slot)
            if mine is None:
                state.put_back(request)
                continue
            request.forget_flight()
            request.sent = mine.confirmed

    def _route(self, stages: tuple[StageRef, ...]) -> None:
        state = self._state
        state.epoch += 1
        state.mode, self._retry_s, self._stranded_s = Mode.ROUTING, None, None
        self._lost.clear()
        gap_s = state.pace.gap_s
        if stages is not state.pipeline:
            devices = tuple(stage.peer.node for stage in stages)
            state.pace = Pace(devices) if state.pipeline != stages else state.pace
            state.pipeline = stages
            state.ledger.reseed(key_seed(stages, state.settings))
            self._fit(min((stage.num_blocks for stage in stages if stage.has_layers), default=1 << 20))
        until_s = state.now_s + max(state.settings.route_s, 3 * gap_s)  # a stage answers when its step has ended
        self._routing = _Routing({s.peer.shard for s in stages}, until_s)
        keep = tuple((s.slot, s.confirmed) for s in state.ledger.sequences.values())
        ends = (Peer(node=""), *(stage.peer for stage in stages), Peer(node=""))
        for index, stage in enumerate(stages):
            route = Route(
                shard=stage.peer.shard, epoch=state.epoch, index=index, count=len(stages), before=ends[index],
                after=ends[index + 2], codec=stage.codec, keep=keep,
            )  # fmt: skip
            state.out.append(Say(stage.peer, route))

    def _fit(self, num_blocks: int) -> None:
        """Have the ledger count that many blocks; requests that find no room are put back, the last first."""
        state = self._state
        while not state.ledger.resize(num_blocks):
            state.put_back(max(state.by_slot.values(), key=lambda r: (r.priority, r.order)))
        state.ledger.orders.clear()  # what is not kept is freed by the route

    def _routed(self) -> None:
        """All stages have answered: rebuild what is missing, and run."""
        state, routing = self._state, self._routing
        assert routing is not None
        self._routing = None
        state.mode, state.progress_s = Mode.RUNNING, state.now_s
        gaps = self._gaps(routing.held)
        opens = {r: Open(r.slot, r.prompt_length, r.params.to_bytes(), tuple(r.tokens)) for r in state.by_slot.values()}
        state.launch("order", (), orders=[each for request, each in opens.items() if not request.is_suspect])
        for request, each in opens.items():
            if request.is_suspect:  # on its own, to be blamed alone if that fails
                state.launch("order", (), orders=[each])
        self._send_rebuilds(gaps, routing.held)
        if self._report is not None:
            pause_s = state.now_s - self._pause_s if self._pause_s is not None else 0.0
            report, self._report, self._pause_s = self._report, None, None
            state.counts["moves"] += report.choice != "begin"
            unused = tuple(peer for peer in report.unused if peer not in state.stage_peers())
            state.out.append(Resharded(report.error, report.choice, pause_s, report.moved_bytes, report.rounds, unused))

    # ---- rebuilding ------------------------------------------------------------------------------------------------------

    def _gaps(self, held: dict[int, dict[int, tuple[int, int]]]) -> list[_Rebuild]:
        """What is missing where, parents first; sequences that can only be computed again are put back, cached ones go."""
        state, found = self._state, []
        self._drop_cached(held)
        sharing = state.ledger.sharing()
        again: set[int] = set()
        for mine, parent, _ in sharing:
            runs = self._runs(mine, held)
            if parent in again or any(self._source(first, mine, held) is None for first, _, _ in runs):
                again.add(mine.slot)
        for slot in again:
            state.counts["recomputed_tokens"] += state.ledger.sequences[slot].confirmed
            state.put_back(state.by_slot[slot])
        for mine, parent, shared in sharing:
            if mine.slot not in again:
                found += [_Rebuild(mine, parent, shared, *run) for run in self._runs(mine, held)]
        return found

    def _drop_cached(self, held: dict[int, dict[int, tuple[int, int]]]) -> None:
        """Cached prefixes that are not whole everywhere are not worth the time of those who wait."""
        ledger = self._state.ledger
        for mine in list(ledger.sequences.values()):
            if not mine.is_active and self._runs(mine, held):
                ledger.drop(mine.slot)

    def _runs(self, mine: Sequence, held: dict[int, dict[int, tuple[int, int]]]) -> list[tuple[int, int, int]]:
        """(first stage, last stage, from which position) of every run of stages that lack keys of a sequence."""
        runs: list[tuple[int, int, int]] = []
        for index, stage in enumerate(self._state.pipeline):
            have = held.get(stage.peer.shard, {}).get(mine.slot, (0, 0))[0] if stage.has_layers else mine.confirmed
            if have < mine.confirmed:
                if runs and runs[-1][1] == index - 1:
                    runs[-1] = (runs[-1][0], index, min(runs[-1][2], have))
                else:
                    runs.append((index, index, have))
        return runs

    def _source(self, first: int, mine: Sequence, held: dict[int, dict[int, tuple[int, int]]]) -> int | None:
        """The stage that can replay into stage `first`: its number, -1 for the driver's token ids, None for none."""
        before = self._state.pipeline[:first]
        if not any(stage.has_layers for stage in before):
            return -1
        kept = held.get(before[-1].peer.shard, {}).get(mine.slot, (0, 0))[1]
        return first - 1 if kept >= mine.confirmed else None

    def _send_rebuilds(self, gaps: Iterable[_Rebuild], held: dict[int, dict[int, tuple[int, int]]]) -> None:
        """Level by level of who was forked from whom: fork, then fill."""
        state = self._state
        gaps = list(gaps)
        state.replays |= {gap.mine.slot for gap in gaps}
        levels: dict[int, int] = {}
        for gap in gaps:
            levels[gap.mine.slot] = levels.get(gap.parent, -1) + 1 if gap.shared else 0
        for level in range(max(levels.values(), default=-1) + 1):
            here = [gap for gap in gaps if levels[gap.mine.slot] == level]
            forks = {gap.mine.slot: Fork(gap.parent, gap.mine.slot, gap.shared) for gap in here if gap.shared > gap.start}
            if forks:
                state.launch("order", (), orders=tuple(forks.values()))
            by_ids: list[_Rebuild] = []
            orders: list[Order] = []
            for gap in here:
                start = max(gap.start, gap.shared)
                if start >= gap.mine.confirmed:
                    state.replays.discard(gap.mine.slot)
                elif (source := self._source(gap.first, gap.mine, held)) == -1:
                    by_ids.append(gap)
                elif source is not None:
                    orders.append(Replay(source, gap.last, gap.mine.slot, start, gap.mine.confirmed))
            if orders:
                state.launch("order", (), orders=orders)
            for last in sorted({gap.last for gap in by_ids}):
                self._send_ids([gap for gap in by_ids if gap.last == last], last)
            if by_ids:
                state.launch("order", ())  # so that a frame is awaited behind them

    def _send_ids(self, gaps: list[_Rebuild], until: int) -> None:
        """Token ids of several sequences side by side, row by row as they were computed."""
        pending = []
        for gap in gaps:
            start, stop = max(gap.start, gap.shared), gap.mine.confirmed
            rows = [(max(a, start), min(b, stop)) for a, b in joined(gap.mine.pieces) if b > start and a < stop]
            pending.append((gap.mine, rows))
        while pending := [(mine, rows) for mine, rows in pending if rows]:
            frame: list[FrameRow] = []
            for mine, rows in pending[:_REPLAY_ROWS]:
                if sum(len(row.tokens) for row in frame) < _REPLAY_TOKENS:
                    first, last = rows.pop(0)
                    fence = self._state.by_slot[mine.slot].fence if mine.slot in self._state.by_slot else 0
                    frame.append(FrameRow(mine.slot, first, tuple(mine.tokens[first:last]), 0, fence))
            self._state.replay_ids(frame, until)

    # ---- moving ----------------------------------------------------------------------------------------------------------

    def _move(self) -> None:
        """Let a migration go on; when all is copied, take the new stages."""
        state, migration = self._state, self._migration
        assert migration is not None
        if migration.is_late:
            self._abandon_move("keys did not arrive in time")
            return
        migration.run()
        if migration.wants_quiet and state.mode is Mode.RUNNING:
            state.mode, self._pause_s = Mode.DRAINING, state.now_s
            migration.run()
        if not migration.is_done or state.flights or state.replays:
            return
        self._report = migration.report()
        self._migration = None
        self._retreat()
        self._route(migration.stages)

    def _abandon_move(self, reason: str, instead: tuple[StageRef, ...] = ()) -> None:
        """Stay where it is; the stages of `instead` are wanted all the same."""
        state = self._state
        if self._migration is not None:
            unused = tuple(peer for peer in self._migration.unused() if all(s.peer != peer for s in instead))
            self._migration, self._pause_s = None, None
            state.out.append(Resharded(f"the move was given up: {reason}", unused=unused))
        if state.mode is Mode.DRAINING:
            state.mode = Mode.RUNNING
