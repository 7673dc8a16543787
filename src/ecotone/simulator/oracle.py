"""When a request must be answered: a bound from the scene alone, which knows nothing of the protocol but its patience.

A plan is *healthy* while all its processes live and run, every link that it needs (between the asker and each of its nodes,
and between neighbours) carries whole frames both ways, and nothing makes its work fail; after a restart, once the process
could have been told and have loaded its part. A request submitted at s must be answered by

    min over the plans of the set of  (start of the first healthy stretch of at least NEED after s) + NEED
    NEED = N S                  N requests that may be under way, S seconds of the slowest plan alone, slow devices included;
    NEED = N S + RECOVERY + 1.5 S    where a plan of the set was in trouble lately: what was under way is missed and repeated

and in an ordered session not before those ahead of it have ended. RECOVERY is what a reader may expect of doubt, ping and
reconnection; it is an assumption of this oracle, not read from the protocol. While several sets of plans may
be in force (a deployment under way), each must have a healthy plan. The bound errs on the late side: some requests that
could be answered are not counted as possible, none that could not are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ecotone.plan import Plan
from ecotone.planset import PlanSet
from ecotone.simulator import faults as ft
from ecotone.simulator.faults import Fault
from ecotone.simulator.scene import Scene, SceneLink, predicted_s, sets_of
from ecotone.simulator.world import FRAME_BYTES

__all__ = ["RECOVERY_S", "Oracle"]

RECOVERY_S = 1.0
_LETTER_BYTES = 640
_FRAMES = 6  # control frames beside each body: acknowledgements, probes, a report
Interval = tuple[float, float]


@dataclass(slots=True)
class _State:
    """What is wrong now, and since when, while the script is read."""

    bad: list[Interval]
    since_s: dict[str, float]

    def begin(self, why: str, at_s: float) -> None:
        self.since_s.setdefault(why, at_s)

    def end(self, why: str, at_s: float) -> None:
        start_s = self.since_s.pop(why, None)
        if start_s is not None:
            self.bad.append((start_s, at_s))

    def close(self) -> list[Interval]:
        return self.bad + [(start_s, math.inf) for start_s in self.since_s.values()]


class Oracle:
    """Times are seconds since the first submission, as in the scene's faults."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.sets = sets_of(scene)
        self._nodes = {d: _State([], {}) for d in scene.devices}
        self._links = {(k.source, k.target): _State([], {}) for k in scene.links}
        self._spoiled = {d: _State([], {}) for d in scene.devices}  # its work fails, or what it sends is garbage
        self._disk = _State([], {})
        self._factor = dict.fromkeys(scene.devices, 1.0)
        self._late_s = 0.0
        self._slowed: dict[tuple[str, str], float] = {}  # least mean rate that a fault gives a link, bytes per second
        self._prepare_s = max((f.takes_s for f in scene.faults if isinstance(f, ft.SetPrepare)), default=0.0)
        restarts = any(isinstance(f, ft.RestartNode) for f in scene.faults)
        self._reload_s = 2 * self._prepare_s if restarts else 0.0  # who restarted behind a cut loads once it is healed
        for fault in sorted(scene.faults, key=lambda f: f.at_s):
            self._read(fault)
        self.node_bad = {d: state.close() for d, state in self._nodes.items()}
        self.link_bad = {pair: state.close() for pair, state in self._links.items()}
        self.spoiled = {d: state.close() for d, state in self._spoiled.items()}
        self.disk_full = self._disk.close()
        every = [plan for group in self.sets for plan in group.plans]
        self.slowest_s = max(self._alone_s(plan, scene) for plan in every)
        open_loop = any(at_s >= 0 for at_s, _ in scene.asks)
        self.num_at_once = len(scene.asks) if open_loop else min(scene.in_flight, len(scene.asks))
        slow = replace(scene, links=tuple(replace(k, rate_bytes_per_s=self._least_rate(k)) for k in scene.links))
        slowest_s = max(self._alone_s(plan, slow) for plan in every)
        self.need_s = RECOVERY_S + 2 * self.num_at_once * slowest_s
        self._bad = {plan.epoch: self._merged(plan) for plan in every}
        spoiled = [interval for intervals in self.spoiled.values() for interval in intervals]
        self._trouble = [i for intervals in self._bad.values() for i in intervals] + spoiled
        self._trouble += [(d.at_s, d.at_s) for d in scene.deployments[1:]]

    # ---- the script -------------------------------------------------------------------------------------------------

    def _read(self, fault: Fault) -> None:
        at_s = fault.at_s
        match fault:
            case ft.KillNode(device=device):
                self._nodes[device].begin("dead", at_s)
            case ft.RestartNode(device=device):
                if "dead" in self._nodes[device].since_s:
                    self._nodes[device].end("stalled", at_s)
                    self._nodes[device].end("dead", at_s + self._redeploy_s(device))
            case ft.StallNode(device=device):
                self._nodes[device].begin("stalled", at_s)
            case ft.ResumeNode(device=device):
                self._nodes[device].end("stalled", at_s)
            case ft.SlowDevice(device=device, factor=factor):
                self._factor[device] = max(self._factor[device], factor)
            case ft.SpoilWork(device=device, kinds=kinds):
                (self._spoiled[device].begin if kinds else self._spoiled[device].end)("work", at_s)
            case ft.GarbleNode(device=device, is_garbling=is_garbling):
                (self._spoiled[device].begin if is_garbling else self._spoiled[device].end)("garbage", at_s)
            case ft.SetPrepare(device=device, error=error) if error:  # who loads again (a restart, of the asker too) fails
                self._nodes[device].begin("refuses", at_s)
            case ft.FillDisk(is_full=is_full):
                (self._disk.begin if is_full else self._disk.end)("full", at_s)
            case _:
                self._read_link(fault)

    def _read_link(self, fault: Fault) -> None:
        at_s = fault.at_s
        match fault:
            case ft.CutLink(source=one, target=other):
                self._links[one, other].begin("cut", at_s)
                self._links[other, one].begin("cut", at_s)
            case ft.CutOneWay(source=one, target=other):
                self._links[one, other].begin("cut", at_s)
            case ft.HealLink(source=one, target=other):
                self._links[one, other].end("cut", at_s + self._reload_s)
                self._links[other, one].end("cut", at_s + self._reload_s)
            case ft.Partition(devices=inside):
                for pair, state in self._links.items():
                    if (pair[0] in inside) != (pair[1] in inside):
                        state.begin("cut", at_s)
            case ft.HealAll():
                for state in self._links.values():
                    state.end("cut", at_s + self._reload_s)
            case ft.SpoilLink(source=one, target=other):
                self._late_s = max(self._late_s, fault.late_s)
                lossy = fault.drop + fault.truncate > 0
                (self._links[one, other].begin if lossy else self._links[one, other].end)("lossy", at_s)
            case ft.FollowTrace(source=one, target=other):
                self._links[one, other].begin("trace", at_s)
                self._slow((one, other), fault.trace.mean_bytes_per_s)
            case ft.SetLink(link=link):
                self._links[link.source, link.target].begin("trace", at_s)
                self._slow((link.source, link.target), link.bandwidth_bytes_per_s)

    def _slow(self, pair: tuple[str, str], bytes_per_s: float) -> None:
        """A link that carries nothing is as good as cut: patience bounds what waits for it."""
        if bytes_per_s > 0:
            self._slowed[pair] = min(self._slowed.get(pair, math.inf), bytes_per_s)

    def _least_rate(self, link: SceneLink) -> float:
        return min(link.rate_bytes_per_s, self._slowed.get((link.source, link.target), math.inf))

    def _redeploy_s(self, device: str) -> float:
        """A restarted process is told its plans and loads them; the asker tells everyone."""
        scene = self.scene
        letters = 2 + sum(len(d.plans) for d in scene.deployments)
        others = [d for d in scene.devices if d != scene.asker] if device == scene.asker else [device]
        links = [scene.link(*pair) for d in others for pair in ((scene.asker, d), (d, scene.asker))]
        talk_s = max((4 * k.latency_s + letters * _LETTER_BYTES / k.rate_bytes_per_s for k in links), default=0.0)
        return talk_s + 2 * self._prepare_s

    # ---- plans ------------------------------------------------------------------------------------------------------

    def _alone_s(self, plan: Plan, scene: Scene) -> float:
        """Seconds of one request alone with the links of `scene`."""
        factor = max(self._factor[d] for d in (plan.source, *plan.devices))
        control_s = 0.0
        for transfer in plan.edges:
            if not transfer.is_local:
                for pair in ((transfer.source, transfer.target), (transfer.target, transfer.source)):
                    link = scene.link(*pair)
                    control_s += link.latency_s + _FRAMES * FRAME_BYTES / link.rate_bytes_per_s + self._late_s
        return factor * predicted_s(scene, plan) + control_s

    def _merged(self, plan: Plan) -> list[Interval]:
        """When the plan is not healthy, in order, without overlap."""
        asker, nodes = plan.source, dict.fromkeys((plan.source, *plan.devices))
        pairs = {(asker, d) for d in nodes if d != asker} | {(t.source, t.target) for t in plan.edges if not t.is_local}
        bad = [interval for node in nodes for interval in self.node_bad[node]]
        for one, other in pairs:
            bad += self.link_bad[one, other] + self.link_bad[other, one]
        merged: list[Interval] = []
        for start_s, stop_s in sorted(bad):
            if merged and start_s <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop_s, merged[-1][1]))
            else:
                merged.append((start_s, stop_s))
        return merged

    def _first_stretch_s(self, plan: Plan, from_s: float, need_s: float) -> float:
        """When a healthy stretch of `need_s` that begins at or after `from_s` is over; infinite where there is none."""
        for start_s, stop_s in self._bad[plan.epoch]:
            if start_s >= from_s + need_s:
                break
            if stop_s > from_s:
                from_s = stop_s
        by_s = from_s + need_s
        for device in dict.fromkeys((plan.source, *plan.devices)):
            if any(start_s < by_s for start_s, _ in self.spoiled[device]):
                return math.inf
        return by_s

    def _set_by_s(self, group: PlanSet, from_s: float, num: int) -> float:
        need_s = num * self.slowest_s
        quiet_s = from_s + need_s
        if any(start_s < quiet_s and stop_s + RECOVERY_S > from_s for start_s, stop_s in self._trouble):
            need_s += RECOVERY_S + 1.5 * self.slowest_s  # what was under way is missed, after that long, and sent again
        return min(self._first_stretch_s(plan, from_s, need_s) for plan in group.plans)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def answered_by(self, submitted_s: Mapping[int, float]) -> dict[int, float]:
        """By when each submitted request must have its result; infinite where nothing is promised."""
        by: dict[int, float] = {}
        over: list[float] = []  # by when those ahead have ended
        order = sorted(submitted_s, key=lambda n: (submitted_s[n], n))
        for number in order:
            asked_s, limit_s = submitted_s[number], self.scene.asks[number][1]
            at_s = asked_s + (self.scene.record_s if self.scene.record else 0.0)  # it begins once it is recorded
            num_ahead = sum(end_s > at_s for end_s in over) + 1
            by_s = self._by_s(at_s, num_ahead)
            num = num_ahead + sum(at_s <= submitted_s[n] < by_s for n in order) - 1
            by_s = self._by_s(at_s, max(num, num_ahead))
            if self.scene.ordered:
                by_s = max(by_s, max(over, default=0.0) + self.slowest_s)
            is_possible = by_s <= asked_s + limit_s if limit_s >= 0 else self._is_patient(at_s, by_s)
            by[number] = by_s if is_possible else math.inf
            over.append(by_s if is_possible else at_s + limit_s if limit_s >= 0 else math.inf)
        return by

    def _is_patient(self, at_s: float, by_s: float) -> bool:
        """Whether patience for requests without a deadline lasts: some plan of each set is healthy, or soon again."""
        if by_s == math.inf:
            return False
        patience_s = self.scene.patience_s - RECOVERY_S
        for group in self.sets:
            now_s = at_s
            while now_s < by_s:
                next_s = min(self._healthy_from_s(plan, now_s) for plan in group.plans)
                if next_s > now_s + patience_s:
                    return False
                now_s = next_s + 0.1
        return True

    def _healthy_from_s(self, plan: Plan, now_s: float) -> float:
        return next((stop_s for start_s, stop_s in self._bad[plan.epoch] if start_s <= now_s < stop_s), now_s)

    def _by_s(self, at_s: float, num: int) -> float:
        by_s = self._set_by_s(self.sets[0], at_s, num)
        for deployment, group in zip(self.scene.deployments[1:], self.sets[1:], strict=True):
            if deployment.at_s <= by_s:
                by_s = max(by_s, self._set_by_s(group, max(at_s, deployment.at_s), num))
        if any(start_s < by_s and stop_s > at_s for start_s, stop_s in self.disk_full):
            return math.inf
        return by_s

    def ends_by(self, submitted_s: Mapping[int, float]) -> dict[int, float]:
        """By when each submitted request must have ended one way or the other; infinite while the asker stays away."""
        last_s = max([f.at_s for f in self.scene.faults] + [d.at_s for d in self.scene.deployments])
        gone = self.node_bad[self.scene.asker]
        ends: dict[int, float] = {}
        for number, at_s in submitted_s.items():
            limit_s = self.scene.asks[number][1]
            end_s = at_s + limit_s + 1.0 if limit_s >= 0 else self.settled_s(max(last_s, at_s))
            for start_s, stop_s in sorted(gone):
                if start_s < end_s and stop_s + 1.0 > end_s:
                    end_s = stop_s + 1.0
            ends[number] = end_s
        return ends

    def settled_s(self, from_s: float) -> float:
        """By when what has no deadline has ended after the last fault at `from_s`, links as slow as faults make them."""
        return from_s + 3 * self.scene.patience_s + 2 * self.need_s
