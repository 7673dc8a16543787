"""What the planner of language models predicts of a plan, beside what the running pipeline takes: first token and per token.

    ttft_factor_worst    measured over predicted time to the first token of 512 tokens, or the inverse: the worst plan
    tpot_factor_worst    the same of the time per token
    order_wrong          pairs of plans on the same links whose predictions differ by a fifth, in which the other is faster

Node processes on emulated machines, one twice as slow, profiled as `ecotone plan` does it (each part alone, random weights
of the shape), then four plans over three kinds of links: the planner's own for a request and for the first token, and even
cuts over two and three machines. Prompts are random, each asked once; medians of three answers of 24 tokens.
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import report
from benchmarks.llm_shards import SHAPE
from benchmarks.llm_world import ask, even_plan, greedy, machines, prompt_of
from ecotone.cluster import Cluster
from ecotone.llm.deploy import NODES, deploy_llm, join
from ecotone.llm.profile_build import build_profile
from ecotone.llm.service import GenerationService
from ecotone.llm.sources import describe
from ecotone.llm.weights import RandomWeights
from ecotone.llmcost import LlmCost, LlmCostModel, Shape
from ecotone.llmplan import LlmPlan
from ecotone.llmprofile import LlmProfile
from ecotone.planner.generation import Asked, choose_plan
from ecotone.runtime import Nodes, launch

EXECUTOR, PROMPT, ANSWER, CONTEXT = "native:int8", 512, 24, 1024
NAMES, SLOWDOWN = ("driver", "one", "two", "slow"), (1.0, 1.0, 1.0, 2.0)
LINKS = {"loopback": (1.25e9, 0.0), "100 Mbit/s, 10 ms": (12.5e6, 0.005), "10 Mbit/s, 50 ms": (1.25e6, 0.025)}
APART = 1.2


@dataclass(slots=True)
class Twin:
    """One plan on one kind of links."""

    links: str
    name: str
    cost: LlmCost
    ttft_s: list[float]
    tpot_s: list[float]

    def ratios(self) -> tuple[float, float]:
        """Measured over predicted."""
        return statistics.median(self.ttft_s) / self.cost.ttft_s, statistics.median(self.tpot_s) / self.cost.tpot_s


def linked(cluster: Cluster, bytes_per_s: float, latency_s: float) -> Cluster:
    links = (replace(link, bandwidth_bytes_per_s=bytes_per_s, latency_s=latency_s) for link in cluster.links)
    return replace(cluster, links=tuple(links))


def profiled(service: GenerationService, source: RandomWeights) -> LlmProfile:
    """The machines one after the other: the emulated ones share two cores."""
    config = source.config
    return build_profile(
        describe(source), {name: service.profile_at(name, config, (EXECUTOR,), 600.0) for name in NAMES[1:]}
    )


def plans(profile: LlmProfile, cluster: Cluster) -> dict[str, LlmPlan]:
    """What is compared. The driver holds no stage: its processor has the loop to run."""
    shape = Shape(prompt=PROMPT, answer=ANSWER, context=CONTEXT)
    made = {
        f"planned for {objective}": choose_plan(profile, cluster, Asked(shape=shape, objective=objective), gap=0.01).plan
        for objective in ("request", "ttft")
    }
    for devices in (NAMES[1:3], NAMES[1:]):
        plan = even_plan(SHAPE.num_layers, devices, EXECUTOR, driver=NAMES[0], context=CONTEXT, max_slots=1)
        made[f"even over {len(devices)}"] = replace(plan, model_hash=profile.model_hash)
    return made


def measured(
    service: GenerationService, cluster: Cluster, plan: LlmPlan, source: RandomWeights, rounds: int, seed: int
) -> tuple[list[float], list[float]]:
    """Times to the first token, and per token."""
    ttft_s, tpot_s = [], []
    with deploy_llm(service, cluster, plan, source) as generator:
        ask(generator, prompt_of(PROMPT, SHAPE.vocabulary, seed), greedy(ANSWER))  # what chunks take is learned
        for index in range(rounds):
            made = ask(generator, prompt_of(PROMPT, SHAPE.vocabulary, seed + 1 + index), greedy(ANSWER))
            ttft_s.append(made.first_s)
            tpot_s.append(made.gap_s)
    return ttft_s, tpot_s


def compare(nodes: Nodes, service: GenerationService, source: RandomWeights, rounds: int, seed: int) -> list[Twin]:
    profile, found = profiled(service, source), []
    for name, (bytes_per_s, latency_s) in LINKS.items():
        cluster = linked(nodes.cluster, bytes_per_s, latency_s)
        nodes.set_links(cluster.links)
        model = LlmCostModel(profile, cluster, Shape(prompt=PROMPT, answer=ANSWER, context=CONTEXT))
        for index, (title, plan) in enumerate(plans(profile, cluster).items()):
            cost = model.predict(plan)
            times = measured(service, cluster, plan, source, rounds, seed + 100 * index)
            found.append(Twin(name, title, cost, *times))
            first, each = found[-1].ratios()
            stages = " + ".join(f"{s.span.num_layers} on {s.device}" for s in plan.stages)
            told = f"first token {cost.ttft_s:6.3f} s x {first:.2f}, per token {cost.tpot_s * 1e3:6.1f} ms x {each:.2f}"
            print(f"{name:18s} {title:20s} {told}   {stages}", flush=True)
    return found


def figures_of(twins: list[Twin]) -> dict[str, float]:
    ratios = [twin.ratios() for twin in twins]
    wrong = 0
    for one, other in combinations(twins, 2):
        for figure in ("ttft_s", "tpot_s"):
            a, b = getattr(one.cost, figure), getattr(other.cost, figure)
            x, y = (statistics.median(getattr(twin, figure)) for twin in (one, other))
            if one.links == other.links and max(a, b) > APART * min(a, b):
                wrong += (a < b) != (x < y)
    return {
        "ttft_factor_worst": max(max(r, 1 / r) for r, _ in ratios),
        "tpot_factor_worst": max(max(r, 1 / r) for _, r in ratios),
        "order_wrong": wrong,
    }


def described(twin: Twin) -> dict[str, Any]:
    first, each = twin.ratios()
    return {
        "links": twin.links, "plan": twin.name, "stages": [[s.device, s.decode_s, s.chunk_s] for s in twin.cost.stages],
        "predicted": {"ttft_s": twin.cost.ttft_s, "tpot_s": twin.cost.tpot_s, "chunk_tokens": twin.cost.chunk_tokens},
        "measured": {"ttft_s": twin.ttft_s, "tpot_s": twin.tpot_s}, "ttft_ratio": first, "tpot_ratio": each,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = report.arguments(__doc__ or "", argv)
    source, cluster = RandomWeights(config=SHAPE, seed=options.seed), machines(NAMES, slowdown=SLOWDOWN)
    with launch(cluster, program=NODES) as nodes, join(nodes) as service:
        twins = compare(nodes, service, source, 1 if options.quick else 3, options.seed)
    about = report.context(options.seed, shape="Llama, 12 layers of width 1024, 158 M parameters", executor=EXECUTOR)
    report.finish(options.json, figures_of(twins), [described(twin) for twin in twins], about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
