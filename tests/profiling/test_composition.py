"""Whole plans beside the sum of their crossings: measured by a walk of its own, predicted by the table, never mixed up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_classifier import classifier, exits, samples

from ecotone import codec
from ecotone.accuracy import AccuracyTable, Crossing, ExitPolicy
from ecotone.model import Captured
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.profiling import check_composition, measure_accuracy, random_crossings
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

CODECS = ("fp32", "int8", "int3", "int2")
COUNT = 80
POLICY = ExitPolicy(name="p", exits=("late",), thresholds=(0.9,), shares=(0.0,), loss_points=0.0)


@pytest.fixture(scope="module")
def captured() -> Captured:
    return classifier()


@pytest.fixture(scope="module")
def table(captured: Captured, tmp_path_factory: pytest.TempPathFactory) -> AccuracyTable:
    path = tmp_path_factory.mktemp("tables") / "t.json"
    heads = exits(captured)
    return measure_accuracy(captured, samples(COUNT), codecs=CODECS, policies=[POLICY], exits=heads, path=path)


def plan_of(captured: Captured, *cuts: tuple[int, str], exit_name: str = "", threshold: float = 0.0) -> Plan:
    """Stages over a and b in turn, cut at these positions in these codecs; back to a in float32."""
    length = captured.graph.num_blocks
    stops = [*(cut for cut, _ in cuts), length]
    stages, transfers, start, device = [], [Transfer(source="a", target="a", position=0, codec=LOCAL)], 0, "a"
    for number, stop in enumerate(stops):
        stages.append(Stage(device=device, start=start, stop=stop))
        other = "b" if device == "a" else "a"
        if number < len(cuts):
            transfers.append(Transfer(source=device, target=other, position=stop, codec=cuts[number][1]))
            start, device = stop, other
    local = device == "a"
    transfers.append(Transfer(source=device, target="a", position=length, codec=LOCAL if local else "fp32"))
    leaving = ()
    if exit_name:
        stages[0] = replace(stages[0], exit=exit_name, threshold=threshold)
        leaving = (Transfer(source="a", target="a", position=length, codec=LOCAL),)
    return Plan(
        graph_hash=captured.graph.content_hash(), stages=tuple(stages), transfers=tuple(transfers), exit_transfers=leaving
    )


def walked(captured: Captured, cuts: dict[int, str], x: torch.Tensor) -> int:
    values: tuple[torch.Tensor, ...] = (x,)
    for block in range(captured.graph.num_blocks):
        if block in cuts:
            names = [captured.graph.tensors[t].name for t in captured.graph.frontier(block)]
            values = tuple(codec.unpack(codec.pack(list(zip(names, values, strict=True)), cuts[block])))
        values = captured.segment(block, block + 1).module()(*values)
    return int(values[0].argmax())


def test_whole_plans_are_measured_beside_their_sum(captured, table):
    given = samples(COUNT)
    reference = [int(captured.reference(s)[0].argmax()) for s in given]
    plans = [plan_of(captured, (1, "int2"), (2, "int3")), plan_of(captured, (1, "int8"), (2, "int8"))]
    plans += [plan_of(captured, (1, "fp32"), (2, "fp32")), plan_of(captured, (1, "int2"), (2, "int3"))]
    found = check_composition(captured, table, given, plans=plans)
    assert [str(c) for c in found] == ["1:int2 2:int3", "1:int8 2:int8"]  # each once, and nothing lossless
    for composition in found:
        cuts = {c.position: c.codec for c in composition.crossings}
        differ = sum(walked(captured, cuts, s[0]) != y for s, y in zip(given, reference, strict=True))
        assert composition.loss_points == pytest.approx(100 * differ / COUNT)
        assert composition.predicted_points == pytest.approx(
            sum(table.cell(c.position, c.codec).fitted_points for c in composition.crossings)
        )
        assert composition.low_points <= composition.loss_points <= composition.high_points
        assert composition.is_safe == (composition.loss_points <= composition.predicted_points)
        assert not (composition.is_safe and composition.is_refuted)
    kept = replace(table, compositions=found)
    assert AccuracyTable.from_json(kept.to_json()) == kept
    assert kept.composition(found[0].crossings) == found[0]
    assert kept.composition(found[0].crossings[:1]) is None


def test_exits_of_a_plan_are_followed(captured, table):
    given, heads = samples(COUNT), exits(captured)
    plan = plan_of(captured, (2, "int2"), exit_name="late", threshold=0.9)
    (found,) = check_composition(captured, table, given, plans=[plan], exits=heads)
    assert found.policy == "p"
    cell = table.cell(2, "int2", "p")  # one crossing: the sum is the measured cell
    assert found.loss_points == pytest.approx(cell.loss_points)
    assert found.predicted_points == pytest.approx(cell.fitted_points)
    with pytest.raises(EcotoneError, match=r"exits late at 0\.5 are no policy of the table"):
        check_composition(captured, table, given, plans=[plan_of(captured, (2, "int2"), exit_name="late", threshold=0.5)])


def test_random_chains_could_be_plans(captured, table):
    chains = random_crossings(captured.graph, table, 10, seed=1, limit_points=50.0)
    assert chains == random_crossings(captured.graph, table, 10, seed=1, limit_points=50.0)
    assert len(set(chains)) == len(chains) > 3
    for chain in chains:
        positions = [c.position for c in chain]
        assert positions == sorted(set(positions))
        assert 2 <= len(chain) <= 3
        assert all(table.cell(c.position, c.codec).fitted_points <= 50 and c.codec != "fp32" for c in chain)
    assert len(check_composition(captured, table, samples(COUNT), plans=chains)) == len(chains)
    assert random_crossings(captured.graph, table, 10, limit_points=-1.0) == ()


def test_other_samples_and_unknown_cells_are_refused(captured, table):
    chain = (Crossing(position=1, codec="int2"), Crossing(position=2, codec="int4"))
    with pytest.raises(EcotoneError, match="of another model or calibration set"):
        check_composition(captured, table, samples(COUNT, seed=9), plans=[chain])
    with pytest.raises(EcotoneError, match="of another model or calibration set"):
        check_composition(classifier(seed=3), table, samples(COUNT), plans=[chain])
    with pytest.raises(EcotoneError, match="int4 at 2 is not in the table"):
        check_composition(captured, table, samples(COUNT), plans=[chain])
    assert check_composition(captured, table, samples(COUNT), plans=[]) == ()
