"""Control groups, v1 and v2: how much CPU and memory an emulated machine has. Folders made and removed here, no others.

A quota of `share` CPUs is share * period every period. The period is 10 ms: with the usual 100 ms a device computes in
bursts and no latency is believable (measured). The kernel takes no quota under 1 ms, so below a tenth of a CPU the period
grows. A quota slows all instructions alike: it imitates neither small caches nor a missing vector unit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Controllers", "cpu_values", "find_controllers", "members", "remove", "set_cpu", "set_memory"]

PERIOD_US, MIN_QUOTA_US = 10_000, 1_000
WEIGHT = 8  # against other programs of this computer, so that machines get their quota while those are busy


@dataclass(frozen=True, slots=True, kw_only=True)
class Controllers:
    """The folders below which groups can be made; None where a controller is not to be had. The same one in v2."""

    version: int = 0
    cpu: Path | None = None
    memory: Path | None = None

    def folders(self, *names: str) -> tuple[Path, ...]:
        """The group folders called NAME/NAME..., one in v2, one for each controller in v1."""
        roots = [root for root in (self.cpu, self.memory) if root is not None]
        return tuple(dict.fromkeys(root.joinpath(*names) for root in roots))


def find_controllers(mounts: str | None = None, own: str | None = None) -> Controllers:
    """Look where this process's own groups are (so that limits set on it hold for the laboratory too).

    `mounts` and `own` are the texts of /proc/self/mountinfo and /proc/self/cgroup, for tests.
    """
    try:
        mounts = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
        own = Path("/proc/self/cgroup").read_text() if own is None else own
    except OSError:
        return Controllers()
    found = {name: root for name in ("cpu", "memory") if (root := _v1_root(name, mounts, own)) is not None}
    if found:
        return Controllers(version=1, cpu=found.get("cpu"), memory=found.get("memory"))
    for root in _v2_roots(mounts, own):
        with contextlib.suppress(OSError):
            controllers = set((root / "cgroup.controllers").read_text().split())
            if os.access(root / "cgroup.subtree_control", os.W_OK) and "cpu" in controllers and _hands_down(root):
                return Controllers(version=2, cpu=root, memory=root if "memory" in controllers else None)
    return Controllers()


def make(folders: tuple[Path, ...], version: int) -> None:
    """Make the group's folders, and below each the right to limit in v2; raises OSError."""
    for folder in folders:
        for part in (folder.parent, folder):
            if version == 2 and part.parent.exists():
                _hands_down(part.parent)
            part.mkdir(exist_ok=True)
        for name, weight in (("cpu.shares", 1024 * WEIGHT), ("cpu.weight", 100 * WEIGHT)):
            if (folder.parent / name).exists():
                (folder.parent / name).write_text(str(weight))


def cpu_values(share: float) -> tuple[int, int]:
    """(quota, period) in microseconds for `share` CPUs."""
    period = max(PERIOD_US, round(MIN_QUOTA_US / share))
    return max(MIN_QUOTA_US, round(share * period)), period


def set_cpu(folder: Path, share: float | None) -> None:
    """Give the group `share` CPUs, None: all there are. Raises OSError."""
    quota, period = cpu_values(share) if share is not None else (-1, PERIOD_US)
    if (folder / "cpu.max").exists():
        (folder / "cpu.max").write_text(f"{quota if share is not None else 'max'} {period}")
        return
    (folder / "cpu.cfs_quota_us").write_text("-1")
    (folder / "cpu.cfs_period_us").write_text(str(period))
    (folder / "cpu.cfs_quota_us").write_text(str(quota))


def set_memory(folder: Path, limit_bytes: int) -> None:
    """Let the group have `limit_bytes` and no swap; more, and the kernel kills it. Raises OSError."""
    if (folder / "memory.max").exists():
        (folder / "memory.max").write_text(str(limit_bytes))
        with contextlib.suppress(OSError):
            (folder / "memory.swap.max").write_text("0")
        return
    (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))


def members(folder: Path) -> tuple[int, ...]:
    """Process ids in the group; none where it is gone."""
    try:
        return tuple(int(line) for line in (folder / "cgroup.procs").read_text().split())
    except (OSError, ValueError):
        return ()


def remove(folder: Path) -> bool:
    """Remove an empty group and those below it; False while something is in it."""
    if not folder.exists():
        return True
    for below in [part for part in folder.iterdir() if part.is_dir()]:
        remove(below)
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def _v1_root(controller: str, mounts: str, own: str) -> Path | None:
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.partition(" ")
        if kind == "cgroup" and controller in options.split(" ")[-1].split(","):
            return _inside(Path(left.split()[4]), left.split()[3], _own_path(controller, own))
    return None


def _v2_roots(mounts: str, own: str) -> Iterator[Path]:
    """This process's own group, then those above it."""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            root = Path(left.split()[4])
            folder = _inside(root, left.split()[3], _own_path("", own))
            yield folder
            yield from (above for above in folder.parents if above == root or root in above.parents)


def _own_path(controller: str, own: str) -> str:
    for line in own.splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path
    return "/"


def _inside(mount: Path, root: str, own: str) -> Path:
    """`own` below `mount`, which shows the tree from `root` on."""
    inner = own.removeprefix(root) if root != "/" else own
    folder = mount / inner.lstrip("/")
    return folder if folder.exists() else mount


def _hands_down(folder: Path) -> bool:
    """Let groups below `folder` be limited (v2); refused by the kernel while processes are in `folder` itself."""
    control = folder / "cgroup.subtree_control"
    has = set(control.read_text().split())
    for name in ("cpu", "memory"):
        if name not in has:
            with contextlib.suppress(OSError):
                control.write_text(f"+{name}")
    return "cpu" in control.read_text().split()
