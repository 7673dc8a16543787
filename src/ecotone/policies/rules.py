"""Who decides in the on-demand world without learning: the rules that a learned policy is measured against.

Fixed              one action for ever, or one for each deadline; `best_static` finds the best in hindsight
EdgentStatic       at the start, from the deepest exit to the shallowest, the first whose best cut is in time
                   (1806.07840)
EdgentDynamic      a map from bandwidth to the plan of best exp(accuracy) + throughput, read where Bayesian change-point
                   detection says that the bandwidth changed (1910.05316); throughput in requests per deadline (ours)
Resolving          before each request the whole table at the state as believed: model-predictive control, one step ahead
Greedy             the same at the state as it is: the full-table oracle, for what it can know now
clairvoyant        knows all that will come: dynamic programming over how late device and link are, in buckets (so a
                   schedule that could be, near the best one; requests still go in order)
Network            a trained network's largest output
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ecotone.policies.actions import ActionTable, FloatArray
from ecotone.policies.belief import Ranges
from ecotone.policies.changepoint import ChangePoints
from ecotone.policies.conditions import Episodes
from ecotone.policies.stream import Clocks, Outcome, Reward, Stream

__all__ = [
   "EdgentDynamic", "EdgentStatic", "Fixed", "Greedy", "Network", "Played", "Resolving", "Rule", "best_static",
    "clairvoyant", "play", "static_rewards",
]  # fmt: skip

IntArray = NDArray[np.intp]
Network_ = Callable[[torch.Tensor], torch.Tensor]


class Rule(Protocol):
    """Decides for all copies of a stream at once, request by request."""

    def begin(self, stream: Stream) -> None:
        """A new stream."""
        ...

    def decide(self, stream: Stream) -> IntArray:
        """Actions (M,) for the present request."""
        ...


@dataclass(frozen=True, slots=True)
class Played:
    """A rule's whole run: (M, N) each, and the deadline of each episode."""

    actions: IntArray
    reward: FloatArray
    latency_s: FloatArray
    deadline_s: FloatArray

    @property
    def mean_reward(self) -> float:
        return float(self.reward.mean())

    @property
    def hits(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.latency_s <= self.deadline_s[:, None]
        return found

    @property
    def hit_rate(self) -> float:
        return float(self.hits.mean())


def play(
    rule: Rule,
    table: ActionTable,
    episodes: Episodes,
    reward: Reward | None = None,
    ranges: Ranges | None = None,
    seed: int = 0,
) -> Played:
    """Run `rule` through `episodes`; `ranges`: those of a network; `seed`: of measurement errors, the same for all rules."""
    stream = Stream(table, episodes, reward, ranges, seed=seed)
    rule.begin(stream)
    actions, rewards, latencies = [], [], []
    while not stream.is_done:
        chosen = rule.decide(stream)
        found = stream.step(chosen)
        actions.append(chosen)
        rewards.append(found.reward)
        latencies.append(found.latency_s)
    return Played(np.stack(actions, 1), np.stack(rewards, 1), np.stack(latencies, 1), episodes.deadline_s)


# ---- fixed --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fixed:
    """`by_deadline[d]`: the action where requests are due after d; `otherwise` elsewhere."""

    otherwise: int
    by_deadline: dict[float, int]

    def begin(self, stream: Stream) -> None:
        pass

    def decide(self, stream: Stream) -> IntArray:
        chosen = [self.by_deadline.get(float(d), self.otherwise) for d in stream.episodes.deadline_s]
        return np.array(chosen, dtype=np.intp)


def static_rewards(table: ActionTable, episodes: Episodes, reward: Reward | None = None) -> FloatArray:
    """Mean reward of every action, used for all requests: (M, A)."""
    stream = Stream(table, episodes, reward)
    shape = (len(episodes), len(table))
    actions = np.broadcast_to(np.arange(len(table)), shape)
    clocks, total = Clocks(*(np.zeros(shape) for _ in range(3))), np.zeros(shape)
    count = episodes.scenario.num_requests
    for i in range(count):
        found = stream.outcomes(actions, clocks, i)
        clocks, total = found.after, total + found.reward
    return total / count


def best_static(table: ActionTable, episodes: Episodes, reward: Reward | None = None) -> Fixed:
    """The best action in hindsight for each deadline of `episodes`, and the best for all of them together."""
    rewards = static_rewards(table, episodes, reward)
    deadlines = np.unique(episodes.deadline_s)
    best = {float(d): int(rewards[episodes.deadline_s == d].mean(axis=0).argmax()) for d in deadlines}
    return Fixed(int(rewards.mean(axis=0).argmax()), best)


# ---- Edgent -------------------------------------------------------------------------------------------------------------


def _uncompressed(table: ActionTable) -> IntArray:
    """Of the actions that differ in codec only, the one that sends most: Edgent knows no bits."""
    kept: dict[tuple[int, int], int] = {}
    for i, key in enumerate(zip(table.depths, table.cuts, strict=True)):
        if key not in kept or table.up_bytes[i] > table.up_bytes[kept[key]]:
            kept[key] = i
    return np.array(sorted(kept.values()), dtype=np.intp)


class EdgentStatic:
    """Right-sizing and partition at the conditions of the first request, kept. Too tight a deadline: the fastest plan.

    (Edgent's paper returns no plan there; requests still have to be answered in this world, so the lateness counts.)
    """

    def begin(self, stream: Stream) -> None:
        table, belief = stream.table, stream.belief
        known, depths = _uncompressed(table), np.array(table.depths)
        latency = table.latency_s(np.exp(belief.last), belief.one_way_s, np.exp(belief.device), np.exp(belief.server))
        chosen = known[latency[:, known].argmin(axis=1)]
        for depth in sorted(set(table.depths)):  # the deepest that is in time is written last
            own = known[depths[known] == depth]
            best = own[latency[:, own].argmin(axis=1)]
            in_time = latency[np.arange(len(best)), best] <= stream.episodes.deadline_s
            chosen = np.where(in_time, best, chosen)
        self._chosen: IntArray = chosen

    def decide(self, stream: Stream) -> IntArray:
        return self._chosen


class EdgentDynamic:
    """Configuration map and change points; see the file's docstring."""

    def __init__(self, bins: int = 20, expected: float = 250.0) -> None:
        self._bins, self._expected = bins, expected

    def begin(self, stream: Stream) -> None:
        table, low, high = stream.table, *np.log(stream.ranges.rate_bytes_per_s)
        size = len(stream.episodes)
        edges = np.linspace(low, high, self._bins + 1)
        self._edges, self._seen_s = edges[1:-1], np.full(size, -math.inf)
        middle = (edges[1:] + edges[:-1]) / 2
        one_way = float(stream.belief.one_way_s.mean())
        latency = table.latency_s(np.exp(middle), one_way, 1.0, 1.0)  # (bins, A)
        known, deadline = _uncompressed(table), stream.episodes.deadline_s[:, None, None]
        value = np.exp(table.accuracy[known]) + deadline / latency[None, :, known]
        late = latency[None, :, known] > deadline
        score = np.where(late, -latency[None, :, known], value)  # all late: the soonest
        self._map = known[score.argmax(axis=2)]  # (M, bins)
        self._changes = ChangePoints(size, float((low + high) / 2), 0.05, 2.0, 0.05, expected=self._expected)
        self._rate = stream.belief.last.copy()
        self._chosen = self._read()

    def _read(self) -> IntArray:
        found: IntArray = self._map[np.arange(len(self._rate)), np.searchsorted(self._edges, self._rate)]
        return found

    def decide(self, stream: Stream) -> IntArray:
        belief = stream.belief
        new = belief.timed_s > self._seen_s
        if new.any():
            self._changes.see(belief.last, new)
            run, mean = self._changes.likeliest()
            self._rate = np.where(new, np.where(run > 0, mean, belief.last), self._rate)
            self._seen_s = np.where(new, belief.timed_s, self._seen_s)
            self._chosen = self._read()
        return self._chosen


# ---- models of the world -----------------------------------------------------------------------------------------------


class Resolving:
    """Solves the table again for each request. `margin`: the rest of the way is taken to last so many times as long."""

    def __init__(self, margin: float = 1.0, latest: bool = True) -> None:
        """`latest`: believe the last rate, not the smoothed one."""
        self.margin, self.latest = margin, latest

    def begin(self, stream: Stream) -> None:
        self._link_s = np.zeros(len(stream.episodes))  # when the link should be free of what was sent
        self._server_s = np.zeros(len(stream.episodes))

    def decide(self, stream: Stream) -> IntArray:
        table, belief, now = stream.table, stream.belief, stream.now_s[:, None]
        rate = np.exp(belief.last if self.latest else belief.mean)[:, None]
        one_way, device, server = belief.one_way_s[:, None], np.exp(belief.device)[:, None], np.exp(belief.server)[:, None]
        computed = now + device * table.head_s
        sent = np.maximum(computed, self._link_s[:, None]) + table.up_bytes / rate
        served = np.maximum(sent + one_way, self._server_s[:, None]) + server * table.tail_s
        back = served + one_way + table.down_bytes / rate + device * table.back_s
        rest = np.where(table.crosses, back, computed) - now
        latency, deadline = stream.waited_s[:, None] + self.margin * rest, stream.episodes.deadline_s[:, None]
        late = -np.minimum(stream.reward.k * (latency / deadline - 1.0), stream.reward.worst)
        value = np.where(latency <= deadline, table.accuracy, late) - 1e-6 * rest  # of equals the sooner
        chosen: IntArray = value.argmax(axis=1)
        rows = np.arange(len(chosen))
        crosses = table.crosses[chosen]
        self._link_s = np.where(crosses, sent[rows, chosen], self._link_s)
        self._server_s = np.where(crosses, served[rows, chosen], self._server_s)
        return chosen


class Greedy:
    """Knows the present and the near future of its own request; the best reward now, of equals the sooner."""

    def begin(self, stream: Stream) -> None:
        self._all = np.broadcast_to(np.arange(len(stream.table)), (len(stream.episodes), len(stream.table)))

    def decide(self, stream: Stream) -> IntArray:
        clocks = stream.clocks
        wide = Clocks(clocks.device_s[:, None], clocks.link_s[:, None], clocks.server_s[:, None])
        found = stream.outcomes(self._all, wide)
        best: IntArray = (found.reward - 1e-6 * found.latency_s).argmax(axis=1)
        return best


def clairvoyant(
    table: ActionTable, episodes: Episodes, reward: Reward | None = None, buckets: int = 8, step_s: float = 0.004
) -> FloatArray:
    """Mean reward of each episode, (M,), under the schedule that dynamic programming finds with all knowledge.

    A state is how late device and link are when the next request comes, each in `buckets` of `step_s` (the last takes the
    rest); of the ways into a state the one of largest reward is kept. O(N buckets^2 A) a copy.
    """
    stream = Stream(table, episodes, reward)
    size, count, states = len(episodes), episodes.scenario.num_requests, buckets * buckets
    clocks = Clocks(*(np.zeros((size, states)) for _ in range(3)))
    total = np.full((size, states), -math.inf)
    total[:, 0] = 0.0
    actions = np.arange(len(table))
    for i in range(count):
        wide = Clocks(*(x[:, :, None] for x in (clocks.device_s, clocks.link_s, clocks.server_s)))
        found = stream.outcomes(np.broadcast_to(actions, (size, states, len(table))), wide, i)
        value = (total[:, :, None] + found.reward).reshape(size, -1)
        clocks, total = _best_by_state(found, value, episodes.arrival_s[:, i + 1], buckets, step_s)
    best: FloatArray = total.max(axis=1) / count
    return best


def _best_by_state(
    found: Outcome, value: FloatArray, next_s: FloatArray, buckets: int, step_s: float
) -> tuple[Clocks, FloatArray]:
    """Of all ways into each state the best one: its clocks and its reward so far, (M, states)."""
    size = len(value)
    parts = [x.reshape(size, -1) for x in (found.after.device_s, found.after.link_s, found.after.server_s)]
    late = [np.clip(np.ceil((x - next_s[:, None]) / step_s), 0, buckets - 1).astype(np.intp) for x in parts[:2]]
    state = late[0] * buckets + late[1]
    kept, total = np.zeros((size, buckets * buckets), dtype=np.intp), np.full((size, buckets * buckets), -math.inf)
    soonest = value - 1e-6 * sum(parts)  # of equals the one that leaves all free the sooner
    order = np.argsort(soonest, axis=1, kind="stable")
    rows = np.arange(size)[:, None]
    ordered = state[rows, order]
    kept[rows, ordered] = order  # the last written, so the best, stays
    np.maximum.at(total, (np.broadcast_to(rows, ordered.shape), ordered), value[rows, order])
    return Clocks(*(x[rows, kept] for x in parts)), total


class Network:
    """The largest output of `network`, or with `sample` a draw from the softmax of its outputs."""

    def __init__(self, network: Network_, sample: bool = False) -> None:
        self._network, self._sample = network, sample

    def begin(self, stream: Stream) -> None:
        pass

    def decide(self, stream: Stream) -> IntArray:
        with torch.no_grad():
            outputs = self._network(torch.from_numpy(stream.observe()))
        chosen = torch.distributions.Categorical(logits=outputs).sample() if self._sample else outputs.argmax(dim=-1)
        found: IntArray = chosen.numpy()
        return found
