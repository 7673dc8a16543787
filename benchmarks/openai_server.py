"""The OpenAI-compatible server by itself: a crowd of connections, and what a streamed token costs.

The server runs in a process of its own before a model that makes tokens for nothing, so what is measured is the server.
Crowd: 10,000 connections at once (fewer where open files are limited; `--quick`: 1,000): half say nothing, a quarter send
half a request, a quarter ask for a stream and get it, or 429 beyond the model's queue. Meanwhile requests are sent one after
the other on connections of their own. Tokens: 1, 8 and 64 streams at once, read as fast as they come by this process; the
cost is the server's processor time over the tokens of all (httpx, the client, is not in it).

unanswered: requests of the crowd's time that did not get their answer. crowd_over_idle: their median time over that of the
same requests before the crowd came. server_us_per_token: with 64 streams. rss_bytes_per_connection: of the server's growth.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from benchmarks import report
from ecotone.decoding.answer import OnPiece, Piece
from ecotone.decoding.engine import Engine, Measured
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.words import Ending, Settings
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.run import serve

CROWD, QUICK_CROWD, QUEUE, SPARE = 10_000, 1_000, 256, 512
ENDLESS = 1 << 60
REQUESTS, TOKENS, STREAMS = 200, 400, (1, 8, 64)
BODY = {"model": "free", "prompt": "x"}


@dataclass(slots=True)
class _Free:
    """Tokens that cost nothing: "x " until max_tokens. Prompts "hold" never end, and are refused beyond QUEUE of them."""

    name: str = "free"
    created_s: int = 0
    context: int = 1 << 16
    vocabulary: int = 256
    stop_tokens: tuple[int, ...] = ()
    _active: dict[int, tuple[OnPiece, int]] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _number: int = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> list[int]:
        return list(str(messages[-1]["content"]).encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode()

    def token_text(self, token: int) -> tuple[str, bytes]:
        return chr(token), bytes([token])

    def check(self, params: SamplingParams) -> None:
        return None

    def start(self, prompt: Sequence[int], params: SamplingParams, on_piece: OnPiece, **_: Any) -> int:
        with self._changed:
            self._number += 1
            if bytes(prompt) != b"hold":
                self._active[self._number] = (on_piece, params.max_tokens)
                self._changed.notify()
            elif sum(left >= ENDLESS for _, left in self._active.values()) >= QUEUE:
                on_piece(Piece(ending=Ending.BUSY, reason="the queue is full"))
            else:
                self._active[self._number] = (on_piece, ENDLESS)
                on_piece(Piece(text="x", tokens=(120,)))
            return self._number

    def cancel(self, request: int) -> None:
        with self._changed:
            self._active.pop(request, None)

    def run(self) -> None:
        while True:
            with self._changed:
                running = [(n, *each) for n, each in self._active.items() if each[1] < ENDLESS]
                if not running:
                    self._changed.wait()
                for number, on_piece, left in running:
                    on_piece(Piece(text="x ", tokens=(120,), ending=Ending.LENGTH if left == 1 else None))
                    self._active[number] = (on_piece, left - 1)
                    if left == 1:
                        del self._active[number]
            time.sleep(0.001)  # a round of a fast model; without it one wake-up would carry many tokens

    def is_ready(self) -> bool:
        return True

    def status(self) -> dict[str, Any]:
        return {}

    def fingerprint(self) -> None:
        return None

    def measured(self) -> Measured:
        return Engine(Settings(context=self.context)).measured()  # of a pipeline that was never asked anything


def _serve() -> None:
    model = _Free()
    threading.Thread(target=model.run, daemon=True).start()
    options = Options(head_s=600.0, idle_s=600.0, max_active_per_key=0)
    serve(model, "127.0.0.1", 0, options, on_start=lambda address: print(address, flush=True))


def _ask(address: str) -> float:
    """Seconds of one request on a connection of its own; raises where it is not answered rightly."""
    start = time.perf_counter()
    with contextlib.closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)) as connection:
        body = json.dumps(BODY | {"max_tokens": 1})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    if answer["choices"][0]["text"] != "x ":
        raise ValueError(str(answer))
    return time.perf_counter() - start


def _asked(address: str, count: int) -> tuple[list[float], int]:
    times, failed = [], 0
    for _ in range(count):
        try:
            times.append(_ask(address))
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            failed += 1
    return times, failed


async def _crowd(host: str, port: int, count: int, process: psutil.Process, address: str) -> dict[str, Any]:
    body = json.dumps(BODY | {"prompt": "hold", "stream": True, "max_tokens": 9}).encode()
    whole = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    before, start = process.memory_info().rss, time.perf_counter()
    statuses: dict[str, int] = {}
    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for index in range(count):
            reader, writer = await asyncio.open_connection(host, port)
            stack.callback(writer.close)
            if index % 4 == 1:
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost:")
            elif index % 4 == 3:
                writer.write(whole % (len(body), body))
                streams.append(reader)
        for reader in streams:
            line = await reader.readline()
            status = line.split()[1].decode() if line else "closed"
            statuses[status] = statuses.get(status, 0) + 1
        opened_s = time.perf_counter() - start
        grown = process.memory_info().rss - before
        times, failed = await asyncio.to_thread(_asked, address, REQUESTS)
    return {
        "connections": count, "opened_s": opened_s, "statuses": statuses, "rss_growth_bytes": grown, "unanswered": failed,
        "median_s": statistics.median(times) if times else None, "worst_s": max(times, default=None),
    }  # fmt: skip


def _tokens(address: str, streams: int, process: psutil.Process) -> dict[str, Any]:
    """Streams at once, all tokens read."""
    counts = [0] * streams

    def read(index: int) -> None:
        body = BODY | {"stream": True, "max_tokens": TOKENS}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=120) as response:
            counts[index] = sum(part.count(b'"text":"x "') for part in response.iter_raw())

    before, start = sum(process.cpu_times()[:2]), time.perf_counter()
    threads = [threading.Thread(target=read, args=(i,)) for i in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall_s, cpu_s = time.perf_counter() - start, sum(process.cpu_times()[:2]) - before
    if counts != [TOKENS] * streams:
        raise ValueError(f"streams of {TOKENS} tokens ended with {sorted(set(counts))}")
    total = streams * TOKENS
    return {"streams": streams, "tokens_per_s": total / wall_s, "server_us_per_token": 1e6 * cpu_s / total}


def main(argv: Sequence[str] | None = None) -> None:
    """Start the server, measure, write the figures."""
    if (argv or sys.argv[1:]) == ["--serve"]:
        _serve()
        return
    options = report.arguments(__doc__ or "", argv)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(QUICK_CROWD if options.quick else CROWD, hard - SPARE)
    command = [sys.executable, "-m", "benchmarks.openai_server", "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            host, _, port = address.removeprefix("http://").rpartition(":")
            process = psutil.Process(server.pid)
            _asked(address, 20)
            tokens = [_tokens(address, streams, process) for streams in STREAMS]
            idle, failed = _asked(address, REQUESTS)
            crowd = asyncio.run(_crowd(host, int(port), count, process, address))
        finally:
            server.terminate()
    figures = {
        "connections": crowd["connections"],
        "unanswered": crowd["unanswered"] + failed,
        "crowd_over_idle": crowd["median_s"] / statistics.median(idle),
        "rss_bytes_per_connection": crowd["rss_growth_bytes"] / count,
        "server_us_per_token": tokens[-1]["server_us_per_token"],
    }
    crowd["idle_median_s"] = statistics.median(idle)
    report.finish(options.json, figures, [crowd, *tokens], report.context(options.seed))


if __name__ == "__main__":
    main()
