"""Models with branches: the minimum cut and the search over orders against enumeration, and what both gain over one cut.

`mismatches`: random graphs of 2 to 10 blocks with tensors of several readers on two machines, where the cut's value is not
the least of all placements in which nothing returns. Beside it, on such problems: every edge priced instead of every tensor,
and a cut without the edges that forbid a return. `order_mismatches`: several machines, every topological order enumerated.
`gains`: latency of the best cut at a single tensor (the papers' chain) and of the best cut anywhere in the captured order
over that of the best order, on random Inception-like graphs and on two networks with times by FLOP. See docs/dag.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import dag_networks, report
from ecotone.cluster import Cluster
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.model import capture
from ecotone.planner import Latency, solve, solve_dag
from ecotone.planner.blockwise import Prices, blockwise, prices
from ecotone.planner.mincut import FlowNetwork, TwoTier, least_two_tier
from ecotone.planner.objective import Asked, PlannerError
from ecotone.planner.placement import Placement, makespan_s
from ecotone.profile import Profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "planner"))
from dag_worlds import EveryChain, enumerated, inception_world, random_dag_world, random_problem

TOLERANCE = 1e-9
COUNT, PUBLISHED_COUNT = 2000, 400


def mismatches(count: int, seed: int) -> int:
    """Of `count` random problems, how many the cut does not solve to the least of all placements."""
    rng = np.random.default_rng(seed)
    wrong = 0
    for _ in range(count):
        problem = random_problem(rng)
        least = enumerated(problem)
        try:
            found = least_two_tier(problem)
        except PlannerError:
            wrong += math.isfinite(least)
            continue
        agrees = abs(found.value - least) <= TOLERANCE * max(1.0, least) and found.bound <= least + TOLERANCE
        wrong += not agrees or abs(found.bound - found.value) > TOLERANCE * max(1.0, least)
    return wrong


def by_edge(problem: TwoTier) -> float:
    """What a cut that prices every edge takes for the least value."""
    split = []
    for parcel in problem.parcels:
        split += [replace(parcel, readers=(r,), is_result=False, home=0.0) for r in parcel.readers[1:]]
        split.append(replace(parcel, readers=parcel.readers[:1]))
    return least_two_tier(replace(problem, parcels=tuple(split))).value


def without_reverse_edges(problem: TwoTier) -> float:
    """What a cut takes for the least value when nothing forbids a return: a tensor made on the second is free to go back."""
    count = len(problem.first)
    network, source, sink = FlowNetwork(count + 2), count, count + 1
    for v in range(count):
        network.edge(source, v, problem.second[v])
        network.edge(v, sink, problem.first[v])
    for parcel in problem.parcels:
        network.once(source if parcel.maker < 0 else parcel.maker, list(parcel.readers), parcel.send)
        if parcel.is_result:
            network.edge(source, parcel.maker, parcel.home)
    return network.cut(source, sink)[0]


def careless(count: int, seed: int) -> dict[str, Any]:
    """How often each careless cut misses the least value of DADS's own problem, over `count` random ones."""
    rng = np.random.default_rng(seed)
    ratios: dict[str, list[float]] = {"exact": [], "by_edge": [], "without_reverse_edges": []}
    for _ in range(count):
        problem = random_problem(rng, plain=True)
        least = enumerated(problem)
        ratios["exact"].append(least_two_tier(problem).value / least)
        ratios["by_edge"].append(by_edge(problem) / least)
        ratios["without_reverse_edges"].append(without_reverse_edges(problem) / least)
    return {
        name: {"wrong": sum(abs(r - 1) > TOLERANCE for r in rows), "of": count, "least_ratio": min(rows), "most": max(rows)}
        for name, rows in ratios.items()
    }


def order_mismatches(count: int, seed: int) -> int:
    """Of `count` random problems on two or three machines, half with short memory, those not solved and proven."""
    wrong = 0
    for index in range(count):
        world = random_dag_world(seed + index, tight=index % 2 == 1)
        least = EveryChain(world, "latency").least()
        try:
            found = solve_dag(world.graph, world.cluster, world.profile, Latency())
        except PlannerError:
            wrong += math.isfinite(least)
            continue
        wrong += max(abs(found.value - least), abs(found.bound - least)) > TOLERANCE * least
    return wrong


def gains(graph: Graph, cluster: Cluster, profile: Profile) -> dict[str, float]:
    """Over the best order: the best cut at a single tensor, and the best cut of the captured order."""
    best = solve_dag(graph, cluster, profile, Latency())
    papers = replace(profile, cuts=(0, *graph.single_tensor_cuts(), graph.num_blocks))
    single, captured = (solve(graph, cluster, p, Latency(), num_runners_up=0).value for p in (papers, profile))
    return {
        "single_tensor_over_best": single / best.value, "captured_over_best": captured / best.value,
        "gap": best.solution.gap, "ideals": best.num_ideals, "stages": len(best.plan.stages),
    }  # fmt: skip


def networks(quick: bool) -> dict[str, list[dict[str, float]]]:
    """Gains on captured networks over link rates, the server ten times as fast."""
    found = {}
    for name, build in dag_networks.NETWORKS.items():
        graph = capture(*build(), name=name, branches=True).graph
        rates = (16.0,) if quick else (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
        worlds = ((rate, *dag_networks.by_flop(graph, rate * 1e6 / 8, 10.0)) for rate in rates)
        found[name] = [{"link_mbit_per_s": rate} | gains(graph, *world) for rate, *world in worlds]
    return found


def direct_sends(worlds: Sequence[tuple[Graph, Cluster, Profile]]) -> list[float]:
    """Latency of the best plan over the makespan that direct sends could have: each tensor sent when it is made, branches on
    both machines at once. Found by moving single blocks from the plan's own placement, so at least that much.
    """
    found = []
    for graph, cluster, profile in worlds:
        price = prices(blockwise(CostModel(graph, cluster, profile), Asked()), "latency")
        best = solve_dag(graph, cluster, profile, Latency())
        names = [cluster.devices[int(d)].name for d in price.tables.device]
        row = [0] * graph.num_blocks
        order = best.order or tuple(range(graph.num_blocks))
        for stage in best.plan.stages:
            for block in order[stage.start : stage.stop]:
                row[block] = names.index(stage.device)
        found.append(best.value / _climbed(price, row))
    return found


def _climbed(price: Prices, row: list[int]) -> float:
    def seconds(machines: list[int]) -> float:
        return makespan_s(price, Placement(machines=tuple(machines), devices=(), value=0.0, bound=0.0))

    best, better = seconds(row), True
    while better:
        better = False
        for block in range(len(row)):
            for machine in range(len(price.tables.device)):
                moved = [*row[:block], machine, *row[block + 1 :]]
                if machine != row[block] and (value := seconds(moved)) < best - 1e-12:
                    row, best, better = moved, value, True
    return best


def main(argv: Sequence[str] | None = None) -> None:
    options = report.arguments(__doc__ or "", argv)
    quick, seed = options.quick, options.seed
    rows = careless(40 if quick else PUBLISHED_COUNT, seed)
    worlds = [inception_world(seed + index) for index in range(10 if quick else 100)]
    inception = [gains(w.graph, w.cluster, w.profile) for w in worlds]
    real = networks(quick)
    overlap = direct_sends([(w.graph, w.cluster, w.profile) for w in worlds[: 5 if quick else 25]])
    single, captured = ([row[f"{name}_over_best"] for row in inception] for name in ("single_tensor", "captured"))
    figures = {
        "dag_mincut_mismatches": float(mismatches(100 if quick else COUNT, seed)),
        "dag_order_mismatches": float(order_mismatches(20 if quick else 200, seed)),
        "by_edge_wrong": float(rows["by_edge"]["wrong"]),
        "without_reverse_edges_wrong": float(rows["without_reverse_edges"]["wrong"]),
        "inception_share_better": sum(r > 1 + 1e-6 for r in single) / len(single),
        "single_tensor_over_best_max": max(single),
        "captured_over_best_max": max(captured),
        "over_best_min": round(min(*single, *captured), 9),
        "gap_max": max(row["gap"] for row in inception),
        "plan_over_direct_sends_median": report.median(overlap),
        "two_towers_captured_over_best_max": max(row["captured_over_best"] for row in real["two_towers"]),
    }
    cases = {"careless": rows, "inception": inception, "networks": real, "plan_over_direct_sends": overlap}
    report.finish(options.json, figures, cases, report.context(seed))


if __name__ == "__main__":
    main()
