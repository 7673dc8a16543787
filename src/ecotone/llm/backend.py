"""A generator and its tokenizer as the HTTP server sees a language model (ecotone.serving.openai.backend.Backend)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ecotone.decoding.answer import OnPiece
from ecotone.decoding.engine import Measured
from ecotone.decoding.params import SamplingParams
from ecotone.llm.generator import Generator
from ecotone.llm.text import TextModel
from ecotone.units import EcotoneError

__all__ = ["LlmBackend"]


class LlmBackend:
    """`check(params)` raises EcotoneError for what cannot be answered; `about` is shown at /status beside what is measured.

    `stop_tokens` end every answer: those of the tokenizer and of the model's generation settings.
    """

    def __init__(
        self,
        name: str,
        generator: Generator,
        text: TextModel,
        vocabulary: int,
        stop_tokens: Sequence[int],
        check: Callable[[SamplingParams], None],
        about: Callable[[], dict[str, Any]] | None = None,
    ):
        self.name, self.created_s = name, int(time.time())
        self.context, self.vocabulary, self.stop_tokens = generator.plan.context, vocabulary, tuple(stop_tokens)
        self._generator, self._text, self._check, self._about = generator, text, check, about
        self._last: tuple[float, Measured] | None = None

    def encode(self, text: str) -> list[int]:
        return self._text.encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
        return self._text.encode_chat(messages, tools)

    def token_text(self, token: int) -> tuple[str, bytes]:
        return self._text.token_text(token)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._text.decode(tokens)

    def check(self, params: SamplingParams) -> None:
        self._check(params)

    def start(
        self, prompt: Sequence[int], params: SamplingParams, on_piece: OnPiece, *, priority: int = 0,
        deadline_s: float | None = None,
    ) -> int:  # fmt: skip
        wrong = next((token for token in prompt if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise EcotoneError(f"token {wrong} is not one of the model's {self.vocabulary}")
        return self._generator.submit(prompt, params, on_piece, priority=priority, deadline_s=deadline_s)

    def cancel(self, request: int) -> None:
        self._generator.cancel(request)

    def is_ready(self) -> bool:
        return self._generator.is_running

    def status(self) -> dict[str, Any]:
        plan = self._generator.plan
        shown = {"plan": str(plan), "context": plan.context, "slots": plan.max_slots, "mode": self.measured().mode}
        return shown | (self._about() if self._about is not None else {})

    def measured(self) -> Measured:
        """Newer than a quarter of a second, so that many who ask do not hold up the engine."""
        now_s = time.monotonic()
        if self._last is None or now_s - self._last[0] > 0.25:
            self._last = (now_s, self._generator.measured())
        return self._last[1]

    def fingerprint(self) -> str | None:
        return f"fp_{self._generator.plan.identity()[:12]}"
