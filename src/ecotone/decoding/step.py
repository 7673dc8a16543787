"""The words between an engine and a shard: which tokens one step computes.

Pure data. A step is a ragged batch: decode rows (one token), chunks of prompts and windows of drafts may share it.
Tensors of a step are flat: row after row, so that token t of row r lies at `offsets[r] + t`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from ecotone.schema import check

__all__ = ["FEW_TOKENS", "Row", "Step"]

FEW_TOKENS = 8
"""Rows of up to so many tokens are decoding: executors made of two compute them by the one for decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`count` tokens of sequence `slot` from position `start`; the last `num_logits` of them ask for logits.

    A `start` below the length that the slot has is the order to roll back to it.
    """

    slot: int
    start: int
    count: int
    num_logits: int = 0

    def __post_init__(self) -> None:
        wrong = [f"{n} is {v}" for n, v in (("slot", self.slot), ("start", self.start)) if v < 0]
        if self.count < 1 or not 0 <= self.num_logits <= self.count:
            wrong.append(f"{self.count} tokens, {self.num_logits} logits")
        check("row", wrong)

    @property
    def stop(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Rows of different slots that are computed together."""

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        slots = [row.slot for row in self.rows]
        wrong = [] if slots else ["no rows"]
        wrong += (
            [f"slot {s} appears twice" for s in sorted({s for s in slots if slots.count(s) > 1})] if len(slots) > 1 else []
        )
        check("step", wrong)

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)

    @property
    def num_logits(self) -> int:
        return sum(row.num_logits for row in self.rows)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each row begins in the flat tensors, and the end of the last."""
        return (0, *accumulate(row.count for row in self.rows))

    def logit_indices(self) -> list[int]:
        """Flat positions that ask for logits, in order."""
        ends = self.offsets[1:]
        return [i for row, end in zip(self.rows, ends, strict=True) for i in range(end - row.num_logits, end)]

    def positions(self) -> list[int]:
        """The position of every token in its own sequence, flat."""
        return [p for row in self.rows for p in range(row.start, row.stop)]
