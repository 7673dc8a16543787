"""Requests that leave early in a running session: their answers are the exit's, the later stages never see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from small_nets import cluster, plan
from torch import nn

from ecotone.accuracy import ExitPolicy
from ecotone.cluster import DeviceId
from ecotone.model import Captured, capture
from ecotone.model.exit_heads import capture_head, default_rule
from ecotone.plan import Plan
from ecotone.planner.exiting import leaving_early
from ecotone.planset import PlanSet, Standby
from ecotone.runtime import DeployError, Nodes, deploy, in_memory

pytestmark = pytest.mark.torch

FIRST, SECOND = 2, 4


class Steps(nn.Module):
    """Six linear layers of 16 and a classifier of 5: a chain, so that an exit may stand anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.last = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) + 0.1 * x
        made: torch.Tensor = self.last(x)
        return made


class OneOutput(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.line = nn.Linear(16, 5)
        with torch.no_grad():
            self.line.weight.mul_(scale)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.line(x),)


@pytest.fixture(scope="module")
def steps() -> Captured:
    torch.manual_seed(3)
    captured = capture(Steps().eval(), (torch.randn(1, 16),), name="steps")
    rule = default_rule(captured.graph)
    heads = [capture_head(captured, name, p, OneOutput(4.0), rule) for name, p in (("first", FIRST), ("second", SECOND))]
    return captured.with_exits(heads)


@pytest.fixture(scope="module")
def inputs() -> list[torch.Tensor]:
    torch.manual_seed(4)
    return [torch.randn(1, 16) for _ in range(40)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with in_memory(cluster("a", "b", "c")) as found:
        yield found


def policy(captured: Captured, inputs: list[torch.Tensor], *shares: float) -> ExitPolicy:
    """Thresholds at which about these shares of `inputs` leave at the first exits."""
    exits, thresholds, left = [], [], list(inputs)
    for head, share in zip(captured.exits, shares, strict=False):
        module = captured.segment(0, head.position, head.name).module()
        sure = [head.rule.of_request(module(x)[1:]) for x in left]
        middle = sorted(sure, reverse=True)[max(0, round(share * len(inputs)) - 1) :][:2]
        exits.append(head.name)
        thresholds.append(sum(middle) / 2)
        left = [x for x, s in zip(left, sure, strict=True) if s < thresholds[-1]]
    return ExitPolicy(name="by hand", exits=tuple(exits), thresholds=tuple(thresholds), shares=shares, loss_points=0.0)


def expected(captured: Captured, plan: Plan, x: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Where a request leaves and with what, by running the pieces by hand."""
    tensors: tuple[torch.Tensor, ...] = (x,)
    for stage in plan.stages:
        made = captured.segment(stage.start, stage.stop, stage.exit).module()(*tensors)
        if stage.exit:
            rule = next(head.rule for head in captured.exits if head.name == stage.exit)
            if rule.of_request(made[-rule.num_outputs :]) >= stage.threshold:
                return stage.exit, made[-1]
            made = made[: -rule.num_outputs]
        tensors = tuple(made)
    return "", tensors[0]


@pytest.mark.parametrize(
    "placed",
    [
        [("a", 7)],
        [("a", FIRST), ("b", 7)],
        [("a", 1), ("b", SECOND), ("c", 7)],
        [("b", FIRST), ("a", 5), ("c", 7)],
        [("c", 7)],
    ],
)
def test_each_request_leaves_where_its_confidence_says_with_the_answer_of_that_exit(
    steps: Captured, inputs: list[torch.Tensor], nodes: Nodes, placed: list[tuple[str, int]]
) -> None:
    length = steps.graph.num_blocks
    placed = [(device, min(stop, length)) for device, stop in placed]
    chosen = leaving_early(plan(steps.graph, *placed), steps.graph, policy(steps, inputs, 0.4, 0.3))
    wanted = [expected(steps, chosen, x) for x in inputs]
    assert {"first", "second", ""} == {name for name, _ in wanted}
    with deploy(chosen, steps, nodes) as session:
        futures = [session.submit((x,)) for x in inputs]
        for future, (name, answer) in zip(futures, wanted, strict=True):
            assert torch.equal(future.result(60.0), answer)
            assert future.exit == name
        assert [bool(torch.equal(found, answer)) for found, (_, answer) in zip(
            session.stream(inputs, in_flight=6), wanted, strict=True
        )] == [True] * len(inputs)  # in the order of the inputs, though some overtake others  # fmt: skip
        traces = sorted(session.report(), key=lambda trace: trace.request)[: len(inputs)]
    for trace, (name, _) in zip(traces, wanted, strict=True):
        last = next((i for i, s in enumerate(chosen.stages) if name and s.exit == name), len(chosen.stages) - 1)
        assert trace.exit == name
        assert [s.stage for s in trace.stages] == list(range(last + 1))  # later stages never saw it
        left_over = chosen.exit_edge(last) if name else len(chosen.stages)
        crossed = [e for e in (*range(last + 1), left_over) if not chosen.edges[e].is_local]
        assert sorted(t.edge for t in trace.transfers) == sorted(crossed)


def test_thresholds_alone_are_another_plan_of_the_set_and_nothing_is_compiled_twice(
    steps: Captured, inputs: list[torch.Tensor], nodes: Nodes
) -> None:
    base = plan(steps.graph, ("a", FIRST), ("b", steps.graph.num_blocks))
    some = leaving_early(base, steps.graph, policy(steps, inputs, 0.5))
    loose = replace(policy(steps, inputs, 0.5), thresholds=(0.0,))
    everyone = leaving_early(base, steps.graph, loose)
    with deploy(PlanSet(primary=some, standbys=(Standby(plan=everyone),)), steps, nodes) as session:
        left = [session.submit((x,)) for x in inputs]
        assert {f.exit for f in left if f.result(60.0) is not None} == {"first", ""}
        compiled = session._shell._stages._compiled  # what this node holds
        assert len(compiled) == 1
        session.prefer(session.plans[1])
        futures = [session.submit((x,)) for x in inputs]
        assert {f.exit for f in futures if f.result(60.0) is not None} <= {"first", ""}
        assert session.submit((inputs[0],)).exit in ("", "first")
        later = session.submit((inputs[0],))
        assert later.result(60.0) is not None
        assert later.exit == "first"


def test_with_the_server_gone_a_local_exit_still_answers(
    steps: Captured, inputs: list[torch.Tensor]
) -> None:  # SPINN: "it answers from the local exit"
    with in_memory(cluster("a", "b")) as nodes:
        base = plan(steps.graph, ("a", FIRST), ("b", steps.graph.num_blocks))
        split = leaving_early(base, steps.graph, policy(steps, inputs, 0.4))
        local = steps.until_exit("second")
        alone = plan(local.graph, ("a", local.graph.num_blocks))
        plans = PlanSet(primary=split, standbys=(Standby(plan=alone, label="local exit"),))
        with deploy(plans, steps, nodes, variants=(local,)) as session:
            first = [session.submit((x,)) for x in inputs[:8]]
            assert [f.epoch for f in first if f.result(60.0) is not None] == [session.plans[0].epoch] * 8
            nodes._threads[DeviceId("b")][0].stop()
            for x in inputs:
                future = session.submit((x,))
                answer = future.result(60.0)
                if future.epoch == alone.epoch or future.exit == "":
                    module = steps.segment(0, SECOND, "second").module()
                    assert torch.equal(answer, module(x)[1])
                else:
                    assert future.exit == "first"  # left before the link was needed


def test_a_plan_with_an_exit_that_the_model_has_not_is_refused(steps: Captured, nodes: Nodes) -> None:
    base = plan(steps.graph, ("a", steps.graph.num_blocks))
    wrong = leaving_early(
        base, steps.graph, ExitPolicy(name="x", exits=("first",), thresholds=(0.5,), shares=(0.5,), loss_points=0)
    )
    stages = (replace(wrong.stages[0], exit="third"), *wrong.stages[1:])
    with pytest.raises(DeployError, match="ends with exit 'third'; exits of the model are first at 2, second at 4"):
        deploy(replace(wrong, stages=stages), steps, nodes)
