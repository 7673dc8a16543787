"""The planning problem as plain numpy tables, made from a CostModel and what was asked; no formula of its own.

Legend: P cut positions (indices into `cuts`, 0 and P - 1 are the ends), D devices, K codecs. A *path* is the answer in
these indices: stages (device, start, stop) and the k + 1 codecs between them, -1 where nothing crosses. Impossible
entries are inf. A stage that by itself does not fit its device is impossible. Adjacent stages are on unlike devices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import BoolArray, CostModel, FloatArray
from ecotone.graph import Graph
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner.objective import Asked, PlannerError

__all__ = ["Chain", "Path", "build", "segment_weights"]

IMAGE_CODECS = ("jpeg", "pixels", "png", "webp")
UNMEASURED_CODEC = "fp32"  # changes nothing and costs a copy: the one codec that needs no measurement


@dataclass(frozen=True, slots=True)
class Path:
    """Stages (device, start, stop) and the codecs round them, all as indices; -1: local."""

    stages: tuple[tuple[int, int, int], ...]
    codecs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """Tables by index: see the file's legend. `best[p, d, e]` is the least transfer time, `choice` its codec (-1: local)."""

    model: CostModel
    cuts: tuple[int, ...]
    source: int
    sink: int
    executors: tuple[str, ...]
    codecs: tuple[str, ...]
    stage: FloatArray  # (D, P, P) seconds
    executor: NDArray[np.intp]  # (D, P, P)
    stage_error: FloatArray  # (D, P, P)
    weights: FloatArray  # (P, P) bytes
    working: FloatArray  # (P, P) bytes
    capacity: FloatArray  # (D,) bytes
    size: FloatArray  # (P, K) bytes
    encode: FloatArray  # (P, K, D) seconds
    decode: FloatArray  # (P, K, D) seconds
    loss: FloatArray  # (P, K) points
    sure_loss: FloatArray  # (P, K) points, by the upper end of the interval
    codec_error: FloatArray  # (P, K)
    send: FloatArray  # (P, K, D, D) bytes / rate; inf where there is no link or the codec is not admissible
    transfer: FloatArray  # (P, K, D, D) seconds
    best: FloatArray  # (P, D, D) seconds
    choice: NDArray[np.intp]  # (P, D, D)

    @property
    def num_positions(self) -> int:
        return len(self.cuts)

    @property
    def num_devices(self) -> int:
        return len(self.capacity)

    def plan(self, path: Path) -> Plan:
        """The Plan of a path."""
        names = [d.name for d in self.model.cluster.devices]
        ends = [self.source, *(d for d, _, _ in path.stages), self.sink]
        at = [0, *(stop for _, _, stop in path.stages)]
        stages = tuple(
            Stage(
                device=names[d], start=self.cuts[a], stop=self.cuts[b], executor=self.executors[int(self.executor[d, a, b])]
            )
            for d, a, b in path.stages
        )
        transfers = tuple(
            Transfer(
                source=names[ends[i]],
                target=names[ends[i + 1]],
                position=self.cuts[at[i]],
                codec=LOCAL if codec < 0 else self.codecs[codec],
            )
            for i, codec in enumerate(path.codecs)
        )
        return Plan(graph_hash=self.model.profile.graph_hash, stages=stages, transfers=transfers)

    def limited(self, load_s: float) -> Chain:
        """The same without stages and transfers that alone load a device or link for more than `load_s`."""
        if not math.isfinite(load_s):
            return self
        stage = np.where(self.stage <= load_s, self.stage, math.inf)
        transfer = np.where(self.send <= load_s, self.transfer, math.inf)
        best, choice = _fastest(transfer)
        return replace(self, stage=stage, transfer=transfer, best=best, choice=choice)

    def without(self, devices: Iterable[int], pairs: Iterable[tuple[int, int]]) -> Chain:
        """The same where these devices compute nothing and these directed links carry nothing."""
        stage, cut = self.stage.copy(), list(pairs)
        stage[list(devices)] = math.inf
        if not cut:
            return replace(self, stage=stage)
        transfer = self.transfer.copy()
        for source, target in cut:
            transfer[:, :, source, target] = math.inf
        best, choice = _fastest(transfer)
        return replace(self, stage=stage, transfer=transfer, best=best, choice=choice)

    def with_fastest_codecs(self, stages: tuple[tuple[int, int, int], ...]) -> Path | None:
        """These stages with the fastest admissible codec on every crossing; None where a link or stage is impossible."""
        ends = [self.source, *(d for d, _, _ in stages), self.sink]
        at = [0, *(stop for _, _, stop in stages)]
        if any(not math.isfinite(self.stage[s]) for s in stages):
            return None
        codecs = [int(self.choice[p, ends[i], ends[i + 1]]) for i, p in enumerate(at)]
        times = [self.best[p, ends[i], ends[i + 1]] for i, p in enumerate(at)]
        return Path(stages, tuple(codecs)) if np.isfinite(times).all() else None


def build(model: CostModel, asked: Asked) -> Chain:
    """Tables of what may be planned under `asked`; raises PlannerError where a device or codec asked for is not there."""
    devices, profile = model.cluster.devices, model.profile
    cuts = np.array(profile.cuts if profile.num_blocks == model.graph.num_blocks else range(model.graph.num_blocks + 1))
    if profile.num_blocks != model.graph.num_blocks or profile.graph_hash != model.graph.content_hash():
        raise PlannerError(f"profile of {profile.cluster_name}: made for another model (graph hash differs); profile again")
    unknown = sorted(set(asked.devices) - {d.name for d in devices})
    if unknown:
        raise PlannerError(f"device={unknown[0]}: no such device; devices are {', '.join(d.name for d in devices)}")
    weights, working = segment_weights(model.graph, cuts), _working(model, cuts)
    capacity = np.array([min(float(d.memory_bytes), asked.memory_bytes) for d in devices])
    stage, executor, error, executors = _stages(model, asked, cuts)
    stage[(weights + working)[None] > capacity[:, None, None]] = math.inf
    names = [d.name for d in devices]
    tables = _transfers(model, asked, cuts)
    return Chain(
        model=model, cuts=tuple(int(c) for c in cuts), source=names.index(model.cluster.source),
        sink=names.index(model.cluster.sink), executors=executors, stage=stage, executor=executor, stage_error=error,
        weights=weights, working=working, capacity=capacity, **tables,
    )  # fmt: skip


def segment_weights(graph: Graph, cuts: NDArray[np.intp]) -> FloatArray:
    """Bytes of weights of every segment between cuts, shared ones once: (P, P), by inclusion and exclusion of neighbours.

    A parameter with uses u1 < u2 < ... lies in [a, b) as often as single uses do less pairs of neighbouring uses.
    """
    count = graph.num_blocks
    single, pairs = np.zeros(count + 1), np.zeros((count + 1, count + 1))
    uses: dict[int, list[int]] = {}
    for index, block in enumerate(graph.blocks):
        for parameter in set(block.parameters):
            uses.setdefault(parameter, []).append(index)
    for parameter, blocks in uses.items():
        size = graph.parameters[parameter].size_bytes
        for block_index in blocks:
            single[block_index + 1] += size
        for first, second in itertools.pairwise(blocks):
            pairs[first, second + 1] += size
    upto = np.cumsum(single)[cuts]
    both = np.cumsum(np.cumsum(pairs[::-1], axis=0)[::-1], axis=1)[np.ix_(cuts, cuts)]
    return np.triu(upto[None, :] - upto[:, None] - both, 1)


def _working(model: CostModel, cuts: NDArray[np.intp]) -> FloatArray:
    size = len(cuts)
    found = np.zeros((size, size))
    if size > 1:
        between = np.array([model.working[a:b].max() for a, b in itertools.pairwise(cuts)], dtype=np.float64)
        for start in range(size - 1):
            found[start, start + 1 :] = np.maximum.accumulate(between[start:])
    return found


def _stages(
    model: CostModel, asked: Asked, cuts: NDArray[np.intp]
) -> tuple[FloatArray, NDArray[np.intp], FloatArray, tuple[str, ...]]:
    """Fastest admissible executor of every device and segment: seconds, executor, error (D, P, P), and executor names.

    A measured time comes before any that is only spread by FLOP from a longer segment: small segments of large frontiers
    cost far more than their share of the FLOP, so such a guess would win where it is most wrong.
    """
    devices, size = model.cluster.devices, len(cuts)
    allowed = {d.name: model.executors(d.name) for d in devices}
    names = tuple(sorted({e for found in allowed.values() for e in found if not asked.executors or e in asked.executors}))
    stage = np.full((len(devices), size, size), math.inf)
    choice = np.zeros(stage.shape, dtype=np.intp)
    error = np.zeros(stage.shape)
    guessed = np.ones(stage.shape, dtype=np.bool_)
    for d, device in enumerate(devices):
        if asked.devices and device.name not in asked.devices:
            continue
        for e, name in enumerate(names):
            times = model.stage_times(device.name, name) if name in allowed[device.name] else None
            if times is None:
                continue
            seconds, flagged = times.table(cuts.tolist())
            errors = np.full((size, size), times.largest_error)
            measured = np.zeros((size, size), dtype=np.bool_)
            place = {int(c): i for i, c in enumerate(cuts)}
            for (start, stop), segment in times.measured.items():
                if start in place and stop in place:
                    errors[place[start], place[stop]] = segment.relative_error
                    measured[place[start], place[stop]] = True
            seconds[_failing(model.failures(device.name, name), cuts) & ~measured] = math.inf
            better = ((seconds < stage[d]) & (flagged == guessed[d])) | (guessed[d] & ~flagged)
            better &= np.isfinite(seconds) & (errors <= asked.executor_error)
            stage[d][better], choice[d][better], error[d][better] = seconds[better], e, errors[better]
            guessed[d][better] = flagged[better]
    return stage, choice, error, names


def _failing(failures: list[tuple[int, int]], cuts: NDArray[np.intp]) -> BoolArray:
    """Segments that hold one that failed: what stopped the executor is in them too."""
    found = np.zeros((len(cuts), len(cuts)), dtype=np.bool_)
    for start, stop in failures:
        found |= (cuts <= start)[:, None] & (cuts >= stop)[None, :]
    return found


def _admissible(model: CostModel, asked: Asked, cuts: NDArray[np.intp]) -> tuple[tuple[str, ...], FloatArray]:
    """Codecs worth a column, and (P, K, 4): bytes (inf where not admissible), points lost, relative error, sure loss."""
    names = {UNMEASURED_CODEC} | {p.codec for p in model.profile.payloads}
    codecs = tuple(sorted(n for n in names if not asked.codecs or n in asked.codecs))
    if not codecs:
        raise PlannerError(
            f"codec={','.join(asked.codecs)}: none of these was measured; known are {', '.join(sorted(names))}"
        )
    found = np.full((len(cuts), len(codecs), 4), math.inf)
    image = _is_image(model.graph)
    for i, position in enumerate(cuts.tolist()):
        for k, codec in enumerate(codecs):
            if codec.startswith(IMAGE_CODECS) and (position != 0 or not image):
                continue
            payload = model.payload(position, codec)
            if payload is None or not (codec == UNMEASURED_CODEC or model.is_measured(position, codec)):
                continue
            loss, sure = model.loss_points(position, codec), model.sure_points(position, codec)
            if loss <= asked.loss_points and sure <= asked.sure_points and payload.relative_error <= asked.error:
                found[i, k] = payload.size_bytes, loss, payload.relative_error, sure
    return codecs, found


def _is_image(graph: Graph) -> bool:
    """One of the inputs has 1 or 3 channels and two spatial sizes: an image codec carries it, the others as they are."""
    shapes = [graph.tensors[index].shape for index in graph.inputs]
    return any(len(s) in (3, 4) and s[-3] in (1, 3) and min(s[-2:]) > 1 for s in shapes)


def _transfers(model: CostModel, asked: Asked, cuts: NDArray[np.intp]) -> dict[str, Any]:
    devices = model.cluster.devices
    codecs, payload = _admissible(model, asked, cuts)
    count, size = len(devices), payload[:, :, 0]
    encode, decode = np.full((2, len(cuts), len(codecs), count), math.inf)
    raw = np.array([model.raw_bytes(int(p)) for p in cuts], dtype=np.float64)
    for k, codec in enumerate(codecs):
        for d, device in enumerate(devices):
            fixed = model.codec_s(device.name, codec, 0.0)
            if fixed is None and codec == UNMEASURED_CODEC:
                encode[:, k, d] = decode[:, k, d] = 0.0
            elif fixed is not None:
                per_byte = np.subtract(model.codec_s(device.name, codec, 1.0) or fixed, fixed)
                encode[:, k, d], decode[:, k, d] = fixed[0] + raw * per_byte[0], fixed[1] + raw * per_byte[1]
    latency, rate = np.full((count, count), math.inf), np.full((count, count), 1.0)
    for d, source in enumerate(devices):
        for e, target in enumerate(devices):
            link = model.link(source.name, target.name) if d != e else None
            if link is not None:
                latency[d, e], rate[d, e] = link.latency_s, link.bandwidth_bytes_per_s
    send = np.where(np.isfinite(latency), size[:, :, None, None] / rate, math.inf)
    transfer = encode[:, :, :, None] + latency + send + decode[:, :, None, :]
    best, choice = _fastest(transfer)
    return {
        "codecs": codecs, "size": size, "encode": encode, "decode": decode, "loss": payload[:, :, 1],
        "codec_error": payload[:, :, 2], "sure_loss": payload[:, :, 3], "send": send, "transfer": transfer, "best": best,
        "choice": choice,
    }  # fmt: skip


def _fastest(transfer: FloatArray) -> tuple[FloatArray, NDArray[np.intp]]:
    """Least transfer time over codecs and which codec; staying on a device is free at the two ends only."""
    best, choice = transfer.min(axis=1), transfer.argmin(axis=1)
    own = np.arange(transfer.shape[-1])
    for end in (0, len(transfer) - 1):
        best[end, own, own], choice[end, own, own] = 0.0, -1
    return best, choice
