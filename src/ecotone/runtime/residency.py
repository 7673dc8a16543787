"""Which plans of a session are resident, which one new requests follow, and what led to it: told by effects.

The coordinator decides; this is the asker's picture of it, for callers and for `ecotone status --explain`. Epochs ascend
over all plan sets of a session. Plans of older sets are remembered for a while, since traces name them.
"""

from __future__ import annotations

import collections
import concurrent.futures
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ecotone.cluster import DeviceId
from ecotone.plan import Plan
from ecotone.planset import PlanSet
from ecotone.protocol import effects
from ecotone.protocol.drift import Drift, Returned
from ecotone.protocol.message import NodeId
from ecotone.runtime.switching import Switchover

__all__ = ["Answer", "Loads", "Residency"]

_REMEMBERED_PLANS, _NOTES = 512, 40

Answer = concurrent.futures.Future[str]
"""Ends with "" when a plan is ready on all its nodes, else with the reason why not."""
Loads = Sequence[Mapping[NodeId, float]]
"""By position in a plan set: the shares of nodes' processors that requests at the intended rate take."""


class Residency:
    """Safe for threads."""

    def __init__(self) -> None:
        self.loads: Mapping[str, tuple[tuple[NodeId, float], ...]] = {}  # declared, by identity of plan
        self._lock = threading.Lock()
        self._known: collections.OrderedDict[int, Plan] = collections.OrderedDict()
        self._labels: dict[int, str] = {}
        self._answers: dict[int, Answer] = {}
        self._coming: dict[int, PlanSet] = {}  # by the epoch of its first plan
        self._set: PlanSet | None = None
        self._ready: set[int] = set()
        self._preferred = -1
        self._leaving: set[NodeId] = set()
        self._epoch = 0
        self._notes: collections.deque[tuple[float, str]] = collections.deque(maxlen=_NOTES)
        self.num_rerouted = 0

    @property
    def known(self) -> Mapping[int, Plan]:
        """Plans by epoch, also of the last former sets."""
        with self._lock:
            return dict(self._known)

    def plan_of(self, epoch: int) -> Plan | None:
        return self._known.get(epoch)

    @property
    def current(self) -> tuple[Plan, ...]:
        """All plans of the set in force, ready or not."""
        with self._lock:
            return self._set.plans if self._set else ()

    @property
    def planset(self) -> PlanSet | None:
        """The set in force."""
        return self._set

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The ready plans of the set in force: the preferred one, then the others in order."""
        with self._lock:
            ready = [plan for plan in (self._set.plans if self._set else ()) if plan.epoch in self._ready]
            return tuple(sorted(ready, key=lambda plan: plan.epoch != self._preferred))

    def begin(self, plans: PlanSet, switch: Switchover) -> tuple[PlanSet, dict[int, Answer]]:
        """Number a set that is about to be deployed; the answers, by epoch, end as the machine tells."""
        with self._lock:
            plans = plans.with_epochs(self._epoch + 1)
            self._epoch += len(plans.plans)
            answers: dict[int, Answer] = {plan.epoch: concurrent.futures.Future() for plan in plans.plans}
            self._answers |= answers
            self._coming[plans.primary.epoch] = plans
            for plan in plans.plans:
                self._known[plan.epoch] = plan
            self._labels |= {
                standby.plan.epoch: f"{standby.label or 'standby'}, {standby.mode}" for standby in plans.standbys
            }
            while len(self._known) > _REMEMBERED_PLANS:
                self._labels.pop(self._known.popitem(last=False)[0], None)
        if switch.kind == "pause":
            self.note(f"switching with a pause: {switch.reason}")
        return plans, answers

    def told(self, effect: object) -> None:
        """An effect of the machine; others than those about plans are ignored."""
        match effect:
            case effects.DeployEnded(epoch=epoch, error=error):
                self._ended(epoch, error)
            case effects.Preferred(epoch=epoch, reason=reason):
                with self._lock:
                    before, self._preferred = self._preferred, epoch
                if before != epoch:
                    self.note(f"new requests follow plan {epoch}: {reason}")
            case effects.Rerouted(request=request, epoch=epoch, reason=reason):
                self.num_rerouted += 1
                self.note(f"request {request} runs again under plan {epoch}: {reason}")
            case effects.LinkChanged(peer=peer, state=state):
                self.note(f"node {peer}: {state}")
                if state == "restarted":
                    self.stay(peer)
            case Drift() | Returned():
                self.note(str(effect))

    def _ended(self, epoch: int, error: str) -> None:
        with self._lock:
            answer, coming = self._answers.pop(epoch, None), self._coming.pop(epoch, None)
            if error:
                self._ready.discard(epoch)
            else:
                self._ready.add(epoch)
                if coming is not None:
                    self._set, self._preferred = coming, epoch
                    self._ready &= {plan.epoch for plan in coming.plans} | self._pending()
        self.note(f"plan {epoch} is ready" if not error else f"plan {epoch} is left out: {error}")
        if answer is not None:
            answer.set_result(error)

    def _pending(self) -> set[int]:
        return {plan.epoch for plans in self._coming.values() for plan in plans.plans}

    def give_up(self, reason: str) -> None:
        """Nothing will be told any more."""
        with self._lock:
            answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer.set_result(reason)

    # ---- nodes that leave --------------------------------------------------------------------------------------------

    def uses(self, peer: NodeId) -> bool:
        return any(_takes_part(plan, peer) for plan in self.current)

    def is_leaving(self, peer: NodeId) -> bool:
        return peer in self._leaving

    def stay(self, peer: NodeId) -> None:
        """`peer` is (or was made) a node like any other again."""
        self._leaving.discard(peer)

    def without(self, peer: NodeId) -> PlanSet | None:
        """The set in force less the plans that need `peer` or another leaving node; None where none is left or lost."""
        with self._lock:
            if self._set is None or not any(_takes_part(plan, peer) for plan in self._set.plans):
                return None
            gone = {*self._leaving, peer}
            kept = [p for p in self._set.plans if p.epoch in self._ready and not any(_takes_part(p, g) for g in gone)]
            if not kept:
                return None
            self._leaving.add(peer)
            modes = {standby.plan.epoch: standby for standby in self._set.standbys}
        self.note(f"node {peer} is shutting down: going on with {len(kept)} plan(s) that do not need it")
        standbys = tuple(replace(modes[plan.epoch], plan=plan) for plan in kept[1:])
        return PlanSet(primary=kept[0], standbys=standbys)

    # ---- for people --------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Remember `text` for explanation()."""
        with self._lock:
            self._notes.append((time.time(), text))

    def explanation(self, factors: Iterable[str] = ()) -> list[str]:
        """The plan in force, the set in order, and what happened lately, for a person; `factors` come between."""
        with self._lock:
            current, ready, preferred = self._set, set(self._ready), self._preferred
            notes, labels = list(self._notes), dict(self._labels)
        if current is None:
            return ["no plan is in force"]
        lines = []
        for plan in current.plans:
            mark = "in force" if plan.epoch == preferred else "resident" if plan.epoch in ready else "not ready"
            label = labels.get(plan.epoch, "preferred")
            lines.append(f"plan {plan.epoch} ({label}, {mark}): {plan}")
        if self.num_rerouted:
            lines.append(f"{self.num_rerouted} requests ran again under another plan so far")
        lines += factors
        lines += [f"{time.strftime('%H:%M:%S', time.localtime(at))} {text}" for at, text in notes[-12:]]
        return lines


def _takes_part(plan: Plan, peer: NodeId) -> bool:
    return DeviceId(peer) in (*plan.devices, plan.sink, plan.source)
