"""Labels of a calibration set: checked against what the model decides before anything is measured with them.

One label per sample: class numbers in the shape of the decisions of one output (the first that fits), with or without a
batch of one in front. IGNORED marks a decision without label. Wrong shapes, dtypes, classes and counts name the sample. A
set on which the model is right no more often than by chance, by a one-sided binomial test, is refused: its labels are of
other samples, or number the classes in another way. Chance is what independent labels of these frequencies would give,
sum_k P(label = k) P(decision = k) (Cohen 1960), and no less than one in the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch

from ecotone.profiling.decisions import class_dim
from ecotone.units import EcotoneError

__all__ = ["IGNORED", "ChanceTest", "LabelError", "Labels"]

IGNORED = -100  # as in torch.nn.functional.cross_entropy
LEAST_DECISIONS = 20  # fewer say nothing about chance
SIGNIFICANCE = 0.01  # of a hundred sets with wrong labels one is taken for right
MAX_CLASSES = 4096  # more would make the table of pairs large: then only 1 / classes is tested


class LabelError(EcotoneError):
    """Labels do not fit the samples or the model."""


class Labels:
    """`given` holds one label per sample: tensors, arrays, lists or numbers; or one tensor or array of them all."""

    def __init__(self, given: Sequence[Any] | torch.Tensor | np.ndarray, samples: Sized, names: Sequence[str] = ()) -> None:
        if not isinstance(given, Sized) or isinstance(given, str | bytes | dict):
            raise LabelError(f"labels: are {type(given).__name__}; give one label per sample, in their order")
        if len(given) != len(samples):
            raise LabelError(f"labels: {len(given)} for {len(samples)} samples; give one label per sample, in their order")
        self._given, self._names = given, names

    def of(self, index: int, outputs: Sequence[torch.Tensor]) -> tuple[int, torch.Tensor]:
        """Which output (among those that decide) the label of sample `index` is for, and the label in its shape.

        Raises LabelError where it fits none of `outputs`, or names a class that there is not.
        """
        where = self._where(index)
        label = self._read(index)
        deciding = [(output, dim) for output in outputs if (dim := class_dim(output)) is not None]
        for number, (output, dim) in enumerate(deciding):
            shape = (*output.shape[:dim], *output.shape[dim + 1 :])
            if tuple(label.shape) == shape or (1, *label.shape) == shape:
                self._check_classes(label, output.shape[dim], where)
                return number, label.reshape(shape)
        wanted = " or ".join(str((*o.shape[:d], *o.shape[d + 1 :])) for o, d in deciding)
        raise LabelError(f"{where}: has shape {tuple(label.shape)}, the model decides {wanted}; give one class per decision")

    def paired(self, index: int, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The label of sample `index` and the output that it is for."""
        number, label = self.of(index, outputs)
        return label, [output for output in outputs if class_dim(output) is not None][number]

    def contents(self) -> Iterator[tuple[torch.Tensor]]:
        """All labels in order, for a content hash."""
        for index in range(len(self._given)):
            yield (self._read(index),)

    def _where(self, index: int) -> str:
        return f"label of sample {index}" + (f" ({self._names[index]})" if self._names else "")

    def _read(self, index: int) -> torch.Tensor:
        item, where = self._given[index], self._where(index)
        try:
            label = item.detach().cpu() if isinstance(item, torch.Tensor) else torch.from_numpy(np.array(item))
        except (TypeError, ValueError, RuntimeError):
            raise LabelError(f"{where}: {item!r:.60} holds no numbers of one shape; give whole class numbers") from None
        if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            kind = str(label.dtype).removeprefix("torch.")
            raise LabelError(f"{where}: is {kind}; give whole class numbers, from 0 (int64)")
        return label.long()

    @staticmethod
    def _check_classes(label: torch.Tensor, classes: int, where: str) -> None:
        wrong = label[((label < 0) | (label >= classes)) & (label != IGNORED)]
        if wrong.numel():
            text = f"holds class {int(wrong.flatten()[0])}, the model has classes 0 to {classes - 1}"
            raise LabelError(f"{where}: {text} ({IGNORED} marks a decision without label)")


class ChanceTest:
    """Counts pairs of label and decision, sample by sample; `check` refuses labels that tell nothing."""

    def __init__(self) -> None:
        self._pairs = np.zeros((0, 0), dtype=np.int64)
        self.num_decisions = self.num_right = 0

    def add(self, labels: torch.Tensor, output: torch.Tensor) -> None:
        """One sample: labels in the shape of the decisions of `output`."""
        dim = class_dim(output)
        assert dim is not None
        known = labels != IGNORED
        made = output.argmax(dim)[known]
        self.num_decisions += made.numel()
        self.num_right += int((made == labels[known]).sum())
        classes = output.shape[dim]
        if classes <= MAX_CLASSES:
            if not self._pairs.size:
                self._pairs = np.zeros((classes, classes), dtype=np.int64)
            np.add.at(self._pairs, (labels[known].numpy().ravel(), made.numpy().ravel()), 1)
        self._classes = classes

    @property
    def chance(self) -> float:
        """Share of decisions that would be right if labels and decisions had nothing to do with each other."""
        least = 1.0 / self._classes
        if not self._pairs.size or (self._pairs.sum(1) > 0).sum() < 2:
            return least  # all labels alike: nothing to permute
        frequencies = self._pairs.sum(1) @ self._pairs.sum(0) / self.num_decisions**2
        return max(least, float(frequencies))

    def check(self) -> None:
        """Raises LabelError where there is nothing to count, or the model is right no more often than by chance."""
        if not self.num_decisions:
            raise LabelError(f"labels: every decision is marked as without label ({IGNORED}); label some of them")
        from scipy import special  # slow to import, and every node would pay for it

        chance = self.chance
        by_chance = float(special.bdtrc(self.num_right - 1, self.num_decisions, chance))
        if self.num_decisions < LEAST_DECISIONS or by_chance < SIGNIFICANCE:
            return
        counts = f"the unsplit model is right in {self.num_right} of {self.num_decisions} decisions"
        says = f"{100 * self.num_right / self.num_decisions:.3g} %, by chance it would be {100 * chance:.3g} %"
        raise LabelError(f"labels look wrong: {counts} ({says}); {self._remedy()}")

    def _remedy(self) -> str:
        """Whether another numbering of the classes would make sense of the labels."""
        if self._pairs.size and self._pairs.shape[0] <= 1024:
            from scipy.optimize import linear_sum_assignment

            rows, columns = linear_sum_assignment(self._pairs, maximize=True)
            best = int(self._pairs[rows, columns].sum())
            if best > 2 * max(self.num_right, self.chance * self.num_decisions):
                share = 100 * best / self.num_decisions
                return f"with its classes renumbered it would be right in {share:.3g} %: give labels in the model's order"
        return "are they in the order of the samples, and do classes count from 0 as in the model?"
