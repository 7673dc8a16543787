"""Runs a checked program as a torch.nn.Module: one loop over operators, values dropped after their last use.

A plain loop, not generated code: nothing that came over the network is ever compiled as text. torch.compile, torch.export
and the converters of OpenVINO and ONNX trace through it, because the loop runs over constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ecotone.model.operators import resolve
from ecotone.model.program import Batch, Program, Ref, needs_batch, references

__all__ = ["ProgramModule", "aligned", "restore_layout"]

ALIGNMENT_BYTES = 64


def restore_layout(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The same values with the dimensions laid out in memory in this order; no copy where they are already."""
    if not order:
        return aligned(tensor.contiguous())
    back = [order.index(dim) for dim in range(len(order))]
    return aligned(tensor.permute(order).contiguous()).permute(back)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address as torch's own allocator gives it; no copy where it is one already.

    Memory from a network or a file starts anywhere, and some kernels then add in another order: the last bit would depend on
    where a tensor came from. Left alone while a converter or compiler traces.
    """
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
        return tensor
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or tensor.data_ptr() % ALIGNMENT_BYTES == 0
    ):
        return tensor
    return tensor.clone()


class ProgramModule(torch.nn.Module):
    """`forward(*inputs) -> tuple` of a program; its weights are buffers, so `.to(device)` moves them."""

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor], device: str = "cpu"):
        super().__init__()
        self.training = False
        self._orders = tuple(spec.order for spec in program.inputs)
        self._batch = program.batch
        self._num_values = len(program.inputs) + len(program.weights) + len(program.nodes)
        self._results = program.results
        self._slots: list[tuple[str, int]] = []
        for number, spec in enumerate(program.weights):
            self.register_buffer(f"weight_{number}", aligned(weights[spec.name].detach()).to(device))
            self._slots.append((f"weight_{number}", len(program.inputs) + number))
        self._steps = _steps(program, torch.device(device))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values: list[Any] = [None] * self._num_values
        self.run(inputs, values)
        return tuple(values[number] for number in self._results)

    def run(
        self, inputs: tuple[torch.Tensor, ...], values: list[Any], observe: Callable[[int, Any], None] | None = None
    ) -> None:
        """Fill `values` by number and forget each after its last use; `observe` sees each as it is made."""
        for number, tensor in enumerate(inputs):
            order = self._orders[number]
            values[number] = restore_layout(tensor, order) if order or not tensor.is_contiguous() else aligned(tensor)
        for name, number in self._slots:
            values[number] = getattr(self, name)
        batch = 0
        if self._batch is not None:
            batch = inputs[self._batch.input].shape[self._batch.dim] // self._batch.factor
        for number, function, args, kwargs, simple, dead in self._steps:
            if simple:
                values[number] = function(*[values[a.value] if type(a) is Ref else a for a in args], **kwargs)
            else:
                filled = [_fill(tree, values, batch) for tree in args]
                values[number] = function(*filled, **{key: _fill(tree, values, batch) for key, tree in kwargs.items()})
            if observe is not None:
                observe(number, values[number])
            for value in dead:
                values[value] = None


Step = tuple[int, Callable[..., Any], list[Any], dict[str, Any], bool, tuple[int, ...]]


def _steps(program: Program, device: torch.device) -> list[Step]:
    first = len(program.inputs) + len(program.weights)
    last = {value: number for number, node in enumerate(program.nodes) for value in references(node)}
    kept = set(program.results)
    dead: dict[int, list[int]] = {}
    for value, number in last.items():
        if value not in kept:
            dead.setdefault(number, []).append(value)
    steps = []
    for number, node in enumerate(program.nodes):
        args = [_place(tree, device) for tree in node.args]
        kwargs = {key: _place(tree, device) for key, tree in node.kwargs.items()}
        flat = all(isinstance(leaf, Ref) or not _holds_reference(leaf) for leaf in args)
        simple = flat and not needs_batch(node) and not any(_holds_reference(tree) for tree in kwargs.values())
        unused = [] if first + number in last or first + number in kept else [first + number]
        free = (*dead.get(number, ()), *unused)
        steps.append((first + number, resolve(node.op), args, kwargs, simple, free))
    return steps


def _place(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, list | tuple):
        return [_place(item, device) for item in tree]
    return device if isinstance(tree, torch.device) else tree


def _holds_reference(tree: Any) -> bool:
    if isinstance(tree, list):
        return any(_holds_reference(item) for item in tree)
    return isinstance(tree, Ref)


def _fill(tree: Any, values: list[Any], batch: int) -> Any:
    if type(tree) is Ref:
        return values[tree.value]
    if type(tree) is list:
        return [_fill(item, values, batch) for item in tree]
    if type(tree) is Batch:
        size = 0
        for power, factor in enumerate(tree.coefficients):
            size = size + factor * batch**power
        return size
    return tree
