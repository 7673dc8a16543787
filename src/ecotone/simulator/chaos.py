"""Runs a scene and judges it: was anything lost, answered twice, stuck, or left behind, against the oracle of the scene.

lost        an end with an error, or none, though a feasible plan existed long enough (oracle.py). A request that was
            never accepted, since no plan could run for all of `patience_s` before it was made, is not promised
duplicated  more than one end of a request, over all processes of the asker
stuck       no end by the deadline plus 1 s (without a deadline: by the time that patience runs out after the last fault)
broken      an effect asked a shell for what it does not hold, or a request left at another exit than it was drawn to
left        tensors, bytes, credit or timers that stay behind once all is healed and the session closed
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ecotone.protocol import events as ev
from ecotone.protocol.events import ErrorKind
from ecotone.simulator.draw import draw_scene
from ecotone.simulator.leaving import rank_of
from ecotone.simulator.oracle import Oracle
from ecotone.simulator.program import Program
from ecotone.simulator.scene import Scene, build, script_of
from ecotone.simulator.world import World

__all__ = ["Verdict", "judge", "leftovers", "run_scene", "run_seed", "run_to_the_end"]

_MOST_EVENTS = 400_000
_SETTLE_S, _CLOSE_S = 3.0, 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Requests by what came of them. `digest` is a hash of every end with its time: equal runs have equal digests."""

    lost: tuple[int, ...] = ()
    duplicated: tuple[int, ...] = ()
    stuck: tuple[int, ...] = ()
    broken: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    num_asked: int = 0
    num_answered: int = 0
    num_possible: int = 0
    num_possible_answered: int = 0
    num_rerouted: int = 0
    num_events: int = 0
    digest: str = ""
    reasons: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.duplicated or self.stuck or self.broken or self.left)

    def __str__(self) -> str:
        named = {
            "lost": self.lost,
            "duplicated": self.duplicated,
            "stuck": self.stuck,
            "broken": self.broken,
            "left": self.left,
        }
        return "; ".join(f"{key} {', '.join(map(str, value))}" for key, value in named.items() if value) or "good"


def run_seed(seed: int) -> Verdict:
    """Draw, run and judge the scene of this seed."""
    return run_scene(draw_scene(seed))


def run_scene(scene: Scene, world_class: type[World] = World, after: Callable[[Program], None] | None = None) -> Verdict:
    """Run a scene to its end and judge it. `after` may look at (or spoil) the program once it is deployed."""
    program = build(scene, world_class)
    world = program.world
    program.deploy(program.plans)
    world.run(lambda: program.is_deployed, 1e4)
    if program.error or not program.is_deployed:
        return Verdict(broken=(f"not deployed: {program.error or 'no answer'}",))
    oracle = Oracle(scene)
    program.begin()
    for fault in script_of(scene):
        world.at(world.origin_s + fault.at_s, program.inflict, fault)
    if after is not None:
        after(program)
    run_to_the_end(program, oracle)
    return judge(scene, program, oracle, leftovers(program))


def run_to_the_end(program: Program, oracle: Oracle) -> None:
    """Until all requests have ended, or those that were made should have."""
    world = program.world
    most, origin_s = world.num_events + _MOST_EVENTS, world.origin_s
    last_s = max([0.0, *(f.at_s for f in script_of(oracle.scene)), *(at_s for at_s, _ in oracle.scene.asks)])
    while not program.is_done and world.num_events < most and last_s < math.inf:
        until_s = origin_s + last_s + 0.001
        world.run(lambda: program.is_done or world.num_events > most, until_s)
        if not program.is_done:
            limits = oracle.ends_by({n: at_s - origin_s for n, at_s in program.submitted_s.items()})
            further_s = max([last_s, *(limit_s for n, limit_s in limits.items() if n not in program.ends)])
            if further_s <= last_s:
                return
            last_s = further_s


def judge(scene: Scene, program: Program, oracle: Oracle, left: tuple[str, ...] = ()) -> Verdict:
    """Hold what the program saw against the oracle."""
    origin_s = program.world.origin_s
    submitted = {n: at_s - origin_s for n, at_s in program.submitted_s.items()}
    by, limits = oracle.answered_by(submitted), oracle.ends_by(submitted)
    lost, stuck, reasons, answered = [], [], [], 0
    for number in submitted:
        ends = program.ends.get(number, ())
        first = ends[0] if ends else None
        answered += first is not None and not first.error
        if first is not None and first.error == ErrorKind.NODE_LOST and number not in program.accepted_s:
            by[number] = math.inf
        if by[number] < math.inf and (first is None or first.error):
            lost.append(number)
            told = f"{first.error} after {first.at_s - origin_s:.3f} s: {first.reason}" if first else "no outcome"
            reasons.append(f"request {number} of {submitted[number]:.3f} s, possible by {by[number]:.3f} s: {told}")
        over_s = (math.inf if first is None else first.at_s - origin_s) - limits[number]
        is_made = number in program.accepted_s or program.is_serving  # else the program itself waits for a plan in force
        if limits[number] < math.inf and over_s > 0 and is_made:
            stuck.append(number)
            reasons.append(f"request {number} of {submitted[number]:.3f} s: {over_s:.3f} s late")
    possible = [n for n in submitted if by[n] < math.inf]
    ends_text = repr([(n, [(e.at_s, e.error, e.epoch) for e in ends]) for n, ends in sorted(program.ends.items())])
    return Verdict(
        lost=tuple(lost),
        duplicated=tuple(n for n, ends in program.ends.items() if len(ends) > 1),
        stuck=tuple(stuck),
        broken=(*program.world.violations, *_misplaced(scene, program)),
        left=left,
        num_asked=len(submitted),
        num_answered=answered,
        num_possible=len(possible),
        num_possible_answered=len(possible) - len(lost),
        num_rerouted=len(program.rerouted),
        num_events=program.world.num_events,
        digest=hashlib.sha256(ends_text.encode()).hexdigest()[:16],
        reasons=tuple(reasons),
    )


def _misplaced(scene: Scene, program: Program) -> Iterator[str]:
    """Results that came out elsewhere than the rank of their request says."""
    for number, ends in program.ends.items():
        for end in (e for e in ends if not e.error):
            rank, left, wanted = rank_of(scene.seed, number), 0.0, ""
            for stage in program.known[end.epoch].stages:
                left += stage.threshold if stage.exit else 0.0
                wanted = wanted or (stage.exit if rank < left else "")
            if end.exit != wanted:
                yield f"request {number} left at {end.exit or 'the end'} instead of {wanted or 'the end'}"


def leftovers(program: Program) -> tuple[str, ...]:
    """Heal everything, close the session, and see what stays at the machines that live."""
    world = program.world
    if not program.is_done or not world.machines[program.name].is_alive:
        return ()
    program.is_over = True
    for name, machine in world.machines.items():
        machine.condition.failing, machine.condition.is_garbling = frozenset(), False
        machine.condition.factor, machine.condition.record_error = 1.0, ""
        world.resume(name)
    for (source, target), channel in world.channels.items():
        world.spoil(source, target, None)
        if channel.trace is not None:
            world.set_link(source, target, channel.latency_s, channel.rate_bytes_per_s)
    world.heal_all()
    world.run(lambda: False, world.now_s + _SETTLE_S)
    world.event(program.name, ev.CloseRequested(drain=True))
    until_s = world.now_s + _CLOSE_S
    world.run(lambda: program.is_closed and not _held(world), until_s)
    return () if program.is_closed and not _held(world) else tuple(_held(world) or ["the session does not close"])


def _held(world: World) -> list[str]:
    found = []
    for name, machine in world.machines.items():
        if machine.is_alive:
            node = machine.node
            if machine.tensors or machine.bodies or node.held_bytes or node.worker.num_queued:
                what = f"tensors {sorted(map(tuple, machine.tensors))}, bytes {sorted(map(tuple, machine.bodies))}"
                found.append(f"{name}: {what}, {node.held_bytes} on credit, {node.worker.num_queued} queued")
    return found
