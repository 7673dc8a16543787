"""How the server is set up: keys, TLS, limits and patience. A value; every limit that a client can meet is here."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ecotone import schema
from ecotone.units import EcotoneError

__all__ = ["Options"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Limits of 0 are off, except `max_connections` 0: what the system's limit of open files allows.

    `head_s`: a request's line and headers must come within; `body_s`: its body; `idle_s`: a connection may rest between
    two requests; `write_s`: a client that takes nothing of its answer for so long is cut off and its request cancelled.
    `hold_s`: a stream's status waits for the first piece so long, to be able to refuse; later a refusal is an event in it.
    `quiet_s`: a stream without a piece for so long gets a comment line. `drain_s`: running answers may end after a stop.
    `aliases`: other names that the model answers to.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    allow_open: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    aliases: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_bodies_bytes: int = 64 << 20
    max_connections: int = 0
    max_active_per_key: int = 1024
    max_requests_per_minute: int = 0
    head_s: float = 20.0
    body_s: float = 60.0
    idle_s: float = 75.0
    write_s: float = 30.0
    hold_s: float = 10.0
    quiet_s: float = 15.0
    drain_s: float = 30.0
    backlog: int = 4096

    def __post_init__(self) -> None:
        schema.check("server options", self._violations())

    def _violations(self) -> Iterator[str]:
        for name in ("head_s", "body_s", "idle_s", "write_s", "hold_s", "quiet_s", "drain_s"):
            if not 0 < getattr(self, name) < 1e6:
                yield f"{name} must be above 0 and below 1e6 seconds"
        for name in ("max_connections", "max_active_per_key", "max_requests_per_minute"):
            if getattr(self, name) < 0:
                yield f"{name} must not be negative; 0 means off"
        if not 0 < self.max_body_bytes <= self.max_bodies_bytes:
            yield "max_body_bytes must be above 0 and at most max_bodies_bytes"
        if self.backlog < 1:
            yield "backlog must be 1 or more"
        if (self.tls_cert is None) != (self.tls_key is None):
            yield "tls_cert and tls_key are given together or not at all"

    def check(self, host: str) -> None:
        """Raise EcotoneError where this cannot be served on `host`: TLS files that do not load, no key off loopback."""
        is_far = host not in LOOPBACK and not host.startswith("127.")
        if is_far and not self.keys and not self.allow_open:
            raise EcotoneError(f"listening on {host} needs API keys: a key file, or the variable ECOTONE_API_KEYS")
        if self.tls_cert is not None and self.tls_key is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_cert, self.tls_key)
            except (OSError, ssl.SSLError) as error:
                raise EcotoneError(f"{self.tls_cert}, {self.tls_key}: certificate and key do not load: {error}") from None
