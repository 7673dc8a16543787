"""One node's whole machine: worker, links to its peers, and at the asker the coordinator. Shells drive only this.

Theory of operation: see docs/protocol.md. `handle(event, now_s)` returns effects; no I/O, no clock.
"""

from __future__ import annotations

from ecotone.protocol.effects import Effect
from ecotone.protocol.events import Event
from ecotone.protocol.message import NodeId
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings

__all__ = ["Node"]


class Node:
    """`incarnation`: a random number above 0, new in every process. `coordinator`: settings at the asker, None elsewhere."""

    def __init__(
        self,
        name: NodeId,
        incarnation: int,
        *,
        links: dict[NodeId, LinkSettings] | None = None,
        worker: WorkerSettings | None = None,
        coordinator: CoordinatorSettings | None = None,
    ) -> None:
        raise NotImplementedError

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Take one event, return what to do, in order. Never raises for anything a peer sent."""
        raise NotImplementedError
