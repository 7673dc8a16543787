"""Sessions over the in-memory wire: the whole machinery but processes and sockets, against the model run whole."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator

import pytest
import torch
from small_nets import cluster, convolutions, even, lines, plan

from ecotone import codec
from ecotone.model import Captured, ModelError
from ecotone.runtime import (
    Busy,
    Cancelled,
    DeadlinePassed,
    DeployError,
    Nodes,
    RequestError,
    Session,
    SessionClosed,
    deploy,
    in_memory,
)

pytestmark = pytest.mark.torch

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def exact() -> tuple[Captured, torch.Tensor]:
    return lines()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with in_memory(cluster("a", "b", "c")) as found:
        yield found


@pytest.fixture
def session(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> Iterator[Session]:
    with deploy(even(exact[0].graph, "a", "b", "c"), exact[0], nodes) as found:
        yield found


def slow_down(nodes: Nodes) -> None:
    """From now on one request of `lines` takes about 0.1 s on the link a>b (its input is 1 KiB)."""
    nodes.set_links(cluster("a", "b", rate=1e4).links)


@pytest.mark.parametrize(
    "devices", [("a",), ("b",), ("a", "b"), ("b", "c"), ("a", "b", "a"), ("a", "b", "c"), ("c", "a", "b")]
)
@pytest.mark.parametrize("codec_id", ["fp32", "fp32+zstd", "fp32+deflate"])
def test_lossless_plans_give_the_bits_of_the_whole_model(
    nodes: Nodes, exact: tuple[Captured, torch.Tensor], devices: tuple[str, ...], codec_id: str
) -> None:
    captured, x = exact
    expected = captured.unflatten_outputs(captured.reference((x,)))
    with deploy(even(captured.graph, *devices, codec=codec_id), captured, nodes) as session:
        assert torch.equal(session(x), expected)


def test_outputs_keep_their_structure_and_skips_cross_every_cut(nodes: Nodes) -> None:
    captured, x = convolutions()
    expected = captured.unflatten_outputs(captured.reference((x,)))
    length = captured.graph.num_blocks
    first = plan(captured.graph, ("b", length))
    with deploy(first, captured, nodes) as session:
        for cut in range(1, length):
            session.replan(plan(captured.graph, ("a", cut), ("c", length)))
            found = session(x)
            assert set(found) == {"logits", "map"}
            for name in found:  # kernels of other layouts differ in the last bits
                torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [c.name for c in codec.catalogue() if not c.is_image])
def test_every_codec_ends_within_its_own_error(nodes: Nodes, exact: tuple[Captured, torch.Tensor], name: str) -> None:
    """One cut: the oracle encodes and decodes the frontier by itself and runs the rest of the model eagerly."""
    captured, x = exact
    length, cut = captured.graph.num_blocks, captured.graph.num_blocks // 2
    frontier = captured.segment(0, cut).module()(x)
    packed = codec.pack([(s.name, t) for s, t in zip(captured.segment(0, cut).outputs, frontier, strict=True)], name)
    tail = captured.segment(cut, length)
    result = tail.module()(*codec.unpack(packed, tail.inputs))
    back = codec.unpack(codec.pack([("y", t) for t in result], name))
    with deploy(plan(captured.graph, ("a", cut), ("b", length), codec=name), captured, nodes) as session:
        assert torch.equal(session(x), captured.unflatten_outputs(back))


def test_a_picture_travels_as_jpeg_at_cut_zero(nodes: Nodes) -> None:
    captured, x = convolutions()
    spec = codec.ImageSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    chosen = plan(captured.graph, ("b", captured.graph.num_blocks), codec="fp32")
    chosen = type(chosen)(
        graph_hash=chosen.graph_hash, stages=chosen.stages,
        transfers=(type(chosen.transfers[0])(source="a", target="b", position=0, codec="png"), *chosen.transfers[1:]),
    )  # fmt: skip
    exact_picture = torch.round(x * 255) / 255
    expected = captured.unflatten_outputs(captured.reference((exact_picture,)))
    with deploy(chosen, captured, nodes, image=spec) as session:
        found = session(exact_picture)
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-5)


def test_streams_keep_order_and_never_have_more_under_way_than_asked(
    session: Session, exact: tuple[Captured, torch.Tensor]
) -> None:
    captured, x = exact
    taken, finished = 0, 0

    def items() -> Iterator[torch.Tensor]:
        nonlocal taken
        for i in range(40):
            taken += 1
            assert taken - finished <= 4  # three under way and the one now taken
            yield x + i

    for i, found in enumerate(session.stream(items(), in_flight=3)):
        finished += 1
        assert torch.equal(found, captured.unflatten_outputs(captured.reference((x + i,))))
    assert finished == 40


def test_unordered_streams_give_every_result_once(session: Session, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    found = {float(y.sum()) for y in session.stream((x * i for i in range(12)), in_flight=4, ordered=False)}
    assert found == {float(captured.reference((x * i,))[0].sum()) for i in range(12)}


def test_the_plan_moves_under_load_and_nothing_is_lost(session: Session, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    stop, counts, failures = threading.Event(), [0, 0], []

    def load(worker: int) -> None:
        expected = captured.unflatten_outputs(captured.reference((x,)))
        while not stop.is_set():
            try:
                if not torch.equal(session(x), expected):
                    failures.append("wrong result")
            except Exception as error:
                failures.append(str(error))
            counts[worker] += 1

    workers = [threading.Thread(target=load, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for devices in (("b", "a"), ("c",), ("a",), ("a", "c", "b"), ("b", "c")):
        before = session.plan.epoch
        session.replan(even(captured.graph, *devices))
        assert session.plan.epoch == before + 1
    stop.set()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert not failures
    assert min(counts) > 0


def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(session: Session) -> None:
    for wrong in (torch.randn(4, 63), torch.zeros(4, 64, dtype=torch.int64)):
        with pytest.raises(ModelError):
            session.submit((wrong,))
    assert session.report() == ()


def test_a_plan_that_does_not_fit_leaves_the_old_one(session: Session, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    before = session.plan
    with pytest.raises(DeployError, match="names device 'nowhere'"):
        session.replan(even(captured.graph, "a", "nowhere"))
    with pytest.raises(DeployError, match=r"no-such:fp32.*is not known"):
        session.replan(even(captured.graph, "a", "b", executor="no-such:fp32"))
    assert session.plan == before
    assert torch.equal(session(x), captured.unflatten_outputs(captured.reference((x,))))


def test_a_full_queue_says_busy_and_what_was_accepted_ends(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    with in_memory(cluster("a", "b")) as nodes, deploy(
        plan(captured.graph, ("b", captured.graph.num_blocks)), captured, nodes, queue_limit=2, max_in_flight=1
    ) as session:  # fmt: skip
        slow_down(nodes)
        futures = [session.submit((x,)) for _ in range(8)]
        ended = [future.exception(PATIENCE_S) for future in futures]
    assert any(isinstance(error, Busy) for error in ended)
    assert any(error is None for error in ended)
    assert all(error is None or isinstance(error, Busy) for error in ended)


def test_deadlines_and_cancelling_end_one_request_and_no_other(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    whole = plan(captured.graph, ("b", captured.graph.num_blocks))
    with in_memory(cluster("a", "b")) as nodes, deploy(whole, captured, nodes) as session:
        slow_down(nodes)
        kept = session.submit((x,))
        late = session.submit((x,), deadline_s=0.001)
        unwanted = session.submit((x,))
        session.cancel(unwanted)
        assert isinstance(late.exception(PATIENCE_S), DeadlinePassed)
        assert isinstance(unwanted.exception(PATIENCE_S), Cancelled)
        assert torch.equal(kept.result(PATIENCE_S), captured.unflatten_outputs(captured.reference((x,))))
        with pytest.raises(RequestError, match="above zero"):
            session.submit((x,), deadline_s=0.0)


def test_closing_drains_and_then_refuses(exact: tuple[Captured, torch.Tensor], nodes: Nodes) -> None:
    captured, x = exact
    session = deploy(even(captured.graph, "a", "b"), captured, nodes)
    futures = [session.submit((x,)) for _ in range(6)]
    session.close()
    session.close()
    assert all(future.exception(0) is None for future in futures)
    with pytest.raises(SessionClosed, match="closed"):
        session.submit((x,))


def test_no_thread_outlives_its_nodes(exact: tuple[Captured, torch.Tensor]) -> None:
    before = set(threading.enumerate())
    captured, x = exact
    with in_memory(cluster("a", "b")) as nodes, deploy(even(captured.graph, "a", "b"), captured, nodes) as session:
        session(x)
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) <= before


def test_the_trace_accounts_for_each_stage_and_transfer(session: Session, exact: tuple[Captured, torch.Tensor]) -> None:
    session(exact[1])
    (trace,) = session.report()
    assert [stage.device for stage in trace.stages] == ["a", "b", "c"]
    assert [(t.source, t.target) for t in trace.transfers] == [("a", "b"), ("b", "c"), ("c", "a")]
    assert 0 < trace.accounted_s <= trace.total_s
    assert all(t.size_bytes >= 4 * 64 * 4 and t.transfer_s > 0 for t in trace.transfers)


def test_emulated_slowness_stretches_the_very_execution(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    slow = cluster("a", "b", slowdown=8.0)
    with (
        in_memory(slow) as nodes,
        deploy(plan(captured.graph, ("b", captured.graph.num_blocks)), captured, nodes) as session,
    ):
        for _ in range(5):
            session(x)
        for trace in session.report():
            assert trace.stages[0].compute_s >= 8 * trace.stages[0].own_s > 0


def test_a_shaped_link_takes_bytes_over_rate_plus_latency(exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    whole = plan(captured.graph, ("b", captured.graph.num_blocks))
    with in_memory(cluster("a", "b")) as nodes, deploy(whole, captured, nodes) as session:
        nodes.set_links(cluster("a", "b", rate=5e4, latency_s=0.03).links)
        session(x)
        for transfer in session.report()[0].transfers:
            assert transfer.transfer_s >= 0.03 + transfer.size_bytes / 5e4


def test_two_sessions_at_once_are_refused_by_name(
    session: Session, exact: tuple[Captured, torch.Tensor], nodes: Nodes
) -> None:
    with pytest.raises(Exception, match="open already"):
        deploy(even(exact[0].graph, "a"), exact[0], nodes)
    assert session(exact[1]) is not None


def test_a_raising_segment_fails_its_request_and_not_the_node(
    session: Session, exact: tuple[Captured, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured, x = exact
    stages = session.nodes._threads["b"][0].shell._stages  # the node is a thread of this process
    found = stages.get

    def poisoned(number: int, epoch: int, index: int) -> object:
        raise ArithmeticError("division of the sea")

    monkeypatch.setattr(stages, "get", poisoned)
    with pytest.raises(RequestError, match=r"stage 1 on b.*division of the sea"):
        session.submit((x,)).result(PATIENCE_S)
    monkeypatch.setattr(stages, "get", found)
    assert torch.equal(session(x), captured.unflatten_outputs(captured.reference((x,))))


def test_futures_are_plain_futures(session: Session, exact: tuple[Captured, torch.Tensor]) -> None:
    futures = [session.submit((exact[1],)) for _ in range(3)]
    done, left = concurrent.futures.wait(futures, PATIENCE_S)
    assert len(done) == 3
    assert not left
