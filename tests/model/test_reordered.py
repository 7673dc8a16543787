"""Other topological orders of a captured model: the same answers to the bit over any cuts; graphs that know their origin.

The oracle is the captured graph run whole. Orders are drawn at random among all topological orders, for blocks in one row
and for blocks that follow the branches.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import nn

from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.graph import Exit, Graph
from ecotone.model import Captured, ModelError, Segment, capture
from ecotone.plan import Plan, Stage, Transfer, plan_violations
from ecotone.schema import SchemaError

pytestmark = pytest.mark.torch

BRANCHED = ("inception", "unet", "detector", "two_towers", "tied", "windows")


@cache
def case(name: str, branches: bool = True) -> Captured:
    module, args, kwargs = zoo.build(name)
    return capture(module, args, kwargs, name=name, branches=branches)


def random_order(graph: Graph, seed: int) -> tuple[int, ...]:
    """A topological order, each next block drawn among those whose inputs are there."""
    rng = np.random.default_rng(seed)
    before = [{graph.tensors[t].producer for t in block.inputs} - {-1} for block in graph.blocks]
    order: list[int] = []
    while len(order) < graph.num_blocks:
        ready = [b for b in range(graph.num_blocks) if b not in order and before[b] <= set(order)]
        order.append(int(rng.choice(ready)))
    return tuple(order)


def run(segment: Segment, tensors: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tuple(t.contiguous() for t in segment.module()(*tensors))


@pytest.mark.parametrize(
    ("name", "branches"), [*((name, True) for name in BRANCHED), *((name, False) for name in ("inception", "two_towers"))]
)
def test_any_order_cut_anywhere_gives_the_same_answer(name: str, branches: bool) -> None:
    captured = case(name, branches)
    inputs = captured.example_inputs
    whole = captured.reference(inputs)
    seen = set()
    for seed in range(2):
        other = captured.reordered(random_order(captured.graph, seed))
        seen.add(other.graph.content_hash())
        count = other.graph.num_blocks
        assert all(torch.equal(a, b) for a, b in zip(other.reference(inputs), whole, strict=True))
        for position in range(seed % 2, count + 1, max(1, count // 3)):
            middle = run(other.segment(0, position), inputs)
            assert sum(t.numel() * t.element_size() for t in middle) == other.graph.frontier_bytes(position)
            made = run(other.segment(position, count), middle)
            assert all(torch.equal(a, b) for a, b in zip(made, whole, strict=True))
        if seed:
            continue
        tensors: Any = inputs
        for start, stop in itertools.pairwise(range(count + 1)):
            tensors = run(other.segment(start, stop), tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, whole, strict=True))
    if name in ("inception", "detector", "two_towers"):
        assert len(seen) > 1


@pytest.mark.parametrize("name", [*BRANCHED, "densenet", "t5"])
def test_blocks_that_follow_branches_make_the_same_model(name: str) -> None:
    module, args, kwargs = zoo.build(name)
    captured = case(name)
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(module(*args, **kwargs))
    found = torch.utils._pytree.tree_leaves(captured.unflatten_outputs(captured.reference(captured.example_inputs)))
    for a, b in zip(found, wanted, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    names = [p.name for p in captured.graph.parameters]
    assert sorted({p for block in captured.graph.blocks for p in block.parameters}) == list(range(len(names)))


def test_branches_stay_apart() -> None:
    """Two towers share no block before they meet, and the models of one row keep the blocks that they had."""
    graph = case("two_towers").graph
    towers = [{i for i, b in enumerate(graph.blocks) if b.name.startswith(side)} for side in ("left", "right")]
    assert all(len(tower) >= 3 for tower in towers)
    for i, block in enumerate(graph.blocks):
        sides = {side for side, tower in enumerate(towers) for t in block.inputs if graph.tensors[t].producer in tower}
        assert len(sides) < 2 or i not in towers[0] | towers[1]
    for name in ("convnext", "lstm"):
        assert [b.flop for b in case(name).graph.blocks] == [b.flop for b in case(name, False).graph.blocks]


def test_a_dynamic_batch_can_be_reordered() -> None:
    module, args, kwargs = zoo.build("detector")
    captured = capture(module, args, kwargs, dynamic_batch=True, branches=True)
    other = captured.reordered(random_order(captured.graph, 5))
    inputs = captured.flatten_inputs((torch.randn(3, 3, 16, 16),), {"scale": torch.rand(3)})
    whole, count = captured.reference(inputs), captured.graph.num_blocks
    for position in range(count + 1):
        made = run(other.segment(position, count), run(other.segment(0, position), inputs))
        assert all(torch.equal(a, b) for a, b in zip(made, whole, strict=True))


class Sums(nn.Module):
    """Two rows that forget the batch, one of which is told it again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s, y = self.a(x).sum(0), self.b(x)
        c = self.c(s.expand(x.shape[0], 8))
        return self.e(c * self.d(self.d(y).sum(0)))


def test_a_cut_that_cannot_tell_the_batch_is_refused() -> None:
    """The captured row has none; of the other orders one has. With `branches` none has."""
    refused = 0
    for branches in (False, True):
        captured = capture(Sums().eval(), (torch.randn(3, 8),), dynamic_batch=True, branches=branches)
        for seed in range(20):
            other = captured.reordered(random_order(captured.graph, seed))
            for position in range(captured.graph.num_blocks):
                crossing = other.graph.frontier(position)
                if any(other.graph.tensors[t].dynamic_dims for t in crossing):
                    other.segment(position, captured.graph.num_blocks)
                    continue
                assert not branches
                refused += 1
                with pytest.raises(ModelError, match="tells the batch"):
                    other.segment(position, captured.graph.num_blocks)
    assert refused


def test_graphs_know_their_order() -> None:
    graph = case("inception").graph
    order = random_order(graph, 3)
    other = graph.reordered(order)
    assert other.order == order
    assert other.content_hash() != graph.content_hash()
    assert Graph.from_json(other.to_json()) == other
    assert Graph.from_json(other.to_json()).content_hash() == other.content_hash()
    back = tuple(order.index(i) for i in range(graph.num_blocks))
    assert other.reordered(back) == graph
    assert other.reordered(back).order == ()
    assert graph.reordered(range(graph.num_blocks)).content_hash() == graph.content_hash()
    twice = other.reordered(random_order(other, 1))
    assert graph.reordered(twice.order) == twice
    assert other.segment_parameter_bytes(0, 99) == graph.segment_parameter_bytes(0, 99)


def test_orders_that_are_none_are_refused() -> None:
    graph = case("inception").graph
    count = graph.num_blocks
    with pytest.raises(SchemaError, match="each of the"):
        graph.reordered((0,) * count)
    with pytest.raises(SchemaError, match="before it is made"):
        case("inception").reordered(tuple(reversed(range(count))))


def test_exits_keep_their_tensor() -> None:
    plain = case("inception").graph
    place = next(p for p in plain.single_tensor_cuts() if p > 1)
    graph = Graph(**{f: getattr(plain, f) for f in ("name", "blocks", "tensors", "inputs", "outputs", "parameters")},
                  exits=(Exit(name="early", position=place, flop=1.0),))  # fmt: skip
    for seed in range(5):
        other = graph.reordered(random_order(graph, seed))
        assert other.frontier(other.exits[0].position) == graph.frontier(place)


def test_a_plan_names_its_order() -> None:
    """Checked against the captured graph, or against the one that it cuts."""
    graph = case("two_towers").graph
    other = graph.reordered(random_order(graph, 2))
    a, count = DeviceId("a"), graph.num_blocks
    cluster = Cluster(name="one", devices=(Device(name=a, memory_bytes=10**9),), links=(), source=a, sink=a)

    def plan(hash_: str, order: tuple[int, ...]) -> Plan:
        ends = tuple(Transfer(source=a, target=a, position=p, codec="none") for p in (0, count))
        return Plan(graph_hash=hash_, stages=(Stage(device=a, start=0, stop=count),), transfers=ends, order=order)

    right = plan(other.content_hash(), other.order)
    assert plan_violations(right, graph, cluster) == plan_violations(right, other, cluster) == ()
    assert Plan.from_json(right.to_json()) == right
    assert right.identity() != plan(other.content_hash(), ()).identity()
    wrong = plan_violations(plan(graph.content_hash(), other.order), graph, cluster)
    assert len(wrong) == 1
    assert "graph hash differs" in wrong[0]
    backwards = plan_violations(plan(other.content_hash(), tuple(reversed(range(count)))), graph, cluster)
    assert "before it is made" in backwards[0]
    with pytest.raises(SchemaError, match="order must name each"):
        plan(other.content_hash(), (0, 0))
