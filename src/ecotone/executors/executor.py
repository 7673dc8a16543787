"""The one small interface behind every executor, and what an executor says of itself.

An executor turns a Segment (see ecotone.model) into a callable on torch tensors. Its id is "name:precision"
("torch:fp32", "openvino:bf16"). It may die (a native crash): profiling therefore probes it in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ecotone.model.segment import Segment
from ecotone.units import EcotoneError

__all__ = ["Compiled", "Executor", "ExecutorError"]


class ExecutorError(EcotoneError):
    """An executor is unknown or missing, or cannot prepare or run a segment."""


Compiled = Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
"""Runs one segment: tensors in the order of `segment.inputs` in, tensors in the order of `segment.outputs` out."""


class Executor(Protocol):
    """`id` is "name:precision". `compile` prepares a segment for a device and may use the cache folder."""

    @property
    def id(self) -> str: ...

    def available(self, accelerator: str) -> str:
        """ "" when this executor works for `accelerator` ("cpu", "cuda", "mps"), else the reason and the remedy."""
        ...

    def compile(self, segment: Segment, examples: Sequence[torch.Tensor], accelerator: str, threads: int) -> Compiled:
        """Prepare `segment`; raises ExecutorError naming the operator where it cannot."""
        ...
