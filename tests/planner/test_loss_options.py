"""After the loss of a device: the score by hand, what holds of any weights, and the trap of weights that must be loaded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from enumeration import World, chain_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from test_failover_choice import three

from ecotone.cluster import DeviceId
from ecotone.cost import predict
from ecotone.plan import Plan
from ecotone.planner import Latency, PlannerError, Variant, solve
from ecotone.planner.options import Loading, Option, OptionWeights, Outlook, score_options
from ecotone.profile import Profile, SegmentTime

pytestmark = pytest.mark.pure


def plan_of(world: World) -> Plan:
    return solve(world.graph, world.cluster, world.profile, Latency()).plan


def option(name: str, accuracy: float, latency: float, downtime: float, plan: Plan = plan_of(three())) -> Option:
    return Option(name=name, plan=plan, accuracy_points=accuracy, latency_s=latency, downtime_s=downtime)


# Repartition keeps the accuracy and takes long to load; the exit is quick and poor; the skip lies between.
TABLE = (option("repartition", 92.0, 0.30, 1.2), option("exit", 80.0, 0.10, 0.06), option("skip", 89.0, 0.28, 0.06))


def test_score_by_hand() -> None:
    """Accuracy scaled: 1, 0, 0.75; latency: 1, 0, 0.9; downtime: 1, 0, 0. Weights 2, 1, 1: 0, 0, 0.6."""
    scores = {s.option.name: s.score for s in score_options(TABLE, OptionWeights(accuracy=2, latency=1, downtime=1))}
    assert scores == pytest.approx({"repartition": 0.0, "exit": 0.0, "skip": 0.6})


@pytest.mark.parametrize(
    ("weights", "best"),
    [((1, 0, 0), "repartition"), ((0, 1, 0), "exit"), ((3, 1, 3), "skip"), ((9, 1, 1), "repartition"), ((1, 3, 1), "exit")],
)
def test_the_option_flips_with_the_weights(weights: tuple[float, float, float], best: str) -> None:
    asked = OptionWeights(accuracy=weights[0], latency=weights[1], downtime=weights[2])
    assert score_options(TABLE, asked)[0].option.name == best


numbers = st.floats(0, 1e3)
options = st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(rows=options, weights=st.tuples(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(0.01, 10)))
def test_what_holds_of_any_weights(rows: list, weights: tuple[float, float, float]) -> None:
    """No option wins that another beats in everything; units and a common factor of the weights do not matter."""
    table = [option(str(i), *row) for i, row in enumerate(rows)]
    asked = OptionWeights(accuracy=weights[0], latency=weights[1], downtime=weights[2])
    found = score_options(table, asked)
    best = found[0].option
    for other in table:
        ahead = (other.accuracy_points - best.accuracy_points, best.latency_s - other.latency_s)
        assert not all(v > 1e-6 for v in (*ahead, best.downtime_s - other.downtime_s))
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)
    doubled = OptionWeights(accuracy=2 * weights[0], latency=2 * weights[1], downtime=2 * weights[2])
    assert score_options(table, doubled)[0].score == pytest.approx(2 * found[0].score)
    milli = [replace(o, latency_s=o.latency_s * 1024, downtime_s=o.downtime_s * 1024) for o in table]
    assert [s.score for s in score_options(milli, asked)] == pytest.approx([s.score for s in found], abs=1e-6)


def early_exit(world: World, loss_points: float) -> Variant:
    """The first two blocks and their own answer, on the camera: 20 ms."""
    graph = chain_graph([10_000, 5_000, 250], [1000, 1000], [1.0] * 2, name="exit")
    segments = tuple(
        SegmentTime(
            device=DeviceId("camera"), executor="torch:fp32", start=a, stop=b, median_s=(b - a) * 10e-3, spread_s=0,
            memory_bytes=0,
        )
        for a, b in ((0, 1), (1, 2), (0, 2))
    )  # fmt: skip
    profile = Profile(graph_hash=graph.content_hash(), cluster_name="c", num_blocks=2, cuts=(0, 1, 2), segments=segments)
    return Variant(name="exit", graph=graph, profile=profile, loss_points=loss_points)


def test_options_of_a_cluster_by_hand() -> None:
    """edge1 is lost. Repartition: camera [0, 2), edge2 [2, 4): 27.4 ms; 800 kB of weights over 1 MB/s and 1 ms, one stage
    of 0.5 s to warm, 20 ms to choose, 55 ms until it begins; the head is loaded. Exit: 20 ms; its one stage is warmed."""
    world = three()
    outlook = Outlook(world.graph, world.cluster, world.profile, [early_exit(world, 12.0)])
    found = {o.name: o for o in outlook.options(DeviceId("edge1"), [plan_of(world)])}
    assert found["repartition"].latency_s == pytest.approx(27.4e-3)
    assert found["repartition"].downtime_s == pytest.approx(0.055 + 0.02 + 0.801 + 0.5)
    assert (found["exit"].accuracy_points, found["exit"].latency_s) == (88.0, pytest.approx(20e-3))
    assert found["exit"].downtime_s == pytest.approx(0.055 + 0.02 + 0.5)
    assert all("edge1" not in o.plan.devices for o in found.values())


def test_a_resident_standby_changes_the_order() -> None:
    """Repartition on edge2 loads for 1.4 s; with that plan resident nothing is loaded, and it wins over the exit."""
    world = three()
    asked, lost = OptionWeights(accuracy=1, latency=1, downtime=2), DeviceId("edge1")
    outlook = Outlook(world.graph, world.cluster, world.profile, [early_exit(world, 12.0)])
    cold = outlook.options(lost, [plan_of(world)])
    assert score_options(cold, asked)[0].option.name == "exit"
    standby = next(o.plan for o in cold if o.name == "repartition")
    warm = score_options(outlook.options(lost, [plan_of(world), standby]), asked)
    assert warm[0].option.plan == standby
    assert warm[0].option.downtime_s == pytest.approx(0.055)


def test_what_a_downtime_cannot_be_worked_out_for_is_no_option() -> None:
    """edge2 can be reached from edge1 only, so once edge1 is lost nobody can hand it weights."""
    world = three()
    links = tuple(k for k in world.cluster.links if "edge2" not in (k.source, k.target))
    lone = replace(world.cluster, links=links)
    found = Outlook(world.graph, lone, world.profile).options(DeviceId("edge1"))
    assert [o.plan.devices for o in found] == [("camera",)]
    assert found[0].latency_s == predict(found[0].plan, world.graph, lone, world.profile).latency_s


def test_the_same_every_time_and_the_loading_is_stated() -> None:
    world = three()
    outlook = Outlook(world.graph, world.cluster, world.profile, loading=Loading(choose_s=0.0, warm_s=0.0))
    first = outlook.options(DeviceId("edge2"))
    assert outlook.options(DeviceId("edge2")) == first
    assert all(math.isfinite(o.downtime_s) for o in first)


@pytest.mark.parametrize("lost", ["camera", "nobody"])
def test_a_loss_that_cannot_be_answered(lost: str) -> None:
    world = three()
    with pytest.raises(PlannerError, match=f"{lost}: is source or sink, or no device"):
        Outlook(world.graph, world.cluster, world.profile).options(DeviceId(lost))


def test_nothing_left_and_bad_weights_are_said() -> None:
    with pytest.raises(PlannerError, match="nothing is left to run"):
        score_options([], OptionWeights())
    for bad in ((-1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (math.nan, 1.0, 1.0)):
        with pytest.raises(PlannerError, match="must be finite"):
            OptionWeights(accuracy=bad[0], latency=bad[1], downtime=bad[2])
