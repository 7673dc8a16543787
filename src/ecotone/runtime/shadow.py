"""A sampled shadow stream: some requests are answered a second time by the reference, and drift is raised.

Theory of operation. `Session.watch` shows each result in the loop thread. A seeded coin takes a share `rate` of them; inputs
and outputs of those are copied (their owner may write over them) into a bounded queue, or skipped where it is full. One
thread of lowest priority takes them out while no request is under way, or when one has waited for `patience_s`, runs the
whole model in eager float32 on the captured module that the asker holds anyway, and tells protocol/drift.py what share of
the decisions differs. A notice goes to the session's listeners and its explanation. So a request never waits for the
shadow, none is lost by it, and memory has a bound. A fault of the reference run stops the shadow, not the session.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from ecotone.plan import Plan
from ecotone.profiling.decisions import count_differing, decided, decides
from ecotone.protocol.drift import Drift, DriftSettings, DriftWatch, Returned
from ecotone.runtime.future import Delivered
from ecotone.runtime.session import Session
from ecotone.units import EcotoneError

__all__ = ["Shadow"]

MAX_WAITING = 32
MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Kept:
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    expected: float
    kept_s: float
    size_bytes: int


class Shadow:
    """Compares a share `rate` of the results of `session` with the whole model, between `start` and `stop`.

    `expected(plan)`: the largest share of decisions that this plan was calibrated to change. `on_notice` is called with each
    Drift and Returned, in the shadow's thread. `seed` decides which requests are taken. Raises EcotoneError for a rate
    outside (0, 1] and for a model that decides nothing.
    """

    def __init__(
        self,
        session: Session,
        rate: float,
        expected: Callable[[Plan], float],
        *,
        settings: DriftSettings | None = None,
        seed: int = 0,
        patience_s: float = 5.0,
        max_waiting: int = MAX_WAITING,
        max_bytes: int = MAX_BYTES,
        on_notice: Callable[[Drift | Returned], object] | None = None,
    ) -> None:
        if not 0 < rate <= 1:
            raise EcotoneError(f"shadow: rate {rate:g} must be above 0 and at most 1, for example 0.01")
        if not decides(session.captured.graph):
            raise EcotoneError(
                f"shadow: {session.captured.graph.name} has no output with classes, so no decisions to compare"
            )
        self.session, self.rate, self.drift_watch = session, rate, DriftWatch(settings)
        self._expected, self._on_notice, self._patience_s = expected, on_notice, patience_s
        self._max_waiting, self._max_bytes = max_waiting, max_bytes
        self._dice = random.Random(seed)
        self._kept: collections.deque[_Kept] = collections.deque()
        self._held_bytes = 0
        self._changed = threading.Condition()
        self._is_stopping = self._is_busy = False
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._explained, self._watched = session.explain, session.watch
        self.num_seen = self.num_skipped = 0
        self.fault = ""  # why comparing was given up, if it was

    @property
    def num_compared(self) -> int:
        return self.drift_watch.num_compared

    @property
    def drift(self) -> Drift | None:
        """The drift that is not over."""
        return self.drift_watch.drift

    def start(self) -> Self:
        """Begin; `session.explain` has the shadow's lines from now on."""
        self._explained, self._watched = self.session.explain, self.session.watch
        self.session.explain = lambda: [*self._explained(), *self.lines()]
        self.session.watch = self._watch
        self._thread.start()
        return self

    def finish(self, timeout_s: float = 10.0) -> bool:
        """Wait until all that was taken is compared; False where that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._kept or self._is_busy) or bool(self.fault), timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Compare nothing more; what waits is dropped. Twice is well."""
        self.session.watch, self.session.explain = self._watched, self._explained
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def lines(self) -> list[str]:
        """What was compared and found, for a person."""
        watch = self.drift_watch
        skipped = f", {self.num_skipped} skipped for want of room" if self.num_skipped else ""
        text = f"shadow: {watch.num_compared} of {self.num_seen} requests compared with the whole model{skipped}"
        if watch.num_compared:
            text += f"; {watch.recent:.2%} of decisions differ, at most {watch.expected:.2%} expected"
        return [
            text,
            *([str(watch.drift)] if watch.drift else []),
            *([f"shadow stopped: {self.fault}"] if self.fault else []),
        ]

    def summary(self, timeout_s: float) -> list[str]:
        """The same after waiting at most so long for what was taken."""
        self.finish(timeout_s)
        return self.lines()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _watch(self, delivered: Delivered) -> None:
        """In the loop thread: a coin, and at times a copy."""
        self._watched(delivered)
        self.num_seen += 1
        if self._dice.random() < self.rate and delivered.plan is not None and not self.fault:
            try:
                self._keep(delivered, delivered.plan)
            except Exception as error:
                self._give_up(error)
        if self._kept:
            with self._changed:
                self._changed.notify_all()  # this may have been the last request under way

    def _keep(self, delivered: Delivered, plan: Plan) -> None:
        size = sum(t.nbytes for t in (*delivered.inputs, *delivered.outputs))
        if len(self._kept) >= self._max_waiting or self._held_bytes + size > self._max_bytes:
            self.num_skipped += 1
            return
        kept = _Kept(_copied(delivered.inputs), _copied(delivered.outputs), self._expected(plan), time.monotonic(), size)
        with self._changed:
            self._kept.append(kept)
            self._held_bytes += size

    def _run(self) -> None:
        _be_last()
        while (kept := self._next()) is not None:
            try:
                self._compare(kept)
            except Exception as error:
                self._give_up(error)
                return
            finally:
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()

    def _next(self) -> _Kept | None:
        """The oldest request taken, once the session is idle or it has waited long enough; None at the end."""
        with self._changed:
            while not self._is_stopping:
                if self._kept:
                    left_s = self._kept[0].kept_s + self._patience_s - time.monotonic()
                    if left_s <= 0 or self.session.num_waiting == 0:
                        self._is_busy = True
                        kept = self._kept.popleft()
                        self._held_bytes -= kept.size_bytes
                        return kept
                    self._changed.wait(left_s)
                else:
                    self._changed.wait()
        return None

    def _compare(self, kept: _Kept) -> None:
        wanted = decided(self.session.captured.reference(kept.inputs))
        made = decided(kept.outputs)
        if [t.shape for t in made] != [t.shape for t in wanted]:
            raise EcotoneError("the outputs that were served do not decide what the whole model decides")
        differ, total = count_differing(made, wanted)
        notice = self.drift_watch.seen(differ / total, kept.expected) if total else None
        if notice is not None:
            self.session.told(notice)
            if self._on_notice is not None:
                self._on_notice(notice)

    def _give_up(self, error: Exception) -> None:
        self.fault = str(error) if isinstance(error, EcotoneError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, EcotoneError):
            traceback.print_exc()
        with self._changed:
            self._kept.clear()
            self._held_bytes = 0
            self._changed.notify_all()


def _copied(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().clone() for t in tensors)


def _be_last() -> None:
    """The lowest priority for this thread, and for those that it starts; where there is none per thread, nothing changes."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
