"""Static dataflow of one setting: balance equations, one iteration, peaks of FIFOs. Exact integers; no plan is known here.

A *flow* is a FIFO from an actor to an actor; per firing its source puts `produce` tokens, its target takes `consume`. A
firing is atomic and blocking: it needs the tokens, and room for what it puts. (Lee, Messerschmitt, Proc. IEEE 75(9), 1987.)

Why one execution decides. Each flow has one source and one target, so a firing never takes tokens or room that another
actor's next firing needs: the system is persistent, and all maximal executions fire every actor equally often (Keller, LNCS
24, 1975; Karp, Miller, SIAM J. Appl. Math. 14(6), 1966). In a consistent graph an actor within its repetition count never
needs a neighbour beyond its own, so an execution in which each actor stops at its count completes, or the actors that it
leaves behind can never fire again under any schedule: a deadlock.

Why the peaks are exact. Let y fire k times and no more. The counts n that all flows allow (initial + produce n_x - consume
n_y within 0 and the capacity) have a greatest element, found by relaxation; in a live system every allowed vector is
reachable (at a stuck prefix, the actor that some continuation would fire first is enabled already). So the most tokens ever
in x -> y is the greatest of initial + produce n_x(k) - consume k over the k of one iteration, after which all repeats.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

__all__ = ["MAX_FIRINGS", "Flow", "Problem", "peaks", "repetitions", "run_iteration"]

MAX_FIRINGS = 1_000_000
"""An iteration beyond this is not executed: it would not be a plan."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Actors are numbers. `capacity` None: without limit."""

    name: str
    source: int
    target: int
    produce: int
    consume: int
    initial: int = 0
    capacity: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and the actors (in order) round which it is; `waits`: what each of them waits for."""

    reason: str
    loop: tuple[int, ...]
    waits: tuple[str, ...] = ()


def repetitions(num_actors: int, flows: Sequence[Flow]) -> list[int] | Problem:
    """Least positive firings of each actor that leave every FIFO as it was, each connected part apart; 0: no active flow."""
    ratio: list[Fraction | None] = [None] * num_actors
    parent: list[int] = list(range(num_actors))
    around: list[list[tuple[int, Fraction, Flow]]] = [[] for _ in range(num_actors)]
    for flow in flows:
        if not flow.produce and not flow.consume:
            continue
        if not flow.produce or not flow.consume:
            reason = f'"{flow.name}" is given {flow.produce} and relieved of {flow.consume} tokens per firing'
            return Problem(reason, (flow.source, flow.target))
        around[flow.source].append((flow.target, Fraction(flow.produce, flow.consume), flow))
        around[flow.target].append((flow.source, Fraction(flow.consume, flow.produce), flow))
    counts = [0] * num_actors
    for root in range(num_actors):
        if ratio[root] is not None or not around[root]:
            continue
        ratio[root], part, queue = Fraction(1), [root], deque([root])
        while queue:
            actor = queue.popleft()
            mine = ratio[actor]
            assert mine is not None
            for other, factor, flow in around[actor]:
                known = ratio[other]
                if known is None:
                    ratio[other], parent[other] = mine * factor, actor
                    part.append(other)
                    queue.append(other)
                elif known != mine * factor:
                    reason = f'"{flow.name}" ({flow.produce} put, {flow.consume} taken) does not fit the others of the loop'
                    return Problem(reason, _tree_loop(parent, actor, other))
        values = [ratio[a] or Fraction(1) for a in part]
        scale = math.lcm(*(v.denominator for v in values))
        whole = [int(v * scale) for v in values]
        divisor = math.gcd(*whole)
        for actor, count in zip(part, whole, strict=True):
            counts[actor] = count // divisor
    return counts


def _tree_loop(parent: list[int], one: int, other: int) -> tuple[int, ...]:
    """The loop that an edge between two actors closes in the tree."""
    up = [one]
    while parent[up[-1]] != up[-1]:
        up.append(parent[up[-1]])
    down = [other]
    while down[-1] not in up:
        down.append(parent[down[-1]])
    return (*up[: up.index(down[-1]) + 1], *reversed(down[:-1]))


def run_iteration(num_actors: int, flows: Sequence[Flow], counts: Sequence[int]) -> Problem | None:
    """Fire every actor as often as `counts` says, under the capacities; the loop of waiting actors where that cannot be."""
    if sum(counts) > MAX_FIRINGS:
        return Problem(f"an iteration takes {sum(counts)} firings, at most {MAX_FIRINGS} are tried; use other rates", ())
    tokens = [flow.initial for flow in flows]
    takes: list[list[int]] = [[] for _ in range(num_actors)]
    puts: list[list[int]] = [[] for _ in range(num_actors)]
    for i, flow in enumerate(flows):
        puts[flow.source].append(i)
        takes[flow.target].append(i)

    def obstacle(actor: int) -> tuple[int, str] | None:
        for i in takes[actor]:
            if tokens[i] < flows[i].consume:
                return flows[i].source, f'a token of "{flows[i].name}"'
        for i in puts[actor]:
            flow = flows[i]
            returned = flow.consume if flow.source == flow.target else 0
            if flow.capacity is not None and flow.produce and tokens[i] + flow.produce - returned > flow.capacity:
                return flow.target, f'room in "{flow.name}" ({tokens[i]} of {flow.capacity} used)'
        return None

    left = list(counts)
    todo = deque(a for a in range(num_actors) if left[a])
    while todo:
        actor = todo.popleft()
        while left[actor] and obstacle(actor) is None:
            left[actor] -= 1
            for i in takes[actor]:
                tokens[i] -= flows[i].consume
            for i in puts[actor]:
                tokens[i] += flows[i].produce
            todo.extend(flows[i].target for i in puts[actor])
            todo.extend(flows[i].source for i in takes[actor])
    if not any(left):
        return None
    walk = [next(a for a in range(num_actors) if left[a])]
    waits: list[str] = []
    while True:
        found = obstacle(walk[-1])
        assert found is not None
        waits.append(found[1])
        if found[0] in walk:
            start = walk.index(found[0])
            return Problem("each waits for the next", tuple(walk[start:]), tuple(waits[start:]))
        walk.append(found[0])


def peaks(num_actors: int, flows: Sequence[Flow], counts: Sequence[int]) -> list[int | None]:
    """The most tokens that any schedule can bring into each flow of a live graph; None: without bound."""
    limits: list[list[tuple[int, Flow, bool]]] = [[] for _ in range(num_actors)]  # by actor: whom it limits
    into: list[list[int]] = [[] for _ in range(num_actors)]
    found: list[int | None] = [flow.initial for flow in flows]
    for i, flow in enumerate(flows):
        if flow.produce and flow.source != flow.target:
            limits[flow.source].append((flow.target, flow, True))
            into[flow.target].append(i)
            if flow.capacity is not None:
                limits[flow.target].append((flow.source, flow, False))
    for actor in range(num_actors):
        for k in range(counts[actor] if into[actor] else 0):
            most = _most_firings(num_actors, limits, actor, k)
            for i in into[actor]:
                flow, firings, sofar = flows[i], most[flows[i].source], found[i]
                if firings is None or sofar is None:
                    found[i] = None
                else:
                    found[i] = max(sofar, flow.initial + flow.produce * firings - flow.consume * k)
    return found


def _most_firings(num_actors: int, limits: list[list[tuple[int, Flow, bool]]], frozen: int, k: int) -> list[int | None]:
    """How often each actor can fire while `frozen` fires at most k times; None: as often as it likes."""
    most: list[int | None] = [None] * num_actors
    most[frozen] = k
    queue, waiting = deque([frozen]), {frozen}
    while queue:
        actor = queue.popleft()
        waiting.discard(actor)
        mine = most[actor]
        assert mine is not None
        for other, flow, is_forward in limits[actor]:
            if is_forward:
                allowed = (flow.initial + flow.produce * mine) // flow.consume
            else:
                assert flow.capacity is not None
                allowed = (flow.capacity - flow.initial + flow.consume * mine) // flow.produce
            known = most[other]
            if known is None or allowed < known:
                most[other] = allowed
                if other not in waiting:
                    waiting.add(other)
                    queue.append(other)
    return most
