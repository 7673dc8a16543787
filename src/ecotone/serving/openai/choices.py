"""One choice of an answer, growing: pieces of the engine in, what the API tells of them out, for streams and for wholes.

A stream's parts joined are the whole: both are made here from the same pieces. A choice that did not end well has no
finish_reason; its error is raised by whoever reads the pieces.
"""

from __future__ import annotations

import codecs
import uuid
from collections.abc import Sequence
from typing import Any

from ecotone.decoding.answer import Piece
from ecotone.decoding.frame import TokenLogprobs
from ecotone.decoding.words import Ending
from ecotone.serving.openai.backend import Backend
from ecotone.serving.openai.toolcalls import ToolCall, ToolReader

__all__ = ["ChatChoice", "TextChoice"]


class ChatChoice:
    """`names`: tools whose calls are looked for, none: text alone. `most_calls`: what comes after so many is left out."""

    def __init__(self, backend: Backend, names: Sequence[str], most_calls: int | None, tells_logprobs: bool):
        self._backend, self._most_calls, self._tells = backend, most_calls, tells_logprobs
        self._reader = ToolReader(names) if names else None
        self._text: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._num_told = 0  # entries of `_logprobs` that a delta took
        self.num_tokens = self.num_cached = 0
        self.finish_reason: str | None = None

    @property
    def has_enough(self) -> bool:
        """Whether its request can be ended: the calls that may be are there."""
        return self._most_calls is not None and len(self._calls) >= self._most_calls

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """The deltas that `piece` makes; ends the choice with its last piece or with enough calls."""
        if self.finish_reason is not None:
            return []
        self.num_tokens += len(piece.tokens)
        self.num_cached = max(self.num_cached, piece.cached)
        self._logprobs += [
            _chat_entry(self._backend, t, p) for t, p in zip(piece.tokens, piece.logprobs, strict=bool(piece.logprobs))
        ]
        text, calls = self._reader.push(piece.text) if self._reader else (piece.text, [])
        if piece.ending is not None and self._reader:
            text += self._reader.finish()
        if self._most_calls is not None:
            calls = calls[: self._most_calls - len(self._calls)]
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        self._text.append(text)
        if calls:
            deltas.append({"tool_calls": [self._call(call) for call in calls]})
        if piece.ending is Ending.LENGTH and not self.has_enough:
            self.finish_reason = "length"
        elif piece.ending is Ending.STOP or self.has_enough:
            self.finish_reason = "tool_calls" if self._calls else "stop"
        return deltas

    def logprobs(self, *, whole: bool = False) -> dict[str, Any] | None:
        """Those not told yet, or all; None where they were not asked for."""
        if not self._tells:
            return None
        first, self._num_told = (0 if whole else self._num_told), len(self._logprobs)
        return {"content": self._logprobs[first:], "refusal": None}

    def message(self) -> dict[str, Any]:
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            calls = [{key: value for key, value in call.items() if key != "index"} for call in self._calls]
            message |= {"content": text or None, "tool_calls": calls}
        return message

    def _call(self, call: ToolCall) -> dict[str, Any]:
        made = {"index": len(self._calls), "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        self._calls.append(made | {"function": {"name": call.name, "arguments": call.arguments}})
        return self._calls[-1]


class TextChoice:
    """Of /v1/completions. `echo`: text told before the first piece."""

    def __init__(self, backend: Backend, echo: str, tells_logprobs: bool):
        self._backend, self._tells, self._echo = backend, tells_logprobs, echo
        self._text: list[str] = []
        self._pieces: list[tuple[int, TokenLogprobs]] = []
        self._num_told = 0
        self._offset, self._decoder = len(echo), codecs.getincrementaldecoder("utf-8")("replace")
        self._sum = 0.0
        self.num_tokens = self.num_cached = 0
        self.finish_reason: str | None = None

    @property
    def has_enough(self) -> bool:
        return False

    @property
    def likelihood(self) -> float:
        """Mean logarithm of the tokens' probabilities; needs logprobs."""
        return self._sum / max(len(self._pieces), 1)

    def take(self, piece: Piece) -> str:
        """The text that `piece` adds."""
        self.num_tokens += len(piece.tokens)
        self.num_cached = max(self.num_cached, piece.cached)
        pairs = list(zip(piece.tokens, piece.logprobs, strict=bool(piece.logprobs)))
        self._pieces += pairs
        self._sum += sum(each.logprob for _, each in pairs)
        text = piece.text if self._text else self._echo + piece.text
        self._text.append(text)
        if piece.ending in (Ending.STOP, Ending.LENGTH):
            self.finish_reason = piece.ending.value
        return text

    def logprobs(self) -> dict[str, Any] | None:
        """Of the tokens not told yet; None where they were not asked for."""
        if not self._tells:
            return None
        told: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, each in self._pieces[self._num_told :]:
            text, data = self._backend.token_text(token)
            told["tokens"].append(text)
            told["token_logprobs"].append(each.logprob)
            told["top_logprobs"].append({self._backend.token_text(t)[0]: p for t, p in each.top})
            told["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(data))
        self._num_told = len(self._pieces)
        return dict(told)

    def text(self) -> str:
        return "".join(self._text)


def _chat_entry(backend: Backend, token: int, each: TokenLogprobs) -> dict[str, Any]:
    top = [_named(backend, t, p) for t, p in each.top]
    return _named(backend, token, each.logprob) | {"top_logprobs": top}


def _named(backend: Backend, token: int, logprob: float) -> dict[str, Any]:
    text, data = backend.token_text(token)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}
