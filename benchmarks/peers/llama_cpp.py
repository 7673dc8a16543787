"""llama.cpp with its RPC back-end: `llama-server` is the client and, unless told otherwise, the first machine as well.

Two machines: the client computes the first half of the layers on its own processor, an RPC server the second half with the
head. `servers=2` puts both halves on RPC servers and leaves only the embedding to the client. No authentication: loopback.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.peers.peer import (
    Arrangement,
    Files,
    PeerError,
    Process,
    Session,
    free_port,
    healthy,
    sse,
    wait_for_port,
)
from benchmarks.tcp_relay import HOST, Relay

SERVER_NAMES = ("ggml-rpc-server", "rpc-server")
ANSWER_TIMEOUT_S = 120.0


class LlamaCpp:
    """`folder` holds llama-server and the RPC server, or a bin/ with them."""

    precisions = ("f32", "4", "8")

    def __init__(self, folder: Path | None, servers: int = 1) -> None:
        self.name = "llama.cpp RPC" if servers == 1 else "llama.cpp RPC, two servers"
        self.servers = servers
        self.folder = None if folder is None else next((f for f in (folder / "bin", folder) if f.is_dir()), folder)

    def missing(self) -> str | None:
        if self.folder is None:
            return "no folder given (--llama-cpp)"
        if not (self.folder / "llama-server").is_file() or self._rpc_server() is None:
            return f"{self.folder} has no llama-server and ggml-rpc-server: build llama.cpp with GGML_RPC=ON"
        return None

    def start(self, files: Files, arrangement: Arrangement) -> LlamaCppRunning:
        logs = Path(tempfile.mkdtemp(prefix="llama-cpp"))
        processes: list[Process] = []
        relays: list[Relay] = []
        options = ["--device", "none"]
        try:
            if arrangement.machines == 2:
                targets = [self._serve(logs, arrangement, core, processes) for core in arrangement.cores[-self.servers :]]
                if arrangement.relay:
                    relays.append(Relay(targets[-1]))
                    targets[-1] = relays[-1].port
                options = ["--rpc", ",".join(f"{HOST}:{port}" for port in targets), "-ngl", self._offloaded()]
                if self.servers == 2:
                    options += ["--tensor-split", "1,1"]
            port = free_port()
            client = Process(
                [str(self._folder() / "llama-server"), "-m", str(files.gguf[arrangement.precision]), "--host", HOST,
                 "--port", str(port),
                 "-t", str(arrangement.threads), "-tb", str(arrangement.threads), "-c", str(arrangement.context), "-np", "1",
                 "--no-warmup", "-b", "512", "-ub", "512", *options],
                logs / "client.log", arrangement.cores[0], env={"GGML_NO_BACKTRACE": "1"},  # else gdb
            )  # fmt: skip
            processes.append(client)
            running = LlamaCppRunning(client, port, processes, relays)
            wait_for_port(port, client)
            running.wait_until_loaded()
        except BaseException:
            Session(processes, relays).close()
            raise
        return running

    def _serve(self, logs: Path, arrangement: Arrangement, core: int, processes: list[Process]) -> int:
        port = free_port()
        command = [str(self._rpc_server()), "-H", HOST, "-p", str(port), "-t", str(arrangement.threads)]
        process = Process(command, logs / f"server{core}.log", core)
        processes.append(process)
        wait_for_port(port, process)
        return port

    def _offloaded(self) -> str:
        return "99" if self.servers == 2 else "7"  # half of 12 layers, and the head, counted as one more

    def _folder(self) -> Path:
        assert self.folder is not None
        return self.folder

    def _rpc_server(self) -> Path | None:
        return next((self._folder() / n for n in SERVER_NAMES if (self._folder() / n).is_file()), None)


class LlamaCppRunning(Session):
    """Requests to llama-server's own completion route, with token ids for a prompt."""

    def __init__(self, client: Process, port: int, processes: Sequence[Process], relays: Sequence[Relay]) -> None:
        super().__init__(processes, relays, worker=processes[-2] if len(processes) > 1 else None)
        self.client, self.port = client, port

    def wait_until_loaded(self) -> None:
        """Return when it answers; raises PeerError where it ends first."""
        self.client.wait_for(lambda: healthy(self.port), "does not load its model")

    def generate(self, prompt: Sequence[int], count: int, on_token: Callable[[], None]) -> list[int] | None:
        request = {
            "prompt": list(prompt), "n_predict": count, "stream": True, "cache_prompt": False, "ignore_eos": True,
            "return_tokens": True, "temperature": 0.0, "samplers": ["temperature"],
        }  # fmt: skip
        made: list[int] = []
        try:
            for event in sse(self.port, "/completion", request, ANSWER_TIMEOUT_S):
                if "error" in event:
                    raise PeerError(str(event["error"])[:200])
                told = event.get("tokens")
                for token in ([-1] if event.get("content") and not event.get("stop") else []) if told is None else told:
                    made.append(token)
                    on_token()
        except PeerError as error:
            raise PeerError(f"{error}; the client {self.client.ending()}", error.seen_s) from None
        if len(made) < count:
            seen_s = time.perf_counter()
            raise PeerError(f"the answer breaks off; the client {self.client.ending()}", seen_s)
        return made if -1 not in made else None  # prima.cpp, which descends from an older state, tells text alone
