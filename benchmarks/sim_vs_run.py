"""The simulator beside reality: the same plans on the virtual clock, fed by the profile, and in real processes.

Plans over one, two and three devices of unlike speed at several link rates, cut at several places; each is run with one
request under way (latency) and as a stream of several (results per second). relative_error_median is the median of
|simulated / measured - 1| over all of these. No plan was run while profiling.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks import report
from benchmarks.split_world import Bench, Sample, captured_model, photographs, profile_of, star, stretched, with_rate
from ecotone.cluster import Cluster
from ecotone.graph import Graph
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.profile import Profile
from ecotone.runtime import launch
from ecotone.simulator import ClosedLoop, simulate

MODEL, EXECUTOR = "mobilenet_v2", "torch:fp32"
DEVICES, SLOWDOWNS = ("camera", "edge", "server"), (10.0, 6.0, 4.0)
RATES_MBIT = (10, 50, 200)
LATENCY_S = 0.003
CODECS = ("fp32", "fp16", "int8", "int8+zstd")
IN_FLIGHT = 4


def main(argv: list[str] | None = None) -> int:
    """Measure and simulate; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    torch.set_num_threads(1)
    samples = photographs(2 if options.quick else 4)
    captured = captured_model(MODEL, samples)
    cluster = star(DEVICES, SLOWDOWNS, 1e9, LATENCY_S)
    slowdowns = dict(zip(DEVICES, SLOWDOWNS, strict=True))
    plain = profile_of(captured, cluster, samples, EXECUTOR, CODECS, options.quick)
    profile = stretched(plain, slowdowns)
    plans = placements(captured.graph, profile)[:: 2 if options.quick else 1]
    cases: list[dict[str, Any]] = []
    with launch(cluster, unshaped=True) as nodes:
        bench = Bench(nodes, LATENCY_S)
        bench.open(captured, cluster, plans[0], samples)
        for number, plan in enumerate(plans):
            rate = RATES_MBIT[number % len(RATES_MBIT)]
            cell = with_rate(cluster, rate * 1e6 / 8)
            cases += both(bench, plan, captured.graph, cell, profile, samples, 12 if options.quick else 24)
            print(
                f"{rate} Mbit/s {plan}: " + ", ".join(f"{c['what']} {c['ratio']:.3f}" for c in cases[-2:]), file=sys.stderr
            )
        bench.close()
    about = report.context(options.seed, model=MODEL, executor=EXECUTOR, slowdowns=slowdowns, latency_s=LATENCY_S)
    errors = [abs(case["ratio"] - 1) for case in cases]
    report.finish(options.json, {"relative_error_median": report.median(errors)}, cases, about)
    return 0


def both(
    bench: Bench, plan: Plan, graph: Graph, cluster: Cluster, profile: Profile, samples: list[Sample], count: int
) -> list[dict[str, Any]]:
    """Latency with one request under way, and rate with several: measured, simulated, and their ratio."""
    measured_s = bench.run(plan, cluster, (samples * 3)[:8]).latency_s
    simulated_s = simulate(plan, graph, cluster, profile, requests=8, trace=False).p50_s
    rate = bench.stream_rate(plan, cluster, (samples * count)[:count], IN_FLIGHT)
    simulated = simulate(
        plan, graph, cluster, profile, requests=count, arrivals=ClosedLoop(in_flight=IN_FLIGHT), trace=False
    )
    about = {"plan": str(plan), "bandwidth_bytes_per_s": cluster.links[0].bandwidth_bytes_per_s}
    return [
        about | {"what": "latency_s", "measured": measured_s, "simulated": simulated_s, "ratio": simulated_s / measured_s},
        about
        | {
            "what": "throughput_per_s", "measured": rate, "simulated": simulated.throughput_per_s,
            "ratio": simulated.throughput_per_s / rate,
        },
    ]  # fmt: skip


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
