"""What a worker keeps of one plan, and of one run of a request: queues by edge and stage, and whether they have room.

Edges are numbered as in plan.py: 0..k between stages, then those over which requests leave early. Data for worker.py, which
alone decides; nothing here makes effects.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ecotone.cluster import DeviceId
from ecotone.plan import Plan, Transfer
from ecotone.protocol.message import BodyId, NodeId, StagePart

__all__ = ["ActiveRun", "EpochWork", "removed"]


@dataclass(slots=True)
class EpochWork:
    """One epoch of a session at one node. `edges`: Plan.edges; `exit_edges`: by stage, those that have an exit."""

    plan: Plan
    asker: NodeId
    parts: tuple[StagePart, ...]
    is_ready: bool = False
    wanted: set[int] = field(default_factory=set)  # numbers of blobs on their way
    inputs: dict[int, deque[BodyId]] = field(default_factory=dict)  # by stage: tensors are here
    arrived: dict[int, deque[BodyId]] = field(default_factory=dict)  # by edge: encoded bytes are here
    to_encode: dict[int, deque[BodyId]] = field(default_factory=dict)  # by edge
    unsent: dict[int, set[BodyId]] = field(default_factory=dict)  # by edge: from Computed until the wire has all
    edges: tuple[Transfer, ...] = field(init=False)
    exit_edges: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.edges = self.plan.edges
        exits = ((i, self.plan.exit_edge(i)) for i in range(len(self.plan.stages)))
        self.exit_edges = {stage: edge for stage, edge in exits if edge is not None}

    def feeds_stage(self, edge: int) -> bool:
        """Whether what comes over `edge` enters a stage; else it is a result."""
        return edge < len(self.plan.stages)

    def may_start(self, stage: int, device: DeviceId, limit: int) -> bool:
        """Whether stage `stage` has room for what it makes: nobody knows before on which of its edges that will be."""
        exit_edge = self.exit_edges.get(stage)
        room = self.has_room(stage + 1, device, limit)
        return room and (exit_edge is None or self.has_room(exit_edge, device, limit))

    def has_room(self, edge: int, device: DeviceId, limit: int) -> bool:
        """Whether one more body fits on `edge`, seen from `device`, where each queue holds `limit`."""
        if self.edges[edge].target != device:
            return len(self.unsent.get(edge, ())) < limit
        return not self.feeds_stage(edge) or len(self.inputs.get(edge, ())) < limit


@dataclass(slots=True)
class ActiveRun:
    """A run of a request that has something at this node."""

    deadline_s: float | None
    bodies: set[BodyId] = field(default_factory=set)
    tell: tuple[int, ...] = ()  # edges that the coordinator, in this node, wants to know of
    is_awaited: bool = False  # another run waits for these


def removed(queues: dict[int, deque[BodyId]], body: BodyId) -> bool:
    """Take `body` out of the queue of its edge; False where it is not there."""
    queue = queues.get(body.edge)
    if queue is None or body not in queue:
        return False
    queue.remove(body)
    return True
