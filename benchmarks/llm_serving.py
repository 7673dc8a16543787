"""Several requests over a pipeline of two nodes: tokens per second at 1, 4 and 16 of them, and a shared prefix.

    aggregate_speedup_1_to_4     tokens per second of four requests at once over those of one (at least 2)
    prefix_speedup_first_token   time to the first token behind a shared prefix of 512 tokens, cache off over on (at least 5)

The model is a Llama of 158 M random parameters in int8; two node processes and the driver, one thread each, on loopback.
Loads of 1, 4 and 16 requests are measured in turn within each round; medians of the rounds' ratios are judged. Beside
them under `cases`: what the formulas of No-bubbles say (max(n*tau, T)/n per token) of the stage times that were measured.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import report
from benchmarks.llm_shards import SHAPE
from benchmarks.llm_world import even_plan, greedy, machines, prompt_of, start, wait
from ecotone.llm.deploy import NODES, deploy_llm, join, settings_for
from ecotone.llm.generator import Generator
from ecotone.llm.sources import describe
from ecotone.llm.weights import RandomWeights
from ecotone.runtime import launch

LOADS = (1, 4, 16)
PREFIX, TAIL = 512, 24
CONTEXT = 1024


def tokens_per_s(generator: Generator, count: int, seed: int, length: int) -> float:
    """All tokens over the time from the first request's first token to the last one's last."""
    prompts = [prompt_of(32, SHAPE.vocabulary, seed + i) for i in range(count)]
    begin_s = time.perf_counter()
    answers = wait([start(generator, prompt, greedy(length)) for prompt in prompts])
    first = min(a.begin_s + a.first_s for a in answers) - begin_s
    last = max(a.begin_s + a.times_s[-1] for a in answers) - begin_s
    return (sum(len(a.tokens) for a in answers) - count) / (last - first)


def first_token_s(generator: Generator, seed: int, rounds: int) -> list[float]:
    """Times to the first token of requests that share PREFIX tokens; the first of them, which computes it, is left out."""
    prefix = prompt_of(PREFIX, SHAPE.vocabulary, seed)
    times = []
    for index in range(rounds + 1):
        prompt = prefix + prompt_of(TAIL, SHAPE.vocabulary, seed + 1000 + index)
        times.append(wait([start(generator, prompt, greedy(4))])[0].first_s)
    return times[1:]


def run(seed: int, rounds: int, length: int, executor: str) -> tuple[dict[str, float], dict[str, Any]]:
    """The figures, and what is behind them."""
    cluster = machines(("driver", "one", "two"))
    source = RandomWeights(config=SHAPE, seed=seed)
    plan = even_plan(SHAPE.num_layers, ("one", "two"), executor, driver="driver", context=CONTEXT, max_slots=16)
    settings = settings_for(plan, cluster, describe(source).fingerprint)
    rates: dict[int, list[float]] = {load: [] for load in LOADS}
    with launch(cluster, program=NODES) as nodes, join(nodes) as service:
        with deploy_llm(service, cluster, plan, source, settings=settings) as generator:
            tokens_per_s(generator, 2, seed, 8)
            for index in range(rounds):
                for load in LOADS:
                    rates[load].append(tokens_per_s(generator, load, seed + 100 * index, length))
            measured = generator.measured()
            cached = first_token_s(generator, seed + 1, rounds)
        off = replace(settings, reuse_prefixes=False)
        with deploy_llm(service, cluster, plan, source, settings=off) as generator:
            computed = first_token_s(generator, seed + 1, rounds)
    ratios = [four / one for one, four in zip(rates[1], rates[4], strict=True)]
    tau, loop = max(measured.stage_times_s), measured.loop_s
    figures = {
        "aggregate_speedup_1_to_4": statistics.median(ratios),
        "prefix_speedup_first_token": statistics.median(computed) / statistics.median(cached),
    }
    cases = {
        "executor": executor,
        "tokens_per_s": {str(load): statistics.median(found) for load, found in rates.items()},
        "tokens_per_s_rounds": {str(load): found for load, found in rates.items()},
        "speedup_1_to_16": statistics.median(b / a for a, b in zip(rates[1], rates[16], strict=True)),
        "first_token_s": {"cached": cached, "computed": computed, "prefix_tokens": PREFIX, "tail_tokens": TAIL},
        "pipeline": {"loop_s": loop, "stage_s": tau, "network_s": measured.network_s, "depth": measured.depth},
        "no_bubbles_tokens_per_s": {str(load): load / max(load * tau, loop) for load in (1, 2, 4)},
    }
    return figures, cases


def main(argv: list[str] | None = None) -> int:
    options = report.arguments(__doc__ or "", argv)
    rounds, length = (2, 24) if options.quick else (5, 96)
    figures, cases = run(options.seed, rounds, length, "native:int8")
    about = report.context(options.seed, shape="Llama, 12 layers of width 1024, 158 M parameters", processes=3)
    report.finish(options.json, figures, cases, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
