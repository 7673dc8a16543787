"""One node's whole machine: worker, links to its peers, and at the asker the coordinator. Shells drive only this.

Theory of operation. An event goes to the part that it concerns; what the parts say to one another (notices.py) is handed on
at once, depth first, until only effects remain, in their order. A letter to the node itself does not touch a link, so that
the asker's own worker is driven like any other. The node also notices that a peer is another incarnation (LinkOpen and
LinkOpened carry it) and tells everyone once. See docs/protocol.md for how a shell drives it.
"""

from __future__ import annotations

from collections import deque
from typing import cast, get_args

from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol import message as msg
from ecotone.protocol import notices as nt
from ecotone.protocol.coordinator import Coordinator
from ecotone.protocol.intake import Receiver
from ecotone.protocol.link import Sender
from ecotone.protocol.message import NodeId
from ecotone.protocol.observe import Observer
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings
from ecotone.protocol.worker import Worker

__all__ = ["Node"]

_EFFECTS = frozenset(get_args(fx.Effect))  # isinstance with a union is ten times slower
_CLOSE_PATIENCE_S = 1.0
_TO_COORDINATOR = (msg.Ready, msg.DeployFailed, msg.Want, msg.RequestFinished, msg.RequestFailed, msg.NodeReport)


class _Peer:
    """Both directions of tensor traffic with one peer."""

    __slots__ = ("incarnation", "receiver", "sender")

    def __init__(self, name: NodeId, incarnation: int, settings: LinkSettings) -> None:
        self.sender = Sender(name, incarnation, settings)
        self.receiver = Receiver(name, incarnation, settings)
        self.incarnation = 0  # the peer's


class Node:
    """`incarnation`: above 0 and above that of every earlier process of this node. `coordinator`: only at the asker."""

    def __init__(
        self,
        name: NodeId,
        incarnation: int,
        *,
        links: dict[NodeId, LinkSettings] | None = None,
        worker: WorkerSettings | None = None,
        coordinator: CoordinatorSettings | None = None,
    ) -> None:
        self.name, self.incarnation = name, incarnation
        self.worker = Worker(name, worker or WorkerSettings())
        self.coordinator = Coordinator(name, coordinator, self._rtt_s) if coordinator else None
        self.observer = Observer(self.worker.settings.report_s)
        self._settings = links or {}
        self._peers: dict[NodeId, _Peer] = {}
        self._is_finishing = False
        self._now_s, self._ahead_s = float("-inf"), 0.0  # of the shell's clock, since that was set back

    def handle(self, event: ev.Event, now_s: float) -> list[fx.Effect]:
        """Take one event, return what to do, in order. Never raises for anything that a peer sent.

        For the machines time never goes backwards: a clock that was set back goes on from where it was.
        """
        now_s += self._ahead_s
        if now_s < self._now_s:
            self._ahead_s += self._now_s - now_s
            now_s = self._now_s
        self._now_s = now_s
        pending: deque[nt.Item] = deque(self._take(event, now_s))
        done: list[fx.Effect] = []
        while pending:
            item = pending.popleft()
            if type(item) in _EFFECTS:
                if self._ahead_s and type(item) is fx.SetTimer:
                    item = fx.SetTimer(timer=item.timer, at_s=item.at_s - self._ahead_s)
                done.append(cast(fx.Effect, item))
            else:
                pending.extendleft(reversed(self._hand_on(cast(nt.Notice, item), now_s)))
        if self._is_finishing and not any(peer.sender.num_letters for peer in self._peers.values()):
            self._is_finishing = False
            done += [fx.CancelTimer(timer=("closing",)), fx.Closed()]
        return done

    @property
    def held_bytes(self) -> int:
        """Bytes of arrived bodies that this node holds on credit."""
        return sum(peer.receiver.held_bytes for peer in self._peers.values())

    # ---- events -----------------------------------------------------------------------------------------------------

    def _take(self, event: ev.Event, now_s: float) -> list[nt.Item]:
        match event:
            case ev.MessageReceived():
                return self._received(event.peer, event.message, now_s)
            case ev.Computed(body=body, seconds=seconds, exited=exited):
                self.worker.shares.charge("processor", body.session, seconds)
                return self.observer.worked(body, "compute", seconds, now_s) + self.worker.computed(body, exited)
            case ev.Encoded(body=body, size_bytes=size_bytes, seconds=seconds):
                self.worker.shares.charge("coder", body.session, seconds)
                return self.observer.worked(body, "encode", seconds, now_s) + self.worker.encoded(body, size_bytes, now_s)
            case ev.Decoded(body=body, seconds=seconds):
                self.worker.shares.charge("coder", body.session, seconds)
                return self.observer.worked(body, "decode", seconds, now_s) + self.worker.decoded(body)
            case ev.ProbeLink(peer=peer, size_bytes=size_bytes):
                return self._peer(peer).sender.probe(size_bytes, now_s)
            case ev.WorkFailed(body=body, work=work, reason=reason):
                return self.worker.work_failed(body, work, reason)
            case ev.TimerFired(timer=timer):
                return self._timer_fired(timer, now_s)
            case ev.PeerUp(peer=peer):
                if self.coordinator:
                    self.coordinator.peer_seen(peer)
                return self._peer(peer).sender.connected(now_s)
            case ev.PeerDown(peer=peer):
                return self._peer(peer).sender.disconnected()
            case ev.Prepared(session=session, epoch=epoch):
                return self.worker.prepared((session, epoch), now_s)
            case ev.PrepareFailed(session=session, epoch=epoch, reason=reason):
                return self.worker.prepare_failed((session, epoch), reason)
            case ev.BlobsMissing():
                return self.worker.blobs_missing(event)
        return self._asked(event, now_s)

    def _asked(
        self,
        event: ev.Submit
        | ev.CancelRequest
        | ev.DeployRequested
        | ev.Prefer
        | ev.Expect
        | ev.Recorded
        | ev.RecordFailed
        | ev.CloseRequested,
        now_s: float,
    ) -> list[nt.Item]:
        """What the asker's own program wants; nothing where there is no coordinator."""
        if self.coordinator is None:
            return []
        match event:
            case ev.Submit():
                return self.coordinator.submit(event, now_s)
            case ev.CancelRequest(request=request):
                return self.coordinator.cancel(request, now_s)
            case ev.DeployRequested():
                return self.coordinator.deploy(event, now_s)
            case ev.Prefer(epoch=epoch):
                return self.coordinator.prefer(epoch, now_s)
            case ev.Expect(epoch=epoch, expected_s=expected_s):
                self.coordinator.sets.expect(epoch, expected_s)
                return []
            case ev.Recorded(request=request):
                return self.coordinator.recorded(request, now_s)
            case ev.RecordFailed(request=request, reason=reason):
                return self.coordinator.record_failed(request, reason, now_s)
            case ev.CloseRequested(drain=drain):
                return self.coordinator.close(drain, now_s)

    def _timer_fired(self, timer: ev.TimerId, now_s: float) -> list[nt.Item]:
        match timer:
            case ("link", str(peer)):
                return self._peer(NodeId(peer)).sender.timer_fired(now_s)
            case ("ack", str(peer)):
                return self._peer(NodeId(peer)).receiver.timer_fired(now_s)
            case ("report",):
                senders = (peer.sender for peer in self._peers.values())
                return self.observer.timer_fired(self.worker.askers, senders, self.worker.num_queued, now_s)
            case ("closing",) if self._is_finishing:
                self._is_finishing = False
                return [fx.Closed()]
            case ("request" | "attempt" | "node" | "pong" | "deploy" | "standby" | "patience", _) if self.coordinator:
                return self.coordinator.timer_fired(timer, now_s)
        return self.worker.timer_fired(timer, now_s)

    def _received(self, name: NodeId, message: msg.LinkMessage, now_s: float) -> list[nt.Item]:
        known = name in self._peers
        peer = self._peer(name)
        items: list[nt.Item] = [] if known else peer.sender.connected(now_s)
        peer.sender.heard(now_s, hears_us=isinstance(message, msg.Ack | msg.LinkOpened | msg.Pong))
        mind = self.coordinator
        if mind is not None:
            if not known:
                mind.peer_seen(name)
            if name in mind.suspicion.asked:
                items += mind.heard(name, now_s)
        match message:
            case msg.Chunk():
                return items + self._chunk(peer, message, now_s)
            case msg.Ack():
                items += peer.sender.acked(message, now_s)
                return items + (self.observer.woken(now_s) if peer.sender.timing.is_new else [])
            case msg.Letter():
                return items + peer.receiver.letter(message, now_s)
            case msg.LinkOpen(incarnation=incarnation):
                items += self._meet(peer, name, incarnation, now_s)
                is_new = incarnation > peer.receiver.sender_incarnation
                return items + (peer.receiver.opened_by(message) if peer.sender.may_answer(now_s) or is_new else [])
            case msg.LinkOpened(incarnation=incarnation):
                items += peer.sender.opened(message, now_s)
                return items + self._meet(peer, name, incarnation, now_s)
            case msg.Void():
                return items + peer.receiver.voided(message, now_s)
            case msg.Ping(nonce=nonce):
                pong = msg.Pong(nonce=nonce, num_queued=self.worker.num_queued, num_sessions=self.worker.num_sessions)
                return [*items, fx.Send(peer=name, message=pong, priority=msg.Priority.CONTROL)]
            case msg.Pong():
                items += peer.sender.ponged(message, now_s)
                return items + (self.observer.woken(now_s) if peer.sender.timing.is_new else [])
        return items

    def _chunk(self, peer: _Peer, chunk: msg.Chunk, now_s: float) -> list[nt.Item]:
        if not peer.receiver.is_new(chunk):
            return peer.receiver.take(chunk, False, now_s)
        wanted = self.worker.wants(peer.sender.peer, chunk.body, chunk.size_bytes)
        items = peer.receiver.take(chunk, wanted, now_s)
        if not wanted and chunk.offset == 0:
            items += self.worker.refused(peer.sender.peer, chunk.body)
        return items

    def _meet(self, peer: _Peer, name: NodeId, incarnation: int, now_s: float) -> list[nt.Item]:
        if incarnation <= peer.incarnation:
            return []
        first, peer.incarnation = peer.incarnation == 0, incarnation
        if first:
            return []
        again = peer.sender.connected(now_s) if peer.sender.peer_incarnation != incarnation else []
        return [nt.PeerRestarted(name), *again]

    # ---- notices ----------------------------------------------------------------------------------------------------

    def _hand_on(self, notice: nt.Notice, now_s: float) -> list[nt.Item]:
        match notice:
            case nt.Transmit(peer=peer, body=body, size_bytes=size_bytes):
                return self._peer(peer).sender.offer(body, size_bytes, notice.deadline_s, notice.background, now_s)
            case nt.BodySent(body=body):
                return self.worker.sent(body)
            case nt.BodyAcked(body=body):
                return self.worker.acked(body)
            case nt.BodyArrived():
                return self.worker.arrived(notice, now_s)
            case nt.FreeBody(peer=peer, body=body):
                return self._peer(peer).receiver.free(body, now_s)
            case nt.Post(peer=peer, content=content):
                if peer == self.name:
                    return self._letter(peer, content, now_s)
                return self._peer(peer).sender.post(content, now_s)
            case nt.LetterArrived(peer=peer, content=content):
                return self._letter(peer, content, now_s)
            case nt.Begin():
                return self.worker.begin(notice)
            case nt.Reached(body=body):
                return self.coordinator.reached(body, now_s) if self.coordinator else []
            case nt.GiveUp(peer=peer, body=body):
                return self._peer(peer).sender.give_up(body, now_s)
            case nt.BodyFailed(body=body, kind=kind, reason=reason):
                return self.worker.send_failed(body, kind, reason)
            case nt.DropRequest(body=body):
                return [fx.Release(body=body, held=fx.Held.TENSORS)]
        return self._told(notice, now_s)

    def _told(
        self, notice: nt.PeerLost | nt.PeerReturned | nt.PeerRestarted | nt.Forget | nt.Finish, now_s: float
    ) -> list[nt.Item]:
        mind = self.coordinator
        match notice:
            case nt.PeerLost(peer=peer):
                return self.worker.peer_lost(peer, now_s) + (mind.peer_lost(peer, now_s) if mind else [])
            case nt.PeerReturned(peer=peer):
                return self.worker.peer_returned(peer) + (mind.peer_returned(peer, now_s) if mind else [])
            case nt.PeerRestarted(peer=peer):
                return self.worker.asker_restarted(peer) + (mind.peer_restarted(peer, now_s) if mind else [])
            case nt.Forget(session=session, epoch=epoch):
                items: list[nt.Item] = []
                for both in self._peers.values():
                    items += both.sender.forget(session, epoch, now_s) + both.receiver.forget(session, epoch)
                return items
            case nt.Finish():
                self._is_finishing = True
                return [fx.SetTimer(timer=("closing",), at_s=now_s + _CLOSE_PATIENCE_S)]

    def _letter(self, peer: NodeId, content: msg.LetterBody, now_s: float) -> list[nt.Item]:
        mind = self.coordinator
        if isinstance(content, msg.NodeReport):
            return [fx.Observed(peer=peer, report=content)] if mind and content.session == mind.settings.session else []
        if mind and isinstance(content, _TO_COORDINATOR) and content.session == mind.settings.session:
            return mind.letter(peer, content, now_s)
        return self.worker.letter(peer, content, now_s)

    def _rtt_s(self, name: NodeId) -> float:
        """Least round trip of a small frame to a peer of late, 0 where none was timed."""
        return self._peers[name].sender.timing.rtt_s if name in self._peers else 0.0

    def _peer(self, name: NodeId) -> _Peer:
        peer = self._peers.get(name)
        if peer is None:
            peer = self._peers[name] = _Peer(name, self.incarnation, self._settings.get(name, LinkSettings()))
        return peer
