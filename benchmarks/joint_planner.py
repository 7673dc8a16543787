"""The joint planner's claims: equal to enumeration of all plans, near its bound at 1,000 blocks and devices, and worth it.

`oracle_mismatches`: random problems in which cut, placement, executors, codecs and exit policy are chosen together, under
each of nine objectives and random budgets, and under scored percentiles, where value, bound or plan is not what the
enumeration of every plan says. `dag_mincut_mismatches`: the same for models with branches (dag_oracle.py, null without).
`large_instance_*`: the slowest, and the widest gap, of three instances of 1,000 blocks, 1,000 devices of 20 kinds, links by
kind, four executors and four codecs, with budgets on accuracy, error and every device's memory.
`sequential_over_joint_median`: latency where cut, precision and exit are decided one after another (baselines.py), by the
same solver, over that of ours.
"""

from __future__ import annotations

import importlib
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
from ecotone.accuracy import AccuracyTable, Cell, ExitPolicy
from ecotone.cluster import Cluster, Device, DeviceId, KindLink, Link, Power
from ecotone.cost import predict
from ecotone.graph import Exit, Graph, Parameter
from ecotone.plan import plan_violations
from ecotone.planner import Latency, PlannerError, Requirement, Solution, baselines, solve
from ecotone.planner.objective import Single, least, quantity
from ecotone.profile import CodecCost, ExitTime, Payload, Profile, SegmentTime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "planner"))
from enumeration import chain_graph
from joint_enumeration import OBJECTIVES, Joint, joint_world, least_value, random_limits
from scored import small_worlds

MEGABYTE = 1_000_000
# name -> (time, relative error) beside eager float32, (bytes, points) beside uncompressed
EXECUTORS = {
    "torch:fp32": (1.0, 0.0),
    "torch:fp16": (0.7, 0.002),
    "openvino:bf16": (0.55, 0.008),
    "openvino:int8": (0.35, 0.03),
}
CODECS = {"fp32": (1.0, 0.0), "fp16": (0.5, 0.01), "int8": (0.25, 0.05), "int4": (0.125, 0.2)}
# (memory of a device over the weights of the model, limit on the relative error, seed)
LARGE = ((0.06, 0.25, 0), (0.02, 0.5, 1), (0.15, 0.1, 2))
TIME_LIMIT_S = 25.0
GOOD_GAP = 0.03  # the search may stop there
Problem = tuple[Graph, Cluster, Profile]


def oracle_mismatches(count: int) -> dict[str, Any]:
    """Problems by objective, and those where ours is not what enumeration says."""
    wrong, refused = dict.fromkeys((*OBJECTIVES, "p95"), 0), 0
    for seed in range(count):
        world = joint_world(seed)
        for name in OBJECTIVES:
            require, limits = random_limits(world, name, seed)
            expected = least_value(world, name, limits)
            refused += math.isinf(expected)
            wrong[name] += not agrees(world, least(name), require, expected, limits)
    scored = small_worlds(max(10, count // 8))
    for world, p95, plans in scored:
        assert p95.score_in is not None
        score = p95.score_in(world.graph, world.cluster, world.profile)
        wrong["p95"] += not agrees(world, p95, [], min(map(score, plans), default=math.inf), {})
    return {"problems": count * len(OBJECTIVES) + len(scored), "refused": refused, "mismatches": wrong}


def agrees(
    world: Joint, objective: Single, require: Sequence[Requirement], expected: float, limits: dict[str, float]
) -> bool:  # fmt: skip
    """Value as expected, proven, by a plan that can run, keeps every limit and costs what is said."""
    problem = (world.graph, world.cluster, world.profile)
    try:
        found = solve(*problem, objective, require, num_runners_up=0, nearest=False, time_limit_s=60.0)
    except PlannerError:
        return math.isinf(expected)
    near = abs(found.value - expected) <= 1e-6 * abs(expected) + 1e-12
    kept = all(quantity(n, found.cost) <= v + abs(v) * 1e-8 + 1e-12 for n, v in limits.items())
    room = {d.name: d.memory_bytes for d in world.cluster.devices}
    fits = all(d.memory_bytes <= room[d.device] for d in found.cost.devices)
    runs = not plan_violations(found.plan, world.graph, world.cluster) and predict(found.plan, *problem) == found.cost
    return near and kept and fits and runs and found.is_proven and found.bound <= found.value + 1e-12


def dag_mincut_mismatches(count: int, seed: int) -> int | None:
    """What the oracle of models with branches counts; None where this build has none."""
    try:
        oracle = importlib.import_module("benchmarks.dag_oracle")
    except ModuleNotFoundError:
        return None
    return int(oracle.mismatches(count, seed))


def large(seed: int, share: float, *, blocks: int = 1000, devices: int = 1000, kinds: int = 20) -> Problem:
    """A chain and a fleet: one camera, the rest of other kinds by chance; `share`: memory of a device over the weights."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(MEGABYTE, 10 * MEGABYTE, blocks).tolist()
    graph = chain_graph((rng.integers(5, 200, blocks + 1) * 1000).tolist(), weights)
    kind_of = [0, *(int(k) for k in rng.integers(1, kinds, devices - 1))]
    room = rng.uniform(0.4, 1.6, kinds) * share * sum(weights)
    fleet = tuple(
        Device(
            name=DeviceId(f"d{i}"), kind=f"k{k}", memory_bytes=int(room[k]) + 2 * MEGABYTE,
            tier="end" if k < kinds // 4 else "edge", power=Power(busy_watt=5.0 + k), price_money_per_s=1e-4 * k,
        )
        for i, k in enumerate(kind_of)
    )  # fmt: skip
    rate, delay = 1e7 * 30.0 ** rng.uniform(-0.5, 0.5, (kinds, kinds)), rng.uniform(1e-4, 3e-3, (kinds, kinds))
    links = tuple(
        KindLink(
            source_kind=f"k{a}", target_kind=f"k{b}", latency_s=float(delay[a, b]), bandwidth_bytes_per_s=float(rate[a, b])
        )
        for a, b in itertools.product(sorted(set(kind_of)), repeat=2)
    )  # fmt: skip
    cluster = Cluster(
        name="large", devices=fleet, links=(), kind_links=links, source=fleet[0].name, sink=fleet[0].name
    )  # fmt: skip
    speakers = {k: fleet[kind_of.index(k)].name for k in sorted(set(kind_of))}
    work = rng.uniform(1e-3, 5e-3, blocks)
    return graph, cluster, _measured(rng, graph, list(speakers.values()), work, rng.uniform(0.5, 4.0, len(speakers)))


def _measured(
    rng: np.random.Generator, graph: Graph, devices: Sequence[DeviceId], work: np.ndarray, speed: np.ndarray
) -> Profile:
    """Prefixes and suffixes of the chain by every executor on every device, codecs, payloads and their loss."""
    blocks, segments, codecs = graph.num_blocks, [], []
    for d, device in enumerate(devices):
        for executor, (gain, error) in EXECUTORS.items():
            upto = np.concatenate([[0.0], np.cumsum(work / speed[d] * gain * rng.uniform(0.7, 1.3, blocks))])
            spans = [(0, b, upto[b]) for b in range(1, blocks + 1)]
            spans += [(a, blocks, upto[-1] - upto[a]) for a in range(1, blocks)]
            segments += [
                SegmentTime(
                    device=device, executor=executor, start=a, stop=b, median_s=float(t) + 1e-4, spread_s=0.0,
                    memory_bytes=0, relative_error=error,
                )
                for a, b, t in spans
            ]  # fmt: skip
        for codec in CODECS:
            costs = {f"{w}_s_per_raw_byte": float(rng.uniform(2e-10, 2e-9)) for w in ("encode", "decode")}
            codecs.append(CodecCost(device=device, codec=codec, encode_fixed_s=1e-5, decode_fixed_s=1e-5, **costs))
    sizes, payloads, cells = graph.every_frontier_bytes(), [], []
    for position, (codec, (share, points)) in itertools.product(range(blocks + 1), CODECS.items()):
        loss = points * float(rng.uniform(0.3, 1.7))
        payloads.append(Payload(position=position, codec=codec, size_bytes=sizes[position] * share, num_samples=64))
        cells.append(
            Cell(
                position=position, codec=codec, num_decisions=1000, points=90.0, loss_points=loss, low_points=loss,
                high_points=loss, fitted_points=loss,
            )
        )  # fmt: skip
    table = AccuracyTable(
        graph_hash=graph.content_hash(), data_hash="drawn", is_labelled=True, reference_points=90.0, cells=tuple(cells)
    )  # fmt: skip
    return Profile(
        graph_hash=graph.content_hash(), cluster_name="large", num_blocks=blocks, cuts=tuple(range(blocks + 1)),
        segments=tuple(segments), codecs=tuple(codecs), payloads=tuple(payloads), accuracy=table,
    )  # fmt: skip


def large_instance(share: float, error: float, seed: int, size: int) -> dict[str, Any]:
    """One of LARGE (`size` blocks and devices): seconds of solve, value, proven bound, what binds."""
    problem = large(seed, share, blocks=size, devices=size)
    start = time.perf_counter()
    require = ("accuracy_loss=1", f"error={error}")
    found = solve(*problem, Latency(), require, time_limit_s=TIME_LIMIT_S, num_runners_up=0, gap=GOOD_GAP)
    seconds = time.perf_counter() - start
    room = {d.name: d.memory_bytes for d in problem[1].devices}
    assert not plan_violations(found.plan, problem[0], problem[1])
    assert predict(found.plan, *problem) == found.cost
    assert all(d.memory_bytes <= room[d.device] for d in found.cost.devices)
    assert found.cost.accuracy_loss_points <= 1 + 1e-9
    assert found.cost.relative_error <= error * (1 + 1e-9)
    return {
        "memory_share": share, "error_limit": error, "seconds": seconds, "value_s": found.value, "bound_s": found.bound,
        "gap": found.gap, "stages": len(found.plan.stages), "executors": len({s.executor for s in found.plan.stages}),
        "codecs": len({t.codec for t in found.plan.transfers}), "points": found.cost.accuracy_loss_points,
        "error": found.cost.relative_error, "shadow_prices": {p.name: p.per_unit for p in found.shadow_prices},
    }  # fmt: skip


def everyday(seed: int) -> Problem:
    """A narrowing network of 20 blocks with three exits on a camera, an edge box and a server; links of 1 to 100 Mbit/s."""
    rng = np.random.default_rng([seed, 20])
    blocks = 20
    sizes = (150_000 * 0.8 ** np.arange(blocks + 1) * rng.uniform(0.5, 2.0, blocks + 1)).astype(int) + 10
    graph = chain_graph(sizes.tolist(), rng.integers(MEGABYTE, 4 * MEGABYTE, blocks).tolist())
    places = (5, 10, 15)
    heads = tuple(Parameter(name=f"head{p}", size_bytes=100_000) for p in places)
    exits = tuple(Exit(name=f"exit{p}", position=p, flop=1.0, parameters=(blocks + i,)) for i, p in enumerate(places))
    graph = replace(graph, parameters=(*graph.parameters, *heads), exits=exits)
    names = tuple(DeviceId(n) for n in ("camera", "edge", "server"))
    devices = tuple(Device(name=n, memory_bytes=10**9, tier="end" if n == "camera" else "edge") for n in names)
    pairs = {("camera", "edge"): 1.0, ("edge", "server"): 2.0, ("camera", "server"): 0.5}
    rates = {pair: float(10 ** rng.uniform(5.1, 7.1)) * f for pair, f in pairs.items()}
    links = tuple(
        Link(source=DeviceId(a), target=DeviceId(b), latency_s=float(rng.uniform(5e-4, 1e-2)), bandwidth_bytes_per_s=rate)
        for (one, other), rate in rates.items()
        for a, b in ((one, other), (other, one))
    )
    cluster = Cluster(name="everyday", devices=devices, links=links, source=names[0], sink=names[0])
    speed = np.array([1.0, rng.uniform(3, 8), rng.uniform(10, 20)])
    profile = _measured(rng, graph, names, rng.uniform(2e-3, 1.2e-2, blocks), speed)
    return graph, cluster, _with_exits(rng, profile, places)


def _with_exits(rng: np.random.Generator, profile: Profile, places: Sequence[int]) -> Profile:
    """Four policies, from careful to bold: more leave, more is lost; heads of 2 % of the whole model."""
    policies = []
    for i, (share, loss) in enumerate(((0.15, 0.1), (0.3, 0.3), (0.45, 0.6), (0.6, 0.95))):
        shares = share * rng.dirichlet((1.0, 1.0, 1.0))
        policies.append(
            ExitPolicy(
                name=f"policy{i}", exits=tuple(f"exit{p}" for p in places), thresholds=(0.9 - 0.1 * i,) * len(places),
                shares=tuple(shares.tolist()), loss_points=loss,
            )
        )  # fmt: skip
    whole = {(s.device, s.executor): s.median_s for s in profile.segments if (s.start, s.stop) == (0, profile.num_blocks)}
    heads = tuple(
        ExitTime(device=d, executor=e, exit=f"exit{p}", median_s=0.02 * t) for (d, e), t in whole.items() for p in places
    )
    assert profile.accuracy is not None
    return replace(profile, exits=heads, accuracy=replace(profile.accuracy, policies=tuple(policies)))


def sequential(count: int) -> list[dict[str, Any]]:
    """Latency decided one after another over joint, on everyday problems within a point of accuracy and 5 % of error."""
    rows = []
    for seed in range(count):
        problem, require = everyday(seed), ("accuracy_loss=1", "error=0.05")
        ours: Solution = solve(*problem, Latency(), require, num_runners_up=0)
        cost = predict(baselines.place("sequential", *problem, require), *problem)
        rows.append(
            {
                "seed": seed, "joint_s": ours.value, "bound_s": ours.bound, "sequential_s": cost.latency_s,
                "ratio": cost.latency_s / ours.value, "exit_policy": ours.exit_policy, "stages": len(ours.plan.stages),
            }
        )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    options = report.arguments(__doc__ or "", argv)
    quick, seed = options.quick, options.seed
    oracle = oracle_mismatches(20 if quick else 380)
    dag = dag_mincut_mismatches(50 if quick else 1000, seed)
    instances = [large_instance(s, e, seed + i, 200 if quick else 1000) for s, e, i in LARGE[: 1 if quick else None]]
    rows = sequential(6 if quick else 60)
    figures = {
        "oracle_mismatches": float(sum(oracle["mismatches"].values())),
        "dag_mincut_mismatches": None if dag is None else float(dag),
        "large_instance_s": max(case["seconds"] for case in instances),
        "large_instance_gap": max(case["gap"] for case in instances),
        "sequential_over_joint_median": report.median([row["ratio"] for row in rows]),
    }
    cases = {"oracle": oracle, "large_instances": instances, "sequential": rows}
    report.finish(options.json, figures, cases, report.context(seed))


if __name__ == "__main__":
    main()
