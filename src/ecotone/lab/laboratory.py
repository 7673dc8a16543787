"""The laboratory as a program uses it: started, changed, asked, ended. Everything is done by its supervisor's process.

`with Laboratory(cluster) as laboratory:` gives emulated machines for as long as the block lasts; the calling process is the
source: its own network namespace holds the source's interface, so that `laboratory.nodes()` is an asker as in
runtime.attach. The supervisor ends with the caller, however it ends. `Laboratory.found(name)` is one that runs already.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ecotone import schema
from ecotone.cluster import Cluster, DeviceId, Link
from ecotone.lab.commands import LabError, entering
from ecotone.lab.machines import machine_environment
from ecotone.lab.network import LinkNow
from ecotone.lab.state import (
    MAX_MACHINES,
    SOCKET,
    LabState,
    Request,
    check_lab_name,
    find_lab,
    lab_folder,
    labs_locked,
    load_state,
)
from ecotone.lab.sweep import end_supervisor, sweep
from ecotone.lab.userspace import CUT_BYTES_PER_S
from ecotone.linktrace import LinkTrace, load_trace
from ecotone.runtime import Nodes, attach
from ecotone.trust.identity import Identity
from ecotone.units import EcotoneError

__all__ = ["Laboratory"]

FABRICS = ("auto", "relay", "bridge", "user")
BUILD_S, VERB_S, FOLLOW_S = 120.0, 120.0, 0.05


class Laboratory:
    """Emulated machines for `cluster`. Start by entering it or by `up`; `nodes` is an asker in the source's place.

    `name` tells laboratories apart (default: the cluster's name and this process's id). `here`: the source is this process,
    else a machine of its own for `run_in`. `fabric`: "auto", "relay", "bridge", or "user" for emulation without root, which
    "auto" falls back to; `status()["remarks"]` says what then differs. `traces`: link traces by the name that links give,
    instead of those shipped or on disk. `seed` decides losses and jitter. Raises LabError.
    """

    def __init__(
        self, cluster: Cluster, *, name: str = "", here: bool = True, fabric: str = "auto", seed: int = 0,
        traces: Mapping[str, LinkTrace] | None = None, detached: bool = False,
    ):  # fmt: skip
        self.cluster = cluster
        self.name = name or f"{cluster.name}-{os.getpid()}"
        for one in (self.name, cluster.name, *(device.name for device in cluster.devices)):
            check_lab_name(one)
        if len(cluster.devices) > MAX_MACHINES:
            raise LabError(
                f"cluster {cluster.name}: {len(cluster.devices)} devices; a laboratory has at most {MAX_MACHINES}"
            )
        if fabric not in FABRICS:
            raise LabError(f"fabric {fabric!r} is not known; {', '.join(FABRICS)} are")
        given = dict(traces or {})
        wanted = {link.trace: given.get(link.trace) or load_trace(link.trace) for link in cluster.links if link.trace}
        self._request = Request(
            name=self.name, cluster=cluster, fabric=fabric, here=here, detached=detached, seed=seed,
            traces={key: trace.to_csv() for key, trace in wanted.items()},
        )  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = contextlib.ExitStack()

    @classmethod
    def found(cls, name: str = "") -> Laboratory:
        """The laboratory of that name, or the only one, that another process started; raises LabError."""
        state = find_lab(name)
        if not state.is_up:
            raise LabError(
                f'laboratory "{state.name}" has lost its supervisor; clean up with ecotone lab down --lab {state.name}'
            )
        bare = replace(state.cluster, links=tuple(replace(link, trace="") for link in state.cluster.links))
        laboratory = cls(bare, name=state.name, here=state.here)
        laboratory.cluster = state.cluster
        return laboratory

    def up(self, deadline_s: float = BUILD_S) -> Self:
        """Build it and wait until every node is up; raises LabError, leaving nothing behind."""
        folder = self._claim()
        self._request.save(folder)
        detached = self._request.detached
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ecotone.lab.supervisor", str(folder)],
            stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if detached else None,
            start_new_session=True,
        )
        end = time.monotonic() + deadline_s
        try:
            self._await_built(end)
            self.wait_until_up(deadline_s=max(1.0, end - time.monotonic()))
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """End it and remove all that it made; a second time does nothing. Raises LabError naming what stays."""
        self._closing.close()
        with contextlib.suppress(LabError, schema.SchemaError):
            state = load_state(lab_folder(self.name))
            end_supervisor(state)
        if self._process is not None:
            self._end_process(self._process)
        remove_lab(self.name)

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    @property
    def state(self) -> LabState:
        """What was made, from its file; raises LabError where the laboratory is not up."""
        return load_state(lab_folder(self.name))

    def status(self, *, counters: bool = True) -> dict[str, Any]:
        """Machines, links with rates and counters now, and remarks: what `ecotone lab status --json` prints."""
        return self._ask({"verb": "status", "counters": counters})

    def wait_until_up(self, *devices: str, deadline_s: float = 60.0) -> None:
        """Return when the nodes of `devices` (all) are up; raises LabError when one has ended or time is over."""
        end = time.monotonic() + deadline_s
        while True:
            machines = self.status(counters=False)["machines"]
            chosen = [m for m in machines if (m["device"] in devices or not devices) and m["device"] != self.cluster.source]
            for machine in chosen:
                if machine["state"].startswith("ended"):
                    raise LabError(f'machine "{machine["device"]}" did not come up: {machine["state"]}')
            late = [m["device"] for m in chosen if m["state"] == "starting"]
            if not late:
                return
            if time.monotonic() > end:
                raise LabError(f"{', '.join(late)}: not up within {deadline_s:g} s; is this computer overloaded?")
            time.sleep(0.05)

    def kill(self, device: str) -> None:
        """kill -9 the node of `device`."""
        self._ask({"verb": "kill", "device": device})

    def restart(self, device: str, *, wait: bool = True) -> None:
        """Start the node of `device` again, killing it first where it runs; with `wait`, return when it is up."""
        self._ask({"verb": "restart", "device": device})
        if wait:
            self.wait_until_up(device)

    def stop(self, device: str) -> None:
        """Freeze the node (SIGSTOP): it holds its connections and says nothing."""
        self._ask({"verb": "stop", "device": device})

    def cont(self, device: str) -> None:
        """Let a frozen node go on (SIGCONT)."""
        self._ask({"verb": "cont", "device": device})

    def slow(self, device: str, slowdown: float) -> None:
        """Make a machine `slowdown` times slower than this computer."""
        self._ask({"verb": "slow", "device": device, "slowdown": slowdown})

    def cut(self, source: str, target: str = "", *, one_way: bool = False) -> None:
        """Let nothing pass between two machines (or from and to one); with `one_way`, only from source to target."""
        self._take(self._ask({"verb": "cut", "source": source, "target": target, "one_way": one_way}))

    def heal(self, source: str = "", target: str = "", *, one_way: bool = False) -> None:
        """End cuts: all, those of one machine, or those between two."""
        self._take(self._ask({"verb": "heal", "source": source, "target": target, "one_way": one_way}))

    def link(
        self, source: str, target: str, *, bytes_per_s: float | None = None, latency_s: float | None = None,
        jitter_s: float | None = None, loss: float | None = None, one_way: bool = False,
    ) -> None:  # fmt: skip
        """Set what is given of a link now, both ways unless `one_way`; it no longer follows a trace."""
        values = {"bytes_per_s": bytes_per_s, "latency_s": latency_s, "jitter_s": jitter_s, "loss": loss}
        stated = {name: value for name, value in values.items() if value is not None}
        self._take(self._ask({"verb": "link", "source": source, "target": target, "one_way": one_way, "values": stated}))

    def trace(
        self, source: str, target: str, trace: LinkTrace | str | None, *, at_s: float = 0.0, one_way: bool = False
    ) -> None:
        """Have a link follow `trace` (a shipped name, a path, or a trace) from its second `at_s` on; None: no more."""
        found = load_trace(trace) if isinstance(trace, str) else trace
        command: dict[str, Any] = {"verb": "trace", "source": source, "target": target, "one_way": one_way, "at_s": at_s}
        if found is not None:
            command |= {"name": found.name, "csv": found.to_csv()}
        self._take(self._ask(command))

    def environment(self, device: str) -> dict[str, str]:
        """Variables that make a process a member of the cluster as `device`."""
        return machine_environment(self.state, device)

    def command_in(self, device: str, command: Sequence[str]) -> list[str]:
        """`command` as it has to be started, with `environment`, to run inside a machine."""
        machine = self.state.machine(device)
        return [*entering(machine.namespace, machine.groups), *command]

    def run_in(self, device: str, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside a machine, as subprocess.run does with `options`; text by default."""
        variables = {**os.environ, **self.environment(device), **options.pop("env", {})}
        options = {"text": True, "capture_output": True} | options
        return subprocess.run(self.command_in(device, command), env=variables, **options)

    def nodes(self, deadline_s: float = 20.0) -> Nodes:
        """An asker in this process as the source, attached to every node; closed with the laboratory at the latest.

        Only where the laboratory was started with `here`. The source's slowdown stretches its lanes, as in an emulated
        cluster: this process is in no control group. Raises LabError, WireError or NodeUnreachable.
        """
        state = self.state
        if not state.here:
            raise LabError(f'laboratory "{self.name}": its source is a machine of its own: use run_in, or here=True')
        folder = Path(state.folder)
        cluster = Cluster.load(folder / "cluster.toml")
        identity = None
        if state.fabric != "user":
            identity = Identity.load(cluster.name, folder / "home" / cluster.source / cluster.name)
        nodes = attach(cluster, identity=identity, deadline_s=deadline_s)
        self._closing.callback(nodes.close)
        if state.fabric == "user":
            self._follow(nodes)
        elif (slowdown := state.cluster.device(cluster.source).slowdown) > 1:
            devices = tuple(replace(d, slowdown=slowdown) if d.name == cluster.source else d for d in cluster.devices)
            nodes.cluster = replace(cluster, devices=devices, emulate=True)
        return nodes

    def _follow(self, nodes: Nodes) -> None:
        """Without root: impose on the asker's own links what verbs and traces say, at most FOLLOW_S later."""
        ended = threading.Event()

        def follow() -> None:
            before: dict[str, LinkNow] = {}
            while not ended.wait(FOLLOW_S):
                with contextlib.suppress(EcotoneError, OSError):
                    for link in self._links():
                        if link.source == nodes.cluster.source and before.get(link.target) != link:
                            impose(nodes, link)
                            before[link.target] = link

        follower = threading.Thread(target=follow, name="lab-links", daemon=True)
        follower.start()
        self._closing.callback(follower.join, 5.0)
        self._closing.callback(ended.set)
        self._imposed = nodes

    _imposed: Nodes | None = None

    def _take(self, answer: Mapping[str, Any]) -> None:
        """Impose changes on this asker's own links at once, where nobody else does."""
        if self._imposed is not None:
            for link in schema.read(tuple[LinkNow, ...], answer["links"], "laboratory"):
                if link.source == self.cluster.source:
                    impose(self._imposed, link)

    def _links(self) -> tuple[LinkNow, ...]:
        return schema.read(tuple[LinkNow, ...], self._ask({"verb": "links"})["links"], "laboratory")

    def _claim(self) -> Path:
        """Make the folder that bears the name; raises LabError where it is up, cleans up after one that died."""
        folder = lab_folder(self.name)
        with labs_locked():
            if folder.exists():
                with contextlib.suppress(LabError, schema.SchemaError):
                    state = load_state(folder)
                    if state.is_up and state.supervisor is not None:
                        raise _Up(
                            f'laboratory "{self.name}" is up already (process {state.supervisor.pid}); end it with '
                            f"ecotone lab down --lab {self.name}, or choose another --name"
                        )
                remove_lab(self.name)
            folder.mkdir(mode=0o700)
        return folder

    def _await_built(self, end: float) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            raise LabError(f'laboratory "{self.name}": not built in time; is this computer overloaded?')
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"failed": "its supervisor ended without a word"}
        if "failed" in answer:
            raise LabError(f'laboratory "{self.name}": {answer["failed"]}')

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        folder = lab_folder(self.name)
        try:
            handle = os.open(folder, os.O_PATH | os.O_DIRECTORY)
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.settimeout(VERB_S)
                    connection.connect(f"/proc/self/fd/{handle}/{SOCKET}")
                    connection.sendall(json.dumps(command).encode() + b"\n")
                    with connection.makefile("rb") as stream:
                        answer = json.loads(stream.readline() or b'{"failed": "its supervisor ended meanwhile"}')
            finally:
                os.close(handle)
        except (OSError, ValueError) as error:
            raise LabError(f'laboratory "{self.name}" does not answer ({error}); ecotone lab down cleans up') from None
        if "failed" in answer:
            raise LabError(str(answer["failed"]))
        return dict(answer)

    @staticmethod
    def _end_process(process: subprocess.Popen[bytes]) -> None:
        """Wait for our supervisor, closing its lifeline."""
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10.0)


class _Up(EcotoneError):
    """A laboratory of that name runs; apart from LabError, which says that its file cannot be read."""


def impose(nodes: Nodes, link: LinkNow) -> None:
    """Give the asker's own end of an emulated link what `link` says."""
    nodes.set_link(
        Link(
            source=DeviceId(link.source), target=DeviceId(link.target), latency_s=link.latency_s,
            bandwidth_bytes_per_s=link.bytes_per_s if link.passes else CUT_BYTES_PER_S,
        )
    )  # fmt: skip


def remove_lab(name: str) -> None:
    """Remove what is left of a laboratory whose supervisor has ended; raises LabError naming what stays."""
    folder = lab_folder(name)
    if not folder.exists():
        return
    try:
        state = load_state(folder)
    except (LabError, schema.SchemaError):  # it ended before anything was made
        shutil.rmtree(folder, ignore_errors=True)
        return
    if state.is_up:
        end_supervisor(state)
    sweep(state)
