"""What the tests run inside emulated machines, by path and with the standard library alone: an echo, a sink, a spinner."""

from __future__ import annotations

import socket
import sys
import time


def echo(address: str, port: int) -> None:
    """Send every datagram back to where it came from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind((address, port))
        print("ready", flush=True)
        while True:
            data, sender = one.recvfrom(2048)
            one.sendto(data, sender)


def sink(address: str, port: int) -> None:
    """Per connection: count bytes, and tell the sender seconds from the first to the last of them, and how many."""
    with socket.create_server((address, port)) as server:
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                received, first = 0, 0.0
                while data := connection.recv(1 << 16):
                    first = first or time.perf_counter()
                    received += len(data)
                    last = time.perf_counter()
                    if data.endswith(b"!"):
                        connection.sendall(f"{last - first} {received}\n".encode())


def spin(wall_s: float) -> None:
    """Compute for `wall_s`; print CPU seconds over wall seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < wall_s:
        sum(range(500))
    print((time.process_time() - cpu) / (time.perf_counter() - start))


if __name__ == "__main__":
    if sys.argv[1] == "spin":
        spin(float(sys.argv[2]))
    else:
        {"echo": echo, "sink": sink}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
