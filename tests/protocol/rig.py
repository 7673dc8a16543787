"""A small deployment on the virtual clock for tests of failover: nodes a (the asker), b, c, d; a program that counts ends.

A plan is written as the devices of its stages, one block each: "bc" goes a -> b -> c -> a, "aa" stays on the asker.
"""

from __future__ import annotations

from itertools import pairwise

from ecotone.cluster import DeviceId, Link
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import BodyId, NodeId, request_of
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings
from ecotone.simulator.world import Machine, World

A, B, C, D = (NodeId(n) for n in "abcd")
NAMES = (A, B, C, D)
COMPUTE_S = 0.010


def plan(stages: str, epoch: int, graph: str = "g") -> Plan:
    """One block per letter; source and sink are the asker."""
    ends = [DeviceId("a"), *(DeviceId(n) for n in stages), DeviceId("a")]
    transfers = tuple(
        Transfer(source=one, target=other, position=i, codec=LOCAL if one == other else "fp32")
        for i, (one, other) in enumerate(pairwise(ends))
    )
    made = tuple(Stage(device=d, start=i, stop=i + 1) for i, d in enumerate(ends[1:-1]))
    return Plan(graph_hash=graph, stages=made, transfers=transfers, epoch=epoch)


def asked(first: int, *stages: str, active: str = "", pause: bool = False, boundary_bytes: int = 0) -> ev.DeployRequested:
    """The set of these plans, epochs from `first` on; `active`: the plan (as written) that is an active twin."""
    plans = [plan(text, first + i) for i, text in enumerate(stages)]
    standbys = tuple(
        ev.Resident(plan=p, is_active=text == active, boundary_bytes=boundary_bytes)
        for p, text in zip(plans[1:], stages[1:], strict=True)
    )
    return ev.DeployRequested(plan=plans[0], standbys=standbys, pause=pause, boundary_bytes=boundary_bytes)


class Rig:
    """`rate` of all links in bytes/s; `bounds` are CoordinatorSettings."""

    def __init__(self, *, rate: float = 1e7, latency_s: float = 1e-4, chunk_bytes: int = 50_000, **bounds: object) -> None:
        self.settings = CoordinatorSettings(session=5, **{"queue_limit": 20, "max_in_flight": 4, **bounds})  # type: ignore[arg-type]
        self._link = LinkSettings(chunk_bytes=chunk_bytes, window_bytes=2 * chunk_bytes)
        machines = {n: Machine(self.node(n, 1)) for n in NAMES}
        links = tuple(
            Link(source=DeviceId(x), target=DeviceId(y), latency_s=latency_s, bandwidth_bytes_per_s=rate)
            for x in NAMES
            for y in NAMES
            if x != y
        )
        self.size_bytes = 20_000
        self.seconds: dict[tuple[str, int], float] = {}  # (node, stage): compute
        self.raising: set[tuple[int, int]] = set()  # (epoch, stage): computing it fails
        self.world = World(machines, links, self._seconds, lambda body: self.size_bytes, self._took)
        self.world.fault_of = lambda body, work: (
            "told to" if work == "compute" and (body.epoch, body.edge) in self.raising else ""
        )
        self.log: list[fx.Effect] = []
        self.computed: list[BodyId] = []
        self.ends: dict[int, list[str]] = {}
        self.epochs: dict[int, int] = {}  # request -> epoch that answered
        self.ended_s: dict[int, float] = {}
        self.incarnation = 1
        self.world.connect_all()

    def node(self, name: NodeId, incarnation: int) -> Node:
        links = dict.fromkeys(NAMES, self._link)
        mind = self.settings if name == A else None
        return Node(name, incarnation, links=links, worker=WorkerSettings(queue_limit=1), coordinator=mind)

    def _seconds(self, body: BodyId, work: str) -> float:
        if work != "compute":
            return 0.0005
        self.computed.append(body)
        return self.seconds.get((str(body.epoch), body.edge), COMPUTE_S)

    def _took(self, effect: fx.Effect, now_s: float) -> None:
        self.log.append(effect)
        match effect:
            case fx.Deliver(request=request, body=body):
                assert request_of(body.request) == request
                self.epochs[request], self.ended_s[request] = body.epoch, now_s
                self.ends.setdefault(request, []).append("result")
            case fx.RequestError(request=request, kind=kind):
                self.ended_s[request] = now_s
                self.ends.setdefault(request, []).append(kind.value)

    # ---- what the asker's program does ------------------------------------------------------------------------------

    def do(self, event: ev.Event) -> None:
        self.world.event(A, event)

    def deploy(self, first: int, *stages: str, active: str = "", wait_s: float = 0.5, **more: object) -> None:
        self.do(asked(first, *stages, active=active, **more))  # type: ignore[arg-type]
        self.let_pass(wait_s)

    def submit(self, *numbers: int, deadline_s: float | None = None, **more: object) -> None:
        for number in numbers:
            self.do(ev.Submit(request=number, deadline_s=deadline_s, **more))  # type: ignore[arg-type]

    def let_pass(self, seconds: float) -> None:
        until_s = self.world.now_s + seconds
        self.world.at(until_s, lambda: None)
        self.world.run(lambda: self.world.now_s >= until_s, until_s)

    def restart(self, name: NodeId) -> None:
        self.incarnation += 1
        self.world.restart(name, self.node(name, self.incarnation))

    def close(self, seconds: float = 30.0) -> None:
        self.do(ev.CloseRequested(drain=True))
        self.let_pass(seconds)

    # ---- what came of it --------------------------------------------------------------------------------------------

    def said(self, kind: type) -> list:
        """Effects of a kind since the last look."""
        found = [e for e in self.log if isinstance(e, kind)]
        self.log = [e for e in self.log if not isinstance(e, kind)]
        return found

    def deployed(self) -> list[tuple[int, str]]:
        return [(e.epoch, e.error) for e in self.said(fx.DeployEnded)]

    def check_nothing_left(self) -> None:
        for name, machine in self.world.machines.items():
            if machine.is_alive:
                assert not machine.tensors, f"{name} still holds tensors {machine.tensors}"
                assert not machine.bodies, f"{name} still holds bytes {machine.bodies}"
                assert machine.node.held_bytes == 0
                assert machine.node.worker.num_queued == 0
                assert not machine.timers.keys() - {("report",)}, f"{name} still waits for {machine.timers}"
        mind = self.world.machines[A].node.coordinator
        assert mind is not None
        assert mind.held_bytes == 0
        assert mind.num_requests == 0
