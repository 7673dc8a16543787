"""Random modules with branches, joins, views, chunks and several outputs: any cut of any of them is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ecotone.model import Segment, capture

pytestmark = pytest.mark.torch

WIDTH = 4
OPERATIONS = ("linear", "conv", "relu", "add", "mul", "cat", "chunk", "transpose", "softmax", "inplace", "mean", "shift")


class Random(nn.Module):
    """Each step names an operation and two earlier tensors; every tensor is (batch, WIDTH, WIDTH)."""

    def __init__(self, steps: list[tuple[str, int, int]], outputs: list[int]):
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))  # shared by all linear steps
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        values = [x, y]
        for operation, first, second in self.steps:
            values.append(self.step(operation, values[first % len(values)], values[second % len(values)], second))
        picked = [values[number % len(values)] for number in self.outputs]
        return {"first": picked[0], "rest": tuple(picked[1:])}

    def step(self, operation: str, a: torch.Tensor, b: torch.Tensor, number: int) -> torch.Tensor:
        if operation == "inplace":
            c = torch.tanh(a)
            c += b
            c[:, 1:] *= 0.5
            return c
        if operation == "chunk":
            left, right = self.narrow(torch.cat([a, b], -1)).chunk(2, -1)
            return torch.cat([right, left], -1)
        made = {
            "linear": lambda: self.linears[number % 2](a), "conv": lambda: self.conv(a), "relu": lambda: torch.relu(a),
            "add": lambda: a + b, "mul": lambda: a * torch.sigmoid(b), "cat": lambda: self.narrow(torch.cat([a, b], -1)),
            "transpose": lambda: a.transpose(1, 2), "softmax": lambda: torch.softmax(a @ b, -1),
            "mean": lambda: a - a.mean((1, 2), keepdim=True),
            "shift": lambda: a + self.shift + torch.arange(WIDTH, dtype=a.dtype),
        }  # fmt: skip
        return made[operation]()


steps = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@settings(max_examples=40)
@given(
    steps=steps, outputs=st.lists(st.integers(0, 13), min_size=1, max_size=3), seed=st.integers(0, 99), dynamic=st.booleans()
)
def test_any_cut_of_any_graph_is_exact(
    steps: list[tuple[str, int, int]], outputs: list[int], seed: int, dynamic: bool
) -> None:
    torch.manual_seed(seed)
    module = Random(steps, [len(steps) + 1, *outputs]).eval()
    x, y = torch.randn(2, WIDTH, WIDTH), torch.randn(2, WIDTH, WIDTH)
    captured = capture(module, (x, y), dynamic_batch=dynamic)
    if dynamic:
        x, y = torch.randn(3, WIDTH, WIDTH), torch.randn(3, WIDTH, WIDTH)
    inputs = captured.flatten_inputs((x, y))
    whole = captured.reference(inputs)
    count = captured.graph.num_blocks
    with torch.no_grad():
        wanted = module(x.clone(), y.clone())
        for cut in range(count + 1):
            head = captured.segment(0, cut)
            tail = captured.segment(cut, count)
            blobs = {sha256: tail.blob(name) for name, (sha256, _) in tail.manifest().items()}
            tail = Segment.from_parts(tail.program_json(), blobs.__getitem__)
            made = tail.module()(*[tensor.contiguous() for tensor in head.module()(*inputs)])
            assert all(torch.equal(a, b) for a, b in zip(made, whole, strict=True))
    found = captured.unflatten_outputs(whole)
    for a, b in zip((found["first"], *found["rest"]), (wanted["first"], *wanted["rest"]), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@settings(max_examples=20)
@given(offset=st.integers(1, 15), seed=st.integers(0, 9))
def test_where_a_tensor_lies_in_memory_does_not_change_the_answer(offset: int, seed: int) -> None:
    """Bytes off a wire start anywhere; torch's own memory starts at multiples of 64. The answers are equal to the bit."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 5)).eval()
    x = torch.rand(1, 3, 16, 16)
    captured = capture(net, (x,))
    elsewhere = torch.empty(x.numel() + 16)[offset : offset + x.numel()].view_as(x).copy_(x)
    assert torch.equal(captured.reference((elsewhere,))[0], captured.reference((x,))[0])
