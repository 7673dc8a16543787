"""What to do when a device is lost: repartition, leave at an earlier exit, or skip round it, by the user's weights.

CONTINUER (arXiv:2206.05267). Every option has an accuracy, a latency and a downtime. With each scaled to [0, 1] over the
options at hand, x' = (x - least) / (greatest - least), 0 where all are equal,

 (1) score = w_a accuracy' - w_l latency' - w_d downtime'           the option of greatest score; ties go to the first

in O(options). What is slow is done before, as in the paper: `Outlook` holds the tables of every model and, once prepared,
the best plan of each without each device; unprepared, one masked programme per model remains at the loss. The downtime
counts what has to be loaded (the trap of the paper):

 (2) downtime  = notice + reroute                                         where every stage of the plan is resident
               = notice + reroute + choose + max over devices d of  alpha + new bytes / beta(source, d) + warm * new stages
                 otherwise; what the source itself lacks is on its disk: warm alone

No state machine: the coordinator prefers the chosen plan, or deploys it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.plan import Plan, Stage
from ecotone.planner.expectation import Detection
from ecotone.planner.failures import Element
from ecotone.planner.objective import Asked, Latency, PlannerError
from ecotone.planner.standbys import Ground, Variant
from ecotone.profile import Profile

__all__ = ["Loading", "Option", "OptionWeights", "Outlook", "Scored", "score_options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionWeights:
    """How much accuracy, latency and downtime count; only their ratios matter."""

    accuracy: float = 1.0
    latency: float = 1.0
    downtime: float = 1.0

    def __post_init__(self) -> None:
        values = (self.accuracy, self.latency, self.downtime)
        if not all(math.isfinite(v) and v >= 0 for v in values) or not any(values):
            raise PlannerError(f"weights {values}: must be finite, not negative, and one of them above zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to go on: points of accuracy (100: the whole model), seconds of latency, seconds without an answer."""

    name: str
    plan: Plan
    accuracy_points: float
    latency_s: float
    downtime_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """An option and its score (equation 1)."""

    option: Option
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Seconds to choose a plan, and to compile and warm one stage that is not resident."""

    choose_s: float = 0.02
    warm_s: float = 0.5


def score_options(options: Sequence[Option], weights: OptionWeights) -> tuple[Scored, ...]:
    """Equation 1 for every option, the best first; raises PlannerError where there is none."""
    if not options:
        raise PlannerError("nothing is left to run: no plan and no variant works without the lost device")
    accuracy = _scaled([o.accuracy_points for o in options])
    latency = _scaled([o.latency_s for o in options])
    downtime = _scaled([o.downtime_s for o in options])
    scores = [
        weights.accuracy * a - weights.latency * b - weights.downtime * c
        for a, b, c in zip(accuracy, latency, downtime, strict=True)
    ]
    found = [Scored(option=o, score=s) for o, s in zip(options, scores, strict=True)]
    return tuple(sorted(found, key=lambda s: -s.score))


def _scaled(values: Sequence[float]) -> list[float]:
    least, span = min(values), max(values) - min(values)
    return [(v - least) / span if span > 0 else 0.0 for v in values]


class Outlook:
    """The tables of the model and its variants on a cluster, made before anything fails."""

    def __init__(
        self, graph: Graph, cluster: Cluster, profile: Profile, variants: Sequence[Variant] = (), *,
        detection: Detection | None = None, loading: Loading | None = None,
    ) -> None:  # fmt: skip
        self.cluster, self.detection, self.loading = cluster, detection or Detection(), loading or Loading()
        self._elements = tuple(Element(devices=(d.name,), mtbf_s=1.0, mttr_s=1.0) for d in cluster.devices)
        wanted, asked = Latency(), Asked.of(())

        def ground(own: Graph, measured: Profile) -> Ground:
            return Ground(own, cluster, measured, wanted, asked, self._elements, math.inf)

        main = ground(graph, profile)
        others = [(v.name, v.loss_points, ground(v.graph, v.profile)) for v in variants]
        self._grounds = [("repartition", 0.0, main), *others]

    def prepare(self) -> None:
        """Plan for the loss of every device in turn, so that `options` only looks up."""
        for index, device in enumerate(self.cluster.devices):
            if device.name not in (self.cluster.source, self.cluster.sink):
                for _, _, ground in self._grounds:
                    ground.best(frozenset((index,)))

    def options(self, lost: DeviceId, resident: Collection[Plan] = ()) -> tuple[Option, ...]:
        """The best plan of every model without `lost`, and every plan of `resident` that does not need it; none may be left.

        Raises PlannerError for a device that is not in the cluster, or is its source or sink.
        """
        names = [d.name for d in self.cluster.devices]
        if lost not in names or lost in (self.cluster.source, self.cluster.sink):
            raise PlannerError(f"{lost}: is source or sink, or no device; others are {', '.join(names)}")
        down, loaded = frozenset((names.index(lost),)), {(p.graph_hash, s) for p in resident for s in p.stages}
        found = []
        for name, loss, ground in self._grounds:
            best = ground.best(down).plan
            plans = [] if best is None else [(name, best)]
            plans += [
                (f"{name} (resident)" if name != "repartition" else "standby", p)
                for p in resident
                if p.graph_hash == ground.model.profile.graph_hash and lost not in (p.source, *p.devices, p.sink)
            ]
            unlike = {plan: label for label, plan in reversed(plans)}
            found += [self._option(label, plan, loss, ground.model, loaded) for plan, label in unlike.items()]
        return tuple(o for o in found if math.isfinite(o.downtime_s))

    def _option(self, name: str, plan: Plan, loss: float, model: CostModel, loaded: Collection[tuple[str, Stage]]) -> Option:
        cost = model.predict(plan)
        return Option(
            name=name, plan=plan, accuracy_points=100.0 - loss - cost.accuracy_loss_points, latency_s=cost.latency_s,
            downtime_s=self._downtime(plan, model, loaded),
        )  # fmt: skip

    def _downtime(self, plan: Plan, model: CostModel, loaded: Collection[tuple[str, Stage]]) -> float:
        """Equation 2."""
        notice = self.detection.crash_s + self.detection.reroute_s
        new = [s for s in plan.stages if (plan.graph_hash, s) not in loaded]
        if not new:
            return notice
        loading = max(self._load_s(plan.source, d, new, model) for d in {s.device for s in new})
        return notice + self.loading.choose_s + loading

    def _load_s(self, source: DeviceId, device: DeviceId, new: Iterable[Stage], model: CostModel) -> float:
        own = [s for s in new if s.device == device]
        warm = self.loading.warm_s * len(own)
        if device == source:
            return warm
        link = model.link(source, device)
        if link is None:
            return math.inf  # the asker hands out the weights
        return warm + link.transfer_s(sum(model.graph.segment_parameter_bytes(s.start, s.stop) for s in own))
