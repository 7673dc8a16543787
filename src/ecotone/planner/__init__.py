"""Where to run which blocks: `solve(graph, cluster, profile, objective, require) -> Solution`, exact first; and which plans
stay resident beside that one in case something fails: `choose(graph, cluster, profile, ...) -> FailoverSolution`. Around it:
`explain` (why), `what_if` (another world) and `pareto` (what less of one quantity costs in another). For many users at once:
`assign(workload, cluster, models) -> Assignment`.
"""

from ecotone.planner import baselines
from ecotone.planner.assignment import Assignment, assign
from ecotone.planner.dag import DagSolution, solve_dag
from ecotone.planner.expectation import Detection, Weights
from ecotone.planner.explain import Breakpoint, Explanation, explain
from ecotone.planner.failover import FailoverSolution, choose
from ecotone.planner.failures import assume
from ecotone.planner.objective import (
    P95,
    AccuracyLoss,
    Bytes,
    Energy,
    Error,
    Latency,
    Lexicographic,
    Money,
    Objective,
    PlannerError,
    Requirement,
    Score,
    ScoreIn,
    Server,
    Throughput,
    parse_objective,
)
from ecotone.planner.options import OptionWeights, Outlook, score_options
from ecotone.planner.pareto import Front, Point, pareto
from ecotone.planner.solve import TIE, RunnerUp, Solution, solve
from ecotone.planner.standbys import Variant
from ecotone.planner.what_if import WhatIf, what_if

__all__ = [
    "P95", "TIE", "AccuracyLoss", "Assignment", "Breakpoint", "Bytes", "DagSolution", "Detection", "Energy", "Error",
    "Explanation", "FailoverSolution", "Front", "Latency", "Lexicographic", "Money", "Objective", "OptionWeights", "Outlook",
    "PlannerError", "Point", "Requirement", "RunnerUp", "Score", "ScoreIn", "Server", "Solution", "Throughput",
    "Variant", "Weights", "WhatIf", "assign", "assume", "baselines", "choose", "explain", "pareto", "parse_objective",
    "score_options", "solve", "solve_dag", "what_if",
]  # fmt: skip
