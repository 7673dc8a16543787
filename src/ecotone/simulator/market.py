"""Users that choose for themselves, on a virtual clock: the machines of protocol/market.py with messages that take time.

`settle` lets every user of a joint problem (planner/congestion.py) look round, lock, move and post until nobody wants to, or
the time is over. Messages take a random time around `delay_s`, and are lost with a chance of `loss`: locks then run out, and
a chooser that hears nothing looks again. Not traffic: requests are not simulated here (simulator/users.py does that).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from ecotone.planner.congestion import Congestion, IntArray
from ecotone.protocol import market as mk

__all__ = ["Settled", "offered", "settle"]


@dataclass(frozen=True, slots=True)
class Settled:
    """Where users came to: `choice` (N,), -1 for those that found no offer; after each move how many had one, and the value.

    `seconds`: until the last move. `is_quiet`: nobody wants to move any more.
    """

    choice: IntArray
    trail: tuple[tuple[int, float], ...]
    num_moves: int
    seconds: float
    is_quiet: bool


def offered(problem: Congestion, user: int) -> tuple[mk.Offered, ...]:
    """A user's offers as its chooser knows them: parts of one queue added up."""
    rows, found = problem.rows[user], []
    for o in range(len(rows.alone)):
        parts: dict[int, mk.Part] = {}
        for k, queue in enumerate(rows.queue[o].tolist()):
            if queue < len(problem.queues):
                before = parts.get(queue, mk.Part(0.0, 0.0, 0.0, problem.queues[queue].factor))
                parts[queue] = mk.Part(
                    before.load + float(rows.load[o, k]), before.moment + float(rows.m[o, k]),
                    before.a + float(rows.a[o, k]), before.factor,
                )  # fmt: skip
        found.append(mk.Offered(float(rows.alone[o]), parts))
    return tuple(found)


def settle(
    problem: Congestion,
    *,
    is_selfish: bool = False,
    delay_s: float = 0.01,
    loss: float = 0.0,
    seed: int = 0,
    until_s: float = 600.0,
    most_moves: int = 200,
) -> Settled:
    """Let users choose until nobody wants to move; `until_s` of virtual time at most."""
    fair = _Fair(problem, is_selfish, delay_s, loss, np.random.default_rng(seed), most_moves)
    return fair.run(until_s)


class _Fair:
    """All choosers and keepers, and the messages between them."""

    def __init__(
        self,
        problem: Congestion,
        is_selfish: bool,
        delay_s: float,
        loss: float,
        random: np.random.Generator,
        most_moves: int,
    ) -> None:
        self.problem, self.delay_s, self.loss, self.random = problem, delay_s, loss, random
        weight = problem.weight / problem.weight.sum()
        self.choosers = {
            party.name: mk.Chooser(
                party.name, offered(problem, u), float(weight[u]), is_selfish=is_selfish, most_load=problem.most_load,
                spread=float(random.random()), pause_s=10 * delay_s, answer_s=20 * delay_s, most_moves=most_moves,
            )
            for u, party in enumerate(problem.parties)
        }  # fmt: skip
        self.keepers = {q: mk.Keeper(q, 100 * delay_s) for q in range(len(problem.queues))}
        users: dict[int, list[str]] = {}
        for name, chooser in self.choosers.items():
            for queue in {q for offer in chooser.offers for q in offer.parts}:
                users.setdefault(queue, []).append(name)
        self.readers = users
        self.now_s, self.moved_s, self.order = 0.0, 0.0, 0
        self.heap: list[tuple[float, int, str, int, object]] = []
        self.choice = np.full(len(problem.parties), -1, dtype=np.intp)
        self.index = {party.name: u for u, party in enumerate(problem.parties)}
        self.trail: list[tuple[int, float]] = []

    def run(self, until_s: float) -> Settled:
        for name, chooser in self.choosers.items():
            self._carry_out(name, chooser.begin())
        while self.heap and self.heap[0][0] <= until_s:
            self.now_s, _, name, queue, event = heapq.heappop(self.heap)
            if name:
                self._carry_out(name, self.choosers[name].handle(event))  # type: ignore[arg-type]
            else:
                self._post(queue, self.keepers[queue].handle(event))  # type: ignore[arg-type]
        moves = sum(chooser.num_moves for chooser in self.choosers.values())
        quiet = all(chooser.is_content for chooser in self.choosers.values())
        return Settled(self.choice, tuple(self.trail), moves, self.moved_s, quiet)

    def _at(self, time_s: float, name: str, queue: int, event: object) -> None:
        self.order += 1
        heapq.heappush(self.heap, (time_s, self.order, name, queue, event))

    def _message(self, name: str, queue: int, event: object) -> None:
        if self.loss and self.random.random() < self.loss:
            return
        self._at(self.now_s + self.delay_s * (0.5 + self.random.random()), name, queue, event)

    def _carry_out(self, name: str, effects: list[mk.ChooserEffect]) -> None:
        for effect in effects:
            match effect:
                case mk.Wake(after_s=after_s, number=number):
                    self._at(self.now_s + after_s, name, -1, mk.Tick(number))
                case mk.Moved(offer=offer):
                    self.choice[self.index[name]], self.moved_s = offer, self.now_s
                    self.trail.append((int((self.choice >= 0).sum()), self.problem.value(self.choice)))
                case mk.Lock(queue=queue) | mk.Commit(queue=queue) | mk.Let(queue=queue):
                    self._message("", queue, effect)

    def _post(self, queue: int, effects: list[mk.KeeperEffect]) -> None:
        for effect in effects:
            match effect:
                case mk.Wake(after_s=after_s, number=number):
                    self._at(self.now_s + after_s, "", queue, mk.Tick(number))
                case mk.Posted():
                    for reader in self.readers.get(queue, ()):
                        self._message(reader, -1, effect)
                case mk.Granted(user=user) | mk.Busy(user=user) | mk.Done(user=user) | mk.Refused(user=user):
                    self._message(user, -1, effect)
