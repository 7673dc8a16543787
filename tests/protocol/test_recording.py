"""Accepted only once recorded: the journal in front of acceptance, and requests of an asker that came back."""

from __future__ import annotations

import pytest
from rig import A, Rig

from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev

pytestmark = pytest.mark.pure


@pytest.fixture
def rig() -> Rig:
    """A journal that takes 50 ms per request."""
    made = Rig(record=True, queue_limit=4, max_in_flight=2, ordered=True)
    made.deploy(0, "bb", "aa")
    made.world.machines[A].condition.record_s = 0.05
    return made


def test_a_request_is_accepted_when_it_is_recorded(rig: Rig) -> None:
    rig.submit(1)
    rig.submit(1)
    rig.let_pass(0.04)
    assert rig.said(fx.Accepted) == []
    rig.let_pass(0.02)
    assert [type(e) for e in rig.log if isinstance(e, fx.Record | fx.Accepted)] == [fx.Record, fx.Accepted]
    rig.let_pass(0.5)
    assert rig.ends == {1: ["result"]}
    assert len(rig.said(fx.Record)) == 1, "asked for once"


def test_a_journal_that_cannot_write_refuses_by_name(rig: Rig) -> None:
    rig.world.machines[A].condition.record_error = "disk full"
    rig.submit(1)
    rig.let_pass(0.5)
    assert rig.said(fx.RequestError) == [
        fx.RequestError(request=1, kind=ev.ErrorKind.UNRECORDED, reason="not written to the journal: disk full")
    ]
    assert rig.said(fx.Accepted) == []
    rig.world.machines[A].condition.record_error = ""
    rig.submit(2)
    rig.let_pass(0.5)
    assert rig.ends == {1: ["unrecorded"], 2: ["result"]}


@pytest.mark.parametrize(("deadline_s", "end"), [(0.02, "deadline"), (None, "cancelled")])
def test_one_that_ends_while_it_is_recorded_ends_once_and_is_never_accepted(
    rig: Rig, deadline_s: float | None, end: str
) -> None:
    rig.submit(1, deadline_s=deadline_s)
    rig.let_pass(0.01)
    if deadline_s is None:
        rig.do(ev.CancelRequest(request=1))
    rig.let_pass(1.0)
    rig.do(ev.Recorded(request=1))
    assert rig.ends == {1: [end]}
    assert rig.said(fx.Accepted) == []
    rig.close()
    rig.check_nothing_left()


def test_what_was_recorded_before_is_accepted_at_once_even_beyond_the_queue(rig: Rig) -> None:
    for number in range(10):
        rig.submit(number, is_recorded=True)
    assert rig.said(fx.Record) == []
    assert len(rig.said(fx.Accepted)) == 10
    rig.let_pass(1.0)
    assert rig.ends == {number: ["result"] for number in range(10)}


def test_requests_being_recorded_count_as_waiting(rig: Rig) -> None:
    rig.submit(*range(6))
    assert rig.ends == {4: ["busy"], 5: ["busy"]}


def test_one_that_is_recorded_late_holds_nobody_up(rig: Rig) -> None:
    """Results come in the order of acceptance."""
    rig.world.machines[A].condition.record_s = 0.5
    rig.submit(1)
    rig.world.machines[A].condition.record_s = 0.01
    rig.submit(2, 3, 4)
    rig.let_pass(0.3)
    assert [e.request for e in rig.said(fx.Deliver)] == [2, 3, 4]
    rig.let_pass(1.0)
    assert [e.request for e in rig.said(fx.Deliver)] == [1]


def test_closing_waits_for_what_is_being_recorded(rig: Rig) -> None:
    rig.submit(1, 2)
    rig.close(2.0)
    assert rig.ends == {1: ["result"], 2: ["result"]}
    rig.check_nothing_left()


def test_an_abrupt_close_ends_what_is_being_recorded(rig: Rig) -> None:
    rig.submit(1, 2)
    rig.do(ev.CloseRequested(drain=False))
    rig.let_pass(2.0)
    assert rig.ends == {1: ["closed"], 2: ["closed"]}
    rig.check_nothing_left()
