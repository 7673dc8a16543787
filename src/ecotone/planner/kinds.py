"""Places: devices one by one while they are few, classes of alike devices where they are many.

Two devices are alike when every table gives them the same numbers: kind, memory, power, price, slowdown, allowed executors,
the names under which they were measured, and their links; source and sink are alike to nobody. Within a class any two
devices have the same link, so a path over classes is worth as much whichever devices take its stages.

A stage on a class means a device of it that the path has not used yet. While one is left that loses nothing: let a path come
back to a device that it has used, and let an unused one of its class take the later stages instead. Times, links, prices and
tiers are the same; every device holds and computes a part of what the one did; no transfer is added (the stages next to it
are on other devices, and links are the class's). Only the idle watts of one more device are added (equation 10), so for
energy a class is a bound and not exact. Where a path needs more devices than there are, `hand_out` packs its stages.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from ecotone.cluster import Device, DeviceId
from ecotone.cost import CostModel, FloatArray

__all__ = ["MOST_APART", "hand_out", "places"]

MOST_APART = 24  # devices that are told apart though they may be alike: then coming back to one is exact too

Stages = Sequence[tuple[int, int, int]]


def places(model: CostModel, allowed: Sequence[str] = ()) -> tuple[tuple[DeviceId, ...], ...]:
    """The members of every place, in the order of the cluster's devices; `allowed`: those that may compute (empty: all)."""
    cluster = model.cluster
    devices = [d for d in cluster.devices if not allowed or d.name in allowed or d.name in (cluster.source, cluster.sink)]
    if len(devices) <= MOST_APART:
        return tuple((d.name,) for d in devices)
    signature = _link_signatures(model)
    found: dict[object, list[DeviceId]] = {}
    for device in devices:
        alone = device.name in (cluster.source, cluster.sink) or not device.kind
        key = device.name if alone else _key(model, device, signature[device.name])
        found.setdefault(key, []).append(device.name)
    return tuple(tuple(names) for names in found.values())


def _key(model: CostModel, device: Device, links: frozenset[object]) -> object:
    return (
        device.kind, device.memory_bytes, device.executors, device.power, device.slowdown, device.price_money_per_s,
        model.is_server(device.name), model.measured_names(device.name), links,
    )  # fmt: skip


def _link_signatures(model: CostModel) -> dict[DeviceId, frozenset[object]]:
    """Per device the links that name it: direction, other end, and all that a plan is priced by."""
    found: dict[DeviceId, set[object]] = defaultdict(set)
    for named in model.cluster.links:
        link = model.link(named.source, named.target) or named
        figures = (link.latency_s, link.bandwidth_bytes_per_s, named.price_money_per_byte)
        found[named.source].add(("to", named.target, *figures))
        found[named.target].add(("from", named.source, *figures))
    return {d.name: frozenset(found[d.name]) for d in model.cluster.devices}


def hand_out(
    stages: Stages, is_local: Sequence[bool], members: Sequence[Sequence[DeviceId]], weights: FloatArray,
    working: FloatArray, capacity: FloatArray,
) -> tuple[DeviceId, ...] | None:  # fmt: skip
    """A device for every stage: an unused one while there is one, else one that has room; None where there is none.

    `is_local[i]`: stage i goes on where stage i - 1 was. `weights`, `working` (P, P) and `capacity` (places,) in bytes.
    """
    used: dict[int, int] = defaultdict(int)
    held: dict[DeviceId, float] = defaultdict(float)
    widest: dict[DeviceId, float] = defaultdict(float)
    found: list[DeviceId] = []
    for i, (place, start, stop) in enumerate(stages):
        group = members[place]
        if i and is_local[i]:
            device = found[-1]
        elif len(group) == 1:
            device = group[0]
        elif used[place] < len(group):
            device = group[used[place]]
            used[place] += 1
        else:
            size, peak = float(weights[start, stop]), float(working[start, stop])
            room = {d: capacity[place] - held[d] - size - max(widest[d], peak) for d in group if not found or d != found[-1]}
            device = max(room, key=lambda d: room[d])
            if room[device] < 0 or not math.isfinite(size):
                return None
        held[device] += float(weights[start, stop])
        widest[device] = max(widest[device], float(working[start, stop]))
        found.append(device)
    return tuple(found)
