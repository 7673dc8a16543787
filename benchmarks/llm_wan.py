"""Speculation over a wide area: tokens per second with drafts in flight over those of plain decoding, link by link.

    speedup_over_formula_min        least speedup over T/((1-a)T + a*tau): a measured acceptance, T loop, tau slowest stage
    speculation_speedup_best_50ms   best speedup at a round trip of 50 ms, where acceptance is 0.85 or more
    speculation_speedup_min         least speedup anywhere
    greedy_mismatches               tokens that differ from one machine's, with drafts or without

The bundled model (tiny-llm, trained) over two node processes and the driver; links of 0, 20, 50 and 100 ms round trip and
10 to 1000 Mbit/s in user space, every hop alike (so a loop is one and a half round trips). The drafter is what `serve`
uses: n-grams of the context where they match, else the bundled tiny-drafter; the window adapts. Two fixed sets of prompts:
"novel", openings of speeches from plays that were held out of training, and "copy", refrains that the model goes on with
(it is too small to quote a passage; these were chosen among eight refrains because it does repeat them). Plain and
speculative answers to the same prompt alternate, over the same stages.
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import ecotone
from benchmarks import report
from benchmarks.llm_world import Timeline, ask, even_plan, greedy, machines
from ecotone.cluster import Link
from ecotone.decoding.speculation import PLAIN, PromptLookup, SpeculationPolicy, SpeculationState, Window
from ecotone.decoding.step import Row, Step
from ecotone.decoding.window import AdaptivePolicy
from ecotone.llm.deploy import NODES, deploy_llm, join
from ecotone.llm.drafters import Chain, model_drafter
from ecotone.llm.executors import by_id
from ecotone.llm.generator import Generator
from ecotone.llm.kv import KvCache
from ecotone.llm.text import TextModel
from ecotone.llm.weights import Checkpoint
from ecotone.llmplan import Span
from ecotone.runtime import Nodes, launch

ASSETS = Path(ecotone.__file__).parent / "assets"
ROUND_TRIPS_S = (0.0, 0.02, 0.05, 0.1)
RATES_BIT_PER_S = (10e6, 100e6, 1000e6)
EXECUTOR, CONTEXT = "native:fp32", 1024
NOVEL = (
    "BIONDELLO:\nMaster, master! news, old news, and such news as\nyou never heard of!\n\nBAPTISTA:\n",
    "PETRUCHIO:\nFather, 'tis thus: yourself and all the world,\nThat talk'd of her, have talk'd amiss of her:\n",
)
REFRAINS = (
    "MENENIUS:\nI do not, sir, sir.\n\n" * 6,
    "KING EDWARD IV:\nI will not, I will not, and I will not.\n\n" * 10,
)


@dataclass(slots=True)
class Switched:
    """A policy that can be switched off."""

    policy: SpeculationPolicy
    is_on: bool = True

    def decide(self, state: SpeculationState) -> Window:
        return self.policy.decide(state) if self.is_on else PLAIN


@dataclass(slots=True)
class Case:
    """One link and set of prompts: seconds per token of each pair of answers, and what drafting did."""

    plain_s: list[float] = field(default_factory=list)
    drafted_s: list[float] = field(default_factory=list)
    judged: int = 0
    accepted: int = 0
    mismatches: int = 0
    loop_s: float = 0.0
    stage_s: float = 0.0

    @property
    def speedup(self) -> float:
        return sum(self.plain_s) / sum(self.drafted_s)

    @property
    def acceptance(self) -> float:
        return self.accepted / max(self.judged, 1)

    @property
    def formula(self) -> float:
        """The speedup that unlimited frames would give, of the plain loop as it was measured."""
        loop_s, a = statistics.median(self.plain_s), self.acceptance
        return loop_s / ((1 - a) * loop_s + a * self.stage_s)


def truth(source: Checkpoint, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy answers of the whole model in this process."""
    span = Span(start=0, stop=source.config.num_layers, embedding=True, head=True)
    shard = by_id(EXECUTOR).load(source, span, KvCache(source.config, span, 1 << 26, torch.float32), "cpu", 1, CONTEXT)
    answers = []
    for slot, prompt in enumerate(prompts):
        rows, tokens, answer = Row(slot=slot, start=0, count=len(prompt), num_logits=1), prompt, list[int]()
        for _ in range(count):
            answer.append(int(shard.forward(Step(rows=(rows,)), torch.tensor(tokens))[-1].argmax()))
            rows, tokens = Row(slot=slot, start=len(prompt) + len(answer) - 1, count=1, num_logits=1), answer[-1:]
        answers.append(answer)
    return answers


def shape(nodes: Nodes, round_trip_s: float, bit_per_s: float) -> None:
    """Every link at this rate and half the round trip."""
    links = [
        Link(source=k.source, target=k.target, bandwidth_bytes_per_s=bit_per_s / 8, latency_s=round_trip_s / 2)
        for k in nodes.cluster.links
    ]
    nodes.set_links(tuple(links))


def measure(
    generator: Generator, switch: Switched, prompts: list[list[int]], right: list[list[int]], rounds: int
) -> Case:  # fmt: skip
    """Plain and speculative answers in turn."""
    case, count = Case(), len(right[0])
    for is_on in (False, True):  # the pace of this link is learned
        switch.is_on = is_on
        ask(generator, prompts[0], greedy(min(count, 12)))
    for _ in range(rounds):
        for prompt, answer in zip(prompts, right, strict=True):
            for is_on in (False, True):
                switch.is_on = is_on
                before = generator.measured().counts
                made = ask(generator, prompt, greedy(count))
                after = generator.measured().counts
                (case.drafted_s if is_on else case.plain_s).append(made.per_token_s)
                case.judged += after.get("drafts_judged", 0) - before.get("drafts_judged", 0)
                case.accepted += after.get("drafts_accepted", 0) - before.get("drafts_accepted", 0)
                case.mismatches += differing(made, answer)
    measured = generator.measured()
    case.loop_s, case.stage_s = measured.loop_s, max(measured.stage_times_s)
    return case


def differing(made: Timeline, right: list[int]) -> int:
    return sum(a != b for a, b in zip(made.tokens, right, strict=False)) + abs(len(made.tokens) - len(right))


def run(seed: int, rounds: int, count: int, trips: tuple[float, ...], rates: tuple[float, ...]) -> dict[str, Case]:
    """Every case by name."""
    source, text = Checkpoint.open(ASSETS / "tiny-llm"), TextModel.open(ASSETS / "tiny-llm")
    sets = {
        "copy": [text.encode(refrain) for refrain in REFRAINS],
        "novel": [text.encode(prompt) for prompt in NOVEL],
    }
    right = {name: truth(source, prompts, count) for name, prompts in sets.items()}
    drafter = Chain(
        PromptLookup(), model_drafter(Checkpoint.open(ASSETS / "tiny-drafter"), text, "native:fp32", context=CONTEXT)
    )
    switch = Switched(AdaptivePolicy())
    cluster = machines(("driver", "one", "two"))
    plan = even_plan(source.config.num_layers, ("one", "two"), EXECUTOR, driver="driver", context=CONTEXT, max_slots=4)
    cases: dict[str, Case] = {}
    with (
        launch(cluster, program=NODES) as nodes,
        join(nodes) as service,
        deploy_llm(service, cluster, plan, source, policy=switch, drafter=drafter) as generator,
    ):
        for trip_s in trips:
            for rate in rates:
                shape(nodes, trip_s, rate)
                for name, prompts in sets.items():
                    case = measure(generator, switch, prompts, right[name], rounds)
                    label = f"{name}, {trip_s * 1e3:.0f} ms, {rate / 1e6:.0f} Mbit/s"
                    cases[label] = case
                    told = f"{case.speedup:.2f} times, formula {case.formula:.2f}, acceptance {case.acceptance:.2f}"
                    print(f"{label:32s} {told}", flush=True)
    return cases


def figures_of(cases: dict[str, Case]) -> dict[str, float | None]:
    at_50 = [c.speedup for name, c in cases.items() if ", 50 ms" in name and c.acceptance >= 0.85]
    over = [c.speedup / c.formula for c in cases.values() if c.judged]
    return {
        "speedup_over_formula_min": min(over, default=None),
        "speculation_speedup_best_50ms": max(at_50, default=None),
        "speculation_speedup_min": min(c.speedup for c in cases.values()),
        "greedy_mismatches": sum(c.mismatches for c in cases.values()),
    }


def described(case: Case) -> dict[str, Any]:
    return {
        "speedup": case.speedup, "formula": case.formula,
        "speedup_over_formula": case.speedup / case.formula, "acceptance": case.acceptance, "drafts_judged": case.judged,
        "plain_s_per_token": case.plain_s, "drafted_s_per_token": case.drafted_s, "slowest_stage_s": case.stage_s,
        "loop_s_measured": case.loop_s, "mismatches": case.mismatches,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = report.arguments(__doc__ or "", argv)
    trips, rates = (ROUND_TRIPS_S, RATES_BIT_PER_S) if not options.quick else ((0.0, 0.05), (100e6,))
    rounds, count = (1, 32) if options.quick else (1, 72)
    cases = run(options.seed, rounds, count, trips, rates)
    about = report.context(options.seed, model="tiny-llm, 1.8 M parameters, trained", drafter="n-grams, then tiny-drafter")
    report.finish(options.json, figures_of(cases), {name: described(case) for name, case in cases.items()}, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
