"""Holds answers against the reference, sample by sample: with labels by what is right, without by what is alike.

The reference is the whole model, unsplit, in eager float32. With labels only the output that they are for counts, and only
decisions that have one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ecotone.profiling.crossings import Answer, Tensors
from ecotone.profiling.decisions import decided
from ecotone.profiling.labels import IGNORED, Labels
from ecotone.profiling.paired import Tally
from ecotone.units import EcotoneError

__all__ = ["Judge", "leaving"]


class Judge:
    """Judges answers for one sample; raises EcotoneError where the model decides nothing or the label does not fit."""

    def __init__(self, index: int, reference: Sequence[torch.Tensor], labels: Labels | None) -> None:
        self._reference = decided(reference)
        if not self._reference:
            raise EcotoneError(
                "accuracy: no output of the model has classes to decide between (a floating tensor with two or more along "
                "dimension 1 of four, else the last); leave the accuracy table out"
            )
        self._output, self._label = -1, None  # type: int, torch.Tensor | None
        if labels is not None:
            self._output, self._label = labels.of(index, reference)

    def add_to(self, tally: Tally, outputs: Sequence[torch.Tensor]) -> None:
        """Count what `outputs` lose and gain against the reference."""
        made = decided(outputs)
        if len(made) != len(self._reference) or any(a.shape != b.shape for a, b in zip(made, self._reference, strict=True)):
            shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
            raise EcotoneError(f"accuracy: outputs {shapes} do not decide what the reference decides; they need its shapes")
        if self._label is None:
            pairs = list(zip(made, self._reference, strict=True))
            total = sum(b.numel() for _, b in pairs)
            differ = sum(int((a != b).sum()) for a, b in pairs)
            tally.add(total, lost=differ, gained=0, differ=differ, right=total - differ)
            return
        known = self._label != IGNORED
        mine, theirs, truth = made[self._output][known], self._reference[self._output][known], self._label[known]
        if not truth.numel():
            return
        is_right, was_right = mine == truth, theirs == truth
        lost, gained = int((was_right & ~is_right).sum()), int((is_right & ~was_right).sum())
        tally.add(truth.numel(), lost, gained, int((mine != theirs).sum()), int(is_right.sum()))


def leaving(answer: Answer, exits: Sequence[str], thresholds: Sequence[float]) -> tuple[str, Tensors]:
    """Where a request leaves by these thresholds ("": at the end), and with what outputs."""
    for name, threshold in zip(exits, thresholds, strict=True):
        outputs, confidence = answer.exits[name]
        if confidence >= threshold:
            return name, outputs
    return "", answer.outputs
