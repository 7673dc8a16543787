"""The wire through our framing, credits and acknowledgements, beside uvloop TCP and gRPC, over loopback between processes.

    round_trip_over_tcp     1 kB there and back, ours / uvloop streams
    throughput_over_grpc    1 MB bodies one way, one answer at the end, ours / gRPC two-way stream
    cpu_s_per_gigabyte      user and system seconds of both our ends while these bodies move
    control_under_load_ms   p50 of a letter there and back while tensors fill a link of 20 Mbit/s with 22 ms base round trip

Each end is pinned to a core of its own, as two machines would be: otherwise the kernel puts both ends of a strict ping-pong
on one core, and a system call's cost is compared instead of a message's. (Unpinned round trips are under cases.) The link
of the last figure is a TCP relay in a third process: bytes leave it at the rate, `LATENCY_S` later, and what does not
fit waits in the sender's sockets, as before a real uplink.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import psutil
import uvloop

from benchmarks.report import arguments, context, finish, median
from benchmarks.wire_peers import ECHO, LARGE_BYTES, LEFT, METHOD, SMALL_BYTES, STREAM
from ecotone.protocol.message import BodyId, Cancel, LetterBody, NodeId
from ecotone.protocol.settings import LinkSettings, chunk_bytes_for
from ecotone.wire.channel import Body, Channel
from ecotone.wire.zenoh import ZenohSettings, ZenohWire

FAR, NEAR = NodeId("far"), NodeId("near")
LINK_BYTES_PER_S, LATENCY_S = 20e6 / 8, 0.011
SOCKET_BUFFER_BYTES = 65536
WINDOW_BYTES = 4 << 20  # what is under way stays in the processor's cache
MORE, LAST = (LEFT.pack(left) + bytes(LARGE_BYTES - LEFT.size) for left in (1, 0))


class OurEnd:
    """The near end of our channel."""

    def __init__(self, port: int, *, socket_buffer_bytes: int | None = None, links: LinkSettings | None = None):
        self._answered, self._numbers, self._left = threading.Event(), iter(range(1 << 62)), 0
        self._stamps: list[float] = []
        settings = ZenohSettings(
            node=NEAR,
            cluster="bench",
            connect=(f"127.0.0.1:{port}",),
            socket_buffer_bytes=socket_buffer_bytes,
            connect_timeout_s=20.0,
        )
        self.channel = Channel(ZenohWire(settings), NEAR, on_body=self._body, on_letter=self._letter, settings=links)
        self.channel.start()
        self.channel.wait_for(FAR, 20.0)

    def round_trips(self, count: int) -> list[float]:
        """Seconds of `count` echoes of 1 kB, one after the other, each sent from the arrival of the last."""
        self._left, self._stamps = count, [time.perf_counter()]
        self._answered.clear()
        self._small()
        if not self._answered.wait(60):
            raise SystemExit("benchmarks.wire: our echo stopped answering")
        return [after - before for before, after in zip(self._stamps, self._stamps[1:], strict=False)]

    def stream(self, count: int) -> float:
        """Seconds until the far end has `count` bodies of 1 MB."""
        self._answered.clear()
        self._left = 1
        start = time.perf_counter()
        for index in range(count):
            content = LAST if index == count - 1 else MORE
            self.channel.send_body(FAR, BodyId(2, 1, STREAM, next(self._numbers)), content)
        if not self._answered.wait(120):
            raise SystemExit("benchmarks.wire: our stream was not answered")
        return time.perf_counter() - start

    def letter_trip(self) -> float:
        """Seconds of one letter there and back."""
        self._answered.clear()
        start = time.perf_counter()
        self.channel.send_letter(FAR, Cancel(session=2, epoch=1, request=0))
        if not self._answered.wait(60):
            raise SystemExit("benchmarks.wire: a letter was not answered")
        return time.perf_counter() - start

    def _small(self) -> None:
        self.channel.send_body(FAR, BodyId(2, 1, ECHO, next(self._numbers)), bytearray(SMALL_BYTES), timeout_s=0)

    def _body(self, peer: NodeId, body: BodyId, _content: Body) -> None:
        self._stamps.append(time.perf_counter())
        self._left -= 1
        if self._left > 0:
            self._small()
        else:
            self._answered.set()
        self.channel.release(peer, body)

    def _letter(self, _peer: NodeId, _letter: LetterBody) -> None:
        self._answered.set()


def tcp_round_trips(port: int, count: int) -> list[float]:
    """Seconds of `count` echoes of 1 kB over uvloop streams."""

    async def run() -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        message, seconds = SMALL_BYTES.to_bytes(4, "little") + bytes(SMALL_BYTES), []
        for _ in range(count):
            start = time.perf_counter()
            writer.write(message)
            await reader.readexactly(4 + SMALL_BYTES)
            seconds.append(time.perf_counter() - start)
        writer.close()
        await writer.wait_closed()
        return seconds

    return uvloop.run(run())


def grpc_stream(port: int, count: int) -> float:
    """Seconds until the far end has `count` messages of 1 MB over one two-way stream."""

    def messages() -> Iterator[bytes]:
        for index in range(count):
            yield LAST if index == count - 1 else MORE

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(timeout=20)
        start = time.perf_counter()
        for _ in channel.stream_stream(METHOD)(messages()):
            return time.perf_counter() - start
    raise SystemExit("benchmarks.wire: gRPC was not answered")


@contextmanager
def peer(kind: str, core: int, **environment: str) -> Iterator[tuple[int, int]]:
    """A far end as a process: (port, process id)."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.wire_peers", kind, str(port), str(core)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"benchmarks.wire: the {kind} peer did not start")
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(10)


def relay(target_port: int) -> int:
    """A TCP relay with the rate and latency of the link in both directions; its port. Lives as long as the process."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # else the relay's own buffer is a long queue
    listener.bind(("127.0.0.1", 0))
    listener.listen()

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            far.connect(("127.0.0.1", target_port))
            for source, target in ((near, far), (far, near)):
                target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_shape, args=(source, target), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def _shape(source: socket.socket, target: socket.socket) -> None:
    flight: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def deliver() -> None:
        while True:
            due, part = flight.get()
            time.sleep(max(0.0, due - time.monotonic()))
            with suppress(OSError):
                if part:
                    target.sendall(part)
                    continue
            target.close()
            return

    threading.Thread(target=deliver, daemon=True).start()
    free = time.monotonic()
    while True:
        try:
            part = source.recv(4096)
        except OSError:
            part = b""  # the other direction closed both
        free = max(free, time.monotonic()) + len(part) / LINK_BYTES_PER_S
        flight.put((free + LATENCY_S, part))
        if not part:
            return
        time.sleep(max(0.0, free - time.monotonic()))


def relay_process() -> None:
    """`python -m benchmarks.wire --relay PORT`: the relay alone, until standard input ends."""
    print(relay(int(sys.argv[2])), flush=True)
    sys.stdin.read()


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This process on one core, for the threads that are started meanwhile too."""
    before = os.sched_getaffinity(0)
    if core >= 0:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure_round_trips(cores: tuple[int, int], rounds: int, count: int) -> dict[str, list[float]]:
    """Median seconds per round of each contender, interleaved."""
    seconds: dict[str, list[float]] = {"ours": [], "tcp": []}
    with pinned(cores[0]), peer("ours", cores[1]) as (our_port, _), peer("tcp", cores[1]) as (tcp_port, _):
        end = OurEnd(our_port, links=LinkSettings(window_bytes=WINDOW_BYTES))
        for index in range(rounds + 1):
            tcp_s, our_s = median(tcp_round_trips(tcp_port, count)), median(end.round_trips(count))
            if index:
                seconds["tcp"].append(tcp_s)
                seconds["ours"].append(our_s)
        end.channel.close()
    return seconds


def measure_throughput(cores: tuple[int, int], rounds: int, count: int) -> dict[str, list[float]]:
    """Seconds per gigabyte of each contender, and CPU seconds per gigabyte of both our ends, interleaved."""
    found: dict[str, list[float]] = {"ours_s": [], "grpc_s": [], "our_cpu_s": [], "grpc_cpu_s": []}
    gigabytes = count * LARGE_BYTES / 1e9
    with pinned(cores[0]), peer("ours", cores[1]) as (our_port, our_pid), peer("grpc", cores[1]) as (port, pid):
        end = OurEnd(our_port, links=LinkSettings(window_bytes=WINDOW_BYTES))
        contenders: dict[str, tuple[Callable[[], float], int]] = {
            "ours_s": (lambda: end.stream(count), our_pid),
            "grpc_s": (lambda: grpc_stream(port, count), pid),
        }
        for index in range(rounds + 1):
            for name, (call, far_pid) in contenders.items():
                before = _cpu_s(far_pid) + time.process_time()
                seconds = call()
                spent = _cpu_s(far_pid) + time.process_time() - before
                if index:
                    found[name].append(seconds / gigabytes)
                    found["our_cpu_s" if name == "ours_s" else "grpc_cpu_s"].append(spent / gigabytes)
        end.channel.close()
    return found


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def measure_control(num_letters: int) -> dict[str, Any]:
    """Round trips of letters over the shaped link, idle and while bodies of 1 MB fill it."""
    chunk_bytes = chunk_bytes_for(LINK_BYTES_PER_S, hold_s=0.02)
    links = LinkSettings(chunk_bytes=chunk_bytes, window_bytes=WINDOW_BYTES)
    environment = {"BENCH_SOCKET_BUFFER": str(SOCKET_BUFFER_BYTES), "BENCH_CHUNK_BYTES": str(chunk_bytes)}
    with peer("ours", -1, **environment) as (port, _):
        command = [sys.executable, "-m", "benchmarks.wire", "--relay", str(port)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            end = OurEnd(int(process.stdout.readline()), socket_buffer_bytes=SOCKET_BUFFER_BYTES, links=links)
            idle = [end.letter_trip() for _ in range(10)]
            loaded, rate = _loaded_letters(end, num_letters)
            end.channel.close()
        finally:
            process.terminate()
            process.wait(10)
    return {
        "link": "userland TCP relay between processes",
        "socket_buffer_bytes": SOCKET_BUFFER_BYTES,
        "chunk_bytes": chunk_bytes,
        "idle_ms": 1e3 * median(idle),
        "loaded_ms": [round(1e3 * seconds, 2) for seconds in loaded],
        "tensors_bit_per_s": 8 * rate,
    }


def _loaded_letters(end: OurEnd, num_letters: int) -> tuple[list[float], float]:
    stop, numbers = threading.Event(), iter(range(1 << 20, 1 << 62))
    sent = 0

    def fill() -> None:
        nonlocal sent
        while not stop.is_set():
            if end.channel.outstanding_bytes(FAR) > 3 * LARGE_BYTES:
                stop.wait(0.02)
                continue
            end.channel.send_body(FAR, BodyId(4, 1, STREAM, next(numbers)), MORE)  # never the last: no answers
            sent += LARGE_BYTES

    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(fill)
        time.sleep(2.0)  # the link's own queues are full
        before, start = sent - end.channel.outstanding_bytes(FAR), time.perf_counter()
        seconds = []
        for _ in range(num_letters):
            seconds.append(end.letter_trip())
            time.sleep(0.02)
        rate = (sent - end.channel.outstanding_bytes(FAR) - before) / (time.perf_counter() - start)
        stop.set()
        filling.result()
    return seconds, rate


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__ or "")
    available = sorted(os.sched_getaffinity(0))
    cores = (available[0], available[1]) if len(available) > 1 else (-1, -1)
    rounds, trips, bodies = (2, 500, 50) if options.quick else (7, 3000, 400)
    trip = measure_round_trips(cores, rounds, trips)
    unpinned = measure_round_trips((-1, -1), 2 if options.quick else 3, trips)
    flow = measure_throughput(cores, rounds, bodies)
    control = measure_control(20 if options.quick else 150)
    figures = {
        "round_trip_over_tcp": median(trip["ours"]) / median(trip["tcp"]),
        "throughput_over_grpc": median(flow["grpc_s"]) / median(flow["ours_s"]),
        "cpu_s_per_gigabyte": median(flow["our_cpu_s"]),
        "control_under_load_ms": median(control["loaded_ms"]),
    }
    cases = {
        "round_trip_s": trip,
        "round_trip_unpinned_s": unpinned,
        "per_gigabyte": flow,
        "control": control,
        "pinned_to_cores": cores,
    }
    finish(options.json, figures, cases, context(options.seed))


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--relay":
        relay_process()
    else:
        main()
