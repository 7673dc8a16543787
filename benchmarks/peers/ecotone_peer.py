"""Ecotone: the driver is the first machine and holds the first half of the layers, a node (`ecotone up`) the second half.

`apart`: the driver holds nothing, both halves are on nodes (which find each other, past a relay). It is not stopped while
others are measured: it waits in system calls, and a node that is frozen is a node that is lost.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers.peer import (
    Arrangement,
    Files,
    LineProcess,
    LinesSession,
    Process,
    Session,
    free_port,
    wait_for_port,
)
from benchmarks.tcp_relay import HOST, Relay

EXECUTORS = {"f32": "native:fp32", "4": "native:int4", "8": "native:int8"}


class Ecotone:
    """`executors`: of each precision."""

    NAME = "Ecotone"

    def __init__(self, executors: Mapping[str, str] = EXECUTORS, apart: bool = False, name: str = "") -> None:
        self.name = name or (f"{self.NAME}, driver apart" if apart else self.NAME)
        self.executors, self.apart = executors, apart
        self.precisions = tuple(executors)

    def missing(self) -> str | None:
        return None

    def start(self, files: Files, arrangement: Arrangement) -> LinesSession:
        logs = Path(tempfile.mkdtemp(prefix="ecotone-peer"))
        processes: list[Process] = []
        relays: list[Relay] = []
        nodes: list[tuple[str, str]] = []  # name, address
        try:
            if arrangement.machines == 2:
                for core in (0, 1) if self.apart else (1,):
                    target = self._serve(logs, arrangement, core, processes, [address for _, address in nodes])
                    name = f"node{target}"
                    if arrangement.relay and core == 1:
                        relays.append(Relay(target))
                        target = relays[0].port
                    nodes.append((name, f"{HOST}:{target}"))
            about = {
                "folder": str(files.folder), "executor": self.executors[arrangement.precision],
                "context": arrangement.context,
                "threads": arrangement.threads, "store": str(logs / "store"),
                "nodes": nodes, "apart": self.apart,
            }  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.peers.ecotone_client", json.dumps(about)]
            threads = {"OMP_NUM_THREADS": str(arrangement.threads)}
            client = LineProcess(command, logs / "client.log", arrangement.cores[0], threads)
            processes.append(client)
            client.expect("ready", 120.0)
        except BaseException:
            Session(processes, relays).close()
            raise
        return LinesSession(client, processes, relays, processes[-2] if arrangement.machines == 2 else None)

    def _serve(
        self, logs: Path, arrangement: Arrangement, core: int, processes: list[Process], connect: Sequence[str]
    ) -> int:
        """Start a node called node<port>, so that each has a weight store of its own; its port."""
        port, threads = free_port(), str(arrangement.threads)
        command = [
            sys.executable,
            "-m",
            "ecotone",
            "up",
            "--name",
            f"node{port}",
            "--listen",
            f"{HOST}:{port}",
            "--threads",
            threads,
        ]
        for address in connect:
            command += ["--connect", address]
        process = Process(command, logs / f"node{core}.log", arrangement.cores[core], {"OMP_NUM_THREADS": threads})
        processes.append(process)
        wait_for_port(port, process)
        return port
