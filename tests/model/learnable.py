"""Small networks that learn small tasks in seconds, trained once: a residual network for bars, a text encoder for words."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from ecotone.model import Captured, capture

Batch = tuple[torch.Tensor, torch.Tensor]
CLASSES = 4


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


def bars(count: int, seed: int) -> Batch:
    """16x16 pictures [n, 1, 16, 16] of a bar at one of four angles, at any place, in any noise: some are easy."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=random)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    angle = labels * torch.pi / CLASSES
    offset = torch.rand(count, generator=random) * 6 - 3
    away = (
        (x[None] - 7.5) * angle.sin()[:, None, None] - (y[None] - 7.5) * angle.cos()[:, None, None] - offset[:, None, None]
    )
    noise = torch.rand(count, 1, 1, generator=random) * 1.6
    pictures = torch.exp(-(away**2)) + noise * torch.randn(count, 16, 16, generator=random)
    return pictures[:, None], labels


def words(count: int, seed: int) -> Batch:
    """Texts of 12 tokens out of 40; the class is the topic (10 tokens each) that most tokens are of."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=random)
    clear = torch.randint(3, 12, (count, 1), generator=random)
    own = labels[:, None] * 10 + torch.randint(0, 10, (count, 12), generator=random)
    tokens = torch.where(torch.arange(12) < clear, own, torch.randint(0, 40, (count, 12), generator=random))
    order = torch.argsort(torch.rand(count, 12, generator=random), 1)
    return torch.gather(tokens, 1, order), labels


@cache
def residual_net() -> Captured:
    """Trained for bars, captured with any batch."""
    torch.manual_seed(0)
    blocks = [Residual(12), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(), Residual(24), Residual(24)]
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES)
    )
    return _trained(net, bars, 5e-3, "residual")


@cache
def text_encoder() -> Captured:
    """BERT of three layers without a mask, trained for words, captured with any batch."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.model(input_ids=input_ids).logits
            return made

    return _trained(Logits(), words, 2e-3, "text")


def _trained(net: nn.Module, make: object, rate: float, name: str) -> Captured:
    assert callable(make)
    x, y = make(1200, 1)
    optimiser = torch.optim.AdamW(net.parameters(), rate)
    net.train()
    for step in range(110):
        chosen = torch.randint(0, len(x), (64,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(net(x[chosen]), y[chosen])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return capture(net.eval(), (x[:2],), name=name, dynamic_batch=True)
