"""A small network that tells three kinds of noise apart, with two exits of its own, and samples of it: shared by tests."""

from __future__ import annotations

import torch
from torch import nn

from ecotone.model import Captured, capture
from ecotone.profiling import ExitRun

CLASSES, SIDE = 3, 8


class Classifier(nn.Module):
    """[n, 2, 8, 8] -> [n, 3]: means of filtered pictures, with narrow maps between, so that few bits hurt."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x)) + x
        x = torch.relu(self.third(x))
        return self.head(x.mean((2, 3)))


def classifier(seed: int = 0, *, dynamic_batch: bool = False, batch: int = 1) -> Captured:
    torch.manual_seed(seed)
    model = Classifier().eval()
    with torch.no_grad():
        model.head.weight.mul_(4)
        outputs = model(pictures(256, seed=5))
        model.head.bias -= outputs.mean(0)  # no class wins by its bias alone
    return capture(model, (pictures(batch),), name="classifier", dynamic_batch=dynamic_batch)


def pictures(count: int, *, seed: int = 1, noise: float = 0.0) -> torch.Tensor:
    """Noise of unlike scale, offset and smoothness; `noise` on top."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.3 + torch.rand(count, 2, 1, 1, generator=generator)
    x = scale * torch.randn(count, 2, SIDE, SIDE, generator=generator) + torch.randn(count, 2, 1, 1, generator=generator)
    return x + noise * torch.randn(count, 2, SIDE, SIDE, generator=generator)


def samples(count: int, *, seed: int = 1, noise: float = 0.0, each: int = 1) -> list[tuple[torch.Tensor, ...]]:
    """So many requests of `each` pictures."""
    x = pictures(count * each, seed=seed, noise=noise)
    return [(part,) for part in x.split(each)]


def exits(captured: Captured) -> list[ExitRun]:
    """Two exits: pooled channels through a random linear layer; confident where the first logit leads by much."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for name, position in (("early", 1), ("late", 2)):
        channels = captured.graph.tensors[captured.graph.frontier(position)[-1]].shape[1]
        weight = torch.randn(channels, CLASSES, generator=generator)

        def outputs(frontier: tuple[torch.Tensor, ...], weight: torch.Tensor = weight) -> tuple[torch.Tensor, ...]:
            return (frontier[-1].mean((2, 3)) @ weight,)

        def confidence(outputs: tuple[torch.Tensor, ...]) -> float:
            best = outputs[0].topk(2, dim=1).values
            return float((best[:, 0] - best[:, 1]).min())

        found.append(ExitRun(name=name, position=position, outputs=outputs, confidence=confidence, content=name))
    return found
