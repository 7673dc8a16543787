"""Heads to train, by the kind of tensor that crosses: maps of a convolution, sequences of tokens, vectors.

    map [n, C, H, W]     3x3 depthwise and 1x1 convolutions, strided while the map is large (the first 3x3 is whole: it sees
                         raw channels), then pooled to one value per class, or to a coarser map where the output is one
    tokens [n, T, D]     first token beside the mean of all, or each token where the output has one row per token; MLP
    vector [n, D]        MLP

As BranchyNet found, an early head needs more layers than a late one: 4, 3 or 2 by the share of FLOP before it. Its width is
the greatest whose FLOP stay under a share of the model's. Depthwise separable convolutions as in MobileNet: an eighth of the
weights of whole ones for a point or two of accuracy less. Every head gives just the model's outputs.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ecotone.graph import Graph
from ecotone.model.capture import Captured, capture
from ecotone.model.confidence import ExitRule, classes_dim
from ecotone.model.errors import ModelError
from ecotone.model.exit_places import flop_share
from ecotone.model.exits import ExitHead, check_place, checked_name
from ecotone.model.program import dtype_of

__all__ = ["Head", "capture_head", "default_rule", "fold_temperature", "make_head"]

WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
POOLED = 2  # a map is strided until it is so many times the output's size along a side
SMALL_SIDE = 4  # or, where the output is no map, until its sides are so small


class Head(nn.Module):
    """One branch per output of the model: forward(tensor) -> tuple of its outputs, in their dtypes; float32 inside."""

    def __init__(self, branches: Sequence[nn.Sequential], dtypes: Sequence[torch.dtype] = ()) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.dtypes = tuple(dtypes) or (torch.float32,) * len(branches)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.float()
        return tuple(branch(x).to(dtype) for branch, dtype in zip(self.branches, self.dtypes, strict=True))


class _Layer(nn.Module):
    """A whole 3x3 convolution, or a depthwise one and a 1x1; a skip where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, whole: bool) -> None:
        super().__init__()
        if whole:
            body: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)]
        else:
            body = [
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, outputs, 1, bias=False),
            ]  # fmt: skip
        self.body = nn.Sequential(*body, nn.BatchNorm2d(outputs))
        self.has_skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return torch.relu(x + made if self.has_skip else made)


class _MeanMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class _FirstAndMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x[:, 0], x.mean(1)), 1)


def make_head(graph: Graph, position: int, flop_budget: float = 0.05) -> Head:
    """A fresh head for `position` whose FLOP are at most `flop_budget` of the model's (the narrowest may be above it).

    Raises ModelError where the tensor there and an output are of kinds that no head is known for.
    """
    tensor = check_place(graph, "asked for", position)
    share = flop_share(graph, position)
    depth = 4 if share < 0.25 else 3 if share < 0.6 else 2
    outputs = [graph.tensors[i] for i in graph.frontier(graph.num_blocks)]
    most = flop_budget * graph.segment_flop(0, graph.num_blocks) / len(outputs)
    branches = []
    for output in outputs:
        if not output.dtype.startswith(("float", "bfloat")):
            raise ModelError(f"{graph.name}: output {output.name} is {output.dtype}; an exit gives outputs of floats only")
        made = _branch(tensor.shape, output.shape, depth, most)
        if made is None:
            found = f"a tensor {list(tensor.shape)} and an output {list(output.shape)}"
            raise ModelError(f"{graph.name}: no head is known for {found} at position {position}; give a module of your own")
        branches.append(made)
    return Head(branches, [dtype_of(output.dtype) for output in outputs])


def _branch(shape: tuple[int, ...], out: tuple[int, ...], depth: int, most: float) -> nn.Sequential | None:
    if shape[:1] != out[:1] or len(out) < 2:
        return None
    if len(shape) == 4 and len(out) in (2, 4):
        return _map_branch(shape, out, depth, most)
    if len(shape) == 3 and len(out) == 2:
        return nn.Sequential(_FirstAndMean(), *_mlp(2 * shape[2], out[1], depth, most / shape[0]))
    if len(shape) == 3 and len(out) == 3 and shape[1] == out[1]:
        return nn.Sequential(*_mlp(shape[2], out[2], depth, most / (shape[0] * shape[1])))
    if len(shape) == 2 and len(out) == 2:
        return nn.Sequential(*_mlp(shape[1], out[1], depth, most / shape[0]))
    return None


def _map_branch(shape: tuple[int, ...], out: tuple[int, ...], depth: int, most: float) -> nn.Sequential | None:
    """Layers, pooling, and a 1x1 convolution (dense) or a linear layer."""
    batch, channels, height, width = shape
    ratio = 0
    if len(out) == 4:
        ratio = height // out[2] if out[2] else 0
        if not ratio or (height, width) != (ratio * out[2], ratio * out[3]):
            return None
    size, least = (ratio, POOLED) if ratio else (max(height, width), SMALL_SIDE)
    strides = _strides(depth, size, least)
    whole = [depth >= 4 and number == 0 for number in range(depth)]  # an early head's first layer sees few channels

    def cost(wide: int) -> float:
        pixels, inputs, total = float(batch * height * width), channels, 0.0
        for stride, is_whole in zip(strides, whole, strict=True):
            pixels /= stride * stride
            total += 2 * pixels * (9 * inputs * wide if is_whole else inputs * (9 + wide))
            inputs = wide
        return total + 2 * pixels * wide * out[1]

    wide = _widest(cost, most, 4 * channels)
    widths = [channels, *[wide] * depth]
    layers = [_Layer(a, b, s, w) for a, b, s, w in zip(widths, widths[1:], strides, whole, strict=False)]
    if not ratio:
        return nn.Sequential(*layers, _MeanMap(), nn.Linear(wide, out[1]))
    left = ratio // math.prod(strides)
    pool = [nn.AvgPool2d(left)] if left > 1 else []
    return nn.Sequential(*layers, *pool, nn.Conv2d(wide, out[1], 1))


def _strides(depth: int, size: int, least: int) -> list[int]:
    """Halve `size` with each layer while it is above `least`, evenly."""
    strides = []
    for _ in range(depth):
        strides.append(2 if size > least and size % 2 == 0 else 1)
        size //= strides[-1]
    return strides


def _mlp(inputs: int, classes: int, depth: int, most: float) -> list[nn.Module]:
    hidden = depth - 1

    def cost(wide: int) -> float:
        return 2.0 * (inputs * wide + (hidden - 1) * wide * wide + wide * classes)

    wide = _widest(cost, most, max(4 * inputs, 32))
    layers: list[nn.Module] = [nn.LayerNorm(inputs)]
    for number in range(hidden):
        layers += [nn.Linear(inputs if number == 0 else wide, wide), nn.GELU()]
    return [*layers, nn.Linear(wide, classes)]


def _widest(cost: Callable[[int], float], most: float, limit: int) -> int:
    fitting = [w for w in WIDTHS if w <= limit and cost(w) <= most]
    return max(fitting, default=WIDTHS[0])


def default_rule(graph: Graph, measure: str = "top", over: str = "mean", output: int | None = None) -> ExitRule:
    """The rule of exits of this model: the first output with classes decides, or number `output` of its distinct ones."""
    outputs = [graph.tensors[i] for i in graph.frontier(graph.num_blocks)]
    with_classes = [
        i for i, t in enumerate(outputs)
        if len(t.shape) >= 2 and t.shape[classes_dim(len(t.shape))] >= 2 and t.dtype.startswith(("float", "bfloat"))
    ]  # fmt: skip
    if not with_classes or (output is not None and output not in with_classes):
        shapes = ", ".join(str(list(t.shape)) for t in outputs)
        raise ModelError(f"{graph.name}: no output has classes to be sure of (outputs {shapes}); exits need one")
    chosen = with_classes[0] if output is None else output
    dim = classes_dim(len(outputs[chosen].shape))
    return ExitRule(num_outputs=len(outputs), output=chosen, dim=dim, measure=measure, over=over)


def fold_temperature(head: Head, output: int, temperature: float) -> None:
    """Divide the answers of branch `output` by `temperature`, in its last layer."""
    last = head.branches[output][-1]  # type: ignore[index]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.div_(temperature)


def _fused(head: nn.Module) -> nn.Module:
    """A copy in evaluation mode, every batch norm folded into the convolution before it: fewer operators and weights."""
    head = copy.deepcopy(head).eval()
    for module in [m for m in head.modules() if isinstance(m, nn.Sequential)]:
        for i, (layer, norm) in enumerate(itertools.pairwise(list(module))):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[i], module[i + 1] = fuse_conv_bn_eval(layer, norm), nn.Identity()
    return head.eval()


def capture_head(captured: Captured, name: str, position: int, module: nn.Module, rule: ExitRule) -> ExitHead:
    """`module` (one tensor in, the model's outputs out) as the exit `name` of `captured`; weights as float16 holds them.

    Raises ModelError where it cannot be captured or does not give the model's outputs.
    """
    check_place(captured.backbone, name, position)
    module = _fused(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().to(parameter.dtype))
        (tensor,) = captured.segment(0, position).module()(*captured.example_inputs)
    made = capture(module, (tensor.clone(memory_format=torch.preserve_format),), name=f"exit {checked_name(name)}")
    head = ExitHead(name, position, made.segment(0, made.graph.num_blocks), rule)
    captured.with_exits([head])  # says what does not fit
    return head
