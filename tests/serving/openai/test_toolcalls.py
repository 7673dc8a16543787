"""Calls of tools in text: how it is cut changes nothing, and text that is no call comes out as it went in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.serving.openai.toolcalls import ToolReader, tool_grammar

pytestmark = pytest.mark.pure

NAMES = ("f", "get_time")
F = '{"name": "f", "arguments": {"a": [1, "}<\\"/tool_call>"]}}'
LLAMA = '{"name": "get_time", "parameters": {"zone": "x"}}'
CALL_F, CALL_LLAMA = ("f", {"a": [1, '}<"/tool_call>']}), ("get_time", {"zone": "x"})


def read(pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    reader, text, calls = ToolReader(NAMES), "", []
    for piece in pieces:
        said, found = reader.push(piece)
        text += said
        calls += [(call.name, json.loads(call.arguments)) for call in found]
    return text + reader.finish(), calls


CASES = [
    ("", "", []),
    ("plain text", "plain text", []),
    ("  \n", "  \n", []),
    (f"<tool_call>{F}</tool_call>", "", [CALL_F]),
    (f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{LLAMA}\n</tool_call>\n", "", [CALL_F, CALL_LLAMA]),
    (f"Let me see.\n<tool_call>{F}</tool_call> Done.", "Let me see.\n Done.", [CALL_F]),
    (f"<tool_call>{F}", "", [CALL_F]),  # ended by a stop token behind the value
    (LLAMA, "", [CALL_LLAMA]),
    (f"<|python_tag|>{LLAMA}; {F}", "", [CALL_LLAMA, CALL_F]),
    (f"[TOOL_CALLS] [{F}, {LLAMA}]", "", [CALL_F, CALL_LLAMA]),
    (f"\n[{F}]", "", [CALL_F]),
    ('{"type": "function", "function": {"name": "f", "arguments": "{}"}}', "", [("f", {})]),
    ('{"name": "f"}', "", [("f", {})]),
    # what is no call
    ('{"name": "g", "arguments": {}}', '{"name": "g", "arguments": {}}', []),
    ('{"answer": 42} yes', '{"answer": 42} yes', []),
    ('<tool_call>{"name": "g"}</tool_call>', '<tool_call>{"name": "g"}</tool_call>', []),
    ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    ('<tool_call>{"name": "f", "arguments"', '<tool_call>{"name": "f", "arguments"', []),  # cut off
    ("a < b <tool", "a < b <tool", []),
    ("[link](x) and {braces}", "[link](x) and {braces}", []),
    (f'text {F}', f'text {F}', []),  # bare JSON within text is text
    (f'[{F}, 1]', f'[{F}, 1]', []),
    ('{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": [1]}', []),
    (f"<tool_call>{F}</tool_call><tool_call>{{x}}</tool_call>", "<tool_call>{x}</tool_call>", [CALL_F]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said", "calls"), CASES)
def test_the_formats_letter_by_letter_and_at_once(text: str, said: str, calls: list[Any]) -> None:
    assert read([text]) == (said, calls)
    assert read(list(text)) == (said, calls)


WORDS = ["<tool_call>", "</tool_call>", F, LLAMA, "[", "]", ", ", "text", "<", "{", "}", '"', " ", "\n", "[TOOL_CALLS]"]


@given(st.lists(st.sampled_from(WORDS), max_size=8), st.data())
def test_how_the_text_is_cut_changes_nothing(tokens: list[str], data: st.DataObject) -> None:
    text = "".join(tokens)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(pieces) == read([text]) == read(list(text))


@given(st.text(alphabet='ab <>{}[]":,tool_cal/\\\n', max_size=60))
def test_text_without_calls_is_kept_to_the_letter(text: str) -> None:
    assert read([text]) == (text, [])


def test_references_of_a_schema_hold_where_it_was_put() -> None:
    """The reference is followed by hand through the made schema, as RFC 6901 says."""
    parameters = {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"enum": [1]}}}
    tools = [{"function": {"name": "z"}}, {"function": {"name": "f", "parameters": parameters}}]
    for is_one in (True, False):
        schema: Any = json.loads(tool_grammar(tools, is_one=is_one).text)
        one = schema if is_one else schema["items"]
        reference = one["anyOf"][1]["properties"]["arguments"]["properties"]["a"]["$ref"]
        found = schema
        for step in reference.removeprefix("#/").split("/"):
            found = found[int(step)] if isinstance(found, list) else found[step]
        assert found == {"enum": [1]}
