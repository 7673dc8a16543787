"""Early exits of a captured model: a head on the one tensor that crosses a position, as a checked program like any segment.

A head takes that tensor and gives the model's outputs, same shapes and dtypes. Joined to the segment before it, it makes one
program whose outputs are the frontier and then the exit's, so every executor compiles both as one graph and a node rebuilds
them from checked parts. Which positions: exit_places.py; heads to train: exit_heads.py; how sure an exit is: confidence.py.
Joining is O(nodes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ecotone.graph import Exit, Graph, Parameter, Tensor
from ecotone.model.confidence import ExitRule
from ecotone.model.errors import ModelError
from ecotone.model.flop import flop_of
from ecotone.model.interpreter import ProgramModule
from ecotone.model.program import Program, TensorSpec, dtype_name, needs_batch, references, renumbered
from ecotone.model.segment import Segment

__all__ = ["ExitHead", "HeadWork", "check_place", "checked_name", "exiting_graph", "joined", "nearest_places", "work_of"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,60}")


@dataclass(frozen=True, slots=True)
class ExitHead:
    """The exit `name` behind block `position` - 1: `segment` takes the tensor there and gives the model's outputs."""

    name: str
    position: int
    segment: Segment
    rule: ExitRule

    def weight_name(self, name: str) -> str:
        """How a weight of the head is called beside the model's own."""
        return f"exit {self.name}: {name}"


@dataclass(frozen=True, slots=True)
class HeadWork:
    """What one run of a head takes and makes."""

    flop: float
    working_bytes: int
    outputs: tuple[torch.Tensor, ...]


def checked_name(name: str) -> str:
    """The name of an exit; raises ModelError where it could not stand in a file's name or an option."""
    if not _NAME.fullmatch(name):
        raise ModelError(f"exit name {name!r:.80}: write 1 to 60 letters, digits and _ . -")
    return name


def nearest_places(graph: Graph, position: int, count: int = 2) -> tuple[int, ...]:
    """The legal positions nearest to `position`, ascending."""
    legal = sorted(graph.single_tensor_cuts(), key=lambda p: (abs(p - position), p))
    return tuple(sorted(legal[:count]))


def check_place(graph: Graph, name: str, position: int) -> Tensor:
    """The tensor that an exit at `position` gets; raises ModelError naming the nearest positions that have just one."""
    if position in graph.single_tensor_cuts():
        return graph.tensors[graph.frontier(position)[0]]
    legal = ", ".join(map(str, nearest_places(graph, position)))
    remedy = f"the nearest are {legal}" if legal else "it has none; capture it so that one tensor crosses, masks left out"
    inside = 0 < position < graph.num_blocks
    found = f"{len(graph.frontier(position))} tensors cross there" if inside else "it is no cut inside"
    raise ModelError(f"exit {name}: position {position} of {graph.name} has no single-tensor frontier ({found}); {remedy}")


def work_of(head: Segment, tensor: torch.Tensor) -> HeadWork:
    """Run a head on `tensor` and count: FLOP, and the most bytes of activations alive at once."""
    program, module = head.program, ProgramModule(head.program, head.weights)
    first = len(program.inputs) + len(program.weights)
    weights = range(len(program.inputs), first)
    values: list[Any] = [None] * (first + len(program.nodes))
    shapes: dict[int, tuple[int, ...]] = {}
    total, most = 0.0, 0

    def observe(number: int, made: Any) -> None:
        nonlocal total, most
        node = program.nodes[number - first]
        for value in references(node):
            if value not in shapes and isinstance(values[value], torch.Tensor):
                shapes[value] = tuple(values[value].shape)
        results = [t for t in (made if isinstance(made, tuple | list) else [made]) if isinstance(t, torch.Tensor)]
        inputs = [shapes[v] for v in references(node) if v in shapes]
        total += flop_of(node.op, inputs, [tuple(t.shape) for t in results])
        alive = [v for i, v in enumerate(values) if i not in weights and isinstance(v, torch.Tensor)]
        most = max(most, sum(t.nbytes for t in alive))

    with torch.no_grad():
        module.run((tensor,), values, observe)
    return HeadWork(total, most, tuple(values[number] for number in program.results))


def exiting_graph(graph: Graph, heads: Sequence[ExitHead], works: Sequence[HeadWork], weights_hash: str) -> Graph:
    """`graph` with its exits, each with FLOP and parameters of its own; raises ModelError where a head does not fit."""
    parameters, exits = list(graph.parameters), []
    for head, work in zip(heads, works, strict=True):
        _check_outputs(graph, head, work.outputs)
        own = [
            Parameter(name=head.weight_name(name), size_bytes=tensor.numel() * tensor.element_size())
            for name, tensor in head.segment.weights.items()
        ]
        numbers = tuple(range(len(parameters), len(parameters) + len(own)))
        parameters += own
        exits.append(
            Exit(
                name=checked_name(head.name), position=head.position, flop=work.flop, parameters=numbers,
                working_bytes=work.working_bytes,
            )
        )  # fmt: skip
    return replace(graph, exits=tuple(exits), parameters=tuple(parameters), weights_hash=weights_hash)


def _check_outputs(graph: Graph, head: ExitHead, outputs: Sequence[torch.Tensor]) -> None:
    wanted = [graph.tensors[i] for i in graph.frontier(graph.num_blocks)]
    found = [(tuple(t.shape), dtype_name(t.dtype)) for t in outputs]
    if found != [(t.shape, t.dtype) for t in wanted]:
        must = ", ".join(f"{list(t.shape)} {t.dtype}" for t in wanted)
        got = ", ".join(f"{list(shape)} {dtype}" for shape, dtype in found)
        raise ModelError(f"exit {head.name}: its head gives {got}, the model {must}; a head must give just that")
    if len(wanted) != head.rule.num_outputs:
        raise ModelError(f"exit {head.name}: its rule is for {head.rule.num_outputs} outputs, the model has {len(wanted)}")


def joined(base: Segment, head: ExitHead, outputs: Sequence[TensorSpec]) -> Segment:
    """`base`, which ends where `head` stands, and the head behind it: `base`'s output, then `outputs`."""
    before, after = base.program, head.segment.program
    if len(before.results) != 1 or len(after.inputs) != 1 or any(needs_batch(node) for node in after.nodes):
        raise ModelError(f"exit {head.name}: a head takes one tensor and no size of the batch; make it without")
    weights = (*before.weights, *(replace(w, name=head.weight_name(w.name)) for w in after.weights))
    entering, kept = len(before.inputs), len(before.weights)
    first = entering + len(weights)
    own = {i: i for i in range(entering + kept)} | {entering + kept + i: first + i for i in range(len(before.nodes))}
    second = first + len(before.nodes)
    theirs = {0: own[before.results[0]]}
    theirs |= {1 + i: entering + kept + i for i in range(len(after.weights))}
    theirs |= {1 + len(after.weights) + i: second + i for i in range(len(after.nodes))}
    nodes = [renumbered(node, own) for node in before.nodes] + [renumbered(node, theirs) for node in after.nodes]
    program = Program(
        graph_hash=before.graph_hash, start=before.start, stop=before.stop, inputs=before.inputs,
        outputs=(*before.outputs, *outputs), weights=weights, nodes=tuple(nodes),
        results=(own[before.results[0]], *(theirs[r] for r in after.results)), batch=before.batch, exit=head.rule,
    )  # fmt: skip
    tensors = base.weights | {head.weight_name(name): tensor for name, tensor in head.segment.weights.items()}
    return Segment(program, tensors)
