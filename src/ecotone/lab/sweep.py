"""Cleaning up a laboratory by its state file alone: processes, namespaces, interfaces, groups, folders. Safe to repeat.

Whoever ends a laboratory runs this: its supervisor at its end, or `ecotone lab down` after a supervisor that was killed.
Nothing that the state file does not name is touched; a process is told from a later one of the same number by its start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

from ecotone.lab import groups
from ecotone.lab.commands import NETNS_FOLDER, LabError, try_run
from ecotone.lab.network import root_interfaces
from ecotone.lab.state import LabState

__all__ = ["end_supervisor", "leftovers", "sweep"]

GRACE_S, KILL_S, SWEEP_S = 20.0, 10.0, 10.0


def end_supervisor(state: LabState) -> None:
    """Ask a living supervisor to clean up and end; kill one that does not."""
    for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, KILL_S)):
        if state.supervisor is None or not state.supervisor.is_alive:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.supervisor.pid, number)
        end = time.monotonic() + patience_s
        while state.supervisor.is_alive and time.monotonic() < end:
            time.sleep(0.02)


def sweep(state: LabState) -> None:
    """Remove all that `state` names; raises LabError naming what could not be removed."""
    end = time.monotonic() + SWEEP_S
    while True:  # again and again: a command may be on its way in, and a killed process leaves its group a moment later
        for pid in _processes(state):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for name in _namespaces(state):
            try_run(["ip", "netns", "del", name])
        for name in root_interfaces(state):
            try_run(["ip", "link", "del", name])
        for folder in _groups(state):
            groups.remove(folder)
        shutil.rmtree(state.cache, ignore_errors=True)
        left = _outside(state)
        if not left or time.monotonic() > end:
            break
        time.sleep(0.02)
    if left:  # the state file stays, so that the next try knows what to remove
        raise LabError(f'laboratory "{state.name}": could not remove {", ".join(left)}; remove it by hand')
    shutil.rmtree(state.folder, ignore_errors=True)


def leftovers(state: LabState) -> tuple[str, ...]:
    """What of the laboratory still exists, in words; empty after a good sweep."""
    return (*_outside(state), *([f"folder {state.folder}"] if Path(state.folder).exists() else []))


def _outside(state: LabState) -> tuple[str, ...]:
    """The same but for the folder with the state file, which goes last."""
    found = [f"process {pid}" for pid in _processes(state)]
    found += [f"namespace {name}" for name in _namespaces(state)]
    found += [f"interface {name}" for name in root_interfaces(state)]
    found += [f"group {folder}" for folder in _groups(state) if folder.exists()]
    found += [f"folder {state.cache}"] if Path(state.cache).exists() else []
    return tuple(found)


def _processes(state: LabState) -> set[int]:
    """Every process of the laboratory: noted, in one of its groups, or in one of its namespaces; never this one."""
    found = {m.process.pid for m in state.machines if m.process is not None and m.process.is_alive}
    for folder in _groups(state):
        found.update(groups.members(folder))
    for name in _namespaces(state):
        told = try_run(["ip", "netns", "pids", name])
        if isinstance(told, str):
            found.update(int(line) for line in told.split())
    return found - {os.getpid()}


def _namespaces(state: LabState) -> tuple[str, ...]:
    names = [m.namespace for m in state.machines if m.namespace] + ([state.hub] if state.hub else [])
    return tuple(name for name in names if (NETNS_FOLDER / name).exists())


def _groups(state: LabState) -> tuple[Path, ...]:
    """Groups of the machines, then the folders that hold them."""
    inner = [Path(folder) for machine in state.machines for folder in machine.groups]
    return tuple(folder for folder in (*inner, *map(Path, state.groups)) if folder.exists())
