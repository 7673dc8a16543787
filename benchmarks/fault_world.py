"""What failover and soak share: a cluster of a camera and two edge servers, the fault-tolerant topologies, a load that
counts every outcome, and faults on real node processes (SIGKILL, SIGSTOP, links so slow that they are cut).

The load is a closed loop; every result is compared bit for bit with the whole model's (all plans send float32 and run the
same executor), and every delivery is counted by request number, below the future that could hide a second one.
"""

from __future__ import annotations

import collections
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.models import mobilenet_v2, pictures
from benchmarks.split_world import star
from ecotone.cluster import Cluster, DeviceId
from ecotone.model import Captured, capture
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planset import PlanSet, Standby
from ecotone.runtime import Nodes, Session
from ecotone.units import EcotoneError

EXECUTOR = "torch:fp32"
CAMERA, EDGES = "camera", ("edge1", "edge2")
SLOWDOWNS = (4.0, 2.0, 2.0)
RATE_MBIT, LATENCY_S = 100.0, 0.002
CUT_OFF_BYTES_PER_S = 1.0
PATIENCE_S = 60.0

Inputs = tuple[torch.Tensor, ...]


def cluster(*names: str) -> Cluster:
    """A camera (the asker) and the edge servers named, all alike linked."""
    slowdowns = (SLOWDOWNS[0], *(SLOWDOWNS[1] for _ in names))
    return star((CAMERA, *names), slowdowns, RATE_MBIT * 1e6 / 8, LATENCY_S)


def model(seed: int) -> tuple[Captured, list[Inputs], list[torch.Tensor]]:
    """MobileNetV2, some pictures and the outputs of the whole model."""
    module, _ = mobilenet_v2(seed)
    inputs: list[Inputs] = [(picture[None],) for picture in pictures(8, seed=seed)]
    captured = capture(module, inputs[0], name="mobilenet_v2")
    return captured, inputs, [captured.unflatten_outputs(captured.reference(each)) for each in inputs]


def half(captured: Captured) -> int:
    """The cut nearest to half of the FLOP at which fewest bytes cross."""
    graph = captured.graph
    total, flop, found = sum(b.flop for b in graph.blocks), 0.0, []
    for position, block in enumerate(graph.blocks[:-1], 1):
        flop += block.flop
        if 0.35 < flop / total < 0.65:
            found.append((graph.frontier_bytes(position), position))
    return min(found)[1]


def split(captured: Captured, tail: str) -> Plan:
    """Head on the camera, tail on `tail` (the camera itself: the local fallback, with the same first stage)."""
    cut, length = half(captured), captured.graph.num_blocks
    placed = [(CAMERA, 0, cut), (tail, cut, length)]
    stages = tuple(Stage(device=DeviceId(d), start=a, stop=b, executor=EXECUTOR) for d, a, b in placed)
    ends, at = [CAMERA, CAMERA, tail, CAMERA], [0, cut, length]
    transfers = tuple(
        Transfer(source=DeviceId(a), target=DeviceId(b), position=p, codec=LOCAL if a == b else "fp32")
        for a, b, p in zip(ends, ends[1:], at, strict=False)
    )
    return Plan(graph_hash=captured.graph.content_hash(), stages=stages, transfers=transfers)


def topologies(captured: Captured) -> dict[str, PlanSet]:
    """T1 local fallback, T2a active/active, T2b active/passive; the primary is always camera -> edge1."""
    first, second = (split(captured, name) for name in EDGES)
    return {
        "T1": PlanSet(primary=first, standbys=(Standby(plan=split(captured, CAMERA), label="local fallback"),)),
        "T2a": PlanSet(primary=first, standbys=(Standby(plan=second, mode="active", label="twin"),)),
        "T2b": PlanSet(primary=first, standbys=(Standby(plan=second, label="standby"),)),
    }


# ---- load --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """One request: when it was handed in and ended, which plan answered, and what came of it."""

    submitted_s: float
    ended_s: float = 0.0
    epoch: int | None = None
    error: str = ""
    is_equal: bool = False
    missing: tuple[int, ...] = ()  # branches, where it was fused

    @property
    def is_success(self) -> bool:
        """It ended, with a result, and the result is the whole model's to the bit."""
        return bool(self.is_equal and self.ended_s and not self.error)


@dataclass(slots=True)
class Counted:
    """Deliveries by request number, told by the session's shell."""

    times: collections.Counter[int] = field(default_factory=collections.Counter)

    def watch(self, session: Session) -> None:
        """Count what the shell delivers to `session`, before the session drops anything."""
        delivered = session.delivered

        def counting(request: int, *more: Any) -> None:
            self.times[request] += 1
            delivered(request, *more)

        session.delivered = counting  # type: ignore[method-assign]

    @property
    def duplicated(self) -> int:
        return sum(count - 1 for count in self.times.values())


class Load:
    """Keeps `in_flight` requests under way; with `rate_per_s` hands in so many, and never has more than that under way.

    `submit(i)` begins number i and returns its future. With `keep_all` False only outcomes that are no success are kept.
    """

    def __init__(
        self,
        submit: Callable[[int], Any],
        is_equal: Callable[[int, Any], bool],
        *,
        in_flight: int,
        rate_per_s: float | None = None,
        keep_all: bool = True,
    ):
        self._submit, self._is_equal, self._rate, self._keep_all = submit, is_equal, rate_per_s, keep_all
        self.outcomes: list[Outcome] = []
        self.num_begun = self.num_ended = 0
        self._room = threading.Semaphore(in_flight)
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due_s = time.perf_counter()
        for number in range(1 << 40):
            if self._rate is not None:
                due_s = max(due_s + 1 / self._rate, time.perf_counter() - 1.0)
                self._stopping.wait(max(0.0, due_s - time.perf_counter()))
            while not self._room.acquire(timeout=0.1):
                if self._stopping.is_set():
                    return
            if self._stopping.is_set():
                return
            outcome = Outcome(time.perf_counter())
            with self._changed:
                self.outcomes.append(outcome)
                self.num_begun += 1
            try:
                future = self._submit(number)
            except EcotoneError as error:
                self._end(outcome, str(error))
                continue
            future.add_done_callback(lambda done, n=number, o=outcome: self._done(n, o, done))

    def _done(self, number: int, outcome: Outcome, done: Any) -> None:
        error = done.exception()
        if error is not None:
            self._end(outcome, f"{type(error).__name__}: {error}")
            return
        ended_s, result = time.perf_counter(), done.result()
        outcome.epoch, outcome.missing = getattr(done, "epoch", None), getattr(result, "missing", ())
        outcome.is_equal = self._is_equal(number, result)
        self._end(outcome, "", ended_s)

    def _end(self, outcome: Outcome, error: str, ended_s: float = 0.0) -> None:
        outcome.error = error
        with self._changed:
            outcome.ended_s = ended_s or time.perf_counter()
            self.num_ended += 1
            if not self._keep_all and outcome.is_success:
                self.outcomes.remove(outcome)
            self._changed.notify_all()
        self._room.release()

    def wait_ended(self, count: int, timeout_s: float = PATIENCE_S) -> None:
        """Return once so many requests have ended; raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.num_ended >= count, timeout_s):
                raise TimeoutError(f"{self.num_ended} of {count} requests ended within {timeout_s:g} s")

    def stop(self, timeout_s: float = PATIENCE_S) -> list[Outcome]:
        """Hand in no more, wait for what is under way, and return all outcomes; what never ended has ended_s 0."""
        self._stopping.set()
        self._thread.join(timeout_s)
        with self._changed:
            self._changed.wait_for(lambda: self.num_ended >= self.num_begun, timeout_s)
        return self.outcomes


def session_load(session: Session, inputs: Sequence[Inputs], wanted: Sequence[torch.Tensor], **options: Any) -> Load:
    """A load on a session, request i with input i modulo their number."""
    count = len(inputs)
    return Load(
        lambda i: session.submit(inputs[i % count]), lambda i, found: torch.equal(found, wanted[i % count]), **options
    )


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Return when `condition` holds; raises TimeoutError."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:g} s in vain")
        time.sleep(0.02)


# ---- faults ------------------------------------------------------------------------------------------------------------


def kill_process(nodes: Nodes, name: str) -> None:
    """SIGKILL, without waiting for its end."""
    os.kill(nodes.children[DeviceId(name)].pid, signal.SIGKILL)


def stop_process(nodes: Nodes, name: str) -> None:
    """SIGSTOP: it neither answers nor dies."""
    os.kill(nodes.children[DeviceId(name)].pid, signal.SIGSTOP)


def continue_process(nodes: Nodes, name: str) -> None:
    os.kill(nodes.children[DeviceId(name)].pid, signal.SIGCONT)


def cut(nodes: Nodes, name: str) -> None:
    """Both directions between the asker and `name` carry one byte a second; the processes and their sockets stay."""
    set_rate(nodes, name, CUT_OFF_BYTES_PER_S)


def heal(nodes: Nodes, name: str) -> None:
    set_rate(nodes, name, RATE_MBIT * 1e6 / 8)


def set_rate(nodes: Nodes, name: str, bytes_per_s: float) -> None:
    """Both directions between the asker and `name`."""
    links = [k for k in nodes.cluster.links if {k.source, k.target} == {nodes.cluster.source, DeviceId(name)}]
    nodes.set_links(tuple(replace(link, bandwidth_bytes_per_s=bytes_per_s) for link in links))
