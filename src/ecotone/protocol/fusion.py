"""Fan-in that tolerates a missing branch (T3 of Edge-PRUNE's fault-tolerant topologies, arXiv:2206.08152). Pure.

Theory of operation. N branches each give one token per frame; the fusing actor fires once per frame, on the tokens that are
there. A failure is a change of rate: per frame a branch has rate 1 (it is waited for) or 0 (it is not).

    open -> waits for every branch of rate 1 -> fires when all of these have come, failed, or passed their time,
            and at least `least_present` have come: for these it waits up to `give_up_s`

The time of a branch is the 99th percentile of its lateness (token after opening) over its last frames plus a margin.
`dead_after` frames in a row that a branch lets pass, or being told, set its rate to 0; hearing anything of it, also a late
token, sets it back to 1 for frames opened from then on. Meanwhile it is asked for one frame at a time, so that it can be
heard again. Tokens are told apart by (branch, frame) alone: one that comes twice or too late is discarded. At most
`max_open` frames are open, so at most max_open * N tokens are held. It does no I/O and has no clock: the shell calls
`passed` at `due_s`.

Not here: how tokens travel, and what fusing computes (runtime/fan_in.py).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ecotone import schema

__all__ = ["Ask", "Discard", "Effect", "Fire", "Fusion", "FusionSettings", "Refuse", "Unfused"]

_PERCENTILE = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionSettings:
    """Patience and bounds, in seconds and frames. `first_wait_s` holds until a branch was heard `min_heard` times.

    `least_present`: with fewer branches a frame is not fused; it ends with an error once all have failed or `give_up_s` have
    passed. `ordered`: frames end in the order of their opening.
    """

    num_branches: int
    first_wait_s: float = 1.0
    margin_s: float = 0.05
    longest_wait_s: float = 2.0
    give_up_s: float = 10.0
    min_heard: int = 8
    window: int = 128
    dead_after: int = 3
    max_open: int = 16
    least_present: int = 1
    ordered: bool = True

    def __post_init__(self) -> None:
        schema.check("fusion settings", self._violations())

    def _violations(self) -> Iterator[str]:
        whole = {
            "num_branches": self.num_branches, "min_heard": self.min_heard, "window": self.window,
            "dead_after": self.dead_after, "max_open": self.max_open,
        }  # fmt: skip
        for name, value in whole.items():
            if value < 1:
                yield f"{name} is {value}, must be 1 or more"
        if not 0 <= self.least_present <= self.num_branches:
            yield f"least_present is {self.least_present}, there are {self.num_branches} branches"
        if not 0 <= self.margin_s <= self.longest_wait_s or not 0 < self.first_wait_s <= self.longest_wait_s:
            yield "margin_s and first_wait_s must lie between 0 and longest_wait_s"
        if self.give_up_s < self.longest_wait_s:
            yield f"give_up_s is {self.give_up_s}, less than longest_wait_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Let `branch` work on `frame`; answer arrived or failed."""

    branch: int
    frame: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fire:
    """Fuse `frame` from the tokens of the branches `present` (ascending, never empty unless least_present is 0)."""

    frame: int
    present: tuple[int, ...]
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfused:
    """`frame` ends without a result: fewer than `least_present` branches came. Its tokens may be freed."""

    frame: int
    present: tuple[int, ...]
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Discard:
    """Free the token of (branch, frame) just handed in: it came twice, too late or unasked."""

    branch: int
    frame: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """`frame` was not opened, and why; nothing is held of it."""

    frame: int
    reason: str


Effect = Ask | Fire | Unfused | Discard | Refuse


@dataclass(slots=True)
class _Frame:
    opened_s: float
    due_s: dict[int, float]  # branches that it waits for, and until when
    asked: set[int]
    present: set[int] = field(default_factory=set)
    is_given_up: bool = False


@dataclass(slots=True)
class _Branch:
    lateness_s: deque[float]
    is_live: bool = True
    num_passed: int = 0  # frames in a row that it let pass
    num_asked: int = 0  # asked and neither arrived nor failed


class Fusion:
    """The machine; every method returns the effects to carry out, in order. Frame numbers ascend and are never reused."""

    def __init__(self, settings: FusionSettings) -> None:
        self.settings = settings
        self._branches = [_Branch(deque(maxlen=settings.window)) for _ in range(settings.num_branches)]
        self._open: OrderedDict[int, _Frame] = OrderedDict()
        self._ended: OrderedDict[int, _Frame] = OrderedDict()  # of late: what their tokens still say of lateness
        self._newest = -1

    @property
    def num_open(self) -> int:
        """Frames opened and not ended."""
        return len(self._open)

    @property
    def num_held(self) -> int:
        """Tokens that the shell holds for open frames."""
        return sum(len(f.present) for f in self._open.values())

    @property
    def live(self) -> tuple[int, ...]:
        """Branches of rate 1."""
        return tuple(i for i, branch in enumerate(self._branches) if branch.is_live)

    @property
    def due_s(self) -> float | None:
        """When `passed` is to be called, if nothing happens before."""
        waits = [due for frame in self._open.values() for due in frame.due_s.values()]
        waits += [f.opened_s + self.settings.give_up_s for f in self._open.values() if not f.due_s and not self._may_end(f)]
        return min(waits, default=None)

    def wait_s(self, branch: int) -> float:
        """The receive timeout of a branch: how long after its opening a frame waits for it."""
        settings, heard = self.settings, sorted(self._branches[branch].lateness_s)
        if len(heard) < settings.min_heard:
            return settings.first_wait_s
        late_s = heard[math.ceil(_PERCENTILE * len(heard)) - 1]
        return min(late_s + settings.margin_s, settings.longest_wait_s)

    def open(self, frame: int, now_s: float) -> list[Effect]:
        """A frame begins: ask every branch of rate 1, and each other one that owes nothing."""
        if frame <= self._newest:
            return [Refuse(frame=frame, reason=f"frame {frame} is not above {self._newest}, the newest so far")]
        if len(self._open) >= self.settings.max_open:
            return [Refuse(frame=frame, reason=f"{len(self._open)} frames are open already; ask again later")]
        self._newest = frame
        asked = {i for i, branch in enumerate(self._branches) if branch.is_live or branch.num_asked == 0}
        due_s = {i: now_s + self.wait_s(i) for i in asked if self._branches[i].is_live}
        self._open[frame] = _Frame(now_s, due_s, set(asked))
        for i in asked:
            self._branches[i].num_asked += 1
        return [*(Ask(branch=i, frame=frame) for i in sorted(asked)), *self._fire()]

    def arrived(self, branch: int, frame: int, now_s: float) -> list[Effect]:
        """A token came. What was not asked for is discarded and says nothing."""
        known = self._open.get(frame) or self._ended.get(frame)
        if known is None or branch not in known.asked:
            return [Discard(branch=branch, frame=frame)]
        self._answered(known, branch)
        self._heard(branch)
        self._branches[branch].lateness_s.append(now_s - known.opened_s)
        if frame not in self._open:
            return [Discard(branch=branch, frame=frame)]
        known.present.add(branch)
        return self._fire()

    def failed(self, branch: int, frame: int) -> list[Effect]:
        """The branch says that this token will not come; that it can say so does not make it live."""
        known = self._open.get(frame) or self._ended.get(frame)
        if known is None or branch not in known.asked:
            return []
        self._answered(known, branch)
        if frame in self._open:
            self._let_pass(branch)
        return self._fire()

    def branch_down(self, branch: int) -> list[Effect]:
        """Told that a branch is dead: rate 0, also for the frames that are open."""
        self._silence(branch)
        return self._fire()

    def branch_up(self, branch: int) -> list[Effect]:
        """Told that a branch lives: frames opened from now on wait for it."""
        self._heard(branch)
        return []

    def passed(self, now_s: float) -> list[Effect]:
        """Time has passed: frames stop waiting for what is due."""
        for frame in self._open.values():
            for branch in sorted(i for i, due in frame.due_s.items() if due <= now_s):
                if frame.due_s.pop(branch, None) is not None:
                    self._let_pass(branch)
            frame.is_given_up |= frame.opened_s + self.settings.give_up_s <= now_s
        return self._fire()

    def close(self) -> list[Effect]:
        """End every open frame now, with the tokens that are there."""
        for frame in self._open.values():
            frame.due_s.clear()
            frame.is_given_up = True
        return self._fire()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _answered(self, frame: _Frame, branch: int) -> None:
        frame.asked.discard(branch)
        frame.due_s.pop(branch, None)
        self._branches[branch].num_asked -= 1

    def _heard(self, branch: int) -> None:
        self._branches[branch].is_live, self._branches[branch].num_passed = True, 0

    def _let_pass(self, branch: int) -> None:
        self._branches[branch].num_passed += 1
        if self._branches[branch].num_passed >= self.settings.dead_after:
            self._silence(branch)

    def _silence(self, branch: int) -> None:
        self._branches[branch].is_live = False
        for frame in self._open.values():
            frame.due_s.pop(branch, None)

    def _may_end(self, frame: _Frame) -> bool:
        has_enough = len(frame.present) >= self.settings.least_present
        return not frame.due_s and (has_enough or not frame.asked or frame.is_given_up)

    def _fire(self) -> list[Effect]:
        effects: list[Effect] = []
        for number in list(self._open):
            frame = self._open[number]
            if not self._may_end(frame):
                if self.settings.ordered:
                    break
                continue
            del self._open[number]
            effects.append(self._ending(number, frame))
            self._ended[number] = frame
            while len(self._ended) > self.settings.window:
                _, oldest = self._ended.popitem(last=False)
                for branch in oldest.asked:  # what was not heard by now never will be: it may be asked again
                    self._branches[branch].num_asked -= 1
        return effects

    def _ending(self, number: int, frame: _Frame) -> Effect:
        present = tuple(sorted(frame.present))
        missing = tuple(i for i in range(self.settings.num_branches) if i not in frame.present)
        if len(present) < self.settings.least_present:
            return Unfused(frame=number, present=present, missing=missing)
        return Fire(frame=number, present=present, missing=missing)
