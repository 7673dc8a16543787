"""A scene: one small world, what is deployed there, what is asked and what goes wrong, all as data that fits on a page.

Random scenes (draw.py) are run and judged in chaos.py; a scene that fails is cut down (shrink.py) and written as TOML. Work
is stated directly (seconds a block, bytes a frontier) rather than through graph and profile, which keeps a run at some
milliseconds. A plan is written "b:2 c:5": blocks [0, 2) on b, [2, 5) on c; the asker is the first device. "b:2?0.4 c:5": an
exit behind block 2, at which 40 % of all requests leave.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, cast

from ecotone import schema
from ecotone.cluster import DeviceId, Link
from ecotone.linktrace import LinkPoint, LinkTrace, load_trace
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planset import PlanSet, Standby
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, chunk_bytes_for
from ecotone.simulator import faults as ft
from ecotone.simulator.faults import Fault
from ecotone.simulator.leaving import Leaving
from ecotone.simulator.program import Ask, Program
from ecotone.simulator.script import read_faults, write_script
from ecotone.simulator.world import FRAME_BYTES, Machine, World

__all__ = ["Deployment", "Scene", "SceneLink", "build", "plan_of", "predicted_s", "script_of", "sets_of", "trace_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneLink:
    """A directed link."""

    source: str
    target: str
    latency_s: float
    rate_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Plans deployed together at `at_s`: the preferred one, then standbys, those in `active` as twins (by position)."""

    at_s: float
    plans: tuple[str, ...]
    active: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Faultless:
    """A scene but for its faults, which are written and read as a script (script.py) instead."""

    devices: tuple[str, ...]
    block_s: tuple[float, ...]
    size_bytes: tuple[int, ...]
    links: tuple[SceneLink, ...]
    deployments: tuple[Deployment, ...]
    asks: tuple[tuple[float, float], ...]
    in_flight: int = 1
    max_in_flight: int = 4
    ordered: bool = True
    record: bool = False
    record_s: float = 0.0
    coding_s: float = 0.0002
    patience_s: float = 5.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene(_Faultless):
    """`block_s` by device (same order), `size_bytes` by frontier 0..number of blocks. The first deployment is at time 0.

    `asks`: (time, deadline) each; below 0: no time (closed loop of `in_flight`), no deadline. `patience_s`: node_timeout_s.
    """

    faults: tuple[Fault, ...] = ()

    @property
    def asker(self) -> str:
        return self.devices[0]

    def link(self, source: str, target: str) -> SceneLink:
        """The directed link; raises KeyError."""
        return _links(self.links)[source, target]

    def to_toml(self, remark: str = "") -> str:
        """Everything, as a file that from_toml reads."""
        plain = schema.write(self)
        lines = [f"# {line}" for line in remark.splitlines()]
        for key in ("faults", "links", "deployments"):
            plain.pop(key, None)
        lines += [f"{key} = {_toml(value)}" for key, value in plain.items()]
        for name, items in (("link", self.links), ("deployment", self.deployments)):
            for item in items:
                lines += ["", f"[[{name}]]", *(f"{k} = {_toml(v)}" for k, v in schema.write(item).items())]
        return "\n".join(lines) + "\n" + write_script(self.faults)

    @staticmethod
    def from_toml(text: str, where: str = "scene") -> Scene:
        """Read a scene; raises SchemaError naming what is wrong."""
        try:
            document: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise schema.SchemaError(where, [f"not TOML: {error}"]) from None
        entries = document.pop("fault", [])
        document["links"] = document.pop("link", [])
        document["deployments"] = document.pop("deployment", [])
        plain = schema.read(_Faultless, document, where)
        faults = read_faults(entries, plain.devices, where, load=trace_of)
        return Scene(**{each.name: getattr(plain, each.name) for each in fields(plain)}, faults=faults)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)


@lru_cache(maxsize=64)
def _links(links: tuple[SceneLink, ...]) -> dict[tuple[str, str], SceneLink]:
    return {(k.source, k.target): k for k in links}


@lru_cache(maxsize=4096)
def plan_of(text: str, asker: str, epoch: int) -> Plan:
    """ "b:2?0.4 c:5" as a plan of source and sink `asker`; the share of an exit stands in as its threshold."""
    placed, exits = [], {}
    for name, _, rest in (part.partition(":") for part in text.split()):
        stop, mark, share = rest.partition("?")
        placed.append((DeviceId(name), int(stop)))
        if mark:
            exits[int(stop)] = float(share)
    starts = [0, *(stop for _, stop in placed)]
    ends = [DeviceId(asker), *(device for device, _ in placed), DeviceId(asker)]
    transfers = tuple(
        Transfer(source=a, target=b, position=p, codec=LOCAL if a == b else "fp32")
        for (a, b), p in zip(pairwise(ends), starts, strict=True)
    )
    stages = tuple(
        Stage(device=d, start=a, stop=b, exit=f"exit{b}" if b in exits else "", threshold=exits.get(b, 0.0))
        for (d, b), a in zip(placed, starts, strict=False)
    )
    leaving = tuple(
        replace(transfers[-1], source=s.device, codec=LOCAL if s.device == asker else "fp32") for s in stages if s.exit
    )
    return Plan(graph_hash="scene", stages=stages, transfers=transfers, epoch=epoch, exit_transfers=leaving)


def trace_of(text: str) -> LinkTrace:
    """ "steps 0:1e6 0.5:0 end:2": bytes per second from each time on, then again; other names are load_trace's."""
    kind, *steps = text.split()
    if kind != "steps":
        return load_trace(text)
    pairs = [step.partition(":") for step in steps]
    points = tuple(
        LinkPoint(time_s=float(at), bytes_per_s=float(rate), latency_s=0.001) for at, _, rate in pairs if at != "end"
    )
    return LinkTrace(name=text, points=points, duration_s=float(pairs[-1][2]))


def sets_of(scene: Scene) -> tuple[PlanSet, ...]:
    """The plan sets of all deployments, epochs ascending."""
    return _sets(scene.deployments, scene.asker)


@lru_cache(maxsize=1024)
def _sets(deployments: tuple[Deployment, ...], asker: str) -> tuple[PlanSet, ...]:
    made, epoch = [], 0
    for deployment in deployments:
        plans = [plan_of(text, asker, epoch + i) for i, text in enumerate(deployment.plans)]
        epoch += len(plans)
        modes: list[Literal["passive", "active"]] = [
            "active" if i in deployment.active else "passive" for i in range(len(plans))
        ]
        standbys = tuple(Standby(plan=p, mode=m) for p, m in zip(plans[1:], modes[1:], strict=True))
        made.append(PlanSet(primary=plans[0], standbys=standbys))
    return tuple(made)


def predicted_s(scene: Scene, plan: Plan) -> float:
    """Seconds of one request alone, on the longest way through the plan: compute, coding, and frames on links."""
    speed = dict(zip(scene.devices, scene.block_s, strict=True))
    longest_s = took_s = 0.0
    for i, stage in enumerate(plan.stages):
        took_s += _crossing_s(scene, plan.transfers[i]) + speed[stage.device] * (stage.stop - stage.start)
        exit_edge = plan.exit_edge(i)
        if exit_edge is not None:
            longest_s = max(longest_s, took_s + _crossing_s(scene, plan.edges[exit_edge]))
    return max(longest_s, took_s + _crossing_s(scene, plan.transfers[-1]))


def _crossing_s(scene: Scene, transfer: Transfer) -> float:
    if transfer.is_local:
        return 0.0
    link = scene.link(transfer.source, transfer.target)
    size_bytes = scene.size_bytes[transfer.position] + FRAME_BYTES
    return 2 * scene.coding_s + link.latency_s + size_bytes / link.rate_bytes_per_s


class _Work:
    """Seconds and bytes by body."""

    __slots__ = ("_coding_s", "_compute_s", "_size_bytes")

    def __init__(self, scene: Scene, plans: list[Plan]) -> None:
        speed = dict(zip(scene.devices, scene.block_s, strict=True))
        self._coding_s = scene.coding_s
        self._compute_s = {(p.epoch, i): speed[s.device] * (s.stop - s.start) for p in plans for i, s in enumerate(p.stages)}
        self._size_bytes = {(p.epoch, i): scene.size_bytes[t.position] for p in plans for i, t in enumerate(p.edges)}

    def seconds(self, body: BodyId, work: str) -> float:
        return self._compute_s[body.epoch, body.edge] if work == "compute" else self._coding_s

    def size_bytes(self, body: BodyId) -> int:
        return self._size_bytes[body.epoch, body.edge]


def build(scene: Scene, world_class: type[World] = World) -> Program:
    """The world of a scene with its program, connected, nothing deployed yet."""
    asker = NodeId(scene.asker)
    chunks = {
        (k.source, k.target): LinkSettings(chunk_bytes=chunk_bytes_for(k.rate_bytes_per_s), bytes_per_s=k.rate_bytes_per_s)
        for k in scene.links
    }
    settings = CoordinatorSettings(
        session=1, queue_limit=max(64, len(scene.asks)), max_in_flight=scene.max_in_flight, ordered=scene.ordered,
        node_timeout_s=scene.patience_s, record=scene.record,
    )  # fmt: skip

    def make(name: NodeId, incarnation: int, session: int) -> Node:
        links = {NodeId(other): chunks[name, other] for other in scene.devices if other != name}
        mind = replace(settings, session=session) if name == asker else None
        return Node(name, incarnation, links=links, coordinator=mind)

    sets = sets_of(scene)
    plans = [plan for group in sets for plan in group.plans]
    work = _Work(scene, plans)
    asks = [Ask(at_s=a if a >= 0 else None, deadline_s=d if d >= 0 else None) for a, d in scene.asks]
    expected_s = {plan.epoch: predicted_s(scene, plan) for plan in plans}
    program = Program(asker, asks, sets[0], make, scene.in_flight, expected_s)
    machines = {NodeId(name): Machine(make(NodeId(name), 1, 1)) for name in scene.devices}
    machines[asker].condition.record_s = scene.record_s
    links = tuple(
        Link(
            source=cast(DeviceId, k.source), target=cast(DeviceId, k.target), latency_s=k.latency_s,
            bandwidth_bytes_per_s=k.rate_bytes_per_s,
        )
        for k in scene.links
    )  # fmt: skip
    program.world = world_class(machines, links, work.seconds, work.size_bytes, program.took, trace=False, seed=scene.seed)
    leaving = program.world.exit_of = Leaving(scene.seed)
    for plan in plans:
        leaving.add(plan, [stage.threshold for stage in plan.stages if stage.exit])
    program.world.connect_all()
    return program


def script_of(scene: Scene) -> list[Fault]:
    """The scene's faults and later deployments, in order of time."""
    again: list[Fault] = [
        ft.Replan(at_s=d.at_s, plan=group) for d, group in zip(scene.deployments[1:], sets_of(scene)[1:], strict=True)
    ]
    return sorted([*scene.faults, *again], key=lambda fault: fault.at_s)
