"""From a plan to compiled stages: at the asker out of the captured model, on other nodes out of the store.

A stage travels as its program and one blob per weight, all by content hash; for an int8 executor also as calibration inputs
("@input/SET/INDEX" among its weights), since ranges come from real activations. Learned codecs of the transfers that start
or end on its device travel beside it ("@codec/ID"). A node rebuilds the segment from checked parts, compiles it and runs it
once, so that the first request finds it warm. Compiled stages outlive their plan and serve the next one that asks for the
same content, executor and threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch

from ecotone import executors
from ecotone.codec import LearnedCodec, read_learned
from ecotone.graph import Graph
from ecotone.model import Captured, ModelError, Segment, TensorSpec
from ecotone.model.confidence import ExitRule
from ecotone.plan import Plan, Stage
from ecotone.protocol.message import Blob, BlobRange, StagePart
from ecotone.runtime.store import Store
from ecotone.units import EcotoneError

__all__ = [
    "CapturedModel",
    "Piece",
    "PlacedStage",
    "ReadyStage",
    "Stages",
    "StoredModel",
    "codecs_from_store",
    "content_of",
    "learned_ids",
    "make_from_model",
    "missing_blobs",
    "parts_of",
    "segment_from_store",
    "weight_bytes",
]  # fmt: skip

_EXAMPLE = "@input"
_PROGRAM = "@program"
_CODEC = "@codec"
_KEPT_COMPILED = 48
_MAX_CALIBRATION_SETS = 4

Tensors = tuple[torch.Tensor, ...]
Piece = tuple[int, int] | tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class ReadyStage:
    """A compiled stage: run(tensors in the order of `inputs`) -> those of `outputs`, then those of its exit, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    run: executors.Compiled
    weight_bytes: int = 0
    exit_outputs: tuple[TensorSpec, ...] = ()
    rule: ExitRule | None = None


@dataclass(frozen=True, slots=True)
class PlacedStage:
    """A ready stage in one plan: its confidence is held against `threshold`, who leaves goes over `exit_edge`."""

    ready: ReadyStage
    threshold: float = 0.0
    exit_edge: int | None = None

    def compute(self, tensors: Tensors) -> tuple[Tensors, int | None]:
        """What the stage makes, and the edge over which that leaves early; None: it goes on."""
        made, rule = self.ready.run(tensors), self.ready.rule
        if rule is None:
            return made, None
        own = made[-rule.num_outputs :]
        if rule.of_request(own) >= self.threshold:
            return own, self.exit_edge
        return made[: -rule.num_outputs], None


class Stages:
    """Compiled stages of one device, by (session, epoch, stage); safe for threads.

    Stages that no plan uses are kept for the next plan, the last used longest, while all weights here fit `memory_bytes`.
    """

    def __init__(self, accelerator: str = "cpu", threads: int = 1, memory_bytes: int = 1 << 62):
        self._accelerator, self._threads, self._memory_bytes = accelerator, threads, memory_bytes
        self._lock = threading.Lock()
        self._ready: dict[tuple[int, int], dict[int, PlacedStage]] = {}
        self._compiled: OrderedDict[tuple[str, str], ReadyStage] = OrderedDict()

    def get(self, session: int, epoch: int, index: int) -> PlacedStage:
        """The stage; raises EcotoneError where this node was not prepared for it."""
        try:
            return self._ready[session, epoch][index]
        except KeyError:
            raise EcotoneError(f"stage {index} of plan epoch {epoch} is not loaded here; deploy the plan again") from None

    def outputs_before(self, session: int, epoch: int, edge: int) -> tuple[TensorSpec, ...] | None:
        """What travels over `edge`, if the stage that makes it is here: stage `edge` - 1, or the one with that exit edge."""
        stages = self._ready.get((session, epoch), {})
        for stage in stages.values():
            if stage.exit_edge == edge:
                return stage.ready.exit_outputs
        return stages[edge - 1].ready.outputs if edge - 1 in stages else None

    def inputs_of(self, session: int, epoch: int, edge: int) -> tuple[TensorSpec, ...] | None:
        """What stage `edge` takes, if it is here."""
        stage = self._ready.get((session, epoch), {}).get(edge)
        return stage.ready.inputs if stage else None

    @property
    def is_in_use(self) -> bool:
        """Whether any plan is loaded."""
        return bool(self._ready)

    def prepare(
        self, session: int, plan: Plan, index: int, content: str,
        make: Callable[[], tuple[Segment, Sequence[Tensors]]], weight_bytes: int = 0,
    ) -> None:  # fmt: skip
        """Compile and warm one stage unless its `content` is compiled already; `make` gives segment and calibration sets.

        `weight_bytes` is what it will hold: unused stages make room for it first. Stages that differ in their threshold only
        are compiled once. Raises EcotoneError where the plan has an exit there and the segment has not, or the other way.
        """
        stage = plan.stages[index]
        key = (content, stage.executor)
        with self._lock:
            ready = self._compiled.get(key)
            if ready is not None:
                self._compiled.move_to_end(key)
            else:
                self._make_room(weight_bytes)
        if ready is None:
            segment, sets = make()
            ready = self._compile(segment, stage.executor, sets, weight_bytes)
        exit_edge = plan.exit_edge(index)
        if (ready.rule is None) != (exit_edge is None):
            raise EcotoneError(f"stage {index}: plan and program disagree on the exit {stage.exit!r}; deploy again")
        with self._lock:
            self._compiled[key] = ready
            placed = PlacedStage(ready, stage.threshold, exit_edge)
            self._ready.setdefault((session, plan.epoch), {})[index] = placed
            self._make_room(0)

    @property
    def held_bytes(self) -> int:
        """Weights of all compiled stages, used or kept."""
        return sum(stage.weight_bytes for stage in tuple(self._compiled.values()))

    def _make_room(self, need_bytes: int) -> None:
        """Forget unused stages, the longest unused first, until `need_bytes` more fit and few enough are kept."""
        used = {id(placed.ready) for stages in self._ready.values() for placed in stages.values()}
        for key in [k for k, stage in self._compiled.items() if id(stage) not in used]:
            if self.held_bytes + need_bytes <= self._memory_bytes and len(self._compiled) <= _KEPT_COMPILED:
                return
            del self._compiled[key]

    def unload(self, session: int, epoch: int | None = None) -> None:
        """Forget the stages of one plan, or of the whole session."""
        with self._lock:
            for key in [k for k in self._ready if k[0] == session and epoch in (None, k[1])]:
                del self._ready[key]

    def _compile(self, segment: Segment, executor_id: str, sets: Sequence[Tensors], weight_bytes: int) -> ReadyStage:
        executor = executors.by_id(executor_id)
        reason = executor.available(self._accelerator)
        if reason:
            raise EcotoneError(f"executor {executor_id} does not work here: {reason}")
        examples = sets[0] if sets else tuple(_example(spec) for spec in segment.inputs)
        executor = executors.with_calibration(executor, sets[1:])
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            run = executor.compile(segment, examples, self._accelerator, self._threads)
            run(examples)
        rule = segment.program.exit
        own = len(segment.outputs) - (rule.num_outputs if rule else 0)
        return ReadyStage(segment.inputs, segment.outputs[:own], run, weight_bytes, segment.outputs[own:], rule)


class CapturedModel:
    """The asker's model: segments on demand, their parts by hash, and the bytes behind those hashes.

    `samples` are flat inputs (as Captured.flatten_inputs gives) that calibrate int8 executors; empty: the example inputs.
    `pieces`: what Captured.segment takes (ranges of blocks, with an exit or without), whose programs travel with every
    part, and the samples and `codecs` too: for a node that is to profile.
    """

    def __init__(
        self,
        captured: Captured,
        samples: Sequence[Tensors] = (),
        pieces: Sequence[Piece] = (),
        codecs: Sequence[LearnedCodec] = (),
    ):
        self.captured, self._pieces = captured, tuple(pieces)
        self.codecs = {made.id: made for made in codecs}
        self._samples = tuple(samples)[:_MAX_CALIBRATION_SETS] or (tuple(captured.example_inputs),)
        self._segments: dict[tuple[int, int, str], Segment] = {}
        self._frontiers: dict[int, tuple[Tensors, ...]] = {0: self._samples}
        self._blobs: dict[str, Callable[[], bytes]] = {}

    def segment(self, start: int, stop: int, exit_name: str = "") -> Segment:
        key = (start, stop, exit_name)
        if key not in self._segments:
            self._segments[key] = self.captured.segment(*key)
        return self._segments[key]

    def sets(self, stage: Stage) -> tuple[Tensors, ...]:
        """Calibration inputs of `stage`: the samples brought to its first block; none where its executor needs none."""
        if not stage.executor.endswith(":int8") and not self._pieces:
            return ()
        if stage.start not in self._frontiers:
            module = self.segment(0, stage.start).module()
            with torch.inference_mode():
                self._frontiers[stage.start] = tuple(tuple(module(*sample)) for sample in self._samples)
        return self._frontiers[stage.start]

    def part(self, index: int, stage: Stage, codecs: Iterable[str] = ()) -> StagePart:
        """Program, weights, calibration inputs and learned codecs of `stage` by content hash."""
        segment = self.segment(stage.start, stage.stop, stage.exit)
        text = segment.program_json().encode()
        program = self._offer(text, "", hashlib.sha256(text).hexdigest())
        weights = self._weights(segment)
        for number, tensors in enumerate(self.sets(stage)):
            for position, tensor in enumerate(tensors):
                data = safetensors.torch.save({"t": tensor.contiguous()})
                weights.append(self._offer(data, f"{_EXAMPLE}/{number}/{position}", hashlib.sha256(data).hexdigest()))
        for piece in self._pieces:
            own = self.segment(*piece)
            data = own.program_json().encode()
            weights.append(self._offer(data, f"{_PROGRAM}/{_named(piece)}", hashlib.sha256(data).hexdigest()))
            weights += [blob for blob in self._weights(own) if own.program.exit and blob not in weights]  # of the head
        for name in self.codecs if self._pieces else codecs:
            made = self.codecs[name]
            weights.append(self._offer(made.data, f"{_CODEC}/{name}", made.sha256))
        return StagePart(stage=index, program=program, weights=tuple(weights))

    def _weights(self, segment: Segment) -> list[Blob]:
        for name, (sha256, _) in segment.manifest().items():
            self._blobs.setdefault(sha256, lambda name=name: segment.blob(name))  # type: ignore[misc]
        return [Blob(sha256=sha, size_bytes=size, name=name) for name, (sha, size) in segment.manifest().items()]

    def offers(self, sha256: str) -> bool:
        """Whether `part` named this blob."""
        return sha256 in self._blobs

    def blob(self, sha256: str) -> bytes:
        """The bytes of a blob that `part` named; raises EcotoneError for another."""
        try:
            return self._blobs[sha256]()
        except KeyError:
            raise EcotoneError(f"blob {sha256[:12]} is not part of this model") from None

    def _offer(self, data: bytes, name: str, sha256: str) -> Blob:
        self._blobs[sha256] = lambda: data
        return Blob(sha256=sha256, size_bytes=len(data), name=name)


def content_of(part: StagePart) -> str:
    """Names everything that decides how a stage is compiled: its program (which names its weights) and its examples."""
    examples = [blob.sha256 for blob in part.weights if blob.name.startswith(_EXAMPLE)]
    return "+".join([part.program.sha256, *examples])


def weight_bytes(part: StagePart) -> int:
    """Bytes of weights that a stage holds, calibration inputs, programs and codecs left out."""
    return sum(blob.size_bytes for blob in part.weights if not blob.name.startswith((_EXAMPLE, _PROGRAM, _CODEC)))


def missing_blobs(store: Store, parts: Sequence[StagePart]) -> tuple[BlobRange, ...]:
    """What `store` lacks of `parts`, numbered, each from where an unfinished download stopped."""
    wanted = {blob.sha256: blob for part in parts for blob in (part.program, *part.weights)}
    lacking = [blob for sha256, blob in wanted.items() if not store.has(sha256)]
    return tuple(
        BlobRange(number=number, sha256=blob.sha256, size_bytes=blob.size_bytes, offset=store.partial_bytes(blob.sha256))
        for number, blob in enumerate(lacking)
    )


def segment_from_store(store: Store, part: StagePart) -> tuple[Segment, tuple[Tensors, ...]]:
    """Rebuild a stage from checked blobs; raises ModelError or StoreError."""
    segment = Segment.from_parts(store.read(part.program.sha256), store.read)
    sets: dict[int, dict[int, torch.Tensor]] = {}
    for blob in part.weights:
        if blob.name.startswith(_EXAMPLE + "/"):
            _, number, position = blob.name.split("/")
            sets.setdefault(int(number), {})[int(position)] = _read_example(store.read(blob.sha256))
    examples = tuple(tuple(tensors[i] for i in sorted(tensors)) for _, tensors in sorted(sets.items()))
    for tensors in examples:
        if [(tuple(t.shape), str(t.dtype)) for t in tensors] != [(s.shape, f"torch.{s.dtype}") for s in segment.inputs]:
            raise ModelError(f"calibration inputs of segment [{segment.start}, {segment.stop}) do not fit it")
    return segment, examples


def codecs_from_store(store: Store, parts: Sequence[StagePart]) -> tuple[LearnedCodec, ...]:
    """The learned codecs that travelled with `parts`, each once; EcotoneError for one that is not what its id says."""
    found: dict[str, LearnedCodec] = {}
    for blob in (blob for part in parts for blob in part.weights if blob.name.startswith(_CODEC + "/")):
        name = blob.name.removeprefix(_CODEC + "/")
        if name not in found:
            found[name] = read_learned(store.read(blob.sha256), name)
            if found[name].id != name:
                raise ModelError(f"{name}: the weights that came are those of {found[name].id}; deploy the plan again")
    return tuple(found.values())


class StoredModel:
    """What a node knows of a model that it is to profile: its graph, segments of the agreed ranges, the samples."""

    def __init__(self, store: Store, part: StagePart, graph: Graph):
        self.graph, self._store = graph, store
        self._programs = {b.name.removeprefix(_PROGRAM + "/"): b.sha256 for b in part.weights if b.name.startswith(_PROGRAM)}
        self.samples = segment_from_store(store, part)[1]

    @property
    def example_inputs(self) -> Tensors:
        return self.samples[0]

    def segment(self, start: int, stop: int, exit_name: str = "") -> Segment:
        """Blocks [start, stop) with this exit or none; raises EcotoneError for what was not sent."""
        sha256 = self._programs.get(_named((start, stop, exit_name)))
        if sha256 is None:
            raise EcotoneError(f"blocks [{start}, {stop}) {exit_name} were not sent for profiling")
        return Segment.from_parts(self._store.read(sha256), self._store.read)


def _named(piece: Piece) -> str:
    start, stop, *exit_name = piece
    return f"{start}-{stop}" + "".join(f"-{name}" for name in exit_name if name)


def _read_example(data: bytes) -> torch.Tensor:
    try:
        return safetensors.torch.load(data)["t"]
    except Exception as error:  # safetensors has its own exception type
        raise ModelError(f"a calibration input is not a safetensors blob: {str(error)[:120]}") from None


def _example(spec: TensorSpec) -> torch.Tensor:
    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.rand(spec.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(spec.shape, dtype=dtype)


def make_from_model(model: CapturedModel, stage: Stage) -> Callable[[], tuple[Segment, Sequence[Tensors]]]:
    """How the asker makes its own stage: straight from the captured model."""
    return lambda: (model.segment(stage.start, stage.stop, stage.exit), model.sets(stage))


def parts_of(model: CapturedModel, plan: Plan) -> tuple[StagePart, ...]:
    """The parts of all stages of `plan`."""
    return tuple(model.part(index, stage, learned_ids(plan, stage)) for index, stage in enumerate(plan.stages))


def learned_ids(plan: Plan, stage: Stage | None = None) -> tuple[str, ...]:
    """Ids of the learned codecs in `plan`; with `stage` of the transfers that start or end on its device."""
    edges = [t for t in plan.edges if stage is None or stage.device in (t.source, t.target)]
    return tuple(dict.fromkeys(t.codec for t in edges if t.codec.startswith("learned:")))
