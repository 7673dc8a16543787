"""The messages of `ecotone lab` for what cannot be done; what it does to machines is tested in tests/lab."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Ended

pytestmark = pytest.mark.torch

NEGATIVE = "time_s,bytes_per_s,latency_s,loss\n0,1000,0.01,0\n1,-5,0.01,0\n"


@pytest.fixture(autouse=True)
def no_labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECOTONE_LABS", str(tmp_path / "labs"))
    return tmp_path / "labs"


@pytest.mark.parametrize(
    "verb", [("kill", "near"), ("cut", "near", "far"), ("heal",), ("status",), ("exec", "near", "--", "true")]
)
def test_a_verb_without_a_laboratory_says_how_to_start_one(ecotone: Callable[..., Ended], verb: tuple[str, ...]) -> None:
    ended = ecotone("lab", *verb)
    assert ended.code == 2
    assert "no laboratory is up; start one with ecotone lab up home.toml" in ended.err


def test_down_without_a_laboratory(ecotone: Callable[..., Ended]) -> None:
    assert "no laboratory is up" in ecotone("lab", "down").err
    assert 'laboratory "x" is not up; there is none' in ecotone("lab", "down", "--lab", "x").err
    assert ecotone("lab", "down", "--all").code == 0
    assert ecotone("lab", "list").out == "none\n"


def test_which_of_several(ecotone: Callable[..., Ended], no_labs: Path) -> None:
    for name in ("one", "two"):
        (no_labs / name).mkdir(parents=True)
    assert "which laboratory? one, two are there; give --lab NAME" in ecotone("lab", "status").err
    assert "which laboratory? there are one, two; give --lab NAME or --all" in ecotone("lab", "down").err
    assert ecotone("lab", "down", "--lab", "one").code == 0
    assert not (no_labs / "one").exists()


def test_what_cannot_be_built(ecotone: Callable[..., Ended], folder: Path) -> None:
    assert "fabric 'paper' is not known; auto, relay, bridge, user are" in ecotone(
        "lab", "up", "pair.toml", "--fabric", "paper"
    ).err  # fmt: skip
    text = (folder / "pair.toml").read_text()
    (folder / "slash.toml").write_text(text.replace('"near"', '"near by"'))
    assert "must not be empty or hold any of" in ecotone("lab", "up", "slash.toml").err
    (folder / "long.toml").write_text(text.replace('"near"', f'"{"n" * 65}"'))
    assert "use 1 to 64 letters" in ecotone("lab", "up", "long.toml").err
    (folder / "bad.csv").write_text(NEGATIVE)
    (folder / "trace.toml").write_text(text + 'trace = "bad.csv"\n')
    assert "rate -5.0" in ecotone("lab", "up", "trace.toml").err
    (folder / "none.toml").write_text(text + 'trace = "lunar"\n')
    assert "neither a file nor one that is shipped: " in ecotone("lab", "up", "none.toml").err
    assert list((folder / "labs").glob("[a-z]*")) == []


def test_quantities_of_links(ecotone: Callable[..., Ended]) -> None:
    assert "what shall change?" in ecotone("lab", "link", "a", "b").err
    assert '--loss "12"' in ecotone("lab", "link", "a", "b", "--loss", "12").err
    assert "shipped traces: " in ecotone("lab", "trace").out
    assert "give both devices and a trace" in ecotone("lab", "trace", "a").err


def test_without_root_it_says_what_is_missing() -> None:
    code = "import os; from ecotone.lab import abilities; os.geteuid() or os.seteuid(65534); print(abilities().sentence())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("user-space emulation only: emulated machines need ")
