"""Refusals and failures in the shape that OpenAI's clients read, and the status each is sent with.

{"error": {"message", "type", "param", "code"}}. The official client raises by status: 400 BadRequestError, 401
AuthenticationError, 404 NotFoundError, 429 RateLimitError, 500 and more InternalServerError; an error inside a stream
APIError. 408, 409, 429 and 500 and more it tries again by itself unless `x-should-retry` says no.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ecotone.decoding.words import Ending
from ecotone.units import EcotoneError

__all__ = ["ApiError", "ClientGone", "bad_value", "ending_error", "too_long"]

INVALID, SERVER, LIMIT = "invalid_request_error", "server_error", "rate_limit_error"
ONCE_MORE = {"Retry-After": "1"}
NOT_AGAIN = {"x-should-retry": "false"}


class ApiError(EcotoneError):
    """What is answered instead of a result; `param` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    def document(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class ClientGone(EcotoneError):
    """Nobody is there to be answered any more; counted as status 499, sent to nobody."""


def bad_value(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """400: a field of the request."""
    return ApiError(400, message, param=param, code=code)


def too_long(param: str, message: str) -> ApiError:
    """400: more tokens than the context has."""
    return ApiError(400, message, param=param, code="context_length_exceeded")


def ending_error(ending: Ending, reason: str, param: str) -> ApiError | None:
    """What a request's ending is to its asker; None where it ended well. `param`: the field that holds the prompt."""
    text = reason or ending.value
    match ending:
        case Ending.STOP | Ending.LENGTH:
            return None
        case Ending.BUSY:
            return ApiError(429, text, kind=LIMIT, code="queue_full", headers=ONCE_MORE)
        case Ending.TOO_LONG:
            return too_long(param, text)
        case Ending.DEADLINE:
            return ApiError(504, text, kind=SERVER, code="deadline_exceeded", headers=NOT_AGAIN)
        case Ending.NODE_LOST:
            return ApiError(503, text, kind=SERVER, code="stage_lost", headers=ONCE_MORE)
        case Ending.CANCELLED:
            return ApiError(503, text, kind=SERVER, code="cancelled", headers=ONCE_MORE)
        case Ending.FAILED:
            return ApiError(500, text, kind=SERVER, code="generation_failed", headers=NOT_AGAIN)
