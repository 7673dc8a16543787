"""What is left of a wire, a radio channel or a fair node while others come and go on it. Pure formulas.

Legend: c capacity of a wire, b rate of a link alone, lambda requests per second and B bytes each on a link, rho share of
time that a link has something to send, n links of a wire, k of them that send just now, m = c / b.

 (1) others   = sum over other links of lambda B / c;   b1 = b / (1 + C(m, m others) / (m (1 - others))),  C Erlang's:
     sharers without number that may each take b (Nunez-Queija's rate-limited processor sharing; at m = 1: c (1 - others))
 (2) b2       = sum k p_k min(b, c / k) / sum k p_k,   p of the birth and death chain: up (n - k) lambda, down
     k min(b, c / k) (1 - rho) / B:  n alike links, each busy or not.    (1) is above the truth at few links, (2) below it
 (3) b'       = b1 at m = 1, else sqrt(b1 b2);   never below c / n, the max-min fair share
 (4) pi       = stationary law of m senders of a radio channel, each on or off: on at rate lambda, off at rate
     (1 - rho) b(A) / B while the set A is on, b(A) by radio.py's equation 1;   rho = P(on),  b' = lambda B / rho
     (coupled processors: each waits at an exponential's pace for the others)
 (5) drained  = senders that empty a backlog of everyone: grown from nothing by those whose load is below their mean rate
     while the drained follow (4) and all others send. A cell is stable where all are drained: equal powers may never recover
     from a burst even though (4) has a solution.
 (6) room_u   = w_u c / sum w  of what the others leave by generalised processor sharing (Parekh and Gallager), when u asks
     for all of a node, each other one for its demand:  those that ask for less than their share go first, leave the rest

O(n) for (2), O(n^2) for (6), O(8^m) for (4), so of more than MOST_EXACT senders the faintest count by their mean.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ecotone.media import RadioCell

__all__ = ["MOST_EXACT", "air_rates", "on_off_law", "room_beside", "undrained", "wire_share"]

FloatArray = NDArray[np.float64]
MOST_EXACT = 7
_FULL = 1.0 - 1e-9


def wire_share(
    own: float, most: float, others: float, num_links: int, per_s: float, size_bytes: float, busy: float
) -> float:
    """Equation 3: mean rate on a wire of `most` of a link that may take `own` of it, while it sends.

    `others`: share of the wire that other links take; `per_s`, `size_bytes`, `busy`: of a link of the wire on average.
    """
    fair, own = most / num_links, min(own, most)
    if num_links == 1:
        return own
    crowd = _limited(own, most, others) if others < _FULL else 0.0
    if own >= most * _FULL:
        return max(crowd, fair)
    few = _alternating(own, most, num_links, per_s, size_bytes, busy)
    return min(own, max(math.sqrt(crowd * few), fair))


def _limited(own: float, most: float, others: float) -> float:
    """Equation 1, between the two whole m around it."""
    servers = most / own
    low = math.floor(servers + 1e-9)
    extra = _waiting(low, low * others) / (low * (1 - others))
    if servers - low > 1e-9:
        more = _waiting(low + 1, (low + 1) * others) / ((low + 1) * (1 - others))
        extra += (servers - low) * (more - extra)
    return own / (1 + extra)


def _waiting(servers: int, load: float) -> float:
    """Erlang's C: the share that waits for one of so many servers under a load in erlangs below their number."""
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = load * blocked / (k + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def _alternating(own: float, most: float, num_links: int, per_s: float, size_bytes: float, busy: float) -> float:
    """Equation 2."""
    k = np.arange(1, num_links + 1)
    each = np.minimum(own, most / k)
    up = (num_links - k + 1) * max(per_s, 1e-12)
    down = k * each / size_bytes * max(1 - busy, 1e-6)
    log_law = np.cumsum(np.log(up) - np.log(down))
    weight = k * np.exp(log_law - log_law.max())
    return float((weight * each).sum() / weight.sum())


def room_beside(weight: FloatArray, demand: FloatArray) -> FloatArray:
    """Equation 6 for each of n sessions of a fair node, arrays (n,): shares of its time, demands likewise."""
    order = np.argsort(demand / weight, kind="stable").tolist()
    found = np.empty(len(weight))
    for own in range(len(weight)):
        left, among = 1.0, float(weight.sum())
        for other in order:
            if other != own and demand[other] * among < left * weight[other]:
                left, among = left - float(demand[other]), among - float(weight[other])
        found[own] = left * weight[own] / among
    return found


def on_off_law(rates: FloatArray, on: FloatArray, off_share: FloatArray, size: FloatArray) -> FloatArray:
    """Equation 4: stationary law over the 2^m sets of senders that are on, given the share of ends that turn one off.

    `rates` (2^m, m): bytes/s of each sender in each set (bit i of the row's number: i is on); `on` (m,): rate at which one
    that is off turns on; `size` (m,): bytes of a request.
    """
    num_sets, count = rates.shape
    sets = np.arange(num_sets)
    flow = np.zeros((num_sets, num_sets))
    for i in range(count):
        is_on = (sets >> i & 1).astype(np.bool_)
        flow[sets, sets ^ (1 << i)] = np.where(is_on, off_share[i] * rates[:, i] / size[i], on[i])
    flow[sets, sets] = -flow.sum(axis=1)
    system = flow.T.copy()
    system[-1] = 1.0
    right = np.zeros(num_sets)
    right[-1] = 1.0
    law: FloatArray = np.maximum(np.linalg.solve(system, right), 0.0)
    law /= law.sum()
    return law


def _members(count: int) -> FloatArray:
    """(2^m, m): 1 where the sender is in the set."""
    return (np.arange(1 << count)[:, None] >> np.arange(count)[None, :] & 1).astype(np.float64)


def _rates_by_set(cell: RadioCell, heard_watt: FloatArray, noise_watt: float) -> FloatArray:
    """Bytes per second of each sender in each set, (2^m, m); 0 where it is off."""
    is_on = _members(len(heard_watt))
    heard = is_on * heard_watt
    others = np.maximum(heard.sum(axis=1, keepdims=True) - heard, 0.0)
    rates: FloatArray = is_on * cell.width_hz / 8 * np.log2(1.0 + heard_watt / (noise_watt + others))
    return rates


def air_rates(cell: RadioCell, heard_watt: FloatArray, per_s: FloatArray, size: FloatArray, busy: FloatArray) -> FloatArray:
    """One step of equation 4 for all senders of a channel, arrays (M,): mean rates from the `busy` shares so far."""
    order = np.argsort(-heard_watt * busy, kind="stable")
    near, far = order[:MOST_EXACT], order[MOST_EXACT:]
    noise = cell.noise_watt + float((heard_watt[far] * busy[far]).sum())
    rates = _rates_by_set(cell, heard_watt[near], noise)
    law = on_off_law(rates, np.maximum(per_s[near], 1e-9), np.maximum(1 - busy[near], 1e-6), size[near])
    on = law @ _members(len(near))
    found = np.empty(len(heard_watt))
    found[near] = (law @ rates) / np.maximum(on, 1e-12)
    loud = float((heard_watt[near] * on).sum())
    found[far] = cell.width_hz / 8 * np.log2(1.0 + heard_watt[far] / (noise + loud))
    return found


def undrained(
    cell: RadioCell, heard_watt: FloatArray, per_s: FloatArray, size: FloatArray
) -> tuple[NDArray[np.bool_], FloatArray]:
    """Equation 5 for all senders of a channel, arrays (M,): who never empties, and the mean rates they have meanwhile.

    Of more than MOST_EXACT senders the faintest are taken as sending all the time.
    """
    order = np.argsort(-heard_watt, kind="stable")
    near, far = order[:MOST_EXACT], order[MOST_EXACT:]
    noise = cell.noise_watt + float(heard_watt[far].sum())
    rates, count = _rates_by_set(cell, heard_watt[near], noise), len(near)
    load, is_done, mean = (per_s * size)[near], np.zeros(count, dtype=np.bool_), np.zeros(count)
    while True:
        done = np.flatnonzero(is_done)
        pinned = int(sum(1 << int(i) for i in np.flatnonzero(~is_done)))
        rows = pinned | _members(len(done)).astype(np.intp) @ (1 << done)
        law = _settled_law(rates[rows][:, done], per_s[near][done], size[near][done])
        mean = law @ rates[rows]
        fresh = ~is_done & (load < mean * _FULL)
        if not fresh.any():
            break
        is_done |= fresh
    stuck = np.ones(len(heard_watt), dtype=np.bool_)
    stuck[near] = ~is_done
    loud = float(heard_watt[near].sum())
    found = cell.width_hz / 8 * np.log2(1.0 + heard_watt / (cell.noise_watt + loud))
    found[near] = np.where(is_done, found[near], mean)
    stuck[far] = (per_s * size)[far] >= found[far] * _FULL
    return stuck, found


def _settled_law(rates: FloatArray, per_s: FloatArray, size: FloatArray) -> FloatArray:
    """Equation 4 until the shares of time agree with the law; the law of nobody is 1."""
    count = rates.shape[1]
    if not count:
        return np.ones(1)
    busy, law = np.zeros(count), np.ones(1)
    for _ in range(30):
        law = on_off_law(rates, np.maximum(per_s, 1e-9), np.maximum(1 - busy, 1e-6), size)
        new = law @ _members(count)
        if np.abs(new - busy).max() < 1e-6:
            break
        busy = (busy + new) / 2
    return law
