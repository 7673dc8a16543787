"""The planner of language models: equal to enumeration of every plan, and what it gains over published and common rules.

`oracle_mismatches`: random problems, under each of four objectives, a third of them with limits, half short of memory,
where the value is not the least of all plans priced by a second implementation. `edgeshard_over_ours_median`: value of
EdgeShard's plan over ours, programme A judged by time per token, B by throughput; where A's plan breaks a memory it is
counted as infeasible and not compared. `proportional` (exo) and `even` (vLLM) are repaired, see planner/generation/
baselines.py, and judged by time per token, request and throughput. All plans are priced by llmcost.py. Under `cases`: one
device and water-filling (Parallax), EdgeShard's testbed with its source link shaped, both schedules against the formulas.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.llm_planner_world import AGX, LLAMA2, NX, RTX, edgeshard_testbed, profile, random_home
from ecotone.cluster import Cluster
from ecotone.llmcost import LlmCostModel, Shape, bubbles_per_s, no_bubbles_per_s
from ecotone.llmprofile import LlmProfile
from ecotone.planner import PlannerError
from ecotone.planner.generation import Asked, baselines, choose_plan, value_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "planner"))
from generation_worlds import best, random_world

OBJECTIVES = ("tpot", "ttft", "request", "throughput")
JUDGED = {"edgeshard_latency": ("tpot",), "edgeshard_throughput": ("throughput",)}  # the others: all of ALL
ALL = ("tpot", "request", "throughput")
RATES = (1e6, 5e6, 50e6, 1e9)  # bit/s of the source's links
SECONDS = 8.0


def oracle_mismatches(seeds: Sequence[int]) -> dict[str, Any]:
    """By objective: how often our value is not the enumerated one, and of how many problems none has a plan."""
    wrong, without = dict.fromkeys(OBJECTIVES, 0), 0
    for seed in seeds:
        for objective in OBJECTIVES:
            world = random_world(seed, objective, tight=seed % 2 == 1, limits=seed % 3 == 0)
            expected = best(world)
            without += math.isinf(expected)
            try:
                found = choose_plan(world.profile, world.cluster, world.asked, explain=False)
            except PlannerError:
                wrong[objective] += not math.isinf(expected)
                continue
            good = abs(found.value - expected) <= 1e-6 * expected and found.is_proven and found.cost.is_feasible
            wrong[objective] += not good
    return {"mismatches": wrong, "problems": len(seeds) * len(OBJECTIVES), "without_plan": without}


def compared(made: LlmProfile, cluster: Cluster, shape: Shape, objective: str) -> dict[str, Any]:
    """Ours and every baseline on one problem: values, and each baseline's over ours; a reason where it has no plan."""
    asked = Asked(shape=shape, objective=objective)
    ours = choose_plan(made, cluster, asked, time_limit_s=SECONDS, explain=False)
    row: dict[str, Any] = {
        "objective": objective, "ours": ours.value, "gap": ours.gap, "devices": len(ours.plan.devices),
        "plan": str(ours.plan),
        "ttft_s": ours.cost.ttft_s, "tpot_s": ours.cost.tpot_s, "tokens_per_s": ours.cost.tokens_per_s,
        "no_bubbles_over_bubbles": ours.cost.tokens_per_s / ours.cost.bubbles_per_s, "over_ours": {}, "none": {},
    }  # fmt: skip
    model = LlmCostModel(made, cluster, shape)
    for name in baselines.NAMES:
        if objective not in JUDGED.get(name, ALL):
            continue
        try:
            cost = model.predict(baselines.place(name, made, cluster, asked))
        except PlannerError as error:
            row["none"][name] = str(error)
            continue
        if cost.violations:
            row["none"][name] = "breaks: " + "; ".join(cost.violations)
        else:
            row["over_ours"][name] = value_of(asked, cost) / ours.value
    return row


def on_testbed(rates: Sequence[float], models: Sequence[Any]) -> list[dict[str, Any]]:
    """EdgeShard's machines in full precision, 32 tokens in and 96 out, one request at a time and eight."""
    rows = []
    for model in models:
        made = profile(model, (AGX, NX, RTX), ("fp32",))
        for rate in rates:
            for objective, shape in (
                ("tpot", Shape(prompt=32, answer=96)),
                ("throughput", Shape(prompt=32, answer=96, concurrency=8)),
            ):
                row = compared(made, edgeshard_testbed(rate / 8), shape, objective)
                rows.append({"model": model.name, "source_bit_per_s": rate, **row})
    return rows


def at_home(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Random homes, 512 tokens in and 128 out; throughput of four requests."""
    rows = []
    for seed in seeds:
        made, cluster = random_home(seed)
        for objective in ALL:
            shape = Shape(prompt=512, answer=128, concurrency=4 if objective == "throughput" else 1)
            rows.append({"cluster": cluster.name, "model": made.model, **compared(made, cluster, shape, objective)})
    return rows


def schedules(count: int, seed: int) -> dict[str, float]:
    """Both schedules played event by event on random stages, against equations (9) and (10): the largest relative error."""
    rng = np.random.default_rng(seed)
    worst = {"no_bubbles": 0.0, "bubbles": 0.0}
    least = math.inf
    for _ in range(count):
        stages = rng.uniform(0.005, 0.05, int(rng.integers(2, 9)))
        frames = int(rng.integers(1, 2 * len(stages) + 1))
        tau, loop = float(stages.max()), float(stages.sum())
        for name, formula in (
            ("no_bubbles", no_bubbles_per_s(frames, frames, tau, loop)),
            ("bubbles", bubbles_per_s(frames, tau, loop)),
        ):
            played = played_per_s(stages.tolist(), frames, waits=name == "bubbles")
            worst[name] = max(worst[name], abs(played - formula) / formula)
        least = min(least, no_bubbles_per_s(frames, frames, tau, loop) / bubbles_per_s(frames, tau, loop))
    return {"no_bubbles_error_max": worst["no_bubbles"], "bubbles_error_max": worst["bubbles"], "gain_min": least}


def played_per_s(stages: Sequence[float], frames: int, *, waits: bool, tokens: int = 200) -> float:
    """Tokens per second of `frames` that circulate through `stages`; `waits`: for all frames before the next token."""
    free = [0.0] * len(stages)
    ready = [0.0] * frames
    for _ in range(tokens):
        order = sorted(range(frames), key=lambda frame: ready[frame])
        for frame in order:
            at = ready[frame]
            for index, seconds in enumerate(stages):
                at = max(at, free[index]) + seconds
                free[index] = at
            ready[frame] = at
        if waits:
            ready = [max(ready)] * frames
    return tokens * frames / max(ready)


def ratios(rows: Sequence[dict[str, Any]], *names: str) -> list[float]:
    return [row["over_ours"][name] for row in rows for name in names if name in row["over_ours"]]


def main(argv: Sequence[str] | None = None) -> None:
    options = report.arguments(__doc__ or "", argv)
    seed, quick = options.seed, options.quick
    oracle = oracle_mismatches(range(seed, seed + (6 if quick else 60)))
    bed = on_testbed(RATES[-1:] if quick else RATES, LLAMA2[:1] if quick else LLAMA2)
    homes = at_home(range(seed, seed + (2 if quick else 16)))
    rows = [*bed, *homes]
    edgeshard = ratios(rows, "edgeshard_latency", "edgeshard_throughput")
    every = {name: ratios(rows, name) for name in baselines.NAMES}
    figures = {
        "oracle_mismatches": float(sum(oracle["mismatches"].values())),
        "edgeshard_over_ours_median": report.median(edgeshard),
        "proportional_over_ours_median": report.median(every["proportional"]),
        "even_over_ours_median": report.median(every["even"]),
    }
    cases = {
        "oracle": oracle,
        "baselines": {
            name: {
                "compared": len(found), "without_plan_or_infeasible": sum(name in row["none"] for row in rows),
                "over_ours_min": min(found, default=None), "over_ours_median": report.median(found) if found else None,
                "over_ours_max": max(found, default=None),
            }
            for name, found in every.items()
        },
        "under_one": sum(ratio < 1 - 1e-9 for found in every.values() for ratio in found),
        "not_proven": sum(row["gap"] > 1e-6 for row in rows),
        "schedules": schedules(200, seed),
        "testbed": bed,
        "homes": homes,
    }  # fmt: skip
    for name, found in cases["baselines"].items():  # type: ignore[union-attr]
        print(name, found)
    print({key: cases[key] for key in ("under_one", "not_proven", "schedules")})
    report.finish(options.json, figures, cases, report.context(seed))


if __name__ == "__main__":
    main()
