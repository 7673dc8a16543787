"""Questions between nodes outside the protocol: traces, profiling, link probes, leave-taking. JSON, asked again if lost.

One frame asks, one or more answer (long answers are cut at the frame's cap). The asker repeats an unanswered question, so a
handler must be harmless to repeat; a handler that takes long runs in a thread of its own, and its answer is kept for
repeats. An answer names its error instead of a value where the handler raised. Nothing here is trusted: what is not a
well-formed question is dropped.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ecotone.codec import frame
from ecotone.protocol.message import NodeId, Priority
from ecotone.runtime.errors import NodeUnreachable
from ecotone.runtime.port import QUESTION, Port
from ecotone.units import EcotoneError
from ecotone.wire.wire import Frame

__all__ = ["Handler", "QuestionError", "Questions"]

_ASK, _ANSWER = 0, 1
_PIECE_BYTES = 512 * 1024
_MAX_ANSWER_BYTES = 64 << 20
_KEPT_ANSWERS = 64

Handler = Callable[[NodeId, dict[str, Any]], Any]
"""Answers a question: (peer, body) -> a JSON value; raises EcotoneError to answer with an error."""


class QuestionError(EcotoneError):
    """The peer answered with an error."""


@dataclass(slots=True)
class _Pending:
    done: threading.Event = field(default_factory=threading.Event)
    pieces: dict[int, bytes] = field(default_factory=dict)
    topic: str = ""
    answer: dict[str, Any] | None = None
    answered_s: float = 0.0
    abandoned: str = ""


class Questions:
    """Asks and answers over `port`. `handlers` by topic; those in `slow` run in threads of their own."""

    def __init__(self, port: Port, handlers: Mapping[str, Handler] | None = None, slow: Mapping[str, Handler] | None = None):
        self._port = port
        self._quick, self._slow = dict(handlers or {}), dict(slow or {})
        self._numbers = itertools.count(time.time_ns())  # of this process and no earlier one
        self._lock = threading.Lock()
        self._pending: dict[tuple[NodeId, int], _Pending] = {}
        self._kept: OrderedDict[tuple[NodeId, int], bytes | None] = OrderedDict()  # None: being worked on
        port.on_question = self._take

    def on(self, topic: str, handler: Handler | None, *, slow: bool = False) -> None:
        """Answer `topic` by `handler` from now on, in a thread of its own where it is `slow`; None: no more."""
        for handlers in (self._quick, self._slow):
            handlers.pop(topic, None)
        if handler is not None:
            (self._slow if slow else self._quick)[topic] = handler

    def ask(
        self,
        peer: NodeId,
        topic: str,
        body: Mapping[str, Any] | None = None,
        *,
        deadline_s: float = 5.0,
        repeat_s: float = 1.0,
    ) -> Any:
        """The peer's answer; raises QuestionError (it could not) or NodeUnreachable (none within `deadline_s`)."""
        return self.ask_timed(peer, topic, body, deadline_s=deadline_s, repeat_s=repeat_s)[0]

    def ask_timed(
        self,
        peer: NodeId,
        topic: str,
        body: Mapping[str, Any] | None = None,
        *,
        padding: bytes = b"",
        priority: Priority = Priority.CONTROL,
        deadline_s: float = 5.0,
        repeat_s: float = 1.0,
    ) -> tuple[Any, float]:
        """The answer and the seconds from asking to answer; `padding` makes the question that many bytes longer."""
        number = next(self._numbers)
        pending = self._pending[peer, number] = _Pending(topic=topic)
        text = json.dumps({"topic": topic, "body": dict(body or {})}).encode()
        question = _build(_ASK, number, text + b"\0" + padding if padding else text)
        end = time.perf_counter() + deadline_s
        try:
            while True:
                start = time.perf_counter()
                self._port.send(peer, question, priority)
                if pending.done.wait(max(0.0, min(repeat_s, end - time.perf_counter()))):
                    break
                if time.perf_counter() >= end:
                    raise NodeUnreachable(f"node {peer} did not answer a question ({topic}) within {deadline_s:g} s")
        finally:
            self._pending.pop((peer, number), None)
        if pending.abandoned:
            raise NodeUnreachable(f"node {peer} did not answer a question ({topic}): {pending.abandoned}")
        answer = pending.answer or {}
        if "error" in answer:
            raise QuestionError(f"node {peer}: {answer['error']}")
        return answer.get("value"), pending.answered_s - start

    def abandon(self, peer: NodeId, topics: Collection[str], reason: str) -> None:
        """Nobody will answer what `peer` was asked: those who wait for `topics` get NodeUnreachable with the reason now."""
        for (asked, _), pending in tuple(self._pending.items()):
            if asked == peer and pending.topic in topics and not pending.done.is_set():
                pending.abandoned = reason
                pending.done.set()

    def tell(self, peer: NodeId, topic: str, body: Mapping[str, Any] | None = None) -> None:
        """Send a question whose answer nobody waits for; it may be lost."""
        text = json.dumps({"topic": topic, "body": dict(body or {})}).encode()
        self._port.send(peer, _build(_ASK, next(self._numbers), text), Priority.CONTROL)

    def _take(self, peer: NodeId, data: Frame) -> None:
        arrived = time.perf_counter()
        try:
            header, payload = frame.parse(data)
            if header.edge == _ANSWER:
                self._take_answer(peer, header, bytes(payload), arrived)
            elif header.edge == _ASK:
                document = json.loads(bytes(payload).partition(b"\0")[0])
                self._take_question(peer, header.micro_batch, str(document["topic"]), dict(document["body"]))
        except (EcotoneError, ValueError, KeyError, TypeError, RecursionError):
            return  # not a question of ours: dropped

    def _take_answer(self, peer: NodeId, header: frame.Header, payload: bytes, arrived: float) -> None:
        pending = self._pending.get((peer, header.micro_batch))
        if pending is None or pending.done.is_set() or header.encoded_bytes > _MAX_ANSWER_BYTES:
            return
        pending.pieces[header.chunk_index] = payload
        if len(pending.pieces) == header.chunk_count:
            answer = json.loads(b"".join(pending.pieces[index] for index in range(header.chunk_count)))
            pending.answer, pending.answered_s = dict(answer), arrived
            pending.done.set()

    def _take_question(self, peer: NodeId, number: int, topic: str, body: dict[str, Any]) -> None:
        quick = self._quick.get(topic)
        if quick is not None:
            self._reply(peer, number, _answer(quick, peer, body))
            return
        slow = self._slow.get(topic)
        if slow is None:
            self._reply(peer, number, json.dumps({"error": f"it does not know the question {topic!r}"}).encode())
            return
        with self._lock:
            known = (peer, number) in self._kept
            kept = self._kept.setdefault((peer, number), None)
            while len(self._kept) > _KEPT_ANSWERS:
                self._kept.popitem(last=False)
        if kept is not None:
            self._reply(peer, number, kept)
        elif not known:
            arguments = (peer, number, slow, body)
            threading.Thread(target=self._work, args=arguments, name=f"question-{topic}", daemon=True).start()

    def _work(self, peer: NodeId, number: int, handler: Handler, body: dict[str, Any]) -> None:
        text = _answer(handler, peer, body)
        with self._lock:
            self._kept[peer, number] = text
        self._reply(peer, number, text)

    def _reply(self, peer: NodeId, number: int, text: bytes) -> None:
        bounds = frame.chunk_bounds(len(text), _PIECE_BYTES)
        for index, (start, stop) in enumerate(bounds):
            piece = _build(_ANSWER, number, text[start:stop], index, len(bounds), len(text))
            self._port.send(peer, piece, Priority.CONTROL)


def _answer(handler: Handler, peer: NodeId, body: dict[str, Any]) -> bytes:
    try:
        return json.dumps({"value": handler(peer, body)}).encode()
    except EcotoneError as error:
        return json.dumps({"error": str(error)}).encode()
    except Exception as error:  # a question must never end a node
        return json.dumps({"error": f"{type(error).__name__}: {error}"}).encode()


def _build(edge: int, number: int, payload: bytes, index: int = 0, count: int = 1, size: int = -1) -> bytearray:
    header = frame.Header(
        kind=frame.Kind.CONTROL, link_id=QUESTION, edge=edge, micro_batch=number, chunk_index=index, chunk_count=count,
        encoded_bytes=size,
    )  # fmt: skip
    return frame.build(header, payload)
