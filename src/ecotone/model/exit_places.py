"""Where exits are worth standing: positions that one tensor crosses, spread over the model's FLOP.

Exits far apart in FLOP save different amounts; two close together cost two heads for one saving. The latest place still
leaves a good part of the model to be saved. Pure over the graph. O(positions * exits).
"""

from __future__ import annotations

from collections.abc import Sequence

from ecotone.graph import Graph
from ecotone.model.errors import ModelError
from ecotone.model.exits import check_place, nearest_places

__all__ = ["exit_places", "flop_share"]

LATEST = 0.8  # share of the FLOP: an exit behind it saves too little


def flop_share(graph: Graph, position: int) -> float:
    """Share of the model's FLOP before `position`, in [0, 1]."""
    total = graph.segment_flop(0, graph.num_blocks)
    return graph.segment_flop(0, position) / total if total > 0 else position / graph.num_blocks


def exit_places(graph: Graph, count: int = 3, at: Sequence[int] = ()) -> tuple[int, ...]:
    """At most `count` positions for exits, ascending: those nearest to even steps of FLOP; or `at`, checked.

    Raises ModelError for a position of `at` without a single-tensor frontier, naming the nearest that have one, and where
    the model has no such position at all.
    """
    if at:
        for position in at:
            check_place(graph, "asked for", position)
        return tuple(sorted(set(at)))
    if count < 1:
        raise ModelError(f"{count} exits: ask for one or more")
    floats = [p for p in graph.single_tensor_cuts() if _is_float(graph, p)]
    if not floats:
        check_place(graph, "asked for", next(iter(nearest_places(graph, 1)), 0))
        raise ModelError(f"{graph.name}: no tensor of floats crosses a position alone; exits need one")
    inner = [p for p in floats if flop_share(graph, p) <= LATEST] or floats[:1]
    chosen: set[int] = set()
    for step in range(count):
        wanted = LATEST * (step + 0.5) / count
        free = [p for p in inner if p not in chosen]
        if free:
            chosen.add(min(free, key=lambda p: (abs(flop_share(graph, p) - wanted), p)))
    return tuple(sorted(chosen))


def _is_float(graph: Graph, position: int) -> bool:
    return graph.tensors[graph.frontier(position)[0]].dtype.startswith(("float", "bfloat"))
