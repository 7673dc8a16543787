"""The best fixed action in a radio cell: where each device leaves its task, on which channel, with how much power.

The problem of MAHPPO's environment (arXiv:2205.11854) without its learner: minimise seconds per task of the slowest device
+ w * mean joules per task. Legend: t_i, e_i seconds and joules of the part computed at device i's point, B_i bytes sent
after it, g_i gain, p_i power, n noise, W width; all finish a task every T seconds, so i may upload for T - t_i of them.

 (1) need_i = B_i / (T - t_i),  d_i = (T - t_i) / T                        rate while uploading; share of time it uploads
 (2) rate_i = sum over sets A of others on the channel of  P(A) W log2(1 + p_i g_i / (n + sum over j in A of p_j g_j)),
              P(A) = product over A of d_j times product over the rest of 1 - d_j
 (3) p_i   <- I_i (2^(need_i / W) - 1) / g_i,  I_i such that  rate_i = W log2(1 + p_i g_i / I_i)   least powers (Yates 1995)
 (4) energy = mean of  e_i + p_i (T - t_i)                                   to upload slower never costs more energy

Least powers exist or not whatever the order, and channels do not disturb one another. So for each T every group of devices
(up to likeness) at every point is priced once, and a programme over channels puts groups together: exact for the model,
which takes uploads as independent and lasting. They are neither: alike devices fall into step, and one that is heard far
above the others ends its queue first and leaves them the channel. So the model's best, those with powers out of step, and
ladders of powers are scored by `score`, a simulation, and climbed from. Groups G: O(G m 2^m) a step of 3, m on a channel.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone.offload import OffloadProfile
from ecotone.planner.objective import PlannerError
from ecotone.radio import Radio

__all__ = ["CellAction", "Score", "Uplink", "best_static", "least_powers", "model_actions"]

FloatArray = NDArray[np.float64]
LEAST_WATT = 1e-10
_NUM_PERIODS = 24
_MOST_GROUPS = 20_000
_STEPS = 80  # of equation 3, which converges geometrically
_KEPT = 60  # actions of the model that are scored
_WAYS = 12  # per period
_TOPS, _LADDER = (1.0, 0.2, 0.04), (0.3, 0.1, 0.03)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uplink:
    """A device of the cell."""

    profile: OffloadProfile
    distance_m: float = 50.0
    max_watt: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CellAction:
    """One fixed action, by device; what it costs (seconds and joules per task), by the model or as scored."""

    points: tuple[int, ...]
    channels: tuple[int, ...]
    powers: tuple[float, ...]
    seconds: float = math.inf
    joule: float = math.inf

    def value(self, energy_weight: float) -> float:
        return self.seconds + energy_weight * self.joule


Score = Callable[[CellAction, float], tuple[float, float]]
"""Seconds and joules per task of an action; it may stop, and say inf, once the seconds are above the second argument."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Devices that share a channel: how many of each (kind, point), their powers and joules in all."""

    members: tuple[tuple[int, int], ...]
    powers: tuple[float, ...]
    joule: float


def least_powers(
    need: FloatArray, duty: FloatArray, gain: FloatArray, max_watt: FloatArray, radio: Radio
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Equation 3 for G groups of m senders at once, arrays (G, m), `need` in bytes/s: powers, and which groups can.

    Starts from the least powers alone, so the sequence rises to the least solution; beyond `max_watt` there is none.
    """
    size = need.shape[1]
    goal = np.exp2(np.minimum(8 * need / radio.width_hz, 60.0)) - 1.0
    power = np.maximum(radio.noise_watt * goal / gain, LEAST_WATT)
    can: NDArray[np.bool_] = np.all(power <= max_watt, axis=1)
    sets = np.array(list(itertools.product((0.0, 1.0), repeat=size - 1)))
    for _ in range(_STEPS):
        live = np.flatnonzero(can)
        if not live.size:
            break
        heard, new = power[live] * gain[live], power[live].copy()
        for i in range(size):
            others = [j for j in range(size) if j != i]
            share = np.ones((live.size, len(sets)))
            for column, j in enumerate(others):
                share *= np.where(sets[:, column] > 0, duty[live, j, None], 1.0 - duty[live, j, None])
            noise = radio.noise_watt + heard[:, others] @ sets.T
            bits = (share * np.log2(1.0 + heard[:, i, None] / noise)).sum(axis=1)
            new[:, i] = power[live, i] * goal[live, i] / (np.exp2(bits) - 1.0)
        change = np.abs(np.log(new / power[live])).max(initial=0.0)
        power[live] = np.maximum(new, LEAST_WATT)
        can[live] = np.all(power[live] <= max_watt[live] * (1 + 1e-9), axis=1)
        if change < 1e-4:
            break
    return np.minimum(power, max_watt), can


def model_actions(
    uplinks: Sequence[Uplink], radio: Radio, *, energy_weight: float = 1.0, most: int = _KEPT
) -> tuple[CellAction, ...]:
    """The best actions of the model (equations 1 to 4), ascending in value: over periods T, groups and channels."""
    kinds = list(dict.fromkeys(uplinks))
    counts = Counter(kinds.index(u) for u in uplinks)
    rosters = list(_rosters(kinds, counts))
    longest = max(max(u.profile.compute_s) for u in uplinks)
    shortest = min(min(s for s in u.profile.compute_s if s > 0) for u in uplinks)
    found: list[CellAction] = []
    for period_s in np.geomspace(shortest * 1.05, longest * 1.2, _NUM_PERIODS):
        groups = [g for size, rows in rosters for g in _priced(rows, size, float(period_s), kinds, radio)]
        for joule, chosen in _put_together(groups, counts, radio.num_channels, float(period_s), kinds, _WAYS):
            found.append(_action(uplinks, kinds, chosen, float(period_s), joule / len(uplinks)))
    unlike = {(a.points, a.channels): a for a in sorted(found, key=lambda a: -a.value(energy_weight))}
    return tuple(sorted(unlike.values(), key=lambda a: a.value(energy_weight))[:most])


def _rosters(kinds: Sequence[Uplink], counts: Counter[int]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """For each size of group, every multiset of (kind, point) that devices can form, shape (G, size, 2)."""
    seats = [(k, p) for k in sorted(counts) for p in range(kinds[k].profile.num_points - 1)]
    for size in range(1, sum(counts.values()) + 1):
        many = math.comb(len(seats) + size - 1, size)
        if many > 50 * _MOST_GROUPS or 2**size > 1024:
            return
        rows = [
            row for row in itertools.combinations_with_replacement(seats, size)
            if all(c <= counts[k] for k, c in Counter(k for k, _ in row).items())
        ]  # fmt: skip
        if len(rows) > _MOST_GROUPS:
            return
        yield size, np.array(rows, dtype=np.intp)


def _priced(rows: NDArray[np.intp], size: int, period_s: float, kinds: Sequence[Uplink], radio: Radio) -> Iterator[_Group]:
    """Equations 1 to 4 for groups of one size; those that can keep the period."""

    def table(of: Callable[[Uplink, int], float]) -> FloatArray:
        values = {(k, p): of(u, p) for k, u in enumerate(kinds) for p in range(u.profile.num_points)}
        return np.array([[values[k, p] for k, p in row] for row in rows.tolist()])

    spare = period_s - table(lambda u, p: u.profile.compute_s[p])
    rows, spare = rows[(fits := (spare > 0).all(axis=1))], spare[fits]
    if not len(rows):
        return
    size_bytes, gain = (
        table(lambda u, p: u.profile.payload_bytes[p]),
        table(lambda u, p: u.distance_m**-radio.path_loss_exponent),
    )
    own, most = table(lambda u, p: u.profile.compute_s[p] * u.profile.compute_watt[p]), table(lambda u, p: u.max_watt)
    power, can = least_powers(size_bytes / spare, spare / period_s, gain, most, radio)
    joule = (own + power * spare).sum(axis=1)
    for index in np.flatnonzero(can):
        members = tuple((int(k), int(p)) for k, p in rows[index])
        yield _Group(members, tuple(power[index].tolist()), float(joule[index]))


def _put_together(
    groups: Sequence[_Group], counts: Counter[int], num_channels: int, period_s: float, kinds: Sequence[Uplink], keep: int
) -> list[tuple[float, tuple[_Group, ...]]]:
    """The `keep` cheapest ways to give every device a channel's group or its last point; joules in all, groups by channel.

    A programme over channels whose state is how many of each kind have a place; per kinds of a group the `keep` cheapest.
    """
    by_kinds: dict[tuple[int, ...], list[_Group]] = {}
    for group in sorted(groups, key=lambda g: g.joule):
        taken = Counter(k for k, _ in group.members)
        alike = by_kinds.setdefault(tuple(taken[k] for k in sorted(counts)), [])
        if len(alike) < keep:
            alike.append(group)
    empty = tuple(0 for _ in counts)
    by_kinds[empty] = [_Group((), (), 0.0)]
    best: dict[tuple[int, ...], list[tuple[float, tuple[_Group, ...]]]] = {empty: [(0.0, ())]}
    for _ in range(num_channels):
        longer: dict[tuple[int, ...], list[tuple[float, tuple[_Group, ...]]]] = {}
        for state, ways in best.items():
            for taken_kinds, alike in by_kinds.items():
                after = tuple(a + b for a, b in zip(state, taken_kinds, strict=True))
                if all(a <= counts[k] for a, k in zip(after, sorted(counts), strict=True)):
                    longer.setdefault(after, []).extend((j + g.joule, (*way, g)) for j, way in ways for g in alike)
        best = {state: sorted(ways, key=lambda w: w[0])[: 4 * keep] for state, ways in longer.items()}
    done = []
    for state, ways in best.items():
        here = [(k, counts[k] - n) for k, n in zip(sorted(counts), state, strict=True) if counts[k] > n]
        if all(kinds[k].profile.compute_s[-1] <= period_s for k, _ in here):
            own = sum(n * kinds[k].profile.compute_s[-1] * kinds[k].profile.compute_watt[-1] for k, n in here)
            done += [(joule + own, way) for joule, way in ways]
    return sorted(done, key=lambda w: w[0])[:keep]


def _action(
    uplinks: Sequence[Uplink], kinds: Sequence[Uplink], groups: tuple[_Group, ...], period_s: float, joule: float
) -> CellAction:
    free = {k: [i for i, u in enumerate(uplinks) if kinds.index(u) == k] for k in range(len(kinds))}
    points = [u.profile.num_points - 1 for u in uplinks]
    channels, powers = [0] * len(uplinks), [LEAST_WATT] * len(uplinks)
    for channel, group in enumerate(groups):
        for (kind, point), power in zip(group.members, group.powers, strict=True):
            i = free[kind].pop(0)
            points[i], channels[i], powers[i] = point, channel, power
    return CellAction(
        points=tuple(points), channels=tuple(channels), powers=tuple(powers), seconds=period_s, joule=joule
    )  # fmt: skip


def best_static(
    uplinks: Sequence[Uplink],
    radio: Radio,
    score: Score,
    *,
    energy_weight: float = 1.0,
    num_scores: int = 1500,
    seed: int = 0,
) -> CellAction:
    """The best action that `num_scores` calls of `score` find: the model's best, with powers out of step, then climbing.

    Deterministic given `seed`. Raises PlannerError where there is no device or no score.
    """
    if not uplinks or num_scores < 1:
        raise PlannerError("a cell without devices, or no action to score: give both")
    random, climber = np.random.default_rng(seed), _Climber(uplinks, radio, score, energy_weight)
    here = CellAction(
        points=tuple(u.profile.num_points - 1 for u in uplinks), channels=(0,) * len(uplinks),
        powers=(LEAST_WATT,) * len(uplinks),
    )  # fmt: skip
    known = (here, *model_actions(uplinks, radio, energy_weight=energy_weight), *_ladders(uplinks, radio))
    starts = [climber.scored(action) for action in known[:num_scores]]
    while climber.num_scored < num_scores // 3:  # out of step: alike devices with unlike powers
        start = starts[int(random.integers(len(starts)))]
        starts.append(climber.scored(climber.shaken(start, random, 0.3)))
    starts.sort(key=lambda a: a.value(energy_weight))
    num_climbs = 4
    for rank, start in enumerate(starts[:num_climbs]):
        climber.climb(start, random, num_scores * (num_climbs + 2 * (rank + 1)) // (3 * num_climbs))
    return climber.best


def _ladders(uplinks: Sequence[Uplink], radio: Radio) -> Iterator[CellAction]:
    """All at one point, channels in turn, and each device of a channel heard so many times fainter than the one before."""
    channels = tuple(i % radio.num_channels for i in range(len(uplinks)))
    for point, top, step in itertools.product(range(min(u.profile.num_points for u in uplinks) - 1), _TOPS, _LADDER):
        powers = tuple(max(u.max_watt * top * step ** (i // radio.num_channels), LEAST_WATT) for i, u in enumerate(uplinks))
        yield CellAction(points=(point,) * len(uplinks), channels=channels, powers=powers)


class _Climber:
    def __init__(self, uplinks: Sequence[Uplink], radio: Radio, score: Score, energy_weight: float) -> None:
        self.uplinks, self.radio, self._score, self._weight = uplinks, radio, score, energy_weight
        self.num_scored, self._best_value = 0, math.inf
        self.best = CellAction(points=(), channels=(), powers=())

    def scored(self, action: CellAction, limit: float = math.inf) -> CellAction:
        """The action with its true cost, inf where that is above `limit`."""
        self.num_scored += 1
        seconds, joule = self._score(action, limit)
        found = CellAction(
            points=action.points, channels=action.channels, powers=action.powers, seconds=seconds, joule=joule
        )  # fmt: skip
        if found.value(self._weight) < self._best_value:
            self.best, self._best_value = found, found.value(self._weight)
        return found

    def shaken(self, action: CellAction, random: np.random.Generator, by: float) -> CellAction:
        """All powers changed by about a factor e^`by`."""
        factors = np.exp(by * random.standard_normal(len(action.powers)))
        powers = zip(action.powers, factors.tolist(), self.uplinks, strict=True)
        shaken = tuple(min(max(p * f, LEAST_WATT), u.max_watt) for p, f, u in powers)
        return CellAction(points=action.points, channels=action.channels, powers=shaken)

    def climb(self, action: CellAction, random: np.random.Generator, until: int) -> None:
        """Change one thing at a time and keep what is better, until so many were scored."""
        while self.num_scored < until:
            value = action.value(self._weight)
            other = self.scored(self._neighbour(action, random), value)
            if other.value(self._weight) < value:
                action = other

    def _neighbour(self, action: CellAction, random: np.random.Generator) -> CellAction:
        points, channels, powers = list(action.points), list(action.channels), list(action.powers)
        i, kind = int(random.integers(len(points))), int(random.integers(8))
        most = self.uplinks[i].max_watt
        if kind == 0:
            points[i] = int(random.integers(self.uplinks[i].profile.num_points))
            powers[i] = max(powers[i], 1e-3 * most)
        elif kind == 1:
            channels[i] = int(random.integers(self.radio.num_channels))
        elif kind == 2:
            powers[i] = float(most * 10 ** random.uniform(-4, 0))
        elif kind == 3:  # two change places in power
            j = int(random.integers(len(points)))
            powers[i], powers[j] = min(powers[j], most), min(powers[i], self.uplinks[j].max_watt)
        else:
            powers[i] *= float(np.exp((0.05, 0.2, 0.6, 0.2)[kind - 4] * random.standard_normal()))
        powers[i] = min(max(powers[i], LEAST_WATT), most)
        return CellAction(points=tuple(points), channels=tuple(channels), powers=tuple(powers))
