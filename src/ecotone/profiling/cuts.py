"""Which cut positions are worth measuring: few enough to measure, enough that the best plan is hardly ever missed.

All of them where there are few. Else the strict prefix minima of the frontier's bytes (where sending became cheaper than
ever before), and, spread evenly over the model's FLOP, the cheapest single-tensor frontier of each stretch: minima alone
are the wrong set once the far machine is loaded. Where an exit stands a stage must be able to end, so those positions are
always there, beside the limit. Pure. O(L log L) beside the frontiers themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

from ecotone.graph import Graph

__all__ = ["DEFAULT_LIMIT", "candidate_cuts"]

DEFAULT_LIMIT = 24


def candidate_cuts(graph: Graph, limit: int = DEFAULT_LIMIT, also: Iterable[int] = ()) -> tuple[int, ...]:
    """At most `limit` inner positions, those of exits and of `also`, ascending, with 0 and L round them."""
    length = graph.num_blocks
    inner = range(1, length)
    if len(inner) <= limit:
        return tuple(sorted({0, *inner, length}))
    size = {p: graph.frontier_bytes(p) for p in (0, *inner)}
    minima, least = [], size[0]
    for p in inner:
        if size[p] < least:
            minima.append(p)
            least = size[p]
    chosen = set(_spread(graph, minima, size, (limit + 1) // 2))
    single = set(graph.single_tensor_cuts())
    for pool in ([p for p in inner if p in single], list(inner)):
        # A stretch may hold no position of the pool: what it leaves free is spread again.
        while len(chosen) < limit and (rest := [p for p in pool if p not in chosen]):
            chosen.update(_spread(graph, rest, size, limit - len(chosen)))
    chosen.update(also, (place.position for place in graph.exits))
    return (0, *sorted(chosen), length)


def _spread(graph: Graph, positions: list[int], size: dict[int, int], count: int) -> list[int]:
    """At most `count` of `positions`: the smallest frontier of each of `count` equal stretches of FLOP."""
    if len(positions) <= count:
        return positions
    done, work = 0.0, {}
    for p in range(graph.num_blocks):
        work[p] = done
        done += graph.blocks[p].flop
    total = done or 1.0
    best: dict[int, int] = {}
    for p in positions:
        # Blocks without FLOP are still places to cut: half the weight goes by position.
        share = 0.5 * work[p] / total + 0.5 * p / graph.num_blocks
        stretch = min(int(share * count), count - 1)
        if stretch not in best or size[p] < size[best[stretch]]:
            best[stretch] = p
    return sorted(best.values())
