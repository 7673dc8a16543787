"""Nodes that are killed, frozen, restarted, garbled or of another version under load: nothing lost, nothing twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from small_nets import cluster, even, lines

from ecotone.cluster import DeviceId
from ecotone.codec import frame
from ecotone.model import Captured
from ecotone.planset import PlanSet, Standby
from ecotone.protocol.message import NodeId, Priority
from ecotone.runtime import DeployError, Nodes, Session, deploy, in_memory, launch
from ecotone.wire.wire import Frame

pytestmark = pytest.mark.loopback

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def exact() -> tuple[Captured, torch.Tensor]:
    return lines()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with launch(cluster("a", "b", "c")) as found:
        yield found


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def set_of(captured: Captured, first: tuple[str, ...], other: tuple[str, ...], mode: str = "passive") -> PlanSet:
    standby = Standby(plan=even(captured.graph, *other), mode=mode, label="-".join(other))  # type: ignore[arg-type]
    return PlanSet(primary=even(captured.graph, *first), standbys=(standby,))


class Load:
    """Threads that ask all the time; each input is another, and each answer is compared with the model's own."""

    def __init__(self, session: Session, captured: Captured, x: torch.Tensor):
        self.session, self.captured, self.x = session, captured, x
        self.answers: list[int | None] = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(3)]

    def _run(self, worker: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            x = self.x + worker + number / 64
            try:
                future = self.session.submit((x,))
                same = torch.equal(future.result(PATIENCE_S), self.captured.unflatten_outputs(self.captured.reference((x,))))
                self.answers.append(future.epoch)
                if not same:
                    self.errors.append(f"wrong result {number}")
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")

    def more(self, epoch: int, count: int = 5) -> None:
        """Wait for `count` further answers under `epoch`."""
        have = self.answers.count(epoch)
        eventually(lambda: bool(self.errors) or self.answers.count(epoch) >= have + count)


@contextmanager
def load_on(session: Session, exact: tuple[Captured, torch.Tensor]) -> Iterator[Load]:
    load = Load(session, *exact)
    for thread in load._threads:
        thread.start()
    try:
        yield load
    finally:
        load._stop.set()
        for thread in load._threads:
            thread.join(PATIENCE_S)
    assert not load.errors, load.errors[:3]


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
    with deploy(set_of(exact[0], first, standby, mode), exact[0], nodes) as session:
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
