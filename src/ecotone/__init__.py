"""Ecotone: one PyTorch model over many unequal machines. Six verbs: capture, discover, measure, solve, simulate, deploy.

captured = ecotone.capture(model, example_inputs)
cluster = ecotone.discover(connect=["192.168.1.5:7447"])        # or ecotone.Cluster.load("home.toml")
profile = ecotone.measure(captured, cluster)
plan = ecotone.solve(captured.graph, cluster, profile, ecotone.Latency()).plan     # or "server,latency", "p95", ...
report = ecotone.simulate(plan, captured.graph, cluster, profile)
with ecotone.deploy(plan, captured, cluster) as session:
    output = session(*inputs)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ecotone.cluster import Cluster
from ecotone.graph import Graph
from ecotone.model import Captured, capture
from ecotone.plan import Plan
from ecotone.planner import Latency, Objective, Requirement, Solution, Throughput, parse_objective, solve_dag
from ecotone.planner import solve as plan_with
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.runtime import Session, deploy, discover, measure
from ecotone.simulator import Arrivals, simulate
from ecotone.simulator.score import makespan_in, percentile
from ecotone.units import EcotoneError

__all__ = [
    "Captured",
    "Cluster",
    "EcotoneError",
    "Latency",
    "Plan",
    "PlanSet",
    "Profile",
    "Session",
    "Throughput",
    "capture",
    "deploy",
    "discover",
    "measure",
    "simulate",
    "solve",
]


def solve(
    graph: Graph,
    cluster: Cluster,
    profile: Profile,
    objective: Objective | str = "latency",
    require: Iterable[Requirement | str] = (),
    *,
    arrivals: Arrivals | None = None,
    orders: bool = False,
    **limits: Any,
) -> Solution:
    """The best plan (ecotone.planner.solve) under an objective, given as a value or as text: "latency", "server,latency".

    A p95, as objective or requirement, is simulated with requests as `arrivals` says, one at a time by default. `orders`:
    also in other orders of the blocks of a model with branches (solve_dag), candidates for least latency compared by
    simulation; what the profile does not hold of such an order is an estimate (docs/dag.md). `limits`: time_limit_s,
    num_runners_up, tie, gap. Raises PlannerError naming the requirement that fails, or what was not measured.
    """
    p95 = percentile(arrivals)
    wanted = parse_objective(objective, p95) if isinstance(objective, str) else objective
    kept = tuple(Requirement.parse(r, p95) if isinstance(r, str) else r for r in require)
    if not orders:
        return plan_with(graph, cluster, profile, wanted, kept, **limits)
    score = makespan_in(graph, cluster, profile) if isinstance(wanted, Latency) else None
    return solve_dag(graph, cluster, profile, wanted, kept, score=score, **limits).solution
