"""The asker's side of a deployment: hand in inputs, get results, move the plan, read what happened.

The session's process embeds the worker of the source device and the coordinator, both in one machine of ecotone.protocol;
the session is the thin shell's listener. Every accepted request ends with its result, exactly once, or with a named error.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from ecotone import codec
from ecotone.cluster import Cluster
from ecotone.executors.memory import keep_freed_memory
from ecotone.model import Captured
from ecotone.plan import Plan, plan_violations
from ecotone.protocol import events
from ecotone.protocol.message import BodyId, NodeId
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, WorkerSettings
from ecotone.runtime.errors import DeployError, RequestError, SessionClosed, request_error
from ecotone.runtime.incarnation import next_incarnation
from ecotone.runtime.launch import Nodes, attach, launch, links_from
from ecotone.runtime.loading import ModelLoader
from ecotone.runtime.node import LEAVING, link_settings
from ecotone.runtime.recorder import Recorder, RequestTrace, Span, join_spans, machine_clock
from ecotone.runtime.shell import Shell
from ecotone.runtime.stages import CapturedModel, Stages, parts_of
from ecotone.units import EcotoneError

__all__ = ["Session", "deploy"]

Future = concurrent.futures.Future[Any]

_KEPT_REQUESTS = 4096


@dataclass(slots=True)
class _Request:
    future: Future
    inputs: Sequence[torch.Tensor]
    submitted_s: float


@dataclass(frozen=True, slots=True)
class _Ended:
    request: int
    epoch: int
    submitted_s: float
    total_s: float


def deploy(
    plan: Plan,
    captured: Captured,
    nodes: Nodes | Cluster,
    *,
    queue_limit: int = 64,
    max_in_flight: int = 8,
    samples: Sequence[Sequence[torch.Tensor]] = (),
    image: codec.ImageSpec | None = None,
    ordered: bool = False,
    pieces: Sequence[tuple[int, int]] = (),
    timeout_s: float = 120.0,
    node_timeout_s: float = 5.0,
) -> Session:
    """Put `plan` in force on `nodes` and return the open session. A Cluster is launched (emulated) or attached to.

    `queue_limit` requests wait at most (more: Busy), `max_in_flight` are under way. `samples` (flat inputs) calibrate int8
    executors; `pieces` are sent for profiling (see measure_cluster). `image` says how pixels became the input, for images
    sent as such. `node_timeout_s`: a node unreachable for so long ends the requests that need it. Raises DeployError,
    NodeUnreachable or WireError in bounded time.
    """
    owned = isinstance(nodes, Cluster)
    if isinstance(nodes, Cluster):
        nodes = launch(nodes, deadline_s=timeout_s) if nodes.emulate else attach(nodes)
    session = None
    try:
        settings = CoordinatorSettings(
            session=secrets.randbits(63), queue_limit=queue_limit, max_in_flight=max_in_flight, ordered=ordered,
            deploy_timeout_s=timeout_s, node_timeout_s=node_timeout_s,
        )  # fmt: skip
        session = Session(nodes, captured, settings, samples=samples, image=image, pieces=pieces, owns_nodes=owned)
        session.replan(plan)
    except BaseException:
        if session is not None:
            session.close(drain=False)
        elif owned:
            nodes.close()
        raise
    return session


class Session:
    """A deployed model: call it, submit to it, stream through it. Made by `deploy`; a context manager that drains."""

    def __init__(
        self,
        nodes: Nodes,
        captured: Captured,
        settings: CoordinatorSettings,
        *,
        samples: Sequence[Sequence[torch.Tensor]] = (),
        image: codec.ImageSpec | None = None,
        pieces: Sequence[tuple[int, int]] = (),
        owns_nodes: bool = False,
    ):
        keep_freed_memory()
        self.nodes, self.captured = nodes, captured
        self._settings, self._owns_nodes = settings, owns_nodes
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._requests: dict[int, _Request] = {}
        self._ended: collections.deque[_Ended] = collections.deque(maxlen=_KEPT_REQUESTS)
        self._deploying: dict[int, concurrent.futures.Future[str]] = {}
        self._plans: dict[int, Plan] = {}
        self._plan: Plan | None = None
        self._epoch, self._is_closed, self._closing = 0, False, ""
        self._all_ended = threading.Event()
        self._model = CapturedModel(captured, [tuple(sample) for sample in samples], pieces)
        device = nodes.cluster.device(nodes.cluster.source)
        machine = Node(
            NodeId(device.name),
            next_incarnation(),
            links=link_settings(links_from(nodes.cluster, device.name), emulate=nodes.cluster.emulate),
            worker=WorkerSettings(),
            coordinator=settings,
        )
        stages = Stages(device.accelerator, device.threads)
        self._recorder = Recorder()
        self._shell = Shell(
            nodes.port, device, machine, stages, ModelLoader(self._model, stages),
            recorder=self._recorder, asker=self, expected=self._specs, image=image,
        )  # fmt: skip
        nodes.questions.on(LEAVING, self._node_leaves)
        self._shell.start()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these arguments; raises ModelError (they do not fit) or a RequestError."""
        return self.submit(args, kwargs).result()

    def submit(
        self, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, deadline_s: float | None = None
    ) -> Future:
        """Hand in one request; the future ends with the model's output or a RequestError (Busy where the queue is full).

        Inputs that do not fit the model raise ModelError here, before anything is sent. `deadline_s` counts from now.
        """
        inputs = self.captured.flatten_inputs(tuple(args), kwargs)
        if deadline_s is not None and not deadline_s > 0:
            raise RequestError(f"deadline_s is {deadline_s}, must be above zero")
        future: Future = concurrent.futures.Future()
        future.set_running_or_notify_cancel()  # cancelling goes through the machine: see cancel
        with self._lock:
            if self._closing:
                raise SessionClosed(f"request refused: {self._closing}")
            number = next(self._numbers)
            self._requests[number] = _Request(future, inputs, time.perf_counter())
        future.request = number  # type: ignore[attr-defined]
        self._shell.post(events.Submit(request=number, deadline_s=deadline_s))
        return future

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
        number = getattr(future, "request", None)
        if number is not None and not future.done():
            self._shell.post(events.CancelRequest(request=number))

    # ---- the plan ----------------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Names this session among all that nodes may serve."""
        return self._settings.session

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        if self._plan is None:
            raise DeployError("no plan is in force")
        return self._plan

    @property
    def is_ready(self) -> bool:
        """Whether a request would be accepted now: a plan is in force, its nodes are reachable, nothing is closing."""
        plan = self._plan
        if plan is None or self._closing or self._is_closed:
            return False
        others = {NodeId(name) for name in (*plan.devices, plan.sink)} - {NodeId(plan.source)}
        return others <= self.nodes.port.peers()

    def replan(self, plan: Plan) -> Plan:
        """Move to `plan`: made ready beside the old one, on which requests under way finish; returns it with its epoch.

        Raises DeployError (the old plan stays) or NodeUnreachable, in bounded time.
        """
        cluster, name = self.nodes.cluster, self.captured.graph.name
        violations = plan_violations(plan, self.captured.graph, cluster)
        if violations:
            raise DeployError(f"plan for {name} on {cluster.name}: " + "; ".join(violations))
        devices = frozenset((*plan.devices, plan.source, plan.sink))
        self.nodes.wait_for(devices, min(10.0, self._settings.deploy_timeout_s))
        parts = parts_of(self._model, plan)
        with self._lock:
            self._epoch += 1
            plan = plan.with_epoch(self._epoch)
            ended = self._deploying[plan.epoch] = concurrent.futures.Future()
            self._plans[plan.epoch] = plan
        self._shell.post(events.DeployRequested(plan=plan, parts=parts))
        try:
            error = ended.result(self._settings.deploy_timeout_s + 10.0)
        except concurrent.futures.TimeoutError:
            error = f"no answer within {self._settings.deploy_timeout_s:g} s"
        if error:
            raise DeployError(f"plan for {name} on {cluster.name}: {error}")
        self._plan = plan
        return plan

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
        self.nodes.questions.on(LEAVING, None)
        if self._owns_nodes:
            self.nodes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(drain=kind is None or not issubclass(kind, EcotoneError))

    # ---- what happened -----------------------------------------------------------------------------------------------

    def report(self, first_request: int = 0) -> tuple[RequestTrace, ...]:
        """Traces of ended requests from `first_request` on, oldest first, at most the last few thousand.

        Asks every node of the plans for its notes; a node that does not answer leaves its parts out.
        """
        session = self._settings.session
        spans: dict[tuple[int, int], dict[str, list[Span]]] = collections.defaultdict(dict)
        source = self.nodes.cluster.source
        for epoch, request, items in self._recorder.of_session(session, first_request):
            spans[epoch, request][source] = items
        for name in sorted({d for plan in self._plans.values() for d in (*plan.devices, plan.sink)} - {source}):
            try:
                offset = self._clock_offset(NodeId(name))
                body = {"session": session, "first_request": first_request}
                answer = self.nodes.questions.ask(NodeId(name), "spans", body, deadline_s=5.0)
            except EcotoneError:
                continue
            for epoch, request, items in answer:
                spans[epoch, request][name] = [Span(s[0], s[1], s[2] - offset, *s[3:]) for s in items]
        return tuple(
            join_spans(e.request, self._plans[e.epoch], e.submitted_s, e.total_s, spans[e.epoch, e.request])
            for e in tuple(self._ended)
            if e.request >= first_request
        )

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

    def delivered(self, request: int, epoch: int, tensors: Sequence[torch.Tensor]) -> None:
        with self._lock:
            entry = self._requests.pop(request, None)
        if entry is None:
            return
        total_s = time.perf_counter() - entry.submitted_s
        self._ended.append(_Ended(request, epoch, entry.submitted_s, total_s))
        try:
            entry.future.set_result(self.captured.unflatten_outputs(tensors))
        except EcotoneError as error:
            entry.future.set_exception(error)

    def failed(self, request: int, kind: events.ErrorKind, reason: str) -> None:
        with self._lock:
            entry = self._requests.pop(request, None)
        if entry is not None:
            entry.future.set_exception(request_error(kind, reason, request))

    def deploy_ended(self, epoch: int, error: str) -> None:
        waiting = self._deploying.pop(epoch, None)
        if waiting is not None:
            waiting.set_result(error)

    def closed(self) -> None:
        self._all_ended.set()

    def crashed(self, reason: str) -> None:
        self._closing = reason
        self._fail_all(reason)
        for waiting in tuple(self._deploying.values()):
            waiting.set_result(reason)
        self._all_ended.set()

    # ---- inside ------------------------------------------------------------------------------------------------------

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
        plan = self._plans.get(body.epoch)
        if plan is None:
            return None
        graph = self.captured.graph
        return [graph.tensors[index] for index in graph.frontier(plan.transfers[body.edge].position)]

    def _node_leaves(self, peer: NodeId, body: dict[str, Any]) -> None:
        """A node of ours is told to stop: finish what was accepted, then let it go."""
        plan = self._plan
        with self._lock:
            if self._closing or plan is None or str(peer) not in (*plan.devices, plan.sink):
                return
            self._closing = f"node {peer} is shutting down; deploy on the remaining nodes"
        self._shell.post(events.CloseRequested(drain=True))

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            left, self._requests = self._requests, {}
        for number, entry in left.items():
            entry.future.set_exception(SessionClosed(f"request {number}: {reason}"))
