"""The small model that ships and its drafter: they load, speak, agree with transformers, and know the held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shard_chain import Chain

import ecotone
from ecotone.decoding.step import Row
from ecotone.llm.executors.torch_shard import TorchShards
from ecotone.llm.text import TextModel
from ecotone.llm.weights import Checkpoint

transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
pytestmark = pytest.mark.torch

ASSETS = Path(ecotone.__file__).parent / "assets"
SHAKESPEARE = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinyshakespeare.txt"
FLOAT = TorchShards("torch:fp32")


def test_it_is_small_and_both_share_a_tokenizer() -> None:
    files = [path for name in ("tiny-llm", "tiny-drafter") for path in (ASSETS / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    assert (ASSETS / "tiny-llm" / "tokenizer.json").read_bytes() == (ASSETS / "tiny-drafter" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["tiny-llm", "tiny-drafter"])
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    text = TextModel.open(ASSETS / name)
    prompt = torch.tensor(text.encode_chat([{"role": "user", "content": "What news of the king?"}]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32)
    right = theirs.generate(prompt[None], max_new_tokens=60, min_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
    chain = Chain(FLOAT, Checkpoint.open(ASSETS / name), cut=1, context=1024)
    assert chain.shards[0].config.stop_tokens == (text.stop_token,)
    made = Chain(FLOAT, Checkpoint.open(ASSETS / name), context=1024).greedy(prompt, 12)
    assert chain.greedy(prompt, 12) == made
    # transformers forbids the end token for its 60; up to where it would have come the texts agree
    until = made.index(text.stop_token) if text.stop_token in made else len(made)
    assert until > 2
    assert made[:until] == right[:until]


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="../shared/data/tinyshakespeare.txt is not here")
@pytest.mark.parametrize("name", ["tiny-llm", "tiny-drafter"])
def test_held_out_text(name: str) -> None:
    held_out = SHAKESPEARE.read_text()
    ids = torch.tensor(TextModel.open(ASSETS / name).encode(held_out[int(0.9 * len(held_out)) :][:20_000])[:4096])
    chain, losses = Chain(FLOAT, Checkpoint.open(ASSETS / name), context=1024, cap_bytes=1 << 24), []
    for slot, window in enumerate(ids.view(8, 512)):
        logits = chain.run([Row(slot=slot, start=0, count=512, num_logits=512)], window)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:]))
    assert 3.0 < float(torch.stack(losses).mean()) < 4.05  # the whole held-out tenth: 3.83
