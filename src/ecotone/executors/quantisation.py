"""What int8 executors share: which inputs calibrate, and keeping a quantiser's own bars off the screen."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence

import torch

from ecotone.executors.executor import Executor, ExecutorError

__all__ = ["calibration_sets", "quiet", "with_calibration"]


def calibration_sets(
    executor: str, examples: Sequence[torch.Tensor], more: Sequence[Sequence[torch.Tensor]]
) -> list[list[torch.Tensor]]:
    """The input sets of `examples`' shapes that calibrate; raises ExecutorError where all their values are one.

    Ranges from a tensor of zeros would clip every real activation, silently: hence the refusal.
    """
    shapes = [t.shape for t in examples]
    sets = [list(examples), *(list(s) for s in more if [t.shape for t in s] == shapes)]
    floating = [t for tensors in sets for t in tensors if t.is_floating_point() and t.numel() > 1]
    if floating and all(bool((t == t.flatten()[0]).all()) for t in floating):
        raise ExecutorError(f"{executor}: int8 is calibrated on its examples and these are constant; pass real inputs")
    return sets


def with_calibration(executor: Executor, sets: Sequence[Sequence[torch.Tensor]]) -> Executor:
    """`executor` calibrated on `sets` (inputs of the segment to come) too; the same one where it needs none."""
    if not executor.id.endswith(":int8"):
        return executor
    return type(executor)(executor.id, tuple(tuple(s) for s in sets))  # type: ignore[call-arg]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed inside, and log records below error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
