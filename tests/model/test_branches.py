"""Blocks that follow branches, on random rows of operators: what any grouping must keep, told by paths between operators."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ecotone.model.blocks import BIG_SHARE, Item
from ecotone.model.branches import branch_groups

pytestmark = pytest.mark.torch


def random_items(seed: int) -> tuple[list[Item], list[Item], list[int]]:
    """5 to 40 operators, half of them heavy; some values cannot cross, some do not tell the batch."""
    rng = np.random.default_rng(seed)
    items: list[Item] = []
    for number in range(int(rng.integers(5, 41))):
        near = max(0, number - int(rng.integers(1, 9)))
        picked = {int(v) for v in rng.integers(near, number, int(rng.integers(1, 4)))} if number else {-1}
        heavy = bool(rng.random() < 0.5)
        cost = float(rng.uniform(50, 100)) if heavy and rng.random() < 0.8 else float(rng.uniform(0, 0.01))
        size = math.inf if rng.random() < 0.05 else float(rng.integers(1, 9))
        reads = (*sorted(picked), *([-1] if rng.random() < 0.05 and -1 not in picked else []))
        items.append(Item(heavy=heavy, cost=cost, reads=reads, size_bytes=size, has_batch=bool(rng.random() < 0.95)))
    read = {value for item in items for value in item.reads}
    results = [number for number in range(len(items)) if number not in read]
    return items, [Item(heavy=False, cost=0.0, reads=(), size_bytes=4.0, has_batch=True)], results


def paths(items: list[Item]) -> list[set[int]]:
    """Operators before each."""
    found: list[set[int]] = []
    for item in items:
        found.append({v for value in item.reads if value >= 0 for v in (value, *found[value])})
    return found


@pytest.mark.parametrize("need_batch", [False, True])
@pytest.mark.parametrize("part", range(4))
def test_groups_keep_order_crossings_and_parallel_work(part: int, need_batch: bool) -> None:
    apart = 0
    for seed in range(part * 20, part * 20 + 20):
        items, inputs, results = random_items(seed)
        groups = branch_groups(items, inputs, results, need_batch=need_batch)
        home = {member: number for number, group in enumerate(groups) for member in group}
        assert sorted(home) == list(range(len(items)))
        before, total = paths(items), sum(item.cost for item in items)
        forced = False
        for number, item in enumerate(items):
            for value in item.reads:
                if value < 0:
                    continue
                assert home[value] <= home[number]
                can_cross = items[value].size_bytes < math.inf and (items[value].has_batch or not need_batch)
                forced |= not can_cross
                assert can_cross or home[value] == home[number]
        if forced:
            continue  # what cannot part takes along what lies between
        for group in groups:
            heavy = [m for m in group if items[m].heavy]
            parallel = [(a, b) for a in heavy for b in heavy if a < b and a not in before[b]]
            if parallel:
                assert sum(items[m].cost for m in group) <= total * BIG_SHARE * 3
        big = [n for n, item in enumerate(items) if item.heavy and item.cost > total * BIG_SHARE]
        pairs = [(a, b) for a in big for b in big if a < b and a not in before[b]]
        assert all(home[a] != home[b] for a, b in pairs)
        apart += len(pairs)
    assert apart or need_batch


def test_a_row_without_branches_is_cut_behind_what_shrinks() -> None:
    """Convolution, norm, pooling; then one that enlarges goes with what it feeds."""

    def item(reads: int, size: float, heavy: bool = False) -> Item:
        return Item(heavy=heavy, cost=10.0 if heavy else 0.01, reads=(reads,), size_bytes=size, has_batch=True)

    items = [item(-1, 8, True), item(0, 8), item(1, 2), item(2, 2, True), item(3, 9), item(4, 9, True), item(5, 1)]
    inputs = [Item(heavy=False, cost=0.0, reads=(), size_bytes=4.0, has_batch=True)]
    assert branch_groups(items, inputs, [6], need_batch=False) == ((0, 1, 2), (3,), (4, 5, 6))


def test_what_branches_read_together_stays_between_them_and_their_maker() -> None:
    """Two branches with a reduction each: both reductions make one block only while that is small."""

    def item(reads: tuple[int, ...], size: float, cost: float) -> Item:
        return Item(heavy=cost > 1, cost=cost, reads=reads, size_bytes=size, has_batch=True)

    def groups(reduction: float) -> tuple[tuple[int, ...], ...]:
        items = [
            item((-1,), 9, 100), item((0,), 2, reduction), item((1,), 8, 100), item((0,), 2, reduction), item((3,), 8, 100),
            item((2, 4), 16, 0.01), item((5,), 9, 100),
        ]  # fmt: skip
        inputs = [Item(heavy=False, cost=0.0, reads=(), size_bytes=4.0, has_batch=True)]
        return branch_groups(items, inputs, [6], need_batch=False)

    assert (1, 3) in groups(5.0)
    assert (1,) in groups(50.0)
    assert (3,) in groups(50.0)
