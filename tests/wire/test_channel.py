"""Channel over the memory network: exactly once through loss, repetition, delay, cuts; letters in order; bounded memory."""

from __future__ import annotations

import random
import threading

import pytest

from ecotone.protocol.message import BodyId, Cancel, LetterBody, NodeId
from ecotone.protocol.settings import LinkSettings
from ecotone.wire.channel import Body, Channel
from ecotone.wire.memory import Fate, Network, Passage, Script
from ecotone.wire.wire import NodeId as WireNodeId
from ecotone.wire.wire import Priority, Received, WireError, WireEvent

pytestmark = pytest.mark.pure
A, B = NodeId("a"), NodeId("b")
QUICK = LinkSettings(chunk_bytes=1000, window_bytes=5000, lease_s=0.1)


class Pair:
    """Channels a and b; what b gets is kept, and released at once unless `hold`."""

    def __init__(self, script: Script | None = None, *, hold: bool = False, settings: LinkSettings = QUICK, **more: int):
        self.network = Network(script=script)
        self.bodies: list[tuple[BodyId, bytes]] = []
        self.letters: list[LetterBody] = []
        self.hold, self.changed = hold, threading.Condition()
        self.a = Channel(self.network.join(A), A, on_body=self._ignore, settings=settings, incarnation=1, **more)
        self.b = Channel(
            self.network.join(B), B, on_body=self._body, on_letter=self._letter, settings=settings, incarnation=1
        )
        self.a.start()
        self.b.start()
        self.a.wait_for(B, 20)

    def _ignore(self, peer: WireNodeId, body: BodyId, content: Body) -> None:
        raise AssertionError("nothing is sent this way")

    def _body(self, peer: WireNodeId, body: BodyId, content: Body) -> None:
        with self.changed:
            self.bodies.append((body, bytes(content)))
            self.changed.notify_all()
        if not self.hold:
            self.b.release(peer, body)

    def _letter(self, peer: WireNodeId, letter: LetterBody) -> None:
        with self.changed:
            self.letters.append(letter)
            self.changed.notify_all()

    def wait(self, num_bodies: int, num_letters: int = 0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.bodies) >= num_bodies and len(self.letters) >= num_letters, 60), (
                f"{len(self.bodies)} of {num_bodies} bodies, {len(self.letters)} of {num_letters} letters"
            )

    def close(self) -> None:
        self.a.close()
        self.b.close()
        self.network.close()


def _faults(seed: int) -> Script:
    generator = random.Random(seed)

    def script(passage: Passage) -> Fate:
        return Fate(copies=generator.choice((0, 1, 1, 1, 1, 1, 2)), held=generator.choice((0, 0, 0, 0, 1, 3)))

    return script


@pytest.mark.parametrize("seed", range(4))
def test_bodies_and_letters_arrive_exactly_once_over_a_lossy_network(seed: int) -> None:
    pair = Pair(_faults(seed))
    generator = random.Random(100 + seed)
    sent = {BodyId(1, 1, i % 2, i): generator.randbytes(generator.randint(1, 4000)) for i in range(30)}
    for index, (body, content) in enumerate(sent.items()):
        pair.a.send_body(B, body, content)
        pair.a.send_letter(B, Cancel(session=1, epoch=1, request=index))
    pair.wait(30, 30)
    assert sorted(pair.bodies) == sorted(sent.items()), "each once, whole"
    assert [letter.request for letter in pair.letters if isinstance(letter, Cancel)] == list(range(30)), "in order"
    with pair.a._changed:
        assert pair.a._changed.wait_for(lambda: pair.a.outstanding_bytes(B) == 0, 30), "all acknowledged, nothing kept"
    assert len(pair.bodies) == 30
    pair.close()


def test_a_cut_link_loses_nothing() -> None:
    pair = Pair()
    pair.network.cut(A, B)
    for index in range(8):
        pair.a.send_body(B, BodyId(1, 1, 0, index), bytes([index]) * 2500)
    pair.network.heal(A, B)
    pair.wait(8)
    assert [(body.request, content[:1]) for body, content in pair.bodies] == [(i, bytes([i])) for i in range(8)]
    pair.close()


def test_a_consumer_that_stops_bounds_the_memory_of_both_ends() -> None:
    pair = Pair(hold=True, queue_bytes=20_000)
    for index in range(25):  # 5 in the consumer's window, 20 in the sender's queue
        pair.a.send_body(B, BodyId(1, 1, 0, index), bytes(1000), timeout_s=20.0)
    with pytest.raises(WireError, match="takes no more"):
        pair.a.send_body(B, BodyId(1, 1, 0, 25), bytes(1000), timeout_s=0.3)
    assert len(pair.bodies) == 5, "the window and no more reached the consumer"
    assert pair.a.outstanding_bytes(B) <= 20_000
    held = [body for body, _ in pair.bodies]
    pair.hold = False
    for body in held:
        pair.b.release(A, body)
    pair.wait(25)
    pair.close()


def test_a_body_larger_than_the_window_passes() -> None:
    pair = Pair()
    content = random.Random(0).randbytes(50_000)
    pair.a.send_body(B, BodyId(1, 1, 0, 1), content)
    pair.wait(1)
    assert pair.bodies[0][1] == content
    pair.close()


def test_garbage_from_a_peer_is_counted_and_passed_over() -> None:
    pair = Pair()
    noise = pair.network.join(WireNodeId("noise"))
    noise.start(lambda event: None)
    noise.send(B, b"not a frame", Priority.DATA)
    pair.a.send_body(B, BodyId(1, 1, 0, 1), b"x")
    pair.wait(1)
    assert pair.b.num_bad_frames == 1
    pair.close()


def test_the_memory_network_is_deterministic_and_pumped_by_hand() -> None:
    def run() -> list[tuple[str, WireEvent]]:
        network, seen = Network(threaded=False, script=_faults(7)), []
        ends = {name: network.join(WireNodeId(name)) for name in "ab"}
        for name, end in ends.items():
            end.start(lambda event, name=name: seen.append((name, event)))  # type: ignore[misc]
        for index in range(50):
            ends["a"].send(WireNodeId("b"), bytes([index]), Priority.DATA)
        assert seen == [], "nothing moves before it is pumped"
        network.pump()
        network.close()
        return seen

    first = run()
    assert first == run()
    frames = [event.frame[0] for _, event in first if isinstance(event, Received)]
    assert set(frames) < set(range(50)), "some were lost"
    assert frames != sorted(frames), "some were held back"
    assert len(frames) > len(set(frames)), "some came twice"


def test_unknown_peers_and_closed_ends_are_named() -> None:
    network = Network(threaded=False)
    end = network.join(WireNodeId("a"))
    end.start(lambda event: None)
    with pytest.raises(WireError, match='no node "z"'):
        end.send(WireNodeId("z"), b"", Priority.DATA)
    with pytest.raises(WireError, match="joined already"):
        network.join(WireNodeId("a"))
    end.close()
    with pytest.raises(WireError, match="closed"):
        end.send(WireNodeId("a"), b"", Priority.DATA)
