"""From an exported fx graph to numbered values: what a program needs, plus shapes, memory layouts and dependences.

Sizes that depend on the batch become polynomials of it, so a cut never has to send a size: a segment reads the batch from
a tensor that crosses. Nodes that depend on no input (position indices, masks, biases looked up in a table) are *free*:
every segment that needs one makes it again, and it never travels.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node as FxNode

from ecotone.graph import DTYPE_BYTES
from ecotone.model.errors import ModelError
from ecotone.model.export import Exported, at, user_outputs
from ecotone.model.interpreter import ProgramModule
from ecotone.model.operators import GETITEM, is_allowed
from ecotone.model.program import (
    HERE,
    Batch,
    BatchSource,
    Node,
    Program,
    Ref,
    TensorSpec,
    WeightSpec,
    dtype_name,
    references,
)

__all__ = ["Flat", "Value", "clone_of", "lower", "memory_order", "observe_layouts"]

CLONE = "aten.clone.default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One numbered value; `sizes` are polynomials of the batch per dimension; `dtype` is "" where it is no tensor."""

    name: str
    sizes: tuple[tuple[int, ...], ...] = ()
    dtype: str = ""
    order: tuple[int, ...] | None = ()  # of its dimensions in memory; None: neither dense nor a permutation of dense
    free: bool = False  # depends on no input
    module: str = ""  # path of the module that makes it
    place: str = ""

    def shape(self, batch: int) -> tuple[int, ...]:
        """Its sizes at this batch."""
        return tuple(sum(factor * batch**power for power, factor in enumerate(size)) for size in self.sizes)

    @property
    def dynamic_dims(self) -> tuple[int, ...]:
        return tuple(dim for dim, size in enumerate(self.sizes) if any(size[1:]))

    def size_bytes(self, batch: int) -> int:
        return math.prod(self.shape(batch)) * DTYPE_BYTES.get(self.dtype, 16)


@dataclass(slots=True, kw_only=True)
class Flat:
    """A functional graph by numbers: inputs, then weights, then nodes, with one Value each."""

    inputs: list[str]
    weights: list[tuple[str, torch.Tensor]]
    nodes: list[Node]
    values: list[Value]
    results: list[Any]  # Ref, or a constant of the return value
    batch: int  # of the example
    dynamic: bool
    parameters: frozenset[str] = frozenset()  # names of the weights that training may change

    @property
    def first_node(self) -> int:
        return len(self.inputs) + len(self.weights)

    def node(self, value: int) -> Node:
        return self.nodes[value - self.first_node]

    def append(self, node: Node, value: Value) -> int:
        """Add a node at the end; returns its value number."""
        self.nodes.append(node)
        self.values.append(value)
        return len(self.values) - 1


def lower(exported: Exported, batch: int) -> Flat:
    """Number the graph; `batch` is that of the example inputs.

    Raises ModelError for an operator that is not on the list, and for a size that cannot be told from the batch.
    """
    return _Lowering(exported).run(batch)


def memory_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...] | None:
    """() for the usual layout, else the order of dimensions that makes it dense; None where no order does."""
    if not stride or tuple(stride) == _dense(shape):
        return ()
    order = tuple(sorted(range(len(shape)), key=lambda dim: (-stride[dim], dim)))
    dense = _dense([shape[dim] for dim in order])
    return order if tuple(stride[dim] for dim in order) == dense else None


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class _Lowering:
    """One pass over the fx graph; only `run` is called from outside."""

    def __init__(self, exported: Exported):
        self.exported = exported
        self.symbol: sympy.Symbol | None = None
        self.number: dict[FxNode, int] = {}
        self.values: list[Value] = []

    def run(self, batch: int) -> Flat:
        placeholders = [node for node in self.exported.graph_module.graph.nodes if node.op == "placeholder"]
        inputs = [n for n in placeholders if self.exported.weight(n.name) is None and _is_tensor(n)]
        for node in inputs:
            self._find_symbol(node)
        for node in inputs:
            self._give_number(node, free=False)
        weights = self._number_weights(placeholders)
        nodes = [
            self._node(node)
            for node in self.exported.graph_module.graph.nodes
            if node.op == "call_function" and not _is_size(node)
        ]
        flat = Flat(
            inputs=[self.values[self.number[n]].name for n in inputs], weights=weights, nodes=nodes, values=self.values,
            results=[], batch=batch, dynamic=self.symbol is not None, parameters=self.exported.parameters,
        )  # fmt: skip
        flat.results = [self._result(name, value, flat) for name, value in user_outputs(self.exported)]
        return flat

    def _find_symbol(self, node: FxNode) -> None:
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol) and self.symbol is None:
                self.symbol = size.node.expr

    def _number_weights(self, placeholders: list[FxNode]) -> list[tuple[str, torch.Tensor]]:
        """Number parameters, buffers and constants in use; tensors that are one in memory get one number."""
        known: dict[tuple[Any, ...], int] = {}
        weights: list[tuple[str, torch.Tensor]] = []
        module = self.exported.graph_module
        found = [(node, self.exported.weight(node.name)) for node in placeholders if node.users]
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), torch.Tensor):
                found.append((node, (str(node.target), getattr(module, str(node.target)))))
        for node, weight in found:
            if weight is None:
                continue
            name, tensor = weight
            _refuse_dtype(tensor, f"weight {name!r}")
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
            if key not in known:
                known[key] = self._give_number(node, free=True, name=name)
                dense = memory_order(tensor.shape, tensor.stride()) is not None
                weights.append((name, tensor.detach().cpu() if dense else tensor.detach().cpu().contiguous()))
            self.number[node] = known[key]
        return weights

    def _give_number(self, node: FxNode, *, free: bool, name: str = "") -> int:
        value = node.meta.get("val")
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        module = stack[-1][0] if stack else ""
        sizes: tuple[tuple[int, ...], ...] = ()
        dtype = ""
        if isinstance(value, torch.Tensor):
            sizes, dtype = tuple(self._polynomial(size, node) for size in value.shape), dtype_name(value.dtype)
        self.values.append(Value(name=name or node.name, sizes=sizes, dtype=dtype, free=free, module=module, place=at(node)))
        self.number[node] = len(self.values) - 1
        return self.number[node]

    def _polynomial(self, size: Any, node: FxNode) -> tuple[int, ...]:
        if not isinstance(size, torch.SymInt):
            return (int(size),)
        expression = size.node.expr
        if expression.is_Integer:
            return (int(expression),)
        if any(str(symbol).startswith("u") for symbol in expression.free_symbols):
            remedy = "use masking (torch.where) or topk with a fixed size"
            raise ModelError(f"operator {node.target}{at(node)} makes a result whose size depends on the data; {remedy}")
        try:
            if self.symbol is None or expression.free_symbols != {self.symbol}:
                raise ValueError
            factors = sympy.Poly(expression, self.symbol).all_coeffs()[::-1]
            if not 1 <= len(factors) <= 4:
                raise ValueError
            return tuple(operator.index(int(factor)) if factor.is_Integer else _fail() for factor in factors)
        except (ValueError, sympy.PolynomialError):
            what = f"operator {node.target}{at(node)} makes a size ({expression}) that cannot be told from the batch"
            raise ModelError(f"{what}; use fixed sizes, or capture without dynamic_batch") from None

    def _node(self, node: FxNode) -> Node:
        name = GETITEM if node.target is operator.getitem else str(node.target)
        if not is_allowed(name):
            remedy = "replace it in the model, or keep that part out of what is captured"
            raise ModelError(
                f"operator {name}{at(node)} cannot travel: it is not on the list of allowed operators; {remedy}"
            )
        args = tuple(self._argument(arg, node) for arg in node.args)
        kwargs = {k: self._argument(v, node) for k, v in node.kwargs.items() if k != "pin_memory"}
        made = Node(name=node.name, op=name, args=args, kwargs=kwargs)
        free = all(self.values[value].free for value in references(made))
        self._give_number(node, free=free)
        return made

    def _argument(self, tree: Any, user: FxNode) -> Any:
        if isinstance(tree, list | tuple):
            return [self._argument(item, user) for item in tree]
        if isinstance(tree, FxNode):
            if tree in self.number:
                return Ref(self.number[tree])
            tree = tree.meta.get("val", tree)
        if isinstance(tree, torch.SymInt):
            size = self._polynomial(tree, user)
            return Batch(size) if any(size[1:]) else size[0]
        if tree is None or isinstance(tree, bool | int | float | str | torch.dtype | torch.layout | torch.memory_format):
            return tree
        if isinstance(tree, torch.device):
            return HERE
        what = f"operator {user.target}{at(user)} takes an argument of type {type(tree).__name__}"
        raise ModelError(f"{what}, which cannot travel; use tensors and plain numbers, or capture without dynamic_batch")

    def _result(self, name: str, value: Any, flat: Flat) -> Any:
        """A Ref for a tensor that the model returns, the constant for anything else."""
        if not isinstance(value, FxNode):
            return value
        if value not in self.number:
            raise ModelError(f"output {name!r} is a size, not a tensor; return it as a tensor, or not at all")
        number = self.number[value]
        if not flat.values[number].free:
            return Ref(number)
        return Ref(flat.append(*_clone(flat, number, "output")))


def _clone(flat: Flat, number: int, suffix: str) -> tuple[Node, Value]:
    """A node that copies a value into the usual layout, so that it may cross a cut."""
    old = flat.values[number]
    name = f"{old.name}_{suffix}"
    node = Node(name=name, op=CLONE, args=(Ref(number),), kwargs={"memory_format": torch.contiguous_format})
    value = Value(name=name, sizes=old.sizes, dtype=old.dtype, order=(), free=False, module=old.module, place=old.place)
    return node, value


def clone_of(flat: Flat, number: int) -> int:
    """Append a node that copies a value into the usual layout; returns its number."""
    return flat.append(*_clone(flat, number, "dense"))


def _fail() -> int:
    raise ValueError


def _is_tensor(node: FxNode) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_size(node: FxNode) -> bool:
    """Whether a node only computes with sizes; its value goes into the arguments of those that read it."""
    return isinstance(node.meta.get("val"), torch.SymInt | int | float | bool)


def _refuse_dtype(tensor: torch.Tensor, what: str) -> None:
    if dtype_name(tensor.dtype) not in DTYPE_BYTES:
        raise ModelError(f"{what} has dtype {dtype_name(tensor.dtype)}; convert it to one of {', '.join(DTYPE_BYTES)}")
    if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise ModelError(f"{what} is a {type(tensor).__name__} of layout {tensor.layout}; make it a plain dense tensor")


def observe_layouts(flat: Flat, example: Sequence[torch.Tensor]) -> None:
    """Run the graph once on `example` (what it was exported with) and note the memory layout of every value."""

    seen: list[int] = []

    def note(number: int, made: Any) -> None:
        seen.extend([number] if number >= flat.first_node else ())
        if isinstance(made, torch.Tensor):
            order = memory_order(made.shape, made.stride())
            flat.values[number] = dataclasses.replace(flat.values[number], order=order)

    for number, tensor in enumerate((*example, *(tensor for _, tensor in flat.weights))):
        note(number, tensor)
    specs = tuple(
        TensorSpec(
            name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), order=flat.values[number].order or ()
        )
        for number, (name, tensor) in enumerate(zip(flat.inputs, example, strict=True))
    )
    weights = tuple(
        WeightSpec(name=name, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), sha256="", size_bytes=0)
        for name, tensor in flat.weights
    )
    source = next(
        (BatchSource(input=i, dim=0) for i in range(len(specs)) if 0 in flat.values[i].dynamic_dims),
        None,
    )
    program = Program(
        graph_hash="", start=0, stop=0, inputs=specs, outputs=(), weights=weights, nodes=tuple(flat.nodes), results=(),
        batch=source,
    )  # fmt: skip
    try:
        with torch.no_grad():
            ProgramModule(program, dict(flat.weights)).run(tuple(example), [None] * len(flat.values), note)
    except Exception as error:
        node, text = flat.nodes[len(seen)], " ".join(str(error).split())[:160]
        place = flat.values[flat.first_node + len(seen)].place
        remedy = "a size in it depends on the data; use masking or fixed sizes"
        raise ModelError(f"operator {node.op}{place} fails when the captured graph runs: {text}; {remedy}") from error
