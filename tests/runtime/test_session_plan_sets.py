"""Plan sets over the in-memory wire: failover, twins, variants, preference, pause, and what the asker is told of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from loads import PATIENCE_S, eventually, set_of
from small_nets import Lines, cluster, even, lines, plan

from ecotone.cluster import DeviceId
from ecotone.model import Captured, capture
from ecotone.planset import PlanSet, Standby
from ecotone.protocol import effects
from ecotone.runtime import Busy, DeployError, NodeLost, Nodes, NodeUnreachable, RequestError, deploy, in_memory

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def exact() -> tuple[Captured, torch.Tensor]:
    return lines()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with in_memory(cluster("a", "b", "c")) as found:
        yield found


def kill(nodes: Nodes, name: str) -> None:
    """End a node of this process at once: the others see that it is gone."""
    nodes._threads[DeviceId(name)][0].stop()


def expected(captured: Captured, x: torch.Tensor) -> torch.Tensor:
    return captured.unflatten_outputs(captured.reference((x,)))


@pytest.mark.parametrize("standby", [("a",), ("a", "c"), ("c",)], ids=["local", "tail elsewhere", "all elsewhere"])
def test_requests_go_on_under_the_standby_when_a_node_dies(
    nodes: Nodes, exact: tuple[Captured, torch.Tensor], standby: tuple[str, ...]
) -> None:
    captured, x = exact
    with deploy(set_of(captured, ("a", "b"), standby), captured, nodes) as session:
        assert [p.epoch for p in session.plans] == [1, 2]
        assert torch.equal(session(x), expected(captured, x))
        nodes.set_links(cluster("a", "b", "c", rate=1e4).links[:2])  # a>b and a>c: what follows is on its way when b dies
        waiting = [session.submit((x,)) for _ in range(4)]
        kill(nodes, "b")
        assert all(torch.equal(future.result(PATIENCE_S), expected(captured, x)) for future in waiting)
        assert {future.epoch for future in waiting} == {2}
        assert session.plan.epoch == 2
        assert any("runs again under plan 2" in line for line in session.explanation())
        again = session.submit((x,))
        assert torch.equal(again.result(PATIENCE_S), expected(captured, x))
        traces = {trace.request: trace for trace in session.report()}
        assert {run.epoch for run in traces[waiting[0].request].others} <= {1}
        assert traces[waiting[0].request].attempt == 1


def test_a_twin_answers_when_its_brother_is_slow_and_each_result_comes_once(
    nodes: Nodes, exact: tuple[Captured, torch.Tensor]
) -> None:
    captured, x = exact
    told: list[object] = []
    with deploy(set_of(captured, ("b",), ("c",), mode="active"), captured, nodes) as session:
        session.listen(told.append)
        nodes.set_links((replace(cluster("a", "b", rate=2e3).links[0]),))  # a>b: 1 KiB takes half a second
        futures = [session.submit((x + i,)) for i in range(5)]
        for i, future in enumerate(futures):
            assert torch.equal(future.result(PATIENCE_S), expected(captured, x + i))
            assert future.epoch == 2
    assert not [effect for effect in told if isinstance(effect, effects.Rerouted)]


def test_prefer_moves_new_requests_at_once_and_tells(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    told: list[object] = []
    with deploy(set_of(captured, ("b",), ("c",), ("a",)), captured, nodes) as session:
        session.listen(told.append)
        for wanted in (3, 2, 1, 2):
            chosen = next(p for p in session.plans if p.epoch == wanted)
            session.prefer(chosen)
            future = session.submit((x,))
            assert torch.equal(future.result(PATIENCE_S), expected(captured, x))
            assert future.epoch == wanted
            assert session.plan == chosen
            assert {p.epoch for p in session.plans} == {1, 2, 3}
        assert [e.epoch for e in told if isinstance(e, effects.Preferred)] == [3, 2, 1, 2]
        with pytest.raises(DeployError, match="is not resident"):
            session.prefer(even(captured.graph, "a", "b"))


def test_a_variant_answers_on_the_survivor_with_its_own_structure(nodes: Nodes) -> None:
    """The main model gives a tensor of 64 columns; the variant, for the same inputs, one of 8 in a dict."""

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"small": self.layer(x)}

    captured, x = lines()
    small = capture(Small().eval(), (x,), name="small")
    plans = PlanSet(
        primary=even(captured.graph, "a", "b"),
        standbys=(Standby(plan=even(small.graph, "a"), label="smaller variant"),),
    )
    with pytest.raises(DeployError, match="another model"):
        deploy(plans, captured, nodes)
    with deploy(plans, captured, nodes, variants=(small,)) as session:
        assert torch.equal(session(x), expected(captured, x))
        kill(nodes, "b")
        eventually(lambda: session.plan.epoch == 2)
        found = session(x)
        assert torch.equal(found["small"], small.reference((x,))[0])


def test_a_variant_with_other_inputs_is_refused_by_name(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, _ = exact
    other = capture(Lines().eval(), (torch.randn(3, 64),), name="other")
    with pytest.raises(DeployError, match=r"variant other takes.*must take the same inputs"):
        deploy(even(captured.graph, "a"), captured, nodes, variants=(other,))


def test_an_outage_of_every_plan_is_waited_out(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    network = nodes.port.wire._network if hasattr(nodes.port.wire, "_network") else nodes.port.wire._inner._network  # type: ignore[attr-defined]
    with deploy(set_of(captured, ("b",), ("c",)), captured, nodes, queue_limit=3, max_in_flight=1) as session:
        session(x)
        network.cut("a", "b")
        network.cut("a", "c")
        eventually(lambda: not session.is_ready)
        waiting = [session.submit((x,), deadline_s=PATIENCE_S) for _ in range(3)]
        late = session.submit((x,))
        assert isinstance(late.exception(PATIENCE_S), Busy)  # the queue is bounded while nothing runs
        assert session.num_waiting == 3
        network.heal("a", "c")
        assert all(torch.equal(future.result(PATIENCE_S), expected(captured, x)) for future in waiting)


def test_without_any_plan_left_requests_end_with_node_lost(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    with deploy(set_of(captured, ("b",), ("c",)), captured, nodes, node_timeout_s=0.3) as session:
        session(x)
        kill(nodes, "b")
        kill(nodes, "c")
        error = session.submit((x,)).exception(PATIENCE_S)
        assert isinstance(error, NodeLost)
        assert "no plan goes without" in str(error)


def test_a_failing_stage_is_tried_under_the_next_plan(
    nodes: Nodes, exact: tuple[Captured, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, x = exact
    with deploy(set_of(captured, ("a", "b"), ("a", "c")), captured, nodes) as session:

        def poisoned(number: int, epoch: int, index: int) -> object:
            raise ArithmeticError("division of the sea")

        monkeypatch.setattr(nodes._threads[DeviceId("b")][0].shell._stages, "get", poisoned)
        future = session.submit((x,))
        assert torch.equal(future.result(PATIENCE_S), expected(captured, x))
        assert future.epoch == 2
        monkeypatch.setattr(nodes._threads[DeviceId("c")][0].shell._stages, "get", poisoned)
        with pytest.raises(RequestError, match="division of the sea"):
            session.submit((x,)).result(PATIENCE_S)


def test_a_set_whose_first_plan_is_out_of_reach_begins_with_a_standby(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    with in_memory(cluster("a", "b")) as nodes:
        kill(nodes, "b")
        eventually(lambda: not nodes.port.peers())
        with pytest.raises(NodeUnreachable, match="node b"):
            deploy(even(captured.graph, "a", "b"), captured, nodes, timeout_s=0.5)
        with deploy(set_of(captured, ("a", "b"), ("a",)), captured, nodes, timeout_s=0.5) as session:
            assert torch.equal(session(x), expected(captured, x))
            assert session.plan.devices == ("a",)
            assert any("the preferred plan joins later" in line for line in session.explanation())


def test_a_standby_that_cannot_be_made_is_left_out(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    broken = even(captured.graph, "a", "c", executor="no-such:fp32")
    plans = PlanSet(primary=even(captured.graph, "a", "b"), standbys=(Standby(plan=broken),))
    with deploy(plans, captured, nodes) as session:
        assert [p.epoch for p in session.plans] == [1]
        assert torch.equal(session(x), expected(captured, x))
        assert any("plan 2 is left out" in line for line in session.explanation())


def tight(captured: Captured, share: float) -> Nodes:
    """Nodes of which b has memory for `share` of the model's weights, and its working set."""
    world = cluster("a", "b")
    length = captured.graph.num_blocks
    size = int(captured.graph.segment_parameter_bytes(0, length) * share) + 64 * 1024
    devices = tuple(replace(d, memory_bytes=size) if d.name == "b" else d for d in world.devices)
    return in_memory(replace(world, devices=devices))


def test_where_memory_holds_one_set_only_a_pause_is_announced_and_taken(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    length = captured.graph.num_blocks
    small, large = plan(captured.graph, ("a", length - 1), ("b", length)), plan(captured.graph, ("b", length))
    other = plan(captured.graph, ("a", 1), ("b", length))
    with tight(captured, 1.05) as nodes, deploy(large, captured, nodes) as session:
        assert session.how_to_switch(large).kind == "beside"  # equal stages are held once
        switch = session.how_to_switch(other)
        assert switch.kind == "pause"
        assert "b has" in switch.reason
        stages = nodes._threads[DeviceId("b")][0].shell._stages
        cap = nodes.cluster.device(DeviceId("b")).memory_bytes
        for chosen in (other, large, small, other):
            before = [session.submit((x,)) for _ in range(3)]
            moved = session.replan(chosen)
            after = session.submit((x,))
            for future in (*before, after):
                assert torch.equal(future.result(PATIENCE_S), expected(captured, x))
            assert after.epoch == moved.epoch
            assert stages.held_bytes <= cap
        assert any("switching with a pause" in line for line in session.explanation())


def test_a_pause_that_fails_brings_the_old_plans_back(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    length = captured.graph.num_blocks
    large, broken = (plan(captured.graph, ("b", length), executor=e) for e in ("torch:fp32", "no-such:fp32"))
    with tight(captured, 1.05) as nodes, deploy(large, captured, nodes) as session:
        with pytest.raises(DeployError, match=r"no-such.*the old plans are back"):
            session.replan(broken)
        assert session.plan.identity() == large.identity()
        assert torch.equal(session(x), expected(captured, x))


def test_a_node_that_leaves_in_order_is_failed_over_not_waited_for(
    nodes: Nodes, exact: tuple[Captured, torch.Tensor]
) -> None:
    captured, x = exact
    with deploy(set_of(captured, ("a", "b"), ("a", "c")), captured, nodes) as session:
        stop, errors = threading.Event(), []

        def load() -> None:
            while not stop.is_set():
                try:
                    if not torch.equal(session(x), expected(captured, x)):
                        errors.append("wrong result")
                except Exception as error:
                    errors.append(str(error))

        worker = threading.Thread(target=load)
        worker.start()
        leaving = nodes._threads[DeviceId("b")][0]
        leaving.leave(PATIENCE_S)
        assert leaving.shell.is_idle  # it was let go, its patience did not end
        stop.set()
        worker.join(PATIENCE_S)
        assert not errors
        assert [p.devices for p in session.plans] == [("a", "c")]
        assert any("node b is shutting down: going on with 1 plan" in line for line in session.explanation())


def test_one_id_runs_once_while_it_runs(exact: tuple[Captured, torch.Tensor], nodes: Nodes) -> None:
    captured, x = exact
    with deploy(even(captured.graph, "b"), captured, nodes) as session:
        nodes.set_links(cluster("a", "b", rate=1e4).links)
        first = session.submit((x,), request_id="one")
        assert session.submit((x,), request_id="one") is first
        with pytest.raises(RequestError, match="runs already with other inputs"):
            session.submit((x + 1,), request_id="one")
        assert torch.equal(session.claim("one", PATIENCE_S), expected(captured, x))


def test_the_memory_for_inputs_is_bounded(exact: tuple[Captured, torch.Tensor], nodes: Nodes) -> None:
    captured, x = exact
    with deploy(even(captured.graph, "b"), captured, nodes, held_limit_bytes=3 * x.nbytes) as session:
        nodes.set_links(cluster("a", "b", rate=1e4).links)
        ended = [f.exception(PATIENCE_S) for f in [session.submit((x,)) for _ in range(6)]]
        assert sum(isinstance(error, Busy) for error in ended) == 3
        assert sum(error is None for error in ended) == 3


def test_a_session_seen_by_its_listener(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> None:
    """The machine reports what nodes measured; a listener that raises does not end the session."""
    captured, x = exact
    told: list[object] = []

    def listener(effect: object) -> None:
        told.append(effect)
        raise ValueError("a fault of the listener")

    with deploy(even(captured.graph, "a", "b"), captured, nodes) as session:
        session.listen(listener)
        end = time.monotonic() + PATIENCE_S
        while not any(isinstance(e, effects.Observed) and e.peer == "b" for e in told) and time.monotonic() < end:
            session(x)
        observed = [e for e in told if isinstance(e, effects.Observed) and e.peer == "b"]
        works = {(sample.work, sample.epoch) for e in observed for sample in e.report.work}
        assert ("compute", 1) in works
