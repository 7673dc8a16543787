"""Who may ask, and how much at once: API keys, requests under way and per minute by key, bytes of bodies in memory.

Keys are compared by digests in constant time, all of them each time, and never kept or shown as they are. Everything here
is used from the event loop alone.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ecotone.serving.openai.errors import LIMIT, ApiError
from ecotone.units import EcotoneError

__all__ = ["Admission", "load_keys"]

VARIABLES = ("ECOTONE_API_KEYS", "ECOTONE_API_KEY")
LEAST_KEY_CHARS = 8


def load_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys in `file` (one a line, # begins a comment), else those of ECOTONE_API_KEYS (commas between); may be none."""
    if file is not None:
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EcotoneError(f"{file}: the keys cannot be read: {error}") from None
        keys = [line.split("#")[0].strip() for line in text.splitlines()]
        where = str(file)
    else:
        where = next((name for name in VARIABLES if environment.get(name)), "")
        keys = [key.strip() for key in environment.get(where, "").split(",")] if where else []
    kept = tuple(dict.fromkeys(key for key in keys if key))
    if file is not None and not kept:
        raise EcotoneError(f"{where}: has no key; write one a line")
    if any(len(key) < LEAST_KEY_CHARS or not key.isascii() or not key.isprintable() for key in kept):
        raise EcotoneError(f"{where}: a key must be at least {LEAST_KEY_CHARS} printable ASCII characters")
    return kept


@dataclass(slots=True)
class _Use:
    active: int = 0
    tokens: float = 0.0  # of the bucket that fills once a minute
    filled_s: float = 0.0


class Admission:
    """Limits of 0 are off. Without keys everybody is one asker."""

    def __init__(
        self,
        keys: tuple[str, ...],
        *,
        most_active: int,
        per_minute: int,
        most_body_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._most_active, self._per_minute, self._clock = most_active, per_minute, clock
        self._uses: dict[int, _Use] = {}
        self._most_body_bytes, self._body_bytes = most_body_bytes, 0

    def asker(self, authorization: str) -> int:
        """Which key `authorization` bears; raises ApiError 401 where there are keys and it bears none of them."""
        if not self._digests:
            return 0
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = [hmac.compare_digest(digest, each) for each in self._digests]
        if scheme.lower() == "bearer" and any(found):
            return found.index(True)
        what = "the API key is not one of this server's" if given else "an API key is needed"
        message = f"{what}: send the header  Authorization: Bearer KEY  (api_key in OpenAI's client)"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    @contextmanager
    def held(self, asker: int) -> Iterator[None]:
        """A place among the requests under way of `asker`; raises ApiError 429 where there is none."""
        use = self._uses.setdefault(asker, _Use(tokens=self._per_minute, filled_s=self._clock()))
        if self._most_active and use.active >= self._most_active:
            message = f"{use.active} requests of this key are under way, which is its limit; wait for one to end"
            raise ApiError(429, message, kind=LIMIT, code="concurrency_limit", headers={"Retry-After": "1"})
        self._spend(use)
        use.active += 1
        try:
            yield
        finally:
            use.active -= 1

    def _spend(self, use: _Use) -> None:
        if not self._per_minute:
            return
        now_s, rate = self._clock(), self._per_minute / 60
        use.tokens = min(use.tokens + (now_s - use.filled_s) * rate, self._per_minute)
        use.filled_s = now_s
        if use.tokens < 1:
            wait_s = (1 - use.tokens) / rate
            message = f"this key may send {self._per_minute} requests a minute; the next one in {wait_s:.1f} s"
            headers = {"Retry-After": str(max(1, round(wait_s + 0.5)))}
            raise ApiError(429, message, kind=LIMIT, code="rate_limit_exceeded", headers=headers)
        use.tokens -= 1

    def grow(self, num_bytes: int) -> None:
        """Count bytes of a body that is held; raises ApiError 429 where all bodies together are too many."""
        if self._body_bytes + num_bytes > self._most_body_bytes:
            message = "too many large requests are being sent at once; try again"
            raise ApiError(429, message, kind=LIMIT, code="bodies_limit", headers={"Retry-After": "1"})
        self._body_bytes += num_bytes

    def shrink(self, num_bytes: int) -> None:
        self._body_bytes -= num_bytes
