"""Edge-PRUNE's claims (arXiv 2204.12947): an SSD-MobileNet-shaped tracker over a device and a server 10 times faster.

Real processes on emulated links, captured, profiled, planned and deployed as a user would; the server is this computer as
it is, the device the same computer stretched tenfold, both with one thread and the same executor. Latency of a frame runs
from hand-in at the device to boxes at the device. At each rate device only, full offload of raw pixels, of JPEG 90, and the
planner's plan take turns; `speedup_*` is device only over the planner's plan, medians. The planner may not cost the answer
more than JPEG 90 costs it (the rule of split_latency); raw and JPEG are what they are.

Sweep: every cut that was profiled, from full offload (cut 0) to device only, one crossing there and one back, in two
families: float32 tensors, as Edge-PRUNE itself sends them, and at each cut the quickest codec that keeps the same rule (at
cut 0 also as a picture). Predicted at many rates, measured at a few (but plans predicted to take over FAR times device
only): see cases, and the PNG that is written beside FILE.

cut_moves_later is 1 where in both families, over falling rates, the best cut never moves to an earlier position and
somewhere moves to a later one: in the planner's plans of at most two stages, and among the measured cuts (those within TIE
of the best count as equally good).
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.split_world import IMAGE, Bench, Sample, profile_of, star, stretched, with_rate
from benchmarks.tracker import SIZE, tracker, tracks
from ecotone import codec
from ecotone.cli.demo_model import frame_paths, read_frame
from ecotone.cluster import Cluster
from ecotone.cost import CostModel
from ecotone.model import Captured, capture
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner import Latency, PlannerError, baselines, solve
from ecotone.profile import Profile
from ecotone.runtime import launch

DEVICES, SLOWDOWNS, LATENCY_S = ("device", "server"), (10.0, 1.0), 0.002
EXECUTOR, JPEG, OUTPUT_CODEC = "torch:fp32", "jpeg:90", "fp32"
CODECS = (*codec.CANDIDATES, "int4clip+zstd", *(c.name for c in codec.catalogue() if c.is_image))
RATES_MBIT = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 1000)
JUDGED_MBIT = 50
FLOAT32, ANY = "float32", "any_codec"
SWEPT_MBIT = {FLOAT32: (5, 25, 100), ANY: (0.2, 1.2, 50)}  # measured over all cuts
PREDICTED_MBIT = tuple(float(r) for r in np.geomspace(1000, 0.1, 41))
ROUNDS, SWEEP_ROUNDS, TIE, FAR = 5, 2, 0.05, 2.0
PICTURE = -1  # in a sweep: cut 0 under an image codec
FAMILIES = {FLOAT32: ("fp32",), ANY: CODECS}
OURS, ALONE = "ecotone", "device_only"
BASELINES = {ALONE: ALONE, "full_offload_raw": "server_only_raw", "full_offload_jpeg": "server_only_jpeg"}


@dataclass(frozen=True, slots=True)
class World:
    """What all parts of the benchmark share."""

    captured: Captured
    cluster: Cluster
    profile: Profile
    samples: list[Sample]
    limit: float  # on the relative error: what JPEG 90 costs

    def at(self, rate_mbit: float) -> Cluster:
        return with_rate(self.cluster, rate_mbit * 1e6 / 8)


@dataclass(slots=True)
class Curve:
    """All cuts of a family at one rate: the plan, the predicted seconds and what was measured."""

    family: str
    rate_mbit: float
    plans: dict[int, Plan]
    predicted_s: dict[int, float]
    measured_s: dict[int, list[float]] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    """Measure; returns 0."""
    options = report.arguments(__doc__.splitlines()[0] if __doc__ else "", argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    world = prepared(options.quick, options.seed)
    print(f"captured and profiled in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    rates = RATES_MBIT[1::3] if options.quick else RATES_MBIT
    curves = [curve(world, name, r) for name, swept in SWEPT_MBIT.items() for r in (swept[1::2] if options.quick else swept)]
    with launch(world.cluster, unshaped=True) as nodes:
        bench = Bench(nodes, LATENCY_S)
        bench.open(world.captured, world.cluster, contenders(world, world.at(JUDGED_MBIT))[0][OURS], world.samples)
        cells = [cell(bench, world, rate, 1 if options.quick else ROUNDS) for rate in rates]
        measure_curves(bench, world, curves, 1 if options.quick else SWEEP_ROUNDS)
        bench.close()
    planned = {name: planned_cuts(world, codecs) for name, codecs in FAMILIES.items()}
    chosen = {name: best_cuts(falling(curves, name)) for name in FAMILIES}
    speedups = {case["rate_mbit_per_s"]: case["speedup"] for case in cells}
    top = max(speedups, key=lambda rate: speedups[rate])
    figures = {
        "speedup_50mbit": speedups.get(JUDGED_MBIT, 0.0),
        "speedup_max": speedups[top],
        "cut_moves_later": float(
            all(moves_later([{cut} for _, cut in found]) for found in planned.values())
            and all(moves_later(found) for found in chosen.values())
        ),
    }
    if options.json:
        draw(Path(options.json).with_suffix(".png"), world, curves)
    cases = {
        "speedup_max_rate_mbit_per_s": top, "rates": cells, "planned_cuts": planned,
        "measured_best_cuts": {
            name: [[c.rate_mbit, sorted(cuts)] for c, cuts in zip(falling(curves, name), found, strict=True)]
            for name, found in chosen.items()
        },
        "sweep": [as_case(c) for c in curves],
    }  # fmt: skip
    about = report.context(
        options.seed, executor=EXECUTOR, threads=1, slowdowns=SLOWDOWNS, latency_s=LATENCY_S, tie=TIE,
        accuracy_rule=f"relative error at most that of {JPEG}: {world.limit:.4f}",
        inputs=f"mosaics of CIFAR-10 photographs, resized to 1x3x{SIZE}x{SIZE}, and {len(tracks())} tracks",
        weights="He initialisation, settled batch norms: untrained; accuracy means nothing here",
        seconds=round(time.perf_counter() - began),
    )  # fmt: skip
    report.finish(options.json, figures, cases, about)
    return 0


def prepared(quick: bool, seed: int) -> World:
    """The tracker captured and profiled, and the error that JPEG 90 costs it."""
    samples = frames(3)
    captured = capture(tracker(seed), samples[0], name="ssd_mobilenet_tracker")
    cluster = star(DEVICES, SLOWDOWNS, 1e9, LATENCY_S)
    profile = profile_of(captured, cluster, samples, EXECUTOR, CODECS, quick, captured.graph.num_blocks + 1)
    profile = stretched(profile, dict(zip(DEVICES, SLOWDOWNS, strict=True)))
    costs = {p.codec: p.relative_error for p in profile.payloads if p.position == 0}
    return World(captured, cluster, profile, samples, costs[JPEG])


def frames(count: int) -> list[Sample]:
    """Pictures of the tracker's size in whole 8-bit steps, normalised, each with the tracks of the frame before."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE.mean, IMAGE.std))
    found = []
    for path in frame_paths()[:count]:
        pixels = torch.nn.functional.interpolate(read_frame(path), size=(SIZE, SIZE), mode="bilinear")
        found.append((((pixels * 255).round() / 255 - mean) / std, tracks()))
    return found


# ---- the contenders at one rate ----------------------------------------------------------------------------------------


def contenders(world: World, cluster: Cluster) -> tuple[dict[str, Plan], dict[str, float]]:
    """Plans by name and their predicted seconds."""
    graph, profile = world.captured.graph, world.profile
    plans = {OURS: best(world, cluster)}
    for name, rule in BASELINES.items():
        asked = (f"codec={JPEG},{OUTPUT_CODEC}",) if rule == "server_only_jpeg" else ()
        plans[name] = baselines.place(rule, graph, cluster, profile, ("error=1e9", *asked))
    model = CostModel(graph, cluster, profile)
    return plans, {name: model.predict(plan).latency_s for name, plan in plans.items()}


def best(world: World, cluster: Cluster, *more: str) -> Plan:
    """The planner's quickest plan under the rule."""
    asked = (f"error={world.limit:.9g}", *more)
    return solve(world.captured.graph, cluster, world.profile, Latency(), asked, num_runners_up=0).plan


def cell(bench: Bench, world: World, rate_mbit: float, rounds: int) -> dict[str, Any]:
    """All contenders in turn at one rate; what is over three times device only is measured in the first round only."""
    cluster = world.at(rate_mbit)
    plans, predicted = contenders(world, cluster)
    distinct = {plan.identity(): plan for plan in plans.values()}
    expected = {plan.identity(): predicted[name] for name, plan in plans.items()}
    seconds: dict[str, list[float]] = {key: [] for key in distinct}
    for number in range(rounds):
        for key, plan in distinct.items():
            if number == 0 or expected[key] < 3 * predicted[ALONE]:
                count = 1 if expected[key] > 0.2 else len(world.samples)
                seconds[key] += bench.run(plan, cluster, world.samples[:count]).latencies_s
    measured = {name: report.median(seconds[plan.identity()]) for name, plan in plans.items()}
    line = {name: round(1e3 * s, 1) for name, s in measured.items()}
    print(f"{rate_mbit:g} Mbit/s: {line} ms | {plans[OURS]}", file=sys.stderr)
    return {
        "rate_mbit_per_s": rate_mbit,
        "speedup": measured[ALONE] / measured[OURS],
        "latency_s": measured,
        "predicted_s": predicted,
        "count": {name: len(seconds[plan.identity()]) for name, plan in plans.items()},
        "plans": {name: str(plan) for name, plan in plans.items()},
    }


# ---- the sweep over all cuts -------------------------------------------------------------------------------------------


def curve(world: World, family: str, rate_mbit: float) -> Curve:
    """The best plan of each cut, and what it is predicted to take."""
    model = CostModel(world.captured.graph, world.at(rate_mbit), world.profile)
    found = Curve(family, rate_mbit, {}, {})
    for cut in (PICTURE, *world.profile.cuts):
        plans = [one_cut(world, max(cut, 0), name) for name in codecs_at(world, family, cut)]
        costs = [(model.predict(plan), plan) for plan in plans]
        usable = [(cost.latency_s, i) for i, (cost, _) in enumerate(costs) if cost.relative_error <= world.limit]
        if usable:
            found.predicted_s[cut], chosen = min(usable)
            found.plans[cut] = plans[chosen]
    return found


def codecs_at(world: World, family: str, cut: int) -> tuple[str, ...]:
    """What was measured for this frontier."""
    if cut == world.captured.graph.num_blocks:
        return (LOCAL,)
    measured = [p.codec for p in world.profile.payloads if p.position == max(cut, 0) and p.codec in FAMILIES[family]]
    return tuple(name for name in measured if codec.info(name).is_image == (cut == PICTURE))


def one_cut(world: World, cut: int, name: str) -> Plan:
    """Blocks before `cut` on the device, the rest on the server, its outputs back."""
    graph = world.captured.graph
    device, server = (d.name for d in world.cluster.devices)
    placed = [(device, 0, cut), (server, cut, graph.num_blocks)]
    stages = tuple(Stage(device=d, start=a, stop=b, executor=EXECUTOR) for d, a, b in placed if a < b)
    ends = [device, *(s.device for s in stages), device]
    at = [0, *(s.stop for s in stages)]
    transfers = tuple(
        Transfer(source=a, target=b, position=p, codec=LOCAL if a == b else OUTPUT_CODEC if a == server else name)
        for a, b, p in zip(ends, ends[1:], at, strict=False)
    )
    return Plan(graph_hash=graph.content_hash(), stages=stages, transfers=transfers)


def measure_curves(bench: Bench, world: World, curves: list[Curve], rounds: int) -> None:
    """All cuts at all swept rates in turn, one counted request each per round."""
    for number in range(rounds):
        for cut in (PICTURE, *world.profile.cuts):
            for found in curves:
                if found.predicted_s.get(cut, math.inf) < FAR * found.predicted_s[world.captured.graph.num_blocks]:
                    result = bench.run(found.plans[cut], world.at(found.rate_mbit), world.samples[:1])
                    found.measured_s.setdefault(cut, []).extend(result.latencies_s)
        print(f"sweep: round {number + 1} of {rounds} done", file=sys.stderr)


def planned_cuts(world: World, codecs: tuple[str, ...]) -> list[tuple[float, int]]:
    """(rate in Mbit/s, cut) of the planner's best plan of at most two stages, from the highest rate to the lowest."""
    found = []
    for rate in PREDICTED_MBIT:
        plan = best(world, world.at(rate), "stages=2", f"codec={','.join(codecs)}")
        own = [stage.stop for stage in plan.stages if stage.device == plan.source]
        if len(plan.stages) == 2 and plan.stages[0].device != plan.source:
            raise PlannerError(f"at {rate:g} Mbit/s the best plan begins on the server: no cut describes {plan}")
        found.append((rate, max(own, default=0)))
    return found


def falling(curves: list[Curve], family: str) -> list[Curve]:
    return sorted((c for c in curves if c.family == family), key=lambda c: -c.rate_mbit)


def best_cuts(curves: list[Curve]) -> list[set[int]]:
    """Of each curve the cuts measured within TIE of the quickest."""
    found = []
    for each in curves:
        seconds = {cut: report.median(values) for cut, values in each.measured_s.items()}
        found.append({max(cut, 0) for cut, s in seconds.items() if s <= (1 + TIE) * min(seconds.values())})
    return found


def moves_later(choices: list[set[int]]) -> bool:
    """Whether one cut of each set makes a sequence that never falls and somewhere rises."""
    at = first = min(choices[0])
    for cuts in choices[1:]:
        later = [cut for cut in cuts if cut >= at]
        if not later:
            return False
        at = min(later)
    return at > first


def as_case(found: Curve) -> dict[str, Any]:
    """All cuts of one rate, for the JSON."""
    rows = [
        {
            "cut": max(cut, 0),
            "is_picture": cut == PICTURE,
            "predicted_s": found.predicted_s[cut],
            "measured_s": found.measured_s.get(cut, []),
            "plan": str(plan),
        }
        for cut, plan in found.plans.items()
    ]
    return {"family": found.family, "rate_mbit_per_s": found.rate_mbit, "cuts": rows}


def draw(path: Path, world: World, curves: list[Curve]) -> None:
    """Predicted lines and measured dots over all cuts, a panel per family and a colour per rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = world.captured.graph.num_blocks
    figure, panels = pyplot.subplots(1, len(FAMILIES), figsize=(12, 4.5), sharey=True)
    for axes, family in zip(panels, FAMILIES, strict=True):
        for number, found in enumerate(falling(curves, family)):
            colour = f"C{number}"
            cuts = [cut for cut in found.predicted_s if cut != PICTURE]
            axes.plot(cuts, [1e3 * found.predicted_s[c] for c in cuts], color=colour, label=f"{found.rate_mbit:g} Mbit/s")
            measured = {c: 1e3 * report.median(v) for c, v in found.measured_s.items()}
            picture = measured.pop(PICTURE, None)
            axes.plot(list(measured), list(measured.values()), "o", color=colour, markersize=4)
            if picture is not None:
                axes.plot([0], [picture], "*", color=colour, markersize=11)
        axes.set_xlabel(f"cut: blocks on the device (0: full offload, {last}: device only)")
        axes.set_title(f"{family.replace('_', ' ')} on the wire")
        axes.set_ylim(0, FAR * 1e3 * curves[0].predicted_s[last])
        axes.legend()
    panels[0].set_ylabel("latency of a frame in ms")
    figure.suptitle("SSD-MobileNet tracker, server 10 times faster: predicted (lines), measured (dots; star: as a picture)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
