"""Measures one device: every executor on the whole model, then the best few on every prefix and suffix.

First pass: all executors on [0, L), quickly. Then, of those within the error asked, the fastest of each class of accuracy
(exact: below 1e-3, fine: below 0.02, coarse: the rest) goes on to the second pass over [0, c) and [c, L) for every
candidate cut c, and over the blocks before each exit with its head and without: the difference, decision included, is the
exit's time. Executors that take long to prepare (torch.compile, int8) take part where they are named, or where
nothing faster is there. O(cuts * executors kept) segments, in groups that fit into memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ecotone import executors
from ecotone.cluster import Device
from ecotone.codec import ImageSpec, is_picture
from ecotone.executors import ExecutorError
from ecotone.graph import Exit, Graph
from ecotone.model import Captured
from ecotone.profile import ExecutorFailure, ExitTime, SegmentTime
from ecotone.profiling.codecs import profile_codecs
from ecotone.profiling.isolation import COMMAND, Outcome, run_here, run_isolated
from ecotone.profiling.job import Frontiers, Job, Step, frontier_values, write_model
from ecotone.profiling.measurement import DeviceMeasurement, MeasureOptions, Progress
from ecotone.units import EcotoneError

__all__ = ["before_exits", "profile_device"]

GROUP_BYTES = 1 << 30  # weights of the segments that are held, and timed in turn, at once
CLASSES = (1e-3, 0.02, float("inf"))
QUICK = ("torch:fp32", "torch:bf16", "openvino:fp32", "openvino:bf16", "onnxruntime:fp32")
# How much faster an executor must be to be worth its preparation at every cut: export to ONNX, calibration, compilers.
PREPARATION = {"onnxruntime": 1.2, "torch-compile": 1.5}
CALIBRATION = 1.2

Run = Callable[[Path, Job], Outcome]


def profile_device(
    captured: Captured,
    device: Device,
    *,
    cuts: Sequence[int],
    samples: Sequence[Sequence[torch.Tensor]] = (),
    options: MeasureOptions | None = None,
    progress: Progress | None = None,
    frontiers: Frontiers | None = None,
    image: ImageSpec | None = None,
    command: Sequence[str] = COMMAND,
) -> DeviceMeasurement:
    """Measure `captured` on this machine as `device` (its accelerator, threads, executors; times stretched by slowdown).

    `cuts` ascend from 0 to L; `samples` are flat inputs, empty: the capture's examples; `frontiers` saves computing them;
    `image` says how pixels became the input. Raises EcotoneError where no executor runs the whole model.
    """
    options = options or MeasureOptions()
    cuts = tuple(cuts)
    samples = list(samples or [captured.example_inputs])[: options.max_samples]
    values = frontiers or frontier_values(captured, samples, cuts)
    names, failures = _candidates(device, options)
    inner = len(cuts) - 2
    steps = len(names) + options.screening_rounds + 2 * (inner + len(captured.graph.exits)) * options.keep + options.rounds
    bar = _Bar(progress, steps)

    def run(folder: Path, job: Job) -> Outcome:
        if options.isolate:
            return run_isolated(folder, job, bar.tick, options.step_timeout_s, command)
        return run_here(folder, job, bar.tick)

    length = captured.graph.num_blocks
    with tempfile.TemporaryDirectory(prefix="ecotone-measure-") as name:
        folder = Path(name)
        ranges = [(0, length), *((0, c) for c in cuts[1:-1]), *((c, length) for c in cuts[1:-1])]
        before = before_exits(captured.graph, cuts)
        pieces = [(start, place.position, name) for place, start in before for name in ("", place.name)]
        write_model(folder, captured, [*ranges, *pieces], values)
        whole = [Step(executor=executor, start=0, stop=length) for executor in names]
        outcomes = [_do(folder, device, whole, options.screening_rounds, run)]
        if not outcomes[0].timed:
            reasons = "; ".join(f"{step.executor}: {reason}" for step, reason in outcomes[0].failed)
            raise EcotoneError(f"device {device.name}: no executor runs this model: {reasons or 'none is available'}")
        kept = _kept(outcomes[0].timed, options)
        for group in _groups(captured, kept, cuts):
            outcomes.append(_do(folder, device, group, options.rounds, run))
        both = [Step(executor=name, start=a, stop=b, exit=exit_name) for a, b, exit_name in pieces for name in kept]
        exits = _exit_times(device, _do(folder, device, both, options.rounds, run)) if both else ()
    picture = next((t for t in values[cuts[0]][0] if t.is_floating_point() and is_picture(tuple(t.shape))), None)
    codecs = profile_codecs(device.name, options.codecs, image=image, picture=picture, frontiers=values, progress=bar.more)
    bar.finish()
    # The whole model is in every pass; the last pass is the thorough one.
    latest = {(e["executor"], e["start"], e["stop"]): e for outcome in outcomes for e in outcome.timed}
    found = [_segment_time(device, event) for event in latest.values()]
    failures += [_failure(device, step, reason) for outcome in outcomes for step, reason in outcome.failed]
    return DeviceMeasurement(
        device=device.name, segments=tuple(found), codecs=codecs, failures=tuple(failures), exits=exits
    ).for_device(device)


def before_exits(graph: Graph, cuts: Sequence[int]) -> list[tuple[Exit, int]]:
    """Each exit with the cut before it: between the two its time is measured."""
    return [(place, max(c for c in cuts if c < place.position)) for place in graph.exits]


def _exit_times(device: Device, outcome: Outcome) -> tuple[ExitTime, ...]:
    """With head and decision less without, per executor and exit; one that failed has none."""
    plain = {(e["executor"], e["stop"]): e["median_s"] for e in outcome.timed if not e["exit"]}
    return tuple(
        ExitTime(
            device=device.name, executor=e["executor"], exit=e["exit"], relative_error=e["relative_error"],
            median_s=max(0.0, e["median_s"] - plain[e["executor"], e["stop"]]),
        )
        for e in outcome.timed
        if e["exit"] and (e["executor"], e["stop"]) in plain
    )  # fmt: skip


def _candidates(device: Device, options: MeasureOptions) -> tuple[list[str], list[ExecutorFailure]]:
    """Ids to try on `device`, and those that were named but cannot work."""
    named = [e for e in options.executors if not device.executors or e in device.executors] or list(device.executors)
    if not named:
        working = [executor.id for executor in executors.catalogue(device.accelerator)]
        quick = [executor for executor in working if executor in QUICK]
        fast = any(not executor.startswith("torch:") for executor in quick)
        return quick if fast else working, []
    names, failures = [], []
    for name in dict.fromkeys(named):
        try:
            reason = executors.by_id(name).available(device.accelerator)
        except ExecutorError as error:
            reason = str(error)
        if reason:
            failures.append(ExecutorFailure(device=device.name, executor=name, start=0, stop=0, reason=reason))
        else:
            names.append(name)
    return names, failures


def _kept(timed: Sequence[dict[str, Any]], options: MeasureOptions) -> list[str]:
    """The fastest of each class of accuracy within the error asked; a coarser class must also be faster."""
    within = [e for e in timed if e["relative_error"] <= options.max_error] or [
        min(timed, key=lambda e: e["relative_error"])
    ]
    kept: list[dict[str, Any]] = []
    for low, high in zip((-1.0, *CLASSES), CLASSES, strict=False):
        members = [e for e in within if low < e["relative_error"] <= high]
        best = min(members, key=_worth_s, default=None)
        if best is not None and all(best["median_s"] < e["median_s"] for e in kept):
            kept.append(best)
    # The fastest first: a small `keep` drops what is slower.
    return [e["executor"] for e in sorted(kept, key=lambda e: e["median_s"])[: options.keep]]


def _worth_s(event: dict[str, Any]) -> float:
    """Seconds of a run, weighted by the trouble of preparing the executor."""
    name, _, precision = str(event["executor"]).partition(":")
    return float(event["median_s"]) * PREPARATION.get(name, 1.0) * (CALIBRATION if precision == "int8" else 1.0)


def _groups(captured: Captured, names: Sequence[str], cuts: Sequence[int]) -> list[list[Step]]:
    """Steps in groups of at most GROUP_BYTES of weights; prefix and suffix of one cut stay together."""
    length = captured.graph.num_blocks
    whole_bytes = captured.graph.segment_parameter_bytes(0, length) * len(names)
    per_group = max(1, GROUP_BYTES // max(1, whole_bytes))
    inner = list(cuts[1:-1])
    groups = []
    # Every n-th cut, not n neighbours: what disturbs one group then disturbs no one stretch of the model.
    count = -(-len(inner) // per_group)
    for first in range(count):
        spans = [span for c in inner[first::count] for span in ((0, c), (c, length))]
        groups.append([Step(executor=name, start=a, stop=b) for a, b in [(0, length), *spans] for name in names])
    return groups


def _do(folder: Path, device: Device, steps: Sequence[Step], rounds: int, run: Run) -> Outcome:
    return run(folder, Job(accelerator=device.accelerator, threads=device.threads, rounds=rounds, steps=tuple(steps)))


def _failure(device: Device, step: Step, reason: str) -> ExecutorFailure:
    return ExecutorFailure(device=device.name, executor=step.executor, start=step.start, stop=step.stop, reason=reason)


def _segment_time(device: Device, event: dict[str, Any]) -> SegmentTime:
    names = ("executor", "start", "stop", "median_s", "spread_s", "memory_bytes", "relative_error", "num_runs")
    return SegmentTime(device=device.name, **{name: event[name] for name in names})


class _Bar:
    """Counts steps for a progress callback; the total is an estimate, never below what is done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def tick(self, what: str) -> None:
        self.done += 1
        self.total = max(self.total, self.done)
        if self.progress:
            self.progress(self.done, self.total, what)

    def more(self, _done: int, _total: int, what: str) -> None:
        self.tick(what)

    def finish(self) -> None:
        if self.progress:
            self.progress(self.total, self.total, "measured")
