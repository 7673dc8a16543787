"""Which runs take suspiciously long, and which nodes do not answer: pings and patience of the coordinator. Pure.

Theory of operation. A run of an epoch should take no longer than `patience_s`: half more than the slowest of its last 32
runs (or than predicted), plus `suspect_after_s`. One that does has its nodes pinged; the wait is doubled each time, so that
a run on a slow link costs a few frames only. A node that says nothing at all for `pong_timeout_s` after that (or three of
its round trips, where these are longer) is *silent*: it counts as lost until anything is heard of it, and is pinged again
now and then. A false suspicion costs a second run, never a second result. Where every node answers the run is merely slow,
or two nodes do not reach one another: the coordinator then starts one more run elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ecotone.protocol.deployments import Deployment
from ecotone.protocol.effects import CancelTimer, LinkChanged, Send, SetTimer
from ecotone.protocol.message import NodeId, Ping, Priority
from ecotone.protocol.notices import Item
from ecotone.protocol.settings import CoordinatorSettings

__all__ = ["Suspicion"]

_MARGIN = 1.5
_ROUND_TRIPS = 3.0


@dataclass(slots=True)
class _Asked:
    """A node that was pinged. `since_s`: first ping without any answer, for which `first_s` was the time."""

    since_s: float
    first_s: float
    wait_s: float
    is_silent: bool = False
    requests: set[int] = field(default_factory=set)  # whose runs are late


class Suspicion:
    """`rtt_s` gives the round trip of small frames to a node as far as known, else 0."""

    def __init__(self, settings: CoordinatorSettings, rtt_s: Callable[[NodeId], float]) -> None:
        self.settings, self._rtt_s = settings, rtt_s
        self.asked: dict[NodeId, _Asked] = {}
        self._slowest_s: dict[NodeId, float] = {}  # answers, seen here
        self._open: dict[int, set[NodeId]] = {}  # request -> nodes that have yet to answer
        self._nonce = 0

    def patience_s(self, deployment: Deployment) -> float:
        """How long a run of this epoch may take before it is doubted; of the first ever, generous."""
        known_s = self.known_s(deployment)
        return known_s * _MARGIN + self.settings.suspect_after_s if known_s else self.settings.node_timeout_s

    def known_s(self, deployment: Deployment) -> float:
        """What a controller said, else the slowest of late, or the prediction; 0: nothing is known."""
        return deployment.told_s or max(deployment.latencies_s, default=deployment.expected_s)

    def took(self, deployment: Deployment, seconds: float, edge: int) -> None:
        """A run ended with a result at `edge`. One that was stopped for long must not make us patient for as long.

        One that left early tells how long others take only where it took longer than is known of them.
        """
        if edge > len(deployment.plan.stages) and not 0 < self.known_s(deployment) < seconds:
            return
        known = bool(deployment.latencies_s) or deployment.expected_s > 0
        deployment.latencies_s.append(min(seconds, 2 * self.patience_s(deployment)) if known else seconds)

    def is_silent(self, peer: NodeId) -> bool:
        asked = self.asked.get(peer)
        return asked is not None and asked.is_silent

    def ask(self, nodes: Iterable[NodeId], number: int, now_s: float) -> list[Item]:
        """Request `number` is late: ping these nodes; see `heard` and `waited`."""
        items: list[Item] = []
        still: set[NodeId] = set()
        for node in nodes:
            still.add(node)
            asked = self.asked.get(node)
            if asked is None:
                asked = self.asked[node] = _Asked(now_s, self._wait_s(node), self._wait_s(node))
                items += self._ping(node, asked, now_s)
            asked.requests.add(number)
        self._open[number] = still
        return items

    def heard(self, peer: NodeId, now_s: float) -> tuple[list[Item], bool, list[int]]:
        """Anything came from a pinged node: what to do, whether it was silent, requests all of whose nodes answered."""
        asked = self.asked.pop(peer)
        # A slow link is learned by and by; one long stall must not make us as patient as it was long.
        slowest_s = self._slowest_s.get(peer, 0.0)
        self._slowest_s[peer] = max(min(now_s - asked.since_s, asked.first_s), 0.75 * slowest_s)
        slow = []
        for number in sorted(asked.requests):
            still = self._open.get(number)
            if still is not None:
                still.discard(peer)
                if not still:
                    del self._open[number]
                    slow.append(number)
        items: list[Item] = [CancelTimer(timer=("pong", peer))]
        if asked.is_silent:
            items.append(LinkChanged(peer=peer, state="heard"))
        return items, asked.is_silent, slow

    def waited(self, peer: NodeId, now_s: float) -> tuple[list[Item], bool]:
        """The time for an answer is over: what to do, and whether the node is silent from now on. It is pinged again."""
        asked = self.asked.get(peer)
        if asked is None:
            return [], False
        is_new, asked.is_silent = not asked.is_silent, True
        asked.wait_s = min(2 * asked.wait_s, max(self.settings.node_timeout_s, self._wait_s(peer)))
        items = self._ping(peer, asked, now_s)
        return [*items, LinkChanged(peer=peer, state="silent")] if is_new else items, is_new

    def forget(self, number: int) -> None:
        """The request has ended, or runs elsewhere."""
        for node in self._open.pop(number, ()):
            asked = self.asked.get(node)
            if asked is not None:
                asked.requests.discard(number)

    def lost(self, peer: NodeId) -> list[Item]:
        """Its link says that the node is lost: no need to ping it."""
        asked = self.asked.pop(peer, None)
        if asked is None:
            return []
        for number in asked.requests:
            self._open.get(number, set()).discard(peer)
        return [CancelTimer(timer=("pong", peer))]

    def timers(self) -> list[Item]:
        """CancelTimer of every timer, at the end of the session."""
        return [CancelTimer(timer=("pong", peer)) for peer in self.asked]

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _wait_s(self, peer: NodeId) -> float:
        return max(self.settings.pong_timeout_s, _ROUND_TRIPS * max(self._rtt_s(peer), self._slowest_s.get(peer, 0.0)))

    def _ping(self, peer: NodeId, asked: _Asked, now_s: float) -> list[Item]:
        self._nonce += 1
        ping = Send(peer=peer, message=Ping(nonce=self._nonce), priority=Priority.CONTROL)
        return [ping, SetTimer(timer=("pong", peer), at_s=now_s + asked.wait_s)]
