"""distributed-llama: `dllama-api` is the root and one machine, `dllama worker` the other; every layer is cut across both.

The root ships the worker its slices at start. Prompts go through a chat template, as characters that are one token each, so
their length is that of the other engines' prompts. Matrices of 4 bits need 8-bit messages between the machines. Its sockets
spin, as by default, but not behind a relay, which needs a core of the two as well: there they block.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.llm_distributed_llama_file import chat_message
from benchmarks.peers.peer import Arrangement, Files, PeerError, Process, Session, free_port, sse, wait_for_port
from benchmarks.tcp_relay import HOST, Relay

SYNC_TYPES = {"f32": "f32", "4": "q80"}
ANSWER_TIMEOUT_S = 120.0


class DistributedLlama:
    """`folder` holds dllama and dllama-api."""

    name = "distributed-llama"
    precisions = ("f32", "4")

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def missing(self) -> str | None:
        if self.folder is None:
            return "no folder given (--distributed-llama)"
        if not all((self.folder / name).is_file() for name in ("dllama", "dllama-api")):
            return f"{self.folder} has no dllama and dllama-api"
        return None

    def start(self, files: Files, arrangement: Arrangement) -> DistributedLlamaRunning:
        assert self.folder is not None
        logs = Path(tempfile.mkdtemp(prefix="dllama"))
        processes: list[Process] = []
        relays: list[Relay] = []
        options = ["--nthreads", str(arrangement.threads), "--net-turbo", "0" if arrangement.relay else "1"]
        root = [
            str(self.folder / "dllama-api"), "--model", str(files.dllama[arrangement.precision]), "--tokenizer",
            str(files.dllama_tokenizer), "--buffer-float-type", SYNC_TYPES[arrangement.precision], "--host", HOST,
            "--max-seq-len", str(arrangement.context), "--temperature", "0", *options,
        ]  # fmt: skip
        try:
            if arrangement.machines == 2:
                target = free_port()
                command = [str(self.folder / "dllama"), "worker", "--host", HOST, "--port", str(target), *options]
                processes.append(Process(command, logs / "worker.log", arrangement.cores[1]))
                wait_for_port(target, processes[0])
                if arrangement.relay:
                    relays.append(Relay(target))
                    target = relays[0].port
                root += ["--workers", f"{HOST}:{target}"]
            port = free_port()
            processes.append(Process([*root, "--port", str(port)], logs / "root.log", arrangement.cores[0]))
            wait_for_port(port, processes[-1])
        except BaseException:
            Session(processes, relays).close()
            raise
        return DistributedLlamaRunning(processes[-1], port, processes, relays)


class DistributedLlamaRunning(Session):
    """Requests to the chat route; one event per token."""

    def __init__(self, root: Process, port: int, processes: Sequence[Process], relays: Sequence[Relay]) -> None:
        super().__init__(processes, relays, worker=processes[0] if len(processes) > 1 else None)
        self.root, self.port, self.asked = root, port, 0

    def generate(self, prompt: Sequence[int], count: int, on_token: Callable[[], None]) -> list[int] | None:
        self.asked += 1
        message = {"role": "user", "content": chat_message(len(prompt), self.asked)}
        request = {"messages": [message], "max_tokens": count, "stream": True, "temperature": 0.0}
        made = 0
        try:
            for event in sse(self.port, "/v1/chat/completions", request, ANSWER_TIMEOUT_S):
                if (event["choices"][0].get("delta") or {}).get("content"):
                    made += 1
                    on_token()
        except PeerError as error:
            raise PeerError(f"{error}; the root {self.root.ending()}", error.seen_s) from None
        if made < count:
            seen_s = time.perf_counter()
            raise PeerError(f"the answer breaks off; the root {self.root.ending()}", seen_s)
        return None  # its tokenizer is its own: which ids these were is not known
