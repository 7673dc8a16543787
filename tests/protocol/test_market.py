"""The machines by which users choose for themselves: what a keeper grants, what a chooser does with it, what is lost."""

from __future__ import annotations

import math

import pytest

from ecotone.protocol.market import (
    Busy,
    Chooser,
    Commit,
    Done,
    Granted,
    Keeper,
    Let,
    Lock,
    Moved,
    Offered,
    Part,
    Posted,
    Refused,
    Tick,
    Totals,
    Wake,
)

pytestmark = pytest.mark.pure

HALF = Part(0.5, 0.01, 1.0)
HOME, SERVER = Offered(0.3, {}), Offered(0.1, {7: HALF})


def test_a_keeper_lets_one_in_at_a_time_and_posts_what_changed() -> None:
    keeper = Keeper(7, lease_s=2.0)
    assert keeper.handle(Lock("a", 7)) == [Granted("a", 7, Totals()), Wake(2.0, 1)]
    assert keeper.handle(Lock("b", 7)) == [Busy("b", 7)]
    assert keeper.handle(Commit("a", 7, HALF, 3.0)) == [Done("a", 7), Posted(7, Totals(0.5, 0.01, 3.0))]
    assert keeper.handle(Lock("b", 7))[0] == Granted("b", 7, Totals(0.5, 0.01, 3.0))
    assert keeper.handle(Let("b", 7)) == []
    assert keeper.handle(Lock("a", 7))[0] == Granted("a", 7, Totals()), "of the others"
    assert keeper.handle(Commit("a", 7, HALF, 3.0)) == [Done("a", 7)], "nothing new, nothing posted"
    keeper.handle(Lock("a", 7))
    assert keeper.handle(Commit("a", 7, None)) == [Done("a", 7), Posted(7, Totals())]


def test_a_lock_runs_out_and_what_is_committed_later_is_refused() -> None:
    keeper = Keeper(7)
    keeper.handle(Lock("a", 7))
    assert keeper.handle(Tick(1)) == []
    assert keeper.handle(Lock("b", 7))[0] == Granted("b", 7, Totals())
    assert keeper.handle(Commit("a", 7, HALF)) == [Refused("a", 7)]
    assert keeper.handle(Let("a", 7)) == []
    assert keeper.handle(Tick(1)) == [], "the lease of a lock that is gone"
    assert keeper.handle(Commit("b", 7, HALF))[0] == Done("b", 7)
    assert keeper.totals() == Totals(0.5, 0.01, 1.0)


def test_costs_are_the_formulas() -> None:
    """D = 0.5 M / (1 - L): beside L = 0.2, M = 0.01, A = 4 a user of L = 0.5, M = 0.01 waits 0.5 * 0.02 / 0.3."""
    others = {7: Totals(0.2, 0.01, 4.0)}
    after, before = 0.5 * 0.02 / 0.3, 0.5 * 0.01 / 0.8
    chooser = Chooser("a", (HOME, SERVER), weight=2.0)
    assert chooser.cost(1, others) == pytest.approx(2.0 * (0.1 + after) + 4.0 * (after - before))
    assert Chooser("a", (HOME, SERVER), weight=2.0, is_selfish=True).cost(1, others) == pytest.approx(2.0 * (0.1 + after))
    assert math.isinf(chooser.cost(1, {7: Totals(0.5, 0.01, 1.0)})), "1.0 is more than may be promised"
    assert chooser.cost(0, others) == pytest.approx(0.6)


def test_a_chooser_locks_looks_again_and_commits() -> None:
    chooser = Chooser("a", (HOME, SERVER), pause_s=1.0, spread=0.5)
    assert chooser.begin() == [Wake(1.0)]
    lock = chooser.handle(Tick())
    assert lock == [Lock("a", 7), Wake(0.5, 1)]
    assert chooser.handle(Tick()) == [], "it is at it"
    done = chooser.handle(Granted("a", 7, Totals()))
    assert done == [Commit("a", 7, HALF, 1.0), Wake(0.5, 2), Moved("a", 1), Wake(1.0)]
    assert chooser.handle(Done("a", 7)) == []
    assert chooser.handle(Tick()) == []
    assert chooser.is_content
    assert chooser.handle(Posted(7, Totals(0.6, 0.02, 2.0))) == [Wake(1.0)], "something changed: it looks again"


def test_a_chooser_that_finds_the_queue_fuller_than_it_thought_lets_go() -> None:
    chooser = Chooser("a", (SERVER,), pause_s=1.0, spread=0.5)
    chooser.begin()
    chooser.handle(Tick())
    assert chooser.handle(Granted("a", 7, Totals(0.5, 0.01, 1.0))) == [Let("a", 7), Wake(1.0)]
    assert chooser.offer == -1
    assert chooser.handle(Tick()) == [], "now it knows"


def test_a_chooser_comes_back_after_a_busy_keeper_a_silent_one_and_a_lock_that_ran_out() -> None:
    chooser = Chooser("a", (SERVER,), pause_s=1.0, spread=0.5)
    chooser.begin()
    chooser.handle(Tick())
    assert chooser.handle(Busy("a", 7)) == [Wake(2.0)]
    assert chooser.handle(Tick()) == [Lock("a", 7), Wake(0.5, 2)]
    assert chooser.handle(Tick(1)) == [], "of an earlier question"
    assert chooser.handle(Tick(2)) == [Let("a", 7), Wake(1.0)], "no answer: what may be locked is let go"
    assert chooser.handle(Granted("a", 7, Totals())) == [Let("a", 7)], "too late"
    chooser.handle(Tick())
    assert Commit("a", 7, HALF, 1.0) in chooser.handle(Granted("a", 7, Totals()))
    chooser.handle(Tick())
    assert chooser.handle(Granted("a", 7, Totals()))[0] == Commit("a", 7, HALF, 1.0), "not confirmed: made again"
    assert not chooser.is_content
    chooser.handle(Refused("a", 7))
    chooser.handle(Tick())
    chooser.handle(Granted("a", 7, Totals()))
    chooser.handle(Done("a", 7))
    chooser.handle(Tick())
    assert chooser.is_content
    assert chooser.num_moves == 1


def test_locks_are_taken_in_one_order() -> None:
    both = Offered(0.1, {9: HALF, 3: HALF, 5: HALF})
    chooser = Chooser("a", (both,))
    chooser.begin()
    asked = []
    effects = chooser.handle(Tick())
    while isinstance(effects[0], Lock):
        asked.append(effects[0].queue)
        effects = chooser.handle(Granted("a", effects[0].queue, Totals()))
    assert asked == [3, 5, 9]
    assert [e.queue for e in effects if isinstance(e, Commit)] == [3, 5, 9]
