"""Drafting: who guesses the tokens to come, and who decides how many guesses are under way. Interfaces, simple ones of each.

A request's tokens travel in frames of up to `rows` tokens, up to `frames` of them in flight: the last settled token and
drafts behind it, then drafts only. rows = frames = 1 is plain decoding. The last stage judges them (tail.py), so a drafter
can be wrong, slow or random without changing the text. The arithmetic of what pays is with the policy: what is measured is
in SpeculationState, in the letters of PipeInfer-like analysis: T loop_s, tau stage_s, a acceptance, W frames, K rows.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from ecotone.decoding.params import SamplingParams
from ecotone.decoding.step import FEW_TOKENS

__all__ = [
    "PLAIN",
    "Draft",
    "DraftAsk",
    "Drafter",
    "FixedPolicy",
    "Kind",
    "PromptLookup",
    "SpeculationPolicy",
    "SpeculationState",
    "Window",
]


class Kind(enum.IntEnum):
    """Of decoding."""

    PLAIN = 0
    SERIAL = 1
    FRAMES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """At most `frames` frames of a request in flight, each of at most `rows` tokens.

    `look`: where nothing else asks for drafts, ask for so many, not to be sent but to see whether they would be right.
    `first_s`, `next_s`: what whoever decided expects of it: seconds until a frame with a settled token is back, and until
    the next frame of drafts behind it is; 0: nothing. `tokens`: that come of a full frame on average.
    """

    frames: int = 1
    rows: int = 1
    look: int = 0
    first_s: float = field(default=0.0, compare=False)
    next_s: float = field(default=0.0, compare=False)
    tokens: float = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        if self.frames < 1 or not 1 <= self.rows <= FEW_TOKENS or self.look < 0:
            raise ValueError(f"a window of {self.frames} frames of {self.rows} rows; rows must be 1 to {FEW_TOKENS}")

    @property
    def kind(self) -> Kind:
        """How drafts travel: with the settled token, in frames behind it, or not at all."""
        return Kind.FRAMES if self.frames > 1 else Kind.SERIAL if self.rows > 1 else Kind.PLAIN


PLAIN = Window()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationState:
    """What is measured when a request may send more. Seconds of the last some frames; zero where nothing was measured yet.

    `loop_s`: a frame of one row there and back, without waiting in queues. `stage_s`: the slowest device's part of it.
    `row_s`: what one more row in a frame adds on the slowest device, `loop_row_s` on all of the loop. `draft_s`: per drafted
    token, for this drafter; `answer_s`: what an answer of it takes besides. `acceptance`: of this request's drafts lately,
    sent or looked at, each counted alone (0.5 before any), `num_drafted` in all; `all_acceptance`: of all requests'.
    `rows_seen`: the most rows of a short frame so far, since the pipeline runs. `frame_s`: seconds by which frames follow
    one another beyond `stage_s` where there are many; `stale_s`: by which each stale frame in flight holds up the one
    behind. `slowness`: by Kind, seconds per token over those expected.
    `num_decoding`: requests that want tokens now. `num_flying`: frames in flight now. `depth`: how many fill the pipeline.
    """

    request: int
    loop_s: float
    stage_s: float
    row_s: float
    draft_s: float
    acceptance: float
    all_acceptance: float
    num_drafted: int
    num_accepted: int
    num_decoding: int
    num_flying: int
    depth: int
    num_tokens: int
    num_left: int
    loop_row_s: float = 0.0
    answer_s: float = 0.0
    rows_seen: int = 1
    frame_s: float = 0.0
    stale_s: float = 0.0
    slowness: tuple[float, ...] = (1.0, 1.0, 1.0)


class SpeculationPolicy(Protocol):
    """Decides for one request at a time; called whenever it may send. Must be quick, and may remember."""

    def decide(self, state: SpeculationState) -> Window: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftAsk:
    """Guess `count` tokens that follow `tokens`, of which the first `num_settled` are certain, the rest drafts in flight.

    `ticket` is given back with the answer. `params` has the seed: a drafter that draws with the same noise agrees most.
    The first `prompt_length` tokens are the prompt: penalties and grammars count from there.
    """

    request: int
    ticket: int
    tokens: tuple[int, ...]
    num_settled: int
    count: int
    params: SamplingParams
    prompt_length: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The answer to an ask: as many tokens as the drafter dares, in `seconds`. None at all is an answer too."""

    request: int
    ticket: int
    tokens: tuple[int, ...] = ()
    seconds: float = 0.0


class Drafter(Protocol):
    """Guesses tokens. Called by one thread at a time, several asks at once where several requests wait.

    One with a true attribute `never_waits` (for a network, a lock, a disk) may be called by the driver's own loop.
    """

    def draft(self, asks: Sequence[DraftAsk]) -> Sequence[Sequence[int]]:
        """The tokens for each ask, at most `count` of them."""
        ...

    def end(self, request: int) -> None:
        """Nothing of this request will be asked any more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPolicy:
    """The same window always, but plain decoding while more than `most_requests` decode: then they fill the pipe."""

    window: Window
    most_requests: int = 1

    def decide(self, state: SpeculationState) -> Window:
        return self.window if state.num_decoding <= self.most_requests else PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLookup:
    """What followed the last occurrence of the latest tokens, if at least `min_match` of them agree (n-grams).

    The longest match up to `max_match` wins, among equals the latest. O(tokens), at the speed of a search in bytes.
    """

    min_match: int = 3
    max_match: int = 8
    never_waits: ClassVar[bool] = True

    def draft(self, asks: Sequence[DraftAsk]) -> Sequence[Sequence[int]]:
        return [self._one(ask.tokens, ask.count) for ask in asks]

    def end(self, request: int) -> None:
        return

    def _one(self, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
        if len(tokens) <= self.min_match:
            return ()
        text = array("I", tokens)
        size, data = text.itemsize, text.tobytes()
        for length in range(min(self.max_match, len(tokens) - 1), self.min_match - 1, -1):
            end = (len(tokens) - 1) * size  # the match must end before the end
            suffix = data[-length * size :]
            while (at := data.rfind(suffix, 0, end)) >= 0:
                if at % size == 0:
                    start = at // size + length
                    return tokens[start : start + count]
                end = at + length * size - 1
        return ()
