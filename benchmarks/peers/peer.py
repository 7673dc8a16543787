"""The interface behind which every engine is measured, and the processes that engines are made of.

A `Peer` says what it can run and starts it: whole in one process, or over two machines (two processes on two cores) with the
relay of benchmarks/tcp_relay.py before the second. A `Running` generates tokens, one call per request, and calls `on_token`
as each arrives at the client. Engines that are not measured at the moment are stopped (SIGSTOP), so that one that spins
while it waits takes nothing from another.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from benchmarks.tcp_relay import HOST, Relay

__all__ = [
    "SPLIT_AT",
    "Arrangement",
    "Files",
    "LineProcess",
    "LinesSession",
    "Peer",
    "PeerError",
    "Process",
    "Running",
    "Session",
    "free_port",
    "healthy",
    "sse",
    "wait_for_port",
]

SPLIT_AT = 6  # of 12 layers: the second machine's first
START_TIMEOUT_S, ANSWER_TIMEOUT_S = 60.0, 60.0
FOLDERS = re.compile(r"/\S*/")
TELLING = re.compile(r"error|assert|fail|abort|crash|exception|refused|reset|malformed", re.IGNORECASE)


class PeerError(Exception):
    """What a client of the engine was told, or what ended it, in words; `seen_s`: when, by the clock of perf_counter."""

    def __init__(self, words: str, seen_s: float | None = None) -> None:
        super().__init__(words)
        self.seen_s = time.perf_counter() if seen_s is None else seen_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The same weights in the formats that engines read; `folder` has config.json and model.safetensors."""

    folder: Path
    gguf: Mapping[str, Path]  # by precision
    dllama: Mapping[str, Path]
    dllama_tokenizer: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """How to start an engine: `precision` (f32, 4, 8), over one or two machines, with a relay before the second or not."""

    precision: str
    machines: int
    relay: bool = False
    cores: tuple[int, int] = (0, 1)
    context: int = 1024
    threads: int = 1


class Running(Protocol):
    """An engine that was started. `worker`: the process of the second machine, for kill -9; None where there is none."""

    relays: tuple[Relay, ...]
    worker: Process | None

    def generate(self, prompt: Sequence[int], count: int, on_token: Callable[[], None]) -> list[int] | None:
        """Generate `count` tokens greedily; `on_token` at each arrival. Their ids, where the engine tells them.

        Raises PeerError with what the client is told.
        """
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None: ...


class Peer(Protocol):
    """An engine. `precisions`: those it can run; `max_prompt`: the longest prompt that its client takes."""

    name: str
    precisions: tuple[str, ...]

    def missing(self) -> str | None:
        """Why it cannot run here; None where it can."""
        ...

    def start(self, files: Files, arrangement: Arrangement) -> Running:
        """Start and wait until it takes requests; raises PeerError."""
        ...


class Process:
    """A process of an engine, pinned, its output in a file of its own; ended by its own process id."""

    def __init__(self, command: Sequence[str], log: Path, core: int | None, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        pinned = ["taskset", "-c", str(core), *command] if core is not None else list(command)  # exec keeps the process id
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                pinned,
                stdin=subprocess.PIPE,
                stdout=self._output(out),
                stderr=out,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def _output(self, log: BinaryIO) -> int | BinaryIO:
        return log

    @property
    def pid(self) -> int:
        return self.popen.pid

    def alive(self) -> bool:
        return self.popen.poll() is None

    def send(self, number: int) -> None:
        """Send a signal to the process and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """kill -9, and continue it first where it was stopped."""
        self.send(signal.SIGKILL)
        self.popen.wait()

    def wait_for(self, reached: Callable[[], bool], otherwise: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when `reached()`; raises PeerError where the process ends first or time is up."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            if not self.alive() or time.monotonic() > deadline:
                raise PeerError(f"{otherwise}: {self.ending()}")
            time.sleep(0.05)

    def ending(self) -> str:
        """How it ended and the last thing it said, on one line."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(2)
        code = self.popen.poll()
        if code is None:
            return "still runs"
        said = [line.strip() for line in self.tail().splitlines() if line.strip()]
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        telling = [line for line in said if TELLING.search(line)] or said
        return f"{how}; its last words: {FOLDERS.sub('', telling[-1])[:160]}" if telling else how

    def tail(self, num_bytes: int = 4000) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - num_bytes))
            return file.read().decode(errors="replace")


class LineProcess(Process):
    """A process that answers on its standard output line by line; its errors go to the log."""

    def __init__(self, command: Sequence[str], log: Path, core: int | None, env: Mapping[str, str] | None = None) -> None:
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        super().__init__(command, log, core, env)
        threading.Thread(target=self._read, daemon=True).start()

    def _output(self, log: BinaryIO) -> int | BinaryIO:
        return subprocess.PIPE

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.put(line.decode(errors="replace").rstrip("\n"))
        self.lines.put(None)

    def write(self, line: str) -> None:
        """Send one line."""
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(line.encode() + b"\n")
            self.popen.stdin.flush()
        except OSError:
            raise PeerError(f"takes no request: {self.ending()}") from None

    def line(self, timeout_s: float) -> str:
        """The next line; raises PeerError at the end of output or when time is up."""
        try:
            line = self.lines.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerError(f"hangs: says nothing for {timeout_s:.0f} s") from None
        if line is None:
            seen_s = time.perf_counter()
            raise PeerError(f"the client {self.ending()}", seen_s)
        return line

    def expect(self, wanted: str, timeout_s: float) -> None:
        """Skip lines until `wanted`."""
        while self.line(timeout_s) != wanted:
            pass


class Session:
    """Processes, relays and their ends, for a `Running` to build on."""

    def __init__(self, processes: Sequence[Process], relays: Sequence[Relay] = (), worker: Process | None = None) -> None:
        self.processes, self.relays, self.worker = list(processes), tuple(relays), worker

    def pause(self) -> None:
        for process in self.processes:
            process.send(signal.SIGSTOP)

    def resume(self) -> None:
        for process in self.processes:
            process.send(signal.SIGCONT)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
        for relay in self.relays:
            relay.close()


class LinesSession(Session):
    """Requests to a client's process, which says "token ID" per token and "done" or "error ..." at the end.

    Not stopped between turns: such an engine takes a machine that is silent for lost.
    """

    def __init__(
        self, client: LineProcess, processes: Sequence[Process], relays: Sequence[Relay], worker: Process | None
    ) -> None:
        super().__init__(processes, relays, worker)
        self.client = client

    def pause(self) -> None:
        """Goes on."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def generate(self, prompt: Sequence[int], count: int, on_token: Callable[[], None]) -> list[int]:
        """See `Running.generate`."""
        self.client.write(json.dumps({"prompt": list(prompt), "count": count}))
        made: list[int] = []
        while True:
            line = self.client.line(ANSWER_TIMEOUT_S)
            seen_s = time.perf_counter()
            if line.startswith("token "):
                made.append(int(line[6:]))
                on_token()
            elif line == "done":
                return made
            else:
                raise PeerError(line.removeprefix("error "), seen_s)


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def listens(port: int) -> bool:
    """Whether something on this machine listens on `port`. Asked of the kernel: to connect would be to be a client."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[3] == "0A" and int(row[1].rsplit(":", 1)[1], 16) == port for row in rows)


def wait_for_port(port: int, process: Process) -> None:
    """Return when something listens on `port`; raises PeerError where `process` ends first or time is up."""
    process.wait_for(lambda: listens(port), f"does not listen on port {port}")


def healthy(port: int) -> bool:
    """Whether a GET of /health is answered with 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def sse(port: int, path: str, request: Mapping[str, Any], timeout_s: float) -> Iterator[dict[str, Any]]:
    """The events of a streamed HTTP answer, as JSON; raises PeerError where it breaks off or is no 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise PeerError(f"HTTP {response.status}: {response.read(300).decode(errors='replace')}")
        while line := response.readline():
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield json.loads(line[6:])
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PeerError(f"{type(error).__name__}: {error}") from None
    finally:
        connection.close()
