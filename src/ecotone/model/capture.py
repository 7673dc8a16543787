"""Capture: a torch.nn.Module with example inputs becomes a Graph, and any range of its blocks a runnable Segment.

    captured = capture(model.eval(), (x,))
    head, tail = captured.segment(0, 5), captured.segment(5, captured.graph.num_blocks)
    y = captured.unflatten_outputs(tail.module()(*head.module()(*captured.flatten_inputs((x,)))))

The steps: `export` (torch.export, made functional), `lower` (numbers, layouts), `blocks` (where cuts are worth it), and
here the Graph and the segments. Composition over any cuts equals `reference` bit for bit: each operator runs once on tensors
of the same values and the same memory layout. That holds for any topological order of the blocks too (`reordered`).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ecotone.graph import DTYPE_BYTES, Block, Graph, Parameter, Tensor, TensorIndex
from ecotone.model.blocks import Item, choose_cuts
from ecotone.model.branches import branch_groups
from ecotone.model.errors import ModelError
from ecotone.model.exits import ExitHead, check_place, exiting_graph, joined, work_of
from ecotone.model.export import export
from ecotone.model.flop import flop_of
from ecotone.model.lower import Flat, clone_of, lower, observe_layouts
from ecotone.model.operators import GETITEM, HEAVY
from ecotone.model.program import (
    BatchSource,
    Node,
    Program,
    Ref,
    TensorSpec,
    WeightSpec,
    dtype_name,
    map_arguments,
    needs_batch,
    references,
    renumbered,
)
from ecotone.model.segment import Segment, weight_blob

__all__ = ["Captured", "capture"]

TRAFFIC_WEIGHT = 8.0  # FLOP that one byte moved is worth, when blocks are compared


def capture(
    model: torch.nn.Module,
    args: Any,
    kwargs: dict[str, Any] | None = None,
    *,
    name: str = "",
    dynamic_batch: bool = False,
    branches: bool = False,
) -> Captured:
    """Capture `model` called as model(*args, **kwargs); a single tensor stands for (tensor,).

    With `dynamic_batch`, dimension 0 of every input tensor may differ when segments run. With `branches`, blocks follow the
    model's branches, so that it can be cut through each of them apart (see branches.py). The model must be in eval mode.
    Raises ModelError naming the operator, the source line and the remedy where the model cannot be captured.
    """
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    kwargs = dict(kwargs or {})
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ModelError(f"model {type(model).__name__}: the example inputs hold no tensor; give at least one")
    for number, tensor in enumerate(tensors):
        if dtype_name(tensor.dtype) not in DTYPE_BYTES:
            raise ModelError(
                f"example input {number} has dtype {dtype_name(tensor.dtype)}; use one of {', '.join(DTYPE_BYTES)}"
            )
    batch = next((int(tensor.shape[0]) for tensor in tensors if tensor.ndim), 1)
    traced_args, traced_kwargs = args, kwargs
    if dynamic_batch:
        traced_args, traced_kwargs = _with_a_batch_of_two(args, kwargs, batch)
    exported = export(model, traced_args, traced_kwargs, dynamic_batch)
    flat = lower(exported, batch)
    example = [leaf for leaf in pytree.tree_leaves((traced_args, traced_kwargs)) if isinstance(leaf, torch.Tensor)]
    observe_layouts(flat, [_plain(tensor) for tensor in example])
    spec = exported.program.call_spec
    leaves = pytree.tree_leaves((args, kwargs))
    return Captured(flat, name or type(model).__name__, spec.in_spec, spec.out_spec, leaves, branches=branches)


class Captured:
    """A captured model: its `graph`, and segments cut out of it. Holds the weights once.

    `exits`: heads that give the model's outputs early, in order of position; see with_exits.
    """

    graph: Graph
    exits: tuple[ExitHead, ...] = ()

    def __init__(
        self, flat: Flat, name: str, in_spec: Any, out_spec: Any, leaves: list[Any], *, branches: bool = False
    ) -> None:
        self._flat, self._in_spec, self._out_spec, self._leaves = flat, in_spec, out_spec, leaves
        self._blocks = _blocks(flat, branches)
        _make_dense(flat, self._blocks)
        _refuse_outputs(flat)
        self._weights = _weight_specs(flat)
        self._crossing = _crossing_values(flat, self._blocks)
        self.graph = self.backbone = self._graph(name)
        self._reference: torch.nn.Module | None = None
        violations = list(self.segment(0, self.graph.num_blocks).program.violations())
        if violations:
            raise ModelError(
                f"{self.graph.name} cannot travel: {'; '.join(violations[:5])}; replace these operators in the model"
            )

    @property
    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the example call, in the order of graph.inputs."""
        return tuple(_plain(leaf) for leaf in self._leaves if isinstance(leaf, torch.Tensor))

    def flatten_inputs(self, args: Any, kwargs: dict[str, Any] | None = None) -> tuple[torch.Tensor, ...]:
        """The tensors of a call in the order of graph.inputs; raises ModelError where they do not fit the example."""
        args = tuple(args) if isinstance(args, tuple | list) else (args,)
        names = list(self._in_spec.unflatten(self._leaves)[1])
        given = dict(kwargs or {})
        kwargs = {key: given.pop(key) for key in names if key in given} | given
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._in_spec:
            wanted = _describe(self._in_spec.unflatten(self._leaves))
            raise ModelError(f"inputs of {self.graph.name}: got {_describe((args, kwargs))}; call it as captured: {wanted}")
        tensors: list[torch.Tensor] = []
        for leaf, example in zip(leaves, self._leaves, strict=True):
            if isinstance(example, torch.Tensor):
                tensors.append(self._checked(leaf, self.graph.tensors[len(tensors)]))
            elif leaf != example:
                raise ModelError(
                    f"inputs of {self.graph.name}: {leaf!r:.40} in place of the captured {example!r:.40}; capture again"
                )
        return tuple(tensors)

    def unflatten_inputs(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call (args, kwargs) whose flatten_inputs are `tensors`, in the order of graph.inputs."""
        if len(tensors) != len(self.graph.inputs):
            raise ModelError(f"inputs of {self.graph.name}: {len(tensors)} tensors, it takes {len(self.graph.inputs)}")
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        args, kwargs = self._in_spec.unflatten(leaves)
        return tuple(args), dict(kwargs)

    def unflatten_outputs(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What the model returns, from the tensors of the last frontier (what the last segment gives)."""
        frontier = self.graph.frontier(self.graph.num_blocks)
        if len(tensors) != len(frontier):
            raise ModelError(f"outputs of {self.graph.name}: {len(tensors)} tensors for a frontier of {len(frontier)}")
        by_index = dict(zip(frontier, tensors, strict=True))
        outputs = iter(self.graph.outputs)
        leaves = [by_index[next(outputs)] if isinstance(result, Ref) else result for result in self._flat.results]
        return self._out_spec.unflatten(leaves)

    def reference(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The graph run whole and eager: tensors of graph.inputs in, tensors of the last frontier out."""
        if self._reference is None:
            self._reference = self.segment(0, self.graph.num_blocks).module()
        with torch.no_grad():
            return tuple(self._reference(*inputs))

    @property
    def parameter_names(self) -> frozenset[str]:
        """Names of the weights that training may change: parameters, not buffers."""
        return self._flat.parameters

    def with_exits(self, heads: Sequence[ExitHead]) -> Captured:
        """The same model with these exits in place of any that it has; `backbone` stays the graph without exits.

        Raises ModelError where a position has no single-tensor frontier, or a head does not give the model's outputs.
        """
        twin = copy.copy(self)
        twin.graph, twin.exits, twin._reference = self.backbone, tuple(sorted(heads, key=lambda head: head.position)), None
        position, tensors, works = 0, self.example_inputs, []
        for head in twin.exits:
            check_place(self.backbone, head.name, head.position)
            with torch.no_grad():
                tensors = tuple(self.segment(position, head.position).module()(*tensors))
            position = head.position
            works.append(work_of(head.segment, tensors[0]))
        digests = [spec.sha256 for spec in self._weights]
        digests += [spec.sha256 for head in twin.exits for spec in head.segment.program.weights]
        twin.graph = exiting_graph(self.backbone, twin.exits, works, _digest_of(digests))
        twin.graph_hash = twin.graph.content_hash()
        return twin

    def until_exit(self, name: str) -> Captured:
        """A small model of its own: the blocks up to this exit and its head, same inputs and outputs; all leave there."""
        head = self._head(name)
        module = _UntilExit(self, self.segment(0, head.position, name).module()).eval()
        args, kwargs = self._in_spec.unflatten(self._leaves)
        short = f"{self.graph.name} up to {name}"
        return capture(module, tuple(args), dict(kwargs), name=short, dynamic_batch=self._flat.dynamic)

    def with_weights(self, weights: Mapping[str, torch.Tensor]) -> Captured:
        """The same model, without exits, with these tensors in place of its own, by name; shapes and dtypes must stay."""
        known = dict(self._flat.weights)
        for name, tensor in weights.items():
            if name not in known or (known[name].shape, known[name].dtype) != (tensor.shape, tensor.dtype):
                found = f"{name} {list(tensor.shape)} {dtype_name(tensor.dtype)}"
                raise ModelError(f"{self.graph.name}: has no weight {found}; take those of this model")
        twin = copy.copy(self)
        changed = [(name, weights.get(name, tensor)) for name, tensor in self._flat.weights]
        twin._flat = replace(self._flat, weights=changed)
        twin._weights = _weight_specs(twin._flat)
        digest = _digest_of([spec.sha256 for spec in twin._weights])
        twin.graph = twin.backbone = replace(self.backbone, weights_hash=digest)
        twin.graph_hash, twin.exits, twin._reference = twin.graph.content_hash(), (), None
        return twin

    def segment(self, start: int, stop: int, exit_name: str = "") -> Segment:
        """Blocks [start, stop): takes frontier(start) in order, returns frontier(stop) in order.

        With an exit, which must stand at `stop`, its outputs follow, like those of the model's end.
        """
        if exit_name:
            return self._exiting(start, stop, exit_name)
        if not 0 <= start <= stop <= self.graph.num_blocks:
            raise ModelError(f"segment [{start}, {stop}) of {self.graph.name}: it has blocks 0 to {self.graph.num_blocks}")
        entering = [self._crossing[index] for index in self.graph.frontier(start)]
        leaving = [self._crossing[index] for index in self.graph.frontier(stop)]
        chosen = _with_free([v for block in self._blocks[start:stop] for v in block], self._flat)
        used = {v for number in chosen for v in references(self._flat.node(number))}
        weights = sorted(v for v in used if len(self._flat.inputs) <= v < self._flat.first_node)
        renumber = {value: number for number, value in enumerate((*entering, *weights, *chosen))}
        nodes = tuple(renumbered(self._flat.node(value), renumber) for value in chosen)
        specs = [self._weights[value - len(self._flat.inputs)] for value in weights]
        program = Program(
            graph_hash=self.graph_hash, start=start, stop=stop,
            inputs=tuple(self._spec(value) for value in entering), outputs=tuple(self._spec(value) for value in leaving),
            weights=tuple(specs), nodes=nodes, results=tuple(renumber[value] for value in leaving),
            batch=self._batch_source(entering) if any(needs_batch(node) for node in nodes) else None,
        )  # fmt: skip
        tensors = dict(self._flat.weights)
        return Segment(program, {spec.name: tensors[spec.name] for spec in specs})

    def reordered(self, order: Sequence[int]) -> Captured:
        """The same model with its blocks in another topological order: block `order[i]` at place i (see Graph.reordered).

        Takes and returns the same tensors, bit for bit, and shares the weights. Raises SchemaError for no such order.
        """
        return self._with(self.graph.reordered(order))

    def in_order(self, order: Sequence[int]) -> Captured:
        """The same model in the order that a plan names (see Graph.in_order)."""
        return self._with(self.graph.in_order(order))

    def _with(self, graph: Graph) -> Captured:
        """Itself with its blocks as `graph`, another order of its own, has them."""
        captured, other = self.graph.order or range(len(self._blocks)), copy.copy(self)
        by_number = dict(zip(captured, self._blocks, strict=True))
        other.graph, other.graph_hash, other._reference = graph, graph.content_hash(), None
        other.backbone = self.backbone.in_order(graph.order)
        places = {leaving.name: leaving.position for leaving in graph.exits}
        moved = (replace(head, position=places[head.name]) for head in self.exits)
        other.exits = tuple(sorted(moved, key=lambda head: head.position))
        other._blocks = [by_number[number] for number in graph.order or range(len(self._blocks))]
        return other

    def _exiting(self, start: int, stop: int, exit_name: str) -> Segment:
        head = self._head(exit_name)
        if head.position != stop or start >= stop:
            where = f"segment [{start}, {stop}) of {self.graph.name}"
            raise ModelError(f"{where}: exit {exit_name} stands at {head.position}; end the segment there")
        ends = [self._crossing[index] for index in self.graph.frontier(self.graph.num_blocks)]
        outputs = [replace(self._spec(value), order=()) for value in ends]
        return joined(self.segment(start, stop), head, outputs)

    def _head(self, name: str) -> ExitHead:
        for head in self.exits:
            if head.name == name:
                return head
        known = ", ".join(f"{h.name} at {h.position}" for h in self.exits) or "none"
        raise ModelError(f"{self.graph.name}: has no exit {name!r}; its exits are {known}")

    def _checked(self, leaf: Any, expected: Tensor) -> torch.Tensor:
        free = set(expected.dynamic_dims)
        found = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None
        fits = found is not None and len(found) == len(expected.shape)
        fits = fits and all(i in free or a == b for i, (a, b) in enumerate(zip(found or (), expected.shape, strict=True)))
        if not fits or dtype_name(leaf.dtype) != expected.dtype:
            got = f"{found} {dtype_name(leaf.dtype)}" if found is not None else type(leaf).__name__
            wanted = tuple("any" if i in free else size for i, size in enumerate(expected.shape))
            text = f"({', '.join(map(str, wanted))})"
            raise ModelError(
                f"input {expected.name}: is {got}, must be {text} {expected.dtype}; reshape it or capture again"
            )
        return _plain(leaf)

    def _spec(self, value: int) -> TensorSpec:
        known = self._flat.values[value]
        return TensorSpec(
            name=known.name, shape=known.shape(self._flat.batch), dtype=known.dtype,
            dynamic_dims=known.dynamic_dims, order=known.order or (),
        )  # fmt: skip

    def _batch_source(self, entering: Sequence[int]) -> BatchSource:
        for number, value in enumerate(entering):
            for dim, size in enumerate(self._flat.values[value].sizes):
                if len(size) == 2 and size[0] == 0 and size[1] > 0:
                    return BatchSource(input=number, dim=dim, factor=size[1])
        # Capture chose its cuts so that one does; another order of the blocks may have frontiers where none does.
        raise ModelError(
            f"segment of {self.graph.name}: no tensor that enters it tells the batch; cut elsewhere, or keep the order"
        )

    def _graph(self, name: str) -> Graph:
        flat, index_of = self._flat, {value: TensorIndex(i) for i, value in enumerate(self._crossing)}
        producer = {value: number for number, block in enumerate(self._blocks) for value in block}
        tensors = tuple(
            Tensor(
                name=(spec := self._spec(value)).name, shape=spec.shape, dtype=spec.dtype,
                producer=producer.get(value, -1), dynamic_dims=spec.dynamic_dims,
            )
            for value in self._crossing
        )  # fmt: skip
        names: dict[str, int] = {}
        blocks = tuple(self._block(values, index_of, names) for values in self._blocks)
        digest = _digest_of([spec.sha256 for spec in self._weights])
        graph = Graph(
            name=name, blocks=blocks, tensors=tensors,
            inputs=tuple(index_of[number] for number in range(len(flat.inputs))),
            outputs=tuple(index_of[result.value] for result in flat.results if isinstance(result, Ref)),
            parameters=tuple(Parameter(name=n, size_bytes=t.numel() * t.element_size()) for n, t in flat.weights),
            weights_hash=digest,
        )  # fmt: skip
        self.graph_hash = graph.content_hash()
        return graph

    def _block(self, values: Sequence[int], index_of: dict[int, TensorIndex], names: dict[str, int]) -> Block:
        flat, own = self._flat, set(values)
        chosen = _with_free(values, flat)
        read = {v for number in chosen for v in references(flat.node(number))}
        heavy = [v for v in values if _is_heavy(flat.node(v))] or list(values)
        name = flat.values[heavy[0]].module or flat.values[heavy[0]].name
        names[name] = names.get(name, 0) + 1
        return Block(
            name=name if names[name] == 1 else f"{name}#{names[name]}",
            inputs=tuple(sorted(index_of[v] for v in read - own if v in index_of)),
            outputs=tuple(sorted(index_of[v] for v in own if v in index_of)),
            flop=sum(_flop(flat, v) for v in chosen),
            parameters=tuple(sorted(v - len(flat.inputs) for v in read if len(flat.inputs) <= v < flat.first_node)),
            ops=tuple(dict.fromkeys(flat.node(v).op for v in values if flat.node(v).op != GETITEM)),
        )


class _UntilExit(torch.nn.Module):
    """Takes and gives what the whole model does."""

    def __init__(self, captured: Captured, segment: torch.nn.Module):
        super().__init__()
        self._captured, self.segment = captured, segment

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _, *outputs = self.segment(*self._captured.flatten_inputs(args, kwargs))
        return self._captured.unflatten_outputs(outputs)


def _digest_of(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


def _with_a_batch_of_two(args: Any, kwargs: Any, batch: int) -> tuple[Any, Any]:
    """torch.export takes a size of 1 for a constant: repeat such examples, which changes no result per item."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return leaf
        if leaf.shape[0] != batch:
            raise ModelError(
                f"dynamic_batch: inputs have batches {batch} and {leaf.shape[0]}; all inputs must have one batch"
            )
        return torch.cat([leaf, leaf]) if batch == 1 else leaf.clone()

    return pytree.tree_map(change, (args, kwargs))  # type: ignore[no-any-return]


def _describe(tree: Any) -> str:
    """A call for people: (float32[1, 3, 8, 8], mask=int64[1, 4])."""

    def text(item: Any) -> str:
        if isinstance(item, torch.Tensor):
            return f"{dtype_name(item.dtype)}{list(item.shape)}"
        if isinstance(item, dict):
            return "{" + ", ".join(f"{key}: {text(value)}" for key, value in item.items()) + "}"
        return f"[{', '.join(map(text, item))}]" if isinstance(item, list | tuple) else repr(item)[:40]

    args, kwargs = tree
    return f"({', '.join([*map(text, args), *(f'{key}={text(value)}' for key, value in kwargs.items())])})"[:300]


def _is_heavy(node: Node) -> bool:
    return node.op != GETITEM and node.op.split(".")[1] in HEAVY


def _flop(flat: Flat, value: int) -> float:
    node = flat.node(value)
    inputs = [flat.values[v].shape(flat.batch) for v in references(node) if flat.values[v].dtype]
    return flop_of(
        node.op, inputs, [flat.values[value].shape(flat.batch)] if flat.values[value].dtype else _parts(flat, value)
    )


def _parts(flat: Flat, value: int) -> list[tuple[int, ...]]:
    """Shapes of the tensors taken out of a result of several."""
    users = (first for first in range(flat.first_node, len(flat.values)) if flat.node(first).op == GETITEM)
    return [flat.values[v].shape(flat.batch) for v in users if references(flat.node(v)) == [value]]


def _with_free(values: Sequence[int], flat: Flat) -> list[int]:
    """The free nodes that these nodes need, then the nodes, as given in order of execution."""
    needed, queue = set(values), list(values)
    while queue:
        for value in references(flat.node(queue.pop())):
            if value >= flat.first_node and flat.values[value].free and value not in needed:
                needed.add(value)
                queue.append(value)
    return [*sorted(needed - set(values)), *values]


def _blocks(flat: Flat, branches: bool) -> list[list[int]]:
    """Value numbers of the nodes of each block; free nodes belong to none."""
    order = [v for v in range(flat.first_node, len(flat.values)) if not flat.values[v].free]
    if not order:
        raise ModelError("the model computes nothing from its inputs; there is nothing to place")
    position = {value: number for number, value in enumerate(order)}
    position |= {number: -1 - number for number in range(len(flat.inputs))}
    items = []
    for value in order:
        node, parents = flat.node(value), references(flat.node(value))
        size = flat.values[value].size_bytes(flat.batch) if flat.values[value].dtype else 0
        read = sum(flat.values[v].size_bytes(flat.batch) for v in parents if len(flat.inputs) <= v < flat.first_node)
        items.append(
            _item(
                flat,
                value,
                [position[v] for v in parents if v in position],
                _flop(flat, value),
                size + read,
                _is_heavy(node),
            )
        )
    inputs = [_item(flat, number, [], 0.0, 0, False) for number in range(len(flat.inputs))]
    results = [position[result.value] for result in flat.results if isinstance(result, Ref)]
    if branches:
        groups = branch_groups(items, inputs, results, need_batch=flat.dynamic)
        return [[order[number] for number in group] for group in groups]
    cuts = (0, *choose_cuts(items, inputs, results, need_batch=flat.dynamic), len(order))
    return [order[a:b] for a, b in itertools.pairwise(cuts)]


def _item(flat: Flat, value: int, reads: list[int], flop: float, traffic: int, heavy: bool) -> Item:
    known = flat.values[value]
    crosses = known.dtype in DTYPE_BYTES and len(known.sizes) <= 8
    clumsy = 1.25 if known.order is None else 1.02 if known.order else 1.0
    return Item(
        heavy=heavy, cost=flop + TRAFFIC_WEIGHT * traffic, reads=tuple(reads),
        size_bytes=known.size_bytes(flat.batch) * clumsy if crosses else float("inf"),
        has_batch=any(len(size) == 2 and size[0] == 0 for size in known.sizes),
    )  # fmt: skip


def _make_dense(flat: Flat, blocks: list[list[int]]) -> None:
    """Give a copy in the usual layout to other blocks where a value that crosses lies scattered in memory."""
    for value in _crossing_values(flat, blocks):
        if flat.values[value].order is not None:
            continue
        home = next((block for block in blocks if value in block), None)
        if home is None:
            continue  # a model input: it comes dense
        copy = clone_of(flat, value)
        home.append(copy)

        def change(leaf: Any, old: int = value, new: int = copy) -> Any:
            return Ref(new) if isinstance(leaf, Ref) and leaf.value == old else leaf

        for number in (v for block in blocks if block is not home for v in block):
            node = flat.node(number)
            kwargs = {k: map_arguments(v, change) for k, v in node.kwargs.items()}
            args = tuple(map_arguments(list(node.args), change))
            flat.nodes[number - flat.first_node] = Node(name=node.name, op=node.op, args=args, kwargs=kwargs)
        flat.results = [change(result) for result in flat.results]


def _crossing_values(flat: Flat, blocks: list[list[int]]) -> list[int]:
    """Model inputs, then values that another block reads or the model returns, in order of their making."""
    home = {value: number for number, block in enumerate(blocks) for value in block}
    read = {
        v for number, block in enumerate(blocks) for value in block
        for v in references(flat.node(value)) if home.get(v, number) != number
    }  # fmt: skip
    read |= {result.value for result in flat.results if isinstance(result, Ref)}
    ordered = [value for block in blocks for value in block if value in read]
    return [*range(len(flat.inputs)), *ordered]


def _refuse_outputs(flat: Flat) -> None:
    for result in flat.results:
        if isinstance(result, Ref) and flat.values[result.value].dtype not in DTYPE_BYTES:
            value = flat.values[result.value]
            known = ", ".join(DTYPE_BYTES)
            raise ModelError(f"output {value.name}{value.place} has dtype {value.dtype}; convert it to one of {known}")


def _weight_specs(flat: Flat) -> list[WeightSpec]:
    specs = []
    for number, (name, tensor) in enumerate(flat.weights):
        blob = weight_blob(tensor)
        spec = WeightSpec(
            name=name,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor.dtype),
            order=flat.values[len(flat.inputs) + number].order or (),
            sha256=hashlib.sha256(blob).hexdigest(),
            size_bytes=len(blob),
        )
        specs.append(spec)
    return specs
