"""`ecotone plan MODEL` where MODEL is a language model: what runs where, what crosses, what a request may expect.

Measured where it is not known yet; nothing is loaded or served. Beside it, on demand, the named baselines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ecotone import schema
from ecotone.cli import options
from ecotone.cli.console import out, print_json
from ecotone.cli.language import LlmWork, load_llm, reached
from ecotone.cli.language_plans import Planned, asked_of, known_profile, make_llm_profile, measured_cluster, show_plan
from ecotone.cli.tables import listing, seconds
from ecotone.cli.workflow import write_file
from ecotone.cluster import Cluster
from ecotone.llmcost import LlmCost, LlmCostModel, Shape
from ecotone.llmplan import LlmPlan
from ecotone.llmprofile import LlmProfile
from ecotone.planner.generation import Asked, LlmSolution, baselines, choose_plan
from ecotone.planner.objective import PlannerError
from ecotone.units import EcotoneError, parse_quantity

__all__ = ["plan_language"]

_LIMITS = {"tpot": "tpot_s", "ttft": "ttft_s", "latency": "request_s", "request": "request_s"}
_KNOWN = "latency=30s, ttft=2s, tpot=80ms, throughput=20/s, loss=0.02"


def plan_language(
    model: options.Model,
    cluster: options.ClusterFile = None,
    profile_file: options.ProfileFile = None,
    objective: options.Objective = "latency",
    require: options.Require = None,
    context: options.Context = 0,
    slots: options.Slots = 1,
    precision: options.Precision = None,
    prompt: Annotated[
        int, typer.Option(min=1, rich_help_panel=options.LANGUAGE, help="Tokens of a request's prompt.")
    ] = 512,
    answer: Annotated[int, typer.Option(min=1, rich_help_panel=options.LANGUAGE, help="Tokens of an answer.")] = 128,
    requests: Annotated[
        int,
        typer.Option(min=1, max=1024, rich_help_panel=options.LANGUAGE, help="Requests at a time, for tokens per second."),
    ] = 1,
    out_file: options.PlanOut = None,
    compare: options.Compare = False,
    json_output: options.Json = False,
) -> None:
    """Of a language model (a Hugging Face directory or hub id of one) it is the plan that ecotone serve would follow.

    Objectives: latency (of a whole request), ttft, tpot, throughput. Limits beside them: --require tpot=80ms, ttft=2s,
    latency=30s, throughput=20/s, loss=0.02 (nats per token).

      ecotone plan ./Llama-3.2-1B --cluster home.toml --precision int8 --precision int4 --require ttft=2s --compare
    """
    work = load_llm(model, cluster, quiet=json_output)
    asked = asked_of(work, objective, context, slots, precision or ())
    wanted = _wanted(asked, prompt, answer, requests, slots, is_whole=context == 0)
    wanted = replace(wanted, **limits(require or ()))
    profile = _profile(work, asked, profile_file)
    machines = measured_cluster(work.cluster, profile)
    solution = choose_plan(profile, machines, wanted)
    others = list(_others(profile, machines, wanted)) if compare else []
    if out_file:
        write_file(out_file, solution.plan.to_json())
    if json_output:
        document = json.loads(solution.to_json())
        print_json(document | {"baselines": [_document(*other) for other in others]} if compare else document)
        return
    show_plan(Planned(plan=solution.plan, asked=wanted, profile=profile, cost=solution.cost, gap=solution.gap))
    if compare:
        out.print()
        out.print(_compared(solution, others))


def _wanted(asked: Asked, prompt: int, answer: int, requests: int, slots: int, *, is_whole: bool) -> Asked:
    """What is asked, for these requests. `is_whole`: no context was named, so that of the model is only what is at hand."""
    if prompt + answer > asked.shape.context:
        most = "the model takes" if is_whole else "--context is"
        raise EcotoneError(
            f"--prompt {prompt} and --answer {answer} are more than {most} {asked.shape.context} tokens; ask for less"
        )
    shape = Shape(
        prompt=prompt, answer=answer, concurrency=requests, context=asked.shape.context, max_slots=max(slots, requests)
    )
    return replace(asked, shape=shape)


def limits(require: Sequence[str]) -> dict[str, Any]:
    """Fields of Asked from "tpot=80ms", "throughput=20/s", "loss=0.02"; raises EcotoneError for anything else."""
    found: dict[str, Any] = {}
    for text in require:
        name, _, value = (part.strip() for part in text.partition("="))
        where = f"--require {text}"
        if name in _LIMITS:
            found[_LIMITS[name]] = parse_quantity(value, "s", where)
        elif name == "throughput":
            found["tokens_per_s"] = parse_quantity(value, "per_s", where)
        elif name == "loss":
            try:
                found["max_loss"] = float(value)
            except ValueError:
                raise EcotoneError(f"{where}: {value!r} is not a number of nats per token") from None
        else:
            raise EcotoneError(f"{where}: is not a limit of a language model; there are {_KNOWN}")
    return found


def _profile(work: LlmWork, asked: Asked, path: Path | None) -> LlmProfile:
    """What is known, without reaching anybody; else measured on the nodes."""
    known = known_profile(work, asked.executors, path)
    if known is not None:
        return known
    with reached(work) as service:
        return make_llm_profile(work, service, asked.executors, path)


def _others(
    profile: LlmProfile, machines: Cluster, asked: Asked
) -> Iterator[tuple[str, LlmPlan | None, LlmCost | None, str]]:
    """(name, plan, its figures, why it has none or breaks what) of every named baseline."""
    model = LlmCostModel(profile, machines, asked.shape)
    for name in baselines.NAMES:
        try:
            plan = baselines.place(name, profile, machines, asked)
        except PlannerError as error:
            yield name, None, None, str(error)
            continue
        cost = model.predict(plan)
        yield name, plan, cost, "; ".join((*cost.violations, *asked.missed(cost)))


def _document(name: str, plan: LlmPlan | None, cost: LlmCost | None, note: str) -> dict[str, object]:
    made: dict[str, object] = {"name": name, "note": note}
    if plan is not None and cost is not None:
        made |= {"plan": schema.write(plan), "cost": schema.write(cost)}
    return made


def _compared(solution: LlmSolution, others: Sequence[tuple[str, LlmPlan | None, LlmCost | None, str]]) -> Table:
    table = listing("contender", right=("request", "first token", "per token", "tokens/s"))
    table.add_column("plan")
    for name, plan, cost, note in (("ecotone", solution.plan, solution.cost, ""), *others):
        if plan is None or cost is None:
            table.add_row(name, "-", "-", "-", "-", f"[dim]{escape(note)}[/]")
            continue
        broken = f" [yellow]{escape(note)}[/]" if note else ""
        table.add_row(
            name, seconds(cost.request_s), seconds(cost.ttft_s), seconds(cost.tpot_s), f"{cost.tokens_per_s:.3g}",
            f"{escape(_short(plan))}{broken}",
        )  # fmt: skip
    return table


def _short(plan: LlmPlan) -> str:
    """ "laptop 0-8, box 8-16": devices and their layers; an end that lies apart by its name."""
    parts = []
    for stage in plan.stages:
        span = stage.span
        layers = f"{span.start}-{span.stop}" if span.num_layers else span.describe()
        parts.append(f"{stage.device} {layers}")
    return ", ".join(parts)
