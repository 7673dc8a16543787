"""Which simulated requests leave at which exit: drawn by request number and seed, so that runs and twins agree.

A request has one rank u in [0, 1): the share of all requests that are easier. Under any plan it leaves at the first exit
whose share of leavers, with those of the exits before it, is above u. So shares come out as calibrated, an easy request is
easy under every plan, and the same seed gives the same requests. No samples, no confidences: those are the runtime's.
"""

from __future__ import annotations

from collections.abc import Sequence

from ecotone.plan import Plan
from ecotone.protocol.message import BodyId, request_of

__all__ = ["Leaving", "rank_of"]

_MASK = (1 << 64) - 1


def rank_of(seed: int, request: int) -> float:
    """Uniform in [0, 1), by splitmix64 of both numbers (Steele, Lea and Flood 2014)."""
    state = (seed * 0x9E3779B97F4A7C15 + request * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


class Leaving:
    """World.exit_of for the plans that were added; without any exit it costs one look-up."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._exits: dict[tuple[int, int], tuple[float, int]] = {}  # epoch, stage -> share that left by its end, edge

    def add(self, plan: Plan, shares: Sequence[float]) -> None:
        """`shares` of all requests that leave at the plan's exits, in their order."""
        total, own = 0.0, iter(shares)
        for stage in range(len(plan.stages)):
            edge = plan.exit_edge(stage)
            if edge is not None:
                total += next(own)
                self._exits[plan.epoch, stage] = total, edge

    def __call__(self, body: BodyId) -> int | None:
        """The edge over which the request leaves after the stage that computes `body`, or None."""
        found = self._exits.get((body.epoch, body.edge))
        if found is None or rank_of(self.seed, request_of(body.request)) >= found[0]:
            return None
        return found[1]
