"""From a request's fields to SamplingParams: OpenAI's options, and those that vLLM's clients send beside them.

The greatest number of new tokens is only known beside the prompt, so a `Wish` is read first and settled then. Choice i of
a request with a seed gets seed + i: the same request gives the same choices.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ecotone.decoding.params import Grammar, SamplingParams
from ecotone.serving.openai.errors import bad_value, too_long
from ecotone.serving.openai.fields import Fields
from ecotone.units import EcotoneError

__all__ = ["EXTRA_FIELDS", "OPENAI_FIELDS", "Wish", "read_wish"]

OPENAI_FIELDS = frozenset(
    {"temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "max_tokens", "n",
     "logprobs", "stream", "stream_options", "user", "model"}
)  # fmt: skip
EXTRA_FIELDS = frozenset(
    {"top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "priority", "deadline_s",
     "guided_json", "guided_regex", "guided_grammar", "guided_choice", "structured_outputs"}
)  # fmt: skip
MOST_STOPS, MOST_STOP_CHARS = 16, 1024
MOST_TOKENS = 1 << 30
LEAST_TOP_P = 1e-9  # top_p 0 means the most likely token alone
_REGEX_SPECIAL = frozenset(".^$*+?{}[]\\|()/-&~#")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a request asks of the choice of its tokens. `most`: new tokens where it says so, named by field `most_field`."""

    params: SamplingParams
    most: int | None
    most_field: str
    default_most: int | None  # where the request does not say; None: what the context leaves
    priority: int
    deadline_s: float | None

    def settled(self, prompt_tokens: int, context: int, choice: int, param: str) -> SamplingParams:
        """The parameters of choice `choice` after a prompt of so many tokens; raises ApiError where they do not fit."""
        room = context - prompt_tokens
        if room < 1:
            message = f"the prompt has {prompt_tokens} tokens, the context {context}: at most {context - 1} leave room for"
            raise too_long(param, f"{message} an answer; shorten the prompt")
        if self.most is not None and self.most > room:
            message = f"the prompt has {prompt_tokens} tokens and {self.most_field} asks for {self.most} more"
            raise too_long(self.most_field, f"{message}; the context is {context} tokens, so at most {room}")
        most = self.most or min(room, self.default_most or room)
        if self.params.min_tokens > most:
            raise bad_value("min_tokens", f"min_tokens {self.params.min_tokens} is more than the {most} tokens there may be")
        seed = self.params.seed
        seed = None if seed is None else (seed + choice) % (1 << 64)
        return dataclasses.replace(self.params, max_tokens=most, seed=seed)


def read_wish(
    fields: Fields,
    *,
    vocabulary: int,
    stop_tokens: tuple[int, ...],
    logprobs: int | None,
    grammar: Grammar | None,
    most_field: str,
    default_most: int | None,
) -> Wish:
    """Read the common options; `logprobs` and a `grammar` of response_format or tools were read by the caller."""
    guided = _guided(fields)
    if guided is not None and grammar is not None:
        raise bad_value(guided[0], f"{guided[0]} cannot be combined with response_format or a required tool")
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    seed = fields.integer("seed", None, -(1 << 63), (1 << 64) - 1)
    own_stops = () if fields.flag("ignore_eos") else stop_tokens
    try:
        params = SamplingParams(
            max_tokens=MOST_TOKENS,
            min_tokens=fields.integer("min_tokens", 0, 0, MOST_TOKENS),
            temperature=fields.number("temperature", 1.0, 0.0, 2.0),
            top_k=max(fields.integer("top_k", 0, -1, 1 << 30), 0),
            top_p=max(top_p, LEAST_TOP_P),
            min_p=fields.number("min_p", 0.0, 0.0, 1.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100.0),
            presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
            logit_bias=_logit_bias(fields, vocabulary),
            seed=None if seed is None else seed % (1 << 64),
            stop_tokens=(*own_stops, *_token_ids(fields, "stop_token_ids", vocabulary)),
            stop=_stop(fields),
            logprobs=logprobs,
            grammar=guided[1] if guided else grammar,
        )
    except EcotoneError as error:
        raise bad_value(getattr(error, "param", None), str(error), getattr(error, "code", "invalid_value")) from None
    deadline_s = fields.number("deadline_s", 0.0, 0.001, 1e6) if "deadline_s" in fields else None
    return Wish(
        params=params, most=fields.integer(most_field, None, 1, MOST_TOKENS), most_field=most_field,
        default_most=default_most, priority=fields.integer("priority", 0, -(1 << 31), 1 << 31), deadline_s=deadline_s,
    )  # fmt: skip


def _stop(fields: Fields) -> tuple[str, ...]:
    given = fields.get("stop")
    texts = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or any(not isinstance(text, str) for text in texts):
        raise bad_value("stop", "stop must be a string or an array of strings", "invalid_type")
    if len(texts) > MOST_STOPS or any(not 0 < len(text) <= MOST_STOP_CHARS for text in texts):
        raise bad_value("stop", f"stop takes at most {MOST_STOPS} strings of 1 to {MOST_STOP_CHARS} characters")
    return tuple(texts)


def _token_ids(fields: Fields, name: str, vocabulary: int) -> tuple[int, ...]:
    ids = fields.typed(name, list, [])
    if any(type(token) is not int or not 0 <= token < vocabulary for token in ids):
        raise bad_value(name, f"{name} must be an array of token ids from 0 to {vocabulary - 1}")
    return tuple(ids)


def _logit_bias(fields: Fields, vocabulary: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, bias in fields.typed("logit_bias", dict, {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocabulary):
            raise bad_value("logit_bias", f"logit_bias: {key!r:.24} is no token id; they are 0 to {vocabulary - 1}")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise bad_value("logit_bias", f"logit_bias of token {key} must be a number from -100 to 100")
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


def _guided(fields: Fields) -> tuple[str, Grammar] | None:
    """The field and grammar of vLLM's options for what the answer must be; at most one of them."""
    given: dict[str, tuple[str, Any]] = {}
    for short in ("json", "regex", "grammar", "choice"):
        if f"guided_{short}" in fields:
            given[f"guided_{short}"] = (short, fields.get(f"guided_{short}"))
    inner = fields.typed("structured_outputs", dict)
    if inner is not None:
        nested = Fields(inner, ("json", "regex", "grammar", "choice"), "structured_outputs")
        given |= {nested.path(short): (short, value) for short, value in inner.items() if short in nested}
    if len(given) > 1:
        raise bad_value(list(given)[1], f"only one of {', '.join(given)} can be given")
    for name, (short, value) in given.items():
        try:
            return name, _grammar(short, value)
        except (EcotoneError, TypeError) as error:
            raise bad_value(name, f"{name}: {error}") from None
    return None


def _grammar(short: str, value: Any) -> Grammar:
    if short == "json" and isinstance(value, str | Mapping):
        return Grammar(kind="json_schema", text=value if isinstance(value, str) else json.dumps(value))
    if short in ("regex", "grammar") and isinstance(value, str):
        return Grammar(kind="regex" if short == "regex" else "lark", text=value)
    if short == "choice" and isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        return Grammar(kind="regex", text="|".join(map(_literal, value)))
    wanted = {"json": "a JSON schema", "choice": "an array of strings"}.get(short, "a string")
    raise TypeError(f"must be {wanted}")


def _literal(text: str) -> str:
    """`text` as a regular expression that matches it alone."""
    return "".join("\\" + c if c in _REGEX_SPECIAL else c for c in text)
