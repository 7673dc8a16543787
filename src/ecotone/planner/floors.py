"""What the 95th percentile of latency of a plan cannot be below, whatever the queues: floors for searches under P95.

Percentile: the least sample that at least 95 % of the requests do not exceed. r(p): share of requests that goes on behind
position p; b: seconds that each request keeps one resource (the processor of a device, its coder, or a link); t_i: arrivals.

 (1) p95 >= sum over the pieces of the chain with r > 5 % of their whole time, stages, heads and crossings
     Pieces follow one another, so r never rises along the chain. Behind the last position p with r(p) > 5 % go more than 5 %
     of all requests, and each of them takes at least the time of every piece up to there, since no request ends sooner than
     alone. More than 5 % are that slow, so the percentile is. (Leaving takes longer still; without exits it is the latency.)
     Where a score draws at random who leaves, 5 % becomes `sure_tail`.
 (2) p95 >= the percentile over i of  D_i = max over j <= i of  t_j - t_i + (i - j + 1) b         without exits
     When request i ends, so have all before it, as results come in order. Those from j on came at t_j or later, and the
     resource has served each for b, one after another: request i ends at t_j + (i - j + 1) b or later.
     D_i = b + max(0, D_(i-1) - (t_i - t_(i-1))), Lindley's recursion. It grows with b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ecotone.cost import FloatArray
from ecotone.planner.objective import TAIL

__all__ = ["largest_load_s", "percentile_s", "queue_floor_s", "reached_by_the_tail", "sure_tail"]

_STEPS = 60
_UNLIKELY = 1e-6


def reached_by_the_tail(share: FloatArray, tail: float = TAIL) -> FloatArray:
    """(P,) what a mean over requests is multiplied by for equation 1: 1 / r where r is above `tail`, else 0."""
    far = share > tail * (1 + 1e-9)
    found: FloatArray = np.where(far, 1.0 / np.where(far, share, 1.0), 0.0)
    return found


def sure_tail(requests: int) -> float:
    """The tail of equation 1 for a sample in which each request leaves by chance: r at or above it means, but for one sample
    in a million, that more than 5 % of `requests` go on."""
    few = math.floor(TAIL * requests)
    low, high = TAIL, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(few, requests, middle) > _UNLIKELY else (low, middle)
    return high


def _at_most(few: int, count: int, share: float) -> float:
    """Probability that at most `few` of `count` go on, each with probability `share`."""
    if share >= 1:
        return 0.0 if few < count else 1.0
    chance = math.exp(count * math.log1p(-share))
    total = chance
    for k in range(few):
        chance *= (count - k) / (k + 1) * share / (1 - share)
        total += chance
    return total


def percentile_s(latencies_s: Sequence[float]) -> float:
    """The 95th percentile as defined above; inf where nothing is given."""
    if not len(latencies_s):
        return math.inf
    return float(sorted(latencies_s)[math.ceil((1 - TAIL) * len(latencies_s) - 1e-9) - 1])


def queue_floor_s(arrivals_s: Sequence[float], busy_s: float) -> float:
    """Equation 2 for one resource; 0 where requests come one at a time."""
    if not len(arrivals_s):
        return 0.0
    delays, delay = [], 0.0
    before = arrivals_s[0]
    for at in arrivals_s:
        delay = busy_s + max(0.0, delay - (at - before))
        before = at
        delays.append(delay)
    return percentile_s(delays)


def largest_load_s(arrivals_s: Sequence[float], value_s: float) -> float:
    """The least b, from above, whose floor (2) reaches `value_s`: what is loaded more cannot be better. inf: no load is."""
    if not len(arrivals_s) or not math.isfinite(value_s):
        return math.inf
    low, high = 0.0, value_s  # one request alone already takes b
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if queue_floor_s(arrivals_s, middle) >= value_s else (middle, high)
    return high
