"""Runs a measuring job in a process of its own and survives its death.

A native crash (signal), an exit or a standstill is charged to the step that was begun last: it is noted as failed, and a
new process goes on with the others. An executor that kills twice is not tried again. So a job of n steps needs at most
n + 1 processes. The process is started afresh (no fork: torch's threads do not survive one).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from ecotone import units
from ecotone.profiling.job import Job, Step, write_job
from ecotone.profiling.work import do_job

__all__ = ["COMMAND", "Outcome", "run_here", "run_isolated"]

COMMAND = (sys.executable, "-m", "ecotone.profiling.work")
DEATHS_TOLERATED = 2


@dataclass(slots=True)
class Outcome:
    """What came of a job so far: "timed" events, and (step, reason) of those that failed."""

    timed: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[Step, str]] = field(default_factory=list)


def run_here(folder: Path, job: Job, tick: Any) -> Outcome:
    """Do the job in this process; a crash is not survived."""
    outcome = Outcome()
    write_job(folder, job)
    do_job(folder, lambda event: _note(outcome, event, tick))
    return outcome


def run_isolated(folder: Path, job: Job, tick: Any, step_timeout_s: float, command: Sequence[str] = COMMAND) -> Outcome:
    """Do the job in processes of its own; `tick(text)` is called at each step and round."""
    outcome = Outcome()
    deaths: dict[str, int] = {}
    while job.steps:
        write_job(folder, job)
        part = Outcome()
        culprit, reason = _run_once(folder, job, part, tick, step_timeout_s, command)
        outcome.failed.extend(part.failed)
        if culprit is None:
            outcome.timed.extend(part.timed)
            break
        gone = {step for step, _ in part.failed} | {culprit}
        outcome.failed.append((culprit, reason))
        deaths[culprit.executor] = deaths.get(culprit.executor, 0) + 1
        if deaths[culprit.executor] >= DEATHS_TOLERATED:
            rest = [s for s in job.steps if s.executor == culprit.executor and s not in gone]
            outcome.failed.extend((s, f"not tried: this executor killed its process twice ({reason})") for s in rest)
            gone.update(rest)
        job = replace(job, steps=tuple(s for s in job.steps if s not in gone))
    return outcome


def _run_once(
    folder: Path, job: Job, part: Outcome, tick: Any, step_timeout_s: float, command: Sequence[str]
) -> tuple[Step | None, str]:
    """One process; (None, "") when it did the whole job, else the step that it died of and how."""
    source = str(Path(units.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "PYTHONPATH": path}
    current = job.steps[0]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, stderr=errors, env=environment)
        try:
            assert process.stdout is not None
            lines = _lines(process.stdout)
            while (line := lines.get(timeout=step_timeout_s)) is not None:
                event = json.loads(line)
                if event["event"] == "begin":
                    current = _step(event)
                _note(part, event, tick)
            status = process.wait(timeout=step_timeout_s)
        except (queue.Empty, subprocess.TimeoutExpired):
            return current, f"did not come back within {step_timeout_s:g} s"
        except ValueError:
            return current, "its process wrote something that is not an event"
        finally:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
        return (None, "") if status == 0 else (current, _cause(status, errors))


def _lines(stream: IO[bytes]) -> queue.SimpleQueue[bytes | None]:
    """The lines of `stream` as they come, then None; a thread reads, so that waiting can have an end."""
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in stream:
                lines.put(line)
        stream.close()
        lines.put(None)

    threading.Thread(target=read, name="ecotone-measure", daemon=True).start()
    return lines


def _cause(status: int, errors: IO[bytes]) -> str:
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "unknown"
        return f"its process died of signal {-status} ({name})"
    errors.seek(0)
    last = errors.read()[-2000:].decode(errors="replace").strip().splitlines()
    return f"its process ended with status {status}" + (f": {last[-1][:200]}" if last else "")


def _note(outcome: Outcome, event: dict[str, Any], tick: Any) -> None:
    kind = event["event"]
    if kind == "timed":
        outcome.timed.append(event)
    elif kind == "failed":
        outcome.failed.append((_step(event), event["reason"]))
    if kind in ("failed", "prepared", "round"):
        tick(f"{event['executor']} [{event['start']}, {event['stop']})" if "executor" in event else "timing")


def _step(event: dict[str, Any]) -> Step:
    return Step(executor=event["executor"], start=event["start"], stop=event["stop"], exit=event.get("exit", ""))
