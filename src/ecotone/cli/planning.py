"""`ecotone profile`, `plan` and `simulate`: measure, solve, and try a plan on a virtual clock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ecotone.cli import options
from ecotone.cli.around import Around, check_around
from ecotone.cli.asked import check_asked, parse_objective, parse_require
from ecotone.cli.console import err, out, print_json
from ecotone.cli.orders import in_best_order
from ecotone.cli.tables import accuracy_tables, listing, plan_table, profile_table, seconds
from ecotone.cli.workflow import (
    Survival,
    Work,
    load_work,
    make_failover,
    make_plan,
    make_profile,
    open_nodes,
    write_file,
)
from ecotone.cost import predict
from ecotone.plan import Plan
from ecotone.planner import TIE, FailoverSolution, Objective, PlannerError, Requirement, Solution, baselines, explain
from ecotone.planner.objective import first_of, shown
from ecotone.planner.reordering import world_of
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.protocol.actors import require_sound, sizes_of

__all__ = ["plan", "profile"]


def profile(
    model: options.Model,
    cluster: options.ClusterFile = None,
    out_file: options.ProfileOut = None,
    samples: options.Samples = "",
    labels: options.Labels = None,
    calibration: options.Calibration = -1,
    executor: options.Executors = None,
    max_error: Annotated[float, typer.Option(help="Pass over executors whose relative error is above this.")] = 0.2,
    exits: options.Exits = "",
    bottleneck: options.Bottlenecks = None,
    input_shape: options.InputShape = "",
    fresh: Annotated[bool, typer.Option(help="Measure again, even if a profile is there.")] = False,
    json_output: options.Json = False,
) -> None:
    """Measure a model on a cluster: every device, executor, link and codec, and what each cut and codec costs in accuracy.

    The profile is a file, reused while model, devices and versions stay the same.

      ecotone profile ecotone.cli.demo_model:bundled --cluster home.toml --samples photos/ --labels photos/labels.json
    """
    work = load_work(
        model, cluster, input_shape=input_shape, samples=samples, labels=labels, max_calibration=calibration,
        exits=exits, bottlenecks=bottleneck, quiet=json_output,
    )  # fmt: skip
    with open_nodes(work) as nodes:
        made = make_profile(work, nodes, executors=executor or (), path=out_file, max_error=max_error, fresh=fresh)
    if json_output:
        print_json(json.loads(made.to_json()))
        return
    out.print(profile_table(made))
    if made.accuracy:
        out.print()
        for table in accuracy_tables(made.accuracy):
            out.print(table)
    if out_file:
        err.print(f"[dim]profile in {out_file}")


def plan(
    model: options.Model,
    cluster: options.ClusterFile = None,
    profile_file: options.ProfileFile = None,
    objective: options.Objective = "latency",
    require: options.Require = None,
    samples: options.Samples = "",
    labels: options.Labels = None,
    executor: options.Executors = None,
    exits: options.Exits = "",
    bottleneck: options.Bottlenecks = None,
    input_shape: options.InputShape = "",
    out_file: options.PlanOut = None,
    explain_it: options.Explain = False,
    compare: options.Compare = False,
    arrivals: options.Arrivals = "",
    what_ifs: options.WhatIf = None,
    pareto_axis: options.Pareto = "",
    plot: options.Plot = None,
    survive: options.Survive = "",
    mtbf: options.Mtbf = "",
    recover: options.Recover = "",
    bounds: options.Bounds = False,
    json_output: options.Json = False,
) -> None:
    """Find the best plan: which device runs which part by which executor, in which codec tensors cross, where requests exit.

    The answer is exact for the chain of the model's cuts, with its proven bound; it may be "one device". Of a model with
    branches another order of the blocks is measured, and taken if it gains. --survive adds standbys against failures.

      ecotone plan net.py:model --cluster home.toml --require accuracy_loss=0.5 --explain
      ecotone plan net.py:model --cluster home.toml --objective server,latency --require latency=50ms
      ecotone plan net.py:model --cluster home.toml --objective p95 --arrivals poisson:20/s
      ecotone plan net.py:model --cluster home.toml --survive auto --what-if link=2Mbit/s --pareto bytes --plot front.png
    """
    survival = Survival.parse(survive, mtbf, recover)
    files: dict[str, Any] = {"samples": samples, "labels": labels, "exits": exits, "bottlenecks": bottleneck}
    work = load_work(model, cluster, input_shape=input_shape, quiet=json_output, **files)
    check_asked(objective, require or (), work.cluster, arrivals)
    check_around(pareto_axis, plot, objective, what_ifs or (), work.cluster)
    with open_nodes(work) as nodes:
        captured, measured = replace(work), make_profile(work, nodes, executors=executor or (), path=profile_file)
        made = in_best_order(work, nodes, measured, objective, require or (), arrivals=arrivals)
    solution = make_plan(work, made, objective, require or (), arrivals=arrivals)
    failover = make_failover(work, made, objective, require or (), survival, arrivals) if survival else None
    wanted, kept = parse_objective(objective, arrivals), parse_require(require or (), arrivals)
    around = Around.of(work, made, solution, wanted, kept, what_ifs or (), pareto_axis, arrivals)
    _write(around, failover.planset if failover else solution.plan, plot, out_file)
    if json_output:
        print_json(json.loads((failover or solution).to_json()) | around.document())
        return
    _show(work, made, solution, failover, is_stated=bool(mtbf), has_bounds=bounds)
    around.show()
    if compare:
        out.print(_baselines(captured, measured, solution, require or ()))
    if explain_it:
        _show_why(work, made, solution, wanted, kept)


def _write(around: Around, plans: Plan | PlanSet, plot: Path | None, out_file: Path | None) -> None:
    if plot:
        write_file(plot, around.picture())
    if out_file:
        write_file(out_file, plans.to_json())


def _show_why(work: Work, made: Profile, solution: Solution, objective: Objective, require: tuple[Requirement, ...]) -> None:
    told = explain(solution, work.captured.graph, work.cluster, made, require, objective=objective, tie=TIE)
    out.print("\n".join(told.lines()), highlight=False, markup=False)


def _show_bounds(work: Work, plans: Plan | PlanSet) -> None:
    """The proven bounds of queues and memory; raises EcotoneError for plans that may lock up."""
    graph = work.captured.graph
    report = require_sound(plans, sizes=sizes_of({graph.content_hash(): graph}))
    out.print(str(report), highlight=False, markup=False, soft_wrap=True)


def _show(
    work: Work, made: Profile, solution: Solution, failover: FailoverSolution | None, *, is_stated: bool, has_bounds: bool
) -> None:
    """The plan part by part, how far it is proven, standbys, and queues on demand; `is_stated`: the user gave an mtbf."""
    graph = work.captured.graph
    if failover and failover.planset.primary != solution.plan:
        first = failover.planset.primary
        out.print(plan_table(first, predict(first, graph, work.cluster, made), graph))
    else:
        out.print(plan_table(solution.plan, solution.cost, graph))
        out.print(_proof(solution))
    stated = [*(d.mtbf_s for d in work.cluster.devices), *(k.mtbf_s for k in work.cluster.links)]
    if failover and not is_stated and not any(stated):
        err.print("[dim]the cluster file states no mtbf: that of 8 h is an assumption; --mtbf sets another")
    for line in failover.lines() if failover else ():
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if has_bounds:
        _show_bounds(work, failover.planset if failover else solution.plan)


def _proof(solution: Solution) -> str:
    """How far the plan is proven; with its value, which the table lacks for a p95, an error or several objectives."""
    first = first_of(solution.objective)
    value = f"{first} {shown(first, solution.value)}: "
    if solution.is_proven:
        where = "this order of the blocks" if solution.plan.order else "this cost model"
        return f"{value}[green]proven best[/] for {solution.objective} in {where}"
    return f"{value}[yellow]within {solution.gap:.1%}[/] of the proven bound {shown(first, solution.bound)}"


def _baselines(work: Work, made: Profile, solution: Solution, require: Sequence[str]) -> Table:
    """Every named baseline that has a plan, on the profile of the captured order; `solution` may be of another one."""
    table = listing("contender", "latency", "throughput", "plan")
    graph = work.captured.graph
    rows = [("ecotone", solution.plan, solution.cost)]
    for name in baselines.NAMES:
        try:
            plan = baselines.place(name, graph, work.cluster, made, tuple(require))
        except PlannerError as error:
            table.add_row(name, "-", "-", f"[dim]{error}[/]")
            continue
        other, profile = world_of(plan.order, graph, work.cluster, made)
        rows.append((name, plan, predict(plan, other, work.cluster, profile)))
    for name, candidate, cost in rows:
        table.add_row(name, seconds(cost.latency_s), f"{cost.throughput_per_s:.3g} /s", escape(str(candidate)))
    return table
