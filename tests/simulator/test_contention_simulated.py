"""The formulas of contention against the simulator, which is the truth: the error is stated, and held to what is stated.

Rates are those that the simulation happened to have. More loads and requests: benchmarks/users.py, docs/users.md.
"""

from __future__ import annotations

import numpy as np
import pytest
from many import cell_of, closed_users, offloading, open_users, seconds_of, star

from ecotone.cluster import Cluster
from ecotone.contention import Contention, Flow
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.media import Tuning
from ecotone.profile import Profile
from ecotone.simulator import simulate_users
from ecotone.workload import Workload

pytestmark = pytest.mark.pure


def errors(
    graph: Graph, cluster: Cluster, profile: Profile, workload: Workload, cuts: tuple[int, ...] = (1,),
    tunings: dict[str, Tuning] | None = None, requests: int = 900,
) -> tuple[float, float]:  # fmt: skip
    """Relative errors of the mean over users of mean latency and of p95, formula over simulation."""
    plans = {u.name: offloading(graph, u.name, cuts[i % len(cuts)]) for i, u in enumerate(workload.users)}
    model = CostModel(graph, cluster, profile)
    per_s = sum(u.rate_per_s for u in workload.users) or 20.0
    found = []
    for seed in (1,):
        many = simulate_users(
            workload, plans, cluster, [(graph, profile)], tunings=tunings, duration_s=1.1 * requests / per_s,
            warm_up_s=0.1 * requests / per_s, max_in_flight=10_000, queue_limit=10_000, seed=seed,
        )  # fmt: skip
        flows = [
            Flow(
                name=u.name, cost=model.predict(plans[u.name]), in_flight=u.in_flight, weight=u.weight,
                rate_per_s=0.0 if u.in_flight else len(many.users[u.name].outcomes) / many.window_s,
            )
            for u in workload.users
        ]  # fmt: skip
        standing = Contention(cluster).standing(flows, tunings)
        means = [(standing.user(n).mean_s, r.mean_s, standing.user(n).p95_s, r.p95_s) for n, r in many.users.items()]
        mean, mean_true, p95, p95_true = np.mean(np.array(means), axis=0)
        found.append((mean / mean_true - 1, p95 / p95_true - 1))
    return tuple(np.mean(found, axis=0))  # type: ignore[return-value]


@pytest.mark.parametrize(("rho", "limit"), [(0.3, 0.03), (0.7, 0.12)])
def test_users_of_one_server(rho: float, limit: float) -> None:
    graph, cluster = star(4, rate=4e7)
    profile = seconds_of(graph, 4, (0.01, 0.03), (0.02, 0.02))
    mean, p95 = errors(graph, cluster, profile, open_users(4, rho / 0.03 / 4), cuts=(0, 1))
    assert abs(mean) <= limit
    assert abs(p95) <= 2.5 * limit


@pytest.mark.parametrize(("rate", "rho", "limit"), [(1e7, 0.3, 0.06), (1e7, 0.6, 0.1), (4e6, 0.6, 0.1)])
def test_users_of_one_wire(rate: float, rho: float, limit: float) -> None:
    """Links that could fill the wire, and links of which 2.5 fill it."""
    graph, cluster = star(6, rate=rate, shared=1e7)
    profile = seconds_of(graph, 6, (0.001, 1.0), (1.0, 1e-4))
    mean, p95 = errors(graph, cluster, profile, open_users(6, rho / 0.04 / 6))
    assert abs(mean) <= limit
    assert abs(p95) <= 2.5 * limit


@pytest.mark.parametrize(("share", "limit"), [(0.1, 0.08), (0.25, 0.12)])
def test_users_of_one_radio_channel(share: float, limit: float) -> None:
    """Powers 20 dB apart; `share` of what the channel carries alone. One channel has a third of what it had."""
    graph, cluster = cell_of((50.0, 50.0, 50.0))
    profile = seconds_of(graph, 3, (0.001, 1.0), (1.0, 1e-4))
    tunings = {f"u{i}": Tuning(channel=c, watt=w) for i, (c, w) in enumerate(((0, 1.0), (0, 0.01), (1, 1.0)))}
    alone_s = 4e5 / cluster.radios[0].alone_bytes_per_s("u0")
    mean, _ = errors(graph, cluster, profile, open_users(3, share / alone_s / 3 * 1.5), tunings=tunings, requests=700)
    assert abs(mean) <= limit


@pytest.mark.parametrize(("count", "in_flight"), [(2, 1), (4, 3)])
def test_closed_users(count: int, in_flight: int) -> None:
    """Deterministic rounds fall into step and never wait for chance: the formula is above, by 13 % at most."""
    graph, cluster = star(count, rate=4e7)
    profile = seconds_of(graph, count, (0.03, 1.0), (1.0, 0.02))
    mean, _ = errors(graph, cluster, profile, closed_users(count, in_flight), requests=200)
    assert 0 <= mean <= 0.13
