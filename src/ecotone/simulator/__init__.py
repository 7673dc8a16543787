"""World 1: the machines of ecotone.protocol on a virtual clock."""

from ecotone.simulator.simulation import (
    Arrivals,
    ClosedLoop,
    CutLink,
    Fault,
    HealLink,
    KillNode,
    Outcome,
    Periodic,
    Poisson,
    Replan,
    Report,
    RestartNode,
    SetLink,
    simulate,
)

__all__ = [
    "Arrivals",
    "ClosedLoop",
    "CutLink",
    "Fault",
    "HealLink",
    "KillNode",
    "Outcome",
    "Periodic",
    "Poisson",
    "Replan",
    "Report",
    "RestartNode",
    "SetLink",
    "simulate",
]
