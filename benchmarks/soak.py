"""Hours in small: 80 % of the measured capacity for `--minutes` (15 by default), with faults all the time.

One session with a plan set (camera -> edge1, standby on edge2, local fallback) on real processes. The load hands in 0.8 of
the rate that a closed loop reached before; at most IN_FLIGHT requests are under way, then the source waits (back-pressure).
Meanwhile, seeded and one after the other: edge1 is killed and started again, edge1 or edge2 is stopped and goes on, links
change their rate or are cut and heal, both edges are gone at once, the preferred plan switches, the whole set is deployed
anew. Every output is compared bit for bit; every delivery is counted.

lost: requests that ended with an error, never, or with other bits (and deliveries beyond the first). rss_growth_bytes: asker
and nodes: for each process the median of the last tenth of its samples less the median of those just after its first tenth;
the sum of the asker's, of edge2's (which lives all along), and of the largest of edge1's lives. A life that began with a
restart counts from START_S after it (libraries and weights are loaded by then) and only if it went on for LIFE_S more;
growth below zero counts as 0.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks import fault_world, report
from benchmarks.fault_world import CAMERA, EDGES, RATE_MBIT, Counted, Load
from ecotone.cluster import DeviceId
from ecotone.planset import PlanSet, Standby
from ecotone.runtime import Nodes, Session, deploy, launch
from ecotone.units import EcotoneError

SHARE, IN_FLIGHT, CAPACITY_S = 0.8, 24, 8.0
MEAN_PAUSE_S, SAMPLE_S, START_S, LIFE_S = 2.0, 0.5, 20.0, 30.0


@dataclass(slots=True)
class Memory:
    """Resident bytes of the asker and of every life of every node process, sampled while it runs."""

    nodes: Nodes
    first: frozenset[int]  # processes that were warm when sampling began
    samples: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stopping.wait(SAMPLE_S):
            for name, pid in {CAMERA: os.getpid(), **self.nodes.pids}.items():
                try:
                    size = psutil.Process(pid).memory_info().rss
                except psutil.Error:
                    continue
                if size:
                    self.samples.setdefault((name, pid), []).append((time.perf_counter(), size))

    def stop(self) -> None:
        self._stopping.set()

    def growth(self) -> dict[str, int]:
        """Bytes by process name; of a node with several lives the largest."""
        found: dict[str, int] = {}
        for (name, pid), samples in self.samples.items():
            settled = [size for at_s, size in samples if pid in self.first or at_s >= samples[0][0] + START_S]
            if pid in self.first or len(settled) * SAMPLE_S >= LIFE_S:
                found[name] = max(found.get(name, 0), grown(settled))
        return found

    def lives(self) -> list[dict[str, Any]]:
        """Every life of every process: its seconds and bytes."""
        found = []
        for (name, _), samples in self.samples.items():
            sizes = [size for _, size in samples]
            seconds = samples[-1][0] - samples[0][0]
            found.append({"name": name, "seconds": seconds, "first": sizes[0], "last": sizes[-1], "peak": max(sizes)})
        return found


def grown(sizes: list[int]) -> int:
    """Median of the last tenth less the median of the tenth after the first."""
    tenth = max(1, len(sizes) // 10)
    return int(np.median(sizes[-tenth:]) - np.median(sizes[tenth : 2 * tenth] or sizes))


def main(argv: list[str] | None = None) -> int:
    """Soak; returns 0."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--minutes", type=float, default=15.0)
    mine, rest = own.parse_known_args(argv)
    options = report.arguments((__doc__ or "").splitlines()[0] + " Also: --minutes M.", rest)
    minutes = min(mine.minutes, 1.0) if options.quick else mine.minutes
    torch.set_num_threads(1)
    captured, inputs, wanted = fault_world.model(options.seed)
    first, second, local = (fault_world.split(captured, name) for name in (*EDGES, CAMERA))
    plans = PlanSet(primary=first, standbys=(Standby(plan=second), Standby(plan=local)))
    counted = Counted()
    with launch(fault_world.cluster(*EDGES)) as nodes, deploy(plans, captured, nodes, queue_limit=2 * IN_FLIGHT) as session:
        counted.watch(session)
        capacity = measured_capacity(fault_world.session_load(session, inputs, wanted, in_flight=4))
        memory = Memory(nodes, frozenset((os.getpid(), *nodes.pids.values())))
        sampler = threading.Thread(target=memory.run, name="memory", daemon=True)
        sampler.start()
        load = fault_world.session_load(
            session, inputs, wanted, in_flight=IN_FLIGHT, rate_per_s=SHARE * capacity, keep_all=False
        )
        began = time.perf_counter()
        done = Mischief(nodes, session, plans, np.random.default_rng(options.seed)).go_on(60 * minutes)
        load.stop()
        lasted_s = time.perf_counter() - began
        memory.stop()
        sampler.join()
    growth = memory.growth()
    figures = {
        "minutes": lasted_s / 60,
        "requests": load.num_begun,
        "lost": len(load.outcomes) + counted.duplicated,
        "rss_growth_bytes": sum(max(0, size) for size in growth.values()),
    }
    cases = {
        "capacity_per_s": capacity, "rate_per_s": load.num_begun / lasted_s, "duplicated": counted.duplicated,
        "errors": [o.error or "other bits" for o in load.outcomes][:20], "events": done, "growth_by_process": growth,
        "lives": memory.lives(),
    }  # fmt: skip
    about = report.context(
        options.seed, model="mobilenet_v2", slowdowns=fault_world.SLOWDOWNS, rate_mbit_per_s=RATE_MBIT, share=SHARE,
        in_flight=IN_FLIGHT,
    )  # fmt: skip
    report.finish(options.json, figures, cases, about)
    return 0


def measured_capacity(load: Load) -> float:
    """Results per second of a closed loop, its start left out."""
    time.sleep(CAPACITY_S / 4)
    ended, began = load.num_ended, time.perf_counter()
    time.sleep(CAPACITY_S)
    rate = (load.num_ended - ended) / (time.perf_counter() - began)
    load.stop()
    return rate


class Mischief:
    """The faults, one after the other; each is over when the next begins."""

    def __init__(self, nodes: Nodes, session: Session, plans: PlanSet, moments: np.random.Generator):
        self.nodes, self.session, self.plans, self.moments = nodes, session, plans, moments
        self._acts: dict[str, Callable[[], None]] = {
            "kill and restart": self.kill,
            "stop and continue": self.stop,
            "other rate": self.slow,
            "links cut": self.cut,
            "both gone": self.both,
            "switch": self.switch,
            "set deployed anew": self.redeploy,
        }

    def go_on(self, seconds: float) -> dict[str, int]:
        """Act until so much time has passed; how often each was done, and how often a switch was refused."""
        end, done = time.perf_counter() + seconds, dict.fromkeys([*self._acts, "refused"], 0)
        while (left_s := end - time.perf_counter()) > 0:
            time.sleep(min(left_s, float(self.moments.exponential(MEAN_PAUSE_S))))
            if end - time.perf_counter() > 15.0:  # what is begun has time to end
                name = str(self.moments.choice(list(self._acts)))
                try:
                    self._acts[name]()
                    done[name] += 1
                except EcotoneError as error:
                    done["refused"] += 1
                    print(f"{name}: {error}", file=sys.stderr)
        return done

    def kill(self) -> None:
        fault_world.kill_process(self.nodes, EDGES[0])
        self._wait(0.5, 3.0)
        self._restart()

    def stop(self) -> None:
        name = self._edge()
        fault_world.stop_process(self.nodes, name)
        self._wait(0.2, 2.0)
        fault_world.continue_process(self.nodes, name)

    def slow(self) -> None:
        name = self._edge()
        fault_world.set_rate(self.nodes, name, RATE_MBIT * 1e6 / 8 * float(10 ** self.moments.uniform(-2, 0)))
        self._wait(1.0, 4.0)
        fault_world.heal(self.nodes, name)

    def cut(self) -> None:
        name = self._edge()
        fault_world.cut(self.nodes, name)
        self._wait(0.5, 2.5)
        fault_world.heal(self.nodes, name)

    def both(self) -> None:
        """Only the local fallback is left."""
        fault_world.kill_process(self.nodes, EDGES[0])
        fault_world.stop_process(self.nodes, EDGES[1])
        self._wait(0.5, 2.0)
        fault_world.continue_process(self.nodes, EDGES[1])
        self._restart()

    def switch(self) -> None:
        resident = self.session.plans
        self.session.prefer(resident[int(self.moments.integers(len(resident)))])

    def redeploy(self) -> None:
        self.session.replan(self.plans)

    def _restart(self) -> None:
        fault_world.wait_until(lambda: not self.nodes.children[DeviceId(EDGES[0])].is_alive)
        self.nodes.restart(EDGES[0], deadline_s=120.0)

    def _edge(self) -> str:
        return EDGES[int(self.moments.integers(len(EDGES)))]

    def _wait(self, least_s: float, most_s: float) -> None:
        time.sleep(float(self.moments.uniform(least_s, most_s)))


if __name__ == "__main__":
    sys.exit(main())
