"""What a stage keeps of the hidden states it sent on, so that the next stage's keys can be rebuilt when its machine is lost.

Per sequence, the outputs of positions from 0 on, row by row as they were computed, in the bytes that were sent: a replay
gives the next stage exactly its former inputs. Rows of up to FEW_TOKENS tokens are joined when they are replayed, longer
ones stay as they were, since executors compute a short row with the same bits in any company, a long one only alike.
Above `cap_bytes` the sequence written longest ago is given up (its rebuilding starts from token ids then). Bytes that
forked sequences share are counted once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from ecotone.decoding.frame import Payload
from ecotone.decoding.step import FEW_TOKENS

__all__ = ["Boundary", "Piece", "joined"]


@dataclass(slots=True, eq=False)
class Piece:
    """Outputs for `tokens` from position `start` on. `users`: sequences that hold it."""

    start: int
    tokens: tuple[int, ...]
    payload: Payload
    users: int = 0

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    def part(self, start: int, stop: int) -> Piece:
        """The positions of [start, stop) that it holds."""
        start, stop = max(start, self.start), min(stop, self.stop)
        each = len(self.payload) // len(self.tokens)
        first, last = start - self.start, stop - self.start
        return Piece(start, self.tokens[first:last], memoryview(self.payload)[first * each : last * each])


class Boundary:
    """The outputs kept by one stage."""

    def __init__(self, cap_bytes: int):
        self.cap_bytes, self.used_bytes, self.num_given_up = cap_bytes, 0, 0
        self._kept: OrderedDict[int, list[Piece]] = OrderedDict()  # in order of last writing

    def add(self, slot: int, start: int, tokens: tuple[int, ...], payload: Payload) -> None:
        """Keep the outputs of a row; what was kept from `start` on is replaced. Kept only where none before is missing."""
        self.cut(slot, start)
        kept = self._kept.get(slot, [])
        if (kept[-1].stop if kept else 0) != start:
            return
        self._kept[slot] = kept
        self._hold(kept, Piece(start, tokens, payload))
        self._kept.move_to_end(slot)
        while self.used_bytes > self.cap_bytes and self._kept:
            self.num_given_up += 1
            self.cut(next(iter(self._kept)), 0)

    def fork(self, source: int, target: int, length: int) -> None:
        """`target` begins with the first `length` positions of `source`."""
        if target in self._kept or not 0 < length <= self.length(source):
            return
        made = self._kept[target] = []
        for piece in self._kept.get(source, ()):
            if piece.start < length:
                self._hold(made, piece if piece.stop <= length else piece.part(piece.start, length))

    def cut(self, slot: int, length: int) -> None:
        """Keep at most the first `length` positions of `slot`."""
        kept = self._kept.get(slot)
        while kept and kept[-1].stop > length:
            last = kept.pop()
            self._let_go(last)
            if last.start < length:
                self._hold(kept, last.part(last.start, length))
        if kept is not None and not kept:
            del self._kept[slot]

    def keep_only(self, lengths: dict[int, int]) -> None:
        """Cut every sequence to its length here; those without one go."""
        for slot in list(self._kept):
            self.cut(slot, lengths.get(slot, 0))

    def slots(self) -> tuple[int, ...]:
        return tuple(self._kept)

    def length(self, slot: int) -> int:
        """Positions [0, length) are kept."""
        kept = self._kept.get(slot)
        return kept[-1].stop if kept else 0

    def pieces(self, slot: int, start: int, stop: int) -> Iterator[Piece]:
        """What is kept of positions [start, stop), joined as described above."""
        parts = [p.part(start, stop) for p in self._kept.get(slot, ()) if p.start < stop and p.stop > start]
        for first, last in joined([(p.start, len(p.tokens)) for p in parts]):
            run = [p for p in parts if first <= p.start < last]
            payload = run[0].payload if len(run) == 1 else b"".join(p.payload for p in run)
            yield Piece(first, tuple(t for p in run for t in p.tokens), payload)

    def _hold(self, kept: list[Piece], piece: Piece) -> None:
        kept.append(piece)
        piece.users += 1
        if piece.users == 1:
            self.used_bytes += len(piece.payload)

    def _let_go(self, piece: Piece) -> None:
        piece.users -= 1
        if piece.users == 0:
            self.used_bytes -= len(piece.payload)


def joined(pieces: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows in which consecutive (start, count) are computed again: short ones together."""
    first = last = -1
    is_short = False
    for start, count in pieces:
        if last >= 0 and not (is_short and count <= FEW_TOKENS and start + count - first <= FEW_TOKENS and start == last):
            yield first, last
            first = -1
        if first < 0:
            first, is_short = start, count <= FEW_TOKENS
        last = start + count
    if first >= 0:
        yield first, last
