"""The learned policy where it would run: behind the controller's interface, on the virtual clock, over the shipped traces.

Not the request-level world it was trained in but Ecotone's own protocol in the simulator: reports, probes, switches, rescues
of late requests. Plans: AlexNet without exits, every cut in every width, all resident. Traces: those shipped in assets/, a
quarter of their rates, latency at most 3 ms one way (as in training; other seeds). Reward as in sac_d, by outcome.

Contenders: *learned*; *deadline*, the planner's most accurate plan in time by the controller's eyes; *ecotone*, the fastest
plan; *best_static*: of the whole on the device and raw offload in each width, the best in hindsight for trace and deadline.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks import branchy_alexnet as net
from benchmarks.sac_d_world import actions, load
from ecotone.linktrace import LinkTrace, load_trace
from ecotone.planner.objective import Latency
from ecotone.planset import PlanSet, Standby
from ecotone.policies.box import Static, contender
from ecotone.policies.stream import Reward
from ecotone.protocol.controller import Controller, Policy
from ecotone.protocol.settings import CoordinatorSettings, WorkerSettings
from ecotone.simulator import FollowTrace, Periodic
from ecotone.simulator.adaptive import simulate_adaptive

TRACES = ("stable_wifi", "walking_away", "warehouse_wifi", "evening_uplink")
DEADLINES_S, PERIOD_S, SHARE, MOST_LATENCY_S = (0.015, 0.025), 0.2, 0.25, 0.003

__all__ = ["compared"]


def compared(quick: bool = False) -> dict[str, Any]:
    """Mean reward and share in time of each contender, by trace and deadline, and over all of them."""
    rows = []
    for name in TRACES[2:3] if quick else TRACES:
        for deadline_s in DEADLINES_S:
            trace = scaled(load_trace(name))
            found = {which: one(which, trace, deadline_s) for which in ("learned", "deadline", "ecotone")}
            fixed = [one(str(number), trace, deadline_s) for number in statics()]
            found["best_static"] = max(fixed, key=lambda x: x["reward"])
            rows.append({"trace": name, "deadline_s": deadline_s, **found})
    names = ("learned", "deadline", "ecotone", "best_static")
    means = {n: {k: float(np.mean([r[n][k] for r in rows])) for k in ("reward", "in_time")} for n in names}  # type: ignore[index]
    return {"means": means, "cases": rows}


def scaled(trace: LinkTrace) -> LinkTrace:
    points = tuple(
        replace(p, bytes_per_s=p.bytes_per_s * SHARE, latency_s=min(p.latency_s, MOST_LATENCY_S)) for p in trace.points
    )
    return replace(trace, points=points)


def statics() -> list[int]:
    """The whole on the device, and the input to the server in every width."""
    return [i for i, cut in enumerate(actions(False).cuts) if cut <= 0]


def one(which: str, trace: LinkTrace, deadline_s: float) -> dict[str, Any]:
    """One contender (or fixed action, by number) through one trace."""
    graph, cluster, profile, table = net.graph(), net.cluster(), net.profile(), actions(False)
    plans = PlanSet(primary=table.plans[0], standbys=tuple(Standby(plan=p) for p in table.plans[1:])).with_epochs(1)
    policy: Policy
    if which == "ecotone":
        policy = Controller(plans, graph, cluster, profile, Latency())
    elif which.isdigit():
        plans = PlanSet(primary=table.plans[int(which)]).with_epochs(int(which) + 1)
        policy = Static(which)
    else:
        trained = load("cuts")
        policy = contender(which, graph, cluster, profile, deadline_s=deadline_s, trained=trained).policy
    links = pairwise((net.DEVICE, net.SERVER, net.DEVICE))
    used = () if which.isdigit() and table.cuts[int(which)] < 0 else links
    found = simulate_adaptive(
        plans, policy, graph, cluster, profile, requests=round(trace.duration_s / PERIOD_S),
        script=tuple(FollowTrace(at_s=0.0, source=a, target=b, trace=trace) for a, b in used),
        arrivals=Periodic(period_s=PERIOD_S), max_in_flight=1, trace=False, worker=WorkerSettings(report_s=0.01),
        coordinator=CoordinatorSettings(session=1, node_timeout_s=60.0), queue_limit=1000,
    )  # fmt: skip
    rewards, hits, rule = [], [], Reward()
    for outcome in found.report.outcomes:
        in_time = not outcome.error and outcome.latency_s <= deadline_s
        late = min(rule.k * (outcome.latency_s / deadline_s - 1), rule.worst) if not outcome.error else rule.worst
        rewards.append(float(table.accuracy[outcome.epoch - 1]) if in_time else -late)
        hits.append(in_time)
    return {
        "reward": float(np.mean(rewards)),
        "in_time": float(np.mean(hits)),
        "switches": found.num_switches,
        "which": which,
    }
