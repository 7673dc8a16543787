"""What the coordinator remembers of one request: its runs, what was tried, the boundary tensors kept for another run."""

from __future__ import annotations

from dataclasses import dataclass, field

from ecotone.plan import Plan
from ecotone.protocol.message import BodyId, NodeId, run_of

__all__ = ["Kept", "Request", "kept_body"]

_KEPT = (1 << 22) - 1  # the attempt number under which the boundary tensors of a request are kept


@dataclass(slots=True)
class Kept:
    """What `plan` makes at the edge of `body`, in memory until the request has its result."""

    plan: Plan
    body: BodyId
    size_bytes: int


def kept_body(body: BodyId, number: int) -> BodyId:
    """The name under which the tensors of `body` are kept for request `number`."""
    return body._replace(request=run_of(number, _KEPT))


@dataclass(slots=True)
class Request:
    """Times on the asker's clock. In exactly one of: being recorded, waiting, in flight (until its end)."""

    deadline_s: float | None
    size_bytes: int
    since_s: float  # waits, or is stuck, since
    is_recording: bool = False
    is_in_flight: bool = False
    num_runs: int = 0
    num_failed: int = 0
    result: BodyId | None = None  # held for order
    runs: dict[int, int] = field(default_factory=dict)  # run -> epoch: those that may still give the result
    tried: set[int] = field(default_factory=set)  # epochs under which it failed
    stuck_under: set[int] = field(default_factory=set)  # epochs of which a node told that it lost another
    avoid: set[NodeId] = field(default_factory=set)  # nodes that told of a failure
    reasons: list[str] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    twins: dict[int, tuple[int, int]] = field(default_factory=dict)  # run that waits -> run and edge it goes on from
    begun_s: dict[int, float] = field(default_factory=dict)  # run -> when
    hedges: set[int] = field(default_factory=set)  # runs begun because another was slow
    wait_s: float = 0.0  # patience with the present runs; doubled each time
    rescue_s: float | None = None  # another run begun later would hardly end within the deadline

    @property
    def told(self) -> str:
        """The first reason of a failure, and what became of the other runs."""
        first, rest = self.reasons[0], list(dict.fromkeys(self.reasons[1:]))
        return f"{first}; then tried: {'; '.join(rest)}" if rest else first
