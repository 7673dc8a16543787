"""Whether a kind of decoding keeps what was expected of it: seconds from frame to frame, and tokens of a frame.

A model of what pays (window.py) knows loops, stages and acceptance. It does not know that drafter, driver and stages share a
processor, that a link is busier than it was, or that right drafts come in runs, which a frame of few rows cuts short. So
each kind of decoding (plain, drafts with the settled token, frames of drafts) has a slowness: seconds over those expected,
of late, by tokens over those expected, of long, since they vary more. The policy leaves out what does not pay by that. A
kind that lost is not seen any more, so what is known of it is dropped after a rest, longer each time: it gets another trial.
Trials are short beside rests, so what they cost stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ecotone.decoding.speculation import Kind

__all__ = ["Worth"]

_FADE, _LONG_FADE = 0.98, 0.995  # per token
_TRIAL = 32  # tokens before a kind is judged
_HICCUP = 3.0  # times what was expected: more is not held against a kind
_REST, _MOST_REST = 256, 4096
_OTHER = 2.0  # so many times the loop that was: another world


@dataclass(slots=True)
class _Record:
    """Of one kind of decoding. `idle`: tokens that came by others since."""

    seconds: float = 0.0
    expected_s: float = 0.0
    tokens: float = 0.0
    expected: float = 0.0
    count: int = 0
    idle: int = 0
    rest: int = _REST

    def add(self, seconds: float, expected_s: float, tokens: int, expected: float) -> None:
        usual = max(self.seconds / self.expected_s, 1.0) if self.expected_s else 1.0
        seconds, fade, long = min(seconds, _HICCUP * usual * expected_s), _FADE**tokens, _LONG_FADE**tokens
        self.seconds, self.expected_s = fade * self.seconds + seconds, fade * self.expected_s + expected_s
        self.tokens, self.expected = long * self.tokens + tokens, long * self.expected + expected
        self.count += tokens
        self.idle = 0
        if self.count >= _REST:  # it is in use
            self.rest = _REST

    def rested(self, tokens: int) -> None:
        """Others had so many tokens."""
        self.idle += tokens
        if self.count and self.idle >= self.rest:
            self.seconds, self.expected_s, self.count = 0.0, 0.0, 0
            self.rest = min(2 * self.rest, _MOST_REST)

    @property
    def slowness(self) -> float:
        if self.count < _TRIAL:
            return 1.0
        return self.seconds / self.expected_s * (self.expected + _TRIAL) / (self.tokens + _TRIAL)


@dataclass(slots=True)
class Worth:
    """Of one pipeline, while one request decodes: with more, what each gets says nothing of drafting."""

    _records: dict[Kind, _Record] = field(default_factory=lambda: {kind: _Record() for kind in Kind})
    _loop_s: float = 0.0

    def at(self, loop_s: float) -> tuple[float, ...]:
        """The slowness by Kind, 1 where too little is known, in a pipeline with this loop.

        Where the loop is quite another than when it was learned, all is forgotten: links changed.
        """
        if not self._loop_s / _OTHER <= loop_s <= self._loop_s * _OTHER:
            self._loop_s, self._records = loop_s, {kind: _Record() for kind in Kind}
        return tuple(self._records[kind].slowness for kind in Kind)

    def told(self, kind: Kind, seconds: float, tokens: int, expected_s: float, expected: float = 1.0) -> None:
        """`tokens` came `seconds` after those before, by this kind of decoding; `expected` were after `expected_s`."""
        for each, record in self._records.items():
            if each is not kind:
                record.rested(tokens)
            elif expected_s > 0:
                record.add(seconds, expected_s, tokens, expected)
