"""A load that checks each answer while nodes are killed, frozen and cut off: for the tests of failover."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from small_nets import even

from ecotone.model import Captured
from ecotone.planset import PlanSet, Standby
from ecotone.runtime import Session

PATIENCE_S = 60.0


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def set_of(captured: Captured, first: tuple[str, ...], *others: tuple[str, ...], mode: str = "passive") -> PlanSet:
    """`first` in equal parts over these devices, with the others as standbys."""
    standbys = tuple(Standby(plan=even(captured.graph, *d), mode=mode, label="-".join(d)) for d in others)  # type: ignore[arg-type]
    return PlanSet(primary=even(captured.graph, *first), standbys=standbys)


class Load:
    """Threads that ask all the time; each input is another, and each answer is compared with the model's own.

    Deliveries are counted by request where the shell hands them to the session, before a future could hide a second one.
    """

    def __init__(self, session: Session, captured: Captured, x: torch.Tensor):
        self.session, self.captured, self.x = session, captured, x
        self.answers: list[int | None] = []
        self.errors: list[str] = []
        self.deliveries: collections.Counter[int] = collections.Counter()
        delivered = session.delivered

        def counting(request: int, *more: Any) -> None:
            self.deliveries[request] += 1
            delivered(request, *more)

        session.delivered = counting  # type: ignore[method-assign]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(3)]

    def _run(self, worker: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            x = self.x + worker + number / 64
            try:
                future = self.session.submit((x,))
                same = torch.equal(future.result(PATIENCE_S), self.captured.unflatten_outputs(self.captured.reference((x,))))
                self.answers.append(future.epoch)
                if not same:
                    self.errors.append(f"wrong result {number}")
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")

    def more(self, epoch: int, count: int = 5) -> None:
        """Wait for `count` further answers under `epoch`."""
        have = self.answers.count(epoch)
        self.until(lambda: self.answers.count(epoch) >= have + count)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the condition, or for an error, which load_on tells."""
        eventually(lambda: bool(self.errors) or condition())


@contextmanager
def load_on(session: Session, exact: tuple[Captured, torch.Tensor]) -> Iterator[Load]:
    load = Load(session, *exact)
    for thread in load._threads:
        thread.start()
    try:
        yield load
    finally:
        load._stop.set()
        for thread in load._threads:
            thread.join(PATIENCE_S)
    assert not load.errors, load.errors[:3]
    assert max(load.deliveries.values(), default=0) <= 1, "a request was answered twice"
