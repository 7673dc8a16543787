"""Answers that keep to a grammar: which tokens may follow, by llguidance (Earley parser over lexer derivatives).

A grammar is compiled once and kept; each request gets its own state, which follows the tokens of its sequence forwards
and, where drafts were refused, backwards. Where the answer is complete only tokens that end it may follow, so something
always may. The compiler of llguidance recurses as deep as a grammar refers to itself and would overflow an ordinary stack
on hostile ones (a chain of a thousand `$ref`s): it runs on a thread with a stack that the size of a grammar bounds.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ecotone.decoding.params import Grammar, SamplingParams
from ecotone.llm.sampling import Mask, agreeing
from ecotone.llm.text import TextModel
from ecotone.units import EcotoneError

__all__ = ["GrammarError", "Grammars"]

Array = np.ndarray[Any, Any]
_KEPT = 64
_STACK_BYTES = 256 << 20  # address space; memory only as far as it is used
_SPACE = r"[ ]|\n[ ]{0,12}"  # between the parts of JSON: enough to indent, too little to go on for ever
_stack_lock = threading.Lock()


class GrammarError(EcotoneError):
    """A grammar cannot be compiled or is too complex, or nothing here can keep to one."""


class Grammars:
    """Compiles grammars for one model of `vocabulary` tokens. Thread-safe.

    `stop_tokens` end a text of this model (DecoderConfig.stop_tokens); without any, those of the tokenizer.
    """

    def __init__(self, text: TextModel, vocabulary: int, stop_tokens: Iterable[int] = ()):
        own = [] if text.stop_token is None else [text.stop_token]
        self._ends = tuple(token for token in (tuple(stop_tokens) or own) if 0 <= token < vocabulary)
        self._text, self._vocabulary = text, vocabulary
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Raise GrammarError, in one line, where `grammar` cannot be used with this model.

        For whoever takes requests in, before a request is handed in. A hostile grammar can take seconds.
        """
        self._compile(grammar)

    def begin(self, params: SamplingParams, prompt_length: int) -> Mask:
        """The state of a request whose parameters have a grammar; raises GrammarError."""
        assert params.grammar is not None
        matcher = self._compile(params.grammar)
        return _Follower(matcher, prompt_length, self._vocabulary, params.stop_tokens, self._ends)

    def _compile(self, grammar: Grammar) -> Any:
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
            if self._tokenizer is None:
                self._tokenizer = _bridge(self._text, self._vocabulary, self._ends)
        found: list[Any] = []
        with _stack_lock:
            before = threading.stack_size(_STACK_BYTES)
            try:
                worker = threading.Thread(target=lambda: found.append(_matcher(grammar, self._tokenizer)), daemon=True)
                worker.start()
            finally:
                threading.stack_size(before)
        worker.join()
        matcher, reason = found[0] if found else (None, "the compiler failed")
        if matcher is None:
            raise GrammarError(f"grammar of kind {grammar.kind}: {reason}")
        with self._lock:
            self._compiled[grammar] = matcher
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return matcher


def _bridge(text: TextModel, vocabulary: int, ends: Sequence[int]) -> Any:
    """The tokenizer as llguidance sees it: the bytes of every token, and which ones end a text."""
    try:
        import llguidance
    except ImportError:
        raise GrammarError('answers by a grammar need llguidance; pip install "ecotone[llm]"') from None
    if not ends:
        raise GrammarError(f"{text.where} names no token that ends a text, so an answer by a grammar could not end")
    backend = getattr(text.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise GrammarError(f"{text.where} has no tokenizer.json, which answers by a grammar need")
    document = json.loads(backend.to_str())
    document["padding"] = document["truncation"] = None  # of batches, not of the bytes of tokens
    try:
        return llguidance.LLTokenizer(json.dumps(document), n_vocab=max(vocabulary, text.vocabulary), eos_token=list(ends))
    except Exception as error:  # whatever a tokenizer that it does not know makes the library raise
        raise GrammarError(f"{text.where}: llguidance cannot read the tokenizer: {_line(error)}") from None


def _matcher(grammar: Grammar, tokenizer: Any) -> tuple[Any, str]:
    """(fresh matcher, "") or (None, why not)."""
    import llguidance

    try:
        made = llguidance.LLMatcher(tokenizer, _source(grammar, llguidance.LLMatcher), log_level=0)
    except (ValueError, RecursionError) as error:
        return None, _line(error)
    if made.is_error():
        return None, _line(made.get_error())
    made.compute_bitmask()
    return (None, f"no text satisfies it ({_line(made.get_error())})") if made.is_error() else (made, "")


def _source(grammar: Grammar, matcher: Any) -> str:
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.text))
    if grammar.kind == "lark":
        return str(matcher.grammar_from_lark(grammar.text))
    schema = json.loads(grammar.text) if grammar.kind == "json_schema" else {"type": "object"}
    if not isinstance(schema, dict):
        raise ValueError("the schema must be a JSON object")
    return str(matcher.grammar_from_json_schema(json.dumps(schema), defaults={"whitespace_pattern": _SPACE}))


def _line(error: object) -> str:
    """The lines of a message that say something, as one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([*lines[:1], *(line for line in lines[1:] if line.startswith("error:"))])[:240] or type(error).__name__


class _Follower:
    """The mask of one request. Tokens that end the answer are not given to the parser: behind them nothing counts."""

    def __init__(self, compiled: Any, prompt_length: int, vocabulary: int, stop_tokens: Sequence[int], ends: Sequence[int]):
        self._compiled, self._matcher = compiled, compiled.deep_copy()
        self._prompt_length, self._vocabulary = prompt_length, vocabulary
        stops = [token for token in stop_tokens if token < vocabulary]
        self._final = np.array(stops or ends, dtype=np.int64)  # without stop tokens the text ends, the request goes on
        self._ends = frozenset((*stops, *ends))
        self._unused = np.array(sorted(set(ends) - set(self._final.tolist())), dtype=np.int64)
        self._taken: list[int] = []

    def allowed(self, tokens: Sequence[int]) -> Array | None:
        """See Mask. None for tokens that the grammar forbids: refused drafts, after which no choice counts."""
        answer = list(tokens[self._prompt_length :])
        answer = answer[: next((i for i, token in enumerate(answer) if token in self._ends), len(answer))]
        is_over = len(answer) < len(tokens) - self._prompt_length
        if not self._follow(answer):
            return None
        mask = np.zeros(self._vocabulary, dtype=bool)
        if not is_over:
            mask = self._bits()
            mask[self._unused] = False
        if is_over or not mask.any() or self._matcher.is_accepting():
            mask[self._final] = True
        return mask

    def _follow(self, answer: list[int]) -> bool:
        """Bring the parser to behind `answer`; False where it does not get there."""
        agreed = agreeing(self._taken, answer)
        if agreed < len(self._taken) and not self._matcher.rollback(len(self._taken) - agreed):
            self._matcher, agreed = self._compiled.deep_copy(), 0
        count = self._matcher.try_consume_tokens(answer[agreed:]) if agreed < len(answer) else 0
        self._taken = answer[: agreed + count]
        if self._matcher.is_error():
            raise GrammarError(f"the grammar is too complex to go on: {_line(self._matcher.get_error())}")
        return len(self._taken) == len(answer)

    def _bits(self) -> Array:
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise GrammarError(f"the grammar is too complex to go on: {_line(self._matcher.get_error())}")
        return bits[: self._vocabulary].astype(bool)
