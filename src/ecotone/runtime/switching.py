"""How a session will move to another plan set: beside the old one (make before break), or by a short pause.

Pure. Beside needs memory for the weights of both on every device; equal stages of old and new are held once. Where a device
has less, requests are held back while the old set is drained and unloaded, then the new one is loaded: nothing is lost, but
answers pause for that time. NEUKONFIG (arXiv:2106.15689) calls the two dynamic switching and pause-and-resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import resident_bytes
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.units import format_quantity

__all__ = ["Switchover", "switchover"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Switchover:
    """`kind` "beside": no request waits; "pause": new requests wait until the new set is loaded. `reason` says why.

    `need_bytes`: what each device would hold of old and new together, with working memory.
    """

    kind: Literal["beside", "pause"]
    reason: str
    need_bytes: Mapping[DeviceId, int]


def switchover(
    old: Sequence[Plan], new: Sequence[Plan], graphs: Mapping[str, Graph], cluster: Cluster
) -> Switchover:  # fmt: skip
    """How `cluster` can move from the resident plans `old` to `new`; `graphs` by content hash."""
    need = resident_bytes(graphs, [*old, *new])
    short = [
        f"{device.name} has {format_quantity(device.memory_bytes, 'bytes')}, both need "
        f"{format_quantity(need[device.name], 'bytes')}"
        for device in cluster.devices
        if need.get(device.name, 0) > device.memory_bytes
    ]
    if not old:
        return Switchover(kind="beside", reason="nothing is loaded yet", need_bytes=need)
    if short:
        reason = "memory does not hold the old plans and the new ones: " + "; ".join(short)
        return Switchover(kind="pause", reason=reason, need_bytes=need)
    return Switchover(kind="beside", reason="every device holds the old plans and the new ones", need_bytes=need)
