"""Our own CPU kernels: their logic exactly (on a processor without rounding of activations), their precisions closely."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from decoder_families import FAMILIES, VOCABULARY, Made
from shard_chain import Chain, ragged

from ecotone.decoding.step import Row, Step
from ecotone.llm.config import DecoderConfig
from ecotone.llm.executors import native_library
from ecotone.llm.executors.executor import Continues, ShardError
from ecotone.llm.executors.native_library import Matrix, compiler, library_for
from ecotone.llm.executors.native_packing import BITS_PER_WEIGHT, pack_matrix, unpack_matrix
from ecotone.llm.executors.native_shard import NativeShards
from ecotone.llm.executors.torch_shard import TorchShards
from ecotone.llm.recipes import Recipe
from ecotone.llm.weights import WeightSource

pytestmark = [pytest.mark.torch, pytest.mark.skipif(not compiler(), reason="no C++ compiler here")]

SEQUENCES = [torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (18, 45)]
OLDER = "haswell" if __import__("platform").machine() == "x86_64" else "native"


class Kept:
    """A source whose matrices are already what the kernels keep of them, so that only computing can differ."""

    def __init__(self, source: WeightSource, bits: int):
        self.source, self.bits = source, bits

    @property
    def config(self) -> DecoderConfig:
        return self.source.config

    def read(self, recipe: Recipe) -> torch.Tensor:
        tensor = self.source.read(recipe)
        if len(recipe.shape) != 2 or "router" in recipe.name or recipe.name == "positions.weight":
            return tensor
        bits = (
            max(self.bits, 8)
            if recipe.name == "head.weight" or (recipe.name == "embedding.weight" and self.config.tied)
            else self.bits
        )
        return unpack_matrix(pack_matrix(tensor, bits), *recipe.shape, bits)


def difference(made: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((m - r).norm() / r.norm()) for m, r in zip(made, right, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_computed_as_the_reference_does(name: str, family: Made) -> None:
    source = family(name)[1]
    right = ragged(Chain(TorchShards("torch:fp32"), source), SEQUENCES, [7, 1, 12])
    for cut, chunks in ((None, [45]), (1, [7, 1, 12])):
        assert difference(ragged(Chain(NativeShards("native:fp32"), source, cut), SEQUENCES, chunks), right) < 1e-5
    source = Kept(source, 16)
    right = ragged(Chain(TorchShards("torch:fp32"), source), SEQUENCES, [7, 1, 12])
    factory = NativeShards("native:bf16", OLDER)
    if OLDER != "native":  # without bfloat16 units activations stay float32
        assert difference(ragged(Chain(factory, source, cut=1), SEQUENCES, [7, 1, 12]), right) < 3e-5
    half = Chain(factory, source, dtype=torch.bfloat16)
    if source.config.experts is None:  # rounding may send a token to another expert
        assert difference(ragged(half, SEQUENCES, [5, 2]), right) < 0.08


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("processor", ["native", OLDER])
def test_products(bits: int, processor: str) -> None:
    library, reason = library_for(processor)
    assert library is not None, reason
    for outputs, inputs, rows in ((16, 32, 1), (40, 96, 5), (33, 70, 9), (1, 1, 2)):
        weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
        packed, made, bias = pack_matrix(weight, bits), torch.empty(rows, outputs), torch.randn(outputs)
        record = Matrix(packed.data_ptr(), bias.data_ptr(), outputs, inputs, bits)
        library.ecotone_multiply(ctypes.byref(record), x.data_ptr(), rows, made.data_ptr(), 1)
        right = x @ unpack_matrix(packed, outputs, inputs, bits).t() + bias
        assert float((made - right).norm()) < 0.012 * float(right.norm())


@pytest.mark.parametrize(("bits", "error"), [(4, 0.1), (8, 0.01), (16, 0.003), (32, 1e-9)])
def test_what_packing_keeps(bits: int, error: float) -> None:
    weight = torch.randn(64, 96)
    packed = pack_matrix(weight, bits)
    assert packed.nbytes * 8 == BITS_PER_WEIGHT[bits] * weight.numel()
    assert float((unpack_matrix(packed, 64, 96, bits) - weight).norm()) < error * float(weight.norm())
    assert not unpack_matrix(pack_matrix(torch.zeros(5, 40), bits), 5, 40, bits).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_shards_stay_near_their_own_weights(bits: int, family: Made) -> None:
    for name in ("llama-tied-llama3", "gemma2", "qwen3", "gpt2"):
        source = Kept(family(name)[1], bits)
        right = ragged(Chain(TorchShards("torch:fp32"), source), SEQUENCES, [7, 1, 12])
        chain = Chain(NativeShards(f"native:int{bits}"), source, cut=2)
        assert difference(ragged(chain, SEQUENCES, [7, 1, 12]), right) < 0.12  # 8-bit activations through three layers
        assert bits < chain.shards[1].bits_per_weight < bits + 4.6


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_token_has_the_same_bits_alone_and_among_others(precision: str, family: Made) -> None:
    for name in ("llama", "gemma2", "qwen3-moe"):
        alone, together = (Chain(NativeShards(f"native:{precision}"), family(name)[1]) for _ in range(2))
        for chain in (alone, together):
            ragged(chain, [s[:8] for s in SEQUENCES], [8])
        one = [alone.run([Row(slot=1, start=8 + i, count=1, num_logits=1)], SEQUENCES[1][8 + i : 9 + i]) for i in range(15)]
        rows = [Row(slot=0, start=8, count=3, num_logits=3), Row(slot=1, start=8, count=15, num_logits=15)]
        window = together.run(rows, torch.cat([SEQUENCES[0][8:11], SEQUENCES[1][8:23]]))[3:]
        assert torch.equal(window, torch.cat(one))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_several_tokens_in_one_call_are_those_of_one_call_each(name: str, precision: str, family: Made) -> None:
    """Every family: scaled embeddings, learned positions, soft caps, experts, windows."""
    factory, source = NativeShards(f"native:{precision}"), family(name)[1]
    prompt, vocabulary = SEQUENCES[1][:20], VOCABULARY - 7  # a smaller vocabulary than the head's
    one, other = (Chain(factory, source).shards[0] for _ in range(2))
    tokens = prompt.tolist()
    rows, new = (Row(slot=0, start=0, count=len(tokens), num_logits=1),), prompt
    for _ in range(9):
        tokens.append(int(one.forward(Step(rows=rows), new)[-1][:vocabulary].argmax()))
        rows, new = (Row(slot=0, start=len(tokens) - 1, count=1, num_logits=1),), torch.tensor(tokens[-1:])
    other.forward(Step(rows=(Row(slot=0, start=0, count=len(prompt) - 1),)), prompt[:-1])
    assert isinstance(other, Continues)
    made = other.continue_greedily(0, len(prompt) - 1, int(prompt[-1]), 9, vocabulary)
    assert made == tokens[len(prompt) :]
    assert other.cache.tables.length(0) == len(prompt) + 8


def test_several_threads_compute_the_same(family: Made) -> None:
    source = family("llama")[1]
    made = []
    for threads in (1, 2):
        chain = Chain(NativeShards("native:int8"), source)
        chain.shards[0]._model.threads = threads  # type: ignore[attr-defined]
        made.append(ragged(chain, SEQUENCES, [9]))
    assert difference(*made) < 1e-6


def test_packed_matrices_come_back_from_disk(family: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path))
    monkeypatch.setattr("ecotone.llm.executors.packed_store.WORTH_BYTES", 0)
    checkpoint, made = family("llama")[1], []
    for _ in range(2):
        made.append(ragged(Chain(NativeShards("native:int4"), checkpoint), SEQUENCES, [9]))
        kept = sorted((tmp_path / "executors").glob("*.bin"))
        assert len(kept) == 3 * 4 + 2
    assert difference(*made) == 0
    kept[0].write_bytes(kept[0].read_bytes()[:-1])  # damaged: packed again, never used
    assert difference(ragged(Chain(NativeShards("native:int4"), checkpoint), SEQUENCES, [9]), made[0]) == 0


def test_a_library_that_fails_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Made) -> None:
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path))
    library_for.cache_clear()
    try:
        with pytest.raises(ShardError, match=r"native:int8: .* failed: "):
            Chain(NativeShards("native:int8", "no-such-processor"), family("llama")[1])
        monkeypatch.setattr(native_library, "_try", lambda built: "its trial ended with -4")
        monkeypatch.setattr(native_library, "_build", lambda *a: a[-1].write_bytes(b"") and "")
        (tmp_path / "native").mkdir(exist_ok=True)
        assert library_for("crashes") == (None, "its trial ended with -4")
        library_for.cache_clear()
        monkeypatch.setattr(native_library, "_try", lambda built: "")
        assert library_for("crashes") == (None, "its trial ended with -4")  # remembered
        monkeypatch.setattr(native_library, "compiler", lambda: "")
        library_for.cache_clear()
        assert "install g++" in NativeShards("native:int8").available("cpu")
        assert "not on cuda" in NativeShards("native:int8").available("cuda")
    finally:
        library_for.cache_clear()
