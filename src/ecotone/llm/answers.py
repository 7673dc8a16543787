"""The tokens of one answer become pieces of text: whole characters, cut at the first stop string. No threads, no clock.

Where several stop strings are given, the one that is complete first counts, and of those that end together the longest:
so the answer does not depend on how its text fell into tokens. Text that may be the beginning of a stop string is held
back until that is known. Per token O(length of the stop strings). Stop tokens are not found here: the engine ends at them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ecotone.decoding.answer import Piece
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.words import Ended, Ending, Tokens
from ecotone.llm.text import Detokeniser, TextModel

__all__ = ["AnswerText"]


class AnswerText:
    """`take` the engine's Tokens and Ended of one request in order; send Stop to the engine once `is_stopped`.

    `special` keeps tokens such as the end of a text visible. The first `min_tokens` tokens are not searched.
    """

    def __init__(self, text: TextModel, params: SamplingParams, special: bool = False):
        self._stream: Detokeniser = text.stream(special)
        self._search, self._unsearched = _Search(params.stop), params.min_tokens
        self._is_ended = False

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found: what comes now is not part of the answer."""
        return self._search.is_found

    def take(self, effect: Tokens | Ended) -> Piece | None:
        """What `effect` makes certain; None where that is nothing, as after a stop string."""
        if self._is_ended:
            return None
        if isinstance(effect, Tokens):
            return None if self.is_stopped else self._tokens(effect)
        self._is_ended = True
        text = "" if self.is_stopped else self._search.add(self._stream.finish()) + self._search.rest()
        if self.is_stopped:  # complete, whatever happened meanwhile
            return Piece(text=text, ending=Ending.STOP, cached=effect.cached)
        return Piece(text=text, ending=effect.ending, reason=effect.reason, cached=effect.cached)

    def _tokens(self, effect: Tokens) -> Piece:
        parts: list[str] = []
        count = 0
        for token in effect.tokens:
            text, count = self._stream.push(token), count + 1
            if self._unsearched > 0:
                self._unsearched -= 1
                parts.append(text)
                continue
            parts.append(self._search.add(text))
            if self.is_stopped:
                break
        return Piece(text="".join(parts), tokens=effect.tokens[:count], logprobs=effect.logprobs[:count])


@dataclass(slots=True)
class _Search:
    """Finds the first of `stops` in text that comes in parts."""

    stops: tuple[str, ...]
    is_found: bool = False
    held: str = ""
    most: int = field(init=False)  # characters that may be the beginning of a stop string

    def __post_init__(self) -> None:
        self.most = max(map(len, self.stops), default=1) - 1

    def add(self, text: str) -> str:
        """What is certain now; ends before the stop string where one is complete."""
        if not text:
            return ""
        seen = self.held + text
        ends = [(at + len(stop), -len(stop)) for stop in self.stops if (at := seen.find(stop)) >= 0]
        if ends:
            end, minus_length = min(ends)
            self.is_found, self.held = True, ""
            return seen[: end + minus_length]
        first = max(len(seen) - self.most, 0)
        start = next((i for i in range(first, len(seen)) if self._may_begin(seen[i:])), len(seen))
        self.held = seen[start:]
        return seen[:start]

    def rest(self) -> str:
        """What was held back, when no more comes."""
        held, self.held = self.held, ""
        return held

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self.stops)
