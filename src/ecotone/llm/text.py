"""Tokens and text: a model's own tokenizer and chat template, and text that grows token by token.

A tokenizer is read from tokenizer.json (or what transformers makes of the directory); code from a model directory is
never run. Streaming holds back bytes that are not a whole character yet, so the pieces joined are the text decoded at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecotone.llm.config import ModelError

__all__ = ["Detokeniser", "TextModel"]

UNFINISHED = "\ufffd"  # what decoders put in place of bytes that are not a character
MAX_HELD_TOKENS = 8  # a character has at most 4 bytes: longer than this, the bytes are simply not text


@dataclass(frozen=True, slots=True)
class TextModel:
    """The tokenizer and chat template of one model directory. Open with `TextModel.open`."""

    tokenizer: Any
    where: str

    @staticmethod
    def open(folder: Path) -> TextModel:
        """The tokenizer in `folder`; raises ModelError where there is none that can be read."""
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ModelError('tokenizers need transformers; pip install "ecotone[hub]"') from None
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise ModelError(f"{folder} has no tokenizer.json; give a model directory with its tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken file makes the library raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise ModelError(f"{folder}: the tokenizer cannot be read: {reason}") from None
        return TextModel(tokenizer, str(folder))

    @property
    def vocabulary(self) -> int:
        return len(self.tokenizer)

    @property
    def stop_token(self) -> int | None:
        """The token that ends a text, where the tokenizer names one."""
        stop = self.tokenizer.eos_token_id
        return None if stop is None else int(stop)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the model expects around a text (a begin token)."""
        return [int(t) for t in self.tokenizer.encode(text, add_special_tokens=special, verbose=False)]

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """The text of `tokens`; `special` keeps tokens such as the end of a text."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, answer: bool = True
    ) -> str:
        """The conversation as the text that the model was trained on, with the head of an answer after it if `answer`.

        Raises ModelError where the model has no template or its template refuses the messages.
        """
        if not self.has_chat_template:
            raise ModelError(f"{self.where} has no chat template; use plain completions")
        try:
            made = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tools=tools and list(tools), add_generation_prompt=answer, tokenize=False
            )
        except Exception as error:  # templates raise errors of their own and of jinja's
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise ModelError(f"{self.where}: its chat template refuses these messages: {reason}") from None
        return str(made)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of `render`: a template writes its own begin token, so none is added."""
        return self.encode(self.render(messages, tools), special=False)

    def stream(self, special: bool = False) -> Detokeniser:
        """A fresh Detokeniser."""
        return Detokeniser(self, special)


class Detokeniser:
    """Text piece by piece: `push(token)` gives what is certain, `finish()` what was held back. O(1) tokens per push.

    Decodes a short window of tokens that began on a character, since tokenizers join pieces with regard to neighbours;
    what is new is the difference to the window's text before.
    """

    def __init__(self, model: TextModel, special: bool):
        self._model, self._special = model, special
        self._window: list[int] = []  # tokens since the last one whose text is settled, that one first
        self._settled = 0  # how many of them are told already
        self.text = ""

    def push(self, token: int) -> str:
        """What `token` makes certain of the text; "" while a character is not whole."""
        self._window.append(token)
        piece = self._new()
        if piece.endswith(UNFINISHED) and len(self._window) - self._settled < MAX_HELD_TOKENS:
            return ""
        return self._tell(piece)

    def finish(self) -> str:
        """The rest: bytes that never became a character, as replacement characters."""
        return self._tell(self._new()) if len(self._window) > self._settled else ""

    def _new(self) -> str:
        before = self._model.decode(self._window[: self._settled], self._special)
        return self._model.decode(self._window, self._special)[len(before) :]

    def _tell(self, piece: str) -> str:
        if piece:
            self._window, self._settled = self._window[self._settled :], len(self._window) - self._settled
            self.text += piece
        return piece
