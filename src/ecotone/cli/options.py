"""Options that several commands share, described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ecotone.units import EcotoneError

MODEL_HELP = "package.module:callable, file.py:callable, an exported .pt2, or a Hugging Face directory or hub id."
SHAPE_HELP = "Shape of an image input, such as 3x224x224, where the model does not say."
REQUIRE_HELP = (
    "A limit to keep, repeatable: latency=50ms, p95=80ms, throughput=20/s, accuracy_loss=0.5, "
    "accuracy_loss_sure=1 (upper end of its interval), error=0.05, energy=2J, bytes=20kB, server=5ms, "
    "money=0.0001, memory=100MB, stages=2, codec=int8,fp32, executor=torch:fp32, device=edge, exit=none."
)


# Options stand in groups of the help, in the order of a command's parameters; those without a group come first.
ASKED, KNOWN, TOLD = "What is asked of the plan", "The model and what is known of it", "What is told beside the plan"
RUNNING, TRAINED, USERS, LANGUAGE = "While it runs", "How it is trained", "Many users", "Language models"


def option(*names: str, text: str, group: str | None = None) -> object:
    """A typer option without a default worth showing."""
    return typer.Option(*names, help=text, show_default=False, rich_help_panel=group)


def trained(text: str, *names: str, **limits: Any) -> object:
    """A typer option of how something is trained."""
    return typer.Option(*names, help=text, rich_help_panel=TRAINED, **limits)


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
Samples = Annotated[
    str,
    option(
        "--samples",
        group=KNOWN,
        text="Real inputs, a file or directory: a few are timed, all make the accuracy table, so many help.",
    ),
]
Labels = Annotated[
    Path | None,
    option(
        "--labels",
        group=KNOWN,
        text="What is right for each sample: FILE.json or .csv (name and label), .npy or .safetensors (in order "
        "of the samples, or a tensor per name). A label is a class number or name, or an array in the shape of "
        "the model's decisions. Without labels agreement with the model itself is counted.",
    ),
]
Calibration = Annotated[
    int,
    option(
        "--calibration", group=KNOWN, text="Make the accuracy table of at most so many samples; 0: no table. Default: all."
    ),
]
Shadow = Annotated[
    float,
    option(
        "--shadow",
        group=RUNNING,
        text="Answer this share of requests (0.01: 1 %) again by the whole model, and raise drift. Default: none.",
    ),
]
Exits = Annotated[
    str,
    option(
        "--exits", group=KNOWN, text="Early exits: a file made by ecotone exits, or own for those that the model brings."
    ),
]
Bottlenecks = Annotated[
    list[Path] | None,
    option("--bottleneck", group=KNOWN, text="A learned codec (ecotone bottleneck) to use at its cut, repeatable."),
]
InputShape = Annotated[str, option("--input-shape", group=KNOWN, text=SHAPE_HELP)]
Executors = Annotated[
    list[str] | None, option("--executor", group=KNOWN, text="Use only this executor, repeatable. Default: all.")
]
Objective = Annotated[
    str,
    typer.Option(
        rich_help_panel=ASKED,
        help="What to make best: latency, p95, throughput, energy, bytes, server (seconds that servers are busy),"
        " money, accuracy_loss or error; several in order: server,latency, or server~5%,latency to give up 5 % of"
        " the first.",
    ),
]
Arrivals = Annotated[
    str,
    option(
        "--arrivals",
        group=ASKED,
        text="How requests come, for a p95: closed:4, periodic:20/s or poisson:20/s. Default: closed:1.",
    ),
]
Require = Annotated[list[str] | None, option("--require", group=ASKED, text=REQUIRE_HELP)]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        rich_help_panel=TOLD,
        help="Why this plan: what each choice costs, which limit binds and what more of it gives, what else was "
        "near, when it would change.",
    ),
]
WhatIf = Annotated[
    list[str] | None,
    option(
        "--what-if",
        group=TOLD,
        text="What would be best elsewhere, repeatable: link=10Mbit/s, camera-server=1Mbit/s, latency=20ms, "
        "server=2x (takes twice as long), server=gone; or with another limit: accuracy_loss=2.",
    ),
]
Pareto = Annotated[
    str,
    option(
        "--pareto",
        group=TOLD,
        text="What less of this costs: latency, p95, throughput, bytes, energy, server, money, accuracy_loss, "
        "error, memory or stages.",
    ),
]
Plot = Annotated[Path | None, option("--plot", group=TOLD, text="With --pareto: draw the front into this PNG.")]
WorkloadFile = Annotated[
    Path, option("--workload", "-w", group=USERS, text="Users who share the cluster (TOML): one joint plan for all of them.")
]
Weight = Annotated[
    float,
    typer.Option(
        rich_help_panel=RUNNING,
        help="Share of nodes that serve others too: one of weight 2 gets twice the time of one of 1.",
        min=1e-6,
        max=1e6,
    ),
]
Compare = Annotated[bool, typer.Option("--compare", rich_help_panel=TOLD, help="Show the named baselines beside it.")]
Survive = Annotated[
    str,
    option(
        "--survive",
        group=ASKED,
        text="Keep standbys for failures: auto (least expected cost), local, standby, active or none.",
    ),
]
Adapt = Annotated[
    bool,
    typer.Option(
        "--adapt",
        rich_help_panel=RUNNING,
        help="Keep plans for other link rates resident and move among them as links change.",
    ),
]
PolicyFile = Annotated[
    Path | None,
    option(
        "--policy",
        group=RUNNING,
        text="With --adapt: let this trained policy choose (ecotone policy train), for the deadline of --require "
        "latency=...",
    ),
]
Mtbf = Annotated[
    str,
    option(
        "--mtbf",
        group=ASKED,
        text="Mean time between failures where the cluster file states none. Default: 8h, an assumption.",
    ),
]
Recover = Annotated[
    str, option("--recover", group=ASKED, text="With --survive: limit on how late a failure makes an answer: 200ms.")
]
Bounds = Annotated[
    bool,
    typer.Option("--bounds", rich_help_panel=TOLD, help="Prove that every queue is bounded, and show how large it can get."),
]
Take = Annotated[
    str,
    typer.Option(
        "--take", rich_help_panel=RUNNING,
        help="Where inputs come faster than answers: newest (old frames are dropped), all (they queue), or auto: "
        "newest for live sources.",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON for a program.")]
Context = Annotated[
    int,
    typer.Option(
        min=0, rich_help_panel=LANGUAGE, show_default=False,
        help="Tokens of the longest sequence, prompt and answer together. Default: the model's, at most 4096.",
    ),
]  # fmt: skip
Slots = Annotated[
    int,
    typer.Option(min=1, max=1024, rich_help_panel=LANGUAGE, help="Sequences whose keys have room at once; more wait."),
]
Precision = Annotated[
    list[str] | None,
    option(
        "--precision",
        group=LANGUAGE,
        text="fp32, bf16, int8 or int4, repeatable: what a shard's weights may be computed in. Default: as they are stored.",
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        rich_help_panel=LANGUAGE,
        help="Who guesses tokens ahead: ngram (what followed in the text before), a small model's directory, layers:2 (the"
        " model's own first two), or none. The text is the same; where guessing does not pay it stops by itself.",
    ),
]
TlsCert = Annotated[Path | None, option("--tls-cert", group=LANGUAGE, text="Certificate (PEM) to serve https with.")]
TlsKey = Annotated[Path | None, option("--tls-key", group=LANGUAGE, text="Its private key (PEM).")]
PerMinute = Annotated[
    int, typer.Option(min=0, rich_help_panel=LANGUAGE, help="Requests per minute that a key may make; 0: any number.")
]


def host_and_port(text: str) -> tuple[str, int]:
    """HOST:PORT of --listen; raises EcotoneError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise EcotoneError(f"--listen {text!r}: write HOST:PORT, for example 127.0.0.1:8000")
    if host in ("0.0.0.0", "::", "[::]"):
        raise EcotoneError("--listen: give one address of this machine instead of all of them")
    return host.strip("[]"), int(port)
