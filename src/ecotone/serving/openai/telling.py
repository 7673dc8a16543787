"""The choices of one request while they are made, told as a whole or as a stream, of chat or of plain completions.

A stream: chunks as pieces come, each choice begun by its role and ended by its finish_reason, then usage where asked for,
then [DONE]. A choice that fails ends all of them with an error and without finish_reason or [DONE], so a part never looks
like a whole. The head of a stream waits for the first piece a while, so that what is refused at once has its own status.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from starlette.responses import Response

from ecotone.serving.openai.asks import ChatAsk, CompletionAsk
from ecotone.serving.openai.backend import Backend
from ecotone.serving.openai.channel import Answers, Job
from ecotone.serving.openai.choices import TextChoice
from ecotone.serving.openai.endpoint import Call, encoded
from ecotone.serving.openai.errors import ONCE_MORE, SERVER, ApiError, ending_error
from ecotone.serving.openai.metrics import Metrics
from ecotone.serving.openai.options import Options
from ecotone.serving.openai.sampling import Wish
from ecotone.units import EcotoneError

__all__ = ["Run", "json_response"]

WAITING = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"


class Run:
    """The choices of one request while they are made: what the four ways of telling them share."""

    def __init__(
        self, running: set[Answers], metrics: Metrics, options: Options, backend: Backend, jobs: list[Job],
        choices: Sequence[Any], ask: ChatAsk | CompletionAsk, head: dict[str, Any], param: str,
    ):  # fmt: skip
        self._running, self._metrics, self._jobs, self._param = running, metrics, jobs, param
        self.options, self.choices, self.ask, self.head = options, choices, ask, head
        self._per_prompt = ask.best_of if isinstance(ask, CompletionAsk) else ask.n
        self.answers = Answers(backend)
        self._told = [False] * len(jobs)
        self._begun_s = 0.0

    async def go(self, call: Call) -> None:
        """Make the choices and tell them; raises ApiError and ClientGone, and then nothing goes on."""
        wish, answers, self._begun_s = self.ask.wish, self.answers, call.read_s
        whole, stream = (chat_whole, chat_stream) if isinstance(self.ask, ChatAsk) else (text_whole, text_stream)
        self._running.add(answers)
        try:
            async with call.watching(answers):
                self._start(wish)
                await (stream if self.ask.stream else whole)(self, call)
        finally:
            self._running.discard(answers)
            for index, choice in enumerate(self.choices):
                self._count(index, choice.finish_reason)  # those that did not end well

    def _start(self, wish: Wish) -> None:
        try:
            self.answers.start(self._jobs, wish.priority, wish.deadline_s)
        except EcotoneError as error:
            raise ApiError(503, str(error), kind=SERVER, code="not_accepted", headers=ONCE_MORE) from None

    @property
    def is_over(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    async def pieces(self, timeout_s: float | None = None) -> list[tuple[int, Any]]:
        """(choice, piece) that came; raises the error of a choice that did not end well."""
        came = await self.answers.take(timeout_s)
        for index, piece in came:
            if piece.ending is not None and self.choices[index].finish_reason is None:
                error = ending_error(piece.ending, piece.reason, self._param)
                if error is not None:
                    raise error
        return came

    def settle(self, index: int) -> None:
        """Count a choice that ended, and end its request where it could go on."""
        if self.choices[index].has_enough:
            self.answers.stop(index)
        self._count(index, self.choices[index].finish_reason)

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(job.prompt) for job in self._jobs[:: self._per_prompt])
        made = sum(choice.num_tokens for choice in self.choices)
        cached = sum(choice.num_cached for choice in self.choices[:: self._per_prompt])
        return {
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def _count(self, index: int, reason: str | None) -> None:
        if not self._told[index] and self.answers.marks:
            self._told[index] = True
            self._metrics.ended(reason, self.answers.marks[index], self._begun_s, time.perf_counter())


async def _collect(run: Run) -> None:
    while not run.is_over:
        for index, piece in await run.pieces():
            run.choices[index].take(piece)
            if run.choices[index].finish_reason is not None:
                run.settle(index)


async def chat_whole(run: Run, call: Call) -> None:
    await _collect(run)
    choices = [
        {"index": i, "message": c.message(), "logprobs": c.logprobs(whole=True), "finish_reason": c.finish_reason}
        for i, c in enumerate(run.choices)
    ]
    await call.reply(json_response(run.head | {"choices": choices, "usage": run.usage()}))


async def text_whole(run: Run, call: Call) -> None:
    ask = run.ask
    assert isinstance(ask, CompletionAsk)
    await _collect(run)
    told: list[TextChoice] = []
    for first in range(0, len(run.choices), ask.best_of):
        group = run.choices[first : first + ask.best_of]
        best = sorted(group, key=lambda c: -c.likelihood) if ask.best_of > ask.n else group
        told += best[: ask.n]
    choices = [
        {"index": i, "text": c.text(), "logprobs": c.logprobs(), "finish_reason": c.finish_reason}
        for i, c in enumerate(told)
    ]
    await call.reply(json_response(run.head | {"choices": choices, "usage": run.usage()}))


async def chat_stream(run: Run, call: Call) -> None:
    begun: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def tell(index: int, piece: Any) -> Iterable[dict[str, Any]]:
        choice = run.choices[index]
        if index not in begun:
            begun.add(index)
            yield chunk(index, {"role": "assistant", "content": ""}, None, None)
        if choice.finish_reason is not None:
            return
        for delta in choice.take(piece):
            yield chunk(index, delta, choice.logprobs(), None)
        if choice.finish_reason is not None:
            run.settle(index)
            rest = choice.logprobs()
            yield chunk(index, {}, rest if rest and rest["content"] else None, choice.finish_reason)

    await _stream(run, call, tell)


async def text_stream(run: Run, call: Call) -> None:
    def tell(index: int, piece: Any) -> Iterable[dict[str, Any]]:
        choice = run.choices[index]
        text = choice.take(piece)
        if choice.finish_reason is not None:
            run.settle(index)
        if text or choice.finish_reason is not None:
            yield {"index": index, "text": text, "logprobs": choice.logprobs(), "finish_reason": choice.finish_reason}

    await _stream(run, call, tell)


async def _stream(run: Run, call: Call, tell: Callable[[int, Any], Iterable[dict[str, Any]]]) -> None:
    options = run.options
    more = {"usage": None} if run.ask.usage_in_stream else {}
    pieces = await run.pieces(options.hold_s)  # before the head: an error now still has a status of its own
    await call.open_stream()
    if not pieces:
        await call.write(WAITING)
    while True:
        told = [run.head | {"choices": [choice]} | more for index, piece in pieces for choice in tell(index, piece)]
        if told:
            await call.write(b"".join(_event(document) for document in told))
        if run.is_over:
            break
        pieces = await run.pieces(options.quiet_s)
        if not pieces:
            await call.write(WAITING)
    last = _event(run.head | {"choices": [], "usage": run.usage()}) if run.ask.usage_in_stream else b""
    await call.write(last + DONE, is_last=True)


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + encoded(document) + b"\n\n"


def json_response(document: dict[str, Any]) -> Response:
    """A whole answer."""
    return Response(encoded(document), media_type="application/json")
