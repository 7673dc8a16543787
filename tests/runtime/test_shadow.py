"""The shadow stream beside a real session, in memory: drift is raised when inputs or codecs change, never without change,
and no request is later, lost or other because of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from small_nets import cluster, convolutions, lines, plan

from ecotone.accuracy import AccuracyTable, Crossing
from ecotone.cost import CostModel
from ecotone.model import Captured, capture
from ecotone.plan import Plan
from ecotone.profile import Profile
from ecotone.profiling import measure_accuracy
from ecotone.protocol.drift import Drift, Returned
from ecotone.runtime import Nodes, Session, deploy, in_memory
from ecotone.runtime.shadow import Shadow
from ecotone.units import EcotoneError

pytestmark = pytest.mark.torch

PATIENCE_S = 60.0
CUT, CODEC = 3, "int6"


@pytest.fixture(scope="module")
def exact() -> Captured:
    return lines()[0]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with in_memory(cluster("a", "b")) as found:
        yield found


@pytest.fixture(scope="module")
def table(exact: Captured, tmp_path_factory: pytest.TempPathFactory) -> AccuracyTable:
    """Calibrated on 300 requests of four rows each, as `ordinary` makes them."""
    path = tmp_path_factory.mktemp("tables") / "t.json"
    given = [(ordinary(seed),) for seed in range(1000, 1300)]
    return measure_accuracy(exact, given, cuts=(CUT,), codecs=(CODEC, "fp32"), path=path)


def ordinary(seed: int) -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))


def glaring(seed: int) -> torch.Tensor:
    """Inputs that were not there in calibration: one element is so far off that 6 bits hardly resolve the others."""
    x = ordinary(seed)
    x[:, seed % 64] = -60.0
    return x


def served(captured: Captured, codec: str = CODEC) -> Plan:
    return plan(captured.graph, ("a", CUT), ("b", captured.graph.num_blocks), codec=codec)


def calibrated(captured: Captured, table: AccuracyTable) -> Callable[[Plan], float]:
    """As `ecotone run --shadow` reads it: by the cost model."""
    profile = Profile(
        graph_hash=table.graph_hash, cluster_name="t", num_blocks=captured.graph.num_blocks,
        cuts=tuple(range(captured.graph.num_blocks + 1)), segments=(), accuracy=table,
    )  # fmt: skip
    model = CostModel(captured.graph, cluster("a", "b"), profile)

    def expected(one: Plan) -> float:
        found = model.expected_disagreement(one)
        assert found is not None
        return found

    return expected


def test_no_change_raises_nothing_and_changes_no_answer(exact, table, nodes):
    told: list[object] = []
    first = served(exact)
    with deploy(first, exact, nodes) as session:
        session.listen(told.append)
        with Shadow(session, 1.0, calibrated(exact, table), patience_s=0.0, max_waiting=1000) as shadow:
            before = [session(ordinary(seed)) for seed in range(10)]
            for seed in range(200):
                session(ordinary(seed))
            assert shadow.finish(PATIENCE_S)
            assert (shadow.num_compared, shadow.num_skipped, shadow.drift) == (210, 0, None)
            assert 0 < shadow.drift_watch.recent < shadow.drift_watch.expected
            assert any("210 of 210 requests compared" in line for line in session.explanation())
        assert not [t for t in told if isinstance(t, Drift)]
        assert session.explain() == []
        assert all(torch.equal(session(ordinary(seed)), before[seed]) for seed in range(10))


def test_inputs_that_were_not_calibrated_are_drift_and_its_end_is_told(exact, table, nodes):
    told: list[object] = []
    noticed: list[object] = []
    with deploy(served(exact), exact, nodes) as session:
        session.listen(told.append)
        expected = calibrated(exact, table)
        with Shadow(session, 1.0, expected, patience_s=0.0, max_waiting=1000, on_notice=noticed.append) as shadow:
            for seed in range(60):
                session(ordinary(seed))
            assert shadow.finish(PATIENCE_S)
            assert shadow.drift is None
            for seed in range(100):
                session(glaring(seed))
            assert shadow.finish(PATIENCE_S)
            (drift,) = [t for t in told if isinstance(t, Drift)]
            assert noticed == [drift] == [shadow.drift]
            assert drift.observed > drift.expected == expected(session.plan)
            assert 50 <= drift.after <= 90
            text = "\n".join(session.explanation())
            assert "drift: " in text
            assert "calibrate again" in text
            end = time.monotonic() + PATIENCE_S
            while shadow.drift is not None and time.monotonic() < end:
                session(ordinary(shadow.num_seen))
                shadow.finish(PATIENCE_S)
            assert [type(t) for t in noticed] == [Drift, Returned]
            assert "drift is over" in "\n".join(session.explanation())


def test_a_codec_that_is_worse_than_calibrated_is_drift(exact, table, nodes):
    """What is served is int3, and the asker still believes what was calibrated for int6."""
    assert table.differing((Crossing(position=CUT, codec="int3"),)) is None
    believed = table.cell(CUT, CODEC).disagreement_high
    with (
        deploy(served(exact), exact, nodes) as session,
        Shadow(session, 1.0, lambda one: believed, patience_s=0.0, max_waiting=1000) as shadow,
    ):
        session.replan(served(exact, "int3"))
        for seed in range(60):
            session(ordinary(seed))
        assert shadow.finish(PATIENCE_S)
        assert shadow.drift is not None


def test_a_share_is_taken_and_the_same_one_again(exact, nodes):
    """By its seed: which requests were compared shows in what the reference was asked."""
    taken: list[list[float]] = []
    with deploy(served(exact, "fp32"), exact, nodes) as session:
        for seed in (5, 5, 6):
            with Shadow(session, 0.2, lambda one: 0.0, seed=seed, patience_s=0.0) as shadow:
                found: list[float] = []
                taken.append(found)
                spy(session, lambda inputs, found=found: found.append(float(inputs[0].sum())))
                for number in range(60):
                    session(ordinary(number))
                assert shadow.finish(PATIENCE_S)
                assert 2 <= shadow.num_compared == len(found) <= 30
                assert shadow.num_seen == 60
                assert shadow.drift_watch.recent == 0
                del session.captured.reference
    assert taken[0] == taken[1] != taken[2]


def spy(session: Session, look: Callable[[tuple[torch.Tensor, ...]], object]) -> None:
    original = type(session.captured).reference

    def reference(inputs):  # type: ignore[no-untyped-def]
        look(inputs)
        return original(session.captured, inputs)

    session.captured.reference = reference  # type: ignore[method-assign]


def test_a_stuck_reference_holds_up_no_request_and_memory_stays_bounded(exact, nodes):
    release = threading.Event()
    with deploy(served(exact, "fp32"), exact, nodes) as session:
        shadow = Shadow(session, 1.0, lambda one: 0.0, patience_s=0.0, max_waiting=4).start()
        try:
            spy(session, lambda inputs: release.wait(PATIENCE_S))
            expected = exact.unflatten_outputs(type(exact).reference(exact, (ordinary(0),)))
            for _ in range(50):
                assert torch.equal(session(ordinary(0)), expected)
            assert len(shadow._kept) <= 4
            assert shadow.num_skipped >= 50 - 4 - 1
            assert not shadow.finish(0.0)
            assert any("skipped for want of room" in line for line in shadow.lines())
        finally:
            release.set()
            shadow.stop()
            del session.captured.reference
    with (
        deploy(served(exact, "fp32"), exact, nodes) as session,
        Shadow(session, 1.0, lambda one: 0.0, patience_s=0.0, max_bytes=100) as small,
    ):
        session(ordinary(0))
        assert small.num_skipped == 1


def test_it_waits_for_idle_moments(exact, nodes):
    """While requests are under way nothing is compared before its patience ends."""
    nodes.set_links(cluster("a", "b", rate=2e4).links)  # a request takes tens of milliseconds
    try:
        with deploy(served(exact, "fp32"), exact, nodes) as session:
            busy: list[int] = []
            with Shadow(session, 1.0, lambda one: 0.0, patience_s=PATIENCE_S) as shadow:
                spy(session, lambda inputs: busy.append(session.num_waiting))
                for _ in session.stream((ordinary(n) for n in range(12)), in_flight=4):
                    pass
                assert shadow.finish(PATIENCE_S)
                assert shadow.num_compared == 12
            del session.captured.reference
            assert busy == [0] * 12
    finally:
        nodes.set_links(cluster("a", "b").links)


def test_inputs_may_be_written_over_after_the_answer(exact, nodes):
    hold, buffer = threading.Event(), ordinary(0).clone()
    with deploy(served(exact, "fp32"), exact, nodes) as session:
        with Shadow(session, 1.0, lambda one: 0.0, patience_s=0.0) as shadow:
            spy(session, lambda inputs: hold.wait(PATIENCE_S))
            session(buffer).zero_()  # the answer is the caller's too
            buffer.zero_()
            hold.set()
            assert shadow.finish(PATIENCE_S)
            assert (shadow.num_compared, shadow.drift_watch.recent) == (1, 0.0)
        del session.captured.reference


def test_a_fault_of_the_reference_ends_the_shadow_only(exact, nodes, capsys):
    with deploy(served(exact, "fp32"), exact, nodes) as session:
        with Shadow(session, 1.0, lambda one: 0.0, patience_s=0.0) as shadow:
            spy(session, lambda inputs: 1 / 0)
            before = session(ordinary(0))
            assert shadow.finish(PATIENCE_S)
            assert "ZeroDivisionError" in shadow.fault
            del session.captured.reference
            assert torch.equal(session(ordinary(0)), before)
            assert any("shadow stopped" in line for line in session.explanation())
        with Shadow(session, 1.0, lambda one: 1 / 0, patience_s=0.0) as shadow:
            assert torch.equal(session(ordinary(0)), before)
            assert "ZeroDivisionError" in shadow.fault
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_what_cannot_be_shadowed_is_refused(exact, nodes):
    with deploy(served(exact, "fp32"), exact, nodes) as session:
        for rate in (0.0, -1.0, 1.5):
            with pytest.raises(EcotoneError, match="must be above 0 and at most 1"):
                Shadow(session, rate, lambda one: 0.0)
    single = capture(torch.nn.Linear(64, 1).eval(), (ordinary(0),))
    local = plan(single.graph, ("a", single.graph.num_blocks))
    with deploy(local, single, nodes) as session, pytest.raises(EcotoneError, match="no output with classes"):
        Shadow(session, 0.5, lambda one: 0.0)


def test_several_outputs_are_compared_together(nodes):
    captured, x = convolutions()
    split = plan(captured.graph, ("a", 2), ("b", captured.graph.num_blocks))
    with (
        deploy(split, captured, nodes) as session,
        Shadow(session, 1.0, lambda one: 0.0, patience_s=0.0) as shadow,
    ):
        session(x)
        assert shadow.finish(PATIENCE_S)
        assert (shadow.num_compared, shadow.fault) == (1, "")
