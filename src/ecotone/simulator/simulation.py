"""simulate(plan, ...): one plan under a stream of requests on the virtual clock, and what came of it.

The machines are those of ecotone.protocol; times come from ecotone.cost. With one request in flight a latency is that of
`cost.predict`, plus headers and acknowledgements; with several, queues and overlap are what only a simulation gets right.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ecotone.cluster import Cluster, DeviceId, Link
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.linktrace import load_trace
from ecotone.plan import Plan
from ecotone.planner.reordering import world_of
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.protocol.actors import require_sound
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings, chunk_bytes_for
from ecotone.simulator.faults import Fault, FollowTrace, KillNode, Replan, check, devices_of
from ecotone.simulator.leaving import Leaving
from ecotone.simulator.medium import media_of
from ecotone.simulator.program import Ask, Program, as_set, with_epochs_from
from ecotone.simulator.world import Machine, World
from ecotone.trace import Trace
from ecotone.units import EcotoneError

__all__ = [
    "Arrivals", "ClosedLoop", "Outcome", "Periodic", "Poisson", "Report", "Times", "arrival_times_s", "asks_of", "make_node",
    "report_of", "simulate",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """`in_flight` requests at once: each that ends makes room for the next."""

    in_flight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Periodic:
    """One request every `period_s`."""

    period_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent arrivals, `rate_per_s` of them on average."""

    rate_per_s: float


Arrivals = ClosedLoop | Periodic | Poisson


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request: seconds since the first submission; `error` is an ErrorKind value, or "" with a result.

    `epoch`: of the plan that answered (-1 with an error). `num_runs`: 1, and one more each time that it was rerouted.
    `exit`: at which it left, "" where it went to the end.
    """

    request: int
    submitted_s: float
    ended_s: float
    error: str = ""
    epoch: int = -1
    num_runs: int = 1
    reason: str = ""
    exit: str = ""

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.submitted_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of a simulation. `outcomes` are in the order of their ends; utilisation is busy time over `makespan_s`."""

    outcomes: tuple[Outcome, ...]
    makespan_s: float
    utilisation: dict[str, float]  # by device, computing
    link_utilisation: dict[str, float]  # by "source>target"
    link_bytes: dict[str, int]
    trace: Trace
    num_events: int
    seed: int
    num_unended: int = 0
    num_duplicated: int = 0  # requests with more than one end
    violations: tuple[str, ...] = ()  # effects that asked for what a shell does not hold: protocol errors

    @property
    def completed(self) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if not o.error)

    @property
    def exits(self) -> dict[str, int]:
        """Results by the exit at which their requests left; "": at the end."""
        return dict(Counter(o.exit for o in self.completed))

    @property
    def completion_order(self) -> tuple[int, ...]:
        """Requests in the order of their results."""
        return tuple(o.request for o in self.completed)

    @property
    def latencies_s(self) -> tuple[float, ...]:
        return tuple(o.latency_s for o in self.completed)

    @property
    def mean_s(self) -> float:
        return float(np.mean(self.latencies_s)) if self.completed else math.nan

    @property
    def p50_s(self) -> float:
        return self.percentile_s(50)

    @property
    def p95_s(self) -> float:
        return self.percentile_s(95)

    def percentile_s(self, percent: float) -> float:
        """Latency that `percent` of the results kept."""
        return float(np.percentile(self.latencies_s, percent)) if self.completed else math.nan

    @property
    def throughput_per_s(self) -> float:
        """Results per second in the steady state: between the result at a tenth of the run and the last."""
        ends = [o.ended_s for o in self.completed]
        first = len(ends) // 10
        span_s = ends[-1] - ends[first] if ends else 0.0
        return (len(ends) - 1 - first) / span_s if span_s > 0 else math.nan


class Times:
    """Seconds and bytes of work by plan epoch, from the cost model of the plan's graph, and who leaves at its exits."""

    def __init__(self, models: dict[str, CostModel], seed: int = 0) -> None:
        self.models = models
        self.costs: dict[int, PlanCost] = {}
        self.leaving = Leaving(seed)

    def add(self, *plans: Plan, reordered: CostModel | None = None) -> None:
        """Raises EcotoneError where a plan is of a graph that was not given, nor of another order of that of `reordered`."""
        for plan in plans:
            if plan.graph_hash not in self.models and reordered is not None:
                graph, measured = world_of(plan.order, reordered.graph, reordered.cluster, reordered.profile)
                self.models.setdefault(graph.content_hash(), CostModel(graph, reordered.cluster, measured))
            model = self.models.get(plan.graph_hash)
            if model is None:
                what = f"plan {plan.epoch} is of graph {plan.graph_hash:.12}, which is not given"
                raise EcotoneError(f"{what}; pass it in `variants`")
            cost = self.costs[plan.epoch] = model.predict(plan)
            self.leaving.add(plan, [c.leaves for c, s in zip(cost.stages, plan.stages, strict=True) if s.exit])

    def seconds(self, body: BodyId, work: str) -> float:
        """Of "compute", "encode" or "decode" of a body."""
        cost = self.costs[body.epoch]
        if work == "compute":
            return cost.stages[body.edge].compute_s
        transfer = cost.edges[body.edge]
        return transfer.encode_s if work == "encode" else transfer.decode_s

    def size_bytes(self, body: BodyId) -> int:
        """Encoded, on the wire."""
        return max(1, round(self.costs[body.epoch].edges[body.edge].size_bytes))


def simulate(
    plan: Plan | PlanSet,
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    *,
    requests: int = 100,
    arrivals: Arrivals | None = None,
    seed: int = 0,
    deadline_s: float | None = None,
    ordered: bool = True,
    queue_limit: int = 64,
    max_in_flight: int | None = None,
    worker: WorkerSettings | None = None,
    coordinator: CoordinatorSettings | None = None,
    script: tuple[Fault, ...] = (),
    variants: Sequence[tuple[Graph, Profile]] = (),
    until_s: float = 1e6,
    trace: bool = True,
    attend: Callable[[Program, Times], None] | None = None,
) -> Report:
    """Run `requests` through a plan or a set of plans on the virtual clock (arrivals: one at a time by default).

    `script`: faults at stated times; links whose cluster entry names a trace follow it, those that share a wire or a radio
    share it (medium.py, everyone at full power). `variants`: further graphs that plans may be of (other orders of the
    blocks of `graph` need none). `coordinator`: patience and bounds not named here. `until_s`: stop there; what has not
    ended is counted. `attend`: told once plans are in force. EcotoneError: a wrong plan, or a script without sense.
    """
    arrivals = arrivals or ClosedLoop()
    in_flight = max_in_flight or (arrivals.in_flight if isinstance(arrivals, ClosedLoop) else 8)
    plans, script = _numbered(as_set(plan), script)
    model = CostModel(graph, cluster, profile)
    times = Times({g.content_hash(): CostModel(g, cluster, p) for g, p in variants} | {graph.content_hash(): model}, seed)
    every = [one for group in (plans, *(as_set(f.plan) for f in script if isinstance(f, Replan))) for one in group.plans]
    times.add(*every, reordered=model)
    settings = dataclasses.replace(
        coordinator or CoordinatorSettings(session=1),
        queue_limit=max(queue_limit, in_flight), max_in_flight=in_flight, ordered=ordered,
    )  # fmt: skip
    planned = [d for one in every for d in (one.source, *one.devices, one.sink)]
    named = [d for fault in script for d in devices_of(fault) if any(d == k.name for k in cluster.devices)]
    names = dict.fromkeys(map(NodeId, (*planned, *named)))
    _check(script, tuple(names), plans, settings, worker)
    links = tuple(k for one in _stated(cluster, names) if (k := model.link(one.source, one.target)) is not None)
    make = partial(make_node, links=links, worker=worker, asker=NodeId(plans.primary.source), coordinator=settings)
    expected_s = {epoch: cost.longest_s for epoch, cost in times.costs.items()}
    asks = asks_of(arrivals, requests, deadline_s, seed)
    program = Program(NodeId(plans.primary.source), asks, plans, make, in_flight, expected_s)
    machines = {name: Machine(make(name, 1, settings.session)) for name in names}
    world = program.world = World(machines, links, times.seconds, times.size_bytes, program.took, trace=trace, seed=seed)
    _bring_into_force(program, cluster, until_s)
    world.exit_of = times.leaving
    world.count_anew()
    program.begin()
    for fault in (*_traces(cluster, names), *script):
        world.at(world.origin_s + fault.at_s, program.inflict, fault)
    if attend is not None:
        attend(program, times)
    world.run(lambda: program.is_done, world.origin_s + until_s)
    return report_of(world, program, seed)


def _stated(cluster: Cluster, names: Iterable[str]) -> tuple[Link, ...]:
    """The links that the cluster names; where it has links by kind, those among the devices that take part."""
    return cluster.links_among(names) if cluster.kind_links else cluster.links


def _bring_into_force(program: Program, cluster: Cluster, until_s: float) -> None:
    world = program.world
    for medium in media_of(cluster, world.channels):
        medium.join(world, world.channels)
    world.connect_all()
    program.deploy(program.plans)
    world.run(lambda: program.is_deployed, until_s)
    if program.error or not program.is_deployed:
        raise EcotoneError(f"plan cannot be deployed: {program.error or 'nodes do not answer'}")


def _numbered(plans: PlanSet, script: tuple[Fault, ...]) -> tuple[PlanSet, tuple[Fault, ...]]:
    """Sets with epochs that ascend through the script; those that do already stay as they are."""
    plans = with_epochs_from(plans, 0)
    newest, numbered = plans.plans[-1].epoch, []
    for fault in sorted(script, key=lambda f: f.at_s):
        if isinstance(fault, Replan):
            group = with_epochs_from(as_set(fault.plan), newest + 1)
            newest = group.plans[-1].epoch
            fault = dataclasses.replace(fault, plan=group)
        numbered.append(fault)
    return plans, tuple(numbered)


def _check(
    script: tuple[Fault, ...],
    names: tuple[str, ...],
    plans: PlanSet,
    settings: CoordinatorSettings,
    worker: WorkerSettings | None,
) -> None:
    """Raises EcotoneError for a script that makes no sense, UnsoundPlan for plans that may not run."""
    check(script, names, "script of faults")
    for group in (plans, *(fault.plan for fault in script if isinstance(fault, Replan))):
        require_sound(group, worker=worker, coordinator=settings)
    if not settings.record and any(isinstance(f, KillNode) and f.device == plans.primary.source for f in script):
        raise EcotoneError(
            f"script of faults: kills the asker {plans.primary.source}, whose requests die with it; "
            "record them (CoordinatorSettings(record=True), --recorded) or kill another"
        )


def arrival_times_s(arrivals: Arrivals, count: int, seed: int) -> tuple[float, ...]:
    """When each of `count` requests comes, from 0; nothing for a closed loop, where each that ends brings the next."""
    if isinstance(arrivals, ClosedLoop):
        return ()
    if isinstance(arrivals, Periodic):
        return tuple((arrivals.period_s * np.arange(count)).tolist())
    gaps = np.random.default_rng(seed).exponential(1 / arrivals.rate_per_s, count)
    return tuple((np.cumsum(gaps) - gaps[0]).tolist())


def asks_of(arrivals: Arrivals, count: int, deadline_s: float | None, seed: int) -> list[Ask]:
    """`count` requests as they come."""
    if isinstance(arrivals, ClosedLoop):
        return [Ask(deadline_s=deadline_s)] * count
    return [Ask(at_s=time_s, deadline_s=deadline_s) for time_s in arrival_times_s(arrivals, count, seed)]


def _traces(cluster: Cluster, names: dict[NodeId, None]) -> list[FollowTrace]:
    known = [k for k in cluster.links if k.trace and NodeId(k.source) in names and NodeId(k.target) in names]
    return [FollowTrace(at_s=0.0, source=k.source, target=k.target, trace=load_trace(k.trace)) for k in known]


def make_node(
    name: NodeId,
    incarnation: int,
    session: int,
    *,
    links: tuple[Link, ...],
    worker: WorkerSettings | None,
    asker: NodeId,
    coordinator: CoordinatorSettings,
) -> Node:
    """A node whose chunks fit the rates of its links."""
    own = {NodeId(k.target): k.bandwidth_bytes_per_s for k in links if k.source == DeviceId(name)}
    settings = {peer: LinkSettings(chunk_bytes=chunk_bytes_for(rate), bytes_per_s=rate) for peer, rate in own.items()}
    mind = dataclasses.replace(coordinator, session=session) if name == asker else None
    return Node(name, incarnation, links=settings, worker=worker, coordinator=mind)


def report_of(world: World, program: Program, seed: int, epochs: Collection[int] | None = None) -> Report:
    """What came of one program's requests; `epochs`: its spans where the world has several programs."""
    origin_s = world.origin_s
    runs: dict[int, int] = {}
    for _, again in program.rerouted:
        runs[again.request] = runs.get(again.request, 1) + 1
    outcomes = [
        Outcome(
            request=number,
            submitted_s=program.submitted_s[number] - origin_s,
            ended_s=end.at_s - origin_s,
            error=end.error,
            epoch=end.epoch,
            num_runs=runs.get(number, 1),
            reason=end.reason,
            exit=end.exit,
        )
        for number, ends in program.ends.items()
        for end in ends
    ]
    outcomes.sort(key=lambda o: o.ended_s)
    makespan_s = max((o.ended_s for o in outcomes), default=0.0)
    over = makespan_s if makespan_s > 0 else math.inf
    known = (span for span in world.spans or [] if epochs is None or span.epoch in epochs)
    spans = sorted(known, key=lambda span: span.stop_s)
    return Report(
        outcomes=tuple(outcomes),
        makespan_s=makespan_s,
        utilisation={str(name): machine.busy_s / over for name, machine in world.machines.items()},
        link_utilisation={f"{a}>{b}": channel.busy_s / over for (a, b), channel in world.channels.items()},
        link_bytes={f"{a}>{b}": channel.num_bytes for (a, b), channel in world.channels.items()},
        trace=Trace(origin="simulated", spans=tuple(spans)),
        num_events=world.num_events,
        seed=seed,
        num_unended=len(program.submitted_s) - len(program.ends),
        num_duplicated=sum(len(ends) > 1 for ends in program.ends.values()),
        violations=tuple(world.violations),
    )
