"""Exits in a running pipeline, for benchmarks.exits: a device four times slower than the server, with exits and without.

Real node processes on an emulated link. For each contender the cut and codec are the best that cost.py knows for its mean
latency; both plans are resident, requests take turns between them round by round.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.split_world import star, stretched
from ecotone import profiling
from ecotone.accuracy import ExitPolicy
from ecotone.cluster import Cluster
from ecotone.cost import CostError, CostModel
from ecotone.model import Captured
from ecotone.model.exit_training import Sample
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner.exiting import leaving_early
from ecotone.planset import PlanSet, Standby
from ecotone.profile import Profile
from ecotone.profiling.calibration import calibrate, policy_table
from ecotone.profiling.exit_outcomes import Outcomes
from ecotone.runtime import Session, deploy, launch

DEVICES, SLOWDOWNS = ("device", "server"), (4.0, 1.0)
RATE_BYTES_PER_S, LATENCY_S = 20e6 / 8, 0.005
EXECUTOR, CODECS, IN_FLIGHT, BUDGET = "torch:fp32", ("fp32", "int8"), 4, 1.0


def pipeline(captured: Captured, outcomes: Outcomes, test: list[Sample], quick: bool) -> dict[str, Any]:
    """Latency and throughput of both contenders on test frames, predicted and measured."""
    cluster = star(DEVICES, SLOWDOWNS, RATE_BYTES_PER_S, LATENCY_S)
    policies = calibrate(outcomes, captured.graph, budgets=(BUDGET,))
    profile = measured(captured, cluster, outcomes, policies, test, quick)
    model = CostModel(captured.graph, cluster, profile)
    plans = {"with_exits": best(captured, cluster, model, policies), "without": best(captured, cluster, model, ())}
    costs = {name: model.predict(plan) for name, plan in plans.items()}
    rounds, size = (1, 6) if quick else (4, 24)
    latencies: dict[str, list[float]] = {name: [] for name in plans}
    rates: dict[str, list[float]] = {name: [] for name in plans}
    left: dict[str, int] = {}
    resident = PlanSet(primary=plans["with_exits"], standbys=(Standby(plan=plans["without"]),))
    with launch(cluster) as nodes, deploy(resident, captured, nodes, timeout_s=300.0) as session:
        for number in range(rounds):
            batch = list(itertools.islice(itertools.cycle(test), number * size, (number + 1) * size))
            for name, plan in plans.items():
                taken, exits = one_by_one(session, plan, batch)
                latencies[name] += taken
                for key in exits if name == "with_exits" else ():
                    left[key] = left.get(key, 0) + 1
                rates[name].append(stream_rate(session, batch))
    figures = {
        name: {
            "plan": str(plan), "predicted_mean_s": costs[name].latency_s, "mean_s": statistics.mean(latencies[name]),
            "median_s": statistics.median(latencies[name]), "predicted_per_s": costs[name].throughput_per_s,
            "per_s": statistics.median(rates[name]), "predicted_server_s": costs[name].server_s,
        }
        for name, plan in plans.items()
    }  # fmt: skip
    ours, plain = figures["with_exits"], figures["without"]
    print(f"pipeline: {ours['mean_s']:.4f} s with exits, {plain['mean_s']:.4f} s without", file=sys.stderr)
    return figures | {
        "left": left, "requests": len(latencies["without"]), "in_flight": IN_FLIGHT,
        "mean_latency_saved": 1 - ours["mean_s"] / plain["mean_s"],  # type: ignore[operator]
        "throughput_over_without": ours["per_s"] / plain["per_s"],  # type: ignore[operator]
    }  # fmt: skip


def measured(
    captured: Captured,
    cluster: Cluster,
    outcomes: Outcomes,
    policies: tuple[ExitPolicy, ...],
    test: list[Sample],
    quick: bool,
) -> Profile:
    """A fresh profile at slowdown 1, stretched, with the policies in its table."""
    options = profiling.MeasureOptions(
        executors=(EXECUTOR,), codecs=CODECS, keep=1, rounds=3 if quick else 9, max_samples=2, max_cuts=20
    )
    plain = replace(cluster, devices=tuple(replace(d, slowdown=1.0) for d in cluster.devices))
    samples = [inputs for inputs, _ in test[:2]]
    table = policy_table(captured.graph, outcomes, policies)
    with tempfile.TemporaryDirectory(prefix="ecotone-exits-") as folder:
        path = Path(folder) / "profile.json"
        made = profiling.measure(
            captured, plain, samples=samples, options=options, table=profiling.AccuracyOptions(given=table), path=path
        )
    slow = dict(zip(DEVICES, SLOWDOWNS, strict=True))
    exits = tuple(replace(e, median_s=e.median_s * slow[e.device]) for e in made.exits)
    return replace(stretched(made, slow), exits=exits)


def best(captured: Captured, cluster: Cluster, model: CostModel, policies: tuple[ExitPolicy, ...]) -> Plan:
    """The plan of least predicted mean latency with one cut at most, leaving by one of `policies` (none: to the end)."""
    graph = captured.graph
    device, server = (d.name for d in cluster.devices)
    found: list[tuple[float, Plan]] = []
    for cut in (0, *graph.single_tensor_cuts(), graph.num_blocks):
        for codec in CODECS:
            placed = [(d, a, b) for d, a, b in ((device, 0, cut), (server, cut, graph.num_blocks)) if a < b]
            ends = [device, *(d for d, _, _ in placed), device]
            transfers = tuple(
                Transfer(source=s, target=t, position=p, codec=LOCAL if s == t else "fp32" if t == device else codec)
                for s, t, p in zip(ends, ends[1:], [0, *(b for _, _, b in placed)], strict=False)
            )
            stages = tuple(Stage(device=d, start=a, stop=b, executor=EXECUTOR) for d, a, b in placed)
            plan = Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)
            for each in [leaving_early(plan, graph, p) for p in policies] or [plan]:
                try:
                    found.append((model.predict(each).latency_s, each))
                except CostError:
                    continue
    return min(found, key=lambda pair: pair[0])[1]


def one_by_one(session: Session, plan: Plan, batch: list[Sample]) -> tuple[list[float], list[str]]:
    """Seconds of each request alone, and where it left; the plan in force is this one from now on."""
    session.prefer(plan)
    session.submit(batch[0][0]).result(60.0)
    taken, exits = [], []
    for inputs, _ in batch:
        start = time.perf_counter()
        future = session.submit(inputs)
        future.result(60.0)
        taken.append(time.perf_counter() - start)
        exits.append(future.exit or "end")
    return taken, exits


def stream_rate(session: Session, batch: list[Sample]) -> float:
    """Results per second with several requests under way."""
    start = time.perf_counter()
    count = sum(1 for _ in session.stream([inputs for inputs, _ in batch], in_flight=IN_FLIGHT))
    return count / (time.perf_counter() - start)
