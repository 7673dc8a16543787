"""Models by name: each form of the convention works, and each mistake is one line with its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ecotone.model import ModelError, Preprocess, capture, load_model, parse_shape

pytestmark = pytest.mark.torch

SOURCE = """
import torch
from torch import nn
import neighbour

instance = nn.Linear(3, 2)

def pair():
    return nn.Linear(3, 2), torch.ones(1, 3)

def triple():
    return nn.Linear(3, 2), (), {"input": torch.ones(1, 3)}

class Full:
    module = nn.Dropout()
    example_inputs = (torch.ones(1, 3),)
    labels = ["cat", "dog"]
    preprocess = {"height": 4, "width": 5}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, neighbour.WIDTH)

    def forward(self, x):
        return self.lin(x)

def number():
    return 3

def broken():
    return 1 / 0

def leaves():
    raise SystemExit(3)

def mismatched():
    model = nn.Sequential(nn.Linear(3, 2))
    model.load_state_dict({"0.weight": torch.zeros(2, 4), "0.bias": torch.zeros(2), "1.extra": torch.zeros(1)})
    return model

def wants(x):
    return x
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("WIDTH = 7\n")
    (tmp_path / "syntax.py").write_text("x = 1\ndef (\n")
    (tmp_path / "bad.pt2").write_text("hello")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("attribute", ["instance", "pair", "triple", "Net"])
def test_callables(folder: Path, attribute: str) -> None:
    loaded = load_model(f"net.py:{attribute}")
    assert isinstance(loaded.module, nn.Module)
    assert not loaded.module.training
    assert len(loaded.args) + len(loaded.kwargs) == (1 if attribute in ("pair", "triple") else 0)
    if attribute == "triple":
        assert capture(loaded.module, loaded.args, loaded.kwargs).graph.num_blocks == 1


def test_objects_with_labels_and_shapes(folder: Path) -> None:
    loaded = load_model("net.py:Full")
    assert loaded.labels == ("cat", "dog")
    assert loaded.preprocess == Preprocess(height=4, width=5)
    shaped = load_model(str(folder / "net.py") + ":instance", input_shape="5x3")
    assert shaped.args[0].shape == (1, 5, 3)
    assert capture(shaped.module, shaped.args).graph.num_blocks == 1


def test_an_installed_module() -> None:
    assert load_model("torch.nn:Identity").name == "torch.nn:Identity"


def test_exported_program(folder: Path) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3)
    torch.export.save(torch.export.export(model, (x,)), folder / "net.pt2")
    loaded = load_model("net.pt2")
    captured = capture(loaded.module, loaded.args, loaded.kwargs)
    with torch.no_grad():
        assert torch.equal(captured.unflatten_outputs(captured.reference((x,))), model(x))


def save_tiny_bert(path: Path) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(path)
    return model


def test_hugging_face_text_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_bert(folder / "bert")
    capsys.readouterr()
    loaded = load_model("bert")
    assert capsys.readouterr() == ("", "")
    assert (loaded.labels, loaded.tokenizer) == (("no", "yes"), "bert")
    captured = capture(loaded.module, loaded.args, loaded.kwargs)
    found = captured.unflatten_outputs(captured.reference(captured.flatten_inputs(loaded.args, loaded.kwargs)))
    with torch.no_grad():
        assert torch.equal(found.logits, model(**loaded.kwargs).logits)


def test_hugging_face_image_directory(folder: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder / "resnet")
    document = {"size": {"shortest_edge": 64}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}
    (folder / "resnet" / "preprocessor_config.json").write_text(json.dumps(document))
    loaded = load_model("resnet", input_shape="3x64x64")
    assert loaded.preprocess == Preprocess(height=64, width=64, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert capture(loaded.module, loaded.args).graph.tensors[0].shape == (1, 3, 64, 64)
    (folder / "resnet" / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"preprocessor_config\.json: cannot be read"):
        load_model("resnet")


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("hidden_size", 32, "mismatched weights: bert.embeddings"),
    ("num_hidden_layers", 2, "mismatched weights: bert.encoder.layer.1"),
])  # fmt: skip
def test_mismatched_hugging_face_weights_are_named(folder: Path, key: str, value: Any, expected: str) -> None:
    save_tiny_bert(folder / "bert")
    config = json.loads((folder / "bert" / "config.json").read_text())
    (folder / "bert" / "config.json").write_text(json.dumps(config | {key: value}))
    assert_refused("bert", expected)


def test_truncated_hugging_face_weights(folder: Path) -> None:
    save_tiny_bert(folder / "bert")
    weights = folder / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert_refused("bert", "bert: cannot be loaded")


def assert_refused(name: str, expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # a remedy follows


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net.py:number", "gives a int, not a torch.nn.Module"),
        ("net.py:broken", "raised ZeroDivisionError at net.py:"),
        ("net.py:leaves", "raised SystemExit at net.py:"),
        ("net.py:mismatched", "mismatched weights: 0.weight, 1.extra"),
        ("net.py:wants", "needs arguments"),
        ("net.py:nope", "net.py has no 'nope'; it has Full, Net"),
        ("net.py", "names no callable"),
        ("absent.py:x", "absent.py: no such file"),
        ("syntax.py:x", "raised SyntaxError at syntax.py:2"),
        ("absent.module:x", "absent.module: no such module"),
        ("a b:c", "neither a module name nor a Python file"),
        ("./nothing", "no such model"),
        ("empty", "has no config.json"),
        ("bad.pt2", "is not an exported program"),
        ("absent.pt2", "no such file"),
    ],
)
def test_mistakes(folder: Path, name: str, expected: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused(name, expected)
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused("no-such-owner/no-such-model", "the hub did not give it")


@pytest.mark.parametrize("text", ["3x", "axb", "3x0x4", "-3", "1x1x1x1x1x1x1"])
def test_wrong_shapes(text: str) -> None:
    with pytest.raises(ModelError, match="3x224x224"):
        parse_shape(text)


def test_shapes() -> None:
    assert parse_shape("3x224x224") == parse_shape("3,224,224") == (3, 224, 224)
    assert parse_shape("") == ()
