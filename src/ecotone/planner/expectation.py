"""What a request costs on average with a plan set, over the states of failure and the steps between them.

Legend: p, q plans; c(p) seconds of the objective plus the price of accuracy given up; L(p) latency; h(p, q) compute of the
stages on the source that both begin with, whose tensors are kept; a(s) the first plan of the set that runs in state s; lost
the price of a request that nobody answers; r_i, P(s) as in failures.py; D_i time to notice that i is gone; R to reroute.

 (1) E        = sum over s of P(s) c(a(s))  +  sum over steps (s, i, t) with i in a(s) of  P(s) r_i X_i(a(s), a(t))
                c(none) = lost;   X_i(p, none) = L(p) (lost - c(p)) for the requests under way
 (2) X_i(p, q) = L(p) W + D_i V      W: mean delay of those under way, V: of those that come before anything is noticed
 (3) V         = M(D_i, R, h) - h    M(x, a, f) = mean of max(y + a, f), y even on [0, x] (the head may still run)
 (4) W         = F + L(q) - h - L(p) + (price of q's accuracy - of p's), at least 0
                F = M(L(p), D_i + R, h) for a device: its liveliness token goes when its process dies, D_i = crash
                F = m L(p) + silence + R for a link: nobody is told, a run's patience ends after m L;
                D_i = silence + (m - 1/2) L(p)
 (5) twins p, q: both begin; p goes first, q's own head and encoding follow (lag), then both bodies share the source's uplink
                fairly:  d = min(send q, max(0, send p - lag));  L'(p) = L(p) + d;  L'(q) = L(q) + head and encode of p + d
                c = min(L') + spare * (busy seconds of devices and links for q, less the head);  separate uplinks: d = 0
                a failure of one costs  L max(0, L'(other) - L'(first)), L = min(L')
(6) throughput: twins load what both use with the sum of both, the shared head once, and one uplink with all that leaves it

A request counts under the state in which it comes. A second failure within D or L is left out: it is of order r^2.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecotone.cost import FloatArray, PlanCost
from ecotone.planner.failures import Element, States
from ecotone.planner.objective import Latency, Objective
from ecotone.planner.standbys import Candidate
from ecotone.planset import shared_edge

__all__ = ["Detection", "Expectation", "Twin", "Weights", "mean_max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Seconds of latency that a lost request is worth, and a point of accuracy given up; a lost request loses 100 points.

    `spare`: a second that a device or link is busy for a twin is worth so much: twice the work must gain about a percent.
    """

    lost_s: float = 10.0
    point_s: float = 0.1
    spare: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """Seconds until a dead process is noticed (its liveliness token goes with its sockets), until a silent one is (a run
    takes `margin` times its usual time, then the coordinator's suspect_after_s + pong_timeout_s), and to reroute.
    """

    crash_s: float = 0.05
    silence_s: float = 0.15
    margin: float = 1.5
    reroute_s: float = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """Equation 5: the two latencies when both run, the value of the pair, and the price of the work for the second."""

    first_s: float
    second_s: float
    value_s: float
    price_s: float


def mean_max(span: float, shift: float, floor: float) -> float:
    """Mean of max(y + shift, floor) for y even on [0, span]."""
    if span <= 0 or shift >= floor:
        return max(shift + max(span, 0.0) / 2, floor)
    turn = min(span, floor - shift)
    return (turn * floor + (span - turn) * (shift + (span + turn) / 2)) / span


class Expectation:
    """Equation 1 for any set out of `candidates`, from tables made once."""

    def __init__(
        self, candidates: Sequence[Candidate], elements: Sequence[Element], states: States, objective: Objective,
        weights: Weights, detection: Detection, *, separate_uplinks: bool = False,
    ) -> None:  # fmt: skip
        self.candidates, self.elements, self.states, self.objective = tuple(candidates), tuple(elements), states, objective
        self.weights, self.detection, self.separate_uplinks = weights, detection, separate_uplinks
        count = len(self.candidates)
        self.latency = np.array([c.cost.latency_s for c in candidates])
        self.value = np.array([*(c.value_s for c in candidates), weights.lost_s])  # the last entry: nobody answers
        self.hits = np.zeros((count + 1, len(elements)), dtype=np.bool_)
        for p, candidate in enumerate(self.candidates):
            self.hits[p] = [e.hits(candidate.plan) for e in elements]
        gone = np.zeros((len(states.down), len(elements)), dtype=np.bool_)
        for s, down in enumerate(states.down):
            gone[s, list(down)] = True
        self.runs = ~(self.hits[:count].astype(np.int64) @ gone.T.astype(np.int64)).astype(np.bool_)  # (plans, states)
        self.head = np.zeros((count, count))
        for p, q in np.ndindex(count, count):
            self.head[p, q] = self._head(p, q) if p != q else 0.0
        kinds = [[[self._step(p, q, link) for q in range(count)] for p in range(count)] for link in (False, True)]
        self.steps_s = np.zeros((2, count + 1, count + 1))
        self.steps_s[:, :count, :count] = np.array(kinds).reshape(2, count, count)
        self.steps_s[:, :count, count] = self.latency * np.maximum(0.0, weights.lost_s - self.value[:count])
        at = np.array(states.steps, dtype=np.intp).reshape(-1, 3)
        self._from, self._element, self._to = at[:, 0], at[:, 1], at[:, 2]
        self._is_link = np.array([elements[i].is_link for i in self._element], dtype=np.intp)
        self._twins: dict[tuple[int, int], Twin] = {}

    def serving(self, order: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """(S,) the first plan of `order` that runs in each state; -1 where none does."""
        runs = self.runs[list(order)]
        return np.where(runs.any(axis=0), np.array(order)[runs.argmax(axis=0)], -1)

    def seconds(self, order: Sequence[int], twin: int | None = None) -> float:
        """Equation 1 for the plans `order`, the first preferred; `twin`: the one of them that runs beside the first."""
        serving = self.serving(order)
        value = self.value[serving]
        before, after = serving[self._from], serving[self._to]
        extra = np.where(self.hits[before, self._element], self.steps_s[self._is_link, before, after], 0.0)
        if twin is not None:
            pair = self.twin(order[0], twin)
            both = self.runs[order[0]] & self.runs[twin]
            value = np.where(both, pair.value_s + pair.price_s, value)
            extra = np.where(both[self._from], self._twin_steps(order[0], twin, after), extra)
        return float(self.states.probability @ value + self.states.rate_per_s @ extra)

    def twin(self, first: int, second: int) -> Twin:
        """Equations 5 and 6."""
        if (first, second) not in self._twins:
            self._twins[first, second] = self._make_twin(first, second)
        return self._twins[first, second]

    def recover_s(self, element: int, before: int, after: int, twin: int | None = None) -> float:
        """Seconds from the failure to the slowest result of a request that it hit; inf where nobody answers."""
        if twin is not None and after in (before, twin):
            pair = self.twin(before, twin)
            return max(pair.first_s, pair.second_s)
        if after < 0:
            return math.inf
        head, detection = self.head[before, after], self.detection
        noticed = detection.crash_s
        if self.elements[element].is_link:
            noticed = detection.silence_s + detection.margin * self.latency[before]
        return float(max(noticed + detection.reroute_s, head) + self.latency[after] - head)

    def _step(self, p: int, q: int, is_link: bool) -> float:
        """Equations 2 to 4."""
        detection, latency, head = self.detection, float(self.latency[p]), float(self.head[p, q])
        notice = detection.silence_s + (detection.margin - 0.5) * latency if is_link else detection.crash_s
        if is_link:
            seen = max(detection.margin * latency + detection.silence_s + detection.reroute_s, head)
        else:
            seen = mean_max(latency, detection.crash_s + detection.reroute_s, head)
        price = (self.candidates[q].loss_points - self.candidates[p].loss_points) * self.weights.point_s
        under_way = max(0.0, seen + float(self.latency[q]) - head - latency + price)
        return latency * under_way + notice * (mean_max(notice, detection.reroute_s, head) - head)

    def _head(self, p: int, q: int) -> float:
        edge = shared_edge(self.candidates[p].plan, self.candidates[q].plan)
        return sum(stage.compute_s for stage in self.candidates[p].cost.stages[:edge])

    def _twin_steps(self, first: int, second: int, after: np.ndarray[tuple[int], np.dtype[np.intp]]) -> FloatArray:
        """Per step out of a state in which both ran: the answer comes from the other, or from nobody if it hit both."""
        pair = self.twin(first, second)
        own, other = self.hits[first, self._element], self.hits[second, self._element]
        latency = min(pair.first_s, pair.second_s)
        late = np.where(own, pair.second_s, np.where(other, pair.first_s, latency)) - latency
        both = self.steps_s[self._is_link, first, after]
        extra: FloatArray = np.where(own & other, both, latency * np.maximum(0.0, late))
        return extra

    def _make_twin(self, first: int, second: int) -> Twin:
        one, other = self.candidates[first], self.candidates[second]
        edge = shared_edge(one.plan, other.plan)
        own_first, encode_first, send_first = _first_crossing(one.cost, edge)
        own_second, encode_second, send_second = _first_crossing(other.cost, edge)
        lag = own_second + encode_second
        delay = 0.0 if self.separate_uplinks else min(send_second, max(0.0, send_first - lag))
        first_s = one.cost.latency_s + delay
        second_s = other.cost.latency_s + own_first + encode_first + delay
        least = min(first_s, second_s)
        if not isinstance(self.objective, Latency):
            least = self._twin_bottleneck(one.cost, other.cost, edge)
        busy = sum(d.busy_s for d in other.cost.devices) + sum(k.busy_s for k in other.cost.links) - self.head[first, second]
        return Twin(
            first_s=first_s, second_s=second_s, value_s=least + self.weights.point_s * one.loss_points,
            price_s=self.weights.spare * float(busy),
        )  # fmt: skip

    def _twin_bottleneck(self, one: PlanCost, other: PlanCost, edge: int) -> float:
        busy: dict[object, float] = defaultdict(float)
        for cost in (one, other):
            for device in cost.devices:
                busy[device.device] += device.busy_s
            for link in cost.links:
                busy[link.source, link.target if self.separate_uplinks else ""] += link.busy_s
        for stage in one.stages[:edge]:
            busy[stage.device] -= stage.compute_s
        return max([one.bottleneck_s, other.bottleneck_s, *busy.values()])


def _first_crossing(cost: PlanCost, edge: int) -> tuple[float, float, float]:
    """Seconds on the source beyond the first `edge` stages, then to encode and send what first leaves it (0: nothing)."""
    source = cost.transfers[0].source
    own = 0.0
    for i, transfer in enumerate(cost.transfers):
        if transfer.source != transfer.target:
            return own, transfer.encode_s, transfer.send_s
        if i < len(cost.stages) and cost.stages[i].device == source and i >= edge:
            own += cost.stages[i].compute_s
    return own, 0.0, 0.0
