"""Watches who is there, and moves the stages of a language model where a better plan pays: a machine joined, or came back.

After a loss the generator goes on with what is left (succession, or the planner with every living stage kept). The
steward comes behind it: when the set of machines has been the same for `settle_s`, it asks for the best plan on them and
moves there if that is better by `least_gain`, with the keys, while requests go on. One move at a time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ecotone.cluster import DeviceId
from ecotone.decoding.words import Resharded
from ecotone.llm.generator import Generator
from ecotone.llmplan import LlmPlan
from ecotone.units import EcotoneError

__all__ = ["Offer", "Steward"]

_LOOK_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The best plan on some machines; `value` and `present_value` (of the plan in force) are seconds: less is better."""

    plan: LlmPlan
    value: float
    present_value: float


class Steward:
    """`solve(plan in force, machines that are there)` gives an Offer, or raises EcotoneError. `tell(text)`: for people."""

    def __init__(
        self,
        generator: Generator,
        alive: Callable[[], frozenset[DeviceId]],
        solve: Callable[[LlmPlan, frozenset[DeviceId]], Offer],
        *,
        least_gain: float = 1.1,
        settle_s: float = 2.0,
        tell: Callable[[str], None] = lambda text: None,
    ):
        self._generator, self._alive, self._solve = generator, alive, solve
        self._least_gain, self._settle_s, self._tell = least_gain, settle_s, tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llm-steward", daemon=True)
        self.moves: list[Resharded] = []

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Look no further; a move under way is awaited."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        judged, seen, since_s = self._alive(), self._alive(), time.monotonic()
        while not self._stop.wait(_LOOK_S):
            now = self._alive()
            if now != seen:
                seen, since_s = now, time.monotonic()
            if seen != judged and time.monotonic() - since_s >= self._settle_s and self._generator.is_running:
                judged = seen
                with contextlib.suppress(EcotoneError):  # nothing better can be had: requests go on where they are
                    self._look(seen)

    def _look(self, alive: frozenset[DeviceId]) -> None:
        present = self._generator.plan
        offer = self._solve(present, alive)
        if offer.plan.identity() == present.identity() or offer.value * self._least_gain > offer.present_value:
            return
        self._tell(f"moving to {offer.plan}: {offer.present_value:.3g} s would become {offer.value:.3g} s")
        report = self._generator.reshard(offer.plan)
        self.moves.append(report)
        self._tell(
            f"the move failed: {report.error}" if report.error else f"moved; nothing was sent for {report.pause_s:.3g} s"
        )
