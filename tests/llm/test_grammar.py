"""Answers by a grammar parse, validate and end, whatever the model would rather say; drafts taken back leave no trace."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ecotone
from ecotone.decoding.params import Grammar, SamplingParams
from ecotone.llm.grammar import GrammarError, Grammars
from ecotone.llm.sampling import make_chooser
from ecotone.llm.text import TextModel

pytest.importorskip("llguidance", reason="the extra `llm` is not installed")
pytest.importorskip("transformers", reason="the extra `llm` is not installed")
pytestmark = pytest.mark.torch
VOCABULARY, STOP, PROMPT = 1024, 0, [5, 6, 7]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 18, "maximum": 150},
        "of": {"type": "array", "items": {"enum": ["Rome", "Verona"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "of"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def text() -> TextModel:
    return TextModel.open(Path(ecotone.__file__).parent / "assets" / "tiny-llm")


@pytest.fixture(scope="module")
def grammars(text: TextModel) -> Grammars:
    return Grammars(text, VOCABULARY)


def answer(grammars: Grammars, grammar: Grammar, seed: int, most: int = 400, **more) -> list[int]:
    """What a model of noise says under `grammar`; ends with the stop token unless `most` tokens are reached."""
    params = SamplingParams(seed=seed, stop_tokens=more.pop("stop_tokens", (STOP,)), grammar=grammar, **more)
    chooser, tokens, random = (
        make_chooser(params, len(PROMPT), VOCABULARY, grammars),
        list(PROMPT),
        np.random.default_rng(seed),
    )
    while len(tokens) - len(PROMPT) < most:
        logits = torch.from_numpy(random.normal(size=VOCABULARY).astype(np.float32))
        logits[STOP] -= 3  # a model that does not know how to end
        tokens.append(chooser.choose(logits, tokens).token)
        if tokens[-1] in params.stop_tokens:
            break
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("seed", range(8))
def test_json_of_a_schema_always_validates(text: TextModel, grammars: Grammars, seed: int) -> None:
    tokens = answer(grammars, Grammar(kind="json_schema", text=json.dumps(SCHEMA)), seed)
    assert tokens[-1] == STOP
    made = json.loads(text.decode(tokens[:-1]))
    assert set(made) == {"name", "age", "of"}
    assert isinstance(made["name"], str)
    assert len(made["name"]) <= 12
    assert isinstance(made["age"], int)
    assert 18 <= made["age"] <= 150
    assert 1 <= len(made["of"]) <= 3
    assert set(made["of"]) <= {"Rome", "Verona"}


def test_any_json_is_the_beginning_of_an_object_and_parses_where_it_ends(text: TextModel, grammars: Grammars) -> None:
    ended = 0
    for seed in range(6):
        tokens = answer(grammars, Grammar(kind="json"), seed, most=300)
        if tokens[-1] == STOP:
            ended += 1
            assert isinstance(json.loads(text.decode(tokens[:-1])), dict)
        assert text.decode(tokens).startswith("{")
    assert ended


def test_regular_expressions_and_lark(text: TextModel, grammars: Grammars) -> None:
    pattern = r"(To|Not) be{1,3}, [0-9]{2}\."
    made = text.decode(answer(grammars, Grammar(kind="regex", text=pattern), 3)[:-1])
    assert re.fullmatch(pattern, made)
    lark = 'start: "aye" (" and " NAME)*\nNAME: /[A-Z][a-z]{1,4}/'
    made = text.decode(answer(grammars, Grammar(kind="lark", text=lark), 4)[:-1])
    assert re.fullmatch(r"aye( and [A-Z][a-z]{1,4})*", made)


def test_a_complete_answer_can_only_end_even_below_its_least_length(grammars: Grammars) -> None:
    grammar = Grammar(kind="regex", text="ab")
    assert answer(grammars, grammar, 1, min_tokens=30)[-1] == STOP
    assert len(answer(grammars, grammar, 1, min_tokens=30)) <= 3
    assert answer(grammars, grammar, 1, stop_tokens=(9, 10**6))[-1] == 9  # the request's own, not the model's


def test_without_a_stop_token_the_text_ends_and_the_request_goes_on(text: TextModel, grammars: Grammars) -> None:
    tokens = answer(grammars, Grammar(kind="regex", text="ab"), 1, most=10, stop_tokens=())
    assert text.decode(tokens) == "ab"
    assert tokens[-7:] == [STOP] * 7


def test_drafts_taken_back_leave_no_trace(grammars: Grammars) -> None:
    params = SamplingParams(seed=1, stop_tokens=(STOP,), grammar=Grammar(kind="json_schema", text=json.dumps(SCHEMA)))
    right = PROMPT + answer(grammars, params.grammar, 7)
    one, random = grammars.begin(params, len(PROMPT)), np.random.default_rng(0)
    for _ in range(150):
        tokens = right[: random.integers(len(PROMPT), len(right) + 1)]
        if random.random() < 0.4:
            tokens = tokens + random.integers(0, VOCABULARY, size=random.integers(1, 4)).tolist()
        mine, fresh = one.allowed(tokens), grammars.begin(params, len(PROMPT)).allowed(tokens)
        assert (mine is None) == (fresh is None)
        assert mine is None or np.array_equal(mine, fresh)
        assert mine is None or mine.any()


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("json_schema", '{"type": "objct"}', "Invalid type: objct"),
        ("json_schema", '{"type":', "Expecting value: line 1 column 9"),
        ("json_schema", "[1]", "the schema must be a JSON object"),
        ("json_schema", '{"if": {}}', 'Unimplemented keys: ["if"]'),
        ("json_schema", "[" * 90_000, "recursion"),
        ("json_schema", '{"$ref": "#/$defs/d", "$defs": {"d": {"$ref": "#/$defs/d"}}}', "no text satisfies it"),
        ("regex", "(a", "unclosed group"),
        ("lark", "start: foo", 'unknown name: "foo"'),
    ],
)
def test_a_bad_grammar_is_refused_in_one_line(grammars: Grammars, kind: str, source: str, says: str) -> None:
    with pytest.raises(GrammarError) as error:
        grammars.check(Grammar(kind=kind, text=source))
    assert says in str(error.value)
    assert str(error.value).startswith(f"grammar of kind {kind}: ")
    assert "\n" not in str(error.value)


def test_a_chain_of_a_thousand_references_does_not_end_the_process(grammars: Grammars) -> None:
    chain = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1500)}
    schema = {"$ref": "#/$defs/d0", "$defs": chain | {"d1500": {"type": "string"}}}
    grammars.check(Grammar(kind="json_schema", text=json.dumps(schema)))


def test_what_is_missing_is_named_with_its_remedy(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r'pip install "ecotone\[llm\]"'):
        Grammars(text, VOCABULARY).check(Grammar(kind="json"))


def test_a_model_that_never_ends_cannot_keep_to_a_grammar(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextModel, "stop_token", None)
    with pytest.raises(GrammarError, match="names no token that ends a text"):
        Grammars(text, VOCABULARY).check(Grammar(kind="json"))


def test_a_model_with_more_logits_than_tokens_never_says_the_ones_without_text(text: TextModel) -> None:
    params = SamplingParams(seed=1, stop_tokens=(STOP,), grammar=Grammar(kind="json"))
    mask = Grammars(text, VOCABULARY + 100).begin(params, 0).allowed([])
    assert mask is not None
    assert mask.shape == (VOCABULARY + 100,)
    assert not mask[VOCABULARY:].any()
