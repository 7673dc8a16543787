"""Tokenizers made here: text there and back, chat templates, and streams whose pieces are the whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecotone.llm.config import ModelError
from ecotone.llm.text import TextModel

tokenizers = pytest.importorskip("tokenizers", reason="the extra `hub` is not installed")
PreTrainedTokenizerFast = pytest.importorskip(
    "transformers", reason="the extra `hub` is not installed"
).PreTrainedTokenizerFast
decoders, models, pre_tokenizers = tokenizers.decoders, tokenizers.models, tokenizers.pre_tokenizers
pytestmark = pytest.mark.torch

CORPUS = ["the cat sat on the mat, the dog did not", "naïve café — 東京 🙂🙃 ñandú"] * 3
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + TEMPLATE


def saved(folder: Path, tokenizer: Any, template: str | None = TEMPLATE) -> TextModel:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return TextModel.open(folder)


def byte_level() -> Any:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> Any:
    """As Llama 2's: words carry their space, unknown characters fall back to bytes."""
    words = ["▁the", "▁cat", "▁sat", "s", "a", "t", "▁", "on"]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *fallback, *words])}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a")][:0], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, metaspace])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return saved(tmp_path_factory.mktemp("tokenizer"), request.param())


def streamed(text: TextModel, tokens: list[int]) -> list[str]:
    stream = text.stream()
    return [stream.push(token) for token in tokens] + [stream.finish()]


@pytest.mark.parametrize("words", ["the cat", "café 東京", "🙂", "", "a\n\n b  c", "🙃" * 30])
def test_text_there_and_back_and_streamed(words: str, text: TextModel) -> None:
    tokens = text.encode(words, special=False)
    assert text.decode(tokens) == words
    pieces = streamed(text, tokens)
    assert "".join(pieces) == words
    assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data())
def test_any_tokens_streamed_are_the_text_at_once(text: TextModel, data: st.DataObject) -> None:
    if text.vocabulary == 300:  # any bytes, text or not
        tokens = data.draw(st.lists(st.integers(0, text.vocabulary - 1), max_size=60))
    else:  # a decoder with byte tokens takes back what it said where bytes that are no text follow: no stream could
        tokens = text.encode(data.draw(st.text(st.sampled_from("the cat\n é東🙂"), max_size=20)), special=False)
    assert "".join(streamed(text, tokens)) == text.decode(tokens)


def test_a_character_comes_when_it_is_whole(text: TextModel) -> None:
    tokens = text.encode("🙂", special=False)
    pieces = streamed(text, tokens)
    assert len(tokens) >= 2
    assert [p for p in pieces if p] == ["🙂"]
    broken = streamed(text, tokens[:-1])
    assert set(broken[-1]) == {"\ufffd"}  # only finish() tells of bytes that never became one
    assert not any(broken[:-1])


def test_long_streams_stay_cheap(text: TextModel) -> None:
    stream = text.stream()
    for token in text.encode("the cat sat on 東京 ", special=False) * 40:
        stream.push(token)
        assert len(stream._window) < 20
    for _ in range(500):
        stream.push(text.stop_token or 0)  # never shown, never kept
    assert len(stream._window) < 20


def test_special_tokens_are_shown_on_request(text: TextModel) -> None:
    tokens = [*text.encode("the", special=False), text.stop_token]
    assert text.decode(tokens) == "the"
    assert text.decode(tokens, special=True).endswith("</s>")
    stream = text.stream(special=True)
    assert "".join([*(stream.push(t) for t in tokens), stream.finish()]).endswith("</s>")


def test_chat_template(text: TextModel, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    assert text.render(messages) == "<user>the cat</s><assistant>"
    assert text.render(messages, answer=False) == "<user>the cat</s>"
    assert text.stop_token in text.encode_chat(messages)
    strict = saved(tmp_path, byte_level(), STRICT)
    with pytest.raises(ModelError, match="refuses these messages: the user speaks first"):
        strict.render([{"role": "system", "content": "x"}])


def test_what_is_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        TextModel.open(tmp_path)
    plain = saved(tmp_path / "plain", byte_level(), None)
    assert not plain.has_chat_template
    with pytest.raises(ModelError, match="no chat template"):
        plain.render([])
    (tmp_path / "plain" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read") as caught:
        TextModel.open(tmp_path / "plain")
    assert "\n" not in str(caught.value)
