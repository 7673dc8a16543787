"""Node processes over loopback: they start, die, drain, restart with a half download, and never outlive their parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_nets import cluster, even, lines, plan

from ecotone.cluster import DeviceId
from ecotone.model import Captured
from ecotone.runtime import ChildError, NodeLost, Nodes, NodeUnreachable, SessionClosed, attach, deploy, launch
from ecotone.runtime.children import Child
from ecotone.runtime.stages import CapturedModel
from ecotone.runtime.store import Store
from ecotone.units import EcotoneError

pytestmark = pytest.mark.loopback

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def exact() -> tuple[Captured, torch.Tensor]:
    return lines()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with launch(cluster("a", "b", "c")) as found:
        yield found


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, fail after PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_three_processes_give_the_bits_of_the_whole_model(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    expected = captured.unflatten_outputs(captured.reference((x,)))
    pids = nodes.pids
    assert sorted(pids) == ["b", "c"]
    with deploy(even(captured.graph, "a", "b", "c"), captured, nodes) as session:
        assert all(torch.equal(y, expected) for y in session.stream([x] * 10))
        session.replan(even(captured.graph, "c", "a"))
        assert torch.equal(session(x), expected)
    with deploy(even(captured.graph, "b"), captured, nodes) as session:  # the processes serve the next session
        assert torch.equal(session(x), expected)
        assert session.report()[0].transfers[0].transfer_s > 0
    nodes.close()
    eventually(lambda: all(is_gone(pid) for pid in pids.values()))


def test_a_killed_node_ends_its_requests_by_name_and_later_plans_without_it_run(
    nodes: Nodes, exact: tuple[Captured, torch.Tensor]
) -> None:
    captured, x = exact
    with deploy(even(captured.graph, "a", "b", "c"), captured, nodes, node_timeout_s=1.0) as session:
        session(x)
        nodes.set_links(cluster("a", "b", "c", rate=2e3).links)  # the next requests are still on their way when b dies
        waiting = [session.submit((x,)) for _ in range(3)]
        nodes.children[DeviceId("b")].kill()
        for future in waiting:
            error = future.exception(PATIENCE_S)
            assert isinstance(error, NodeLost)
            assert "b" in str(error)
        with pytest.raises(NodeUnreachable, match="node b"):
            session.replan(even(captured.graph, "b"))
        nodes.set_links(cluster("a", "b", "c").links[:2])
        session.replan(even(captured.graph, "a"))
        assert torch.equal(session(x), captured.unflatten_outputs(captured.reference((x,))))


def test_a_node_told_to_stop_drains_what_was_accepted(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> None:
    captured, x = exact
    expected = captured.unflatten_outputs(captured.reference((x,)))
    with deploy(even(captured.graph, "a", "b"), captured, nodes) as session:
        session(x)
        nodes.set_links(cluster("a", "b", "c", rate=2e4).links)
        accepted = [session.submit((x,)) for _ in range(6)]
        child = nodes.children[DeviceId("b")]
        child.terminate()
        assert all(torch.equal(future.result(PATIENCE_S), expected) for future in accepted)
        assert child.wait(PATIENCE_S) == 0
        with pytest.raises(SessionClosed, match="node b is shutting down"):
            session.submit((x,))


def test_a_cut_download_goes_on_where_it_stopped(exact: tuple[Captured, torch.Tensor], tmp_path: Path) -> None:
    """The node's folder holds half of one weight from before; the asker sends only the rest, and it is used."""
    captured, x = exact
    segment = captured.segment(0, captured.graph.num_blocks)
    name, (sha256, size) = next(iter(segment.manifest().items()))
    blob, half = segment.blob(name), size // 2
    store = Store(tmp_path / "b")
    store.append(sha256, 0, blob[:half], size)
    store.close()
    sent: list[tuple[str, int]] = []
    whole = CapturedModel.blob

    def noted(self: CapturedModel, wanted: str) -> bytes:
        sent.append((wanted, 0))
        return whole(self, wanted)

    with pytest.MonkeyPatch.context() as patch, launch(cluster("a", "b"), folder=tmp_path) as nodes:
        patch.setattr(CapturedModel, "blob", noted)
        with deploy(plan(captured.graph, ("b", captured.graph.num_blocks)), captured, nodes) as session:
            assert torch.equal(session(x), captured.unflatten_outputs(captured.reference((x,))))
    assert (sha256, 0) in sent
    kept = Store(tmp_path / "b")
    assert kept.read(sha256) == blob
    sent.clear()
    kept.close()
    with pytest.MonkeyPatch.context() as patch, launch(cluster("a", "b"), folder=tmp_path) as nodes:
        patch.setattr(CapturedModel, "blob", noted)
        with deploy(plan(captured.graph, ("b", captured.graph.num_blocks)), captured, nodes) as session:
            session(x)
    assert not sent  # everything was on the node's disk


def test_a_damaged_blob_on_a_node_is_fetched_again(exact: tuple[Captured, torch.Tensor], tmp_path: Path) -> None:
    captured, x = exact
    segment = captured.segment(0, captured.graph.num_blocks)
    sha256, size = next(iter(segment.manifest().values()))
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / sha256).write_bytes(bytes(size))
    with launch(cluster("a", "b"), folder=tmp_path) as nodes:
        chosen = plan(captured.graph, ("b", captured.graph.num_blocks))
        with deploy(chosen, captured, nodes) as session:
            assert torch.equal(session(x), captured.unflatten_outputs(captured.reference((x,))))


def test_nodes_end_when_their_parent_is_killed() -> None:
    script = (
        "import sys, time; sys.path[:0] = [sys.argv[1]]\n"
        "from small_nets import cluster\nfrom ecotone.runtime import launch\n"
        "nodes = launch(cluster('a', 'b'))\nprint(*nodes.pids.values(), flush=True)\nsys.stdin.read()\n"
    )
    here = str(Path(__file__).parent)
    parent = subprocess.Popen([sys.executable, "-c", script, here], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids
    parent.send_signal(signal.SIGKILL)
    parent.wait(PATIENCE_S)
    eventually(lambda: all(is_gone(pid) for pid in pids))


def test_a_process_that_cannot_start_is_explained_on_one_line() -> None:
    child = Child("x", ("-c", "raise SystemExit('no such thing')"))
    with pytest.raises(ChildError, match=r"node x ended with status 1; it said last: no such thing"):
        child.ask(None, PATIENCE_S)
    child.close()
    silent = Child("y", ("-c", "import sys; sys.stdin.read()"))
    with pytest.raises(ChildError, match=r"node y: no answer within 0\.2 s"):
        silent.ask(None, 0.2)
    silent.close()
    assert is_gone(silent.pid)


def test_a_node_that_is_not_there_is_one_error_in_bounded_time() -> None:
    absent = cluster("a", "b", emulate=False)
    known = tuple(
        d if d.name == "a" else type(d)(name=d.name, memory_bytes=1, address="127.0.0.1:1") for d in absent.devices
    )
    began = time.monotonic()
    with pytest.raises(EcotoneError, match=r"127\.0\.0\.1:1") as caught:
        attach(replace(absent, devices=known))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < PATIENCE_S
