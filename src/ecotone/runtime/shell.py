"""Carries out what a node's machine decides: one loop thread, an inbox, and a thread each for computing and for codecs.

Theory of operation. Everything that happens (frames, timers, finished work, the asker's wishes) is put into the inbox. The
loop takes one item, turns it into an event of ecotone.protocol, lets the machine handle it, and carries out the effects in
order. It never computes and never waits for the wire, so control stays quick; compute and codec lanes run beside it, so
transfer overlaps compute. The shell decides nothing: the simulator carries out the same effects on a virtual clock.

The shell holds, per BodyId, tensors and encoded bytes, until the machine releases them.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, get_args

import torch

from ecotone import codec
from ecotone.cluster import Device
from ecotone.plan import Plan
from ecotone.protocol import effects, events
from ecotone.protocol.message import BLOB_EDGE, Blob, BlobRange, BodyId, Chunk, StagePart
from ecotone.protocol.node import Node
from ecotone.runtime.lane import Done, Lane
from ecotone.runtime.port import Port
from ecotone.runtime.recorder import Recorder, Span
from ecotone.runtime.stages import Stages
from ecotone.units import EcotoneError
from ecotone.wire.framing import from_frame, to_frame
from ecotone.wire.wire import PeerDown, PeerUp, Received, WireEvent

__all__ = ["Asker", "Loader", "Shell", "Told"]

Tensors = Sequence[torch.Tensor]


class Loader(Protocol):
    """Where a node's stages come from. Called in the shell's loading thread."""

    def prepare(self, session: int, epoch: int, plan: Plan, parts: tuple[StagePart, ...]) -> tuple[BlobRange, ...]:
        """Compile the node's stages of `plan`; what content is missing, if any; raises EcotoneError where it cannot."""
        ...

    def keep_piece(self, session: int, epoch: int, number: int, offset: int, piece: bytes) -> None:
        """Bytes of missing blob `number` (as prepare numbered it), `offset` from where it was to go on."""
        ...

    def unload(self, session: int, epoch: int) -> None: ...

    def open_blob(self, blob: Blob) -> bytes:
        """At the asker: the content of a blob."""
        ...


Told = effects.DeployEnded | effects.Preferred | effects.Rerouted | effects.Observed | effects.LinkChanged
"""What the machine says that neither ends a request nor moves a tensor."""


class Asker(Protocol):
    """What the session behind an asker's shell is told; called in the loop thread, must return at once."""

    def inputs(self, request: int) -> Tensors: ...
    def record(self, request: int) -> None: ...
    def accepted(self, request: int) -> None: ...
    def delivered(self, request: int, body: BodyId, tensors: Tensors) -> None: ...
    def failed(self, request: int, kind: events.ErrorKind, reason: str) -> None: ...
    def told(self, effect: Told) -> None: ...
    def closed(self) -> None: ...
    def crashed(self, reason: str) -> None: ...


class ExpectedTensors(Protocol):
    """Gives name, shape and dtype of the tensors on an edge, where known: what arrives is checked against it."""

    def __call__(self, body: BodyId) -> Sequence[codec.HasSpec] | None: ...


@dataclass(frozen=True, slots=True)
class _Finished:
    work: str
    body: BodyId
    done: Done
    start_s: float


class _Stop:
    pass


class Shell:
    """One node's shell. `asker` is None on nodes that only work; `expected` and `image` serve the asker's ends."""

    def __init__(
        self,
        port: Port,
        device: Device,
        machine: Node,
        stages: Stages,
        loader: Loader,
        *,
        recorder: Recorder | None = None,
        asker: Asker | None = None,
        expected: ExpectedTensors | None = None,
        image: codec.ImageSpec | None = None,
    ):
        self._port, self._device, self._machine = port, device, machine
        self._stages, self._loader, self._asker = stages, loader, asker
        self._expected, self._image = expected, image
        self.recorder = recorder or Recorder()
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._tensors: dict[BodyId, Tensors] = {}
        self._bytes: dict[BodyId, bytearray | memoryview] = {}
        self._timers: dict[events.TimerId, float] = {}
        self._heap: list[tuple[float, int, events.TimerId]] = []
        self._order = itertools.count()
        self._payload: memoryview = memoryview(b"")
        self._compute = Lane(f"{device.name}-compute", slowdown=device.slowdown, threads=device.threads)
        self._codec = Lane(f"{device.name}-codec", slowdown=device.slowdown, threads=device.threads)
        self._loading = Lane(f"{device.name}-loading", threads=device.threads)
        self._thread = threading.Thread(target=self._run, name=f"{device.name}-loop", daemon=True)
        self._carry_out = self._table()

    def start(self) -> None:
        """Begin to take events; the port's peers are told first."""
        self._thread.start()
        self._port.attach(self)

    def post(self, event: events.Event) -> None:
        """Put an event into the inbox, from any thread."""
        self._inbox.put(event)

    def on_wire(self, event: WireEvent) -> None:
        self._inbox.put(event)

    @property
    def is_idle(self) -> bool:
        """No plan is loaded and nothing is held: every session that worked here is over."""
        return not self._tensors and not self._bytes and not self._stages.is_in_use

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop and the lanes; what they hold is dropped. No thread is left unless a native call hangs."""
        self._port.detach(self)
        self._inbox.put(_Stop())
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        for lane in (self._compute, self._codec, self._loading):
            lane.close(timeout_s)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                item = self._next()
                if isinstance(item, _Stop):
                    return
                for event in self._events_of(item):
                    for effect in self._machine.handle(event, time.monotonic()):
                        self._carry_out[type(effect)](effect)
                self._payload = memoryview(b"")
        except Exception as error:  # a fault of ours: say so loudly, end the requests, do not hang
            traceback.print_exc(file=sys.stderr)
            if self._asker is not None:
                self._asker.crashed(f"node {self._device.name} failed inside: {_reason(error)}")

    def _next(self) -> object:
        while True:
            wait = None
            while self._heap:
                at_s, _, timer = self._heap[0]
                if self._timers.get(timer) != at_s:  # cancelled or replaced
                    heapq.heappop(self._heap)
                    continue
                wait = at_s - time.monotonic()
                break
            if wait is not None and wait <= 0:
                _, _, timer = heapq.heappop(self._heap)
                del self._timers[timer]
                return events.TimerFired(timer=timer)
            try:
                return self._inbox.get(timeout=wait)
            except queue.Empty:
                continue

    def _events_of(self, item: object) -> tuple[events.Event, ...]:
        if isinstance(item, Received):
            try:
                message, payload = from_frame(item.frame)
            except EcotoneError:
                return ()  # damaged or not ours: the link machine asks again for what matters
            self._payload = payload
            return (events.MessageReceived(peer=item.peer, message=message),)
        if isinstance(item, PeerUp):
            return (events.PeerUp(peer=item.peer),)
        if isinstance(item, PeerDown):
            return (events.PeerDown(peer=item.peer),)
        if isinstance(item, _Finished):
            return (self._finished(item),)
        return (item,)  # type: ignore[return-value]  # only events are posted

    def _finished(self, item: _Finished) -> events.Event:
        body, done = item.body, item.done
        if done.error is not None:
            where = f"stage {body.edge}" if item.work == "compute" else f"transfer {body.edge}"
            reason = f"{where} on {self._device.name}: {item.work}: {_reason(done.error)}"
            return events.WorkFailed(body=body, work=item.work, reason=reason)
        size, exit_edge = 0, None
        if item.work == "compute":
            made, exit_edge = done.value
            self._tensors[body._replace(edge=body.edge + 1 if exit_edge is None else exit_edge)] = made
        elif item.work == "decode":
            self._tensors[body] = done.value
        else:
            size = len(done.value)
            self._bytes[body] = done.value
        self.recorder.add(body, Span(item.work, body.edge, item.start_s, done.seconds, done.own_seconds, size))
        if item.work == "compute":
            return events.Computed(body=body, seconds=done.seconds, exited=exit_edge is not None)
        if item.work == "decode":
            return events.Decoded(body=body, seconds=done.seconds)
        return events.Encoded(body=body, size_bytes=size, seconds=done.seconds)

    # ---- effects -----------------------------------------------------------------------------------------------------

    def _table(self) -> dict[type, Callable[[Any], object]]:
        return {
            effects.Send: self._send,
            effects.StoreChunk: self._store_chunk,
            effects.Release: self._release,
            effects.Compute: self._start_compute,
            effects.Encode: self._start_encode,
            effects.Decode: self._start_decode,
            effects.SetTimer: self._set_timer,
            effects.CancelTimer: lambda effect: self._timers.pop(effect.timer, None),
            effects.Prepare: self._prepare,
            effects.Unload: lambda effect: self._loading.put(
                partial(self._loader.unload, effect.session, effect.epoch), lambda done: None
            ),
            effects.OpenBlob: self._open_blob,
            effects.Bind: self._bind,
            effects.Alias: self._alias,
            effects.Record: self._record,
            effects.Accepted: self._accepted,
            effects.Deliver: self._deliver,
            effects.RequestError: self._request_error,
            effects.Output: lambda effect: self._tensors.pop(effect.body, None),
            effects.Closed: self._closed,
            **dict.fromkeys(get_args(Told), self._tell),
        }

    def _send(self, effect: effects.Send) -> None:
        message = effect.message
        payload: memoryview | bytes = b""
        if isinstance(message, Chunk):
            held = self._bytes.get(message.body)
            if held is None:
                return  # given up meanwhile
            payload = memoryview(held)[message.offset : message.offset + message.length]
            if message.offset == 0:
                self.recorder.add(message.body, Span("sent", message.body.edge, time.perf_counter(), size_bytes=len(held)))
        # Bodies and weights carry checksums of their own: those of the frame would be the second pass over the bytes.
        self._port.send(effect.peer, to_frame(message, payload, checksum=False), effect.priority)

    def _store_chunk(self, effect: effects.StoreChunk) -> None:
        body, payload = effect.body, self._payload
        if body.edge == BLOB_EDGE:
            keep = partial(self._loader.keep_piece, body.session, body.epoch, body.request, effect.offset, bytes(payload))
            self._loading.put(keep, lambda done: None)  # a failure shows when Prepare comes again and finds it missing
            return
        if effect.length == effect.size_bytes:
            self._bytes[body] = payload  # the frame itself: no copy
        else:
            buffer = self._bytes.get(body)
            if buffer is None:
                buffer = self._bytes[body] = memoryview(bytearray(effect.size_bytes))  # a view copies once
            buffer[effect.offset : effect.offset + effect.length] = payload
        if effect.offset + effect.length == effect.size_bytes:
            self.recorder.add(body, Span("received", body.edge, time.perf_counter(), size_bytes=effect.size_bytes))

    def _release(self, effect: effects.Release) -> None:
        (self._tensors if effect.held is effects.Held.TENSORS else self._bytes).pop(effect.body, None)

    def _start_compute(self, effect: effects.Compute) -> None:
        body = effect.body
        tensors = self._tensors.get(body)

        def work() -> tuple[Tensors, int | None]:
            if tensors is None:
                raise EcotoneError("its inputs are gone")
            stage = self._stages.get(body.session, body.epoch, body.edge)
            with torch.no_grad():
                return stage.compute(tuple(tensors))

        self._put(self._compute, "compute", body, work)

    def _start_encode(self, effect: effects.Encode) -> None:
        body = effect.body
        tensors = self._tensors.get(body)

        def work() -> bytearray:
            if tensors is None:
                raise EcotoneError("its tensors are gone")
            specs = self._stages.outputs_before(body.session, body.epoch, body.edge)
            if specs is None and self._expected is not None:
                specs = self._expected(body)  # type: ignore[assignment]
            names = [spec.name for spec in specs] if specs else [str(i) for i in range(len(tensors))]
            return codec.pack(list(zip(names, tensors, strict=True)), effect.codec, image=self._image)

        self._put(self._codec, "encode", body, work)

    def _start_decode(self, effect: effects.Decode) -> None:
        body = effect.body
        held = self._bytes.get(body)

        def work() -> Tensors:
            if held is None:
                raise EcotoneError("its bytes are gone")
            specs: Sequence[codec.HasSpec] | None = self._stages.inputs_of(body.session, body.epoch, body.edge)
            if specs is None and self._expected is not None:
                specs = self._expected(body)
            return codec.unpack(held, specs)

        self._put(self._codec, "decode", body, work)

    def _put(self, lane: Lane, work: str, body: BodyId, call: Callable[[], object]) -> None:
        inbox = self._inbox

        def finished(done: Done) -> None:
            inbox.put(_Finished(work, body, done, time.perf_counter() - done.seconds))

        lane.put(call, finished)

    def _set_timer(self, effect: effects.SetTimer) -> None:
        self._timers[effect.timer] = effect.at_s
        heapq.heappush(self._heap, (effect.at_s, next(self._order), effect.timer))

    def _prepare(self, effect: effects.Prepare) -> None:
        session, epoch = effect.session, effect.epoch

        def finished(done: Done) -> None:
            if done.error is not None:
                self.post(events.PrepareFailed(session=session, epoch=epoch, reason=_reason(done.error)))
            elif done.value:
                self.post(events.BlobsMissing(session=session, epoch=epoch, blobs=done.value))
            else:
                self.post(events.Prepared(session=session, epoch=epoch))

        self._loading.put(partial(self._loader.prepare, session, epoch, effect.plan, effect.parts), finished)

    def _open_blob(self, effect: effects.OpenBlob) -> None:
        try:
            self._bytes[effect.body] = memoryview(self._loader.open_blob(effect.blob))[effect.offset :]
        except EcotoneError:
            return  # a node asked for what is not ours to give: it gets nothing, and its deployment times out

    def _bind(self, effect: effects.Bind) -> None:
        if self._asker is not None:
            self._tensors[effect.body] = self._asker.inputs(effect.request)

    def _alias(self, effect: effects.Alias) -> None:
        held = self._tensors.get(effect.source)
        if held is not None:
            self._tensors[effect.target] = held

    def _record(self, effect: effects.Record) -> None:
        if self._asker is not None:
            self._asker.record(effect.request)

    def _accepted(self, effect: effects.Accepted) -> None:
        if self._asker is not None:
            self._asker.accepted(effect.request)

    def _deliver(self, effect: effects.Deliver) -> None:
        tensors = self._tensors.pop(effect.body, ())
        if self._asker is not None:
            self._asker.delivered(effect.request, effect.body, tensors)

    def _request_error(self, effect: effects.RequestError) -> None:
        if self._asker is not None:
            self._asker.failed(effect.request, effect.kind, effect.reason)

    def _tell(self, effect: Told) -> None:
        if self._asker is not None:
            self._asker.told(effect)

    def _closed(self, effect: effects.Closed) -> None:
        if self._asker is not None:
            self._asker.closed()


def _reason(error: BaseException) -> str:
    """One line that names what happened."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, EcotoneError) else f"{type(error).__name__}: {text}"
