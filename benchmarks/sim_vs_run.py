"""The simulator beside reality: the same plans on the virtual clock, fed by the profile, and in real processes.

Plans over one, two and three devices of unlike speed at several link rates, cut at several places; each is run with one
request under way (latency) and as a stream of several (results per second), in rounds over all plans, medians.
relative_error_median is the median of |simulated / measured - 1| over all of these; no case is dropped, no plan was run
while profiling. The profile is the mean of one made before all runs and one made after, so that a drift of the machine
does not pass for an error of the simulator; `drift` in the context says how far the two lie apart. The devices are slow
enough (each computes a small share of its time) that processes of one computer seldom compute at the same moment: the
simulator gives every device a processor of its own, which two cores do not have.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks import report
from benchmarks.split_world import (
    Bench,
    captured_model,
    mean_profile,
    photographs,
    profile_of,
    star,
    steady_rate,
    stretched,
    with_rate,
)
from ecotone.cluster import Cluster
from ecotone.graph import Graph
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.profile import Profile
from ecotone.runtime import launch
from ecotone.simulator import ClosedLoop, simulate

MODEL, EXECUTOR = "mobilenet_v2", "torch:fp32"
DEVICES, SLOWDOWNS = ("camera", "edge", "server"), (20.0, 14.0, 10.0)
RATES_MBIT = (10, 50, 200)
LATENCY_S = 0.003
CODECS = ("fp32", "fp16", "int8", "int8+zstd")
IN_FLIGHT, ROUNDS, STREAM, MAX_CUTS = 3, 3, 12, 8


def main(argv: list[str] | None = None) -> int:
    """Measure and simulate; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    torch.set_num_threads(1)
    samples = photographs(2 if options.quick else 4)
    captured = captured_model(MODEL, samples)
    cluster = star(DEVICES, SLOWDOWNS, 1e9, LATENCY_S)
    slowdowns = dict(zip(DEVICES, SLOWDOWNS, strict=True))
    before = profile_of(captured, cluster, samples, EXECUTOR, CODECS, options.quick, MAX_CUTS)
    plans = placements(captured.graph, before)[:: 2 if options.quick else 1]
    cells = [with_rate(cluster, RATES_MBIT[n % len(RATES_MBIT)] * 1e6 / 8) for n in range(len(plans))]
    rounds = 1 if options.quick else ROUNDS
    latencies: list[list[float]] = [[] for _ in plans]
    rates: list[list[float]] = [[] for _ in plans]
    with launch(cluster, unshaped=True) as nodes:
        bench = Bench(nodes, LATENCY_S)
        bench.open(captured, cluster, plans[0], samples)
        for number in range(rounds):
            for plan, cell, latency, rate in zip(plans, cells, latencies, rates, strict=True):
                latency.append(bench.run(plan, cell, samples).latency_s)
                rate.append(bench.stream_rate(plan, cell, (samples * STREAM)[:STREAM], IN_FLIGHT))
            print(f"round {number + 1} of {rounds} done", file=sys.stderr)
        bench.close()
    after = profile_of(captured, cluster, samples, EXECUTOR, CODECS, options.quick, MAX_CUTS)
    profile = stretched(mean_profile(before, after), slowdowns)
    cases: list[dict[str, Any]] = []
    for plan, cell, latency, rate in zip(plans, cells, latencies, rates, strict=True):
        cases += both(plan, captured.graph, cell, profile, report.median(latency), report.median(rate))
    for case in cases:
        print(f"{case['what']:17s} {case['ratio']:.3f} {case['plan']}", file=sys.stderr)
    about = report.context(
        options.seed, model=MODEL, executor=EXECUTOR, slowdowns=slowdowns, latency_s=LATENCY_S, in_flight=IN_FLIGHT,
        drift=report.median([b.median_s / a.median_s for a, b in zip(before.segments, after.segments, strict=True)]),
    )  # fmt: skip
    errors = [abs(case["ratio"] - 1) for case in cases]
    report.finish(options.json, {"relative_error_median": report.median(errors)}, cases, about)
    return 0


def both(
    plan: Plan, graph: Graph, cluster: Cluster, profile: Profile, latency_s: float, rate_per_s: float
) -> list[dict[str, Any]]:
    """Latency with one request under way, and rate with several: measured, simulated, and their ratio."""
    alone = simulate(plan, graph, cluster, profile, requests=8, trace=False)
    stream = simulate(plan, graph, cluster, profile, requests=STREAM, arrivals=ClosedLoop(in_flight=IN_FLIGHT), trace=False)
    pairs = (
        ("latency_s", latency_s, alone.p50_s),
        ("throughput_per_s", rate_per_s, steady_rate([o.ended_s for o in stream.completed], IN_FLIGHT)),
    )
    about = {"plan": str(plan), "bandwidth_bytes_per_s": cluster.links[0].bandwidth_bytes_per_s}
    return [about | {"what": what, "measured": m, "simulated": s, "ratio": s / m} for what, m, s in pairs]


def placements(graph: Graph, profile: Profile) -> list[Plan]:
    """Plans over one, two and three devices, cut early, in the middle and late."""
    length, cuts = graph.num_blocks, profile.cuts[1:-1]
    early, middle, late = (cuts[len(cuts) * part // 4] for part in (1, 2, 3))
    placed: list[tuple[str, tuple[tuple[str, int], ...]]] = [
        ("fp32", (("camera", length),)),
        ("int8", (("server", length),)),
        ("int8", (("camera", early), ("server", length))),
        ("int8+zstd", (("camera", middle), ("edge", length))),
        ("fp16", (("camera", late), ("server", length))),
        ("int8", (("edge", middle), ("server", length))),
        ("int8", (("camera", early), ("edge", late), ("server", length))),
        ("fp16", (("camera", early), ("edge", middle), ("server", length))),
        ("int8", (("camera", early), ("server", late), ("camera", length))),
    ]
    return [_plan(graph, codec, stages) for codec, stages in placed]


def _plan(graph: Graph, codec: str, placed: tuple[tuple[str, int], ...]) -> Plan:
    starts = [0, *(stop for _, stop in placed)]
    ends = [DEVICES[0], *(device for device, _ in placed), DEVICES[0]]
    stages = [
        Stage(device=device, start=start, stop=stop, executor=EXECUTOR)  # type: ignore[arg-type]
        for start, (device, stop) in zip(starts, placed, strict=False)
    ]
    transfers = [
        Transfer(source=a, target=b, position=p, codec=LOCAL if a == b else codec)  # type: ignore[arg-type]
        for a, b, p in zip(ends, ends[1:], starts, strict=False)
    ]
    return Plan(graph_hash=graph.content_hash(), stages=tuple(stages), transfers=tuple(transfers))


if __name__ == "__main__":
    sys.exit(main())
