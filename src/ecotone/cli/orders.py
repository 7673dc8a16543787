"""In which order the blocks of a model are cut: found, measured and kept where it gains, so that every later step is on it.

A model with branches has many topological orders (docs/dag.md). What was measured is of the captured order; a promising
other one is first seen on times block by block, then its few new segments and frontiers are measured, and only then
compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ecotone import codec
from ecotone.accuracy import AccuracyTable
from ecotone.cli.asked import parse_objective, parse_require
from ecotone.cli.console import err
from ecotone.cli.workflow import Work, make_plan, make_profile
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner import TIE, DagSolution, PlannerError, solve_dag
from ecotone.planner.reordering import profile_in_order, same_cuts
from ecotone.profile import Profile, SegmentTime
from ecotone.runtime import Nodes

__all__ = ["in_best_order", "profile_of"]

LADDER = ("fp32", "int8", "int4")


def in_best_order(
    work: Work,
    nodes: Nodes | None,
    profile: Profile,
    objective: str,
    require: Sequence[str],
    max_error: float = 0.2,
    *,
    arrivals: str = "",
) -> Profile:
    """The profile to plan on: that of the best order of the blocks, in which `work.captured` then is.

    Where no order but the captured one pays, nothing changes and nothing is measured. A model with exits or learned
    codecs, which count the blocks of one row, keeps its order.
    """
    if work.captured.exits or work.bottlenecks:
        return profile
    graph, cluster = work.captured.graph, work.cluster
    wanted, kept = parse_objective(objective, arrivals), parse_require(require, arrivals)
    with nullcontext() if work.quiet else err.status("looking at other orders of the blocks"):
        try:
            found = solve_dag(graph, cluster, profile, wanted, kept, tie=TIE, guess=True)
        except PlannerError:  # no order keeps what is asked; the plain planner says why
            return profile
    if found.order == graph.order:
        return profile
    other = replace(work, captured=work.captured.in_order(found.order))
    measured = _measured(other, nodes, graph, profile, found, max_error)
    before, after = (_value(w, p, objective, require, arrivals) for w, p in ((work, profile), (other, measured)))
    if not after < before * (1 - TIE):
        return profile
    work.captured = other.captured
    if not work.quiet:
        err.print(f"[dim]cut through branches: {objective} {1 - after / before:.1%} better than in the captured order")
    return measured


def _value(work: Work, profile: Profile, objective: str, require: Sequence[str], arrivals: str) -> float:
    try:
        return make_plan(work, profile, objective, require, arrivals=arrivals).value
    except PlannerError:
        return float("inf")


def _measured(
    other: Work, nodes: Nodes | None, graph: Graph, profile: Profile, promised: DagSolution, max_error: float
) -> Profile:
    """What was measured of `graph`, where it holds in the other order too, and the cuts that are new there, measured now.

    Only with executors that did well before, in codecs of plans that did, and a short ladder of others.
    """
    new = tuple(c for c in promised.plan.cuts if 0 < c < graph.num_blocks)
    executors = tuple(sorted({s.executor for s in profile.segments}))
    coders = {t.codec for c in promised.candidates for t in c.plan.transfers} & {c.codec for c in profile.codecs}
    ladder = {p.codec for p in profile.payloads} & set(LADDER)
    general = {c for c in coders | ladder if not c.startswith("learned:")}  # a learned one is made for its own cut
    codecs = tuple(sorted(c for c in general if not codec.info(c).is_image))
    found = make_profile(other, nodes, executors=executors, max_error=max_error, cuts=new, codecs=codecs or ("fp32",))
    order = other.captured.graph
    kept = profile_in_order(graph, order, other.cluster, profile, same_cuts(graph, order, profile.cuts))
    known = {(s.device, s.executor, s.start, s.stop) for s in kept.segments}
    coded = {(p.position, p.codec) for p in kept.payloads}
    fresh = tuple(s for s in _without_drift(profile, found) if (s.device, s.executor, s.start, s.stop) not in known)
    return replace(
        kept, cuts=tuple(sorted({*found.cuts, *kept.cuts})), segments=(*kept.segments, *fresh), key=found.key,
        payloads=(*kept.payloads, *(p for p in found.payloads if (p.position, p.codec) not in coded)),
        accuracy=_both(found.accuracy, kept.accuracy),
    )  # fmt: skip


def _both(fresh: AccuracyTable | None, kept: AccuracyTable | None) -> AccuracyTable | None:
    """What was measured of the new cuts, and what holds from before; of one thing the fresh measurement."""
    if fresh is None or kept is None:
        return fresh or kept
    known, chains = {c.key for c in fresh.cells}, {(c.crossings, c.policy) for c in fresh.compositions}
    return replace(
        fresh, policies=fresh.policies or kept.policies,
        cells=(*fresh.cells, *(c for c in kept.cells if c.key not in known)),
        compositions=(*fresh.compositions, *(c for c in kept.compositions if (c.crossings, c.policy) not in chains)),
    )  # fmt: skip


def _without_drift(before: Profile, after: Profile) -> Iterator[SegmentTime]:
    """Segments measured later, scaled to the speed that the machine had before: both measured the whole model."""
    whole = {(s.device, s.executor): s.median_s for s in before.segments if (s.start, s.stop) == (0, before.num_blocks)}
    again = {(s.device, s.executor): s.median_s for s in after.segments if (s.start, s.stop) == (0, after.num_blocks)}
    for segment in after.segments:
        key = (segment.device, segment.executor)
        drift = whole[key] / again[key] if whole.get(key) and again.get(key) else 1.0
        yield replace(segment, median_s=segment.median_s * drift, spread_s=segment.spread_s * drift)


def profile_of(work: Work, nodes: Nodes | None, plan: Plan, path: Path | None = None) -> Profile:
    """A profile to price `plan` by: of the captured order (`path`: its file), or of just this plan's cuts in another one."""
    cuts = tuple(c for c in plan.cuts if 0 < c < work.captured.graph.num_blocks)
    return make_profile(work, nodes, cuts=cuts) if plan.order else make_profile(work, nodes, path=path)
