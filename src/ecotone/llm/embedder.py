"""A text encoder as the HTTP server sees one (ecotone.serving.openai.backend.Embedder), whoever computes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ecotone.llm.encoders import Infer, TextEncoder

__all__ = ["EncoderBackend"]


class EncoderBackend:
    """`infer` by the length that it was captured for. `is_ready` says whether it can be asked now."""

    is_nested = False

    def __init__(self, name: str, encoder: TextEncoder, infer: Mapping[int, Infer], is_ready: Callable[[], bool]):
        self.name, self.created_s = name, int(time.time())
        self.context, self.size = max(infer), encoder.width
        self.vocabulary = encoder.text.vocabulary
        self.is_ready = is_ready
        self._encoder, self._infer = encoder, infer

    def encode(self, text: str) -> list[int]:
        """All token ids of `text`: the server refuses what is longer than `context`."""
        return self._encoder.tokens([text], 1 << 20)[0]

    def embed(self, inputs: Sequence[Sequence[int]]) -> Sequence[Sequence[float]]:
        return [[float(v) for v in row] for row in self._encoder.embed_tokens(inputs, self._infer)]
