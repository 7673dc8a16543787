"""End-to-end latency of Ecotone's plan beside five baselines, in real processes on emulated links.

Grid: MobileNetV2, EfficientNet-B0, ResNet-18 shapes x 1, 5, 20, 100 Mbit/s x server 3 and 10 times faster than the device.
The same executor (one, stated in the context), precision and thread for every contender, and the same accuracy
constraint: the output may differ from the uncut float32 run by at most MAX_ERROR (L2, relative) on photographs.
Where two contenders are the same plan they share one measurement; contenders take turns within each round. The networks are
untrained and so more sensitive than trained ones: a JPEG of the input often breaks the constraint on them. It is then
measured all the same and shown as "jpeg_beyond_accuracy" with its error, but not compared: the others could be cheaper too
if they were allowed as much.

measured_over_bound_median: latency of ours over (its own measured compute, encode and decode + bytes / rate + latency).
prediction_error_median: |predicted / measured - 1| over all plans but device only (which profiling ran whole).
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from benchmarks import report
from benchmarks.split_world import (
    Bench,
    Measured,
    Sample,
    captured_model,
    photographs,
    profile_of,
    star,
    stretched,
    with_rate,
)
from ecotone import executors
from ecotone.cluster import Cluster
from ecotone.cost import PlanCost, predict
from ecotone.model import Captured
from ecotone.plan import Plan
from ecotone.planner import Latency, PlannerError, baselines, solve
from ecotone.profile import Profile
from ecotone.runtime import launch

NAMES = ("mobilenet_v2", "efficientnet_b0", "resnet18")
RATES_MBIT = (1, 5, 20, 100)
FASTER = (3, 10)
LATENCY_S = 0.002
MAX_ERROR = 0.05
BASELINES = ("device_only", "server_only_raw", "server_only_jpeg", "neurosurgeon", "fixed_int8_middle")
CODECS = (
    "fp32", "fp16", "fp16+zstd", "int8", "int8+zstd", "int6+zstd", "int4+zstd", "int4c+zstd", "int3c+zstd",
    "png", "jpeg:95", "jpeg:90", "jpeg:75",
)  # fmt: skip
EXECUTORS = ("torch:fp32",)
SECONDS_PER_PLAN = 1.2
BEYOND = "jpeg_beyond_accuracy"


def main(argv: list[str] | None = None) -> int:
    """Measure the grid; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    torch.set_num_threads(1)
    samples = photographs(2 if options.quick else 5)
    executor = next(name for name in EXECUTORS if not executors.by_id(name).available("cpu"))
    names = NAMES[:1] if options.quick else NAMES
    rates = RATES_MBIT[1::2] if options.quick else RATES_MBIT
    base = star(("device", "server"), (1.0, 1.0), 1e9, LATENCY_S)
    cases: list[dict[str, Any]] = []
    with launch(base, unshaped=True) as nodes:
        bench = Bench(nodes, LATENCY_S)
        for name in names:
            began = time.perf_counter()
            captured = captured_model(name, samples)
            profile = profile_of(captured, base, samples, executor, CODECS, options.quick)
            print(f"{name}: captured and profiled in {time.perf_counter() - began:.0f} s", file=sys.stderr)
            for faster in FASTER:
                cases += cells(bench, captured, base, stretched(profile, {"device": float(faster)}), faster, rates, samples)
        bench.close()
    about = report.context(
        options.seed, executor=executor, threads=1, max_relative_error=MAX_ERROR, latency_s=LATENCY_S,
        inputs="mosaics of CIFAR-10 photographs, 1x3x224x224", weights="He initialisation, settled batch norms: not trained",
    )  # fmt: skip
    report.finish(options.json, figures(cases), cases, about)
    return 0


def figures(cases: list[dict[str, Any]]) -> dict[str, float]:
    """The four numbers, from the cells."""
    ratios = [case["best_baseline_over_ours"] for case in cases]
    errors = [e for case in cases for e in case["prediction_errors"].values()]
    return {
        "measured_over_bound_median": report.median([case["measured_over_bound"] for case in cases]),
        "prediction_error_median": report.median(errors or [0.0]),
        "best_baseline_over_ours_min": min(ratios),
        "share_of_grid_above_1_3": sum(r >= 1.3 for r in ratios) / len(ratios),
    }


def cells(
    bench: Bench,
    captured: Captured,
    base: Cluster,
    profile: Profile,
    faster: int,
    rates: tuple[int, ...],
    samples: list[Sample],
) -> list[dict[str, Any]]:
    """All rates of one model and one server."""
    slow = star(("device", "server"), (float(faster), 1.0), 1e9, LATENCY_S)
    found = []
    opened = False
    for rate in rates:
        cluster = with_rate(slow, rate * 1e6 / 8)
        plans, reasons = contenders(captured, cluster, profile)
        if not opened:
            bench.open(captured, cluster, plans["ecotone"], samples)
            opened = True
        found.append(cell(bench, captured, cluster, profile, plans, samples) | {"rate_mbit_per_s": rate, "faster": faster})
        found[-1]["without_plan"] = reasons
        line = {name: round(1e3 * s, 1) for name, s in found[-1]["latency_s"].items()}
        print(f"{captured.graph.name} x{faster} {rate} Mbit/s: {line} | {plans['ecotone']}", file=sys.stderr)
    return found


def contenders(captured: Captured, cluster: Cluster, profile: Profile) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plans by name, ours among them, and why a baseline has none under the accuracy constraint."""
    require = (f"error={MAX_ERROR:g}",)
    plans = {"ecotone": solve(captured.graph, cluster, profile, Latency(), require).plan}
    reasons = {}
    for name in BASELINES:
        try:
            plans[name] = baselines.place(name, captured.graph, cluster, profile, require)
        except PlannerError as error:
            reasons[name] = str(error)
    if "server_only_jpeg" not in plans:
        plans[BEYOND] = baselines.place("server_only_jpeg", captured.graph, cluster, profile, ("error=1e9",))
    return plans, reasons


def cell(
    bench: Bench, captured: Captured, cluster: Cluster, profile: Profile, plans: dict[str, Plan], samples: list[Sample]
) -> dict[str, Any]:
    """Measure the distinct plans of one cell in turn, a few rounds, and compare."""
    costs: dict[str, PlanCost] = {n: predict(p, captured.graph, cluster, profile) for n, p in plans.items()}
    distinct = {plan.identity(): plan for plan in plans.values()}
    expected = {plan.identity(): costs[name].latency_s for name, plan in plans.items()}
    latencies: dict[str, list[float]] = {key: [] for key in distinct}
    bounds: dict[str, list[float]] = {key: [] for key in distinct}
    best_s = min(expected.values())
    for round_number in range(3):
        for key, plan in distinct.items():
            hopeless = expected[key] > 2.5 * best_s
            if hopeless and round_number:
                continue  # far from the best baseline: one round says so
            count = max(1, min(len(samples), int(SECONDS_PER_PLAN / 3 / expected[key]) - 1))
            measured = bench.run(plan, cluster, samples[:count])
            latencies[key] += measured.latencies_s
            bounds[key] += measured.bounds_s
    results = {key: Measured(tuple(latencies[key]), tuple(bounds[key])) for key in distinct}
    by_name = {name: results[plan.identity()] for name, plan in plans.items()}
    ours = by_name["ecotone"]
    best = min(by_name[name].latency_s for name in plans if name not in ("ecotone", BEYOND))
    errors = {
        name: abs(costs[name].latency_s / by_name[name].latency_s - 1)
        for name, plan in plans.items()
        if len(plan.stages) > 1 or not plan.transfers[0].is_local
    }
    return {
        "model": captured.graph.name,
        "plans": {name: str(plan) for name, plan in plans.items()},
        "latency_s": {name: result.latency_s for name, result in by_name.items()},
        "predicted_s": {name: cost.latency_s for name, cost in costs.items()},
        "relative_error": {name: cost.relative_error for name, cost in costs.items()},
        "prediction_errors": {plans[name].identity(): error for name, error in errors.items()},
        "measured_over_bound": ours.over_bound,
        "best_baseline_over_ours": best / ours.latency_s,
    }


if __name__ == "__main__":
    sys.exit(main())
