"""Petals: the client holds embedding and head, servers hold blocks, all in a private swarm on loopback.

Two machines: two servers of half the blocks each; the client is on the first machine, the relay before the second. Whole:
one server with all blocks beside the client, since Petals has no engine without a server. float32 on processors.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from benchmarks.llm_shards import SHAPE
from benchmarks.peers.peer import (
    SPLIT_AT,
    Arrangement,
    Files,
    LineProcess,
    LinesSession,
    PeerError,
    Process,
    Session,
    free_port,
)
from benchmarks.tcp_relay import HOST, Relay

SCRIPT = Path(__file__).with_name("petals_client.py")


class Petals:
    """`python` has petals installed."""

    name = "Petals"
    precisions = ("f32",)

    def __init__(self, python: Path | None) -> None:
        self.python = python

    def missing(self) -> str | None:
        if self.python is None:
            return "no Python given (--petals)"
        return None if self.python.is_file() else f"{self.python} does not exist"

    def start(self, files: Files, arrangement: Arrangement) -> LinesSession:
        logs = Path(tempfile.mkdtemp(prefix="petals"))
        processes: list[Process] = []
        relays: list[Relay] = []
        blocks = [(0, SHAPE.num_layers)] if arrangement.machines == 1 else [(0, SPLIT_AT), (SPLIT_AT, SHAPE.num_layers)]
        peers: list[str] = []
        try:
            for index, span in enumerate(blocks):
                port = announced = free_port()
                if arrangement.relay and index == 1:
                    relays.append(Relay(port))
                    announced = relays[0].port
                processes.append(self._serve(files.folder, logs, span, (port, announced), peers, arrangement.cores[index]))
                peers.append(self._address(processes[-1], announced))
            command = [str(self.python), "-I", str(SCRIPT), str(files.folder), str(arrangement.context), *peers]
            client = LineProcess(command, logs / "client.log", arrangement.cores[0])
            processes.append(client)
            client.expect("ready", 60.0)
        except BaseException:
            Session(processes, relays).close()
            raise
        return LinesSession(client, processes, relays, processes[1] if len(blocks) == 2 else None)

    def _serve(
        self, folder: Path, logs: Path, span: tuple[int, int], ports: tuple[int, int], peers: list[str], core: int
    ) -> Process:
        first, last = span
        command = [
            str(self.python), "-m", "petals.cli.run_server", str(folder), "--block_indices", f"{first}:{last}",
            "--host_maddrs", f"/ip4/{HOST}/tcp/{ports[0]}", "--announce_maddrs", f"/ip4/{HOST}/tcp/{ports[1]}",
            "--dht_prefix", "benchmark", "--throughput", "1", "--skip_reachability_check", "--no_auto_relay",
            "--torch_dtype", "float32", "--device", "cpu", "--identity_path", str(logs / f"identity{first}"),
            "--num_handlers", "1", *(["--initial_peers", *peers] if peers else ["--new_swarm"]),
        ]  # fmt: skip
        return Process(command, logs / f"server{first}.log", core, env={"OMP_NUM_THREADS": "1"})

    def _address(self, server: Process, port: int) -> str:
        """The address that the server tells in its log; it says "Started" once its blocks are loaded."""
        server.wait_for(lambda: "Started" in server.tail(20_000), "does not start", timeout_s=120.0)
        found = re.findall(rf"/ip4/{re.escape(HOST)}/tcp/{port}/p2p/\w+", server.tail(40_000))
        if not found:
            raise PeerError(f"tells no address: {server.ending()}")
        return str(found[-1])
