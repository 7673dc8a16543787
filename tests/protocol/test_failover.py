"""Failover: runs begin elsewhere when nodes go, fail or hang; twins; boundaries kept; what ends where nothing can run.

Times follow from the rig: a stage takes COMPUTE_S = 10 ms, coding 0.5 ms, frames of 20 kB 2 ms, latency 0.1 ms.
"""

from __future__ import annotations

import pytest
from rig import COMPUTE_S, NAMES, A, B, C, D, Rig, plan

from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import request_of

pytestmark = pytest.mark.pure


def finish(rig: Rig) -> None:
    """A draining close leaves nothing anywhere."""
    rig.close()
    rig.check_nothing_left()
    assert rig.world.violations == []


def computed(rig: Rig, stage: int) -> list[int]:
    """Requests of the runs that computed this stage, in order."""
    return [request_of(body.request) for body in rig.computed if body.edge == stage]


class TestLostNodes:
    def test_what_ran_over_a_dead_node_runs_under_the_fallback_at_once(self) -> None:
        rig = Rig()
        rig.deploy(0, "bc", "aa")
        rig.submit(1, 2)
        rig.let_pass(0.012)
        rig.world.kill(B, 0.05)
        killed_s = rig.world.now_s
        rig.let_pass(1.0)
        assert rig.epochs == {1: 1, 2: 1}
        assert [(r.request, r.epoch) for r in rig.said(fx.Rerouted)] == [(1, 1), (2, 1)]
        assert rig.said(fx.Preferred)[-1] == fx.Preferred(epoch=1, reason="b cannot be reached")
        # detected after 50 ms, then two stages each on one processor
        assert rig.ended_s[2] - killed_s == pytest.approx(0.05 + 4 * COMPUTE_S, abs=0.01)
        finish(rig)

    def test_new_requests_go_back_once_the_node_is_ready_again(self) -> None:
        rig = Rig()
        rig.deploy(0, "bc", "aa")
        rig.world.kill(B, 0.0)
        rig.let_pass(0.1)
        rig.submit(1)
        rig.let_pass(0.5)
        rig.restart(B)
        rig.let_pass(0.5)
        rig.submit(2)
        rig.let_pass(0.5)
        assert rig.epochs == {1: 1, 2: 0}
        finish(rig)

    def test_a_stranded_run_may_still_win(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb", "cc")
        rig.seconds["1", 0] = 2.0
        rig.submit(1)
        rig.let_pass(0.01)
        rig.world.cut(A, B, 0.0)
        rig.let_pass(0.5)
        assert [r.epoch for r in rig.said(fx.Rerouted)] == [1]
        rig.world.heal(A, B)
        rig.let_pass(0.5)
        assert rig.epochs == {1: 0}, "the node came back with the result before the standby had one"
        rig.let_pass(3.0)
        assert rig.ends == {1: ["result"]}
        finish(rig)

    def test_without_another_plan_a_request_waits_for_the_link_and_its_run_goes_on(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb")
        rig.submit(1, 2)
        rig.let_pass(0.01)
        rig.world.cut(A, B, 0.0)
        rig.let_pass(3.0)
        assert rig.ends == {}
        rig.world.heal(A, B)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 0, 2: 0}
        assert computed(rig, 0) == [1, 2], "nothing was computed twice"
        finish(rig)

    def test_a_restarted_node_gets_its_plans_again_and_its_requests_run_again(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb", "bc")
        rig.submit(1, 2, 3)
        rig.let_pass(0.015)
        rig.world.kill(B, 0.0)
        rig.let_pass(0.2)
        rig.restart(B)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 0, 2: 0, 3: 0}
        finish(rig)

    def test_a_node_that_dies_with_a_standby_only_disturbs_nothing(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb", "cc", "aa")
        rig.submit(1)
        rig.let_pass(0.01)
        rig.world.kill(C, 0.0)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 0}
        assert rig.said(fx.Rerouted) == []
        finish(rig)

    def test_one_that_is_stuck_goes_on_under_a_new_set(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb")
        rig.submit(1)
        rig.let_pass(0.01)
        rig.world.kill(B, 0.0)
        rig.let_pass(0.5)
        rig.deploy(10, "cc")
        assert rig.epochs == {1: 10}
        finish(rig)

    def test_results_keep_their_order_through_a_failover(self) -> None:
        rig = Rig(ordered=True)
        rig.deploy(0, "bc", "aa")
        rig.submit(*range(8))
        rig.let_pass(0.03)
        rig.world.kill(C, 0.02)
        rig.let_pass(2.0)
        assert [e.request for e in rig.said(fx.Deliver)] == list(range(8))
        finish(rig)

    def test_a_node_that_dropped_the_session_meanwhile_gets_it_again(self) -> None:
        """Cut off for longer than session_timeout_s (30 s) a node frees all of an asker; then the cut heals."""
        rig = Rig()
        rig.deploy(0, "bb", "bc")
        rig.submit(1)
        rig.let_pass(0.01)
        rig.submit(2, deadline_s=100.0)
        rig.world.partition([A], 0.1)
        rig.let_pass(40.0)
        assert rig.world.machines[B].node.worker.epochs == ()
        rig.world.heal_all()
        rig.let_pass(5.0)
        assert rig.ends == {1: ["node-lost"], 2: ["result"]}, "without a deadline it ended after node_timeout_s"
        rig.submit(3)
        rig.let_pass(1.0)
        assert rig.epochs[3] == 0
        finish(rig)

    def test_a_node_that_loses_the_next_one_tells_and_the_run_ends_by_name_if_nothing_helps(self) -> None:
        rig = Rig()
        rig.deploy(0, "bc")
        rig.world.cut(B, C, 0.01)
        rig.submit(1, 2)
        rig.let_pass(5.0)
        assert rig.ends == {}, "told after 1 s, patient for 5 s more"
        rig.world.heal(B, C)
        rig.let_pass(2.0)
        assert rig.epochs == {1: 0, 2: 0}
        rig.world.cut(B, C, 0.01)
        rig.submit(*range(3, 13))
        rig.let_pass(6.5)
        assert all(rig.ends[number] == ["node-lost"] for number in range(3, 13)), "those that waited as well"
        assert "c cannot be reached from b (told by b)" in rig.said(fx.RequestError)[0].reason
        finish(rig)


class TestNothingCanRun:
    def test_a_request_without_a_deadline_ends_by_name_after_node_timeout(self) -> None:
        rig = Rig(node_timeout_s=2.0)
        rig.deploy(0, "bc", "cb")
        rig.submit(1)
        rig.let_pass(0.005)
        rig.world.kill(B, 0.0)
        lost_s = rig.world.now_s
        rig.let_pass(1.0)
        rig.submit(2)
        rig.let_pass(0.99)
        assert rig.ends == {}
        rig.let_pass(0.02)
        assert rig.ends == {1: ["node-lost"]}
        rig.let_pass(1.0)
        assert rig.ends == {1: ["node-lost"], 2: ["node-lost"]}
        assert [rig.ended_s[n] - lost_s for n in (1, 2)] == pytest.approx([2.0, 3.0], abs=0.01)
        assert "b cannot be reached" in rig.said(fx.RequestError)[0].reason

    def test_one_with_a_deadline_waits_until_then_and_is_told_the_node(self) -> None:
        rig = Rig(node_timeout_s=1.0)
        rig.deploy(0, "bc")
        rig.world.kill(B, 0.0)
        rig.let_pass(0.1)
        rig.submit(1, deadline_s=4.0)
        rig.submit(2, deadline_s=9.0)
        rig.let_pass(3.8)
        assert rig.ends == {}
        rig.let_pass(0.3)
        error = rig.said(fx.RequestError)[0]
        assert (error.request, error.kind, error.reason[:2]) == (1, ev.ErrorKind.NODE_LOST, "b ")
        rig.restart(B)
        rig.let_pass(1.0)
        assert rig.ends == {1: ["node-lost"], 2: ["result"]}
        finish(rig)

    def test_requests_are_refused_only_when_nothing_could_run_for_long(self) -> None:
        rig = Rig(node_timeout_s=1.0, queue_limit=2, max_in_flight=1)
        rig.deploy(0, "bc")
        rig.world.kill(B, 0.0)
        rig.let_pass(0.1)
        rig.submit(1, 2, 3)
        assert rig.ends == {3: ["busy"]}, "bounded by queue_limit"
        rig.let_pass(2.0)
        rig.submit(4)
        assert rig.ends[4] == ["node-lost"]
        rig.restart(B)
        rig.let_pass(0.2)
        rig.submit(5)
        rig.let_pass(0.5)
        assert rig.ends[5] == ["result"]

    def test_too_late_is_told_as_such_where_it_could_run(self) -> None:
        rig = Rig()
        rig.deploy(0, "bc")
        rig.submit(1, deadline_s=0.02)
        rig.let_pass(1.0)
        assert rig.ends == {1: ["deadline"]}
        finish(rig)


class TestFailures:
    def test_a_failed_run_is_tried_under_a_plan_that_avoids_the_node(self) -> None:
        rig = Rig()
        rig.deploy(0, "bc", "cb", "aa")
        rig.raising = {(0, 1)}  # c raises
        rig.submit(1)
        rig.let_pass(0.5)
        assert rig.epochs == {1: 2}, "plan 1 needs c as well"
        finish(rig)

    def test_where_all_fail_the_first_reason_is_told_and_the_rest(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb", "cc")
        rig.raising = {(0, 0), (1, 1)}
        rig.submit(1)
        rig.let_pass(0.5)
        error = rig.said(fx.RequestError)[0]
        assert error.kind is ev.ErrorKind.FAILED
        assert error.reason == (
            "compute of stage 0 failed: told to (told by b); then tried: compute of stage 1 failed: told to (told by c)"
        )
        finish(rig)

    def test_a_plan_not_tried_whose_node_is_lost_is_waited_for(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb", "cc")
        rig.world.kill(C, 0.0)
        rig.let_pass(0.1)
        rig.raising = {(0, 0)}
        rig.submit(1)
        rig.let_pass(1.0)
        assert rig.ends == {}
        rig.restart(C)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 1}
        rig.submit(2)
        rig.let_pass(1.0)
        assert rig.epochs[2] == 1, "a plan that failed is in doubt for a while"
        finish(rig)

    def test_waiting_for_one_ends_with_the_reason_of_the_failure(self) -> None:
        rig = Rig(node_timeout_s=1.0)
        rig.deploy(0, "bb", "cc")
        rig.world.kill(C, 0.0)
        rig.let_pass(0.1)
        rig.raising = {(0, 0)}
        rig.submit(1)
        rig.submit(2, deadline_s=0.5)
        rig.let_pass(0.6)
        assert rig.ends == {2: ["failed"]}
        rig.let_pass(1.0)
        assert rig.ends == {1: ["failed"], 2: ["failed"]}
        finish(rig)

    def test_a_node_whose_work_always_fails_is_avoided_after_the_first_request(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb", "aa")
        rig.world.machines[B].condition.failing = frozenset({"compute"})
        for number in range(1, 6):
            rig.submit(number)
            rig.let_pass(0.1)
        assert set(rig.epochs.values()) == {1}
        assert len(rig.said(fx.Rerouted)) == 1


class TestTwins:
    def test_what_both_share_is_computed_once_and_the_first_result_counts(self) -> None:
        rig = Rig()
        rig.deploy(0, "ab", "ac", active="ac")
        rig.seconds["1", 1] = 0.001
        rig.submit(1, 2)
        rig.let_pass(1.0)
        assert (computed(rig, 0), sorted(computed(rig, 1))) == ([1, 2], [1, 1, 2, 2])
        assert rig.epochs == {1: 1, 2: 1}
        assert rig.ends == {1: ["result"], 2: ["result"]}
        finish(rig)

    def test_a_twin_answers_without_waiting_for_detection(self) -> None:
        rig = Rig()
        rig.deploy(0, "bb", "cc", active="cc")
        rig.submit(1)
        rig.let_pass(0.01)
        begun_s = rig.world.now_s
        rig.world.kill(B, 10.0)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 1}
        assert rig.ended_s[1] - begun_s < 0.04
        assert rig.said(fx.Rerouted) == []
        rig.let_pass(10.0)
        finish(rig)

    def test_a_dead_twin_is_left_out(self) -> None:
        rig = Rig()
        rig.deploy(0, "ab", "ac", active="ac")
        rig.submit(1)
        rig.let_pass(0.012)
        rig.world.kill(C, 0.0)
        rig.let_pass(1.0)
        rig.submit(2)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 0, 2: 0}
        assert computed(rig, 1).count(2) == 1
        finish(rig)

    def test_a_twin_that_waits_for_a_run_which_fails_begins_by_itself(self) -> None:
        rig = Rig()
        rig.deploy(0, "ab", "ac", active="ac")
        rig.raising = {(0, 0)}
        rig.submit(1)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 1}
        finish(rig)

    def test_a_twin_does_not_wait_for_the_link_of_the_other_run(self) -> None:
        """The link to b is so slow that b's outputs pile up at the source; the shared stage is computed all the same."""
        rig = Rig(max_in_flight=8)
        rig.deploy(0, "ab", "ac", active="ac")
        rig.world.set_link(A, B, 1e-4, 2e4)  # 1 s for a body
        begun_s = rig.world.now_s
        rig.submit(*range(8))
        rig.let_pass(1.0)
        assert set(rig.epochs.values()) == {1}
        assert rig.ended_s[7] - begun_s < 8 * 2 * COMPUTE_S + 0.05
        assert len(computed(rig, 0)) == 8, "once each"
        rig.let_pass(20.0)
        finish(rig)

    def test_requests_in_flight_are_counted_not_runs(self) -> None:
        rig = Rig(max_in_flight=2)
        rig.deploy(0, "bb", "cc", active="cc")
        rig.submit(1, 2, 3)
        assert {e.request for e in rig.said(fx.Accepted)} == {1, 2, 3}
        assert rig.world.machines[A].node.worker.num_queued == 4, "two requests, two runs each"
        rig.let_pass(1.0)
        assert set(rig.ends) == {1, 2, 3}


class TestKeptBoundaries:
    def test_a_run_elsewhere_goes_on_from_the_boundary(self) -> None:
        rig = Rig()
        rig.deploy(0, "ab", "ac", "aa", boundary_bytes=100)
        rig.submit(1)
        rig.let_pass(0.013)
        assert rig.world.machines[A].node.coordinator.held_bytes == 100  # type: ignore[union-attr]
        rig.world.kill(B, 0.0)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 1}
        assert computed(rig, 0) == [1], "the stages on the source were computed once"
        assert rig.world.machines[A].node.coordinator.held_bytes == 0  # type: ignore[union-attr]
        finish(rig)

    def test_one_beyond_the_cap_is_not_kept_and_the_run_begins_with_the_inputs(self) -> None:
        rig = Rig(held_limit_bytes=1000)
        rig.deploy(0, "ab", "ac", boundary_bytes=100)
        rig.submit(1, size_bytes=950)
        rig.let_pass(0.013)
        assert rig.world.machines[A].node.coordinator.held_bytes == 950  # type: ignore[union-attr]
        rig.world.kill(B, 0.0)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 1}
        assert computed(rig, 0) == [1, 1]
        finish(rig)

    def test_inputs_beyond_the_cap_are_refused_by_name(self) -> None:
        rig = Rig(held_limit_bytes=1000)
        rig.deploy(0, "bb")
        rig.submit(1, size_bytes=600)
        rig.submit(2, size_bytes=401)
        rig.submit(3, size_bytes=1001)
        assert rig.ends == {2: ["busy"], 3: ["too-large"]}
        assert "600 of 1000 bytes are held" in rig.said(fx.RequestError)[0].reason
        rig.let_pass(1.0)
        rig.submit(4, size_bytes=1000)
        rig.let_pass(1.0)
        assert rig.ends[4] == ["result"]

    def test_a_plan_of_another_graph_begins_with_the_inputs(self) -> None:
        rig = Rig()
        rig.do(ev.DeployRequested(plan=plan("ab", 0, "large"), standbys=(ev.Resident(plan=plan("aa", 1, "small")),)))
        rig.let_pass(0.5)
        rig.submit(1)
        rig.let_pass(0.013)
        rig.world.kill(B, 0.0)
        rig.let_pass(1.0)
        assert rig.epochs == {1: 1}
        assert computed(rig, 0) == [1, 1]
        finish(rig)


class TestSuspicion:
    def warmed_up(self, *stages: str, **bounds: object) -> Rig:
        rig = Rig(**bounds)  # type: ignore[arg-type]
        rig.deploy(0, *stages)
        rig.submit(100, 101)
        rig.let_pass(1.0)
        return rig

    def test_a_stopped_node_is_found_out_and_trusted_when_it_is_heard_again(self) -> None:
        rig = self.warmed_up("bc", "aa")
        rig.submit(1)
        rig.let_pass(0.01)
        rig.world.stall(B)
        stopped_s = rig.world.now_s
        rig.let_pass(1.0)
        assert rig.epochs[1] == 1
        # patience: 1.5 times the slowest (some 40 ms) + 50 ms, 100 ms for the answer, two stages
        assert rig.ended_s[1] - stopped_s < 0.3
        assert rig.said(fx.Preferred)[-1] == fx.Preferred(epoch=1, reason="b does not answer")
        rig.world.resume(B)
        rig.let_pass(1.0)
        assert rig.said(fx.Preferred)[-1] == fx.Preferred(epoch=0, reason="b answers again")
        assert rig.ends[1] == ["result"]
        finish(rig)

    def test_a_first_request_over_a_stopped_node_is_not_lost(self) -> None:
        rig = Rig(node_timeout_s=1.0)
        rig.deploy(0, "bc", "aa")
        rig.world.stall(C)
        rig.submit(1)
        rig.submit(2, deadline_s=0.5)
        rig.let_pass(3.0)
        assert rig.epochs == {1: 1, 2: 1}, "with a deadline another run begins in time, though nothing is known yet"

    def test_two_nodes_that_do_not_reach_one_another_are_gone_round(self) -> None:
        rig = self.warmed_up("bc", "aa")
        rig.world.cut_one_way(B, C)
        for number in range(1, 11):
            rig.submit(number)
            rig.let_pass(0.05)
        rig.let_pass(1.0)
        assert all(rig.epochs[number] == 1 for number in range(1, 11))
        assert len(rig.said(fx.Rerouted)) <= 5, "once overtaken the plan is in doubt and new requests go elsewhere"
        rig.world.heal(B, C)
        rig.let_pass(5.0)
        rig.submit(20)
        rig.let_pass(1.0)
        assert rig.epochs[20] == 0, "doubt ends"
        finish(rig)

    def test_a_slow_run_gets_one_companion_not_more(self) -> None:
        rig = self.warmed_up("bb", "cc", "dd", "aa")
        rig.world.machines[B].condition.factor = 1000.0
        for node in (C, D):
            rig.world.machines[node].condition.factor = 100.0
        rig.submit(1)
        rig.let_pass(1.0)
        assert [r.epoch for r in rig.said(fx.Rerouted)] == [1]
        rig.let_pass(30.0)
        assert rig.epochs[1] == 1

    def test_on_a_link_of_1_kbit_per_s_it_does_not_thrash(self) -> None:
        """125 bytes/s: a frame takes a second, a request ten; whatever is suspected costs at most one more run each."""
        rig = Rig(rate=125.0, latency_s=0.01, chunk_bytes=8192, deploy_timeout_s=1000.0)
        rig.size_bytes = 300
        rig.deploy(0, "b", "aa", wait_s=300.0)
        for number in range(8):
            rig.submit(number)
            rig.let_pass(60.0)
        assert rig.ends == {number: ["result"] for number in range(8)}
        assert len(rig.said(fx.Rerouted)) <= 8
        # A loss doubles the doubt, from 1 s to 64 s: 7 in the first 127 s of 780, then one a minute; two changes each.
        assert len(rig.said(fx.Preferred)) <= 2 * (7 + 11)

    def test_without_another_plan_suspicion_ends_nothing(self) -> None:
        rig = self.warmed_up("bb")
        rig.world.machines[B].condition.factor = 100.0
        rig.submit(1, 2, 3)
        rig.let_pass(20.0)
        assert {n: rig.ends[n] for n in (1, 2, 3)} == {1: ["result"], 2: ["result"], 3: ["result"]}
        assert rig.said(fx.Rerouted) == []

    def test_a_lost_ping_is_sent_again(self) -> None:
        rig = self.warmed_up("bb", "aa")
        rig.world.cut_one_way(A, B)
        rig.submit(1)
        rig.let_pass(0.9)
        assert rig.epochs[1] == 1
        rig.world.heal(A, B)
        rig.let_pass(3.0)
        rig.submit(2)
        rig.let_pass(1.0)
        assert rig.epochs[2] == 0
        finish(rig)


class TestEnds:
    @pytest.mark.parametrize("ordered", [True, False])
    def test_a_cancel_in_the_middle_of_a_failover_ends_it_once(self, ordered: bool) -> None:
        rig = Rig(ordered=ordered)
        rig.deploy(0, "bb", "cc")
        rig.submit(1, 2)
        rig.let_pass(0.012)
        rig.world.cut(A, B, 0.0)
        rig.let_pass(0.005)
        rig.do(ev.CancelRequest(request=1))
        rig.let_pass(1.0)
        rig.do(ev.CancelRequest(request=2))
        rig.world.heal(A, B)
        rig.let_pass(2.0)
        assert rig.ends == {1: ["cancelled"], 2: ["result"]}
        finish(rig)

    def test_closing_in_the_middle_of_a_failover_answers_all(self) -> None:
        rig = Rig()
        rig.deploy(0, "bc", "aa")
        rig.submit(*range(10))
        rig.let_pass(0.02)
        rig.world.kill(B, 0.03)
        finish(rig)
        assert rig.ends == {number: ["result"] for number in range(10)}

    def test_an_abrupt_close_with_stranded_runs_leaves_nothing(self) -> None:
        rig = Rig()
        rig.deploy(0, "bc", "cc", "aa", boundary_bytes=7)
        rig.submit(*range(10))
        rig.let_pass(0.02)
        rig.world.cut(A, B, 0.0)
        rig.let_pass(0.001)
        rig.do(ev.CloseRequested(drain=False))
        rig.world.heal(A, B)
        rig.let_pass(10.0)
        assert all(len(ends) == 1 for ends in rig.ends.values())
        rig.check_nothing_left()

    def test_a_clock_that_is_set_back_stops_nothing(self) -> None:
        rig = Rig()
        rig.deploy(0, "bc", "aa")
        for name in NAMES:
            rig.world.set_clock(name, step_s=-100.0)
        rig.submit(1)
        rig.submit(2, deadline_s=0.001)
        rig.let_pass(0.5)
        assert rig.ends == {1: ["result"], 2: ["deadline"]}
        rig.submit(3)
        rig.let_pass(0.005)
        rig.world.set_clock(A, step_s=-3.0)
        rig.world.stall(B)
        rig.let_pass(1.0)
        assert rig.epochs[3] == 1
        rig.world.resume(B)
        finish(rig)
