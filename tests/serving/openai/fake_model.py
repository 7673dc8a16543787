"""A small language model of bytes with an engine thread, for the server to stand before: no weights, real tokens and pace.

Token ids are bytes, 256 ends a text, 257 begins a chat. The prompt's last line says what is answered:
  say TEXT             TEXT, then the end            count            1 2 3 ... until stopped by max_tokens
  seed                 the seed asked for            hold TEXT        TEXT, then nothing until cancelled
  fail ENDING [N]      N tokens, then that ending    anything else    the line backwards
Where there is a grammar the answer is made by llguidance over bytes, so whatever it makes the grammar really allows.
"""

from __future__ import annotations

import codecs
import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import llguidance
import llguidance.numpy as masks

from ecotone.decoding.answer import OnPiece, Piece
from ecotone.decoding.engine import Measured
from ecotone.decoding.frame import TokenLogprobs
from ecotone.decoding.params import Grammar, SamplingParams
from ecotone.decoding.words import Ending
from ecotone.units import EcotoneError

END, BEGIN = 256, 257
PREFERRED = b'"}]0aeiou1'  # what closes things first, so that answers stay short
SPACES = frozenset(b" \t\r\n")


@dataclass(slots=True)
class Active:
    """A request that runs: its tokens come one a round."""

    prompt: tuple[int, ...]
    params: SamplingParams
    on_piece: OnPiece
    deadline_s: float | None
    tokens: Iterator[int | Ending]
    made: list[int] = field(default_factory=list)
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    cached: int = 0
    is_held: bool = False


class FakeModel:
    """A Backend. `queue_limit` requests at once; `cancelled`, `seen` and `templates` are for tests to look at."""

    name, created_s, vocabulary, stop_tokens = "bytes", 1_700_000_000, 258, (END,)

    def __init__(self, context: int = 4096, queue_limit: int = 10_000, pace_s: float = 0.0):
        self.context, self._queue_limit, self._pace_s = context, queue_limit, pace_s
        self.ready = True
        self.seen: list[tuple[tuple[int, ...], SamplingParams, int]] = []
        self.templates: list[tuple[list[Any], Any]] = []
        self.cancelled: list[int] = []
        self._numbers = itertools.count(1)
        self._active: dict[int, Active] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="fake-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout=10)

    # ---- text ------------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
        self.templates.append((list(messages), tools))
        if messages[0]["content"] == "refuse":
            raise EcotoneError("the chat template refuses these messages: no")
        shown = json.dumps(tools) + "\n" if tools else ""
        return [BEGIN, *(shown + "\n".join(m["content"] for m in messages)).encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode("utf-8", "replace")

    def token_text(self, token: int) -> tuple[str, bytes]:
        data = bytes([token]) if token < 256 else b""
        return data.decode("utf-8", "replace"), data

    # ---- requests --------------------------------------------------------------------------------------------------------

    def check(self, params: SamplingParams) -> None:
        if params.grammar is not None and (
            wrong := llguidance.LLMatcher.validate_grammar(_compiled(params.grammar), _BYTES)
        ):
            raise EcotoneError(f"the grammar does not compile: {wrong.splitlines()[0]}")

    def start(
        self, prompt: Sequence[int], params: SamplingParams, on_piece: OnPiece, *, priority: int = 0,
        deadline_s: float | None = None,
    ) -> int:  # fmt: skip
        number = next(self._numbers)
        self.seen.append((tuple(prompt), params, priority))
        due_s = None if deadline_s is None else time.monotonic() + deadline_s
        active = Active(tuple(prompt), params, on_piece, due_s, self._tokens(tuple(prompt), params))
        with self._changed:
            if len(self._active) >= self._queue_limit:
                on_piece(Piece(ending=Ending.BUSY, reason="0 requests wait already; try again later"))
                return number
            active.cached = max((len(a.prompt) for a in self._active.values() if a.prompt == active.prompt), default=0)
            self._active[number] = active
            self._changed.notify_all()
        return number

    def cancel(self, request: int) -> None:
        with self._changed:
            if request in self._active:
                self.cancelled.append(request)
                active = self._active.pop(request)
                active.on_piece(Piece(ending=Ending.CANCELLED, reason="cancelled"))
                self._changed.notify_all()

    def wait_cancelled(self, count: int = 1, timeout_s: float = 20.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: len(self.cancelled) >= count, timeout_s)

    def wait_active(self, timeout_s: float = 20.0) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._active), timeout_s)

    def is_ready(self) -> bool:
        return self.ready

    def status(self) -> dict[str, Any]:
        return {"plan": "all here"}

    def fingerprint(self) -> str | None:
        return "fp_bytes"

    def measured(self) -> Measured:
        return Measured(
            mode="running", epoch=2, num_waiting=0, num_active=len(self._active), num_flying=1, num_cached_sequences=3,
            free_blocks=6, total_blocks=8, loop_s=0.5, stage_s=0.2, network_s=0.1, wait_s=0.0, frame_s=0.0,
            stage_times_s=(0.2, 0.2), depth=3, acceptance=0.75,
            counts={"prompt_tokens": 10, "cached_tokens": 4, "drafts_judged": 8, "losses": 1},
        )  # fmt: skip

    def _work(self) -> None:
        while True:
            with self._changed:
                runs = [(n, a) for n, a in self._active.items() if not a.is_held]
                if not runs and not self._is_closed:
                    due = [a.deadline_s for a in self._active.values() if a.deadline_s is not None]
                    self._changed.wait(max(0.0, min(due) - time.monotonic()) if due else None)
                if self._is_closed:
                    return
                for number, active in list(self._active.items()):
                    self._round(number, active)
            if self._pace_s:
                time.sleep(self._pace_s)  # the pace of a model, not a wait for something

    def _round(self, number: int, active: Active) -> None:
        if active.deadline_s is not None and time.monotonic() >= active.deadline_s:
            piece = Piece(ending=Ending.DEADLINE, reason="its deadline came before its end")
        elif active.is_held:
            return
        else:
            piece = self._piece(active)
        active.on_piece(piece)
        if piece.ending is not None:
            self._active.pop(number, None)

    def _piece(self, active: Active) -> Piece:
        token = next(active.tokens)
        if isinstance(token, Ending):
            active.is_held = token is Ending.CANCELLED
            if active.is_held:
                return Piece()
            return Piece(ending=token, cached=active.cached, reason="" if token.value in _GOOD else "as was asked")
        active.made.append(token)
        text = active.decoder.decode(bytes([token]))
        logprobs: tuple[TokenLogprobs, ...] = ()
        if active.params.logprobs is not None:
            top = ((token, -0.5), ((token + 1) % 256, -1.5))[: active.params.logprobs]
            logprobs = (TokenLogprobs(-0.5 - (active.params.seed or 0), top),)
        for stop in active.params.stop:
            if token == ord(stop):  # stop strings are one byte here, so no text has to be held back for them
                return Piece(text="", tokens=(token,), logprobs=logprobs, ending=Ending.STOP, cached=active.cached)
        is_full = len(active.made) >= active.params.max_tokens
        ending = Ending.LENGTH if is_full else None
        return Piece(text=text, tokens=(token,), logprobs=logprobs, ending=ending, cached=active.cached * is_full)

    def _tokens(self, prompt: tuple[int, ...], params: SamplingParams) -> Iterator[int | Ending]:
        line = self.decode(prompt).splitlines()[-1] if prompt else ""
        word, _, rest = line.partition(" ")
        if params.grammar is not None:
            yield from _allowed(params.grammar)
        elif word == "count":
            yield from itertools.chain.from_iterable(f"{i} ".encode() for i in itertools.count(1))
        elif word == "hold":
            yield from (rest or "x").encode()
            yield Ending.CANCELLED
        elif word == "fail":
            ending, _, count = rest.partition(" ")
            yield from b"x" * int(count or 0)
            yield Ending(ending)
        else:
            text = rest if word == "say" else str(params.seed) if word == "seed" else line[::-1]
            yield from text.replace("\\n", "\n").encode()
        yield Ending.STOP


_GOOD = ("stop", "length")
_BYTES = llguidance.LLTokenizer("byte")


def _compiled(grammar: Grammar) -> str:
    makers: dict[str, Any] = {
        "json": lambda text: llguidance.LLMatcher.grammar_from_json_schema('{"type": "object"}'),
        "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
        "regex": llguidance.LLMatcher.grammar_from_regex,
        "lark": llguidance.LLMatcher.grammar_from_lark,
    }
    return str(makers[grammar.kind](grammar.text))


def _allowed(grammar: Grammar) -> Iterator[int]:
    """Bytes that the grammar allows, the preferred ones first, until it may end."""
    matcher = llguidance.LLMatcher(_BYTES, _compiled(grammar))
    bitmask = masks.allocate_token_bitmask(1, _BYTES.vocab_size)
    while not matcher.is_accepting() or grammar.kind == "regex":
        if matcher.is_stopped():
            return
        masks.fill_next_token_bitmask(matcher, bitmask)
        allowed = [t for t in range(256) if bitmask[0][t // 32] >> (t % 32) & 1]
        if not allowed:
            return
        solid = [t for t in allowed if t not in SPACES] or allowed
        token = next((t for t in PREFERRED if t in solid), solid[0])
        matcher.consume_token(token)
        yield token


@dataclass(frozen=True, slots=True)
class FakeEmbedder:
    """Vectors of byte counts: [number, sum, first, last]."""

    name: str = "byte-vectors"
    created_s: int = 1_700_000_000
    context: int = 64
    vocabulary: int = 256
    size: int = 4
    is_nested: bool = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[float(len(x)), float(sum(x)), float(x[0]), float(x[-1])] for x in inputs]

    def is_ready(self) -> bool:
        return True
