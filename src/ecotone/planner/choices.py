"""What may be chosen, as tables: executors per device and segment, codecs per position. No formula of its own.

Legend: X executors, D places, P cut positions, K codecs. Impossible entries are inf. A measured time comes before any that
is only spread by FLOP from a longer segment: small segments of large frontiers cost far more than their share of the FLOP,
so such a guess would win where it is most wrong. It is a choice only where nothing measured is admissible (`guesses`:
everywhere).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.accuracy import ExitPolicy
from ecotone.cluster import DeviceId
from ecotone.cost import BoolArray, CostModel, FloatArray
from ecotone.graph import Graph
from ecotone.planner.objective import Asked, PlannerError, exceeds

__all__ = ["codec_tables", "executor_tables", "fastest", "undominated"]

IMAGE_CODECS = ("avif", "jpeg", "pixels", "png", "webp")
UNMEASURED_CODEC = "fp32"  # changes nothing and costs a copy: the one codec that needs no measurement
LARGEST_EXACT = 20_000_000  # cells of a table beyond which it is kept in single precision
LARGEST = 400_000_000

Positions = NDArray[np.intp]


def executor_tables(
    model: CostModel, asked: Asked, cuts: Positions, devices: Sequence[DeviceId], *, guesses: bool
) -> tuple[tuple[str, ...], FloatArray, FloatArray, bool]:
    """Executor names, seconds (X, D, P, P), relative error: the same shape, or (X, D, 1, 1) where it never varies; and
    whether guesses were left out."""
    allowed = {d: model.executors(d) for d in devices}
    names = tuple(sorted({e for found in allowed.values() for e in found if not asked.executors or e in asked.executors}))
    shape = (max(1, len(names)), len(devices), len(cuts), len(cuts))
    if math.prod(shape) > LARGEST:
        kinds = "give alike devices one kind, and their links by kind (source_kind, target_kind)"
        raise PlannerError(f"{len(devices)} unlike devices and {len(cuts)} cuts are too many for the tables; {kinds}")
    seconds = np.full(shape, math.inf, dtype=np.float32 if math.prod(shape) > LARGEST_EXACT else np.float64)
    base, left_out = np.zeros(shape[:2]), False
    varying: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
    place = {int(c): i for i, c in enumerate(cuts)}
    for d, device in enumerate(devices):
        if asked.devices and device not in asked.devices:
            continue
        best_guessed = np.ones(shape[2:], dtype=np.bool_)
        flags: dict[int, BoolArray] = {}
        for e, name in enumerate(names):
            times = model.stage_times(device, name) if name in allowed[device] else None
            if times is None:
                continue
            found, flags[e] = times.table(cuts.tolist())
            base[e, d] = times.largest_error
            at = [
                (place[a], place[b], s.relative_error) for (a, b), s in times.measured.items() if a in place and b in place
            ]
            measured = np.zeros(shape[2:], dtype=np.bool_)
            for a, b, error in at:
                measured[a, b] = True
                if error != times.largest_error:
                    varying.setdefault((e, d), []).append((a, b, error))
            found[_failing(model.failures(device, name), cuts) & ~measured] = math.inf
            if base[e, d] > asked.executor_error or (e, d) in varying:
                errors = np.full(shape[2:], times.largest_error)
                for a, b, error in varying.get((e, d), ()):
                    errors[a, b] = error
                found[errors > asked.executor_error] = math.inf
            best_guessed &= flags[e] | ~np.isfinite(found)
            seconds[e, d] = found
        for e, flagged in flags.items() if not guesses else ():
            out = flagged & ~best_guessed & np.isfinite(seconds[e, d])
            seconds[e, d][out], left_out = math.inf, left_out or bool(out.any())
    error_table = base[:, :, None, None]
    if varying:
        error_table = np.repeat(np.repeat(error_table, shape[2], axis=2), shape[3], axis=3)
        for (e, d), rows in varying.items():
            for a, b, error in rows:
                error_table[e, d, a, b] = error
    return names, seconds, error_table, left_out


def undominated(seconds: FloatArray, error: FloatArray) -> None:
    """Strike out, in place, every executor that another one beats or equals in time and error on a segment."""
    for j in range(len(seconds)):
        for i in range(len(seconds)):
            if i != j and (error[i] <= error[j]).any():
                better = (seconds[i] < seconds[j]) | ((seconds[i] == seconds[j]) & ((error[i] < error[j]) | (i < j)))
                seconds[j][better & (error[i] <= error[j])] = math.inf


def fastest(seconds: FloatArray) -> tuple[FloatArray, NDArray[np.int16]]:
    """Least seconds over executors, and which: (D, P, P) both."""
    best, which = seconds[0].copy(), np.zeros(seconds.shape[1:], dtype=np.int16)
    for e in range(1, len(seconds)):
        better = seconds[e] < best
        best[better], which[better] = seconds[e][better], e
    return best, which


def _failing(failures: list[tuple[int, int]], cuts: Positions) -> BoolArray:
    """Segments that hold one that failed: what stopped the executor is in them too."""
    found = np.zeros((len(cuts), len(cuts)), dtype=np.bool_)
    for start, stop in failures:
        found |= (cuts <= start)[:, None] & (cuts >= stop)[None, :]
    return found


def codec_tables(
    model: CostModel, asked: Asked, cuts: Positions, members: Sequence[Sequence[DeviceId]], policy: ExitPolicy | None
) -> dict[str, Any]:
    """Bytes, loss, error (P, K), encode, decode (P, K, D), send and transfer (P, K, D, D) of one request that crosses.

    The diagonal is the link between two devices of one class; inf where a place is one device. `outputs`, `sending`
    (K, D, D): the transfer at the end and its link's part, without regard to limits on loss and error: for exits, which
    count as often as they are taken.
    """
    codecs, payload = _admissible(model, asked, cuts, policy)
    count, size = len(members), payload[:, :, 0]
    spent, surely = (policy.loss_points, policy.high_points) if policy else (0.0, 0.0)
    too_much = [
        [
            exceeds(spent + loss, asked.loss_points) or exceeds(surely + sure, asked.sure_points) or error > asked.error
            for _, loss, error, sure in row
        ]
        for row in payload
    ]
    encode, decode = np.full((2, len(cuts), len(codecs), count), math.inf)
    raw = np.array([model.raw_bytes(int(p)) for p in cuts], dtype=np.float64)
    for k, codec in enumerate(codecs):
        for d, group in enumerate(members):
            fixed = model.codec_s(group[0], codec, 0.0)
            if fixed is None and codec == UNMEASURED_CODEC:
                encode[:, k, d] = decode[:, k, d] = 0.0
            elif fixed is not None:
                per_byte = np.subtract(model.codec_s(group[0], codec, 1.0) or fixed, fixed)
                encode[:, k, d], decode[:, k, d] = fixed[0] + raw * per_byte[0], fixed[1] + raw * per_byte[1]
    latency, rate = np.full((count, count), math.inf), np.full((count, count), 1.0)
    for d, sources in enumerate(members):
        for e, targets in enumerate(members):
            target = targets[0] if d != e else targets[-1]
            link = model.link(sources[0], target) if sources[0] != target else None
            if link is not None:
                latency[d, e], rate[d, e] = link.latency_s, link.bandwidth_bytes_per_s
    send = np.where(np.isfinite(latency), size[:, :, None, None] / rate, math.inf)
    sending = send[-1].copy()
    outputs = encode[-1, :, :, None] + latency + sending + decode[-1, :, None, :]
    send[too_much] = math.inf
    transfer = encode[:, :, :, None] + latency + send + decode[:, :, None, :]
    return {
        "codecs": codecs, "size": size, "encode": encode, "decode": decode, "loss": payload[:, :, 1],
        "codec_error": payload[:, :, 2], "sure_loss": payload[:, :, 3], "send": send, "transfer": transfer,
        "outputs": outputs, "sending": sending,
    }  # fmt: skip


def _admissible(
    model: CostModel, asked: Asked, cuts: Positions, policy: ExitPolicy | None
) -> tuple[tuple[str, ...], FloatArray]:
    """Codecs worth a column, and (P, K, 4): bytes, points lost, relative error, points at most; inf where not measured."""
    names = {UNMEASURED_CODEC} | {p.codec for p in model.profile.payloads}
    codecs = tuple(sorted(n for n in names if not asked.codecs or n in asked.codecs))
    if not codecs:
        raise PlannerError(
            f"codec={','.join(asked.codecs)}: none of these was measured; known are {', '.join(sorted(names))}"
        )
    found = np.full((len(cuts), len(codecs), 4), math.inf)
    image, allowed = _is_image(model.graph), set(model.profile.cuts)
    for i, position in enumerate(cuts.tolist()):
        for k, codec in enumerate(codecs):
            if codec.startswith(IMAGE_CODECS) and (position != 0 or not image):
                continue
            payload = model.payload(position, codec)
            if payload is None or not (codec == UNMEASURED_CODEC or model.is_measured(position, codec)):
                continue
            if position in allowed:
                loss, sure = model.loss_points(position, codec, policy), model.sure_points(position, codec, policy)
                found[i, k] = payload.size_bytes, loss, payload.relative_error, sure
    return codecs, found


def _is_image(graph: Graph) -> bool:
    """One of the inputs has 1 or 3 channels and two spatial sizes: an image codec carries it, the others as they are."""
    shapes = [graph.tensors[index].shape for index in graph.inputs]
    return any(len(s) in (3, 4) and s[-3] in (1, 3) and min(s[-2:]) > 1 for s in shapes)
