"""The planner's claims: exact against enumeration, fast on long chains and many devices, never behind a baseline.

Ours and each baseline plan the same random problems; all plans are priced by the same cost model.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.cost import predict
from ecotone.graph import Graph
from ecotone.planner import Latency, PlannerError, Solution, Throughput, baselines, solve
from ecotone.profile import CodecCost, Payload, Profile, SegmentTime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "planner"))
from enumeration import World, best, chain_graph, random_world

MEGABYTE = 1_000_000
ROUNDS = 5
# (memory of all devices over the weights, fastest link over slowest, seed)
MEMORY_CASES = ((3.0, 4.0, 0), (2.0, 4.0, 0), (4.0, 4.0, 1), (3.0, 100.0, 2), (4.0, 100.0, 3))


def oracle_mismatches(count: int) -> dict[str, int]:
    """Problems of each sort where our value differs from the least of all enumerated plans by more than 1e-6."""
    wrong = {"latency": 0, "latency_with_memory": 0, "throughput": 0}
    for seed, sort in itertools.product(range(count), wrong):
        world = random_world(seed, tight=sort == "latency_with_memory")
        objective = Throughput() if sort == "throughput" else Latency()
        wrong[sort] += not agrees(world, objective)
    return wrong


def agrees(world: World, objective: Latency | Throughput) -> bool:
    expected = best(world, objective.name)
    try:
        found = solve(world.graph, world.cluster, world.profile, objective).value
    except PlannerError:
        return math.isinf(expected)
    return abs(found - expected) <= 1e-6 * expected


def large(
    seed: int, blocks: int, kinds: Sequence[int], *, memory_share: float | None = None, spread: float = 100.0
) -> tuple[Graph, Cluster, Profile]:
    """A chain on devices of several kinds (counts given), measured as prefixes and suffixes; links alike per pair of kinds.

    `memory_share`: memory of all devices together over the weights of the model; None: plenty. `spread`: the fastest link's
    rate over the slowest's, 10 MB/s between them.
    """
    rng = np.random.default_rng(seed)
    weights = rng.integers(MEGABYTE, 10 * MEGABYTE, blocks).tolist()
    graph = chain_graph((rng.integers(5, 200, blocks + 1) * 1000).tolist(), weights)
    image = replace(graph.tensors[0], shape=(1, 3, 160, 160))
    graph = replace(graph, tensors=(image, *graph.tensors[1:]))
    kind_of = [k for k, n in enumerate(kinds) for _ in range(n)]
    shares = rng.uniform(0.5, 1.5, len(kinds))
    unit = 1e12 if memory_share is None else memory_share * sum(weights) / sum(shares[k] for k in kind_of)
    devices = tuple(
        Device(name=DeviceId(f"d{i}"), kind=f"k{k}", memory_bytes=int(unit * shares[k]) + 2 * MEGABYTE)
        for i, k in enumerate(kind_of)
    )
    rate = 1e7 * spread ** rng.uniform(-0.5, 0.5, (len(kinds),) * 2)
    delay = rng.uniform(1e-4, 3e-3, (len(kinds),) * 2)
    links = tuple(
        Link(
            source=devices[a].name, target=devices[b].name, latency_s=float(delay[kind_of[a], kind_of[b]]),
            bandwidth_bytes_per_s=float(rate[kind_of[a], kind_of[b]]),
        )
        for a, b in itertools.permutations(range(len(devices)), 2)
    )  # fmt: skip
    cluster = Cluster(name="large", devices=devices, links=links, source=devices[0].name, sink=devices[0].name)
    return graph, cluster, _measured(rng, graph, devices, kind_of)


def _measured(rng: np.random.Generator, graph: Graph, devices: tuple[Device, ...], kind_of: list[int]) -> Profile:
    blocks = graph.num_blocks
    work = rng.uniform(1e-3, 5e-3, blocks)
    segments, codecs = [], []
    for kind in sorted(set(kind_of)):
        name, speed = devices[kind_of.index(kind)].name, rng.uniform(0.5, 4.0)
        upto = np.concatenate([[0.0], np.cumsum(work / speed * rng.uniform(0.7, 1.3, blocks))])
        spans = {(0, b): upto[b] for b in range(1, blocks + 1)} | {(a, blocks): upto[-1] - upto[a] for a in range(1, blocks)}
        segments += [
            SegmentTime(
                device=name, executor="torch:fp32", start=a, stop=b, median_s=float(t) + 1e-4, spread_s=0, memory_bytes=0
            )
            for (a, b), t in spans.items()
        ]
        for codec in ("fp32", "int8", "int4", "jpeg:90"):
            costs = {f"{w}_s_per_raw_byte": float(rng.uniform(2e-10, 2e-9)) for w in ("encode", "decode")}
            codecs.append(CodecCost(device=name, codec=codec, encode_fixed_s=1e-5, decode_fixed_s=1e-5, **costs))
    photograph = Payload(position=0, codec="jpeg:90", size_bytes=graph.frontier_bytes(0) * 0.04, num_samples=64)
    carried = [
        Payload(position=p, codec=codec, size_bytes=graph.frontier_bytes(p) * share, num_samples=64)
        for p in range(blocks + 1)
        for codec, share in (("fp32", 1.0), ("int8", 0.25), ("int4", 0.125))
    ]
    return Profile(
        graph_hash=graph.content_hash(), cluster_name="large", num_blocks=blocks, cuts=tuple(range(blocks + 1)),
        segments=tuple(segments), codecs=tuple(codecs), payloads=(photograph, *carried),
    )  # fmt: skip


def timed(problem: tuple[Graph, Cluster, Profile], objective: Latency | Throughput, rounds: int) -> tuple[float, Solution]:
    """Median wall seconds of solve, and its answer."""
    seconds, answer = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        answer = solve(*problem, objective)
        seconds.append(time.perf_counter() - start)
    assert answer is not None
    return report.median(seconds), answer


def memory_gap(seed: int, share: float, spread: float, offset: int) -> dict[str, Any]:
    """A 200 x 16 chain whose best plan without the memory limits breaks them: value, proven bound and gap after 10 s."""
    problem = large(seed + offset, 200, (1,) * 16, memory_share=share, spread=spread)
    graph, cluster, profile = problem
    roomy = replace(cluster, devices=tuple(replace(d, memory_bytes=10**15) for d in cluster.devices))
    free = solve(graph, roomy, profile, Latency(), num_runners_up=0)
    room = {d.name: d.memory_bytes for d in cluster.devices}
    binding = any(d.memory_bytes > room[d.device] for d in free.cost.devices)
    found = solve(*problem, Latency(), time_limit_s=10.0, num_runners_up=0)
    return {
        "memory_share": share, "link_spread": spread, "binding": binding, "without_limits_s": free.value,
        "value_s": found.value, "bound_s": found.bound, "gap": found.gap, "stages": len(found.plan.stages),
    }  # fmt: skip


def against_baselines(count: int, seed: int) -> list[dict[str, Any]]:
    """Value of every baseline over ours, under the objective it is made for, over problems where it has a plan."""
    throughput_only, latency_only = (
        {"edgeshard_throughput", "pipeedge"},
        {"edgeshard_latency", "neurosurgeon", "best_fixed_cut"},
    )
    ratios: dict[tuple[str, str], list[float]] = {}
    for index in range(count):
        share = (None, 3.0, 1.5)[index % 3]
        problem = large(seed + index, 24, (1, 2, 2), memory_share=share)
        for objective in (Latency(), Throughput()):
            ours = solve(*problem, objective, time_limit_s=3.0, num_runners_up=0).value
            for name in baselines.NAMES:
                if name in (latency_only if objective.name == "throughput" else throughput_only):
                    continue
                try:
                    plan = baselines.place(name, *problem)
                except PlannerError:
                    continue
                ratios.setdefault((name, objective.name), []).append(objective.value(predict(plan, *problem)) / ours)
    return [
        {"baseline": n, "objective": o, "problems": len(r), "over_ours_median": report.median(r), "over_ours_min": min(r)}
        for (n, o), r in sorted(ratios.items())
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = report.arguments(__doc__ or "", argv)
    rounds, seed = (1 if options.quick else ROUNDS), options.seed
    wrong = oracle_mismatches(40 if options.quick else 400)
    free_s, free = timed(large(seed, 200, (1,) * 16), Latency(), rounds)
    tight = [memory_gap(seed, *case) for case in MEMORY_CASES[: 1 if options.quick else None]]
    wide_s, wide = timed(large(seed, 60, (5, 5, 5)), Throughput(), rounds)
    rows = against_baselines(6 if options.quick else 30, seed)
    figures = {
        "oracle_mismatches": float(sum(wrong.values())),
        "chain_200x16_s": free_s,
        "chain_200x16_memory_gap": report.median([case["gap"] for case in tight]),
        "throughput_15dev_3kinds_s": wide_s,
        "baseline_over_ours_median": min(row["over_ours_median"] for row in rows),
    }
    cases = {
        "oracle": wrong,
        "chain_200x16": {"value_s": free.value, "bound_s": free.bound, "stages": len(free.plan.stages)},
        "chain_200x16_memory": tight,
        "throughput_15dev_3kinds": {"value_s": wide.value, "bound_s": wide.bound, "stages": len(wide.plan.stages)},
        "baselines": rows,
    }
    report.finish(options.json, figures, cases, report.context(seed))


if __name__ == "__main__":
    main()
