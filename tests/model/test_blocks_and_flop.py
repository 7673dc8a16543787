"""Blocks of the standard networks at full size, and FLOP against counts done by hand."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from ecotone.model import Captured, capture
from ecotone.model.blocks import Item, choose_cuts
from ecotone.model.flop import flop_of

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no installed package
models = importlib.import_module("benchmarks.models")

pytestmark = pytest.mark.torch


@cache
def captured(name: str) -> Captured:
    return capture(*models.MODELS[name](), name=name)


@pytest.mark.parametrize(
    ("name", "least", "most", "giga_flop", "million_parameters"),
    [  # FLOP are twice the multiply-adds of the papers: 1.8, 0.3 and 0.39 G
        ("resnet18", 10, 30, 3.64, 11.69),
        ("mobilenet_v2", 20, 60, 0.62, 3.50),
        ("efficientnet_b0", 20, 60, 0.80, 5.29),
    ],
)
def test_standard_networks(name: str, least: int, most: int, giga_flop: float, million_parameters: float) -> None:
    graph = captured(name).graph
    assert least <= graph.num_blocks <= most
    assert graph.segment_flop(0, graph.num_blocks) == pytest.approx(giga_flop * 1e9, rel=0.05)
    learned = [p for p in graph.parameters if "running" not in p.name]
    assert sum(p.size_bytes for p in learned) == pytest.approx(4e6 * million_parameters, rel=0.005)
    assert len(graph.single_tensor_cuts()) >= 8


def test_a_convolution_keeps_its_norm_and_activation() -> None:
    for block in captured("resnet18").graph.blocks[:-1]:
        assert block.ops[:2] == ("aten.conv2d.default", "aten.batch_norm.default")
    sums = [block.ops for block in captured("resnet18").graph.blocks if "aten.add.Tensor" in block.ops]
    assert len(sums) == 8
    assert all(ops.index("aten.relu.default") == ops.index("aten.add.Tensor") + 1 for ops in sums)


def test_transformers_have_a_few_blocks_per_layer() -> None:
    layer = nn.TransformerEncoderLayer(192, 3, 768, batch_first=True, norm_first=True)
    graph = capture(nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval(), torch.randn(1, 197, 192)).graph
    assert 12 * 2 <= graph.num_blocks <= 12 * 4
    assert len(graph.single_tensor_cuts()) >= 12


def test_weights_are_alive() -> None:
    """Activations neither die nor explode: what He initialisation and real statistics are for."""
    module, picture = models.mobilenet_v2()
    with torch.no_grad():
        for layer in module:
            picture = layer(picture)
            assert 1e-3 < picture.std() < 1e3


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "expected"),
    [
        ("aten.conv2d.default", [(1, 3, 8, 8), (16, 3, 3, 3), (16,)], [(1, 16, 8, 8)], 2 * 16 * 64 * 27),
        ("aten.conv2d.default", [(1, 16, 8, 8), (16, 1, 3, 3)], [(1, 16, 8, 8)], 2 * 16 * 64 * 9),  # depthwise
        ("aten.conv_transpose2d.input", [(1, 8, 4, 4), (8, 5, 2, 2)], [(1, 5, 8, 8)], 2 * 8 * 16 * 5 * 4),
        ("aten.linear.default", [(7, 12), (30, 12), (30,)], [(7, 30)], 2 * 7 * 12 * 30),
        ("aten.addmm.default", [(30,), (7, 12), (12, 30)], [(7, 30)], 2 * 7 * 12 * 30),
        ("aten.bmm.default", [(5, 7, 12), (5, 12, 3)], [(5, 7, 3)], 2 * 5 * 7 * 12 * 3),
        ("aten.matmul.default", [(5, 7, 12), (12, 3)], [(5, 7, 3)], 2 * 5 * 7 * 12 * 3),
        ("aten.einsum.default", [(7, 12), (12, 3)], [(7, 3)], 2 * 7 * 12 * 3),
        (
            "aten.scaled_dot_product_attention.default", [(1, 2, 7, 8), (1, 2, 9, 8), (1, 2, 9, 4)], [(1, 2, 7, 4)],
            2 * 7 * 9 * (2 * 8 + 2 * 4 + 5),
        ),
        ("aten.lstm.input", [(2, 5, 3), (1, 2, 4), (1, 2, 4), (16, 3), (16, 4), (16,), (16,)], [], 2 * 10 * 16 * 7),
        ("aten.relu.default", [(2, 3)], [(2, 3)], 6),
        ("aten.batch_norm.default", [(2, 3), (3,)], [(2, 3)], 30),
        ("aten.view.default", [(2, 3)], [(6,)], 0),
        ("operator.getitem", [], [(6,)], 0),
    ],
)  # fmt: skip
def test_flop_by_hand(op: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], expected: float) -> None:
    assert flop_of(op, inputs, outputs) == pytest.approx(expected)


def item(heavy: bool, reads: tuple[int, ...], size: float, cost: float = 1.0, has_batch: bool = True) -> Item:
    return Item(heavy=heavy, cost=cost, reads=reads, size_bytes=size, has_batch=has_batch)


def test_cuts_lie_where_least_crosses() -> None:
    """conv 8 -> relu 8 -> pool 2 -> pad 4 -> conv 8: cut after the pool."""
    items = [item(True, (-1,), 8), item(False, (0,), 8), item(False, (1,), 2), item(False, (2,), 4), item(True, (3,), 8)]
    assert choose_cuts(items, [item(False, (), 3)], [4], need_batch=False) == (3,)


def test_no_cut_where_something_cannot_cross_or_the_batch_is_lost() -> None:
    inf = float("inf")
    items = [item(True, (-1,), inf), item(False, (0,), inf), item(True, (1,), 8)]
    assert choose_cuts(items, [item(False, (), 3)], [2], need_batch=False) == ()
    items = [item(True, (-1,), 8, has_batch=False), item(True, (0,), 8)]
    assert choose_cuts(items, [item(False, (), 3)], [1], need_batch=True) == ()
    assert choose_cuts(items, [item(False, (), 3)], [1], need_batch=False) == (1,)


def test_units_too_small_to_matter_join_their_neighbour() -> None:
    items = [item(True, (-1,), 8, 1000.0), item(True, (0,), 4, 0.1), item(True, (1,), 8, 1000.0)]
    assert choose_cuts(items, [item(False, (), 3)], [2], need_batch=False) == (2,)
