"""Random problems on models with branches, and oracles that enumerate all placements: they share no code with the planner.

Two machines (`random_problem`, `enumerated`): every set of blocks on the first machine, priced for all sets at once.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ecotone.planner.mincut import Parcel, TwoTier


def random_problem(rng: np.random.Generator, *, plain: bool = False) -> TwoTier:
    """A random DAG of 2 to 10 blocks with one or two inputs; `plain`: DADS's own problem, only the result comes home."""
    count = int(rng.integers(2, 11))
    speed = float(rng.choice([0.3, 1.0, 3.0, 10.0]))
    first = rng.uniform(0.1, 3.0, count).tolist()
    second = (rng.uniform(0.1, 3.0, count) / speed).tolist()
    scale = float(10 ** rng.uniform(-1.5, 0.8))
    readers: list[set[int]] = [set() for _ in range(count + 2)]  # tensors 0 and 1 are inputs, v + 2 is what block v makes
    num_inputs = int(rng.integers(1, 3))
    for v in range(count):
        for maker in rng.choice(v + num_inputs, min(v + num_inputs, int(rng.integers(1, 4))), replace=False):
            readers[maker if maker < num_inputs else maker - num_inputs + 2].add(v)
    parcels = []
    for tensor in range(count + 2):
        maker = tensor - 2 if tensor >= 2 else -1
        is_result = maker >= 0 and (not readers[tensor] or (not plain and rng.random() < 0.1))
        if readers[tensor] or is_result:
            send, home = float(rng.uniform(0, 2) * scale), float(rng.uniform(0, 2) * scale) if is_result else 0.0
            parcels.append(
                Parcel(maker=maker, readers=tuple(sorted(readers[tensor])), send=send, is_result=is_result, home=home)
            )
    problem = TwoTier(first=tuple(first), second=tuple(second), parcels=tuple(parcels), relayed=False)
    return problem if plain else _with_fixed_costs(rng, problem)


def _with_fixed_costs(rng: np.random.Generator, problem: TwoTier) -> TwoTier:
    """Latencies and other costs that are paid once, results wanted elsewhere, blocks that run on one side only."""
    fixed = [float(v) if rng.random() < 0.7 else 0.0 for v in rng.uniform(0, 2.0, 5)]
    ends_at_second, relayed = bool(rng.random() < 0.3), bool(rng.random() < 0.5)
    first, second = list(problem.first), list(problem.second)
    for side in (first, second):
        for v in range(len(side)):
            side[v] = math.inf if rng.random() < 0.03 else side[v]
    at_home = tuple(replace(p, home=0.0) for p in problem.parcels) if ends_at_second else problem.parcels
    return TwoTier(
        first=tuple(first), second=tuple(second), parcels=at_home, first_fixed=fixed[0], second_fixed=fixed[1],
        send_fixed=fixed[2], home_fixed=0.0 if ends_at_second else fixed[3],
        stay_fixed=fixed[4] if relayed and not ends_at_second else 0.0, ends_at_second=ends_at_second, relayed=relayed,
    )  # fmt: skip


def enumerated(problem: TwoTier) -> float:
    """The least value over all sets of blocks on the first machine, priced here for all sets at once."""
    count = len(problem.first)
    on_first = (np.arange(1 << count)[:, None] >> np.arange(count) & 1).astype(np.bool_)
    some_second, some_first = ~on_first.all(axis=1), on_first.any(axis=1)
    total = np.where(on_first, np.array(problem.first), np.array(problem.second)).sum(axis=1)
    total += np.where(some_first, problem.first_fixed, 0.0) + np.where(some_second, problem.second_fixed, 0.0)
    over = some_second | problem.ends_at_second
    total += np.where(over, problem.send_fixed, problem.stay_fixed)
    comes_home = over & problem.relayed
    for parcel in problem.parcels:
        here = on_first[:, parcel.maker] if parcel.maker >= 0 else np.ones(1 << count, dtype=np.bool_)
        readers = on_first[:, list(parcel.readers)]
        total[~here & readers.any(axis=1)] = math.inf
        needed = ~readers.all(axis=1)
        if parcel.is_result:
            needed |= problem.ends_at_second | (over & problem.relayed)
            total += parcel.home * (over if problem.relayed else ~here)
            comes_home |= ~here & (not problem.relayed)
        total += parcel.send * (here & needed)
    total += problem.home_fixed * comes_home
    return float(total.min())
