"""A captured model as data: blocks in topological order, the tensors between them, the parameters they hold.

Legend: L blocks 0..L-1; a cut position p in [0, L] lies before block p; its *frontier* is the set of tensors that are
made before p and still needed at or after it. p = 0 is the model's inputs, p = L its outputs. A block may read several
tensors (branches stay a DAG); any p is a legal cut, because the order is topological. An *exit* is a small head on the one
tensor that crosses some p, which gives the model's outputs early. A model with branches has many topological orders, and
capture fixes one; `reordered` gives another, in which other sets of blocks are prefixes. No torch here: see ecotone.model.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NewType

from ecotone import schema

__all__ = ["DTYPE_BYTES", "Block", "Exit", "Graph", "Parameter", "Tensor", "TensorIndex"]

TensorIndex = NewType("TensorIndex", int)

SCHEMA, VERSION = "ecotone.graph", 1
DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One activation. `shape` is that of the example inputs; `dynamic_dims` (often the batch) may differ at run time."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    producer: int  # index of the block that makes it; -1: a model input
    dynamic_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        schema.check(f"tensor {self.name}", self._violations())

    def _violations(self) -> Iterator[str]:
        if self.dtype not in DTYPE_BYTES:
            yield f"dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}"
        if any(size < 0 for size in self.shape) or len(self.shape) > 8:
            yield f"shape {self.shape} must have at most 8 dimensions, none negative"
        if any(not 0 <= d < len(self.shape) for d in self.dynamic_dims):
            yield f"dynamic_dims {self.dynamic_dims} lie outside shape {self.shape}"

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes uncompressed."""
        return self.num_elements * DTYPE_BYTES.get(self.dtype, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One weight or buffer; blocks that share it name the same index, and a segment counts it once."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The smallest piece that the planner places. `inputs`, `outputs`: tensor indices; `parameters`: parameter indices."""

    name: str
    inputs: tuple[TensorIndex, ...]
    outputs: tuple[TensorIndex, ...]
    flop: float
    parameters: tuple[int, ...] = ()
    ops: tuple[str, ...] = ()  # operator names inside, for people and for support tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """An early exit: a head that turns the single tensor at `position` into the model's outputs (same shapes and dtypes).

    `parameters`: indices of its own weights, which no block names. `working_bytes`: its largest working set.
    """

    name: str
    position: int
    flop: float
    parameters: tuple[int, ...] = ()
    working_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A model. `inputs` and `outputs` are tensor indices in the order of the flattened call and return value.

    `order`: which block of the captured graph stands at each place, () as captured; it tells the origin and is no part of
    the content hash.
    """

    name: str
    blocks: tuple[Block, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[TensorIndex, ...]
    outputs: tuple[TensorIndex, ...]
    parameters: tuple[Parameter, ...] = ()
    weights_hash: str = ""  # content hash of all weights, so that a profile knows its model
    exits: tuple[Exit, ...] = ()  # ascending in position
    order: tuple[int, ...] = ()
    _last_use: tuple[int, ...] = field(init=False, repr=False, compare=False, default=())
    _hash: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        schema.check(f"graph {self.name}", self._violations())
        last = [-1] * len(self.tensors)
        for index, block in enumerate(self.blocks):
            for tensor in block.inputs:
                last[tensor] = index
        for tensor in self.outputs:
            last[tensor] = len(self.blocks)
        object.__setattr__(self, "_last_use", tuple(last))

    def _violations(self) -> Iterator[str]:
        count = len(self.tensors)
        for index, block in enumerate(self.blocks):
            for tensor in (*block.inputs, *block.outputs):
                if not 0 <= tensor < count:
                    yield f"block {block.name} names tensor {tensor}, there are {count}"
                    return
            for tensor in block.inputs:
                if self.tensors[tensor].producer >= index:
                    yield f"block {block.name} reads {self.tensors[tensor].name} before it is made"
            for tensor in block.outputs:
                if self.tensors[tensor].producer != index:
                    yield f"tensor {self.tensors[tensor].name} does not name block {block.name} as its producer"
            if not (block.flop >= 0 and math.isfinite(block.flop)):
                yield f"block {block.name}: flop must be finite and not negative"
            if any(not 0 <= p < len(self.parameters) for p in block.parameters):
                yield f"block {block.name} names a parameter that is not there"
        if any(not 0 <= t < count for t in (*self.inputs, *self.outputs)):
            yield "inputs or outputs name a tensor that is not there"
        elif any(self.tensors[t].producer != -1 for t in self.inputs):
            yield "an input tensor has a producer"
        if self.order and sorted(self.order) != list(range(len(self.blocks))):
            yield f"order must name each of the {len(self.blocks)} blocks once"
        yield from self._exit_violations()

    def _exit_violations(self) -> Iterator[str]:
        names = [e.name for e in self.exits]
        for name in sorted({n for n in names if not n or names.count(n) > 1}):
            yield f"exit name {name!r} must be unique and not empty"
        if [e.position for e in self.exits] != sorted(e.position for e in self.exits):
            yield "exits must ascend in position"
        for place in self.exits:
            if not 0 < place.position < len(self.blocks):
                yield f"exit {place.name}: position {place.position} must lie inside (0, {len(self.blocks)})"
            if not (place.flop >= 0 and math.isfinite(place.flop)) or place.working_bytes < 0:
                yield f"exit {place.name}: flop and working set must be finite and not negative"
            if any(not 0 <= p < len(self.parameters) for p in place.parameters):
                yield f"exit {place.name} names a parameter that is not there"

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def frontier(self, position: int) -> tuple[TensorIndex, ...]:
        """Tensors that cross the cut before block `position`, ascending; at L the distinct outputs."""
        return tuple(
            TensorIndex(i)
            for i, tensor in enumerate(self.tensors)
            if tensor.producer < position and (self._last_use[i] >= position or (position == 0 and i in self.inputs))
        )

    def frontier_bytes(self, position: int) -> int:
        """Bytes of the frontier uncompressed."""
        return sum(self.tensors[t].size_bytes for t in self.frontier(position))

    def every_frontier_bytes(self) -> tuple[int, ...]:
        """Bytes of the frontier at each position 0..L, uncompressed, in one pass: O(L + tensors)."""
        steps = [0] * (self.num_blocks + 2)
        for i, tensor in enumerate(self.tensors):
            first = tensor.producer + 1
            last = max(self._last_use[i], 0) if i in self.inputs else self._last_use[i]
            if first <= last:
                steps[first] += tensor.size_bytes
                steps[last + 1] -= tensor.size_bytes
        return tuple(itertools.accumulate(steps[:-1]))

    def single_tensor_cuts(self) -> tuple[int, ...]:
        """Positions strictly inside where exactly one tensor crosses: the chain of the papers."""
        return tuple(p for p in range(1, self.num_blocks) if len(self.frontier(p)) == 1)

    def exit(self, name: str) -> Exit | None:
        """The exit called `name`, or None."""
        return next((e for e in self.exits if e.name == name), None)

    def reordered(self, order: Sequence[int]) -> Graph:
        """The same model with block `order[i]` of this graph at place i; tensors and parameters keep their indices.

        Another order has another content hash. Raises SchemaError where `order` is no topological order, or where the tensor
        of an exit crosses no place alone (in every topological order it does, but for blocks whose results nobody reads).
        """
        chosen, count = tuple(order), len(self.blocks)
        where = f"order of graph {self.name}"
        if sorted(chosen) != list(range(count)):
            schema.check(where, [f"must name each of the {count} blocks once"])
        place = {old: new for new, old in enumerate(chosen)}
        captured = tuple(self.order[i] for i in chosen) if self.order else chosen
        bare = replace(
            self, blocks=tuple(self.blocks[i] for i in chosen), exits=(),
            tensors=tuple(replace(t, producer=place[t.producer]) if t.producer >= 0 else t for t in self.tensors),
            order=() if captured == tuple(range(count)) else captured,
        )  # fmt: skip
        exits = []
        for leaving in self.exits:
            crossing = self.frontier(leaving.position)
            places = [p for p in (leaving.position, *range(1, count)) if bare.frontier(p) == crossing]
            schema.check(where, [] if places else [f"the tensor of exit {leaving.name} crosses no place alone"])
            exits.append(replace(leaving, position=places[0]))
        return replace(bare, exits=tuple(sorted(exits, key=lambda e: e.position)))

    def in_order(self, order: Sequence[int]) -> Graph:
        """The same model in the order that a plan names (see `order`); raises SchemaError as `reordered` does."""
        count = len(self.blocks)
        wanted, place = tuple(order) or tuple(range(count)), {b: i for i, b in enumerate(self.order or range(count))}
        if sorted(wanted) != list(range(count)):
            schema.check(f"order of graph {self.name}", [f"must name each of the {count} blocks once"])
        steps = tuple(place[block] for block in wanted)
        return self if steps == tuple(range(count)) else self.reordered(steps)

    def segment_parameters(self, start: int, stop: int, exit_name: str = "") -> frozenset[int]:
        """Indices of the parameters that blocks [start, stop), and the exit at their end if one is named, need."""
        place = self.exit(exit_name)
        own = place.parameters if place else ()
        return frozenset((*own, *(p for block in self.blocks[start:stop] for p in block.parameters)))

    def segment_parameter_bytes(self, start: int, stop: int, exit_name: str = "") -> int:
        """Bytes of the weights that blocks [start, stop) (and the exit at their end) need, shared ones once."""
        return sum(self.parameters[p].size_bytes for p in self.segment_parameters(start, stop, exit_name))

    def segment_flop(self, start: int, stop: int) -> float:
        """FLOP of blocks [start, stop)."""
        return sum(block.flop for block in self.blocks[start:stop])

    def content_hash(self) -> str:
        """Hex sha256 of structure and weights hash; the graph's name and origin are not part of it. Worked out once."""
        if not self._hash:
            document = schema.write(self)
            del document["name"], document["order"]
            digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
            object.__setattr__(self, "_hash", digest)
        return self._hash

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "graph") -> Graph:
        """Read a graph; raises SchemaError naming every violation."""
        return schema.load_json(Graph, text, SCHEMA, VERSION, where)
