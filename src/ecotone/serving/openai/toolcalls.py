"""Calls of tools in a model's text, found while it grows, and the grammar that makes a model call one.

Three ways of writing them are read, those of most models that can be downloaded:
  <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several, text around them  Hermes, Qwen
  {"name": ..., "parameters": {...}} as the whole answer, also after <|python_tag|>    Llama 3
  [{"name": ..., "arguments": {...}}, ...] as the whole answer, after [TOOL_CALLS]     Mistral, and what the grammar makes
Text that begins like a call but is none, or names no tool that was offered, is given out as text, letter by letter; so is
a call that was cut off. Linear in the text.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ecotone.decoding.params import Grammar

__all__ = ["ToolCall", "ToolReader", "tool_grammar"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
STARTS = ("<|python_tag|>", "[TOOL_CALLS]")
# llguidance's own keyword, which JSON Schema lets others ignore: a call is written as models saw calls written, in one line
_ONE_LINE = {
    "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": "", "item_separator": ", ", "key_separator": ": "}
}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON in a string, as the API has it."""

    name: str
    arguments: str


class _ValueEnd:
    """Finds where the JSON object or array that a text begins with ends; fed piece by piece."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._is_escaped, self._at = 0, False, False, 0

    def feed(self, text: str) -> int:
        """Index behind the value in `text`, which begins with what was fed before; -1 while it is open."""
        for index in range(self._at, len(text)):
            character = text[index]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._at = index + 1
                    return index + 1
        self._at = len(text)
        return -1


class _At(enum.Enum):
    """Where the reader stands: nothing but space yet, in text, in a JSON value, behind a tagged one, behind a call."""

    START = enum.auto()
    TEXT = enum.auto()
    VALUE = enum.auto()
    CLOSE = enum.auto()
    AFTER = enum.auto()


class ToolReader:
    """Feed text by `push`, then `finish`; what is certain comes back as text and calls. `names`: the tools offered."""

    def __init__(self, names: Sequence[str]):
        self._names = frozenset(names)
        self._at = _At.START
        self._held = ""  # text not decided on
        self._head = ""  # what stood before the JSON value being read: a tag, a mark; text again where it is no call
        self._value = _ValueEnd()
        self._is_tagged = False
        self._said: list[str] = []
        self._calls: list[ToolCall] = []

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """What `text` makes certain."""
        self._held += text
        steps = {
            _At.START: self._start, _At.TEXT: self._text, _At.VALUE: self._read, _At.CLOSE: self._close,
            _At.AFTER: self._after,
        }  # fmt: skip
        while steps[self._at]():
            pass
        said, self._said = "".join(self._said), []
        calls, self._calls = self._calls, []
        return said, calls

    def finish(self) -> str:
        """The rest, which is text, where the answer ends here."""
        rest = self._head + self._held
        is_space = self._at in (_At.CLOSE, _At.AFTER) and not rest.strip()
        self._held = self._head = ""
        return "" if is_space else rest

    # Each step decides on one more thing and returns whether there may be another; False: more text is needed first.

    def _start(self) -> bool:
        bare = self._held.lstrip()
        if any(mark.startswith(bare) for mark in (*STARTS, OPEN)):  # also where nothing is there
            return False
        mark = next((mark for mark in STARTS if bare.startswith(mark)), "")
        value = bare[len(mark) :].lstrip()
        inner = value[1:].lstrip()
        if not value or (value[0] in "{[" and not inner):
            return False
        if (value[0] == "{" and inner[0] in '"}') or (value[0] == "[" and inner[0] == "{"):
            return self._begin(value, is_tagged=False)
        self._at = _At.TEXT
        return True

    def _text(self) -> bool:
        at = self._held.find(OPEN)
        if at < 0:
            most = min(len(OPEN) - 1, len(self._held))
            keep = next((n for n in range(most, 0, -1) if self._held.endswith(OPEN[:n])), 0)
            self._said.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
            return False
        self._said.append(self._held[:at])
        self._held = self._held[at:]
        value = self._held[len(OPEN) :].lstrip()
        if value and value[0] == "{":
            return self._begin(value, is_tagged=True)
        if value:
            self._said.append(OPEN)
            self._held = self._held[len(OPEN) :]
        return bool(value)

    def _begin(self, value: str, is_tagged: bool) -> bool:
        self._head = self._held[: len(self._held) - len(value)]
        self._held, self._value, self._is_tagged, self._at = value, _ValueEnd(), is_tagged, _At.VALUE
        return True

    def _read(self) -> bool:
        end = self._value.feed(self._held)
        if end < 0:
            return False
        found = _calls_in(self._held[:end], self._names)
        if found is None:
            self._said.append(self._head + self._held[:end])
            self._at = _At.TEXT
        else:
            self._calls += found
            self._at = _At.CLOSE if self._is_tagged else _At.AFTER
        self._head, self._held = "", self._held[end:]
        return True

    def _close(self) -> bool:
        bare = self._held.lstrip()
        if bare != CLOSE and CLOSE.startswith(bare):
            return False
        self._held = bare.removeprefix(CLOSE)
        self._at = _At.AFTER
        return True

    def _after(self) -> bool:
        bare = self._held.lstrip() if self._is_tagged else self._held.lstrip(" \t\r\n;,")
        if OPEN.startswith(bare):
            return False
        if bare[0] == "{" and not self._is_tagged:
            return self._begin(bare, is_tagged=False)
        if bare.startswith(OPEN):
            self._held = bare
        self._at = _At.TEXT
        return True


def _calls_in(text: str, names: frozenset[str]) -> list[ToolCall] | None:
    """The calls that a JSON value is; None where it is none, or any of an array is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    values = value if isinstance(value, list) else [value]
    calls = [_call(each, names) for each in values]
    return [call for call in calls if call] if values and all(calls) else None


def _call(value: Any, names: frozenset[str]) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def tool_grammar(tools: Sequence[dict[str, Any]], *, is_one: bool) -> Grammar:
    """JSON that calls one of `tools`, or several in an array unless `is_one`."""
    at = "#/anyOf" if is_one else "#/items/anyOf"
    one = {"anyOf": [_call_schema(tool["function"], f"{at}/{i}") for i, tool in enumerate(tools)]}
    schema: dict[str, Any] = one if is_one else {"type": "array", "minItems": 1, "items": one}
    return Grammar(kind="json_schema", text=json.dumps(schema | _ONE_LINE))


def _call_schema(function: dict[str, Any], at: str) -> dict[str, Any]:
    parameters = _moved(function.get("parameters") or {"type": "object"}, f"{at}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references into itself hold where it stands at `to` in another."""
    if isinstance(schema, list):
        return [_moved(each, to) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, to) for key, value in schema.items()}
    if isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
        moved["$ref"] = to + schema["$ref"][1:]
    return moved
