"""A trained policy in charge: a small network names the plan of the next request, and the controller stands beside it.

Before each request the network sees what belief.py makes of the nodes' reports (rates and latency as the controller believes
them, factors of the machines as they were seen) and names the best action; actions whose plan is not resident, or of which a
node does not answer, are masked. Where an input lies outside what the policy was trained on, the planner's choice counts
instead (deadline.py) and the explanation says so; a network answers as confidently there as anywhere.

The file is a safetensors file (network.py); its header holds the plans that the outputs stand for, the ranges and what was
measured in training. Using one needs torch and safetensors only.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ecotone import schema
from ecotone.cluster import Cluster, DeviceId
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planset import PlanSet, Standby
from ecotone.policies.belief import FEATURES, HIGHEST, LOWEST, Belief, Ranges
from ecotone.policies.deadline import DeadlinePolicy
from ecotone.policies.network import mlp_of, read_file, tensors_of, write_file
from ecotone.profile import Profile
from ecotone.protocol.controller import Seen
from ecotone.protocol.effects import Observed
from ecotone.protocol.message import NodeReport
from ecotone.units import EcotoneError

__all__ = ["LearnedPolicy", "Trained", "TrainedAbout", "load_trained", "save_trained"]

SCHEMA, VERSION = "ecotone.policy.ondemand", 1
TOLERANCE = 0.1  # of a range, beyond its ends
_CHECKED = ("rate", "round_trip", "device_load", "server_load", "deadline")
_LEAST_WORK_S = 2e-4  # shorter work says nothing of a machine's speed


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedAbout:
    """What a policy chooses among, and what for. `measured`: figures of its training, by name; for people."""

    name: str
    graph_hash: str
    device: DeviceId
    server: DeviceId
    plans: tuple[Plan, ...]
    ranges: Ranges
    features: tuple[str, ...]
    scenarios: tuple[str, ...]
    seed: int
    measured: dict[str, float] = field(default_factory=dict)
    about: str = ""

    def __post_init__(self) -> None:
        wrong = []
        if self.features != FEATURES:
            wrong.append(f"features {', '.join(self.features)[:200]} are not those of this Ecotone; train it again")
        if not self.plans or any(plan.graph_hash != self.graph_hash for plan in self.plans):
            wrong.append("needs plans, all of the model that it names")
        if len({plan.identity() for plan in self.plans}) != len(self.plans):
            wrong.append("names a plan twice")
        schema.check("trained policy", wrong)


@dataclass(frozen=True, slots=True)
class Trained:
    """A policy from a file: the network's outputs stand for `about.plans`, the largest is the choice."""

    about: TrainedAbout
    network: nn.Sequential

    def plan_set(self) -> PlanSet:
        """All its plans, in their order."""
        first, *others = self.about.plans
        return PlanSet(primary=first, standbys=tuple(Standby(plan=plan, label="learned") for plan in others))

    def policy(self, plans: PlanSet, graph: Graph, cluster: Cluster, profile: Profile, deadline_s: float) -> LearnedPolicy:
        """This policy in charge of resident `plans`."""
        return LearnedPolicy(self, plans, graph, cluster, profile, deadline_s)


def save_trained(path: str | os.PathLike[str], network: nn.Sequential, about: TrainedAbout) -> None:
    """Write a policy; raises EcotoneError."""
    write_file(path, tensors_of(network), about, SCHEMA, VERSION)


def load_trained(path: str | os.PathLike[str]) -> Trained:
    """Read what save_trained wrote; raises EcotoneError or SchemaError for anything else."""
    about, tensors = read_file(path, TrainedAbout, SCHEMA, VERSION)
    return Trained(about, mlp_of(tensors, len(FEATURES), len(about.plans), f"policy {path}"))


class LearnedPolicy(DeadlinePolicy):
    """Runs `trained` on `plans`; raises EcotoneError where it is of another model or none of its plans is resident."""

    name = "learned"

    def __init__(
        self, trained: Trained, plans: PlanSet, graph: Graph, cluster: Cluster, profile: Profile, deadline_s: float
    ) -> None:
        about = trained.about
        if about.graph_hash != graph.content_hash():
            raise EcotoneError(f"policy {about.name} was trained for another model (graph hash differs); train it again")
        links = {(k.source, k.target): k for k in cluster.links}
        if about.server != about.device and (about.device, about.server) not in links:
            raise EcotoneError(f"policy {about.name} chooses between {about.device} and {about.server}; no such link here")
        self._trained, self._pair = trained, (about.device, about.server)
        self._number = {plan.identity(): i for i, plan in enumerate(about.plans)}
        stated = links.get(self._pair)
        rate = stated.bandwidth_bytes_per_s if stated else about.ranges.rate_bytes_per_s[1]
        self._belief = Belief(1, rate, stated.latency_s if stated else 0.0)
        self._row, self._queue, self._timed_s, self._notice = np.zeros(1, dtype=np.intp), 0.0, -math.inf, ""
        super().__init__(plans, graph, cluster, profile, deadline_s)

    def _take(self, plans: PlanSet) -> None:
        super()._take(plans)
        self._epochs = {self._number[p.identity()]: p.epoch for p in plans.plans if p.identity() in self._number}
        if not self._epochs:
            raise EcotoneError(f"policy {self._trained.about.name}: none of its plans is resident; deploy those of its file")
        self._seconds = {
            (epoch, i): (stage.device, stage.compute_s)
            for epoch, plan in self._plans.items() for i, stage in enumerate(self._model.predict(plan).stages)
        }  # fmt: skip

    def _learn(self, event: Seen, now_s: float) -> None:
        if not isinstance(event, Observed):
            return
        self._learn_work(event.report)
        if DeviceId(event.peer) == self._trained.about.device:
            self._queue = float(max(0, event.report.num_queued - 1))
        state = self.controller.links.get(self._pair)
        if state is not None and state.timed_s > self._timed_s:
            self._belief.link(self._row, state.bytes_per_s, state.latency_s, now_s)
            self._timed_s = state.timed_s

    def _learn_work(self, report: NodeReport) -> None:
        for work in report.work:
            device, seconds = self._seconds.get((work.epoch, work.index), (DeviceId(""), 0.0))
            if work.work == "compute" and seconds >= _LEAST_WORK_S and work.seconds > 0:
                ratio = work.seconds / seconds
                if device == self._trained.about.device:
                    self._belief.loads(self._row, device=ratio)
                else:
                    self._belief.loads(self._row, server=ratio)

    def _choose(self, now_s: float) -> tuple[int | None, str]:
        usable = set(self.controller.usable)
        epochs = {number: epoch for number, epoch in self._epochs.items() if epoch in usable}
        one = np.ones(1)
        raw = self._belief.features(
            self._trained.about.ranges, now_s * one, self.deadline_s * one, self._queue * one, 0.0 * one
        )
        self._notice = self._outside(raw[0]) if epochs else "none of its plans can run now"
        if self._notice:
            chosen, why = super()._choose(now_s)
            return chosen, f"{self._notice}; the planner's choice: {why}"
        with torch.inference_mode():
            outputs = self._trained.network(torch.from_numpy(np.clip(raw, LOWEST, HIGHEST)))[0].numpy()
        best = max(epochs, key=lambda number: (outputs[number], -number))
        return epochs[best], f"action {best} of policy {self._trained.about.name}"

    def _outside(self, features: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> str:
        """Which input is beyond what the policy was trained on; "" where none is."""
        for name in _CHECKED:
            value = float(features[FEATURES.index(name)])
            if not -TOLERANCE <= value <= 1 + TOLERANCE:
                return f"{name.replace('_', ' ')} is outside the trained range ({value:.2f} of it)"
        return ""

    def explanation(self) -> tuple[str, ...]:
        """The choice, a notice where the policy is not in charge, and what the controller believes."""
        about = self._trained.about
        notice = (f"policy {about.name} is not in charge: {self._notice}",) if self._notice else ()
        first, *rest = super().explanation()
        return (first, *notice, f"{len(self._epochs)} of its {len(about.plans)} plans are resident", *rest)
