"""Several sessions at one node: whose turn it is on the processor and on the coder, and who is let in. Pure.

Theory of operation. Start-time fair queueing (Goyal, Vin, Cheng, 1996), the time of a turn charged after it, since only
then is it known. Each session has a weight w and, for each of the two resources, a tag; the session with the least tag that
has work takes the next turn (of equal tags, the one whose last turn is longest ago). A turn of l seconds adds l / w to the
tag. When a session of tag T is picked, those of a lesser tag, passed over for want of work that could begin, are raised to
T: time that was not used is not saved up.

Claim: of two sessions i, j that have work at every pick of an interval, with turns of at most L_i, L_j seconds and W_i, W_j
seconds of turns ended in it,  |W_i / w_i - W_j / w_j| <= L_i / w_i + L_j / w_j:  equal to within one turn each.
Proof: both tags grow only by turns. A turn goes to the lesser of the two, so after it -L_j / w_j <= T_i - T_j <= L_i / w_i
if that held before. It holds at the beginning: let v be the tag of the last pick. A session with work then had at least v,
one without was raised to it, and none is above v by more than its last turn over its weight, since that turn began at the
least tag. So T_i - T_j stays in an interval of that length, and so its change, W_i / w_i - W_j / w_j, is within it. QED
No starvation: while i waits, each other j takes turns only until its tag passes T_i, at most w_j (T_i - T_j) + L_j seconds.

Admission: at most `max_sessions`, and declared loads (shares of the processor) of at most `max_load` in all; the load of a
session is the greatest of its plans here. One session alone is served exactly as if this file were not there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Literal, TypeVar

from ecotone.protocol.message import Deploy

__all__ = ["Resource", "Shares"]

EpochKey = tuple[int, int]
Resource = Literal["processor", "coder"]
_V = TypeVar("_V")
MOST_WEIGHT = 1e6


class Shares:
    """Limits of 0 stand for none. Sessions without a plan left here are forgotten at the next admission."""

    def __init__(self, max_sessions: int = 0, max_load: float = 0.0) -> None:
        self.max_sessions, self.max_load = max_sessions, max_load
        self._weights: dict[int, float] = {}
        self._loads: dict[EpochKey, float] = {}
        self._tags: dict[Resource, dict[int, float]] = {"processor": {}, "coder": {}}
        self._now: dict[Resource, float] = {"processor": 0.0, "coder": 0.0}  # tag of the last pick
        self._last: dict[Resource, dict[int, int]] = {"processor": {}, "coder": {}}  # number of the session's last turn
        self._num_turns = 0

    def admit(self, deploy: Deploy, resident: Collection[EpochKey]) -> str:
        """Let a plan in ("") or say why not; `resident`: the plans that are here."""
        self._forget(resident)
        session, weight, load = deploy.session, deploy.weight, deploy.load
        if not (0 < weight <= MOST_WEIGHT and 0 <= load < math.inf):
            return f"weight {weight:g} must be above zero and at most {MOST_WEIGHT:g}, load {load:g} not negative"
        others = {key[0] for key in resident} - {session}
        if self.max_sessions and len(others) >= self.max_sessions:
            return f"serves {len(others)} sessions already, at most {self.max_sessions}; come later or plan without it"
        taken = sum(self._load(other) for other in others)
        if self.max_load and load and taken + load > self.max_load * (1 + 1e-9):
            what = f"would be at {taken + load:.0%}, {load:.0%} by this session, and promises at most {self.max_load:.0%}"
            return f"{what}; ask for a lower rate or plan without it"
        self._weights[session], self._loads[session, deploy.epoch] = weight, load
        for resource, tags in self._tags.items():
            tags.setdefault(session, self._now[resource])
        return ""

    def _load(self, session: int) -> float:
        return max((load for (own, _), load in self._loads.items() if own == session), default=0.0)

    def _forget(self, resident: Collection[EpochKey]) -> None:
        sessions = {key[0] for key in resident}
        self._loads = {key: load for key, load in self._loads.items() if key in resident}
        self._weights = {session: weight for session, weight in self._weights.items() if session in sessions}
        for resource, tags in self._tags.items():
            self._tags[resource] = {session: tag for session, tag in tags.items() if session in sessions}
            self._last[resource] = {s: turn for s, turn in self._last[resource].items() if s in sessions}

    def order(self, resource: Resource, epochs: dict[EpochKey, _V]) -> Iterable[tuple[EpochKey, _V]]:
        """Plans in the order in which they may take the next turn."""
        tags = self._tags[resource]
        if len(tags) < 2:
            return epochs.items()
        last = self._last[resource]
        return sorted(epochs.items(), key=lambda item: (tags.get(item[0][0], 0.0), last.get(item[0][0], 0)))

    def picked(self, resource: Resource, session: int) -> None:
        """`session` takes a turn; those before it had no work."""
        tags = self._tags[resource]
        now = self._now[resource] = tags[session]
        self._num_turns += 1
        self._last[resource][session] = self._num_turns
        for other, tag in tags.items():
            if tag < now:
                tags[other] = now

    def charge(self, resource: Resource, session: int, seconds: float) -> None:
        """A turn of `session` took so long."""
        tags = self._tags[resource]
        if session in tags:
            tags[session] += seconds / self._weights[session]
