"""Reading the JSON of a request: bytes to an object, and fields with their types and ranges, each error naming its field.

null is the same as absent, as with OpenAI. A field that is not known is refused, since an option that is silently ignored
gives another answer than was asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn

from ecotone.serving.openai.errors import bad_value

__all__ = ["Fields", "parse_body"]

_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object"}


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; raises ApiError 400 for anything else, also NaN, lone surrogates and endless nesting."""
    try:
        document = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad_value(None, f"the body is not JSON: {str(error)[:120]}", "invalid_json") from None
    if not isinstance(document, dict):
        raise bad_value(None, f"the body must be a JSON object, is {_kind(document)}", "invalid_json")
    if b"\\ud" in body.lower() and not all(map(_is_text, _strings(document))):
        raise bad_value(None, "a string of the body holds half a character (a lone surrogate escape)", "invalid_json")
    return document


class Fields:
    """The fields of one object at `where` ("" is the body). Unknown ones are refused at once."""

    def __init__(self, document: Mapping[str, Any], known: Collection[str], where: str = ""):
        self._document, self._where = document, where
        for name in document:
            if name not in known and document[name] is not None:
                raise bad_value(self.path(name), f"unknown field {name!r:.60} in the request", "unknown_parameter")

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def __contains__(self, name: str) -> bool:
        return self._document.get(name) is not None

    def get(self, name: str) -> Any:
        """The value as it is; None where absent or null."""
        return self._document.get(name)

    def typed(self, name: str, kind: type, default: Any = None) -> Any:
        """The value if it is a `kind`, `default` where absent."""
        value = self._document.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise bad_value(self.path(name), f"{self.path(name)} must be {_NAMES[kind]}, is {_kind(value)}", "invalid_type")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.typed(name, bool, default))

    def text(self, name: str, default: str = "", choices: Collection[str] = ()) -> str:
        value = self.typed(name, str, default)
        if choices and value not in choices:
            raise bad_value(self.path(name), f"{self.path(name)} {value!r:.60} is not one of {', '.join(choices)}")
        return str(value)

    def integer(self, name: str, default: int | None, least: int, most: int) -> Any:
        """An int in [least, most], or `default`."""
        value = self._document.get(name)
        if isinstance(value, float) and value.is_integer():  # JSON knows one kind of number
            value = int(value)
        elif value is not None:
            value = self.typed(name, int)
        return default if value is None else self._within(name, value, least, most)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A float in [least, most], or `default`."""
        value = self._document.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.typed(name, float)
        return float(self._within(name, value, least, most))

    def _within(self, name: str, value: Any, least: Any, most: Any) -> Any:
        kind = "integer" if isinstance(value, int) and isinstance(least, int) else "decimal"
        if value > most or (isinstance(value, float) and math.isnan(value)):
            message = f"{self.path(name)} must be at most {most}, is {str(value)[:24]}"
            raise bad_value(self.path(name), message, f"{kind}_above_max_value")
        if value < least:
            message = f"{self.path(name)} must be at least {least}, is {str(value)[:24]}"
            raise bad_value(self.path(name), message, f"{kind}_below_min_value")
        return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too; a stack and no recursion."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
