"""Where to run which blocks: `solve(graph, cluster, profile, objective, require) -> Solution`, exact first."""

from ecotone.planner.objective import Latency, Objective, PlannerError, Requirement, Throughput
from ecotone.planner.solve import RunnerUp, Solution, solve

__all__ = ["Latency", "Objective", "PlannerError", "Requirement", "RunnerUp", "Solution", "Throughput", "solve"]
