"""What fails, how often and for how long: the elements of a cluster, and the states that they can be in together.

An element is a device other than source and sink, or the connection of two devices (both directions fail as one). Each works
for a mean time mtbf, is then down for a mean time mttr, and knows nothing of the others. With r = 1 / mtbf and
u = mttr / (mtbf + mttr), the share of time that an element is down,

 (1) P(s) = product of u over the elements down in s, times the product of 1 - u over the others,

taken over the states with at most `survive` elements down and made to sum to one: what is said is said of those. A mtbf
of 0 means "not known to fail". The source holds the requests; when it dies there is nobody left to answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecotone.cluster import Cluster, DeviceId, Link
from ecotone.cost import FloatArray
from ecotone.plan import Plan

__all__ = ["Element", "States", "assume", "elements_of", "states_of"]

MOST_SPELLED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One device, or two whose connection it is; mean seconds of work between failures and of one failure."""

    devices: tuple[DeviceId, ...]
    mtbf_s: float
    mttr_s: float

    @property
    def is_link(self) -> bool:
        return len(self.devices) == 2

    @property
    def rate_per_s(self) -> float:
        """Failures per second of work."""
        return 1.0 / self.mtbf_s

    @property
    def share_down(self) -> float:
        return self.mttr_s / (self.mtbf_s + self.mttr_s)

    def hits(self, plan: Plan) -> bool:
        """Whether `plan` cannot run without this element."""
        if self.is_link:
            return any({t.source, t.target} == set(self.devices) for t in plan.edges if not t.is_local)
        return self.devices[0] in plan.devices

    def __str__(self) -> str:
        return " - ".join(self.devices)


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """`down[s]`: indices of the elements down in state s; `probability` (S,) sums to one; state 0: all work.

    `steps`: (s, element, t) where the element fails in s and leads to t; `rate_per_s` (len(steps),): failures a second.
    """

    down: tuple[frozenset[int], ...]
    probability: FloatArray
    steps: tuple[tuple[int, int, int], ...]
    rate_per_s: FloatArray


def elements_of(cluster: Cluster) -> tuple[Element, ...]:
    """All elements with a stated rate: devices in order, then connections; of two directions the worse figures count.

    Connections by kind are elements where the devices are at most MOST_SPELLED.
    """
    ends = (cluster.source, cluster.sink)
    found = [
        Element(devices=(d.name,), mtbf_s=d.mtbf_s, mttr_s=d.mttr_s)
        for d in cluster.devices
        if d.mtbf_s > 0 and d.name not in ends
    ]
    pairs: dict[frozenset[DeviceId], list[Link]] = {}
    for link in cluster.links_among(d.name for d in cluster.devices) if _few(cluster) else cluster.links:
        pairs.setdefault(frozenset((link.source, link.target)), []).append(link)
    for links in pairs.values():
        rated = [k for k in links if k.mtbf_s > 0]
        if rated:
            names = (links[0].source, links[0].target)
            mtbf, mttr = min(k.mtbf_s for k in rated), max(k.mttr_s for k in rated)
            found.append(Element(devices=names, mtbf_s=mtbf, mttr_s=mttr))
    return tuple(found)


def _few(cluster: Cluster) -> bool:
    """Whether connections by kind are few enough to be elements one by one."""
    return len(cluster.devices) <= MOST_SPELLED


def states_of(elements: Sequence[Element], survive: int, others: Sequence[Element] = ()) -> States:
    """Equation 1 for up to `survive` down at once of `elements` and `others`; states tell only the former apart."""
    indices, most = range(len(elements)), min(survive, len(elements))
    down = [frozenset(c) for n in range(most + 1) for c in itertools.combinations(indices, n)]
    place = {s: i for i, s in enumerate(down)}
    shares, within = [e.share_down for e in elements], _at_most([e.share_down for e in others], survive)
    own = [math.prod(u if i in s else 1.0 - u for i, u in enumerate(shares)) for s in down]
    weight = np.array([w * within[survive - len(s)] for s, w in zip(down, own, strict=True)])
    steps = tuple(_steps(down, place, len(elements)))
    room = [own[s] * within[survive - len(down[s]) - 1] * elements[e].rate_per_s for s, e, _ in steps]
    total = float(weight.sum())
    return States(tuple(down), weight / total, steps, np.array(room, dtype=np.float64) / total)


def _at_most(shares: Sequence[float], survive: int) -> list[float]:
    """Probability that at most 0, 1, ... `survive` of independent elements are down."""
    exactly = [1.0] + [0.0] * survive
    for u in shares:
        exactly = [exactly[n] * (1.0 - u) + (exactly[n - 1] * u if n else 0.0) for n in range(survive + 1)]
    return list(itertools.accumulate(exactly))


def _steps(down: Sequence[frozenset[int]], place: dict[frozenset[int], int], count: int) -> Iterator[tuple[int, int, int]]:
    for i, state in enumerate(down):
        for element in range(count):
            after = place.get(state | {element})
            if element not in state and after is not None:
                yield i, element, after


def assume(cluster: Cluster, mtbf_s: float) -> Cluster:
    """The same cluster where every device and link that states no mtbf has this one."""
    devices = tuple(d if d.mtbf_s > 0 else replace(d, mtbf_s=mtbf_s) for d in cluster.devices)
    links = tuple(k if k.mtbf_s > 0 else replace(k, mtbf_s=mtbf_s) for k in cluster.links)
    kinds = tuple(k if k.mtbf_s > 0 else replace(k, mtbf_s=mtbf_s) for k in cluster.kind_links)
    return replace(cluster, devices=devices, links=links, kind_links=kinds)
