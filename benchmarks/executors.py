"""ResNet-50 by every executor beside eager float32: how much faster is the best one that stays accurate.

Claim: the fastest executor whose logits differ from eager float32 by at most 0.2 (L2, relative) is at least 8 times as
fast as eager float32 (the faster of NCHW and channels_last) on a processor with AMX, 3 times without. One thread, one
224x224 picture, He initialisation and real batch-norm statistics, all contenders in turn within each round. Pictures
are CIFAR-10 photographs tiled 7x7 where ../shared/data has them, else seeded smooth noise; the one that is timed does
not calibrate.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import models, report
from benchmarks.photographs import SHARED, SIDE, TEST, mosaics, photographs
from ecotone import executors
from ecotone.executors import Executor, ExecutorError
from ecotone.model import Segment, capture
from ecotone.profiling.work import relative_error

THREADS = 1
MAX_ERROR = 0.2
CALIBRATION = 16
TESTED = 4
ROUNDS = 25
SLOW_TO_PREPARE = ("torch-compile:fp32",)  # minutes for little: --quick leaves both compilers out
Pictures = list[torch.Tensor]


def pictures(count: int, seed: int) -> tuple[Pictures, str]:
    """`count` pictures 1x3x224x224 about zero mean and unit variance, and where they come from."""
    if not (SHARED / TEST).is_file():
        return list(models.pictures(count, seed=seed).split(1)), "seeded smooth noise"
    rows, _ = mosaics(*photographs(SHARED / TEST, SIDE**2 * count))
    return list(((rows - rows.mean()) / rows.std()).split(1)), "CIFAR-10 test photographs, 7x7 of them per picture"


def compiled_all(
    segment: Segment, calibration: Pictures, names: Sequence[str]
) -> tuple[dict[str, executors.Compiled], dict[str, str]]:
    """Each executor that can, prepared, and the reasons of those that cannot."""
    ready: dict[str, executors.Compiled] = {}
    reasons: dict[str, str] = {}
    for name in names:
        executor: Executor = executors.by_id(name)
        reason = executor.available("cpu")
        if not reason:
            try:
                tuned = executors.with_calibration(executor, [(p,) for p in calibration[1:]])
                ready[name] = tuned.compile(segment, calibration[:1], "cpu", THREADS)
            except ExecutorError as error:
                reason = str(error)
        if reason:
            reasons[name] = reason
        print(f"  {name:20s} {reason or 'ready'}", file=sys.stderr)
    return ready, reasons


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the figures."""
    asked = report.arguments(__doc__.splitlines()[0], argv)
    torch.set_num_threads(THREADS)
    model, _ = models.resnet50()
    shots, origin = pictures(CALIBRATION + TESTED, asked.seed)
    calibration, tested = shots[:CALIBRATION], shots[CALIBRATION:]
    captured = capture(model, (tested[0],), name="resnet50")
    segment = captured.segment(0, captured.graph.num_blocks)
    names = [e for e in executors.IDS if not e.startswith("torch-compile:") or not (asked.quick or e in SLOW_TO_PREPARE)]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ECOTONE_CACHE"] = cache  # prepared here, by this version, from this calibration
        ready, reasons = compiled_all(segment, calibration, names)
        layouts = {"eager NCHW": model, "eager channels_last": models.resnet50()[0].to(memory_format=torch.channels_last)}
        with torch.no_grad():
            wanted = [(model(x),) for x in tested]
            # Accuracy of every contender first, then time, so that no contender is timed with a broken answer.
            errors = {name: relative_error([run([x]) for x in tested], wanted) for name, run in ready.items()}
            x, x_last = tested[0], tested[0].to(memory_format=torch.channels_last)
            contenders: dict[str, Any] = {
                "eager NCHW": lambda: layouts["eager NCHW"](x),
                "eager channels_last": lambda: layouts["eager channels_last"](x_last),
            }
            contenders |= {name: (lambda run=run: run([x])) for name, run in ready.items()}
            seconds = report.interleaved(contenders, 5 if asked.quick else ROUNDS, warm_up=3)
    medians = {name: report.median(taken) for name, taken in seconds.items()}
    eager = min(medians["eager NCHW"], medians["eager channels_last"])
    good = {name: medians[name] for name in ready if errors[name] <= MAX_ERROR}
    best = min(good, key=lambda name: good[name])
    cases = [
        {"name": name, "median_s": value, "over_eager": eager / value, "relative_error": errors.get(name, 0.0)}
        for name, value in medians.items()
    ]
    figures = {"resnet50_best_over_eager": eager / good[best], "resnet50_relative_error": errors[best]}
    about = report.context(asked.seed, threads=THREADS, best=best, pictures=origin, not_run=reasons)
    for case in sorted(cases, key=lambda c: c["median_s"]):
        line = f"{case['median_s'] * 1e3:8.2f} ms  {case['over_eager']:6.2f} x  {case['relative_error']:.4f}"
        print(f"  {case['name']:22s} {line}")
    report.finish(asked.json, figures, cases, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
