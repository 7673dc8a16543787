"""What the simple policies know: measured rates of links, and what each resident plan would take at given rates.

No factors, no hysteresis, no doubt: the cost model of the papers, seconds as profiled plus latency plus bytes / rate.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from ecotone.cluster import Cluster, DeviceId
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.protocol.controller import ProbeLink, Seen, link_terms
from ecotone.protocol.effects import Observed

__all__ = ["Prices", "Rates"]

Pair = tuple[DeviceId, DeviceId]


class Rates:
    """Bytes per second and latency of each directed link: the mean of the last `window` samples, as stated before any."""

    def __init__(self, cluster: Cluster, window: int, probe_s: float, probe_bytes: int = 16384) -> None:
        self._stated = {(k.source, k.target): (k.bandwidth_bytes_per_s, k.latency_s) for k in cluster.links}
        self._samples: dict[Pair, deque[float]] = {pair: deque(maxlen=window) for pair in self._stated}
        self._latency = {pair: latency_s for pair, (_, latency_s) in self._stated.items()}
        self._timed_s: dict[Pair, float] = {}
        self._source, self._probe_s, self._probe_bytes = cluster.source, probe_s, probe_bytes

    def see(self, event: Seen, now_s: float) -> None:
        """Take the link samples of a report."""
        if not isinstance(event, Observed):
            return
        for sample in event.report.links:
            pair, busy_s = (DeviceId(event.peer), DeviceId(sample.peer)), sample.seconds - sample.rtt_s
            if pair in self._samples and sample.size_bytes > 0 and busy_s > 0:
                self._samples[pair].append(sample.size_bytes / busy_s)
                self._latency[pair] = sample.rtt_s / 2 if sample.rtt_s > 0 else self._latency[pair]
                self._timed_s[pair] = now_s

    def now(self) -> dict[Pair, tuple[float, float]]:
        """(seconds per byte, latency) of every link; an unmeasured direction has the mean of the opposite one's samples."""
        found = {}
        for pair, (stated, _) in self._stated.items():
            samples = self._samples[pair] or self._samples.get((pair[1], pair[0]), deque())
            rate = sum(samples) / len(samples) if samples else stated
            found[pair] = (1.0 / rate, self._latency[pair])
        return found

    def probes(self, now_s: float, used: frozenset[Pair]) -> tuple[ProbeLink, ...]:
        """Links from the asker, but those in use, that nothing timed for a while."""
        idle = [pair for pair in self._stated if pair[0] == self._source and pair not in used]
        late = [pair for pair in idle if now_s - self._timed_s.get(pair, -math.inf) >= self._probe_s]
        for pair in late:
            self._timed_s[pair] = now_s
        return tuple(ProbeLink(peer=pair[1], size_bytes=self._probe_bytes) for pair in late)


class Prices:
    """Latency of resident plans from profiled seconds and given links."""

    def __init__(self, graph: Graph, cluster: Cluster, profile: Profile) -> None:
        self._model = CostModel(graph, cluster, profile)
        self._parts: dict[int, tuple[float, tuple[tuple[Pair, float, float], ...]]] = {}

    def take(self, plans: PlanSet) -> None:
        """The plans that are resident now."""
        self._parts = {plan.epoch: self._part(plan) for plan in plans.plans}

    def _part(self, plan: Plan) -> tuple[float, tuple[tuple[Pair, float, float], ...]]:
        cost = self._model.predict(plan)
        on_links = sum(t.share * (t.latency_s + t.send_s) for t in cost.edges)
        return cost.latency_s - on_links, link_terms(plan, self._model)

    def uses(self, epoch: int) -> frozenset[Pair]:
        """The links that a plan sends over."""
        return frozenset(pair for pair, _, _ in self._parts[epoch][1]) if epoch in self._parts else frozenset()

    def best(self, links: Mapping[Pair, tuple[float, float]]) -> int | None:
        """The epoch of least latency."""

        def seconds(epoch: int) -> float:
            compute_s, terms = self._parts[epoch]
            return compute_s + sum(n * links[pair][1] + size * links[pair][0] for pair, n, size in terms)

        return min(self._parts, key=lambda epoch: (seconds(epoch), epoch), default=None)
