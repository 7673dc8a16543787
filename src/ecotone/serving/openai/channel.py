"""The way of pieces from the engine's thread to the event loop: bounded, and the engine never waits.

One `Answers` holds all choices of one HTTP request. The engine's thread appends and wakes the loop, once for however many
pieces come before the loop looks; a reader that is too slow makes them more, up to a bound, beyond which the requests are
cancelled and the reader gets an error. Nothing here knows HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ecotone.decoding.answer import OnPiece, Piece
from ecotone.decoding.params import SamplingParams
from ecotone.serving.openai.backend import Backend
from ecotone.serving.openai.errors import SERVER, ApiError

__all__ = ["Answers", "Job", "Mark"]

MOST_WAITING = 1 << 18  # tokens and characters of one HTTP request that its reader has not taken
_PIECE_COST = 16


@dataclass(frozen=True, slots=True)
class Job:
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(slots=True)
class Mark:
    """When the first and the last token of a choice came, and how many have; seconds of time.perf_counter."""

    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0


class Answers:
    """Made and used in the event loop; only what the engine calls runs in its thread."""

    def __init__(self, backend: Backend, most_waiting: int = MOST_WAITING):
        self._backend, self._most_waiting = backend, most_waiting
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._pieces: list[tuple[int, Piece]] = []
        self._waiting = 0
        self._is_woken = self._is_over = False
        self._came = asyncio.Event()
        self._error: Exception | None = None
        self._requests: dict[int, int] = {}  # choice: number of its request, while it runs
        self.marks: list[Mark] = []

    def start(self, jobs: Sequence[Job], priority: int, deadline_s: float | None) -> None:
        """Hand in a request per job; where one is refused at once by an error, none goes on."""
        self.marks = [Mark() for _ in jobs]
        try:
            for choice, job in enumerate(jobs):
                number = self._backend.start(
                    job.prompt, job.params, self._taker(choice), priority=priority, deadline_s=deadline_s
                )
                self._requests[choice] = number
        except BaseException:
            self.cancel()
            raise

    async def take(self, timeout_s: float | None = None) -> list[tuple[int, Piece]]:
        """The pieces that have come, at least one; none where `timeout_s` went by. Raises what `fail` was given."""
        pieces: list[tuple[int, Piece]] = []
        try:
            async with asyncio.timeout(timeout_s):
                while not pieces:  # a wake-up may come for pieces that were taken already
                    await self._came.wait()
                    if self._error is not None:
                        raise self._error
                    self._came.clear()
                    with self._lock:
                        pieces, self._pieces, self._waiting = self._pieces, [], 0
                        self._is_woken = False
        except TimeoutError:
            return []
        for choice, piece in pieces:
            if piece.ending is not None:
                self._requests.pop(choice, None)
        return pieces

    def fail(self, error: Exception) -> None:
        """Cancel what runs and have `take` raise `error`; the first error counts."""
        self._error = self._error or error
        self.cancel()
        self._came.set()

    def stop(self, choice: int) -> None:
        """End one choice; what still comes of it is for its reader to leave out."""
        number = self._requests.get(choice)
        if number is not None:
            self._backend.cancel(number)

    def cancel(self) -> None:
        """End every choice that still runs; nothing more is kept."""
        self._is_over = True
        requests, self._requests = self._requests, {}
        for number in requests.values():
            self._backend.cancel(number)

    def _taker(self, choice: int) -> OnPiece:
        mark = self.marks[choice]

        def take(piece: Piece) -> None:  # in the engine's thread
            if piece.tokens:
                mark.last_s = time.perf_counter()
                mark.first_s = mark.first_s or mark.last_s
                mark.num_tokens += len(piece.tokens)
            with self._lock:
                if self._is_over:
                    return
                self._pieces.append((choice, piece))
                self._waiting += _PIECE_COST + len(piece.text) + sum(1 + len(each.top) for each in piece.logprobs)
                is_full = self._waiting > self._most_waiting
                if self._is_woken and not is_full:
                    return
                self._is_woken, self._is_over = True, is_full
            self._call(self._overflow if is_full else self._came.set)

        return take

    def _call(self, function: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function)  # type: ignore[arg-type]
        except RuntimeError:  # the loop is closed: nobody is left to be told
            self._is_over = True

    def _overflow(self) -> None:
        text = "the client reads too slowly; its answer was dropped"
        self.fail(ApiError(503, text, kind=SERVER, code="slow_reader"))
