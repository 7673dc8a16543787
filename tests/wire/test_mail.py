"""Mail over the memory network: each message once and in order through loss and delay; urgent ones ahead; restarts."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from ecotone.protocol.message import NodeId
from ecotone.protocol.settings import LinkSettings
from ecotone.wire.mail import Mail
from ecotone.wire.memory import DELIVERED, Fate, Network, Passage
from ecotone.wire.wire import WireError

pytestmark = pytest.mark.pure
A, B = NodeId("a"), NodeId("b")
QUICK = LinkSettings(chunk_bytes=1000, window_bytes=5000, lease_s=0.05)


class End:
    """A mail and what it was given."""

    def __init__(self, network: Network, name: NodeId, incarnation: int = 1, queue_bytes: int = 1 << 31):
        self.got: list[bytes] = []
        self.urgent: list[bytes] = []
        self.told: list[str] = []
        self.changed = threading.Condition()
        links = {A: QUICK, B: QUICK}
        self.mail = Mail(
            network.join(name), name, incarnation, on_message=lambda _, c: self._add(self.got, bytes(c)),
            on_urgent=lambda _, c: self._add(self.urgent, bytes(c)),
            on_peer=lambda _, is_up: self._add(self.told, "up" if is_up else "down"),
            on_restarted=lambda _: self._add(self.told, "restarted"), links=links, queue_bytes=queue_bytes,
        )  # fmt: skip
        self.mail.start()

    def _add(self, where: list, what: object) -> None:  # type: ignore[type-arg]
        with self.changed:
            where.append(what)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 20), (len(self.got), self.urgent, self.told)


def message(number: int) -> bytes:
    return number.to_bytes(4, "little") + random.Random(number).randbytes(random.Random(number).choice((0, 10, 3000)))


def test_order_survives_loss_repetition_and_delay() -> None:
    fates = random.Random(4)

    def script(passage: Passage) -> Fate:
        return Fate(copies=fates.choice((0, 1, 1, 1, 2)), held=fates.choice((0, 0, 0, 3)))

    network = Network(script=script)
    a, b = End(network, A), End(network, B)
    front, back = [message(n) for n in range(60)], [message(100 + n) for n in range(40)]
    for number in range(60):
        a.mail.send(B, front[number])
        if number < 40:
            a.mail.send(B, back[number], background=True)
    b.wait(lambda: len(b.got) == 100)
    assert [m for m in b.got if m in front] == front
    assert [m for m in b.got if m in back] == back
    b.mail.send(A, b"back")
    a.wait(lambda: a.got == [b"back"])
    network.close()


def test_thousands_wait_behind_one_that_is_late_and_take_no_more_room_than_the_window() -> None:
    lost = [True]

    def script(passage: Passage) -> Fate:
        return Fate(copies=0) if lost[0] and passage.source == A and b"first!" in bytes(passage.frame) else DELIVERED

    network = Network(script=script)
    a, b = End(network, A), End(network, B)
    a.wait(lambda: "up" in a.told)
    a.mail.send(B, b"first!")
    for number in range(6000):
        a.mail.send(B, message(number)[:4])
    seen = [len(incoming.early) for incoming in b.mail._incoming.values()]
    lost[0] = False
    b.wait(lambda: len(b.got) == 6001)
    assert b.got[0] == b"first!"
    assert b.got[1:] == [message(n)[:4] for n in range(6000)]
    assert max(seen, default=0) * 20 <= 5000 + 20
    network.close()


def test_urgent_mail_passes_what_waits_and_may_be_lost() -> None:
    network = Network(script=lambda p: Fate(copies=0) if p.source == A and b"queued" in bytes(p.frame) else DELIVERED)
    a, b = End(network, A), End(network, B)
    a.wait(lambda: "up" in a.told)
    a.mail.send(B, b"queued")
    a.mail.urge(B, b"now")
    b.wait(lambda: b.urgent == [b"now"])
    assert not b.got
    network.kill(B)
    a.mail.urge(B, b"nobody hears it")
    network.close()


@pytest.mark.parametrize("who", ["receiver", "sender"])
def test_a_restart_begins_a_new_stream(who: str) -> None:
    network = Network()
    a, b = End(network, A), End(network, B)
    for number in range(20):
        a.mail.send(B, message(number))
    b.wait(lambda: len(b.got) == 20)
    if who == "receiver":
        network.kill(B)
        a.wait(lambda: a.told[-1:] == ["down"])
        a.mail.send(B, b"for the process that was: dropped with it")
        b = End(network, B, incarnation=2)
        a.wait(lambda: "restarted" in a.told)
    else:
        network.kill(A)
        a = End(network, A, incarnation=2)
    for number in range(30, 50):
        a.mail.send(B, message(number))
    b.wait(lambda: message(49) in b.got)
    assert b.got[-20:] == [message(n) for n in range(30, 50)]
    network.close()


def test_a_queue_that_is_full_or_closed_says_so() -> None:
    network = Network()
    a = End(network, A, queue_bytes=1000)
    network.join(B)
    a.mail.send(B, bytes(900))
    with pytest.raises(WireError, match="takes no more for now"):
        a.mail.send(B, bytes(900))
    assert a.mail.queued_bytes(B) > 900
    a.mail.close()
    with pytest.raises(WireError, match="closed"):
        a.mail.send(B, b"x")
    network.close()
