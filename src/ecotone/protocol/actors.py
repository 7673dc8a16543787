"""A plan, a plan set or a fan-in as a dataflow graph: the queues, slots and credits that worker, links and coordinator keep.

One request is one token. Per transfer i that leaves its device, and per stage i (channels at their enforced limits):

    stage i-1 -> [to encode] -> encode i -> [encoded] -> link i -> [under way, arrived] -> decode i -> [inputs] -> stage i
        ^------------- slots: queue_limit ------------'        credit: window bytes               queue_limit

Between stages of one device only [inputs] stands. A stage with an exit has two edges out, of which a request takes one:
where it leaves is a setting, rates 0 and 1. (It begins only with room on both; both drain, so that stops nobody for good.)
The asker admits `queue_limit` waiting requests; the coordinator's window of `max_in_flight` is a loop from the delivery of
results back to the dispatch. A set is a subgraph: the dispatch selects a plan (and its active twins), the first result
merges; each set of plans that can run together is a setting, so the loss of a node is a change of rates. A device computes
one stage at a time and codes one body at a time; a firing begins only with room for what it makes and then ends, so sharing
a processor stops nobody for good and is no part of the graph. `slack` counts what is in work outside a queue, and runs that
begin at a kept boundary, which take no slot; `stale` what runs hold that have ended at the asker (their Cancel travels, or
their work is not interrupted). Not counted: letters, weights, and runs begun again while an earlier run of the same request
still occupies the same plan.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ecotone.cost import packed_bytes
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planset import PlanSet, shared_edge
from ecotone.protocol.dataflow import (
    ON_OFF,
    ONE,
    Actor,
    Channel,
    DataflowGraph,
    DataflowReport,
    Rate,
    Setting,
    Subgraph,
    UnsoundPlan,
    check,
)
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings

__all__ = ["Sizes", "fan_in_dataflow", "plan_dataflow", "require_sound", "sizes_of"]

Sizes = Callable[[Plan, int], tuple[int, int]]
"""(bytes of the tensors, bytes encoded) of edge i of a plan."""
_MAX_WAYS = 64  # combinations of exits under one set of running plans; above it one plan's at a time
_MAX_TWINS = 6  # above it only none, one or all of the twins beside a plan are looked at
_MAX_DEAD = 3  # devices lost at once that a setting is named after
_MAX_BRANCHES = 10  # of a fan-in, above it at most two missing ones are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    worker: WorkerSettings
    link: LinkSettings
    coordinator: CoordinatorSettings
    sizes: Sizes | None

    @property
    def window(self) -> int:
        return self.coordinator.max_in_flight


@dataclass(slots=True)
class _Draft:
    """A graph in the making."""

    actors: list[Actor] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)

    def actor(self, name: str, kind: str, place: str) -> str:
        self.actors.append(Actor(name=name, kind=kind, place=place))
        return name


def sizes_of(graphs: Mapping[str, Graph]) -> Sizes:
    """Bytes from the graphs by content hash; a codec without a formula counts as the raw tensors (an upper estimate)."""

    def sizes(plan: Plan, edge: int) -> tuple[int, int]:
        graph, transfer = graphs[plan.graph_hash], plan.edges[edge]
        raw = graph.frontier_bytes(transfer.position)
        packed = None if transfer.is_local else packed_bytes(graph, transfer.position, transfer.codec)
        return raw, raw if packed is None else math.ceil(packed)

    return sizes


def plan_dataflow(
    plans: PlanSet | Plan,
    *,
    worker: WorkerSettings | None = None,
    link: LinkSettings | None = None,
    coordinator: CoordinatorSettings | None = None,
    sizes: Sizes | None = None,
) -> DataflowGraph:
    """The graph of a plan or set under these settings.

    Without `sizes` a link's credit counts as one body that surely fits, and as any number at most.
    """
    limits = _Limits(
        worker=worker or WorkerSettings(),
        link=link or LinkSettings(),
        coordinator=coordinator or CoordinatorSettings(session=0),
        sizes=sizes,
    )
    plan_set = plans if isinstance(plans, PlanSet) else PlanSet(primary=plans)
    draft, source = _Draft(), str(plan_set.primary.source)
    labels = _labels(plan_set)
    inputs = max(limits.sizes(p, 0)[0] for p in plan_set.plans) if limits.sizes else 0
    results = max(limits.sizes(p, len(p.stages))[0] for p in plan_set.plans) if limits.sizes else 0
    held = limits.coordinator.held_limit_bytes
    asker, dispatch = draft.actor("asker", "source", source), draft.actor("dispatch", "select", source)
    first, deliver = draft.actor("first result", "merge", source), draft.actor("deliver", "sink", source)
    room, sink = limits.coordinator.queue_limit, str(plan_set.primary.sink)
    draft.channels += [
        Channel(name="waiting requests", source=asker, target=dispatch, capacity=room, place=source),
        Channel(name="inputs kept", source=asker, target=deliver, token_bytes=inputs, limit_bytes=held, place=source),
        Channel(name="held for order", source=first, target=deliver, token_bytes=results, place=sink),
        Channel(name="window", source=deliver, target=dispatch, initial=limits.window, place=source),
    ]
    branches = []
    is_static = len(labels) == 1 and not plan_set.primary.exit_transfers
    for label, plan in zip(labels, plan_set.plans, strict=True):
        others = [p for p in plan_set.plans if p is not plan]
        branches.append(_branch(draft, label, plan, others, limits, ONE if is_static else ON_OFF))
    subgraphs: tuple[Subgraph, ...] = ()
    if not is_static:
        settings = tuple(
            Setting(name=name, rates=tuple(r for i, branch in enumerate(branches) for r in _rates(branch, leaves.get(i))))
            for mode, active in _modes(plan_set, labels)
            for name, leaves in _ways(plan_set, labels, mode, active)
        )
        subgraphs = (Subgraph(name="plans", select=dispatch, merge=first, settings=settings),)
    return DataflowGraph(actors=tuple(draft.actors), channels=tuple(draft.channels), subgraphs=subgraphs)


def fan_in_dataflow(num_branches: int, *, max_open: int, least_present: int = 1, token_bytes: int = 0) -> DataflowGraph:
    """T3: N branches into one fusing actor, `max_open` frames open; a setting is the set of branches that are waited for.

    Each branch is a plan of its own, to be checked as such.
    """
    draft = _Draft()
    opened, fuse = draft.actor("open frame", "select", ""), draft.actor("fuse", "merge", "")
    draft.channels.append(Channel(name="frames open", source=fuse, target=opened, initial=max_open))
    names = []
    for i in range(num_branches):
        branch = draft.actor(f"branch {i}", "stage", "")
        for name, ends in ((f"asked of branch {i}", (opened, branch)), (f"tokens of branch {i}", (branch, fuse))):
            size = token_bytes if ends[1] == fuse else 0
            draft.channels.append(
                Channel(name=name, source=ends[0], target=ends[1], produce=ON_OFF, consume=ON_OFF, token_bytes=size)
            )
        names.append((f"asked of branch {i}", f"tokens of branch {i}"))
    most_missing = num_branches - least_present if num_branches <= _MAX_BRANCHES else min(2, num_branches - least_present)
    settings = []
    for count in range(most_missing + 1):
        for missing in itertools.combinations(range(num_branches), count):
            name = f"without {', '.join(f'branch {i}' for i in missing)}" if missing else "all branches"
            rates = tuple((c, int(i not in missing)) for i in range(num_branches) for c in names[i])
            settings.append(Setting(name=name, rates=rates))
    subgraph = Subgraph(name="fan-in", select=opened, merge=fuse, settings=tuple(settings))
    return DataflowGraph(actors=tuple(draft.actors), channels=tuple(draft.channels), subgraphs=(subgraph,))


def require_sound(
    plans: PlanSet | Plan,
    *,
    worker: WorkerSettings | None = None,
    link: LinkSettings | None = None,
    coordinator: CoordinatorSettings | None = None,
    sizes: Sizes | None = None,
) -> DataflowReport:
    """The report of a sound plan or set; raises UnsoundPlan naming every violation otherwise. To be asked before it runs.

    Remembers what it was asked lately: a script of faults may ask for every world.
    """
    report = _checked(plans, worker, link, coordinator, sizes)
    if not report.is_sound:
        reasons = "; ".join(map(str, report.violations))
        raise UnsoundPlan(
            f"plan may not run: {reasons}; give its queues more room (queue_limit, max_in_flight, window_bytes)"
        )
    return report


@functools.lru_cache(maxsize=64)
def _checked(
    plans: PlanSet | Plan,
    worker: WorkerSettings | None,
    link: LinkSettings | None,
    coordinator: CoordinatorSettings | None,
    sizes: Sizes | None,
) -> DataflowReport:
    return check(plan_dataflow(plans, worker=worker, link=link, coordinator=coordinator, sizes=sizes))


# ---- one plan ------------------------------------------------------------------------------------------------------------


_Branch = list[tuple[str, int, bool]]
"""Channels of a plan: name, the stage that a request must reach to use it, and whether it must leave just there."""


def _rates(branch: _Branch, leaves: int | None) -> list[tuple[str, int]]:
    """Active rates where requests leave at the end of stage `leaves` (number of stages: at the end); None: plan not used."""
    used = [leaves is not None and (leaves == at if is_exit else leaves >= at) for _, at, is_exit in branch]
    return [(name, int(on)) for (name, _, _), on in zip(branch, used, strict=True)]


def _branch(draft: _Draft, label: str, plan: Plan, others: Sequence[Plan], limits: _Limits, active: Rate) -> _Branch:
    """Stages and transfers of one plan between dispatch and first result; `active`: the rate of all its channels."""
    sign = f"{label}: " if label else ""
    shared = {e for other in others if 0 < (e := shared_edge(plan, other)) < len(plan.stages)}
    length, window = len(plan.stages), limits.link.window_bytes
    found: _Branch = []
    room, ended = (
        limits.worker.queue_limit,
        limits.window,
    )  # a Cancel travels: until it is there, ended runs hold their places

    def add(name: str, source: str, target: str, place: str, size_bytes: int = 0, **more: Any) -> None:
        ends: dict[str, Any] = {"source": source, "target": target, "produce": active, "consume": active, "place": place}
        draft.channels.append(Channel(name=sign + name, token_bytes=size_bytes, **ends, **more))

    at = ["dispatch"]  # what makes the tensors of edge i
    exits = {plan.exit_edge(i): i for i in range(length) if plan.stages[i].exit}
    for i, transfer in enumerate(plan.edges):
        raw, packed = limits.sizes(plan, i) if limits.sizes else (0, 0)
        here, there = str(transfer.source), str(transfer.target)
        stage, first = exits.get(i), len(draft.channels)
        before = at[i if stage is None else stage + 1]
        # Runs that begin here, of their own accord; or a stage that computes because a twin waits for the other edge.
        free = limits.window if i in shared or (stage is not None and stage < max(shared, default=0)) else 0
        after = "first result" if i >= length else draft.actor(sign + f"stage {i} on {there}", "stage", there)
        if i in shared:
            add(f"kept boundary {i}", before, "first result", here, raw, limit_bytes=limits.coordinator.held_limit_bytes)
        if not transfer.is_local:
            encode = draft.actor(sign + f"encode {i} on {here}", "encode", here)
            link = draft.actor(sign + f"link {i}, {here}>{there}", "link", f"{here}>{there}")
            decode = draft.actor(sign + f"decode {i} on {there}", "decode", there)
            slots = {"capacity": room, "slack": 1 + free, "stale": ended} if i else {"stale": 1}
            add(f"to encode {i}", before, encode, here, raw, **slots)
            slots = {"capacity": room, "slack": free, "stale": ended} if i else {}
            add(f"encoded {i}", encode, link, here, packed, **slots)
            if i:
                add(f"slots {i}", link, before, here, initial=room, slack=free)
            fit = max(1, window // packed) if packed else 1
            spare = int(fit * packed < window) if packed else limits.window  # one more in part; any number of small ones
            credit = {"capacity": fit, "slack": spare, "stale": ended, "limit_bytes": max(window, packed)}
            add(f"not acknowledged {i}", link, decode, here, packed, **credit)
            add(f"under way or arrived {i}", link, decode, there, packed, **credit)
            before = decode
        name = f"inputs {i}" if i < length else "results" if i == length else f"results {i}"
        if i >= length:  # the sink always takes
            add(name, before, after, there, raw)
        elif i == 0 and transfer.is_local:  # the asker begins what the window allows
            add(name, before, after, there, raw, stale=1)
        else:
            add(name, before, after, there, raw, capacity=room, slack=1 + (free if transfer.is_local else 0), stale=ended)
        at.append(after)
        found += [(c.name, i if stage is None else stage, stage is not None) for c in draft.channels[first:] if c.is_dynamic]
    return found


# ---- settings ------------------------------------------------------------------------------------------------------------


def _labels(plan_set: PlanSet) -> list[str]:
    if not plan_set.standbys:
        return [""]
    found = ["primary"]
    for i, standby in enumerate(plan_set.standbys):
        label = standby.label or f"standby {i + 1}"
        found.append(label if label not in found else f"{label} {i + 1}")
    return found


def _modes(plan_set: PlanSet, labels: Sequence[str]) -> Iterator[tuple[str, frozenset[int]]]:
    """Every set of plans that a request can run under, with the fewest lost devices that bring it about."""
    plans = plan_set.plans
    twins = [i + 1 for i, standby in enumerate(plan_set.standbys) if standby.mode == "active"]
    devices = [d for d in plan_set.devices if d != plan_set.primary.source]
    causes: dict[frozenset[int], str] = {}
    for count in range(min(_MAX_DEAD, len(devices)) + 1):
        for dead in itertools.combinations(devices, count):
            alive = [i for i, p in enumerate(plans) if not set(dead) & {*p.devices, p.sink}]
            if alive:
                reason = f"{', '.join(dead)} lost" if dead else "all nodes answer"
                causes.setdefault(frozenset([alive[0], *(t for t in twins if t in alive)]), reason)
    for i in range(len(plans)):
        beside = [t for t in twins if t != i]
        some = range(len(beside) + 1) if len(beside) <= _MAX_TWINS else (0, 1, len(beside))
        for chosen in (c for n in some for c in itertools.combinations(beside, n)):
            active = frozenset([i, *chosen])
            causes.setdefault(active, " with ".join(labels[j] for j in (i, *chosen)) + " in force")
    for active, reason in causes.items():
        yield reason, active


def _ways(
    plan_set: PlanSet, labels: Sequence[str], mode: str, active: frozenset[int]
) -> Iterator[tuple[str, dict[int, int]]]:
    """Every way in which requests can leave the active plans: the stage at whose end each does, by number of the plan."""
    plans, numbers = plan_set.plans, sorted(active)
    choices = [[len(plans[n].stages), *(i for i, s in enumerate(plans[n].stages) if s.exit)] for n in numbers]
    every: Iterable[tuple[int, ...]] = itertools.product(*choices)
    if math.prod(map(len, choices)) > _MAX_WAYS:
        ends = [len(plans[n].stages) for n in numbers]
        every = dict.fromkeys((*ends[:j], stage, *ends[j + 1 :]) for j, own in enumerate(choices) for stage in own)
    for chosen in every:
        leaves = dict(zip(numbers, chosen, strict=True))
        told = [f"{labels[n]} leaves after stage {s}".strip() for n, s in leaves.items() if s < len(plans[n].stages)]
        yield ", ".join([mode, *told]), leaves
