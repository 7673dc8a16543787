"""The asker's side of a deployment: hand in inputs, get results, move the plan, read what happened.

The session's process embeds the worker of the source device and the coordinator, both in one machine of ecotone.protocol;
the session is the thin shell's listener. Every accepted request ends with its result, exactly once, or with a named error.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ecotone import codec
from ecotone.executors.memory import keep_freed_memory
from ecotone.plan import Plan
from ecotone.planset import PlanSet, Standby
from ecotone.protocol import effects, events
from ecotone.protocol.actors import require_sound
from ecotone.protocol.drift import Drift, Returned
from ecotone.protocol.message import BodyId, NodeId, attempt_of
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, WorkerSettings
from ecotone.runtime.durable import Durable, Outcome
from ecotone.runtime.errors import (
    DeployError,
    NodeUnreachable,
    RequestError,
    RequestIdTaken,
    SessionClosed,
    UnknownRequest,
    request_error,
)
from ecotone.runtime.future import Delivered, Future
from ecotone.runtime.incarnation import next_incarnation
from ecotone.runtime.launch import Nodes, links_from
from ecotone.runtime.loading import ModelLoader
from ecotone.runtime.models import Models
from ecotone.runtime.node import EXPLAIN, LEAVING, link_settings
from ecotone.runtime.recorder import Ended, Recorder, RequestTrace, Span, machine_clock, trace_of
from ecotone.runtime.residency import Answer, Loads, Residency
from ecotone.runtime.shell import Shell, Told
from ecotone.runtime.stages import Stages
from ecotone.runtime.switching import Switchover, switchover
from ecotone.units import EcotoneError

__all__ = ["Session"]

_KEPT_REQUESTS = 4096
Listener = Callable[[Told | Drift | Returned], object]


@dataclass(slots=True)
class _Request:
    future: Future
    inputs: Sequence[torch.Tensor]
    submitted_s: float
    deadline_s: float | None = None


class Session:
    """A deployed model: call it, submit to it, stream through it. Made by `deploy`; a context manager that drains.

    `explain` gives what a controller has to say of its choice; `explanation` has it between the plans and what happened.
    `watch` sees each result in the loop thread before it is told; it must neither raise nor take long (see shadow.py).
    """

    def __init__(
        self,
        nodes: Nodes,
        models: Models,
        settings: CoordinatorSettings,
        *,
        image: codec.ImageSpec | None = None,
        worker: WorkerSettings | None = None,
        journal: Path | None = None,
        owns_nodes: bool = False,
    ):
        keep_freed_memory()
        self.nodes, self.captured = nodes, models.captured
        self._models, self._settings, self._owns_nodes = models, settings, owns_nodes
        self._worker = worker or WorkerSettings()
        self._durable = Durable(journal) if journal else None
        self._numbers = itertools.count(self._durable.next_number if self._durable else 1)
        self._lock, self._id_lock = threading.Lock(), threading.Lock()
        self._requests: dict[int, _Request] = {}
        self._by_id: dict[str, _Request] = {}  # from submit until the outcome is told
        self._ended: collections.deque[Ended] = collections.deque(maxlen=_KEPT_REQUESTS)
        self._listeners: list[Listener] = []
        self.explain: Callable[[], list[str]] = list
        self.watch: Callable[[Delivered], object] = lambda delivered: None
        self._moving, self._awaited, self._residency = threading.Lock(), -1, Residency()
        self._is_closed, self._closing, self._all_ended = False, "", threading.Event()
        device = nodes.cluster.device(nodes.cluster.source)
        machine = Node(
            NodeId(device.name),
            next_incarnation(),
            links=link_settings(links_from(nodes.cluster, device.name), emulate=nodes.cluster.emulate),
            worker=self._worker,
            coordinator=settings,
        )
        stages = Stages(device.accelerator, device.threads, device.memory_bytes)
        self._recorder = Recorder()
        self._shell = Shell(
            nodes.port, device, machine, stages, ModelLoader(models, stages),
            recorder=self._recorder, asker=self, expected=self._specs, image=image,
        )  # fmt: skip
        nodes.questions.on(LEAVING, self._node_leaves)
        nodes.questions.on(EXPLAIN, lambda peer, body: {"lines": self.explanation()})
        self._shell.start()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these arguments; raises ModelError (they do not fit) or a RequestError."""
        return self.submit(args, kwargs).result()

    def submit(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        deadline_s: float | None = None,
        request_id: str | None = None,
    ) -> Future:
        """Hand in one request; the future ends with the model's output or a RequestError (Busy where the queue is full).

        Inputs that do not fit the model raise ModelError here, before anything is sent. `deadline_s` counts from now.
        A second request of one `request_id` does not run: it gets the future of the first while that runs. With a journal
        such a request is accepted once it is on the disk, and its result stays to be had by its id, also by the next process
        with this journal, until `acknowledge`. An id that comes with other inputs is refused.
        """
        inputs = self.captured.flatten_inputs(tuple(args), kwargs)
        if deadline_s is not None and not deadline_s > 0:
            raise RequestError(f"deadline_s is {deadline_s}, must be above zero")
        if request_id is None:
            return self._begin(inputs, deadline_s, None)
        with self._id_lock:
            return self._known(request_id, inputs) or self._begin(inputs, deadline_s, request_id)

    def claim(self, request_id: str, timeout_s: float | None = None) -> Any:
        """The output of the request of this id, handed in by this process or an earlier one; waits where it still runs.

        Raises its RequestError, UnknownRequest (never accepted, or acknowledged), or TimeoutError.
        """
        running = self._by_id.get(request_id)
        if running is None and self._durable is None:
            raise UnknownRequest(f"request {request_id!r} does not run, and without a journal results are not kept")
        future = running.future if running else self._stored(request_id)
        return future.result(timeout_s)

    def acknowledge(self, request_id: str) -> None:
        """The caller has the outcome of this request and will not ask again: it is forgotten when this returns."""
        if self._durable is None:
            raise UnknownRequest(f"request {request_id!r}: without a journal there is nothing to acknowledge")
        self._durable.acknowledge(request_id)

    def expire(self, keep: int, keep_s: float) -> None:
        """Acknowledge outcomes that nobody asked for again: older than `keep_s` seconds, or not among the newest `keep`."""
        if self._durable is not None:
            self._durable.expire(keep, keep_s)

    def stream(
        self, items: Iterable[Any], *, in_flight: int = 4, ordered: bool = True, deadline_s: float | None = None
    ) -> Iterator[Any]:
        """Outputs for `items` (a tensor, a tuple of arguments or a dict of keywords each), at most `in_flight` under way.

        The next item is taken only when there is room, so memory stays bounded. With `ordered`, outputs come in the order of
        the items, else as they end. The first error ends the stream; what is under way is then cancelled.
        """
        waiting: collections.deque[Future] = collections.deque()
        try:
            for item in items:
                while len(waiting) >= max(1, in_flight):
                    yield self._next(waiting, ordered)
                waiting.append(self._submit_item(item, deadline_s))
            while waiting:
                yield self._next(waiting, ordered)
        finally:
            for future in waiting:
                self.cancel(future)

    def cancel(self, future: Future) -> None:
        """Give the request of this future up: it ends with Cancelled, unless its result is already there."""
        if not future.done():
            self._shell.post(events.CancelRequest(request=future.request))

    @property
    def num_waiting(self) -> int:
        """Requests handed in that have neither result nor error yet."""
        return len(self._requests)

    # ---- the plan ----------------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Names this session among all that nodes may serve."""
        return self._settings.session

    @property
    def plan(self) -> Plan:
        """The plan that new requests follow; raises DeployError where there is none."""
        plans = self.plans
        if not plans:
            raise DeployError("no plan is in force")
        return plans[0]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans that are resident on all their nodes: the one that new requests follow, then in order of the set."""
        return self._residency.plans

    @property
    def is_ready(self) -> bool:
        """Whether a request would run now: a resident plan's nodes are all reachable, nothing is closing."""
        if self._closing or self._is_closed:
            return False
        return any(self._missing(plan) == frozenset() for plan in self.plans)

    def replan(self, plan: Plan | PlanSet, *, expected_s: Mapping[int, float] | None = None, loads: Loads = ()) -> Plan:
        """Move to `plan` and return it (of a set the first) with its epoch; the whole former set is retired.

        The new set is made ready beside the old one, on which requests under way finish; where memory does not hold both,
        new requests wait meanwhile (see how_to_switch). Standbys that fail are left out, those whose nodes cannot be reached
        join when they can: see `plans`. Where the first plan's nodes cannot be reached but a standby's can, that one begins.
        Raises, in bounded time, DeployError (the old set stays), UnsoundPlan (queues could block) or NodeUnreachable.
        """
        plans = plan if isinstance(plan, PlanSet) else PlanSet(primary=plan)
        name = f"plan for {self.captured.graph.name} on {self.nodes.cluster.name}"
        for one in plans.plans:
            violations = self._models.violations(one, self.nodes.cluster)
            if violations:
                raise DeployError(f"{name}: " + "; ".join(violations))
        require_sound(plans, worker=self._worker, coordinator=self._settings)
        expected = {one.identity(): (expected_s or {}).get(i, 0.0) for i, one in enumerate(plans.plans)}
        with self._moving:
            self._residency.loads = {
                one.identity(): tuple(own.items()) for one, own in zip(plans.plans, loads, strict=False)
            }
            first = self._reachable_first(plans)
            switch, old = self.how_to_switch(first), self._residency.planset
            found, error = self._deploy(first, expected, switch)
            if error and switch.kind == "pause" and old is not None:
                _, again = self._deploy(old, {}, Switchover(kind="beside", reason="back to the old plans", need_bytes={}))
                error += f"; going back to the old plans failed as well: {again}" if again else "; the old plans are back"
            if error:
                raise DeployError(f"{name}: {error}")
            if first is not plans:
                self._awaited = found.plans[1].epoch
            return found.primary

    def _deploy(self, plans: PlanSet, expected: Mapping[str, float], switch: Switchover) -> tuple[PlanSet, str]:
        """The set with its epochs, and "" or why its first plan could not be put in force."""
        plans, answers = self._residency.begin(plans, switch)
        residents = [
            events.Resident(
                plan=plan, parts=self._models.parts(plan), is_active=plan.epoch in active,
                expected_s=expected.get(plan.identity(), 0.0), boundary_bytes=self._models.boundary_bytes(plan),
                loads=self._residency.loads.get(plan.identity(), ()),
            )
            for active in [{standby.plan.epoch for standby in plans.standbys if standby.mode == "active"}]
            for plan in plans.plans
        ]  # fmt: skip
        first = residents[0]
        self._shell.post(
            events.DeployRequested(
                plan=first.plan, parts=first.parts, standbys=tuple(residents[1:]), expected_s=first.expected_s,
                boundary_bytes=first.boundary_bytes, pause=switch.kind == "pause", loads=first.loads,
            )
        )  # fmt: skip
        timeout_s = self._settings.deploy_timeout_s
        end = time.monotonic() + timeout_s + 10.0
        for plan in plans.plans:
            if plan is not plans.primary and self._missing(plan):
                continue
            error = self._wait(answers[plan.epoch], plan, end)
            if error and plan is plans.primary:
                return plans, error
        return plans, ""

    def _wait(self, answer: Answer, plan: Plan, end_s: float) -> str:
        """The answer to a deployment; a node of another version never gives one."""
        while True:
            try:
                return answer.result(max(0.0, min(0.5, end_s - time.monotonic())))
            except concurrent.futures.TimeoutError:
                foreign = self.nodes.port.foreign(NodeId(name) for name in (*plan.devices, plan.sink))
                if foreign or time.monotonic() >= end_s:
                    return foreign or f"no answer within {self._settings.deploy_timeout_s:g} s"

    def _reachable_first(self, plans: PlanSet) -> PlanSet:
        """The set as it is where its first plan's nodes answer, else with the first standby whose nodes do in front."""
        first = plans.primary
        try:
            devices = frozenset((first.source, *first.devices, first.sink))
            self.nodes.wait_for(devices, min(10.0, self._settings.deploy_timeout_s))
        except NodeUnreachable as error:
            ready = next((standby for standby in plans.standbys if not self._missing(standby.plan)), None)
            if ready is None:
                raise
            self._residency.note(f"{error}; beginning with {ready.label or 'a standby'}, the preferred plan joins later")
            rest = tuple(standby for standby in plans.standbys if standby is not ready)
            return PlanSet(primary=ready.plan, standbys=(Standby(plan=first, label="preferred, awaited"), *rest))
        return plans

    def how_to_switch(self, plan: Plan | PlanSet) -> Switchover:
        """Whether replan(plan) would make the new set ready beside the old one or pause for it, and why."""
        plans = plan if isinstance(plan, PlanSet) else PlanSet(primary=plan)
        return switchover(self._residency.current, plans.plans, self._models.graphs(plans.plans), self.nodes.cluster)

    def prefer(self, plan: Plan) -> None:
        """New requests follow `plan` from now on, where its nodes answer: no loading, no waiting. It must be resident."""
        found = next((one for one in self.plans if plan in (one, one.with_epoch(plan.epoch))), None)
        if found is None:
            raise DeployError(f"plan {plan} is not resident; deploy it with the set, or replan")
        self._shell.post(events.Prefer(epoch=found.epoch))

    def expect(self, epoch: int, expected_s: float) -> None:
        """As things are now a run under resident plan `epoch` should take so long: one that takes much longer is doubted."""
        self._shell.post(events.Expect(epoch=epoch, expected_s=expected_s))

    def probe(self, peer: str, size_bytes: int) -> None:
        """Time the idle link to `peer` with so many bytes of padding; the next Observed of this node has the sample."""
        self._shell.post(events.ProbeLink(peer=NodeId(peer), size_bytes=size_bytes))

    def explanation(self) -> list[str]:
        """The plan in force, the others of the set, why, and what happened lately: what `ecotone status --explain` shows."""
        return self._residency.explanation(self.explain())

    def listen(self, callback: Listener) -> None:
        """Call `callback` with each Observed, Preferred, Rerouted, LinkChanged, DeployEnded (in the loop thread), Drift."""
        self._listeners.append(callback)

    def _missing(self, plan: Plan) -> frozenset[NodeId]:
        """Nodes of `plan` that cannot be reached now."""
        others = {NodeId(name) for name in (*plan.devices, plan.sink)} - {NodeId(plan.source)}
        return frozenset(others - self.nodes.port.peers())

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self, *, drain: bool = True, timeout_s: float = 60.0) -> None:
        """Accept nothing more; finish what was accepted (`drain`) or end it with errors; stop all threads. Twice is well."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._closing = self._closing or "the session is closed"
        self._shell.post(events.CloseRequested(drain=drain))
        if not self._all_ended.wait(timeout_s if drain else min(timeout_s, 10.0)) and drain:
            self._shell.post(events.CloseRequested(drain=False))
            self._all_ended.wait(5.0)
        self._shell.stop()
        self._fail_all("the session is closed")
        if self._durable is not None:
            self._durable.close()
        for topic in (LEAVING, EXPLAIN):
            self.nodes.questions.on(topic, None)
        if self._owns_nodes:
            self.nodes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(drain=kind is None or not issubclass(kind, EcotoneError))

    def resume(self) -> int:
        """Run again what an earlier process with this journal accepted and did not end; how many. Called by `deploy`."""
        left = self._durable.unfinished() if self._durable else ()
        for number, request_id, inputs, left_s in left:
            try:
                self.captured.flatten_inputs(*self.captured.unflatten_inputs(inputs))
            except EcotoneError as error:
                raise DeployError(
                    f"the journal holds request {request_id!r} of another model ({error}); use another"
                ) from None
            future = Future(number, request_id)
            self._requests[number] = self._by_id[request_id] = _Request(future, inputs, time.perf_counter(), left_s)
            if left_s is not None and left_s <= 0:
                self.failed(number, events.ErrorKind.DEADLINE, "its deadline passed while the asker was away")
                continue
            size = sum(tensor.nbytes for tensor in inputs)
            self._shell.post(events.Submit(request=number, deadline_s=left_s, size_bytes=size, is_recorded=True))
        return len(left)

    # ---- what happened -----------------------------------------------------------------------------------------------

    def report(self, first_request: int = 0) -> tuple[RequestTrace, ...]:
        """Traces of ended requests from `first_request` on with all their runs, oldest first, the last few thousand.

        Asks every node of the plans for its notes; a node that does not answer leaves its parts out.
        """
        session, source, plans = self._settings.session, self.nodes.cluster.source, self._residency.known
        spans: dict[tuple[int, int], dict[str, list[Span]]] = collections.defaultdict(dict)
        for epoch, run, items in self._recorder.of_session(session, first_request):
            spans[epoch, run][source] = items
        devices = {d for plan in plans.values() for d in (*plan.devices, plan.sink)} - {source}
        for name in sorted(devices & self.nodes.port.peers()):
            try:
                offset = self._clock_offset(NodeId(name))
                body = {"session": session, "first_request": first_request}
                answer = self.nodes.questions.ask(NodeId(name), "spans", body, deadline_s=5.0)
            except EcotoneError:
                continue
            for epoch, run, items in answer:
                spans[epoch, run][name] = [Span(s[0], s[1], s[2] - offset, *s[3:]) for s in items]
        ended = [e for e in tuple(self._ended) if e.request >= first_request and e.epoch in plans]
        return trace_of(ended, plans, spans)

    def _clock_offset(self, peer: NodeId) -> float:
        """Seconds that the clock of `peer` is ahead of ours: 0 on one machine, else by the middle of a question."""
        answer, round_trip_s = self.nodes.questions.ask_timed(peer, "clock", deadline_s=2.0)
        if answer["clock"] == machine_clock():
            return 0.0
        return float(answer["now_s"]) - (time.perf_counter() - round_trip_s / 2)

    # ---- told by the shell, in its loop thread -----------------------------------------------------------------------

    def inputs(self, request: int) -> Sequence[torch.Tensor]:
        entry = self._requests.get(request)
        return entry.inputs if entry else ()

    def record(self, request: int) -> None:
        entry = self._requests.get(request)

        def written(reason: str) -> None:
            failed = events.RecordFailed(request=request, reason=reason)
            self._shell.post(failed if reason else events.Recorded(request=request))

        if self._durable is None or entry is None:
            written("")
        else:
            self._durable.record(request, entry.inputs, entry.deadline_s, written)

    def accepted(self, request: int) -> None:
        entry = self._requests.get(request)
        if entry is not None:
            entry.future.accept()

    def delivered(self, request: int, body: BodyId, tensors: Sequence[torch.Tensor]) -> None:
        with self._lock:
            entry = self._requests.pop(request, None)
        if entry is None:
            return
        total_s = time.perf_counter() - entry.submitted_s
        plan = self._residency.plan_of(body.epoch)
        self.watch(Delivered(entry.inputs, tensors, plan))
        entry.future.exit = plan.exit_at(body.edge) if plan else ""
        attempt = attempt_of(body.request)
        self._ended.append(Ended(request, body.epoch, attempt, entry.submitted_s, total_s, entry.future.exit))
        self._end(entry, Outcome(tuple(tensors), self._models.origin(plan), body.epoch))

    def failed(self, request: int, kind: events.ErrorKind, reason: str) -> None:
        with self._lock:
            entry = self._requests.pop(request, None)
        if entry is not None:
            self._end(entry, Outcome(kind=kind, reason=reason))

    def told(self, effect: Told | Drift | Returned) -> None:
        self._residency.told(effect)
        if isinstance(effect, effects.DeployEnded) and effect.epoch == self._awaited and not effect.error:
            self._shell.post(events.Prefer(epoch=effect.epoch))
        for callback in tuple(self._listeners):
            try:
                callback(effect)
            except Exception:  # a listener's fault must not end the session
                traceback.print_exc()

    def closed(self) -> None:
        self._all_ended.set()

    def crashed(self, reason: str) -> None:
        self._closing = reason
        self._fail_all(reason)
        self._residency.give_up(reason)
        self._all_ended.set()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _begin(self, inputs: Sequence[torch.Tensor], deadline_s: float | None, request_id: str | None) -> Future:
        with self._lock:
            if self._closing:
                raise SessionClosed(f"request refused: {self._closing}")
            number = next(self._numbers)
            future = Future(number, request_id)
            entry = self._requests[number] = _Request(future, inputs, time.perf_counter(), deadline_s)
            if request_id is not None:
                self._by_id[request_id] = entry
        if request_id is not None and self._durable is not None:
            self._durable.begin(number, request_id)
        size = sum(tensor.nbytes for tensor in inputs)
        self._shell.post(events.Submit(request=number, deadline_s=deadline_s, size_bytes=size))
        return future

    def _known(self, request_id: str, inputs: Sequence[torch.Tensor]) -> Future | None:
        """The future of a request of this id, where it runs or has ended; None for a new one. Raises RequestError."""
        running = self._by_id.get(request_id)
        if running is not None:
            if not all(torch.equal(mine, given) for mine, given in zip(running.inputs, inputs, strict=True)):
                raise RequestIdTaken(f"request {request_id!r} runs already with other inputs; give a new request a new id")
            return running.future
        if self._durable is None or not self._durable.knows(request_id, inputs):
            return None
        return self._stored(request_id)

    def _stored(self, request_id: str) -> Future:
        """The outcome of this id out of the journal, as a future; raises UnknownRequest."""
        assert self._durable is not None
        outcome = self._durable.outcome(request_id)
        running = self._by_id.get(request_id)
        if outcome is None and running is not None:
            return running.future
        future = Future(0, request_id)
        self._tell(future, outcome or Outcome(kind=events.ErrorKind.CLOSED, reason="the session ended before its result"))
        return future

    def _end(self, entry: _Request, outcome: Outcome) -> None:
        """Write the outcome down where it must survive, then tell it."""
        request_id = entry.future.request_id

        def written(reason: str) -> None:
            if reason:
                self._residency.note(f"request {request_id!r}: its outcome was told but not written down: {reason}")
            self._tell(entry.future, outcome)
            if request_id is not None:
                self._by_id.pop(request_id, None)

        if self._durable is None:
            written("")
        else:
            self._durable.end(entry.future.request, outcome, written)

    def _tell(self, future: Future, outcome: Outcome) -> None:
        future.epoch = outcome.epoch or None
        if outcome.kind is not None:
            future.set_exception(request_error(outcome.kind, outcome.reason, future.request))
        else:
            try:
                future.set_result(self._models.of_hash(outcome.graph_hash).captured.unflatten_outputs(outcome.tensors))
            except EcotoneError as error:
                future.set_exception(error)
        future.accept()

    def _submit_item(self, item: Any, deadline_s: float | None) -> Future:
        if isinstance(item, dict):
            return self.submit((), item, deadline_s=deadline_s)
        return self.submit(item if isinstance(item, tuple) else (item,), deadline_s=deadline_s)

    @staticmethod
    def _next(waiting: collections.deque[Future], ordered: bool) -> Any:
        if ordered:
            return waiting.popleft().result()
        done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        first = next(future for future in waiting if future in done)
        waiting.remove(first)
        return first.result()

    def _specs(self, body: BodyId) -> Sequence[codec.HasSpec] | None:
        """Names and shapes on an edge of a plan of ours, from the graph."""
        plan = self._residency.plan_of(body.epoch)
        return None if plan is None else self._models.specs(plan, body.edge)

    def _node_leaves(self, peer: NodeId, body: dict[str, Any]) -> None:
        """A node of ours is told to stop: move to the plans without it, or finish what was accepted and let it go."""
        with self._lock:
            if self._closing or self._residency.is_leaving(peer):
                return
            rest = self._residency.without(peer)
            if rest is None and not self._residency.uses(peer):
                return
            if rest is None:
                self._closing = f"node {peer} is shutting down; deploy on the remaining nodes"
        if rest is None:
            self._shell.post(events.CloseRequested(drain=True))
            return
        self._shell.post(events.Prefer(epoch=rest.primary.epoch))
        threading.Thread(target=self._leave_behind, args=(peer, rest), name="failover", daemon=True).start()

    def _leave_behind(self, peer: NodeId, rest: PlanSet) -> None:
        try:
            self.replan(rest)
        except EcotoneError as error:
            self._residency.note(f"node {peer} is shutting down, moving to the plans without it failed: {error}")
            self._residency.stay(peer)

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            left, self._requests = self._requests, {}
        for entry in left.values():
            self._end(entry, Outcome(kind=events.ErrorKind.CLOSED, reason=reason))
