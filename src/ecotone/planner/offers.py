"""What each user of a workload may choose from: plans that are best somewhere between an empty and a crowded cluster.

A plan competes for a user where links are slower than stated (others use them), where a server is slower (others use it), or
where only one server, or none, may be used: `solve` is asked in each of these worlds. Of the plans found those are dropped
that take no less time alone than another and ask no less of every device and link. Users whose problem is the same but for
the name of their device share the answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ecotone import schema
from ecotone.cluster import Cluster, DeviceId
from ecotone.contention import visits_of
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.plan import Plan, plan_violations
from ecotone.plancost import PlanCost
from ecotone.planner.objective import Latency, PlannerError
from ecotone.planner.solve import solve
from ecotone.planner.what_if import changed
from ecotone.profile import Profile
from ecotone.workload import User, Workload

__all__ = ["Candidate", "offers_of", "renamed", "undominated"]

Models = Mapping[str, tuple[Graph, Profile]]
"""Graph and profile by the name that users give; one alone may go by any name."""
LINKS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64)
SERVERS = ("2x", "4x", "16x")
MOST = 12  # per user


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan for a user, and what it costs alone."""

    plan: Plan
    cost: PlanCost


def model_of(user: User, models: Models) -> tuple[Graph, Profile]:
    """The user's model; raises PlannerError where it is not given."""
    if user.model in models:
        return models[user.model]
    if not user.model and len(models) == 1:
        return next(iter(models.values()))
    raise PlannerError(f"user {user.name}: model {user.model!r} is not given; models are {', '.join(models)}")


def offers_of(
    workload: Workload, cluster: Cluster, models: Models, *, most: int = MOST, time_limit_s: float = 60.0
) -> dict[str, tuple[Candidate, ...]]:
    """Candidates of every user, the best alone first. Raises PlannerError naming a user for whom no plan keeps `require`."""
    deadline = time.perf_counter() + time_limit_s
    found: dict[str, tuple[Candidate, ...]] = {}
    known: dict[str, tuple[DeviceId, list[Plan]]] = {}
    for user in workload.users:
        graph, profile = model_of(user, models)
        own = _surroundings(user, workload, cluster)
        key, model = _likeness(user, own, graph, profile), CostModel(graph, own, profile)
        plans: list[Plan] = []
        if key in known:
            other, alike = known[key]
            plans = [p for p in (renamed(plan, other, user.source) for plan in alike) if not plan_violations(p, graph, own)]
        if not plans:
            plans = list(_plans(user, own, graph, profile, deadline))
            known[key] = (user.source, plans)
        candidates = [Candidate(plan=plan, cost=model.predict(plan)) for plan in plans]
        found[user.name] = undominated(candidates)[:most]
    return found


def _surroundings(user: User, workload: Workload, cluster: Cluster) -> Cluster:
    """The cluster as this user may use it: without the devices of other users."""
    others = {u.source for u in workload.users} - set(user.ends)
    devices = tuple(d for d in cluster.devices if d.name not in others)
    links = tuple(k for k in cluster.links if not others & {k.source, k.target})
    kinds, (source, sink) = {d.kind for d in devices}, user.ends
    by_kind = tuple(k for k in cluster.kind_links if {k.source_kind, k.target_kind} <= kinds)
    return replace(cluster, devices=devices, links=links, kind_links=by_kind, source=source, sink=sink, radios=(), shared=())


def _likeness(user: User, own: Cluster, graph: Graph, profile: Profile) -> str:
    """Equal for users with the same problem but for the name of the source: a kind measured for all, and alike links."""
    device = own.device(user.source)
    document = schema.write(own)
    document["devices"] = [schema.write(d) for d in own.devices if d.name != user.source]
    document["own"] = schema.write(replace(device, name=DeviceId("source"), address=""))
    document["kind"] = device.kind or device.name
    document["measured"] = user.source if any(s.device == user.source for s in profile.segments) else ""
    text = json.dumps([document, graph.content_hash(), user.require, user.sink or "source"], sort_keys=True)
    return text.replace(json.dumps(user.source), '"source"')


def _plans(user: User, own: Cluster, graph: Graph, profile: Profile, deadline: float) -> Iterator[Plan]:
    """The best plan of each world, unlike ones, that of today first; raises PlannerError where today has none."""
    seen: set[str] = set()
    is_first = True
    for world, profiled, require in _worlds(own, graph, profile):
        left_s = deadline - time.perf_counter()
        if left_s <= 0 and not is_first:
            return
        try:
            wanted = (*user.require, *require)
            found = solve(graph, world, profiled, Latency(), wanted, num_runners_up=0, time_limit_s=max(left_s, 2.0)).plan
        except PlannerError as error:
            if is_first:
                raise PlannerError(f"user {user.name}: {error}") from None
            continue
        is_first = False
        if found.identity() not in seen:
            seen.add(found.identity())
            yield found


def _worlds(own: Cluster, graph: Graph, profile: Profile) -> Iterator[tuple[Cluster, Profile, tuple[str, ...]]]:
    yield own, profile, ()
    ends = {own.source, own.sink}
    servers = [d.name for d in own.devices if d.name not in ends]
    yield own, profile, (f"device={','.join(sorted(ends))}",)
    for server in servers if len(servers) > 1 else []:
        yield own, profile, (f"device={','.join(sorted(ends | {server}))}",)
    for factor in LINKS:
        yield own.scaled_links(factor), profile, ()
    for server in servers:
        for slower in SERVERS:
            yield (*changed(graph, own, profile, f"{server}={slower}"), ())
    for factor in LINKS[1::2]:
        for slower in SERVERS[1:]:
            crowded, profiled = own.scaled_links(factor), profile
            for server in servers:
                crowded, profiled = changed(graph, crowded, profiled, f"{server}={slower}")
            yield crowded, profiled, ()


def renamed(plan: Plan, old: DeviceId, new: DeviceId) -> Plan:
    """The same plan for another source (and sink, where that was the source)."""

    def name(device: DeviceId) -> DeviceId:
        return new if device == old else device

    return replace(
        plan,
        stages=tuple(replace(s, device=name(s.device)) for s in plan.stages),
        transfers=tuple(replace(t, source=name(t.source), target=name(t.target)) for t in plan.transfers),
        exit_transfers=tuple(replace(t, source=name(t.source), target=name(t.target)) for t in plan.exit_transfers),
    )


def undominated(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those of which no other is as good alone and on every resource, ascending in latency alone."""
    asked = [_asked(c) for c in candidates]
    kept = []
    for i, one in enumerate(asked):
        worse = any(
            _within(other, one) and (not _within(one, other) or j < i) for j, other in enumerate(asked) if j != i
        )  # fmt: skip
        if not worse:
            kept.append(candidates[i])
    return tuple(sorted(kept, key=lambda c: c.cost.latency_s))


def _asked(candidate: Candidate) -> dict[str, float]:
    """Seconds alone, and of every resource; bytes of links count as their seconds do."""
    found = {"": candidate.cost.latency_s}
    for resource, seconds, share, _ in visits_of(candidate.cost):
        found[str(resource)] = found.get(str(resource), 0.0) + share * seconds
    for device in candidate.cost.devices:
        found[f"memory {device.device}"] = float(device.memory_bytes)
    return found


def _within(one: dict[str, float], other: dict[str, float]) -> bool:
    return all(value <= other.get(name, 0.0) * (1 + 1e-9) for name, value in one.items())
