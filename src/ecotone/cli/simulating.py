"""`ecotone simulate`: a plan on the virtual clock, by the very machines that run it on real ones."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ecotone.cli import options
from ecotone.cli.asked import check_asked, parse_arrivals
from ecotone.cli.console import err, out, print_json
from ecotone.cli.orders import in_best_order, profile_of
from ecotone.cli.resident import Asked, chosen_plans
from ecotone.cli.simulated_faults import drawn_faults, fault_document, fault_tables, read_faults_file
from ecotone.cli.tables import seconds
from ecotone.cli.workflow import Work, load_work, make_profile, open_nodes, read_plan_set, write_file
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.protocol.settings import CoordinatorSettings
from ecotone.simulator import Report
from ecotone.simulator import simulate as run_simulation
from ecotone.units import EcotoneError, format_quantity, parse_quantity

__all__ = ["simulate"]


def simulate(
    model: options.Model,
    cluster: options.ClusterFile = None,
    plan_file: options.PlanFile = None,
    profile_file: options.ProfileFile = None,
    objective: options.Objective = "latency",
    require: options.Require = None,
    survive: options.Survive = "",
    exits: options.Exits = "",
    requests: Annotated[int, typer.Option(help="How many requests to send.", min=1, max=1_000_000)] = 200,
    arrivals: Annotated[str, typer.Option(help="closed:4 (so many at once), periodic:20/s, or poisson:20/s.")] = "closed:1",
    links: Annotated[float, typer.Option(help="Multiply every link's rate by this: 0.125 is eight times slower.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of random arrivals.")] = 0,
    faults: Annotated[
        str, typer.Option(help="A script of faults (TOML), or random:7 for one drawn from seed 7.", show_default=False)
    ] = "",
    deadline: Annotated[str, typer.Option(help="Time that each request has: 2s. Default: all it takes.")] = "",
    journal: Annotated[
        bool,
        typer.Option("--recorded", help="Requests are recorded, as by serve --journal: the asker itself may be killed."),
    ] = False,
    trace_file: Annotated[Path | None, options.option("--trace", text="Write what happened, event by event (JSON).")] = None,
    bottleneck: options.Bottlenecks = None,
    input_shape: options.InputShape = "",
    json_output: options.Json = False,
) -> None:
    """Try a plan on a virtual clock: latency, throughput and load under arrivals and link rates of your choice.

    ecotone simulate net.py:model --cluster home.toml --arrivals poisson:15/s --links 0.125
    ecotone simulate net.py:model --cluster home.toml --survive auto --faults script.toml
    """
    if not links > 0:
        raise EcotoneError(f"--links is {links}, must be above zero")
    pattern, asked = parse_arrivals(arrivals), Asked.of(objective, require, plan_file, survive, False, arrivals=arrivals)
    deadline_s = parse_quantity(deadline, "s", "--deadline") if deadline else None
    work = load_work(model, cluster, input_shape=input_shape, exits=exits, bottlenecks=bottleneck, quiet=json_output)
    check_asked(objective, require or (), work.cluster, arrivals)
    known = tuple(device.name for device in work.cluster.devices)
    script = read_faults_file(faults, known, partial(_beside, Path(faults).parent, work))
    chosen, profile = _chosen(work, asked, profile_file)
    machines = dataclasses.replace(work.cluster.scaled_links(links), emulate=True)
    run = partial(
        run_simulation, chosen, work.captured.graph, machines, profile, requests=requests, arrivals=pattern, seed=seed,
        deadline_s=deadline_s, coordinator=CoordinatorSettings(session=1, record=journal), trace=trace_file is not None,
    )  # fmt: skip
    report = calm = run()
    if faults:
        if faults.startswith("random:"):
            script = drawn_faults(faults, chosen.devices, journal, calm.makespan_s)
        report = run(script=script)
    if trace_file:
        write_file(trace_file, report.trace.to_json())
    if json_output:
        print_json(_document(report) | ({"faults": fault_document(report, script, calm)} if faults else {}))
        return
    for plan in chosen.plans:
        err.print(f"[dim]{escape(str(plan))}", soft_wrap=True)
    _print(report)
    for part in fault_tables(report, script, calm, chosen) if faults else ():
        out.print(part, soft_wrap=True)


def _chosen(work: Work, asked: Asked, profile_file: Path | None) -> tuple[PlanSet, Profile]:
    """The plans to try, and a profile of the order of blocks that they cut."""
    with open_nodes(work) as nodes:
        if asked.plan_file:
            plans = read_plan_set(asked.plan_file, work)
            return plans, profile_of(work, nodes, plans.primary, profile_file)
        measured = make_profile(work, nodes, path=profile_file)
        profile = in_best_order(work, nodes, measured, asked.objective, asked.require, arrivals=asked.arrivals)
    return chosen_plans(work, profile, asked), profile


def _beside(folder: Path, work: Work, name: str) -> PlanSet:
    """A plan file that a script names, relative to the script."""
    return read_plan_set(folder / name, dataclasses.replace(work))


def _document(report: Report) -> dict[str, object]:
    return {
        "requests": len(report.outcomes),
        "failed": len(report.outcomes) - len(report.completed),
        "mean_s": report.mean_s,
        "p50_s": report.p50_s,
        "p95_s": report.p95_s,
        "throughput_per_s": report.throughput_per_s,
        "utilisation": report.utilisation,
        "link_utilisation": report.link_utilisation,
        "link_bytes": report.link_bytes,
        "exits": report.exits,
    }


def _print(report: Report) -> None:
    document = _document(report)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("requests", f"{document['requests']}, {document['failed']} failed")
    table.add_row("latency", f"median {seconds(report.p50_s)}, 95 % under {seconds(report.p95_s)}")
    table.add_row("throughput", f"{report.throughput_per_s:.3g} /s")
    for name, count in report.exits.items() if set(report.exits) - {""} else ():
        table.add_row(f"left at {name}" if name else "to the end", f"{count} requests")
    for name, share in report.utilisation.items():
        table.add_row(name, f"computing {share:.0%} of the time")
    for name, size in report.link_bytes.items():
        if size:
            table.add_row(
                name, f"{format_quantity(size, 'bytes')}, busy {report.link_utilisation.get(name, 0.0):.0%} of the time"
            )
    out.print(table)
