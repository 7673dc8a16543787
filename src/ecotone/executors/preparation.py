"""What every executor does round its engine: shapes, tensors that only pass through, threads, errors, one per shape.

A Segment hands on tensors that are only needed later ("relayed"): those never enter an engine, so they stay exact under
every precision. Engines get `Core`, the rest of the segment. Engines are prepared for concrete shapes; a call with
other shapes prepares once more and the latest few are kept.
"""

from __future__ import annotations

import contextlib
import platform
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ecotone.executors.executor import Compiled, ExecutorError
from ecotone.model.program import references
from ecotone.model.segment import Segment

__all__ = [
    "Core",
    "Engine",
    "Route",
    "cpu_flags",
    "engine_threads",
    "per_shape",
    "route_of",
    "shapes_of",
    "stop_unsupported",
]

KEPT_SHAPES = 8

Engine = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""Runs a core: CPU tensors in, fresh contiguous CPU tensors out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Which outputs an engine makes, which are inputs handed on, and which inputs it reads; indices of the segment."""

    made: tuple[int, ...]
    relayed: tuple[tuple[int, int], ...]  # (output, input)
    fed: tuple[int, ...]

    def through(self, engine: Engine) -> Compiled:
        """The whole segment from an engine of its core."""
        count = len(self.made) + len(self.relayed)

        def run(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            results: list[torch.Tensor | None] = [None] * count
            for output, source in self.relayed:
                results[output] = tensors[source]
            if self.made:
                for output, tensor in zip(self.made, engine([tensors[i] for i in self.fed]), strict=True):
                    results[output] = tensor
            return tuple(t for t in results if t is not None)

        return run


def route_of(segment: Segment) -> Route:
    """How tensors go through `segment`. An input that no operator reads is not fed: some exporters prune it, some not."""
    program = segment.program
    count = len(program.inputs)
    read = {value for node in program.nodes for value in references(node)}
    return Route(
        made=tuple(i for i, value in enumerate(program.results) if value >= count),
        relayed=tuple((i, value) for i, value in enumerate(program.results) if value < count),
        fed=tuple(i for i in range(count) if i in read),
    )


class Core(torch.nn.Module):
    """The operators of a segment without the tensors that only pass through, for inputs shaped like `tensors`."""

    def __init__(self, segment: Segment, route: Route, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.inner = segment.module()
        self.fed, self.made, self.count = route.fed, route.made, len(tensors)
        batch = segment.program.batch
        for position in set(range(self.count)) - set(route.fed):
            # Nobody reads it, but the batch may be counted on its shape.
            size = [1] * tensors[position].dim()
            if batch is not None and batch.input == position:
                size[batch.dim] = tensors[position].shape[batch.dim]
            self.register_buffer(f"unread_{position}", torch.zeros(size))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.fed, tensors, strict=True))
        whole = [given[i] if i in given else getattr(self, f"unread_{i}") for i in range(self.count)]
        outputs = self.inner(*whole)
        return tuple(outputs[i] for i in self.made)


def shapes_of(tensors: Sequence[torch.Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Data type and shape of each tensor."""
    return tuple((str(t.dtype), tuple(t.shape)) for t in tensors)


def per_shape(
    executor: str, segment: Segment, examples: Sequence[torch.Tensor], prepare: Callable[[Sequence[torch.Tensor]], Compiled]
) -> Compiled:
    """A Compiled that calls `prepare(tensors)` once per concrete shape; the first time now, with `examples`.

    Raises ExecutorError where the number of tensors is not that of the segment's inputs.
    """
    known: OrderedDict[object, Compiled] = OrderedDict()

    def run(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if len(tensors) != len(segment.inputs):
            text = f"takes {len(segment.inputs)} tensors, got {len(tensors)}; pass those of segment.inputs in order"
            raise ExecutorError(f"{executor}: segment [{segment.start}, {segment.stop}) {text}")
        shapes = shapes_of(tensors)
        compiled = known.get(shapes)
        if compiled is None:
            compiled = known[shapes] = prepare(tensors)
            while len(known) > KEPT_SHAPES:
                known.popitem(last=False)
        else:
            known.move_to_end(shapes)
        return compiled(tensors)

    if len(examples) == len(segment.inputs):
        known[shapes_of(examples)] = prepare(examples)
    else:
        run(examples)
    return run


@contextlib.contextmanager
def engine_threads(threads: int) -> Iterator[None]:
    """torch computes with `threads` threads inside; the caller's number is put back after."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def stop_unsupported(executor: str, segment: Segment) -> Iterator[None]:
    """Any error of an engine inside becomes an ExecutorError that names the operator where the engine does."""
    try:
        yield
    except ExecutorError:
        raise
    except Exception as error:
        text = str(error)
        names = dict.fromkeys(re.findall(r"aten(?:::|\.)[a-zA-Z_0-9]+(?:\.[a-zA-Z_0-9]+)?", text))
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Exception from ")]
        first = (lines[0] if lines else type(error).__name__)[:200]
        cause = f"operator {', '.join(list(names)[:3])}: {first}" if names else first
        where = f"{executor}: cannot prepare segment [{segment.start}, {segment.stop})"
        raise ExecutorError(f"{where}: {cause}; use torch:fp32 for it") from error


def cpu_flags() -> str:
    """What of the processor decides whether a prepared segment still fits: machine and instruction sets."""
    return f"{platform.machine()}/{torch.backends.cpu.get_cpu_capability()}"
