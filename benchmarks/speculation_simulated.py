"""Adaptive speculation on the virtual clock: against plain decoding, every fixed window of a set, and formulas.

Worlds are drawn by seed: 1 to 6 equal stages of 2 to 50 ms, hops of 0 to 100 ms, 1 to 6 requests, rows that cost as much as
a frame or nothing, a drafter that names each token rightly with a known chance and takes 0 to 100 ms for it. The drafter
knows the true text (simulator/hashmodel.py), so acceptance is exactly what was asked for. In the same worlds without a
drafter plain decoding is measured, and fixed windows with the same drafts.

    over_plain_min       adaptive over plain tokens per second, the worst world
    over_best_median     adaptive over the best fixed window (plain among them) of each world; over_best_min: the worst
    table_error_max      frames of W = 6, 16, 32 against the table of the methods (15 ms stages, T = 378 ms)
    over_formula_min     adaptive gain over T/((1-a)T + a*tau), one request, T = 378 ms, tau = 15 ms, a from 0.5 to 0.97
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks import report
from ecotone.decoding.speculation import FixedPolicy, SpeculationPolicy, Window
from ecotone.decoding.window import AdaptivePolicy
from ecotone.simulator.generation_line import run_line

WORLDS = 80
WINDOWS = [Window(frames=w, rows=k) for w, k in ((4, 1), (16, 1), (32, 1), (1, 2), (1, 4), (1, 8), (4, 4))]
TABLE = {0.5: (5.0, 5.1, 5.1), 0.74: (8.0, 9.1, 9.2), 0.9: (11.9, 18.3, 19.6), 0.97: (14.5, 30.6, 38.4)}
T, TAU = 0.378, 0.015


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    stages: int
    stage_s: float
    hop_s: float
    accuracy: float
    draft_s: float
    requests: int
    are_rows_free: bool

    def run(self, policy: SpeculationPolicy | None) -> float:
        """Tokens per second."""
        return run_line(**asdict(self), policy=policy, tokens=200)[0]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = report.arguments((__doc__ or "").splitlines()[0], argv)
    random = np.random.default_rng(options.seed)
    worlds = [measured(draw(random)) for _ in range(WORLDS // 10 if options.quick else WORLDS)]
    table = list(itertools.chain.from_iterable(table_row(a) for a in TABLE))
    formula = [formula_row(a) for a in TABLE]
    over_best = [w["adaptive"] / w["best"] for w in worlds if w["accuracy"] > 0]
    figures = {
        "worlds": len(worlds),
        "over_plain_min": min(w["adaptive"] / w["plain"] for w in worlds),
        "over_best_median": report.median(over_best),
        "over_best_min": min(over_best),
        "table_error_max": max(abs(row["per_s"] / row["table"] - 1) for row in table),
        "over_formula_min": min(row["over_formula"] for row in formula),
    }
    cases = {"worlds": worlds, "table": table, "formula": formula}
    report.finish(options.json, figures, cases, report.context(options.seed))
    return 0


def draw(random: np.random.Generator) -> Case:
    """A world."""
    return Case(
        stages=int(random.choice([1, 2, 4, 6])), stage_s=float(random.choice([0.002, 0.01, 0.05])),
        hop_s=float(random.choice([0.0, 0.001, 0.005, 0.02, 0.1])), requests=int(random.choice([1, 1, 1, 2, 6])),
        accuracy=float(random.choice([0.0, 0.0, 0.3, 0.6, 0.85, 0.97])), are_rows_free=bool(random.random() < 0.5),
        draft_s=float(random.choice([0.0, 0.0, 0.001, 0.01, 0.1])),
    )  # fmt: skip


def measured(case: Case) -> dict:
    """Tokens per second: plain, adaptive, and of the best window."""
    plain, adaptive = case.run(None), case.run(AdaptivePolicy())
    fixed = {"plain": plain}
    for window in WINDOWS if case.accuracy else ():
        policy = FixedPolicy(window=window, most_requests=99)
        fixed[f"{window.frames}x{window.rows}"] = case.run(policy)
    best = max(fixed, key=lambda name: fixed[name])
    return {**asdict(case), "plain": plain, "adaptive": adaptive, "best": fixed[best], "best_window": best}


def table_row(accuracy: float) -> list[dict]:
    """Frames of three depths, beside the table's figure."""
    found = []
    for frames, expected in zip((6, 16, 32), TABLE[accuracy], strict=True):
        policy = FixedPolicy(window=Window(frames=frames))
        per_s = report.median([slow_line(policy, accuracy, seed) for seed in range(3)])
        found.append({"accuracy": accuracy, "frames": frames, "per_s": per_s, "table": expected})
    return found


def formula_row(accuracy: float) -> dict:
    """The adaptive policy's gain over plain decoding, over the formula for endless depth."""
    gain = report.median([slow_line(AdaptivePolicy(), accuracy, seed) for seed in range(3)]) * T
    formula = T / ((1 - accuracy) * T + accuracy * TAU)
    return {"accuracy": accuracy, "gain": gain, "formula": formula, "over_formula": gain / formula}


def slow_line(policy: SpeculationPolicy, accuracy: float, seed: int) -> float:
    """Tokens per second over six stages of 15 ms and hops of 48 ms."""
    return run_line(6, stage_s=TAU, hop_s=0.048, policy=policy, accuracy=accuracy, tokens=600, seed=seed)[0]


if __name__ == "__main__":
    sys.exit(main())
