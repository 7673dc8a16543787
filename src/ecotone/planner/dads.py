"""DADS (INFOCOM 2019) on a measured profile, light load: the source and one server, by the minimum cut of mincut.py.

Each machine is a device with one executor, the wire carries one codec, a frontier is handed on whole (a plan's rule), and
what a link or stage costs once is paid once, so on a row of blocks this is the best of all cuts. The blocks that stay
come first in an order of their own; the plan is the two stages of that order. Inputs that no block reads are not priced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ecotone.planner.blockwise import Blockwise, Prices
from ecotone.planner.ideals import frontiers_of
from ecotone.planner.mincut import Parcel, TwoTier, TwoTierCut, least_two_tier

__all__ = ["first_blocks_first", "light_load", "two_tier"]


def two_tier(prices: Prices, first: int, second: int, codec: int) -> TwoTier:
    """The problem of two machines of a profile; the first is on the source, `codec` is used up and down."""
    tables = prices.tables
    graph, here, there = tables.graph, int(tables.device[first]), int(tables.device[second])
    once, send = prices.by_tensor(codec, here, there)
    readers: list[list[int]] = [[] for _ in graph.tensors]
    for v, block in enumerate(graph.blocks):
        for tensor in block.inputs:
            readers[tensor].append(v)
    ends_at_second = tables.sink == there
    home_once, home, stay = 0.0, np.zeros(len(graph.tensors)), 0.0
    if not ends_at_second:
        home_once, home = prices.by_tensor(codec, there, tables.sink)
        if tables.sink != here:
            last = frontiers_of(graph, ((1 << graph.num_blocks) - 1,))
            stay = float(prices.options(last)[0, codec, here, tables.sink])
    parcels = tuple(
        Parcel(
            maker=tensor.producer, readers=tuple(readers[t]), send=float(send[t]), is_result=t in graph.outputs,
            home=float(home[t]) if t in graph.outputs else 0.0,
        )
        for t, tensor in enumerate(graph.tensors)
    )  # fmt: skip
    return TwoTier(
        first=tuple(prices.block[first].tolist()), second=tuple(prices.block[second].tolist()), parcels=parcels,
        first_fixed=float(prices.fixed[first]), second_fixed=float(prices.fixed[second]), send_fixed=once,
        home_fixed=home_once, stay_fixed=stay, ends_at_second=ends_at_second,
    )  # fmt: skip


def light_load(prices: Prices, server: int, codec: int) -> TwoTierCut | None:
    """The best placement between the source and device `server`, over their executors; None where one runs nothing."""
    tables = prices.tables
    own, other = _machines(tables, tables.source), _machines(tables, server)
    cuts = [least_two_tier(two_tier(prices, a, b, codec)) for a in own for b in other]
    return min(cuts, key=lambda cut: cut.value, default=None)


def _machines(tables: Blockwise, device: int) -> Sequence[int]:
    return [m for m in range(len(tables.device)) if tables.device[m] == device and math.isfinite(tables.seconds[m].sum())]


def first_blocks_first(cut: TwoTierCut, num_blocks: int) -> tuple[int, ...]:
    """The order in which the blocks that stay come before the others."""
    return tuple(sorted(range(num_blocks), key=lambda v: (v not in cut.first, v)))
