"""Nodes by hand: deployment with content, parking, old epochs, strangers, refusals; two nodes joined by a perfect wire."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from ecotone.cluster import DeviceId
from ecotone.plan import Plan, Stage, Transfer
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol import message as msg
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings

pytestmark = pytest.mark.pure

A, B = NodeId("a"), NodeId("b")
SMALL = LinkSettings(chunk_bytes=10)
PROGRAM = msg.Blob(sha256="11" * 32, size_bytes=25)
WEIGHT = msg.Blob(sha256="22" * 32, size_bytes=40, name="w")


def plan(epoch: int = 0) -> Plan:
    """The asker a sends its inputs to b, which computes everything and sends back."""
    a, b = DeviceId("a"), DeviceId("b")
    return Plan(
        graph_hash="g",
        stages=(Stage(device=b, start=0, stop=1),),
        transfers=(Transfer(source=a, target=b, position=0), Transfer(source=b, target=a, position=1)),
        epoch=epoch,
    )


@dataclass
class Two:
    """Nodes a (asker) and b; frames arrive at once and in order; other effects are kept for the test."""

    a: Node = field(
        default_factory=lambda: Node(
            A, 1, links={B: LinkSettings(chunk_bytes=10)}, coordinator=CoordinatorSettings(session=3)
        )
    )
    b: Node = field(default_factory=lambda: Node(B, 1, worker=WorkerSettings(park_limit_bytes=100)))
    seen: list[tuple[NodeId, fx.Effect]] = field(default_factory=list)
    now_s: float = 0.0

    def do(self, name: NodeId, event: ev.Event) -> None:
        todo = [(name, event)]
        while todo:
            here, next_event = todo.pop(0)
            for effect in (self.a if here == A else self.b).handle(next_event, self.now_s):
                if isinstance(effect, fx.Send):
                    todo.append((effect.peer, ev.MessageReceived(peer=here, message=effect.message)))
                else:
                    self.seen.append((here, effect))

    def take(self, name: NodeId, kind: type) -> list:
        """Effects of a kind at a node since the last look."""
        found = [e for n, e in self.seen if n == name and isinstance(e, kind)]
        self.seen = [(n, e) for n, e in self.seen if not (n == name and isinstance(e, kind))]
        return found

    def connect(self) -> None:
        self.do(A, ev.PeerUp(peer=B))
        self.do(B, ev.PeerUp(peer=A))

    def deploy(self, epoch: int = 0) -> None:
        self.do(A, ev.DeployRequested(plan=plan(epoch), parts=(msg.StagePart(stage=0, program=PROGRAM, weights=(WEIGHT,)),)))
        self.do(A, ev.Prepared(session=3, epoch=epoch))
        self.do(B, ev.Prepared(session=3, epoch=epoch))


def connected() -> Two:
    two = Two()
    two.connect()
    return two


def test_missing_content_is_fetched_from_where_it_stopped_before_the_plan_is_in_force() -> None:
    two = connected()
    part = msg.StagePart(stage=0, program=PROGRAM, weights=(WEIGHT,))
    two.do(A, ev.DeployRequested(plan=plan(), parts=(part,)))
    assert [p.parts for p in two.take(B, fx.Prepare)] == [(part,)]
    assert [p.parts for p in two.take(A, fx.Prepare)] == [()]
    two.do(A, ev.Prepared(session=3, epoch=0))
    wanted = (
        msg.BlobRange(number=0, sha256=PROGRAM.sha256, size_bytes=25),
        msg.BlobRange(number=1, sha256=WEIGHT.sha256, size_bytes=40, offset=15),
    )
    two.do(B, ev.BlobsMissing(session=3, epoch=0, blobs=wanted))
    opened = two.take(A, fx.OpenBlob)
    assert [(o.blob, o.offset) for o in opened] == [(PROGRAM, 0), (WEIGHT, 15)]
    stored = two.take(B, fx.StoreChunk)
    assert [(s.body.request, s.offset, s.length) for s in stored] == [
        (0, 0, 10),
        (0, 10, 10),
        (0, 20, 5),
        (1, 0, 10),
        (1, 10, 10),
        (1, 20, 5),
    ]
    two.do(B, ev.TimerFired(timer=("ack", A)))  # small bodies are acknowledged by the short timer
    assert {r.body for r in two.take(A, fx.Release)} == {o.body for o in opened}, "the asker closes what it opened"
    assert len(two.take(B, fx.Prepare)) == 1, "again, now that all is here"
    assert two.take(A, fx.DeployEnded) == []
    two.do(B, ev.Prepared(session=3, epoch=0))
    assert two.take(A, fx.DeployEnded) == [fx.DeployEnded(epoch=0)]


def test_a_request_crosses_both_ways_and_its_memory_is_freed() -> None:
    two = connected()
    two.deploy()
    two.do(A, ev.Submit(request=7))
    body = BodyId(3, 0, 0, 7)
    assert two.take(A, fx.Bind) == [fx.Bind(request=7, body=body)]
    assert two.take(A, fx.Encode) == [fx.Encode(body=body, codec="fp32")]
    two.do(A, ev.Encoded(body=body, size_bytes=35))
    assert sum(s.length for s in two.take(B, fx.StoreChunk)) == 35
    assert two.take(B, fx.Decode) == [fx.Decode(body=body, codec="fp32")]
    assert two.b.held_bytes == 35
    two.do(B, ev.Decoded(body=body))
    assert two.b.held_bytes == 0
    assert two.take(B, fx.Compute) == [fx.Compute(body=body)]
    two.do(B, ev.Computed(body=body))
    back = body._replace(edge=1)
    assert [e.body for e in two.take(B, fx.Encode)] == [back]
    two.do(B, ev.Encoded(body=back, size_bytes=5))
    two.do(A, ev.Decoded(body=back))
    assert two.take(A, fx.Deliver) == [fx.Deliver(request=7, body=back)]


def test_a_node_that_cannot_prepare_leaves_the_former_plan_in_force() -> None:
    two = connected()
    two.deploy(0)
    two.take(A, fx.DeployEnded)
    two.do(A, ev.DeployRequested(plan=plan(1)))
    two.do(A, ev.Prepared(session=3, epoch=1))
    two.do(B, ev.PrepareFailed(session=3, epoch=1, reason="no memory"))
    ended = two.take(A, fx.DeployEnded)
    assert [(e.epoch, e.error) for e in ended] == [(1, "b: no memory")]
    two.do(A, ev.Submit(request=0))
    assert two.take(A, fx.Bind) == [fx.Bind(request=0, body=BodyId(3, 0, 0, 0))]
    assert [(u.epoch) for u in two.take(A, fx.Unload)] == [1]


def test_what_came_before_a_plan_that_cannot_be_prepared_is_freed() -> None:
    two = connected()
    two.deploy(0)
    two.do(A, ev.Submit(request=0, deadline_s=9.0))
    early = BodyId(3, 1, 0, 5)  # of a plan that b does not know yet
    chunk = msg.Chunk(
        sender_incarnation=1, incarnation=1, seq=0, body=early, size_bytes=4, offset=0, length=4, budget_s=5.0,
        background=False, number=1,
    )  # fmt: skip
    two.do(B, ev.MessageReceived(peer=A, message=chunk))
    assert [s.body for s in two.take(B, fx.StoreChunk)] == [early]
    two.do(A, ev.DeployRequested(plan=plan(1)))
    two.take(B, fx.CancelTimer)
    two.do(B, ev.PrepareFailed(session=3, epoch=1, reason="no memory"))
    two.do(B, ev.Decoded(body=early))  # was begun when the plan came
    assert early in {r.body for r in two.take(B, fx.Release) if r.held is fx.Held.BYTES}
    assert ("deadline", 3, 1, 5) in {c.timer for c in two.take(B, fx.CancelTimer)}
    assert two.b.worker.num_queued == 0


def test_a_new_plan_takes_over_and_the_old_one_is_unloaded_when_drained() -> None:
    two = connected()
    two.deploy(0)
    two.do(A, ev.Submit(request=0))
    two.deploy(1)
    assert two.take(B, fx.Unload) == [], "a request still runs under the old plan"
    two.do(A, ev.CancelRequest(request=0))
    assert [u.epoch for u in two.take(B, fx.Unload)] == [0]
    two.do(A, ev.Submit(request=1))
    assert two.take(A, fx.Bind)[-1].body.epoch == 1


def test_an_epoch_must_be_above_all_before() -> None:
    two = connected()
    two.deploy(4)
    two.take(A, fx.DeployEnded)
    two.do(A, ev.DeployRequested(plan=plan(4)))
    assert "not above 4" in two.take(A, fx.DeployEnded)[0].error


def send_chunk(
    node: Node, body: BodyId, size_bytes: int, seq: int, budget_s: float | None = None, peer: NodeId = A
) -> list[fx.Effect]:
    """A chunk that holds a whole body, over an open link."""
    node.handle(ev.MessageReceived(peer=peer, message=msg.LinkOpen(incarnation=1)), 0.0)
    chunk = msg.Chunk(
        sender_incarnation=1,
        incarnation=1,
        seq=seq,
        body=body,
        size_bytes=size_bytes,
        offset=0,
        length=size_bytes,
        budget_s=budget_s,
    )
    return node.handle(ev.MessageReceived(peer=peer, message=chunk), 0.0)


def deploy_b(node: Node, epoch: int) -> list[fx.Effect]:
    letter = msg.Deploy(session=3, epoch=epoch, plan_json=plan(epoch).to_json())
    node.handle(ev.MessageReceived(peer=A, message=msg.LinkOpen(incarnation=1)), 0.0)
    frame = msg.Letter(sender_incarnation=1, incarnation=1, number=0, content=letter)
    return node.handle(ev.MessageReceived(peer=A, message=frame), 0.0)


@pytest.fixture
def b() -> Node:
    return Node(B, 1, worker=WorkerSettings(park_limit_bytes=100))


def test_a_body_of_a_future_plan_waits_for_it_within_the_limit(b: Node) -> None:
    assert any(isinstance(e, fx.StoreChunk) for e in send_chunk(b, BodyId(3, 5, 0, 1), 60, 0))
    assert not any(isinstance(e, fx.StoreChunk) for e in send_chunk(b, BodyId(3, 5, 0, 2), 60, 1)), "beyond the limit"
    work = deploy_b(b, 5)
    assert [e.body for e in work if isinstance(e, fx.Decode)] == [BodyId(3, 5, 0, 1)]


def test_a_body_of_an_older_plan_is_dropped_and_its_credit_returns(b: Node) -> None:
    deploy_b(b, 5)
    effects = send_chunk(b, BodyId(3, 4, 0, 1), 60, 0)
    assert not any(isinstance(e, fx.StoreChunk) for e in effects)
    assert b.held_bytes == 0


def test_a_body_that_comes_past_its_time_is_not_computed(b: Node) -> None:
    deploy_b(b, 5)
    b.handle(ev.Prepared(session=3, epoch=5), 0.0)
    effects = send_chunk(b, BodyId(3, 5, 0, 1), 60, 0, budget_s=0.0)
    assert not any(isinstance(e, fx.Decode) for e in effects)
    assert b.held_bytes == 0


def test_a_body_from_a_node_that_the_plan_does_not_name_is_dropped(b: Node) -> None:
    deploy_b(b, 5)
    assert not any(isinstance(e, fx.StoreChunk) for e in send_chunk(b, BodyId(3, 5, 0, 1), 60, 0, peer=NodeId("x")))
    assert any(isinstance(e, fx.StoreChunk) for e in send_chunk(b, BodyId(3, 5, 0, 1), 60, 0))


def test_a_strangers_cancel_and_close_are_ignored(b: Node) -> None:
    deploy_b(b, 5)
    peer = NodeId("x")
    b.handle(ev.MessageReceived(peer=peer, message=msg.LinkOpen(incarnation=1)), 0.0)
    letters: list[msg.LetterBody] = [msg.CloseSession(session=3), msg.Retire(session=3, epoch=5)]
    for number, content in enumerate(letters):
        frame = msg.Letter(sender_incarnation=1, incarnation=1, number=number, content=content)
        effects = b.handle(ev.MessageReceived(peer=peer, message=frame), 0.0)
        assert not any(isinstance(e, fx.Unload) for e in effects)


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "ecotone.plan"}', plan(9).to_json()])
def test_a_broken_or_mismatched_plan_is_answered_not_raised(b: Node, text: str) -> None:
    b.handle(ev.MessageReceived(peer=A, message=msg.LinkOpen(incarnation=1)), 0.0)
    opened = msg.LinkOpened(sender_incarnation=1, incarnation=1, next_seq=0, next_letter=0, window_bytes=100)
    b.handle(ev.PeerUp(peer=A), 0.0)
    b.handle(ev.MessageReceived(peer=A, message=opened), 0.0)
    letter = msg.Deploy(session=3, epoch=5, plan_json=text)
    frame = msg.Letter(sender_incarnation=1, incarnation=1, number=0, content=letter)
    effects = b.handle(ev.MessageReceived(peer=A, message=frame), 0.0)
    answers = [e.message.content for e in effects if isinstance(e, fx.Send) and isinstance(e.message, msg.Letter)]
    assert [type(c) for c in answers] == [msg.DeployFailed]
    assert answers[0].reason.startswith("b: ")


def test_ping_is_answered() -> None:
    effects = Node(B, 1).handle(ev.MessageReceived(peer=A, message=msg.Ping(nonce=4)), 0.0)
    assert msg.Pong(nonce=4) in [e.message for e in effects if isinstance(e, fx.Send)]
