"""Plays link traces on the emulated links of running nodes, and a stream of periodic requests against them.

The player owns the trace's clock. While a request is under way the clock runs with real time and the links follow the trace.
Between the end of one request and the time when the next is due nothing happens in a stream of one request at a time, so
that time is not waited for: the clock is put forward. So every contender gets the same requests at the same trace times, and
60 s of trace take as long as its requests do. At half of the way and when the request is due the clock is held while the
policy is told the time, so that it can probe idle links and read its reports, as it could in the time left out.

A request is due every `period_s`; it begins then or when the one before it has ended, and its latency counts from when it
was due (no omission of what a slow request delays). Rate 0 is emulated by one byte a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ecotone.cluster import DeviceId, Link
from ecotone.linktrace import LinkTrace
from ecotone.runtime import Nodes, Session
from ecotone.runtime.adapt import Adaptive

__all__ = ["Played", "TracePlayer", "play"]

OUTAGE_BYTES_PER_S = 1.0
SETTLE_S, PROBE_S = 0.01, 0.04
Outputs = tuple[torch.Tensor, ...]


class TracePlayer:
    """The links between `source` and `target`, both ways, follow `trace` from `hold` and `go` on; `now` is its clock."""

    def __init__(self, nodes: Nodes, source: DeviceId, target: DeviceId, trace: LinkTrace) -> None:
        self._nodes, self._ends, self.trace = nodes, ((source, target), (target, source)), trace
        self._changed = threading.Condition()
        self._at_s, self._since_s, self._is_running, self._is_closed = 0.0, 0.0, False, False
        self._set: tuple[float, float] | None = None
        self._thread = threading.Thread(target=self._run, name="trace-player", daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Seconds of the trace."""
        with self._changed:
            return self._now()

    def hold(self, at_s: float) -> None:
        """Stop the clock at `at_s` or where it is, if that is later; links as of then."""
        with self._changed:
            self._at_s, self._is_running = max(at_s, self._now()), False
            self._apply(self._at_s)

    def go(self) -> None:
        """Let the clock run."""
        with self._changed:
            self._since_s, self._is_running = time.monotonic(), True
            self._changed.notify()

    def close(self) -> None:
        """Stop following; links stay as they are."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(5.0)

    def _now(self) -> float:
        return self._at_s + (time.monotonic() - self._since_s if self._is_running else 0.0)

    def _apply(self, at_s: float) -> None:
        point = self.trace.at(at_s)
        values = (point.bytes_per_s or OUTAGE_BYTES_PER_S, point.latency_s)
        if values != self._set:
            self._set = values
            self._nodes.set_links(
                tuple(Link(source=a, target=b, bandwidth_bytes_per_s=values[0], latency_s=values[1]) for a, b in self._ends)
            )

    def _run(self) -> None:
        with self._changed:
            while not self._is_closed:
                wait_s = None
                if self._is_running:
                    now_s = self._now()
                    self._apply(now_s)
                    inside = now_s % self.trace.duration_s
                    ends = [p.time_s for p in self.trace.points if p.time_s > inside]
                    wait_s = (ends[0] if ends else self.trace.duration_s) - inside
                self._changed.wait(None if wait_s is None else wait_s + 1e-4)


@dataclass(slots=True)
class Played:
    """One contender on one trace: by request, the latency, the plan that answered, and whether its output was right."""

    due_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)
    mismatches: int = 0
    num_switches: int = 0

    @property
    def mean_s(self) -> float:
        return sum(self.latencies_s) / len(self.latencies_s)


def play(
    session: Session,
    adaptive: Adaptive | None,
    player: TracePlayer,
    samples: Sequence[Outputs],
    references: dict[tuple[str, int], torch.Tensor],
    period_s: float,
    dues: Sequence[int],
    limit_s: float = 1e9,
) -> Played:
    """Requests number `dues` of the stream, one after another, for at most `limit_s`; `references` by plan and sample."""
    played, end_s = Played(), time.monotonic() + limit_s
    identity = {plan.epoch: plan.identity() for plan in session.plans}
    for number in dues:
        due_s = number * period_s
        for at_s in (due_s - period_s / 2, due_s):  # skipped where the last request took so long
            if player.now() < at_s:
                player.hold(at_s)
                _settle(adaptive)
        player.hold(due_s)
        if adaptive is not None:
            adaptive.tick()
        player.go()
        which = number % len(samples)
        future = session.submit(samples[which])
        output = future.result(120.0)
        played.latencies_s.append(player.now() - due_s)
        played.due_s.append(due_s)
        assert future.epoch is not None
        plan = identity[future.epoch]
        played.plans.append(plan)
        played.mismatches += not torch.equal(output, references[plan, which])
        if time.monotonic() > end_s:
            break
    if adaptive is not None:
        played.num_switches = adaptive.num_switches
    return played


def _settle(adaptive: Adaptive | None) -> None:
    """Time in which reports arrive, the policy decides, and a probe that it asked for comes back.

    Who has no policy idles as long: a machine fresh from the last request is faster than one that waited for the next.
    """
    time.sleep(SETTLE_S)
    if adaptive is None:
        return
    before = adaptive.num_probes
    adaptive.tick()
    if adaptive.num_probes > before:
        time.sleep(PROBE_S)
        adaptive.tick()
