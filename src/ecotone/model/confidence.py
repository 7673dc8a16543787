"""How sure an exit is: one number in [0, 1] per request, from the outputs of its head, for every executor alike.

A *decision* is a choice among the classes along one dimension of one output. Per decision, with p = softmax in float32 over
C classes: "top" is max p (SPINN), "entropy" is 1 - H(p) / log C with H = -sum p log p (BranchyNet's criterion turned round,
so that more is surer), "margin" is the greatest p less the second. A sample with many decisions (a map of tiles, a text of
tokens) has their mean or their least, as the rule says; a request of several samples has the least of its samples, since it
leaves as a whole. O(elements of the output).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ecotone import schema

__all__ = ["MEASURES", "OVER", "ExitRule", "classes_dim"]

MEASURES = ("top", "entropy", "margin")
OVER = ("mean", "min")


def classes_dim(rank: int) -> int:
    """The dimension of the classes of an output: 1 of four dimensions or more (a map), else the last."""
    return 1 if rank >= 4 else rank - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRule:
    """The last `num_outputs` tensors are an exit's; number `output` of them decides along dimension `dim`."""

    num_outputs: int = 1
    output: int = 0
    dim: int = 1
    measure: str = "top"
    over: str = "mean"

    def __post_init__(self) -> None:
        schema.check("exit rule", self.violations())

    def violations(self) -> Iterator[str]:
        """What is wrong with it."""
        if not 0 <= self.output < self.num_outputs:
            yield f"output {self.output} of {self.num_outputs} does not exist"
        if self.dim < 1:
            yield f"dim is {self.dim}; the classes lie along dimension 1 or later, dimension 0 is the samples"
        if self.measure not in MEASURES or self.over not in OVER:
            yield f"{self.measure!r} over {self.over!r}: measures are {', '.join(MEASURES)}, over {' or '.join(OVER)}"

    def of_decisions(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Per sample and decision, shape [n, decisions]; `outputs` are those of the exit."""
        logits = outputs[self.output].float().movedim(self.dim, -1)
        if self.measure == "entropy":
            log_p = torch.log_softmax(logits, -1)
            sure = 1 + (log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])
        else:
            p = torch.softmax(logits, -1)
            if self.measure == "top":
                sure = p.amax(-1)
            else:
                best = p.topk(2, -1).values
                sure = best[..., 0] - best[..., 1]
        return sure.reshape(len(sure), -1)

    def of_samples(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Per sample, shape [n]."""
        sure = self.of_decisions(outputs)
        return sure.mean(1) if self.over == "mean" else sure.amin(1)

    def of_request(self, outputs: Sequence[torch.Tensor]) -> float:
        """The confidence that is held against a threshold; NaN (a broken head) counts as 0."""
        found = float(self.of_samples(outputs).amin())
        return found if found == found else 0.0
