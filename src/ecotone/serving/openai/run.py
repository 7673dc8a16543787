"""Running the server: sockets, TLS, and an orderly end. uvicorn does the HTTP; what it lacks is in `connections.py`.

At SIGINT or SIGTERM nothing new is taken, readiness is refused, running answers may end within `drain_s`, and what then
still runs ends with an error in it. A second SIGINT ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn

from ecotone.serving.openai.app import application
from ecotone.serving.openai.backend import Backend, Embedder
from ecotone.serving.openai.connections import Connection, Connections, allowed_connections
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.service import Service
from ecotone.units import EcotoneError

__all__ = ["Server", "serve"]

GOODBYE_S = 2.0  # for the last errors to be sent


def serve(
    backend: Backend | None,
    host: str,
    port: int,
    options: Options,
    *,
    embedder: Embedder | None = None,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; `on_start` is given the address, once it answers. Raises EcotoneError."""
    with _signals_kept():
        asyncio.run(Server(backend, embedder, host, port, options, on_start).run())


class Server:
    """`run` in an event loop, `stop` from any thread. `port` 0 takes a free one; `address` says which, once started."""

    def __init__(
        self,
        backend: Backend | None,
        embedder: Embedder | None,
        host: str,
        port: int,
        options: Options,
        on_start: Callable[[str], None] | None = None,
    ):
        options.check(host)
        self._backend, self._embedder, self._options = backend, embedder, options
        self._host, self._port, self._on_start = host, port, on_start
        self._uvicorn: _Uvicorn | None = None
        self._stop_asked = threading.Event()
        self.address = ""

    async def run(self) -> None:
        """Serve until stopped; raises EcotoneError where the address cannot be listened on."""
        options = self._options
        service = Service(self._backend, self._embedder, options)
        connections = Connections(options, allowed_connections(options.max_connections))
        service.metrics.open_connections.set_function(lambda: len(connections))
        config = uvicorn.Config(
            application(service, options), log_level="error", access_log=False,
            http=cast(Any, functools.partial(Connection, connections)), ws="none", lifespan="off",
            backlog=options.backlog, timeout_keep_alive=int(options.idle_s) or 1, server_header=False,
            proxy_headers=False, timeout_graceful_shutdown=int(options.drain_s + GOODBYE_S) + 1,
            ssl_certfile=options.tls_cert, ssl_keyfile=options.tls_key,
        )  # fmt: skip
        self._uvicorn = _Uvicorn(config, service, options.drain_s, self._announce)
        if self._stop_asked.is_set():
            self._uvicorn.should_exit = True
        try:
            await self._uvicorn.serve([self._listening()])
        finally:
            service.close()

    def _listening(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            return socket.create_server((self._host, self._port), family=family, backlog=self._options.backlog)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            message = f"{self._host}:{self._port} cannot be listened on ({reason}); choose another address"
            raise EcotoneError(message) from None

    def stop(self) -> None:
        """Begin the end; `run` returns when it is done."""
        self._stop_asked.set()
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    def _announce(self, place: tuple[Any, ...]) -> None:
        host = f"[{place[0]}]" if ":" in place[0] else place[0]
        self.address = f"{'https' if self._options.tls_cert else 'http'}://{host}:{place[1]}"
        if self._on_start is not None:
            self._on_start(self.address)


class _Uvicorn(uvicorn.Server):
    """Announces where it listens, and ends answers by an error where they outlast the drain."""

    def __init__(
        self, config: uvicorn.Config, service: Service, drain_s: float, announce: Callable[[tuple[Any, ...]], None]
    ):
        super().__init__(config)
        self._service, self._drain_s, self._announce = service, drain_s, announce

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce(self.servers[0].sockets[0].getsockname())

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        self._service.is_stopping = True
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._drain_s, self._service.abort, "the server is shutting down")
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more at its end; the caller still has a model to close."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
