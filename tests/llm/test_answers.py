"""Answers against the whole text cut at its first stop string, however tokens, effects and stop strings fall."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ecotone
from ecotone.decoding.answer import Piece
from ecotone.decoding.frame import TokenLogprobs
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.words import Ended, Ending, Tokens
from ecotone.llm.answers import AnswerText
from ecotone.llm.text import TextModel

pytest.importorskip("transformers", reason="the extra `hub` is not installed")
pytestmark = pytest.mark.torch
TEXT = TextModel.open(Path(ecotone.__file__).parent / "assets" / "tiny-llm")


def first_stop(text: str, stops: tuple[str, ...]) -> str | None:
    """`text` up to the stop string that is complete first, read character by character; None where there is none."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return None


def run(
    groups: list[list[int]], stops: tuple[str, ...], ending: Ending = Ending.LENGTH, **more
) -> tuple[list[Piece], AnswerText]:
    answer, pieces, at = AnswerText(TEXT, SamplingParams(stop=stops, **more)), [], 10
    for group in groups:
        logprobs = tuple(TokenLogprobs(-float(at + i)) for i in range(len(group)))
        pieces.append(answer.take(Tokens(1, at, tuple(group), logprobs)))
        at += len(group)
    pieces.append(answer.take(Ended(1, ending, "why", cached=3)))
    assert answer.take(Ended(1, ending)) is None
    return [piece for piece in pieces if piece is not None], answer


WORDS = "the end of a naïve café, the the 東京🙂 abababc end\n\n"
TOKENS = st.one_of(st.sampled_from(TEXT.encode(WORDS, special=False)), st.integers(0, 1023))


@settings(max_examples=150, deadline=None)
@given(groups=st.lists(st.lists(TOKENS, min_size=1, max_size=5), max_size=10), data=st.data())
def test_the_text_is_the_whole_text_cut_at_the_first_stop_string(groups: list[list[int]], data: st.DataObject) -> None:
    tokens = [token for group in groups for token in group]
    whole = TEXT.decode(tokens)
    places = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(lambda p: whole[p[0] : p[0] + p[1]])
    stops = tuple(
        filter(None, data.draw(st.lists(st.one_of(places, st.sampled_from(["the", "ab", "abc", "zz"])), max_size=3)))
    )
    pieces, answer = run(groups, stops)
    right = first_stop(whole, stops)
    assert "".join(piece.text for piece in pieces) == (whole if right is None else right)
    assert [piece.ending for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].ending is (Ending.LENGTH if right is None else Ending.STOP)
    assert pieces[-1].reason == ("why" if right is None else "")
    assert pieces[-1].cached == 3
    told = [token for piece in pieces for token in piece.tokens]
    assert told == tokens[: len(told)]
    assert [each.logprob for piece in pieces for each in piece.logprobs] == [-float(10 + i) for i in range(len(told))]
    if right is None:
        assert told == tokens
        assert not answer.is_stopped
    elif stops and told != tokens:  # cut behind the token that made a stop string complete, and not before
        assert answer.is_stopped
        assert first_stop(TEXT.decode(told), stops) is not None


def test_what_may_become_a_stop_string_is_held_back_until_it_is_known() -> None:
    a, b, c = (TEXT.encode(letter, special=False) for letter in "abc")
    pieces, _ = run([a, b, a, b, c], ("abc",))
    assert [piece.text for piece in pieces] == ["", "", "ab", "", "", ""]
    pieces, _ = run([a, b, a, b], ("abc",), Ending.CANCELLED)
    assert [piece.text for piece in pieces] == ["", "", "ab", "", "ab"]
    assert pieces[-1].ending is Ending.CANCELLED


def test_nothing_comes_after_a_stop_string_and_the_answer_is_complete_whatever_happens_then() -> None:
    letters = TEXT.encode("xyz", special=False)
    answer = AnswerText(TEXT, SamplingParams(stop=("y",)))
    piece = answer.take(Tokens(1, 5, tuple(letters)))
    assert piece is not None
    assert (piece.text, piece.tokens, answer.is_stopped) == ("x", tuple(letters[:2]), True)
    assert answer.take(Tokens(1, 8, tuple(letters))) is None
    assert answer.take(Ended(1, Ending.NODE_LOST, "gone")) == Piece(ending=Ending.STOP)


def test_the_first_tokens_are_not_searched_when_a_least_length_is_asked_for() -> None:
    letters = TEXT.encode("xyxyz", special=False)
    pieces, answer = run([letters], ("y",), min_tokens=2)
    assert "".join(piece.text for piece in pieces) == "xyx"
    assert answer.is_stopped
    pieces, answer = run([letters[:2]], ("xy",), min_tokens=1)
    assert "".join(piece.text for piece in pieces) == "xy"  # it began in what is not searched


def test_special_tokens_are_text_only_where_asked_for() -> None:
    pieces, _ = run([[0], TEXT.encode("x", special=False)], ())
    assert "".join(piece.text for piece in pieces) == "x"
    answer = AnswerText(TEXT, SamplingParams(), special=True)
    piece = answer.take(Tokens(1, 0, (0,)))
    assert piece is not None
    assert piece.text == TEXT.tokenizer.eos_token
