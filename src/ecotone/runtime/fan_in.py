"""Fan-in (T3): N branches, each a deployed session of its own, feed one fusing function; a dead branch does not stop it.

The fusing process is the asker of every branch, each over its own Nodes (one launch or attach per branch), so that branches
fail apart from one another. `submit` takes the inputs of all branches for one frame; each branch's outputs come back here
and are fused once, on the branches that came in time. ecotone.protocol.fusion decides; this is its shell: a loop thread with
an inbox, and a thread that fuses.

Not here: endpoints as sources of their own. In this version the inputs of every branch are handed in at the fusing process
and travel to the endpoint with the first transfer of its plan.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from ecotone.cluster import DeviceId
from ecotone.protocol import fusion
from ecotone.protocol.effects import LinkChanged
from ecotone.protocol.fusion import Fusion, FusionSettings
from ecotone.runtime.errors import Busy, NodeLost, RequestError, SessionClosed
from ecotone.runtime.future import Future
from ecotone.runtime.session import Session
from ecotone.units import EcotoneError

__all__ = ["FanIn", "Fused", "with_mask"]

_BRANCH_DEADLINE_S = 30.0  # a token that takes longer is given up, so that its branch is asked again


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """The result of one frame: what fusing made, the branches that took part and those that were missing (by position)."""

    frame: int
    output: Any
    present: tuple[int, ...]
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Opened:
    frame: int
    inputs: Sequence[Any]
    future: concurrent.futures.Future[Fused]


@dataclass(frozen=True, slots=True)
class _Answered:
    branch: int
    frame: int
    answer: concurrent.futures.Future[Any]


@dataclass(frozen=True, slots=True)
class _Lost:
    branch: int


class _Stop:
    pass


class FanIn:
    """Sessions whose outputs are fused frame by frame. A context manager; it does not close the sessions, their owner does.

    `fuse` gets the outputs of all branches by position, None where one is missing, in a thread of its own, in the order in
    which frames end; see with_mask for a module. `settings.num_branches` is taken from the branches.
    """

    def __init__(
        self,
        branches: Sequence[Session],
        fuse: Callable[[Sequence[Any]], Any],
        *,
        settings: FusionSettings | None = None,
        deadline_s: float = _BRANCH_DEADLINE_S,
    ):
        if not branches:
            raise EcotoneError("fan-in: there is no branch; give one session or more")
        self.branches, self._fuse, self._deadline_s = tuple(branches), fuse, deadline_s
        settings = settings or FusionSettings(num_branches=len(branches))
        if settings.num_branches != len(branches):
            raise EcotoneError(f"fan-in: settings are for {settings.num_branches} branches, there are {len(branches)}")
        self._machine = Fusion(settings)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._is_closed = False
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._frames: dict[int, _Opened] = {}
        self._tokens: dict[tuple[int, int], Any] = {}
        self._asked: dict[tuple[int, int], Future] = {}  # of the branches, not answered yet
        self._lane = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="fusing")
        self._thread = threading.Thread(target=self._run, name="fan-in", daemon=True)
        for branch, session in enumerate(self.branches):
            session.listen(partial(self._told, branch))
        self._thread.start()

    def submit(self, inputs: Sequence[Any]) -> concurrent.futures.Future[Fused]:
        """Hand in one frame: per branch its arguments (a tensor or a tuple of them). The future ends with a Fused, or with
        Busy (too many frames are open), NodeLost (too few branches came) or what `fuse` raised.
        """
        if len(inputs) != len(self.branches):
            raise EcotoneError(f"fan-in: inputs for {len(inputs)} branches, there are {len(self.branches)}")
        for branch, item in zip(self.branches, inputs, strict=True):
            branch.captured.flatten_inputs(_arguments(item))  # raises ModelError here, before anything is sent
        future: concurrent.futures.Future[Fused] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._is_closed:
                raise SessionClosed("frame refused: the fan-in is closed")
            self._inbox.put(_Opened(next(self._numbers), tuple(inputs), future))
        return future

    def __call__(self, *inputs: Any) -> Fused:
        """The fused result of one frame."""
        return self.submit(inputs).result()

    @property
    def live(self) -> tuple[int, ...]:
        """Branches that frames wait for now."""
        return self._machine.live

    def close(self, timeout_s: float = 60.0) -> None:
        """Accept nothing more and let every open frame end, if need be without late branches, whose requests are cancelled:
        nobody wants their answers any more. Twice is well.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._inbox.put(_Stop())
        self._thread.join(timeout_s)
        for (branch, _), late in list(self._asked.items()):
            self.branches[branch].cancel(late)
        self._lane.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # a fault of ours: end the frames, do not hang
            traceback.print_exc(file=sys.stderr)
            self._is_closed = True
            for opened in self._frames.values():
                opened.future.set_exception(EcotoneError(f"frame {opened.frame}: the fan-in failed inside: {error}"))

    def _loop(self) -> None:
        machine, is_stopping = self._machine, False
        while not (is_stopping and machine.num_open == 0):
            due_s = machine.due_s
            try:
                item = self._inbox.get(timeout=None if due_s is None else max(0.0, due_s - time.monotonic()))
            except queue.Empty:
                self._carry_out(machine.passed(time.monotonic()))
                continue
            match item:
                case _Opened():
                    self._frames[item.frame] = item
                    self._carry_out(machine.open(item.frame, time.monotonic()))
                case _Answered():
                    self._carry_out(self._answer(item))
                case _Lost(branch=branch):
                    self._carry_out(machine.branch_down(branch))
                case _Stop():
                    is_stopping = True

    def _answer(self, item: _Answered) -> list[fusion.Effect]:
        key = (item.branch, item.frame)
        self._asked.pop(key, None)
        error = item.answer.exception()
        if error is None:
            self._tokens.setdefault(key, item.answer.result())
            return self._machine.arrived(item.branch, item.frame, time.monotonic())
        effects = self._machine.failed(item.branch, item.frame)
        return effects + (self._machine.branch_down(item.branch) if isinstance(error, NodeLost | SessionClosed) else [])

    def _carry_out(self, effects: list[fusion.Effect]) -> None:
        for effect in effects:
            match effect:
                case fusion.Ask(branch=branch, frame=frame):
                    self._ask(branch, frame)
                case fusion.Discard(branch=branch, frame=frame):
                    if frame not in self._frames:
                        self._tokens.pop((branch, frame), None)
                case fusion.Refuse(frame=frame, reason=reason):
                    self._frames.pop(frame).future.set_exception(Busy(f"frame {frame}: {reason}"))
                case fusion.Unfused(frame=frame):
                    self._take(frame)
                    future, missing = self._frames.pop(frame).future, ", ".join(str(i) for i in effect.missing)
                    future.set_exception(NodeLost(f"frame {frame}: branch {missing} did not come in time"))
                case fusion.Fire(frame=frame):
                    self._lane.submit(self._fire, self._frames.pop(frame).future, effect, self._take(frame))

    def _ask(self, branch: int, frame: int) -> None:
        arguments = _arguments(self._frames[frame].inputs[branch])
        try:
            asked = self.branches[branch].submit(arguments, deadline_s=self._deadline_s)
        except EcotoneError as error:
            refused: concurrent.futures.Future[Any] = concurrent.futures.Future()
            refused.set_exception(error if isinstance(error, RequestError) else RequestError(str(error)))
            self._tell(branch, frame, refused)
            return
        self._asked[branch, frame] = asked
        asked.add_done_callback(partial(self._tell, branch, frame))

    def _told(self, branch: int, effect: object) -> None:
        """A node went that every plan of the branch needs: the branch is dead. That it lives again its tokens will say."""
        if isinstance(effect, LinkChanged) and effect.state in ("down", "silent") and not self._is_closed:
            plans = self.branches[branch].plans
            if all(DeviceId(effect.peer) in (*plan.devices, plan.sink) for plan in plans):
                self._inbox.put(_Lost(branch))

    def _tell(self, branch: int, frame: int, answer: concurrent.futures.Future[Any]) -> None:
        self._inbox.put(_Answered(branch, frame, answer))

    def _take(self, frame: int) -> list[Any]:
        return [self._tokens.pop((branch, frame), None) for branch in range(len(self.branches))]

    def _fire(self, future: concurrent.futures.Future[Fused], effect: fusion.Fire, tokens: list[Any]) -> None:
        try:
            output = self._fuse(tokens)
        except Exception as error:  # whatever the caller's function raises is the frame's outcome
            future.set_exception(error)
            return
        future.set_result(Fused(frame=effect.frame, output=output, present=effect.present, missing=effect.missing))


def _arguments(item: Any) -> tuple[Any, ...]:
    return item if isinstance(item, tuple) else (item,)


def with_mask(module: Callable[..., Any], like: Sequence[torch.Tensor]) -> Callable[[Sequence[Any]], Any]:
    """`fuse` for a module of one tensor a branch and a float mask (N,): a missing branch is zeros shaped as `like`."""

    def fuse(outputs: Sequence[Any]) -> Any:
        given = [torch.zeros_like(like[i]) if output is None else output for i, output in enumerate(outputs)]
        with torch.no_grad():
            return module(*given, torch.tensor([float(output is not None) for output in outputs]))

    return fuse
