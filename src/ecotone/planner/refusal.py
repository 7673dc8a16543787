"""Why there is no plan: the requirement that binds, by how much, and the nearest plan that does without it alone.

For each limit in turn the quantity is made least while all other limits are kept. Where that gives a plan, it is the
nearest that this one limit costs; of those the one that misses its limit by the least share is named. Memory: the least
factor on every device's memory with which there is a plan; named where no limit is to blame, or beside a limit that is
further away. Where none is to blame alone, the plan of best objective is shown with all that it breaks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ecotone.cost import CostModel
from ecotone.plan import Plan
from ecotone.planner.chain import Chain, build
from ecotone.planner.network import bare
from ecotone.planner.objective import SLACK, Asked, Latency, PlannerError, Throughput, exceeds, least, missed, shown
from ecotone.planner.programme import Programme
from ecotone.planner.search import Task, chains_of, search_all
from ecotone.units import format_quantity

__all__ = ["reason"]

SECONDS = 2.0  # for looking at what would be near, and as long for more memory
_NEAR_GAP = 1e-3


@dataclass(frozen=True, slots=True)
class _Near:
    """A plan that keeps every limit but one, the line about it, and by what share it misses that one."""

    share: float
    line: str
    plan: Plan


def reason(model: CostModel, task: Task, *, proven: bool, time_limit_s: float) -> str:
    """One line for a PlannerError: the requirement that fails, by how much, the nearest plan; or what stands in the way."""
    asked, chains = task.asked, chains_of(model, task.asked)
    short, factor = _memory(chains[0], asked)
    if short:
        near = _with_more_memory(model, task, _soon(time_limit_s), factor)
        nearest = f"; nearest: {near.plan} with {_rounded_up(1 + near.share)} times the memory" if near else ""
        return f"no plan: {short}{nearest}"
    hindrance = _stages(chains[0], asked)
    if hindrance:
        return f"no plan: {hindrance}"
    if not any(math.isfinite(_least(chain)) for chain in chains_of(model, _unbound(asked))):
        ends = f"{model.cluster.source} to {model.cluster.sink}"
        return f"no plan: no links that lead from {ends} over devices that can compute; add a link or allow another codec"
    near = min(_near(model, task, _soon(time_limit_s)), key=lambda n: n.share, default=None)
    more = _with_more_memory(model, task, _soon(time_limit_s))
    if near is None:
        near = more
    elif more is not None and more.share < near.share:
        near = replace(near, line=f"{near.line}; or {more.line}")
    if not proven:
        known, advice = f"; nearest: {near.line}" if near else "", "give a longer time limit or ask for less"
        return f"no plan found within {time_limit_s:g} s, though one may exist; {advice}{known}"
    if near is not None:
        return f"no plan: {near.line}"
    free = _unbound(asked)
    found = search_all(chains_of(model, free), replace(task, asked=free, deadline=_soon(time_limit_s), limit=math.inf))
    if found.plan is None:
        return "no plan keeps all requirements at once, and none keeps all but one of them; ask for less"
    cost = model.predict(found.plan)
    breaks = "; ".join(asked.violations(cost)) or "it breaks the memory of a device that it uses more than once"
    return f"no plan keeps all requirements at once; the plan of best {task.objective.name} ({found.plan}): {breaks}"


def _soon(time_limit_s: float) -> float:
    return time.perf_counter() + min(SECONDS, time_limit_s)


def _near(model: CostModel, task: Task, until: float) -> Iterator[_Near]:
    """The nearest plan for every limit, that limit lifted."""
    for name in task.asked.limited:
        if name == "memory" or time.perf_counter() > until:
            continue
        objective = least(name, task.asked.p95) if name != "stages" else None
        lifted = task.asked.without_limit(name)
        if name == "accuracy_loss":
            lifted = replace(lifted, loss_points=math.inf)
        found, is_best = (_fewest_stages(model, lifted, task, until) if objective is None else None), True
        if objective is not None:
            own = Task.of(model, lifted, objective, until, gap=_NEAR_GAP)
            other = search_all(chains_of(model, lifted), own)
            found = None if other.plan is None else (other.plan, other.value)
            is_best = other.bound >= other.value - abs(other.value) * 2 * _NEAR_GAP
        limit = task.asked.limit(name)
        if found is None or not exceeds(found[1], limit):
            continue
        cost = model.predict(found[0])
        value = f", {task.objective.name} {shown(task.objective.name, task.objective.value(cost))}"
        share = found[1] / limit - 1 if limit > 0 else math.inf
        said = missed(name, found[1], limit)
        said = said if is_best else said.replace("the best is", "the best found in short time is")
        yield _Near(share, f"{said}; nearest: {found[0]}{value}", found[0])


def _fewest_stages(model: CostModel, asked: Asked, task: Task, until: float) -> tuple[Plan, float] | None:
    for count in range(int(task.asked.stages) + 1, len(model.profile.cuts)):
        if time.perf_counter() > until:
            return None
        tried = replace(asked, stages=float(count))
        found = search_all(chains_of(model, tried), Task.of(model, tried, Latency(), until, gap=1.0))
        if found.plan is not None:
            return found.plan, float(count)
    return None


def _with_more_memory(model: CostModel, task: Task, until: float, least_factor: float = 1.0) -> _Near | None:
    """The plan of the least factor on all memory, all other limits kept; None where memory is not what prevents one.

    No factor below `least_factor` will do. First a plan that may use any amount, which says how much it needs; then
    bisection, for as long as there is time.
    """
    limits = {d.name: min(float(d.memory_bytes), task.asked.memory_bytes) for d in model.cluster.devices}

    def needed(plan: Plan) -> float:
        return max(d.memory_bytes / limits[d.device] if d.memory_bytes else 0.0 for d in model.predict(plan).devices)

    def with_factor(factor: float) -> Plan | None:
        devices = tuple(replace(d, memory_bytes=math.ceil(d.memory_bytes * factor)) for d in model.cluster.devices)
        roomy = CostModel(model.graph, replace(model.cluster, devices=devices), model.profile)
        asked = replace(task.asked, memory_bytes=task.asked.memory_bytes * factor)
        objective = task.objective if isinstance(task.objective, Throughput) else Latency()
        return search_all(chains_of(roomy, asked), Task.of(roomy, asked, objective, until, gap=1.0)).plan

    scarcest = min(limits.values())
    best = with_factor(_everything(model) / scarcest) if scarcest > 0 else None  # no factor makes anything of 0
    if best is None or needed(best) <= 1.0:
        return None
    low, high = least_factor, needed(best)
    tried = low * (1 + SLACK) if low > 1.0 else math.sqrt(high)  # that 1 will not do is known
    while low < tried < high * (1 - _NEAR_GAP) and time.perf_counter() < until:
        plan = with_factor(tried)
        if plan is None:
            low = tried
        else:
            best, high = plan, needed(plan)
        tried = math.sqrt(low * high)
    own = {d.device: d.memory_bytes for d in model.predict(best).devices}
    device = max(own, key=lambda d: own[d] / limits[d])
    need, has = format_quantity(own[device], "bytes"), format_quantity(limits[device], "bytes")
    return _Near(high - 1, f"memory fails: {device} would need {need} and may use {has}; nearest: {best}", best)


def _rounded_up(factor: float) -> str:
    """In three digits, never less."""
    unit = 10.0 ** (math.floor(math.log10(factor)) - 2)
    return f"{math.ceil(factor / unit * (1 - SLACK)) * unit:.6g}"


def _everything(model: CostModel) -> float:
    """Bytes with which a device can hold any part of the model, heads of exits and working sets among them."""
    heads = sum(e.working_bytes for e in model.graph.exits)
    return float(sum(p.size_bytes for p in model.graph.parameters) + model.working.sum() + heads)


def _unbound(asked: Asked) -> Asked:
    for name in asked.limited:
        if name != "memory":
            asked = asked.without_limit(name)
    return asked


def _memory(chain: Chain, asked: Asked) -> tuple[str, float]:
    """Why there is too little memory for any plan whatever, and the least factor on it that could do; "" and 1."""
    may = np.isfinite(chain.stage).any(axis=(1, 2)) | (chain.weights[0, -1] > 0)
    allowed = np.array([not asked.devices or d.name in asked.devices for d in chain.devices]) & may
    counts = np.array([len(group) for group in chain.members])
    need, has = float(chain.weights[0, -1]), float((chain.capacity * counts)[allowed].sum())
    if need > has:
        short = format_quantity(need - has, "bytes")
        amounts = f"the weights take {format_quantity(need, 'bytes')}, the devices hold {format_quantity(has, 'bytes')}"
        return f"memory fails: {amounts} ({short} short); add a device or use a smaller model", need / has if has else 1.0
    largest = float(chain.capacity[allowed].max(initial=0.0))
    for i in range(chain.num_positions - 1):
        piece = float(chain.weights[i, i + 1] + chain.working[i, i + 1])
        if piece > largest:
            blocks = f"blocks [{chain.cuts[i]}, {chain.cuts[i + 1]})"
            amounts = (
                f"{blocks} take {format_quantity(piece, 'bytes')}, the largest device {format_quantity(largest, 'bytes')}"
            )
            told = f"memory fails: {amounts} ({format_quantity(piece - largest, 'bytes')} short)"
            return told, piece / largest if largest else 1.0
    return "", 1.0


def _stages(chain: Chain, asked: Asked) -> str:
    if np.isfinite(chain.stage).any():
        return ""
    if math.isfinite(asked.error) and np.isfinite(build(chain.model, replace(asked, error=math.inf)).stage).any():
        return ""  # that limit is to blame: see `_near`
    if asked.executors or asked.devices:
        try:
            free = build(chain.model, replace(asked, error=math.inf, executors=(), devices=()))
        except PlannerError as error:
            return str(error)
        if np.isfinite(free.stage).any():
            return "none of the executors or devices asked for was measured on this model; ask for others or profile again"
    return "nothing measured fits any device; profile the model on this cluster"


def _least(chain: Chain) -> float:
    """Least latency without budgets; inf where no path exists."""
    return Programme(bare(chain, "latency")).backward(np.zeros(0)).least
