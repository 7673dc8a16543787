"""Where drafts are made for a driver: at once in its own thread while that is quick, else in a thread beside it.

Handing an ask to another thread and its answer back costs a good part of a millisecond, as much as a small model needs for
some tokens. So a drafter that never waits and has been quick so far is called by the driver's loop itself, for asks that
should take no longer than AT_ONCE_S. What a request is asked for first, when its prompt is new to the drafter, always goes
to the thread.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from ecotone.decoding.speculation import Draft, DraftAsk, Drafter

__all__ = ["DraftRoom"]

AT_ONCE_S = 0.002
_SHARE = 0.1


class DraftRoom:
    """Asks `drafter`, never from two threads at a time. `tell` is given the answers that `ask` does not give at once.

    `ask` and `end` are for one thread, the driver's loop.
    """

    def __init__(self, drafter: Drafter, tell: Callable[[tuple[Draft, ...]], None]):
        self._drafter, self._tell = drafter, tell
        self._never_waits = bool(getattr(drafter, "never_waits", False))
        self._queue: queue.SimpleQueue[tuple[DraftAsk, ...] | int | None] = queue.SimpleQueue()
        self._num_put = self._num_done = 0  # counted by the loop and by the thread: equal while the thread has nothing to do
        self._begun: set[int] = set()  # requests that were asked for before
        self._token_s = AT_ONCE_S  # per token, of late
        self._thread = threading.Thread(target=self._run, name="llm-drafter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """End; what is asked is not answered. Before `start` nothing."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def ask(self, asks: tuple[DraftAsk, ...]) -> tuple[Draft, ...]:
        """The answers; none where they are told later."""
        requests = {ask.request for ask in asks}
        is_quick = (
            self._never_waits and requests <= self._begun and self._token_s * sum(ask.count for ask in asks) <= AT_ONCE_S
        )
        self._begun |= requests
        if is_quick and self._num_put == self._num_done:
            return self._made(asks)
        self._hand_over(asks)
        return ()

    def end(self, request: int) -> None:
        """Nothing of this request will be asked any more."""
        self._begun.discard(request)
        self._hand_over(request)

    def _hand_over(self, item: tuple[DraftAsk, ...] | int) -> None:
        self._num_put += 1
        self._queue.put(item)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, int):
                self._drafter.end(item)
            else:
                self._tell(self._made(item))
            self._num_done += 1

    def _made(self, asks: Sequence[DraftAsk]) -> tuple[Draft, ...]:
        begin_s = time.perf_counter()
        try:
            found = self._drafter.draft(asks)
        except Exception:  # no drafts is an answer; the text does not depend on them
            traceback.print_exc(file=sys.stderr)
            found = [()] * len(asks)
        spent_s = time.perf_counter() - begin_s
        self._token_s += _SHARE * (spent_s / sum(ask.count for ask in asks) - self._token_s)
        return tuple(
            Draft(request=ask.request, ticket=ask.ticket, tokens=tuple(tokens), seconds=spent_s / len(asks))
            for ask, tokens in zip(asks, found, strict=True)
        )
