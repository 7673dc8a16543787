"""What exits would have done, sample by sample, on data that nobody learnt from: how sure each was, and how right.

Data for calibration.py, which chooses thresholds from it without running anything again. One pass over the samples, exit by
exit; O(model and heads) per sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ecotone.model import Captured, ModelError
from ecotone.model.confidence import ExitRule
from ecotone.model.exit_training import Data, Progress
from ecotone.units import EcotoneError

__all__ = ["CalibrationError", "Floats", "Outcomes", "observe", "observed"]

Floats = NDArray[np.float64]


class CalibrationError(EcotoneError):
    """No thresholds keep a budget, or the data says nothing of these exits."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a calibration set showed. `sure` and `right`: (samples, exits); `final`: (samples,); rights are shares in [0, 1].

    `is_labelled`: right means as labelled. `decisions` that a sample has.
    """

    exits: tuple[str, ...]
    sure: Floats
    right: Floats
    final: Floats
    is_labelled: bool
    decisions: int = 1

    def __len__(self) -> int:
        return len(self.final)

    def of(self, exits: Sequence[str]) -> Outcomes:
        """The same of some of the exits."""
        columns = [self.exits.index(name) for name in exits]
        return replace(self, exits=tuple(exits), sure=self.sure[:, columns], right=self.right[:, columns])

    def rows(self, chosen: NDArray[np.intp]) -> Outcomes:
        """The same of some of the samples."""
        return replace(self, sure=self.sure[chosen], right=self.right[chosen], final=self.final[chosen])

    def tensors(self) -> dict[str, torch.Tensor]:
        """As tensors for a file."""
        found = {"sure": self.sure, "right": self.right, "final": self.final}
        return {name: torch.from_numpy(values.astype(np.float32)) for name, values in found.items()} | {
            "labelled": torch.tensor([int(self.is_labelled), self.decisions])
        }

    @staticmethod
    def from_tensors(exits: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> Outcomes | None:
        """What `tensors` gave; None where they are not there or do not fit."""
        try:
            sure, right, final = (tensors[name].double().numpy() for name in ("sure", "right", "final"))
            labelled, decisions = tensors["labelled"].tolist()
        except (KeyError, RuntimeError, ValueError, TypeError):
            return None
        fits = sure.shape == right.shape == (len(final), len(exits)) and len(final) > 0
        return Outcomes(tuple(exits), sure, right, final, bool(labelled), max(1, decisions)) if fits else None


def observe(captured: Captured, data: Data, *, progress: Progress | None = None) -> Outcomes:
    """Run the exits of `captured` on samples that nobody learnt from; raises ModelError where one does not fit."""
    (outcomes,) = observed(captured, data, [[head.rule for head in captured.exits]], progress)
    return outcomes


@dataclass(slots=True)
class _Seen:
    sure: list[Floats] = field(default_factory=list)  # per rule set: (samples, exits)
    right: list[Floats] = field(default_factory=list)
    final: list[Floats] = field(default_factory=list)
    decisions: int = 1


def observed(
    captured: Captured, data: Data, rules: Sequence[Sequence[ExitRule]], progress: Progress | None = None
) -> list[Outcomes]:
    """One Outcomes per set of rules, from one pass over the data."""
    if not captured.exits:
        raise CalibrationError(f"{captured.graph.name}: has no exits to calibrate; attach or train some")
    stops = (0, *(head.position for head in captured.exits))
    exiting = [
        captured.segment(a, head.position, head.name).module()
        for a, head in zip(stops, captured.exits, strict=False)
    ]  # fmt: skip
    last = captured.segment(stops[-1], captured.graph.num_blocks).module()
    seen, labelled, samples = _Seen(), [], data() if callable(data) else data
    total = 0 if callable(data) else len(data)
    for number, (inputs, labels) in enumerate(samples):
        with torch.no_grad():
            tensors, exits = tuple(inputs), []
            for module in exiting:
                frontier, *outputs = module(*tensors)
                tensors = (frontier,)
                exits.append(outputs)
            final = list(last(*tensors))
        seen.sure.append(np.stack([_surest(exits, row) for row in rules]))
        rule = captured.exits[0].rule
        decided = final[rule.output]
        seen.decisions = max(1, decided.numel() // (len(decided) * decided.shape[rule.dim]))
        seen.right.append(np.stack([_right(outputs, final, labels, rule) for outputs in exits], axis=1))
        seen.final.append(_right(final, final, labels, rule))
        labelled.append(labels is not None)
        if progress:
            progress(number + 1, max(total, number + 1), "calibration")
    if not labelled:
        raise CalibrationError(f"exits of {captured.graph.name}: there are no samples to calibrate on")
    if any(labelled) != all(labelled):
        raise CalibrationError("some samples have labels and some have none; give all or none")
    sure, right, final_right = np.concatenate(seen.sure, axis=1), np.concatenate(seen.right), np.concatenate(seen.final)
    names = tuple(head.name for head in captured.exits)
    return [Outcomes(names, sure[i], right, final_right, all(labelled), seen.decisions) for i in range(len(rules))]


def _surest(exits: Sequence[Sequence[torch.Tensor]], rules: Sequence[ExitRule]) -> Floats:
    """(samples, exits)."""
    found = [rule.of_samples(outputs).double().numpy() for outputs, rule in zip(exits, rules, strict=True)]
    return np.stack(found, axis=1)


def _right(
    outputs: Sequence[torch.Tensor], final: Sequence[torch.Tensor], labels: torch.Tensor | None, rule: ExitRule
) -> Floats:
    """Per sample the share of its decisions that are right, or like the model's own: (samples,)."""
    chosen = outputs[rule.output].argmax(rule.dim)
    wanted = final[rule.output].argmax(rule.dim) if labels is None else labels
    if tuple(wanted.shape) != tuple(chosen.shape):
        raise ModelError(f"labels {list(wanted.shape)}: the model decides {list(chosen.shape)} times; give them so shaped")
    found: Floats = (chosen == wanted).reshape(len(chosen), -1).double().mean(1).numpy()
    return found
