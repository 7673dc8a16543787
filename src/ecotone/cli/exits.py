"""`ecotone exits`: attach early exits to a model, train and calibrate them, write them to a file for the other commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from ecotone.accuracy import ExitPolicy
from ecotone.cli import options
from ecotone.cli.calibrating import FileSamples, read_labels
from ecotone.cli.console import err, out, print_json, progress_bar
from ecotone.cli.tables import listing
from ecotone.cli.workflow import Work, load_work
from ecotone.model import Captured
from ecotone.model.exit_file import write_exits
from ecotone.model.exit_places import exit_places, flop_share
from ecotone.model.exit_training import Sample, TrainOptions, train_exits
from ecotone.profiling.calibration import BUDGETS, best_rules, calibrate, judge, usual_policies
from ecotone.profiling.exit_outcomes import CalibrationError, Outcomes
from ecotone.profiling.labels import Labels
from ecotone.schema import write
from ecotone.units import EcotoneError

__all__ = ["exits"]

HELD_OUT = 0.2  # share of the samples that thresholds are chosen on, which nothing learns from
FEWEST = 10


def exits(
    model: options.Model,
    samples: Annotated[
        str,
        options.option(
            "--samples", group=options.KNOWN, text="Inputs to learn from: a directory, or anything that run takes."
        ),
    ],
    out_file: Annotated[Path, options.option("--out", "-o", text="Where to write the exits: NAME.exits.safetensors.")],
    labels: options.Labels = None,
    at: Annotated[str, options.option("--at", text="Positions, such as 2,6,8. Default: spread over the model's FLOP.")] = "",
    count: Annotated[int, typer.Option(help="How many exits, where --at names none.", min=1, max=4)] = 3,
    budget: Annotated[
        list[str] | None,
        options.option("--budget", text="Points of accuracy that may be lost, repeatable. Default: 0.25, 0.5, 1 and 2."),
    ] = None,
    epochs: Annotated[int, options.trained("Passes over the samples.", min=1)] = 20,
    joint: Annotated[bool, options.trained("Let the model learn as well; its answers change a little.", "--joint")] = False,
    seed: Annotated[int, options.trained("Seed of training and of the split.")] = 0,
    input_shape: options.InputShape = "",
    json_output: options.Json = False,
) -> None:
    """Attach early exits to a model, train them on samples, and choose thresholds within a budget of accuracy.

    A request that an exit is sure of leaves there and frees the later stages. Four fifths of the samples teach the exits,
    the last fifth chooses how sure is sure enough. Without labels the model's own answers teach. The other commands take
    the file with --exits.

      ecotone exits net.py:model --samples photos/ --labels labels.json --out net.exits.safetensors
    """
    budgets = _budgets(budget or ())
    places = _positions(at)
    work = load_work(model, None, input_shape=input_shape, branches=False, quiet=json_output)
    places = exit_places(work.captured.graph, count, places)
    data = _data(work, samples, labels)
    order = np.random.default_rng(seed).permutation(len(data))
    apart = max(1, round(HELD_OUT * len(data)))
    held, learn = [data[i] for i in order[:apart]], [data[i] for i in order[apart:]]
    training = TrainOptions(epochs=epochs, joint=joint, seed=seed)
    with progress_bar("training", json_output) as report:
        trained = train_exits(work.captured, learn, at=places, held_out=held, options=training, progress=report)
    with progress_bar("calibrating", json_output) as report:
        trained, outcomes = best_rules(trained, held, progress=report)
    write_exits(out_file, trained, original=work.captured, data=outcomes.tensors())
    policies, unkept = _calibrated(trained, outcomes, budgets)
    if json_output:
        print_json(_document(trained, outcomes, policies))
        return
    out.print(_heads(trained, outcomes))
    if unkept:
        out.print(f"[yellow]no policy yet:[/] {escape(unkept)}", soft_wrap=True, highlight=False)
    else:
        out.print(_policies(trained, outcomes, policies))
    err.print(f"[dim]wrote {out_file}; use it with --exits {out_file}", soft_wrap=True, highlight=False)


def _data(work: Work, samples: str, labels: Path | None) -> list[Sample]:
    """Every item as flat inputs, with its label where there are any."""
    inputs = FileSamples(samples, work.preparation)
    if len(inputs) < FEWEST:
        raise EcotoneError(
            f"--samples {samples}: holds {len(inputs)} inputs; exits need {FEWEST} at least, rather thousands"
        )
    if labels is None:
        return [(tensors, None) for tensors in inputs]
    known = Labels(read_labels(labels, inputs.names, work.preparation.labels), inputs, inputs.names)
    return [(tensors, label[None]) for tensors, (label,) in zip(inputs, known.contents(), strict=True)]


def _calibrated(trained: Captured, outcomes: Outcomes, budgets: Sequence[float]) -> tuple[tuple[ExitPolicy, ...], str]:
    """Policies within the budgets asked for, which must be kept; of the usual ones those that are, or why none is."""
    if budgets:
        return calibrate(outcomes, trained.graph, budgets=budgets), ""
    try:
        return usual_policies(outcomes, trained.graph), ""
    except CalibrationError as error:
        return (), str(error)


def _budgets(texts: Sequence[str]) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for text in texts for part in text.split(","))
    except ValueError:
        raise EcotoneError(f"--budget {' '.join(texts)!r}: write points, for example --budget 0.5 --budget 1") from None
    if any(not 0 <= budget <= 100 for budget in found):
        raise EcotoneError(f"--budget {' '.join(texts)!r}: points lie from 0 to 100; usual ones are {BUDGETS}")
    return found


def _positions(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdigit() for part in parts):
        raise EcotoneError(f"--at {text!r}: write positions, as --at 2,6,8; where no exit can be, the nearest are named")
    return tuple(sorted({int(part) for part in parts}))


def _heads(trained: Captured, outcomes: Outcomes) -> Table:
    """Each exit alone: where it stands, what it costs, how good it is."""
    table = listing("exit", "before it", "its head", "right alone", "sure by")
    graph, whole = trained.graph, trained.graph.segment_flop(0, trained.graph.num_blocks)
    for number, (head, place) in enumerate(zip(trained.exits, graph.exits, strict=True)):
        right = float(outcomes.right[:, number].mean())
        table.add_row(
            head.name, f"{flop_share(graph, head.position):.0%} of the FLOP", f"{place.flop / whole:.1%}", f"{right:.1%}",
            f"{head.rule.measure}, {head.rule.over}",
        )  # fmt: skip
    alike = "" if outcomes.is_labelled else " (by definition)"
    table.add_row("the end", "100% of the FLOP", "", f"{float(outcomes.final.mean()):.1%}{alike}", "")
    return table


def _policies(trained: Captured, outcomes: Outcomes, policies: Sequence[ExitPolicy]) -> Table:
    """The policy that saves the most within each budget."""
    table = listing("policy", "leave", "FLOP saved", "points lost", "between")
    best: dict[str, tuple[float, ExitPolicy]] = {}
    for policy in policies:
        saved = judge(outcomes, trained.graph, policy.exits, policy.thresholds).saved
        budget = policy.name.rpartition(" ")[2]
        if budget not in best or saved > best[budget][0]:
            best[budget] = (saved, policy)
    for saved, policy in best.values():
        leave = ", ".join(
            f"{share:.0%} at {name} (from {threshold:.3f})"
            for name, share, threshold in zip(policy.exits, policy.shares, policy.thresholds, strict=True)
        )
        between = f"{policy.low_points:.2f} and {policy.high_points:.2f}"
        table.add_row(policy.name, leave, f"{saved:.1%}", f"{policy.loss_points:.2f}", between)
    return table


def _document(trained: Captured, outcomes: Outcomes, policies: Sequence[ExitPolicy]) -> dict[str, object]:
    return {
        "graph_hash": trained.graph.content_hash(),
        "exits": [
            write(place) | {"right": float(outcomes.right[:, i].mean()), "rule": write(trained.exits[i].rule)}
            for i, place in enumerate(trained.graph.exits)
        ],
        "end_right": float(outcomes.final.mean()),
        "samples": len(outcomes),
        "policies": [
            write(p) | {"saved": judge(outcomes, trained.graph, p.exits, p.thresholds).saved} for p in policies
        ],
    }  # fmt: skip
