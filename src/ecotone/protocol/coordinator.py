"""The coordinator at the asker: accepts requests, runs them where it can, ends every accepted request exactly once. Pure.

Theory of operation. A request: refused, or (recorded and) accepted and then

    waiting -> running (one run, or several) -> finished -> delivered
         \\_________\\______ deadline, cancellation, nothing left to try: RequestError

At most `max_in_flight` requests run, are stuck or are held back for order; at most `queue_limit` wait; more are refused.
With `ordered` a result is held until every request accepted before it has ended, or until its deadline; errors are told at
once. A number that was ended is remembered for a while: asking again neither runs nor answers it twice.

A *run* is one attempt at a request under one epoch, with a number of its own (message.run_of). The first result of any run
is the request's; the others are cancelled then. A new run begins
- under each active twin of the set, at once;
- when no run of the request is *live* (its epoch usable, see deployments.py): a node was lost or restarted. A stranded run
  is left alone, since its node may come back with the result;
- when a run failed, under a plan that this request has not tried;
- when a run takes suspiciously long (suspicion.py), beside it.
Where nothing is usable the request is *stuck*: it waits for a node, a standby or another set; without a deadline for at most
`node_timeout_s`. A run that shares its first stages with an earlier one goes on from kept boundary tensors.

Invariant: a request is in exactly one of recording, waiting, in flight; in `_stuck` only in flight and without a live run.
Every public method ends in `_settle`, which does whatever has become possible.
"""

from __future__ import annotations

from collections.abc import Callable

from ecotone.plan import Plan
from ecotone.protocol.deployments import Deployments
from ecotone.protocol.effects import Accepted, CancelTimer, Deliver, DeployEnded, Preferred, Record, RequestError, SetTimer
from ecotone.protocol.events import DeployRequested, ErrorKind, Submit, TimerId
from ecotone.protocol.message import (
    BodyId,
    CloseSession,
    DeployFailed,
    LetterBody,
    NodeId,
    Ready,
    RequestFailed,
    RequestFinished,
    Want,
    request_of,
    run_of,
)
from ecotone.protocol.notices import DropRequest, Finish, Item, Post
from ecotone.protocol.requests import Request
from ecotone.protocol.runs import Runs
from ecotone.protocol.settings import CoordinatorSettings
from ecotone.protocol.suspicion import Suspicion

__all__ = ["Coordinator"]

_REMEMBERED = 1 << 16  # ended requests that are remembered
_MAX_FAILED = 16  # runs of a request that nodes may call failed
_PATIENCE: TimerId = ("patience", 0)


class Coordinator:
    """Items that it returns are effects for the shell and notices for worker and links (see notices.py)."""

    def __init__(
        self, name: NodeId, settings: CoordinatorSettings, rtt_s: Callable[[NodeId], float] = lambda _: 0.0
    ) -> None:
        self.name, self.settings = name, settings
        self.sets = Deployments(name, settings)
        self.runs = Runs(settings, self.sets)
        self.suspicion = Suspicion(settings, rtt_s)
        self._requests: dict[int, Request] = {}  # in the order of acceptance
        self._waiting: dict[int, None] = {}
        self._stuck: dict[int, str] = {}  # why
        self._ended: dict[int, None] = {}
        self._num_recording = self._num_in_flight = 0
        self._lost: set[NodeId] = set()  # by their links
        self._preferred: int | None = None
        self._now_s = 0.0
        self._unusable_s: float | None = None  # no plan of the set can run since
        self._is_patient = False  # the timer is set
        self._was_deployed = self._is_closing = self._is_stopping = self._is_closed = False

    @property
    def num_requests(self) -> int:
        """Accepted (or being recorded) and not yet ended."""
        return len(self._requests)

    @property
    def held_bytes(self) -> int:
        """Inputs and boundary tensors kept for requests."""
        return self.runs.held_bytes

    @property
    def in_force(self) -> Plan | None:
        """The plan that new requests follow; the one preferred where none can run."""
        epoch = next(iter((*self.sets.usable_epochs(self._now_s), *self.sets.order)), None)
        return None if epoch is None else self.sets[epoch].plan

    # ---- requests ---------------------------------------------------------------------------------------------------

    def submit(self, event: Submit, now_s: float) -> list[Item]:
        """Accept or refuse; a number that was seen is not run again."""
        self._now_s, number = now_s, event.request
        known = self._requests.get(number)
        if known is not None:
            return [] if known.is_recording else [Accepted(request=number)]
        if number in self._ended:
            return []
        refusal = self._refusal(event)
        if refusal is not None:
            return [RequestError(request=number, kind=refusal[0], reason=refusal[1])]
        deadline_s = None if event.deadline_s is None else now_s + event.deadline_s
        request = self._requests[number] = Request(deadline_s, event.size_bytes, now_s)
        self.runs.held_bytes += event.size_bytes
        items: list[Item] = []
        if deadline_s is not None:
            items.append(SetTimer(timer=("request", number), at_s=deadline_s))
        if self.settings.record and not event.is_recorded:
            request.is_recording = True
            self._num_recording += 1
            return [*items, Record(request=number)]
        self._waiting[number] = None
        return [Accepted(request=number), *items, *self._settle()]

    def recorded(self, number: int, now_s: float) -> list[Item]:
        """The request is in the journal: now it is accepted."""
        self._now_s = now_s
        request = self._requests.get(number)
        if request is None or not request.is_recording:
            return []
        request.is_recording, request.since_s = False, now_s
        self._num_recording -= 1
        self._requests[number] = self._requests.pop(number)  # results come in the order of acceptance
        self._waiting[number] = None
        return [Accepted(request=number), *self._settle()]

    def record_failed(self, number: int, reason: str, now_s: float) -> list[Item]:
        """The journal could not take the request: it is refused."""
        self._now_s = now_s
        request = self._requests.get(number)
        if request is None or not request.is_recording:
            return []
        return self._fail(number, ErrorKind.UNRECORDED, f"not written to the journal: {reason}") + self._settle()

    def cancel(self, number: int, now_s: float) -> list[Item]:
        """End a request that is no longer wanted; unknown or ended ones are ignored."""
        self._now_s = now_s
        return self._fail(number, ErrorKind.CANCELLED, "cancelled") + self._settle()

    def close(self, drain: bool, now_s: float) -> list[Item]:
        """Accept nothing more; with `drain` finish first, else end everything now."""
        self._now_s, self._is_closing = now_s, True
        if not drain:
            self._is_stopping = True
        return self._settle()

    def _refusal(self, event: Submit) -> tuple[ErrorKind, str] | None:
        if self._is_closing:
            return ErrorKind.CLOSED, "the session is closing"
        if not self._was_deployed and not (event.is_recorded and self.sets.is_changing):
            return ErrorKind.CLOSED, "no plan is in force; deploy one first"
        if event.is_recorded:
            return None  # it was accepted before
        patience_s, limit = self.settings.node_timeout_s, self.settings.held_limit_bytes
        if event.deadline_s is None and self._unusable_s is not None and self._now_s - self._unusable_s >= patience_s:
            return ErrorKind.NODE_LOST, f"{self.sets.missing}; plan without it or bring it back"
        num_waiting = len(self._waiting) + self._num_recording
        if num_waiting >= self.settings.queue_limit:
            return ErrorKind.BUSY, f"{num_waiting} requests wait already; ask again later"
        if event.size_bytes > limit:
            return (
                ErrorKind.TOO_LARGE,
                f"inputs of {event.size_bytes} bytes, at most {limit} are kept; raise held_limit_bytes",
            )
        if self.runs.held_bytes + event.size_bytes > limit:
            reason = f"{self.runs.held_bytes} of {limit} bytes are held for accepted requests; ask again later"
            return ErrorKind.BUSY, reason
        return None

    # ---- plans ------------------------------------------------------------------------------------------------------

    def deploy(self, event: DeployRequested, now_s: float) -> list[Item]:
        """Bring a set of plans into force; ends with DeployEnded."""
        self._now_s = now_s
        if self._is_closing:
            return [DeployEnded(epoch=event.plan.epoch, error="the session is closing")]
        return self.sets.deploy(event, now_s) + self._settle()

    def prefer(self, epoch: int, now_s: float) -> list[Item]:
        """New requests run under this epoch of the set where its nodes answer."""
        self._now_s = now_s
        self.sets.prefer(epoch)
        return self._settle("asked for")

    # ---- what nodes say ---------------------------------------------------------------------------------------------

    def letter(self, peer: NodeId, content: LetterBody, now_s: float) -> list[Item]:
        """A node's answer; of another session or an unknown epoch it is ignored."""
        self._now_s = now_s
        match content:
            case RequestFinished(epoch=epoch, request=run, edge=edge):
                return self._finished(peer, epoch, run, edge) + self._settle()
            case RequestFailed():
                return self._run_failed(peer, content) + self._settle(content.reason)
            case Ready(epoch=epoch) if self.sets.has(epoch, peer):
                return self.sets.ready(peer, epoch) + self._settle(f"plan {epoch} is ready")
            case DeployFailed(epoch=epoch, reason=reason) if self.sets.has(epoch, peer):
                return self._deploy_failed(peer, epoch, reason) + self._settle(reason)
            case Want(epoch=epoch) if self.sets.has(epoch, peer):
                return self.sets.send_blobs(peer, content) + self._settle()
        return []

    def peer_seen(self, peer: NodeId) -> None:
        """The wire reaches this node."""
        self.sets.seen(peer)

    def peer_lost(self, peer: NodeId, now_s: float) -> list[Item]:
        """A node cannot be reached: what has no other live run runs elsewhere, or waits."""
        self._now_s = now_s
        if peer in self._lost or self._is_closed:
            return []
        self._lost.add(peer)
        return self.suspicion.lost(peer) + self._down(peer, f"{peer} cannot be reached")

    def peer_returned(self, peer: NodeId, now_s: float) -> list[Item]:
        """The node answers again."""
        self._now_s = now_s
        if peer not in self._lost or self._is_closed:
            return []
        self._lost.discard(peer)
        return self.sets.set_down(peer, False, now_s) + self._settle(f"{peer} answers again")

    def heard(self, peer: NodeId, now_s: float) -> list[Item]:
        """Anything came from a node that was pinged (suspicion.asked)."""
        self._now_s = now_s
        items, was_silent, slow = self.suspicion.heard(peer, now_s)
        if self._is_closed:
            return []
        if was_silent and peer not in self._lost:
            items += self.sets.set_down(peer, False, now_s)
        for number in slow:
            items += self._hedge(number, "every node answers, yet it takes long")
        return items + (self._settle(f"{peer} answers again") if was_silent else [])

    def peer_restarted(self, peer: NodeId, now_s: float) -> list[Item]:
        """The node lost its memory: runs over it are gone, and it gets its part of each plan again."""
        self._now_s = now_s
        if self._is_closed:
            return []
        items = self.sets.restarted(peer)
        for deployment in self.sets.over(peer):
            for run in sorted(deployment.running):
                items += self._lose(run, f"{peer} restarted")
        return items + self._settle(f"{peer} restarted")

    def reached(self, body: BodyId, now_s: float) -> list[Item]:
        """The tensors of an edge from which another plan could go on are at the source."""
        self._now_s = now_s
        number = request_of(body.request)
        request = self._requests.get(number)
        return [] if request is None else self.runs.reached(number, request, body)

    def timer_fired(self, timer: TimerId, now_s: float) -> list[Item]:
        """("request" or "attempt", number), ("node" or "pong", name), ("deploy" or "standby", epoch), ("patience", 0)."""
        self._now_s = now_s
        match timer:
            case _ if self._is_closed:
                return []
            case ("attempt", int(number)):
                return self._overdue(number)
            case ("pong", str(name)):
                items, is_new = self.suspicion.waited(NodeId(name), now_s)
                return items + (self._down(NodeId(name), f"{name} does not answer") if is_new else [])
            case ("standby", _):
                return self._settle("its primary is not to be had")
            case ("request", int(number)) if number in self._requests:
                return self._too_late(number) + self._settle()
            case ("node", str(name)):
                return self.sets.unreachable(NodeId(name)) + self._settle()
            case ("deploy", int(epoch)):
                return self.sets.late(epoch) + self._settle()
            case ("patience", _):
                return self._end_of_patience() + self._settle()
        return []

    # ---- inside: what has become possible ---------------------------------------------------------------------------

    def _settle(self, why: str = "") -> list[Item]:
        """Deliver in turn, start what can start, retire what is drained, finish. Idempotent."""
        if self._is_closed:
            return []
        items: list[Item] = []
        if self._is_stopping or (self._is_closing and not self.sets.order and not self.sets.is_changing):
            for number in list(self._requests):
                items += self._fail(number, ErrorKind.CLOSED, "the session was closed")
        items += self._deliver_in_turn()
        items += self.sets.without_primary(self._now_s, bool(self._waiting))
        target = self.sets.target(self._now_s)
        self._was_deployed = self._was_deployed or bool(self.sets.order)
        if target is not None or (not self.sets.order and (self.sets.is_changing or self._was_deployed)):
            self._unusable_s = None
        elif self._unusable_s is None:
            self._unusable_s = self._now_s
        if target is not None and target != self._preferred:
            self._preferred = target
            items.append(Preferred(epoch=target, reason=why or "the best that can run"))
        for number in list(self._stuck):
            items += self._get_on(number)
        while target is not None and not self.sets.is_held and self._waiting:
            if self._num_in_flight >= self.settings.max_in_flight:
                break
            items += self._dispatch(target)
        if self.sets.is_held:
            items += self._drain_for_pause()
        return items + self.sets.retire_drained() + self._be_patient() + self._finish()

    def _dispatch(self, target: int) -> list[Item]:
        number = next(iter(self._waiting))
        del self._waiting[number]
        request = self._requests[number]
        request.is_in_flight = True
        self._num_in_flight += 1
        first = run_of(number, request.num_runs)
        twins = self.sets.twins_of(target)
        items = self._start(number, request, target, is_awaited=bool(twins))
        for epoch in twins:
            items += self.runs.start(number, request, epoch, self._now_s, beside=first)
        return items

    def _start(self, number: int, request: Request, epoch: int, why: str = "", is_awaited: bool = False) -> list[Item]:
        """Another run, with patience of its own."""
        self.suspicion.forget(number)
        items = self.runs.start(number, request, epoch, self._now_s, why=why, is_awaited=is_awaited)
        request.wait_s = max(self.suspicion.patience_s(self.sets[epoch]), request.wait_s)
        return items + self._watch(number, request)

    def _get_on(self, number: int) -> list[Item]:
        """A stuck request: its run lives again, or another can begin."""
        request = self._requests[number]
        if self.runs.is_live(request):
            del self._stuck[number]
            return self._watch(number, request)
        epoch = self.runs.next_plan(request, self._now_s)
        if epoch is None:
            return []
        return self._start(number, request, epoch, self._stuck.pop(number))

    def _drain_for_pause(self) -> list[Item]:
        """Once no live run is left of the old set, its stranded ones go and the next set is deployed."""
        flying = [(n, r) for n, r in self._requests.items() if r.is_in_flight and r.result is None]
        if any(self.runs.is_live(request) for _, request in flying):
            return []
        items: list[Item] = []
        for _, request in flying:
            for run in sorted(request.runs):
                items += self._lose(run, "its plan made room for another")
        return items + self.sets.resume(self._now_s)

    # ---- inside: runs -----------------------------------------------------------------------------------------------

    def _deploy_failed(self, peer: NodeId, epoch: int, reason: str) -> list[Item]:
        if peer in self.sets[epoch].not_ready:
            return self.sets.failed(peer, epoch, reason)
        items = self.sets.lapsed(peer, epoch)
        for run in sorted(self.sets[epoch].running):
            items += self._lose(run, reason)
        return items

    def _finished(self, peer: NodeId, epoch: int, run: int, edge: int) -> list[Item]:
        number = request_of(run)
        request, deployment = self._requests.get(number), self.sets.get(epoch)
        if deployment is None or peer != NodeId(deployment.plan.sink) or edge not in deployment.last_edges:
            return []
        body = BodyId(self.settings.session, epoch, edge, run)
        if request is None or request.runs.get(run) != epoch or request.result is not None:
            return [DropRequest(body)]
        self._learn(request, body)
        request.result = body
        items: list[Item] = [*self.runs.end_all(request, but=run), CancelTimer(timer=("attempt", number))]
        self.suspicion.forget(number)
        self._stuck.pop(number, None)
        return items + ([] if self.settings.ordered else self._deliver(number, request))

    def _learn(self, request: Request, body: BodyId) -> None:
        """What a result says of plans: how long one takes, and which failed or were overtaken by a run begun later."""
        run, epoch = body.request, body.epoch
        self.suspicion.took(self.sets[epoch], self._now_s - request.begun_s[run], body.edge)
        self.sets.trust(epoch)
        doubted = set(request.tried)
        if run in request.hedges:
            doubted.update(other for other in request.runs.values() if self.sets.usable(other))
        for other in doubted - {epoch}:
            self.sets.doubt(other, self._now_s)

    def _run_failed(self, peer: NodeId, content: RequestFailed) -> list[Item]:
        """A node says that a run cannot end well: try a plan that was not tried, or end the request."""
        number, run = request_of(content.request), content.request
        request = self._requests.get(number)
        if request is None or request.runs.get(run) != content.epoch or request.result is not None:
            return []
        kind = ErrorKind(content.kind) if content.kind in set(ErrorKind) else ErrorKind.FAILED
        reason = f"{content.reason} (told by {peer})"
        request.num_failed += 1
        request.reasons.append(reason)
        if kind is ErrorKind.NODE_LOST:
            self.sets[content.epoch].gaps[peer] = reason
            self._strand_all(content.epoch, reason)
        elif kind is ErrorKind.CLOSED:  # a node has not got the plan again
            request.stuck_under.add(content.epoch)
        else:
            request.tried.add(content.epoch)
            request.avoid.add(peer)
        items = self._lose(run, reason)
        if number not in self._stuck or (kind is ErrorKind.DEADLINE and request.deadline_s is not None):
            return items  # another run lives; or a clock runs fast there: ours decides when the time is over
        is_tried = bool(self.sets.order) and request.tried.issuperset(self.sets.order)
        if request.num_failed < _MAX_FAILED and not is_tried:
            return items
        kind = ErrorKind.NODE_LOST if kind is ErrorKind.CLOSED else kind
        kind = kind if kind in (ErrorKind.NODE_LOST, ErrorKind.TOO_LARGE) else ErrorKind.FAILED
        return items + self._fail(number, kind, request.told)

    def _lose(self, run: int, reason: str) -> list[Item]:
        """A run is over without a result: cancel what is left of it; its request is stuck unless another run lives."""
        number = request_of(run)
        request = self._requests.get(number)
        if request is None or request.result is not None or run not in request.runs:
            return []
        items = self.runs.end(number, request, run)
        self._strand(number, request, reason)
        return items

    def _strand(self, number: int, request: Request, reason: str) -> None:
        if number not in self._stuck and not self.runs.is_live(request):
            self._stuck[number] = reason
            request.since_s = self._now_s

    def _down(self, peer: NodeId, reason: str) -> list[Item]:
        items = self.sets.set_down(peer, True, self._now_s)
        for deployment in self.sets.over(peer):
            self._strand_all(deployment.plan.epoch, reason)
        return items + self._settle(reason)

    def _strand_all(self, epoch: int, reason: str) -> None:
        for run in sorted(self.sets[epoch].running):
            request = self._requests[request_of(run)]
            if request.result is None:
                self._strand(request_of(run), request, reason)

    # ---- inside: runs that take long --------------------------------------------------------------------------------

    def _watch(self, number: int, request: Request) -> list[Item]:
        """Look at the request again when its runs should have ended, or another one would no longer make its deadline."""
        at_s, request.rescue_s = self._now_s + request.wait_s, None
        other = self.runs.next_plan(request, self._now_s) if request.deadline_s is not None else None
        if other is not None and request.deadline_s is not None:
            need_s = self.suspicion.known_s(self.sets[other])
            last_s = request.deadline_s - self.suspicion.patience_s(self.sets[other])
            if not need_s:
                last_s = (self._now_s + request.deadline_s) / 2
            known_s = max(
                (self.suspicion.known_s(self.sets[e]) for e in request.runs.values() if self.sets.get(e)), default=0
            )
            last_s = max(last_s, self._now_s + known_s)
            if self._now_s < last_s < at_s and last_s + need_s < request.deadline_s:
                at_s = request.rescue_s = last_s
        return [SetTimer(timer=("attempt", number), at_s=at_s)]

    def _overdue(self, number: int) -> list[Item]:
        """The runs of a request take longer than they should: ask its nodes; they may be silent, or all answer."""
        request = self._requests.get(number)
        if request is None or request.result is not None or number in self._stuck:
            return []
        is_last = request.rescue_s is not None and self._now_s >= request.rescue_s - 1e-9
        nodes = {n for epoch in request.runs.values() if self.sets.usable(epoch) for n in self.sets[epoch].nodes}
        nodes.discard(self.name)
        items = self.suspicion.ask(sorted(nodes), number, self._now_s)
        is_told = any(self.sets[epoch].told_s > 0 for epoch in request.runs.values() if self.sets.usable(epoch))
        if is_last or is_told or not nodes:  # what a controller expects is fresh: no need to hear the nodes first
            reason = "its time is nearly over" if is_last else "it takes long"
            items += self._hedge(number, reason)
        request.wait_s *= 2
        return items + self._watch(number, request)

    def _hedge(self, number: int, reason: str) -> list[Item]:
        """One more run beside a single live one, where another plan can."""
        request = self._requests.get(number)
        if request is None or request.result is not None:
            return []
        if sum(self.sets.usable(epoch) for epoch in request.runs.values()) != 1:
            return []
        epoch = self.runs.next_plan(request, self._now_s)
        if epoch is None:
            return []
        request.hedges.add(run_of(number, request.num_runs))
        return self._start(number, request, epoch, reason)

    # ---- inside: ends -----------------------------------------------------------------------------------------------

    def _deliver_in_turn(self) -> list[Item]:
        items: list[Item] = []
        while True:
            accepted = ((n, r) for n, r in self._requests.items() if not r.is_recording)
            number, request = next(accepted, (0, None))
            if request is None or request.result is None:
                return items
            items += self._deliver(number, request)

    def _deliver(self, number: int, request: Request) -> list[Item]:
        assert request.result is not None
        self._end(number, request)
        timer = [] if request.deadline_s is None else [CancelTimer(timer=("request", number))]
        return [*timer, Deliver(request=number, body=request.result)]

    def _fail(self, number: int, kind: ErrorKind, reason: str) -> list[Item]:
        request = self._requests.get(number)
        if request is None:
            return []
        items: list[Item] = [RequestError(request=number, kind=kind, reason=reason)]
        if request.result is not None:
            items.append(DropRequest(request.result))
        if request.deadline_s is not None:
            items.append(CancelTimer(timer=("request", number)))
        items += self.runs.end_all(request, but=None if request.result is None else request.result.request)
        if request.is_in_flight and request.result is None:
            items.append(CancelTimer(timer=("attempt", number)))
        self.suspicion.forget(number)
        self._end(number, request)
        return items

    def _end(self, number: int, request: Request) -> None:
        """Every request passes here exactly once."""
        del self._requests[number]
        self._ended[number] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        self.runs.held_bytes -= request.size_bytes
        self._waiting.pop(number, None)
        self._stuck.pop(number, None)
        self._num_recording -= request.is_recording
        self._num_in_flight -= request.is_in_flight
        for run, epoch in request.runs.items():
            deployment = self.sets.get(epoch)
            if deployment is not None:
                deployment.running.discard(run)

    def _too_late(self, number: int) -> list[Item]:
        request = self._requests[number]
        if request.result is not None:
            return self._deliver(number, request)  # it waited for its turn: in time before in order
        if request.is_recording:
            return self._fail(number, ErrorKind.DEADLINE, "not written to the journal within its time")
        could_run = (
            self.runs.is_live(request) or self.runs.next_plan(request, self._now_s) is not None or not self.sets.order
        )
        if could_run or not (request.is_in_flight or self._unusable_s is not None):
            return self._fail(number, ErrorKind.DEADLINE, "no result within its time")
        return self._fail(number, *self._why_stuck(request))

    def _be_patient(self) -> list[Item]:
        """Set the timer that ends what is stuck; forget it when nothing is."""
        is_needed = bool(self._waiting and self._unusable_s is not None)
        is_needed |= bool(self._stuck and self.sets.order)
        if is_needed == self._is_patient:
            return []
        self._is_patient = is_needed
        if not is_needed:
            return [CancelTimer(timer=_PATIENCE)]
        return [SetTimer(timer=_PATIENCE, at_s=self._now_s + self.settings.node_timeout_s)]

    def _end_of_patience(self) -> list[Item]:
        """Requests without a deadline for which nothing could run for `node_timeout_s` end."""
        items: list[Item] = []
        later_s: list[float] = []
        waiting = () if self._unusable_s is None else tuple(self._waiting)
        for number in (*self._stuck, *waiting):
            request = self._requests[number]
            if request.deadline_s is not None:
                continue
            due_s = max(request.since_s, self._unusable_s or 0.0) + self.settings.node_timeout_s
            if due_s <= self._now_s + 1e-9:
                items += self._fail(number, *self._why_stuck(request))
            else:
                later_s.append(due_s)
        self._is_patient = bool(later_s)
        return [*items, SetTimer(timer=_PATIENCE, at_s=min(later_s))] if later_s else items

    def _why_stuck(self, request: Request) -> tuple[ErrorKind, str]:
        if request.reasons and request.tried:
            return ErrorKind.FAILED, f"{request.told}; no other plan could run: {self.sets.missing}"
        return ErrorKind.NODE_LOST, self.sets.missing

    def _finish(self) -> list[Item]:
        if not self._is_closing or self._requests or self._is_closed:
            return []
        self._is_closed = True
        items = self.sets.abandon("the session was closed") + self.sets.timers() + self.suspicion.timers()
        if self._is_patient:
            items.append(CancelTimer(timer=_PATIENCE))
        over = CloseSession(session=self.settings.session)
        return [*items, *(Post(node, over) for node in sorted(self.sets.told)), Finish()]
