"""End-to-end latency of Ecotone's plan beside five baselines, in real processes on emulated links.

Grid: MobileNetV2, EfficientNet-B0, ResNet-18 shapes x 1, 5, 20, 100 Mbit/s x server 3 and 10 times faster than the device.
The same executor (one, stated in the context) and thread for every contender; where two are the same plan they share one
measurement; contenders take turns within each round.

Accuracy, the same for all: *no contender may cost the answer more than the JPEG baseline costs it on that network*, JPEG
being quality 90; the cost is the relative L2 error of the output over the same photographs. Ours is planned under that limit
with the codecs profiled by default and every image codec of the catalogue, so it may well be a JPEG of lower quality: on
untrained networks quality matters little to the answer, the cases say which plan it is. The baselines are what they are: raw
sends 8-bit pixels (float32 where quicker), Neurosurgeon float32, the fixed cut int8 whatever that costs. The cases also hold
the predicted share under other limits, JPEG left out where it is beyond them; no key is made of that.

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
from ecotone import codec, executors
from ecotone.cluster import Cluster
from ecotone.cost import PlanCost, predict
from ecotone.model import Captured
from ecotone.plan import Plan
from ecotone.planner import TIE, Latency, PlannerError, baselines, solve
from ecotone.profile import Profile
from ecotone.runtime import launch

NAMES = ("mobilenet_v2", "efficientnet_b0", "resnet18")
RATES_MBIT = (1, 5, 20, 100)
FASTER = (3, 10)
LATENCY_S = 0.002
JPEG = "jpeg:90"
OTHER_LIMITS = (0.02, 0.05, 0.1, 0.2)
OURS, JPEG_BASELINE, INT8_BASELINE = "ecotone", "server_only_jpeg", "fixed_int8_middle"
CODECS = (*codec.CANDIDATES, "int4clip+zstd", *(c.name for c in codec.catalogue() if c.is_image))
EXECUTORS = ("torch:fp32",)
ROUNDS, CLOSE_ROUNDS, CLOSE = 3, 6, 1.1
SECONDS_PER_ROUND = 0.4


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
        options.seed, executor=executor, threads=1, latency_s=LATENCY_S,
        accuracy_rule=f"no contender's output may err more than that of {JPEG} on the same network",
        inputs="mosaics of CIFAR-10 photographs, 1x3x224x224",
        weights="He initialisation, settled batch norms: the networks are untrained;"
        " how coarse codecs change a trained network's answers was not measured here",
    )  # fmt: skip
    report.finish(options.json, figures(cases), {"cells": cases, "other_limits": other_limits(cases)}, about)
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


def other_limits(cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Predicted only: in how much of the grid ours would be 1.3 times faster under other fixed limits on the error."""
    found = []
    for limit in OTHER_LIMITS:
        ratios = [case["predicted_under_limit"][f"{limit:g}"] for case in cases]
        share = sum(r >= 1.3 for r in ratios) / len(ratios)
        found.append({"max_relative_error": limit, "predicted_share_above_1_3": share, "predicted_ratio_min": min(ratios)})
    return found


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
            bench.open(captured, cluster, plans[OURS], samples)
            opened = True
        case = cell(bench, captured, cluster, profile, plans, samples) | {"rate_mbit_per_s": rate, "faster": faster}
        case["without_plan"] = reasons
        case["predicted_under_limit"] = {
            f"{limit:g}": predicted_ratio(captured, cluster, profile, plans, limit) for limit in OTHER_LIMITS
        }
        found.append(case)
        line = {name: round(1e3 * s, 1) for name, s in case["latency_s"].items()}
        print(f"{captured.graph.name} x{faster} {rate} Mbit/s: {line} | {plans[OURS]}", file=sys.stderr)
    return found


def contenders(captured: Captured, cluster: Cluster, profile: Profile) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plans by name, ours under the error of the JPEG baseline, and why a baseline has none."""
    plans, reasons = {}, {}
    for name in baselines_of_grid():
        asked = (f"codec={JPEG},fp32",) if name == JPEG_BASELINE else ()
        try:
            plans[name] = baselines.place(name, captured.graph, cluster, profile, ("error=1e9", *asked))
        except PlannerError as error:
            reasons[name] = str(error)
    limit = predict(plans[JPEG_BASELINE], captured.graph, cluster, profile).relative_error
    return {OURS: ours(captured, cluster, profile, limit), **plans}, reasons


def baselines_of_grid() -> tuple[str, ...]:
    return ("device_only", "server_only_raw", JPEG_BASELINE, "neurosurgeon", INT8_BASELINE)


def ours(captured: Captured, cluster: Cluster, profile: Profile, max_error: float) -> Plan:
    """The quickest plan whose output errs no more than that."""
    return solve(captured.graph, cluster, profile, Latency(), (f"error={max_error:.9g}",), tie=TIE).plan


def predicted_ratio(captured: Captured, cluster: Cluster, profile: Profile, plans: dict[str, Plan], limit: float) -> float:
    """Best baseline over ours, both predicted, under another limit on the error; JPEG is left out where it breaks it."""
    costs = {name: predict(plan, captured.graph, cluster, profile) for name, plan in plans.items() if name != OURS}
    if costs[JPEG_BASELINE].relative_error > limit:
        del costs[JPEG_BASELINE]
    mine = predict(ours(captured, cluster, profile, limit), captured.graph, cluster, profile)
    return min(cost.latency_s for cost in costs.values()) / mine.latency_s


def cell(
    bench: Bench, captured: Captured, cluster: Cluster, profile: Profile, plans: dict[str, Plan], samples: list[Sample]
) -> dict[str, Any]:
    """Measure the distinct plans of one cell in turn, and compare."""
    costs: dict[str, PlanCost] = {n: predict(p, captured.graph, cluster, profile) for n, p in plans.items()}
    expected = {plan.identity(): costs[name].latency_s for name, plan in plans.items()}
    results = in_turn(bench, cluster, {plan.identity(): plan for plan in plans.values()}, expected, plans[OURS], samples)
    by_name = {name: results[plan.identity()] for name, plan in plans.items()}
    mine = by_name[OURS]
    best = min(by_name[name].latency_s for name in plans if name != OURS)
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
        "measured_over_bound": mine.over_bound,
        "best_baseline_over_ours": best / mine.latency_s,
    }


def in_turn(
    bench: Bench,
    cluster: Cluster,
    plans: dict[str, Plan],
    expected: dict[str, float],
    mine: Plan,
    samples: list[Sample],
) -> dict[str, Measured]:
    """All plans by identity: one round for what is far behind, more rounds for what is near to ours."""
    latencies: dict[str, list[float]] = {key: [] for key in plans}
    bounds: dict[str, list[float]] = {key: [] for key in plans}
    near = {key for key in plans if expected[key] < CLOSE * expected[mine.identity()]}
    for number in range(CLOSE_ROUNDS if len(near) > 1 else ROUNDS):
        for key, plan in plans.items():
            if (number and expected[key] > 2.5 * min(expected.values())) or (number >= ROUNDS and key not in near):
                continue
            count = max(1, min(len(samples), int(SECONDS_PER_ROUND / expected[key])))
            measured = bench.run(plan, cluster, samples[:count])
            latencies[key] += measured.latencies_s
            bounds[key] += measured.bounds_s
    return {key: Measured(tuple(latencies[key]), tuple(bounds[key])) for key in plans}


if __name__ == "__main__":
    sys.exit(main())
