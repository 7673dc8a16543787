"""What a script may do to a simulated world: faults as data, in seconds since the first submission, and how each is done.

Whom the wire tells: the end of a process, a cut and a partition are noticed after `detect_s`; a stopped process, a link that
is dead one way, lost frames and slow machines are not, only deadlines find them. How a script looks as TOML: script.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ecotone import schema
from ecotone.cluster import DeviceId, Link
from ecotone.linktrace import LinkTrace
from ecotone.plan import Plan
from ecotone.planset import PlanSet
from ecotone.protocol import events as ev
from ecotone.protocol.message import NodeId
from ecotone.simulator.channel import FrameFaults
from ecotone.simulator.world import World

__all__ = [
    "BendClock", "CutLink", "CutOneWay", "Fault", "FillDisk", "FollowTrace", "GarbleNode", "HealAll", "HealLink", "KillNode",
    "Partition", "Replan", "RestartNode", "ResumeNode", "SetLink", "SetPrepare", "SlowDevice", "SpoilLink", "SpoilWork",
    "StallNode", "Switch", "check", "devices_of", "inflict", "violations_of",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CutLink:
    """Both directions between two devices go dead; the ends notice after `detect_s`."""

    at_s: float
    source: DeviceId
    target: DeviceId
    detect_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOneWay:
    """Frames from `source` to `target` are lost, and nobody is told."""

    at_s: float
    source: DeviceId
    target: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class HealLink:
    """Both directions carry again."""

    at_s: float
    source: DeviceId
    target: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """All links between `devices` and the rest go dead."""

    at_s: float
    devices: tuple[DeviceId, ...]
    detect_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealAll:
    """Every cut and partition is over."""

    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLink:
    """A directed link gets another latency and rate."""

    at_s: float
    link: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowTrace:
    """A directed link follows a trace from now on (its time 0 is now); a rate of 0 is an outage."""

    at_s: float
    source: DeviceId
    target: DeviceId
    trace: LinkTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoilLink:
    """Shares of frames from `source` to `target` that are lost, repeated or damaged, how late they may be; all 0: none."""

    at_s: float
    source: DeviceId
    target: DeviceId
    drop: float = 0.0
    duplicate: float = 0.0
    truncate: float = 0.0
    late_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KillNode:
    """A device's process ends (kill -9). The asker's may end where requests are recorded."""

    at_s: float
    device: DeviceId
    detect_s: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartNode:
    """A killed device starts a new process; the asker's reads its journal and asks for what is unanswered."""

    at_s: float
    device: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class StallNode:
    """A process is stopped (SIGSTOP): it answers nothing, and nobody is told."""

    at_s: float
    device: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeNode:
    """A stopped process goes on (SIGCONT)."""

    at_s: float
    device: DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowDevice:
    """Work that begins from now on takes `factor` times as long as it would (1: as before)."""

    at_s: float
    device: DeviceId
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BendClock:
    """A device's clock jumps by `step_s` (below 0: backwards) and runs at `drift` times the true speed."""

    at_s: float
    device: DeviceId
    step_s: float = 0.0
    drift: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FillDisk:
    """The asker's journal takes nothing more, or takes it again."""

    at_s: float
    device: DeviceId
    is_full: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoilWork:
    """These kinds of work ("compute", "encode", "decode") raise on a device; none: all is well again."""

    at_s: float
    device: DeviceId
    kinds: tuple[str, ...] = ("compute",)


@dataclass(frozen=True, slots=True, kw_only=True)
class GarbleNode:
    """What a device sends no longer decodes, or does so again."""

    at_s: float
    device: DeviceId
    is_garbling: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPrepare:
    """Loading segments takes `takes_s` from now on, or fails with `error` (another version, no room)."""

    at_s: float
    device: DeviceId
    takes_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """The asker deploys another plan or set of plans (epochs above the present ones)."""

    at_s: float
    plan: Plan | PlanSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The asker prefers another resident plan from now on."""

    at_s: float
    epoch: int


Fault = (
    CutLink | CutOneWay | HealLink | Partition | HealAll | SetLink | FollowTrace | SpoilLink | KillNode | RestartNode
    | StallNode | ResumeNode | SlowDevice | BendClock | FillDisk | SpoilWork | GarbleNode | SetPrepare | Replan | Switch
)  # fmt: skip


def devices_of(fault: Fault) -> tuple[DeviceId, ...]:
    """The devices that a fault names."""
    match fault:
        case SetLink(link=link):
            return link.source, link.target
        case Partition(devices=devices):
            return devices
        case HealAll() | Replan() | Switch():
            return ()
        case CutLink() | CutOneWay() | HealLink() | FollowTrace() | SpoilLink():
            return fault.source, fault.target
    return (fault.device,)


def violations_of(fault: Fault, devices: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with a fault in a world of these devices."""
    if not (math.isfinite(fault.at_s) and fault.at_s >= 0):
        yield f"at is {fault.at_s} s, must be finite and not negative"
    for device in devices_of(fault):
        if device not in devices:
            yield f"unknown device {device!r}; devices are {', '.join(devices)}"
    detect_s = getattr(fault, "detect_s", 0.0)
    if not (math.isfinite(detect_s) and detect_s >= 0):
        yield f"detect is {detect_s} s, must be finite and not negative"
    match fault:
        case Partition(devices=inside):
            if not inside or not set(devices) - set(inside):
                yield "a partition needs devices on both sides"
        case CutLink() | CutOneWay() | HealLink() | FollowTrace() | SpoilLink():
            if fault.source == fault.target:
                yield f"the link leads from {fault.source} to itself; name two devices"
    match fault:
        case SpoilLink():
            shares = (fault.drop, fault.duplicate, fault.truncate)
            if not all(0 <= share <= 1 for share in shares) or fault.drop + fault.truncate > 1:
                yield f"drop, duplicate and truncate are {shares}, must be shares from 0 to 1"
            if not (math.isfinite(fault.late_s) and fault.late_s >= 0):
                yield f"late is {fault.late_s} s, must be finite and not negative"
        case SlowDevice(factor=factor) if not (math.isfinite(factor) and factor > 0):
            yield f"factor is {factor}, must be finite and above zero"
        case BendClock() if not (math.isfinite(fault.step_s) and 0.5 <= fault.drift <= 2):
            yield f"step is {fault.step_s} s and drift {fault.drift}; drift must be from 0.5 to 2"
        case SpoilWork(kinds=kinds) if set(kinds) - {"compute", "encode", "decode"}:
            yield f"work is {', '.join(kinds)}; name compute, encode, decode"
        case SetPrepare(takes_s=takes_s) if not (math.isfinite(takes_s) and takes_s >= 0):
            yield f"takes is {takes_s} s, must be finite and not negative"


def check(script: tuple[Fault, ...], devices: tuple[str, ...], where: str) -> None:
    """Raise SchemaError naming everything that is wrong with a script."""
    found = (f"fault {i}: {text}" for i, fault in enumerate(script, 1) for text in violations_of(fault, devices))
    schema.check(where, found)


def inflict(world: World, fault: Fault, asker: NodeId) -> None:
    """Do it now; ends and restarts of processes and new plans are the program's (see program.py)."""
    match fault:
        case CutLink(source=source, target=target, detect_s=detect_s):
            world.cut(NodeId(source), NodeId(target), detect_s)
        case CutOneWay(source=source, target=target):
            world.cut_one_way(NodeId(source), NodeId(target))
        case HealLink(source=source, target=target):
            world.heal(NodeId(source), NodeId(target))
        case Partition(devices=devices, detect_s=detect_s):
            world.partition(map(NodeId, devices), detect_s)
        case HealAll():
            world.heal_all()
        case SetLink(link=link):
            ends = NodeId(link.source), NodeId(link.target)
            world.set_link(*ends, link.latency_s, link.bandwidth_bytes_per_s)
        case FollowTrace(source=source, target=target, trace=trace):
            world.follow(NodeId(source), NodeId(target), trace)
        case SpoilLink(source=source, target=target):
            faults = FrameFaults(drop=fault.drop, duplicate=fault.duplicate, truncate=fault.truncate, late_s=fault.late_s)
            world.spoil(NodeId(source), NodeId(target), None if faults == FrameFaults() else faults)
        case StallNode(device=device):
            world.stall(NodeId(device))
        case ResumeNode(device=device):
            world.resume(NodeId(device))
        case BendClock(device=device, step_s=step_s, drift=drift):
            world.set_clock(NodeId(device), step_s=step_s, drift=drift)
        case Switch(epoch=epoch):
            world.event(asker, ev.Prefer(epoch=epoch))
        case SlowDevice() | FillDisk() | SpoilWork() | GarbleNode() | SetPrepare():
            _change(world, fault)


def _change(world: World, fault: SlowDevice | FillDisk | SpoilWork | GarbleNode | SetPrepare) -> None:
    condition = world.machines[NodeId(fault.device)].condition
    match fault:
        case SlowDevice(factor=factor):
            condition.factor = factor
        case FillDisk(is_full=is_full):
            condition.record_error = "no space left on device" if is_full else ""
        case SpoilWork(kinds=kinds):
            condition.failing = frozenset(kinds)
        case GarbleNode(is_garbling=is_garbling):
            condition.is_garbling = is_garbling
        case SetPrepare(takes_s=takes_s, error=error):
            condition.prepare_s, condition.prepare_error = takes_s, error
