"""Shard executors beside the reference: precisions of PyTorch's kernels, OpenVINO, two executors over one cache, trials."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
from decoder_families import VOCABULARY, Made
from shard_chain import Chain, ragged

from ecotone.decoding.step import Row
from ecotone.llm.executors import IDS, by_id, cache_dtype, catalogue, trial
from ecotone.llm.executors.executor import ShardError
from ecotone.llm.executors.linears import pack
from ecotone.llm.executors.openvino_shard import OpenVinoShards
from ecotone.llm.executors.torch_shard import TorchShards
from ecotone.llm.executors.trial import TRIAL_CONFIG
from ecotone.llm.kv import KvCacheFull
from ecotone.llm.weights import RandomWeights

pytestmark = pytest.mark.torch

needs_openvino = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("openvino", "nncf")), reason="the extra `fast` is not installed"
)
FLOAT = TorchShards("torch:fp32")
SEQUENCES = [torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (18, 45)]
RANDOM = RandomWeights(config=TRIAL_CONFIG)


def difference(made: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((m - r).norm() / r.norm()) for m, r in zip(made, right, strict=True))


@pytest.mark.parametrize(("precision", "error", "bits"), [("bf16", 0.03, 16), ("int8", 0.06, 8.2), ("int4", 0.5, 4.6)])
def test_precisions_of_torch(precision: str, error: float, bits: float) -> None:
    right = ragged(Chain(FLOAT, RANDOM), SEQUENCES, [9])
    chain = Chain(by_id(f"torch:{precision}"), RANDOM, cut=1, dtype=torch.bfloat16)
    few, many = ragged(chain, SEQUENCES, [5]), ragged(Chain(by_id(f"torch:{precision}"), RANDOM), SEQUENCES, [40])
    assert 0 < difference(few, right) < error
    assert 0 < difference(many, right) < error  # from 16 rows on another kernel computes
    assert all(0 < shard.bits_per_weight <= bits for shard in chain.shards)
    assert sum(shard.weight_bytes for shard in chain.shards) > 0


def test_int8_of_any_width() -> None:
    for inputs in (8, 24, 40, 48):  # PyTorch's kernel dies of inputs that are no multiple of 16
        weight, x = torch.randn(20, inputs), torch.randn(3, inputs)
        made = pack(weight, None, "int8", "cpu")(x.bfloat16())
        assert difference([made.float()], [x @ weight.t()]) < 0.03


@needs_openvino
@pytest.mark.parametrize("name", ["llama-yarn", "mistral", "gemma3", "phi", "gpt2", "qwen3"])
def test_openvino_in_float32(name: str, family: Made) -> None:
    source = family(name)[1]
    right = ragged(Chain(FLOAT, source), SEQUENCES, [7, 1, 12])
    assert (
        difference(ragged(Chain(OpenVinoShards("openvino:fp32", True), source, cut=1), SEQUENCES, [7, 1, 12]), right) < 2e-5
    )


@needs_openvino
@pytest.mark.parametrize(("precision", "error"), [("int8", 0.06), ("int4", 0.5)])
def test_openvino_with_compressed_weights(precision: str, error: float) -> None:
    right = ragged(Chain(FLOAT, RANDOM), SEQUENCES, [9])
    chain = Chain(OpenVinoShards(f"openvino:{precision}", True), RANDOM)
    assert 0 < difference(ragged(chain, SEQUENCES, [11, 1]), right) < error


@needs_openvino
def test_two_executors_share_one_cache_and_roll_back() -> None:
    right = ragged(Chain(FLOAT, RANDOM), SEQUENCES, [9])
    prefill, decode = OpenVinoShards("openvino:fp32", True), FLOAT
    phased = by_id("openvino:fp32+torch:fp32")
    assert phased.id == f"{prefill.id}+{decode.id}"
    chain = Chain(type(phased)(prefill, decode), RANDOM)  # type: ignore[call-arg]
    assert difference(ragged(chain, SEQUENCES, [20, 1, 2]), right) < 1e-5
    again = chain.run([Row(slot=1, start=10, count=35, num_logits=35)], SEQUENCES[1][10:])
    assert difference([again], [right[1][10:]]) < 1e-5
    single = Chain(decode, RANDOM).shards[0].weight_bytes
    assert chain.shards[0].weight_bytes > 1.9 * single  # two copies are counted


@pytest.mark.parametrize("cut", [None, 1])
def test_a_mixed_step_is_split_by_rows(cut: int | None) -> None:
    plain, mixed = Chain(FLOAT, RANDOM, cut), Chain(by_id("torch:bf16+torch:fp32"), RANDOM, cut)
    for chain in (plain, mixed):
        chain.run([Row(slot=0, start=0, count=8)], SEQUENCES[0][:8])
    rows = [Row(slot=0, start=8, count=2, num_logits=2), Row(slot=1, start=0, count=30, num_logits=3)]
    rows.append(Row(slot=2, start=0, count=1, num_logits=1))
    ids = torch.cat([SEQUENCES[0][8:10], SEQUENCES[1][:30], SEQUENCES[0][:1]])
    right, made = plain.run(rows, ids), mixed.run(rows, ids)
    few = [0, 1, 5]
    assert torch.allclose(made[few], right[few], atol=1e-4)
    assert 1e-4 < difference([made[2:5]], [right[2:5]]) < 0.05  # the other executor's rounding
    with pytest.raises(KvCacheFull):
        mixed.run([Row(slot=8, start=0, count=3), Row(slot=9, start=0, count=10_000)], torch.zeros(10_003, dtype=torch.long))
    assert mixed.shards[0].cache.tables.length(8) == 0


@needs_openvino
def test_catalogue_and_refusals(family: Made) -> None:
    config = family("gemma2")[1].config
    table = catalogue(config, "cpu")
    assert tuple(table) == IDS
    assert table["torch:fp32"] == ""
    assert "soft-capped" in table["openvino:int8"]
    assert "experts" in catalogue(family("mixtral")[1].config, "cpu")["openvino:bf16"]
    assert "not on cuda" in catalogue(config, "cuda")["openvino:bf16"]
    with pytest.raises(ShardError, match="soft-capped"):
        Chain(by_id("openvino:fp32"), family("gemma2")[1])
    with pytest.raises(ShardError, match="'fast' is unknown; known: torch:fp32"):
        by_id("fast")
    with pytest.raises(ShardError, match="unknown precision"):
        Chain(TorchShards("torch:int3"), RANDOM)
    assert cache_dtype("torch:fp32") == torch.float32
    assert cache_dtype("openvino:bf16+native:int4") == torch.bfloat16


@needs_openvino
def test_an_executor_that_dies_in_its_trial_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path))
    answers = iter([(-8, "", ""), (1, "", "a\nit computes with an error of 0.9"), (-11, "trial passed\n", "")])

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        code, out, err = next(answers)
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(trial.subprocess, "run", run)
    assert "died in its trial (SIGFPE)" in trial.trial_reason("openvino:int8", "bf16", 1, "v1")
    assert "died" in trial.trial_reason("openvino:int8", "bf16", 1, "v1")  # remembered: not run again
    with pytest.raises(ShardError, match=r"openvino:fp32: its trial failed: it computes with an error of 0\.9"):
        Chain(by_id("openvino:fp32"), RANDOM)
    assert trial.trial_reason("openvino:int8", "bf16", 2, "v1") == ""  # died only after it had answered


@needs_openvino
def test_a_real_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path))
    assert trial.trial_reason("openvino:fp32", "fp32", 1, "test") == ""
