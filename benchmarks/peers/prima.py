"""prima.cpp: a ring of processes, `llama-server` as rank 0, `llama-cli` as rank 1, half of the layers each, no prefetching.

Rank r listens on data port + r and sends to the next rank on the same base port, so with a base port per rank a relay fits
before each rank: one hop of the ring per direction, as over one cable. Ranks listen on every interface of the machine as
published: run it where nobody else can reach it.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.llm_shards import SHAPE
from benchmarks.peers.llama_cpp import LlamaCppRunning
from benchmarks.peers.peer import SPLIT_AT, Arrangement, Files, Process, Session, free_port, wait_for_port
from benchmarks.tcp_relay import HOST, Relay


class Prima:
    """`folder` holds llama-server and llama-cli of prima.cpp."""

    name = "prima.cpp"
    precisions = ("f32", "4", "8")

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def missing(self) -> str | None:
        if self.folder is None:
            return "no folder given (--prima)"
        if not all((self.folder / name).is_file() for name in ("llama-server", "llama-cli")):
            return f"{self.folder} has no llama-server and llama-cli of prima.cpp"
        return None

    def start(self, files: Files, arrangement: Arrangement) -> LlamaCppRunning:
        assert self.folder is not None
        logs = Path(tempfile.mkdtemp(prefix="prima"))
        processes: list[Process] = []
        relays: list[Relay] = []
        model = [
            "-m",
            str(files.gguf[arrangement.precision]),
            "-c",
            str(arrangement.context),
            "-t",
            str(arrangement.threads),
        ]
        http_port = free_port()
        server = [
            str(self.folder / "llama-server"),
            *model,
            "--host",
            HOST,
            "--port",
            str(http_port),
            "-np",
            "1",
        ]
        try:
            if arrangement.machines == 2:
                bases = [free_pair(), free_pair()] if arrangement.relay else [free_pair()] * 2
                rings = [self._ring(rank, base) for rank, base in enumerate(bases)]
                server += rings[0]
                worker = [str(self.folder / "llama-cli"), *model, *rings[1]]
                processes.append(Process(worker, logs / "rank1.log", arrangement.cores[1]))
                if arrangement.relay:
                    relays += [Relay(bases[1] + 1, listen=bases[0] + 1), Relay(bases[0], listen=bases[1])]
            client = Process(server, logs / "rank0.log", arrangement.cores[0])
            processes.append(client)
            wait_for_port(http_port, client)
            running = LlamaCppRunning(client, http_port, processes, relays)
            running.wait_until_loaded()
        except BaseException:
            Session(processes, relays).close()
            raise
        return running

    def _ring(self, rank: int, base: int) -> Sequence[str]:
        windows = f"{SPLIT_AT},{SHAPE.num_layers - SPLIT_AT}"
        return [
            "--world", "2", "--rank", str(rank), "--master", HOST, "--next", HOST, "-lw", windows, "-ngl", "0",
            "--data-port", str(base), "--signal-port", str(free_pair()),
        ]  # fmt: skip


def free_pair() -> int:
    """The first of two neighbouring ports that are free now."""
    while True:
        port = free_port()
        try:
            with socket.create_server((HOST, port + 1)):
                return port
        except OSError:
            continue
