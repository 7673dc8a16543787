"""Options that several commands share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "package.module:callable, file.py:callable, an exported .pt2, or a Hugging Face directory or hub id."
SHAPE_HELP = "Shape of an image input, such as 3x224x224, where the model does not say."
REQUIRE_HELP = (
    "A limit to keep, repeatable: latency=50ms, throughput=20/s, accuracy_loss=0.5, error=0.05, energy=2J, bytes=20kB, "
    "memory=100MB, codec=int8,fp32, device=edge, stages=2."
)


def option(*names: str, text: str) -> object:
    """A typer option without a default worth showing."""
    return typer.Option(*names, help=text, show_default=False)


Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
ClusterFile = Annotated[
    Path | None,
    typer.Option(
        "--cluster", "-c", envvar="ECOTONE_CLUSTER", show_default=False, show_envvar=False,
        help="Cluster file (TOML). Without it: that of the variable ECOTONE_CLUSTER, else this machine alone.",
    ),
]  # fmt: skip
ProfileFile = Annotated[Path | None, option("--profile", text="Profile file, made where missing. Default: in the cache.")]
PlanFile = Annotated[Path | None, option("--plan", text="Use the plan of this file instead of solving for one.")]
PlanOut = Annotated[Path | None, option("--out", "-o", text="Where to write the plan (JSON).")]
ProfileOut = Annotated[Path | None, option("--out", "-o", text="Where to write the profile (JSON).")]
Samples = Annotated[str, option("--samples", text="A few real inputs to measure accuracy on: a file or directory.")]
InputShape = Annotated[str, option("--input-shape", text=SHAPE_HELP)]
Executors = Annotated[list[str] | None, option("--executor", text="Use only this executor, repeatable. Default: all.")]
Objective = Annotated[str, typer.Option(help="What to make best: latency or throughput.")]
Require = Annotated[list[str] | None, option("--require", text=REQUIRE_HELP)]
Explain = Annotated[bool, typer.Option("--explain", help="Why this plan, what else was near, when it would change.")]
WhatIf = Annotated[
    list[str] | None,
    option(
        "--what-if",
        text="What would be best elsewhere, repeatable: link=10Mbit/s, camera-server=1Mbit/s, latency=20ms, server=2x "
        "(takes twice as long), server=gone.",
    ),
]
Pareto = Annotated[
    str,
    option("--pareto", text="What less of this costs: bytes, energy, accuracy_loss, error, memory, throughput or latency."),
]
Plot = Annotated[Path | None, option("--plot", text="With --pareto: draw the front into this PNG.")]
Compare = Annotated[bool, typer.Option("--compare", help="Show the named baselines beside it.")]
Survive = Annotated[
    str,
    option("--survive", text="Keep standbys for failures: auto (least expected cost), local, standby, active or none."),
]
Adapt = Annotated[
    bool, typer.Option("--adapt", help="Keep plans for other link rates resident and move among them as links change.")
]
Learned = Annotated[
    Path | None,
    option(
        "--learned",
        text="With --adapt: let this policy choose (see `ecotone policy train`), for the deadline of --require latency=...",
    ),
]
Mtbf = Annotated[
    str, option("--mtbf", text="Mean time between failures where the cluster file states none. Default: 8h, an assumption.")
]
Recover = Annotated[str, option("--recover", text="With --survive: limit on how late a failure makes an answer: 200ms.")]
Bounds = Annotated[bool, typer.Option("--bounds", help="Prove that every queue is bounded, and show how large it can get.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON for a program.")]
