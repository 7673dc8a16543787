"""Ecotone: one PyTorch model over many unequal machines. Six verbs: capture, discover, measure, solve, simulate, deploy.

captured = ecotone.capture(model, example_inputs)
cluster = ecotone.discover(connect=["192.168.1.5:7447"])        # or ecotone.Cluster.load("home.toml")
profile = ecotone.measure(captured, cluster)
plan = ecotone.solve(captured.graph, cluster, profile, ecotone.Latency()).plan
report = ecotone.simulate(plan, captured.graph, cluster, profile)
with ecotone.deploy(plan, captured, cluster) as session:
    output = session(*inputs)
"""

from ecotone.cluster import Cluster
from ecotone.model import Captured, capture
from ecotone.plan import Plan
from ecotone.planner import Latency, Throughput, solve
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.runtime import Session, deploy, discover, measure
from ecotone.simulator import simulate
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
