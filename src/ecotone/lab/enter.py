"""Become another command inside a laboratory's machine: its control groups, its network namespace, its parent's lifeline.

Run as a script, by path, with nothing but the standard library, so that it costs milliseconds and the command keeps the
process id: `python enter.py OPTION... -- COMMAND ARGUMENT...`. Options: `group=DIRECTORY` joins a control group,
`netns=PATH` enters a network namespace, `netns=new` a fresh one without a name, `die=PID` has the kernel end the command
when its parent PID ends. Status 125: could not enter, with the reason on standard error; 127: no such command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Enter and exec; returns only where that failed."""
    try:
        split = arguments.index("--")
    except ValueError:
        split = len(arguments)
    options, command = arguments[:split], arguments[split + 1 :]
    if not command:
        print(f"{sys.argv[0]}: no command after --", file=sys.stderr)
        return 125
    try:
        for option in options:
            apply(*option.split("=", 1))
    except (OSError, TypeError, ValueError) as error:
        print(f"cannot enter the machine ({option}): {error}", file=sys.stderr)
        return 125
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
    return 127


def apply(kind: str, value: str) -> None:
    """Carry out one option; raises OSError or ValueError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if kind == "group":
        with open(os.path.join(value, "cgroup.procs"), "w") as file:
            file.write(str(os.getpid()))
    elif kind == "netns" and value == "new":
        check(libc.unshare(CLONE_NEWNET))
    elif kind == "netns":
        handle = os.open(value, os.O_RDONLY | os.O_CLOEXEC)
        check(libc.setns(handle, CLONE_NEWNET))
        os.close(handle)
    elif kind == "die":
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        if os.getppid() != int(value):  # the parent ended before the kernel knew what to do
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise ValueError("not known")


def check(result: int) -> None:
    """Raise what the C library left in errno."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
