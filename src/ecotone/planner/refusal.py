"""Why there is no plan: the first requirement that no plan at all can keep, with what the best plan reaches.

Each quantity is minimised alone, by the latency programme on that quantity's table; a requirement below that minimum fails
for sure. Where every one could be kept alone, the plan of best objective is shown with what it breaks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ecotone.cost import FloatArray
from ecotone.planner.budgets import energy_tables
from ecotone.planner.chain import Chain, build
from ecotone.planner.latency import best_path, remaining
from ecotone.planner.objective import Asked, Objective, PlannerError, missed
from ecotone.planner.throughput import relaxed_bottleneck
from ecotone.units import format_quantity

__all__ = ["reason"]


def reason(chain: Chain, asked: Asked, objective: Objective, *, proven: bool, time_limit_s: float) -> str:
    """One line for a PlannerError: the requirement that fails and by how much, or what stands in the way."""
    hindrance = _memory(chain, asked) or _stages(chain, asked) or _alone(chain, asked)
    if hindrance:
        return f"no plan: {hindrance}"
    path, _ = best_path(chain)
    if path is None:
        ends = f"{chain.model.cluster.source} to {chain.model.cluster.sink}"
        return f"no plan: no links that lead from {ends} over devices that can compute; add a link or allow another codec"
    cost = chain.model.predict(chain.plan(path))
    if not proven:
        return f"no plan found within {time_limit_s:g} s, though one may exist; give a longer time limit or ask for less"
    breaks = "; ".join(asked.violations(cost)) or "it breaks the memory of a device that it uses more than once"
    return f"no plan keeps all requirements at once; the plan of least latency ({chain.plan(path)}): {breaks}"


def _memory(chain: Chain, asked: Asked) -> str:
    may = np.isfinite(chain.stage).any(axis=(1, 2)) | (chain.weights[0, -1] > 0)
    devices = [d.name for d in chain.model.cluster.devices]
    allowed = np.array([not asked.devices or name in asked.devices for name in devices]) & may
    need, has = float(chain.weights[0, -1]), float(chain.capacity[allowed].sum())
    if need > has:
        short = format_quantity(need - has, "bytes")
        amounts = f"the weights take {format_quantity(need, 'bytes')}, the devices hold {format_quantity(has, 'bytes')}"
        return f"memory fails: {amounts} ({short} short); add a device or use a smaller model"
    largest = float(chain.capacity[allowed].max(initial=0.0))
    for i in range(chain.num_positions - 1):
        piece = float(chain.weights[i, i + 1] + chain.working[i, i + 1])
        if piece > largest:
            blocks = f"blocks [{chain.cuts[i]}, {chain.cuts[i + 1]})"
            amounts = (
                f"{blocks} take {format_quantity(piece, 'bytes')}, the largest device {format_quantity(largest, 'bytes')}"
            )
            return f"memory fails: {amounts} ({format_quantity(piece - largest, 'bytes')} short)"
    return ""


def _stages(chain: Chain, asked: Asked) -> str:
    if np.isfinite(chain.stage).any():
        return ""
    if math.isfinite(asked.error) or asked.executors or asked.devices:
        try:
            free = build(chain.model, replace(asked, error=math.inf, executors=(), devices=()))
        except PlannerError as error:
            return str(error)
        if np.isfinite(free.stage).any():
            least = float(free.stage_error[np.isfinite(free.stage)].min())
            if math.isfinite(asked.error) and least > asked.error:
                return missed("error", least, asked.error)
            return "none of the executors or devices asked for was measured on this model; ask for others or profile again"
    return "nothing measured fits any device; profile the model on this cluster"


def _alone(chain: Chain, asked: Asked) -> str:
    """The first total that fails even when it alone is minimised."""
    nothing = np.where(np.isfinite(chain.stage), 0.0, math.inf)
    energy_stage, energy_transfer = energy_tables(chain)
    crossing = np.isfinite(chain.transfer)

    def spread(table: FloatArray) -> FloatArray:
        return np.where(crossing, table[:, :, None, None], math.inf)

    rows = (
        ("latency", asked.latency_s, chain.stage, chain.transfer, 1.0),
        ("bytes", asked.size_bytes, nothing, spread(chain.size), 1.0),
        ("accuracy_loss", asked.loss_points, nothing, spread(chain.loss), 1.0),
        ("accuracy_loss_sure", asked.sure_points, nothing, spread(chain.sure_loss), 1.0),
        ("error", asked.error, nothing + chain.stage_error, spread(chain.codec_error), 1.0),
        ("energy", asked.energy_joule, nothing + energy_stage, np.where(crossing, energy_transfer, math.inf), 1.0),
        ("stages", asked.stages, nothing + 1.0, np.where(crossing, 0.0, math.inf), 1.0),
    )
    for name, limit, stage, transfer, scale in rows:
        least = scale * _least(chain, stage, transfer) if math.isfinite(limit) else 0.0
        if math.isfinite(least) and least > limit * (1 + 1e-9):
            return missed(name, least, limit)
    if math.isfinite(asked.bottleneck_s):
        least = relaxed_bottleneck(chain)
        if math.isfinite(least) and least > asked.bottleneck_s:
            return missed("throughput", least, asked.bottleneck_s)
    return ""


def _least(chain: Chain, stage: FloatArray, transfer: FloatArray) -> float:
    best = transfer.min(axis=1)
    own = np.arange(chain.num_devices)
    for end in (0, chain.num_positions - 1):
        best[end, own, own] = 0.0
    return float((best[0, chain.source] + remaining(stage, best, chain.sink).start[0]).min())
