"""Does a measuring job: prepare each segment, verify it against eager float32, note its memory, then time all in turn.

Run as `python -m ecotone.profiling.work FOLDER` it is the process whose death is survived: it says on its standard output,
one JSON line each, what it begins and what came of it, so that whoever started it knows what killed it. Memory is the
resident high-water mark (Linux: VmHWM, reset after preparing) above what the process held before the segment was loaded,
weights included; preparing's own peak is not in it. On CUDA it is the allocator's peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ecotone import executors
from ecotone.executors import Compiled
from ecotone.executors.memory import keep_freed_memory
from ecotone.model.confidence import ExitRule
from ecotone.profiling.job import Frontiers, Job, Step, load_frontiers, load_segment, read_job
from ecotone.profiling.timing import Sweep, collector_off, median_and_spread, timed_s
from ecotone.units import EcotoneError

__all__ = ["Emit", "do_job", "error_of", "error_terms", "main", "relative_error"]

Emit = Callable[[dict[str, object]], None]


def relative_error(made: Sequence[Sequence[torch.Tensor]], wanted: Sequence[Sequence[torch.Tensor]]) -> float:
    """L2 norm of the difference over that of `wanted`, over all samples and tensors as one vector.

    A tensor that is not floating counts 1 per element that differs. Infinite where a value is not finite.
    """
    terms = [error_terms(mine, theirs) for mine, theirs in zip(made, wanted, strict=True)]
    return error_of(sum(difference for difference, _ in terms), sum(size for _, size in terms))


def error_terms(made: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Of one sample: the squared norm of the difference, and of what was wanted. They add up over samples."""
    difference = size = 0.0
    for a, b in zip(made, wanted, strict=True):
        if b.is_floating_point():
            x, y = a.double(), b.double()
            gap = torch.where((x == y) | (x.isnan() & y.isnan()), torch.zeros_like(x), x - y)  # inf == inf
            difference += float(gap.square().sum())
            size += float(torch.nan_to_num(y, posinf=0.0, neginf=0.0).square().sum())
        else:
            difference += float((a != b).sum())
            size += b.numel()
    return difference, size


def error_of(difference: float, size: float) -> float:
    """The relative error that summed `error_terms` make."""
    if difference == 0:
        return 0.0
    return float((difference / size) ** 0.5) if size else float("inf")


def do_job(folder: Path, emit: Emit) -> None:
    """Do the job in `folder`, saying each result through `emit`: "begin", then "failed" or "prepared", at last "timed"."""
    job = read_job(folder)
    frontiers = load_frontiers(folder)
    prepared: list[tuple[Step, Compiled, dict[str, object]]] = []
    for step in job.steps:
        key: dict[str, object] = {"executor": step.executor, "start": step.start, "stop": step.stop, "exit": step.exit}
        emit({"event": "begin"} | key)
        try:
            compiled, facts = _prepared(folder, job, step, frontiers)
        except Exception as error:
            reason = str(error) if isinstance(error, EcotoneError) else f"{type(error).__name__}: {error}"
            emit({"event": "failed", "reason": " ".join(reason.split())[:300]} | key)
            continue
        prepared.append((step, compiled, key | facts))
        emit({"event": "prepared"} | key)
    times = _timed(job, prepared, frontiers, emit)
    for (_, _, facts), taken in zip(prepared, times, strict=True):
        median, spread = median_and_spread(taken)
        emit({"event": "timed", "median_s": median, "spread_s": spread, "num_runs": len(taken)} | facts)


def _prepared(folder: Path, job: Job, step: Step, frontiers: Frontiers) -> tuple[Compiled, dict[str, object]]:
    inputs = frontiers.get(step.start, [()])
    wanted = frontiers.get(step.stop, [() for _ in inputs])
    before = _resident_bytes(job.accelerator)
    segment = load_segment(folder, step)
    if segment.program.exit is not None:
        wanted = [tuple(segment.module()(*tensors)) for tensors in inputs]
    executor = executors.with_calibration(executors.by_id(step.executor), inputs[1:])
    compiled = _deciding(executor.compile(segment, inputs[0], job.accelerator, job.threads), segment.program.exit)
    del segment
    _forget_peak(job.accelerator)
    made = [compiled(tensors) for tensors in inputs]
    memory = max(0, _peak_bytes(job.accelerator) - before)
    error = relative_error(made, wanted)
    if not error < float("inf"):
        raise EcotoneError(f"{step.executor}: the result holds values that are not finite; use another executor")
    return compiled, {"memory_bytes": memory, "relative_error": error}


def _deciding(compiled: Compiled, rule: ExitRule | None) -> Compiled:
    """A stage with an exit as a node runs it: its confidence is worked out as well."""
    if rule is None:
        return compiled

    def run(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        made = compiled(tensors)
        rule.of_request(made[-rule.num_outputs :])
        return made

    return run


def _timed(
    job: Job, prepared: list[tuple[Step, Compiled, dict[str, object]]], frontiers: Frontiers, emit: Emit
) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in prepared]
    if not prepared:
        return times
    sweep = Sweep()
    torch.set_num_threads(job.threads)
    with collector_off():
        for number in range(job.rounds):
            for (step, compiled, facts), taken in zip(prepared, times, strict=True):
                if number == 0:
                    key = {name: facts[name] for name in ("executor", "start", "stop", "exit")}
                    emit({"event": "begin"} | key)
                inputs = frontiers.get(step.start, [()])
                tensors = inputs[number % len(inputs)]
                sweep()
                taken.append(timed_s(lambda run=compiled, given=tensors: run(given)))  # type: ignore[misc]
            emit({"event": "round", "number": number})
    return times


def _status_bytes(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _trim() -> None:
    """Give freed memory back to the system, so that what the next segment takes shows."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes(accelerator: str) -> int:
    _trim()
    if accelerator.startswith("cuda"):
        return int(torch.cuda.memory_allocated(torch.device(accelerator)))
    return _status_bytes("VmRSS")


def _forget_peak(accelerator: str) -> None:
    _trim()
    if accelerator.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(torch.device(accelerator))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(accelerator: str) -> int:
    if accelerator.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(torch.device(accelerator)))
    return _status_bytes("VmHWM")


@contextlib.contextmanager
def _own_output() -> Iterator[Emit]:
    """An emitter on the real standard output, while everything else that prints there goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "w", buffering=1) as stream:
        yield lambda event: print(json.dumps(event), file=stream, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Do the job in the folder named; exit status 0."""
    keep_freed_memory()  # as a node does
    with _own_output() as emit:
        do_job(Path(arguments[0]), emit)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
