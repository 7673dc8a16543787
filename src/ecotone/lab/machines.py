"""The machines of a laboratory with root: processes of `ecotone up` in namespaces and control groups, members by mutual TLS.

A machine starts without CPU quota, or importing torch on a twentieth of a core would take a minute; the quota comes when its
node says that it is up. Every process here ends with the supervisor, by the kernel's own hand (PR_SET_PDEATHSIG), so all of
them must be started from the supervisor's main thread, which lives as long as it does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ecotone import schema
from ecotone.cluster import Cluster, Device
from ecotone.lab import groups
from ecotone.lab.commands import LabError, entering
from ecotone.lab.network import LinkNow, Network
from ecotone.lab.state import LabState, Machine, process_id, save_state
from ecotone.trust.identity import Authority

__all__ = ["KernelMachines", "cluster_toml", "machine_environment", "member_cluster"]

BASE_BYTES = 600 << 20
"""What Python, torch and Zenoh take before the first model; a device's memory is what is left for models."""
UP = b" is up at "


class KernelMachines:
    """Everything of one laboratory that the kernel carries. The state's processes are kept up to date on disk."""

    def __init__(self, state: LabState, *, netem: bool, version: int):
        self.state = state
        self._network = Network(state, netem=netem)
        self._version = version
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._loading: dict[str, int] = {}  # device -> how long its log was when the node was started
        self._slowdown = {device.name: device.slowdown for device in state.cluster.devices}

    def build(self, links: Iterable[LinkNow]) -> None:
        """Keys, groups, network, and a node for every device but the source; raises LabError or TrustError."""
        folder, cluster = Path(self.state.folder), self.state.cluster
        authority = Authority.create(cluster.name, folder / "authority")
        for machine in self.state.machines:
            home = folder / "home" / machine.device / cluster.name
            authority.issue(machine.device, directory=home, addresses=[machine.address])
        schema.write_aside(folder / "cluster.toml", cluster_toml(member_cluster(self.state)))
        for machine in self.state.machines:
            self._make_groups(machine)
        self._network.build(links)
        for machine in self.state.machines:
            if machine.device != cluster.source:
                self.start(machine.device)

    def start(self, device: str) -> None:
        """Start the node of `device`; raises LabError where it runs. `poll` says when it is up."""
        if self._is_running(device):
            raise LabError(f'machine "{device}" is up already; kill it first')
        machine = self.state.machine(device)
        others = [m for m in self.state.machines if m.device not in (device, self.state.cluster.source)]
        command = [
            *entering(machine.namespace, machine.groups, os.getpid()), sys.executable, "-m", "ecotone", "up",
            "--name", device, "--cluster", str(Path(self.state.folder) / "cluster.toml"),
            "--network", self.state.cluster.name, "--listen", f"{machine.address}:{machine.port}", "--retry",
            *(word for other in others for word in ("--connect", f"{other.address}:{other.port}")),
        ]  # fmt: skip
        self._limit(machine, None)
        log = Path(self.state.folder) / "logs" / f"{device}.log"
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab") as file:
            self._loading[device] = file.tell()
            self._running[device] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                env=os.environ | machine_environment(self.state, device),
            )  # fmt: skip
        self._note(device)

    def poll(self) -> dict[str, str]:
        """Bring quotas to nodes that have come up; returns what each machine is: up, starting, stopped or ended: why."""
        found = {}
        for device, process in self._running.items():
            if process.poll() is not None:
                found[device] = f"ended: {self._last_words(device, process.returncode)}"
                self._loading.pop(device, None)
                continue
            if device in self._loading and UP in self._log(device):
                del self._loading[device]
                self._limit(self.state.machine(device), self._slowdown[self.state.machine(device).device])
            found[device] = "starting" if device in self._loading else self._run_state(process.pid)
        return found

    def signal(self, device: str, number: int) -> None:
        """Send the node of `device` a signal; a SIGKILL has been carried out when this returns. Raises LabError."""
        if not self._is_running(device):
            raise LabError(f'machine "{device}" is not running; ecotone lab restart {device}')
        process = self._running[device]
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait(10.0)
            self._note(device)

    def slow(self, device: str, slowdown: float) -> None:
        """Make a machine `slowdown` times slower than this computer, live; raises LabError without control groups."""
        machine = self.state.machine(device)
        if not machine.groups:
            raise LabError(f'machine "{device}" has no control group here, so its speed cannot be changed')
        self._slowdown[machine.device] = slowdown
        if device not in self._loading:
            self._limit(machine, slowdown)

    def set_links(self, links: Iterable[LinkNow]) -> None:
        self._network.set_links(links)

    def counters(self) -> dict[tuple[str, str], dict[str, int]]:
        return self._network.counters()

    @property
    def slowdowns(self) -> dict[str, float]:
        return {str(name): factor for name, factor in self._slowdown.items()}

    def close(self) -> None:
        """End nodes and relay; namespaces and groups are removed by the state file."""
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait(10.0)
        self._network.close()

    def _make_groups(self, machine: Machine) -> None:
        folders = tuple(Path(group) for group in machine.groups)
        try:
            groups.make(folders, self._version)
            for folder in folders:
                if (folder / "memory.max").exists() or (folder / "memory.limit_in_bytes").exists():
                    groups.set_memory(folder, self._device(machine).memory_bytes + BASE_BYTES)
        except OSError as error:
            raise LabError(f'machine "{machine.device}": its control group cannot be made: {error}') from None
        if machine.device == self.state.cluster.source:
            self._limit(machine, self._slowdown[machine.device])

    def _limit(self, machine: Machine, slowdown: float | None) -> None:
        """The CPU that the machine has: its threads over `slowdown`, or all there is (None, or 1 with threads to spare)."""
        share = None if slowdown is None else self._device(machine).threads / slowdown
        for group in machine.groups:
            if any((Path(group) / name).exists() for name in ("cpu.max", "cpu.cfs_quota_us")):
                try:
                    groups.set_cpu(Path(group), share)
                except OSError as error:
                    raise LabError(f'machine "{machine.device}": its CPU quota cannot be set: {error}') from None

    def _device(self, machine: Machine) -> Device:
        return self.state.cluster.device(machine.device)

    def _is_running(self, device: str) -> bool:
        self.state.machine(device)
        if device == self.state.cluster.source:
            raise LabError(
                f'"{device}" is the source: it has no node, commands run there (ecotone lab exec {device} -- ...)'
            )
        return device in self._running and self._running[device].poll() is None

    def _note(self, device: str) -> None:
        process = self._running[device]
        alive = process_id(process.pid) if process.poll() is None else None
        self.state = self.state.with_process(device, alive)
        save_state(self.state)

    def _log(self, device: str) -> bytes:
        with open(Path(self.state.folder) / "logs" / f"{device}.log", "rb") as file:
            file.seek(self._loading.get(device, 0))
            return file.read(1 << 20)

    def _last_words(self, device: str, status: int) -> str:
        if status == -signal.SIGKILL:
            return "killed"
        lines = [line.strip() for line in self._log(device)[-4000:].decode("utf-8", "replace").splitlines() if line.strip()]
        return f"status {status}; it said last: {lines[-1][:300] if lines else 'nothing'}"

    @staticmethod
    def _run_state(pid: int) -> str:
        try:
            letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "ended"
        return "stopped" if letter == "T" else "up"


def member_cluster(state: LabState) -> Cluster:
    """The cluster file of those inside: real machines at addresses, nothing emulated by them."""
    ports = {machine.device: f"{machine.address}:{machine.port}" for machine in state.machines}
    cluster = state.cluster
    devices = tuple(
        replace(device, slowdown=1.0, address="" if device.name == cluster.source else ports[device.name])
        for device in cluster.devices
    )
    return replace(cluster, devices=devices, emulate=False)


def machine_environment(state: LabState, device: str) -> dict[str, str]:
    """Variables that make a process inside the machine a member of the laboratory's cluster."""
    folder, threads = Path(state.folder), str(state.cluster.device(device).threads)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {
        "ECOTONE_LAB": state.name,
        "ECOTONE_CLUSTER": str(folder / "cluster.toml"),
        "ECOTONE_HOME": str(folder / "home" / device),
        "ECOTONE_CACHE": str(Path(state.cache) / device),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "COLUMNS": os.environ.get("COLUMNS", "200"),
        "PATH": path,
    }


def cluster_toml(cluster: Cluster) -> str:
    """`cluster` as the TOML file that Cluster.load reads."""
    lines = ['schema = "ecotone.cluster"', "version = 1"]
    lines += _fields({"name": cluster.name, "source": cluster.source, "sink": cluster.sink, "emulate": cluster.emulate})
    for device in cluster.devices:
        lines += ["", "[[device]]", *_fields(schema.write(device))]
    for link in cluster.links:
        lines += ["", "[[link]]", *_fields(schema.write(link) | {"duplex": False})]
    return "\n".join(lines) + "\n"


def _fields(values: dict[str, object]) -> list[str]:
    """TOML lines; strings, numbers and flat tables are written alike in JSON, but for the equals sign."""
    lines = []
    for name, value in values.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict):
            text = "{ " + ", ".join(f"{key} = {json.dumps(item)}" for key, item in value.items()) + " }"
        lines.append(f"{name} = {text}")
    return lines
