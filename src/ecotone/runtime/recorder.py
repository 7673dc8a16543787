"""What really happened to each request, for tables of predicted beside measured: spans on every node, joined at the asker.

A node notes when it computed, encoded, decoded, began to send and finished receiving each frontier. The asker collects the
notes of all nodes after the fact and puts them on its own clock (nodes of one machine share it; others are aligned by the
middle of the question that fetched the notes). Recording never talks to anyone while requests run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ecotone.plan import Plan
from ecotone.protocol.message import BodyId, attempt_of, request_of

__all__ = [
    "Ended", "Recorder", "RequestTrace", "RunTrace", "Span", "StageTrace", "TransferTrace", "join_spans", "machine_clock",
    "trace_of",
]  # fmt: skip

_KEPT_REQUESTS = 4096


class Span(NamedTuple):
    """`kind` ("compute", "encode", "decode", "sent", "received") of `edge` began at `start_s` and took `seconds`.

    `own_seconds` leaves out emulated slowness; `size_bytes` is that of the encoded body, where there is one.
    """

    kind: str
    edge: int
    start_s: float
    seconds: float = 0.0
    own_seconds: float = 0.0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTrace:
    """Stage `stage` on `device`: it waited `queue_s` for its turn and computed `compute_s` (`own_s` without emulation)."""

    stage: int
    device: str
    start_s: float
    compute_s: float
    own_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTrace:
    """Transfer `edge`: encoding, time from encoded to wholly received (queue, latency and bytes / rate), decoding."""

    edge: int
    source: str
    target: str
    size_bytes: int = 0
    encode_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTrace:
    """One run of a request under plan `epoch`: 0 is the first attempt; times from hand-in. What no node remembers lacks."""

    attempt: int
    epoch: int
    stages: tuple[StageTrace, ...]
    transfers: tuple[TransferTrace, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """One request from hand-in to result, by the run that answered; `others` are its lost, late or twin runs.

    Stages and transfers that no node remembered, or that this run took over from another, are missing from the tuples.
    `exit`: at which it left early; transfers are numbered as Plan.edges.
    """

    request: int
    epoch: int
    submitted_s: float
    total_s: float
    stages: tuple[StageTrace, ...]
    transfers: tuple[TransferTrace, ...]
    attempt: int = 0
    others: tuple[RunTrace, ...] = ()
    exit: str = ""

    @property
    def accounted_s(self) -> float:
        """Sum of all measured parts; the rest of `total_s` is waiting and overhead."""
        return sum(s.compute_s for s in self.stages) + sum(t.encode_s + t.transfer_s + t.decode_s for t in self.transfers)


class Ended(NamedTuple):
    """A request that got its result: from which plan, in which attempt, when it was handed in, where it left early."""

    request: int
    epoch: int
    attempt: int
    submitted_s: float
    total_s: float
    exit: str = ""


class Recorder:
    """Spans of the last runs of requests, by (session, epoch, run); safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: OrderedDict[tuple[int, int, int], list[Span]] = OrderedDict()

    def add(self, body: BodyId, span: Span) -> None:
        key = (body.session, body.epoch, body.request)
        with self._lock:
            spans = self._spans.get(key)
            if spans is None:
                spans = self._spans[key] = []
                if len(self._spans) > _KEPT_REQUESTS:
                    self._spans.popitem(last=False)
            spans.append(span)

    def of_session(self, session: int, first_request: int = 0) -> list[tuple[int, int, list[Span]]]:
        """(epoch, run, spans) of `session` for every run of the requests from `first_request` on."""
        with self._lock:
            kept = [(key, list(spans)) for key, spans in self._spans.items() if key[0] == session]
        return [(key[1], key[2], spans) for key, spans in kept if request_of(key[2]) >= first_request]


def machine_clock() -> str:
    """Names the clock behind time.perf_counter here: equal for all processes of one boot of one machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def join_spans(run: int, plan: Plan, submitted_s: float, spans: Mapping[str, Iterable[Span]]) -> RunTrace:
    """The trace of `run` under `plan`, from `spans` by node, all on one clock."""
    found = {(node, span.kind, span.edge): span for node, items in spans.items() for span in items}
    stages = []
    for index, stage in enumerate(plan.stages):
        span = found.get((stage.device, "compute", index))
        if span is not None:
            stages.append(
                StageTrace(
                    stage=index, device=stage.device, start_s=span.start_s - submitted_s, compute_s=span.seconds,
                    own_s=span.own_seconds,
                )
            )  # fmt: skip
    transfers = []
    for edge, transfer in enumerate(plan.edges):
        encode = found.get((transfer.source, "encode", edge))
        received = found.get((transfer.target, "received", edge))
        decode = found.get((transfer.target, "decode", edge))
        if encode is None or received is None or decode is None:
            continue
        transfers.append(
            TransferTrace(
                edge=edge, source=transfer.source, target=transfer.target, size_bytes=encode.size_bytes,
                encode_s=encode.seconds, transfer_s=received.start_s - encode.start_s - encode.seconds,
                decode_s=decode.seconds,
            )
        )  # fmt: skip
    return RunTrace(attempt=attempt_of(run), epoch=plan.epoch, stages=tuple(stages), transfers=tuple(transfers))


def trace_of(
    ended: Iterable[Ended], plans: Mapping[int, Plan], spans: Mapping[tuple[int, int], Mapping[str, Iterable[Span]]]
) -> tuple[RequestTrace, ...]:
    """The traces of `ended` requests with all their runs; `spans` by (epoch, run) and node, plans by epoch."""
    runs: dict[int, list[tuple[int, int]]] = {}
    for epoch, run in spans:
        if epoch in plans:
            runs.setdefault(request_of(run), []).append((epoch, run))
    traces = []
    for end in ended:
        found = [
            join_spans(run, plans[epoch], end.submitted_s, spans[epoch, run]) for epoch, run in runs.get(end.request, ())
        ]
        mine = next((r for r in found if (r.epoch, r.attempt) == (end.epoch, end.attempt)), None)
        traces.append(
            RequestTrace(
                request=end.request, epoch=end.epoch, submitted_s=end.submitted_s, total_s=end.total_s,
                stages=mine.stages if mine else (), transfers=mine.transfers if mine else (), attempt=end.attempt,
                others=tuple(sorted((r for r in found if r is not mine), key=lambda r: r.attempt)), exit=end.exit,
            )
        )  # fmt: skip
    return tuple(traces)
