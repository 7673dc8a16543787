"""World 1: the machines of ecotone.protocol on a virtual clock."""

from ecotone.simulator.faults import (
    BendClock,
    CutLink,
    CutOneWay,
    Fault,
    FillDisk,
    FollowTrace,
    GarbleNode,
    HealAll,
    HealLink,
    KillNode,
    Partition,
    Replan,
    RestartNode,
    ResumeNode,
    SetLink,
    SetPrepare,
    SlowDevice,
    SpoilLink,
    SpoilWork,
    StallNode,
    Switch,
)
from ecotone.simulator.simulation import Arrivals, ClosedLoop, Outcome, Periodic, Poisson, Report, simulate
from ecotone.simulator.users import UsersReport, simulate_users

__all__ = [
    "Arrivals", "BendClock", "ClosedLoop", "CutLink", "CutOneWay", "Fault", "FillDisk", "FollowTrace", "GarbleNode",
    "HealAll", "HealLink", "KillNode", "Outcome", "Partition", "Periodic", "Poisson", "Replan", "Report", "RestartNode",
    "ResumeNode", "SetLink", "SetPrepare", "SlowDevice", "SpoilLink", "SpoilWork", "StallNode", "Switch", "UsersReport",
    "simulate", "simulate_users",
]  # fmt: skip
