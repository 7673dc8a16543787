"""HTTP connections that cannot be held for nothing: uvicorn's, with a cap, and patience with what does not come or go.

A connection waits for the head of a request at most `head_s`, and for its client to take bytes of an answer at most
`write_s`; then it is cut off, which its request sees as a client that went away. At the cap the connection that has rested
longest makes room; where none rests, the new one is told 503. Buffers of the system are kept small, so that a client that
reads nothing is noticed by what it does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ecotone.serving.openai.endpoint import encoded
from ecotone.serving.openai.errors import SERVER, ApiError
from ecotone.serving.openai.options import Options

try:
    import resource
except ImportError:  # Windows has no such limit to raise
    resource = None  # type: ignore[assignment]

__all__ = ["Connection", "Connections", "allowed_connections"]

NO_LIMIT = 1 << 16
SPARE_FILES = 128  # for the model's files, the engine's links and the log
SEND_BUFFER_BYTES = 128 << 10
KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))


def allowed_connections(wanted: int) -> int:
    """So many connections as are wanted (0: all that may be), within the limit of open files, which is raised for it."""
    if resource is None:
        return wanted or NO_LIMIT
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = NO_LIMIT if hard == resource.RLIM_INFINITY else hard
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, target), hard))
        soft = max(soft, target)
    room = max(soft - SPARE_FILES, 16)
    return min(wanted, room) if wanted else room


class Connections:
    """All connections of a server: how many there are, and which of them rest. Used from the event loop alone."""

    def __init__(self, options: Options, most: int):
        self.options, self._most = options, most
        self._open: set[Connection] = set()
        self._resting: dict[Connection, None] = {}  # the longest at rest first

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: Connection) -> bool:
        """Whether `connection` may stay; another may have been closed for it."""
        if len(self._open) >= self._most and self._resting:
            longest = next(iter(self._resting))
            self.leave(longest)
            longest.transport.abort()
        if len(self._open) >= self._most:
            return False
        self._open.add(connection)
        self._resting[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._resting.pop(connection, None)

    def rests(self, connection: Connection, is_resting: bool) -> None:
        """A request begins or ends on `connection`."""
        if not is_resting:
            self._resting.pop(connection, None)
        elif connection in self._open:
            self._resting.setdefault(connection)


class Connection(H11Protocol):
    """One connection."""

    def __init__(self, connections: Connections, **more: Any):
        super().__init__(**more)
        self._all, self._options = connections, connections.options
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _tune(transport.get_extra_info("socket"))
        if self._all.enter(self):
            self._await_head()
        else:
            self._say_and_close(ApiError(503, "too many connections; try again", kind=SERVER, code="connections_limit"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.leave(self)
        self._head_timer = _stopped(self._head_timer)
        self._write_timer = _stopped(self._write_timer)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_write()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_write()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._write_timer = _stopped(self._write_timer)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered in the API's shape, unless an answer is on its way already."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
        else:
            self._say_and_close(ApiError(400, msg, code="invalid_http"))

    def _look(self) -> None:
        """After something happened: a request is under way, or its head is waited for, or the connection rests."""
        is_busy = self.cycle is not None and not self.cycle.response_complete
        self._all.rests(self, not is_busy)
        if is_busy:
            self._head_timer = _stopped(self._head_timer)
        elif self.timeout_keep_alive_task is None and self._head_timer is None:
            self._await_head()

    def _await_head(self) -> None:
        if not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self._options.head_s, self._head_late)

    def _head_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            message = f"no whole request came within {self._options.head_s:g} s"
            self._say_and_close(ApiError(408, message, code="request_timeout"))

    def _await_write(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._options.write_s, self.transport.abort)

    def _say_and_close(self, error: ApiError) -> None:
        body = encoded(error.document())
        head = f"HTTP/1.1 {error.status} Refused\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()
        self._await_write()


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, and `timer` will not ring."""
    if timer is not None:
        timer.cancel()
    return None


def _tune(sock: socket.socket | None) -> None:
    """A small send buffer, and a vanished peer found by keep-alive probes."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # the peer may have gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
