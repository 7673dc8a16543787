"""CONTINUER's claim: what to do at the loss of a device is chosen within 20 ms, and the choice flips with the weights.

Chains as long as the paper's networks (32 to 152 blocks) on 4 to 16 unlike devices, with an earlier exit and a path that
skips blocks as variants. The tables, and the best plan of every model without each device, are made before (not timed, as
in the paper); then every device in turn is lost, and what is timed is all that follows: latency, accuracy and downtime of
every option, and the scores. `choice_s_worst` is the slowest of all; `unprepared_s_worst` that with plans made only then;
`set_choice_s_worst` the slowest choice of a whole plan set (made when deploying, not at a failure). `num_options_chosen`:
how many unlike options some weights of the grid make best; `best_alone_over_chosen`: mean score of the best single option
if always taken, over that of the choice (1: the choice would be worth nothing), both from the worst option up.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.planner import large
from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import CostModel
from ecotone.graph import Graph, TensorIndex
from ecotone.plan import Plan, Stage
from ecotone.planner import Latency, OptionWeights, Outlook, Variant, assume, choose, score_options, solve
from ecotone.planner.options import Option
from ecotone.profile import Profile, SegmentTime

Problem = tuple[Graph, Cluster, Profile]

SIZES = ((32, 4), (66, 8), (152, 16))  # blocks and devices; ResNet-32, MobileNetV2 and ResNet-152 have about so many
ROUNDS = 3
MTBF_S = 8 * 3600.0
EXIT_SHARE, EXIT_LOSS = 0.6, 9.0  # the exit runs so much of the model and is so many points worse
SKIP_SHARE, SKIP_LOSS = 0.9, 3.0
GRID = tuple(OptionWeights(accuracy=a, latency=b, downtime=c) for a, b, c in itertools.product((0.25, 1.0, 4.0), repeat=3))


def shortened(problem: Problem, name: str, share: float, loss_points: float) -> Variant:
    """The first `share` of the blocks and then an answer of the model's size, timed as those blocks are on every device."""
    graph, cluster, profile = problem
    count = max(1, int(graph.num_blocks * share))
    answer = graph.tensors[graph.outputs[0]]
    made = graph.tensors[count]
    tensors = (*graph.tensors[:count], type(made)(name="answer", shape=answer.shape, dtype=answer.dtype, producer=count - 1))
    short = Graph(
        name=name, blocks=graph.blocks[:count], tensors=tensors, inputs=graph.inputs, outputs=(TensorIndex(count),),
        parameters=graph.parameters[:count],
    )  # fmt: skip
    model = CostModel(*problem)
    segments = []
    for device in cluster.devices:
        spans = {(0, b) for b in range(1, count + 1)} | {(a, count) for a in range(count)}
        for a, b in sorted(spans):
            seconds = model.stage(Stage(device=device.name, start=a, stop=b)).compute_s
            segments.append(
                SegmentTime(
                    device=device.name, executor="torch:fp32", start=a, stop=b, median_s=seconds, spread_s=0, memory_bytes=0
                )
            )
    payloads = tuple(p for p in profile.payloads if p.position < count)
    measured = Profile(
        graph_hash=short.content_hash(), cluster_name=profile.cluster_name, num_blocks=count, cuts=tuple(range(count + 1)),
        segments=tuple(segments), codecs=profile.codecs, payloads=payloads,
    )  # fmt: skip
    return Variant(name=name, graph=short, profile=measured, loss_points=loss_points)


def losses(
    problem: Problem, variants: Sequence[Variant], plan: Plan, rounds: int, *, prepared: bool
) -> tuple[list[float], list[Any]]:
    """Seconds of every choice, and the options of every lost device."""
    others = [d.name for d in problem[1].devices if d.name not in (plan.source, plan.sink)]
    seconds, found = [], []
    for number in range(rounds):
        outlook = Outlook(*problem, variants)
        if prepared:
            outlook.prepare()
        for lost in others:
            start = time.perf_counter()
            options = outlook.options(DeviceId(lost), [plan])
            score_options(options, GRID[0])
            seconds.append(time.perf_counter() - start)
            if number == 0:
                found.append(options)
    return seconds, found


def alone(tables: Sequence[Sequence[Option]]) -> tuple[dict[str, float], float, set[str]]:
    """Mean score above the worst option, over losses and weights: of each option always taken, and of the choice."""
    totals: dict[str, float] = {}
    chosen, names, count = 0.0, set(), 0
    for options, weights in itertools.product(tables, GRID):
        scored = score_options(options, weights)
        least = scored[-1].score
        for entry in scored:
            totals[entry.option.name] = totals.get(entry.option.name, 0.0) + entry.score - least
        chosen += scored[0].score - least
        names.add(scored[0].option.name)
        count += 1
    return {name: total / count for name, total in totals.items()}, chosen / count, names


def main(argv: list[str] | None = None) -> int:
    """Measure and report; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    seconds, late, sets, names, cases, ratios = [], [], [], set(), [], []
    for blocks, devices in SIZES[:1] if options.quick else SIZES:
        problem = large(options.seed, blocks, (1,) * devices)
        variants = [
            shortened(problem, "exit", EXIT_SHARE, EXIT_LOSS),
            shortened(problem, "skip", SKIP_SHARE, SKIP_LOSS),
        ]
        plan = solve(*problem, Latency(), num_runners_up=0).plan
        gc.collect()
        rounds = 1 if options.quick else ROUNDS
        took, tables = losses(problem, variants, plan, rounds, prepared=True)
        unprepared = losses(problem, variants, plan, rounds, prepared=False)[0]
        single, chosen, won = alone(tables)
        start = time.perf_counter()
        together = choose(problem[0], assume(problem[1], MTBF_S), problem[2], variants=variants)
        sets.append(time.perf_counter() - start)
        seconds += took
        late += unprepared
        names |= won
        ratios.append(max(single.values()) / chosen)
        cases.append(
            {
                "blocks": blocks, "devices": devices, "choices": len(took), "choice_s_median": report.median(took),
                "choice_s_worst": max(took), "unprepared_s_worst": max(unprepared),
                "score_alone": single, "score_chosen": chosen, "chosen": sorted(won),
                "set_choice_s": sets[-1], "set_topology": together.topology, "set_gap": together.gap,
                "set_expected_s": together.expected_s, "plan_alone_expected_s": together.plain_expected_s,
            }
        )  # fmt: skip
        print(cases[-1], file=sys.stderr)
    figures = {
        "choice_s_worst": max(seconds), "num_options_chosen": float(len(names)), "best_alone_over_chosen": max(ratios),
        "choice_s_median": report.median(seconds), "unprepared_s_worst": max(late), "set_choice_s_worst": max(sets),
    }  # fmt: skip
    shares = {"exit": [EXIT_SHARE, EXIT_LOSS], "skip": [SKIP_SHARE, SKIP_LOSS]}
    about = report.context(options.seed, mtbf_s=MTBF_S, rounds=ROUNDS, share_and_loss=shares)
    report.finish(options.json, figures, cases, about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
