"""The supervisor of one laboratory: a process that owns everything, obeys verbs, moves traces, and cleans up when it ends.

`python -m ecotone.lab.supervisor FOLDER`, started by Laboratory with request.json in the folder; it says one JSON line,
{"listening": true} or {"failed": why}, when the network stands and the nodes are starting. It ends, and removes what it
made, on SIGTERM, SIGINT, the verb "down", and, where it was not detached, on the end of its standard input (its parent's).
A supervisor that is killed takes its processes with it; the rest waits for `ecotone lab down` (sweep.py).

One loop and one thread: verbs come over a socket in the private folder, one JSON line in, one out.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ecotone import schema
from ecotone.lab.abilities import Abilities, abilities
from ecotone.lab.commands import LabError
from ecotone.lab.groups import find_controllers
from ecotone.lab.links import Links
from ecotone.lab.machines import KernelMachines
from ecotone.lab.network import LinkNow
from ecotone.lab.state import (
    SOCKET,
    Fabric,
    LabState,
    Request,
    free_subnet,
    labs_locked,
    new_identity,
    plan_machines,
    process_id,
    save_state,
)
from ecotone.lab.sweep import sweep
from ecotone.lab.userspace import REMARKS, UserMachines
from ecotone.linktrace import LinkTrace
from ecotone.units import EcotoneError

__all__ = ["main"]

POLL_S = 0.1
FAST_BYTES_PER_S = 12.5e6  # above it larger packets, or the relay would be what is measured
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cont": signal.SIGCONT}


class Supervisor:
    """One laboratory, from its state file to its removal."""

    def __init__(self, request: Request, state: LabState, machines: KernelMachines | UserMachines, links: Links):
        self._request, self._state = request, state
        self._machines, self._links = machines, links
        self._ended = False
        self._began_s = time.monotonic()
        self._stations: dict[str, str] = {}

    def serve(self, listener: socket.socket, wakeup: socket.socket) -> None:
        """Obey until something says that it is over."""
        inputs = [listener, wakeup] + ([] if self._request.detached else [sys.stdin.buffer])
        self._apply(self._links.start(time.monotonic()))
        while not self._ended:
            pause = min(POLL_S, max(0.0, self._links.next_change_s(time.monotonic()) - time.monotonic()))
            ready = select.select(inputs, [], [], pause)[0]
            if wakeup in ready or (sys.stdin.buffer in ready and not os.read(0, 4096)):
                return
            if listener in ready:
                self._answer(listener)
            self._stations = self._machines.poll()
            self._apply(self._links.follow(time.monotonic()))

    def _apply(self, links: list[LinkNow]) -> None:
        if links:
            with contextlib.suppress(LabError):  # a relay that has ended is told by status
                self._machines.set_links(links)

    def _answer(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(2.0)
            with connection.makefile("rwb") as stream:
                try:
                    reply = self._obey(json.loads(stream.readline() or b"{}"))
                except EcotoneError as error:
                    reply = {"failed": str(error)}
                except (KeyError, TypeError, ValueError, OSError) as error:
                    reply = {"failed": f"the laboratory did not understand: {type(error).__name__}: {error}"}
                stream.write(json.dumps(reply).encode() + b"\n")

    def _obey(self, command: dict[str, Any]) -> dict[str, Any]:
        verb = command["verb"]
        if verb in SIGNALS:
            self._machines.signal(command["device"], SIGNALS[verb])
            return {"done": verb}
        verbs: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "status": self._status, "restart": self._restart, "slow": self._slow, "down": self._down, "link": self._link,
            "cut": self._cut, "heal": self._heal, "trace": self._trace, "links": self._tell_links,
        }  # fmt: skip
        if verb not in verbs:
            raise LabError(f"verb {verb!r} is not known; {', '.join((*SIGNALS, *verbs))} are")
        return verbs[verb](command)

    def _restart(self, command: dict[str, Any]) -> dict[str, Any]:
        if self._machines.poll().get(command["device"]) in ("up", "starting", "stopped"):
            self._machines.signal(command["device"], signal.SIGKILL)
        self._machines.start(command["device"])
        return {"done": "restart"}

    def _slow(self, command: dict[str, Any]) -> dict[str, Any]:
        slowdown = float(command["slowdown"])
        if not 1 <= slowdown <= 1000:
            raise LabError(f"slowdown is {slowdown:g}; it must be from 1 (as fast as this computer) to 1000")
        self._machines.slow(command["device"], slowdown)
        return {"done": "slow"}

    def _down(self, command: dict[str, Any]) -> dict[str, Any]:
        self._ended = True
        return {"done": "down"}

    def _pairs(self, command: dict[str, Any]) -> list[tuple[str, str]]:
        return self._links.pairs(command["source"], command.get("target", ""), one_way=bool(command.get("one_way")))

    def _set(self, links: list[LinkNow]) -> dict[str, Any]:
        self._machines.set_links(links)
        return {"links": [schema.write(link) for link in links]}

    def _link(self, command: dict[str, Any]) -> dict[str, Any]:
        return self._set(self._links.change(self._pairs(command), command["values"]))

    def _cut(self, command: dict[str, Any]) -> dict[str, Any]:
        return self._set(self._links.cut(self._pairs(command)))

    def _heal(self, command: dict[str, Any]) -> dict[str, Any]:
        return self._set(self._links.heal(self._pairs(command) if command.get("source") else None))

    def _trace(self, command: dict[str, Any]) -> dict[str, Any]:
        text = command.get("csv")
        trace = None if text is None else LinkTrace.from_csv(text, command["name"], f"link trace {command['name']}")
        now_s = time.monotonic()
        start_s = now_s - float(command.get("at_s", 0.0))
        return self._set(self._links.trace(self._pairs(command), trace, start_s, now_s))

    def _tell_links(self, command: dict[str, Any]) -> dict[str, Any]:
        return {"links": [schema.write(link) for link in self._links.now.values()]}

    def _status(self, command: dict[str, Any]) -> dict[str, Any]:
        self._stations = self._machines.poll()
        state, now_s = self._machines.state, time.monotonic()
        counters = self._machines.counters() if command.get("counters", True) else {}
        return {
            "name": state.name, "fabric": state.fabric, "subnet": state.subnet, "seed": state.seed, "mtu": state.mtu,
            "here": state.here, "up_s": now_s - self._began_s, "supervisor": os.getpid(), "folder": state.folder,
            "remarks": list(state.remarks),
            "machines": [self._machine(machine.device) for machine in state.machines],
            "links": [
                schema.write(link) | {"trace_s": self._links.trace_time_s(pair, now_s), "counters": counters.get(pair, {})}
                for pair, link in self._links.now.items()
            ],
        }  # fmt: skip

    def _machine(self, device: str) -> dict[str, Any]:
        machine = self._machines.state.machine(device)
        place = "here" if self._machines.state.here else "for commands"
        found: dict[str, Any] = {
            "device": device, "address": f"{machine.address}:{machine.port}", "namespace": machine.namespace,
            "slowdown": self._machines.slowdowns[device], "pid": machine.process.pid if machine.process else None,
            "state": place if device == self._state.cluster.source else self._stations.get(device, "starting"),
        }  # fmt: skip
        with contextlib.suppress(psutil.Error):
            if machine.process is not None:
                found["rss_bytes"] = psutil.Process(machine.process.pid).memory_info().rss
        return found


def main() -> int:
    """Build, serve, remove; 2 where it cannot be built, with the reason on standard output."""
    folder = Path(sys.argv[1])
    wakeup, awake = socket.socketpair()
    wakeup.setblocking(False)
    awake.setblocking(False)
    signal.set_wakeup_fd(awake.fileno())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    request = Request.load(folder)
    state: LabState | None = None
    machines: KernelMachines | UserMachines | None = None
    try:
        found = abilities() if request.fabric != "user" else Abilities(missing="it was asked for (--fabric user)")
        with labs_locked():
            state = _plan(request, found, folder)
            save_state(state)
        Path(state.cache).mkdir(mode=0o700)
        links = Links(request.cluster, {n: LinkTrace.from_csv(csv, n, f"trace {n}") for n, csv in request.traces.items()})
        if state.fabric == "user":
            machines = UserMachines(state)
        else:
            machines = KernelMachines(state, netem=found.netem, version=found.version)
        machines.build(links.now.values())
        with _listen(folder) as listener:
            _say({"listening": True})
            Supervisor(request, state, machines, links).serve(listener, wakeup)
    except (EcotoneError, OSError) as error:
        _say({"failed": str(error)})
        return 2
    finally:
        if machines is not None:
            machines.close()
        if state is not None:
            sweep(machines.state if machines is not None else state)
    return 0


def _plan(request: Request, found: Abilities, folder: Path) -> LabState:
    """Everything that will be made, by name; raises LabError for what cannot be."""
    cluster, identity = request.cluster, new_identity()
    fabric = _fabric(request, found)
    roots: tuple[Path, ...] = ()
    subnet, remarks = "", list(REMARKS) if fabric == "user" else _remarks(request, found)
    if fabric == "user":
        remarks.insert(0, found.missing)
    else:
        roots = find_controllers().folders(f"ecotone-{identity}")
        subnet = free_subnet(identity)
    fastest = max((link.bandwidth_bytes_per_s for link in cluster.links), default=0.0)
    return LabState(
        name=request.name, identity=identity, fabric=fabric, cluster=cluster, here=request.here, folder=str(folder),
        machines=plan_machines(
            cluster, fabric=fabric, here=request.here, identity=identity, groups=roots, subnet=subnet
        ),
        cache=str(Path(tempfile.gettempdir()) / f"ecotone-lab-{identity}"), subnet=subnet, remarks=tuple(remarks),
        hub=f"ecotone-{identity}" if fabric == "bridge" else "", groups=tuple(str(root) for root in roots),
        supervisor=process_id(os.getpid()), seed=request.seed,
        mtu=9000 if fastest > FAST_BYTES_PER_S and fabric != "user" else 1500,
    )  # fmt: skip


def _fabric(request: Request, found: Abilities) -> Fabric:
    if not found.has_machines:
        if request.fabric in ("auto", "user"):
            return "user"
        raise LabError(f"fabric {request.fabric}: {found.missing}; without it: --fabric user")
    if request.fabric == "relay" or (request.fabric == "auto" and not found.netem):
        if found.tun:
            return "relay"
        if request.fabric == "auto" and not _needs_delay(request):
            return "bridge"
        if request.fabric == "auto":
            return "user"
        raise LabError("fabric relay: /dev/net/tun is missing here; load the module tun, or take --fabric user")
    if not found.bridge:
        raise LabError("fabric bridge: this kernel has no bridge; take --fabric relay")
    if _needs_delay(request) and not found.netem:
        raise LabError(
            "fabric bridge: this kernel lacks netem, so links cannot have latency, jitter or loss; take --fabric relay"
        )
    return "bridge"


def _needs_delay(request: Request) -> bool:
    return any(link.latency_s or link.jitter_s or link.loss or link.trace for link in request.cluster.links)


def _remarks(request: Request, found: Abilities) -> list[str]:
    """What does not hold as the cluster file says it."""
    remarks = []
    slow = [device for device in request.cluster.devices if device.slowdown > 1]
    if slow and not found.cpu:
        remarks.append("no CPU control group here: slowdown is not imposed on nodes")
    if not found.memory:
        remarks.append("no memory control group here: memory is not limited")
    wanted = sum(device.threads / device.slowdown for device in request.cluster.devices)
    if wanted > (os.cpu_count() or 1):
        remarks.append(
            f"the machines together may use {wanted:.3g} CPUs of {os.cpu_count()}: all busy, each is slower than stated"
        )
    return remarks


def _listen(folder: Path) -> socket.socket:
    """The socket of the verbs; bound by way of /proc, since its path may be too long for one."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        listener.bind(f"/proc/self/fd/{handle}/{SOCKET}")
    finally:
        os.close(handle)
    listener.listen(16)
    return listener


def _say(event: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # everything is removed by now; taking torch apart would only keep those who wait for the end
