"""Two-tier placement by minimum cut against enumeration of every placement, and what goes wrong with a careless cut.

Random graphs of 2 to 10 blocks with tensors of several readers, on two machines with random costs; `mismatches` counts
problems where the cut's value is not the least of all placements in which nothing returns. Beside it, on the same problems:
every edge priced instead of every tensor, and a cut without the edges that forbid a return. See planner/mincut.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from ecotone.planner.mincut import FlowNetwork, TwoTier, least_two_tier
from ecotone.planner.objective import PlannerError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "planner"))
from dag_worlds import enumerated, random_problem

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


def main(argv: Sequence[str] | None = None) -> None:
    options = report.arguments(__doc__ or "", argv)
    rows = careless(40 if options.quick else PUBLISHED_COUNT, options.seed)
    figures = {
        "dag_mincut_mismatches": float(mismatches(100 if options.quick else COUNT, options.seed)),
        "by_edge_wrong": float(rows["by_edge"]["wrong"]),
        "without_reverse_edges_wrong": float(rows["without_reverse_edges"]["wrong"]),
    }
    report.finish(options.json, figures, rows, report.context(options.seed))


if __name__ == "__main__":
    main()
