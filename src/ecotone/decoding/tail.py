"""What the last stage decides: which token follows, and how far a window of drafts agrees with that.

The model's own choice at every position is the answer's token, drafts or not: a draft counts when it *is* that choice.
For a request without randomness this is the usual check. With randomness the choice depends on seed, position and logits
alone (Gumbel noise by position), so a draft is accepted with the probability that the model gives it, and what replaces a
refused one has the model's distribution without it: rejection sampling of a drafter that names one token. A drafter that
draws with the same noise agrees more often than chance. The text never depends on drafting, batching or failures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ecotone.decoding.frame import FrameRow, Open, RowResult, TokenLogprobs
from ecotone.decoding.params import SamplingParams
from ecotone.units import EcotoneError

__all__ = ["Choice", "Chooser", "Tail"]


@dataclass(frozen=True, slots=True)
class Choice:
    token: int
    logprobs: TokenLogprobs | None = None


class Chooser(Protocol):
    """Chooses the tokens of one request. `tokens` are all before the one to choose, and may be fewer than last time."""

    def choose(self, logits: Any, tokens: Sequence[int]) -> Choice: ...


@dataclass(slots=True)
class _Slot:
    tokens: list[int]
    chooser: Chooser | None = None


@dataclass(slots=True)
class Tail:
    """The tokens of every sequence, and a chooser for each that is a request. `make`: (parameters, prompt's length)."""

    make: Callable[[SamplingParams, int], Chooser]
    _slots: dict[int, _Slot] = field(default_factory=dict)

    def open(self, order: Open) -> None:
        """A request begins, or is told again; raises SchemaError, or what `make` raises."""
        chooser = self.make(SamplingParams.from_bytes(order.params), order.prompt_length)
        self._slots[order.slot] = _Slot(list(order.tokens), chooser)

    def cut(self, slot: int, length: int) -> None:
        """Forget all of a sequence where `length` is 0, and never choose for it again otherwise: it only lies there."""
        self._slots.pop(slot, None)

    def slots(self) -> tuple[int, ...]:
        return tuple(self._slots)

    def clear(self) -> None:
        """A route begins: the driver opens every request again."""
        self._slots.clear()

    def judge(self, rows: Sequence[FrameRow], logits: Sequence[Any]) -> tuple[RowResult, ...]:
        """What became of each row; `logits` has one entry per position that asked for it, in order."""
        found, at = [], 0
        for row in rows:
            found.append(self._judge(row, logits, at))
            at += row.num_logits
        return tuple(found)

    def _judge(self, row: FrameRow, logits: Sequence[Any], at: int) -> RowResult:
        slot = self._slots.get(row.slot)
        if slot is None:
            if row.num_logits:
                raise EcotoneError(f"slot {row.slot} asks for tokens but was never opened")
            return RowResult(row.slot, row.fence, row.start, row.stop)
        if row.start > len(slot.tokens):
            raise EcotoneError(f"slot {row.slot}: tokens up to {len(slot.tokens)} are known, a row starts at {row.start}")
        del slot.tokens[row.start :]
        silent = len(row.tokens) - row.num_logits
        slot.tokens += row.tokens[:silent]
        chosen: list[Choice] = []
        for index in range(silent, len(row.tokens)):
            if chosen and row.tokens[index] != chosen[-1].token:
                break
            slot.tokens.append(row.tokens[index])
            assert slot.chooser is not None
            chosen.append(slot.chooser.choose(logits[at + index - silent], slot.tokens))
        logprobs = tuple(c.logprobs for c in chosen if c.logprobs is not None)
        tokens = tuple(c.token for c in chosen)
        stop = row.start + silent + len(tokens)
        return RowResult(row.slot, row.fence, stop - max(len(tokens), 1), stop, tokens, logprobs)
