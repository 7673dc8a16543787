"""In which order the blocks of a model are cut: found, measured and kept where it gains, so that every later step is on it.

A model with branches has many topological orders (docs/dag.md). What was measured is of the captured order; a promising
other one is first seen on times block by block, then its few new segments and frontiers are measured, and only then
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ecotone.cli.console import err
from ecotone.cli.workflow import Work, make_plan, make_profile, parse_objective
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner import TIE, PlannerError, solve_dag
from ecotone.planner.reordering import profile_in_order, same_cuts
from ecotone.profile import Profile
from ecotone.runtime import Nodes

__all__ = ["in_best_order", "profile_of"]


def in_best_order(
    work: Work, nodes: Nodes | None, profile: Profile, objective: str, require: Sequence[str], max_error: float = 0.2
) -> Profile:
    """The profile to plan on: that of the best order of the blocks, in which `work.captured` then is.

    Where no order but the captured one pays, nothing changes and nothing is measured.
    """
    graph, cluster, wanted = work.captured.graph, work.cluster, tuple(require)
    with nullcontext() if work.quiet else err.status("looking at other orders of the blocks"):
        try:
            found = solve_dag(graph, cluster, profile, parse_objective(objective), wanted, tie=TIE, guess=True)
        except PlannerError:  # no order keeps what is asked; the plain planner says why
            return profile
    if found.order == graph.order:
        return profile
    other = replace(work, captured=work.captured.in_order(found.order))
    measured = _measured(other, nodes, graph, profile, found.plan.cuts, max_error)
    before, after = (_value(w, p, objective, require) for w, p in ((work, profile), (other, measured)))
    if not after < before * (1 - TIE):
        return profile
    work.captured = other.captured
    if not work.quiet:
        err.print(f"[dim]cut through branches: {1 - after / before:.1%} less {objective} than in the captured order")
    return measured


def _value(work: Work, profile: Profile, objective: str, require: Sequence[str]) -> float:
    try:
        return make_plan(work, profile, objective, require).value
    except PlannerError:
        return float("inf")


def _measured(
    other: Work, nodes: Nodes | None, graph: Graph, profile: Profile, cuts: Sequence[int], max_error: float
) -> Profile:
    """What was measured of `graph`, where it holds in the other order too, and the new `cuts`, measured now."""
    length = graph.num_blocks
    new = tuple(c for c in cuts if 0 < c < length)
    executors = tuple(sorted({s.executor for s in profile.segments}))
    found = make_profile(other, nodes, executors=executors, max_error=max_error, cuts=new)
    order = other.captured.graph
    kept = profile_in_order(graph, order, other.cluster, profile, same_cuts(graph, order, profile.cuts))
    fresh = {(s.device, s.executor, s.start, s.stop) for s in found.segments}
    coded = {(p.position, p.codec) for p in found.payloads}
    return replace(
        found, cuts=tuple(sorted({*found.cuts, *kept.cuts})), links=profile.links, accuracy=found.accuracy or kept.accuracy,
        segments=(*found.segments, *(s for s in kept.segments if (s.device, s.executor, s.start, s.stop) not in fresh)),
        payloads=(*found.payloads, *(p for p in kept.payloads if (p.position, p.codec) not in coded)),
        codecs=profile.codecs, exits=profile.exits or found.exits,
    )  # fmt: skip


def profile_of(work: Work, nodes: Nodes | None, plan: Plan, path: Path | None = None) -> Profile:
    """A profile to price `plan` by: of the captured order (`path`: its file), or of just this plan's cuts in another one."""
    cuts = tuple(c for c in plan.cuts if 0 < c < work.captured.graph.num_blocks)
    return make_profile(work, nodes, cuts=cuts) if plan.order else make_profile(work, nodes, path=path)
