"""`ecotone plan --workload` and `simulate --workload`: users who share a cluster, their joint plan, and how it holds.

The users are a file (workload.py, docs/users.md). One that names no model has MODEL of the command line; another's
`model` is loaded as MODEL would be. Everyone's plan, what it has alone and beside the others, and who is refused with the
reason. `or_together` puts such a command behind the --workload of the one for a single user.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ecotone.cli import options
from ecotone.cli.asked import parse_require
from ecotone.cli.console import err, out, print_json
from ecotone.cli.either import either
from ecotone.cli.tables import listing, seconds
from ecotone.cli.workflow import Work, load_cluster, load_work, make_profile, open_nodes, read_file, write_file
from ecotone.cluster import Cluster
from ecotone.graph import Graph
from ecotone.media import Tuning
from ecotone.plan import plan_violations
from ecotone.planner import Assignment, assign
from ecotone.planner.assignment import UserPlan
from ecotone.profile import Profile
from ecotone.simulator import UsersReport, simulate_users
from ecotone.units import EcotoneError, parse_quantity
from ecotone.workload import User, Workload

__all__ = ["or_together", "plan_together", "simulate_together"]

Models = dict[str, tuple[Graph, Profile]]
_MOST_RESOURCES, _WARM_UP = 8, 0.1  # rows of the table of loads; share of the time simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the command line says about users that share a cluster."""

    workload_file: Path
    model: str
    cluster_file: Path | None
    profile_file: Path | None = None
    require: tuple[str, ...] = ()
    samples: str = ""
    labels: Path | None = None
    executors: tuple[str, ...] = ()
    input_shape: str = ""
    quiet: bool = False

    def load(self) -> tuple[Workload, Cluster, Models]:
        """Users, cluster, and graph and measured profile of every model; raises EcotoneError before anything is measured."""
        workload, machines = Workload.load(self.workload_file), load_cluster(self.cluster_file)
        users = tuple(replace(u, require=(*self.require, *u.require)) for u in workload.users)
        workload = replace(workload, users=users)
        workload.check(machines)
        for user in users:
            for text in user.require:
                _check_requirement(user, text)
        works = {"": self._work(self.model, is_first=True)}
        for name in dict.fromkeys(u.model for u in users if u.model):
            works[name] = works[""] if name == self.model else self._work(name, is_first=False)
        models = {}
        with open_nodes(works[""]) as nodes:
            for name, work in works.items():
                file = self.profile_file if work is works[""] else None
                models[name] = (work.captured.graph, make_profile(work, nodes, executors=self.executors, path=file))
        return workload, machines, models

    def _work(self, model: str, *, is_first: bool) -> Work:
        """--samples, --labels and --input-shape are of MODEL alone."""
        samples, labels, shape = (self.samples, self.labels, self.input_shape) if is_first else ("", None, "")
        return load_work(model, self.cluster_file, input_shape=shape, samples=samples, labels=labels, quiet=self.quiet)


def _check_requirement(user: User, text: str) -> None:
    try:
        parse_require((text,))
    except EcotoneError as error:
        raise EcotoneError(f"user {user.name}: {error}") from None


def or_together(one: Callable[..., None], together: Callable[..., None]) -> Callable[..., None]:
    """The command `one`, with the options that only `together` has; with --workload it is `together`."""
    return either(one, together, lambda given: given["workload"] is not None, "--workload")


def plan_together(
    model: options.Model,
    workload: options.WorkloadFile,
    cluster: options.ClusterFile = None,
    profile_file: options.ProfileFile = None,
    require: options.Require = None,
    samples: options.Samples = "",
    labels: options.Labels = None,
    executor: options.Executors = None,
    input_shape: options.InputShape = "",
    out_file: options.PlanOut = None,
    json_output: options.Json = False,
) -> None:
    """With --workload it is a joint plan for all users of that file: who runs what where, and who is refused and why.

    ecotone plan net.py:model --cluster gate.toml --workload users.toml --out joint.json
    """
    asked = _Asked(
        workload_file=workload, model=model, cluster_file=cluster, profile_file=profile_file, require=tuple(require or ()),
        samples=samples, labels=labels, executors=tuple(executor or ()), input_shape=input_shape, quiet=json_output,
    )  # fmt: skip
    users, machines, models = asked.load()
    found = assign(users, machines, models)
    if out_file:
        write_file(out_file, found.to_json())
    if json_output:
        print_json(json.loads(found.to_json()))
        return
    out.print(_users_table(users, found))
    for own in found.users:
        out.print(
            f"[cyan]{escape(own.name)}[/]: {escape(f'{own.plan}{_tuned(own.tuning)}')}", soft_wrap=True, highlight=False
        )
    for refusal in found.refused:
        out.print(f"[yellow]refused[/] {escape(refusal.name)}: {escape(refusal.reason)}", soft_wrap=True, highlight=False)
    out.print(_loads(found.utilisation), soft_wrap=True, highlight=False)
    out.print(_proof(found), soft_wrap=True)


def simulate_together(
    model: options.Model,
    workload: options.WorkloadFile,
    cluster: options.ClusterFile = None,
    plan_file: options.PlanFile = None,
    profile_file: options.ProfileFile = None,
    require: options.Require = None,
    duration: Annotated[
        str, typer.Option(help="With --workload: how long the users ask.", rich_help_panel=options.USERS)
    ] = "30s",
    seed: Annotated[int, typer.Option(help="Seed of random arrivals.")] = 0,
    input_shape: options.InputShape = "",
    json_output: options.Json = False,
) -> None:
    """With --workload all its users ask at once, under their joint plan, for --duration; beside it what was predicted.

    ecotone simulate net.py:model --cluster gate.toml --workload users.toml --plan joint.json
    """
    duration_s = parse_quantity(duration, "s", "--duration")
    asked = _Asked(
        workload_file=workload, model=model, cluster_file=cluster, profile_file=profile_file, require=tuple(require or ()),
        input_shape=input_shape, quiet=json_output,
    )  # fmt: skip
    users, machines, models = asked.load()
    found = _read(plan_file, users, machines, models) if plan_file else assign(users, machines, models)
    report = _simulated(found, users, machines, models, duration_s, seed)
    if json_output:
        print_json(_document(found, report))
        return
    out.print(_simulated_table(found, report))
    refused = {r.name: r.reason for r in found.refused} | report.refused
    for name, reason in refused.items():
        out.print(f"[yellow]refused[/] {escape(name)}: {escape(reason)}", soft_wrap=True, highlight=False)
    measured = {f"processor {name}": share for name, share in report.utilisation.items()}
    measured |= {f"link {name}": share for name, share in report.link_utilisation.items()} | report.media
    out.print(_loads(measured), soft_wrap=True, highlight=False)
    err.print(f"[dim]{report.window_s:g} s after a start of {_WARM_UP * duration_s:g} s, seed {seed}")


def _simulated(
    found: Assignment, workload: Workload, machines: Cluster, models: Models, duration_s: float, seed: int
) -> UsersReport:  # fmt: skip
    """All who are let in, at the rates that they were promised."""
    if not found.users:
        first = found.refused[0]
        raise EcotoneError(f"workload {workload.name}: nobody is let in; {first.name}: {first.reason}")
    rates = {u.name: u.rate_per_s for u in found.users}
    users = [replace(u, rate_per_s=rates[u.name]) if u.rate_per_s and u.name in rates else u for u in workload.users]
    return simulate_users(
        replace(workload, users=tuple(users)), found.plans, machines, list(models.values()), tunings=found.tunings,
        duration_s=duration_s, warm_up_s=_WARM_UP * duration_s, seed=seed,
    )  # fmt: skip


def _read(path: Path, workload: Workload, machines: Cluster, models: Models) -> Assignment:
    """The joint plan of a file, held against users, models and cluster; raises EcotoneError."""
    found = Assignment.from_json(read_file(path), f"plan {path}")
    for own in found.users:
        user = workload.user(own.name)
        graph = models[user.model][0]
        wrong = plan_violations(own.plan, graph, workload.cluster_for(own.name, machines))
        if wrong:
            raise EcotoneError(f"plan {path}: user {own.name}: {own.plan}: " + "; ".join(wrong))
    return found


# ---- what is printed ---------------------------------------------------------------------------------------------------


def _users_table(workload: Workload, found: Assignment) -> Table:
    """One row per user that is let in: what it has alone, and beside the others."""
    table = listing("user", "rate", "weight", "alone", "together", "95 % within")
    for own in found.users:
        user = workload.user(own.name)
        table.add_row(
            escape(user.name), _rate(user, own), f"{user.weight:g}", seconds(own.alone_s), seconds(own.mean_s),
            seconds(own.p95_s),
        )  # fmt: skip
    return table


def _rate(user: User, own: UserPlan) -> str:
    if user.is_closed:
        return f"{own.rate_per_s:.3g} /s, {user.in_flight} at once"
    slowed = own.rate_per_s < user.rate_per_s * (1 - 1e-9)
    return f"{own.rate_per_s:.3g} /s" + (f", not {user.rate_per_s:.3g}" if slowed else "")


def _tuned(tuning: Tuning | None) -> str:
    return f", channel {tuning.channel} at {tuning.watt:.3g} W" if tuning else ""


def _loads(utilisation: Mapping[str, float]) -> str:
    """The fullest resources in one line."""
    fullest = sorted(((share, name) for name, share in utilisation.items() if share >= 0.005), reverse=True)
    shown = ", ".join(f"{name} {share:.0%}" for share, name in fullest[:_MOST_RESOURCES])
    more = len(fullest) - _MOST_RESOURCES
    return f"busy: {escape(shown) or 'nothing'}" + (f" and {more} less busy" if more > 0 else "")


def _proof(found: Assignment) -> str:
    """The aim's value and how far it is proven."""
    if not found.users:
        return "nobody is let in"
    what = {"mean": "weighted mean", "worst": "worst over alone", "fair": "weighted geometric mean"}[found.aim]
    value = f"{found.value:.3g} times" if found.aim == "worst" else seconds(found.value)
    if found.gap <= 1e-6:
        return f"{what} {value}: [green]proven best[/] of the plans that were weighed, for those who are let in"
    return f"{what} {value}: [yellow]within {found.gap:.1%}[/] of what could be, of the plans that were weighed"


def _simulated_table(found: Assignment, report: UsersReport) -> Table:
    table = listing("user", "requests", "failed", "mean, predicted", "simulated", "95 %, predicted", "simulated")
    for own in found.users:
        if own.name in report.users:
            came = report.users[own.name]
            p95 = seconds(came.p95_s) if came.completed else "-"
            table.add_row(
                escape(own.name), str(len(came.outcomes)), str(len(came.outcomes) - len(came.completed)),
                seconds(own.mean_s), seconds(came.mean_s) if came.completed else "-", seconds(own.p95_s), p95,
            )  # fmt: skip
    return table


def _document(found: Assignment, report: UsersReport) -> dict[str, object]:
    """For a program: both sides of every user, shares of the window."""
    users = {}
    for own in found.users:
        if own.name in report.users:
            came = report.users[own.name]
            users[own.name] = {
                "rate_per_s": own.rate_per_s, "predicted_mean_s": own.mean_s, "predicted_p95_s": own.p95_s,
                "requests": len(came.outcomes), "failed": len(came.outcomes) - len(came.completed),
                "mean_s": _finite(came.mean_s), "p95_s": _finite(came.p95_s) if came.completed else None,
            }  # fmt: skip
    return {
        "users": users, "refused": {r.name: r.reason for r in found.refused} | report.refused,
        "utilisation": report.utilisation, "link_utilisation": report.link_utilisation, "media": report.media,
        "joule": report.joule, "window_s": report.window_s,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
