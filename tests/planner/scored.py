"""Scores for plans that cost no simulation, and worlds so small that every plan can be scored."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
from joint_enumeration import Joint, every_joint_plan, joint_world, plan_of

from ecotone.cluster import Cluster
from ecotone.cost import CostModel, PlanCost
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner import P95, Score
from ecotone.planner.floors import queue_floor_s
from ecotone.planner.objective import alone_percentile_s
from ecotone.profile import Profile


def pinch_s(cost: PlanCost) -> float:
    """The most that a request keeps any one processor, coder or link."""
    work: dict[tuple, float] = {}
    for stage in cost.stages:
        work[stage.device, "p"] = work.get((stage.device, "p"), 0.0) + stage.compute_s
    for t in cost.transfers:
        work[t.source, "c"] = work.get((t.source, "c"), 0.0) + t.encode_s
        work[t.target, "c"] = work.get((t.target, "c"), 0.0) + t.decode_s
    return max([*work.values(), *(k.busy_s for k in cost.links)])


def made_up(arrivals: list[float]) -> P95:
    """A score that keeps what is asked of one: the floors, and up to a third more by a hash of all but the executors."""

    def score_in(graph: Graph, cluster: Cluster, profile: Profile) -> Score:
        model = CostModel(graph, cluster, profile)

        def score(plan: Plan) -> float:
            cost = model.predict(plan)
            floor = alone_percentile_s(cost)
            if not plan.exit_transfers:
                floor = max(floor, queue_floor_s(arrivals, pinch_s(cost)))
            bare = replace(plan, stages=tuple(replace(s, executor="any") for s in plan.stages))
            return floor * (1 + zlib.crc32(bare.identity().encode()) % 1000 / 3000)

        return score

    return P95(score_in=score_in, arrivals_s=tuple(arrivals))


def small_worlds(count: int) -> list[tuple[Joint, P95, list[Plan]]]:
    """The first `count` worlds of two devices with at most 300 plans that fit: a score, and the plans within a point."""
    found = []
    for seed in range(5000):
        world = joint_world(seed, num_devices=2)
        tables = [t for t in every_joint_plan(world) if not t.over_memory]
        if not tables or sum(t.values["latency"].size for t in tables) > 300:
            continue
        rng = np.random.default_rng(seed)
        usual = min(float(t.values["latency"].min()) for t in tables)
        arrivals = np.cumsum(rng.exponential(usual * float(rng.choice([0.3, 0.7, 2.0])), 40)).tolist()
        plans = [
            plan_of(world, t, index)
            for t in tables
            for index in zip(*np.nonzero(t.values["accuracy_loss"] <= 1 + 1e-9), strict=True)
        ]
        found.append((world, made_up(arrivals if seed % 4 else []), plans))
        if len(found) == count:
            break
    return found
