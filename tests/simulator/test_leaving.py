"""Simulated requests that leave early: drawn by number and seed, and in the mean just what cost.py predicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from worlds import chain, cluster_of, plan_of, profile_of

from ecotone import cost
from ecotone.accuracy import AccuracyTable, ExitPolicy
from ecotone.cluster import Cluster, DeviceId
from ecotone.graph import Exit, Graph
from ecotone.plan import Plan
from ecotone.planner.exiting import leaving_early
from ecotone.planset import PlanSet, Standby
from ecotone.profile import ExitTime, Profile
from ecotone.simulator import ClosedLoop, CutLink, KillNode, RestartNode, simulate
from ecotone.simulator.chaos import run_scene
from ecotone.simulator.exhaustive import small_scene
from ecotone.simulator.leaving import Leaving, rank_of
from ecotone.simulator.scene import plan_of as scene_plan
from ecotone.simulator.scene import predicted_s

pytestmark = pytest.mark.pure

World = tuple[Plan, Graph, Cluster, Profile]


def world(stages: str = "abc", shares: tuple[float, ...] = (0.5, 0.25)) -> World:
    """Blocks of 10 ms each, an exit of 2 ms behind each of the first ones."""
    exits = tuple(Exit(name=f"e{i + 1}", position=i + 1, flop=1.0) for i in range(len(shares)))
    graph = replace(chain(len(stages)), exits=exits)
    names = sorted(set(stages) | {"a"})
    policy = ExitPolicy(
        name="p", exits=tuple(e.name for e in exits), thresholds=(0.9,) * len(shares), shares=shares, loss_points=0.0
    )
    profile = replace(
        profile_of(graph, {n: [0.010] * len(stages) for n in names}, coding_s=0.001),
        exits=tuple(
            ExitTime(device=DeviceId(n), executor="torch:fp32", exit=e.name, median_s=0.002) for n in names for e in exits
        ),
        accuracy=AccuracyTable(
            graph_hash=graph.content_hash(), data_hash="", is_labelled=True, reference_points=80, cells=(),
            policies=(policy,),
        ),
    )  # fmt: skip
    plan = leaving_early(plan_of(graph, stages), graph, policy)
    return plan, graph, cluster_of("".join(names)), profile


def test_ranks_are_even_and_repeat() -> None:
    ranks = np.array([rank_of(seed, number) for seed in range(50) for number in range(200)])
    assert np.histogram(ranks, 10, (0, 1))[0] == pytest.approx(1000, rel=0.15)
    assert abs(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]) < 0.03
    assert [rank_of(3, n) for n in range(5)] == [rank_of(3, n) for n in range(5)] != [rank_of(4, n) for n in range(5)]


@pytest.mark.parametrize("stages", ["abc", "bac", "bbb"])
def test_the_mean_is_what_cost_predicts_and_the_tail_is_not(stages: str) -> None:
    plan, graph, cluster, profile = world(stages)
    predicted = cost.predict(plan, graph, cluster, profile)
    report = simulate(plan, graph, cluster, profile, requests=2000, seed=1)
    # Of 2000 drawn requests the shares differ by about sqrt(s (1 - s) / n), 1.1 points.
    assert report.exits["e1"] / 2000 == pytest.approx(0.5, abs=0.035)
    assert report.exits["e2"] / 2000 == pytest.approx(0.25, abs=0.035)
    assert report.mean_s == pytest.approx(predicted.latency_s, rel=0.03)
    # A quarter goes to the end, so the 95th percentile is that of the longest way, far above the mean.
    assert report.p95_s == pytest.approx(predicted.longest_s, rel=0.03)
    assert report.p95_s > 1.2 * report.mean_s
    exact = simulate(plan, graph, cluster, profile, requests=200, seed=1)
    for outcome in exact.outcomes:
        rank = rank_of(1, outcome.request)
        assert outcome.exit == ("e1" if rank < 0.5 else "e2" if rank < 0.75 else "")


def test_later_stages_are_free_for_others_so_a_pipeline_runs_at_the_mean_bottleneck() -> None:
    plan, graph, cluster, profile = world("abc", (0.5, 0.25))
    full = simulate(plan_of(graph, "abc"), graph, cluster, profile, requests=600, arrivals=ClosedLoop(in_flight=8))
    slow = replace(
        profile, segments=tuple(replace(s, median_s=4 * s.median_s) if s.device == "c" else s for s in profile.segments)
    )
    early = simulate(plan, graph, cluster, slow, requests=1500, arrivals=ClosedLoop(in_flight=8), seed=2)
    late = simulate(plan_of(graph, "abc"), graph, cluster, slow, requests=300, arrivals=ClosedLoop(in_flight=8))
    assert full.throughput_per_s == pytest.approx(100, rel=0.01)
    assert late.throughput_per_s == pytest.approx(25, rel=0.01)  # c takes 40 ms for each
    # c sees a quarter of the requests: 10 ms each in the mean. a computes 12 ms, and codes 1 ms for a half going out and a
    # half coming home; the simulator codes beside that. So a binds, at 77 a second in the formulas and 83 simulated.
    assert cost.predict(plan, graph, cluster, slow).throughput_per_s == pytest.approx(1 / 0.013)
    assert early.throughput_per_s > 0.8 / 0.012
    assert early.utilisation["c"] == pytest.approx(0.01 * early.throughput_per_s, rel=0.12)


def test_a_request_that_needs_no_link_is_answered_while_the_link_is_down() -> None:
    plan, graph, cluster, profile = world("abb", (0.6,))
    script = (CutLink(at_s=0.5, source=DeviceId("a"), target=DeviceId("b"), detect_s=0.05),)
    local = plan_of(graph, "aaa")
    alone = simulate(plan, graph, cluster, profile, requests=60, script=script, deadline_s=1.0, seed=5)
    early = [o for o in alone.outcomes if rank_of(5, o.request) < 0.6]
    late = [o for o in alone.outcomes if o.submitted_s > 0.6 and rank_of(5, o.request) >= 0.6]
    assert all(o.error for o in late)
    assert late
    assert all(o.exit == "e1" for o in early if not o.error)
    both = PlanSet(primary=plan, standbys=(Standby(plan=local),))
    report = simulate(both, graph, cluster, profile, requests=60, script=script, deadline_s=2.0, seed=5)
    assert not [o for o in report.outcomes if o.error]
    assert report.violations == ()


def test_runs_and_twins_of_a_request_leave_at_the_same_exit() -> None:
    plan, graph, cluster, profile = world("abc", (0.4, 0.3))
    twin = leaving_early(plan_of(graph, "acb"), graph, profile.accuracy.policies[0])  # type: ignore[union-attr]
    both = PlanSet(primary=plan, standbys=(Standby(plan=twin, mode="active"),))
    script = (
        KillNode(at_s=0.2, device=DeviceId("b")), RestartNode(at_s=0.5, device=DeviceId("b")),
        KillNode(at_s=0.8, device=DeviceId("c")), RestartNode(at_s=1.1, device=DeviceId("c")),
    )  # fmt: skip
    report = simulate(both, graph, cluster, profile, requests=80, script=script, seed=9, deadline_s=5.0)
    assert not [o for o in report.outcomes if o.error]
    assert {o.exit for o in report.outcomes} == {"e1", "e2", ""}
    for o in report.outcomes:
        rank = rank_of(9, o.request)
        assert o.exit == ("e1" if rank < 0.4 else "e2" if rank < 0.7 else "")


def test_a_scene_writes_its_exits_as_shares_and_a_misplaced_result_is_broken() -> None:
    plan = scene_plan("a:1?0.3 b:2?0.4 c:3", "a", 4)
    assert [(s.device, s.stop, s.exit, s.threshold) for s in plan.stages] == [
        ("a", 1, "exit1", 0.3), ("b", 2, "exit2", 0.4), ("c", 3, "", 0.0),
    ]  # fmt: skip
    assert [t.source for t in plan.exit_transfers] == ["a", "b"]
    scene = small_scene("exits, three machines")
    assert type(scene).from_toml(scene.to_toml()) == scene
    # b: 20 kB over a>b is not needed; a computes 20 ms, 8 kB to b, b 10 ms, then 4 kB to c and 12 ms, 1 kB home.
    whole = 0.020 + 0.010 + 0.012 + 3 * (2 * 0.0002 + 0.002) + (8_128 + 4_128 + 1_128) / 1e6
    assert predicted_s(scene, scene_plan(scene.deployments[0].plans[0], "a", 0)) == pytest.approx(whole)
    assert run_scene(scene).is_good
    wrong = run_scene(scene, after=lambda program: setattr(program.world, "exit_of", Leaving(scene.seed + 1)))
    assert any("instead of" in line for line in wrong.broken)
