"""Texts through a model's own tokenizer: a tiny BERT classifier in a local directory, made here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ecotone.model import capture, load_model
from ecotone.serving.prepare import Preparation, PrepareError
from ecotone.serving.sources import Item, open_source

transformers = pytest.importorskip("transformers", reason="needs the extra [hub]")
pytestmark = pytest.mark.torch
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "dog", "ran"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=3, id2label={0: "calm", 1: "glad", 2: "sad"},
        label2id={"calm": 0, "glad": 1, "sad": 2},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


def test_lines_become_what_the_model_itself_would_answer(directory: Path, tmp_path: Path) -> None:
    loaded = load_model(str(directory))
    captured = capture(loaded.module, loaded.args, loaded.kwargs, name="bert")
    preparation = Preparation.of(loaded, captured)
    (tmp_path / "lines.txt").write_text("the cat sat\n\nthe dog ran the dog\n")
    items = list(open_source(str(tmp_path / "lines.txt")))
    assert [item.name for item in items] == ["lines.txt:1", "lines.txt:3"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for item in items:
        got = preparation.outputs(captured.unflatten_outputs(captured.reference(preparation.flat(item))))
        with torch.no_grad():
            want = loaded.module(**tokenizer(item.value, return_tensors="pt"))
        torch.testing.assert_close(torch.from_numpy(next(iter(got.values()))), want.logits, rtol=1e-4, atol=1e-5)
    assert loaded.labels == ("calm", "glad", "sad")


def test_a_picture_for_a_text_model_is_refused(directory: Path) -> None:
    loaded = load_model(str(directory))
    preparation = Preparation.of(loaded, capture(loaded.module, loaded.args, loaded.kwargs, name="bert"))
    with pytest.raises(PrepareError, match=r"x\.npy"):
        preparation.prepare(Item("x.npy", "array", torch.zeros(1, 3).numpy()))
