"""simulate(plan, ...): one plan under a stream of requests on the virtual clock, and what came of it.

The machines are those of ecotone.protocol; times come from ecotone.cost. With one request in flight a latency is that of
`cost.predict`, plus headers and acknowledgements; with several, queues and overlap are what only a simulation gets right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from ecotone.cluster import Cluster, DeviceId, Link
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.profile import Profile
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings, chunk_bytes_for
from ecotone.simulator.world import Machine, World
from ecotone.trace import Trace
from ecotone.units import EcotoneError

__all__ = [
    "Arrivals", "ClosedLoop", "CutLink", "Fault", "HealLink", "KillNode", "Outcome", "Periodic", "Poisson", "Replan",
    "Report", "RestartNode", "SetLink", "simulate",
]  # fmt: skip

_SESSION = 1


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
class CutLink:
    """Both directions between two devices go dead; the ends notice after `detect_s`."""

    at_s: float
    source: DeviceId
    target: DeviceId
    detect_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealLink:
    """Both directions carry again."""

    at_s: float
    source: DeviceId
    target: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLink:
    """A directed link gets another latency and rate."""

    at_s: float
    link: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class KillNode:
    """A device's process ends (not the source's)."""

    at_s: float
    device: DeviceId
    detect_s: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartNode:
    """A killed device starts a new process."""

    at_s: float
    device: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """The asker switches to another plan (epoch above the present one)."""

    at_s: float
    plan: Plan


Fault = CutLink | HealLink | SetLink | KillNode | RestartNode | Replan


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request: seconds since the first submission; `error` is an ErrorKind value, or "" with a result."""

    request: int
    submitted_s: float
    ended_s: float
    error: str = ""

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

    @property
    def completed(self) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if not o.error)

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


@dataclass(slots=True)
class _Asker:
    """The program at the asker: submits by the arrival process, notes the ends."""

    num_requests: int
    arrivals: Arrivals
    seed: int
    deadline_s: float | None
    world: World = field(init=False)
    name: NodeId = field(init=False)
    submitted_s: dict[int, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    error: str = ""
    is_deployed: bool = False

    @property
    def is_done(self) -> bool:
        return len(self.outcomes) == self.num_requests

    def begin(self) -> None:
        origin_s = self.world.origin_s = self.world.now_s
        if isinstance(self.arrivals, ClosedLoop):
            for _ in range(min(self.arrivals.in_flight, self.num_requests)):
                self.world.at(origin_s, self.submit)
            return
        count = self.num_requests
        if isinstance(self.arrivals, Periodic):
            times = self.arrivals.period_s * np.arange(count)
        else:
            gaps = np.random.default_rng(self.seed).exponential(1 / self.arrivals.rate_per_s, count)
            times = np.cumsum(gaps) - gaps[0]
        for time_s in times:
            self.world.at(origin_s + float(time_s), self.submit)

    def submit(self) -> None:
        request = len(self.submitted_s)
        if request < self.num_requests:
            self.submitted_s[request] = self.world.now_s
            self.world.event(self.name, ev.Submit(request=request, deadline_s=self.deadline_s))

    def took(self, effect: fx.Effect, now_s: float) -> None:
        match effect:
            case fx.DeployEnded(error=error):
                self.error = self.error or ("" if self.is_deployed else error)
                self.is_deployed = True
            case fx.Deliver(request=request, body=body):
                self.world.span(now_s, self.name, body, "result")
                self.end(request, "")
            case fx.RequestError(request=request, kind=kind):
                self.world.span(now_s, self.name, BodyId(_SESSION, 0, 0, request), "error")
                self.end(request, kind.value)

    def end(self, request: int, error: str) -> None:
        origin_s = self.world.origin_s
        start_s, stop_s = self.submitted_s[request] - origin_s, self.world.now_s - origin_s
        self.outcomes.append(Outcome(request=request, submitted_s=start_s, ended_s=stop_s, error=error))
        if isinstance(self.arrivals, ClosedLoop):
            self.world.at(self.world.now_s, self.submit)


class _Times:
    """Seconds and bytes of work by plan epoch, from the cost model."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self.costs: dict[int, PlanCost] = {}

    def add(self, plan: Plan) -> None:
        self.costs[plan.epoch] = self.model.predict(plan)

    def seconds(self, body: BodyId, work: str) -> float:
        cost = self.costs[body.epoch]
        if work == "compute":
            return cost.stages[body.edge].compute_s
        transfer = cost.transfers[body.edge]
        return transfer.encode_s if work == "encode" else transfer.decode_s

    def size_bytes(self, body: BodyId) -> int:
        return max(1, round(self.costs[body.epoch].transfers[body.edge].size_bytes))


def simulate(
    plan: Plan,
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
    script: tuple[Fault, ...] = (),
    until_s: float = 1e6,
    trace: bool = True,
) -> Report:
    """Run `requests` through `plan` on the virtual clock (arrivals: one at a time by default) with faults at stated times.

    `until_s`: stop there; what has not ended by then is counted. Raises EcotoneError where the plan cannot be deployed.
    """
    arrivals = arrivals or ClosedLoop()
    in_flight = max_in_flight or (arrivals.in_flight if isinstance(arrivals, ClosedLoop) else 8)
    model = CostModel(graph, cluster, profile)
    times = _Times(model)
    plans = (plan, *(f.plan for f in script if isinstance(f, Replan)))
    for one in plans:
        times.add(one)
    settings = CoordinatorSettings(
        session=_SESSION, queue_limit=max(queue_limit, in_flight), max_in_flight=in_flight, ordered=ordered
    )
    names = dict.fromkeys(NodeId(d) for one in plans for d in (one.source, *one.devices, one.sink))
    links = tuple(found for k in cluster.links if (found := model.link(k.source, k.target)) is not None)
    make = partial(_node, links=links, worker=worker, asker=NodeId(plan.source), coordinator=settings)
    asker = _Asker(requests, arrivals, seed, deadline_s)
    machines = {name: Machine(make(name, 1)) for name in names}
    world = asker.world = World(machines, links, times.seconds, times.size_bytes, asker.took, trace=trace)
    asker.name = NodeId(plan.source)
    world.connect_all()
    world.event(asker.name, ev.DeployRequested(plan=plan))
    world.run(lambda: asker.is_deployed, until_s)
    if asker.error or not asker.is_deployed:
        raise EcotoneError(f"plan cannot be deployed: {asker.error or 'nodes do not answer'}")
    world.num_events = 0
    for channel in world.channels.values():
        channel.num_bytes, channel.busy_s = 0, 0.0
    asker.begin()
    for number, fault in enumerate(script):
        world.at(world.origin_s + fault.at_s, _scripted(world, fault, asker.name, partial(make, incarnation=number + 2)))
    world.run(lambda: asker.is_done, world.origin_s + until_s)
    return _report(world, asker, seed)


def _node(
    name: NodeId,
    incarnation: int,
    *,
    links: tuple[Link, ...],
    worker: WorkerSettings | None,
    asker: NodeId,
    coordinator: CoordinatorSettings,
) -> Node:
    """A node whose chunks fit the rates of its links."""
    own = {NodeId(k.target): k.bandwidth_bytes_per_s for k in links if k.source == DeviceId(name)}
    settings = {peer: LinkSettings(chunk_bytes=chunk_bytes_for(rate)) for peer, rate in own.items()}
    return Node(name, incarnation, links=settings, worker=worker, coordinator=coordinator if name == asker else None)


def _scripted(world: World, fault: Fault, asker: NodeId, make: Callable[[NodeId], Node]) -> Callable[[], None]:
    match fault:
        case CutLink(source=source, target=target, detect_s=detect_s):
            return lambda: world.cut(NodeId(source), NodeId(target), detect_s)
        case HealLink(source=source, target=target):
            return lambda: world.heal(NodeId(source), NodeId(target))
        case SetLink(link=link):
            ends = NodeId(link.source), NodeId(link.target)
            return lambda: world.set_link(*ends, link.latency_s, link.bandwidth_bytes_per_s)
        case KillNode(device=device, detect_s=detect_s):
            return lambda: world.kill(NodeId(device), detect_s)
        case RestartNode(device=device):
            return lambda: world.restart(NodeId(device), make(NodeId(device)))
        case Replan(plan=plan):
            return lambda: world.event(asker, ev.DeployRequested(plan=plan))


def _report(world: World, asker: _Asker, seed: int) -> Report:
    makespan_s = max((o.ended_s for o in asker.outcomes), default=0.0)
    over = makespan_s if makespan_s > 0 else math.inf
    spans = sorted(world.spans or [], key=lambda span: span.stop_s)
    return Report(
        outcomes=tuple(asker.outcomes),
        makespan_s=makespan_s,
        utilisation={str(name): machine.busy_s / over for name, machine in world.machines.items()},
        link_utilisation={f"{a}>{b}": channel.busy_s / over for (a, b), channel in world.channels.items()},
        link_bytes={f"{a}>{b}": channel.num_bytes for (a, b), channel in world.channels.items()},
        trace=Trace(origin="simulated", spans=tuple(spans)),
        num_events=world.num_events,
        seed=seed,
        num_unended=len(asker.submitted_s) - len(asker.outcomes),
    )
