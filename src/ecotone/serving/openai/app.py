"""The ASGI application: addresses and methods, and what is answered where there is none."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ecotone.serving.openai.admission import Admission
from ecotone.serving.openai.endpoint import Endpoint, error_response
from ecotone.serving.openai.errors import ApiError
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.service import Service

__all__ = ["application"]


def application(service: Service, options: Options) -> Starlette:
    """The addresses of `service`. Health needs no key; everything else does where there are keys."""
    admission = Admission(
        options.keys, most_active=options.max_active_per_key, per_minute=options.max_requests_per_minute,
        most_body_bytes=options.max_bodies_bytes,
    )  # fmt: skip
    nobody = Admission((), most_active=0, per_minute=0, most_body_bytes=options.max_bodies_bytes)
    addresses = [
        ("/health", "GET", service.ready, nobody),
        ("/health/ready", "GET", service.ready, nobody),
        ("/health/live", "GET", service.live, nobody),
        ("/metrics", "GET", service.scrape, admission),
        ("/status", "GET", service.status, admission),
        ("/v1/models", "GET", service.models, admission),
        ("/v1/models/{name:path}", "GET", service.model, admission),
        ("/v1/chat/completions", "POST", service.chat, admission),
        ("/v1/completions", "POST", service.completion, admission),
        ("/v1/embeddings", "POST", service.embeddings, admission),
    ]
    counted = service.metrics.answered
    routes = [
        Route(
            path, Endpoint(work, options, who, counted, path=path, has_body=method == "POST"), methods=[method]
        )
        for path, method, work, who in addresses
    ]  # fmt: skip
    return Starlette(routes=routes, exception_handlers={404: _no_address, 405: _no_method})


async def _no_address(request: Request, error: Exception) -> Response:
    message = f"there is no {request.method} {request.url.path}; the API is under /v1"
    return error_response(ApiError(404, message, code="unknown_url"))


async def _no_method(request: Request, error: Exception) -> Response:
    headers = (error.headers or {}) if isinstance(error, HTTPException) else {}
    message = f"{request.method} is not allowed on {request.url.path}; {headers.get('Allow', 'another method')} is"
    return error_response(ApiError(405, message, code="method_not_allowed", headers=headers))
