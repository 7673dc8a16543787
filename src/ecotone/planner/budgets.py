"""Budgets that couple the stages of a plan: bytes of memory per device, changed decisions, error, bytes sent, and so on.

Every budget is a column that only grows along a path and must end at or below 1 (amounts are divided by their limit).
A device budget has one column per device; a total has one for the whole path. Memory counts weights per stage: shared
weights twice where two stages of one device hold them, which errs on the safe side. Energy counts what surely flows
(idle watts of devices other than source and sink are left out), so it bounds from below; the whole is checked at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ecotone.cost import FloatArray
from ecotone.planner.chain import Chain, Path
from ecotone.planner.objective import SLACK, Asked

__all__ = ["Budgets", "budgets_of", "energy_tables", "fits", "usage"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Budgets:
    """`device_stage[b]` (D, P, P) and `device_encode`, `device_decode` (P, K, D) feed the column of the device they run on;
    `total_stage[r]` (D, P, P) and `total_transfer[r]` (P, K, D, D) feed total r. `peak` (D, P, P) is the working set as
    a share of the device's memory; it joins device budget 0 as a maximum, not a sum.
    Columns: D per device budget, then totals.
    """

    device_stage: tuple[FloatArray, ...] = ()
    device_encode: tuple[FloatArray | None, ...] = ()
    device_decode: tuple[FloatArray | None, ...] = ()
    total_stage: tuple[FloatArray, ...] = ()
    total_transfer: tuple[FloatArray, ...] = ()
    peak: FloatArray | None = None
    dominance: bool = True
    needs_codecs: bool = False  # True where another codec than the fastest may be the better one

    @property
    def num_device(self) -> int:
        return len(self.device_stage)

    @property
    def num_total(self) -> int:
        return len(self.total_stage)


def _share(amount: FloatArray, limit: FloatArray | float) -> FloatArray:
    """`amount / limit`; where the limit is 0 anything above 0 breaks it."""
    limit = np.asarray(limit, dtype=np.float64)
    safe = np.where(limit > 0, limit, 1.0)
    return np.where(limit > 0, np.where(np.isfinite(amount), amount, 0.0) / safe, np.where(amount > 0, 2.0, 0.0))


def budgets_of(chain: Chain, asked: Asked, *, once: bool = False) -> Budgets:
    """Every budget of `asked` that can bind on `chain`; `once`: each device computes one stage at most."""
    stages: list[FloatArray] = []
    encodes: list[FloatArray | None] = []
    decodes: list[FloatArray | None] = []
    peak = None
    per_device = chain.capacity[:, None, None]
    if not once and float(chain.weights[0, -1] + chain.working.max()) > float(chain.capacity.min()):
        stages, encodes, decodes = [_share(chain.weights[None], per_device)], [None], [None]
        peak = _share(chain.working[None], per_device)
    if math.isfinite(asked.bottleneck_s):
        stages.append(_share(chain.stage, asked.bottleneck_s))
        encodes.append(_share(chain.encode, asked.bottleneck_s))
        decodes.append(_share(chain.decode, asked.bottleneck_s))
    if once:
        stages.append(np.ones_like(chain.stage))
        encodes.append(None)
        decodes.append(None)
    totals = _totals(chain, asked)
    needs_codecs = bool(totals) or math.isfinite(asked.bottleneck_s)
    return Budgets(
        device_stage=tuple(stages), device_encode=tuple(encodes), device_decode=tuple(decodes),
        total_stage=tuple(s for s, _ in totals), total_transfer=tuple(t for _, t in totals), peak=peak,
        dominance=not math.isfinite(asked.energy_joule), needs_codecs=needs_codecs,
    )  # fmt: skip


def _totals(chain: Chain, asked: Asked) -> list[tuple[FloatArray, FloatArray]]:
    nothing, shape = np.zeros_like(chain.stage), chain.transfer.shape
    found = []

    def crossing(table: FloatArray, limit: float) -> FloatArray:
        return np.broadcast_to(_share(np.where(np.isfinite(table), table, 0.0), limit)[:, :, None, None], shape)

    if np.where(np.isfinite(chain.loss), chain.loss, 0.0).max(initial=0.0) > 0 and asked.loss_points < 100:
        found.append((nothing, crossing(chain.loss, asked.loss_points)))
    if math.isfinite(asked.sure_points):
        found.append((nothing, crossing(chain.sure_loss, asked.sure_points)))
    if math.isfinite(asked.error):
        found.append((_share(chain.stage_error, asked.error), crossing(chain.codec_error, asked.error)))
    if math.isfinite(asked.size_bytes):
        found.append((nothing, crossing(chain.size, asked.size_bytes)))
    if math.isfinite(asked.stages):
        found.append((_share(np.ones_like(chain.stage), asked.stages), np.zeros(shape)))
    if math.isfinite(asked.energy_joule):
        stage, transfer = energy_tables(chain)
        found.append((_share(stage, asked.energy_joule), _share(transfer, asked.energy_joule)))
    return found


def energy_tables(chain: Chain) -> tuple[FloatArray, FloatArray]:
    """Joules that surely flow during each stage and each transfer (equation 10 of cost.py, from below)."""
    power = [d.power for d in chain.model.cluster.devices]
    busy = np.array([p.busy_watt for p in power])
    ends = {chain.source, chain.sink}
    waiting = sum(power[d].idle_watt for d in ends)
    own_idle = np.array([p.idle_watt if d in ends else 0.0 for d, p in enumerate(power)])
    send = np.array([p.send_joule_per_byte for p in power])
    during = busy + waiting - own_idle
    stage = np.where(np.isfinite(chain.stage), chain.stage, 0.0) * during[:, None, None]
    extra = busy - own_idle
    seconds, encode, decode, size = (
        np.where(np.isfinite(t), t, 0.0) for t in (chain.transfer, chain.encode, chain.decode, chain.size)
    )
    transfer = waiting * seconds + (encode * extra)[:, :, :, None] + (decode * extra)[:, :, None, :]
    transfer = transfer + size[:, :, None, None] * send[:, None]
    return np.maximum(stage, 0.0), np.where(np.isfinite(chain.transfer), np.maximum(transfer, 0.0), 0.0)


def usage(chain: Chain, budgets: Budgets, path: Path) -> FloatArray:
    """Columns of a whole path (see Budgets), working sets added as maxima."""
    count = chain.num_devices
    device = np.zeros((budgets.num_device, count))
    total = np.zeros(budgets.num_total)
    peak = np.zeros(count)
    for d, a, b in path.stages:
        device[:, d] += [table[d, a, b] for table in budgets.device_stage]
        total += [table[d, a, b] for table in budgets.total_stage]
        if budgets.peak is not None:
            peak[d] = max(peak[d], budgets.peak[d, a, b])
    ends = [chain.source, *(d for d, _, _ in path.stages), chain.sink]
    at = [0, *(stop for _, _, stop in path.stages)]
    for i, codec in enumerate(path.codecs):
        if codec < 0:
            continue
        p, d, e = at[i], ends[i], ends[i + 1]
        for b, (encode, decode) in enumerate(zip(budgets.device_encode, budgets.device_decode, strict=True)):
            device[b, d] += encode[p, codec, d] if encode is not None else 0.0
            device[b, e] += decode[p, codec, e] if decode is not None else 0.0
        total += [table[p, codec, d, e] for table in budgets.total_transfer]
    if budgets.peak is not None:
        device[0] += peak
    return np.concatenate([device.ravel(), total])


def fits(columns: FloatArray) -> bool:
    """True where no budget is broken."""
    return bool((columns <= 1.0 + SLACK).all())
