"""Failover of the fault-tolerant topologies on real processes and sockets: what is lost, doubled, and how long it takes.

T1 local fallback, T2a active/active, T2b active/passive (one session, head on the camera, tail on edge1) and T3 fan-in (two
branches, each on its own endpoint). Under a closed-loop load a node process gets SIGKILL, SIGSTOP (and SIGCONT later), or
its links are cut (1 byte/s, and healed later), each at a seeded random moment of a request's life; also the standby is
killed. Every output is compared bit for bit with the whole model's; every delivery is counted by request number.

lost: requests that ended with an error, never, or with other bits. duplicated: deliveries beyond the first of a request.
recover_s_worst: over all trials, seconds from the fault to the first result that did not need the faulty node (T1, T2b: of a
plan without it; T3: fused without it), where that node was in use; recover_s_active_active: the same over T2a alone.
`all_answered_s` under cases: until the last request that was under way at the fault had its result; `gap_s`: the longest
time without any result after the fault. overhead_fraction_passive: without faults, one request at a time, plain
split, T1 and T2b take turns on the same nodes: the larger ratio of medians, minus 1.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks import fault_world, report
from benchmarks.fault_world import EDGES, PATIENCE_S, Counted, Inputs, Load, Outcome
from ecotone.cluster import DeviceId
from ecotone.model import Captured
from ecotone.planset import PlanSet
from ecotone.runtime import FanIn, Fused, Nodes, Session, deploy, launch

IN_FLIGHT, AFTER_S, AGAIN_S = 4, 2.0, 0.5
KILL, KILL_STANDBY, STOP, CUT = "SIGKILL", "SIGKILL of the standby", "SIGSTOP", "links cut"
TRIALS = {KILL: 5, KILL_STANDBY: 1, STOP: 2, CUT: 2}
OVERHEAD_ROUNDS, OVERHEAD_REQUESTS = 12, 6
PLAIN, ACTIVE = "plain split", "T2a"


@dataclass(frozen=True, slots=True)
class World:
    captured: Captured
    inputs: list[Inputs]
    wanted: list[torch.Tensor]
    moments: np.random.Generator


@dataclass(slots=True)
class Trial:
    """A fault on `victim` under load: all that happened."""

    topology: str
    fault: str
    victim: str
    at_s: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    duplicated: int = 0
    survivors: Callable[[Outcome], bool] = lambda outcome: True

    @property
    def lost(self) -> int:
        return sum(not outcome.is_success for outcome in self.outcomes)

    @property
    def recover_s(self) -> float:
        after = [o.ended_s for o in self.outcomes if o.ended_s > self.at_s and not o.error and self.survivors(o)]
        return min(after, default=self.at_s + PATIENCE_S) - self.at_s

    def as_case(self) -> dict[str, Any]:
        ended = sorted(o.ended_s for o in self.outcomes if o.ended_s and not o.error)
        later = [self.at_s, *(t for t in ended if t > self.at_s)]
        under_way = [o.ended_s for o in self.outcomes if o.submitted_s < self.at_s < o.ended_s]
        return {
            "topology": self.topology,
            "fault": self.fault,
            "victim": self.victim,
            "requests": len(self.outcomes),
            "lost": self.lost,
            "duplicated": self.duplicated,
            "recover_s": self.recover_s,
            "all_answered_s": max(under_way, default=self.at_s) - self.at_s,
            "gap_s": max((b - a for a, b in itertools.pairwise(later)), default=0.0),
            "errors": sorted({o.error for o in self.outcomes if o.error})[:5],
        }


def main(argv: list[str] | None = None) -> int:
    """Try all faults on all topologies; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    world = World(*fault_world.model(options.seed), np.random.default_rng(options.seed))
    counts = dict.fromkeys(TRIALS, 1) if options.quick else TRIALS
    trials = session_trials(world, counts) + fan_in_trials(world, counts)
    overheads = measure_overhead(world, 2 if options.quick else OVERHEAD_ROUNDS)
    in_use = [t for t in trials if t.fault != KILL_STANDBY]
    figures = {
        "lost": sum(t.lost for t in trials),
        "duplicated": sum(t.duplicated for t in trials),
        "recover_s_worst": max(t.recover_s for t in in_use),
        "recover_s_active_active": max(t.recover_s for t in in_use if t.topology == ACTIVE),
        "overhead_fraction_passive": max(overheads["fraction"].values()),
    }
    about = report.context(
        options.seed, model="mobilenet_v2", slowdowns=fault_world.SLOWDOWNS, rate_mbit_per_s=fault_world.RATE_MBIT,
        latency_s=fault_world.LATENCY_S, in_flight=IN_FLIGHT, requests=sum(len(t.outcomes) for t in trials),
        seconds=round(time.perf_counter() - began),
    )  # fmt: skip
    report.finish(options.json, figures, {"trials": [t.as_case() for t in trials], "overhead": overheads}, about)
    return 0


def say(trial: Trial) -> Trial:
    """One line of it to the terminal."""
    case = trial.as_case()
    keys = ("requests", "lost", "duplicated", "recover_s", "all_answered_s", "gap_s")
    line = " ".join(f"{key} {case[key]:.3g}" for key in keys)
    print(f"{trial.topology:4s} {trial.fault:24s} {line} {case['errors'] or ''}", file=sys.stderr)
    return trial


def session_trials(world: World, counts: dict[str, int]) -> list[Trial]:
    """T1 and T2: each topology in one session on processes that stay but for those killed, which are started again."""
    trials = []
    with launch(fault_world.cluster(*EDGES)) as nodes:
        for name, plans in fault_world.topologies(world.captured).items():
            with deploy(plans, world.captured, nodes, max_in_flight=IN_FLIGHT) as session:
                counted = Counted()
                counted.watch(session)
                for fault, count in counts.items():
                    if fault != KILL_STANDBY or name != "T1":  # the local fallback cannot be killed without the asker
                        trials += [session_trial(world, name, fault, nodes, session, counted) for _ in range(count)]
    return trials


def session_trial(world: World, name: str, fault: str, nodes: Nodes, session: Session, counted: Counted) -> Trial:
    """One fault under load, repaired at the end: the set is resident again as a whole and its first plan preferred."""
    victim = EDGES[1] if fault == KILL_STANDBY else EDGES[0]
    resident, before = session.plans, counted.duplicated
    without = {plan.epoch for plan in resident if DeviceId(victim) not in plan.devices}
    trial = Trial(name, fault, victim, survivors=lambda outcome: outcome.epoch in without)
    load = fault_world.session_load(session, world.inputs, world.wanted, in_flight=IN_FLIGHT)
    inflict(world, trial, nodes, load)
    trial.outcomes, trial.duplicated = load.stop(), counted.duplicated - before
    repair(trial, nodes)
    for plan in reversed(resident):  # each is usable again, and the first is preferred as before
        session.prefer(plan)
        fault_world.wait_until(lambda wanted=plan: session.plans[0] == wanted)
    return say(trial)


def fan_in_trials(world: World, counts: dict[str, int]) -> list[Trial]:
    """T3: each branch has its head at the asker and its tail on an endpoint; one of the endpoints gets the fault."""
    trials = []
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(launch(fault_world.cluster(edge))) for edge in EDGES]
        sessions = [
            stack.enter_context(
                deploy(fault_world.split(world.captured, edge), world.captured, each, max_in_flight=IN_FLIGHT)
            )
            for edge, each in zip(EDGES, nodes, strict=True)
        ]
        counters = [Counted() for _ in EDGES]
        for counter, session in zip(counters, sessions, strict=True):
            counter.watch(session)
        fan_in = stack.enter_context(FanIn(sessions, total))
        for fault in (KILL, STOP, CUT):
            trials += [fan_in_trial(world, fault, i % len(EDGES), nodes, fan_in, counters) for i in range(counts[fault])]
    return trials


def fan_in_trial(world: World, fault: str, branch: int, nodes: list[Nodes], fan_in: FanIn, counters: list[Counted]) -> Trial:
    """One fault on one branch, repaired at the end: frames are fused from all branches again."""
    frames: list[int] = []
    before = sum(counter.duplicated for counter in counters)

    def submit(i: int) -> Any:
        return fan_in.submit([world.inputs[(i + b) % len(world.inputs)] for b in range(len(EDGES))])

    def is_equal(i: int, fused: Fused) -> bool:
        frames.append(fused.frame)
        return torch.equal(fused.output, total([world.wanted[(i + b) % len(world.wanted)] for b in fused.present]))

    trial = Trial("T3", fault, EDGES[branch], survivors=lambda outcome: branch in outcome.missing)
    load = Load(submit, is_equal, in_flight=IN_FLIGHT)
    inflict(world, trial, nodes[branch], load)
    trial.outcomes = load.stop()
    repeated = len(frames) - len(set(frames))
    trial.duplicated = repeated + sum(counter.duplicated for counter in counters) - before
    repair(trial, nodes[branch])
    fault_world.wait_until(lambda: submit(0).result(PATIENCE_S).missing == ())
    return say(trial)


def repair(trial: Trial, nodes: Nodes) -> None:
    """Start a killed process again."""
    if trial.fault in (KILL, KILL_STANDBY):
        nodes.restart(trial.victim)


def total(outputs: Sequence[Any]) -> torch.Tensor:
    """The fusing function: the sum of what is there, always in the order of the branches."""
    return torch.stack([output for output in outputs if output is not None]).sum(0)


def inflict(world: World, trial: Trial, nodes: Nodes, load: Load) -> None:
    """Let the load run in, put the fault on the victim at a random moment of a request's life, and later take it back."""
    load.wait_ended(4 * IN_FLIGHT)
    typical_s = report.median([o.ended_s - o.submitted_s for o in tuple(load.outcomes) if o.ended_s])
    time.sleep(float(world.moments.uniform(0, typical_s)))
    trial.at_s = time.perf_counter()
    begin, end = {
        KILL: (fault_world.kill_process, None),
        KILL_STANDBY: (fault_world.kill_process, None),
        STOP: (fault_world.stop_process, fault_world.continue_process),
        CUT: (fault_world.cut, fault_world.heal),
    }[trial.fault]
    begin(nodes, trial.victim)
    time.sleep(AFTER_S)
    if end is not None:
        end(nodes, trial.victim)
        time.sleep(AGAIN_S)


def measure_overhead(world: World, rounds: int) -> dict[str, Any]:
    """Latency alone and without faults: plain split, T1 and T2b in turn, in one session on the same nodes."""
    sets = {PLAIN: PlanSet(primary=fault_world.split(world.captured, EDGES[0]))}
    sets |= {name: plans for name, plans in fault_world.topologies(world.captured).items() if name != ACTIVE}
    seconds: dict[str, list[float]] = {name: [] for name in sets}
    with launch(fault_world.cluster(*EDGES)) as nodes, deploy(sets[PLAIN], world.captured, nodes) as session:
        for number in range(rounds):
            for name in sorted(sets, key=lambda n: (number + len(n)) % len(sets)):
                session.replan(sets[name])
                seconds[name] += one_by_one(session, world)
    medians = {name: report.median(values) for name, values in seconds.items()}
    return {
        "latency_s": medians,
        "fraction": {name: medians[name] / medians[PLAIN] - 1 for name in sets if name != PLAIN},
        "count": len(seconds[PLAIN]),
    }


def one_by_one(session: Session, world: World) -> list[float]:
    """Seconds of single requests, after one that does not count."""
    found = []
    for i in range(1 + OVERHEAD_REQUESTS):
        began = time.perf_counter()
        session.submit(world.inputs[i % len(world.inputs)]).result(PATIENCE_S)
        found.append(time.perf_counter() - began)
    return found[1:]


if __name__ == "__main__":
    sys.exit(main())
