"""The `ecotone` command: the groups of commands put together, and their help."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from ecotone.cli.bottleneck import bottleneck
from ecotone.cli.chat import chat
from ecotone.cli.console import main_of, out
from ecotone.cli.demo import demo
from ecotone.cli.doctor import doctor
from ecotone.cli.either import either
from ecotone.cli.exits import exits
from ecotone.cli.lab import app as lab
from ecotone.cli.nodes import status, up
from ecotone.cli.planning import plan, profile
from ecotone.cli.planning_llm import plan_language
from ecotone.cli.policy import app as policy
from ecotone.cli.running import run, serve
from ecotone.cli.serving_encoder import serve_encoder
from ecotone.cli.serving_llm import serve_llm
from ecotone.cli.simulating import simulate
from ecotone.cli.together import or_together, plan_together, simulate_together
from ecotone.executors.memory import keep_freed_memory
from ecotone.llm.recognise import is_encoder, is_language_model

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Run one PyTorch model over many unequal machines: measure them, plan exactly where each part runs, run that plan.",
)
START, MACHINES, WORK, MADE = "Start here", "Machines", "Work", "Parts that a plan may use"
app.command(rich_help_panel=START)(demo)
app.command(rich_help_panel=START)(doctor)
app.command(rich_help_panel=MACHINES)(up)
app.command(rich_help_panel=MACHINES)(status)
app.add_typer(lab, name="lab", rich_help_panel=MACHINES)
app.command(rich_help_panel=WORK)(profile)
app.command("plan", rich_help_panel=WORK)(
    either(
        or_together(plan, plan_together), plan_language, lambda given: is_language_model(given["model"]), "a language model"
    )
)
app.command("simulate", rich_help_panel=WORK)(or_together(simulate, simulate_together))
app.command(rich_help_panel=WORK)(run)
app.command("serve", rich_help_panel=WORK)(
    either(
        either(serve, serve_llm, lambda given: is_language_model(given["model"]), "a language model"),
        serve_encoder,
        lambda given: is_encoder(given["model"]),
        "a text encoder",
    )
)
app.command(rich_help_panel=WORK)(chat)
app.command(rich_help_panel=MADE)(exits)
app.command(rich_help_panel=MADE)(bottleneck)
app.add_typer(policy, name="policy", rich_help_panel=MADE)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"ecotone {importlib.metadata.version('ecotone')}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point of the `ecotone` command."""
    keep_freed_memory()
    raise SystemExit(main_of(app))
