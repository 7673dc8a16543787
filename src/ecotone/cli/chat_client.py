"""A client of any OpenAI-compatible server, as small as a terminal needs: the models, and one streamed answer.

An answer that ends without a finish_reason was cut off and is an error, whatever text had come. Times are as the user has
them: from asking to the first text, and from that to the last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from ecotone.units import EcotoneError

__all__ = ["Answer", "ChatClient", "events"]

CONNECT_S, READ_S = 10.0, 600.0


@dataclass(slots=True)
class Answer:
    """Filled while its stream is read. `tokens` as the server counts them, else the parts that came."""

    text: str = ""
    finish_reason: str | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_s: float = 0.0  # from asking to the first text
    total_s: float = 0.0
    tool_calls: list[str] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first; 0 where there are none."""
        span_s = self.total_s - self.first_s
        return (self.tokens - 1) / span_s if self.tokens > 1 and span_s > 0 else 0.0


class ChatClient:
    """`url` ends in /v1. Close it after use; it is a context manager."""

    def __init__(self, url: str, key: str = "", transport: httpx.BaseTransport | None = None):
        if not url.startswith(("http://", "https://")):
            raise EcotoneError(f"--url {url!r}: write http://HOST:PORT/v1")
        if not key.isascii() or not key.isprintable():
            raise EcotoneError("the key has characters that a header cannot carry; check --key or OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
        try:
            self._http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout, transport=transport)
        except (httpx.InvalidURL, ValueError) as error:
            raise EcotoneError(f"--url {url!r}: {error}") from None
        self._url = url

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names of the models there."""
        try:
            response = self._http.get("/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != 200:
            raise _refusal(response)
        try:
            return [str(each["id"]) for each in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise EcotoneError(f"{self._url}/models is not the list of models that OpenAI's API has") from None

    def stream(
        self, model: str, messages: Sequence[Mapping[str, str]], answer: Answer, options: Mapping[str, Any]
    ) -> Iterator[str]:
        """Ask, and yield the text as it comes, filling `answer`. Closing the iterator ends the request at the server."""
        document = {"model": model, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}
        start_s = time.perf_counter()
        try:
            with self._http.stream("POST", "/chat/completions", json=document | dict(options)) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                for event in events(response.iter_lines()):
                    text = _take(event, answer)
                    answer.total_s = time.perf_counter() - start_s
                    if text:
                        answer.first_s = answer.first_s or answer.total_s
                        yield text
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if answer.finish_reason is None:
            raise EcotoneError("the answer was cut off: the server ended it without saying why")

    def _unreachable(self, error: httpx.HTTPError) -> EcotoneError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return EcotoneError(f"{self._url} cannot be reached: {error}; is the server running? else give another --url")
        return EcotoneError(f"{self._url}: the connection failed: {str(error) or type(error).__name__}")


def events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to [DONE]; comments and other fields are left out."""
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            text, data = "\n".join(data), []
            if text == "[DONE]":
                return
            try:
                event = json.loads(text)
            except (ValueError, RecursionError):
                raise EcotoneError(f"the server sent an event that is not JSON: {text[:80]!r}") from None
            if isinstance(event, dict):
                yield event


def _take(event: dict[str, Any], answer: Answer) -> str:
    """The text of one event; raises EcotoneError where it is an error."""
    if event.get("error"):
        error = event["error"]
        raise EcotoneError(str(error.get("message", error) if isinstance(error, dict) else error))
    usage = event.get("usage")
    if isinstance(usage, dict):
        answer.tokens = int(usage.get("completion_tokens") or 0)
        answer.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        answer.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    choices = event.get("choices") or []
    if not choices:
        return ""
    delta = choices[0].get("delta") or {}
    answer.finish_reason = choices[0].get("finish_reason") or answer.finish_reason
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        answer.tool_calls.append(f"{function.get('name')}({function.get('arguments')})")
    text = str(delta.get("content") or "")
    if text:
        answer.text += text
        answer.tokens += not isinstance(usage, dict)
    return text


def _refusal(response: httpx.Response) -> EcotoneError:
    try:
        error = response.json()["error"]
        message = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        message = response.text.strip()[:200] or response.reason_phrase
    return EcotoneError(f"the server answered {response.status_code}: {message}")
