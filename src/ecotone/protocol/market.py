"""The joint assignment without a planner that knows all: users that choose for themselves, and keepers of queues that post
how full these are. Pure: two machines, no clock, no network.

Theory of operation. Of every queue (planner/congestion.py) a *keeper* posts three totals: L (load), M (second moment) and A
(what a second of its delay costs all who wait there: sum of w a). A *chooser*, one per user, knows its own offers and the
totals, and so for each offer both its own latency T and what the change does to everybody else:

 (1) own    w (t + sum a D(L + l, M + m))
 (2) price  sum over queues r of  A_r (D_r(L + l, M + m) - D_r(L, M))          A, L, M of the others

It moves to the offer of least own + price (a selfish one: of least own). With prices the cost of a move to its user is the
change of the joint value sum w T, so that value is an exact potential: each move makes it less, the choices are finitely
many, hence moves end, in a choice that nobody alone can make better (a Nash equilibrium; the joint optimum is one). Selfish
users have a potential only where they are alike on each queue (Rosenthal, 1973); else they may go round, so each moves at
most `most_moves` times. How much is lost against the optimum: docs/users.md.

Moves must not cross. A chooser locks the queues of its present and its wanted offer, in ascending order (so no two wait for
one another in a ring), and is told their totals as of now; it recomputes, and commits where the offer is still better by
`least_gain` and no queue would pass its limit, else lets go. A keeper that is locked answers Busy: the chooser lets go and
comes back later, after a wait of its own. A lock whose owner falls silent is dropped after `lease_s`, and what it commits
later is refused.

    resting --Tick--> locking --all Granted--> committing or letting go --> resting

Messages may be lost: what is not answered in `answer_s` is asked again; a commit that was not confirmed is made again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Busy", "Chooser", "ChooserEffect", "ChooserEvent", "Commit", "Done", "Granted", "Keeper", "KeeperEffect", "KeeperEvent",
    "Let", "Lock", "Moved", "Offered", "Part", "Posted", "Refused", "Tick", "Totals", "Wake",
]  # fmt: skip

FULL = 1.0 - 1e-12


@dataclass(frozen=True, slots=True)
class Totals:
    """L, M and A of a queue."""

    load: float = 0.0
    moment: float = 0.0
    worth: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """What an offer brings to a queue, and c of its delay (congestion.py, equation 1)."""

    load: float
    moment: float
    a: float
    factor: float = 0.5


@dataclass(frozen=True, slots=True)
class Offered:
    """One of a user's offers: seconds alone, and its part of every queue that it uses."""

    alone_s: float
    parts: Mapping[int, Part]


# ---- what is said: chooser to keeper (Lock, Commit, Let), keeper to chooser (Granted, Busy, Refused), to all (Posted) -----


@dataclass(frozen=True, slots=True)
class Lock:
    user: str
    queue: int


@dataclass(frozen=True, slots=True)
class Commit:
    """The locked queue now holds this part of the user's (None: nothing), of this weight; the lock is given up."""

    user: str
    queue: int
    part: Part | None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Let:
    """The lock is given up, nothing changed."""

    user: str
    queue: int


@dataclass(frozen=True, slots=True)
class Granted:
    """The user holds the lock; `totals` are those of the others."""

    user: str
    queue: int
    totals: Totals


@dataclass(frozen=True, slots=True)
class Busy:
    """Someone else holds the lock."""

    user: str
    queue: int


@dataclass(frozen=True, slots=True)
class Done:
    """The user's Commit was taken."""

    user: str
    queue: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A Commit without a lock: it had run out."""

    user: str
    queue: int


@dataclass(frozen=True, slots=True)
class Posted:
    """Totals of a queue, for everyone; with those of the reader's own part in them."""

    queue: int
    totals: Totals


@dataclass(frozen=True, slots=True)
class Tick:
    """A timer is due; `number` is that of its Wake."""

    number: int = 0


@dataclass(frozen=True, slots=True)
class Wake:
    """Effect: answer Tick(number) in so many seconds. 0: to look round; else that of an unanswered question."""

    after_s: float
    number: int = 0


@dataclass(frozen=True, slots=True)
class Moved:
    """Effect, for the user's own node: from now on this offer (its number)."""

    user: str
    offer: int


ChooserEvent = Tick | Granted | Busy | Done | Refused | Posted
ChooserEffect = Lock | Commit | Let | Wake | Moved
KeeperEvent = Lock | Commit | Let | Tick
KeeperEffect = Granted | Busy | Done | Refused | Posted | Wake


class Keeper:
    """Keeps one queue's parts and its lock. `lease_s`: longest that a lock is held."""

    def __init__(self, queue: int, lease_s: float = 1.0) -> None:
        self.queue, self.lease_s = queue, lease_s
        self.parts: dict[str, tuple[Part, float]] = {}  # by user, with its weight
        self._owner = ""
        self._num_locks = self._armed = 0  # number of the newest lock, and of the one whose lease counts

    def totals(self, without: str = "") -> Totals:
        """Of everyone but `without`."""
        kept = [own for user, own in sorted(self.parts.items()) if user != without]
        return Totals(
            math.fsum(p.load for p, _ in kept), math.fsum(p.moment for p, _ in kept), math.fsum(w * p.a for p, w in kept)
        )

    def handle(self, event: KeeperEvent) -> list[KeeperEffect]:
        """Take one event, return what to say and do, in order."""
        match event:
            case Lock(user=user) if self._owner in ("", user):
                self._owner = user
                self._num_locks += 1
                self._armed = self._num_locks
                return [Granted(user, self.queue, self.totals(user)), Wake(self.lease_s, self._num_locks)]
            case Lock(user=user):
                return [Busy(user, self.queue)]
            case Commit(user=user) if user != self._owner:
                return [Refused(user, self.queue)]
            case Commit(user=user, part=part, weight=weight):
                self._owner, self._armed = "", 0
                before, after = self.parts.pop(user, None), None if part is None else (part, weight)
                if after is not None:
                    self.parts[user] = after
                done: list[KeeperEffect] = [Done(user, self.queue)]
                return done if before == after else [*done, Posted(self.queue, self.totals())]
            case Let(user=user):
                if user == self._owner:
                    self._owner, self._armed = "", 0
                return []
            case Tick(number=number) if number == self._armed and self._owner:
                self._owner, self._armed = "", 0
        return []


class Chooser:
    """Chooses for one user. `pause_s`: how long it rests between looks; `spread` in [0, 1): so that users differ in that."""

    def __init__(
        self,
        user: str,
        offers: Sequence[Offered],
        weight: float = 1.0,
        *,
        is_selfish: bool = False,
        most_load: float = 0.95,
        least_gain: float = 1e-6,
        pause_s: float = 0.1,
        spread: float = 0.0,
        answer_s: float = 0.5,
        most_moves: int = 200,
    ) -> None:
        self.user, self.offers, self.weight = user, tuple(offers), weight
        self.is_selfish, self.most_load, self.least_gain = is_selfish, most_load, least_gain
        self.pause_s, self.answer_s, self.most_moves = pause_s * (0.5 + spread), answer_s, most_moves
        self.offer = -1
        self.num_moves = 0
        self._seen: dict[int, Totals] = {}
        self._is_waking = False
        self._wanted = -1  # an offer while locking
        self._to_lock: list[int] = []
        self._held: dict[int, Totals] = {}
        self._unsure: set[int] = set()  # queues whose keeper may not have our part
        self._num_busy = 0
        self._asked = 0  # number of what waits for an answer

    @property
    def is_content(self) -> bool:
        """Nothing better is known, or moves are used up."""
        return not self._is_waking and self._wanted < 0 and not self._unsure

    def begin(self) -> list[ChooserEffect]:
        """Look round for the first time after a wait."""
        return self._rest()

    def handle(self, event: ChooserEvent) -> list[ChooserEffect]:
        """Take one event, return what to say and do, in order."""
        match event:
            case Posted(queue=queue, totals=totals):
                self._seen[queue] = totals
                return self._rest() if self.is_content else []
            case Tick(number=0):
                self._is_waking = False
                return self._look() if self._wanted < 0 else []
            case Tick(number=number):
                return self._unanswered() if number == self._asked else []
            case Granted(queue=queue, totals=totals) if self._to_lock and self._to_lock[0] == queue:
                self._held[queue] = totals
                self._to_lock.pop(0)
                return self._lock_next() if self._to_lock else self._decide()
            case Granted(queue=queue):
                return [Let(self.user, queue)]
            case Busy(queue=queue) if self._to_lock and self._to_lock[0] == queue:
                self._num_busy = min(self._num_busy + 1, 4)
                return [*self._let_go(), *self._rest(2.0**self._num_busy)]
            case Done(queue=queue):
                self._unsure.discard(queue)
            case Refused():
                return self._rest()
        return []

    def _lock_next(self) -> list[ChooserEffect]:
        self._asked += 1
        return [Lock(self.user, self._to_lock[0]), Wake(self.answer_s, self._asked)]

    def _unanswered(self) -> list[ChooserEffect]:
        """A keeper did not answer: let go of what may be locked, and look again later."""
        if self._wanted < 0:
            return self._rest() if self._unsure else []
        asked = self._to_lock[:1]
        return [*self._let_go(), *(Let(self.user, queue) for queue in asked), *self._rest()]

    def _rest(self, factor: float = 1.0) -> list[ChooserEffect]:
        if self._is_waking:
            return []
        self._is_waking = True
        return [Wake(self.pause_s * factor)]

    def _look(self) -> list[ChooserEffect]:
        """By what was posted: try to move where another offer seems better; else rest until something is posted."""
        old = self.offers[self.offer].parts if self.offer >= 0 else {}
        self._held = {}
        if self._unsure:
            self._wanted, self._to_lock = max(self.offer, 0), sorted({*self._unsure, *old})
            return self._lock_next()
        others = {queue: self._without_own(queue) for offer in self.offers for queue in offer.parts}
        best = self._best(others)
        if best is None or self.num_moves >= self.most_moves:
            return []
        self._wanted, self._to_lock = best, sorted({*old, *self.offers[best].parts})
        return self._lock_next() if self._to_lock else self._decide()

    def _without_own(self, queue: int) -> Totals:
        totals = self._seen.get(queue, Totals())
        own = self.offers[self.offer].parts.get(queue) if self.offer >= 0 else None
        if own is None:
            return totals
        return Totals(
            max(totals.load - own.load, 0.0), max(totals.moment - own.moment, 0.0),
            max(totals.worth - self.weight * own.a, 0.0),
        )  # fmt: skip

    def _decide(self) -> list[ChooserEffect]:
        """All locks are held: the totals are those of now. Move if the wanted offer is still better."""
        self._num_busy = 0
        best = None if self._unsure else self._best(self._held, (self._wanted,))
        moved: list[ChooserEffect] = []
        if best is not None:
            self.offer, self.num_moves = best, self.num_moves + 1
            moved.append(Moved(self.user, best))
        for queue, totals in self._held.items():
            self._seen[queue] = self._with_own(queue, totals)
        if best is None and not self._unsure:
            return [*self._let_go(), *self._rest()]
        self._unsure = set(self._held)
        self._asked += 1
        parts = self.offers[self.offer].parts if self.offer >= 0 else {}
        commits: list[ChooserEffect] = [
            Commit(self.user, queue, parts.get(queue), self.weight) for queue in sorted(self._held)
        ]
        self._wanted, self._held = -1, {}
        return [*commits, Wake(self.answer_s, self._asked), *moved, *self._rest()]

    def _with_own(self, queue: int, totals: Totals) -> Totals:
        own = self.offers[self.offer].parts.get(queue) if self.offer >= 0 else None
        if own is None:
            return totals
        return Totals(totals.load + own.load, totals.moment + own.moment, totals.worth + self.weight * own.a)

    def _let_go(self) -> list[ChooserEffect]:
        held, self._held, self._to_lock, self._wanted = sorted(self._held), {}, [], -1
        return [Let(self.user, queue) for queue in held]

    def _best(self, others: Mapping[int, Totals], among: Sequence[int] = ()) -> int | None:
        """The offer of least cost that fits and is better than the present one; None where there is none."""
        now = self.cost(self.offer, others) if self.offer >= 0 else math.inf
        costs = {o: self.cost(o, others) for o in among or range(len(self.offers)) if o != self.offer}
        best = min(costs, key=lambda o: (costs[o], o), default=-1)
        if best < 0 or math.isinf(costs[best]):
            return None
        return best if costs[best] < now * (1 - self.least_gain) or math.isinf(now) else None

    def cost(self, offer: int, others: Mapping[int, Totals]) -> float:
        """Equation 1, and 2 where it is not selfish, beside the totals of the others; inf where a queue were too full."""
        chosen = self.offers[offer]
        own, price = chosen.alone_s, 0.0
        for queue, part in chosen.parts.items():
            totals = others.get(queue, Totals())
            if totals.load + part.load > self.most_load * (1 + 1e-9):
                return math.inf
            after = _delay(part.factor, totals.load + part.load, totals.moment + part.moment)
            own += part.a * after
            price += totals.worth * (after - _delay(part.factor, totals.load, totals.moment))
        return self.weight * own + (0.0 if self.is_selfish else price)


def _delay(factor: float, load: float, moment: float) -> float:
    return factor * moment / (1.0 - load) if load < FULL else math.inf
