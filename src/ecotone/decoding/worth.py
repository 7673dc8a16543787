"""Whether drafting has paid: seconds per token as they came with drafts in flight, beside those of plain decoding.

A model of what pays (window.py) knows loops, stages and acceptance. It does not know that drafter, driver and stages share a
processor, or that a link is busier than it was. So the policy's choice is held against what came of it: where tokens came
more slowly than they do without drafts, drafting rests for a while, longer each time, and is tried again. Trials are
short beside rests, so what they cost stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Worth"]

_FADE = 0.97  # per token
_TRIAL, _KNOWN = 16, 4  # tokens of a trial; plain tokens that must have been timed
_OTHER = 1.5  # plain decoding is so many times as fast or slow as when a rest began: it is another world
_SLOWER = 1.01
_REST, _MOST_REST = 256, 4096


@dataclass(slots=True)
class _Rate:
    seconds: float = 0.0
    tokens: float = 0.0
    count: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        fade = _FADE**tokens
        self.seconds, self.tokens = fade * self.seconds + seconds, fade * self.tokens + tokens
        self.count += tokens

    @property
    def per_token_s(self) -> float:
        return self.seconds / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class Worth:
    """Of one pipeline, while one request decodes: with more, what each gets says nothing of drafting."""

    _plain: _Rate = field(default_factory=_Rate)
    _drafted: _Rate = field(default_factory=_Rate)
    _rest_left: int = 0
    _rest: int = _REST
    _began_s: float = 0.0  # plain seconds per token when the rest began

    @property
    def is_resting(self) -> bool:
        return self._rest_left > 0

    def told(self, seconds: float, tokens: int, *, is_drafted: bool) -> None:
        """`tokens` came `seconds` after those before them, with drafting or without."""
        if not is_drafted:
            self._plain.add(seconds, tokens)
            self._rest_left = max(self._rest_left - tokens, 0)
            if self._rest_left and not 1 / _OTHER < self._plain.per_token_s / self._began_s < _OTHER:
                self._rest_left, self._rest = 0, _REST
            return
        self._drafted.add(seconds, tokens)
        if self._drafted.count < _TRIAL or self._plain.count < _KNOWN:
            return
        if self._drafted.per_token_s > _SLOWER * self._plain.per_token_s:
            self._rest_left, self._rest = self._rest, min(2 * self._rest, _MOST_REST)
            self._drafted, self._began_s = _Rate(), self._plain.per_token_s
        else:
            self._rest = max(self._rest // 2, _REST)
            self._drafted.count = 0  # looked at again after as many tokens
