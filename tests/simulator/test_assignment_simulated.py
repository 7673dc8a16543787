"""assign() end to end: offers, admission, slower streams, radio and closed users; what it promises, the simulator sees."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from many import SERVER, cell_of, closed_users, ends, offloading, open_users, seconds_of, star

from ecotone.cluster import Cluster, DeviceId
from ecotone.contention import Contention, Flow
from ecotone.cost import CostModel
from ecotone.media import Tuning
from ecotone.plan import Plan
from ecotone.planner.assignment import Assignment, assign
from ecotone.planner.objective import PlannerError
from ecotone.planner.offers import Candidate, offers_of, renamed, undominated
from ecotone.simulator import simulate_users
from ecotone.workload import Workload

pytestmark = pytest.mark.pure


def world(count: int, *, here: float = 0.15, server: float = 0.02, **more: float) -> tuple:
    graph, cluster = star(count, rate=2e7, **more)
    return graph, cluster, seconds_of(graph, count, (here, here), (server / 2, server / 2))


def simulated(found: Assignment, workload: Workload, cluster: Cluster, graph, profile, **more) -> dict[str, float]:
    many = simulate_users(
        workload, found.plans, cluster, [(graph, profile)], tunings=found.tunings, duration_s=40.0, warm_up_s=4.0,
        max_in_flight=100, queue_limit=10_000, **more,
    )  # fmt: skip
    return {name: report.mean_s for name, report in many.users.items()}


def test_offers_hold_what_is_best_alone_and_what_needs_no_server() -> None:
    graph, cluster, profile = world(3)
    found = offers_of(open_users(3, 5.0), cluster, {"": (graph, profile)})
    assert list(found) == ["u0", "u1", "u2"]
    for name, candidates in found.items():
        placed = [tuple(s.device for s in c.plan.stages) for c in candidates]
        assert placed[0] == (SERVER,)
        assert (DeviceId(name),) in placed
        assert all(c.plan.source == name for c in candidates)
        latencies = [c.cost.latency_s for c in candidates]
        assert latencies == sorted(latencies)
    assert [renamed(c.plan, DeviceId("u0"), DeviceId("u1")) for c in found["u0"]] == [c.plan for c in found["u1"]]


def test_a_plan_that_asks_more_of_everything_is_no_offer() -> None:
    graph, cluster, profile = world(1)
    model = CostModel(graph, cluster, profile)
    plans = [offloading(graph, "u0", cut, codec) for cut, codec in ((0, "fp32"), (0, "fp16"), (2, "fp32"))]
    candidates = [Candidate(plan=p, cost=model.predict(p)) for p in plans]
    assert [c.plan for c in undominated(candidates)] == [plans[1], plans[2]]  # fp16 sends half and costs nothing here
    assert undominated([candidates[0], candidates[0]]) == (candidates[0],)


def test_users_whom_the_server_cannot_all_serve_are_spread() -> None:
    """Eight users at 8 requests a second and 20 ms each would be 128 % of the server; at home it is 300 ms at 8 a second."""
    graph, cluster, profile = world(4, here=0.05)
    workload = open_users(4, 8.0)
    crowded = assign(workload, cluster, {"": (graph, profile)})
    assert [u.plan.stages[0].device for u in crowded.users] == [SERVER] * 4
    eight = world(8, here=0.05)
    found = assign(open_users(8, 8.0), eight[1], {"": (eight[0], eight[2])}, time_limit_s=5.0)
    assert not found.refused
    at_server = sum(u.plan.stages[0].device == SERVER for u in found.users)
    assert 3 <= at_server <= 5
    assert found.utilisation["processor s"] <= 0.95
    means = simulated(found, open_users(8, 8.0), eight[1], eight[0], eight[2])
    assert np.mean([u.mean_s for u in found.users]) == pytest.approx(np.mean(list(means.values())), rel=0.15)


def test_the_joint_plan_is_that_of_enumeration_under_the_full_formulas() -> None:
    """Three closed users, all their offers in all combinations."""
    graph, cluster, profile = world(3, here=0.04, server=0.05)
    workload = closed_users(3, 2)
    models = {"": (graph, profile)}
    offers = offers_of(workload, cluster, models)
    found = assign(workload, cluster, models, offers=offers)
    best = min(
        np.mean([u.mean_s for u in Contention(cluster).standing(flows).users])
        for chosen in itertools.product(*(offers[u.name] for u in workload.users))
        for flows in [[Flow(name=u.name, cost=c.cost, in_flight=2) for u, c in zip(workload.users, chosen, strict=True)]]
    )
    assert found.value == pytest.approx(best, rel=1e-5)
    assert found.gap == 0.0


def test_who_does_not_fit_is_refused_with_the_reason_and_weights_decide() -> None:
    graph, cluster, profile = world(4, here=10.0, server=0.04)
    many = open_users(4, 8.0)  # 32 % of the server each
    users = tuple(replace(u, weight=w) for u, w in zip(many.users, (1.0, 3.0, 1.0, 2.0), strict=True))
    found = assign(replace(many, users=users), cluster, {"": (graph, profile)})
    assert {u.name for u in found.users} == {"u1", "u3"}
    assert [r.name for r in found.refused] == ["u0", "u2"]
    assert found.refused[0].reason == "processor s would be at 96%, at most 95% may be promised"
    assert Assignment.from_json(found.to_json()) == found


def test_streams_that_may_be_slower_are_slowed_down_before_anyone_is_refused() -> None:
    graph, cluster, profile = world(4, here=10.0, server=0.04)
    many = open_users(4, 8.0, least_rate_per_s=2.0)
    found = assign(many, cluster, {"": (graph, profile)}, time_limit_s=4.0)
    assert not found.refused
    rates = [u.rate_per_s for u in found.users]
    assert rates == pytest.approx([rates[0]] * 4)
    assert 0.9 <= sum(rates) * 0.04 <= 0.95 + 1e-9  # as fast as the server allows
    assert found.utilisation["processor s"] == pytest.approx(sum(rates) * 0.04)


def test_an_open_stream_beside_a_closed_one_is_slowed_to_its_share() -> None:
    """u1 always has three requests at the server; u0's 60 % would not fit beside it, the half that is its share does."""
    graph, cluster, profile = world(2, here=10.0, server=0.04)
    both = closed_users(2, 3, require=("device=s",))
    elastic = replace(both.users[0], in_flight=0, rate_per_s=15.0, least_rate_per_s=2.0)
    workload = replace(both, users=(elastic, both.users[1]))
    found = assign(workload, cluster, {"": (graph, profile)}, time_limit_s=4.0)
    assert not found.refused
    rate = found.users[0].rate_per_s
    assert 0.9 * 0.95 * 0.5 / 0.04 <= rate <= 0.95 * 0.5 / 0.04 * (1 + 1e-9)
    promised = replace(workload, users=(replace(elastic, rate_per_s=rate), both.users[1]))
    assert simulated(found, promised, cluster, graph, profile)["u0"] < 1.0  # it would be 10 s at 15 a second


def test_a_deadline_keeps_a_user_off_the_crowded_server() -> None:
    """All three are best at the server in the mean, but u0's deadline would then be missed; at home it is kept."""
    graph, cluster, profile = world(3, here=0.07, server=0.04)
    many = open_users(3, 6.0)
    late = replace(many, users=(replace(many.users[0], arrivals="periodic", deadline_s=0.145), *many.users[1:]))
    free = assign(many, cluster, {"": (graph, profile)})
    assert all(u.plan.stages[0].device == SERVER for u in free.users)
    found = assign(late, cluster, {"": (graph, profile)})
    assert not found.refused
    assert all(u.p95_s <= 0.145 for u in found.users if u.name == "u0")


def test_users_of_a_radio_cell_get_channels_and_powers_that_do_not_jam() -> None:
    graph, cluster = cell_of((50.0, 50.0, 50.0))
    profile = seconds_of(graph, 3, (0.4, 0.5), (0.001, 0.001))
    workload = open_users(3, 0.4)
    found = assign(workload, cluster, {"": (graph, profile)}, time_limit_s=8.0)
    assert not found.refused
    tunings = [u.tuning for u in found.users]
    assert all(t is not None and t.channel in (0, 1) and 0 < t.watt <= 1.0 for t in tunings)
    loud = {str(u): Tuning(channel=i % 2, watt=1.0) for i, u in enumerate(ends(3))}
    plain = Contention(cluster).standing(
        [Flow(name=u.name, cost=u.cost, rate_per_s=0.4) for u in found.users], loud
    )  # fmt: skip
    assert found.value <= np.mean([u.mean_s for u in plain.users])
    means = simulated(found, workload, cluster, graph, profile)
    assert np.mean([u.mean_s for u in found.users]) == pytest.approx(np.mean(list(means.values())), rel=0.25)


def test_a_score_decides_between_the_search_s_choice_and_the_polished_one() -> None:
    graph, cluster, profile = world(3, here=0.05, server=0.05)
    workload = open_users(3, 8.0)
    seen: list[dict[str, Plan]] = []

    def score(plans: Mapping[str, Plan], tunings: Mapping[str, Tuning], promised: Workload) -> float:
        seen.append(dict(plans))
        assert [u.rate_per_s for u in promised.users] == [8.0] * 3
        return float(len(seen))

    found = assign(workload, cluster, {"": (graph, profile)}, score=score)
    assert found.plans == seen[0]
    assert 1 <= len(seen) <= 2


def test_what_cannot_be_is_refused_in_words() -> None:
    graph, cluster, profile = world(2)
    two = open_users(2, 1.0)
    bad = replace(two, users=(two.users[0], replace(two.users[1], require=("latency=1ms",))))
    with pytest.raises(PlannerError, match=r"user u1: .*latency=1 ms fails"):
        assign(bad, cluster, {"": (graph, profile)})
    with pytest.raises(PlannerError, match="nobody offers a plan for u0"):
        assign(two, cluster, {"": (graph, profile)}, offers={"u1": offers_of(two, cluster, {"": (graph, profile)})["u1"]})
