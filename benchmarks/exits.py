"""Early exits of the bundled network (BranchyNet, ICPR 2016; SPINN, 2008.06402): compute saved within a budget of accuracy.

Exits are those that ship (trained with the backbone frozen by examples/train_tile_exits.py). Thresholds are chosen on
photographs that neither backbone nor exits learnt from, with the upper end of the loss's interval within the budget, and
then judged on test photographs, which were looked at for nothing else. Saved is the mean share of the whole network's FLOP,
heads that were tried counted as spent; lost is points of accuracy against the whole network's own final answers, by labels.

"On test frames" can be read in two ways. *Tile*, the judged one: the network is fully convolutional, and each 32x32 tile of
a test frame is a request with one decision, as in the papers. *Frame*: a whole frame of 49 tiles leaves or goes on as one;
its confidence is a mean over 49 decisions, frames are nearly alike, so exits are close to all or nothing, and 40 held-out
frames cannot prove half a point. Where test photographs lost more than the budget, nothing counts as saved. `cases` has
both readings, thresholds by the middle of the interval beside those by its upper end, entropy and margin beside top
probability, the first exit alone, predicted beside observed exit rates, the curve of accuracy over compute (drawn beside
FILE) and a running pipeline: device and server, latency and throughput with exits beside those without, in turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.exits_run import pipeline
from benchmarks.photographs import HELD_OUT, SIDE, TEST, TRAIN, files_in, frames_of, offer_folder, photographs
from ecotone.cli.demo_model import EXITS, tilenet
from ecotone.model import Captured, capture
from ecotone.model.confidence import MEASURES
from ecotone.model.exit_file import read_exits
from ecotone.model.exit_training import Sample
from ecotone.profiling.calibration import Result, calibrate, judge, spent_flop
from ecotone.profiling.exit_outcomes import CalibrationError, Outcomes, observe, observed

JUDGED = "tile"
BUDGETS = {"half": 0.5, "one": 1.0}
CURVE = np.linspace(0.2, 1.0, 81)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a request is, and what the exits did on held-out and on test photographs."""

    name: str
    captured: Captured
    held: list[Sample]
    test: list[Sample]


def main(argv: list[str] | None = None) -> int:
    """Measure; 0, or 2 where there are no test photographs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write figures, cases and context to FILE")
    parser.add_argument("--quick", action="store_true", help="a tenth of the photographs; not the judged figures")
    parser.add_argument("--seed", type=int, default=0)
    offer_folder(parser)
    options = parser.parse_args(argv)
    files = files_in(options.data)
    if files is None:
        print(f"exits: {TRAIN} or {TEST} is missing in {options.data}; nothing measured", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    began = time.perf_counter()
    held, test = photographs(files[0], -HELD_OUT), photographs(files[1], 10 * SIDE**2 if options.quick else 102 * SIDE**2)
    found: dict[str, Any] = {}
    frames, tiles = readings(held, test)
    for reading in (frames, tiles):
        found[reading.name] = case(reading)
        print(f"{reading.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    found["pipeline"] = pipeline(frames.captured, observe(frames.captured, frames.held), frames.test, options.quick)
    figures = {
        f"compute_saved_at_{name}_point": saved(found[JUDGED]["budgets"][name], budget) for name, budget in BUDGETS.items()
    }
    if options.json:
        draw(Path(options.json).with_suffix(".png"), found)
    about = report.context(
        options.seed, seconds=round(time.perf_counter() - began), exits=EXITS.name, held_out=len(held[0]), test=len(test[0]),
        rule="thresholds from held-out photographs, the upper end of the loss within the budget; judged on test photographs",
    )  # fmt: skip
    report.finish(options.json, figures, found, about)
    return 0


def readings(held: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]) -> list[Reading]:
    """Both, frames first, with the shipped exits."""
    file = read_exits(EXITS)
    whole = file.attach(capture(tilenet(), (torch.rand(1, 3, SIDE * 32, SIDE * 32),), name="TileNet"))
    alone = file.attach(capture(tilenet(), (torch.rand(1, 3, 32, 32),), name="TileNet, one tile", dynamic_batch=True))
    tiles = [
        list(zip(((x / 255,) for x in p.float().split(245)), t[:, None, None].split(245), strict=True))
        for p, t in (held, test)
    ]
    return [Reading("frame", whole, frames_of(*held), frames_of(*test)), Reading("tile", alone, tiles[0], tiles[1])]


# ---- one reading -------------------------------------------------------------------------------------------------------


def case(reading: Reading) -> dict[str, Any]:
    """Everything that is said of one reading."""
    graph, rules = reading.captured.graph, [head.rule for head in reading.captured.exits]
    every = [rules, *([replace(rule, measure=measure) for rule in rules] for measure in MEASURES)]
    (known, *held), (fresh, *test) = (observed(reading.captured, data, every) for data in (reading.held, reading.test))
    whole = graph.segment_flop(0, graph.num_blocks)
    measures = {
        measure: {name: chosen(reading.captured, *pair, budget) for name, budget in BUDGETS.items()}
        for measure, *pair in zip(MEASURES, held, test, strict=True)
    }
    spent = (spent_flop(graph, known.exits) / whole).tolist()
    return {
        "requests": {"held_out": len(known), "test": len(fresh), "decisions_each": known.decisions},
        "exits": [
            {
                "name": head.name, "flop_before": graph.segment_flop(0, head.position) / whole,
                "flop_of_head": place.flop / whole, "rule": f"{head.rule.measure}, {head.rule.over}",
                "accuracy_held_out": float(known.right[:, i].mean()), "accuracy_test": float(fresh.right[:, i].mean()),
            }
            for i, (head, place) in enumerate(zip(reading.captured.exits, graph.exits, strict=True))
        ],
        "end": {"accuracy_held_out": float(known.final.mean()), "accuracy_test": float(fresh.final.mean())},
        "budgets": {name: chosen(reading.captured, known, fresh, budget) for name, budget in BUDGETS.items()},
        "budgets_by_mean": {
            name: chosen(reading.captured, known, fresh, budget, bound="mean") for name, budget in BUDGETS.items()
        },
        "first_exit_alone": shown(judge(fresh, graph, known.exits[:1], (0.0,))),
        "first_exit_and_end": {
            name: chosen(reading.captured, known.of(known.exits[:1]), fresh.of(known.exits[:1]), budget)
            for name, budget in BUDGETS.items()
        },
        "by_measure": measures,
        "rates": rates(reading.captured, known, fresh),
        "curve": [[float(t), *shown(judge(fresh, graph, known.exits, [t] * len(known.exits))).values()] for t in CURVE],
        "spent_when_leaving": spent,
    }  # fmt: skip


def chosen(captured: Captured, known: Outcomes, fresh: Outcomes, budget: float, bound: str = "high") -> dict[str, Any]:
    """The policy that saves the most on held-out data within the budget, and what it does on test data."""
    graph = captured.graph
    try:
        policies = calibrate(known, graph, budgets=(budget,), bound=bound)
    except CalibrationError as error:
        return {"policy": str(error), "test": {"saved": 0.0, "lost_points": 0.0}}
    results = [(judge(known, graph, p.exits, p.thresholds), p) for p in policies]
    seen, policy = max(results, key=lambda pair: pair[0].saved)
    test = judge(fresh, graph, policy.exits, policy.thresholds)
    return {
        "policy": policy.name, "thresholds": list(policy.thresholds), "held_out": shown(seen),
        "predicted_loss_points": policy.loss_points,
        "predicted_interval": [policy.low_points, policy.high_points], "test": shown(test),
    }  # fmt: skip


def saved(case: dict[str, Any], budget: float) -> float:
    """What counts: nothing, where test photographs lost more than the budget."""
    test = case["test"]
    return float(test["saved"]) if test["lost_points"] <= budget else 0.0


def shown(result: Result) -> dict[str, Any]:
    return {"saved": result.saved, "lost_points": result.loss_points, "shares": list(result.shares)}


def rates(captured: Captured, known: Outcomes, fresh: Outcomes) -> dict[str, Any]:
    """Shares that leave at common thresholds: predicted from held-out data, observed on test data."""
    rows = []
    for threshold in np.linspace(0.3, 0.98, 18):
        predicted, observed = (
            judge(o, captured.graph, known.exits, [float(threshold)] * len(known.exits)).shares for o in (known, fresh)
        )
        rows.append({"threshold": float(threshold), "predicted": list(predicted), "observed": list(observed)})
    errors = [abs(a - b) for row in rows for a, b in zip(row["predicted"], row["observed"], strict=True)]
    return {"mean_error": float(np.mean(errors)), "largest_error": float(np.max(errors)), "by_threshold": rows}


def draw(path: Path, found: dict[str, Any]) -> None:
    """Accuracy over compute: one threshold for all exits, from sure to unsure, and the chosen policies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, name in enumerate(("tile", "frame")):
        rows = found[name]["curve"]
        compute, lost = [100 * (1 - row[1]) for row in rows], [-row[2] for row in rows]
        axes.plot(compute, lost, color=f"C{number}", label=f"a request is a {name}")
        for budget in BUDGETS:
            test = found[name]["budgets"][budget]["test"]
            axes.plot([100 * (1 - test["saved"])], [-test["lost_points"]], "o", color=f"C{number}")
    axes.axvline(100, color="0.8", linewidth=1)
    axes.set_xlabel("mean FLOP of a request, % of the whole network (heads included)")
    axes.set_ylabel("points of accuracy against the end")
    axes.set_ylim(-12, 1)
    axes.legend()
    axes.set_title("Early exits of TileNet on test photographs: one threshold (lines), calibrated (dots)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
