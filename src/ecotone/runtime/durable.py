"""Requests that survive their asker: which ids are known, what is recorded of them, what is given back after a restart.

Only requests with an id are recorded, since nobody could ask for the others again. Such a request is accepted once it is on
the disk; its outcome is on the disk before anyone is told, so a second asking (now, or by the next process with this
journal) sees the same outcome and nothing runs twice. Acknowledging forgets inputs and outcome. An outcome that the disk
does not take is told all the same: after a restart that request runs again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from ecotone.protocol import journal as form
from ecotone.protocol.events import ErrorKind
from ecotone.runtime.errors import RequestError, RequestIdTaken, UnknownRequest, Unrecorded
from ecotone.runtime.journal import JournalFile

__all__ = ["Durable", "Outcome", "Unfinished"]

Tensors = Sequence[torch.Tensor]

_ENDS_FOR_GOOD = (
    ErrorKind.DEADLINE, ErrorKind.CANCELLED, ErrorKind.NODE_LOST, ErrorKind.FAILED, ErrorKind.TOO_LARGE,
)  # fmt: skip
"""CLOSED is none of them: what a closing session gives up is taken up by the next one."""


class Unfinished(NamedTuple):
    """An accepted request without an outcome, from before; `left_s` of its deadline is left."""

    number: int
    request_id: str
    inputs: tuple[torch.Tensor, ...]
    left_s: float | None


class Outcome(NamedTuple):
    """How a request ended: its tensors, by which model, or the error's kind and reason."""

    tensors: tuple[torch.Tensor, ...] = ()
    graph_hash: str = ""
    epoch: int = 0
    kind: ErrorKind | None = None
    reason: str = ""


class Durable:
    """The journal at `path`, in terms of requests. Raises JournalError; see JournalFile."""

    def __init__(self, path: Path):
        self._file = JournalFile(path)
        self._ids: dict[int, str] = {entry.number: entry.request_id for entry in self._file.unfinished}
        self._finished_s: dict[str, float] = {entry.request_id: time.monotonic() for entry in self._file.finished}
        self._lock = threading.Lock()

    @property
    def next_number(self) -> int:
        return self._file.next_number

    def unfinished(self) -> tuple[Unfinished, ...]:
        """What is to be submitted again, as recorded."""
        found, now_s = [], time.time()
        for entry in self._file.unfinished:
            accepted = self._file.read_inputs(entry.number)
            if accepted is not None:
                found.append(Unfinished(entry.number, entry.request_id, _unpack(accepted.inputs), entry.left_s(now_s)))
        return tuple(found)

    def outcome(self, request_id: str) -> Outcome | None:
        """How the request of this id ended; None: it has not. Raises UnknownRequest for acknowledged or unknown ids."""
        found = self._file.read_outcome(request_id)
        match found:
            case form.Delivered():
                return Outcome(_unpack(found.result), found.graph_hash, found.epoch)
            case form.Failed():
                kind = ErrorKind(found.kind) if found.kind in set(ErrorKind) else ErrorKind.FAILED
                return Outcome(kind=kind, reason=found.reason)
        if self._file.is_acknowledged(request_id):
            raise UnknownRequest(f"request {request_id!r} was acknowledged; its result is no longer kept")
        if self._file.find(request_id) is None:
            raise UnknownRequest(f"request {request_id!r} is not known here; submit it")
        return None

    def knows(self, request_id: str, inputs: Tensors) -> bool:
        """Whether this id was accepted; raises UnknownRequest if acknowledged, RequestError if it had other inputs."""
        if self._file.is_acknowledged(request_id):
            raise UnknownRequest(f"request {request_id!r} was acknowledged already; give a new request a new id")
        entry = self._file.find(request_id)
        if entry is None:
            return False
        if entry.digest != form.digest_of(_pack(inputs)):
            raise RequestIdTaken(f"request {request_id!r} was accepted with other inputs; give a new request a new id")
        return True

    def begin(self, number: int, request_id: str) -> None:
        """Request `number` has this id."""
        with self._lock:
            self._ids[number] = request_id

    def record(self, number: int, inputs: Tensors, deadline_s: float | None, done: Callable[[str], None]) -> None:
        """Write the request down where it has an id; then `done` with "" or the reason why not, in another thread."""
        request_id = self._ids.get(number)
        if request_id is None:
            done("")
            return
        kept = tuple(inputs)

        def make() -> form.Record:
            return form.Accepted(
                number=number, request_id=request_id, inputs=_pack(kept), deadline_s=deadline_s, at_s=time.time()
            )

        self._file.append(make, done)

    def end(self, number: int, outcome: Outcome, done: Callable[[str], None]) -> None:
        """Write the outcome down where the request has an id; then `done`, at once or in another thread."""
        with self._lock:
            request_id = self._ids.pop(number, None)
        if request_id is None or outcome.kind not in (None, *_ENDS_FOR_GOOD):
            done("")
            return

        def make() -> form.Record:
            if outcome.kind is not None:
                return form.Failed(number=number, kind=outcome.kind.value, reason=outcome.reason)
            packed = _pack(outcome.tensors)
            return form.Delivered(number=number, result=packed, graph_hash=outcome.graph_hash, epoch=outcome.epoch)

        def written(reason: str) -> None:
            self._finished_s[request_id] = time.monotonic()
            done(reason)

        self._file.append(make, written)

    def acknowledge(self, request_id: str) -> None:
        """Forget a finished request; raises UnknownRequest, RequestError (unfinished), Unrecorded (disk)."""
        entry = self._file.find(request_id)
        if entry is None:
            if self._file.is_acknowledged(request_id):
                return
            raise UnknownRequest(f"request {request_id!r} is not known here")
        if not entry.is_finished:
            raise RequestError(f"request {request_id!r} has no outcome yet; claim it first")
        try:
            self._file.append_and_wait(form.Acknowledged(number=entry.number, request_id=request_id))
        except form.JournalError as error:
            raise Unrecorded(str(error)) from None
        self._finished_s.pop(request_id, None)

    def expire(self, keep: int, keep_s: float) -> None:
        """Acknowledge, in the background, outcomes older than `keep_s` seconds and all but the newest `keep`."""
        now_s = time.monotonic()
        while self._finished_s:  # in the order in which they ended
            request_id, at_s = next(iter(self._finished_s.items()))
            if len(self._finished_s) <= keep and now_s - at_s <= keep_s:
                return
            entry = self._file.find(request_id)
            if entry is not None:
                record = form.Acknowledged(number=entry.number, request_id=request_id)
                self._file.append(lambda record=record: record, lambda reason: None)  # type: ignore[misc]
            self._finished_s.pop(request_id, None)

    def close(self) -> None:
        self._file.close()


def _pack(tensors: Tensors) -> bytes:
    """Tensors without loss; clones, since equal storage of two tensors is refused by the format."""
    return safetensors.torch.save({f"{i:06d}": t.detach().cpu().contiguous().clone() for i, t in enumerate(tensors)})


def _unpack(data: bytes) -> tuple[torch.Tensor, ...]:
    try:
        found = safetensors.torch.load(data)
    except Exception as error:  # safetensors has its own exception type
        raise form.JournalDamaged(
            f"the journal's tensors cannot be read: {str(error)[:120]}; is it another one's?"
        ) from None
    return tuple(found[name] for name in sorted(found))
