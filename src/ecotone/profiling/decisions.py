"""Decisions: what a model says in the end, as class numbers. Everything about accuracy is counted in them.

A decision is the arg-max over the classes of one output: over dimension 1 where it has four dimensions or more (a map of
N,C,H,W has one decision per pixel), else over the last (N,C: one an item; N,T,C: one a token). Outputs that are not
floating point, have no dimension or one class decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ecotone.graph import Graph

__all__ = ["class_dim", "count_differing", "decided", "decides", "disagreement"]


def class_dim(output: torch.Tensor) -> int | None:
    """The dimension of the classes; None where this output decides nothing."""
    if not output.is_floating_point() or output.dim() == 0:
        return None
    dim = 1 if output.dim() >= 4 else output.dim() - 1
    return dim if output.shape[dim] > 1 else None


def decides(graph: Graph) -> bool:
    """Whether some output of the model has decisions."""
    outputs = (graph.tensors[index] for index in graph.outputs)
    shapes = [o.shape for o in outputs if o.shape and o.dtype.startswith(("float", "bfloat"))]
    return any(shape[1 if len(shape) >= 4 else -1] > 1 for shape in shapes)


def decided(outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Class numbers (int64) of every output that decides something, in order."""
    return tuple(output.argmax(dim) for output in outputs if (dim := class_dim(output)) is not None)


def count_differing(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> tuple[int, int]:
    """How many decisions of one sample differ, and how many there are; both as `decided` gives them."""
    pairs = list(zip(mine, theirs, strict=True))
    return sum(int((a != b).sum()) for a, b in pairs), sum(b.numel() for _, b in pairs)


def disagreement(made: Sequence[Sequence[torch.Tensor]], wanted: Sequence[Sequence[torch.Tensor]]) -> float:
    """Share of decisions that differ over all samples; 0 where nothing is decided."""
    counts = [count_differing(decided(mine), decided(theirs)) for mine, theirs in zip(made, wanted, strict=True)]
    total = sum(count for _, count in counts)
    return sum(differ for differ, _ in counts) / total if total else 0.0
