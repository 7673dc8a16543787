"""Small random models of many families, each with example inputs: what the capture tests run over.

Families come from transformers configurations with tiny widths, or from plain torch where the family is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

ZOO: dict[str, Callable[[], Case]] = {}


def entry(function: Callable[[], Case]) -> Callable[[], Case]:
    ZOO[function.__name__] = function
    return function


def build(name: str) -> Case:
    """The model in eval mode, its args and kwargs; the same at every call."""
    torch.manual_seed(7)
    module, args, kwargs = ZOO[name]()
    module.eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # random statistics: a fresh norm would hide a missing buffer
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return module, args, kwargs


def image(size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def tokens(length: int = 7, batch: int = 2, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length))


@entry
def resnet() -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=5)
    return ResNetForImageClassification(config), (image(),), {}


@entry
def mobilenet_v2() -> Case:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=5)
    return MobileNetV2ForImageClassification(config), (image(),), {}


@entry
def efficientnet() -> Case:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_labels=5,
        in_channels=[32, 16, 24], out_channels=[16, 24, 40], kernel_sizes=[3, 3, 5], strides=[1, 2, 2],
        num_block_repeats=[1, 2, 2], expand_ratios=[1, 6, 6],
    )  # fmt: skip
    return EfficientNetForImageClassification(config), (image(),), {}


@entry
def convnext() -> Case:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=5)
    return ConvNextForImageClassification(config), (image(),), {}


@entry
def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config), (image(),), {}


@entry
def swin() -> Case:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=5
    )
    return SwinForImageClassification(config), (image(),), {}


def _bert_sizes() -> dict[str, int]:
    return {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32,
    }  # fmt: skip


def _mask() -> torch.Tensor:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return mask


@entry
def bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**_bert_sizes(), num_labels=3))
    return model, (), {"input_ids": tokens(), "attention_mask": _mask()}


class SentenceEncoder(nn.Module):
    """Mean pooling over the tokens that count, then unit length, as sentence encoders do."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, dim=-1)


@entry
def sentence_encoder() -> Case:
    from transformers import MPNetConfig, MPNetModel

    return SentenceEncoder(MPNetModel(MPNetConfig(**_bert_sizes()))), (tokens(), _mask()), {}


@entry
def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), (), {"input_ids": tokens(), "decoder_input_ids": tokens(4)}


class Level(nn.Sequential):
    def __init__(self, inside: int, outside: int):
        super().__init__(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Level(3, 8), Level(8, 16), Level(16, 32)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.merge = nn.ModuleList([Level(32, 16), Level(16, 8)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for number, level in enumerate(self.down):
            x = level(x if number == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, (skips[1], skips[0]), strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.head(x)


@entry
def unet() -> Case:
    return UNet(), (image(16),), {}


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)) for i in range(4)
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


@entry
def densenet() -> Case:
    return DenseNet(), (image(12),), {}


class Inception(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.a = Level(width, 4)
        self.b = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), Level(4, 4))
        self.c = nn.Sequential(nn.Conv2d(width, 4, 1), Level(4, 4), Level(4, 4))
        self.d = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(width, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


@entry
def inception() -> Case:
    net = nn.Sequential(Level(3, 8), Inception(8), Inception(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    return net, (image(12),), {}


class Detector(nn.Module):
    """Several scales, several heads, a dictionary of lists and tensors out, a scale by name in."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([Level(3, 8), Level(8, 16), Level(16, 16)])
        self.boxes = nn.ModuleList(nn.Conv2d(w, 4, 3, padding=1) for w in (8, 16, 16))
        self.scores = nn.ModuleList(nn.Conv2d(w, 3, 3, padding=1) for w in (8, 16, 16))

    def forward(self, picture: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
        x, boxes, scores = picture, [], []
        for body, box, score in zip(self.body, self.boxes, self.scores, strict=True):
            x = F.max_pool2d(body(x), 2)
            boxes.append(box(x).flatten(2).transpose(1, 2))
            scores.append(score(x).flatten(2).transpose(1, 2))
        return {
            "boxes": torch.cat(boxes, 1) * scale[:, None, None],
            "scores": [s.softmax(-1) for s in scores],
            "none": None,
            "last": x,
        }


@entry
def detector() -> Case:
    return Detector(), (image(16),), {"scale": torch.tensor([1.0, 2.0])}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(24, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states, (hidden, _) = self.lstm(self.embed(ids))
        states, _ = self.gru(states)
        return self.head(states[:, -1]), hidden


@entry
def lstm() -> Case:
    return Recurrent(), (tokens(),), {}


@entry
def mamba() -> Case:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=False)
    return MambaForCausalLM(config), (tokens(5),), {}


class Tied(nn.Module):
    """One table at both ends, a buffer, a constant made in forward, and an input that only passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(12))
        self.register_buffer("scale", torch.rand(12), persistent=False)

    def forward(self, ids: torch.Tensor, extra: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.embed(ids) + self.shift
        place = torch.arange(ids.shape[1], device=ids.device).to(x.dtype)[:, None]
        x = torch.tanh(self.mix(x + place)) * self.scale + torch.tensor(0.5)
        return self.head(x), extra, self.head(self.mix(x))


@entry
def tied() -> Case:
    return Tied(), (tokens(5, 2, 30), torch.randn(2, 3)), {}


class Windows(nn.Module):
    """In-place writes through views, chunks that cross cuts, transposed layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.first(x).chunk(2, -1)
        y = self.second(left).transpose(1, 2)
        z = torch.zeros_like(y)
        z[:, :, 1:] = y[:, :, :-1]
        z += 1
        return self.third(z.transpose(1, 2).relu()) * torch.sigmoid(right)


@entry
def windows() -> Case:
    return Windows(), (torch.randn(2, 4, 8),), {}


class Tower(nn.Sequential):
    """Three convolutions, each with half the picture and more channels."""

    def __init__(self, inside: int):
        super().__init__(Level(inside, 4), nn.MaxPool2d(2), Level(4, 6), nn.MaxPool2d(2), Level(6, 8), nn.MaxPool2d(2))


class TwoTowers(nn.Module):
    """A camera and a depth map, each through a tower of its own, then one head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Tower(3), Tower(1)
        self.head = nn.Linear(2 * 8 * 4, 5)

    def forward(self, picture: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.left(picture).flatten(1), self.right(depth).flatten(1)], 1))


@entry
def two_towers() -> Case:
    return TwoTowers(), (image(16), torch.randn(2, 1, 16, 16)), {}
