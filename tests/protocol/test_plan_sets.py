"""Plan sets: what is in force and when, standbys that are late or fail, preference, pauses, retirement."""

from __future__ import annotations

import pytest
from rig import A, B, C, D, Rig, asked

from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import Deploy, NodeId
from ecotone.protocol.notices import Post

pytestmark = pytest.mark.pure


def epochs_at(rig: Rig, name: str) -> set[int]:
    """Epochs that the node has."""
    return {epoch for _, epoch in rig.world.machines[NodeId(name)].node.worker.epochs}


def test_the_primary_and_each_ready_standby_are_told() -> None:
    rig = Rig()
    rig.deploy(3, "bc", "cb", "aa")
    told = rig.deployed()
    assert told[0] == (3, ""), "standbys are told after the primary"
    assert sorted(told) == [(3, ""), (4, ""), (5, "")]
    assert rig.said(fx.Preferred) == [fx.Preferred(epoch=3, reason="plan 3 is ready")]


def test_a_standby_whose_node_is_dead_does_not_hold_the_set_up_and_joins_when_it_is_back() -> None:
    rig = Rig(deploy_timeout_s=2.0)
    rig.world.kill(D, 0.0)
    rig.deploy(0, "bc", "dd", "aa")
    assert rig.deployed() == [(0, ""), (2, "")]
    rig.let_pass(2.0)
    assert [(epoch, "joins" in error) for epoch, error in rig.deployed()] == [(1, True)], "late"
    rig.restart(D)
    rig.let_pass(1.0)
    assert rig.deployed() == [(1, "")]


def test_a_standby_that_fails_is_left_out_and_retired() -> None:
    rig = Rig()
    rig.world.machines[D].condition.prepare_error = "no memory"
    rig.deploy(0, "bc", "bd", "aa")
    assert sorted(rig.deployed()) == [(0, ""), (1, "d: no memory"), (2, "")]
    assert epochs_at(rig, "b") == {0}


def test_a_primary_that_fails_leaves_the_old_set_in_force_and_nothing_of_the_new() -> None:
    rig = Rig()
    rig.deploy(0, "bc", "aa")
    rig.deployed()
    rig.world.machines[D].condition.prepare_error = "no memory"
    rig.deploy(10, "bd", "cb", "aa")
    assert rig.deployed() == [(10, "d: no memory")]
    assert (epochs_at(rig, "a"), epochs_at(rig, "b"), epochs_at(rig, "c")) == ({0, 1}, {0}, {0})
    rig.submit(1)
    rig.let_pass(0.5)
    assert rig.epochs == {1: 0}


def test_a_primary_whose_node_is_lost_is_given_up_after_node_timeout() -> None:
    rig = Rig(node_timeout_s=1.0)
    rig.deploy(0, "bc", "aa")
    rig.deployed()
    rig.world.kill(D, 0.0)
    rig.deploy(10, "bd", wait_s=0.9)
    assert rig.deployed() == []
    rig.let_pass(0.2)
    assert rig.deployed() == [(10, "d cannot be reached for 1 s")]


def test_a_set_begins_with_a_standby_where_nothing_else_can_run() -> None:
    """As an asker that comes back while the node of its primary is dead."""
    rig = Rig()
    rig.world.kill(B, 0.0)
    rig.let_pass(0.01)
    rig.do(asked(0, "bc", "aa"))
    rig.submit(7, is_recorded=True, deadline_s=1.0)
    rig.let_pass(0.5)
    assert rig.deployed() == [(0, ""), (1, "")]
    assert rig.epochs == {7: 1}
    rig.restart(B)
    rig.let_pass(0.5)
    rig.submit(8)
    rig.let_pass(0.5)
    assert rig.epochs[8] == 0, "the primary has joined"


def test_a_newer_set_takes_over_and_the_old_one_goes_when_its_last_request_has_ended() -> None:
    rig = Rig()
    rig.deploy(0, "bc", "aa")
    rig.seconds["0", 1] = 0.3  # c is slow under the old plan
    rig.submit(1)
    rig.let_pass(0.05)
    rig.deploy(10, "cb", "ab", wait_s=0.05)
    assert epochs_at(rig, "b") == {0, 10, 11}
    rig.submit(2)
    rig.let_pass(0.6)
    assert rig.epochs == {1: 0, 2: 10}
    assert epochs_at(rig, "b") == {10, 11}
    assert rig.said(fx.Rerouted) == []


def test_an_epoch_of_a_set_must_be_above_the_one_before() -> None:
    rig = Rig()
    rig.deploy(5, "bc", "aa")
    rig.deployed()
    rig.do(asked(6, "bc"))
    assert rig.deployed() == [(6, "epoch 6 is not above 6, the newest so far")]


def test_preferring_a_resident_plan_loads_nothing_and_moves_new_requests_only() -> None:
    rig = Rig()
    rig.deploy(0, "bc", "dd", "aa")
    rig.said(fx.Preferred)
    before = rig.world.machines[B].node.worker
    rig.submit(1)
    rig.do(ev.Prefer(epoch=1))
    rig.do(ev.Prefer(epoch=99))
    rig.submit(2)
    rig.let_pass(0.5)
    assert rig.said(fx.Preferred) == [fx.Preferred(epoch=1, reason="asked for")]
    assert rig.epochs == {1: 0, 2: 1}
    assert len(rig.deployed()) == 3
    assert rig.world.machines[B].node.worker is before


def test_a_plan_of_the_set_on_its_way_can_be_preferred_beforehand() -> None:
    rig = Rig()
    rig.do(asked(0, "bc", "aa"))
    rig.do(ev.Prefer(epoch=1))
    rig.let_pass(0.5)
    rig.submit(1)
    rig.let_pass(0.5)
    assert rig.epochs == {1: 1}


class TestPause:
    """Memory does not hold old and new together."""

    def test_the_old_set_is_drained_and_retired_before_the_new_one_is_deployed(self) -> None:
        rig = Rig(max_in_flight=1)
        rig.deploy(0, "bc", "aa")
        rig.deployed()
        rig.seconds["0", 1] = 0.3
        rig.submit(1, 2, 3)
        rig.let_pass(0.05)
        rig.do(asked(10, "cb", pause=True))
        rig.let_pass(0.1)
        assert (epochs_at(rig, "b"), rig.deployed()) == ({0}, [])
        rig.let_pass(1.0)
        assert rig.epochs == {1: 0, 2: 10, 3: 10}
        assert rig.deployed() == [(10, "")]
        assert epochs_at(rig, "b") == {10}
        rig.close()
        rig.check_nothing_left()

    def test_where_the_new_set_fails_requests_wait_for_the_next(self) -> None:
        rig = Rig(max_in_flight=1, node_timeout_s=0.5)
        rig.deploy(0, "bc", "aa")
        rig.deployed()
        rig.world.machines[D].condition.prepare_error = "no memory"
        rig.submit(1, 2, 3)
        rig.do(asked(10, "bd", pause=True))
        rig.let_pass(2.0)
        assert rig.deployed() == [(10, "d: no memory")]
        rig.submit(4)
        rig.let_pass(2.0)
        assert rig.epochs == {1: 0}, "nobody is dropped, though no plan is in force for longer than node_timeout_s"
        rig.deploy(20, "bc", "aa", wait_s=1.0)
        assert rig.epochs == {1: 0, 2: 20, 3: 20, 4: 20}
        rig.close()
        rig.check_nothing_left()

    def test_the_old_set_is_not_given_up_for_one_whose_node_is_away(self) -> None:
        rig = Rig()
        rig.deploy(0, "bc", "aa")
        rig.deployed()
        rig.world.kill(D, 0.0)
        rig.let_pass(0.1)
        rig.do(asked(10, "bd", pause=True))
        assert rig.deployed() == [(10, "d cannot be reached; the old plan stays")]
        rig.submit(1)
        rig.let_pass(0.5)
        assert rig.epochs == {1: 0}

    def test_a_stranded_run_does_not_hold_the_pause_up(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb")
        rig.submit(1)
        rig.let_pass(0.01)
        rig.world.cut(A, B, 0.0)
        rig.let_pass(0.1)
        rig.do(asked(10, "cc", pause=True))
        rig.let_pass(1.0)
        assert rig.epochs == {1: 10}
        rig.world.heal(A, B)
        rig.let_pass(1.0)
        rig.close()
        rig.check_nothing_left()

    def test_a_session_that_drains_in_a_pause_answers_everything(self) -> None:
        rig = Rig(max_in_flight=1)
        rig.deploy(0, "bc")
        rig.submit(1, 2, 3)
        rig.do(asked(10, "cb", pause=True))
        rig.close(5.0)
        assert rig.ends == {1: ["result"], 2: ["result"], 3: ["result"]}
        rig.check_nothing_left()


def test_closing_while_a_set_is_deployed_ends_the_deployment_by_name() -> None:
    rig = Rig()
    rig.deploy(0, "bc")
    rig.deployed()
    rig.world.machines[C].condition.prepare_s = 100.0
    rig.do(asked(10, "cb", "aa"))
    rig.close(5.0)
    assert rig.deployed() == [(10, "the session was closed")]
    assert rig.said(fx.Closed)
    rig.check_nothing_left()


def test_a_second_asker_with_the_same_session_is_refused() -> None:
    rig = Rig()
    rig.deploy(0, "bc", "aa")
    letter = Deploy(session=5, epoch=7, plan_json=asked(7, "bc").plan.to_json())
    answers = rig.world.machines[B].node.worker.letter(C, letter, 0.0)
    assert [type(a) for a in answers] == [Post]
    assert "belongs to another asker" in answers[0].content.reason  # type: ignore[union-attr]
