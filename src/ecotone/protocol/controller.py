"""Which resident plan new requests should take, from what was measured lately. Pure: events in, decisions out.

Theory of operation. Several plans are resident (see planset.py), so a switch costs nothing. Every node reports how long work
and links took. From that the controller keeps one factor per device, one per piece of work of a resident plan, and a rate
and a latency per directed link; with them it prices every resident plan, which takes microseconds, and compares the best one
with the one in force. It answers Keep, Switch (to a resident plan) or Replan (conditions left what the resident plans were
chosen for: the shell asks the planner off the hot path and tells Planned). It asks for a probe of a link that no traffic
times and on which a plan that may be better depends. It is the same object on the virtual clock and on real machines.

 (1) t(plan)  = sum over its work w on device d of  lambda_d b_w T_w  +  sum over links k of (n_k a_k + B_k s_k)
                + sum over its devices of queue_d c_d          (latency; throughput: the largest sum of one device or link)
                T_w: as profiled; n_k, B_k: messages and bytes over k; s: seconds a byte takes; a: latency; c_d: mean seconds
                of a computation on d, queue_d: how many wait there. With exits T_w, n_k, B_k count by the share of
                requests that need them (cost.py), and the coordinator is told of the longest way instead of the mean
 (2) lambda_d <- lambda_d + g (x / (b_w T_w) - lambda_d)        for each sample x of work w on d       (g: `work_gain`)
 (3) b_w      <- b_w + h (x / (lambda_d T_w) - b_w)             what the profile missed of this work   (h: `bias_gain`)
 (4) s_k      <- s_k + g (x - s_k)       x: the point nearest to s_k of [busy - jitter, busy + jitter] / bytes, where busy =
                 seconds - rtt: a short sample says little, but "at least so fast" it says
                 g: `fall_gain` where the link got slower (x > s_k), else `rise_gain`
 (5) a_k      =  rtt / 2
 (6) A direction not measured for `stale_s` takes the factor s_k / (stated s_k) of the opposite one, if that is fresher.

The mean in (4) is one of seconds per byte, for that is what (1) is linear in; it falls quickly and rises slowly in the rate
by itself. Hysteresis: another plan is taken when it is better by `gain` in `decisions` comparisons running (one for each
report that says something new), or at once when it is better by `at_once`. A plan over a lost node is no candidate; while
the coordinator has moved on by itself (a node went silent) the devices of the plan left are doubted until heard again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.objective import Latency, Objective
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.protocol.effects import DeployEnded, LinkChanged, Observed, Preferred, Rerouted
from ecotone.protocol.message import LinkSample, NodeReport, WorkSample

__all__ = [
    "Controller", "ControllerSettings", "Decision", "Expect", "Keep", "LinkState", "Planned", "PlanningFailed", "Policy",
    "ProbeLink", "Replan", "Seen", "Switch", "Tick", "link_terms",
]  # fmt: skip

Pair = tuple[DeviceId, DeviceId]


# ---- what a controller sees ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed; the shell says so every `tick_s`, and before a request where it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """This set is resident now (with its epochs), as asked for by Replan or deployed by someone."""

    plans: PlanSet


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningFailed:
    """Replan came to nothing, and why; the resident plans stay."""

    reason: str


Seen = Observed | LinkChanged | Preferred | Rerouted | DeployEnded | Planned | PlanningFailed | Tick


# ---- what it answers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """The plan in force stays, and why."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """New requests take the resident plan `epoch` from now on."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """Ask the planner, off the hot path, with what was learnt: `now` has today's links, `profile` today's devices."""

    now: Cluster
    profile: Profile
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeLink:
    """Time the link from the asker to `peer` with `size_bytes` of padding."""

    peer: DeviceId
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """As things are now a request under `epoch` should take `expected_s`: the coordinator doubts runs by that."""

    epoch: int
    expected_s: float


Decision = Keep | Switch | Replan | ProbeLink | Expect


class Policy(Protocol):
    """Whoever chooses among resident plans: this controller, and the baselines of ecotone.policies."""

    @property
    def name(self) -> str: ...

    def handle(self, event: Seen, now_s: float) -> tuple[Decision, ...]:
        """What follows from `event`; `now_s` is the shell's monotonic clock."""
        ...

    def explanation(self) -> tuple[str, ...]:
        """The choice in force and why, one fact a line."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """Gains, thresholds and patience; times in seconds. Chosen on generated traces of other seeds than the shipped ones."""

    gain: float = 0.05  # by what share another plan must be better
    decisions: int = 2  # comparisons running
    at_once: float = 0.2  # better by so much: without waiting
    work_gain: float = 0.2
    bias_gain: float = 0.05
    fall_gain: float = 0.8
    rise_gain: float = 0.9
    jitter_s: float = 0.001
    stale_s: float = 2.0
    probe_s: float = 0.25  # how often an unused link is timed
    probe_busy_s: float = 0.02  # what a probe should occupy of the link
    probe_bytes: tuple[int, int] = (4096, 32768)
    hope: float = 4.0  # a link is probed where it would matter if it were so many times as fast as stated
    expect_change: float = 0.15  # the coordinator is told when the plan's predicted latency changed by so much
    drift: float = 0.25  # a device's factor moved by so much since planning: plan again
    replan_every_s: float = 10.0


# ---- what it knows ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LinkState:
    """A directed link: seconds a byte takes, latency, when it was last timed."""

    s_per_byte: float
    latency_s: float
    stated_s_per_byte: float
    timed_s: float = -math.inf

    @property
    def bytes_per_s(self) -> float:
        return 1.0 / self.s_per_byte


@dataclass(frozen=True, slots=True)
class _Work:
    """One piece of work of a plan."""

    device: DeviceId
    kind: str  # "compute", "encode", "decode"
    index: int
    seconds: float  # as profiled
    share: float = 1.0  # of requests that need it


@dataclass(frozen=True, slots=True)
class _Priced:
    """A resident plan, taken apart for equation 1."""

    plan: Plan
    label: str
    work: tuple[_Work, ...]
    links: tuple[tuple[Pair, float, float], ...]  # messages and bytes of each directed link
    devices: frozenset[DeviceId]
    longest: float = 1.0  # longest way over mean latency


def link_terms(plan: Plan, model: CostModel) -> tuple[tuple[Pair, float, float], ...]:
    """Messages and bytes that `plan` sends over each directed link, per request in the mean."""
    found: dict[Pair, tuple[float, float]] = {}
    for cost, transfer in zip(model.predict(plan).edges, plan.edges, strict=True):
        if not transfer.is_local:
            count, size = found.get((cost.source, cost.target), (0.0, 0.0))
            found[cost.source, cost.target] = (count + cost.share, size + cost.share * cost.size_bytes)
    return tuple((pair, count, size) for pair, (count, size) in found.items())


def _take_apart(plan: Plan, label: str, model: CostModel) -> _Priced:
    cost = model.predict(plan)
    work = [_Work(s.device, "compute", i, s.compute_s, s.share) for i, s in enumerate(cost.stages)]
    for i, transfer in enumerate(cost.edges):
        if transfer.source != transfer.target:
            work.append(_Work(transfer.source, "encode", i, transfer.encode_s, transfer.share))
            work.append(_Work(transfer.target, "decode", i, transfer.decode_s, transfer.share))
    devices = frozenset((plan.source, *plan.devices, plan.sink))
    longest = cost.longest_s / cost.latency_s if plan.exit_transfers and cost.latency_s > 0 else 1.0
    return _Priced(plan, label, tuple(work), link_terms(plan, model), devices, longest)


@dataclass(slots=True)
class _Device:
    factor: float = 1.0
    planned: float = 1.0  # when the resident plans were chosen
    queue: float = 0.0
    compute_s: float = 0.0  # mean of a computation


_REMEMBERED = 8
_LEAST_WORK_S = 2e-4  # shorter work says nothing of a device's speed
_FACTORS = (0.02, 50.0)


@dataclass(slots=True)
class _Streak:
    epoch: int = -1
    count: int = 0


class Controller:
    """Chooses among the plans of `plans` (with epochs, the first in force) on `cluster` as `profile` measured it."""

    name = "ecotone"

    def __init__(
        self,
        plans: PlanSet,
        graph: Graph,
        cluster: Cluster,
        profile: Profile,
        objective: Objective | None = None,
        settings: ControllerSettings | None = None,
        *,
        variants: Mapping[str, tuple[Graph, Profile]] | None = None,
    ) -> None:
        self.settings = settings or ControllerSettings()
        self.objective: Objective = objective or Latency()
        self._cluster, self._profile = cluster, profile
        self._models = {graph.content_hash(): CostModel(graph, cluster, profile)}
        for name, (other, measured) in (variants or {}).items():
            self._models[name] = CostModel(other, cluster, measured)
        model = self._models[graph.content_hash()]
        self.links: dict[Pair, LinkState] = {}
        for k in cluster.links:
            link = model.link(k.source, k.target) or k
            s = 1.0 / link.bandwidth_bytes_per_s
            self.links[k.source, k.target] = LinkState(s, link.latency_s, s)
        self._devices = {d.name: _Device() for d in cluster.devices}
        self._bias: dict[tuple[str, int, str, int], float] = {}  # graph, first block or cut, kind, ...: see _key
        self._priced: dict[int, _Priced] = {}
        self._lost: set[DeviceId] = set()
        self._doubted: set[DeviceId] = set()
        self._streak = _Streak()
        self._probed_s: dict[DeviceId, float] = {}
        self._told: dict[int, float] = {}  # what the coordinator expects of a plan
        self._replan_asked_s, self._is_planning = -math.inf, False
        self._history: deque[str] = deque(maxlen=_REMEMBERED)
        self.num_switches = 0
        self.asked = self.in_force = 0  # epochs: what we asked for, what the coordinator says
        self._take(plans)

    # ---- events -----------------------------------------------------------------------------------------------------

    def handle(self, event: Seen, now_s: float) -> tuple[Decision, ...]:
        """What follows from `event`: at most one of Keep, Switch, Replan for news, and probes."""
        match event:
            case Observed(peer=peer, report=report):
                if not self._learn(DeviceId(peer), report, now_s):
                    return ()
                return (*self._decide(now_s), *self._probes(now_s), *self._expect(now_s))
            case LinkChanged(peer=peer, state=state):
                (self._lost.add if state == "down" else self._lost.discard)(DeviceId(peer))
                return self._decide(now_s)
            case Preferred(epoch=epoch):
                return self._moved(epoch, now_s)
            case DeployEnded(epoch=epoch, error=error):
                if error:
                    self._priced.pop(epoch, None)
                return ()
            case Planned(plans=plans):
                self._is_planning = False
                self._take(plans)
                self._note(now_s, f"{len(self._priced)} plans resident")
                return self._decide(now_s)
            case PlanningFailed(reason=reason):
                self._is_planning = False
                self._note(now_s, f"planning failed: {reason}")
                return ()
            case Tick():
                return self._probes(now_s)
        return ()

    def _take(self, plans: PlanSet) -> None:
        labels = {s.plan.epoch: s.label for s in plans.standbys}
        resident = {p.epoch: p for p in plans.plans if p.graph_hash in self._models}
        self._priced = {
            epoch: _take_apart(plan, labels.get(epoch, ""), self._models[plan.graph_hash])
            for epoch, plan in resident.items()
        }
        self.asked = self.in_force = plans.primary.epoch
        self._streak = _Streak()
        for device in self._devices.values():
            device.planned = device.factor

    def _moved(self, epoch: int, now_s: float) -> tuple[Decision, ...]:
        """The coordinator has new requests run under `epoch`: as we asked, or because nodes went or came back."""
        before, self.in_force = self.in_force, epoch
        if epoch not in self._priced:
            return ()
        if epoch == self.asked:
            self._doubted -= self._priced[epoch].devices
            return ()
        if before in self._priced:
            self._doubted |= self._priced[self.asked if self.asked in self._priced else before].devices
            self._doubted -= self._priced[epoch].devices
        self._note(now_s, f"the coordinator took plan {epoch}: {self._short(epoch)}")
        return self._decide(now_s)

    # ---- learning ---------------------------------------------------------------------------------------------------

    def _learn(self, peer: DeviceId, report: NodeReport, now_s: float) -> bool:
        device = self._devices.get(peer)
        if device is None:
            return False
        device.queue += 0.5 * (max(0, report.num_queued - 1) - device.queue)  # one is being served
        for work in report.work:
            self._learn_work(peer, device, work)
        for link in report.links:
            self._learn_link((peer, DeviceId(link.peer)), link, now_s)
        return bool(report.work or report.links)

    def _learn_work(self, name: DeviceId, device: _Device, sample: WorkSample) -> None:
        """Equations 2 and 3."""
        priced = self._priced.get(sample.epoch)
        if priced is None or not sample.count:
            return
        for work in priced.work:
            if (work.device, work.kind, work.index) != (name, sample.work, sample.index):
                continue
            if sample.work == "compute":
                device.compute_s += 0.2 * (sample.seconds - device.compute_s) if device.compute_s else sample.seconds
            if work.seconds < _LEAST_WORK_S:
                return
            ratio, key = sample.seconds / work.seconds, _key(priced.plan, work)
            bias = self._bias.get(key, 1.0)
            keep = 1 - (1 - self.settings.work_gain) ** sample.count
            device.factor = _clamped(device.factor + keep * (ratio / bias - device.factor))
            keep = 1 - (1 - self.settings.bias_gain) ** sample.count
            self._bias[key] = _clamped(bias + keep * (ratio / device.factor - bias))
            return

    def _learn_link(self, pair: Pair, sample: LinkSample, now_s: float) -> None:
        """Equations 4 and 5."""
        state = self.links.get(pair)
        busy_s = sample.seconds - sample.rtt_s
        if state is None or sample.size_bytes <= 0 or not (math.isfinite(busy_s) and busy_s > 0):
            return
        jitter_s = self.settings.jitter_s
        low, high = max(0.0, busy_s - jitter_s) / sample.size_bytes, (busy_s + jitter_s) / sample.size_bytes
        x = min(max(state.s_per_byte, low), high)
        gain = self.settings.fall_gain if x > state.s_per_byte else self.settings.rise_gain
        state.s_per_byte += gain * (x - state.s_per_byte)
        state.timed_s = now_s
        if sample.rtt_s > 0:
            state.latency_s = sample.rtt_s / 2
        self._lost -= set(pair)
        self._doubted -= set(pair)

    def _link(self, pair: Pair, now_s: float) -> tuple[float, float]:
        """Seconds per byte and latency as believed now: equation 6."""
        state, opposite = self.links[pair], self.links.get((pair[1], pair[0]))
        if opposite is None or now_s - state.timed_s <= self.settings.stale_s or opposite.timed_s <= state.timed_s:
            return state.s_per_byte, state.latency_s
        return state.stated_s_per_byte * opposite.s_per_byte / opposite.stated_s_per_byte, opposite.latency_s

    # ---- deciding ---------------------------------------------------------------------------------------------------

    def value_s(self, epoch: int, now_s: float) -> float:
        """Equation 1 for a resident plan: seconds of latency or of bottleneck as corrected now."""
        priced = self._priced[epoch]
        return self._value(priced, {pair: self._link(pair, now_s) for pair, _, _ in priced.links})

    def _value(self, priced: _Priced, links: Mapping[Pair, tuple[float, float]]) -> float:
        busy: dict[DeviceId, float] = {}
        for work in priced.work:
            seconds = self._devices[work.device].factor * self._bias.get(_key(priced.plan, work), 1.0) * work.seconds
            busy[work.device] = busy.get(work.device, 0.0) + work.share * seconds
        if self.objective.name == "throughput":
            return max([*busy.values(), *(size * links[pair][0] for pair, _, size in priced.links)])
        waits = sum(self._devices[d].queue * self._devices[d].compute_s for d in busy)
        return sum(busy.values()) + sum(n * links[pair][1] + size * links[pair][0] for pair, n, size in priced.links) + waits

    @property
    def usable(self) -> tuple[int, ...]:
        """Epochs of the resident plans of which every device answers."""
        return tuple(self._usable())

    def _usable(self) -> Iterable[int]:
        away = self._lost | self._doubted
        return [epoch for epoch, priced in self._priced.items() if not priced.devices & away]

    def _decide(self, now_s: float) -> tuple[Decision, ...]:
        values = {epoch: self.value_s(epoch, now_s) for epoch in self._usable()}
        if not values:
            return ()
        best = min(values, key=lambda epoch: (values[epoch], epoch))
        present = self.asked
        if present not in values:
            return self._switch(best, now_s, "its nodes do not answer" if present in self._priced else "it is gone")
        gain = 1 - values[best] / values[present]
        if best == present or gain <= self.settings.gain:
            self._streak = _Streak()
            return self._replan_or_keep(now_s, f"no other plan is better by {self.settings.gain:.0%}")
        self._streak = _Streak(best, self._streak.count + 1 if self._streak.epoch == best else 1)
        if gain >= self.settings.at_once or self._streak.count >= self.settings.decisions:
            shown = f"{_ms(values[best])} instead of {_ms(values[present])}"
            return self._switch(best, now_s, f"{shown}, {gain:.0%} better")
        return self._replan_or_keep(now_s, f"plan {best} is {gain:.0%} better, seen {self._streak.count} times so far")

    def _switch(self, epoch: int, now_s: float, reason: str) -> tuple[Decision, ...]:
        before, self.asked, self._streak = self.asked, epoch, _Streak()
        self.num_switches += 1
        self._note(now_s, f"switch from plan {before} to plan {epoch}: {reason}")
        return (Switch(epoch=epoch, reason=reason),)

    def _replan_or_keep(self, now_s: float, reason: str) -> tuple[Decision, ...]:
        moved = [
            name
            for name, device in self._devices.items()
            if abs(math.log(device.factor / device.planned)) > math.log1p(self.settings.drift)
        ]
        if not moved or self._is_planning or now_s - self._replan_asked_s < self.settings.replan_every_s:
            return (Keep(reason=reason),)
        name = moved[0]
        device = self._devices[name]
        why = f"{name} takes {device.factor:.2f} times as long as profiled ({device.planned:.2f} when planned)"
        self._replan_asked_s, self._is_planning = now_s, True
        self._note(now_s, f"plan again: {why}")
        return (Replan(now=self.corrected_cluster(now_s), profile=self.corrected_profile(), reason=why),)

    def _probes(self, now_s: float) -> tuple[Decision, ...]:
        """Time links from the asker that the plan in force leaves idle, where some resident plan over them might win."""
        present = self._priced.get(self.in_force)
        if present is None:
            return ()
        present_s = self._value(present, {pair: self._link(pair, now_s) for pair, _, _ in present.links})
        idle = {pair for pair in self.links if pair[0] == present.plan.source} - {pair for pair, _, _ in present.links}
        wanted = {pair for p in self._priced.values() if self._could_win(p, present_s) for pair, _, _ in p.links}
        found: list[Decision] = []
        for pair in sorted(idle & wanted):
            state, (low, high) = self.links[pair], self.settings.probe_bytes
            if now_s - max(state.timed_s, self._probed_s.get(pair[1], -math.inf)) < self.settings.probe_s:
                continue
            self._probed_s[pair[1]] = now_s
            size = int(min(max(self.settings.probe_busy_s / state.s_per_byte, low), high))
            found.append(ProbeLink(peer=pair[1], size_bytes=size))
        return tuple(found)

    def _could_win(self, priced: _Priced, present_s: float) -> bool:
        """Whether the plan would be better than the present one on links as good as one may hope."""
        hoped = {p: (self.links[p].stated_s_per_byte / self.settings.hope, 0.0) for p, _, _ in priced.links}
        return self._value(priced, hoped) < present_s

    def _expect(self, now_s: float) -> tuple[Decision, ...]:
        """Tell the coordinator what the plan asked for should take, where that changed."""
        if self.objective.name != "latency" or self.asked not in self._priced:
            return ()
        seconds = self.value_s(self.asked, now_s) * self._priced[self.asked].longest
        told = self._told.get(self.asked)
        if told is not None and abs(math.log(seconds / told)) < math.log1p(self.settings.expect_change):
            return ()
        self._told[self.asked] = seconds
        return (Expect(epoch=self.asked, expected_s=seconds),)

    # ---- what it can tell -------------------------------------------------------------------------------------------

    def corrected_cluster(self, now_s: float) -> Cluster:
        """The cluster with links as believed now."""
        links = []
        for k in self._cluster.links:
            s, latency_s = self._link((k.source, k.target), now_s)
            links.append(replace(k, bandwidth_bytes_per_s=1.0 / s, latency_s=latency_s))
        return replace(self._cluster, links=tuple(links))

    def corrected_profile(self) -> Profile:
        """The profile with every time of a device multiplied by its factor; links are left to the cluster."""
        factor = {name: device.factor for name, device in self._devices.items()}
        segments = tuple(
            replace(s, median_s=s.median_s * factor[s.device]) if s.device in factor else s for s in self._profile.segments
        )
        return replace(self._profile, segments=segments, links=())

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The resident plans that it knows."""
        return tuple(p.plan for p in self._priced.values())

    def explanation(self, now_s: float | None = None) -> tuple[str, ...]:
        """The plan in force, what was learnt, what each resident plan would take, what was decided lately and why."""
        at_s = max((k.timed_s for k in self.links.values()), default=0.0) if now_s is None else now_s
        rows = [f"plan {self.in_force} in force: {self._short(self.in_force)}"]
        if self.asked != self.in_force:
            rows.append(f"plan {self.asked} is preferred, but its nodes do not answer")
        usable = set(self._usable())
        for epoch in sorted(self._priced, key=lambda e: self.value_s(e, at_s)):
            mark = "" if epoch in usable else ", a node of it does not answer"
            rows.append(f"plan {epoch} would take {_ms(self.value_s(epoch, at_s))}{mark}: {self._short(epoch)}")
        for name, device in self._devices.items():
            queued = f", {device.queue:.1f} wait" if device.queue >= 0.05 else ""
            rows.append(f"{name} takes {device.factor:.2f} times as long as profiled{queued}")
        for (one, other), state in self.links.items():
            s, latency_s = self._link((one, other), at_s)
            timed = f"timed {at_s - state.timed_s:.1f} s ago" if math.isfinite(state.timed_s) else "as stated"
            rows.append(f"{one} > {other}: {8e-6 / s:.3g} Mbit/s, {_ms(latency_s)}, {timed}")
        rows += self._breakpoints(at_s)
        return (*rows, *self._history)

    def _breakpoints(self, at_s: float) -> list[str]:
        """At what rates of all links together another resident plan would be better."""
        if self.in_force not in self._priced:
            return []
        usable = list(self._usable())
        rows = []
        for way, factors in (
            ("slower", [2.0 ** (i / 4) for i in range(1, 41)]),
            ("faster", [2.0 ** (-i / 4) for i in range(1, 41)]),
        ):
            for factor in factors:
                values = {e: self._value(self._priced[e], self._scaled(e, factor, at_s)) for e in usable}
                best = min(values, key=lambda e: values[e], default=self.in_force)
                if best != self.in_force and values[best] < values.get(self.in_force, math.inf) * (1 - self.settings.gain):
                    rows.append(f"with links {max(factor, 1 / factor):.2g} times {way} it would be plan {best}")
                    break
        return rows

    def _scaled(self, epoch: int, factor: float, at_s: float) -> dict[Pair, tuple[float, float]]:
        believed = {pair: self._link(pair, at_s) for pair, _, _ in self._priced[epoch].links}
        return {pair: (s * factor, latency_s) for pair, (s, latency_s) in believed.items()}

    def _short(self, epoch: int) -> str:
        return str(self._priced[epoch].plan) if epoch in self._priced else "not known here"

    def _note(self, now_s: float, text: str) -> None:
        self._history.append(f"{now_s:.2f} s: {text}")


def _key(plan: Plan, work: _Work) -> tuple[str, int, str, int]:
    """What equal work of different plans has in common: a stage its blocks, a codec run its position and name."""
    if work.kind == "compute":
        stage = plan.stages[work.index]
        return (f"{stage.device} {stage.executor}", stage.start, work.kind, stage.stop)
    transfer = plan.edges[work.index]
    return (f"{work.device} {transfer.codec}", transfer.position, work.kind, -1)


def _clamped(factor: float) -> float:
    return min(max(factor, _FACTORS[0]), _FACTORS[1])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
