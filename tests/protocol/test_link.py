"""The reliable link, model-based: a hostile wire loses, repeats, reorders and delays frames; links break, ends restart.

The model knows only what was offered; what must hold: each body is reported once, whole, or ends with a named error; held
memory stays within the window; when the wire behaves again, everything ends (no deadlock).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.protocol import effects as fx
from ecotone.protocol import message as msg
from ecotone.protocol.intake import Receiver
from ecotone.protocol.link import Sender
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.notices import BodyAcked, BodyArrived, BodyFailed, LetterArrived
from ecotone.protocol.settings import LinkSettings

pytestmark = pytest.mark.pure

SETTINGS = LinkSettings(chunk_bytes=10, window_bytes=25, max_body_bytes=200, ack_every_chunks=2, lease_s=1.0)


class Pair:
    """A sender and a receiver with the wire between them in the test's hands."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_processes = 1
        self.sender, self.receiver = Sender(NodeId("b"), 1, SETTINGS), Receiver(NodeId("a"), 1, SETTINGS)
        self.forth: list[msg.LinkMessage] = []
        self.back: list[msg.LinkMessage] = []
        self.ack_timer = self.link_timer = False
        self.stored: dict[BodyId, list[tuple[int, int]]] = {}  # at the receiver's shell, by body
        self.whole: list[BodyId] = []  # arrived and not yet consumed
        self.arrivals: list[BodyId] = []
        self.letters: list[msg.LetterBody] = []
        self.ended: list[BodyId] = []  # released by the sender, in any way
        self.failed: set[BodyId] = set()
        self.largest = 0

    def do(self, items: list, at_sender: bool) -> None:
        for item in items:
            match item:
                case fx.Send(message=message):
                    (self.forth if at_sender else self.back).append(message)
                case fx.StoreChunk(body=body, offset=offset, length=length):
                    self.stored.setdefault(body, []).append((offset, length))
                case fx.Release(body=body) if at_sender:
                    self.ended.append(body)
                case fx.Release(body=body):
                    self.stored.pop(body, None)
                case fx.SetTimer(timer=timer):
                    self.link_timer |= timer[0] == "link"
                    self.ack_timer |= timer[0] == "ack"
                case fx.CancelTimer():
                    self.link_timer = False
                case BodyArrived(body=body, size_bytes=size_bytes):
                    covered = sorted(self.stored[body])
                    assert [o for o, _ in covered] == [sum(n for _, n in covered[:i]) for i in range(len(covered))]
                    assert sum(n for _, n in covered) == size_bytes == size_of(body)
                    self.arrivals.append(body)
                    self.whole.append(body)
                case BodyFailed(body=body, reason=reason):
                    assert reason
                    self.failed.add(body)
                case LetterArrived(content=content):
                    self.letters.append(content)
                case BodyAcked() | fx.LinkChanged() | _:
                    pass
        held = sum(n for chunks in self.stored.values() for _, n in chunks)
        assert held == self.receiver.held_bytes
        by_channel: dict[int, int] = {}
        for body, chunks in self.stored.items():
            by_channel[body.edge] = by_channel.get(body.edge, 0) + sum(n for _, n in chunks)
        assert all(n <= max(SETTINGS.window_bytes, self.largest) for n in by_channel.values())

    def deliver_forth(self, index: int, repeat: bool = False) -> None:
        message = self.forth[index] if repeat else self.forth.pop(index)
        take = {
            msg.LinkOpen: lambda m: self.receiver.opened_by(m),
            msg.Chunk: lambda m: self.receiver.take(m, True, self.now_s),
            msg.Void: lambda m: self.receiver.voided(m, self.now_s),
            msg.Letter: lambda m: self.receiver.letter(m, self.now_s),
        }
        self.do(take[type(message)](message), at_sender=False)

    def deliver_back(self, index: int, repeat: bool = False) -> None:
        message = self.back[index] if repeat else self.back.pop(index)
        self.sender.heard(self.now_s, hears_us=True)
        react = self.sender.opened if isinstance(message, msg.LinkOpened) else self.sender.acked
        self.do(react(message, self.now_s), at_sender=True)

    def offer(self, body: BodyId) -> None:
        self.largest = max(self.largest, size_of(body))
        self.do(self.sender.offer(body, size_of(body), None, False, self.now_s), at_sender=True)

    def consume(self, index: int) -> None:
        body = self.whole.pop(index)
        self.stored.pop(body, None)
        self.do(self.receiver.free(body, self.now_s), at_sender=False)

    def reconnect(self) -> None:
        self.forth.clear()
        self.back.clear()
        self.do(self.sender.disconnected(), at_sender=True)
        self.do(self.sender.connected(self.now_s), at_sender=True)

    def restart_receiver(self) -> None:
        """The process dies: its memory goes, a new one with a higher incarnation answers."""
        self.num_processes += 1
        self.receiver = Receiver(NodeId("a"), self.num_processes, SETTINGS)
        self.stored, self.whole, self.ack_timer = {}, [], False
        self.reconnect()

    def timers(self) -> None:
        self.now_s += 0.6
        if self.ack_timer:
            self.ack_timer = False
            self.do(self.receiver.timer_fired(self.now_s), at_sender=False)
        if self.link_timer:
            self.link_timer = False
            self.do(self.sender.timer_fired(self.now_s), at_sender=True)

    def settle(self) -> None:
        """A fair wire, an eager consumer and the timers, until nothing is left; the bound is what deadlock would break."""
        for _ in range(400):
            while self.forth or self.back or self.whole:
                if self.forth:
                    self.deliver_forth(0)
                elif self.back:
                    self.deliver_back(0)
                else:
                    self.consume(0)
            if not self.sender.num_bodies and not self.sender.num_letters:
                return
            self.timers()
        raise AssertionError(f"stuck: {self.sender.num_bodies} bodies, {self.sender.num_letters} letters")


LONG, WEIGHTS = BodyId(1, 0, 0, 1000), BodyId(1, 0, -1, 1000)


def size_of(body: BodyId) -> int:
    """Of eight chunks, of four, or what the numbers give."""
    return {LONG: 80, WEIGHTS: 40}.get(body) or 1 + (body.request * 17 + body.edge * 5) % 60


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["offer"] * 3
            + ["forth"] * 6
            + ["back"] * 4
            + ["consume"] * 2
            + ["letter", "lose forth", "lose back", "repeat forth", "repeat back", "reconnect", "give up", "time", "restart"]
        ),
        st.integers(0, 7),
    ),
    max_size=120,
)


@settings(max_examples=400)
@given(steps)
def test_every_body_arrives_exactly_once_or_ends_with_a_named_error(script: list[tuple[str, int]]) -> None:
    pair = Pair()
    pair.do(pair.sender.connected(0.0), at_sender=True)
    offered: list[BodyId] = []
    given_up: set[BodyId] = set()
    num_letters = 0
    restarts = 0
    for action, n in script:
        if action == "offer":
            offered.append(BodyId(1, 0, n % 2, len(offered)))
            pair.offer(offered[-1])
        elif action == "letter":
            pair.do(pair.sender.post(msg.Ready(session=1, epoch=num_letters), pair.now_s), at_sender=True)
            num_letters += 1
        elif action == "reconnect":
            pair.reconnect()
        elif action == "restart":
            pair.restart_receiver()
            restarts += 1
        elif action == "time":
            pair.timers()
        elif action == "give up" and offered:
            body = offered[n % len(offered)]
            if body not in pair.ended:
                given_up.add(body)
            pair.do(pair.sender.give_up(body, pair.now_s), at_sender=True)
        elif action == "consume" and pair.whole:
            pair.consume(n % len(pair.whole))
        elif action.endswith("forth") and pair.forth:
            index = n % len(pair.forth)
            pair.forth.pop(index) if action.startswith("lose") else pair.deliver_forth(index, action.startswith("repeat"))
        elif action.endswith("back") and pair.back:
            index = n % len(pair.back)
            pair.back.pop(index) if action.startswith("lose") else pair.deliver_back(index, action.startswith("repeat"))
    pair.settle()
    assert len(pair.arrivals) == len(set(pair.arrivals)), "a body was reported twice"
    assert sorted(pair.ended) == sorted(offered), "the sender frees every body exactly once"
    for body in offered:
        assert body in pair.arrivals or body in pair.failed or body in given_up
    assert restarts or not pair.failed
    assert pair.receiver.held_bytes == 0
    if not restarts:
        assert [letter.epoch for letter in pair.letters] == list(range(num_letters)), "letters: in order, once"
    else:
        assert {letter.epoch for letter in pair.letters} == set(range(num_letters)), "letters: none lost"


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(["offer", "forth", "back", "consume", "restart"]), st.integers(0, 5)), max_size=80)
)
def test_a_restarted_sender_starts_anew_within_the_window(script: list[tuple[str, int]]) -> None:
    pair = Pair()
    pair.do(pair.sender.connected(0.0), at_sender=True)
    count = 0
    for action, n in script:
        if action == "offer":
            pair.offer(BodyId(1, 0, 0, count))
            count += 1
        elif action == "restart":
            pair.num_processes += 1
            pair.sender, pair.link_timer = Sender(NodeId("b"), pair.num_processes, SETTINGS), False
            pair.reconnect()
        elif action == "forth" and pair.forth:
            pair.deliver_forth(n % len(pair.forth))
        elif action == "back" and pair.back:
            pair.deliver_back(n % len(pair.back))
        elif action == "consume" and pair.whole:
            pair.consume(n % len(pair.whole))
    pair.settle()
    assert len(pair.arrivals) == len(set(pair.arrivals))
    pair.offer(BodyId(1, 0, 0, count))
    pair.settle()
    assert pair.arrivals[-1] == BodyId(1, 0, 0, count), "the link works on"


def test_credit_holds_the_sender_until_the_consumer_frees_memory() -> None:
    # Window 25, bodies of 18 (request 1) then 35 (request 2): the window grows to 35, so 17 of the second fit.
    pair = Pair()
    pair.do(pair.sender.connected(0.0), at_sender=True)
    pair.offer(BodyId(1, 0, 0, 1))
    pair.offer(BodyId(1, 0, 0, 2))
    for step in range(50):
        if pair.forth:
            pair.deliver_forth(0)
        elif pair.back:
            pair.deliver_back(0)
        elif step < 40:
            pair.timers()
    assert pair.arrivals == [BodyId(1, 0, 0, 1)]
    assert pair.receiver.held_bytes == 35  # the window grew to the largest body, not beyond
    pair.consume(0)
    pair.settle()
    assert pair.arrivals == [BodyId(1, 0, 0, 1), BodyId(1, 0, 0, 2)]


def test_a_lost_grant_is_asked_for() -> None:
    pair = Pair()
    pair.do(pair.sender.connected(0.0), at_sender=True)
    for request in (1, 2, 3):
        pair.offer(BodyId(1, 0, 0, request))
    for _ in range(60):
        if pair.forth:
            pair.deliver_forth(0)
        elif pair.back:
            pair.deliver_back(0)
    pair.consume(0)
    pair.timers()
    pair.back.clear()  # the acknowledgement that carried the grant
    pair.settle()
    assert len(pair.arrivals) == 3


def test_a_repeated_chunk_beyond_a_gap_counts_once() -> None:
    pair = Pair()
    pair.do(pair.sender.connected(0.0), at_sender=True)
    pair.deliver_forth(0)
    pair.deliver_back(0)
    pair.offer(BodyId(1, 0, 0, 1))  # 18 bytes: chunks of 10 and 8
    pair.deliver_forth(1, repeat=True)
    pair.deliver_forth(1, repeat=True)
    assert pair.receiver.held_bytes == 8
    assert pair.arrivals == []
    pair.settle()
    assert pair.arrivals == [BodyId(1, 0, 0, 1)]


WIDE = replace(SETTINGS, window_bytes=200)


def opened(wide: Pair) -> Pair:
    """A pair with room for twenty chunks, its handshake done."""
    wide.sender, wide.receiver = Sender(NodeId("b"), 1, WIDE), Receiver(NodeId("a"), 1, WIDE)
    wide.do(wide.sender.connected(0.0), at_sender=True)
    wide.deliver_forth(0)
    wide.deliver_back(0)
    wide.largest = WIDE.window_bytes
    return wide


def seqs(messages: list[msg.LinkMessage]) -> list[int]:
    return [message.seq for message in messages if isinstance(message, msg.Chunk)]


def acknowledged(pair: Pair) -> None:
    """What the receiver has to say comes to the sender."""
    if pair.ack_timer:
        pair.ack_timer = False
        pair.do(pair.receiver.timer_fired(pair.now_s), at_sender=False)
    while pair.back:
        pair.deliver_back(0)


def test_what_later_chunks_overtook_is_sent_again_at_once() -> None:
    """Chunks 0, 1 and 4 of 8 are lost: the acknowledgement of the others tells, no timer has to pass."""
    pair = opened(Pair())
    pair.do(pair.sender.offer(LONG, size_of(LONG), None, False, 0.0), at_sender=True)
    assert seqs(pair.forth) == list(range(8))
    pair.forth = [pair.forth[i] for i in (2, 3, 5, 6, 7)]
    for _ in range(5):
        pair.deliver_forth(0)
    acknowledged(pair)
    assert seqs(pair.forth) == [0, 1, 4]
    acknowledged(pair)
    assert seqs(pair.forth) == [0, 1, 4], "sent again once for each loss"


def test_a_gap_is_acknowledged_at_once_and_what_comes_in_order_is_not() -> None:
    """Links that share acknowledgements widely (mail) must not learn of a loss that much later."""
    pair = opened(Pair())
    pair.do(pair.sender.offer(LONG, size_of(LONG), None, False, 0.0), at_sender=True)
    pair.deliver_forth(0)
    assert pair.back == []
    assert pair.ack_timer
    del pair.forth[0]
    pair.deliver_forth(0)
    assert [message.ahead for message in pair.back if isinstance(message, msg.Ack)] == [((2, 3),)]


def test_chunks_in_another_order_are_not_taken_for_lost() -> None:
    pair = opened(Pair())
    pair.do(pair.sender.offer(LONG, size_of(LONG), None, False, 0.0), at_sender=True)
    for place in (2, 0, 0, 1, 0, 0, 1, 0):
        pair.deliver_forth(place)
        acknowledged(pair)
    assert pair.forth == []


def test_when_all_was_lost_the_first_repeats_show_it() -> None:
    """Nothing newer came: the timer sends the oldest again, and their acknowledgement sends the rest."""
    pair = opened(Pair())
    pair.do(pair.sender.offer(LONG, size_of(LONG), None, False, 0.0), at_sender=True)
    pair.forth.clear()
    for _ in range(3):
        pair.timers()
    pair.forth = [m for m in pair.forth if isinstance(m, msg.Chunk)]
    assert seqs(pair.forth) == [0, 1, 2, 3]
    while pair.forth and pair.forth[0].seq < 4:
        pair.deliver_forth(0)
    acknowledged(pair)
    assert seqs(pair.forth) == [4, 5, 6, 7]
    assert pair.sender._resend_wait_s == WIDE.lease_s


def test_a_link_that_became_slow_is_given_the_time_that_it_takes() -> None:
    """Chunks come late, not never, and so do their repeats: the numbers tell, and the next repeat waits that long."""
    pair = opened(Pair())
    pair.do(pair.sender.offer(LONG, size_of(LONG), None, False, 0.0), at_sender=True)
    for _ in range(12):  # 7.2 s, of which the first repeats are under way behind the originals
        pair.timers()
    originals = [m for m in pair.forth if isinstance(m, msg.Chunk)][:8]
    pair.forth = list(originals[:4])
    for _ in range(4):
        pair.deliver_forth(0)
    acknowledged(pair)
    assert pair.sender._late_s == pytest.approx(7.2)
    assert seqs(pair.forth) == []
    for _ in range(8):
        pair.timers()
    assert seqs(pair.forth) == [], "nothing goes again so soon"


def test_tensors_that_overtook_weights_do_not_call_them_lost() -> None:
    pair = opened(Pair())
    pair.do(pair.sender.offer(WEIGHTS, size_of(WEIGHTS), None, True, 0.0), at_sender=True)
    pair.do(pair.sender.offer(LONG, size_of(LONG), None, False, 0.0), at_sender=True)
    weights, tensors = pair.forth[:4], pair.forth[4:]
    pair.forth = list(tensors)
    while pair.forth:
        pair.deliver_forth(0)
    acknowledged(pair)
    assert pair.forth == []
    pair.forth = weights[3:]  # the last of the weights: the first two, three and more numbers before it, were lost
    pair.deliver_forth(0)
    acknowledged(pair)
    assert seqs(pair.forth) == [0]


def test_silence_with_bytes_outstanding_is_told_once() -> None:
    sender = Sender(NodeId("b"), 1, SETTINGS)
    items = sender.connected(0.0)
    for step in range(1, 10):
        items += sender.timer_fired(0.5 * step)
    assert [i.state for i in items if isinstance(i, fx.LinkChanged)] == ["down"]


def test_a_peer_that_was_called_lost_is_asked_until_it_answers() -> None:
    """What was outstanding may be acknowledged late, by a frame that is no answer to the handshake."""
    pair = Pair()
    pair.reconnect()
    pair.settle()
    pair.offer(LONG)
    pair.deliver_forth(0)  # one chunk arrives; all that the peer says is lost
    states: list[str] = []
    for _ in range(6):
        pair.now_s += 0.6
        states += [i.state for i in pair.sender.timer_fired(pair.now_s) if isinstance(i, fx.LinkChanged)]
    assert states == ["down"]
    pair.sender.give_up(LONG, pair.now_s)
    through = msg.Ack(sender_incarnation=1, incarnation=1, next_seq=pair.sender._next_seq, next_letter=0, grants=())
    pair.sender.acked(through, pair.now_s)
    assert pair.sender.num_bodies == 0
    asked = [i for i in pair.sender.timer_fired(pair.now_s + 0.6) if isinstance(i, fx.Send)]
    assert [type(i.message) for i in asked] == [msg.LinkOpen]
    answer = pair.receiver.opened_by(asked[0].message)[0]
    back = pair.sender.opened(answer.message, pair.now_s + 0.7)
    assert [i.state for i in back if isinstance(i, fx.LinkChanged)] == ["up"]


def test_a_letter_does_not_wait_for_credit() -> None:
    pair = Pair()
    pair.do(pair.sender.connected(0.0), at_sender=True)
    pair.deliver_forth(0)
    pair.deliver_back(0)
    for request in range(5):
        pair.offer(BodyId(1, 0, 0, request))
    pair.forth.clear()
    pair.do(pair.sender.post(msg.Ready(session=1, epoch=0), 0.0), at_sender=True)
    assert [type(m) for m in pair.forth] == [msg.Letter]


def test_a_body_beyond_the_cap_is_refused_by_name() -> None:
    sender = Sender(NodeId("b"), 1, SETTINGS)
    items = sender.offer(BodyId(1, 0, 0, 0), 201, None, False, 0.0)
    assert any(isinstance(i, BodyFailed) and "200" in i.reason for i in items)
