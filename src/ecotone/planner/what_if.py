"""Another world, and what would be best there: a link of another rate, another latency, a slower or missing device; or other
requirements.

Changes are text: "link=10Mbit/s" (every link), "camera-server=10Mbit/s" (both directions), "camera>server=10Mbit/s" (one),
"latency=20ms" (every link), "server=2x" (takes twice as long), "server=gone"; or a requirement other than latency in place
of the one there is: "accuracy_loss=2", "energy=0.5J", "exit=none".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ecotone.cluster import Cluster, Device
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.measured import with_measured_links
from ecotone.planner.objective import REQUIREMENTS, Asked, Objective, PlannerError, Requirement
from ecotone.planner.solve import Solution, solve
from ecotone.profile import Profile
from ecotone.units import EcotoneError, parse_quantity

__all__ = ["WhatIf", "changed", "what_if"]

_EXAMPLES = (
    "link=10Mbit/s, camera-server=10Mbit/s, camera>server=10Mbit/s, latency=20ms, server=2x, server=gone, accuracy_loss=2"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """`today`: what the plan of today would cost there, None where it cannot run; `best` None: `refusal` says why.

    `breaks`: the requirements that today's plan would break there.
    """

    change: str
    today: PlanCost | None
    best: Solution | None
    refusal: str = ""
    breaks: tuple[str, ...] = ()


def what_if(
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    plan: Plan,
    change: str,
    objective: Objective,
    require: Iterable[Requirement | str] = (),
    *,
    tie: float = 0.0,
) -> WhatIf:
    """What `plan` and the best plan would cost after `change`; raises PlannerError for one that is not understood."""
    wanted = tuple(Requirement.parse(r) if isinstance(r, str) else r for r in require)
    other = _required(cluster, change, wanted)
    if other is None:
        other_cluster, other_profile = changed(graph, cluster, profile, change)
    else:
        (other_cluster, other_profile), wanted = (cluster, profile), other
    left = {d.name for d in other_cluster.devices}
    today = None
    if {plan.source, plan.sink, *plan.devices} <= left:
        try:
            today = CostModel(graph, other_cluster, other_profile).predict(plan)
        except EcotoneError:  # a link or device that it needs is not there
            today = None
    try:
        best = solve(graph, other_cluster, other_profile, objective, wanted, num_runners_up=0, tie=tie)
    except PlannerError as error:
        return WhatIf(change=change, today=today, best=None, refusal=str(error))
    breaks = Asked.of(wanted, objective).violations(today) if today is not None else ()
    return WhatIf(change=change, today=today, best=best, breaks=breaks)


def _required(cluster: Cluster, change: str, require: tuple[Requirement, ...]) -> tuple[Requirement, ...] | None:
    """The requirements with the one that `change` states in place of its like; None where it states none."""
    name = change.partition("=")[0].strip()
    if name in {d.name for d in cluster.devices} or name == "latency" or name not in REQUIREMENTS:
        return None
    try:
        stated = Requirement.parse(change, next((r.by for r in require if r.by), None))
    except PlannerError as error:
        raise PlannerError(f"what if {change!r}? {error}") from None
    return (*(r for r in require if r.name != name), stated)


def changed(graph: Graph, cluster: Cluster, profile: Profile, change: str) -> tuple[Cluster, Profile]:
    """Cluster and profile after `change`; raises PlannerError for one that is not understood."""
    name, equals, value = (part.strip() for part in change.partition("="))
    if not (name and equals and value):
        raise PlannerError(f"what if {change!r}? write for example {_EXAMPLES}")
    cluster, profile = with_measured_links(graph, cluster, profile)
    if name in {d.name for d in cluster.devices}:
        return _device(cluster, profile, name, value, change)
    return _relinked(cluster, name, value, change), profile


def _relinked(cluster: Cluster, name: str, value: str, change: str) -> Cluster:
    """The cluster with the links that `name` names changed, those by kind too."""
    every = name in ("link", "latency")
    one, _, other = name.partition(">") if ">" in name else name.partition("-")
    pairs = {(one, other)} if ">" in name else {(one, other), (other, one)}
    chosen = {k for k in cluster.links if every or (k.source, k.target) in pairs}
    by_kind = [k for a, b in pairs if (a, b) not in {(k.source, k.target) for k in chosen} and (k := cluster.link(a, b))]
    if not (chosen or by_kind or (every and cluster.kind_links)):
        ends = ", ".join(sorted({"-".join(sorted((k.source, k.target))) for k in cluster.links})) or "none"
        raise PlannerError(f"what if {change!r}? there is no device or link {name!r}; links are {ends}")
    field, unit = ("latency_s", "s") if name == "latency" else ("bandwidth_bytes_per_s", "bytes_per_s")
    try:
        amount = {field: parse_quantity(value, unit, f"what if {change!r}?")}
        links = tuple(replace(k, **amount) if k in chosen else k for k in cluster.links)  # type: ignore[arg-type]
        links = (*links, *(replace(k, **amount) for k in by_kind))  # type: ignore[arg-type]
        kinds = tuple(replace(k, **amount) if every else k for k in cluster.kind_links)  # type: ignore[arg-type]
    except EcotoneError as error:
        told = str(error)
        raise PlannerError(told if change in told else f"what if {change!r}? {told}") from None
    return replace(cluster, links=links, kind_links=kinds)


def _device(cluster: Cluster, profile: Profile, name: str, value: str, change: str) -> tuple[Cluster, Profile]:
    if value == "gone":
        if name in (cluster.source, cluster.sink):
            raise PlannerError(f"what if {change!r}? {name} is where inputs arise or results are wanted: it cannot go")
        kept: tuple[Device, ...] = tuple(d for d in cluster.devices if d.name != name)
        links = tuple(k for k in cluster.links if name not in (k.source, k.target))
        return replace(cluster, devices=kept, links=links), profile
    try:
        factor = float(value.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not (value.endswith("x") and 0 < factor < float("inf")):
        raise PlannerError(f"what if {change!r}? of a device write {name}=2x (takes twice as long) or {name}=gone")
    segments = tuple(replace(s, median_s=s.median_s * factor) if s.device == name else s for s in profile.segments)
    times = ("encode_fixed_s", "encode_s_per_raw_byte", "decode_fixed_s", "decode_s_per_raw_byte")
    codecs = tuple(
        replace(c, **{field: getattr(c, field) * factor for field in times}) if c.device == name else c
        for c in profile.codecs
    )
    return cluster, replace(profile, segments=segments, codecs=codecs)
