"""A policy beside a session: the shell of protocol/controller.py on real machines. Decides nothing.

What the session's loop tells its listeners goes into an inbox; one thread hands it to the policy and carries out what it
answers: Switch by `session.prefer`, ProbeLink by `session.probe`, Replan by the planner in a worker thread and
`session.replan`, make-before-break, so that neither the loop nor a request ever waits for a decision. A fault of the policy
stops the adapting, not the session.
"""

from __future__ import annotations

import collections
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ecotone.planset import PlanSet, Standby
from ecotone.protocol import effects
from ecotone.protocol.controller import (
    Decision,
    Expect,
    Keep,
    Planned,
    PlanningFailed,
    Policy,
    ProbeLink,
    Replan,
    Seen,
    Switch,
    Tick,
)
from ecotone.runtime.session import Session
from ecotone.units import EcotoneError

__all__ = ["Adaptive"]

_REMEMBERED = 256
_SEEN = (effects.Observed, effects.LinkChanged, effects.Preferred, effects.Rerouted, effects.DeployEnded)


@dataclass(frozen=True, slots=True)
class _Asked:
    """An event with someone who waits until it is handled."""

    event: Seen
    done: threading.Event


class Adaptive:
    """Runs `policy` on `session` between `start` and `stop`; a context manager.

    `plan` answers Replan in a worker thread (None: nobody plans). `tick_s`: how often the policy is told that time passes;
    0: only by `tick`. `clock` gives the policy its seconds (an emulated trace may have its own).
    """

    def __init__(
        self,
        session: Session,
        policy: Policy,
        *,
        plan: Callable[[Replan], PlanSet] | None = None,
        tick_s: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session, self.policy = session, policy
        self._plan, self._tick_s, self._clock = plan, tick_s, clock
        self._inbox: queue.SimpleQueue[Seen | _Asked | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adaptive", daemon=True)
        self._planner: threading.Thread | None = None
        self._lock = threading.Lock()
        self._explained = session.explain
        self.decisions: collections.deque[tuple[float, Decision]] = collections.deque(maxlen=_REMEMBERED)
        self.num_switches = self.num_probes = self.num_kept = 0
        self.fault = ""  # why the policy was stopped, if it failed

    def start(self) -> Self:
        """Begin with the session's resident plans; `session.explain` tells the policy's reasons from now on."""
        self.session.listen(self._listen)
        self.session.explain = lambda: list(self.explanation())
        self._inbox.put(self._resident())
        self._thread.start()
        return self

    def stop(self, timeout_s: float = 10.0) -> None:
        """Decide nothing more; the plan in force stays. Twice is well."""
        self._inbox.put(None)
        self.session.explain = self._explained
        for thread in (self._thread, self._planner):
            if thread is not None and thread.is_alive() and thread is not threading.current_thread():
                thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def tick(self, timeout_s: float = 5.0) -> None:
        """Tell the policy the time and wait until all that was told so far is decided and carried out."""
        asked = _Asked(Tick(), threading.Event())
        self._inbox.put(asked)
        if self._thread.is_alive():
            asked.done.wait(timeout_s)

    def explanation(self) -> tuple[str, ...]:
        """The policy's account of the plan in force."""
        with self._lock:
            return tuple(self.policy.explanation())

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _listen(self, effect: object) -> None:
        if isinstance(effect, _SEEN):
            self._inbox.put(effect)

    def _resident(self) -> Planned:
        first, *others = self.session.plans
        return Planned(plans=PlanSet(primary=first, standbys=tuple(Standby(plan=plan) for plan in others)))

    def _run(self) -> None:
        next_s = time.monotonic() + self._tick_s
        while True:
            try:
                wait_s = max(0.0, next_s - time.monotonic()) if self._tick_s else None
                item = self._inbox.get(timeout=wait_s)
            except queue.Empty:
                item = Tick()
                next_s = time.monotonic() + self._tick_s
            if item is None:
                return
            event = item.event if isinstance(item, _Asked) else item
            try:
                with self._lock:
                    decisions = self.policy.handle(event, self._clock())
                for decision in decisions:
                    self._carry_out(decision)
            except Exception as error:  # a fault of the policy: say so, leave the session as it is
                self.fault = f"{type(error).__name__}: {error}"
                traceback.print_exc()
                return
            finally:
                if isinstance(item, _Asked):
                    item.done.set()

    def _carry_out(self, decision: Decision) -> None:
        if isinstance(decision, Keep):
            self.num_kept += 1
            return
        self.decisions.append((self._clock(), decision))
        match decision:
            case Switch(epoch=epoch):
                plan = next((p for p in self.session.plans if p.epoch == epoch), None)
                if plan is not None:  # else it was replaced meanwhile: Planned follows
                    self.session.prefer(plan)
                    self.num_switches += 1
            case Expect(epoch=epoch, expected_s=expected_s):
                self.session.expect(epoch, expected_s)
            case ProbeLink(peer=peer, size_bytes=size_bytes):
                self.session.probe(peer, size_bytes)
                self.num_probes += 1
            case Replan():
                self._planner = threading.Thread(target=self._replan, args=(decision,), name="planning", daemon=True)
                self._planner.start()

    def _replan(self, asked: Replan) -> None:
        """In a thread of its own: the planner, then the deployment beside the old plans."""
        try:
            if self._plan is None:
                raise EcotoneError("nobody plans here")
            found = self._plan(asked)
            if {p.identity() for p in found.plans} == {p.identity() for p in self.session.plans}:
                raise EcotoneError("the same plans are best")
            self.session.replan(found)
        except EcotoneError as error:
            self._inbox.put(PlanningFailed(reason=str(error)))
            return
        self._inbox.put(self._resident())
