"""A profile for another order of a model's blocks, made of what was measured in the captured one. No planning here.

Segments of another order are other sets of blocks. A prefix or suffix that holds the same blocks as a measured one keeps
its time; of the others the blocks' own times are added (CostModel's equation 1 taken apart, blockwise.py). Payloads and
cells of the accuracy table go over to positions where the same tensors cross; elsewhere only float32 is known, by
formula. So a plan in another order can be priced, simulated and compared at once; measuring its few segments
(profiling.measure with `cuts`) then replaces the estimate. Links, codecs and failures do not depend on the order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ecotone.accuracy import NOWHERE, Composition
from ecotone.cluster import Cluster
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.profile import Profile, SegmentTime

LEARNED = "learned:"  # such a codec is of one cut of the captured order

__all__ = ["profile_in_order", "same_cuts", "world_of"]


def same_cuts(graph: Graph, other: Graph, cuts: Iterable[int]) -> tuple[int, ...]:
    """Those of `cuts` of `graph` before which `other`, another order of it, has the same blocks."""
    one, two = graph.order or tuple(range(graph.num_blocks)), other.order or tuple(range(other.num_blocks))
    return tuple(c for c in cuts if set(one[:c]) == set(two[:c]))


def world_of(order: Sequence[int], graph: Graph, cluster: Cluster, profile: Profile) -> tuple[Graph, Profile]:
    """`graph` and `profile` in the order that a plan names, cut where the profile is and wherever the plan likes."""
    other = graph.in_order(order)
    return (graph, profile) if other is graph else (other, profile_in_order(graph, other, cluster, profile))


def profile_in_order(
    graph: Graph, other: Graph, cluster: Cluster, profile: Profile, cuts: Iterable[int] | None = None
) -> Profile:
    """`profile` of `graph` for `other`, another order of it, with `cuts` inside (all where none are given).

    Raises SchemaError where `other` is no order of `graph`.
    """
    count = graph.num_blocks
    chosen = tuple(sorted({0, count, *(range(count + 1) if cuts is None else cuts)}))
    kept = set(same_cuts(graph, other, profile.cuts))
    name = other.content_hash()
    table = profile.accuracy
    places = _alike(graph, other, profile, chosen)
    if table is not None:
        usable = (c for c in table.cells if not c.codec.startswith(LEARNED))
        cells = (replace(c, position=to) for c in usable for to in places.get(c.position, []))
        nowhere = (c for c in table.cells if c.position == NOWHERE)
        moved = tuple(found for c in table.compositions if (found := _moved(c, places)) is not None)
        table = replace(table, graph_hash=name, cells=(*nowhere, *cells), compositions=moved)
    general = [p for p in profile.payloads if not p.codec.startswith(LEARNED)]
    return replace(
        profile, graph_hash=name, cuts=chosen, key="", accuracy=table,
        segments=tuple(_segments(graph, other, cluster, profile, chosen, kept)),
        payloads=tuple(replace(p, position=to) for p in general for to in places.get(p.position, ())),
        failures=tuple(f for f in profile.failures if {f.start, f.stop} <= kept),
    )  # fmt: skip


def _alike(graph: Graph, other: Graph, profile: Profile, cuts: Sequence[int]) -> dict[int, list[int]]:
    """By position of `graph` that was measured: the cuts of `other` that the same tensors cross."""
    by_frontier: dict[tuple[int, ...], list[int]] = {}
    for cut in cuts:
        by_frontier.setdefault(other.frontier(cut), []).append(cut)
    measured = {p.position for p in profile.payloads} | set(profile.cuts)
    return {p: by_frontier.get(graph.frontier(p), []) for p in measured}


def _moved(composition: Composition, places: dict[int, list[int]]) -> Composition | None:
    """The same crossings at their first place in the other order; None where one has none."""
    rows = [(crossing, places.get(crossing.position, [])) for crossing in composition.crossings]
    if not all(found for _, found in rows):
        return None
    return replace(composition, crossings=tuple(replace(crossing, position=found[0]) for crossing, found in rows))


def _segments(
    graph: Graph, other: Graph, cluster: Cluster, profile: Profile, cuts: Sequence[int], kept: set[int]
) -> Iterable[SegmentTime]:
    """Prefix and suffix of every cut by every device and executor that was measured."""
    model, last = CostModel(graph, cluster, profile), graph.num_blocks
    place = {block: i for i, block in enumerate(graph.order or range(last))}
    row = [place[block] for block in other.order or range(last)]
    spans = [(0, c) for c in cuts[1:]] + [(c, last) for c in cuts[1:-1]]
    for device, executor in dict.fromkeys((s.device, s.executor) for s in profile.segments):
        times = model.stage_times(device, executor)
        if times is None:
            continue
        each, once = times.per_block()
        upto = np.concatenate([[0.0], np.cumsum(each[row])])
        for start, stop in spans:
            same = times.measured.get((start, stop)) if {start, stop} <= kept else None
            if same is not None:
                yield same
            elif math.isfinite(upto[-1]):
                yield SegmentTime(
                    device=device, executor=executor, start=start, stop=stop, spread_s=0.0, memory_bytes=0,
                    median_s=float(upto[stop] - upto[start] + once), relative_error=times.largest_error,
                )  # fmt: skip
