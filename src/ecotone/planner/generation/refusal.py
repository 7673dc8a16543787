"""Why there is no plan: memory (needs X, has Y, and what would help), or the limit that no plan keeps and its best value.

Remedies are tried, not guessed: each is the same search on a changed question, and only what leads to a plan is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ecotone.cluster import Cluster
from ecotone.llmcost import BLOCK_TOKENS, LlmCostModel, Shape
from ecotone.llmplan import LlmPlan
from ecotone.llmprofile import EMBEDDING, HEAD, LlmProfile
from ecotone.planner.generation.asked import Asked, value_of
from ecotone.planner.generation.problem import World
from ecotone.planner.objective import PlannerError
from ecotone.units import format_quantity

__all__ = ["reason"]

SECONDS = 1.0  # for each question asked again
Find = Callable[..., tuple[LlmPlan, float] | None]
ANY_LOSS = 1e9


def reason(profile: LlmProfile, cluster: Cluster, asked: Asked, find: Find) -> str:
    """One line for a PlannerError."""
    world = World(LlmCostModel(profile, cluster, asked.shape), asked)
    if not world.classes:
        refused = "; ".join(f"{name} {why}" for name, why in list(world.refused.items())[:4])
        return f"no device can be used: {refused}"
    if not any(world.options):
        wanted = f" ({', '.join(asked.executors)})" if asked.executors else ""
        return f"none of the executors allowed{wanted} was measured on any device; allow others or profile again"
    find = _or_none(find)
    free = replace(asked, objective="tpot", tpot_s=0.0, ttft_s=0.0, request_s=0.0, tokens_per_s=0.0)
    if find(profile, cluster, free, (), SECONDS) is None:
        return _memory(profile, cluster, free, world, find)
    return "; ".join(_limits(profile, cluster, asked, find)) or "no plan keeps all limits at once; ask for less"


def _or_none(find: Find) -> Find:
    """The same, with None where nothing was found in the short time that is given here."""

    def found(*question: Any) -> tuple[LlmPlan, float] | None:
        try:
            return find(*question)
        except PlannerError:
            return None

    return found


# ---- memory --------------------------------------------------------------------------------------------------------------


def _memory(profile: LlmProfile, cluster: Cluster, asked: Asked, world: World, find: Find) -> str:
    need, device = _needs(world, asked)
    has = sum(group[0].memory_bytes * len(group) for group in world.classes)
    amounts = f"needs {format_quantity(need, 'bytes')} for weights and keys, has {format_quantity(has, 'bytes')}"
    if need > has:
        told = f"the model fits nowhere: {amounts} ({format_quantity(need - has, 'bytes')} short)"
    else:
        told = f"the model fits nowhere: {amounts} on {device} together, but no cut into stages fits them"
    unused = "; ".join(f"{name} {why}" for name, why in list(world.refused.items())[:3])
    helps = list(_remedies(profile, cluster, asked, find))
    return (
        told + (f" (not used: {unused})" if unused else "") + (f"; what would help: {', or '.join(helps)}" if helps else "")
    )


def _needs(world: World, asked: Asked) -> tuple[int, str]:
    """The fewest bytes of weights and keys by executors within the loss; the devices that were counted."""
    layers = world.profile.layers
    least: int | None = None
    for group, options in zip(world.classes, world.options, strict=True):
        for executor, found in options.items():
            if found.loss > asked.max_loss or any(p not in found.weight_bytes for p in (*layers, EMBEDDING, HEAD)):
                continue
            weights = sum(found.weight_bytes[part] for part in (*layers, EMBEDDING, HEAD))
            total = weights + world.model.kv_bytes(group[0].name, executor, len(layers))
            least = total if least is None else min(least, total)
    count = sum(len(group) for group in world.classes)
    return least or 0, f"{count} device{'s' if count > 1 else ''}"


def _remedies(profile: LlmProfile, cluster: Cluster, asked: Asked, find: Find) -> Iterator[str]:
    shape = asked.shape

    def fits(changed: Asked, on: Cluster = cluster) -> LlmPlan | None:
        found = find(profile, on, changed, (), SECONDS)
        return found[0] if found is not None else None

    looser = fits(replace(asked, max_loss=ANY_LOSS))
    if looser is not None:
        names = sorted({stage.executor for stage in looser.stages})
        loss = LlmCostModel(profile, cluster, shape).predict(looser).loss
        yield f"{' and '.join(names)} (a loss of {loss:.3g}, {asked.max_loss:g} is allowed)"
    if shape.slots > 1 and fits(replace(asked, shape=replace(shape, max_slots=1))) is not None:
        slots = _largest(lambda n: fits(replace(asked, shape=replace(shape, max_slots=n))) is not None, 1, shape.slots)
        yield f"{slots} sequence{'s' if slots > 1 else ''} at a time instead of {shape.slots}"
    else:
        blocks = shape.longest // BLOCK_TOKENS
        one = replace(asked, shape=_shorter(shape, 1))
        if blocks > 1 and fits(one) is not None:
            most = _largest(lambda n: fits(replace(asked, shape=_shorter(shape, n))) is not None, 1, blocks)
            yield f"a context of {most * BLOCK_TOKENS} tokens instead of {shape.longest}"
    more = _more_memory(cluster, asked, fits)
    if more:
        yield more


def _shorter(shape: Shape, blocks: int) -> Shape:
    """The same with room for so many blocks of tokens; prompt and answer shrink where they must."""
    context = blocks * BLOCK_TOKENS
    slots = 1 if shape.slots == 1 else shape.slots
    return replace(
        shape,
        context=context,
        max_slots=slots,
        prompt=min(shape.prompt, context // 2),
        answer=min(shape.answer, context // 2),
    )


def _more_memory(cluster: Cluster, asked: Asked, fits: Callable[[Asked, Cluster], LlmPlan | None]) -> str:
    """By how much the largest device would have to grow, to a thirtieth."""
    largest = max(cluster.devices, key=lambda device: device.memory_bytes)

    def grown(extra: int) -> Cluster:
        devices = (replace(d, memory_bytes=d.memory_bytes + extra) if d is largest else d for d in cluster.devices)
        return replace(cluster, devices=tuple(devices))

    high = 1 << 20
    while fits(asked, grown(high)) is None:
        high *= 4
        if high > 1 << 44:
            return ""
    low = high // 4
    while high - low > high // 30:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(asked, grown(middle)) is not None else (middle, high)
    return f"{format_quantity(high, 'bytes')} more memory on {largest.name}"


def _largest(good: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high) that is good, where `low` is and smaller ones are better."""
    while high - low > max(1, low // 30):
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


# ---- limits --------------------------------------------------------------------------------------------------------------


def _limits(profile: LlmProfile, cluster: Cluster, asked: Asked, find: Find) -> Iterator[str]:
    """Each limit that cannot be kept while the others are, and the best value of what it limits."""
    named = {
        "tpot_s": ("tpot", "time per token"), "ttft_s": ("ttft", "time to first token"),
        "request_s": ("request", "time of a request"), "tokens_per_s": ("throughput", "tokens per second"),
    }  # fmt: skip
    for field, (objective, name) in named.items():
        limit = float(getattr(asked, field))
        if not limit:
            continue
        lifted = _without_limit(replace(asked, objective=objective), field)
        found = find(profile, cluster, lifted, (), SECONDS)
        if found is None:
            continue
        value = value_of(lifted, LlmCostModel(profile, cluster, asked.shape).predict(found[0]))
        if field == "tokens_per_s":
            if 1 / value < limit:
                yield f"{name} fails: the best is {1 / value:.4g}, {limit:.4g} are asked; nearest: {found[0]}"
        elif value > limit:
            best, asked_s = format_quantity(value, "s"), format_quantity(limit, "s")
            yield f"{name} fails: the best is {best}, {asked_s} is asked; nearest: {found[0]}"


def _without_limit(asked: Asked, field: str) -> Asked:
    cleared: dict[str, Any] = {field: 0.0}
    return replace(asked, **cleared)
