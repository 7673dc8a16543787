"""Where to run which blocks: `solve(graph, cluster, profile, objective, require) -> Solution`, exact first; and which plans
stay resident beside that one in case something fails: `choose(graph, cluster, profile, ...) -> FailoverSolution`.
"""

from ecotone.planner import baselines
from ecotone.planner.expectation import Detection, Weights
from ecotone.planner.explain import Breakpoint, Explanation, explain
from ecotone.planner.failover import FailoverSolution, choose
from ecotone.planner.failures import assume
from ecotone.planner.objective import Latency, Objective, PlannerError, Requirement, Throughput
from ecotone.planner.options import OptionWeights, Outlook, score_options
from ecotone.planner.solve import TIE, RunnerUp, Solution, solve
from ecotone.planner.standbys import Variant

__all__ = [
    "TIE", "Breakpoint", "Detection", "Explanation", "FailoverSolution", "Latency", "Objective", "OptionWeights", "Outlook",
    "PlannerError", "Requirement", "RunnerUp", "Solution", "Throughput", "Variant", "Weights", "assume", "baselines",
    "choose", "explain", "score_options", "solve",
]  # fmt: skip
