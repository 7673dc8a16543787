"""How one request wants its tokens chosen. A value that travels to the stage with the head; nothing is chosen here.

Order of application there, as in transformers: penalties, bias, what a grammar allows, temperature, top-k, top-p, min-p.
Presence and frequency penalties count generated tokens, the repetition penalty the prompt's as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ecotone import schema

__all__ = ["GRAMMARS", "Grammar", "SamplingParams"]

GRAMMARS = ("json", "json_schema", "regex", "lark")
MAX_LOGPROBS = 64
MAX_GRAMMAR_CHARS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the answer must be: any JSON object, JSON of a schema, a regular expression, or a Lark grammar."""

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        wrong = [] if self.kind in GRAMMARS else [f"kind {self.kind!r} is not one of {', '.join(GRAMMARS)}"]
        if len(self.text) > MAX_GRAMMAR_CHARS:
            wrong.append(f"{len(self.text)} characters, at most {MAX_GRAMMAR_CHARS}")
        if self.kind != "json" and not self.text:
            wrong.append(f"kind {self.kind} needs its text")
        schema.check("grammar", wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """`temperature` 0 is the greatest logit. `top_k` 0, `top_p` 1, `min_p` 0, penalties of 0 (repetition: 1) are off.

    `seed`: every choice depends on it, the position and the logits alone; None: one is drawn when the request is handed in.
    `stop_tokens` end the answer and are not part of it; `stop` strings likewise, found by whoever reads the text.
    `logprobs`: None for none, else the chosen token's and so many of the most likely; of the model, before any change.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        schema.check("sampling", self._violations())

    def _violations(self) -> Iterator[str]:
        if self.max_tokens < 1 or not 0 <= self.min_tokens <= self.max_tokens:
            yield f"max_tokens {self.max_tokens} must be 1 or more, min_tokens {self.min_tokens} from 0 to that"
        numbers = {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
        numbers |= {"presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty}
        yield from (f"{name} must be finite" for name, value in numbers.items() if not math.isfinite(value))
        if not 0 <= self.temperature <= 100:
            yield f"temperature {self.temperature} must be from 0 to 100"
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            yield f"top_p {self.top_p} must be above 0 and at most 1, min_p {self.min_p} from 0 to 1"
        if self.top_k < 0:
            yield f"top_k {self.top_k} must not be negative; 0 means off"
        if not 0 < self.repetition_penalty <= 100 or max(abs(self.presence_penalty), abs(self.frequency_penalty)) > 100:
            yield "the repetition penalty must be above 0, no penalty above 100"
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            yield f"seed {self.seed} must be from 0 to 2^64 - 1"
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            yield f"logprobs {self.logprobs} must be from 0 to {MAX_LOGPROBS}"
        if any(token < 0 or not math.isfinite(bias) or abs(bias) > 1000 for token, bias in self.logit_bias):
            yield "logit_bias must be pairs of a token id and a number from -1000 to 1000"
        if any(token < 0 for token in self.stop_tokens) or any(not text for text in self.stop):
            yield "stop tokens must not be negative, stop strings not empty"

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """Whether the greatest logit is chosen whatever came before: no noise, no penalty, no bias, no grammar."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1, self.min_tokens
        return self.is_greedy and not any(penalties) and not self.logit_bias and self.grammar is None

    def to_bytes(self) -> bytes:
        return json.dumps(schema.write(self), separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes) -> SamplingParams:
        """Read what `to_bytes` wrote; raises SchemaError."""
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise schema.SchemaError("sampling", [f"not JSON: {str(error)[:80]}"]) from None
        return schema.read(SamplingParams, document, "sampling")
