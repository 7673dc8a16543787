"""What the laboratory can do on this computer, found by trying: rights, namespaces, TUN, queueing disciplines, groups.

Nothing is left behind: each try runs in a network namespace without a name that ends with its process.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from ecotone.lab.commands import LabError, entering, try_run
from ecotone.lab.groups import find_controllers

__all__ = ["Abilities", "abilities"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """`missing` says in words why there are no kernel machines; empty: there are."""

    missing: str = ""
    netem: bool = False
    tun: bool = False
    bridge: bool = False
    cpu: bool = False
    memory: bool = False
    version: int = 0  # of control groups, 0: none

    @property
    def has_machines(self) -> bool:
        return not self.missing

    def sentence(self) -> str:
        """One line for `ecotone doctor`."""
        if self.missing:
            return f"user-space emulation only: {self.missing}"
        delay = "netem" if self.netem else "our TUN relay (no netem here)" if self.tun else "none (no netem, no TUN)"
        limits = [word for word, has in (("CPU quota", self.cpu), ("memory limit", self.memory)) if has]
        held = f"{' and '.join(limits)} by control groups v{self.version}" if limits else "no control groups"
        return f"namespaces, rates by htb, delay and loss by {delay}, {held}"


def abilities() -> Abilities:
    """Try everything; takes about 0.3 s with root, nothing without."""
    missing = _missing()
    if missing:
        return Abilities(missing=missing)
    controllers = find_controllers()
    return Abilities(
        netem=_tc_works("netem delay 1ms"),
        tun=_works("ip", "tuntap", "add", "dev", "probe", "mode", "tun"),
        bridge=_works("ip", "link", "add", "probe", "type", "bridge"),
        cpu=controllers.cpu is not None,
        memory=controllers.memory is not None,
        version=controllers.version,
    )


def _missing() -> str:
    if not hasattr(os, "geteuid") or os.uname().sysname != "Linux":
        return "emulated machines need Linux"
    if os.geteuid() != 0:
        return "emulated machines need root (sudo)"
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"the command {command} is not installed (Debian: apt install iproute2)"
    made = try_run([*entering("new"), "true"])
    if isinstance(made, LabError):
        return "this kernel or container forbids network namespaces"
    if not _tc_works("htb default 1"):
        return "this kernel has no htb queueing discipline (module sch_htb)"
    return ""


def _works(*command: str) -> bool:
    return not isinstance(try_run([*entering("new"), *command]), LabError)


def _tc_works(discipline: str) -> bool:
    return _works("tc", "qdisc", "add", "dev", "lo", "root", *discipline.split())
