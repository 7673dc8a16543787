"""Requests read without a server: grammars of choices, limits that depend on the prompt, keys, buckets, odd JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.serving.openai.admission import Admission, load_keys
from ecotone.serving.openai.errors import ApiError
from ecotone.serving.openai.fields import Fields, parse_body
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.sampling import EXTRA_FIELDS, OPENAI_FIELDS, Wish, read_wish
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure


def wish(document: dict[str, Any], default_most: int | None = None) -> Wish:
    return read_wish(
        Fields(document, OPENAI_FIELDS | EXTRA_FIELDS), vocabulary=100, stop_tokens=(7,), logprobs=None, grammar=None,
        most_field="max_tokens", default_most=default_most,
    )  # fmt: skip


def refused(document: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        wish(document)
    return caught.value


def test_the_context_bounds_the_answer() -> None:
    assert wish({}).settled(10, 64, 0, "prompt").max_tokens == 54
    assert wish({}, 16).settled(10, 64, 0, "prompt").max_tokens == 16
    assert wish({}, 16).settled(60, 64, 0, "prompt").max_tokens == 4
    assert wish({"max_tokens": 54}).settled(10, 64, 0, "prompt").max_tokens == 54
    for given_most, length, param in ((55, 10, "max_tokens"), (None, 64, "prompt")):
        with pytest.raises(ApiError, match="64") as caught:
            wish({"max_tokens": given_most}).settled(length, 64, 0, "prompt")
        assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")
    with pytest.raises(ApiError, match="min_tokens 60"):
        wish({"min_tokens": 60}).settled(10, 64, 0, "prompt")


def test_seeds_and_stops() -> None:
    assert wish({"seed": -1}).settled(1, 64, 3, "prompt").seed == 2  # modulo 2^64
    assert wish({}).settled(1, 64, 3, "prompt").seed is None
    assert wish({"stop": "a"}).params.stop == ("a",)
    assert wish({"stop": []}).params.stop == ()
    assert wish({"ignore_eos": True, "stop_token_ids": [3]}).params.stop_tokens == (3,)
    assert wish({"stop_token_ids": [3]}).params.stop_tokens == (7, 3)
    assert wish({"top_p": 0, "top_k": -1, "temperature": 0}).params.is_greedy


WRONG: list[tuple[str, Any]] = [
    ("stop", ""), ("stop", ["a"] * 17), ("stop", [1]), ("seed", 1.5), ("seed", True), ("top_p", 1.01), ("min_p", -0.1),
    ("stop_token_ids", [100]), ("logit_bias", {"1": 101}), ("logit_bias", {"x": 1}), ("logit_bias", [1]),
    ("logit_bias", {"1": True}), ("max_tokens", 0), ("deadline_s", 0), ("guided_json", 1), ("guided_regex", ""),
    ("guided_choice", []), ("what", 1),
]  # fmt: skip
NESTED = [
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
    ({"structured_outputs": {"foo": 1}}, "structured_outputs.foo"),
    ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
]


@pytest.mark.parametrize(("document", "param"), [({name: value}, name) for name, value in WRONG] + NESTED)
def test_what_is_wrong_is_named(document: dict[str, Any], param: str) -> None:
    assert (refused(document).status, refused(document).param) == (400, param)


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4), st.text(max_size=8))
def test_a_choice_matches_its_words_alone(words: list[str], other: str) -> None:
    grammar = wish({"guided_choice": words}).params.grammar
    assert grammar is not None
    for text in (*words, other):
        assert bool(re.fullmatch(grammar.text, text)) == (text in words)


@given(st.binary(max_size=40))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    try:
        document = json.loads(body, parse_constant=lambda name: [][0])
    except (ValueError, IndexError):
        document = None
    if isinstance(document, dict):
        assert parse_body(body) == document
    else:
        with pytest.raises(ApiError) as caught:
            parse_body(body)
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key-1\n\nsecond-key  # of the robot\nfirst-key-1\n")
    assert load_keys(file, {"ECOTONE_API_KEYS": "unused-key"}) == ("first-key-1", "second-key")
    assert load_keys(None, {"ECOTONE_API_KEYS": "key-one-1, key-two-2"}) == ("key-one-1", "key-two-2")
    assert load_keys(None, {"ECOTONE_API_KEY": "key-one-1"}) == ("key-one-1",)
    assert load_keys(None, {}) == ()
    for text in ("# none\n", "short\n", "schlüssel-1\n"):
        file.write_text(text)
        with pytest.raises(EcotoneError) as caught:
            load_keys(file, {})
        assert "short\n" not in str(caught.value)


def test_the_bucket_of_a_key_fills_with_time() -> None:
    now_s = 100.0
    admission = Admission(
        ("key-number-1", "key-number-2"), most_active=0, per_minute=2, most_body_bytes=10, clock=lambda: now_s
    )
    assert admission.asker("Bearer key-number-2") == 1
    for wrong in ("", "Bearer", "Bearer key", "Basic key-number-2", "Bearer key-number-22"):
        with pytest.raises(ApiError) as caught:
            admission.asker(wrong)
        assert (caught.value.status, "key-number" in str(caught.value)) == (401, False)
    for _ in range(2):
        with admission.held(1):
            pass
    with pytest.raises(ApiError) as caught, admission.held(1):
        pass
    assert int(caught.value.headers["Retry-After"]) >= 30  # one of two a minute
    with admission.held(0):
        pass
    now_s += 30.0
    with admission.held(1):
        pass
    admission.grow(10)
    with pytest.raises(ApiError, match="large"):
        admission.grow(1)
    admission.shrink(10)
    admission.grow(1)


def test_options_say_what_is_wrong_with_them() -> None:
    for wrong in (
        {"head_s": 0},
        {"max_connections": -1},
        {"max_body_bytes": 1 << 40},
        {"tls_cert": Path("x")},
        {"backlog": 0},
    ):
        with pytest.raises(EcotoneError, match=next(iter(wrong))):
            Options(**wrong)  # type: ignore[arg-type]
