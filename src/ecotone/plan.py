"""A plan: which device runs which blocks with which executor, and in which codec each frontier crosses.

A value: frozen, comparable, JSON in one place, no tensors inside. Legend: k stages; transfer i in [0, k] stands before
stage i (transfer 0 brings the inputs from the source, transfer k takes the outputs to the sink). A transfer whose two
ends are the same device moves nothing and has the codec "none". Ranges are half-open from 0.

Exits: a stage may end with one. Requests whose confidence there reaches the threshold leave: the exit's outputs go to the
sink over the stage's *exit transfer*. Edges are numbered: 0..k the transfers, then the exit transfers in order of stages.

Order: positions count blocks in the order of the graph that `graph_hash` names. Where that is not the captured order,
`order` says how to make it from the captured graph (Graph.reordered), so that a plan file is enough to run by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ecotone import schema
from ecotone.cluster import Cluster, DeviceId
from ecotone.graph import Graph

__all__ = ["LOCAL", "Plan", "Stage", "Transfer", "plan_violations"]

SCHEMA, VERSION = "ecotone.plan", 1
LOCAL = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Blocks [start, stop) on `device`, run by `executor` ("name:precision"). Never empty.

    `exit`: the head that runs at its end ("": none); a request leaves there when its confidence is at least `threshold`.
    """

    device: DeviceId
    start: int
    stop: int
    executor: str = "torch:fp32"
    exit: str = ""
    threshold: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The frontier at `position` goes from `source` to `target` in `codec` (see ecotone.codec); LOCAL: same device."""

    source: DeviceId
    target: DeviceId
    position: int
    codec: str = "fp32"

    @property
    def is_local(self) -> bool:
        return self.source == self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """k stages in order and the k + 1 transfers round them, and one transfer to the sink for every stage with an exit.

    `epoch` orders plans of one deployment. `order`: Graph.order of the graph that is cut.
    """

    graph_hash: str
    stages: tuple[Stage, ...]
    transfers: tuple[Transfer, ...]
    epoch: int = 0
    exit_transfers: tuple[Transfer, ...] = ()
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        schema.check("plan", self._violations())

    def _violations(self) -> Iterator[str]:
        if not self.stages:
            yield "has no stage"
            return
        if self.epoch < 0:
            yield "epoch is negative"
        if len(self.transfers) != len(self.stages) + 1:
            yield f"{len(self.stages)} stages need {len(self.stages) + 1} transfers, there are {len(self.transfers)}"
            return
        for i, stage in enumerate(self.stages):
            if stage.start >= stage.stop:
                yield f"stage {i} is empty: [{stage.start}, {stage.stop})"
            if stage.start != (self.stages[i - 1].stop if i else 0):
                yield f"stage {i} starts at block {stage.start}, the one before it ends elsewhere"
            if self.transfers[i].target != stage.device or self.transfers[i].position != stage.start:
                yield f"transfer {i} does not lead into stage {i}"
            if self.transfers[i + 1].source != stage.device or self.transfers[i + 1].position != stage.stop:
                yield f"transfer {i + 1} does not lead out of stage {i}"
        for i, transfer in enumerate(self.edges):
            if transfer.is_local != (transfer.codec == LOCAL):
                yield f'transfer {i}: codec must be "{LOCAL}" exactly where source and target are the same device'
        if self.order and sorted(self.order) != list(range(self.stages[-1].stop)):
            yield f"order must name each of the {self.stages[-1].stop} blocks once"
        yield from self._exit_violations()

    def _exit_violations(self) -> Iterator[str]:
        leaving = [(i, stage) for i, stage in enumerate(self.stages) if stage.exit]
        if len(leaving) != len(self.exit_transfers):
            yield f"{len(leaving)} stages have an exit, there are {len(self.exit_transfers)} exit transfers"
            return
        last = self.stages[-1].stop
        for (i, stage), transfer in zip(leaving, self.exit_transfers, strict=True):
            ends = (transfer.source, transfer.target, transfer.position)
            if not stage.threshold >= 0:
                yield f"stage {i}: threshold {stage.threshold} of exit {stage.exit} must be 0 (all leave) or more"
            if ends != (stage.device, self.transfers[-1].target, last):
                yield f"the exit transfer of stage {i} must lead from {stage.device} to the sink, at position {last}"
            if i == len(self.stages) - 1:
                yield "the last stage has an exit; the model's end is the exit there"

    @property
    def source(self) -> DeviceId:
        return self.transfers[0].source

    @property
    def sink(self) -> DeviceId:
        return self.transfers[-1].target

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """Devices that compute, in order of first use."""
        return tuple(dict.fromkeys(stage.device for stage in self.stages))

    @property
    def edges(self) -> tuple[Transfer, ...]:
        """All transfers by number: the k + 1 between stages, then those of the exits."""
        return (*self.transfers, *self.exit_transfers)

    def exit_edge(self, stage: int) -> int | None:
        """The number of the edge over which requests leave at the end of `stage`; None where it has no exit."""
        if not self.stages[stage].exit:
            return None
        return len(self.transfers) + sum(bool(s.exit) for s in self.stages[:stage])

    def exit_at(self, edge: int) -> str:
        """The exit whose requests leave over `edge`; "" for an edge between stages."""
        names = [s.exit for s in self.stages if s.exit]
        return names[edge - len(self.transfers)] if edge >= len(self.transfers) else ""

    @property
    def cuts(self) -> tuple[int, ...]:
        """Positions where something crosses a link, ends excluded when they are local."""
        return tuple(t.position for t in self.transfers if not t.is_local)

    @property
    def crossings(self) -> tuple[tuple[int, str], ...]:
        """Position and codec of every frontier that goes over a link, in order; outputs of exits are left out."""
        return tuple((t.position, t.codec) for t in self.transfers if not t.is_local)

    def with_epoch(self, epoch: int) -> Plan:
        return replace(self, epoch=epoch)

    def identity(self) -> str:
        """Hex sha256 of what the plan does: equal for equal plans of different epochs."""
        document = schema.write(self.with_epoch(0))
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "plan") -> Plan:
        """Read a plan; raises SchemaError naming every violation."""
        return schema.load_json(Plan, text, SCHEMA, VERSION, where)

    def __str__(self) -> str:
        parts = [f"{self.source} ->"]
        for transfer, stage in zip(self.transfers, self.stages, strict=False):
            if not transfer.is_local:
                parts.append(f"({transfer.codec})")
            leaves = f" exit {stage.exit}>={stage.threshold:.3g}" if stage.exit else ""
            parts.append(f"{stage.device}[{stage.start}:{stage.stop}] {stage.executor}{leaves} ->")
        last = self.transfers[-1]
        reordered = ["(blocks reordered)"] if self.order else []
        return " ".join([*parts, *([] if last.is_local else [f"({last.codec})"]), str(self.sink), *reordered])


def plan_violations(plan: Plan, graph: Graph, cluster: Cluster) -> tuple[str, ...]:
    """Every reason why `plan` cannot run `graph` on `cluster`; empty when it can. (Its own shape it checks itself.)

    `graph` may have its blocks in any order: the plan names the one that it cuts.
    """
    try:
        graph = graph if plan.order == graph.order else graph.in_order(plan.order)
    except schema.SchemaError as error:
        return ("was made for another model: " + "; ".join(error.violations) + "; plan again",)
    return tuple(_against(plan, graph, cluster))


def _against(plan: Plan, graph: Graph, cluster: Cluster) -> Iterator[str]:
    known = {d.name: d for d in cluster.devices}
    if plan.graph_hash != graph.content_hash():
        yield "was made for another model (graph hash differs); plan again"
    if plan.stages[-1].stop != graph.num_blocks:
        yield f"ends at block {plan.stages[-1].stop}, the model has {graph.num_blocks}"
        return
    for name in (plan.source, plan.sink, *plan.devices):
        if name not in known:
            yield f"names device {name!r}; devices are {', '.join(known)}"
    for stage in plan.stages:
        place = graph.exit(stage.exit)
        if stage.exit and (place is None or place.position != stage.stop):
            known_exits = ", ".join(f"{e.name} at {e.position}" for e in graph.exits) or "none"
            yield f"stage [{stage.start}, {stage.stop}) ends with exit {stage.exit!r}; exits of the model are {known_exits}"
    for transfer in plan.edges:
        if not transfer.is_local and cluster.link(transfer.source, transfer.target) is None:
            yield f"sends from {transfer.source} to {transfer.target}, but the cluster has no such link"
    for stage in plan.stages:
        device = known.get(stage.device)
        if device and device.executors and stage.executor not in device.executors:
            yield f"device {stage.device} may not use executor {stage.executor}"
    for name in plan.devices:
        used = {p for s in plan.stages if s.device == name for p in graph.segment_parameters(s.start, s.stop, s.exit)}
        need = sum(graph.parameters[p].size_bytes for p in used)
        if name in known and need > known[name].memory_bytes:
            yield f"needs {need} bytes of weights on {name}, which has {known[name].memory_bytes} bytes of memory"
