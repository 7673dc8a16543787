"""A joint choice improved under the full formulas of contention.py: offers, and channels and powers of radio senders.

All choices in turn where they are few, else one change at a time: a user's offer, its sender's channel, its power. What
counts, in order: how far resources are beyond what may be promised and deadlines missed, weight refused, the value; so a
start that overloads something is mended first, and where it cannot be the lightest user goes. Every step is an evaluation of
all users (contention.py), so this is for tens of users and seconds, not for optima. Radio senders start on channels in turn,
each heard so much fainter than the one before on its channel that it does not jam it (equal powers do: sharing.py, 5).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ecotone.contention import Contention, Flow, Standing
from ecotone.media import Tuning
from ecotone.planner.congestion import Congestion
from ecotone.planner.offers import Candidate
from ecotone.workload import Aim, User

__all__ = ["MOST_CHOICES", "Polished", "Seat", "polish"]

_STEPS = (1.0, 0.1, 0.01, 0.001)  # of a sender's greatest power
_LADDER = 0.03
_BETTER = 1 - 1e-6
MOST_CHOICES = 3000


@dataclass(frozen=True, slots=True)
class Seat:
    """What a user has: the number of its offer (-1: refused), and channel and power where its device is a radio sender."""

    offer: int
    tuning: Tuning | None = None


@dataclass(slots=True)
class Polished:
    """The users, their offers and rates, and how a choice is judged. `memory`: the form that knows what devices hold."""

    users: Sequence[User]
    candidates: Sequence[Sequence[Candidate]]
    rates: Mapping[str, float]
    aim: Aim
    contention: Contention
    most_load: float
    memory: Congestion
    senders: dict[str, tuple[str, int, float]] = field(init=False)  # device: cell, channels, greatest power

    def __post_init__(self) -> None:
        cells = self.contention.cluster.radios
        self.senders = {s.device: (c.name, c.num_channels, s.max_watt) for c in cells for s in c.sender}

    def tuned(self, seats: Sequence[Seat]) -> list[Seat]:
        """Seats with a channel and a power for every radio sender that has none."""
        counts: dict[tuple[str, int], int] = {}
        turn: dict[str, int] = {}
        found = []
        for user, seat in zip(self.users, seats, strict=True):
            sender = self.senders.get(str(user.source))
            if sender is None or seat.tuning is not None:
                found.append(seat)
                continue
            cell, num_channels, most = sender
            channel = turn.get(cell, 0) % num_channels
            turn[cell] = turn.get(cell, 0) + 1
            rung = counts[cell, channel] = counts.get((cell, channel), -1) + 1
            found.append(Seat(seat.offer, Tuning(channel=channel, watt=most * _LADDER ** min(rung, 3))))
        return found

    def tunings(self, seats: Sequence[Seat]) -> dict[str, Tuning]:
        return {str(u.source): s.tuning for u, s in zip(self.users, seats, strict=True) if s.tuning and s.offer >= 0}

    def standing(self, seats: Sequence[Seat]) -> Standing:
        """contention.py for those that are not refused."""
        flows = [self._flow(i, s.offer) for i, s in enumerate(seats) if s.offer >= 0]
        return (
            self.contention.standing(flows, self.tunings(seats))
            if flows
            else Standing(users=(), utilisation={}, promised={})
        )

    def _flow(self, index: int, offer: int) -> Flow:
        user = self.users[index]
        return Flow(
            name=user.name, cost=self.candidates[index][offer].cost, rate_per_s=self.rates[user.name],
            in_flight=user.in_flight, is_periodic=user.arrivals == "periodic", weight=user.weight,
        )  # fmt: skip

    def alone_s(self, index: int) -> float:
        """Mean latency of a user that is the only one, at full power, under the offer that is best for that."""
        flows = (self._flow(index, offer) for offer in range(len(self.candidates[index])))
        return min(self.contention.standing([flow]).users[0].mean_s for flow in flows)

    def value(self, seats: Sequence[Seat], standing: Standing) -> float:
        """The aim over those that are let in (congestion.py, equation 3)."""
        latency = np.full(len(self.users), math.nan)
        loads = {u.name: u for u in standing.users}
        for i, user in enumerate(self.users):
            if user.name in loads:
                latency[i] = loads[user.name].mean_s
        return self.memory.value_of(latency)

    def key(self, seats: Sequence[Seat], standing: Standing) -> tuple[float, float, float]:
        """What is too much, weight refused, value: less is better."""
        refused = sum(u.weight for u, s in zip(self.users, seats, strict=True) if s.offer < 0)
        excess = sum(max(0.0, share - self.most_load) for share in standing.promised.values())
        late = 0.0
        for user in self.users:
            load = next((u for u in standing.users if u.name == user.name), None)
            if load is not None and user.deadline_s is not None and load.p95_s > user.deadline_s:
                late += min(load.p95_s / user.deadline_s - 1, 10.0)
        choice = np.array([s.offer for s in seats], dtype=np.intp)
        big = float(len(self.memory.too_big(choice)))
        value = self.value(seats, standing)
        return round(excess + late + big, 9), round(refused, 9), value

    def refusal(self, seats: Sequence[Seat], index: int) -> str:
        """What would be asked too much if this user were let in, at its mildest."""
        mildest, reason = math.inf, "no plan fits"
        for offer in range(len(self.candidates[index])):
            other = list(seats)
            other[index] = Seat(offer, other[index].tuning)
            other = self.tuned(other)
            standing = self.standing(other)
            excess, _, _ = self.key(other, standing)
            if excess < mildest:
                mildest, reason = excess, self._too_much(other, standing)
        return reason

    def _too_much(self, seats: Sequence[Seat], standing: Standing) -> str:
        resource = max(standing.promised, key=lambda r: standing.promised[r], default=None)
        if resource is not None and standing.promised[resource] > self.most_load:
            share = standing.promised[resource]
            return f"{resource} would be at {share:.0%}, at most {self.most_load:.0%} may be promised"
        big = self.memory.too_big(np.array([s.offer for s in seats], dtype=np.intp))
        if big:
            return big[0]
        late = [
            f"{u.name} would have 95 % of its results within {load.p95_s * 1e3:.3g} ms, not {u.deadline_s * 1e3:.3g} ms"
            for u in self.users
            for load in standing.users
            if load.name == u.name and u.deadline_s is not None and load.p95_s > u.deadline_s
        ]
        return late[0] if late else "a user of more weight has its place"


def polish(game: Polished, start: Sequence[Seat], *, time_limit_s: float = 10.0) -> tuple[list[Seat], Standing, bool]:
    """A choice that no single change makes better, or the best in the time; how it stands; whether all were looked at."""
    deadline = time.perf_counter() + time_limit_s
    seats = game.tuned(start)
    standing = game.standing(seats)
    key = game.key(seats, standing)
    every = _all_seats(game)
    found = None if every is None else _best_of(game, every, (key, seats, standing), deadline)
    if found is not None and found[0][0] == 0:
        return found[1], found[2], True
    while True:
        seats, standing, key = _climb(game, seats, standing, key, deadline)
        if key[0] == 0:
            break
        here = [i for i, s in enumerate(seats) if s.offer >= 0]
        if not here:
            break
        lightest = min(here, key=lambda i: (game.users[i].weight, -i))
        seats[lightest] = Seat(-1, seats[lightest].tuning)
        standing = game.standing(seats)
        key = game.key(seats, standing)
    return seats, standing, False


def _all_seats(game: Polished) -> list[list[Seat]] | None:
    """What every user may have, where no more than MOST_CHOICES follow from that; None where there are more."""
    options, product = [], 1.0
    for user, candidates in zip(game.users, game.candidates, strict=True):
        sender = game.senders.get(str(user.source))
        tunings: list[Tuning | None] = [None]
        if sender is not None:
            _, channels, most = sender
            tunings = [Tuning(channel=c, watt=most * step) for c in range(channels) for step in _STEPS]
        options.append([Seat(-1, tunings[0]), *(Seat(o, t) for o in range(len(candidates)) for t in tunings)])
        product *= len(options[-1])
    return options if product <= MOST_CHOICES else None


_Judged = tuple[tuple[float, float, float], list[Seat], Standing]


def _best_of(game: Polished, options: list[list[Seat]], start: _Judged, deadline: float) -> _Judged | None:
    """The best of all combinations, `start` where none is better; None where the time did not suffice."""
    best = start
    for seats in map(list, itertools.product(*options)):
        if time.perf_counter() > deadline:
            return None
        standing = game.standing(seats)
        key = game.key(seats, standing)
        if key[:2] < best[0][:2] or (key[:2] == best[0][:2] and key[2] < best[0][2] * _BETTER):
            best = (key, seats, standing)
    return best


def _climb(
    game: Polished, seats: list[Seat], standing: Standing, key: tuple[float, float, float], deadline: float
) -> tuple[list[Seat], Standing, tuple[float, float, float]]:
    changed = True
    while changed and time.perf_counter() < deadline:
        changed = False
        for index in range(len(seats)):
            for seat in _others(game, seats, index):
                other = list(seats)
                other[index] = seat
                new_standing = game.standing(other)
                new = game.key(other, new_standing)
                if new[:2] < key[:2] or (new[:2] == key[:2] and new[2] < key[2] * _BETTER):
                    seats, standing, key, changed = other, new_standing, new, True
                if time.perf_counter() > deadline:
                    return seats, standing, key
    return seats, standing, key


def _others(game: Polished, seats: Sequence[Seat], index: int) -> Iterator[Seat]:
    """Single changes of one user's seat; a refused one may come back."""
    own, user = seats[index], game.users[index]
    for offer in range(len(game.candidates[index])):
        if offer != own.offer:
            yield Seat(offer, own.tuning)
    sender = game.senders.get(str(user.source))
    if sender is None or own.tuning is None or own.offer < 0:
        return
    _, num_channels, most = sender
    for channel in range(num_channels):
        if channel != own.tuning.channel:
            yield Seat(own.offer, Tuning(channel=channel, watt=own.tuning.watt))
    powers = {most * step for step in _STEPS} | {min(most, own.tuning.watt * f) for f in (0.5, 2.0)}
    for watt in sorted(powers):
        if abs(watt - own.tuning.watt) > 1e-9 * most:
            yield Seat(own.offer, Tuning(channel=own.tuning.channel, watt=watt))
