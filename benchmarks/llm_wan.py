"""Speculation over a wide area: tokens per second with drafts in flight over those of plain decoding, link by link.

    speedup_over_formula_min        least speedup over T/((1-a)T + a*tau): a measured acceptance, T seconds per token of
                                    plain decoding, tau the slowest stage's period: seconds from token to token where each
                                    frame is a draft and every draft right, so computing, messages and the link's rate
    speedup_over_compute_formula_min  not judged: the same with tau the seconds that the slowest stage computes, no more
    speculation_speedup_best_50ms   best speedup at a round trip of 50 ms, where acceptance is 0.85 or more
    speculation_speedup_min         least speedup anywhere
    greedy_mismatches               tokens that differ from one machine's, with drafts or without

The bundled model (tiny-llm, trained) over two node processes and the driver; links of 0, 20, 50 and 100 ms round trip and
10 to 1000 Mbit/s in user space, every hop alike (so a loop is one and a half round trips). The drafter is what `serve`
uses: n-grams of the context where they match, else the bundled tiny-drafter; the window adapts. Two fixed sets of prompts:
"novel", openings of speeches from plays that were held out of training, and "copy", refrains that the model goes on with
(it is too small to quote a passage; these were chosen among eight refrains because it does repeat them). Plain and
speculative answers to the same prompt alternate, over the same stages, more often where answers are short; a figure of a
case is of the medians by prompt. Before the first one the pipeline works for a while: new processes are slow.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import ecotone
from benchmarks import report
from benchmarks.llm_world import Timeline, ask, even_plan, greedy, machines
from ecotone.cluster import Link
from ecotone.decoding.speculation import (
    PLAIN,
    DraftAsk,
    Drafter,
    FixedPolicy,
    PromptLookup,
    SpeculationPolicy,
    SpeculationState,
    Window,
)
from ecotone.decoding.step import Row, Step
from ecotone.decoding.window import AdaptivePolicy
from ecotone.decoding.words import Settings
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
# Answers and their tokens by round trip: a default run has ten minutes, and an answer ends in the midst of its last cycle.
ROUNDS, TOKENS, FEWEST = {0.0: 3}, {0.0: 216, 0.02: 144}, 72
WARM_S, MOST_FRAMES = 10.0, Settings(context=1).most_flights
OFF, ADAPTIVE = FixedPolicy(window=PLAIN), AdaptivePolicy()
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
    """The policy of the moment."""

    now: SpeculationPolicy

    def decide(self, state: SpeculationState) -> Window:
        return self.now.decide(state)


@dataclass(slots=True)
class Known:
    """A drafter that knows the answers, by prompt, while it is asked for them; else `usual` drafts."""

    usual: Drafter
    answers: dict[tuple[int, ...], list[int]]
    is_telling: bool = False
    never_waits: bool = True

    def draft(self, asks: Sequence[DraftAsk]) -> Sequence[Sequence[int]]:
        if not self.is_telling:
            return self.usual.draft(asks)
        found = []
        for each in asks:
            at = len(each.tokens) - each.prompt_length
            found.append(self.answers[each.tokens[: each.prompt_length]][at : at + each.count])
        return found

    def end(self, request: int) -> None:
        self.usual.end(request)


@dataclass(slots=True)
class Case:
    """One link and set of prompts: seconds per token of each pair of answers, by prompt, and what drafting did."""

    plain_s: dict[int, list[float]] = field(default_factory=dict)
    drafted_s: dict[int, list[float]] = field(default_factory=dict)
    judged: int = 0
    accepted: int = 0
    mismatches: int = 0
    loop_s: float = 0.0
    stage_s: float = 0.0
    period_s: float = 0.0

    @property
    def speedup(self) -> float:
        return typical(self.plain_s) / typical(self.drafted_s)

    @property
    def acceptance(self) -> float:
        return self.accepted / max(self.judged, 1)

    def formula(self, tau_s: float) -> float:
        """The speedup that unlimited frames would give, of the plain loop as it was measured."""
        loop_s, a = typical(self.plain_s), self.acceptance
        return loop_s / ((1 - a) * loop_s + a * tau_s)


def typical(seconds: dict[int, list[float]]) -> float:
    """The mean over prompts of the median over answers."""
    return statistics.mean(statistics.median(each) for each in seconds.values())


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
    for switch.now in (OFF, ADAPTIVE):  # the pace of this link is learned
        ask(generator, prompts[0], greedy(min(count, 12)))
    for _ in range(rounds):
        for index, (prompt, answer) in enumerate(zip(prompts, right, strict=True)):
            for switch.now in (OFF, ADAPTIVE):
                before = generator.measured().counts
                made = ask(generator, prompt, greedy(count))
                after = generator.measured().counts
                (case.plain_s if switch.now is OFF else case.drafted_s).setdefault(index, []).append(made.per_token_s)
                case.judged += after.get("drafts_judged", 0) - before.get("drafts_judged", 0)
                case.accepted += after.get("drafts_accepted", 0) - before.get("drafts_accepted", 0)
                case.mismatches += differing(made, answer)
    measured = generator.measured()
    case.loop_s, case.stage_s = measured.loop_s, max(measured.stage_times_s)
    return case


def differing(made: Timeline, right: list[int]) -> int:
    return sum(a != b for a, b in zip(made.tokens, right, strict=False)) + abs(len(made.tokens) - len(right))


def period(generator: Generator, switch: Switched, known: Known, prompt: list[int], count: int) -> float | None:
    """Seconds from token to token where frames of one right draft each keep the pipeline full; the least of three answers.

    None where the loop is so long that the engine's frames do not fill it.
    """
    measured = generator.measured()
    window = Window(frames=min(math.ceil(measured.loop_s / measured.stage_s) + 1, MOST_FRAMES))
    switch.now, known.is_telling = FixedPolicy(window=window), True
    found = []
    for _ in range(3):
        times_s = ask(generator, prompt, greedy(count)).times_s[count // 4 :]  # full by then
        found.append((times_s[-1] - times_s[0]) / (len(times_s) - 1))
    known.is_telling = False
    return min(found) if measured.loop_s / MOST_FRAMES < 0.8 * min(found) else None


def warm(generator: Generator, switch: Switched, prompt: list[int], seconds: float) -> None:
    switch.now, end_s = OFF, time.monotonic() + seconds
    while time.monotonic() < end_s:
        ask(generator, prompt, greedy(32))


def run(
    rounds: dict[float, int], tokens: dict[float, int], fewest: int, trips: tuple[float, ...], rates: tuple[float, ...]
) -> dict[str, Case]:
    """Every case by name."""
    source, text = Checkpoint.open(ASSETS / "tiny-llm"), TextModel.open(ASSETS / "tiny-llm")
    sets = {
        "copy": [text.encode(refrain) for refrain in REFRAINS],
        "novel": [text.encode(prompt) for prompt in NOVEL],
    }
    longest = max(tokens.get(trip_s, fewest) for trip_s in trips)
    right = {name: truth(source, prompts, longest) for name, prompts in sets.items()}
    drafter = Chain(
        PromptLookup(), model_drafter(Checkpoint.open(ASSETS / "tiny-drafter"), text, "native:fp32", context=CONTEXT)
    )
    known = Known(drafter, {tuple(p): a for name in sets for p, a in zip(sets[name], right[name], strict=True)})
    switch = Switched(OFF)
    cluster = machines(("driver", "one", "two"))
    plan = even_plan(source.config.num_layers, ("one", "two"), EXECUTOR, driver="driver", context=CONTEXT, max_slots=4)
    cases: dict[str, Case] = {}
    periods: dict[float, list[float]] = {}
    with (
        launch(cluster, program=NODES) as nodes,
        join(nodes) as service,
        deploy_llm(service, cluster, plan, source, policy=switch, drafter=known) as generator,
    ):
        warm(generator, switch, sets["novel"][0], WARM_S)
        for trip_s in trips:
            count = tokens.get(trip_s, fewest)
            for rate in rates:
                shape(nodes, trip_s, rate)
                links = len(cases)
                for name, prompts in sets.items():
                    case = measure(generator, switch, prompts, [each[:count] for each in right[name]], rounds.get(trip_s, 1))
                    label = f"{name}, {trip_s * 1e3:.0f} ms, {rate / 1e6:.0f} Mbit/s"
                    cases[label] = case
                tau_s = period(generator, switch, known, sets["copy"][0], longest)
                if tau_s is None:
                    tau_s = min(periods[rate])  # of shorter round trips
                else:
                    periods.setdefault(rate, []).append(tau_s)
                for label, case in list(cases.items())[links:]:
                    case.period_s = tau_s
                    told = f"{case.speedup:.2f} times, formula {case.formula(tau_s):.2f}, acceptance {case.acceptance:.2f}"
                    print(f"{label:32s} {told}", flush=True)
    return cases


def figures_of(cases: dict[str, Case]) -> dict[str, float | None]:
    at_50 = [c.speedup for name, c in cases.items() if ", 50 ms" in name and c.acceptance >= 0.85]
    over = [c.speedup / c.formula(c.period_s) for c in cases.values() if c.judged]
    computing = [c.speedup / c.formula(c.stage_s) for c in cases.values() if c.judged]
    return {
        "speedup_over_formula_min": min(over, default=None),
        "speedup_over_compute_formula_min": min(computing, default=None),
        "speculation_speedup_best_50ms": max(at_50, default=None),
        "speculation_speedup_min": min(c.speedup for c in cases.values()),
        "greedy_mismatches": sum(c.mismatches for c in cases.values()),
    }


def described(case: Case) -> dict[str, Any]:
    return {
        "speedup": case.speedup, "formula": case.formula(case.period_s),
        "speedup_over_formula": case.speedup / case.formula(case.period_s),
        "speedup_over_compute_formula": case.speedup / case.formula(case.stage_s), "acceptance": case.acceptance,
        "drafts_judged": case.judged, "plain_s_per_token": case.plain_s, "drafted_s_per_token": case.drafted_s,
        "period_s": case.period_s, "slowest_stage_compute_s": case.stage_s, "loop_s_measured": case.loop_s,
        "mismatches": case.mismatches,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = report.arguments(__doc__ or "", argv)
    trips, rates = (ROUND_TRIPS_S, RATES_BIT_PER_S) if not options.quick else ((0.0, 0.05), (100e6,))
    shape: tuple[dict[float, int], dict[float, int], int] = ({}, {}, 32) if options.quick else (ROUNDS, TOKENS, FEWEST)
    cases = run(*shape, trips, rates)
    about = report.context(options.seed, model="tiny-llm, 1.8 M parameters, trained", drafter="n-grams, then tiny-drafter")
    report.finish(options.json, figures_of(cases), {name: described(case) for name, case in cases.items()}, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
