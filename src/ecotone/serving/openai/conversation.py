"""The messages and tools of a chat request, checked and put into the form that chat templates expect.

Templates (Hugging Face's) want text content as one string and the arguments of former tool calls as objects, where the
API has arrays of parts and JSON in a string. Parts that are no text are refused: this model reads text.
"""

from __future__ import annotations

import json
from typing import Any

from ecotone.serving.openai.errors import bad_value
from ecotone.serving.openai.fields import Fields

__all__ = ["read_messages", "read_tools"]

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_MESSAGES, MOST_TOOLS = 4096, 128
_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning_content", "annotations", "audio",
            "function_call")  # fmt: skip


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """`messages` for a template; raises ApiError naming the message and part that is wrong."""
    given = fields.typed("messages", list)
    if not given:
        raise bad_value("messages", "messages must be an array with at least one message", "invalid_type")
    if len(given) > MOST_MESSAGES:
        raise bad_value("messages", f"messages has {len(given)} entries, at most {MOST_MESSAGES}")
    return [_message(value, f"messages[{index}]") for index, value in enumerate(given)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_value(where, f"{where} must be an object with role and content", "invalid_type")
    fields = Fields(value, _MESSAGE, where)
    role = fields.text("role", "", ROLES)
    for name in ("function_call", "audio"):
        if name in fields:
            raise bad_value(fields.path(name), f"{fields.path(name)} is not served here; use tool_calls and text")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    message["content"] = _content(fields, role)
    if role == "assistant" and "tool_calls" in fields:
        calls = fields.typed("tool_calls", list)
        message["tool_calls"] = [_former_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    elif "content" not in fields and "refusal" not in fields:
        raise bad_value(fields.path("content"), f"{fields.path('content')} is missing", "missing_required_parameter")
    if role == "tool":
        message["tool_call_id"] = fields.text("tool_call_id")
    if "name" in fields:
        message["name"] = fields.text("name")
    return message


def _content(fields: Fields, role: str) -> str:
    content = fields.get("content")
    if content is None:
        return fields.text("refusal") if role == "assistant" else ""
    if isinstance(content, str):
        return content
    where = fields.path("content")
    if not isinstance(content, list):
        raise bad_value(where, f"{where} must be a string or an array of parts", "invalid_type")
    texts = []
    for index, part in enumerate(content):
        at = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise bad_value(at, f"{at} must be an object with a type", "invalid_type")
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise bad_value(f"{at}.type", f"{at}: parts of type {kind!r:.40} are not served here; this model reads text")
        text = part.get(str(kind))
        if not isinstance(text, str):
            raise bad_value(f"{at}.{kind}", f"{at}.{kind} must be a string", "invalid_type")
        texts.append(text)
    return "\n".join(texts)


def _former_call(value: Any, where: str) -> dict[str, Any]:
    """A tool call of an earlier answer, its arguments as an object where they are one."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_value(where, f"{where} must be an object with function.name and function.arguments", "invalid_type")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise bad_value(f"{where}.function.arguments", f"{where}.function.arguments is not JSON") from None
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    """`tools` as they go to the template: functions with a name and, where given, a JSON schema of their parameters."""
    tools, names = [], set()
    for index, value in enumerate(fields.typed("tools", list, [])):
        where = f"tools[{index}]"
        function = value.get("function") if isinstance(value, dict) else None
        if not isinstance(function, dict) or value.get("type", "function") != "function":
            raise bad_value(where, f'{where} must be {{"type": "function", "function": {{...}}}}')
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not 0 < len(name) <= 128 or not all(c.isalnum() or c in "_-." for c in name):
            raise bad_value(f"{where}.function.name", f"{where}.function.name must be 1 to 128 letters, digits, _, - or .")
        if name in names:
            raise bad_value(f"{where}.function.name", f"two tools are named {name!r}")
        if parameters is not None and not isinstance(parameters, dict):
            raise bad_value(f"{where}.function.parameters", f"{where}.function.parameters must be a JSON schema")
        names.add(name)
        kept = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        tools.append({"type": "function", "function": kept})
    if len(tools) > MOST_TOOLS:
        raise bad_value("tools", f"tools has {len(tools)} entries, at most {MOST_TOOLS}")
    return tools
