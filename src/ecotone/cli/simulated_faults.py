"""`ecotone simulate --faults`: reads a script or draws one, and says what came of the requests that it touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from ecotone.cli.tables import listing, seconds
from ecotone.cli.workflow import read_file
from ecotone.planset import PlanSet
from ecotone.simulator import Fault, Report
from ecotone.simulator.draw import draw_faults
from ecotone.simulator.faults import devices_of
from ecotone.simulator.script import read_script, write_script
from ecotone.units import EcotoneError

__all__ = ["drawn_faults", "fault_document", "fault_tables", "read_faults_file"]

_MOST_ROWS = 20
_RANDOM_FAULTS = 4


def read_faults_file(text: str, devices: tuple[str, ...], load_plan: Callable[[str], PlanSet]) -> tuple[Fault, ...]:
    """The script of a file; of "random:SEED" nothing yet (drawn_faults), but the seed is checked."""
    kind, _, seed = text.partition(":")
    if kind == "random" and not seed.isdigit():
        raise EcotoneError(f'--faults "{text}" is not understood; write a file, or random:7 for a script drawn from a seed')
    if not text or kind == "random":
        return ()
    return read_script(read_file(Path(text)).decode(errors="replace"), devices, f"script {text}", load_plan=load_plan)


def drawn_faults(text: str, devices: tuple[str, ...], record: bool, span_s: float) -> tuple[Fault, ...]:
    """The script of "random:SEED" within `span_s`; devices[0] is the asker."""
    if len(devices) < 2:
        raise EcotoneError("--faults random: the plan runs on one device alone; there is nobody else to fail")
    return draw_faults(np.random.default_rng(int(text.partition(":")[2])), devices, record, span_s, _RANDOM_FAULTS)


def fault_document(report: Report, script: tuple[Fault, ...], calm: Report) -> dict[str, Any]:
    """What --json says about faults: what happened, when results came again, and whom it touched."""
    touched = [o for o in report.outcomes if o.error or o.num_runs > 1]
    return {
        "lost": sum(bool(o.error) for o in report.outcomes) + report.num_unended,
        "duplicated": report.num_duplicated,
        "rerouted": sum(o.num_runs > 1 for o in report.outcomes),
        "mean_s_without_faults": calm.mean_s,
        "faults": [
            {
                "at_s": fault.at_s,
                "what": type(fault).__name__,
                "devices": list(devices_of(fault)),
                "next_result_after_s": recovery_s(report, fault.at_s),
            }
            for fault in script
        ],
        "touched": [
            {
                "request": o.request, "runs": o.num_runs, "plan": o.epoch, "latency_s": o.latency_s, "error": o.error,
                "reason": o.reason,
            }
            for o in touched
        ],
    }  # fmt: skip


def recovery_s(report: Report, at_s: float) -> float | None:
    """From `at_s` to the next result; None where none came."""
    return next((o.ended_s - at_s for o in report.completed if o.ended_s >= at_s), None)


def fault_tables(report: Report, script: tuple[Fault, ...], calm: Report, plans: PlanSet) -> list[Table | str]:
    """The script with the time to the next result after each fault, and the requests that ran again or were lost."""
    happened = listing("at", "what", "next result after")
    happened.title_justify = "left"
    for fault in script:
        after_s = recovery_s(report, fault.at_s)
        lines = write_script((fault,)).partition("[[fault]]")[2].split("\n")
        what = ", ".join(line for line in lines if line and not line.startswith("at = "))
        happened.add_row(seconds(fault.at_s), escape(what), "none came" if after_s is None else seconds(after_s))
    touched = [o for o in report.outcomes if o.error or o.num_runs > 1]
    lost = sum(bool(o.error) for o in report.outcomes) + report.num_unended
    head = (
        f"{len(report.outcomes)} requests: {len(report.completed)} answered, {lost} lost, "
        f"{report.num_duplicated} answered twice, {sum(o.num_runs > 1 for o in report.outcomes)} ran again; "
        f"mean {seconds(report.mean_s)}, without faults {seconds(calm.mean_s)}"
    )
    made: list[Table | str] = [happened, head]
    if touched:
        rows = listing("request", "runs", "latency", "came of it")
        for o in touched[:_MOST_ROWS]:
            names = {plan.epoch: f"answered by plan {i + 1} of the set" for i, plan in enumerate(plans.plans)}
            came = f"{o.error}: {o.reason}" if o.error else names.get(o.epoch, f"answered by plan {o.epoch}")
            rows.add_row(str(o.request), str(o.num_runs), seconds(o.latency_s), escape(came))
        made.append(rows)
        if len(touched) > _MOST_ROWS:
            made.append(f"and {len(touched) - _MOST_ROWS} more; --json names all")
    return made
