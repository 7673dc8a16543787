"""From times of shards, as devices measured them, to the profile that a planner reads.

A curve fixed + per token + per (token, position) pair is fitted to each part and phase by non-negative least squares of
relative errors: one row and many weigh alike. Pairs are those of llmprofile.attended. What a rounded executor costs in
nats per token is a rule of thumb (marked so) unless `losses` states it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from ecotone.llm.config import DecoderConfig
from ecotone.llm.executors import cache_dtype
from ecotone.llm.service import ExecutorTimes
from ecotone.llm.sources import ModelRef
from ecotone.llm.timing import Load, ShardTime, layer_kinds
from ecotone.llmprofile import EMBEDDING, FRAME, HEAD, Curve, ExecutorFacts, LayerPart, LlmProfile, PartTime, attended

__all__ = ["ASSUMED_LOSS", "build_profile"]

ASSUMED_LOSS = {"fp32": 0.0, "bf16": 0.001, "int8": 0.005, "int4": 0.05}
FRAME_S = 4e-4
"""What a stage adds to a frame besides computing: messages, queues, threads and its share of the driver's, as measured on
one machine of two cores (benchmarks/llm_decode.py)."""
CODEC_LOSS = {"fp32": 0.0, "bf16": 0.001, "int8": 0.01}


def build_profile(
    ref: ModelRef, measured: Mapping[str, Sequence[ExecutorTimes]], losses: Mapping[str, float] | None = None
) -> LlmProfile:  # fmt: skip
    """The profile of `ref`'s model on the devices of `measured`; `losses` by executor, where they were measured."""
    config, stated = ref.config, dict(losses or {})
    names = {kind: str(index) for kind, index in layer_kinds(config).items()}
    times = [
        _part(device, config, found.executor, part, [t for t in found.times if t.part == part])
        for device, per_executor in measured.items()
        for found in per_executor
        for part in dict.fromkeys(time.part for time in found.times)
    ]
    frame = Curve(fixed_s=FRAME_S)
    times += [
        PartTime(device=device, executor=found.executor, part=FRAME, prefill=frame, decode=frame)
        for device, per_executor in measured.items()
        for found in per_executor
        if found.times
    ]
    facts = [_facts(config, executor, stated) for executor in dict.fromkeys(time.executor for time in times)]
    return LlmProfile(
        model_hash=ref.fingerprint, width=config.width, max_positions=config.max_positions, model=ref.name,
        kinds=tuple(LayerPart(part=name, window=kind.window) for kind, name in names.items()),
        layers=tuple(names[layer] for layer in config.layers), times=tuple(times), executors=tuple(facts),
        codec_losses=dict(CODEC_LOSS), machine=platform.machine(),
    )  # fmt: skip


def _facts(config: DecoderConfig, executor: str, losses: Mapping[str, float]) -> ExecutorFacts:
    precision = executor.partition(":")[2]
    return ExecutorFacts(
        executor=executor, kv_bytes_per_token=config.kv_bytes_per_token(1, cache_dtype(executor).itemsize),
        loss=losses.get(executor, ASSUMED_LOSS.get(precision, 0.0)), is_assumed=executor not in losses,
    )  # fmt: skip


def _part(device: str, config: DecoderConfig, executor: str, part: str, times: Sequence[ShardTime]) -> PartTime:
    is_layer = part.isdigit()
    name = part if is_layer else {"embedding": EMBEDDING, "head": HEAD}[part]
    window = config.layers[int(part)].window if is_layer else 0
    few = [t for t in times if t.load.count <= t.load.rows or t.load.count <= 8]
    many = [t for t in times if t not in few] or few
    prefill, first = fitted(many, window, has_pairs=is_layer)
    decode, second = fitted(few or many, window, has_pairs=is_layer)
    return PartTime(
        device=device, executor=executor, part=name, prefill=prefill, decode=decode, residual=max(first, second),
        weight_bytes=max(t.weight_bytes for t in times),
    )  # fmt: skip


def fitted(times: Sequence[ShardTime], window: int, *, has_pairs: bool) -> tuple[Curve, float]:
    """The curve of these times, and the largest relative error that it leaves."""
    loads = [time.load for time in times]
    seconds = np.array([time.step_s for time in times])
    columns = [[1.0, float(load.rows * load.count), _pairs(load, window) if has_pairs else 0.0] for load in loads]
    weighted = np.array(columns) / seconds[:, None]
    found, _ = nnls(weighted, np.ones(len(times)))
    curve = Curve(fixed_s=float(found[0]), token_s=float(found[1]), pair_s=float(found[2]))
    return curve, float(np.max(np.abs(weighted @ found - 1.0)))


def _pairs(load: Load, window: int) -> float:
    return load.rows * attended(load.count, load.context, window)
