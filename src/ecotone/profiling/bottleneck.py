"""Trains a learned bottleneck (codec/learned.py) for one cut of a captured model, the model itself frozen, and measures it.

How the weights are found stands in bottleneck_training.py. The tables of the rANS stage are counted on the training samples
after the weights became float16, and the codec that is measured on the validation samples is the file that is returned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ecotone import codec
from ecotone.codec.learned import PRIOR, LearnedCodec, Spec, down, read_learned, write_learned
from ecotone.codec.rans import Tables
from ecotone.graph import Graph
from ecotone.model import Captured
from ecotone.profiling.bottleneck_training import BottleneckOptions, Parameters, Work, class_dim, train
from ecotone.profiling.decisions import disagreement
from ecotone.profiling.measurement import Progress
from ecotone.profiling.work import relative_error
from ecotone.units import EcotoneError

__all__ = [
    "BottleneckOptions", "TrainedBottleneck", "check_bottleneck", "head_hash", "train_bottleneck", "trainable_cuts",
]  # fmt: skip

CACHE_LIMIT_BYTES = 4 << 30
Samples = Sequence[Sequence[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedBottleneck:
    """The codec and what it does on the validation samples; `loss_points` (percent of decisions) where there were labels."""

    codec: LearnedCodec
    bytes_per_sample: float
    bits_per_element: float
    relative_error: float
    disagreement: float
    num_validation: int
    loss_points: float | None = None


def train_bottleneck(
    captured: Captured,
    cut: int,
    samples: Samples,
    labels: Sequence[Tensor] | None = None,
    *,
    name: str = "",
    options: BottleneckOptions | None = None,
    progress: Progress | None = None,
) -> TrainedBottleneck:
    """A codec for the frontier at `cut`, which must be one float tensor. `samples`: flat inputs, real ones; at least 4.

    `labels`: per sample the right classes of the first output (its shape without the class dimension). Same seed, same
    machine: same file. Raises EcotoneError where the cut or the samples do not fit.
    """
    options = options or BottleneckOptions()
    spec = _spec(captured, cut, name, options)
    if len(samples) < 4 or (labels is not None and len(labels) != len(samples)):
        raise EcotoneError(f"bottleneck: {len(samples)} samples; give at least 4, and with labels as many labels")
    size = captured.graph.frontier_bytes(cut) * len(samples)
    if size > CACHE_LIMIT_BYTES:
        raise EcotoneError(f"bottleneck: {len(samples)} samples are {size} bytes at cut {cut}; give fewer, or cut elsewhere")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        work = Work(captured, spec, samples, labels, options)
        parameters = train(work, progress)
        made = read_learned(_file(work, parameters))
    return _measured(work, made)


def check_bottleneck(captured: Captured, made: LearnedCodec, where: str = "bottleneck") -> None:
    """Raise EcotoneError, naming why, where the codec was not trained for this very model and cut."""
    spec, graph = made.spec, captured.graph
    crossing = graph.frontier(spec.position) if spec.position <= graph.num_blocks else ()
    tensor = graph.tensors[crossing[0]] if len(crossing) == 1 else None
    problem = made.violation(tensor.shape, tensor.dtype) if tensor else f"nothing single crosses at {spec.position}"
    if problem or head_hash(captured, spec.position) != spec.head:
        reason = problem or "the weights before its cut are others"
        raise EcotoneError(f"{where}: {made.id} was trained for another model than {graph.name}: {reason}; train one for it")


def head_hash(captured: Captured, cut: int) -> str:
    """Names the values at `cut`: hex sha256 over the weights of the blocks before it and the shapes of what crosses there.

    What lies behind the cut, exits among it, does not change it.
    """
    digest = hashlib.sha256()
    for content in sorted(sha256 for sha256, _ in captured.segment(0, cut).manifest().values()):
        digest.update(content.encode())
    for index in captured.graph.frontier(cut):
        tensor = captured.graph.tensors[index]
        digest.update(f"{tensor.dtype}{[d for i, d in enumerate(tensor.shape) if i not in tensor.dynamic_dims]}".encode())
    return digest.hexdigest()


# ---- what is trained -----------------------------------------------------------------------------------------------------


def _spec(captured: Captured, cut: int, name: str, options: BottleneckOptions) -> Spec:
    graph = captured.graph
    where = f"bottleneck at {cut} of {graph.name}"
    if not 0 < cut < graph.num_blocks:
        raise EcotoneError(f"{where}: the cut must lie inside (0, {graph.num_blocks})")
    tensors = [graph.tensors[index] for index in graph.frontier(cut)]
    if len(tensors) != 1 or "float" not in tensors[0].dtype or len(tensors[0].shape) not in (3, 4):
        single = ", ".join(str(p) for p in trainable_cuts(graph))
        raise EcotoneError(
            f"{where}: one float tensor of 3 or 4 dimensions must cross there; such cuts are {single or 'none'}"
        )
    shape = tensors[0].shape
    is_sequence = len(shape) == 3
    stride, kernel = (1, 1) if is_sequence else (options.stride, options.kernel)
    channels = shape[-1] if is_sequence else shape[-3]
    return Spec(
        name=name or f"{_plain(graph.name)}-{cut}", position=cut, head=head_hash(captured, cut), channels=channels,
        latents=options.latents or min(channels, 32), stride=stride, kernel=kernel, hidden=options.hidden,
        is_sequence=is_sequence, coding=options.coding,
    )  # fmt: skip


def trainable_cuts(graph: Graph) -> tuple[int, ...]:
    """Positions where a bottleneck can be trained."""
    found = []
    for cut in graph.single_tensor_cuts():
        tensor = graph.tensors[graph.frontier(cut)[0]]
        if "float" in tensor.dtype and len(tensor.shape) in (3, 4):
            found.append(cut)
    return tuple(found)


def _plain(name: str) -> str:
    """ "package.module:Net" -> net: what an id may hold of a model's name."""
    last = name.lower().rpartition(":")[2]
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in last).strip("-")[:24] or "model"


def _measured(work: Work, made: LearnedCodec) -> TrainedBottleneck:
    """The codec over the validation samples."""
    answers, size, right, decisions = [], 0, 0, 0
    chosen = range(work.num_training, len(work.values))
    codec.hold(made)
    try:
        for i in chosen:
            body = codec.pack([("x", work.values[i])], made.id)
            size += len(body)
            with torch.no_grad():
                answers.append(tuple(work.tail(*codec.unpack(body))))
            if work.labels is not None:
                for sign, outputs in ((1, work.outputs[i]), (-1, answers[-1])):
                    hits = outputs[0].argmax(class_dim(outputs[0])).reshape(-1) == work.labels[i].reshape(-1)
                    right += sign * int(hits.sum())
                decisions += work.labels[i].numel()
    finally:
        codec.release(made)
    wanted = [work.outputs[i] for i in chosen]
    return TrainedBottleneck(
        codec=made, bytes_per_sample=size / len(chosen), num_validation=len(chosen),
        bits_per_element=8 * size / sum(work.values[i].numel() for i in chosen),
        relative_error=relative_error(answers, wanted), disagreement=disagreement(answers, wanted),
        loss_points=100 * right / decisions if decisions else None,
    )  # fmt: skip


def _file(work: Work, weights: Parameters) -> bytes:
    """The codec's file: tables counted on the training samples, figures of the validation samples in its Spec."""
    spec = work.spec
    tables: tuple[np.ndarray, np.ndarray] | tuple[None, None] = (None, None)
    if spec.coding == PRIOR:
        tables = _tables(work, weights)
    figures = _measured(work, read_learned(write_learned(spec, weights, *tables)))
    spec = replace(
        spec, bits_per_element=round(figures.bits_per_element, 5), relative_error=round(figures.relative_error, 5),
        disagreement=round(figures.disagreement, 5),
    )  # fmt: skip
    return write_learned(spec, weights, *tables)


def _tables(work: Work, weights: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and lowest integers of the latents over the training samples; one more to each side may still come."""
    counts: list[dict[int, int]] = [{} for _ in range(work.spec.latents)]
    for i in range(work.num_training):
        with torch.no_grad():
            y = down(work.maps([i]), weights, work.spec).round().clamp(-(2.0**14), 2.0**14)
        for latent, values in enumerate(y.movedim(1, 0).reshape(work.spec.latents, -1).to(torch.int32).numpy()):
            for value, count in zip(*np.unique(values, return_counts=True), strict=True):
                counts[latent][int(value)] = counts[latent].get(int(value), 0) + int(count)
    lowest = np.array([_range(found)[0] for found in counts])
    table = np.zeros((len(counts), max(_range(found)[1] - low for found, low in zip(counts, lowest, strict=True))), np.int64)
    for row, low, found in zip(table, lowest, counts, strict=True):
        start, stop = _range(found)
        row[: stop - start] = [2 * found.get(value, 0) + 1 for value in range(start, stop)]
        assert start == low
    return Tables.of_weights(table).frequency, lowest


def _range(found: dict[int, int], limit: int = 256) -> tuple[int, int]:
    """Half-open range of the integers that get a place: all seen and one more on each side, at most `limit`."""
    usual = max(found, key=lambda value: found[value])
    start, stop = max(min(found) - 1, usual - limit // 2), min(max(found) + 2, usual + limit // 2)
    return start, stop
