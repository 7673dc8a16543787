"""What a chat, completion or embedding request asks for, read from its JSON and checked: values, nothing is run here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ecotone.decoding.params import Grammar
from ecotone.serving.openai.backend import Backend, Embedder
from ecotone.serving.openai.conversation import read_messages, read_tools
from ecotone.serving.openai.errors import bad_value
from ecotone.serving.openai.fields import Fields
from ecotone.serving.openai.sampling import EXTRA_FIELDS, OPENAI_FIELDS, Wish, read_wish
from ecotone.serving.openai.toolcalls import tool_grammar
from ecotone.units import EcotoneError

__all__ = ["ChatAsk", "CompletionAsk", "EmbeddingAsk", "Prompt", "read_chat", "read_completion", "read_embedding"]

MOST_CHOICES, MOST_TOP, MOST_INPUTS = 128, 20, 2048
_CHAT = (
    OPENAI_FIELDS
    | EXTRA_FIELDS
    | {
        "messages",
        "max_completion_tokens",
        "top_logprobs",
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "modalities",
        "functions",
        "function_call",
        "audio",
        "web_search_options",
    }
)
_COMPLETION = OPENAI_FIELDS | EXTRA_FIELDS | {"prompt", "suffix", "echo", "best_of"}
_NO_EFFECT = frozenset(
    {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "prediction", "verbosity", "reasoning_effort"}
)  # fmt: skip
Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAsk:
    """`calls`: tools may be called. `most_calls`: at most so many, None for any number."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    calls: bool
    most_calls: int | None
    wish: Wish
    n: int
    stream: bool
    usage_in_stream: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionAsk:
    """`best_of` answers are made per prompt, the `n` likeliest (per token) of them told."""

    prompts: tuple[Prompt, ...]
    wish: Wish
    n: int
    best_of: int
    echo: bool
    tells_logprobs: bool
    stream: bool
    usage_in_stream: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingAsk:
    inputs: tuple[Prompt, ...]
    is_base64: bool
    dimensions: int | None


def read_chat(document: dict[str, Any], backend: Backend) -> ChatAsk:
    """A request of /v1/chat/completions; raises ApiError."""
    fields = Fields(document, _CHAT | _NO_EFFECT)
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if name in fields:
            raise bad_value(name, f"{name} is the former name of {instead}; use {instead}", "unsupported_parameter")
    for name in ("audio", "web_search_options"):
        if name in fields:
            raise bad_value(name, f"{name} is not served here", "unsupported_parameter")
    if fields.typed("modalities", list, ["text"]) != ["text"]:
        raise bad_value("modalities", 'only the modality "text" is served here', "unsupported_value")
    messages, tools = read_messages(fields), read_tools(fields)
    tools, grammar, calls = _tool_choice(fields, tools)
    form = _response_format(fields)
    if form is not None and grammar is not None:
        raise bad_value("response_format", "response_format cannot be combined with a required tool")
    stream, usage = _streaming(fields)
    wish = read_wish(
        fields, vocabulary=backend.vocabulary, stop_tokens=backend.stop_tokens, logprobs=_chat_logprobs(fields),
        grammar=form or grammar, default_most=None,
        most_field="max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens",
    )  # fmt: skip
    is_one = calls and not fields.flag("parallel_tool_calls", True)
    n = fields.integer("n", 1, 1, MOST_CHOICES)
    return ChatAsk(
        messages=messages, tools=tools, calls=calls, most_calls=1 if is_one else None, wish=wish, n=n, stream=stream,
        usage_in_stream=usage,
    )  # fmt: skip


def read_completion(document: dict[str, Any], backend: Backend) -> CompletionAsk:
    """A request of /v1/completions; raises ApiError."""
    fields = Fields(document, _COMPLETION | _NO_EFFECT)
    if fields.text("suffix"):
        raise bad_value("suffix", "suffix (filling in the middle) is not served here", "unsupported_parameter")
    prompts = _inputs(fields, "prompt", backend.vocabulary)
    stream, usage = _streaming(fields)
    n = fields.integer("n", 1, 1, MOST_CHOICES)
    best_of = fields.integer("best_of", n, 1, MOST_CHOICES)
    if best_of < n:
        raise bad_value("best_of", f"best_of {best_of} must be at least n, which is {n}")
    if stream and best_of > n:
        raise bad_value("best_of", "best_of beyond n cannot be streamed: the best is known at the end")
    if len(prompts) * best_of > MOST_CHOICES:
        message = f"{len(prompts)} prompts with {best_of} answers each are more than {MOST_CHOICES}"
        raise bad_value("best_of" if best_of > 1 else "prompt", message)
    logprobs, echo = fields.integer("logprobs", None, 0, MOST_TOP), fields.flag("echo")
    if echo and logprobs is not None:
        raise bad_value("echo", "echo with logprobs needs those of the prompt, which are not kept", "unsupported_parameter")
    wish = read_wish(
        fields, vocabulary=backend.vocabulary, stop_tokens=backend.stop_tokens, most_field="max_tokens", default_most=16,
        logprobs=0 if logprobs is None and best_of > n else logprobs, grammar=None,
    )  # fmt: skip
    return CompletionAsk(
        prompts=prompts, wish=wish, n=n, best_of=best_of, echo=echo, tells_logprobs=logprobs is not None, stream=stream,
        usage_in_stream=usage,
    )  # fmt: skip


def read_embedding(document: dict[str, Any], embedder: Embedder) -> EmbeddingAsk:
    """A request of /v1/embeddings; raises ApiError."""
    fields = Fields(document, {"input", "model", "encoding_format", "dimensions", "user"})
    dimensions = fields.integer("dimensions", None, 1, embedder.size)
    if dimensions not in (None, embedder.size) and not embedder.is_nested:
        message = f"{embedder.name} was not trained for shorter vectors; dimensions can only be {embedder.size}"
        raise bad_value("dimensions", message, "unsupported_parameter")
    is_base64 = fields.text("encoding_format", "float", ("float", "base64")) == "base64"
    return EmbeddingAsk(inputs=_inputs(fields, "input", embedder.vocabulary), is_base64=is_base64, dimensions=dimensions)


def _inputs(fields: Fields, name: str, vocabulary: int) -> tuple[Prompt, ...]:
    """A string, token ids, or an array of either, as a tuple of prompts."""
    value = fields.get(name)
    if value is None:
        raise bad_value(name, f"you must provide {name}", "missing_required_parameter")
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        value = [value]
    if not isinstance(value, list) or not value:
        message = f"{name} must be a string, an array of strings, an array of token ids, or an array of such arrays"
        raise bad_value(name, message, "invalid_type")
    if len(value) > MOST_INPUTS:
        raise bad_value(name, f"{name} has {len(value)} entries, at most {MOST_INPUTS}")
    return tuple(_input(entry, f"{name}[{index}]", vocabulary) for index, entry in enumerate(value))


def _input(entry: Any, where: str, vocabulary: int) -> Prompt:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, list) or not entry or any(type(token) is not int for token in entry):
        raise bad_value(where, f"{where} must be a string or an array of token ids", "invalid_type")
    if min(entry) < 0 or max(entry) >= vocabulary:
        raise bad_value(where, f"{where} has token ids beyond the vocabulary; they are 0 to {vocabulary - 1}")
    return tuple(entry)


def _streaming(fields: Fields) -> tuple[bool, bool]:
    stream, options = fields.flag("stream"), fields.typed("stream_options", dict)
    if options is None:
        return stream, False
    if not stream:
        raise bad_value("stream_options", "stream_options is only allowed where stream is true")
    inner = Fields(options, ("include_usage", "include_obfuscation"), "stream_options")
    return stream, inner.flag("include_usage")


def _chat_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", None, 0, MOST_TOP)
    if not fields.flag("logprobs"):
        if top is not None:
            raise bad_value("top_logprobs", "top_logprobs is only allowed where logprobs is true")
        return None
    return top or 0


def _response_format(fields: Fields) -> Grammar | None:
    given = fields.typed("response_format", dict)
    if given is None:
        return None
    inner = Fields(given, ("type", "json_schema"), "response_format")
    kind = inner.text("type", "", ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(kind="json")
    where = "response_format.json_schema"
    described = inner.typed("json_schema", dict)
    if described is None:
        raise bad_value(where, f"{where} is missing", "missing_required_parameter")
    schema = Fields(described, ("name", "description", "schema", "strict"), where).typed("schema", dict, {})
    try:
        return Grammar(kind="json_schema", text=json.dumps(schema))
    except EcotoneError as error:
        raise bad_value(f"{where}.schema", str(error)) from None


def _tool_choice(fields: Fields, tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Grammar | None, bool]:
    """The tools that the template is shown, the grammar that makes a call certain, and whether calls are looked for."""
    choice = fields.get("tool_choice")
    if choice is None:
        return tools, None, bool(tools)
    if not tools:
        raise bad_value("tool_choice", "tool_choice is only allowed where tools are given")
    if choice == "none":
        return [], None, False
    if choice == "auto":
        return tools, None, True
    if choice == "required":
        return tools, _forced(tools, is_one=not fields.flag("parallel_tool_calls", True)), True
    name = choice.get("function", {}) if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = name.get("name") if isinstance(name, dict) else None
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        message = (
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": one of tools}}'
        )
        raise bad_value("tool_choice", message)
    return tools, _forced(named, is_one=True), True


def _forced(tools: list[dict[str, Any]], *, is_one: bool) -> Grammar:
    try:
        return tool_grammar(tools, is_one=is_one)
    except EcotoneError as error:
        raise bad_value("tools", str(error)) from None
