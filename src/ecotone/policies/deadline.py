"""The most accurate resident plan that will be in time: the table solved again before each request.

`Controller` knows what each resident plan would take now (its equation 1); it would take the fastest. Where requests have a
deadline, a slower and more accurate plan may do as well. This policy lets a controller watch, and decides otherwise: of the
plans whose predicted latency, times `margin`, is within the deadline the most accurate one (of equals the faster), else the
fastest. No hysteresis: a switch among resident plans costs nothing. What the controller says beside its choice (probes,
expectations, plans to make anew) goes through.
"""

from __future__ import annotations

import math

from ecotone.cluster import Cluster
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.objective import Latency
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.protocol.controller import Controller, ControllerSettings, Decision, Keep, Planned, Seen, Switch, Tick
from ecotone.protocol.effects import LinkChanged, Preferred
from ecotone.units import EcotoneError

__all__ = ["DeadlinePolicy"]


class DeadlinePolicy:
    """Chooses among `plans` (with epochs, the first in force); `deadline_s` of every request."""

    name = "deadline"

    def __init__(
        self,
        plans: PlanSet,
        graph: Graph,
        cluster: Cluster,
        profile: Profile,
        deadline_s: float,
        *,
        margin: float = 1.1,
        settings: ControllerSettings | None = None,
    ) -> None:
        if not (math.isfinite(deadline_s) and deadline_s > 0 and margin >= 1):
            raise EcotoneError(f"deadline {deadline_s} s must be above zero and finite, and the margin at least 1")
        self.deadline_s, self.margin = deadline_s, margin
        self.controller = Controller(plans, graph, cluster, profile, Latency(), settings)
        self._model = CostModel(graph, cluster, profile)
        self.asked, self._reason, self._now_s = plans.primary.epoch, "the first", 0.0
        self._plans: dict[int, Plan] = {}
        self._loss: dict[int, float] = {}
        self._take(plans)

    def _take(self, plans: PlanSet) -> None:
        self._plans = {plan.epoch: plan for plan in plans.plans}
        self._loss = {epoch: self._model.predict(plan).loss_points for epoch, plan in self._plans.items()}
        self.asked = plans.primary.epoch

    def handle(self, event: Seen, now_s: float) -> tuple[Decision, ...]:
        """The controller's news, and a choice before each request and when nodes come or go."""
        self.controller.asked, self._now_s = self.asked, now_s
        found: list[Decision] = [d for d in self.controller.handle(event, now_s) if not isinstance(d, Switch | Keep)]
        if isinstance(event, Planned):
            self._take(event.plans)
        self._learn(event, now_s)
        if isinstance(event, Tick | LinkChanged | Preferred | Planned):
            chosen, self._reason = self._choose(now_s)
            if chosen is not None and chosen != self.asked:
                found.append(Switch(epoch=chosen, reason=self._reason))
                self.asked = chosen
            elif isinstance(event, Tick):
                found.append(Keep(reason=self._reason))
        self.controller.asked = self.asked
        return tuple(found)

    def _learn(self, event: Seen, now_s: float) -> None:
        """For those who remember more than the controller does."""

    def _choose(self, now_s: float) -> tuple[int | None, str]:
        """The epoch to take, None where no plan's nodes answer, and why."""
        values = {e: self.controller.value_s(e, now_s) for e in self.controller.usable if e in self._plans}
        if not values:
            return None, "no node answers"
        in_time = [e for e, value in values.items() if value * self.margin <= self.deadline_s]
        if not in_time:
            fastest = min(values, key=lambda e: (values[e], e))
            return fastest, f"none is in time, this is the fastest at {1e3 * values[fastest]:.3g} ms"
        best = min(in_time, key=lambda e: (self._loss[e], values[e], e))
        return best, f"{1e3 * values[best]:.3g} ms, in time with the least loss, {self._loss[best]:.3g} points"

    def explanation(self) -> tuple[str, ...]:
        """The choice and the controller's reasons behind it."""
        first = f"plan {self.asked} for a deadline of {1e3 * self.deadline_s:.3g} ms: {self._reason}"
        return (first, *self.controller.explanation(self._now_s))
