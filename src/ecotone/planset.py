"""A plan set: the plans that are resident together, the preferred one first and those to fall back on or switch to.

A failover topology (Edge-PRUNE, arXiv:2206.08152) is such a set: T1 a local fallback, T2 a standby on another server
(active: every request runs under both, the first result counts; passive: it runs there once the first is lost). One of
another graph (a smaller variant, an earlier exit; CONTINUER, arXiv:2206.05267) names its own graph hash. A controller that
moves the cut keeps its candidates resident likewise. Data only; planner/failover.py chooses, the coordinator carries it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ecotone import schema
from ecotone.cluster import DeviceId
from ecotone.plan import Plan

__all__ = ["PlanSet", "Standby", "shared_edge"]

SCHEMA, VERSION = "ecotone.planset", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """A resident plan beside the preferred one. `label` says what it is for: "local fallback", "standby on edge2", ..."""

    plan: Plan
    mode: Literal["passive", "active"] = "passive"
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSet:
    """`primary` and its standbys in order of preference: the first whose devices all answer takes over."""

    primary: Plan
    standbys: tuple[Standby, ...] = ()

    def __post_init__(self) -> None:
        schema.check("plan set", self._violations())

    def _violations(self) -> Iterator[str]:
        seen = {self.primary.identity()}
        for i, standby in enumerate(self.standbys):
            plan = standby.plan
            ends, wanted = (plan.source, plan.sink), (self.primary.source, self.primary.sink)
            if ends != wanted:
                yield f"standby {i} goes from {ends[0]} to {ends[1]}, the primary from {wanted[0]} to {wanted[1]}"
            if plan.identity() in seen:
                yield f"standby {i} is the same plan as one before it"
            seen.add(plan.identity())

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans, the preferred one first."""
        return (self.primary, *(s.plan for s in self.standbys))

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """All devices that take part, source and sink included, in order of first use."""
        return tuple(dict.fromkeys(d for p in self.plans for d in (p.source, *p.devices, p.sink)))

    def with_epochs(self, first: int) -> PlanSet:
        """The same set with epochs first, first + 1, ... in order."""
        standbys = tuple(replace(s, plan=s.plan.with_epoch(first + 1 + i)) for i, s in enumerate(self.standbys))
        return PlanSet(primary=self.primary.with_epoch(first), standbys=standbys)

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "plan set") -> PlanSet:
        """Read a set; raises SchemaError naming every violation."""
        return schema.load_json(PlanSet, text, SCHEMA, VERSION, where)


def shared_edge(one: Plan, other: Plan) -> int:
    """The last edge up to which both plans do the same on the source device: its tensors serve either plan.

    0 where nothing but the inputs is shared. A request that ran under `one` can go on under `other` from there.
    """
    edge = 0
    if one.graph_hash != other.graph_hash:
        return edge
    for i, (mine, theirs) in enumerate(zip(one.stages, other.stages, strict=False)):
        if mine != theirs or mine.device != one.source or one.transfers[i] != other.transfers[i]:
            break
        edge = i + 1
    return edge
