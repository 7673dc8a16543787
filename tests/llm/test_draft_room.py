"""Where drafts are made: at once where that is quick, in a thread else, and never in two places at a time."""

from __future__ import annotations

import threading

import pytest

from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import Draft, DraftAsk
from ecotone.llm.draft_room import DraftRoom

pytestmark = pytest.mark.torch


class Counted:
    """Drafts the numbers that follow; says who called, and waits at `gate` while that is shut."""

    never_waits = True

    def __init__(self) -> None:
        self.callers: list[str] = []
        self.ended: list[int] = []
        self.inside, self.most_inside = 0, 0
        self.gate = threading.Event()
        self.gate.set()

    def draft(self, asks):  # type: ignore[no-untyped-def]
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.callers.append(threading.current_thread().name)
        assert self.gate.wait(20)
        self.inside -= 1
        if asks[0].count == 99:
            raise RuntimeError("no drafts today")
        return [tuple(range(len(ask.tokens), len(ask.tokens) + ask.count)) for ask in asks]

    def end(self, request: int) -> None:
        self.ended.append(request)


class Desk:
    """A room, and what it told later."""

    def __init__(self, never_waits: bool = True) -> None:
        self.drafter = Counted()
        self.drafter.never_waits = never_waits
        self.told: list[Draft] = []
        self.changed = threading.Condition()
        self.room = DraftRoom(self.drafter, self._take)
        self.room.start()

    def _take(self, drafts: tuple[Draft, ...]) -> None:
        with self.changed:
            self.told.extend(drafts)
            self.changed.notify_all()

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.told) >= count, 20)

    def ask(self, request: int, count: int = 2, ticket: int = 1) -> tuple[Draft, ...]:
        tokens = tuple(range(5))
        return self.room.ask((
            DraftAsk(request=request, ticket=ticket, tokens=tokens, num_settled=5, count=count, params=SamplingParams()),
        ))  # fmt: skip


@pytest.fixture
def desk():  # type: ignore[no-untyped-def]
    made = Desk()
    yield made
    made.drafter.gate.set()
    made.room.close(20)


def until_quick(desk: Desk, request: int = 1) -> None:
    """Ask until the room answers at once: what it knows of the drafter's speed settles."""
    for _ in range(200):
        before = len(desk.told)
        if desk.ask(request, count=8):
            return
        desk.wait(before + 1)
    pytest.fail("it never answered at once")


def test_a_quick_drafter_answers_at_once_but_never_to_what_is_new(desk: Desk) -> None:
    assert desk.ask(1) == ()
    desk.wait(1)
    assert desk.told[0].tokens == (5, 6)
    until_quick(desk)
    (draft,) = desk.ask(1, count=3, ticket=7)
    assert (draft.request, draft.ticket, draft.tokens) == (1, 7, (5, 6, 7))
    assert desk.drafter.callers[-1] == threading.current_thread().name
    before = len(desk.told)
    assert desk.ask(2) == ()  # its prompt is new to the drafter
    desk.wait(before + 1)
    assert desk.drafter.callers[-1] == "llm-drafter"
    desk.room.end(1)
    assert desk.ask(1) == ()  # it was forgotten
    desk.wait(before + 2)
    assert desk.drafter.ended == [1]


def test_nobody_else_drafts_while_the_thread_does_and_its_answers_come(desk: Desk) -> None:
    until_quick(desk)
    desk.drafter.gate.clear()
    told = len(desk.told)
    assert desk.ask(3) == ()
    assert desk.ask(1) == ()  # quick, but the thread is at work
    desk.drafter.gate.set()
    desk.wait(told + 2)
    assert desk.drafter.most_inside == 1


def test_long_asks_and_drafters_that_fail_do_not_hold_up_the_loop(desk: Desk) -> None:
    until_quick(desk)
    told = len(desk.told)
    assert desk.ask(1, count=10**6) == ()  # no drafter is so quick
    desk.wait(told + 1)
    desk.ask(4, count=99)
    desk.wait(told + 2)
    assert desk.told[-1].tokens == ()  # no drafts is an answer


def test_a_drafter_that_may_wait_is_never_called_by_the_loop() -> None:
    desk = Desk(never_waits=False)
    for count in range(60):
        assert desk.ask(1) == ()
        desk.wait(count + 1)
    assert set(desk.drafter.callers) == {"llm-drafter"}
    desk.room.close(20)
