"""Accuracy by cut and bits on the bundled network, whole plans beside the sum of their crossings, and how soon drift shows.

Not judged. The table is A(cut, codec) on 102 frames of 49 CIFAR-10 test photographs where ../shared/data has them, else on
the 40 shipped frames. `compositions_refuted`: whole plans that surely lose more than the sum rule says; `compositions_safe`:
share that loses no more than the sum; `sum_minus_measured_points`: mean of the difference. `fewest_bits_at_1_point`: the
bits per element (before any lossless coder) that the median cut bears at a loss of at most 1 point, DynO's b*(p).
`drift_comparisons`: compared requests until drift is raised once the lens is out of focus (box of 5 pixels), median.
Run: python -m benchmarks.accuracy_table [--json FILE] [--quick]
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import report
from benchmarks.photographs import SHARED, TEST, mosaics, photographs
from ecotone import codec
from ecotone.accuracy import AccuracyTable, Cell, Composition
from ecotone.cli.demo_model import example_inputs, frames, tilenet
from ecotone.codec import ImageSpec
from ecotone.model import Captured, capture
from ecotone.profiling import check_composition, measure_accuracy, random_crossings
from ecotone.profiling.composition import predicted_points
from ecotone.profiling.decisions import count_differing, decided
from ecotone.protocol.drift import Drift, DriftWatch

PIXELS = ImageSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CODECS = (
    "fp16", "int8", "int6", "int4", "int3", "int2", "int4c", "int3c", "int2c", "int4clip", "int3clip", "int2clip",
    "jpeg:95", "jpeg:90", "jpeg:75", "jpeg:50", "webp:80",
)  # fmt: skip
NUM_CHAINS = 24
LEAST_POINTS = 0.3  # of the sum: with less there is nothing to compare
SERVED = (5, "int4")  # the narrow map at stride 8, as plans cut there
BLURS = (1, 3, 5, 9, 15)  # width of the box that each pixel is the mean of
SHOWN_BLUR = 5


def main(argv: Sequence[str] | None = None) -> None:
    options = report.arguments(__doc__ or "", argv)
    torch.manual_seed(options.seed)
    pixels, labels, origin = calibration_set(4 if options.quick else None)
    captured = capture(tilenet(), example_inputs(), name="TileNet")
    samples = [(frame[None],) for frame in pixels]
    with tempfile.TemporaryDirectory() as folder:  # nothing is taken from an earlier run
        names = CODECS[:6] if options.quick else CODECS
        table = measure_accuracy(captured, samples, labels, codecs=names, image=PIXELS, path=f"{folder}/table.json")
    chains = random_crossings(
        captured.graph, table, 6 if options.quick else NUM_CHAINS, seed=options.seed,
        is_wanted=lambda chain: predicted_points(table, chain) >= LEAST_POINTS,
    )  # fmt: skip
    found = check_composition(captured, table, samples, labels, chains, image=PIXELS)
    drift = drift_cases(captured, table, pixels)
    print_table(table)
    print_compositions(found)
    figures = {
        "decisions": float(table.cells[0].num_decisions),
        "reference_points": table.reference_points,
        "compositions_refuted": float(sum(c.is_refuted for c in found)),
        "compositions_safe": sum(c.is_safe for c in found) / len(found),
        "sum_minus_measured_points": sum(c.predicted_points - c.loss_points for c in found) / len(found),
        "fewest_bits_at_1_point": report.median([fewest_bits(table, p) for p in inner(table)]),
        "drift_comparisons": next(case["comparisons"] for case in drift if case["blur"] == SHOWN_BLUR),
    }
    cases = {"cells": [cell_case(c) for c in table.cells if c.position >= 0], "drift": drift}
    cases["compositions"] = [composition_case(c) for c in found]
    report.finish(options.json, figures, cases, report.context(options.seed, network="TileNet", frames=origin))


def calibration_set(count: int | None) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Frames [n, 3, 224, 224] in [0, 1], labels [n, 7, 7], and where they are from."""
    if not (SHARED / TEST).is_file() or count:
        pixels, labels = frames(count)
        return pixels, labels, f"{len(pixels)} shipped frames"
    pixels, labels = mosaics(*photographs(SHARED / TEST))
    return pixels, labels, f"{len(pixels)} mosaics of CIFAR-10 test photographs"


def inner(table: AccuracyTable) -> list[int]:
    positions = sorted({c.position for c in table.cells if c.position >= 0})
    return positions[1:-1]


def fewest_bits(table: AccuracyTable, position: int) -> float:
    """The fewest bits per element at which this cut loses at most 1 point."""
    cells = [c for c in table.cells if c.position == position and c.fitted_points <= 1]
    return float(min(codec.info(c.codec).bits for c in cells))


def drift_cases(captured: Captured, table: AccuracyTable, pixels: torch.Tensor) -> list[dict[str, Any]]:
    """Frames out of focus: what share of decisions of a plan with one crossing then differs, and when that is raised."""
    cut, name = SERVED
    cell = table.cell(cut, name)
    assert cell is not None
    head, tail = captured.segment(0, cut), captured.segment(cut, captured.graph.num_blocks)
    first, rest, labels = head.module(), tail.module(), [spec.name for spec in head.outputs]
    cases = []
    for width in BLURS:
        shares = []
        for frame in pixels[:40]:
            x = torch.nn.functional.avg_pool2d(frame[None], width, 1, width // 2, count_include_pad=False)
            with torch.no_grad():
                body = codec.pack(list(zip(labels, first(x), strict=True)), name)
                differ, total = count_differing(decided(rest(*codec.unpack(body))), decided(captured.reference((x,))))
            shares.append(differ / total)
        times = [until_raised(shares, cell.disagreement_high, random.Random(round_)) for round_ in range(21)]
        cases.append(
            {"blur": width, "disagreement": sum(shares) / len(shares), "expected": cell.disagreement_high,
             "comparisons": report.median(times)}
        )  # fmt: skip
    return cases


def until_raised(shares: Sequence[float], rate: float, dice: random.Random, limit: int = 5000) -> float:
    """Comparisons until drift is raised, the shares drawn at random; `limit` where it is not."""
    watch = DriftWatch()
    for number in range(1, limit + 1):
        if isinstance(watch.seen(dice.choice(shares), rate), Drift):
            return number
    return limit


def print_table(table: AccuracyTable) -> None:
    """Fitted points lost, one row per cut; a star where the interval holds more than 1 point and the fit does not."""
    names = list(dict.fromkeys(c.codec for c in table.cells if c.position > 0))
    print("cut " + "".join(f"{name:>10}" for name in names))
    for position in sorted({c.position for c in table.cells if c.position >= 0}):
        cells = [table.cell(position, name) for name in names]
        marks = ["*" if c and c.fitted_points <= 1 < c.high_points else " " for c in cells]
        row = "".join(f"{c.fitted_points:9.2f}{m}" if c else " " * 10 for c, m in zip(cells, marks, strict=True))
        print(f"{position:3d} {row}")
    pictures = [c for c in table.cells if c.position == 0 and c.codec not in names]
    print("    " + ", ".join(f"{c.codec} {c.fitted_points:.2f}" for c in pictures))


def print_compositions(found: Sequence[Composition]) -> None:
    print(f"{'crossings':44s}{'sum':>7}{'measured':>10}   interval")
    for c in found:
        mark = "too low" if c.is_refuted else ""
        print(f"{c!s:44s}{c.predicted_points:7.2f}{c.loss_points:10.2f}   {c.low_points:.2f} to {c.high_points:.2f} {mark}")


def cell_case(cell: Cell) -> dict[str, Any]:
    names = (
        "position",
        "codec",
        "loss_points",
        "low_points",
        "high_points",
        "fitted_points",
        "disagreement",
        "design_effect",
    )
    return {name: getattr(cell, name) for name in names}


def composition_case(c: Composition) -> dict[str, Any]:
    return {
        "crossings": str(c), "predicted_points": c.predicted_points, "loss_points": c.loss_points,
        "low_points": c.low_points, "high_points": c.high_points,
    }  # fmt: skip


if __name__ == "__main__":
    main()
