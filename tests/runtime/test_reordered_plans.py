"""Plans that cut a model in another order of its blocks, on the in-memory wire: the same answers, and the same promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loads import PATIENCE_S
from small_nets import cluster, even, plan

from ecotone.cluster import DeviceId
from ecotone.cost import predict
from ecotone.model import Captured, capture
from ecotone.plan import Plan
from ecotone.planner.reordering import world_of
from ecotone.planset import PlanSet, Standby
from ecotone.profile import Profile, SegmentTime
from ecotone.runtime import DeployError, Nodes, deploy, in_memory
from ecotone.simulator import simulate

pytestmark = pytest.mark.torch


class Towers(torch.nn.Module):
    """Two rows of linear layers that meet: eager float32 gives the same bits in any pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.left = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
        self.right = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16))
        self.head = torch.nn.Linear(32, 8)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        left, right = self.left(a), self.right(b)
        return {"score": self.head(torch.cat([left, right], 1)), "left": left}


@pytest.fixture(scope="module")
def towers() -> tuple[Captured, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    inputs = (torch.randn(4, 32), torch.randn(4, 24))
    return capture(Towers().eval(), inputs, name="towers", branches=True), inputs


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with in_memory(cluster("a", "b", "c")) as found:
        yield found


def interleaved(captured: Captured) -> Captured:
    """One block of each tower in turn."""
    names = [block.name for block in captured.graph.blocks]
    sides = [[i for i, name in enumerate(names) if name.startswith(side)] for side in ("left", "right")]
    assert len(sides[0]) == len(sides[1]) == 2
    order = [b for pair in zip(*reversed(sides), strict=True) for b in pair]
    return captured.reordered((*order, *(i for i in range(len(names)) if i not in order)))


def cut(captured: Captured, *placed: tuple[str, int]) -> Plan:
    return replace(plan(captured.graph, *placed), order=captured.graph.order)


def check(captured: Captured, inputs: tuple[torch.Tensor, ...], found: dict[str, torch.Tensor]) -> None:
    wanted = captured.unflatten_outputs(captured.reference(inputs))
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_plan_in_another_order_is_deployed_from_the_captured_model(
    nodes: Nodes, towers: tuple[Captured, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    captured, inputs = towers
    other = interleaved(captured)
    assert other.graph.content_hash() != captured.graph.content_hash()
    for stop in range(1, captured.graph.num_blocks):
        with deploy(cut(other, ("a", stop), ("b", captured.graph.num_blocks)), captured, nodes) as session:
            check(captured, inputs, session(*inputs))


def test_plans_of_several_orders_are_resident_together(
    nodes: Nodes, towers: tuple[Captured, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """The standby takes over after a kill; the session may hold the model in either order."""
    captured, inputs = towers
    other, count = interleaved(captured), captured.graph.num_blocks
    plans = PlanSet(primary=cut(other, ("a", 2), ("b", count)), standbys=(Standby(plan=even(captured.graph, "a", "c")),))
    for held in (captured, other):
        with in_memory(cluster("a", "b", "c")) as own, deploy(plans, held, own) as session:
            first = session.submit(inputs)
            check(captured, inputs, first.result(PATIENCE_S))
            own._threads[DeviceId("b")][0].stop()
            second = session.submit(inputs)
            check(captured, inputs, second.result(PATIENCE_S))
            assert (first.epoch, second.epoch) == (1, 2)
    with deploy(even(captured.graph, "a", "b"), captured, nodes) as session:
        assert session.how_to_switch(plans).kind == "beside"
    with deploy(plans.primary, captured, nodes) as session:
        switch = session.how_to_switch(even(captured.graph, "a", "b"))
        assert switch.kind == "beside"
        session.replan(even(captured.graph, "a", "b"))
        check(captured, inputs, session(*inputs))


def test_an_order_of_another_model_is_refused(
    nodes: Nodes, towers: tuple[Captured, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    captured, _ = towers
    torch.manual_seed(2)
    stranger = capture(Towers().eval(), towers[1], name="stranger", branches=True)
    other = interleaved(stranger)
    with pytest.raises(DeployError, match="another model"):
        deploy(cut(other, ("a", other.graph.num_blocks)), captured, nodes)


def test_a_result_in_the_journal_is_had_under_another_order(
    tmp_path: Path, towers: tuple[Captured, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    captured, inputs = towers
    other, count, journal = interleaved(captured), captured.graph.num_blocks, tmp_path / "journal"
    first, second = cut(other, ("a", 2), ("b", count)), even(captured.graph, "a", "b")
    with in_memory(cluster("a", "b")) as own, deploy(first, captured, own, journal=journal) as session:
        check(captured, inputs, session.submit(inputs, request_id="one").result(PATIENCE_S))
    with in_memory(cluster("a", "b")) as own, deploy(second, captured, own, journal=journal) as session:
        check(captured, inputs, session.claim("one", PATIENCE_S))


def test_a_simulation_prices_the_order_that_a_plan_names(
    towers: tuple[Captured, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    captured, _ = towers
    graph, machines = captured.graph, cluster("a", "b", rate=1e6, latency_s=1e-3)
    count = graph.num_blocks
    spans = [(0, c) for c in range(1, count + 1)] + [(c, count) for c in range(1, count)]
    segments = tuple(
        SegmentTime(
            device=d.name, executor="torch:fp32", start=a, stop=b, median_s=1e-3 * (b * b - a * a), spread_s=0.0,
            memory_bytes=0,
        )
        for d in machines.devices for a, b in spans
    )  # fmt: skip
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name="test", num_blocks=count, cuts=tuple(range(count + 1)),
        segments=segments,
    )  # fmt: skip
    chosen = cut(interleaved(captured), ("a", 2), ("b", count))
    report = simulate(chosen, graph, machines, profile, requests=3)
    other, measured = world_of(chosen.order, graph, machines, profile)
    assert report.p50_s == pytest.approx(predict(chosen, other, machines, measured).latency_s, rel=0.05)
