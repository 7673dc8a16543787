"""The coordinator at the asker: accepts requests, deploys plans, ends every accepted request exactly once. Pure.

Theory of operation. A request: refused (BUSY, CLOSED, NODE_LOST), or accepted and then

    waiting -> running (inputs bound to the epoch in force, begun at the source) -> finished -> delivered
         \\_________\\______ deadline, cancellation, failure, node lost: RequestError, and Cancel to the plan's nodes

At most `max_in_flight` requests run or are held back for order; at most `queue_limit` wait; more are refused. With `ordered`
a result is held until every request accepted before it has ended; errors are told at once. A number that was ended is
remembered for a while: asking again neither runs nor answers it twice, and late results of it are released.

A plan: Deploy to every node of it -> each answers Want (content, sent as background bodies) or Ready -> all Ready: the epoch
is in force, new requests go there, those that run finish under theirs, and an epoch without requests is retired: make before
break. A failure or the end of patience leaves the former plan in force. A node of the plan that is lost holds new requests
back; for longer than `node_timeout_s`, requests end with NODE_LOST. One that restarted ends those that ran at once (what it
held is gone) and gets its part of the plan again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ecotone.cluster import DeviceId
from ecotone.plan import Plan
from ecotone.protocol.effects import Accepted, Bind, CancelTimer, Deliver, DeployEnded, OpenBlob, RequestError, SetTimer
from ecotone.protocol.events import ErrorKind, Submit, TimerId
from ecotone.protocol.message import (
    BLOB_EDGE,
    Blob,
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
    StagePart,
    Want,
)
from ecotone.protocol.notices import Begin, DropRequest, Finish, Item, Post, Transmit
from ecotone.protocol.settings import CoordinatorSettings

__all__ = ["Coordinator"]

_REMEMBERED = 1 << 16  # ended requests that are remembered


@dataclass(slots=True)
class _Request:
    deadline_s: float | None
    epoch: int | None = None  # None: waiting
    is_finished: bool = False  # held for order


@dataclass(slots=True)
class _Deployment:
    plan: Plan
    parts: tuple[StagePart, ...]
    nodes: tuple[NodeId, ...]
    not_ready: set[NodeId]
    running: set[int] = field(default_factory=set)


class Coordinator:
    """Items that it returns are effects for the shell and notices for worker and links (see notices.py)."""

    def __init__(self, name: NodeId, settings: CoordinatorSettings) -> None:
        self.name, self.settings = name, settings
        self._requests: dict[int, _Request] = {}  # in the order of acceptance
        self._waiting: deque[int] = deque()
        self._num_in_flight = 0  # running, or held for order
        self._ended: dict[int, None] = {}
        self._deployments: dict[int, _Deployment] = {}  # by epoch: pending, in force, draining
        self._in_force: int | None = None
        self._pending: int | None = None
        self._newest = -1
        self._lost: set[NodeId] = set()
        self._given_up: set[NodeId] = set()  # lost beyond patience
        self._told: set[NodeId] = set()
        self._is_closing = self._is_stopping = self._is_closed = False

    @property
    def num_requests(self) -> int:
        """Accepted and not yet ended."""
        return len(self._requests)

    @property
    def in_force(self) -> Plan | None:
        """The plan that new requests follow."""
        return None if self._in_force is None else self._deployments[self._in_force].plan

    # ---- requests ---------------------------------------------------------------------------------------------------

    def submit(self, event: Submit, now_s: float) -> list[Item]:
        """Accept or refuse; a number that was seen is not run again."""
        request = event.request
        if request in self._requests:
            return [Accepted(request=request)]
        if request in self._ended:
            return []
        if self._is_closing or self._in_force is None:
            reason = "the session is closing" if self._is_closing else "no plan is in force; deploy one first"
            return [RequestError(request=request, kind=ErrorKind.CLOSED, reason=reason)]
        gone = self._given_up.intersection(self._deployments[self._in_force].nodes)
        if gone:
            reason = f"{', '.join(sorted(gone))} cannot be reached; plan without it or bring it back"
            return [RequestError(request=request, kind=ErrorKind.NODE_LOST, reason=reason)]
        if len(self._waiting) >= self.settings.queue_limit:
            reason = f"{len(self._waiting)} requests wait already; ask again later"
            return [RequestError(request=request, kind=ErrorKind.BUSY, reason=reason)]
        deadline_s = None if event.deadline_s is None else now_s + event.deadline_s
        self._requests[request] = _Request(deadline_s)
        self._waiting.append(request)
        items: list[Item] = [Accepted(request=request)]
        if deadline_s is not None:
            items.append(SetTimer(timer=("request", request), at_s=deadline_s))
        return items + self._dispatch()

    def cancel(self, request: int) -> list[Item]:
        """End a request that is no longer wanted; unknown or ended ones are ignored."""
        return self._fail(request, ErrorKind.CANCELLED, "cancelled")

    def close(self, drain: bool) -> list[Item]:
        """Accept nothing more; with `drain` finish first, else end everything now."""
        self._is_closing = True
        items: list[Item] = []
        if not drain or self._in_force is None:
            self._is_stopping = True
            for request in list(self._requests):
                items += self._fail(request, ErrorKind.CLOSED, "the session was closed")
        return items + self._finish()

    # ---- what nodes say ---------------------------------------------------------------------------------------------

    def letter(self, peer: NodeId, content: LetterBody, now_s: float) -> list[Item]:
        """A node's answer; of another session or an unknown epoch it is ignored."""
        session = self.settings.session
        match content:
            case RequestFinished(session=own, epoch=epoch, request=request) if own == session:
                return self._finished(epoch, request)
            case RequestFailed(session=own, request=request) if own == session:
                running = self._requests.get(request)
                if running is None or running.epoch != content.epoch or running.is_finished:
                    return []
                kind = ErrorKind(content.kind) if content.kind in set(ErrorKind) else ErrorKind.FAILED
                return self._fail(request, kind, f"{content.reason} (told by {peer})")
            case Ready(session=own, epoch=epoch) if own == session and epoch in self._deployments:
                return self._ready(peer, epoch)
            case DeployFailed(session=own, epoch=epoch, reason=reason) if own == session:
                return self._deploy_failed(epoch, reason)
            case Want(session=own, epoch=epoch) if own == session and epoch in self._deployments:
                return self._send_blobs(peer, content)
        return []

    def peer_lost(self, peer: NodeId, now_s: float) -> list[Item]:
        """A node cannot be reached: hold new requests back, and be patient for a while."""
        if peer in self._lost or not any(peer in d.nodes for d in self._deployments.values()):
            return []
        self._lost.add(peer)
        return [SetTimer(timer=("node", peer), at_s=now_s + self.settings.node_timeout_s)]

    def peer_returned(self, peer: NodeId) -> list[Item]:
        """The node answers again."""
        if peer not in self._lost:
            return []
        self._lost.discard(peer)
        self._given_up.discard(peer)
        return [CancelTimer(timer=("node", peer)), *self._dispatch()]

    def peer_restarted(self, peer: NodeId) -> list[Item]:
        """The node lost its memory: what ran over it ends, and it gets its part of each plan again."""
        items: list[Item] = []
        for epoch, deployment in list(self._deployments.items()):
            if peer in deployment.nodes:
                deployment.not_ready.add(peer)
                items.append(self._deploy_to(peer, deployment))
                for request in sorted(deployment.running):
                    items += self._fail(request, ErrorKind.NODE_LOST, f"{peer} restarted in the middle of it")
                items += self._retire_drained(epoch)
        return items

    def timer_fired(self, timer: TimerId) -> list[Item]:
        """("request", number), ("node", name) or ("deploy", epoch)."""
        match timer:
            case ("request", int(request)):
                return self._fail(request, ErrorKind.DEADLINE, "no result within its time")
            case ("node", str(name)) if NodeId(name) in self._lost:
                return self._give_up(NodeId(name))
            case ("deploy", int(epoch)) if epoch == self._pending:
                silent = ", ".join(sorted(self._deployments[epoch].not_ready))
                return self._deploy_failed(epoch, f"{silent} not ready after {self.settings.deploy_timeout_s:g} s")
        return []

    # ---- plans ------------------------------------------------------------------------------------------------------

    def deploy(self, plan: Plan, parts: tuple[StagePart, ...], now_s: float) -> list[Item]:
        """Bring a plan into force beside the present one; ends with DeployEnded."""
        error = ""
        if plan.epoch <= self._newest:
            error = f"epoch {plan.epoch} is not above {self._newest}, the newest so far"
        elif plan.source != DeviceId(self.name):
            error = f"the plan's source is {plan.source}, the asker is {self.name}"
        elif self._is_closing:
            error = "the session is closing"
        if error:
            return [DeployEnded(epoch=plan.epoch, error=error)]
        items = self._deploy_failed(self._pending, "superseded by a newer plan") if self._pending is not None else []
        nodes = tuple(dict.fromkeys(NodeId(d) for d in (plan.source, *plan.devices, plan.sink)))
        deployment = _Deployment(plan, parts, nodes, set(nodes))
        self._deployments[plan.epoch] = deployment
        self._pending = self._newest = plan.epoch
        self._told.update(nodes)
        items.append(SetTimer(timer=("deploy", plan.epoch), at_s=now_s + self.settings.deploy_timeout_s))
        return items + [self._deploy_to(node, deployment) for node in nodes]

    def _deploy_to(self, node: NodeId, deployment: _Deployment) -> Post:
        plan = deployment.plan
        parts = tuple(p for p in deployment.parts if plan.stages[p.stage].device == DeviceId(node))
        return Post(node, Deploy(session=self.settings.session, epoch=plan.epoch, plan_json=plan.to_json(), parts=parts))

    def _ready(self, peer: NodeId, epoch: int) -> list[Item]:
        deployment = self._deployments[epoch]
        deployment.not_ready.discard(peer)
        if deployment.not_ready:
            return []
        if epoch != self._pending:
            return self._dispatch()
        old, self._in_force, self._pending = self._in_force, epoch, None
        items: list[Item] = [CancelTimer(timer=("deploy", epoch)), DeployEnded(epoch=epoch)]
        items += self._dispatch()
        return items + (self._retire_drained(old) if old is not None else [])

    def _deploy_failed(self, epoch: int, reason: str) -> list[Item]:
        deployment = self._deployments.get(epoch)
        if deployment is None:
            return []
        if epoch != self._pending:
            items: list[Item] = []
            for request in sorted(deployment.running):
                items += self._fail(request, ErrorKind.NODE_LOST, reason)
            return items
        self._pending = None
        del self._deployments[epoch]
        retire = Retire(session=self.settings.session, epoch=epoch)
        ended: list[Item] = [CancelTimer(timer=("deploy", epoch)), DeployEnded(epoch=epoch, error=reason)]
        return ended + [Post(node, retire) for node in deployment.nodes]

    def _retire_drained(self, epoch: int) -> list[Item]:
        """An old epoch without requests goes."""
        deployment = self._deployments.get(epoch)
        if deployment is None or epoch in (self._in_force, self._pending) or deployment.running:
            return []
        del self._deployments[epoch]
        retire = Retire(session=self.settings.session, epoch=epoch)
        return [Post(node, retire) for node in deployment.nodes]

    def _send_blobs(self, peer: NodeId, want: Want) -> list[Item]:
        parts = self._deployments[want.epoch].parts
        known: dict[str, Blob] = {blob.sha256: blob for part in parts for blob in (part.program, *part.weights)}
        items: list[Item] = []
        for range_ in want.blobs:
            blob = known.get(range_.sha256)
            if blob is None or not 0 <= range_.offset < blob.size_bytes or peer == self.name:
                return self._deploy_failed(
                    want.epoch, f"{peer} asks for content {range_.sha256:.12}, which is not to be had"
                )
            body = BodyId(want.session, want.epoch, BLOB_EDGE, range_.number)
            items.append(OpenBlob(body=body, blob=blob, offset=range_.offset))
            items.append(Transmit(peer, body, blob.size_bytes - range_.offset, background=True))
        return items

    # ---- inside: requests -------------------------------------------------------------------------------------------

    def _dispatch(self) -> list[Item]:
        items: list[Item] = []
        if self._in_force is None or self._is_stopping:
            return items
        deployment = self._deployments[self._in_force]
        if deployment.not_ready or self._lost.intersection(deployment.nodes):
            return items
        while self._waiting and self._num_in_flight < self.settings.max_in_flight:
            number = self._waiting.popleft()
            request = self._requests[number]
            request.epoch = self._in_force
            deployment.running.add(number)
            self._num_in_flight += 1
            body = BodyId(self.settings.session, self._in_force, 0, number)
            items += [Bind(request=number, body=body), Begin(body, request.deadline_s)]
        return items

    def _finished(self, epoch: int, number: int) -> list[Item]:
        request, deployment = self._requests.get(number), self._deployments.get(epoch)
        if deployment is None:
            return []
        if request is None or request.epoch != epoch:
            return [DropRequest(self._outputs(deployment, number))]
        if request.is_finished:
            return []
        request.is_finished = True
        items: list[Item] = [] if request.deadline_s is None else [CancelTimer(timer=("request", number))]
        if not self.settings.ordered:
            items += self._deliver(number, request)
        return items + self._after()

    def _deliver(self, number: int, request: _Request) -> list[Item]:
        assert request.epoch is not None
        deployment = self._deployments[request.epoch]
        body = self._outputs(deployment, number)
        self._end(number, request)
        return [Deliver(request=number, body=body), *self._retire_drained(request.epoch)]

    def _outputs(self, deployment: _Deployment, number: int) -> BodyId:
        return BodyId(self.settings.session, deployment.plan.epoch, len(deployment.plan.stages), number)

    def _fail(self, number: int, kind: ErrorKind, reason: str) -> list[Item]:
        request = self._requests.get(number)
        if request is None:
            return []
        items: list[Item] = [RequestError(request=number, kind=kind, reason=reason)]
        if request.deadline_s is not None:
            items.append(CancelTimer(timer=("request", number)))
        self._end(number, request)
        if request.epoch is None:
            self._waiting.remove(number)
            return items + self._after()
        deployment = self._deployments[request.epoch]
        if request.is_finished:
            items.append(DropRequest(self._outputs(deployment, number)))
        cancel = Cancel(session=self.settings.session, epoch=request.epoch, request=number)
        items += [Post(node, cancel) for node in deployment.nodes if not request.is_finished]
        return items + self._retire_drained(request.epoch) + self._after()

    def _end(self, number: int, request: _Request) -> None:
        """Every request passes here exactly once."""
        del self._requests[number]
        self._ended[number] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        if request.epoch is not None:
            self._num_in_flight -= 1
            self._deployments[request.epoch].running.discard(number)

    def _after(self) -> list[Item]:
        """Something ended: deliver what waited for its turn, begin more, or finish."""
        items: list[Item] = []
        while self._requests:
            number, request = next(iter(self._requests.items()))
            if not request.is_finished:
                break
            items += self._deliver(number, request)
        return items + self._dispatch() + self._finish()

    def _finish(self) -> list[Item]:
        if not self._is_closing or self._requests or self._is_closed:
            return []
        self._is_closed = True
        over = CloseSession(session=self.settings.session)
        return [*(Post(node, over) for node in sorted(self._told)), Finish()]

    def _give_up(self, peer: NodeId) -> list[Item]:
        self._given_up.add(peer)
        items: list[Item] = []
        reason = f"{peer} cannot be reached for {self.settings.node_timeout_s:g} s"
        for epoch, deployment in list(self._deployments.items()):
            if peer not in deployment.nodes:
                continue
            if epoch == self._pending:
                items += self._deploy_failed(epoch, reason)
                continue
            for request in sorted(deployment.running):
                items += self._fail(request, ErrorKind.NODE_LOST, reason)
            if epoch == self._in_force:
                for request in list(self._waiting):
                    items += self._fail(request, ErrorKind.NODE_LOST, reason)
        return items
