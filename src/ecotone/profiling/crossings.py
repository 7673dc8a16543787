"""Runs a model with one of its frontiers sent through a codec: the forward passes behind accuracy tables and payloads.

Every frontier is computed once per sample, in eager float32; then for each cut and codec the frontier is encoded, decoded
and only the rest of the model runs. Codecs that differ in their lossless coder give the same values and run once. Ranges
are of one item, so each sample is encoded by itself; where the model takes any batch, small samples run through it together.
Cost per sample: one pass, and for each cut and codec the share of the model behind that cut. Memory: one batch.

Exits: heads on frontiers. One at or before the cut has seen the frontier as it was made, one behind it as it came over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ecotone import codec
from ecotone.codec import CodecError, ImageSpec
from ecotone.model import Captured, Segment
from ecotone.profiling.ladders import is_exact, value_codec
from ecotone.units import EcotoneError

__all__ = ["Answer", "Crossings", "ExitRun", "Sent", "Tensors", "batches", "exit_run"]

Tensors = tuple[torch.Tensor, ...]

BATCH_BYTES = 2 << 20  # of the largest frontier: beyond the cache a larger batch gains nothing
MAX_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRun:
    """An exit to run: `outputs` turns the frontier at `position` into the model's outputs, `confidence` weighs those.

    A request leaves by a policy at the first of its exits whose confidence reaches the threshold. `content`: a hash of what
    the head computes; without one a table with this exit is never reused.
    """

    name: str
    position: int
    outputs: Callable[[Tensors], Tensors]
    confidence: Callable[[Tensors], float]
    content: str = ""


class _Rule(Protocol):
    def of_request(self, outputs: Sequence[torch.Tensor]) -> float: ...


class _Head(Protocol):
    """An exit of a captured model: a segment from the frontier at its position to the outputs, and how sure it is."""

    @property
    def name(self) -> str: ...
    @property
    def position(self) -> int: ...
    @property
    def segment(self) -> Segment: ...
    @property
    def rule(self) -> _Rule: ...


def exit_run(head: _Head) -> ExitRun:
    """The exit of a captured model, to be run here."""
    module = head.segment.module()
    return ExitRun(
        name=head.name, position=head.position, outputs=lambda tensors: tuple(module(*tensors)),
        confidence=head.rule.of_request, content=f"{head.segment.content_hash()} {head.rule}",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What came out for one sample: at the end, and at every exit (outputs and confidence, by name)."""

    outputs: Tensors
    exits: Mapping[str, tuple[Tensors, float]]


@dataclass(frozen=True, slots=True)
class Sent:
    """One batch whose frontier at `cut` went through `values` (see ladders.value_codec): the answers, per sample.

    `is_exact`: nothing changed. `sizes`: bytes of the bodies, per sample, under each codec that gives these values.
    """

    cut: int
    values: str
    answers: tuple[Answer, ...]
    is_exact: bool
    sizes: Mapping[str, tuple[int, ...]]


class Crossings:
    """One captured model, cut at `cuts` (ascending, 0 and L among them), under `codecs`; image codecs at cut 0 only.

    Raises EcotoneError for a cut or an exit that the model does not have.
    """

    def __init__(
        self,
        captured: Captured,
        cuts: Sequence[int],
        codecs: Sequence[str],
        *,
        image: ImageSpec | None = None,
        exits: Iterable[ExitRun] = (),
    ) -> None:
        self.captured, self.graph, self.image = captured, captured.graph, image
        self.length = captured.graph.num_blocks
        self.exits = tuple(sorted(exits, key=lambda head: head.position))
        for head in self.exits:
            if not 0 < head.position < self.length:
                where = f"exit {head.name} at {head.position}"
                raise EcotoneError(f"{where}: no frontier inside {self.graph.name}, which has {self.length} blocks")
        wrong = [cut for cut in cuts if not 0 <= cut <= self.length]
        if wrong:
            raise EcotoneError(f"cut {wrong[0]}: {self.graph.name} has positions 0 to {self.length}")
        self.cuts = tuple(sorted({0, *cuts, self.length}))
        self.codecs = tuple(codecs)
        self._stops = tuple(sorted({*self.cuts, *(head.position for head in self.exits)}))
        self._modules: dict[tuple[int, int], torch.nn.Module] = {}
        self.batch = _batch_of(captured, self._stops)

    def clean(self, samples: Sequence[Tensors]) -> tuple[dict[int, list[Tensors]], list[Answer]]:
        """The frontier at every cut and the answers, per sample, with nothing sent."""
        values, kept = list(samples), {0: list(samples)}
        exits: list[dict[str, tuple[Tensors, float]]] = [{} for _ in samples]
        for start, stop in itertools.pairwise(self._stops):
            values = self.run(start, stop, values)
            self._look(stop, values, exits)
            if stop in self.cuts:
                kept[stop] = values
        return kept, [Answer(v, e) for v, e in zip(values, exits, strict=True)]

    def sent(self, kept: Mapping[int, list[Tensors]], answers: Sequence[Answer], with_sizes: bool = True) -> Iterator[Sent]:
        """One batch (see `clean`) at every cut under everything that can code it."""
        for cut in self.cuts:
            yield from self.sent_at(cut, kept[cut], answers, with_sizes)

    def sent_at(
        self, cut: int, frontier: Sequence[Tensors], answers: Sequence[Answer], with_sizes: bool = True
    ) -> Iterator[Sent]:
        """The same at one cut; without `with_sizes` no time goes into lossless coders."""
        for values, names in self._codecs_at(cut).items():
            try:
                bodies = {name: [self.pack(cut, t, name) for t in frontier] for name in (names if with_sizes else [values])}
            except CodecError:
                continue  # this frontier is no picture
            sizes = {name: tuple(map(len, found)) for name, found in bodies.items()} if with_sizes else {}
            same, decoded = True, list(frontier)
            if not is_exact(values):
                decoded = [tuple(codec.unpack(body)) for body in next(iter(bodies.values()))]
                same = all(_equal(a, b) for a, b in zip(decoded, frontier, strict=True))
            yield Sent(cut, values, tuple(answers) if same else tuple(self.finish(cut, decoded, answers)), same, sizes)

    def pack(self, cut: int, tensors: Tensors, codec_id: str) -> bytearray:
        """The body of the frontier at `cut`, as a worker sends it."""
        names = [self.graph.tensors[t].name for t in self.graph.frontier(cut)]
        return codec.pack(list(zip(names, tensors, strict=True)), codec_id, image=self.image)

    def finish(self, cut: int, values: list[Tensors], answers: Sequence[Answer]) -> list[Answer]:
        """The answers where the frontier at `cut` is `values`: exits up to there as in `answers`, the others anew."""
        early = {head.name for head in self.exits if head.position <= cut}
        exits = [{name: seen for name, seen in answer.exits.items() if name in early} for answer in answers]
        stops = [cut, *(head.position for head in self.exits if head.position > cut), self.length]
        for start, stop in itertools.pairwise(sorted(set(stops))):
            values = self.run(start, stop, values)
            self._look(stop, values, exits)
        return [Answer(v, e) for v, e in zip(values, exits, strict=True)]

    def run(self, start: int, stop: int, values: list[Tensors]) -> list[Tensors]:
        """Blocks [start, stop) on every sample, in eager float32."""
        if start == stop:
            return values
        if (start, stop) not in self._modules:
            self._modules[start, stop] = self.captured.segment(start, stop).module()
        module = self._modules[start, stop]
        with torch.no_grad():
            if not self.batch or len(values) == 1:
                return [tuple(module(*tensors)) for tensors in values]
            counts = [tensors[0].shape[0] for tensors in values]
            joined = module(*(torch.cat(same) for same in zip(*values, strict=True)))
            return list(zip(*(torch.split(tensor, counts) for tensor in joined), strict=True))

    def _codecs_at(self, cut: int) -> dict[str, list[str]]:
        """Codecs by the values that they give, the fastest to decode first."""
        found: dict[str, list[str]] = {}
        for name in self.codecs:
            if codec.position_of(name) in (None, cut) and (cut == 0 or not codec.info(name).is_image):
                found.setdefault(value_codec(name), []).append(name)
        return {values: sorted(names, key=lambda name: name != values) for values, names in found.items()}

    def _look(self, position: int, values: list[Tensors], exits: list[dict[str, tuple[Tensors, float]]]) -> None:
        """Run the heads at `position`."""
        for head in self.exits:
            if head.position == position:
                for tensors, seen in zip(values, exits, strict=True):
                    with torch.no_grad():
                        outputs = tuple(head.outputs(tensors))
                        seen[head.name] = (outputs, float(head.confidence(outputs)))


def batches(samples: Iterable[Sequence[torch.Tensor]], size: int) -> Iterator[list[Tensors]]:
    """Samples in lists of at most `size` (0: one by one), none kept."""
    group: list[Tensors] = []
    for sample in samples:
        group.append(tuple(sample))
        if len(group) >= max(1, size):
            yield group
            group = []
    if group:
        yield group


def _batch_of(captured: Captured, stops: Sequence[int]) -> int:
    """How many samples may run at once; 0: each by itself, since some frontier does not carry the batch in front."""
    graph = captured.graph
    shape = graph.tensors[graph.inputs[0]].shape
    for stop in stops:
        for tensor in (graph.tensors[index] for index in graph.frontier(stop)):
            if tensor.dynamic_dims != (0,) or tensor.shape[:1] != shape[:1]:
                return 0
    largest = max(graph.frontier_bytes(stop) for stop in stops)
    return max(1, min(MAX_BATCH, BATCH_BYTES // max(1, largest)))


def _equal(mine: Tensors, theirs: Tensors) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
