"""accuracy_loss_sure: the upper ends of the intervals bind, exactly, against enumeration and by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from enumeration import World, best, chain_graph, random_world

from ecotone.accuracy import NOWHERE, AccuracyTable, Cell, ExitPolicy
from ecotone.cost import CostModel
from ecotone.planner import Latency, PlannerError, Throughput, solve
from ecotone.profile import Profile

pytestmark = pytest.mark.pure


def calibrated(world: World) -> Profile:
    """Nothing was seen to be lost, but as much as the world's shares cannot be excluded: those are its upper ends."""
    cells = [
        Cell(
            position=p, codec=codec, num_decisions=1000, points=100.0, loss_points=0.0, low_points=-1.0,
            high_points=100 * share, fitted_points=0.0,
        )
        for (p, codec), (_, share) in world.payload.items()
    ]  # fmt: skip
    table = AccuracyTable(
        graph_hash=world.graph.content_hash(), data_hash="d", is_labelled=True, reference_points=80.0, cells=tuple(cells)
    )
    payloads = tuple(replace(p, disagreement=0.0) for p in world.profile.payloads)
    return replace(world.profile, accuracy=table, payloads=payloads)


@pytest.mark.parametrize("objective", [Latency(), Throughput()], ids=["latency", "throughput"])
@pytest.mark.parametrize("seed", range(8))
def test_upper_ends_bind_as_the_enumeration_says(seed, objective):
    world = random_world(seed)
    for limit in (0.0, 0.25, 0.9):
        value = best(world, objective.name, loss_points=limit)
        try:
            found = solve(world.graph, world.cluster, calibrated(world), objective, (f"accuracy_loss_sure={limit}",))
        except PlannerError:
            assert value == float("inf")
            continue
        assert found.value == pytest.approx(value)
        assert found.cost.sure_points <= limit + 1e-9
        assert found.cost.loss_points == 0


def test_what_was_not_calibrated_is_not_sure():
    world = next(w for w in map(random_world, range(60)) if any(codec == "int8" for _, codec in w.codec))
    bare = replace(world.profile, payloads=tuple(replace(p, disagreement=0.0) for p in world.profile.payloads))
    model = CostModel(world.graph, world.cluster, bare)
    assert (model.sure_points(1, "int8"), model.sure_points(1, "fp32"), model.sure_points(1, "fp32+zstd")) == (100, 0, 0)
    found = solve(world.graph, world.cluster, bare, Latency(), ("accuracy_loss_sure=5",))
    assert {t.codec for t in found.plan.transfers} <= {"none", "fp32"}


def test_under_an_exit_policy_its_own_upper_end_counts_once():
    graph = chain_graph([4, 4, 4], [10, 10])
    policy = ExitPolicy(
        name="p", exits=("e",), thresholds=(0.5,), shares=(0.4,), loss_points=0.5, low_points=0.1, high_points=0.9
    )
    cell = Cell(
        position=1, codec="int8", policy="p", num_decisions=100, points=80, loss_points=0.7, low_points=0.2,
        high_points=1.5, fitted_points=0.7,
    )  # fmt: skip
    alone = replace(cell, policy="", loss_points=0.1, low_points=0.0, high_points=0.6, fitted_points=0.1)
    whole = replace(alone, position=NOWHERE, codec="none", loss_points=0.0, high_points=0.0, fitted_points=0.0)
    table = AccuracyTable(
        graph_hash=graph.content_hash(), data_hash="d", is_labelled=True, reference_points=80.0,
        cells=(cell, alone, whole), policies=(policy,),
    )  # fmt: skip
    assert table.sure_points(1, "int8", policy) == pytest.approx(1.5 - 0.5)
    assert table.crossing_points(1, "int8", policy) == pytest.approx(0.7 - 0.5)
    assert table.sure_points(1, "int8") == 0.6
    assert table.sure_points(1, "int4", policy) is None
    better = replace(policy, loss_points=-0.3, low_points=-0.6)
    assert table.crossing_points(1, "int8", better) == pytest.approx(0.7)  # what exits win is not charged to the crossing
