"""A source answered while the server runs: the newest answer at /latest, all of them as they come at /results (JSON lines).

One thread reads the source and hands frames to the session, a few under way at once; a slow listener never slows it: each
listener has a bounded queue whose oldest answers are dropped.
"""

from __future__ import annotations

import asyncio
import collections
import json
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ecotone.runtime import Session
from ecotone.serving.http import refusal
from ecotone.serving.prepare import Preparation
from ecotone.serving.results import Answer, json_line
from ecotone.serving.sources import Item, Source
from ecotone.units import EcotoneError

__all__ = ["Live"]

LISTENER_LINES = 256


class Live:
    """Answers `source` through `session` from `start` to `close`."""

    def __init__(self, preparation: Preparation, session: Session, source: Source, in_flight: int = 2):
        self._preparation, self._session, self._source = preparation, session, source
        self._room = threading.Semaphore(in_flight)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="live-source", daemon=True)
        self._lock = threading.Lock()
        self._latest, self._error = "", ""
        self._listeners: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Event, collections.deque[str]]] = {}

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """Read no further; what is under way is answered."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    def routes(self, token: str) -> tuple[Route, ...]:
        """/latest and /results, behind the server's token."""

        async def latest(request: Request) -> Response:
            if self._latest or self._error:
                document = self._latest or json.dumps({"error": self._error})
                return refusal(request, token) or PlainTextResponse(document + "\n", media_type="application/json")
            return refusal(request, token) or JSONResponse({"error": "no answer yet"}, 503, {"Retry-After": "1"})

        async def results(request: Request) -> Response:
            return refusal(request, token) or StreamingResponse(self._lines(), media_type="application/x-ndjson")

        return (Route("/latest", latest), Route("/results", results))

    async def _lines(self) -> AsyncIterator[str]:
        """Answers from now on, until the source ends."""
        queue: collections.deque[str] = collections.deque(maxlen=LISTENER_LINES)
        changed, key = asyncio.Event(), id(queue)
        with self._lock:
            self._listeners[key] = (asyncio.get_running_loop(), changed, queue)
        try:
            while True:
                ended = not self._thread.is_alive()
                while queue:
                    yield queue.popleft() + "\n"
                if ended:
                    return
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), timeout=1.0)
                except TimeoutError:
                    continue
        finally:
            with self._lock:
                self._listeners.pop(key, None)

    def _read(self) -> None:
        try:
            for item in self._source:
                while not self._room.acquire(timeout=0.2):
                    if self._stop.is_set():
                        return
                if self._stop.is_set():
                    return
                self._hand_in(item)
        except EcotoneError as error:
            self._error = str(error)

    def _hand_in(self, item: Item) -> None:
        call, start_s = self._preparation.prepare(item), time.perf_counter()

        def finish(done: Future[Any]) -> None:
            self._room.release()
            error = done.exception()
            if error is not None:
                self._tell(json.dumps({"item": item.name, "error": str(error)}))
                return
            outputs = self._preparation.outputs(done.result())
            answer = Answer(item=item.name, outputs=outputs, latency_s=time.perf_counter() - start_s)
            self._tell(json_line(answer, self._preparation.labels))

        try:
            future = self._session.submit(call.args, call.kwargs)
        except EcotoneError:
            self._room.release()
            raise
        future.add_done_callback(finish)

    def _tell(self, line: str) -> None:
        with self._lock:
            self._latest = line
            listeners = tuple(self._listeners.values())
        for loop, changed, queue in listeners:
            queue.append(line)
            loop.call_soon_threadsafe(changed.set)
