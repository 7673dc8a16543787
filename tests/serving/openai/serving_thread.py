"""A server in a thread of the tests' process, and how to ask it: the official client, or bytes on a socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import openai

from ecotone.serving.openai.backend import Backend, Embedder
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.run import Server

PATIENCE_S = 30


@contextmanager
def serving(backend: Backend | None, options: Options | None = None, embedder: Embedder | None = None) -> Iterator[Server]:
    """A server on loopback while this lasts."""
    started = threading.Event()
    server = Server(backend, embedder, "127.0.0.1", 0, options or Options(), lambda _: started.set())
    thread = threading.Thread(target=lambda: asyncio.run(server.run()), name="openai-server", daemon=True)
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield server
    finally:
        server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def client(server: Server, **more: Any) -> openai.OpenAI:
    """OpenAI's client, which tries nothing twice."""
    settings = {"base_url": f"{server.address}/v1", "api_key": "unused-key", "max_retries": 0, "timeout": PATIENCE_S} | more
    return openai.OpenAI(**settings)


def connect(server: Server, receive_buffer: int = 0) -> socket.socket:
    """A plain connection."""
    parts = urlsplit(server.address)
    made = socket.socket()
    if receive_buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.settimeout(PATIENCE_S)
    made.connect((parts.hostname, parts.port))
    return made


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """The bytes of a request."""
    head = [f"POST {path} HTTP/1.1", "Host: here", "Content-Type: application/json",
            f"Content-Length: {len(body) if length is None else length}", *headers]  # fmt: skip
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def receive_all(sock: socket.socket) -> bytes:
    """What comes until the other side closes, however it does."""
    parts = []
    try:
        while part := sock.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)
