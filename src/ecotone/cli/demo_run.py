"""The demo's measuring: choose the contenders under one state of the links, run them in turn on live nodes, sum up.

Contenders are interleaved in rounds of one session, so that what disturbs the computer disturbs all of them; equal plans
share one measurement. Latency is one frame at a time; throughput is a stream with several frames in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

from ecotone.cli.demo_words import plan_in_words
from ecotone.cluster import Cluster
from ecotone.cost import PlanCost, predict
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner import TIE, Latency, PlannerError, baselines, solve
from ecotone.profile import Profile
from ecotone.runtime import RequestTrace, Session
from ecotone.web.result import Contender, LinkPart, PlanPart

__all__ = ["Entry", "Tally", "choose", "run_all", "summed_up"]

ROUNDS, WARM, IN_FLIGHT = 2, 2, 4
_BASELINES = (
    ("device", "Device only", "device_only"),
    ("jpeg", "Server only, JPEG", "server_only_jpeg"),
    ("fixed", "Best fixed cut", "best_fixed_cut"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A plan that takes part, and what was predicted of it before it ran."""

    kind: str
    name: str
    plan: Plan
    cost: PlanCost


@dataclass(slots=True)
class Tally:
    """What was measured of one plan so far."""

    latencies_s: list[float] = field(default_factory=list)
    traces: list[RequestTrace] = field(default_factory=list)
    right: int = 0
    tiles: int = 0
    throughput_per_s: float = 0.0


def choose(
    graph: Graph, cluster: Cluster, profile: Profile, require: Sequence[str], stale: Plan | None = None
) -> tuple[Entry, ...]:
    """The contenders of one act, Ecotone's plan last; `stale` is the plan of the act before, kept."""
    entries = []
    for kind, name, baseline in _BASELINES:
        try:
            plan = baselines.place(baseline, graph, cluster, profile, require)
        except PlannerError:
            plan = baselines.place(baseline, graph, cluster, profile, ("accuracy_loss=100",))
        entries.append(Entry(kind=kind, name=name, plan=plan, cost=predict(plan, graph, cluster, profile)))
    if stale is not None:
        cost = predict(stale, graph, cluster, profile)
        entries.append(Entry(kind="stale", name="First plan, kept", plan=stale, cost=cost))
    solution = solve(graph, cluster, profile, Latency(), tuple(require), tie=TIE)
    return (*entries, Entry(kind="ecotone", name="Ecotone's plan", plan=solution.plan, cost=solution.cost))


def run_all(
    session: Session,
    entries: Sequence[Entry],
    pixels: torch.Tensor,
    labels: torch.Tensor,
    progress: Callable[[int, int, str], None],
) -> dict[str, Tally]:
    """Run every distinct plan on every frame in each of ROUNDS interleaved rounds; tallies by the identity of the plan."""
    plans = {entry.plan.identity(): entry for entry in entries}
    tallies = {identity: Tally() for identity in plans}
    epochs: dict[int, Tally] = {}
    total, done = ROUNDS * len(plans) * 2 * len(pixels), 0
    for number in range(ROUNDS):
        for identity, entry in plans.items():
            tally = tallies[identity]
            session.replan(entry.plan)
            for frame in pixels[:1].expand(WARM, -1, -1, -1):
                session(frame[None])
            epochs[session.plan.epoch] = tally
            for frame, truth in zip(pixels, labels, strict=True):
                began = time.perf_counter()
                answer = session(frame[None])
                tally.latencies_s.append(time.perf_counter() - began)
                tally.right += int((answer[0].argmax(0) == truth).sum())
                tally.tiles += truth.numel()
                done += 1
                progress(done, total, entry.name)
            began = time.perf_counter()
            for _ in session.stream(((frame[None],) for frame in pixels), in_flight=IN_FLIGHT):
                done += 1
                progress(done, total, f"{entry.name}, {IN_FLIGHT} in flight")
            rate = len(pixels) / (time.perf_counter() - began)
            tally.throughput_per_s += (rate - tally.throughput_per_s) / (number + 1)
    traces = sorted(session.report(), key=lambda trace: trace.request)
    for epoch, tally in epochs.items():  # those that ran alone: after the warm-up, before the stream
        tally.traces.extend([trace for trace in traces if trace.epoch == epoch][WARM : WARM + len(pixels)])
    return tallies


def summed_up(graph: Graph, entries: Sequence[Entry], tallies: dict[str, Tally]) -> tuple[Contender, ...]:
    """One Contender per entry, in order; an entry whose plan came before shares its measurement and says so."""
    first: dict[str, str] = {}
    contenders = []
    for entry in entries:
        identity = entry.plan.identity()
        tally, same_as = tallies[identity], first.setdefault(identity, entry.name)
        contenders.append(_contender(graph, entry, tally, "" if same_as == entry.name else same_as))
    return tuple(contenders)


def _median(values: Iterable[float]) -> float:
    """The median, or 0 where nothing was measured."""
    return median(found) if (found := list(values)) else 0.0


def _contender(graph: Graph, entry: Entry, tally: Tally, same_as: str) -> Contender:
    links = _links(graph, entry, tally)
    return Contender(
        kind=entry.kind,
        name=entry.name,
        words=plan_in_words(entry.plan),
        latency_median_s=median(tally.latencies_s),
        latency_p95_s=quantiles(tally.latencies_s, n=20)[-1] if len(tally.latencies_s) > 1 else tally.latencies_s[0],
        throughput_per_s=tally.throughput_per_s,
        bytes_per_frame=sum(link.size_bytes for link in links),
        accuracy=tally.right / max(1, tally.tiles),
        energy_joule=entry.cost.energy_joule,
        predicted_latency_s=entry.cost.latency_s,
        predicted_throughput_per_s=entry.cost.throughput_per_s,
        predicted_bytes=entry.cost.size_bytes,
        num_frames=len(tally.latencies_s),
        same_as=same_as,
        stages=_stages(graph, entry, tally),
        links=links,
    )


def _stages(graph: Graph, entry: Entry, tally: Tally) -> tuple[PlanPart, ...]:
    whole = graph.segment_flop(0, graph.num_blocks) or 1.0
    found = [(part.stage, part.compute_s) for trace in tally.traces for part in trace.stages]
    return tuple(
        PlanPart(
            device=stage.device,
            start=stage.start,
            stop=stage.stop,
            executor=stage.executor,
            flop_share=graph.segment_flop(stage.start, stage.stop) / whole,
            predicted_s=cost.compute_s,
            measured_s=_median(seconds for stage_index, seconds in found if stage_index == i),
        )
        for i, (stage, cost) in enumerate(zip(entry.plan.stages, entry.cost.stages, strict=True))
    )


def _links(graph: Graph, entry: Entry, tally: Tally) -> tuple[LinkPart, ...]:
    found = [
        (part.edge, part.size_bytes, part.encode_s + part.transfer_s + part.decode_s)
        for trace in tally.traces
        for part in trace.transfers
    ]
    return tuple(
        LinkPart(
            source=transfer.source,
            target=transfer.target,
            position=transfer.position,
            codec=transfer.codec,
            size_bytes=_median(sent for edge, sent, _ in found if edge == i) or cost.size_bytes,
            raw_bytes=graph.frontier_bytes(transfer.position),
            predicted_s=cost.total_s,
            measured_s=_median(seconds for edge, _, seconds in found if edge == i),
        )
        for i, (transfer, cost) in enumerate(zip(entry.plan.transfers, entry.cost.transfers, strict=True))
        if not transfer.is_local
    )
