"""A thousand switches of plan under load on real processes: how long the results pause, what is dropped, what memory grows.

One camera and one server (processes, loopback sockets, shaped links) answer a periodic load, one frame each PERIOD_S; the
result of every frame is compared in number and time. Judged are switches between two *resident* plans (Session.prefer), once
per FRAMES_PER_SWITCH frames at a seeded random moment.

gap_s of a switch: over the frames handed in from the one before the switch to WINDOW after it, the longest time between two
results that follow one another, less the plan's own period. The plan's own period is the median time between results of that
plan while nothing is switched, the larger of the two plans'; the median, not a high percentile, so that the jitter of the
machine counts against us. `control` under cases is the same figure at moments without any switch: what the machine does
by itself. dropped: frames of all cases without a result. rss_growth_bytes: resident memory of asker and node process
together, median of the last tenth of the switches less median of the second tenth (the first is warm-up).

Beside it, on the same frames: replan with loading beside the old plan (make before break, each plan new to both devices),
and break before make (both devices' memory taken to hold one plan only: requests are held back, the old plan is unloaded,
the new one loaded). NEUKONFIG (arXiv:2106.15689) reports 6 s for pause and resume, 0.6 s for its dynamic switching, below
1 ms with a second pipeline resident, on other devices.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks import report
from benchmarks.split_world import IMAGE, Sample, captured_model, photographs, star
from ecotone.cluster import DeviceId
from ecotone.graph import Graph
from ecotone.model import Captured
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planset import PlanSet, Standby
from ecotone.runtime import Future, Nodes, Session, deploy, launch

MODEL, EXECUTOR, CODEC = "mobilenet_v2", "torch:fp32", "int8"
DEVICES = ("camera", "server")
RATE_BYTES_PER_S, LATENCY_S = 25e6, 0.002
PERIOD_S, FRAMES_PER_SWITCH, WINDOW = 0.05, 5, 1
SWITCHES, LOADINGS, PAUSES, CONTROLS = 1000, 30, 10, 200
PAPER_S = {"pause and resume": 6.0, "dynamic switching": 0.6, "second pipeline resident": 0.001}


@dataclass(slots=True)
class Frame:
    submitted_s: float
    ended_s: float = 0.0
    epoch: int | None = None
    error: str = ""


@dataclass(slots=True)
class Load:
    """A thread that hands in one frame each PERIOD_S, in turn of `samples`, until it is told to stop."""

    session: Session
    samples: Sequence[Sample]
    frames: list[Frame] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        begin = time.perf_counter()
        for number in itertools.count():
            wait_s = begin + number * PERIOD_S - time.perf_counter()
            if self.is_over.wait(max(0.0, wait_s)):
                return
            frame = Frame(time.perf_counter())
            self.frames.append(frame)
            self.session.submit(self.samples[number % len(self.samples)]).add_done_callback(_ender(frame))

    def wait_for(self, count: int) -> None:
        """Until so many frames were handed in."""
        while len(self.frames) < count:
            time.sleep(PERIOD_S / 4)

    def finish(self) -> None:
        """Stop, and wait for what is under way; a frame without a result after a minute is dropped."""
        self.is_over.set()
        end = time.perf_counter() + 60.0
        while any(not frame.ended_s for frame in self.frames) and time.perf_counter() < end:
            time.sleep(0.01)


@dataclass(slots=True)
class Run:
    """What one way of switching did: the moments, how long the caller waited, and every frame."""

    frames: list[Frame]
    moments_s: list[float]
    waits_s: list[float]
    rss_bytes: list[int]
    kinds: list[str]

    @property
    def dropped(self) -> int:
        return sum(bool(frame.error) or not frame.ended_s for frame in self.frames)

    def gaps_s(self, period_s: float) -> list[float]:
        """Per switch, see the top of this file."""
        starts = np.array([frame.submitted_s for frame in self.frames])
        found = []
        for moment_s, wait_s in zip(self.moments_s, self.waits_s, strict=True):
            first = int(np.searchsorted(starts, moment_s)) - 1
            last = int(np.searchsorted(starts, moment_s + wait_s)) + WINDOW
            ends = sorted(frame.ended_s for frame in self.frames[max(0, first) : last + 1] if frame.ended_s)
            if len(ends) > 1:
                found.append(max(b - a for a, b in itertools.pairwise(ends)) - period_s)
        return found

    def as_case(self, name: str, period_s: float) -> dict[str, Any]:
        gaps = self.gaps_s(period_s)
        return {
            "name": name,
            "switches": len(self.moments_s),
            "frames": len(self.frames),
            "dropped": self.dropped,
            "kinds": sorted(set(self.kinds)),
            "gap_s_median": float(np.percentile(gaps, 50)),
            "gap_s_p99": float(np.percentile(gaps, 99)),
            "gap_s_max": max(gaps),
            "switch_call_s_median": report.median(self.waits_s),
            "latency_s_median": report.median([f.ended_s - f.submitted_s for f in self.frames if f.ended_s]),
            "rss_growth_bytes": growth(self.rss_bytes),
            "errors": sorted({frame.error for frame in self.frames if frame.error})[:5],
        }


def main(argv: list[str] | None = None) -> int:
    """Measure all ways of switching; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    torch.set_num_threads(1)
    samples = photographs(4)
    captured = captured_model(MODEL, samples)
    random = np.random.default_rng(options.seed)
    share = 10 if options.quick else 1
    cluster = star(DEVICES, (1.0, 1.0), RATE_BYTES_PER_S, LATENCY_S)
    plans = [cut_plan(captured.graph, cut) for cut in cuts(captured.graph)]
    one, other = plans[len(plans) // 2 : len(plans) // 2 + 2]
    with launch(cluster) as nodes:
        both = PlanSet(primary=one, standbys=(Standby(plan=other, label="the other cut"),))
        with deploy(both, captured, nodes, samples=samples, image=IMAGE, max_in_flight=8) as session:
            periods = {str(plan): own_period_s(session, plan, samples) for plan in session.plans}
            period_s = max(periods.values())
            pair = itertools.cycle(reversed(session.plans))
            control = switch(session, samples, CONTROLS // share, random, lambda: "none")
            resident = switch(session, samples, SWITCHES // share, random, lambda: prefer(session, next(pair)))
        ways = {"control": control, "both resident": resident} | with_loading(captured, nodes, plans, samples, random, share)
    cases = [run.as_case(name, period_s) for name, run in ways.items()]
    for case in cases:
        print({key: case[key] for key in ("name", "switches", "gap_s_median", "gap_s_p99", "dropped")}, file=sys.stderr)
    figures = {
        "gap_s_p99": cases[1]["gap_s_p99"],
        "dropped": sum(case["dropped"] for case in cases),
        "rss_growth_bytes": cases[1]["rss_growth_bytes"],
    }
    about = report.context(
        options.seed, model=MODEL, plans=[str(one), str(other)], load_period_s=PERIOD_S, own_period_s=periods,
        bytes_per_s=RATE_BYTES_PER_S, latency_s=LATENCY_S, paper_downtime_s=PAPER_S,
    )  # fmt: skip
    report.finish(options.json, figures, cases, about)
    return 0


def with_loading(
    captured: Captured, nodes: Nodes, plans: Sequence[Plan], samples: Sequence[Sample], random: np.random.Generator,
    share: int,
) -> dict[str, Run]:  # fmt: skip
    """Replanning beside the old plan, and with a pause, to plans that neither device has compiled."""
    found = {}
    roomy = nodes.cluster
    for name, count in (("loading beside", LOADINGS), ("break before make", PAUSES)):
        if name == "break before make":
            nodes.cluster = with_memory_for_one(captured.graph, nodes, plans)
        for device in DEVICES[1:]:  # a new process has nothing compiled; its weights are on its disk
            nodes.children[DeviceId(device)].terminate()
            nodes.children[DeviceId(device)].wait(30.0)
            nodes.restart(device)
        with deploy(plans[0], captured, nodes, samples=samples, image=IMAGE, max_in_flight=8, queue_limit=4096) as session:
            order = itertools.cycle([*plans[1:], plans[0]])
            found[name] = switch(session, samples, count // min(share, 5), random, partial(replan, session, order))
    nodes.cluster = roomy
    return found


def switch(
    session: Session, samples: Sequence[Sample], count: int, random: np.random.Generator, change: Callable[[], str]
) -> Run:
    """Under load, `change` the plan `count` times, FRAMES_PER_SWITCH frames apart."""
    load = Load(session, samples)
    thread = threading.Thread(target=load.run, name="load", daemon=True)
    thread.start()
    run = Run(load.frames, [], [], [], [])
    processes = [psutil.Process(), *(psutil.Process(pid) for pid in session.nodes.pids.values())]
    load.wait_for(2 * FRAMES_PER_SWITCH)
    for _ in range(count):
        load.wait_for(len(load.frames) + FRAMES_PER_SWITCH)
        time.sleep(float(random.uniform(0, PERIOD_S)))
        run.moments_s.append(time.perf_counter())
        run.kinds.append(change())
        run.waits_s.append(time.perf_counter() - run.moments_s[-1])
        run.rss_bytes.append(sum(process.memory_info().rss for process in processes))
    load.wait_for(len(load.frames) + 2 * FRAMES_PER_SWITCH)
    load.finish()
    thread.join()
    return run


def prefer(session: Session, plan: Plan) -> str:
    session.prefer(plan)
    return "resident"


def replan(session: Session, plans: Iterator[Plan]) -> str:
    plan = next(plans)
    kind = session.how_to_switch(plan).kind
    session.replan(plan)
    return kind


def own_period_s(session: Session, plan: Plan, samples: Sequence[Sample]) -> float:
    """Median time between the results of `plan` under the same load, without switches."""
    session.prefer(plan)
    load = Load(session, samples)
    thread = threading.Thread(target=load.run, daemon=True)
    thread.start()
    load.wait_for(60)
    load.finish()
    thread.join()
    ends = sorted(frame.ended_s for frame in load.frames[10:] if frame.ended_s)
    return report.median([b - a for a, b in itertools.pairwise(ends)])


def growth(rss_bytes: Sequence[int]) -> float:
    """Median of the last tenth less median of the second tenth; 0 for too few samples."""
    tenth = len(rss_bytes) // 10
    return report.median(rss_bytes[-tenth:]) - report.median(rss_bytes[tenth : 2 * tenth]) if tenth else 0.0


def cuts(graph: Graph) -> list[int]:
    """Positions in the later two thirds where one tensor crosses: plans of like latency."""
    return [cut for cut in graph.single_tensor_cuts() if cut > graph.num_blocks // 3][:-1]


def cut_plan(graph: Graph, cut: int) -> Plan:
    """Blocks before `cut` on the camera, the others on the server."""
    camera, server = (DeviceId(name) for name in DEVICES)
    return Plan(
        graph_hash=graph.content_hash(),
        stages=(
            Stage(device=camera, start=0, stop=cut, executor=EXECUTOR),
            Stage(device=server, start=cut, stop=graph.num_blocks, executor=EXECUTOR),
        ),
        transfers=(
            Transfer(source=camera, target=camera, position=0, codec=LOCAL),
            Transfer(source=camera, target=server, position=cut, codec=CODEC),
            Transfer(source=server, target=camera, position=graph.num_blocks, codec="fp32"),
        ),
    )


def with_memory_for_one(graph: Graph, nodes: Nodes, plans: Sequence[Plan]) -> Any:
    """The cluster with memory for the largest single plan on each device, and for no two."""
    world = nodes.cluster
    length = graph.num_blocks
    need = {
        DEVICES[0]: max(graph.segment_parameter_bytes(0, plan.stages[0].stop) for plan in plans),
        DEVICES[1]: max(graph.segment_parameter_bytes(plan.stages[1].start, length) for plan in plans),
    }
    return replace(world, devices=tuple(replace(d, memory_bytes=need[d.name]) for d in world.devices))


def _ender(frame: Frame) -> Callable[[Any], None]:
    def ended(future: Future) -> None:
        frame.ended_s = time.perf_counter()
        error = future.exception()
        frame.error = f"{type(error).__name__}: {error}" if error else ""
        frame.epoch = future.epoch

    return ended


if __name__ == "__main__":
    sys.exit(main())
