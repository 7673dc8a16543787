"""Users that each choose one of their offers, on resources that slow down as they fill: the numbers of the joint assignment.

Legend: user u with weight w_u chooses offer o; an offer has seconds alone t and visits to queues r, each with p (share of
the requests) and s (seconds). Per visit  a = p,  m = lambda p s^2,  l = lambda p s  and, of the queue,  c = 1/2:

 (1) L_r = sum l,  M_r = sum m,  D_r = c_r M_r / (1 - L_r)     mean wait of M/G/1 (Pollaczek and Khinchine)
 (2) T_u = t + sum over visits of  a D_r                        mean latency of u
 (3) value: mean   sum w T / sum w                              worst   max T_u / T0_u,  T0 the least t of u's offers
            fair   exp(sum w log T / sum w)                     (proportional fairness)

A shared wire fits the same form:  a = p s,  m = l = lambda p s,  c = 1,  s = bytes / capacity  (processor sharing: a visit
is stretched by L / (1 - L)). What contention.py knows beyond this (order at fair nodes, spaced arrivals, radio, closed
users) is not here: this form is what can be bounded (bounds.py), searched fast, and priced (protocol/market.py).

Feasible: every L_r at most `most_load`; resident weights and the largest working set within each device's memory; a deadline
at least T plus `tail` times what u waits, a stand-in for the 95 % quantile (1.9 is that of an exponential wait at half
load).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ecotone.planner.objective import PlannerError
from ecotone.workload import Aim

__all__ = ["Congestion", "Offer", "Party", "Queue", "Visit"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
TAIL = 1.9
_SHARPNESS = 16.0
SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Queue:
    """A resource: its name for people, and c of equation 1 (0.5: first come first served; 1: divides itself)."""

    name: str
    factor: float = 0.5


@dataclass(frozen=True, slots=True)
class Visit:
    """Of one offer to queue `queue` (its number): share of requests and seconds."""

    queue: int
    share: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One way to serve a user. `resident`: (device, key, bytes of weights, bytes of working set); a key is held once."""

    alone_s: float
    visits: tuple[Visit, ...]
    resident: tuple[tuple[str, str, int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """A user in numbers: what it may choose from."""

    name: str
    offers: tuple[Offer, ...]
    rate_per_s: float
    weight: float = 1.0
    deadline_s: float = math.inf


@dataclass(slots=True)
class _Rows:
    """Offers of one user as rows, padded with a queue that nobody fills: arrays (O, K)."""

    queue: IntArray
    a: FloatArray
    m: FloatArray
    load: FloatArray
    alone: FloatArray


@dataclass(slots=True)
class Congestion:
    """The whole problem. Choices are arrays (N,) of offer numbers; -1: refused."""

    parties: tuple[Party, ...]
    queues: tuple[Queue, ...]
    aim: Aim = "mean"
    most_load: float = 0.95
    memory_bytes: dict[str, int] = field(default_factory=dict)
    rows: list[_Rows] = field(init=False)
    weight: FloatArray = field(init=False)
    factor: FloatArray = field(init=False)
    least: FloatArray = field(init=False)
    deadline: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        empty = [p.name for p in self.parties if not p.offers]
        if empty or not self.parties:
            raise PlannerError(f"{', '.join(empty) or 'nobody'}: no plan to choose from")
        width = max((len(o.visits) for p in self.parties for o in p.offers), default=1) or 1
        self.rows = [self._rows_of(p, width) for p in self.parties]
        self.weight = np.array([p.weight for p in self.parties])
        self.factor = np.array([*(q.factor for q in self.queues), 0.0])
        self.least = np.array([rows.alone.min() for rows in self.rows])
        self.deadline = np.array([p.deadline_s for p in self.parties])

    def _rows_of(self, party: Party, width: int) -> _Rows:
        count, pad = len(party.offers), len(self.queues)
        zeros = np.zeros((count, width))
        queue, alone = np.full((count, width), pad, dtype=np.intp), np.array([o.alone_s for o in party.offers])
        rows = _Rows(queue=queue, a=zeros.copy(), m=zeros.copy(), load=zeros, alone=alone)
        for i, offer in enumerate(party.offers):
            for k, visit in enumerate(offer.visits):
                divides = self.queues[visit.queue].factor == 1.0
                load = party.rate_per_s * visit.share * visit.seconds
                rows.queue[i, k], rows.load[i, k] = visit.queue, load
                rows.a[i, k] = visit.share * (visit.seconds if divides else 1.0)
                rows.m[i, k] = load * (1.0 if divides else visit.seconds)
        return rows

    # ---- a choice of all ---------------------------------------------------------------------------------------------

    def totals(self, choice: IntArray) -> tuple[FloatArray, FloatArray]:
        """L and M of every queue (the last entry is the padding), (Q + 1,)."""
        load, moment = np.zeros(len(self.factor)), np.zeros(len(self.factor))
        for rows, o in zip(self.rows, choice.tolist(), strict=True):
            if o >= 0:
                np.add.at(load, rows.queue[o], rows.load[o])
                np.add.at(moment, rows.queue[o], rows.m[o])
        return load, moment

    def latencies(self, choice: IntArray) -> FloatArray:
        """T of every user, (N,); inf where a queue is full, nan of the refused."""
        delay = self.delays(*self.totals(choice))
        found = np.full(len(choice), math.nan)
        for u, o in enumerate(choice.tolist()):
            if o >= 0:
                rows = self.rows[u]
                found[u] = rows.alone[o] + float((rows.a[o] * delay[rows.queue[o]]).sum())
        return found

    def delays(self, load: FloatArray, moment: FloatArray) -> FloatArray:
        """D of equation 1, any leading shape."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found: FloatArray = np.where(load < 1.0, self.factor * moment / (1.0 - load), math.inf)
        found[moment == 0] = 0.0
        return found

    def value(self, choice: IntArray) -> float:
        """Equation 3 of those that are not refused; 0 where all are."""
        return self.value_of(self.latencies(choice))

    def guides(self, latencies: FloatArray) -> FloatArray:
        """For each row what a search makes small: the value; for the worst a high power mean, which has fewer plateaus."""
        if self.aim == "mean":
            weight = np.where(np.isnan(latencies), 0.0, self.weight)
            found: FloatArray = np.nansum(weight * latencies, axis=1) / np.maximum(weight.sum(axis=1), 1e-300)
            return found
        if self.aim == "worst":
            here = ~np.isnan(latencies)
            ratio = np.where(here, latencies / self.least, 0.0)
            top = np.maximum(ratio.max(axis=1), 1e-300)
            finite = np.where(np.isfinite(ratio), ratio, 0.0)
            power = ((finite / np.where(np.isfinite(top), top, 1.0)[:, None]) ** _SHARPNESS).sum(axis=1)
            mean = power / np.maximum(here.sum(axis=1), 1)
            worst: FloatArray = np.where(
                np.isfinite(top), np.where(np.isfinite(top), top, 0.0) * mean ** (1 / _SHARPNESS), math.inf
            )
            return worst
        return np.array([self.value_of(row) for row in latencies])

    def value_of(self, latency: FloatArray) -> float:
        """Equation 3 of these latencies (nan: refused)."""
        here = ~np.isnan(latency)
        if not here.any():
            return 0.0
        weight, seconds = self.weight[here], latency[here]
        if self.aim == "worst":
            return float((seconds / self.least[here]).max())
        if self.aim == "fair":
            return float(np.exp((weight * np.log(seconds)).sum() / weight.sum()))
        return float((weight * seconds).sum() / weight.sum())

    def violations(self, choice: IntArray) -> list[str]:
        """Everything that this choice asks too much of, in words: "processor edge would be at 130 %"."""
        load, _ = self.totals(choice)
        found = [
            f"{queue.name} would be at {share:.0%}, at most {self.most_load:.0%} is promised"
            for queue, share in zip(self.queues, load.tolist(), strict=False)
            if share > self.most_load * (1 + SLACK)
        ]
        found += self.too_big(choice)
        if found:
            return found
        latency = self.latencies(choice)
        late = self.tails(choice, latency) > self.deadline * (1 + SLACK)
        return [f"{self.parties[u].name} would miss its deadline of {self.deadline[u]:g} s" for u in np.flatnonzero(late)]

    def tails(self, choice: IntArray, latency: FloatArray) -> FloatArray:
        """What deadlines are held against."""
        alone = np.array([rows.alone[o] if o >= 0 else math.nan for rows, o in zip(self.rows, choice.tolist(), strict=True)])
        found: FloatArray = latency + TAIL * (latency - alone)
        return found

    def too_big(self, choice: IntArray) -> list[str]:
        """Devices that would hold more than they have, in words."""
        if not self.memory_bytes:
            return []
        held: dict[str, dict[str, tuple[int, int]]] = {}
        for party, o in zip(self.parties, choice.tolist(), strict=True):
            for device, key, weights, working in party.offers[o].resident if o >= 0 else ():
                held.setdefault(device, {})[key] = (weights, working)
        found = []
        for device, stages in held.items():
            need = sum(w for w, _ in stages.values()) + max(a for _, a in stages.values())
            if need > self.memory_bytes.get(device, math.inf):
                found.append(f"{device} would hold {need} bytes and has {self.memory_bytes[device]}")
        return found

    # ---- one user's offers beside what the others chose --------------------------------------------------------------

    def alternatives(self, choice: IntArray, user: int) -> tuple[FloatArray, NDArray[np.bool_]]:
        """For every offer of `user` beside the others: T of all users (O, N), and whether loads and deadlines fit."""
        rows, others = self.rows[user], choice.copy()
        others[user] = -1
        load, moment = self.totals(others)
        count = len(rows.alone)
        loads, moments = np.tile(load, (count, 1)), np.tile(moment, (count, 1))
        np.add.at(loads, (np.arange(count)[:, None], rows.queue), rows.load)
        np.add.at(moments, (np.arange(count)[:, None], rows.queue), rows.m)
        delay = self.delays(loads, moments)
        queue, a, alone = self._chosen(others)
        with np.errstate(invalid="ignore"):  # of refused users, which are nan anyway
            seconds = alone + (a * delay[:, queue]).sum(axis=2)
        own = rows.alone + (rows.a * np.take_along_axis(delay, rows.queue, axis=1)).sum(axis=1)
        seconds[:, user] = own
        alone_all = np.tile(alone, (count, 1))
        alone_all[:, user] = rows.alone
        tails = seconds + TAIL * (seconds - alone_all)
        late = np.nan_to_num(tails, nan=-math.inf) > self.deadline * (1 + SLACK)
        fits = (loads[:, :-1] <= self.most_load * (1 + SLACK)).all(axis=1) & ~late.any(axis=1)
        return seconds, fits

    def _chosen(self, choice: IntArray) -> tuple[IntArray, FloatArray, FloatArray]:
        """Queues, a and seconds alone of all chosen offers, (N, K) and (N,); nan alone of the refused."""
        taken = np.maximum(choice, 0)
        queue = np.array([rows.queue[o] for rows, o in zip(self.rows, taken.tolist(), strict=True)])
        a = np.array([rows.a[o] for rows, o in zip(self.rows, taken.tolist(), strict=True)])
        alone = np.array([rows.alone[o] for rows, o in zip(self.rows, taken.tolist(), strict=True)])
        a[choice < 0] = 0.0
        alone[choice < 0] = math.nan
        return queue, a, alone

    def fallbacks(self) -> FloatArray:
        """Latency that each user can have whatever the others do: its best offer on queues that nobody else can use, (N,).

        No best choice gives a user more than that: it could change over without harm to anyone. inf where there is none.
        """
        users = np.zeros(len(self.factor))
        for rows in self.rows:
            users[np.unique(rows.queue)] += 1
        found = np.full(len(self.rows), math.inf)
        for u, rows in enumerate(self.rows):
            is_own = ((users[rows.queue] <= 1) | (rows.queue == len(self.queues))).all(axis=1)
            if is_own.any():
                nobody = np.full(len(self.rows), -1, dtype=np.intp)
                seconds, fits = self.alternatives(nobody, u)
                found[u] = float(np.where(is_own & fits, seconds[:, u], math.inf).min())
        return found
