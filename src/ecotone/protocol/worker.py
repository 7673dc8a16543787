"""The worker of one node: which stage computes next, what is encoded, decoded, sent and freed. Pure.

Theory of operation. A request has one live frontier at a time; it moves along edges 0..k of its plan (see plan.py), and may
leave after a stage with an exit: what it has made then goes over the stage's exit edge to the sink. Here:

    body arrives -> [arrived] -> Decode -> [inputs of stage i] -> Compute -> [to encode] -> Encode -> link
                                                  ^ local edges, and edge 0 at the source: tensors enter here

One Compute at a time (one processor), and one Encode or Decode at a time beside it, so that transfer overlaps compute; the
latest stage and edge go first, which drains the pipeline; of several sessions each has its share (fairness.py). Queues are
bounded: a body is decoded only while fewer than `queue_limit` inputs of its stage wait, and its bytes (the link's credit)
are freed by that; a stage starts only while fewer than `queue_limit` of its outputs are not yet given to the wire, on its
exit edge as well. (Boundaries that a twin waits for are made even so: one for each request in flight at most.) Every edge
has its own credit and the sink always takes, so exit edges drain, and by induction from the sink each stage moves on: no
deadlock, also where a device holds several stages.

Plans are kept by (session, epoch). Bodies of an unknown, newer epoch are parked within a byte limit until their plan comes;
those of a retired one are dropped. A run whose budget ends, that is cancelled or that fails here, is dropped here and
remembered for a while, since its body may still arrive. All is keyed by runs, several of which may be of one request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from ecotone.cluster import DeviceId
from ecotone.plan import Plan
from ecotone.protocol.effects import CancelTimer, Compute, Decode, Encode, Held, Output, Prepare, Release, SetTimer, Unload
from ecotone.protocol.epochs import ActiveRun, EpochWork, removed
from ecotone.protocol.events import BlobsMissing, ErrorKind, TimerId
from ecotone.protocol.fairness import Shares
from ecotone.protocol.intake import BLOB_NUMBER_MASK
from ecotone.protocol.message import (
    BLOB_EDGE,
    BodyId,
    Cancel,
    CloseSession,
    Deploy,
    DeployFailed,
    LetterBody,
    NodeId,
    Ready,
    RequestFailed,
    RequestFinished,
    Retire,
    Want,
    request_of,
)
from ecotone.protocol.notices import Begin, BodyArrived, Forget, FreeBody, GiveUp, Item, Post, Reached, Transmit
from ecotone.protocol.parking import Parking
from ecotone.protocol.settings import WorkerSettings
from ecotone.schema import SchemaError

__all__ = ["Worker"]

EpochKey = tuple[int, int]
RequestKey = tuple[int, int, int]
_K = TypeVar("_K")
_REMEMBERED = 4096  # dropped requests and closed sessions that are remembered


class Worker:
    """Items that it returns are effects for the shell and notices for the links (see notices.py)."""

    def __init__(self, name: NodeId, settings: WorkerSettings) -> None:
        self.name, self.settings = name, settings
        self.shares = Shares(settings.max_sessions, settings.max_load)
        self._device = DeviceId(name)
        self._epochs: dict[EpochKey, EpochWork] = {}
        self._newest: dict[int, int] = {}  # session -> newest epoch that was deployed here
        self._gone: dict[EpochKey, None] = {}  # retired, or could not be prepared
        self._lapsed: dict[int, NodeId] = {}  # sessions that were dropped because their asker was silent
        self._handed_out: dict[tuple[int, int], None] = {}  # requests whose outputs this sink has
        self._closed: dict[int, None] = {}
        self._active: dict[RequestKey, ActiveRun] = {}
        self._dropped: dict[RequestKey, None] = {}
        self._parking = Parking(settings.park_limit_bytes)
        self._unreachable: dict[NodeId, bool] = {}  # lost peers; whether the timer is set
        self._gaps: dict[NodeId, set[EpochKey]] = {}  # plans whose asker was told that this peer is lost
        self._computing: BodyId | None = None
        self._exit_edge: int | None = None  # of the stage that computes, while its plan may be retired
        self._coding: BodyId | None = None

    @property
    def num_queued(self) -> int:
        """Requests that have something here."""
        return len(self._active)

    @property
    def askers(self) -> dict[int, NodeId]:
        """Who is told of this node, by session."""
        return {session: epoch.asker for (session, _), epoch in self._epochs.items()}

    @property
    def epochs(self) -> tuple[EpochKey, ...]:
        """(session, epoch) of the plans that this node takes part in."""
        return tuple(self._epochs)

    @property
    def num_sessions(self) -> int:
        return len({session for session, _ in self._epochs})

    # ---- deployment -------------------------------------------------------------------------------------------------

    def letter(self, peer: NodeId, content: LetterBody, now_s: float) -> list[Item]:
        """What an asker says to this worker; anything else is ignored."""
        match content:
            case Deploy():
                return self._deploy(peer, content, now_s)
            case Retire(session=session, epoch=epoch) if self._is_asker(peer, session):
                return self._retire(session, epoch)
            case CloseSession(session=session) if self._is_asker(peer, session):
                return self._close(session)
            case Retire(session=session, epoch=epoch) if not self._has_session(session):
                return [*self._parking.drop(session, epoch), Forget(session, epoch)]  # nobody's, as after a restart
            case CloseSession(session=session) if not self._has_session(session):
                return [*self._parking.drop(session, None), Forget(session, None)]
            case Cancel(session=session, epoch=epoch, request=request) if self._is_asker(peer, session):
                return self._drop((session, epoch, request)) + self._advance()
            case RequestFailed(session=session, epoch=epoch) if (session, epoch) in self._epochs:
                found = self._epochs[session, epoch]
                return [] if found.asker == self.name else [Post(found.asker, content)]
        return []

    def prepared(self, key: EpochKey, now_s: float) -> list[Item]:
        """The shell has loaded and warmed this epoch."""
        epoch = self._epochs.get(key)
        if epoch is None:
            return [Unload(session=key[0], epoch=key[1])]
        epoch.is_ready = True
        return [Post(epoch.asker, Ready(session=key[0], epoch=key[1])), *self._advance()]

    def prepare_failed(self, key: EpochKey, reason: str) -> list[Item]:
        """The shell cannot load this epoch; bodies that came before their plan did are dropped with it."""
        epoch = self._epochs.get(key)
        if epoch is None:
            return []
        _remember(self._gone, key)
        failed = DeployFailed(session=key[0], epoch=key[1], reason=f"{self.name}: {reason}")
        return [*self._unload(key), Post(epoch.asker, failed), *self._advance()]

    def blobs_missing(self, event: BlobsMissing) -> list[Item]:
        """Ask the asker for content; numbers get the node's rank, so that no two nodes ask under one number."""
        epoch = self._epochs.get((event.session, event.epoch))
        if epoch is None or not event.blobs:
            return []
        plan = epoch.plan
        rank = (plan.source, *plan.devices, plan.sink).index(self._device) * (BLOB_NUMBER_MASK + 1)
        epoch.wanted = {blob.number for blob in event.blobs}
        blobs = tuple(replace(blob, number=blob.number + rank) for blob in event.blobs)
        return [Post(epoch.asker, Want(session=event.session, epoch=event.epoch, blobs=blobs))]

    def asker_restarted(self, peer: NodeId) -> list[Item]:
        """The peer lost its memory: its sessions are nobody's now."""
        sessions = {session for (session, _), epoch in self._epochs.items() if epoch.asker == peer}
        sessions.update(session for session, asker in self._lapsed.items() if asker == peer)
        return [item for session in sorted(sessions) for item in self._close(session)]

    def peer_lost(self, peer: NodeId, now_s: float) -> list[Item]:
        """Give the sessions of a silent asker some time, and the runs that are on their way to a silent peer."""
        sessions = {session for (session, _), epoch in self._epochs.items() if epoch.asker == peer}
        at_s = now_s + self.settings.session_timeout_s
        items: list[Item] = [SetTimer(timer=("session", session), at_s=at_s) for session in sorted(sessions)]
        self._unreachable[peer] = False
        return items + self._watch_reach(peer, now_s)

    def peer_returned(self, peer: NodeId) -> list[Item]:
        """The peer answers again."""
        sessions = {session for (session, _), epoch in self._epochs.items() if epoch.asker == peer}
        items: list[Item] = [CancelTimer(timer=("session", session)) for session in sorted(sessions)]
        if self._unreachable.pop(peer, False):
            items.append(CancelTimer(timer=("reach", peer)))
        for key in sorted(self._gaps.pop(peer, ())):
            epoch = self._epochs.get(key)
            if epoch is not None and epoch.is_ready:
                items.append(Post(epoch.asker, Ready(session=key[0], epoch=key[1])))
        return items

    def _watch_reach(self, peer: NodeId, now_s: float) -> list[Item]:
        if self._unreachable.get(peer, True) or not self._on_the_way(peer):
            return []
        self._unreachable[peer] = True
        return [SetTimer(timer=("reach", peer), at_s=now_s + self.settings.reach_timeout_s)]

    def _on_the_way(self, peer: NodeId) -> list[RequestKey]:
        """Runs with a body for `peer`. Not those whose asker is at an end of that link: it sees the loss itself."""
        found = []
        for key, active in self._active.items():
            epoch = self._epochs[key[:2]]
            ends = (epoch.edges[body.edge] for body in active.bodies)
            if epoch.asker not in (self.name, peer) and any(
                t.source == self._device != t.target == DeviceId(peer) for t in ends
            ):
                found.append(key)
        return found

    def _cannot_reach(self, peer: NodeId, now_s: float) -> list[Item]:
        """`peer` was lost for `reach_timeout_s`: tell the askers of the runs that wait for it."""
        if peer not in self._unreachable:
            return []
        self._unreachable[peer] = False
        items: list[Item] = []
        for key in self._on_the_way(peer):
            self._gaps.setdefault(peer, set()).add(key[:2])
            items += self._fail(key, ErrorKind.NODE_LOST, f"{peer} cannot be reached from {self.name}")
        return items

    def timer_fired(self, timer: TimerId, now_s: float) -> list[Item]:
        """A run's deadline ("deadline", session, epoch, run), or the end of patience ("session", number; "reach", peer)."""
        match timer:
            case ("session", int(session)):
                return self._lapse(session)
            case ("reach", str(peer)):
                return self._cannot_reach(NodeId(peer), now_s)
            case ("deadline", int(session), int(epoch), int(request)):
                return self._fail((session, epoch, request), ErrorKind.DEADLINE, "its time was over")
        return []

    # ---- bodies -----------------------------------------------------------------------------------------------------

    def wants(self, peer: NodeId, body: BodyId, size_bytes: int) -> bool:
        """Whether chunks of this body are to be kept: not of old epochs or dropped requests; future ones within a limit."""
        session, number, edge, request = body
        epoch = self._epochs.get((session, number))
        if epoch is not None:
            if edge == BLOB_EDGE:
                return peer == epoch.asker and request & BLOB_NUMBER_MASK in epoch.wanted
            ours = 0 <= edge < len(epoch.edges) and epoch.edges[edge].target == self._device
            return ours and epoch.edges[edge].source == DeviceId(peer) and (session, number, request) not in self._dropped
        known_old = session in self._closed or number <= self._newest.get(session, -1) or edge == BLOB_EDGE
        return not known_old and self._parking.admits(body, size_bytes)

    def refused(self, peer: NodeId, body: BodyId) -> list[Item]:
        """Tell the node before us that this body was dropped for want of room or plan (it tells the asker)."""
        session, epoch, _, request = body
        if (session, epoch) in self._epochs or session in self._closed or epoch <= self._newest.get(session, -1):
            return []
        reason = f"{self.name} does not know plan {epoch} and has no room to wait for it"
        kind = ErrorKind.CLOSED.value  # as after a restart: the plan is to come, another run may fare better
        return [Post(peer, RequestFailed(session=session, epoch=epoch, request=request, kind=kind, reason=reason))]

    def arrived(self, arrival: BodyArrived, now_s: float) -> list[Item]:
        """A whole body is here, encoded."""
        body = arrival.body
        session, number, edge, request = body
        epoch = self._epochs.get((session, number))
        if epoch is None:
            self._parking.arrived(arrival)
            return []
        if edge == BLOB_EDGE:
            epoch.wanted.discard(request & BLOB_NUMBER_MASK)
            again = Prepare(session=session, epoch=number, plan=epoch.plan, parts=epoch.parts)
            return [] if epoch.wanted else [again]
        key = (session, number, request)
        if key in self._dropped or (arrival.budget_s is not None and arrival.budget_s <= 0):
            free: list[Item] = [Release(body=body, held=Held.BYTES), FreeBody(arrival.peer, body)]
            return free if key in self._dropped else free + self._fail(key, ErrorKind.DEADLINE, "arrived too late")
        items = self._enter(body, None if arrival.budget_s is None else now_s + arrival.budget_s)
        epoch.arrived.setdefault(edge, deque()).append(body)
        return items + self._advance()

    def begin(self, start: Begin) -> list[Item]:
        """The inputs of a run, at the source, or the tensors of an edge at which an earlier run had arrived."""
        body = start.body
        epoch = self._epochs.get((body.session, body.epoch))
        if epoch is None or _key(body) in self._dropped:  # a twin's result may end the run before it begins
            return [Release(body=body, held=Held.TENSORS)]
        items = self._enter(body, start.deadline_s)
        active = self._active[_key(body)]
        active.tell, active.is_awaited = start.tell, start.is_awaited
        return items + self._route(epoch, body) + self._advance()

    def computed(self, body: BodyId, exited: bool = False) -> list[Item]:
        """Stage body.edge is done with this request, which leaves there if it `exited`."""
        self._computing = None
        made = body._replace(edge=self._exit_edge if exited and self._exit_edge is not None else body.edge + 1)
        items: list[Item] = [Release(body=body, held=Held.TENSORS)]
        epoch, active = self._epochs.get((body.session, body.epoch)), self._active.get(_key(body))
        if epoch is None or active is None or body not in active.bodies:
            return [*items, Release(body=made, held=Held.TENSORS), *self._advance()]
        active.bodies.discard(body)
        active.bodies.add(made)
        if made.edge in active.tell:
            items.append(Reached(made))
        return items + self._route(epoch, made) + self._advance()

    def encoded(self, body: BodyId, size_bytes: int, now_s: float) -> list[Item]:
        """The bytes of an outgoing body are here."""
        self._coding = None
        items: list[Item] = [Release(body=body, held=Held.TENSORS)]
        epoch, active = self._epochs.get((body.session, body.epoch)), self._active.get(_key(body))
        if epoch is None or active is None or body not in active.bodies:
            return [*items, Release(body=body, held=Held.BYTES), *self._advance()]
        peer = NodeId(epoch.edges[body.edge].target)
        items.append(Transmit(peer, body, size_bytes, active.deadline_s))
        return items + self._watch_reach(peer, now_s) + self._advance()

    def decoded(self, body: BodyId) -> list[Item]:
        """The tensors of an incoming body are here; its bytes, and so the link's credit, are freed."""
        self._coding = None
        epoch, active = self._epochs.get((body.session, body.epoch)), self._active.get(_key(body))
        items: list[Item] = [Release(body=body, held=Held.BYTES)]
        if epoch is not None:
            items.append(FreeBody(NodeId(epoch.edges[body.edge].source), body))
        if epoch is None or active is None or body not in active.bodies:
            return [*items, Release(body=body, held=Held.TENSORS), *self._advance()]
        return items + self._route(epoch, body) + self._advance()

    def work_failed(self, body: BodyId, work: str, reason: str) -> list[Item]:
        """A Compute, Encode or Decode raised: the request ends, the worker goes on."""
        if work == "compute":
            self._computing = None
        else:
            self._coding = None
        items: list[Item] = [Release(body=body, held=Held.TENSORS), Release(body=body, held=Held.BYTES)]
        epoch = self._epochs.get((body.session, body.epoch))
        if epoch is not None and work == "decode":
            items.append(FreeBody(NodeId(epoch.edges[body.edge].source), body))
        if epoch is not None and _key(body) in self._active:
            self._active[_key(body)].bodies.discard(body)
            epoch.unsent.get(body.edge, set()).discard(body)
        what = f"stage {body.edge}" if work == "compute" else f"transfer {body.edge}"
        return items + self._fail(_key(body), ErrorKind.FAILED, f"{work} of {what} failed: {reason}")

    def sent(self, body: BodyId) -> list[Item]:
        """The wire has all of an outgoing body: its stage may start another."""
        epoch = self._epochs.get((body.session, body.epoch))
        if epoch is None or body.edge == BLOB_EDGE:
            return []
        epoch.unsent[body.edge].discard(body)
        return self._advance()

    def acked(self, body: BodyId) -> list[Item]:
        """The next node has it: nothing of it is here any more."""
        return [] if body.edge == BLOB_EDGE else self._leave(body)

    def send_failed(self, body: BodyId, kind: ErrorKind, reason: str) -> list[Item]:
        """The link gave a body up. Where its peer restarted, `peer_returned` follows."""
        epoch = self._epochs.get((body.session, body.epoch))
        if body.edge == BLOB_EDGE:
            return []
        if kind is ErrorKind.NODE_LOST and epoch is not None:
            peer = NodeId(epoch.edges[body.edge].target)
            self._gaps.setdefault(peer, set()).add((body.session, body.epoch))
        return self._fail(_key(body), kind, reason)

    # ---- inside: requests -------------------------------------------------------------------------------------------

    def _enter(self, body: BodyId, deadline_s: float | None) -> list[Item]:
        active = self._active.get(_key(body))
        if active is not None:
            active.bodies.add(body)
            return []
        self._active[_key(body)] = ActiveRun(deadline_s, {body})
        return [] if deadline_s is None else [SetTimer(timer=("deadline", *_key(body)), at_s=deadline_s)]

    def _leave(self, body: BodyId) -> list[Item]:
        active = self._active.get(_key(body))
        if active is None:
            return []
        active.bodies.discard(body)
        if active.bodies:
            return []
        del self._active[_key(body)]
        return [] if active.deadline_s is None else [CancelTimer(timer=("deadline", *_key(body)))]

    def _route(self, epoch: EpochWork, body: BodyId) -> list[Item]:
        """Tensors of edge body.edge are at this node: into a stage, to the coder, or out."""
        transfer = epoch.edges[body.edge]
        if transfer.target != self._device:
            epoch.to_encode.setdefault(body.edge, deque()).append(body)
            epoch.unsent.setdefault(body.edge, set()).add(body)
            return []
        if epoch.feeds_stage(body.edge):
            epoch.inputs.setdefault(body.edge, deque()).append(body)
            return []
        items = self._leave(body)
        if epoch.asker != self.name:  # of the runs of a request only the first hands its outputs out
            request = (body.session, request_of(body.request))
            items.append(Release(body=body, held=Held.TENSORS) if request in self._handed_out else Output(body=body))
            _remember(self._handed_out, request)
        finished = RequestFinished(session=body.session, epoch=body.epoch, request=body.request, edge=body.edge)
        return [*items, Post(epoch.asker, finished)]

    def _fail(self, key: RequestKey, kind: ErrorKind, reason: str) -> list[Item]:
        epoch = self._epochs.get(key[:2])
        known = key in self._dropped
        items = self._drop(key)
        if epoch is not None and not known:
            session, number, request = key
            failed = RequestFailed(session=session, epoch=number, request=request, kind=kind.value, reason=reason)
            items.append(Post(epoch.asker, failed))
        return items + self._advance()

    def _drop(self, key: RequestKey) -> list[Item]:
        """Forget a request: free what waits; work in progress frees its own when it ends."""
        _remember(self._dropped, key)
        active, epoch = self._active.pop(key, None), self._epochs.get(key[:2])
        if active is None or epoch is None:
            return []
        items: list[Item] = [CancelTimer(timer=("deadline", *key))] if active.deadline_s is not None else []
        for body in sorted(active.bodies):
            if body in (self._computing, self._coding):
                epoch.unsent.get(body.edge, set()).discard(body)
            elif removed(epoch.arrived, body):
                peer = NodeId(epoch.edges[body.edge].source)
                items += [Release(body=body, held=Held.BYTES), FreeBody(peer, body)]
            elif removed(epoch.inputs, body):
                items.append(Release(body=body, held=Held.TENSORS))
            elif removed(epoch.to_encode, body):
                epoch.unsent[body.edge].discard(body)
                items.append(Release(body=body, held=Held.TENSORS))
            else:
                epoch.unsent[body.edge].discard(body)
                items.append(GiveUp(NodeId(epoch.edges[body.edge].target), body))
        return items

    # ---- inside: epochs ---------------------------------------------------------------------------------------------

    def _has_session(self, session: int) -> bool:
        return session in self._lapsed or any(own == session for own, _ in self._epochs)

    def _is_asker(self, peer: NodeId, session: int) -> bool:
        if self._lapsed.get(session) == peer:
            return True
        return any(epoch.asker == peer for (own, _), epoch in self._epochs.items() if own == session)

    def _deploy(self, peer: NodeId, deploy: Deploy, now_s: float) -> list[Item]:
        key = (deploy.session, deploy.epoch)
        known = self._epochs.get(key)
        if known is not None and known.asker == peer:
            return [Post(peer, Ready(session=deploy.session, epoch=deploy.epoch))] if known.is_ready else []
        reason, plan = self._deploy_violation(peer, deploy)
        if plan is None:
            return [Post(peer, DeployFailed(session=deploy.session, epoch=deploy.epoch, reason=f"{self.name}: {reason}"))]
        self._newest[deploy.session] = max(deploy.epoch, self._newest.get(deploy.session, -1))
        self._epochs[key] = EpochWork(plan=plan, asker=peer, parts=deploy.parts)
        items: list[Item] = [Prepare(session=deploy.session, epoch=deploy.epoch, plan=plan, parts=deploy.parts)]
        for arrival in self._parking.take(key):
            if self.wants(arrival.peer, arrival.body, arrival.size_bytes):
                items += self.arrived(arrival, now_s)
            else:
                items += [Release(body=arrival.body, held=Held.BYTES), FreeBody(arrival.peer, arrival.body)]
        return items

    def _deploy_violation(self, peer: NodeId, deploy: Deploy) -> tuple[str, Plan | None]:
        session = deploy.session
        if session in self._closed or (session, deploy.epoch) in self._gone:
            return "this plan was retired", None
        if any(own == session and epoch.asker != peer for (own, _), epoch in self._epochs.items()):
            return "the session belongs to another asker", None
        try:
            plan = _read_plan(deploy.plan_json)
        except SchemaError as error:
            return str(error), None
        if plan.epoch != deploy.epoch or self._device not in (plan.source, plan.sink, *plan.devices):
            return "the plan has another epoch, or no part for this node", None
        mine = {i for i, stage in enumerate(plan.stages) if stage.device == self._device}
        if not {part.stage for part in deploy.parts} <= mine:
            return "parts of other nodes were sent", None
        refusal = self.shares.admit(deploy, self._epochs)
        return refusal, None if refusal else plan

    def _retire(self, session: int, number: int) -> list[Item]:
        if (session, number) in self._epochs:
            _remember(self._gone, (session, number))
        items = self._unload((session, number)) + self._parking.drop(session, number)
        return [*items, Forget(session, number), *self._advance()]

    def _unload(self, key: EpochKey) -> list[Item]:
        items: list[Item] = []
        for run in [k for k in self._active if k[:2] == key]:
            items += self._drop(run)
        if self._epochs.pop(key, None) is not None:
            items.append(Unload(session=key[0], epoch=key[1]))
        return items

    def _lapse(self, session: int) -> list[Item]:
        """The asker was silent for long: free all of its session, and tell it; it may come back and deploy again.

        The accounts of the links stay, since the asker counts on.
        """
        items: list[Item] = []
        for key in sorted(k for k in self._epochs if k[0] == session):
            asker = self._epochs[key].asker
            reason = f"{self.name}: {asker} was silent for {self.settings.session_timeout_s:g} s"
            items += self._unload(key)
            items.append(Post(asker, DeployFailed(session=session, epoch=key[1], reason=reason)))
            self._lapsed[session] = asker
        return items + self._advance()

    def _close(self, session: int) -> list[Item]:
        _remember(self._closed, session)
        self._lapsed.pop(session, None)
        items: list[Item] = [CancelTimer(timer=("session", session))]
        for _, number in sorted(k for k in self._epochs if k[0] == session):
            items += self._retire(session, number)
        self._newest.pop(session, None)
        return [*items, *self._parking.drop(session, None), Forget(session, None)]

    # ---- inside: scheduling -----------------------------------------------------------------------------------------

    def _advance(self) -> list[Item]:
        items: list[Item] = []
        if self._computing is None and (body := self._next_compute()) is not None:
            self._computing = body
            items.append(Compute(body=body))
        if self._coding is None and (coding := self._next_coding()) is not None:
            self._coding = coding.body
            items.append(coding)
        return items

    def _next_compute(self) -> BodyId | None:
        """The latest stage whose outputs have room, of the oldest epoch that has one, of the session whose turn it is."""
        limit = self.settings.queue_limit
        for (session, _), epoch in self.shares.order("processor", self._epochs):
            best = -1
            for stage, waiting in epoch.inputs.items():
                if not waiting or stage <= best or not epoch.is_ready:
                    continue
                if epoch.may_start(stage, self._device, limit) or self._is_awaited(waiting[0]):
                    best = stage
            if best >= 0:
                self.shares.picked("processor", session)
                self._exit_edge = epoch.exit_edges.get(best)
                return epoch.inputs[best].popleft()
        return None

    def _is_awaited(self, body: BodyId) -> bool:
        """A twin waits for what this stage makes: it must not depend on the link of the other run."""
        active = self._active[_key(body)]
        return active.is_awaited and bool(active.tell) and body.edge < active.tell[-1]

    def _next_coding(self) -> Encode | Decode | None:
        """The latest edge that waits to be encoded, or decoded where its stage has room, of the oldest epoch, in turn."""
        limit = self.settings.queue_limit
        for (session, _), epoch in self.shares.order("coder", self._epochs):
            best, queues = -1, epoch.to_encode
            for edge, waiting in epoch.to_encode.items():
                if waiting and edge > best:
                    best = edge
            for edge, waiting in epoch.arrived.items():
                if waiting and edge > best and epoch.has_room(edge, self._device, limit):
                    best, queues = edge, epoch.arrived
            if best >= 0:
                self.shares.picked("coder", session)
                body, codec = queues[best].popleft(), epoch.edges[best].codec
                return Encode(body=body, codec=codec) if queues is epoch.to_encode else Decode(body=body, codec=codec)
        return None


@lru_cache(maxsize=256)
def _read_plan(text: str) -> Plan:
    return Plan.from_json(text)


def _key(body: BodyId) -> RequestKey:
    return (body.session, body.epoch, body.request)


def _remember(known: dict[_K, None], key: _K) -> None:
    known[key] = None
    if len(known) > _REMEMBERED:
        del known[next(iter(known))]
