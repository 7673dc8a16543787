"""Times a link over the wire that carries the tensors: padded questions with empty answers, fitted to a line.

Half of an empty question's round trip is taken for the way back, the rest is the way there; small answers travel at control
priority, so this holds where both directions have alike latencies.
"""

from __future__ import annotations

from ecotone import profiling
from ecotone.cluster import Link
from ecotone.profile import LinkFit
from ecotone.profiling import LinkSample
from ecotone.protocol.message import NodeId, Priority
from ecotone.runtime.questions import Questions

__all__ = ["measure_link"]

_ROUNDS = 5


def measure_link(questions: Questions, link: Link) -> LinkFit:
    """Time `link`, which leaves this node; sizes follow its stated rate, so that a slow link takes seconds, not minutes."""
    peer = NodeId(link.target)
    empty = sorted(_round_trip(questions, peer, 0) for _ in range(2 * _ROUNDS))[_ROUNDS]
    back = empty / 2
    sizes = profiling.probe_sizes(link.bandwidth_bytes_per_s)
    samples = [
        LinkSample(size_bytes=size, seconds=max(1e-6, _round_trip(questions, peer, size) - back))
        for _ in range(_ROUNDS)
        for size in sizes
    ]
    return profiling.fit_link(link.source, link.target, samples)


def _round_trip(questions: Questions, peer: NodeId, size_bytes: int) -> float:
    priority = Priority.DATA if size_bytes else Priority.CONTROL
    _, seconds = questions.ask_timed(
        peer, "echo", padding=bytes(size_bytes), priority=priority, deadline_s=60.0, repeat_s=60.0
    )
    return seconds
