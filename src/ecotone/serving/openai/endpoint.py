"""One HTTP request from its first byte to its last: who asks, the body, the work, errors in OpenAI's shape, and the count.

An endpoint is an ASGI application, so that one coroutine holds a request's place and cancels its work however it ends,
also in the middle of a stream and where the client goes away.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ecotone.serving.openai.admission import Admission
from ecotone.serving.openai.channel import Answers
from ecotone.serving.openai.errors import NOT_AGAIN, SERVER, ApiError, ClientGone
from ecotone.serving.openai.options import Options

__all__ = ["Call", "Endpoint", "encoded", "error_response"]

logger = logging.getLogger("ecotone.openai")
DISCARD_S = 2.0  # how long the rest of a body that is refused is read, so that its sender reads the answer
CLIENT_GONE_STATUS = 499


class Call:
    """What the work of one request has in hand."""

    def __init__(self, request: Request, receive: Receive, send: Send, admission: Admission):
        self.request, self._receive, self._send, self._admission = request, receive, send, admission
        self.body = b""
        self.held_bytes = 0
        self.is_read = False
        self.read_s = 0.0  # when the whole body was there, on time.perf_counter
        self.status = 0  # of what was sent; 0 before

    def drop_body(self) -> None:
        """The body has been read into values; its bytes are free for other requests."""
        self._admission.shrink(self.held_bytes)
        self.body, self.held_bytes = b"", 0

    async def chunk(self) -> bytes:
        """The next part of the body; raises ClientGone."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client went away within its request")
        self.is_read = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def discard(self, most_bytes: int) -> bool:
        """Read the rest of the body for a short while, so that its sender comes to read the answer; whether that was all."""
        with suppress(TimeoutError, ClientGone):
            async with asyncio.timeout(DISCARD_S):
                while not self.is_read and most_bytes > 0:
                    most_bytes -= len(await self.chunk())
        return self.is_read

    @asynccontextmanager
    async def watching(self, answers: Answers) -> AsyncIterator[None]:
        """While this lasts, `answers` fail with ClientGone where the client goes away; at the end what runs is cancelled."""

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            answers.fail(ClientGone("the client went away"))

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            answers.cancel()
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher

    async def reply(self, response: Response) -> None:
        """Send a whole answer."""
        response.headers["x-request-id"] = _request_id(self.request)
        self.status = response.status_code
        await response(self.request.scope, self._receive, self._send)

    async def open_stream(self) -> None:
        """Send the head of a stream of server-sent events."""
        self.status = 200
        headers = {
            "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no",
            "x-request-id": _request_id(self.request),
        }  # fmt: skip
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def write(self, data: bytes, is_last: bool = False) -> None:
        """Send a part of a stream; waits while the client does not take what was sent before."""
        message: Message = {"type": "http.response.body", "body": data, "more_body": not is_last}
        await self._send(message)


class Endpoint:
    """`work` answers through its Call; `needs_key`, `has_body` and `is_counted` say what is done around it."""

    def __init__(
        self,
        work: Callable[[Call], Awaitable[None]],
        options: Options,
        admission: Admission,
        counted: Callable[[str, int], None],
        *,
        path: str,
        has_body: bool = False,
    ):
        self._work, self._options, self._admission = work, options, admission
        self._counted, self._path, self._has_body = counted, path, has_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(Request(scope, receive), receive, send, self._admission)
        try:
            asker = self._admission.asker(call.request.headers.get("authorization", ""))
            if not self._has_body:
                await self._work(call)
                return
            with self._admission.held(asker):
                try:
                    await self._read(call)
                    await self._work(call)
                finally:
                    call.drop_body()
        except ApiError as error:
            await self._refuse(call, error)
        except ClientGone:
            call.status = CLIENT_GONE_STATUS
        except Exception:
            logger.exception("a request to %s failed", scope["path"])
            message = "the server failed at this request; its log says why"
            await self._refuse(call, ApiError(500, message, kind=SERVER, code="internal_error"))
        finally:
            self._counted(self._path, call.status or CLIENT_GONE_STATUS)

    async def _refuse(self, call: Call, error: ApiError) -> None:
        """Send `error`: as the answer, or as an event that ends a stream which has begun."""
        if call.status:
            call.status = error.status
            await call.write(b"data: " + encoded(error.document()) + b"\n\n", is_last=True)
            return
        response = error_response(error)
        is_late = error.status == 408  # the rest would be as late
        if self._has_body and not call.is_read and (is_late or not await call.discard(4 * self._options.max_body_bytes)):
            response.headers["Connection"] = "close"
        await call.reply(response)

    async def _read(self, call: Call) -> None:
        """The body of a JSON request, within its limits of size and time, counted by the bytes it holds."""
        headers = call.request.headers
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            message = f"Content-Type is {media[:60] or 'missing'}; send application/json"
            raise ApiError(415, message, code="unsupported_media_type")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "Content-Encoding: send the body as it is, not compressed", code="unsupported_encoding")
        most, announced = self._options.max_body_bytes, headers.get("content-length", "")
        too_large = ApiError(413, f"the request is larger than {most} bytes", code="request_too_large")
        if announced.isdigit() and int(announced[:20]) > most:
            raise too_large
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._options.body_s):
                while not call.is_read:
                    chunk = await call.chunk()
                    if call.held_bytes + len(chunk) > most:
                        raise too_large
                    self._admission.grow(len(chunk))
                    call.held_bytes += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            message = f"the body did not come within {self._options.body_s:g} s"
            raise ApiError(408, message, code="request_timeout", headers=NOT_AGAIN) from None
        call.body, call.read_s = b"".join(chunks), time.perf_counter()


def error_response(error: ApiError) -> Response:
    """`error` as a whole answer."""
    return Response(encoded(error.document()), error.status, error.headers, "application/json")


def encoded(document: object) -> bytes:
    """Compact JSON."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _request_id(request: Request) -> str:
    made = request.scope.get("ecotone.request_id")
    if made is None:
        made = request.scope["ecotone.request_id"] = f"req_{uuid.uuid4().hex}"
    return str(made)
