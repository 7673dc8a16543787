"""What lies around a plan, for `ecotone plan`: other worlds (--what-if) and what less of a quantity costs (--pareto)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ecotone import schema
from ecotone.cli.asked import parse_arrivals, parse_objective
from ecotone.cli.console import err, out
from ecotone.cli.tables import listing, seconds
from ecotone.cli.workflow import Work
from ecotone.cluster import Cluster
from ecotone.planner import TIE, Front, Objective, Requirement, Solution, WhatIf, pareto, what_if
from ecotone.planner.objective import first_of, shown
from ecotone.planner.pareto import check_axis
from ecotone.planner.what_if import check_change
from ecotone.profile import Profile
from ecotone.simulator.score import percentile
from ecotone.units import EcotoneError
from ecotone.web.front import Dot, front_png

__all__ = ["Around", "check_around"]

_LABELS = {
    "latency": ("latency, ms", 1e3), "p95": ("95 % of latencies under, ms", 1e3),
    "throughput": ("slowest part, ms", 1e3), "bytes": ("bytes per request, kB", 1e-3),
    "energy": ("energy per request, J", 1.0), "server": ("servers busy per request, ms", 1e3),
    "money": ("money per request", 1.0), "accuracy_loss": ("accuracy loss, points", 1.0),
    "accuracy_loss_sure": ("accuracy loss at most, points", 1.0), "error": ("relative error", 1.0),
    "memory": ("memory of the fullest device, MB", 1e-6), "stages": ("stages", 1.0),
}  # fmt: skip


def check_around(axis: str, plot: Path | None, objective: str, changes: Sequence[str], cluster: Cluster) -> None:
    """Raises EcotoneError for what is not understood or does not go together, before anything is measured."""
    for change in changes:
        check_change(cluster, change)
    if axis:
        check_axis(axis, parse_objective(objective))
    if plot and not axis:
        raise EcotoneError("--plot draws the front of --pareto; add --pareto bytes, or another quantity")


@dataclass(frozen=True, slots=True)
class Around:
    """Answers to --what-if and --pareto beside the plan `today`."""

    name: str
    today: Solution
    objective: Objective
    changes: tuple[WhatIf, ...]
    front: Front | None

    @staticmethod
    def of(
        work: Work, made: Profile, today: Solution, objective: Objective, require: Sequence[Requirement],
        changes: Sequence[str], axis: str, arrivals: str = "",
    ) -> Around:  # fmt: skip
        """Solve for each change and along the axis, where asked; raises PlannerError."""
        kept, world = tuple(require), (work.captured.graph, work.cluster, made)
        p95 = percentile(parse_arrivals(arrivals or "closed:1"))
        answers = tuple(what_if(*world, today.plan, each, objective, kept, tie=TIE, p95=p95) for each in changes)
        front = pareto(*world, objective, axis, kept, p95=p95 if axis == "p95" else None) if axis else None
        return Around(work.captured.graph.name, today, objective, answers, front)

    def document(self) -> dict[str, Any]:
        """What was asked for, for JSON."""
        told = {"what_if": schema.write(self.changes)} if self.changes else {}
        return told | ({"front": schema.write(self.front)} if self.front else {})

    def show(self) -> None:
        """Tables on the terminal; nothing where nothing was asked."""
        if self.changes:
            out.print()
            out.print(self._changes_table())
        if self.front:
            out.print()
            out.print(_front_table(self.front))
            if not self.front.is_complete:
                err.print("[dim]the search ended before the end of the front; there may be plans with less")

    def picture(self) -> bytes:
        """The front as a PNG; raises MissingLibrary where matplotlib is not installed."""
        front = self.front
        assert front is not None
        (x_label, x_scale), (y_label, y_scale) = _LABELS[front.axis], _LABELS[first_of(front.objective)]
        dots = [Dot(p.other * x_scale, p.value * y_scale, " + ".join(p.plan.devices)) for p in front.points]
        return front_png(dots, f"{self.name}: {front.objective} against {front.axis}", x_label, y_label)

    def _changes_table(self) -> Table:
        """One row per change: what today's plan would take there, and what would be best."""
        name = first_of(self.objective.name)
        table = listing("what if", "today's plan", "the best", "better", "which is")
        for each in self.changes:
            stays_s = self.objective.value(each.today) if each.today else None
            stays = "cannot run" if stays_s is None else _shown(name, stays_s)
            stays += ", breaks it" if each.breaks else ""
            if each.best is None:
                table.add_row(escape(each.change), stays, "-", "-", f"[dim]{escape(each.refusal)}[/]")
                continue
            by = f"{stays_s / each.best.value:.2f}x" if stays_s and each.best.value else "-"
            which = "the same plan" if each.best.plan == self.today.plan else str(each.best.plan)
            table.add_row(escape(each.change), stays, _shown(name, each.best.value), by, escape(which))
        return table


def _front_table(front: Front) -> Table:
    """One row per point, from the best under the objective to the least of the other quantity."""
    table = listing(right=(front.objective, front.axis))
    table.add_column("plan")
    for point in front.points:
        table.add_row(
            _shown(first_of(front.objective), point.value), _shown(front.axis, point.other), escape(str(point.plan))
        )  # fmt: skip
    return table


def _shown(name: str, value: float) -> str:
    """Seconds as elsewhere in the tables, all else as in messages."""
    return seconds(value) if name in ("latency", "p95", "throughput", "server") else shown(name, value)
