"""Running `ip`, `tc` and commands inside a machine: bounded in time, with errors that name the command. No state."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ecotone.units import EcotoneError

__all__ = ["ENTER", "RELAY", "LabError", "entering", "ip", "run", "tc", "try_run"]

ENTER, RELAY = Path(__file__).with_name("enter.py"), Path(__file__).with_name("relay.py")
NETNS_FOLDER = Path("/run/netns")
COMMAND_S = 20.0


class LabError(EcotoneError):
    """The laboratory cannot be built, found or changed."""


def run(command: Sequence[str], text: str | None = None) -> str:
    """Run a system command and return what it printed; raises LabError with its own words."""
    problem = try_run(command, text)
    if isinstance(problem, str):
        return problem
    raise problem


def try_run(command: Sequence[str], text: str | None = None) -> str | LabError:
    """The same, but the error is returned: for asking what the kernel can do."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMMAND_S)
    except FileNotFoundError:
        return LabError(f"the laboratory needs the command {command[0]}; install it (Debian: apt install iproute2)")
    except subprocess.TimeoutExpired:
        return LabError(f"{' '.join(command)}: no end after {COMMAND_S:g} s")
    if done.returncode:
        words = " ".join((done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").split())
        return LabError(f"{' '.join(command)}: {words[:300]}")
    return done.stdout


def ip(*lines: str) -> None:
    """Run lines of `ip` in one process (`link add ...`); the first that fails ends it with LabError."""
    run(["ip", "-batch", "-"], "\n".join(lines) + "\n")


def tc(namespace: str, lines: Iterable[str]) -> None:
    """Run lines of `tc` in a namespace ("": this one's own) in one process."""
    text = "".join(f"{line}\n" for line in lines)
    if text:
        run(["tc", *(["-n", namespace] if namespace else []), "-batch", "-"], text)


def entering(namespace: str, groups: Iterable[str] = (), parent: int | None = None) -> list[str]:
    """The words to put before a command so that it runs inside a machine; `parent`: it ends when that process ends."""
    options = [f"group={group}" for group in groups]
    if namespace:
        options.append(f"netns={NETNS_FOLDER / namespace}" if namespace != "new" else "netns=new")
    if parent is not None:
        options.append(f"die={parent}")
    return [sys.executable, "-I", str(ENTER), *options, "--"]
