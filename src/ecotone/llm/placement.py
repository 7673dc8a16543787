"""Where the stages of a driver are, and where they go when machines are lost, leave in order, or come.

`replan` decides (a planner, or decoding/succession.py), `Pipeline` loads; this says which machines may be chosen. A machine
that was lost without its link going down (it stalls, or its frames do not come through) may not, for a while that doubles
from loss to loss; nor one that has said that it is leaving. What was lost while others were being loaded is planned anew at
once. Petals bans servers likewise (arXiv 2209.01188).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ecotone.cluster import Cluster, DeviceId
from ecotone.decoding.succession import succeed
from ecotone.llm.pipeline import Pipeline, Stages
from ecotone.llm.service import GenerationService
from ecotone.llmplan import LlmPlan
from ecotone.runtime.errors import NodeUnreachable

__all__ = ["Placement", "Replan"]

Replan = Callable[[LlmPlan, frozenset[DeviceId]], LlmPlan]
"""(plan in force, devices that may be used) -> the plan to go on with; raises EcotoneError where there is none."""
_BAN_S, _MOST_BAN_S = 15.0, 240.0


class Placement:
    """For one driver; from any thread. `replan` None: decoding/succession.py, which moves lost stages and no others."""

    def __init__(
        self, service: GenerationService, pipeline: Pipeline, plan: LlmPlan, cluster: Cluster, replan: Replan | None
    ):  # fmt: skip
        self.pipeline, self.is_planned = pipeline, replan is not None
        self._service, self._first_plan, self._cluster = service, plan, cluster
        self._planner = replan
        self._lock = threading.Lock()
        self._banned: dict[str, tuple[float, float]] = {}  # until when, and for how long that was
        self._leaving: set[str] = set()
        self._new: set[str] = set()  # other processes than before, whose former shards were not called lost yet

    @property
    def plan(self) -> LlmPlan:
        """The plan in force."""
        return self.pipeline.plan or self._first_plan

    def usable(self) -> frozenset[DeviceId]:
        """Devices of the cluster that answer and may be chosen now."""
        now_s = time.monotonic()
        peers = self._service.peers()
        with self._lock:
            out = self._leaving | {node for node, (until_s, _) in self._banned.items() if until_s > now_s}
        return frozenset(device.name for device in self._cluster.devices if device.name in peers and device.name not in out)

    # ---- what becomes of machines ----------------------------------------------------------------------------------------

    def came(self, node: str) -> None:
        """A node's link is up (again)."""
        with self._lock:
            self._banned.pop(node, None)
            self._leaving.discard(node)

    def began_anew(self, node: str) -> None:
        """A node is another process than before."""
        self.came(node)
        with self._lock:
            self._new.add(node)

    def leaves(self, node: str) -> None:
        """A node wants to go."""
        with self._lock:
            self._leaving.add(node)

    def lost(self, nodes: tuple[str, ...]) -> None:
        """The engine counts these nodes' stages as lost."""
        now_s = time.monotonic()
        with self._lock:
            for node in nodes:
                until_s, length_s = self._banned.get(node, (0.0, _BAN_S / 2))
                if node not in self._new and until_s <= now_s:
                    length_s = min(2 * length_s, _MOST_BAN_S)
                    self._banned[node] = now_s + length_s, length_s
                self._new.discard(node)
        self.pipeline.lose(nodes)
        for node in nodes:
            self._service.abandon(node, "it was lost")

    # ---- stages ----------------------------------------------------------------------------------------------------------

    def replanned(self) -> LlmPlan:
        """What `replan` makes of the plan in force and the machines that are there; raises EcotoneError."""
        return self._replan(self.usable())

    def after_loss(self) -> Stages:
        """Stages without lost ones, loaded; raises EcotoneError where nothing can be had."""
        while True:
            usable = self.usable()
            try:
                return self.pipeline.load(self._replan(usable))
            except NodeUnreachable:
                if self.usable() >= usable:  # nobody else is gone: the same would be tried again
                    raise

    def _replan(self, usable: frozenset[DeviceId]) -> LlmPlan:
        plan, weight_bytes = self.pipeline.in_force()
        return self._planner(plan, usable) if self._planner else succeed(plan, self._cluster, usable, weight_bytes)
