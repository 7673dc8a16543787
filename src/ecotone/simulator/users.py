"""simulate_users(workload, plans, ...): all users of a cluster at once on the virtual clock, and what came of each.

Every user is an asker with its own coordinator, session, plans and arrivals; they share devices (each session its weight,
protocol/fairness.py), links, wires and radio channels (medium.py). The machines are those that run on real nodes; times come
from ecotone.cost. Epochs are numbered apart, so that a body's epoch tells whose it is. Requests that are submitted between
`warm_up_s` and `duration_s` count, and busy time of that window is the utilisation.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ecotone.cluster import Cluster, Link
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.media import Tuning
from ecotone.plan import Plan
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.protocol.actors import require_sound
from ecotone.protocol.message import NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, WorkerSettings
from ecotone.simulator.channel import Channel
from ecotone.simulator.medium import Medium, default_tunings, media_of
from ecotone.simulator.program import Ask, Loads, Program, as_set
from ecotone.simulator.simulation import (
    Arrivals,
    ClosedLoop,
    Periodic,
    Poisson,
    Report,
    Times,
    asks_of,
    make_node,
    report_of,
)
from ecotone.simulator.world import Machine, World
from ecotone.units import EcotoneError
from ecotone.workload import User, Workload

__all__ = ["UsersReport", "simulate_users"]

_EPOCHS_APART = 1000  # plans that one user may go through


@dataclass(frozen=True, slots=True, kw_only=True)
class UsersReport:
    """`users`: what came of each that was let in; `refused`: why the others were not. Shares are of the window measured.

    `utilisation`: computing, by device; `link_utilisation` by "source>target"; `media`: shares with anything under way.
    `joule`: modelled energy by device over the window, watts of radio senders while they send included.
    """

    users: dict[str, Report]
    refused: dict[str, str]
    utilisation: dict[str, float]
    link_utilisation: dict[str, float]
    media: dict[str, float]
    joule: dict[str, float]
    window_s: float
    num_events: int
    violations: tuple[str, ...] = ()


def simulate_users(
    workload: Workload,
    plans: Mapping[str, Plan | PlanSet],
    cluster: Cluster,
    models: Sequence[tuple[Graph, Profile]],
    *,
    tunings: Mapping[str, Tuning] | None = None,
    duration_s: float = 30.0,
    warm_up_s: float = 3.0,
    drain_s: float = 60.0,
    seed: int = 0,
    max_in_flight: int = 8,
    queue_limit: int = 64,
    worker: WorkerSettings | None = None,
    trace: bool = False,
) -> UsersReport:
    """Run every user of `workload` that has an entry in `plans` under it, for `duration_s` of arrivals.

    `models`: graphs of the plans with their profiles. `tunings`: channels and powers of radio senders, by device.
    `max_in_flight`, `queue_limit`: of every open user's session, as `deploy` has them. A user whose plan a node does not
    take is in `refused`. Raises EcotoneError for plans that do not fit the user, the models or the cluster.
    """
    if not 0 <= warm_up_s < duration_s:
        raise EcotoneError(f"warm-up {warm_up_s} s must be within the duration {duration_s} s")
    workload.check(cluster)
    times = Times({g.content_hash(): CostModel(g, cluster, p) for g, p in models}, seed)
    sets = _numbered(workload, plans, times, worker)
    crowd = _Crowd(workload, sets, cluster, times, worker, (max_in_flight, queue_limit), (duration_s, seed), trace)
    media = media_of(cluster, crowd.world.channels, tunings)
    for medium in media:
        medium.join(crowd.world, crowd.world.channels)
    refused = crowd.bring_into_force()
    return crowd.run(media, refused, tunings or {}, warm_up_s, duration_s, drain_s)


def _numbered(
    workload: Workload, plans: Mapping[str, Plan | PlanSet], times: Times, worker: WorkerSettings | None
) -> dict[str, PlanSet]:
    """The plans of each user with epochs of its own, checked."""
    unknown = sorted(set(plans) - {u.name for u in workload.users})
    if unknown or not plans:
        raise EcotoneError(f"plans of {', '.join(unknown) or 'nobody'}: give plans of users of workload {workload.name}")
    sets = {}
    for index, user in enumerate(workload.users):
        if user.name in plans:
            found = sets[user.name] = as_set(plans[user.name]).with_epochs(index * _EPOCHS_APART)
            if (found.primary.source, found.primary.sink) != user.ends:
                ends = f"{found.primary.source} to {found.primary.sink}"
                raise EcotoneError(f"user {user.name}: its plan goes from {ends}, not from {user.ends[0]} to {user.ends[1]}")
            require_sound(found, worker=worker)
            times.add(*found.plans)
    return sets


def arrivals_of(user: User) -> Arrivals:
    """How the user's requests come."""
    if user.is_closed:
        return ClosedLoop(in_flight=user.in_flight)
    return Poisson(rate_per_s=user.rate_per_s) if user.arrivals == "poisson" else Periodic(period_s=1 / user.rate_per_s)


class _Crowd:
    """The programs of all users in one world."""

    def __init__(
        self, workload: Workload, sets: dict[str, PlanSet], cluster: Cluster, times: Times,
        worker: WorkerSettings | None, bounds: tuple[int, int], span: tuple[float, int], trace: bool,
    ) -> None:  # fmt: skip
        self.cluster, self.times, self.seed = cluster, times, span[1]
        self.users = {u.name: u for u in workload.users if u.name in sets}
        some = next(iter(times.models.values()))
        names = dict.fromkeys(NodeId(d) for one in sets.values() for d in one.devices)
        stated = cluster.links_among(names) if cluster.kind_links else cluster.links
        links = tuple(found for k in stated if (found := some.link(k.source, k.target)) is not None)
        minds = {name: _mind(user, i, bounds) for i, (name, user) in enumerate(self.users.items(), 1)}
        askers = {NodeId(user.source): minds[name] for name, user in self.users.items()}
        self.programs: dict[str, Program] = {}
        for index, (name, user) in enumerate(self.users.items()):
            make = partial(_make, links=links, worker=worker, askers=askers)
            expected = {plan.epoch: times.costs[plan.epoch].longest_s for plan in sets[name].plans}
            in_flight = user.in_flight or bounds[0]
            asks = asks_of(*_stream(user, sets[name], times, span[0]), user.deadline_s, self.seed + index)
            asks = _out_of_step(asks, user, np.random.default_rng((self.seed, index)).random())
            asks = [ask for ask in asks if ask.at_s is None or ask.at_s < span[0]]
            self.programs[name] = Program(NodeId(user.source), asks, sets[name], make, in_flight, expected)
        machines = {name: Machine(_make(name, 1, askers[name].session if name in askers else 0, links=links, worker=worker,
                                        askers=askers)) for name in names}  # fmt: skip
        pairs = {(NodeId(a), NodeId(b)) for one in sets.values() for a in one.devices for b in one.devices if a != b}
        self.world = World(
            machines, links, times.seconds, times.size_bytes, lambda effect, now_s: None, trace=trace, seed=self.seed,
            channels=_channels(sorted(pairs), links),
        )  # fmt: skip
        for program in self.programs.values():
            program.world = self.world
            self.world.programs[program.name] = program.took

    def bring_into_force(self, until_s: float = 600.0) -> dict[str, str]:
        """Deploy everyone's plans; who was refused, and why."""
        self.world.connect_all()
        for name, program in self.programs.items():
            program.loads = self._loads(name)
            program.deploy(program.plans)
        self.world.run(lambda: all(p.is_deployed for p in self.programs.values()), until_s)
        refused = {
            name: p.error or "nodes do not answer" for name, p in self.programs.items() if p.error or not p.is_deployed
        }
        self.programs = {name: p for name, p in self.programs.items() if name not in refused}
        if not self.programs:
            raise EcotoneError("no user's plan can be deployed: " + "; ".join(f"{n}: {why}" for n, why in refused.items()))
        return refused

    def _loads(self, name: str) -> dict[int, Loads]:
        """What an open user declares, by epoch: the share of each processor that its rate takes."""
        rate = self.users[name].rate_per_s
        found = {}
        for plan in self.programs[name].plans.plans:
            busy: dict[NodeId, float] = {}
            for stage in self.times.costs[plan.epoch].stages:
                busy[NodeId(stage.device)] = busy.get(NodeId(stage.device), 0.0) + stage.share * stage.compute_s
            found[plan.epoch] = tuple((node, seconds * rate) for node, seconds in busy.items())
        return found

    def run(
        self, media: Sequence[Medium], refused: dict[str, str], tunings: Mapping[str, Tuning],
        warm_up_s: float, duration_s: float, drain_s: float,
    ) -> UsersReport:  # fmt: skip
        world, origin_s = self.world, self.world.now_s
        world.exit_of = self.times.leaving
        world.count_anew()
        for program in self.programs.values():
            program.begin()
        world.run(lambda: False, origin_s + warm_up_s)
        before = self._busy(media)
        world.run(lambda: False, origin_s + duration_s)
        after = self._busy(media)
        for program in self.programs.values():
            program.stop()
        for _ in range(100):
            if all(len(p.ends) == len(p.submitted_s) for p in self.programs.values()):
                break
            world.run(lambda: False, min(world.now_s, origin_s + duration_s + drain_s) + drain_s / 100)
        window_s = duration_s - warm_up_s
        share = [
            {k: (v - old.get(k, 0.0)) / window_s for k, v in new.items()} for new, old in zip(after, before, strict=True)
        ]
        reports = {name: self._report(program, warm_up_s, duration_s) for name, program in self.programs.items()}
        return UsersReport(
            users=reports, refused=refused, utilisation=share[0], link_utilisation=share[1], media=share[2],
            joule=self._joule(share, tunings, window_s), window_s=window_s, num_events=world.num_events,
            violations=tuple(world.violations),
        )  # fmt: skip

    def _busy(
        self, media: Sequence[Medium]
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, float]]:
        world = self.world
        for medium in media:
            medium.changed()
        return (
            {str(name): machine.busy_s for name, machine in world.machines.items()},
            {f"{a}>{b}": channel.busy_s for (a, b), channel in world.channels.items()},
            {medium.name: medium.busy_s for medium in media},
            {f"{a}>{b}": float(channel.num_bytes) for (a, b), channel in world.channels.items()},
        )

    def _joule(self, share: Sequence[dict[str, float]], tunings: Mapping[str, Tuning], window_s: float) -> dict[str, float]:
        computing, sending, _, sent = share
        watts = {}
        for cell in self.cluster.radios:
            for device, tuning in (default_tunings(cell) | dict(tunings)).items():
                watts[f"{device}>{cell.receiver}"] = tuning.watt
        found = {}
        for name, busy in computing.items():
            power = self.cluster.device(name).power
            mean_watt = power.busy_watt * busy + power.idle_watt * (1 - busy)
            for link, share_busy in sending.items():
                if link.partition(">")[0] == name:
                    mean_watt += watts.get(link, 0.0) * share_busy + power.send_joule_per_byte * sent[link]
            found[name] = mean_watt * window_s
        return found

    def _report(self, program: Program, warm_up_s: float, duration_s: float) -> Report:
        report = report_of(self.world, program, self.seed, {plan.epoch for plan in program.plans.plans})
        counted = tuple(o for o in report.outcomes if warm_up_s <= o.submitted_s < duration_s)
        return dataclasses.replace(report, outcomes=counted)


def _out_of_step(asks: list[Ask], user: User, phase: float) -> list[Ask]:
    """Periodic users do not all begin at once; the first request of each comes within its first period."""
    if user.is_closed or user.arrivals != "periodic":
        return asks
    return [dataclasses.replace(ask, at_s=(ask.at_s or 0.0) + phase / user.rate_per_s) for ask in asks]


def _mind(user: User, session: int, bounds: tuple[int, int]) -> CoordinatorSettings:
    in_flight = user.in_flight or bounds[0]
    limit = max(bounds[1], in_flight)
    return CoordinatorSettings(
        session=session, queue_limit=limit, max_in_flight=in_flight, ordered=False, weight=user.weight
    )


def _stream(user: User, plans: PlanSet, times: Times, duration_s: float) -> tuple[Arrivals, int]:
    """Arrivals, and certainly enough of them for the duration."""
    if user.is_closed:
        fastest_s = min(times.costs[plan.epoch].latency_s for plan in plans.plans)
        return arrivals_of(user), user.in_flight * (2 + math.ceil(duration_s / max(fastest_s, 1e-6)))
    expected = user.rate_per_s * duration_s
    return arrivals_of(user), math.ceil(expected + 8 * math.sqrt(expected) + 8)


def _make(
    name: NodeId, incarnation: int, session: int, *, links: tuple[Link, ...], worker: WorkerSettings | None,
    askers: Mapping[NodeId, CoordinatorSettings],
) -> Node:  # fmt: skip
    mind = askers.get(name) or CoordinatorSettings(session=0)
    asker = name if name in askers else NodeId("")
    return make_node(name, incarnation, session, links=links, worker=worker, asker=asker, coordinator=mind)


def _channels(pairs: Iterable[tuple[NodeId, NodeId]], links: Sequence[Link]) -> dict[tuple[NodeId, NodeId], Channel]:
    """A channel for each pair: its own link, else the path of least latency, at the least rate on it (control only)."""
    direct = {(NodeId(k.source), NodeId(k.target)): k for k in links}
    after: dict[NodeId, list[Link]] = {}
    for link in links:
        after.setdefault(NodeId(link.source), []).append(link)
    found = {}
    for source, target in pairs:
        own = direct.get((source, target))
        if own is not None:
            found[source, target] = Channel(own.latency_s, own.bandwidth_bytes_per_s)
            continue
        best, queue = {source: 0.0}, [(0.0, math.inf, source)]
        while queue and queue[0][2] != target:
            latency_s, rate, here = heapq.heappop(queue)
            for hop in after.get(here, ()):
                there, far = NodeId(hop.target), latency_s + hop.latency_s
                if far < best.get(there, math.inf):
                    best[there] = far
                    heapq.heappush(queue, (far, min(rate, hop.bandwidth_bytes_per_s), there))
        if not queue:
            raise EcotoneError(f"no path of links leads from {source} to {target}; add a link to the cluster")
        found[source, target] = Channel(queue[0][0], queue[0][1])
    return found
