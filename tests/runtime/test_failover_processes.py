"""Nodes that are killed, frozen, restarted, garbled or of another version under load: nothing lost, nothing twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from loads import PATIENCE_S, load_on, set_of
from small_nets import cluster, even, lines

from ecotone.cluster import DeviceId
from ecotone.codec import frame
from ecotone.model import Captured
from ecotone.protocol.message import NodeId, Priority
from ecotone.runtime import DeployError, Nodes, deploy, in_memory, launch
from ecotone.wire.wire import Frame

pytestmark = pytest.mark.loopback


@pytest.fixture(scope="module")
def exact() -> tuple[Captured, torch.Tensor]:
    return lines()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with launch(cluster("a", "b", "c")) as found:
        yield found


@pytest.mark.parametrize(
    ("first", "standby", "mode"),
    [
        (("a", "b"), ("a",), "passive"),
        (("a", "b"), ("a", "c"), "passive"),
        (("b",), ("c",), "active"),
    ],
    ids=["T1 local fallback", "T2b passive standby", "T2a active twin"],
)
def test_kill_9_of_a_node_loses_nothing_and_it_comes_back(
    nodes: Nodes, exact: tuple[Captured, torch.Tensor], first: tuple[str, ...], standby: tuple[str, ...], mode: str
) -> None:
    with deploy(set_of(exact[0], first, standby, mode=mode), exact[0], nodes) as session:
        with load_on(session, exact) as load:
            load.more(epoch=1)
            nodes.children[DeviceId("b")].kill()
            load.more(epoch=2)
            nodes.restart("b", deadline_s=90.0)
            load.more(epoch=1)
        assert session.num_waiting == 0


def test_a_frozen_node_is_suspected_and_its_late_results_do_no_harm(
    nodes: Nodes, exact: tuple[Captured, torch.Tensor]
) -> None:
    with deploy(set_of(exact[0], ("b",), ("c",)), exact[0], nodes) as session, load_on(session, exact) as load:
        load.more(epoch=1)
        os.kill(nodes.pids[DeviceId("b")], signal.SIGSTOP)
        try:
            load.more(epoch=2, count=20)
        finally:
            os.kill(nodes.pids[DeviceId("b")], signal.SIGCONT)
        load.more(epoch=1)


def test_a_node_told_to_stop_is_left_behind_in_order(nodes: Nodes, exact: tuple[Captured, torch.Tensor]) -> None:
    with deploy(set_of(exact[0], ("a", "b"), ("a", "c")), exact[0], nodes) as session:
        with load_on(session, exact) as load:
            load.more(epoch=1)
            child = nodes.children[DeviceId("b")]
            child.terminate()
            assert child.wait(PATIENCE_S) == 0
            load.more(epoch=session.plan.epoch)
        assert [plan.devices for plan in session.plans] == [("a", "c")]


def spoil(nodes: Nodes, name: str, change: Callable[[bytearray], None]) -> Callable[[], None]:
    """Let what a node of this process sends to the asker pass through `change`; call what comes back to end that."""
    port = nodes._threads[DeviceId(name)][0].port
    send = port.send

    def spoiled(peer: NodeId, data: Frame, priority: Priority) -> bool:
        data = bytearray(data)
        change(data)
        return send(peer, data, priority)

    port.send = spoiled  # type: ignore[method-assign]

    def mend() -> None:
        port.send = send  # type: ignore[method-assign]

    return mend


def test_a_node_that_answers_garbage_is_passed_over(exact: tuple[Captured, torch.Tensor]) -> None:
    """Every tensor that b sends has a bit flipped: its checksum tells, and the other plan answers."""

    def flip(data: bytearray) -> None:
        if data[5] == frame.Kind.DATA:
            data[-3] ^= 0x10

    with (
        in_memory(cluster("a", "b", "c")) as nodes,
        deploy(set_of(exact[0], ("b",), ("c",)), exact[0], nodes) as session,
        load_on(session, exact) as load,
    ):
        load.more(epoch=1)
        spoil(nodes, "b", flip)
        load.more(epoch=2)


def test_a_node_that_speaks_noise_harms_nobody(exact: tuple[Captured, torch.Tensor]) -> None:
    """From some moment on all that b says is noise: it is as good as gone."""

    def noise(data: bytearray) -> None:
        data[:] = bytes((7 * i + len(data)) % 256 for i in range(len(data)))

    with (
        in_memory(cluster("a", "b", "c")) as nodes,
        deploy(set_of(exact[0], ("b",), ("c",)), exact[0], nodes) as session,
        load_on(session, exact) as load,
    ):
        load.more(epoch=1)
        mend = spoil(nodes, "b", noise)
        load.more(epoch=2)
        mend()
        load.more(epoch=1)


def test_a_node_of_another_version_is_named(exact: tuple[Captured, torch.Tensor]) -> None:
    def newer(data: bytearray) -> None:
        data[4] = frame.VERSION + 1

    captured, x = exact
    with in_memory(cluster("a", "b", "c")) as nodes:
        spoil(nodes, "b", newer)
        wanted = rf"node b speaks version {frame.VERSION + 1} of the wire, this program {frame.VERSION}; install the same"
        with pytest.raises(DeployError, match=wanted):
            deploy(even(captured.graph, "a", "b"), captured, nodes)
        with deploy(set_of(captured, ("a", "c"), ("a", "b")), captured, nodes) as session:
            assert session(x) is not None
            assert [plan.devices for plan in session.plans] == [("a", "c")]
