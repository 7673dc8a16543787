"""Where to run which blocks: `solve(graph, cluster, profile, objective, require) -> Solution`, exact first."""

from ecotone.planner import baselines
from ecotone.planner.explain import Breakpoint, Explanation, explain
from ecotone.planner.objective import Latency, Objective, PlannerError, Requirement, Throughput
from ecotone.planner.solve import TIE, RunnerUp, Solution, solve

__all__ = [
    "TIE", "Breakpoint", "Explanation", "Latency", "Objective", "PlannerError", "Requirement", "RunnerUp", "Solution",
    "Throughput", "baselines", "explain", "solve",
]  # fmt: skip
