"""The cut moves while the link changes: mean latency of Ecotone's controller beside static plans and others, on processes.

MobileNetV2 shapes, an end device 8 times slower than its server, one request every 0.5 s, one at a time; latency counts from
when a request was due. The link follows the traces shipped in assets/traces (generated, fixed before anything was tuned; all
tuning was on other seeds) for 60 s each; time in which nothing happens is left out: see trace_player.py. Accuracy: no plan
may cost the answer more than JPEG of quality 90 costs it, as in split_latency.

Contenders, see ecotone.policies: *ecotone*; *oracle*, which knows the trace and chooses among the same plans; *static*:
every plan of `policies.statics` that the simulator puts within CLOSE of the best static one is measured, the best of them
in hindsight counts; *neurosurgeon*, *dynamic_split* and the other statics on a few requests of each trace only, since they
would take minutes, with ours on the same requests beside them. The simulator's figures of all stand in the cases, apart.

Keys: ecotone over the best static plan, on the stable trace, the worst and the second best of the changing ones; over the
oracle, the worst of all traces. output_mismatches: results of any contender that are not, bit for bit, what the same plan
gives for the same input over a still link.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import report
from benchmarks.split_world import IMAGE, Sample, captured_model, photographs, profile_of, star, stretched
from benchmarks.trace_player import Played, TracePlayer, play
from ecotone import codec
from ecotone.cluster import Cluster, DeviceId, Link
from ecotone.cost import predict
from ecotone.linktrace import LinkTrace, load_trace, shipped_traces
from ecotone.model import Captured
from ecotone.plan import Plan
from ecotone.planner import baselines
from ecotone.planset import PlanSet
from ecotone.policies import Contender, contender, statics
from ecotone.profile import Profile
from ecotone.protocol.settings import CoordinatorSettings, WorkerSettings
from ecotone.runtime import Nodes, Session, deploy, launch
from ecotone.runtime.adapt import Adaptive
from ecotone.simulator import FollowTrace, Periodic, simulate
from ecotone.simulator.adaptive import simulate_adaptive

MODEL, EXECUTOR = "mobilenet_v2", "torch:fp32"
DEVICE, SERVER = DeviceId("device"), DeviceId("server")
SLOWER, NOMINAL_BYTES_PER_S, NOMINAL_LATENCY_S = 8.0, 20e6 / 8, 0.005
PERIOD_S, STABLE = 0.5, "stable_wifi"
CLOSE, MOST_STATICS = 1.15, 3
ROUNDS_STABLE = 3
WORKER = WorkerSettings(report_s=0.01)
PATIENCE_S = 60.0
OURS, ORACLE = "ecotone", "oracle"
OTHERS = ("neurosurgeon", "dynamic_split")
OTHERS_REQUESTS, OTHERS_LIMIT_S = tuple(range(40, 120, 8)), 5.0
CODECS = (*codec.CANDIDATES, "int4clip+zstd", *(c.name for c in codec.catalogue() if c.is_image))


@dataclass(slots=True)
class World:
    """What all contenders share."""

    captured: Captured
    cluster: Cluster
    profile: Profile
    require: tuple[str, ...]
    samples: list[Sample]
    plans: dict[str, Plan]  # the statics
    references: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """Measure; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    torch.set_num_threads(1)
    world = make_world(options.quick)
    traces = {name: load_trace(name) for name in shipped_traces()}
    if options.quick:
        traces = {name: traces[name] for name in (STABLE, "lte_train")}
    simulated = {name: simulate_all(world, trace) for name, trace in traces.items()}
    cases = []
    with launch(world.cluster, unshaped=True) as nodes:
        bench = Bench(world, nodes)
        for name, trace in traces.items():
            cases.append(measure(bench, name, trace, simulated[name]))
        bench.close()
    about = report.context(
        options.seed, executor=EXECUTOR, model=MODEL, device_slower=SLOWER, period_s=PERIOD_S, require=world.require,
        traces="assets/traces, generator seed 20260", plans={name: str(plan) for name, plan in world.plans.items()},
    )  # fmt: skip
    report.finish(options.json, figures(cases), {"traces": cases, "simulated": simulated}, about)
    return 0


def figures(cases: list[dict[str, Any]]) -> dict[str, float]:
    """The keys, from the cases."""
    over_static = {case["trace"]: case["ours_over_best_static"] for case in cases}
    changing = sorted(ratio for name, ratio in over_static.items() if name != STABLE)
    return {
        "ours_over_best_static_stable": over_static[STABLE],
        "ours_over_best_static_changing_max": changing[-1],
        "ours_over_best_static_second_best": changing[min(1, len(changing) - 1)],
        "ours_over_oracle_max": max(case["ours_over_oracle"] for case in cases),
        "output_mismatches": sum(case["output_mismatches"] for case in cases),
    }


def make_world(quick: bool) -> World:
    """Model, profile, accuracy rule and static plans."""
    began = time.perf_counter()
    samples = photographs(2 if quick else 5)
    captured = captured_model(MODEL, samples)
    base = star((DEVICE, SERVER), (1.0, 1.0), 1e9, 0.0)
    profile = profile_of(captured, base, samples, EXECUTOR, CODECS, quick, max_cuts=12)
    profile = stretched(profile, {DEVICE: SLOWER})
    cluster = star((DEVICE, SERVER), (SLOWER, 1.0), NOMINAL_BYTES_PER_S, NOMINAL_LATENCY_S)
    jpeg = baselines.place("server_only_jpeg", captured.graph, cluster, profile, ("error=1e9", "codec=jpeg:90,fp32"))
    require = (f"error={predict(jpeg, captured.graph, cluster, profile).relative_error:.9g}",)
    plans = statics(captured.graph, cluster, profile, require)
    print(f"captured and profiled in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for name, plan in plans.items():
        print(f"  {name}: {plan}", file=sys.stderr)
    return World(captured, cluster, profile, require, samples, plans)


def both_ways(trace: LinkTrace) -> dict[tuple[DeviceId, DeviceId], LinkTrace]:
    return {(DEVICE, SERVER): trace, (SERVER, DEVICE): trace}


def of_policy(world: World, name: str, trace: LinkTrace) -> Contender:
    graph = world.captured.graph
    return contender(name, graph, world.cluster, world.profile, world.require, traces=both_ways(trace))


# ---- simulated, apart ---------------------------------------------------------------------------------------------------


def simulate_all(world: World, trace: LinkTrace) -> dict[str, float]:
    """Mean latency of every policy and static plan on the virtual clock."""
    arguments: dict[str, Any] = {
        "requests": round(trace.duration_s / PERIOD_S), "arrivals": Periodic(period_s=PERIOD_S), "max_in_flight": 1,
        "trace": False, "worker": WORKER, "queue_limit": 1000,
        "coordinator": CoordinatorSettings(session=1, node_timeout_s=PATIENCE_S),
    }  # fmt: skip
    follow = tuple(FollowTrace(at_s=0.0, source=a, target=b, trace=trace) for a, b in both_ways(trace))
    graph, found = world.captured.graph, {}
    for name in (OURS, ORACLE, *OTHERS):
        one = of_policy(world, name, trace)
        adapted = simulate_adaptive(
            one.plans.with_epochs(1), one.policy, graph, world.cluster, world.profile, script=follow, **arguments
        )
        found[name] = adapted.report.mean_s
    for name, plan in world.plans.items():
        script = follow if SERVER in plan.devices else ()
        found[name] = simulate(plan, graph, world.cluster, world.profile, script=script, **arguments).mean_s
    return found


# ---- measured -----------------------------------------------------------------------------------------------------------


class Bench:
    """One session on nodes that stay up; `run` puts a contender's plans in force and plays a trace against it."""

    def __init__(self, world: World, nodes: Nodes) -> None:
        self.world, self.nodes = world, nodes
        self._resident: PlanSet | None = None
        self._unlimited()
        first = world.plans["device_only"]
        self.session: Session = deploy(
            first, world.captured, nodes, samples=world.samples, image=IMAGE, max_in_flight=1, timeout_s=120.0,
            node_timeout_s=PATIENCE_S, worker=WORKER,
        )  # fmt: skip

    def close(self) -> None:
        self._unlimited()
        self.session.close()

    def run(self, one: Contender, trace: LinkTrace, dues: Sequence[int], limit_s: float = 1e9) -> Played:
        """The requests `dues` of the stream under this contender."""
        self._put_in_force(one.plans)
        player = TracePlayer(self.nodes, DEVICE, SERVER, trace)
        adaptive = None
        try:
            player.hold(0.0)
            if len(one.plans.plans) > 1:
                adaptive = Adaptive(self.session, one.policy, tick_s=0.0, clock=player.now).start()
            return play(self.session, adaptive, player, self.world.samples, self.world.references, PERIOD_S, dues, limit_s)
        finally:
            if adaptive is not None:
                adaptive.stop()
            player.close()

    def _put_in_force(self, plans: PlanSet) -> None:
        """Resident over a still link, the reference outputs of each plan known, every plan warm, the first preferred."""
        self._unlimited()
        for plan in plans.plans:
            if (plan.identity(), 0) not in self.world.references:  # alone, so that no other plan can answer
                self.session.replan(plan)
                self._resident = None
                for which, sample in enumerate(self.world.samples):
                    self.world.references[plan.identity(), which] = self.session.submit(sample).result(60.0)
        if plans != self._resident:
            graph, cluster, profile = self.world.captured.graph, self.world.cluster, self.world.profile
            expected = {i: predict(plan, graph, cluster, profile).latency_s for i, plan in enumerate(plans.plans)}
            self.session.replan(plans, expected_s=expected)
            self._resident = plans
        resident = {plan.identity(): plan for plan in self.session.plans}
        for plan in reversed(plans.plans):
            self.session.prefer(resident[plan.identity()])
            self.session.submit(self.world.samples[0]).result(60.0)

    def _unlimited(self) -> None:
        links = tuple(
            Link(source=a, target=b, latency_s=0.0, bandwidth_bytes_per_s=1e11)
            for a, b in ((DEVICE, SERVER), (SERVER, DEVICE))
        )
        self.nodes.set_links(links)


def measure(bench: Bench, name: str, trace: LinkTrace, simulated: Mapping[str, float]) -> dict[str, Any]:
    """One trace: ours, the oracle and the near statics in turn, then the others on a few requests."""
    began, world = time.perf_counter(), bench.world
    best_s = min(simulated[static] for static in world.plans)
    near = sorted((s for s in world.plans if simulated[s] <= CLOSE * best_s), key=lambda s: simulated[s])[:MOST_STATICS]
    every = range(round(trace.duration_s / PERIOD_S))
    played: dict[str, list[Played]] = {}
    for _ in range(ROUNDS_STABLE if name == STABLE else 1):
        for who in (near[0], OURS, ORACLE, *near[1:]):
            one = static(world, who) if who in world.plans else of_policy(world, who, trace)
            played.setdefault(who, []).append(bench.run(one, trace, every))
    mean = {who: sum(p.mean_s for p in runs) / len(runs) for who, runs in played.items()}
    best = min(near, key=lambda s: mean[s])
    ours = played[OURS][0]
    others = {}
    for who in (*OTHERS, *(s for s in world.plans if s not in near)):
        one = static(world, who) if who in world.plans else of_policy(world, who, trace)
        run = bench.run(one, trace, OTHERS_REQUESTS, OTHERS_LIMIT_S)
        same = [ours.latencies_s[round(due_s / PERIOD_S)] for due_s in run.due_s]
        others[who] = {"mean_s": run.mean_s, "ours_on_same_s": sum(same) / len(same), "requests": len(same)}
        played[who] = [run]
    case = {
        "trace": name,
        "mean_s": mean,
        "best_static": best,
        "ours_over_best_static": mean[OURS] / mean[best],
        "ours_over_oracle": mean[OURS] / mean[ORACLE],
        "switches": {who: [p.num_switches for p in runs] for who, runs in played.items() if who not in world.plans},
        "answered_by": dict(Counter(str(plan_of(world, p, bench)) for p in ours.plans)),
        "on_a_few_requests": others,
        "output_mismatches": sum(p.mismatches for runs in played.values() for p in runs),
        "latencies_s": {who: [round(s, 4) for s in runs[0].latencies_s] for who, runs in played.items() if who in mean},
    }
    shown = {who: f"{1e3 * s:.1f}" for who, s in mean.items()}
    ratios = f"{case['ours_over_best_static']:.3f} of {best}, {case['ours_over_oracle']:.3f} of the oracle"
    print(f"{name}: {shown} ms; {ratios}; {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return case


def plan_of(world: World, identity: str, bench: Bench) -> str:
    """A plan's text by its identity."""
    known = {plan.identity(): str(plan) for plan in (*world.plans.values(), *bench.session.plans)}
    return known.get(identity, identity[:12])


def static(world: World, name: str) -> Contender:
    """One static plan."""
    base = contender("device_only", world.captured.graph, world.cluster, world.profile)
    return Contender(name=name, plans=PlanSet(primary=world.plans[name]), policy=base.policy)


if __name__ == "__main__":
    sys.exit(main())
