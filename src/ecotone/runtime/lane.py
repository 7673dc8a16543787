"""A thread that does one kind of work in order: a device's compute, or its codecs. Emulated slowness is made here.

After a job that took t seconds on this computer the lane of a device that is s times slower waits (s - 1) * t before it
hands the result on, so the slowness follows that very execution, not a profile. Results go to a callback, which must
return at once (it puts an event into the node's inbox).
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Done", "Lane"]

_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a job: its value, or the error it raised; seconds with and without the emulated slowness."""

    value: Any
    error: BaseException | None
    seconds: float
    own_seconds: float


Job = tuple[Callable[[], Any], Callable[[Done], None]]


class Lane:
    """One daemon thread called `name`; `slowdown` stretches every job; `threads` is torch's thread count in it."""

    def __init__(self, name: str, *, slowdown: float = 1.0, threads: int = 1):
        self._slowdown, self._threads = slowdown, threads
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], Any], done: Callable[[Done], None]) -> None:
        """Do `work` after all earlier jobs, then call `done` from the lane's thread; never raises, never waits."""
        self._jobs.put((work, done))

    def close(self, timeout_s: float = 10.0) -> bool:
        """Finish what was put, then end; False if the thread still runs after `timeout_s`."""
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        _sharpen_sleep()
        torch.set_num_threads(self._threads)
        while (job := self._jobs.get()) is not None:
            work, done = job
            done(stretched(work, self._slowdown))
            del job, work, done


def stretched(work: Callable[[], Any], slowdown: float) -> Done:
    """Do `work` and make it last `slowdown` times as long as it did; an error is returned, not raised."""
    start = time.perf_counter()
    value, failure = None, None
    try:
        value = work()
    except Exception as error:
        failure = error
    own = time.perf_counter() - start
    end = start + own * slowdown
    while (left := end - time.perf_counter()) > 0:
        time.sleep(left)
    return Done(value, failure, time.perf_counter() - start, own)


def _sharpen_sleep() -> None:
    """Ask Linux for timers exact to a microsecond in this thread: sleeping otherwise ends 50 us late."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
