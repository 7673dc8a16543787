"""DynO's claims (arXiv 2104.09949): throughput of a device and a server 20 times faster, cut and precision chosen together.

The bundled network on frames of 49 CIFAR-10 photographs; real processes on emulated links of 0.5 to 100 Mbit/s; one executor
and one thread for all. At each rate these take turns, a stream of frames each: device only; server only with raw pixels and
with JPEG 90; a float32 split as Neurosurgeon's, here at the cut of best *throughput*; int8 at the fixed cut in the middle of
the FLOP; and ours, the planner's plan of fewest bytes among those within 1 % of the best throughput, with half a point of
accuracy to lose by its table, which is of photographs that nothing was trained on: the other half is for what a table of
1,960 decisions cannot know. Counted here are the answers of test frames, as they came out of the running pipeline. Equal
plans share a measurement.

`ours_over_best_min`: ours over the best of all five, at the worst rate. `ours_over_float32_offloaders_max`: over the better
of raw and float32 split. `bytes_ratio_to_float32_split`: what the packing saves, DynO's claim: bytes to the server of a
float32 split at the cut of ours over those of ours, median over rates. `bytes_ratio_to_best_float32_split`: the same of the
contender, which cuts elsewhere, both ways. `accuracy_loss_points`: worst plan of ours against the whole network, by labels.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.photographs import HELD_OUT, SIDE, TEST, TRAIN, files_in, frames_of, offer_folder, photographs
from benchmarks.split_world import Bench, Sample, star, stretched, with_rate
from ecotone import codec, profiling
from ecotone.cli.demo_model import example_inputs, tilenet
from ecotone.cluster import Cluster
from ecotone.codec import ImageSpec
from ecotone.cost import CostModel
from ecotone.model import Captured, capture
from ecotone.plan import Plan
from ecotone.planner import Throughput, baselines, parse_objective, solve
from ecotone.profile import Profile
from ecotone.runtime import launch

DEVICES, FASTER, LATENCY_S = ("device", "server"), 20.0, 0.002
RATES_MBIT = (0.5, 1, 2, 5, 10, 20, 50, 100)
EXECUTOR, JPEG, OUTPUT_CODEC = "torch:fp32", "jpeg:90", "fp32"
PIXELS = ImageSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CODECS = (*codec.CANDIDATES, "int8+rans", "int6+rans", *codec.IMAGE_CANDIDATES)
OBJECTIVE, BUDGET_POINTS = "throughput~1%,bytes", 0.5
IN_FLIGHT, ROUNDS, SECONDS, FEWEST, MOST = 4, 3, 2.5, 3, 60  # of a stream: frames beside those that fill and drain it
FAR = 4.0  # times slower than ours: measured in the first round only
OURS, ALONE, RAW, PICTURE, FLOAT32, INT8 = (
    "ecotone", "device_only", "server_only_raw", "server_only_jpeg", "float32_split", "fixed_int8_middle",
)  # fmt: skip
COLOURS = {OURS: "C3", ALONE: "C7", RAW: "C0", PICTURE: "C1", FLOAT32: "C2", INT8: "C4"}


@dataclass(frozen=True, slots=True)
class World:
    """What all rates share."""

    captured: Captured
    cluster: Cluster
    profile: Profile
    frames: list[tuple[Sample, torch.Tensor]]

    def at(self, rate_mbit: float) -> Cluster:
        return with_rate(self.cluster, rate_mbit * 1e6 / 8)


@dataclass(slots=True)
class Ran:
    """What a plan did at one rate; `right` and `reference` count tiles that it and the whole network name right."""

    per_s: list[float] = field(default_factory=list)
    bytes_per_frame: float = 0.0
    bytes_up: float = 0.0
    right: int = 0
    reference: int = 0
    tiles: int = 0


def main(argv: list[str] | None = None) -> int:
    """Measure; 0, or 2 where there are no photographs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write figures, cases and context to FILE, curves to a PNG beside it")
    parser.add_argument("--quick", action="store_true", help="three rates, one round; not the judged figures")
    parser.add_argument("--seed", type=int, default=0)
    offer_folder(parser)
    options = parser.parse_args(argv)
    files = files_in(options.data)
    if files is None:
        print(f"dyno: {TRAIN} or {TEST} is missing in {options.data}; nothing measured", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    began = time.perf_counter()
    world = prepared(files, options.quick)
    print(f"captured and profiled in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    with launch(world.cluster, unshaped=True) as nodes:
        bench = Bench(nodes, LATENCY_S, PIXELS)
        first = contenders(world, world.at(RATES_MBIT[-1]))[OURS]
        bench.open(world.captured, world.cluster, first, [s for s, _ in world.frames[:2]])
        rates = RATES_MBIT[1::3] if options.quick else RATES_MBIT
        cells = [cell(bench, world, rate, 1 if options.quick else ROUNDS) for rate in rates]
        bench.close()
    if options.json:
        draw(Path(options.json).with_suffix(".png"), cells)
    about = report.context(
        options.seed, executor=EXECUTOR, threads=1, faster=FASTER, latency_s=LATENCY_S, in_flight=IN_FLIGHT,
        budget=f"{BUDGET_POINTS:g} points by the accuracy table of {HELD_OUT} held-out photographs",
        frames=len(world.frames), seconds=round(time.perf_counter() - began),
    )  # fmt: skip
    report.finish(options.json, figures(cells), {"rates": cells}, about)
    return 0


def prepared(files: tuple[Path, Path], quick: bool) -> World:
    """The network, its profile with the accuracy table of held-out photographs, and test frames with labels."""
    held = frames_of(*photographs(files[0], -(HELD_OUT // 4 if quick else HELD_OUT)))
    test = frames_of(*photographs(files[1], (10 if quick else 102) * SIDE**2))
    captured = capture(tilenet(), example_inputs(), name="TileNet")
    cluster = star(DEVICES, (FASTER, 1.0), 1e9, LATENCY_S)
    plain = replace(cluster, devices=tuple(replace(d, slowdown=1.0) for d in cluster.devices))
    options = profiling.MeasureOptions(
        executors=(EXECUTOR,), codecs=CODECS, keep=1, rounds=5 if quick else 11, max_samples=2
    )
    with tempfile.TemporaryDirectory(prefix="ecotone-dyno-") as folder:
        made = profiling.measure(
            captured, plain, samples=[inputs for inputs, _ in held], labels=[t[0] for _, t in held], options=options,
            image=PIXELS, path=f"{folder}/profile.json",
        )  # fmt: skip
    slow = dict(zip(DEVICES, (FASTER, 1.0), strict=True))
    return World(captured, cluster, stretched(made, slow), test)


def contenders(world: World, cluster: Cluster) -> dict[str, Plan]:
    """Plans by name."""
    graph, profile = world.captured.graph, world.profile
    asked = (f"accuracy_loss={BUDGET_POINTS}",)
    plans = {OURS: solve(graph, cluster, profile, parse_objective(OBJECTIVE), asked, num_runners_up=0).plan}
    anything = ("accuracy_loss=100", "error=1e9")
    for name in (ALONE, RAW, INT8):
        plans[name] = baselines.place(name, graph, cluster, profile, anything)
    plans[PICTURE] = baselines.place(PICTURE, graph, cluster, profile, (*anything, f"codec={JPEG},{OUTPUT_CODEC}"))
    plain = (*anything, "codec=fp32", "stages=2")
    plans[FLOAT32] = solve(graph, cluster, profile, Throughput(), plain, num_runners_up=0).plan
    return plans


def cell(bench: Bench, world: World, rate_mbit: float, rounds: int) -> dict[str, Any]:
    """All contenders in turn at one rate."""
    cluster = world.at(rate_mbit)
    plans, model = contenders(world, cluster), CostModel(world.captured.graph, cluster, world.profile)
    distinct = {plan.identity(): plan for plan in plans.values()}
    expected = {key: model.predict(plan).throughput_per_s for key, plan in distinct.items()}
    ran = {key: Ran() for key in distinct}
    ours = expected[plans[OURS].identity()]
    for number in range(rounds):
        for key, plan in distinct.items():
            if number == 0 or expected[key] * FAR > ours:
                stream(bench, world, cluster, plan, expected[key], number, ran[key])
    measured = {name: report.median(ran[plan.identity()].per_s) for name, plan in plans.items()}
    print(f"{rate_mbit:g} Mbit/s: { {n: round(v, 2) for n, v in measured.items()} } /s | {plans[OURS]}", file=sys.stderr)
    mine = ran[plans[OURS].identity()]
    return {
        "rate_mbit_per_s": rate_mbit,
        "throughput_per_s": measured,
        "predicted_per_s": {name: expected[plan.identity()] for name, plan in plans.items()},
        "bytes_per_frame": {name: ran[plan.identity()].bytes_per_frame for name, plan in plans.items()},
        "bytes_up_per_frame": mine.bytes_up,
        "float32_bytes_at_the_cut": float32_bytes(world, plans[OURS]),
        "loss_points": {name: loss_points(ran[plan.identity()]) for name, plan in plans.items()},
        "tiles": mine.tiles,
        "rounds": {name: len(ran[plan.identity()].per_s) for name, plan in plans.items()},
        "float32_split_offloads": len(plans[FLOAT32].cuts) > 0 or plans[FLOAT32].stages[0].device != DEVICES[0],
        "plans": {name: str(plan) for name, plan in plans.items()},
    }


def stream(bench: Bench, world: World, cluster: Cluster, plan: Plan, per_s: float, number: int, into: Ran) -> None:
    """One stream of test frames; other ones in each round."""
    count = min(MOST, max(FEWEST, round(SECONDS * per_s))) + 2 * IN_FLIGHT
    start = number * count % len(world.frames)
    taken = list(itertools.islice(itertools.cycle(world.frames), start, start + count))
    rate, outputs, traces = bench.streamed(plan, cluster, [inputs for inputs, _ in taken], IN_FLIGHT)
    into.per_s.append(rate)
    sizes = [(t.target, t.size_bytes) for trace in traces for t in trace.transfers]
    into.bytes_per_frame = sum(size for _, size in sizes) / len(traces)
    into.bytes_up = sum(size for target, size in sizes if target == DEVICES[1]) / len(traces)
    for (inputs, labels), logits in zip(taken, outputs, strict=True):
        whole = world.captured.reference(inputs)[0]
        into.right += int((logits.argmax(dim=1) == labels).sum())
        into.reference += int((whole.argmax(dim=1) == labels).sum())
        into.tiles += labels.numel()


def float32_bytes(world: World, plan: Plan) -> float:
    """Bytes in float32 of what `plan` sends to the server."""
    graph = world.captured.graph
    return float(sum(graph.frontier_bytes(t.position) for t in plan.transfers if t.target == DEVICES[1] and not t.is_local))


def loss_points(ran: Ran) -> float:
    """Points of accuracy that the plan lost against the whole network on the frames that it was given."""
    return 100 * (ran.reference - ran.right) / ran.tiles


def figures(cells: list[dict[str, Any]]) -> dict[str, float | None]:
    """The judged numbers."""
    over: dict[str, list[float]] = {"best": [], "alone": [], "float32": []}
    for found in cells:
        rate = found["throughput_per_s"]
        mine = rate[OURS]
        over["best"].append(mine / max(rate[name] for name in (ALONE, RAW, PICTURE, FLOAT32, INT8)))
        over["alone"].append(mine / rate[ALONE])
        over["float32"].append(mine / max(rate[RAW], rate[FLOAT32]))
    packed = [f["float32_bytes_at_the_cut"] / f["bytes_up_per_frame"] for f in cells if f["bytes_up_per_frame"]]
    sent = [
        found["bytes_per_frame"][FLOAT32] / max(1.0, found["bytes_per_frame"][OURS])
        for found in cells
        if found["float32_split_offloads"]
    ]
    return {
        "ours_over_best_min": min(over["best"]),
        "ours_over_device_only_max": max(over["alone"]),
        "ours_over_float32_offloaders_max": max(over["float32"]),
        "bytes_ratio_to_float32_split": report.median(packed) if packed else None,
        "bytes_ratio_to_best_float32_split": report.median(sent) if sent else None,
        "accuracy_loss_points": max(found["loss_points"][OURS] for found in cells),
        "ours_over_jpeg_max": max(f["throughput_per_s"][OURS] / f["throughput_per_s"][PICTURE] for f in cells),
        "ours_over_jpeg_min": min(f["throughput_per_s"][OURS] / f["throughput_per_s"][PICTURE] for f in cells),
        "ours_over_int8_max": max(f["throughput_per_s"][OURS] / f["throughput_per_s"][INT8] for f in cells),
        "ours_over_int8_min": min(f["throughput_per_s"][OURS] / f["throughput_per_s"][INT8] for f in cells),
    }


def draw(path: Path, cells: list[dict[str, Any]]) -> None:
    """Throughput over link rate, measured (lines) and predicted (dots)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = [found["rate_mbit_per_s"] for found in cells]
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8))
    for name, colour in COLOURS.items():
        measured = [found["throughput_per_s"][name] for found in cells]
        axes.plot(rates, measured, color=colour, linewidth=2.5 if name == OURS else 1.2, label=name.replace("_", " "))
        axes.plot(rates, [found["predicted_per_s"][name] for found in cells], "o", color=colour, markersize=4, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlabel="link rate in Mbit/s", ylabel="frames per second")
    axes.set_title(f"TileNet, server {FASTER:g} times faster: measured (lines), predicted (dots)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
