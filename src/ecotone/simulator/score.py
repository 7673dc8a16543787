"""Scores for the planner: what a plan takes under load, by simulation. Made here, handed to it as plain functions.

`percentile` is the objective and requirement "p95" for a stated pattern of arrivals: planner/floors.py says what a score
must keep to for its bounds to hold, and the simulator does (tests/simulator/test_score.py): results come in order, a
processor, coder or link serves one thing at a time, nothing is faster than alone. Nobody is turned away: the queue holds all
requests. Pure: the same plan gives the same score.
"""

from __future__ import annotations

import math

from ecotone.cluster import Cluster
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.floors import percentile_s, sure_tail
from ecotone.planner.objective import P95, Score
from ecotone.profile import Profile
from ecotone.simulator.simulation import Arrivals, ClosedLoop, arrival_times_s, simulate
from ecotone.units import EcotoneError

__all__ = ["makespan_in", "percentile"]

REQUESTS = 100


def percentile(arrivals: Arrivals | None = None, *, requests: int = REQUESTS, seed: int = 0) -> P95:
    """The 95th percentile of latency of `requests` that come as `arrivals` say (one at a time by default).

    A ClosedLoop of more than one in flight has no arrival times of its own, so only the floor of one request alone holds.
    """
    pattern = arrivals or ClosedLoop()

    def score_in(graph: Graph, cluster: Cluster, profile: Profile) -> Score:
        def score(plan: Plan) -> float:
            try:
                report = simulate(
                    plan, graph, cluster, profile, requests=requests, arrivals=pattern, seed=seed, trace=False,
                    queue_limit=requests,
                )  # fmt: skip
            except EcotoneError:
                return math.inf  # cannot be deployed: no answer
            late = [math.inf] * (requests - len(report.completed))
            return percentile_s([*report.latencies_s, *late])

        return score

    return P95(score_in=score_in, arrivals_s=arrival_times_s(pattern, requests, seed), tail=sure_tail(requests))


def makespan_in(graph: Graph, cluster: Cluster, profile: Profile) -> Score:
    """Seconds of one request, with all overlap that a plan allows."""

    def score(plan: Plan) -> float:
        report = simulate(plan, graph, cluster, profile, requests=1, trace=False)
        return report.latencies_s[0] if report.completed else math.inf

    return score
