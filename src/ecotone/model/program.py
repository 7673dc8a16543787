"""A program: a flat list of allowed operators over numbered values, as plain data that travels as JSON.

Values are numbered: the inputs first, then the weights, then one per node. An argument is a number, a text, None, a list,
a torch constant (dtype, layout, memory format, device), a `Ref` to an earlier value or a `Batch` polynomial. A tensor's
`order` is the order of its dimensions in memory, () for the usual one; a program restores it on entry, so that kernels
see the layout that they saw when the model was captured. Reading a program checks everything and runs nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ecotone import schema
from ecotone.graph import DTYPE_BYTES
from ecotone.model.confidence import ExitRule
from ecotone.model.errors import ModelError
from ecotone.model.operators import GETITEM, is_allowed, resolve

__all__ = [
    "Batch", "BatchSource", "Node", "Program", "Ref", "TensorSpec", "WeightSpec", "map_arguments", "references",
    "renumbered",
]  # fmt: skip

SCHEMA, VERSION = "ecotone.program", 1
MAX_JSON_BYTES, MAX_NODES, MAX_TENSORS, MAX_WEIGHT_BYTES = 1 << 26, 200_000, 100_000, 1 << 38
MAX_LIST, MAX_DEPTH, MAX_TEXT = 1 << 20, 4, 200
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LAYOUTS = {"strided": torch.strided}
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in (*DTYPE_BYTES, "complex64", "complex128")}
_NAMES: dict[Any, dict[str, str]] = {
    **{dtype: {"dtype": name} for name, dtype in _DTYPES.items()},
    **{layout: {"layout": name} for name, layout in _LAYOUTS.items()},
    **{form: {"memory_format": name} for name, form in _FORMATS.items()},
}
HERE = torch.device("meta")  # stands for the device that the program runs on


@dataclass(frozen=True, slots=True)
class Ref:
    """The value with this number."""

    value: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A size that depends on the batch b: sum of coefficients[i] * b**i."""

    coefficients: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """An input or output of a segment; `shape` is that of the example, `dynamic_dims` may differ when it runs."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    dynamic_dims: tuple[int, ...] = ()
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """A weight by content: `sha256` and `size_bytes` are those of its safetensors blob."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    size_bytes: int
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSource:
    """Where the batch is read: the size of dimension `dim` of input `input`, divided by `factor`."""

    input: int
    dim: int
    factor: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operator call; `args` and `kwargs` hold plain values, torch constants, Ref and Batch."""

    name: str
    op: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Blocks [start, stop) of the graph with this hash; `results` are the value numbers of `outputs`.

    `exit`: the last of `outputs` are those of an exit, and say how sure it is.
    """

    graph_hash: str
    start: int
    stop: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[WeightSpec, ...]
    nodes: tuple[Node, ...]
    results: tuple[int, ...]
    batch: BatchSource | None = None
    exit: ExitRule | None = None

    def to_json(self) -> str:
        """JSON text; equal programs give equal text."""
        document = {"schema": SCHEMA, "version": VERSION} | schema.write(self)
        document["nodes"] = [_write_node(node) for node in self.nodes]
        return json.dumps(document, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str | bytes, where: str = "program") -> Program:
        """Read and check a program; raises ModelError naming the violations (the first twenty)."""
        if len(text) > MAX_JSON_BYTES:
            raise ModelError(f"{where}: {len(text)} bytes are over the limit of {MAX_JSON_BYTES}; use smaller segments")
        try:
            raw = schema.load_json(Program, text, SCHEMA, VERSION, where)
            violations: list[str] = []
            nodes = tuple(_read_node(node, violations) for node in raw.nodes)
            values = {name: getattr(raw, name) for name in Program.__slots__}
            program = Program(**(values | {"nodes": nodes}))
        except schema.SchemaError as error:
            raise ModelError(_shorten(where, error.violations)) from None
        violations.extend(program.violations())
        if violations:
            raise ModelError(_shorten(where, violations))
        return program

    def violations(self) -> Iterator[str]:
        """Every broken rule: names, numbers, operators, arguments, sizes."""
        yield from self._violations_of_tensors()
        count = len(self.inputs) + len(self.weights)
        if len(self.nodes) > MAX_NODES:
            yield f"{len(self.nodes)} nodes are over the limit of {MAX_NODES}"
            return
        for number, node in enumerate(self.nodes):
            yield from _violations_of_node(node, count + number, self.batch is not None)
        total = count + len(self.nodes)
        if len(self.results) != len(self.outputs):
            yield f"{len(self.results)} results for {len(self.outputs)} outputs"
        yield from (f"result {value} does not exist" for value in self.results if not 0 <= value < total)
        if not 0 <= self.start <= self.stop:
            yield f"range [{self.start}, {self.stop}) is not one"

    def _violations_of_tensors(self) -> Iterator[str]:
        specs: tuple[TensorSpec | WeightSpec, ...] = (*self.inputs, *self.outputs, *self.weights)
        if len(specs) > MAX_TENSORS:
            yield f"{len(specs)} tensors are over the limit of {MAX_TENSORS}"
            return
        for spec in specs:
            yield from _violations_of_spec(spec)
        if len({w.name for w in self.weights}) < len(self.weights):
            yield "two weights have one name"
        if sum(w.size_bytes for w in self.weights) > MAX_WEIGHT_BYTES:
            yield f"weights are over the limit of {MAX_WEIGHT_BYTES} bytes"
        if self.exit is not None:
            yield from self._violations_of_exit(self.exit)
        source = self.batch
        if source is not None and not (
            0 <= source.input < len(self.inputs)
            and 0 <= source.dim < len(self.inputs[source.input].shape)
            and source.factor >= 1
        ):
            yield f"batch source {source.input}.{source.dim}/{source.factor} does not exist"

    def _violations_of_exit(self, rule: ExitRule) -> Iterator[str]:
        if len(self.outputs) != rule.num_outputs + 1:
            yield f"an exit of {rule.num_outputs} outputs beside one tensor, but there are {len(self.outputs)} in all"
            return
        shape = self.outputs[1 + rule.output].shape
        if rule.dim >= len(shape) or shape[rule.dim] < 2:
            yield f"an exit decides along dimension {rule.dim} of {shape!r:.80}, which has no classes"


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name that the checker let pass."""
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def map_arguments(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree of lists with every leaf changed."""
    if isinstance(tree, list | tuple):
        return [map_arguments(item, change) for item in tree]
    return change(tree)


def references(node: Node) -> list[int]:
    """Value numbers that the node reads, in order, with repeats."""
    found: list[int] = []

    def note(leaf: Any) -> None:
        if isinstance(leaf, Ref):
            found.append(leaf.value)

    map_arguments([node.args, list(node.kwargs.values())], note)
    return found


def renumbered(node: Node, numbers: Mapping[int, int]) -> Node:
    """The same call with every value called by its new number."""

    def change(leaf: Any) -> Any:
        return Ref(numbers[leaf.value]) if isinstance(leaf, Ref) else leaf

    args = tuple(map_arguments(list(node.args), change))
    return Node(name=node.name, op=node.op, args=args, kwargs={k: map_arguments(v, change) for k, v in node.kwargs.items()})


def needs_batch(node: Node) -> bool:
    """Whether an argument is a Batch."""
    found: list[bool] = []
    map_arguments([node.args, list(node.kwargs.values())], lambda leaf: found.append(isinstance(leaf, Batch)))
    return any(found)


def _shorten(where: str, violations: list[str] | tuple[str, ...]) -> str:
    more = f"; and {len(violations) - 20} more" if len(violations) > 20 else ""
    return f"{where}: " + "; ".join(text[:300] for text in violations[:20]) + more


def _write_node(node: Node) -> dict[str, Any]:
    document: dict[str, Any] = {"name": node.name, "op": node.op, "args": map_arguments(node.args, _write_leaf)}
    if node.kwargs:
        document["kwargs"] = {key: map_arguments(value, _write_leaf) for key, value in node.kwargs.items()}
    return document


def _write_leaf(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, bool | int | str):
        return leaf
    if isinstance(leaf, float):
        return leaf if math.isfinite(leaf) else {"float": str(leaf)}
    if isinstance(leaf, Ref):
        return {"v": leaf.value}
    if isinstance(leaf, Batch):
        return {"batch": list(leaf.coefficients)}
    if isinstance(leaf, torch.device):
        return {"device": "here"}
    if leaf in _NAMES:
        return dict(_NAMES[leaf])
    raise ModelError(
        f"argument {leaf!r:.80} of type {type(leaf).__name__} cannot travel; replace the operator that takes it"
    )


def _read_node(node: Node, violations: list[str]) -> Node:
    """A node whose arguments are documents still -> a node with values."""
    found: list[str] = []
    args = tuple(_read_tree(tree, 0, found) for tree in node.args)
    kwargs = {key: _read_tree(tree, 0, found) for key, tree in node.kwargs.items()}
    violations.extend(f"node {node.name[:60]!r}: {text}" for text in found)
    return Node(name=node.name, op=node.op, args=args, kwargs=kwargs)


def _read_tree(tree: Any, depth: int, violations: list[str]) -> Any:
    if isinstance(tree, list):
        if depth >= MAX_DEPTH or len(tree) > MAX_LIST:
            violations.append("an argument list is too deep or too long")
            return None
        return [_read_tree(item, depth + 1, violations) for item in tree]
    if isinstance(tree, dict):
        return _read_tagged(tree, violations)
    if isinstance(tree, str) and len(tree) > MAX_TEXT:
        violations.append(f"a text of {len(tree)} characters is over the limit of {MAX_TEXT}")
    if isinstance(tree, int) and not -(2**63) <= tree < 2**63:
        violations.append("a number does not fit into 64 bits")
    return tree


def _read_tagged(document: Mapping[str, Any], violations: list[str]) -> Any:
    tag, value = next(iter(document.items()), ("", None))
    tables: dict[str, Mapping[str, Any]] = {
        "dtype": _DTYPES, "layout": _LAYOUTS, "memory_format": _FORMATS, "device": {"here": HERE},
        "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    }  # fmt: skip
    if len(document) == 1 and tag in tables and isinstance(value, str) and value in tables[tag]:
        return tables[tag][value]
    if len(document) == 1 and tag == "v" and type(value) is int:
        return Ref(value)
    if len(document) == 1 and tag == "batch" and _is_polynomial(value):
        return Batch(tuple(value or ()))
    violations.append(f"argument {dict(document)!r:.80} is not known")
    return None


def _is_polynomial(value: Any) -> bool:
    fits = isinstance(value, list) and 0 < len(value) <= 4
    return fits and all(type(item) is int and abs(item) < 2**48 for item in value)


def _violations_of_spec(spec: TensorSpec | WeightSpec) -> Iterator[str]:
    where = f"tensor {spec.name[:60]!r}"
    if not spec.name or len(spec.name) > MAX_TEXT or not spec.name.isprintable():
        yield f"{where}: its name must have 1 to {MAX_TEXT} printable characters"
    if spec.dtype not in DTYPE_BYTES:
        yield f"{where}: dtype {spec.dtype!r:.40} is not one of {', '.join(DTYPE_BYTES)}"
    if len(spec.shape) > 8 or any(not 0 <= size < 2**40 for size in spec.shape):
        yield f"{where}: shape {spec.shape!r:.80} must have at most 8 dimensions, none negative"
    if spec.order and sorted(spec.order) != list(range(len(spec.shape))):
        yield f"{where}: order {spec.order!r:.80} is not an order of its dimensions"
    if isinstance(spec, WeightSpec):
        needed = math.prod(spec.shape) * DTYPE_BYTES.get(spec.dtype, 1)
        if not _SHA256.fullmatch(spec.sha256):
            yield f"{where}: sha256 is not 64 hexadecimal digits"
        if not needed <= spec.size_bytes <= needed + 4096:
            yield f"{where}: {spec.size_bytes} bytes cannot hold shape {spec.shape} of {spec.dtype}"
    elif any(not 0 <= dim < len(spec.shape) for dim in spec.dynamic_dims):
        yield f"{where}: dynamic_dims {spec.dynamic_dims!r:.80} lie outside its shape"


def _violations_of_node(node: Node, number: int, has_batch: bool) -> Iterator[str]:
    where = f"node {node.name[:60]!r}"
    if not is_allowed(node.op):
        yield f"{where}: operator {node.op[:80]!r} is not on the list of allowed operators"
    else:
        yield from (f"{where}: {text}" for text in _violations_of_call(node))
    for value in references(node):
        if not 0 <= value < number:
            yield f"{where}: reads value {value}, which is not made before it"
    if not has_batch and needs_batch(node):
        yield f"{where}: needs the batch, but the program names no source for it"


def _violations_of_call(node: Node) -> Iterator[str]:
    if node.op == GETITEM:
        if node.kwargs or len(node.args) != 2 or not isinstance(node.args[0], Ref) or type(node.args[1]) is not int:
            yield "operator.getitem takes one value and one number"
        return
    signature = resolve(node.op)._schema.arguments  # type: ignore[attr-defined]
    if len(node.args) > len(signature):
        yield f"{len(node.args)} arguments for {len(signature)} parameters"
    known = {argument.name for argument in signature[len(node.args) :]}
    yield from (f"argument {key[:40]!r} is not known or given twice" for key in node.kwargs if key not in known)
    given = {argument.name for argument in signature[: len(node.args)]} | set(node.kwargs)
    missing = [a.name for a in signature if not a.has_default_value() and a.name not in given]
    yield from (f"argument {name!r} is missing" for name in missing)
    sizes = [item for item in (node.args[:1] or [None]) if isinstance(item, list)]
    if sizes and all(type(i) is int for i in sizes[0]) and math.prod(map(abs, sizes[0])) > 1 << 36:
        yield f"makes a tensor of shape {sizes[0]!r:.60}, over the limit of 2**36 elements"
