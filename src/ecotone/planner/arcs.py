"""The moves of a network that are worth looking at, as lists: what survives the proof that it cannot be on a better path.

Under prices, the least priced cost so far + the move + the least still to go, less the sum of the prices, is below every
path that takes the move and keeps the budgets. A move whose sum is not below the best value known is left out, and with it
nothing that could be better (reduced-cost fixing). Where more than MOST_ARCS stages survive, those of least sum are kept,
and `missed` is the least sum among the others: what may have been missed is not below it.

Lists lie sorted by (position, place), `first[p * D + d]` to `first[p * D + d + 1]` are the moves from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import FloatArray
from ecotone.planner.network import Network
from ecotone.planner.programme import Programme, Remaining

__all__ = ["Arcs", "Moves", "Stages", "arcs_of", "repriced", "surviving"]

MOST_ARCS = 1_500_000

Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """Stages by where they start: stop, executor option, place; value; columns of the place, totals, working set."""

    first: Index
    stop: Index
    option: Index
    device: Index
    value: FloatArray
    priced: FloatArray  # value and what its columns cost under the prices
    held: FloatArray  # (n, held budgets)
    total: FloatArray  # (n, totals)
    peak: FloatArray  # (n,)
    run: FloatArray  # (n,) of the device that computes now


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Crossings, or transfers of exits, by where they start: the place after it, codec option (-1: local), value; columns of
    the place that sends and of `other`, the place that receives (an exit's: the sink), totals; the bit of the place used."""

    first: Index
    target: Index
    other: Index
    option: Index
    value: FloatArray
    priced: FloatArray
    sender: FloatArray  # (n, held budgets)
    receiver: FloatArray  # (n, held budgets)
    total: FloatArray  # (n, totals)
    bit: NDArray[np.uint64]
    run: FloatArray  # (n, 2): added to the device that computed, and what the next begins with


@dataclass(frozen=True, slots=True, eq=False)
class Arcs:
    """All moves: at each position leave (at exits), cross, compute. `missed`: nothing left out is below it."""

    stages: Stages
    crossings: Moves
    leaves: Moves | None
    missed: float


def surviving(programme: Programme, price: FloatArray, table: Remaining, below: float) -> Arcs:
    """The moves that may be on a path of less than `below`."""
    held, done = programme.forward(price)
    offset = float(price.sum()) - programme.network.fixed
    kept, missed = _stages_below(programme, price, table, held, below + offset)
    crossings = programme.crossings(price)
    bounds = done[:, None, :, None] + crossings + table.start[:, None, None, :]
    bounds[0] = math.inf
    bounds[0, :, programme.chain.source] = crossings[0, :, programme.chain.source] + table.start[0]
    bounds[-1] = math.inf
    bounds[-1, :, :, programme.chain.sink] = done[-1] + crossings[-1, :, :, programme.chain.sink]
    p, k, d, e = np.nonzero(bounds < below + offset)
    order = np.lexsort((e, k, d, p))
    return arcs_of(programme, price, kept, (p[order], k[order], d[order], e[order]), missed=missed - offset)


def _stages_below(
    programme: Programme, price: FloatArray, table: Remaining, held: FloatArray, limit: float
) -> tuple[tuple[Index, ...], float]:
    """(p, d, x, q) of the stages whose bound is below `limit`, at most MOST_ARCS, and the least bound of the others."""
    found: list[tuple[Index, ...]] = []
    bounds: list[FloatArray] = []
    size, waiting, missed = programme.size, 0, math.inf
    for p in range(size - 1):
        row = programme.stage_row(price, p).transpose(1, 0, 2)  # (D, X, Q)
        through = held[p][:, None, None] + row + table.end[p + 1 :].T[:, None, :]
        d, x, q = np.nonzero(through < limit)
        if len(d):
            found.append((np.full(len(d), p), d, x, q + p + 1))
            bounds.append(through[d, x, q])
            waiting += len(d)
        if waiting > 2 * MOST_ARCS or (p == size - 2 and waiting > MOST_ARCS):
            every = np.concatenate(bounds)
            limit = float(np.partition(every, MOST_ARCS)[MOST_ARCS])
            columns = [np.concatenate(c) for c in zip(*found, strict=True)]
            keep = every < limit
            missed = min(missed, limit)
            found, bounds, waiting = [tuple(c[keep] for c in columns)], [every[keep]], int(keep.sum())
    if not found:
        nothing = np.zeros(0, dtype=np.intp)
        return (nothing,) * 4, missed
    return tuple(np.concatenate(c) for c in zip(*found, strict=True)), missed


def arcs_of(
    programme: Programme, price: FloatArray, stages: Iterable[Index], crossings: Iterable[Index], missed: float = math.inf
) -> Arcs:
    """Lists from (p, d, x, q) of stages and (p, k, d, e) of crossings, both sorted by p and d; staying is added."""
    network = programme.network
    p, d, x, q = stages
    value = network.stage[x, d, p, q].astype(np.float64)
    held = _columns([h.stage for h in network.held], (x, d, p, q), len(p))
    total = _columns([t.amount.stage for t in network.totals], (x, d, p, q), len(p))
    peak = network.peak[d, p, q] if network.peak is not None else np.zeros(len(p))
    priced = value + (held * _own(price, network, d)).sum(axis=1) + total @ _totals(price, network)
    run = _columns([network.run.stage if network.run else None], (x, d, p, q), len(p))[:, 0]
    made = Stages(_first(programme, p, d), q, x, d, value, priced, held, total, peak, run)
    return Arcs(made, _crossings(programme, price, crossings), _leaves(programme, price), missed)


def repriced(programme: Programme, arcs: Arcs, price: FloatArray) -> Arcs:
    """The same moves under other prices."""
    network, totals = programme.network, _totals(price, programme.network)
    stages = arcs.stages
    priced = stages.value + (stages.held * _own(price, network, stages.device)).sum(axis=1) + stages.total @ totals

    def moves(found: Moves) -> Moves:
        sender = np.repeat(np.tile(np.arange(programme.count), programme.size), np.diff(found.first))
        cost = (found.sender * _own(price, network, sender)).sum(axis=1)
        cost += (found.receiver * _own(price, network, found.other)).sum(axis=1)
        return replace(found, priced=found.value + cost + found.total @ totals)

    leaves = None if arcs.leaves is None else moves(arcs.leaves)
    return replace(arcs, stages=replace(stages, priced=priced), crossings=moves(arcs.crossings), leaves=leaves)


def _crossings(programme: Programme, price: FloatArray, crossings: Iterable[Index]) -> Moves:
    network, chain = programme.network, programme.chain
    p, k, d, e = crossings
    value = network.crossing[p, k, d, e]
    sender = _columns([h.sender for h in network.held], (p, k, d, e), len(p))
    receiver = _columns([h.receiver for h in network.held], (p, k, d, e), len(p))
    total = _columns([t.amount.crossing for t in network.totals], (p, k, d, e), len(p))
    for b, one in enumerate(network.held):
        if one.arrive is not None:
            receiver[:, b] += np.where(p < programme.size - 1, one.arrive[e], 0.0)
    at = np.nonzero(chain.free)[0]
    at, own = np.repeat(at, programme.count), np.tile(np.arange(programme.count), len(at))
    ends = ((at > 0) | (own == chain.source)) & ((at < programme.size - 1) | (own == chain.sink))
    at, own = at[ends], own[ends]
    stay = np.zeros((len(at), len(network.held)))
    for b, one in enumerate(network.held):
        if one.arrive is not None:
            stay[:, b] = np.where(at == 0, one.arrive[own], 0.0)
    p, d, e = np.concatenate([p, at]), np.concatenate([d, own]), np.concatenate([e, own])
    k, value = np.concatenate([k, np.full(len(at), -1)]), np.concatenate([value, np.zeros(len(at))])
    receiver = np.concatenate([receiver, stay])
    sender, total = (np.concatenate([t, np.zeros((len(at), t.shape[1]))]) for t in (sender, total))
    order = np.lexsort((np.arange(len(p)), d, p))
    bit, now = _bits(network)[e], network.run
    run = _columns([now.sender if now else None, now.receiver if now else None], (p, np.maximum(k, 0), d, e), len(p))
    run[k < 0] = 0.0
    where = (p[order], d[order], e[order], e[order], k[order])
    rows = (sender[order], receiver[order], total[order], run[order])
    return _moves(programme, price, where, value[order], rows, bit[order])


def _leaves(programme: Programme, price: FloatArray) -> Moves | None:
    network, chain = programme.network, programme.chain
    if network.leaving is None:
        return None
    exits = np.array([e.position for e in chain.exits], dtype=np.intp)
    p, d, k = (g.ravel() for g in np.meshgrid(exits, np.arange(programme.count), np.arange(network.leaving.shape[1]),
                                              indexing="ij"))  # fmt: skip
    value = network.leaving[p, k, d]
    possible = np.isfinite(value)
    p, d, k, value = p[possible], d[possible], k[possible], value[possible]
    sender = _columns([h.leaver for h in network.held], (p, k, d), len(p))
    receiver = _columns([h.taker for h in network.held], (p, k, d), len(p))
    total = _columns([t.amount.leaving for t in network.totals], (p, k, d), len(p))
    rows = np.concatenate([value[:, None], sender, receiver, total], axis=1)
    keep = _undominated_leaves(p, d, rows) if network.dominance else np.arange(len(p))
    where = (p[keep], d[keep], d[keep], np.full(len(keep), chain.sink), k[keep])
    bit = np.zeros(len(keep), dtype=np.uint64)
    run = _columns([network.run.leaver if network.run else None, None], (p, k, d), len(p))
    return _moves(programme, price, where, value[keep], (sender[keep], receiver[keep], total[keep], run[keep]), bit)


def _undominated_leaves(p: Index, d: Index, rows: FloatArray) -> Index:
    """Of the codecs of one exit on one place those that no other one beats in everything."""
    kept = []
    for i in range(len(p)):
        same = np.nonzero((p == p[i]) & (d == d[i]))[0]
        worse = (rows[same] <= rows[i]).all(axis=1) & ((rows[same] < rows[i]).any(axis=1) | (same < i))
        if not worse.any():
            kept.append(i)
    return np.array(kept, dtype=np.intp)


def _moves(
    programme: Programme, price: FloatArray, where: tuple[Index, ...], value: FloatArray, rows: tuple[FloatArray, ...],
    bit: NDArray[np.uint64],
) -> Moves:  # fmt: skip
    """From (position, sender, target, other, option), what each of them adds (sender, receiver, total, run), and bits."""
    p, d, target, other, option = where
    sender, receiver, total, run = rows
    network = programme.network
    priced = value + (sender * _own(price, network, d)).sum(axis=1) + (receiver * _own(price, network, other)).sum(axis=1)
    priced = priced + total @ _totals(price, network)
    first = _first(programme, p, d)
    return Moves(first, target, other, option, value.astype(np.float64), priced, sender, receiver, total, bit, run)


def _first(programme: Programme, p: Index, d: Index) -> Index:
    found: Index = np.searchsorted(p * programme.count + d, np.arange(programme.size * programme.count + 1))
    return found


def _columns(tables: list[FloatArray | None], index: tuple[Index, ...], count: int) -> FloatArray:
    """(count, tables): the entries of tables that are broadcast along axes of length 1; 0 where there is no table."""
    found = np.zeros((count, len(tables)))
    for b, table in enumerate(tables):
        if table is not None:
            at = tuple(i if n > 1 else np.zeros_like(i) for i, n in zip(index, table.shape, strict=True))
            found[:, b] = table[at]
    return found


def _own(price: FloatArray, network: Network, device: Index) -> FloatArray:
    """(n, held budgets) prices of the columns of `device`."""
    count = network.chain.num_devices
    prices = price[: len(network.held) * count].reshape(len(network.held), count)
    found: FloatArray = prices[:, device].T
    return found


def _totals(price: FloatArray, network: Network) -> FloatArray:
    return price[len(network.held) * network.chain.num_devices :]


def _bits(network: Network) -> NDArray[np.uint64]:
    found = np.zeros(network.chain.num_devices, dtype=np.uint64)
    if network.watched is not None:
        found[network.watched] = np.uint64(1) << np.arange(len(network.watched), dtype=np.uint64)
    return found
