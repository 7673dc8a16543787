"""Which plans to keep resident where link rates change: those that are best somewhere over the rates that may come.

The best latency over all plans is a concave, piecewise linear function of the seconds a byte takes (each plan is a line:
seconds on devices plus bytes times seconds per byte), so few plans form its lower envelope. `solve` gives the best plan at
each point of a geometric grid of rates: all links together, and the links of each further device alone. Of these plans,
and the one that needs no link, a few are kept: greedily the plan that takes most off the mean of log(best kept / best of
all) over the grid, as long as every device holds all of them at once (cost.resident_bytes).

What lies between two points of the grid stays unseen; the loss there is bounded by the neighbours' difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from ecotone.cluster import Cluster
from ecotone.cost import CostModel, FloatArray, resident_bytes
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.measured import with_measured_links
from ecotone.planner.objective import Asked, Lexicographic, Objective, PlannerError, Requirement
from ecotone.planner.search import Task
from ecotone.planner.solve import solve
from ecotone.planset import PlanSet, Standby
from ecotone.profile import Profile

__all__ = ["candidates"]

LOWEST, HIGHEST = 1 / 128, 4.0  # of the rates stated or measured
STEPS_PER_OCTAVE = 2
ENOUGH = 0.005  # stop when no plan more would take this share off the mean


def candidates(
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    objective: Objective,
    require: Iterable[Requirement | str] = (),
    *,
    most: int = 6,
    now: Cluster | None = None,
    extra: Iterable[Plan] = (),
    time_limit_s: float = 10.0,
) -> PlanSet:
    """At most `most` plans to keep resident together; the best at the links of `now` (default: as stated) is the primary.

    Rates from LOWEST to HIGHEST of those of `cluster` are taken to be plausible. `extra` plans compete as well. Raises
    PlannerError where no plan keeps `require` at the rates of `now`.
    """
    requirements = tuple(require)
    cluster, profile = with_measured_links(graph, cluster, profile)
    today = cluster if now is None else with_measured_links(graph, now, profile)[0]
    deadline = time.perf_counter() + time_limit_s
    first = solve(graph, today, profile, objective, requirements, num_runners_up=0, time_limit_s=time_limit_s).plan
    worlds = [today, *_worlds(cluster)]
    found = dict.fromkeys([first, *extra])
    for world in worlds[1:]:
        left_s = deadline - time.perf_counter()
        if left_s <= 0:
            break
        try:
            found[
                solve(
                    graph, world, profile, objective, requirements, num_runners_up=0, nearest=False, time_limit_s=left_s
                ).plan
            ] = None
        except PlannerError:
            continue  # too slow a link for what was asked: nothing is best there
    alone = _alone(graph, cluster, profile, objective, requirements)
    if alone is not None:
        found[alone] = None
    plans = list(found)
    values = _values(graph, profile, objective, plans, worlds)
    kept = _kept(graph, cluster, plans, values, [plans.index(p) for p in (first, alone) if p is not None], most)
    kept.sort(key=lambda i: (plans[i] != first, values[i, 0]))
    standbys = tuple(Standby(plan=plans[i], label=_label(values, i)) for i in kept[1:])
    return PlanSet(primary=plans[kept[0]], standbys=standbys)


def _worlds(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster at every rate of the grid: all links together, then those of each device but the source alone.

    Links by kind change together, and those of each kind alone.
    """
    octaves = math.log2(HIGHEST / LOWEST)
    factors = np.geomspace(LOWEST, HIGHEST, round(octaves * STEPS_PER_OCTAVE) + 1).tolist()
    yield from (cluster.scaled_links(f) for f in factors)
    others = list(dict.fromkeys(end for k in cluster.links for end in (k.source, k.target) if end != cluster.source))
    if len(cluster.devices) <= 2:
        return
    for kind in dict.fromkeys(end for link in cluster.kind_links for end in (link.source_kind, link.target_kind)):
        for factor in factors[::2]:
            kinds = (
                replace(k, bandwidth_bytes_per_s=k.bandwidth_bytes_per_s * factor)
                if kind in (k.source_kind, k.target_kind)
                else k
                for k in cluster.kind_links
            )
            yield replace(cluster, kind_links=tuple(kinds))
    for name in others:
        for factor in factors[::2]:
            links = (
                replace(k, bandwidth_bytes_per_s=k.bandwidth_bytes_per_s * factor) if name in (k.source, k.target) else k
                for k in cluster.links
            )
            yield replace(cluster, links=tuple(links))


def _alone(
    graph: Graph, cluster: Cluster, profile: Profile, objective: Objective, require: tuple[Requirement | str, ...]
) -> Plan | None:
    """The best plan that needs no link, if any: the one that an outage leaves."""
    if cluster.source != cluster.sink:
        return None
    try:
        only = (*require, f"device={cluster.source}")
        return solve(graph, cluster, profile, objective, only, num_runners_up=0, nearest=False).plan
    except PlannerError:
        return None


def _values(graph: Graph, profile: Profile, objective: Objective, plans: list[Plan], worlds: list[Cluster]) -> FloatArray:
    """What each plan costs in each world, (plans, worlds)."""
    single = objective.objectives[0] if isinstance(objective, Lexicographic) else objective
    found = np.empty((len(plans), len(worlds)))
    for j, world in enumerate(worlds):
        model = CostModel(graph, world, profile)
        task = Task.of(model, Asked(), single, math.inf)
        found[:, j] = [task.value(plan, model.predict(plan)) for plan in plans]
    return found


def _kept(graph: Graph, cluster: Cluster, plans: list[Plan], values: FloatArray, always: list[int], most: int) -> list[int]:
    """Greedy choice: see the file's docstring. `always` come first, memory permitting."""
    limits = {d.name: d.memory_bytes for d in cluster.devices}
    graphs = {graph.content_hash(): graph}

    def fits(chosen: list[int]) -> bool:
        held = resident_bytes(graphs, [plans[i] for i in chosen])
        return all(size <= limits[device] for device, size in held.items())

    kept: list[int] = []
    for i in dict.fromkeys(always):
        if not kept or (len(kept) < most and fits([*kept, i])):
            kept.append(i)
    logs = np.log(np.maximum(values, 1e-12))
    while len(kept) < most:
        now = logs[kept].min(axis=0)
        gains = [(float((now - np.minimum(now, logs[i])).mean()), -i) for i in range(len(plans)) if i not in kept]
        usable = sorted((g for g in gains if g[0] > ENOUGH), reverse=True)
        chosen = next((-i for _, i in usable if fits([*kept, -i])), None)
        if chosen is None:
            break
        kept.append(chosen)
    return kept


def _label(values: FloatArray, index: int) -> str:
    share = float((values[index] <= values.min(axis=0) * (1 + 1e-9)).mean())
    return f"best at {share:.0%} of the rates considered"
