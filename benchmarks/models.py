"""The standard networks that benchmarks time, at 224x224 and full size, with weights that behave like trained ones.

Shapes are those of the papers (ResNet 1512.03385, MobileNetV2 1801.04381, EfficientNet 1905.11946), in plain torch. Random
weights alone would mislead: default initialisation lets activations die into denormals, which are slow. So weights are He
normal and the batch norms hold the statistics of seeded calibration pictures, as after training. Accuracy means
nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["MODELS", "conv", "efficientnet_b0", "mobilenet_v2", "pictures", "resnet18", "resnet50", "settle"]

Made = tuple[nn.Module, torch.Tensor]


def pictures(count: int, size: int = 224, seed: int = 0) -> torch.Tensor:
    """Seeded smooth pictures (count, 3, size, size), about zero mean and unit variance: noise at several scales."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, size, size)
    for scale in (7, 28, 112):
        coarse = torch.randn(count, 3, scale, scale, generator=generator)
        total += nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return (total - total.mean()) / total.std()


def settle(model: nn.Module, seed: int, size: int = 224, run: Callable[[torch.Tensor], object] | None = None) -> nn.Module:
    """He initialisation, then batch-norm statistics over calibration pictures, which `run` (the model) takes in batches."""
    torch.manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out" if part.groups == 1 else "fan_in", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=1 / math.sqrt(part.in_features))
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # a plain average over the calibration batches
    model.train()
    with torch.no_grad():
        for batch in range(2):
            (run or model)(pictures(8, size, seed=seed + 1 + batch))
    return model.eval()


def _settle(model: nn.Module, seed: int) -> Made:
    """(model in eval mode, one picture)."""
    return settle(model, seed), pictures(1, seed=seed)


def conv(inside: int, outside: int, kernel: int, stride: int, groups: int, activation: nn.Module | None) -> nn.Sequential:
    """Convolution, batch norm and, where given, an activation."""
    parts: list[nn.Module] = [
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]
    return nn.Sequential(*parts, *([activation] if activation is not None else []))


class _Residual(nn.Module):
    """`body` plus a shortcut, projected where the shape changes; ReLU after the sum where asked."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, relu: bool):
        super().__init__()
        self.body, self.shortcut = body, shortcut
        self.activation = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def _resnet(depths: tuple[int, ...], bottleneck: bool) -> nn.Module:
    layers: list[nn.Module] = [conv(3, 64, 7, 2, 1, nn.ReLU(inplace=True)), nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for level, depth in enumerate(depths):
        width = 64 << level
        outside = width * (4 if bottleneck else 1)
        for block in range(depth):
            stride = 2 if level and block == 0 else 1
            relu = nn.ReLU(inplace=True)
            if bottleneck:
                body = nn.Sequential(
                    conv(inside, width, 1, 1, 1, relu),
                    conv(width, width, 3, stride, 1, relu),
                    conv(width, outside, 1, 1, 1, None),
                )
            else:
                body = nn.Sequential(conv(inside, width, 3, stride, 1, relu), conv(width, width, 3, 1, 1, None))
            same = inside == outside and stride == 1
            layers.append(_Residual(body, nn.Identity() if same else conv(inside, outside, 1, stride, 1, None), True))
            inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.expand(self.activation(self.reduce(self.pool(x)))))


def _inverted(inside: int, outside: int, expand: int, kernel: int, stride: int, silu: bool) -> nn.Module:
    """MobileNetV2's block; with `silu`, EfficientNet's (squeeze-and-excitation in it)."""
    wide = inside * expand

    def activation() -> nn.Module:
        return nn.SiLU(inplace=True) if silu else nn.ReLU6(inplace=True)

    parts: list[nn.Module] = [conv(inside, wide, 1, 1, 1, activation())] if expand > 1 else []
    parts.append(conv(wide, wide, kernel, stride, wide, activation()))
    if silu:
        parts.append(_SqueezeExcite(wide, max(1, inside // 4)))
    body = nn.Sequential(*parts, conv(wide, outside, 1, 1, 1, None))
    return _Residual(body, nn.Identity(), False) if stride == 1 and inside == outside else body


def _mobile(table: tuple[tuple[int, int, int, int, int], ...], silu: bool) -> nn.Module:
    """`table` rows: expand, channels, repeats, stride, kernel."""
    activation: Callable[[], nn.Module] = (lambda: nn.SiLU(inplace=True)) if silu else (lambda: nn.ReLU6(inplace=True))
    layers: list[nn.Module] = [conv(3, 32, 3, 2, 1, activation())]
    inside = 32
    for expand, channels, repeats, stride, kernel in table:
        for block in range(repeats):
            layers.append(_inverted(inside, channels, expand, kernel, stride if block == 0 else 1, silu))
            inside = channels
    layers += [conv(inside, 1280, 1, 1, 1, activation()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


def resnet18(seed: int = 0) -> Made:
    """ResNet-18: 11.7 M parameters, 3.6 GFLOP. Returns (module in eval mode, one picture of 1x3x224x224)."""
    return _settle(_resnet((2, 2, 2, 2), False), seed)


def resnet50(seed: int = 0) -> Made:
    """ResNet-50 (stride in the 3x3): 25.6 M parameters, 8.2 GFLOP."""
    return _settle(_resnet((3, 4, 6, 3), True), seed)


def mobilenet_v2(seed: int = 0) -> Made:
    """MobileNetV2 1.0: 3.5 M parameters, 0.6 GFLOP."""
    table = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3))
    return _settle(_mobile((*table, (6, 320, 1, 1, 3)), False), seed)


def efficientnet_b0(seed: int = 0) -> Made:
    """EfficientNet-B0: 5.3 M parameters, 0.8 GFLOP."""
    table = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5))
    return _settle(_mobile((*table, (6, 320, 1, 1, 3)), True), seed)


MODELS: dict[str, Callable[[], Made]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_b0": efficientnet_b0,
}
