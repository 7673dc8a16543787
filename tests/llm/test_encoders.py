"""Embeddings of tiny random encoders made here: those of transformers text by text, whole and over two machines."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.graph import Graph
from ecotone.llm.config import ModelError
from ecotone.llm.encoders import TextEncoder
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.runtime import deploy, in_memory

transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="the extra `hub` is not installed")
pytestmark = pytest.mark.torch

LINE = "to be or not that is the question whether tis nobler in mind suffer slings and arrows"
WORDS = LINE.split(" ")
SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 66,
}  # fmt: skip
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=1 + (i * 7) % 30)) for i in range(11)]


def saved(folder: Path, kind: str = "bert", modules: dict[str, Any] | None = None, **settings: Any) -> TextEncoder:
    """A random encoder of `kind` in `folder`, with sentence-transformers' files where `modules` (pooling) is given."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*specials, *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(len(kind))
    made = {"bert": ("BertConfig", "BertModel"), "roberta": ("XLMRobertaConfig", "XLMRobertaModel")}[kind]
    config = getattr(transformers, made[0])(vocab_size=len(vocabulary), pad_token_id=0, **SIZES)
    getattr(transformers, made[1])(config).save_pretrained(folder)
    if modules is not None:
        names = ["Transformer", "Pooling", *(["Normalize"] if settings.pop("unit", True) else [])]
        listed = [
            {"idx": i, "name": str(i), "path": f"{i}_{n}" if i else "", "type": f"s.m.{n}"} for i, n in enumerate(names)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modules))
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return TextEncoder.open(folder)


def right(encoder: TextEncoder, texts: list[str], pooling: str, unit: bool) -> torch.Tensor:
    """Each text alone, without padding, by transformers."""
    found = []
    for text in texts:
        ids = torch.tensor([encoder.text.tokenizer(text, truncation=True, max_length=encoder.max_tokens)["input_ids"]])
        with torch.inference_mode():
            states = encoder.body(input_ids=ids).last_hidden_state[0]
        pooled = {"mean": states.mean(0), "cls": states[0], "max": states.max(0).values, "lasttoken": states[-1]}[pooling]
        found.append(pooled / pooled.norm() if unit else pooled)
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 24}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
    ],
)
def test_vectors_are_those_of_each_text_alone(tmp_path: Path, kind: str, config: dict[str, Any], pooling: str) -> None:
    encoder = saved(tmp_path, kind, config, unit=pooling != "max")
    with torch.inference_mode():
        made = encoder.embed(TEXTS, encoder.module(), batch=4)
    torch.testing.assert_close(made, right(encoder, TEXTS, pooling, pooling != "max"), rtol=1e-5, atol=1e-5)


def test_without_sentence_files_it_is_the_mean_and_texts_that_are_too_long_are_cut(tmp_path: Path) -> None:
    encoder = saved(tmp_path, "roberta")
    assert (encoder.poolings, encoder.unit, encoder.max_tokens, encoder.width) == (("mean",), False, 65, 24)
    assert encoder.lengths == (32, 64, 65)
    texts = ["arrows " * 300, "mind"]
    with torch.inference_mode():
        made = encoder.embed(texts, encoder.module())
        torch.testing.assert_close(made, right(encoder, texts, "mean", False), rtol=1e-5, atol=1e-5)
        assert encoder.embed([], encoder.module()).shape == (0, 24)


def test_limits_and_lower_case_of_the_sentence_files_count(tmp_path: Path) -> None:
    encoder = saved(tmp_path, "bert", {"pooling_mode_mean_tokens": True}, max_seq_length=10, do_lower_case=True)
    assert encoder.max_tokens == 10
    with torch.inference_mode():
        module = encoder.module()
        assert torch.equal(encoder.embed(["TO BE"], module), encoder.embed(["to be"], module))
        assert torch.equal(encoder.embed(["to " * 8], module), encoder.embed(["to " * 20], module))


def two_stages(graph: Graph) -> tuple[Cluster, Plan]:
    a, b = DeviceId("a"), DeviceId("b")
    devices = tuple(Device(name=name, memory_bytes=1 << 30) for name in (a, b))
    links = tuple(Link(source=s, target=t, latency_s=0.0, bandwidth_bytes_per_s=1e9) for s, t in ((a, b), (b, a)))
    cut, end = graph.num_blocks // 2, graph.num_blocks
    parts = ((a, 0, cut), (b, cut, end))
    stages = tuple(Stage(device=d, start=start, stop=stop, executor="torch:fp32") for d, start, stop in parts)
    ways = ((a, a, 0, LOCAL), (a, b, cut, "fp32"), (b, a, end, "fp32"))
    transfers = tuple(Transfer(source=s, target=t, position=p, codec=c) for s, t, p, c in ways)
    cluster = Cluster(name="two", devices=devices, links=links, source=a, sink=a)
    return cluster, Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_deployed_over_two_machines_it_is_the_same(tmp_path: Path, kind: str) -> None:
    encoder = saved(tmp_path, kind, {"pooling_mode_mean_tokens": True})
    captured = encoder.capture(32)
    assert captured.graph.num_blocks >= 4
    cluster, plan = two_stages(captured.graph)
    with in_memory(cluster) as nodes, deploy(plan, captured, nodes) as session:
        made = encoder.embed(TEXTS, {32: session}, batch=4)  # batches of 4, 4 and 3
    torch.testing.assert_close(made, right(encoder, TEXTS, "mean", True), rtol=1e-5, atol=1e-5)


def test_what_is_not_computed_or_not_there_is_refused(tmp_path: Path) -> None:
    encoder = saved(tmp_path, "bert", {"pooling_mode_mean_tokens": True})
    with pytest.raises(ModelError, match="this encoder takes 1 to 66"):
        encoder.capture(67)
    with pytest.raises(ModelError, match="lengths must be 1 to 66"):
        encoder.embed(["to"], {})
    with pytest.raises(ModelError, match="came back for 1 texts of width 24"):
        encoder.embed(["to"], lambda ids, mask: torch.zeros(1, 5))
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(ModelError, match="pooling pooling_mode_weightedmean_tokens; computed are cls, mean"):
        TextEncoder.open(tmp_path)
    (tmp_path / "modules.json").write_text('[{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "../x"}]')
    with pytest.raises(ModelError, match="not to be trusted"):
        TextEncoder.open(tmp_path)
    (tmp_path / "modules.json").write_text('[{"type": "a.Transformer"}, {"type": "a.Pooling"}, {"type": "a.Dense"}]')
    with pytest.raises(ModelError, match="modules Transformer, Pooling, Dense; computed are"):
        TextEncoder.open(tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        TextEncoder.open(tmp_path)
