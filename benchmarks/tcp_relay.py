"""A user-space TCP relay that stands for a link: delay, rate and a bounded buffer each way, counted bytes, death by kill.

`python -m benchmarks.tcp_relay TARGET_PORT FILE LISTEN_PORT` relays from that port of 127.0.0.1 (0: a free one; it is
printed) until standard input ends. FILE is a page of memory shared with the process that started it: it sets delay and
rate there at any time, and reads what crossed. Bytes leave at the rate and arrive
`delay_s` later; what does not fit into BUFFER_BYTES beyond the link's own content waits in the sender's socket, as before
a real uplink. Without delay and rate a byte costs one recv and one send.
It stands in for netem where a kernel has none; it cannot lose or reorder what TCP carries.
"""

from __future__ import annotations

import mmap
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

HOST = "127.0.0.1"
PAGE = 4096
LINK = struct.Struct("<dd")  # delay_s, bytes_per_s (0: no limit), at offset 0
COUNTS_AT, COUNT = 64, struct.Struct("<QQ")  # towards the target, and back
PART_BYTES, BUFFER_BYTES = 1 << 16, 1 << 18
SLOT_S = 0.002  # a limited link is read in parts that take this long, so that a small message is not behind a large part


class Relay:
    """The near side: starts a relay process before `target_port`, and owns it."""

    def __init__(self, target_port: int, listen: int = 0) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="relay", suffix=".page")  # noqa: SIM115 - lives as long as the relay
        self._file.truncate(PAGE)
        self._page = mmap.mmap(self._file.fileno(), PAGE)
        command = [sys.executable, "-m", "benchmarks.tcp_relay", str(target_port), self._file.name, str(listen)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def shape(self, delay_s: float, bytes_per_s: float | None) -> None:
        """Delay each way and rate each way from now on; None: no limit."""
        self._page[: LINK.size] = LINK.pack(delay_s, bytes_per_s or 0.0)

    def counted(self) -> int:
        """Bytes that crossed so far, both ways."""
        return sum(COUNT.unpack_from(self._page, COUNTS_AT))

    def close(self) -> None:
        """Kill the relay: the link is gone, as by a pulled cable whose ends are told."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self._page.close()
        self._file.close()


class _Direction:
    """One way of one connection: a thread that reads, and one that delivers what is on its way."""

    def __init__(self, page: mmap.mmap, index: int, source: socket.socket, target: socket.socket) -> None:
        self.page, self.index, self.source, self.target = page, index, source, target
        self.flight: deque[tuple[float, bytes]] = deque()
        self.waiting_bytes, self.changed = 0, threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()
        threading.Thread(target=self.deliver, daemon=True).start()

    def read(self) -> None:
        free_s = time.monotonic()
        while True:
            delay_s, rate = LINK.unpack_from(self.page)
            part_bytes = PART_BYTES if not rate else min(PART_BYTES, max(1500, int(rate * SLOT_S)))
            try:
                part = self.source.recv(part_bytes)
            except OSError:
                part = b""
            delay_s, rate = LINK.unpack_from(self.page)
            self.count(len(part))
            now = time.monotonic()
            free_s = max(free_s, now) + (len(part) / rate if rate else 0.0)
            if part and not rate and not delay_s and self.send_now(part):
                continue
            with self.changed:
                self.flight.append((free_s + delay_s, part))
                self.waiting_bytes += len(part)
                self.changed.notify_all()
                limit = BUFFER_BYTES + int(rate * delay_s)
                while part and self.waiting_bytes > limit:
                    self.changed.wait()
            if not part:
                return

    def send_now(self, part: bytes) -> bool:
        """Send past an empty queue; False where something is still on its way or the target is gone."""
        with self.changed:
            if self.flight or self.waiting_bytes:
                return False
        try:
            self.target.sendall(part)
        except OSError:
            self.end()
        return True

    def deliver(self) -> None:
        while True:
            with self.changed:
                while not self.flight:
                    self.changed.wait()
                due_s, part = self.flight.popleft()
            left_s = due_s - time.monotonic()
            if left_s > 0:
                time.sleep(left_s)
            if not part:
                with suppress(OSError):
                    self.target.shutdown(socket.SHUT_WR)
                return
            try:
                self.target.sendall(part)
            except OSError:
                self.end()
            with self.changed:
                self.waiting_bytes -= len(part)
                self.changed.notify_all()

    def end(self) -> None:
        """The target takes no more: the source is told so."""
        with suppress(OSError):
            self.source.shutdown(socket.SHUT_RD)

    def count(self, num_bytes: int) -> None:
        # One thread writes each count of a connection; connections of one relay share the counts under the lock.
        with _COUNTING:
            counts = list(COUNT.unpack_from(self.page, COUNTS_AT))
            counts[self.index] += num_bytes
            COUNT.pack_into(self.page, COUNTS_AT, *counts)


_COUNTING = threading.Lock()


def serve(listener: socket.socket, target_port: int, page: mmap.mmap) -> None:
    """Accept and relay for ever. A target that refuses ends that connection alone."""
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection((HOST, target_port), timeout=5)
        except OSError:
            near.close()
            continue
        far.settimeout(None)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _Direction(page, 0, near, far)
        _Direction(page, 1, far, near)


def main() -> None:
    """Relay until standard input ends."""
    target_port, file, listen = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    sys.setswitchinterval(1e-4)  # two threads take turns per message: do not hold the other back for 5 ms
    with file.open("r+b") as shared:
        page = mmap.mmap(shared.fileno(), PAGE)
    listener = socket.create_server((HOST, listen))
    threading.Thread(target=serve, args=(listener, target_port, page), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
