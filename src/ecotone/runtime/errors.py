"""What a deployment can end with, each one line with its remedy. All are EcotoneErrors."""

from __future__ import annotations

from ecotone.protocol.events import ErrorKind
from ecotone.units import EcotoneError

__all__ = [
    "Busy", "Cancelled", "DeadlinePassed", "DeployError", "NodeLost", "NodeUnreachable", "RequestError", "SessionClosed",
    "request_error",
]  # fmt: skip


class NodeUnreachable(EcotoneError):
    """A node of the plan does not answer."""


class DeployError(EcotoneError):
    """A plan could not be put in force; the former one, if any, stays."""


class RequestError(EcotoneError):
    """A request ended without its result; the subclasses say why, this one: a stage, codec or message failed."""


class Busy(RequestError):
    """The queue of accepted requests is full: send later or slower."""


class SessionClosed(RequestError):
    """The session is closing or closed, or a node of it is leaving."""


class DeadlinePassed(RequestError):
    """The result would have come after the deadline."""


class Cancelled(RequestError):
    """The asker cancelled it."""


class NodeLost(RequestError):
    """A node of the plan died or was cut off while it held the request."""


_CLASSES: dict[ErrorKind, type[RequestError]] = {
    ErrorKind.BUSY: Busy,
    ErrorKind.CLOSED: SessionClosed,
    ErrorKind.DEADLINE: DeadlinePassed,
    ErrorKind.CANCELLED: Cancelled,
    ErrorKind.NODE_LOST: NodeLost,
}


def request_error(kind: ErrorKind, reason: str, request: int) -> RequestError:
    """The exception for the machine's RequestError effect."""
    return _CLASSES.get(kind, RequestError)(f"request {request}: {reason or kind.value}")
