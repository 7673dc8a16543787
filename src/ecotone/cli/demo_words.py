"""What the demo says and draws besides measuring: candidate plans, the curve over cuts, headlines. Pure functions of data.

Legend: p a cut; q a codec. A one-cut plan runs [0, p) on the source and [p, L) on one other device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import CostError, CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.profile import Profile
from ecotone.web.drawing import milliseconds
from ecotone.web.result import Act, Contender, CurvePoint

__all__ = ["conclusion", "curve", "headline", "one_cut", "plan_in_words"]


def one_cut(graph: Graph, cluster: Cluster, second: DeviceId, position: int, codec: str, executors: tuple[str, str]) -> Plan:
    """[0, position) on the source, the rest on `second`, the answer to the sink in fp32; 0 and L leave one stage."""
    first, stop = cluster.source, graph.num_blocks
    halves = ((first, 0, position, executors[0]), (second, position, stop, executors[1]))
    stages = tuple(Stage(device=d, start=a, stop=b, executor=e) for d, a, b, e in halves if a < b)
    ends = [first, *(stage.device for stage in stages), cluster.sink]
    places = [0, *(stage.stop for stage in stages)]
    transfers = tuple(
        Transfer(source=a, target=b, position=p, codec=LOCAL if a == b else "fp32" if p == stop else codec)
        for a, b, p in zip(ends, ends[1:], places, strict=False)
    )
    return Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)


def _candidates(graph: Graph, cluster: Cluster, profile: Profile, second: DeviceId, position: int) -> Iterator[Plan]:
    fastest = {}
    for device, start, stop in ((cluster.source, 0, position), (second, position, graph.num_blocks)):
        times = {(s.device, s.executor): s.median_s for s in profile.segments if (s.start, s.stop) == (start, stop)}
        mine = {executor: seconds for (name, executor), seconds in times.items() if name == device}
        fastest[device] = min(mine, key=lambda e: mine[e], default="torch:fp32")
    for payload in profile.payloads:
        if payload.position == position:
            yield one_cut(graph, cluster, second, position, payload.codec, (fastest[cluster.source], fastest[second]))
    yield one_cut(graph, cluster, second, position, "fp32", (fastest[cluster.source], fastest[second]))


def curve(graph: Graph, cluster: Cluster, profile: Profile, max_disagreement: float) -> tuple[CurvePoint, ...]:
    """Predicted latency of every one-cut plan in its best codec that changes at most `max_disagreement` of the decisions."""
    model, points = CostModel(graph, cluster, profile), []
    for second in (device.name for device in cluster.devices if device.name != cluster.source):
        if cluster.link(cluster.source, second) is None or cluster.link(second, cluster.sink) is None:
            continue
        for position in profile.cuts:
            costs: list[tuple[PlanCost, str]] = []
            for plan in _candidates(graph, cluster, profile, second, position):
                try:
                    costs.append((model.predict(plan), plan.transfers[-2].codec))
                except CostError:
                    continue
            kept = [pair for pair in costs if pair[0].disagreement <= max_disagreement]
            if kept:
                cost, codec = min(kept, key=lambda pair: pair[0].latency_s)
                points.append(_point(cluster.source, second, position, codec, cost))
    return tuple(points)


def _point(first: DeviceId, second: DeviceId, position: int, codec: str, cost: PlanCost) -> CurvePoint:
    return CurvePoint(
        first=first, second=second, position=position, codec=codec, latency_s=cost.latency_s, size_bytes=cost.size_bytes
    )


def plan_in_words(plan: Plan) -> str:
    """ "camera 0 to 20, int4 to server 20 to 48"."""
    parts = []
    for transfer, stage in zip(plan.transfers, plan.stages, strict=False):
        way = "" if transfer.is_local else f"{transfer.codec} to "
        parts.append(f"{way}{stage.device} {stage.start} to {stage.stop}")
    return ", ".join(parts)


def _where(plan: Plan) -> str:
    """Where the work is done, for a sentence."""
    cuts = " and ".join(str(stage.start) for stage in plan.stages[1:])
    shared = f"cutting at block {cuts} between {' and '.join(plan.devices)}"
    if plan.transfers[0].is_local:
        return shared if cuts else f"running everything on {plan.source}"
    picture = f"sending the picture as {plan.transfers[0].codec} to {plan.devices[0]}"
    return f"{picture} and {shared}" if cuts else f"{picture}, which does all the work"


def headline(contenders: Sequence[Contender], plan: Plan) -> str:
    """Some sentences: how Ecotone's plan stands beside the best of the others, and whether it *is* the JPEG."""
    ours = next(c for c in contenders if c.kind == "ecotone")
    words = f"Best is {_where(plan)}: {milliseconds(ours.latency_median_s)}"
    if ours.same_as:
        return f"{words}, which is the plan that {ours.same_as} has, too. {_jpeg_words(plan)}".strip()
    best = min((c for c in contenders if c.kind != "ecotone"), key=lambda c: c.latency_median_s)
    ratio, other = best.latency_median_s / ours.latency_median_s, milliseconds(best.latency_median_s)
    if ratio >= 1.02:
        words += f", {ratio:.2f} times faster than the best of the others ({best.name}, {other})."
    elif ratio > 0.98:
        words += f", as fast as the best of the others ({best.name}, {other})."
    else:
        words = (
            f"Ecotone chose {_where(plan)} ({milliseconds(ours.latency_median_s)}); {best.name} was faster here ({other})."
        )
    return f"{words} {_jpeg_words(plan)}".strip()


def _jpeg_words(plan: Plan) -> str:
    if not plan.transfers[0].codec.startswith(("jpeg", "webp", "png")):
        return ""
    words = "So an image codec is the best plan here"
    return f"{words}: cutting the network would not pay." if len(plan.stages) == 1 else f"{words} for the first hop."


def conclusion(plans: Sequence[Plan], acts: Sequence[Act], factor: float) -> str:
    """What happened over both acts, in two sentences."""
    first, second = (next(c for c in act.contenders if c.kind == "ecotone") for act in acts[:2])
    words = f"With the links as they are, {_where(plans[0])}: {milliseconds(first.latency_median_s)}. "
    words += f"With every link {factor:g} times slower, "
    if plans[0].identity() == plans[1].identity():
        return f"{words}still the same plan: {milliseconds(second.latency_median_s)}."
    words += f"{_where(plans[1])}: {milliseconds(second.latency_median_s)}"
    stale = acts[1].contender("stale")
    if stale:
        words += f", where the first plan would need {milliseconds(stale.latency_median_s)}"
    return f"{words}."
