"""Best first over problems and slices of their bottleneck: which to search, in which order, and when nothing better is left.

An objective "sum + w * maximum" (first token: the slowest of stages and links, once per chunk) or "the larger of both"
(throughput) has a weak bound, since the least sum and the least maximum belong to different plans. So a problem is parted
by the maximum: in the slice (low, high] every stage and link keeps to `high` and the maximum counts as `low`, so the bound
is off by the slice's width at most. Slices are halved, least bound first, until they are thin or beaten, then searched.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from ecotone.planner.generation.bounds import Rest
from ecotone.planner.generation.labels import Forms
from ecotone.planner.generation.problem import Problem
from ecotone.planner.generation.search import EQUAL, Found, sweep

__all__ = ["Explored", "explore"]

THIN = 1.02  # a slice of so little width is searched as it is
NEAR = 0.02  # and one whose bound is so near to the best plan


@dataclass(slots=True)
class _Node:
    problem: Problem
    rest: Rest
    low: float = 0.0
    high: float = math.inf
    is_tight: bool = False
    is_swept: bool = False


@dataclass(slots=True)
class Explored:
    """The best of all problems with the problem it is of; `bound`: no plan of any has less. What is less than `gap` better
    is not looked for."""

    gap: float = EQUAL
    value: float = math.inf
    bound: float = math.inf
    best: tuple[Problem, Found] | None = None
    _waiting: list[tuple[float, int, _Node]] = field(default_factory=list)
    _number: itertools.count[int] = field(default_factory=itertools.count)

    def push(self, node: _Node, least: float = 0.0) -> None:
        root = max(node.rest.root(), least)
        if root < self.to_beat:
            heapq.heappush(self._waiting, (root, next(self._number), node))

    @property
    def to_beat(self) -> float:
        return self.value * (1 - self.gap) if math.isfinite(self.value) else math.inf

    def take(self, problem: Problem, found: Found) -> None:
        if found.path is not None and found.value < self.value:
            self.value, self.best = found.value, (problem, found)

    def pop(self) -> tuple[float, _Node] | None:
        if self._waiting and self._waiting[0][0] < self.to_beat:
            root, _, node = heapq.heappop(self._waiting)
            return root, node
        return None

    def leave(self, bound: float) -> None:
        """Time is over: what was not looked at bounds what is known."""
        self.bound = min([self.bound, bound, *(root for root, _, _ in self._waiting)])


def explore(problems: Iterable[Problem], deadline: float, gap: float = 0.0) -> Explored:
    """Search all `problems` for the one best plan; stops at `deadline` (time.perf_counter) with what is proven by then.

    `gap`: a plan that is proven to be within this share of the best will do.
    """
    made = Explored(gap=max(gap, EQUAL))
    for problem in problems:
        made.push(_Node(problem, Rest(problem, Forms(problem))))
    while (popped := made.pop()) is not None:
        root, node = popped
        if time.perf_counter() > deadline and made.best is not None:  # a first plan is always looked for
            made.leave(root)
            break
        _look_into(made, root, node, deadline)
    made.bound = min(made.bound, made.value * (1 - gap) if made.best is not None else math.inf)
    return made


def _look_into(made: Explored, root: float, node: _Node, deadline: float) -> None:
    """The next step with a node: a better bound, a quick plan, two halves, or the exact search. It goes back into the queue
    where its bound rose, so that work goes to the least bound."""
    problem, rest = node.problem, node.rest
    if not node.is_tight:
        rest.tighten(made.value)
        node.is_tight = True
        made.push(node, root)
        return
    column = _sliced_by(rest.forms)
    if not node.is_swept and math.isinf(node.high):
        quick = sweep(problem, rest, made.value, math.inf, exact=False)
        made.take(problem, quick)
        node.is_swept, node.is_tight = True, False  # now that there is a value to aim at
        if quick.bound < made.to_beat:
            made.push(node, root)
        return
    low, high = rest.range(column) if math.isinf(node.high) and column >= 0 else (node.low, node.high)
    if column < 0 or root >= made.value * (1 - NEAR) or high <= low * THIN or low <= 0:
        found = sweep(problem, rest, made.value, deadline, exact=True, gap=made.gap)
        made.take(problem, found)
        made.bound = min(made.bound, max(found.bound, root))
        return
    middle = math.sqrt(low * high)
    for below, above in ((low, middle), (middle, high)):
        part = problem.between(rest.forms.used[column], below, above)
        made.push(_Node(part, Rest(part, rest.forms), below, above), root)


def _sliced_by(forms: Forms) -> int:
    """The maximum that the objective weighs; -1 where it weighs none."""
    for _, weights, limit in forms.rows:
        if limit is None and len(weights) and weights.max() > 0:
            return int(weights.argmax())
    return -1
