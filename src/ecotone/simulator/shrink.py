"""Cuts a failing scene down to the shortest one that still fails: delta debugging (Zeller, Hildebrandt 2002), deterministic.

First faults, then requests, later deployments, standbys and machines that no plan needs are dropped as long as the scene
still fails in the same way; then what is left is made plain (no order, no journal, round times). Every step runs the scene
again, so the cost is some hundred runs. Of what is left nothing can be dropped alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from ecotone.simulator import faults as ft
from ecotone.simulator.chaos import Verdict, run_scene
from ecotone.simulator.faults import Fault
from ecotone.simulator.scene import Scene

__all__ = ["same_failure", "shortest", "shrink"]

T = TypeVar("T")
Fails = Callable[[Scene], bool]


def same_failure(verdict: Verdict, run: Callable[[Scene], Verdict] = run_scene) -> Fails:
    """Whether a scene fails in one of the ways in which `verdict` does."""
    ways = [way for way in ("lost", "duplicated", "stuck", "broken", "left") if getattr(verdict, way)]

    def fails(scene: Scene) -> bool:
        again = run(scene)
        return any(getattr(again, way) for way in ways)

    return fails


def shrink(scene: Scene, fails: Fails) -> Scene:
    """The shortest scene found that still fails; `scene` itself must."""
    former = None
    while scene != former:
        former = scene
        scene = replace(scene, faults=tuple(shortest(scene.faults, partial(_fails_with_faults, scene, fails))))
        scene = replace(scene, asks=tuple(shortest(scene.asks, partial(_fails_with_asks, scene, fails))))
        scene = next((simpler for simpler in _simpler(scene) if simpler != scene and fails(simpler)), scene)
    for digits in (2, 1):
        for rounded in (_round_faults, _round_asks):
            if fails(rounded(scene, digits)):
                scene = rounded(scene, digits)
    return scene


def shortest(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """ddmin: a subsequence that still fails and of which no single item can be dropped."""
    kept, parts = list(items), 2
    if kept and fails([]):
        return []
    while len(kept) >= 2:
        step = -(-len(kept) // parts)
        for start in range(0, len(kept), step):
            rest = kept[:start] + kept[start + step :]
            if rest and fails(rest):
                kept, parts = rest, max(parts - 1, 2)
                break
        else:
            if step == 1:
                break
            parts = min(2 * parts, len(kept))
    return kept


def _fails_with_faults(scene: Scene, fails: Fails, faults: Sequence[Fault]) -> bool:
    return fails(replace(scene, faults=tuple(faults)))


def _fails_with_asks(scene: Scene, fails: Fails, asks: Sequence[tuple[float, float]]) -> bool:
    return bool(asks) and fails(replace(scene, asks=tuple(asks)))


def _simpler(scene: Scene) -> Iterator[Scene]:
    """Scenes with one thing less, each made from the one given."""
    if len(scene.deployments) > 1:
        yield replace(scene, deployments=scene.deployments[:-1])
    for i, deployment in enumerate(scene.deployments):
        for j in range(1, len(deployment.plans)):
            plans = deployment.plans[:j] + deployment.plans[j + 1 :]
            active = tuple(k - (k > j) for k in deployment.active if k != j)
            less = replace(deployment, plans=plans, active=active)
            yield replace(scene, deployments=(*scene.deployments[:i], less, *scene.deployments[i + 1 :]))
        if deployment.active:
            passive = replace(deployment, active=())
            yield replace(scene, deployments=(*scene.deployments[:i], passive, *scene.deployments[i + 1 :]))
        whole = tuple(re.sub(r"\?\S+", "", plan) for plan in deployment.plans)
        if len(set(whole)) == len(whole) and whole != deployment.plans:
            without = replace(deployment, plans=whole)
            yield replace(scene, deployments=(*scene.deployments[:i], without, *scene.deployments[i + 1 :]))
    for name in scene.devices[1:]:
        if not _needs(scene, name):
            yield _without(scene, name)
    if not any(isinstance(f, ft.FillDisk) or (isinstance(f, ft.KillNode) and f.device == scene.asker) for f in scene.faults):
        yield replace(scene, record=False, record_s=0.0)
    yield replace(scene, ordered=False)


def _needs(scene: Scene, name: str) -> bool:
    planned = any(part.startswith(f"{name}:") for d in scene.deployments for plan in d.plans for part in plan.split())
    return planned or any(name in ft.devices_of(fault) for fault in scene.faults)


def _without(scene: Scene, name: str) -> Scene:
    kept = [i for i, device in enumerate(scene.devices) if device != name]
    links = tuple(k for k in scene.links if name not in (k.source, k.target))
    devices, block_s = tuple(scene.devices[i] for i in kept), tuple(scene.block_s[i] for i in kept)
    return replace(scene, devices=devices, block_s=block_s, links=links)


def _round_faults(scene: Scene, digits: int) -> Scene:
    return replace(scene, faults=tuple(replace(fault, at_s=round(fault.at_s, digits)) for fault in scene.faults))


def _round_asks(scene: Scene, digits: int) -> Scene:
    return replace(scene, asks=tuple((round(at_s, digits), round(limit_s, digits)) for at_s, limit_s in scene.asks))
