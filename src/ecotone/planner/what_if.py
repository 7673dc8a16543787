"""Another world, and what would be best there: a link of another rate, another latency, a slower or missing device.

Changes are text: "link=10Mbit/s" (every link), "camera-server=10Mbit/s" (both directions), "camera>server=10Mbit/s" (one),
"latency=20ms" (every link), "server=2x" (takes twice as long), "server=gone".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ecotone.cluster import Cluster, Device, Link
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.measured import with_measured_links
from ecotone.planner.objective import Objective, PlannerError, Requirement
from ecotone.planner.solve import Solution, solve
from ecotone.profile import Profile
from ecotone.units import EcotoneError, parse_quantity

__all__ = ["WhatIf", "changed", "what_if"]

_EXAMPLES = "link=10Mbit/s, camera-server=10Mbit/s, camera>server=10Mbit/s, latency=20ms, server=2x, server=gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """`today`: what the plan of today would cost there, None where it cannot run; `best` None: `refusal` says why."""

    change: str
    today: PlanCost | None
    best: Solution | None
    refusal: str = ""


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
    other_cluster, other_profile = changed(graph, cluster, profile, change)
    left = {d.name for d in other_cluster.devices}
    today = None
    if {plan.source, plan.sink, *plan.devices} <= left:
        try:
            today = CostModel(graph, other_cluster, other_profile).predict(plan)
        except EcotoneError:  # a link or device that it needs is not there
            today = None
    try:
        best = solve(graph, other_cluster, other_profile, objective, require, num_runners_up=0, tie=tie)
    except PlannerError as error:
        return WhatIf(change=change, today=today, best=None, refusal=str(error))
    return WhatIf(change=change, today=today, best=best)


def changed(graph: Graph, cluster: Cluster, profile: Profile, change: str) -> tuple[Cluster, Profile]:
    """Cluster and profile after `change`; raises PlannerError for one that is not understood."""
    name, equals, value = (part.strip() for part in change.partition("="))
    if not (name and equals and value):
        raise PlannerError(f"what if {change!r}? write for example {_EXAMPLES}")
    cluster, profile = with_measured_links(graph, cluster, profile)
    if name in {d.name for d in cluster.devices}:
        return _device(cluster, profile, name, value, change)
    return replace(cluster, links=_links(cluster, name, value, change)), profile


def _links(cluster: Cluster, name: str, value: str, change: str) -> tuple[Link, ...]:
    if name in ("link", "latency"):
        chosen = set(cluster.links)
    else:
        one, _, other = name.partition(">") if ">" in name else name.partition("-")
        pairs = {(one, other)} if ">" in name else {(one, other), (other, one)}
        chosen = {k for k in cluster.links if (k.source, k.target) in pairs}
    if not chosen:
        ends = ", ".join(sorted({"-".join(sorted((k.source, k.target))) for k in cluster.links})) or "none"
        raise PlannerError(f"what if {change!r}? there is no device or link {name!r}; links are {ends}")
    try:
        if name == "latency":
            latency_s = parse_quantity(value, "s", f"what if {change!r}?")
            return tuple(replace(k, latency_s=latency_s) for k in cluster.links)
        rate = parse_quantity(value, "bytes_per_s", f"what if {change!r}?")
        return tuple(replace(k, bandwidth_bytes_per_s=rate) if k in chosen else k for k in cluster.links)
    except EcotoneError as error:
        told = str(error)
        raise PlannerError(told if change in told else f"what if {change!r}? {told}") from None


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
