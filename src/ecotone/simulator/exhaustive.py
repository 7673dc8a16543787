"""Every process ended, restarted or stopped at every event of a small run: no moment is left to chance.

A run of n events under k ways to hurt each of d machines is n k d runs, each deterministic, judged like any other scene.
The attack may fall into the deployment as well as into the requests. Ways: "kill" (for good), "restart" (killed, back 0.2
s later), "stall" (stopped, goes on 0.6 s later). The asker is not killed for good, and only where requests are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ecotone.cluster import DeviceId
from ecotone.simulator import faults as ft
from ecotone.simulator.chaos import Verdict, judge, leftovers, run_to_the_end
from ecotone.simulator.faults import Fault
from ecotone.simulator.oracle import Oracle
from ecotone.simulator.scene import Deployment, Scene, SceneLink, build
from ecotone.simulator.world import World

__all__ = ["SMALL", "WAYS", "Attack", "attacks", "num_events", "run_attacked", "small_scene"]

WAYS = ("kill", "restart", "stall")
_SEED = 36  # of the two requests one leaves at the first exit, one goes on
_BACK_S = {"restart": 0.2, "stall": 0.6}
SMALL = {
    "T1, two machines": (2, ("b:3", "a:3"), ()),
    "T1 with a boundary, two machines": (2, ("a:1 b:3", "a:3"), ()),
    "T2a, three machines": (3, ("a:1 b:3", "a:1 c:3"), (1,)),
    "T2b, three machines": (3, ("a:1 b:3", "a:1 c:3"), ()),
    "T2b and T1, three machines": (3, ("b:2 c:3", "c:3", "a:3"), ()),
    "exits, three machines": (3, ("a:1?0.3 b:2?0.4 c:3", "a:1?0.3 c:3", "a:3"), ()),
    "exits and a twin, three machines": (3, ("a:1?0.5 b:3", "a:1?0.5 c:3"), (1,)),
}
"""Plan sets that are tried in full: number of machines, plans, active ones."""


@dataclass(frozen=True, slots=True)
class Attack:
    """At event `index` (counted from the first deployment) `device` is hurt in one of WAYS."""

    device: str
    way: str
    index: int


def small_scene(name: str, *, record: bool = False, ordered: bool = True) -> Scene:
    """Two requests, 50 ms apart, through one of SMALL, with ten seconds each."""
    count, plans, active = SMALL[name]
    devices = tuple("abc"[:count])
    links = tuple(
        SceneLink(source=a, target=b, latency_s=0.002, rate_bytes_per_s=1e6) for a in devices for b in devices if a != b
    )
    return Scene(
        devices=devices, block_s=(0.02, 0.01, 0.012)[:count], size_bytes=(20_000, 8_000, 4_000, 1_000), links=links,
        deployments=(Deployment(at_s=0.0, plans=plans, active=active),), asks=((0.0, 10.0), (0.05, 10.0)),
        record=record, record_s=0.003 if record else 0.0, ordered=ordered, seed=_SEED,
    )  # fmt: skip


def num_events(scene: Scene, world_class: type[World] = World) -> int:
    """Events of the undisturbed run, deployment included."""
    program = build(scene, world_class)
    program.deploy(program.plans)
    program.world.run(lambda: program.is_serving, 60.0)
    program.begin()
    program.world.run(lambda: program.is_done, 60.0)
    return program.world.num_events


def attacks(scene: Scene, count: int, stride: int = 1) -> Iterator[Attack]:
    """Every way, machine and event index."""
    for device in scene.devices:
        for way in WAYS:
            if device != scene.asker or way == "stall" or (way == "restart" and scene.record):
                yield from (Attack(device, way, index) for index in range(0, count, stride))


def run_attacked(scene: Scene, attack: Attack, world_class: type[World] = World) -> tuple[Verdict, Scene]:
    """Run with one attack; the verdict, and the scene with the attack as faults at the times where it fell."""
    program = build(scene, world_class)
    world = program.world
    program.deploy(program.plans)
    hurt: list[Fault] = []

    def strike() -> None:
        for fault in _faults(attack, world.now_s):
            hurt.append(fault)
            world.at(fault.at_s, program.inflict, fault)

    world.run(lambda: program.is_serving or world.num_events >= attack.index, 60.0)
    if not program.is_serving:
        strike()
        world.run(lambda: program.is_serving, 60.0)
    if not program.is_serving:
        return Verdict(stuck=(-1,), reasons=(f"{attack}: no plan comes into force: {program.error}",)), scene
    program.begin()
    if not hurt:
        world.run(lambda: program.is_done or world.num_events >= attack.index, 60.0)
        strike()
    faults = tuple(replace(fault, at_s=fault.at_s - world.origin_s) for fault in hurt)
    scene = replace(scene, faults=faults)
    oracle = Oracle(scene)
    run_to_the_end(program, oracle)
    return judge(scene, program, oracle, leftovers(program)), scene


def _faults(attack: Attack, now_s: float) -> tuple[Fault, ...]:
    device = DeviceId(attack.device)
    if attack.way == "stall":
        return ft.StallNode(at_s=now_s, device=device), ft.ResumeNode(at_s=now_s + _BACK_S["stall"], device=device)
    killed = ft.KillNode(at_s=now_s, device=device)
    if attack.way == "kill":
        return (killed,)
    return killed, ft.RestartNode(at_s=now_s + _BACK_S["restart"], device=device)
