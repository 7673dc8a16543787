"""What a cache allows a shard: roll back, fork, leave and come back, run full, and still compute what it computed before."""

from __future__ import annotations

import pytest
import torch
from decoder_families import VOCABULARY, Made
from shard_chain import Chain

from ecotone.decoding.step import Row
from ecotone.llm.executors.executor import ShardError
from ecotone.llm.executors.torch_shard import TorchShards
from ecotone.llm.kv import BLOCK_TOKENS, KvCache, KvCacheFull, SlotError
from ecotone.llmplan import Span
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

FLOAT = TorchShards("torch:fp32")
IDS = torch.randint(0, VOCABULARY, (90,), generator=torch.Generator().manual_seed(5))


def run(chain: Chain, slot: int, start: int, ids: torch.Tensor) -> torch.Tensor:
    return chain.run([Row(slot=slot, start=start, count=len(ids), num_logits=len(ids))], ids)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_roll_back_and_fork(name: str, family: Made) -> None:
    chain, other = (Chain(FLOAT, family(name)[1], cut=1) for _ in range(2))
    right = run(other, 0, 0, IDS)
    run(chain, 0, 0, IDS[:50])
    run(chain, 0, 50, IDS[:9])  # drafts that are refused
    assert torch.allclose(run(chain, 0, 50, IDS[50:70]), right[50:70], atol=1e-4)
    for shard in chain.shards:
        shard.cache.tables.fork(0, 7, 45)  # in the middle of a block
    assert torch.allclose(run(chain, 7, 45, IDS[45:90]), right[45:], atol=1e-4)
    assert torch.allclose(run(chain, 0, 70, IDS[70:90]), right[70:], atol=1e-4)  # untouched by its fork
    changed = IDS.clone()
    changed[46] = (changed[46] + 1) % VOCABULARY
    run(chain, 7, 46, changed[46:60])
    assert torch.allclose(run(chain, 0, 89, IDS[89:]), right[89:], atol=1e-4)


def test_keys_and_values_move_to_shards_with_another_cut(family: Made) -> None:
    checkpoint = family("qwen3")[1]
    old, new = Chain(FLOAT, checkpoint, cut=1), Chain(FLOAT, checkpoint, cut=2)
    right = run(Chain(FLOAT, checkpoint), 0, 0, IDS)
    run(old, 3, 0, IDS[:70])
    for shard in new.shards:
        for layer in range(shard.span.start, shard.span.stop):
            source = next(s for s in old.shards if s.span.start <= layer < s.span.stop)
            for start, stop in ((0, 40), (40, 70)):
                keys, values = source.cache.export(3, [layer], start, stop)
                assert keys.shape == values.shape == (1, 2, stop - start, 8)
                shard.cache.import_(5, [layer], start, keys, values)
    assert torch.allclose(run(new, 5, 70, IDS[70:]), right[70:], atol=1e-4)


def test_an_import_into_shared_blocks_leaves_the_other_alone(family: Made) -> None:
    config = family("llama")[1].config
    cache = KvCache(config, Span(start=0, stop=1), 1 << 20, torch.float32)
    first, second = (torch.randn(1, config.num_kv_heads, 40, config.head_size) for _ in range(2))
    cache.import_(0, [0], 0, first, first)
    cache.tables.fork(0, 1, 40)
    cache.import_(1, [0], 10, second[:, :, :20], second[:, :, :20])
    assert torch.equal(cache.export(0, [0], 0, 40)[0], first)
    mixed = torch.cat([first[:, :, :10], second[:, :, :20], first[:, :, 30:]], 2)
    assert torch.equal(cache.export(1, [0], 0, 40)[1], mixed)


def test_layers_from_two_sources_reach_a_prefix_that_was_forked_between(family: Made) -> None:
    """What a move does: layer 0 of a parent and its fork come, then layer 1 of the parent: its fork shares that too."""
    source = Chain(FLOAT, family("llama")[1])
    right = run(source, 0, 0, IDS)
    cache = source.shards[0].cache
    target = Chain(FLOAT, family("llama")[1])
    there, prefix = target.shards[0].cache, BLOCK_TOKENS * 2
    num_layers = cache.span.num_layers
    for layer in range(num_layers):
        there.import_(0, [layer], 0, *cache.export(0, [layer], 0, prefix), for_all=True)
        if layer == 0:
            there.tables.fork(0, 5, prefix)
    assert there.tables.table(0) == there.tables.table(5)  # no block was doubled
    for slot in (0, 5):
        assert torch.allclose(run(target, slot, prefix, IDS[prefix:]), right[prefix:], atol=1e-4)


def test_a_full_cache_refuses_and_goes_on(family: Made) -> None:
    checkpoint = family("llama")[1]
    right = run(Chain(FLOAT, checkpoint), 0, 0, IDS)
    block = checkpoint.config.kv_bytes_per_token(3, 4) * BLOCK_TOKENS
    chain = Chain(FLOAT, checkpoint, cap_bytes=3 * block + block // 2)
    assert chain.shards[0].cache.num_free_tokens == 96
    run(chain, 0, 0, IDS[:60])
    with pytest.raises(KvCacheFull, match="2 blocks of 32 tokens are needed, 1 of 3 are free"):
        run(chain, 1, 0, IDS[:40])
    assert torch.allclose(run(chain, 0, 60, IDS[60:]), right[60:], atol=1e-4)
    chain.shards[0].cache.tables.free(0)
    assert torch.allclose(run(chain, 1, 0, IDS[:40]), right[:40], atol=1e-4)


def test_misuse_is_named(family: Made) -> None:
    checkpoint = family("llama")[1]
    chain = Chain(FLOAT, checkpoint, cut=1)
    with pytest.raises(SlotError, match="position 3 would leave a gap"):
        run(chain, 0, 3, IDS[:2])
    with pytest.raises(ShardError, match="2 token ids are expected"):
        chain.run([Row(slot=0, start=0, count=2)], IDS[:3])
    with pytest.raises(ShardError, match=r"lie in \[0, 96\)"):
        chain.run([Row(slot=0, start=0, count=2)], torch.tensor([1, VOCABULARY]))
    run(chain, 0, 0, IDS[:4])
    cache = chain.shards[0].cache
    with pytest.raises(SlotError, match="holds 4 tokens"):
        cache.export(0, [0], 0, 5)
    with pytest.raises(SlotError, match="layer 2 is not among"):
        cache.export(0, [2], 0, 4)
    with pytest.raises(EcotoneError, match="holds no block; layers \\[0, 3\\) needs at least"):
        KvCache(checkpoint.config, Span(start=0, stop=3), 1000, torch.float32)


def test_positions_beyond_what_was_learned(family: Made) -> None:
    chain = Chain(FLOAT, family("gpt2")[1])
    ids = torch.zeros(256, dtype=torch.long)
    chain.run([Row(slot=0, start=0, count=256)], ids)
    with pytest.raises(ShardError, match="position 256 is beyond the 256"):
        chain.run([Row(slot=0, start=256, count=1)], ids[:1])
