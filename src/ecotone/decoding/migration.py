"""Moving keys to other stages while requests go on, in rounds, as virtual machines move (PipeLive, arXiv 2604.12171).

Each layer of a new stage comes from the old stage that holds it. A round copies what is confirmed and not copied yet; what
is appended meanwhile is the next round's. When what is left would take less than one decoding step, or rounds shrink no
more, nothing new is sent, what is in flight comes back, and the last round is copied: that is the pause. Rounds converge
while keys are appended more slowly than the link carries them.

Or keys are not copied but computed again from token ids in the new pipeline, where that is expected to be sooner:
copy = bytes/rate + latency against tokens * time per token of a prompt. Both figures and the choice are reported.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecotone.decoding.messages import Export, ExportPiece, Imported, Peer
from ecotone.decoding.state import Mode, State
from ecotone.decoding.words import Resharded, Say, StageRef

__all__ = ["Migration"]

_MOST_ROUNDS, _PIECE_TOKENS, _LATE_S = 8, 256, 10.0


@dataclass(frozen=True, slots=True)
class _Move:
    """Layers [first, last) from an old stage to a new one; `token_bytes` of each token."""

    number: int
    source: Peer
    target: Peer
    first: int
    last: int
    token_bytes: float


class Migration:
    """From the pipeline of `state` to `stages`. `run` it after every event; `is_done` when stages may take their places."""

    def __init__(self, state: State, stages: tuple[StageRef, ...]):
        self._state, self.stages = state, stages
        old = {stage.peer.shard for stage in state.pipeline}
        self._moves = [
            _Move(0, s.peer, t.peer, max(s.first, t.first), min(s.last, t.last),
                  s.block_bytes / max(s.last - s.first, 1) / state.settings.block_tokens)
            for t in stages if t.peer.shard not in old
            for s in state.pipeline if max(s.first, t.first) < min(s.last, t.last)
        ]  # fmt: skip
        self._moves = [_Move(i, m.source, m.target, m.first, m.last, m.token_bytes * (m.last - m.first))
                       for i, m in enumerate(self._moves)]  # fmt: skip
        self._copied: dict[int, int] = {}
        self._missing: set[int] = set()
        self._round = 0
        self._moved_bytes = 0
        self.late_s = float("inf")
        self._last_left: int | None = None
        self.wants_quiet = self.is_done = False
        copy_s, compute_s = self._copy_s(self._left()), self._compute_s()
        self.choice = "migrate" if copy_s <= compute_s or not self._left() else "recompute"
        self._figures = f"{self.choice}: copying {copy_s:.3g} s, computing {compute_s:.3g} s"
        if self.choice == "recompute" or not self._moves:
            self.wants_quiet = self.is_done = True

    def run(self) -> None:
        """Begin the next round where the last one has ended."""
        state = self._state
        if self.is_done or self._missing:
            return
        left, is_quiet = self._left(), state.mode is Mode.DRAINING and not state.flights
        if is_quiet and not left:
            self.is_done = True
        elif is_quiet or (state.mode is Mode.RUNNING and not self._is_last(left)):
            self._begin_round()
        else:
            self.wants_quiet = True

    def imported(self, message: Imported) -> None:
        """A target has all of a move's round."""
        if message.round != self._round or message.move not in self._missing:
            return
        self._missing.discard(message.move)
        self._moved_bytes += message.size_bytes

    def end_copying(self, reason: str) -> None:
        """Copy nothing more; what is there counts."""
        self._figures += f", copying ended early: {reason}"
        self._missing.clear()
        self.wants_quiet = self.is_done = True

    @property
    def is_late(self) -> bool:
        """Whether a round takes far longer than it should: a node hangs, or a link does."""
        return bool(self._missing) and self._state.now_s >= self.late_s

    def unused(self) -> tuple[Peer, ...]:
        """Shards that were loaded for this move and are not in the pipeline."""
        old = {stage.peer for stage in self._state.pipeline}
        return tuple(stage.peer for stage in self.stages if stage.peer not in old)

    def report(self) -> Resharded:
        """What to tell once a new pipeline runs; `unused`: all shards, of which the pipeline's own are to be taken away.

        It may not be `stages` any more, if some of them are lost before they have taken their places.
        """
        peers = dict.fromkeys(stage.peer for stage in (*self._state.pipeline, *self.stages))
        return Resharded("", self._figures, 0.0, self._moved_bytes, self._round, tuple(peers))

    # ---- inside ----------------------------------------------------------------------------------------------------------

    def _left(self) -> int:
        """Tokens that are confirmed and not copied; shared ones once."""
        return sum(
            max(mine.confirmed - max(self._copied.get(mine.slot, 0), shared), 0)
            for mine, _, shared in self._state.ledger.sharing()
        )

    def _is_last(self, left: int) -> bool:
        before, self._last_left = self._last_left, left
        if self._round >= _MOST_ROUNDS or not left or (before is not None and self._round > 2 and left >= before):
            return True
        return self._round > 0 and self._copy_s(left) < max(self._state.pace.loop_s(1), 1e-3)

    def _rate(self, move: _Move) -> float:
        settings = self._state.settings
        return settings.rates.get((move.source.node, move.target.node), settings.default_rate_bytes_per_s)

    def _copy_s(self, tokens: int) -> float:
        """The slowest link's time for so many tokens; moves within a node are free."""
        times: dict[tuple[str, str], float] = {}
        for move in self._moves:
            ends = (move.source.node, move.target.node)
            if move.source.node != move.target.node:
                times[ends] = times.get(ends, 0.0) + tokens * move.token_bytes / self._rate(move)
        return max(times.values(), default=0.0)

    def _compute_s(self) -> float:
        """A prompt of all tokens that requests at work have; infinite where no prompt was timed yet."""
        state = self._state
        tokens = sum(mine.confirmed for mine in state.ledger.sequences.values() if mine.is_active)
        per_token_s = state.pace.stage_s(256, is_few=False) / 256
        return tokens * per_token_s if per_token_s else float("inf")

    def _begin_round(self) -> None:
        state = self._state
        self._round += 1
        pieces = []
        for mine, parent, shared in state.ledger.sharing():
            start = max(self._copied.get(mine.slot, 0), shared)
            for at in range(start, mine.confirmed, _PIECE_TOKENS):
                stop = min(at + _PIECE_TOKENS, mine.confirmed)
                pieces.append(ExportPiece(slot=mine.slot, start=at, stop=stop, parent=parent, shared=shared))
            self._copied[mine.slot] = max(mine.confirmed, self._copied.get(mine.slot, 0))
        self._missing = {move.number for move in self._moves}
        copy_s = self._copy_s(sum(piece.stop - piece.start for piece in pieces))
        self.late_s = state.now_s + _LATE_S + 5 * copy_s
        for move in self._moves:
            export = Export(
                shard=move.source.shard, target=move.target, first=move.first, last=move.last,
                codec=state.settings.kv_codec, move=move.number, round=self._round, pieces=tuple(pieces),
            )  # fmt: skip
            state.out.append(Say(move.source, export))
