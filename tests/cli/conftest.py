"""A command line run in this process, and a small model and cluster to run it on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import CLUSTER, NET, Ended

from ecotone.cli.console import err, main_of, out
from ecotone.cli.main import app


@pytest.fixture
def ecotone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run `ecotone ARGS` here: the real application, its exit code and what it printed."""

    def run(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ecotone", *map(str, arguments)])
        for console in (out, err):  # it may have been made under another COLUMNS, such as a worker's
            monkeypatch.setattr(console, "width", 300)
        capsys.readouterr()
        code = main_of(app)
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests of the command line: what is measured once is used again, as a user's second command does."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with net.py and pair.toml, current, with the tests' cache and a home of its own."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "pair.toml").write_text(CLUSTER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECOTONE_CACHE", str(cache))
    monkeypatch.setenv("ECOTONE_HOME", str(tmp_path / "home"))
    return tmp_path
