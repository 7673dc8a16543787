"""Zenoh on loopback between real processes: frames both ways, lost peers, wrong addresses, mutual TLS, access by name."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ecotone.protocol.message import BodyId
from ecotone.trust.identity import Authority, Identity
from ecotone.wire.channel import Channel
from ecotone.wire.wire import NodeId, PeerDown, PeerUp, Priority, Received, WireError, WireEvent
from ecotone.wire.zenoh import ZenohSettings, ZenohWire, endpoint

pytestmark = pytest.mark.loopback
ROOT = Path(__file__).parents[2]


class End:
    """An end in this process, with its events in a queue."""

    def __init__(self, node: str, **settings: object):
        self.events: queue.Queue[WireEvent] = queue.Queue()
        self.wire = ZenohWire(ZenohSettings(node=NodeId(node), **settings))  # type: ignore[arg-type]
        self.wire.start(self.events.put)

    def next(self, timeout_s: float = 20.0) -> WireEvent:
        return self.events.get(timeout=timeout_s)


@contextmanager
def ends(*found: End) -> Iterator[None]:
    try:
        yield
    finally:
        for end in found:
            end.wire.close()


@contextmanager
def far_end(name: str, mode: str, address: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.wire.far_end", name, mode, address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"up {name}\n"
        yield process
    finally:
        process.kill()
        process.wait(20)


def test_frames_travel_between_processes_and_a_killed_one_is_seen() -> None:
    near = End("near", lease_s=1.0)
    with ends(near), far_end("far", "echo", near.wire.listening[0]) as process:
        assert near.next() == PeerUp("far")
        for frame in (b"", b"x", bytearray(os.urandom(1_100_000))):
            for priority in Priority:
                near.wire.send(NodeId("far"), frame, priority)
                assert near.next() == Received("far", bytes(frame))
        process.kill()
        assert near.next() == PeerDown("far")
        near.wire.send(NodeId("far"), b"lost in silence", Priority.DATA)
        with pytest.raises(WireError, match='no node "stranger"'):
            near.wire.send(NodeId("stranger"), b"", Priority.DATA)
    with pytest.raises(WireError, match="closed"):
        near.wire.send(NodeId("far"), b"", Priority.DATA)


def test_a_restarted_node_is_announced_again() -> None:
    near = End("near", lease_s=1.0)
    with ends(near):
        with far_end("far", "echo", near.wire.listening[0]):
            assert near.next() == PeerUp("far")
        assert near.next() == PeerDown("far")
        with far_end("far", "echo", near.wire.listening[0]):
            assert near.next() == PeerUp("far")
            near.wire.send(NodeId("far"), b"again", Priority.DATA)
            assert near.next() == Received("far", b"again")


def test_a_second_process_of_one_name_is_refused() -> None:
    first = End("a")
    with ends(first), pytest.raises(WireError, match='node "a" of cluster "local" is up already'):
        End("a", connect=first.wire.listening, lease_s=0.5)


def test_a_consumer_that_stops_longer_than_zenoh_waits_closes_nothing() -> None:
    """Zenoh closes a transport after 5 s of a full queue; credit stops the sender before it is full."""
    wire = ZenohWire(ZenohSettings(node=NodeId("near")))
    changes: list[bool] = []
    channel = Channel(
        wire,
        NodeId("near"),
        on_body=lambda *_: None,
        on_peer=lambda peer, is_up: changes.append(is_up),
        queue_bytes=16 << 20,
    )
    channel.start()
    try:
        with far_end("far", "hold", wire.listening[0]):
            channel.wait_for(NodeId("far"), 20)
            for index in range(20):  # 4 in the consumer's window, 16 in the sender's queue
                channel.send_body(NodeId("far"), BodyId(1, 1, 0, index), bytes(1_000_000), timeout_s=20.0)
            start = time.monotonic()
            with pytest.raises(WireError, match="takes no more"):
                channel.send_body(NodeId("far"), BodyId(1, 1, 0, 20), bytes(1_000_000), timeout_s=6.0)
            assert time.monotonic() - start > 5.5
            assert changes == [True], "the link stayed up all the while"
            assert channel.outstanding_bytes(NodeId("far")) <= 16 << 20
    finally:
        channel.close()


def test_nodes_that_share_a_peer_find_each_other() -> None:
    first = End("first")
    second = End("second", connect=first.wire.listening)
    third = End("third", connect=first.wire.listening)
    with ends(first, second, third):
        assert {third.next(), third.next()} == {PeerUp("first"), PeerUp("second")}
        third.wire.send(NodeId("second"), b"direct", Priority.DATA)
        found = [second.next(), second.next(), second.next()]
        assert Received(NodeId("third"), b"direct") in found


def test_one_of_several_endpoints_is_enough_and_none_is_an_error_in_time() -> None:
    near = End("near")
    with ends(near):
        other = End("other", connect=("127.0.0.1:9", near.wire.listening[0]), connect_timeout_s=10.0)
        with ends(other):
            assert other.next() == PeerUp("near")
        start = time.monotonic()
        with pytest.raises(WireError, match=r"no node answers at 127\.0\.0\.1:9 within 1 s"):
            End("lost", connect=("127.0.0.1:9",), connect_timeout_s=1.0)
        assert time.monotonic() - start < 10
        with pytest.raises(WireError, match="in use"):
            End("late", listen=near.wire.listening)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"listen": ("10.0.0.1:1",)}, "loopback only"),
        ({"connect": ("router.example:7447",)}, "loopback only"),
        ({"listen": ("0.0.0.0:7447",), "trust_network": True}, "all addresses"),
        ({"listen": ("7447",)}, "HOST:PORT"),
        ({"listen": ("127.0.0.1:99999",)}, "HOST:PORT"),
        ({"connect": ("tls/127.0.0.1:1",)}, "without an identity"),
        ({"multicast": True}, "joined clusters"),
        ({"node": "a/b"}, "letters"),
        ({"cluster": "**"}, "letters"),
        ({"lease_s": 0.0}, "too short"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(WireError, match=message):
        ZenohSettings(**({"node": NodeId("n")} | settings))  # type: ignore[arg-type]


def test_endpoints_are_written_in_one_way() -> None:
    assert endpoint("127.0.0.1:80") == "tcp/127.0.0.1:80"
    assert endpoint("[::1]:80", encrypted=True) == "tls/[::1]:80"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder = tmp_path_factory.mktemp("cluster")
    authority, other = Authority.create("home", folder / "ca"), Authority.create("home", folder / "other")
    found = {name: authority.issue(name, directory=folder / name) for name in ("m", "n", "o")}
    return found | {"stranger": other.issue("stranger", directory=folder / "stranger")}


def test_members_speak_and_strangers_are_refused(members: dict[str, Identity]) -> None:
    m = End("m", cluster="home", identity=members["m"])
    assert m.wire.listening[0].startswith("tls/")
    n = End("n", cluster="home", identity=members["n"], connect=m.wire.listening)
    with ends(m, n):
        assert (m.next(), n.next()) == (PeerUp("n"), PeerUp("m"))
        n.wire.send(NodeId("m"), b"secret", Priority.DATA)
        assert m.next() == Received("n", b"secret")
        with pytest.raises(WireError, match="refused our certificate"):
            End("s", cluster="home", identity=members["stranger"], connect=m.wire.listening, connect_timeout_s=1.5)
        plain = m.wire.listening[0].replace("tls/", "tcp/")
        with pytest.raises(WireError, match="no node answers"):
            End("p", cluster="home", connect=(plain,), connect_timeout_s=1.5)
        assert m.events.empty()


def test_pinned_members_speak_under_their_own_name_alone(members: dict[str, Identity]) -> None:
    m = End("m", cluster="home", identity=members["m"], members=("n",))
    n = End("n", cluster="home", identity=members["n"], connect=m.wire.listening)
    liar = ZenohWire(ZenohSettings(node=NodeId("n"), cluster="home", identity=members["o"], connect=m.wire.listening))
    with ends(m, n):
        assert (m.next(), n.next()) == (PeerUp("n"), PeerUp("m"))
        liar._refuse_twin = lambda *_: None  # type: ignore[method-assign]  # a liar would not ask
        liar.start(lambda event: None)
        liar._known.add(NodeId("m"))
        liar.send(NodeId("m"), b"forged", Priority.DATA)
        n.wire.send(NodeId("m"), b"true", Priority.DATA)
        m.wire.send(NodeId("n"), b"back", Priority.DATA)
        assert m.next() == Received("n", b"true")
        assert n.next() == Received("m", b"back")
        with pytest.raises(queue.Empty):
            m.next(0.5)
        liar.close()
