"""How every command talks: one console for results, one for progress and errors, and one place where errors end.

Results go to standard output, progress bars and messages to standard error, so that `--json` output can be piped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer import Typer

from ecotone.units import EcotoneError

__all__ = ["err", "main_of", "out", "print_json", "progress_bar"]

out = Console()
err = Console(stderr=True)

Report = Callable[[int, int, str], None]


@contextmanager
def progress_bar(title: str, quiet: bool = False) -> Iterator[Report]:
    """A progress bar on standard error, there from the first report; the yielded function takes (done, total, what)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    progress = Progress(*columns, console=err, transient=False, disable=quiet)
    task = progress.add_task(title, total=None, what="")

    def report(done: int, total: int, what: str = "") -> None:
        progress.update(task, completed=done, total=total, what=what)
        if not quiet and not progress.live.is_started:
            progress.start()

    try:
        yield report
    finally:
        if progress.live.is_started:
            progress.stop()


def print_json(document: object) -> None:
    """Print a document for a program to read."""
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def main_of(app: Typer) -> int:
    """Run the application: 0 done, 2 the caller's error on one line, 130 interrupted; a traceback with ECOTONE_DEBUG=1."""
    try:
        app()
    except EcotoneError as error:
        if os.environ.get("ECOTONE_DEBUG"):
            raise
        _say(str(error))
        return 2
    except SystemExit as stop:  # usage errors (2), --help and Exit (their code) end here
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _say(message: str) -> None:
    err.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True, highlight=False)
