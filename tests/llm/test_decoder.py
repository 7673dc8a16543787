"""Every family against transformers' own model in float32: whole, at every cut, in chunks, together with others."""

from __future__ import annotations

import pytest
import torch
from decoder_families import BY_LENGTH, FAMILIES, LAYERS, VOCABULARY, Made, reference
from shard_chain import Chain, ragged

from ecotone.llm.executors.torch_shard import TorchShards

pytestmark = pytest.mark.torch

FLOAT = TorchShards("torch:fp32")
LENGTHS = (18, 45)  # transformers keeps the rotation of the longest sequence it has seen, so the shorter goes first


def relative(made: torch.Tensor, right: torch.Tensor) -> float:
    return float((made - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers_whole_and_at_every_cut(name: str, family: Made) -> None:
    model, checkpoint = family(name)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    right = [reference(model, ids) for ids in sequences]
    assert relative(right[1][:18], right[1][1:19]) > 0.1  # the reference tells positions apart
    for cut in (None, *range(LAYERS + 1)):
        if name in BY_LENGTH:
            made = [ragged(Chain(FLOAT, checkpoint, cut, len(s)), [s], [7, 1, 12])[0] for s in sequences]
        else:
            made = ragged(Chain(FLOAT, checkpoint, cut), sequences, [7, 1, 12])
        for mine, theirs in zip(made, right, strict=True):
            assert relative(mine, theirs) < 2e-5, cut


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in BY_LENGTH])
def test_greedy_text_is_that_of_transformers(name: str, family: Made) -> None:
    model, checkpoint = family(name)
    prompt = torch.randint(0, VOCABULARY, (9,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ids = prompt
        for _ in range(52):  # without a cache: nothing of theirs is shared with what is tested
            ids = torch.cat([ids, model(ids[None], use_cache=False).logits[0, -1].argmax()[None]])
    assert Chain(FLOAT, checkpoint, cut=1).greedy(prompt, 52) == ids[9:].tolist()
