"""FLOP of one operator from shapes: a multiplication and an addition are two; the rest is counted per element.

Matrix work is exact (convolution, linear, matrix products, attention, recurrent cells); norms and softmax count five per
element, other operators one per element made, views none. It is a size for planning, not a promise about time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ecotone.model.operators import GETITEM, is_view

__all__ = ["flop_of"]

Shape = tuple[int, ...]
_FIVE = {
    "batch_norm", "_native_batch_norm_legit_no_training", "layer_norm", "native_layer_norm", "group_norm",
    "native_group_norm", "instance_norm", "rms_norm", "softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax",
}  # fmt: skip
_RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def flop_of(op: str, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> float:
    """FLOP of `op` ("aten.conv2d.default") on tensors of these shapes: arguments in order, results in order."""
    if op == GETITEM or is_view(op):
        return 0.0
    name = op.split(".")[1]
    made = float(sum(math.prod(shape) for shape in outputs))
    if "conv" in name and len(inputs) > 1:
        data, weight = inputs[0], inputs[1]
        if "transpose" in name:
            return 2.0 * math.prod(data) * math.prod(weight[1:])
        return 2.0 * made * math.prod(weight[1:])
    if name in ("linear", "mm", "bmm", "matmul", "mv", "dot") and inputs:
        return 2.0 * made * (inputs[0][-1] if inputs[0] else 1)
    if name in ("addmm", "baddbmm", "addbmm", "addmv") and len(inputs) > 1:
        return 2.0 * made * inputs[1][-1]
    if name == "einsum":
        return _einsum(inputs, made)
    if "scaled_dot_product" in name and len(inputs) > 2:
        query, key, value = inputs[:3]
        pairs = float(math.prod(query[:-1]) * key[-2])
        return 2.0 * pairs * (query[-1] + value[-1]) + 5.0 * pairs
    if name in _RECURRENT and inputs:
        return _recurrent(inputs)
    if name.endswith("_cell") and len(inputs) > 3:
        return 2.0 * inputs[0][0] * sum(math.prod(shape) for shape in inputs[2:] if len(shape) == 2)
    return (5.0 if name in _FIVE else 1.0) * made


def _einsum(inputs: Sequence[Shape], made: float) -> float:
    """Exact for a plain matrix product: |a| |b| |out| = (M K) (K N) (M N), the square of M N K."""
    product = math.prod(math.prod(shape) for shape in inputs)
    return 2.0 * math.sqrt(made * product) if len(inputs) == 2 else max(made, float(product))


def _recurrent(inputs: Sequence[Shape]) -> float:
    """Each weight matrix meets each time step of each sequence once: input (T, B, I) or (B, T, I)."""
    steps = math.prod(inputs[0][:-1])
    return 2.0 * steps * sum(math.prod(shape) for shape in inputs[1:] if len(shape) == 2)
