"""A plan and an exit policy make a plan with exits: stages are split where an exit stands, each exit leads to the sink.

Not a choice: which exits and thresholds, and where the cuts go then, is for the solvers. O(stages + exits).
"""

from __future__ import annotations

from dataclasses import replace

from ecotone.accuracy import ExitPolicy
from ecotone.graph import Graph
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner.objective import PlannerError

__all__ = ["leaving_early"]


def leaving_early(plan: Plan, graph: Graph, policy: ExitPolicy, *, codec: str = "") -> Plan:
    """`plan`, whose requests leave as `policy` says; results of exits travel in `codec` (that of the last transfer).

    Two stages of one device stand side by side where an exit is in the middle of its part. Raises PlannerError for an exit
    that `graph` does not have, or at which no stage can end.
    """
    wanted = {}
    for name, threshold in zip(policy.exits, policy.thresholds, strict=True):
        place = graph.exit(name)
        if place is None or not 0 < place.position < plan.stages[-1].stop:
            known = ", ".join(f"{e.name} at {e.position}" for e in graph.exits) or "none"
            raise PlannerError(f"policy {policy.name}: exit {name!r} is not one of the model's: {known}; calibrate again")
        wanted[place.position] = (name, threshold)
    stages: list[Stage] = []
    transfers = [plan.transfers[0]]
    for stage, after in zip(plan.stages, plan.transfers[1:], strict=True):
        stops = [p for p in sorted(wanted) if stage.start < p < stage.stop]
        for start, stop in zip((stage.start, *stops), (*stops, stage.stop), strict=True):
            name, threshold = wanted.get(stop, ("", 0.0))
            stages.append(replace(stage, start=start, stop=stop, exit=name, threshold=threshold))
            if stop < stage.stop:
                transfers.append(Transfer(source=stage.device, target=stage.device, position=stop, codec=LOCAL))
        transfers.append(after)
    last = transfers[-1]
    packed = codec or ("fp32" if last.is_local else last.codec)
    leaving = tuple(
        Transfer(
            source=s.device, target=last.target, position=last.position, codec=LOCAL if s.device == last.target else packed
        )
        for s in stages
        if s.exit
    )
    return replace(plan, stages=tuple(stages), transfers=tuple(transfers), exit_transfers=leaving)
