"""Who takes the place of a lost device, where nobody plans anew: its standby, else the device with most memory to spare.

Only the lost spans move: stages on other devices stay as they are, with the keys that they hold (the trap of SpotServe's
kind: one death must not move the ranges of machines that live). Executors stay too, so that the text goes on unchanged.
A planner may do better (ecotone.planner); this one always knows something to do, in O(stages * devices).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ecotone.cluster import Cluster, DeviceId
from ecotone.llmplan import EXACT, LOCAL, LlmPlan, LlmStage
from ecotone.units import EcotoneError, format_quantity

__all__ = ["succeed"]


def succeed(plan: LlmPlan, cluster: Cluster, alive: Collection[DeviceId], weight_bytes: Sequence[int]) -> LlmPlan:
    """`plan` with every stage of a device that is not `alive` on one that is; `weight_bytes` of each stage.

    Raises EcotoneError saying which stage finds no place, and what would help.
    """
    living = [device for device in cluster.devices if device.name in alive]
    used = dict.fromkeys((device.name for device in living), 0)
    for stage, weights in zip(plan.stages, weight_bytes, strict=True):
        if stage.device in used:
            used[stage.device] += weights + stage.kv_bytes
    stages: list[LlmStage] = []
    kept = tuple(standby for standby in plan.standbys if standby.device in used)
    for standby in kept:
        used[standby.device] += weight_bytes[standby.stage] + plan.stages[standby.stage].kv_bytes
    for index, stage in enumerate(plan.stages):
        if stage.device in used:
            stages.append(stage)
            continue
        after = plan.stages[index + 1].device if index + 1 < len(plan.stages) else plan.driver
        ends = (stages[-1].device if stages else plan.driver, after if after in used else plan.driver)
        ready = next((s.device for s in kept if s.stage == index and _reaches(plan, cluster, s.device, ends)), None)
        if ready is None:
            need = weight_bytes[index] + stage.kv_bytes
            ready = _roomiest(plan, cluster, used, stage, need, ends)
            used[ready] += need
        stages.append(replace(stage, device=ready))
    standbys = tuple(s for s in kept if stages[s.stage].device != s.device)
    return replace(plan, stages=_with_codecs(plan, stages), standbys=standbys, epoch=plan.epoch + 1)


def _reaches(plan: LlmPlan, cluster: Cluster, name: DeviceId, ends: tuple[DeviceId, DeviceId]) -> bool:
    """Whether a stage on `name` can hear the device before it and the driver, and tell the one behind it and the driver."""
    pairs = ((plan.driver, name), (name, plan.driver), (ends[0], name), (name, ends[1]))
    return all(one == other or cluster.link(one, other) is not None for one, other in pairs)


def _roomiest(
    plan: LlmPlan, cluster: Cluster, used: Mapping[DeviceId, int], stage: LlmStage, need: int,
    ends: tuple[DeviceId, DeviceId],
) -> DeviceId:  # fmt: skip
    """The device with most memory left that may hold the stage."""
    room: dict[DeviceId, int] = {}
    for name, taken in used.items():
        device = cluster.device(name)
        if device.executors and stage.executor not in device.executors:
            continue
        if not _reaches(plan, cluster, name, ends):
            continue
        room[name] = device.memory_bytes - taken
    best = max(room, key=lambda name: room[name], default=None)
    if best is None:
        raise EcotoneError(f"{stage.device} is lost and no device that is left may hold {stage.span.describe()}")
    if room[best] < need:
        wants, has = (format_quantity(n, "bytes") for n in (need, max(room[best], 0)))
        raise EcotoneError(
            f"{stage.device} is lost; {stage.span.describe()} needs {wants}, {best} has {has} left; add a machine, "
            "or serve with a shorter context or fewer bits"
        )
    return best


def _with_codecs(plan: LlmPlan, stages: Sequence[LlmStage]) -> tuple[LlmStage, ...]:
    """Codecs for the new neighbours: LOCAL on one device, else the former one, else the one that the plan uses."""
    usual = next((s.codec for s in plan.stages if s.codec != LOCAL), EXACT)
    made = []
    for index, stage in enumerate(stages):
        is_local = index + 1 == len(stages) or stages[index + 1].device == stage.device
        former = plan.stages[index].codec
        made.append(replace(stage, codec=LOCAL if is_local else usual if former == LOCAL else former))
    return tuple(made)
