"""Run as a process of its own by `trial.py`: says "trial passed" where an executor computes what float32 computes."""

from __future__ import annotations

import os
import sys

import torch

from ecotone.decoding.step import Row, Step
from ecotone.llm.executors.openvino_shard import OpenVinoShards
from ecotone.llm.executors.torch_shard import TorchShards
from ecotone.llm.executors.trial import TRIAL_CONFIG, random_ids
from ecotone.llm.kv import KvCache
from ecotone.llm.weights import RandomWeights
from ecotone.llmplan import Span

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.1, "int4": 0.6}


def main(id: str, cache: str, threads: int) -> int:
    """0 where prompt, decoding and a mixed step agree with torch:fp32."""
    source = RandomWeights(config=TRIAL_CONFIG)
    span, dtype = Span(start=0, stop=2, embedding=True, head=True), torch.bfloat16 if cache == "bf16" else torch.float32
    tried = OpenVinoShards(id, tried=True).load(source, span, KvCache(TRIAL_CONFIG, span, 1 << 20, dtype), threads=threads)
    right = TorchShards("torch:fp32").load(source, span, KvCache(TRIAL_CONFIG, span, 1 << 20, torch.float32))
    ids = random_ids(41)
    steps = [
        Step(rows=(Row(slot=0, start=0, count=40, num_logits=2),)),
        Step(rows=(Row(slot=0, start=40, count=1, num_logits=1),)),
        Step(rows=(Row(slot=0, start=39, count=2, num_logits=2), Row(slot=1, start=0, count=9, num_logits=9))),
    ]
    for step in steps:
        made, expected = (shard.forward(step, ids[: step.num_tokens]) for shard in (tried, right))
        error = float((made - expected).norm() / expected.norm())
        if not error < TOLERANCE[id.partition(":")[2]]:
            print(f"it computes with an error of {error:.2g}", file=sys.stderr)
            return 1
    print("trial passed", flush=True)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    sys.stdout.flush()
    os._exit(code)  # taking OpenVINO down has crashed; the verdict is said already
