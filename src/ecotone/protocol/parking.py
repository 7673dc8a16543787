"""Bodies that came before the plan they belong to: kept within a limit of bytes until that is deployed, or never will be.

A node that restarted gets bodies of runs that its neighbours began before; those of a plan on its way are as good as any.
"""

from __future__ import annotations

from ecotone.protocol.effects import Held, Release
from ecotone.protocol.message import BodyId
from ecotone.protocol.notices import BodyArrived, FreeBody, Item

__all__ = ["Parking"]

EpochKey = tuple[int, int]


class Parking:
    """`limit_bytes`: of all bodies of unknown plans together."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._sizes: dict[EpochKey, dict[BodyId, int]] = {}
        self._arrived: dict[EpochKey, list[BodyArrived]] = {}
        self._num_bytes = 0

    def admits(self, body: BodyId, size_bytes: int) -> bool:
        """Whether chunks of this body are to be kept."""
        known = self._sizes.get(body[:2], {})
        if body in known:
            return True
        if self._num_bytes + size_bytes > self.limit_bytes:
            return False
        self._sizes.setdefault(body[:2], known)[body] = size_bytes
        self._num_bytes += size_bytes
        return True

    def arrived(self, arrival: BodyArrived) -> None:
        """All of the body is here."""
        self._arrived.setdefault(arrival.body[:2], []).append(arrival)

    def take(self, key: EpochKey) -> list[BodyArrived]:
        """What has arrived of this epoch; it is parked no longer."""
        self._num_bytes -= sum(self._sizes.pop(key, {}).values())
        return self._arrived.pop(key, [])

    def drop(self, session: int, epoch: int | None) -> list[Item]:
        """The plan of this epoch (None: any of the session) will not come: free what has arrived."""
        keys = {*self._sizes, *self._arrived}
        items: list[Item] = []
        for key in sorted(k for k in keys if k[0] == session and epoch in (None, k[1])):
            for arrival in self.take(key):
                items += [Release(body=arrival.body, held=Held.BYTES), FreeBody(arrival.peer, arrival.body)]
        return items
