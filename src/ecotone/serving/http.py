"""The HTTP server: Open Inference Protocol v2 over any `infer` function, with authentication and back-pressure.

Statuses: 400 a request that is not the protocol's, 401 no or a wrong token, 404 another model, 409 an id with other inputs,
410 an id whose result is no longer kept, 413 too large, 429 the queue is full (Retry-After), 499-like cancellation when the
client goes away, 503 not ready, draining or not written to the journal, 504 deadline passed.
The server knows no session: `infer` takes flat tensors and gives a Future, so the tests drive the real application.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ecotone.model.errors import ModelError
from ecotone.runtime.errors import (
    Busy,
    DeadlinePassed,
    NodeLost,
    NodeUnreachable,
    RequestIdTaken,
    SessionClosed,
    UnknownRequest,
    Unrecorded,
)
from ecotone.serving.oip import InputSpec, ProtocolError, parse_infer, render_infer
from ecotone.serving.prepare import to_numpy
from ecotone.units import EcotoneError

__all__ = ["Infer", "Service", "application", "refusal"]

Infer = Callable[[Sequence[torch.Tensor], float | None], "Future[Sequence[torch.Tensor]]"]
InferOnce = Callable[[Sequence[torch.Tensor], float | None, str], "Future[Sequence[torch.Tensor]]"]
HEADER = "inference-header-content-length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One served model. `ready()` is asked per health request; `cancel` ends a request whose client went away.

    `infer_once` takes requests that have an id, where ids are remembered: the second of an id gets the result of the first.
    Such a request is not cancelled when its client goes away: it may come back for the result.
    """

    name: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    infer: Infer
    infer_once: InferOnce | None = None
    ready: Callable[[], bool]
    cancel: Callable[[Future[Sequence[torch.Tensor]]], object]
    status: Callable[[], dict[str, object]]
    version: str = "1"
    token: str = ""
    max_body_bytes: int = 64 * 2**20


def application(service: Service, more: Sequence[Route] = ()) -> Starlette:
    """The ASGI application of `service`, with `more` routes beside its own."""
    base = f"/v2/models/{service.name}"
    handler = _Handlers(service)
    routes = [
        *more,
        Route("/v2/health/live", handler.live),
        Route("/v2/health/ready", handler.is_ready),
        Route("/v2", handler.server),
        Route("/metrics", handler.metrics),
        Route("/status", handler.status),
    ]
    for prefix in (base, f"{base}/versions/{service.version}"):
        routes += [
            Route(prefix, handler.model),
            Route(f"{prefix}/ready", handler.is_ready),
            Route(f"{prefix}/infer", handler.infer, methods=["POST"]),
        ]
    return Starlette(routes=routes, exception_handlers={404: handler.missing})


class _Handlers:
    """The routes of one service, and their counters."""

    def __init__(self, service: Service):
        self.service = service
        self.counts: dict[int, int] = {}

    async def live(self, request: Request) -> Response:
        return PlainTextResponse("")

    async def is_ready(self, request: Request) -> Response:
        return PlainTextResponse("") if self.service.ready() else _error(503, "not ready", {"Retry-After": "1"})

    async def server(self, request: Request) -> Response:
        return JSONResponse({"name": "ecotone", "version": version("ecotone"), "extensions": ["binary_tensor_data"]})

    async def model(self, request: Request) -> Response:
        if refused := refusal(request, self.service.token):
            return refused
        service = self.service
        described = [
            [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]
            for specs in (service.inputs, service.outputs)
        ]
        document = {"name": service.name, "versions": [service.version], "platform": "ecotone"}
        return JSONResponse(document | {"inputs": described[0], "outputs": described[1]})

    async def status(self, request: Request) -> Response:
        return refusal(request, self.service.token) or JSONResponse(self.service.status())

    async def metrics(self, request: Request) -> Response:
        """Requests by status, in the Prometheus text format."""
        if refused := refusal(request, self.service.token):
            return refused
        lines = ["# HELP ecotone_requests_total Infer requests by HTTP status.", "# TYPE ecotone_requests_total counter"]
        lines += [f'ecotone_requests_total{{status="{code}"}} {n}' for code, n in sorted(self.counts.items())]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def missing(self, request: Request, error: Exception) -> Response:
        return _error(404, f"there is no {request.url.path}; the model here is {self.service.name!r}")

    async def infer(self, request: Request) -> Response:
        response = refusal(request, self.service.token) or await self._infer(request)
        self.counts[response.status_code] = self.counts.get(response.status_code, 0) + 1
        return response

    async def _infer(self, request: Request) -> Response:
        service = self.service
        if not service.ready():
            return _error(503, "not ready or shutting down; try again", {"Retry-After": "1"})
        try:
            body = await _read_body(request, service.max_body_bytes)
            parsed = parse_infer(body, _header_bytes(request), service.inputs)
            tensors = [torch.from_numpy(np.array(a, copy=not a.flags.writeable)) for a in parsed.arrays]
            if service.infer_once is not None and parsed.id:
                outputs = await asyncio.wrap_future(service.infer_once(tensors, parsed.timeout_s, parsed.id))
            else:
                outputs = await self._answer(request, service.infer(tensors, parsed.timeout_s))
            named = {spec.name: to_numpy(t) for spec, t in zip(service.outputs, outputs, strict=True)}
            content, header = render_infer(parsed, service.name, service.version, named)
        except EcotoneError as error:
            return self._failure(error)
        media = "application/json" if header is None else "application/octet-stream"
        return Response(content, headers={} if header is None else {HEADER: str(header)}, media_type=media)

    async def _answer(self, request: Request, future: Future[Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
        """The future's result; cancels the request where the client goes away first."""
        waiting = asyncio.wrap_future(future)
        while True:
            done, _ = await asyncio.wait([waiting], timeout=1.0)
            if done:
                return waiting.result()
            if await request.is_disconnected():
                self.service.cancel(future)
                raise ProtocolError("the client went away")

    def _failure(self, error: EcotoneError) -> Response:
        if isinstance(error, _TooLarge):
            return _error(413, str(error))
        if isinstance(error, Busy):
            return _error(429, str(error), {"Retry-After": "1"})
        if isinstance(error, DeadlinePassed):
            return _error(504, str(error))
        if isinstance(error, RequestIdTaken):
            return _error(409, str(error))
        if isinstance(error, UnknownRequest):
            return _error(410, str(error))
        if isinstance(error, NodeLost | NodeUnreachable | SessionClosed | Unrecorded):
            return _error(503, str(error), {"Retry-After": "1"})
        if isinstance(error, ProtocolError | ModelError):
            return _error(400, str(error))
        return _error(500, str(error))


def refusal(request: Request, token: str) -> Response | None:
    """401 where `token` is set and the request does not bear it, compared in constant time; else None."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not token or hmac.compare_digest(given.encode(), token.encode()):
        return None
    message = "send the header  Authorization: Bearer TOKEN  with the token that the server was started with"
    return _error(401, message, {"WWW-Authenticate": "Bearer"})


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps({"error": message}), status, headers, "application/json")


class _TooLarge(EcotoneError):
    pass


async def _read_body(request: Request, limit: int) -> bytes:
    chunks, total = [], 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > limit:
            raise _TooLarge(f"the request is larger than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _header_bytes(request: Request) -> int | None:
    value = request.headers.get(HEADER)
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or len(value) > 12:
        raise ProtocolError(f"{HEADER} must be a number of bytes, is {value!r:.40}")
    return int(value)
