"""The progress bar: none where nothing is done."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ecotone.cli import console

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bar_only_where_something_is_done(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(reports: int, quiet: bool = False) -> str:
        written = io.StringIO()
        monkeypatch.setattr(console, "err", Console(file=written, force_terminal=is_terminal, width=120))
        with console.progress_bar("profiling", quiet) as report:
            for done in range(reports):
                report(done + 1, reports, "net")
        return written.getvalue()

    assert shown(0) == ""
    assert "profiling" in shown(3)
    assert "3/3" in shown(3)
    assert shown(3, quiet=True) == ""


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=written, force_terminal=True, width=120))

    def failing() -> None:
        with console.progress_bar("profiling") as report:
            report(1, 3, "net")
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        failing()
    assert written.getvalue().endswith("\x1b[?25h")  # the cursor is shown again
