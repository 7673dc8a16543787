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
from ecotone.planner.objective import P95, REQUIREMENTS, Asked, Objective, PlannerError, Requirement
from ecotone.planner.solve import Solution, solve
from ecotone.profile import Profile
from ecotone.units import EcotoneError, parse_quantity

__all__ = ["WhatIf", "changed", "check_change", "what_if"]

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
    p95: P95 | None = None,
) -> WhatIf:
    """What `plan` and the best plan would cost after `change`; raises PlannerError for one that is not understood.

    `p95`: what a change "p95=80ms" means.
    """
    wanted = tuple(Requirement.parse(r) if isinstance(r, str) else r for r in require)
    other = _required(cluster, change, wanted, p95)
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
    refusal, best = "", None
    try:
        best = solve(graph, other_cluster, other_profile, objective, wanted, num_runners_up=0, tie=tie)
    except PlannerError as error:
        refusal = str(error)
    breaks = Asked.of(wanted, objective).violations(today) if today is not None else ()
    return WhatIf(change=change, today=today, best=best, refusal=refusal, breaks=breaks)


def check_change(cluster: Cluster, change: str) -> None:
    """Raises PlannerError for a change that is not understood, without anything measured."""
    if _required(cluster, change, (), None) is not None:
        return
    name, value = _read(change)
    if name not in {d.name for d in cluster.devices}:
        _relinked(cluster, name, value, change)
    elif value == "gone":
        _gone(cluster, name, change)
    else:
        _factor(name, value, change)


def _required(
    cluster: Cluster, change: str, require: tuple[Requirement, ...], p95: P95 | None
) -> tuple[Requirement, ...] | None:
    """The requirements with the one that `change` states in place of its like; None where it states none."""
    name = change.partition("=")[0].strip()
    if name in {d.name for d in cluster.devices} or name == "latency" or name not in REQUIREMENTS:
        return None
    try:
        stated = Requirement.parse(change, next((r.by for r in require if r.by), p95))
    except PlannerError as error:
        raise PlannerError(f"what if {change!r}? {error}") from None
    return (*(r for r in require if r.name != name), stated)


def changed(graph: Graph, cluster: Cluster, profile: Profile, change: str) -> tuple[Cluster, Profile]:
    """Cluster and profile after `change`; raises PlannerError for one that is not understood."""
    name, value = _read(change)
    cluster, profile = with_measured_links(graph, cluster, profile)
    if name in {d.name for d in cluster.devices}:
        if value == "gone":
            return _gone(cluster, name, change), profile
        return cluster, _slower(profile, name, _factor(name, value, change))
    return _relinked(cluster, name, value, change), profile


def _read(change: str) -> tuple[str, str]:
    """Name and value."""
    name, equals, value = (part.strip() for part in change.partition("="))
    if not (name and equals and value):
        raise PlannerError(f"what if {change!r}? write for example {_EXAMPLES}")
    return name, value


def _relinked(cluster: Cluster, name: str, value: str, change: str) -> Cluster:
    """The cluster with the links that `name` names changed, those by kind too."""
    every = name in ("link", "latency")
    one, _, other = name.partition(">") if ">" in name else name.partition("-")
    pairs = {(one, other)} if ">" in name else {(one, other), (other, one)}
    chosen = {k for k in cluster.links if every or (k.source, k.target) in pairs}
    by_kind = [k for a, b in pairs if (a, b) not in {(k.source, k.target) for k in chosen} and (k := cluster.link(a, b))]
    if not (chosen or by_kind or (every and cluster.kind_links)):
        ends = ", ".join(sorted({"-".join(sorted((k.source, k.target))) for k in cluster.links})) or "none"
        raise PlannerError(f"what if {change!r}? there is no device or link {name!r}, nor a requirement; links are {ends}")
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


def _gone(cluster: Cluster, name: str, change: str) -> Cluster:
    if name in (cluster.source, cluster.sink):
        raise PlannerError(f"what if {change!r}? {name} is where inputs arise or results are wanted: it cannot go")
    kept: tuple[Device, ...] = tuple(d for d in cluster.devices if d.name != name)
    links = tuple(k for k in cluster.links if name not in (k.source, k.target))
    return replace(cluster, devices=kept, links=links)


def _factor(name: str, value: str, change: str) -> float:
    """How many times as long the device takes."""
    try:
        factor = float(value.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not (value.endswith("x") and 0 < factor < float("inf")):
        raise PlannerError(f"what if {change!r}? of a device write {name}=2x (takes twice as long) or {name}=gone")
    return factor


def _slower(profile: Profile, name: str, factor: float) -> Profile:
    segments = tuple(replace(s, median_s=s.median_s * factor) if s.device == name else s for s in profile.segments)
    times = ("encode_fixed_s", "encode_s_per_raw_byte", "decode_fixed_s", "decode_s_per_raw_byte")
    codecs = tuple(
        replace(c, **{field: getattr(c, field) * factor for field in times}) if c.device == name else c
        for c in profile.codecs
    )
    return replace(profile, segments=segments, codecs=codecs)
