"""What a deployment can end with, each one line with its remedy. All are EcotoneErrors."""

from __future__ import annotations

from ecotone.protocol.events import ErrorKind
from ecotone.units import EcotoneError

__all__ = [
    "Busy", "Cancelled", "DeadlinePassed", "DeployError", "NodeLost", "NodeUnreachable", "RequestError",
    "RequestIdTaken", "SessionClosed",
    "UnknownRequest", "Unrecorded", "request_error",
]  # fmt: skip


class NodeUnreachable(EcotoneError):
    """A node of the plan does not answer."""


class DeployError(EcotoneError):
    """A plan could not be put in force; the former one, if any, stays."""


class RequestError(EcotoneError):
    """A request ended without its result; the subclasses say why, this one: a stage, codec or message failed."""


class Busy(RequestError):
    """The queue of accepted requests, or the memory for their inputs, is full: send later or slower."""


class SessionClosed(RequestError):
    """The session is closing or closed, or a node of it is leaving."""


class DeadlinePassed(RequestError):
    """The result would have come after the deadline."""


class Cancelled(RequestError):
    """The asker cancelled it."""


class NodeLost(RequestError):
    """Nodes died or were cut off: no plan could run until the deadline (without one: for `node_timeout_s`)."""


class Unrecorded(RequestError):
    """Refused: the journal could not take the request (its disk is full), so it would not survive this process."""


class RequestIdTaken(RequestError):
    """A request of this id was accepted with other inputs."""


class UnknownRequest(RequestError):
    """No request of this id is known: it was never accepted, or its result was acknowledged and forgotten."""


_CLASSES: dict[ErrorKind, type[RequestError]] = {
    ErrorKind.BUSY: Busy,
    ErrorKind.CLOSED: SessionClosed,
    ErrorKind.DEADLINE: DeadlinePassed,
    ErrorKind.CANCELLED: Cancelled,
    ErrorKind.NODE_LOST: NodeLost,
    ErrorKind.UNRECORDED: Unrecorded,
}


def request_error(kind: ErrorKind, reason: str, request: int) -> RequestError:
    """The exception for the machine's RequestError effect."""
    return _CLASSES.get(kind, RequestError)(f"request {request}: {reason or kind.value}")
