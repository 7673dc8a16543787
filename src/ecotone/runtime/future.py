"""What `Session.submit` gives back: a plain future that also knows its request, whether it is accepted, and who answered;
and what the session says of a result to whoever watches."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ecotone.plan import Plan

__all__ = ["Delivered", "Future"]


class Future(concurrent.futures.Future[Any]):
    """Ends with the model's output or a RequestError. `request` is the number, `request_id` the caller's name for it."""

    def __init__(self, request: int = 0, request_id: str | None = None):
        super().__init__()
        self.request, self.request_id = request, request_id
        self.epoch: int | None = None
        """The plan that answered; None until it is there, and for a result that was read from the journal."""
        self.exit = ""
        """The early exit whose answer it is; "" for that of the model's end."""
        self._accepted = threading.Event()
        self.set_running_or_notify_cancel()  # cancelling goes through the machine: see Session.cancel

    @property
    def is_accepted(self) -> bool:
        """Whether the request will end with exactly one result or error; with a journal: also through a restart."""
        return self._accepted.is_set()

    def wait_accepted(self, timeout_s: float | None = None) -> bool:
        """Wait until the request is accepted or has ended (refused, for instance); False when `timeout_s` passed first."""
        return self._accepted.wait(timeout_s)

    def accept(self) -> None:
        """Told by the session."""
        self._accepted.set()


@dataclass(frozen=True, slots=True)
class Delivered:
    """A result just before it is told: what went in, what came out (in the order of the last frontier), under which plan."""

    inputs: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]
    plan: Plan | None
