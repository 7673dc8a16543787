"""Weights on disk: only what is asked is read, and what is missing, damaged or hostile is said clearly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from decoder_families import FAMILIES, LAYERS, Made, make
from safetensors.torch import load_file, save_file

from ecotone.llm.config import ModelError
from ecotone.llm.recipes import layer_recipes, span_recipes
from ecotone.llm.weights import Checkpoint, RandomWeights, content_key, find_model, read_all
from ecotone.llmplan import Span

pytestmark = pytest.mark.torch

WHOLE = Span(start=0, stop=LAYERS, embedding=True, head=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A llama in two files with an index: layer 0 apart from the rest."""
    make("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    first = {n: t for n, t in tensors.items() if ".layers.0." in n}
    parts = {"model-1.safetensors": first, "model-2.safetensors": {n: t for n, t in tensors.items() if n not in first}}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def every(checkpoint: Checkpoint, span: Span) -> list[torch.Tensor]:
    before, layers, after = span_recipes(checkpoint.config, span)
    return [tensor for _, tensor in read_all(checkpoint, [*before, *(r for part in layers for r in part), *after])]


def test_a_shard_reads_only_its_own_files(folder: Path) -> None:
    (folder / "model-1.safetensors").write_bytes(b"not the weights of anything")
    checkpoint = Checkpoint.open(folder)
    assert len(every(checkpoint, Span(start=1, stop=LAYERS, head=True))) == 6 * (LAYERS - 1) + 2
    with pytest.raises(ModelError, match=r"model-1\.safetensors is not a whole safetensors file"):
        every(checkpoint, WHOLE)


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_are_accounted_to_the_last_one(name: str, family: Made) -> None:
    model, checkpoint = family(name)
    embedding, layers, head = checkpoint.stored_bytes(WHOLE)
    parameters = sum(p.nbytes for p in model.parameters())
    tied = model.get_input_embeddings().weight.nbytes if checkpoint.config.tied else 0
    assert embedding + sum(layers) + head == parameters + tied
    assert sum(t.nbytes for t in every(checkpoint, WHOLE)) == parameters + tied
    assert checkpoint.stored_bytes(Span(start=1, stop=2))[1] == layers[1:2]


def test_damage_is_named(folder: Path) -> None:
    second = folder / "model-2.safetensors"
    tensors = load_file(second)
    save_file({n: t[:-1] if n == "lm_head.weight" else t for n, t in tensors.items()}, second)
    with pytest.raises(ModelError, match=r"lm_head\.weight has shape \(95, 48\), the configuration says \(96, 48\)"):
        every(Checkpoint.open(folder), WHOLE)
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, second)
    with pytest.raises(ModelError, match=r"lm_head\.weight cannot be read|lm_head\.weight is in no file"):
        every(Checkpoint.open(folder), WHOLE)
    save_file({n: t.to(torch.int8) if n == "lm_head.weight" else t for n, t in tensors.items()}, second)
    with pytest.raises(ModelError, match=r"torch\.int8"):
        every(Checkpoint.open(folder), WHOLE)
    second.write_bytes(second.read_bytes()[:-5])
    with pytest.raises(ModelError, match="download it again"):
        every(Checkpoint.open(folder), WHOLE)
    second.unlink()
    with pytest.raises(ModelError, match=r"model-2\.safetensors is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin"])
def test_an_index_cannot_point_elsewhere(name: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ModelError, match="not to be trusted"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": ['])
def test_an_index_that_is_none(content: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="is not an index"):
        Checkpoint.open(folder)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ModelError, match="is a pickle, which is never opened; convert it"):
        Checkpoint.open(tmp_path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"fc.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="these weights are not of a llama model"):
        Checkpoint.open(tmp_path)


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="neither a directory nor a hub id") as caught:
        find_model("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_random_weights_do_not_depend_on_the_span(family: Made) -> None:
    config = family("llama")[1].config
    one, other, another = RandomWeights(config=config), RandomWeights(config=config), RandomWeights(config=config, seed=1)
    for recipe in layer_recipes(config, 2):
        assert torch.equal(one.read(recipe), other.read(recipe))
        assert not torch.equal(one.read(recipe), another.read(recipe))
    assert not torch.equal(one.read(layer_recipes(config, 1)[1]), one.read(layer_recipes(config, 2)[1]))


def test_a_content_key_tells_bytes_and_shapes_apart() -> None:
    a = torch.arange(6.0)
    different = [a, a.view(2, 3), a.bfloat16(), a + 1, torch.arange(5.0)]
    assert len({content_key([t]) for t in different}) == len(different)
    assert content_key([a]) == content_key([torch.arange(6.0)])
