"""One shard of a 160 M-parameter Llama by every executor: prompts of 128 and 512 tokens, decoding, windows of four.

One thread, one machine, no network: what the executors of docs/llm.md can do, beside float32 in eager PyTorch with a
key-value cache ("torch:fp32"). Contenders are measured in turn within each round. A time is the processor time of the
process, best of the round, so that a busy machine changes it little; medians over rounds are written.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import report
from ecotone.decoding.step import Row, Step
from ecotone.llm.config import DecoderConfig, LayerConfig, RopeConfig
from ecotone.llm.executors import IDS, ShardExecutor, by_id, cache_dtype, catalogue
from ecotone.llm.kv import KvCache
from ecotone.llm.weights import RandomWeights
from ecotone.llmplan import Span
from ecotone.units import EcotoneError

SHAPE = DecoderConfig(
    family="llama", vocabulary=8192, width=1024, num_heads=16, num_kv_heads=8, head_size=64, ffn_width=2816,
    max_positions=2048, layers=(LayerConfig(),) * 12, ropes=(RopeConfig(rotary_size=64, original_positions=2048),),
)  # fmt: skip
WHOLE = Span(start=0, stop=SHAPE.num_layers, embedding=True, head=True)
CACHE_BYTES = 1 << 28
STEPS = {
    "prefill128": (0, 128, 1),
    "decode128": (128, 1, 1),
    "window128": (128, 4, 4),
    "prefill512": (0, 512, 1),
    "decode512": (512, 1, 1),
}


def step_s(shard: ShardExecutor, ids: torch.Tensor, start: int, count: int, repeats: int) -> float:
    """Processor seconds of the fastest of `repeats` steps of `count` tokens from `start`, the last asking for logits."""
    step = Step(rows=(Row(slot=0, start=start, count=count, num_logits=1 if count > 4 else count),))
    best = float("inf")
    for _ in range(repeats):
        before = time.process_time()
        shard.forward(step, ids[start : start + count])
        best = min(best, time.process_time() - before)
    return best


def loaded(seed: int) -> dict[str, tuple[ShardExecutor, float]]:
    """Every executor that works here, with the seconds it took to load."""
    source, made = RandomWeights(config=SHAPE, seed=seed), {}
    for id, reason in catalogue(SHAPE, "cpu").items():
        before = time.perf_counter()
        try:
            if reason:
                raise EcotoneError(reason)
            shard = by_id(id).load(source, WHOLE, KvCache(SHAPE, WHOLE, CACHE_BYTES, cache_dtype(id)))
        except EcotoneError as error:
            print(f"{id}: left out: {error}", flush=True)
            continue
        made[id] = shard, time.perf_counter() - before
    return made


def measure(shards: dict[str, tuple[ShardExecutor, float]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of every shard and kind of step, one value per round."""
    ids = torch.randint(0, SHAPE.vocabulary, (600,), generator=torch.Generator().manual_seed(1))
    rates: dict[str, dict[str, list[float]]] = {id: {name: [] for name in STEPS} for id in shards}
    for _ in range(rounds):
        for id, (shard, _) in shards.items():
            for name, (start, count, _) in STEPS.items():
                seconds = step_s(shard, ids, start, count, repeats=1 if count > 4 else 10)
                rates[id][name].append(count / seconds)
    return rates


def main() -> int:
    """Measure and write the figures."""
    options = report.arguments(__doc__ or "")
    torch.set_num_threads(1)
    shards = loaded(options.seed)
    rates = measure(shards, rounds=2 if options.quick else 5)
    cases: dict[str, Any] = {}
    for id in (i for i in IDS if i in shards):
        shard, load_s = shards[id]
        about = {"bits_per_weight": shard.bits_per_weight, "weight_bytes": shard.weight_bytes, "load_s": load_s}
        cases[id] = about | {f"{name}_tokens_per_s": report.median(values) for name, values in rates[id].items()}
        row = " ".join(f"{cases[id][f'{name}_tokens_per_s']:10.1f}" for name in STEPS)
        print(f"{id:16s} {shard.bits_per_weight:5.2f} bits {shard.weight_bytes / 1e6:6.0f} MB {row}", flush=True)
    eager = cases["torch:fp32"]

    def best(kind: str, bits: float) -> float:
        near = [c for c in cases.values() if abs(c["bits_per_weight"] - bits) < 0.5]
        return max(c[f"{kind}_tokens_per_s"] for c in near) / eager[f"{kind}_tokens_per_s"]

    figures = {
        "decode4_over_eager": best("decode128", 4.6),
        "decode8_over_eager": best("decode128", 8.3),
        "prefill_over_eager": max(c["prefill128_tokens_per_s"] for c in cases.values()) / eager["prefill128_tokens_per_s"],
    }
    report.finish(options.json, figures, cases, report.context(options.seed, threads=1, layers=12, time="process"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
