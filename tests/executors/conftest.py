"""Two small models as segments, and a cache folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ecotone.model import Segment, capture


class SmallConvolutions(nn.Module):
    """A residual block with a depthwise convolution: what executors quantise, fuse and lay out differently."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU6(), nn.Conv2d(16, 16, 1))
        self.last = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.inner(x)
        return self.last(x.mean((2, 3)))


class SmallEncoder(nn.Module):
    """Embedding, one attention layer, a head; takes token ids and a mask, returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.queries, self.keys, self.values = (nn.Linear(32, 32) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 7)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(ids)
        scores = self.queries(x) @ self.keys(x).transpose(1, 2) / 32**0.5
        scores = scores.masked_fill(~mask[:, None, :], -1e4)
        hidden = self.norm(x + scores.softmax(-1) @ self.values(x))
        return self.head(hidden), hidden


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _whole(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Segment:
    captured = capture(model.eval(), inputs)
    return captured.segment(0, captured.graph.num_blocks)


@pytest.fixture(scope="session")
def convolutions() -> tuple[Segment, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    inputs = (torch.randn(1, 3, 32, 32),)
    return _whole(SmallConvolutions(), inputs), inputs


@pytest.fixture(scope="session")
def encoder() -> tuple[Segment, tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    ids, mask = torch.randint(0, 50, (1, 12)), torch.ones(1, 12, dtype=torch.bool)
    mask[:, 9:] = False
    return _whole(SmallEncoder(), (ids, mask)), (ids, mask)
