"""Two machines, a model with branches, any additive objective: the exact placement by a minimum cut (DADS, INFOCOM 2019).

Blocks on the source side of the cut run on the *first* machine, which holds the inputs; the others on the *second*. Nothing
returns to the first but results, so the first's blocks are closed under "comes before" (an ideal), and the placement is a
plan of two stages on a graph in another order. Legend: S, T the two sides; c(v), d(v) what block v adds on the first and the
second; x(t) what tensor t adds when it is handed over; all in the unit of the objective.
 1. s -> v of capacity d(v), v -> t of capacity c(v).
 2. Tensor u with several readers: one node a, u -> a of capacity x, a -> each reader without limit: paid once, not per edge.
 3. Reader -> maker without limit, so nothing goes back.
 4. What is paid once whatever the amount (the latency of a link, the fixed cost of a stage or a codec) hangs on a node that
    is on side T as soon as one of its members is: s -> e of that capacity, e -> member without limit. All of it is
    submodular, so one cut is exact; no case is tried apart.
 5. A plan hands its whole frontier on (`relayed`): results made early cross and come home with the rest. Direct: each
    result goes home from where it was made.
Flow: Dinic's blocking flows on floats. An augmentation subtracts the least residual from itself, so at least one edge
becomes zero exactly, and levels only grow: O(V^2 E) whatever the numbers. Rounding reaches the flow's value only; the cut is
valued anew from the problem, and value and flow enclose the optimum (`bound`).
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, replace

from ecotone.planner.objective import PlannerError

__all__ = ["FlowNetwork", "Parcel", "TwoTier", "TwoTierCut", "least_two_tier", "two_tier_value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A tensor: made by block `maker` (-1: a model input, on the first machine), read by blocks `readers`.

    `send`: what handing it over adds. `is_result`: the model returns it; `home`: what bringing it home from the second adds.
    """

    maker: int
    readers: tuple[int, ...]
    send: float
    is_result: bool = False
    home: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoTier:
    """A placement problem; block v adds `first[v]` or `second[v]` (inf: cannot run there).

    The rest is paid once: where any block is on the first (`first_fixed`) or second (`second_fixed`), something is handed
    over (`send_fixed`), results come home from the second (`home_fixed`), or nothing was handed over and the results leave
    from the first (`stay_fixed`). `ends_at_second`: results are wanted there, so they are handed over in any case.
    """

    first: tuple[float, ...]
    second: tuple[float, ...]
    parcels: tuple[Parcel, ...]
    first_fixed: float = 0.0
    second_fixed: float = 0.0
    send_fixed: float = 0.0
    home_fixed: float = 0.0
    stay_fixed: float = 0.0
    ends_at_second: bool = False
    relayed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoTierCut:
    """The blocks on the first machine, what the placement adds up to, and the flow: a proven lower bound on any other."""

    first: frozenset[int]
    value: float
    bound: float


def two_tier_value(problem: TwoTier, first: Set[int]) -> float:
    """What a placement adds up to; inf where something would return to the first machine."""
    count = len(problem.first)
    second = set(range(count)) - set(first)
    handed_over = bool(second) or problem.ends_at_second
    total = sum(problem.first[v] for v in first) + sum(problem.second[v] for v in second)
    total += (problem.first_fixed if first else 0.0) + (problem.second_fixed if second else 0.0)
    total += problem.send_fixed if handed_over else problem.stay_fixed
    any_home = handed_over if problem.relayed else False
    for parcel in problem.parcels:
        made_first = parcel.maker < 0 or parcel.maker in first
        read_second = any(r in second for r in parcel.readers)
        if not made_first and any(r in first for r in parcel.readers):
            return math.inf
        carried = parcel.is_result and (problem.ends_at_second or (problem.relayed and handed_over))
        if made_first and (read_second or carried):
            total += parcel.send
        if parcel.is_result and not problem.relayed and not made_first:
            total += parcel.home
            any_home = True
        elif parcel.is_result and problem.relayed and handed_over:
            total += parcel.home
    return total + (problem.home_fixed if any_home else 0.0)


def least_two_tier(problem: TwoTier) -> TwoTierCut:
    """The placement of least value; raises PlannerError where every one is impossible."""
    best = _least(problem, None)
    if len(best.first) < len(problem.first) or best.bound >= best.value or problem.ends_at_second:
        return best
    # Cheaper only by handing over with no block on the second: then all stays, or some block that none reads is there.
    read = {p.maker for p in problem.parcels if p.readers}
    others = [_least(problem, v) for v in range(len(problem.first)) if v not in read and math.isfinite(problem.second[v])]
    bound = min(best.value, *(other.bound for other in others)) if others else best.value
    return replace(min((best, *others), key=lambda cut: cut.value), bound=bound)


def _least(problem: TwoTier, forced: int | None) -> TwoTierCut:
    """The least cut, with block `forced` on the second machine; its bound also counts handing over without a block there."""
    count = len(problem.first)
    network, source, sink, end = FlowNetwork(count + 3), count, count + 1, count + 2
    for v in range(count):
        network.edge(source, v, problem.second[v])
        network.edge(v, sink, math.inf if v == forced else problem.first[v])
        network.edge(end, v, math.inf)
    _fixed_charges(network, problem, source, sink)
    over = problem.send_fixed
    for parcel in problem.parcels:
        maker = source if parcel.maker < 0 else parcel.maker
        readers = list(dict.fromkeys(parcel.readers))
        for reader in readers if parcel.maker >= 0 else ():
            network.edge(reader, parcel.maker, math.inf)
        if parcel.is_result and (problem.relayed or problem.ends_at_second):
            readers.append(end)
        if parcel.is_result and problem.relayed:
            over += parcel.home
        network.once(maker, readers, parcel.send)
    over += problem.home_fixed if problem.relayed else 0.0
    network.edge(source, end, over)
    network.edge(end, sink, math.inf if problem.ends_at_second else problem.stay_fixed)
    flow, side = network.cut(source, sink)
    chosen = frozenset(v for v in range(count) if side[v])
    value = two_tier_value(problem, chosen)
    return TwoTierCut(first=chosen, value=value, bound=min(flow, value))


def _fixed_charges(network: FlowNetwork, problem: TwoTier, source: int, sink: int) -> None:
    """Rule 4 for the stages, and for results that go home directly."""
    blocks = range(len(problem.first))
    if problem.first_fixed:
        used = network.node()
        network.edge(used, sink, problem.first_fixed)
        for v in blocks:
            network.edge(v, used, math.inf)
    network.once(source, list(blocks), problem.second_fixed)
    if problem.relayed:
        return
    makers = [p.maker for p in problem.parcels if p.is_result and p.maker >= 0]
    network.once(source, makers, problem.home_fixed)
    for parcel in problem.parcels:
        if parcel.is_result and parcel.maker >= 0:
            network.edge(source, parcel.maker, parcel.home)


class FlowNetwork:
    """A directed network with capacities (inf: no limit) and its least cut between two nodes."""

    def __init__(self, num_nodes: int) -> None:
        self._edges: list[list[int]] = [[] for _ in range(num_nodes)]  # by node: numbers of edges that leave it
        self._head: list[int] = []
        self._room: list[float] = []

    def node(self) -> int:
        """A new node."""
        self._edges.append([])
        return len(self._edges) - 1

    def edge(self, tail: int, head: int, capacity: float) -> None:
        """An edge; one without capacity is left out."""
        if capacity > 0:
            for start, stop, room in ((tail, head, capacity), (head, tail, 0.0)):
                self._edges[start].append(len(self._head))
                self._head.append(stop)
                self._room.append(room)

    def once(self, tail: int, heads: list[int], capacity: float) -> None:
        """`capacity` is cut once as soon as `tail` is on the source's side and any of `heads` is not."""
        if capacity > 0 and len(heads) == 1:
            self.edge(tail, heads[0], capacity)
        elif capacity > 0 and heads:
            shared = self.node()
            self.edge(tail, shared, capacity)
            for head in heads:
                self.edge(shared, head, math.inf)

    def cut(self, source: int, sink: int) -> tuple[float, list[bool]]:
        """The value of a maximum flow, and for each node whether it is on the source's side of a least cut.

        Raises PlannerError where every cut is infinite. To be called once: it uses the capacities up.
        """
        flow = 0.0
        while True:
            level = self._levels(source)
            if level[sink] < 0:
                return flow, [one >= 0 for one in level]
            at = [0] * len(self._edges)
            while (path := self._path(source, sink, level, at)) is not None:
                amount = min(self._room[e] for e in path)
                if math.isinf(amount):
                    raise PlannerError("no placement: some block can run on neither machine, or only where it must not")
                flow += amount
                for e in path:
                    self._room[e] -= amount
                    self._room[e ^ 1] += amount

    def _levels(self, source: int) -> list[int]:
        """Edges with room from the source to each node; -1: out of reach."""
        level = [-1] * len(self._edges)
        level[source] = 0
        layer = [source]
        while layer:
            found = []
            for tail in layer:
                for e in self._edges[tail]:
                    head = self._head[e]
                    if self._room[e] > 0 and level[head] < 0:
                        level[head] = level[tail] + 1
                        found.append(head)
            layer = found
        return level

    def _path(self, source: int, sink: int, level: list[int], at: list[int]) -> list[int] | None:
        """Edges of a path with room along ascending levels; `at` says up to where each node's edges are used up."""
        path: list[int] = []
        node = source
        while node != sink:
            edges = self._edges[node]
            while at[node] < len(edges):
                e = edges[at[node]]
                if self._room[e] > 0 and level[self._head[e]] == level[node] + 1:
                    break
                at[node] += 1
            else:
                if not path:
                    return None
                node = self._head[path.pop() ^ 1]
                at[node] += 1
                continue
            path.append(e)
            node = self._head[e]
        return path
