"""Where a laboratory keeps what it made: one private folder a laboratory, whose state file is written before anything else.

Names of namespaces, interfaces and groups follow from the laboratory's random id, so all of them are on disk before the
first exists; whoever cleans up later, needs nothing but this file and touches nothing that it does not name.
Folder: $ECOTONE_LABS, else /run/ecotone-labs for root, else $XDG_RUNTIME_DIR/ecotone-labs, else in the temporary folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ecotone import schema
from ecotone.cluster import Cluster, DeviceId
from ecotone.lab.commands import LabError, try_run

__all__ = [
    "Fabric", "LabState", "Machine", "ProcessId", "Request", "check_lab_name", "find_lab", "lab_folder", "lab_names",
    "labs_locked", "load_state", "plan_machines", "process_id", "save_state",
]  # fmt: skip

SCHEMA, VERSION = "ecotone.lab", 1
STATE, REQUEST, SOCKET = "state.json", "request.json", "control.sock"
MAX_MACHINES = 200
_NAME = re.compile(r"^[A-Za-z0-9_.\-]{1,64}$")

Fabric = Literal["relay", "bridge", "user"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessId:
    """A process, told from a later one of the same number by its start (clock ticks since boot)."""

    pid: int
    start: int

    @property
    def is_alive(self) -> bool:
        return process_id(self.pid) == self


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a laboratory shall be. `fabric` may be "auto"; `traces` are CSV texts by the names that links give."""

    name: str
    cluster: Cluster
    fabric: str = "auto"
    here: bool = False
    detached: bool = False
    seed: int = 0
    traces: dict[str, str]

    def save(self, folder: Path) -> None:
        schema.write_aside(folder / REQUEST, schema.dump_json(self, "ecotone.lab.request", 1))

    @staticmethod
    def load(folder: Path) -> Request:
        return schema.load_json(Request, (folder / REQUEST).read_text(), "ecotone.lab.request", 1, str(folder / REQUEST))


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One emulated machine. `namespace` is empty where it is the caller's own place; `port` is where its node listens."""

    device: DeviceId
    number: int
    address: str
    port: int
    namespace: str = ""
    interface: str = ""
    groups: tuple[str, ...] = ()
    process: ProcessId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabState:
    """All that a laboratory made or is about to make. `here`: the source is the place of whoever started it."""

    name: str
    identity: str
    fabric: Fabric
    cluster: Cluster
    machines: tuple[Machine, ...]
    here: bool
    folder: str
    cache: str
    subnet: str = ""
    hub: str = ""
    groups: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    supervisor: ProcessId | None = None
    seed: int = 0
    mtu: int = 1500

    def machine(self, device: str) -> Machine:
        """The machine of that name; raises LabError with the names there are."""
        for machine in self.machines:
            if machine.device == device:
                return machine
        known = ", ".join(machine.device for machine in self.machines)
        raise LabError(f'laboratory "{self.name}": no device "{device}"; devices are {known}')

    @property
    def is_up(self) -> bool:
        return self.supervisor is not None and self.supervisor.is_alive

    @property
    def source(self) -> Machine:
        return self.machine(self.cluster.source)

    def with_process(self, device: str, process: ProcessId | None) -> LabState:
        machines = tuple(replace(m, process=process) if m.device == device else m for m in self.machines)
        return replace(self, machines=machines)


def process_id(pid: int) -> ProcessId | None:
    """The process of this number with its start; None where there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else ProcessId(pid=pid, start=int(fields[19]))


def labs_root() -> Path:
    """The folder of all laboratories, made where missing, the owner's alone."""
    chosen = os.environ.get("ECOTONE_LABS")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if chosen:
        root = Path(chosen)
    elif os.geteuid() == 0 and os.access("/run", os.W_OK):
        root = Path("/run/ecotone-labs")
    else:
        root = Path(runtime) / "ecotone-labs" if runtime else Path(tempfile.gettempdir()) / f"ecotone-labs-{os.getuid()}"
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if root.stat().st_uid != os.getuid():
            raise LabError(f"{root}: belongs to somebody else; set ECOTONE_LABS to a folder of yours")
    except OSError as error:
        raise LabError(f"{root}: {error.strerror or error}; set ECOTONE_LABS to a folder of yours") from None
    return root.resolve()


def lab_folder(name: str) -> Path:
    return labs_root() / name


@contextlib.contextmanager
def labs_locked() -> Iterator[None]:
    """While inside, no other laboratory chooses its name or subnet."""
    with open(labs_root() / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lab_names() -> tuple[str, ...]:
    """Laboratories that have a folder, up or left behind."""
    return tuple(sorted(path.name for path in labs_root().iterdir() if path.is_dir()))


def find_lab(name: str = "") -> LabState:
    """The laboratory of that name, or the only one there is; raises LabError otherwise."""
    names = lab_names()
    if not name and len(names) > 1:
        raise LabError(f"which laboratory? {', '.join(names)} are there; give --lab NAME")
    if not names or (name and name not in names):
        which = f'laboratory "{name}"' if name else "no laboratory"
        known = f"; there are {', '.join(names)}" if names else ""
        raise LabError(f"{which} is {'not ' if name else ''}up{known}; start one with ecotone lab up home.toml")
    return load_state(lab_folder(name or names[0]))


def load_state(folder: Path) -> LabState:
    """Read a laboratory's state; raises LabError or SchemaError."""
    try:
        text = (folder / STATE).read_text()
    except OSError as error:
        raise LabError(
            f"{folder}: holds no laboratory ({error.strerror}); ecotone lab down --lab {folder.name} removes it"
        ) from None
    return schema.load_json(LabState, text, SCHEMA, VERSION, str(folder / STATE))


def save_state(state: LabState) -> None:
    """Write the state whole or not at all."""
    path = Path(state.folder) / STATE
    schema.write_aside(path, schema.dump_json(state, SCHEMA, VERSION))
    path.chmod(0o600)


def check_lab_name(name: str) -> None:
    """Raise LabError unless `name` may name a laboratory, a cluster or a device of one."""
    if not _NAME.match(name) or name.startswith("."):
        raise LabError(f'name "{name[:80]}": use 1 to 64 letters, digits, "-", "_" or "."')


def plan_machines(
    cluster: Cluster, *, fabric: Fabric, here: bool, identity: str, groups: tuple[Path, ...], subnet: str
) -> tuple[Machine, ...]:
    """Every machine with the names that it will have; raises LabError for a cluster that cannot be built."""
    if fabric == "user":
        return tuple(Machine(device=d.name, number=n, address="127.0.0.1", port=0) for n, d in enumerate(cluster.devices))
    hosts = list(ipaddress.ip_network(subnet).hosts())
    machines = []
    for number, device in enumerate(cluster.devices):
        is_here = here and device.name == cluster.source
        machines.append(
            Machine(
                device=device.name, number=number, address=str(hosts[number]), port=7447,
                namespace="" if is_here else f"ecotone-{identity}-{device.name}",
                interface=f"ec{identity}{number}",
                groups=() if is_here else tuple(str(folder / str(number)) for folder in groups),
            )
        )  # fmt: skip
    return tuple(machines)


def new_identity() -> str:
    """Six hex digits that no interface here bears."""
    while True:
        identity = secrets.token_hex(3)
        if not any(name.startswith((f"ec{identity}", f"eh{identity}")) for name in os.listdir("/sys/class/net")):
            return identity


def free_subnet(identity: str) -> str:
    """A private /24 that no route of this computer and no other laboratory has; call with the laboratories locked."""
    taken = [ipaddress.ip_network(text) for text in (*_routes(), *_other_subnets())]
    start = int(identity, 16)
    for step in range(64 * 256):
        index = (start + step) % (64 * 256)
        subnet = ipaddress.ip_network(f"10.{64 + index // 256}.{index % 256}.0/24")
        if not any(subnet.overlaps(other) for other in taken if other.version == 4):
            return str(subnet)
    raise LabError("no free subnet between 10.64.0.0 and 10.127.255.0; end other laboratories (ecotone lab down)")


def _routes() -> Iterator[str]:
    told = try_run(["ip", "-j", "route", "show", "table", "all"])
    if isinstance(told, str):
        for route in json.loads(told or "[]"):
            target = str(route.get("dst", ""))
            if re.match(r"^\d+\.\d+\.\d+\.\d+(/\d+)?$", target):
                yield target


def _other_subnets() -> Iterator[str]:
    for name in lab_names():
        with contextlib.suppress(LabError, schema.SchemaError):
            if subnet := load_state(lab_folder(name)).subnet:
                yield subnet
