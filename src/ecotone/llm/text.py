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
MAX_WINDOW_TOKENS = 64  # bytes that are no text for so long are told as they are


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: printable ones stand for themselves, others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()


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

    def token_text(self, token: int) -> tuple[str, bytes]:
        """One token alone: for people, and the bytes that it stands for where they are known (byte-level tokenizers)."""
        shown = self.decode([token], special=True)
        if UNFINISHED not in shown:
            return shown, shown.encode()
        piece = str(self.tokenizer.convert_ids_to_tokens(int(token)))
        found = [_BYTES.get(character) for character in piece]
        whole = bytes(b for b in found if b is not None)
        return shown, whole if len(whole) == len(piece) else shown.encode()

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
    """Text piece by piece: `push(token)` gives what is certain, `finish()` what was held back.

    Decodes a short window of tokens, since tokenizers join pieces with regard to neighbours; what was told of the
    window's text before is left out. Decoders end in replacement characters where the last bytes are not a whole
    character: those are held back (one per character or one per byte, and then also for whole ones in the same run of
    byte tokens, which were told already). Where all is whole the window moves on, to the tokens since it last did.
    """

    def __init__(self, model: TextModel, special: bool):
        self._model, self._special = model, special
        self._skipped = frozenset() if special else frozenset(model.tokenizer.all_special_ids)
        self._window: list[int] = []
        self._fresh = 0  # index in the window of the first token after the last whole point
        self._told = 0  # characters of the window's text that were given out

    def push(self, token: int) -> str:
        """What `token` makes certain of the text; "" while a character is not whole."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        whole = self._model.decode(self._window, self._special)
        is_open = whole.endswith(UNFINISHED) and len(self._window) <= MAX_WINDOW_TOKENS
        piece = (whole.rstrip(UNFINISHED) if is_open else whole)[self._told :]
        self._told += len(piece)
        if not is_open:
            self._move()
        return piece

    def finish(self) -> str:
        """The rest: bytes that never became a character, as a replacement character."""
        piece = self._model.decode(self._window, self._special)[self._told :] if self._window else ""
        self._told += len(piece)
        return piece

    def _move(self) -> None:
        fresh = self._window[self._fresh :]
        if told := self._model.decode(fresh, self._special):  # a window must begin with text, to be context for the next
            self._window, self._fresh, self._told = fresh, len(fresh), len(told)
