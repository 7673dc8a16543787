"""Networks with branches for the DAG planner: GoogLeNet (arXiv:1409.4842) and a camera with a depth map, in plain torch.

Weights are random: only structure, FLOP and bytes count here. Times are FLOP over a stated speed, and bytes moved.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.models import conv
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.graph import Graph
from ecotone.profile import Profile, SegmentTime

__all__ = ["NETWORKS", "by_flop"]

DEVICE_FLOP_PER_S, LATENCY_S = 10e9, 0.002


class _Inception(nn.Module):
    """Four branches of one input: 1x1; 1x1 and 3x3; 1x1 and 3x3; pooling and 1x1."""

    def __init__(self, inside: int, a: int, b: tuple[int, int], c: tuple[int, int], d: int):
        super().__init__()
        self.a = conv(inside, a, 1, 1, 1, nn.ReLU())
        self.b = nn.Sequential(conv(inside, b[0], 1, 1, 1, nn.ReLU()), conv(b[0], b[1], 3, 1, 1, nn.ReLU()))
        self.c = nn.Sequential(conv(inside, c[0], 1, 1, 1, nn.ReLU()), conv(c[0], c[1], 3, 1, 1, nn.ReLU()))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inside, d, 1, 1, 1, nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


def googlenet() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """GoogLeNet without its auxiliary heads: 3.0 GFLOP at 224x224."""
    table: tuple[tuple[int, tuple[int, int], tuple[int, int], int] | None, ...] = (
        (64, (96, 128), (16, 32), 32), (128, (128, 192), (32, 96), 64), None, (192, (96, 208), (16, 48), 64),
        (160, (112, 224), (24, 64), 64), (128, (128, 256), (24, 64), 64), (112, (144, 288), (32, 64), 64),
        (256, (160, 320), (32, 128), 128), None, (256, (160, 320), (32, 128), 128), (384, (192, 384), (48, 128), 128),
    )  # fmt: skip
    layers: list[nn.Module] = [conv(3, 64, 7, 2, 1, nn.ReLU()), nn.MaxPool2d(3, 2, ceil_mode=True)]
    layers += [conv(64, 64, 1, 1, 1, nn.ReLU()), conv(64, 192, 3, 1, 1, nn.ReLU()), nn.MaxPool2d(3, 2, ceil_mode=True)]
    inside = 192
    for row in table:
        layers.append(nn.MaxPool2d(3, 2, ceil_mode=True) if row is None else _Inception(inside, *row))
        inside = inside if row is None else row[0] + row[1][1] + row[2][1] + row[3]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000)]
    return nn.Sequential(*layers).eval(), (torch.rand(1, 3, 224, 224),)


class _TwoTowers(nn.Module):
    """A camera and a depth map, each through ten convolutions with a narrow waist, then one head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = self._tower(3), self._tower(1)
        self.head = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))

    @staticmethod
    def _tower(channels: int) -> nn.Module:
        widths = ((16, 2), (16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 2), (128, 1))
        layers, inside = [], channels
        for width, stride in widths:
            layers.append(conv(inside, width, 3, stride, 1, nn.ReLU()))
            inside = width
        layers += [nn.Conv2d(inside, 16, 1), conv(16, 256, 3, 1, 1, nn.ReLU()), conv(256, 256, 3, 1, 1, nn.ReLU())]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, picture: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        score: torch.Tensor = self.head(torch.cat([self.left(picture), self.right(depth)], 1))
        return score


def two_towers() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """0.46 GFLOP at 160x160."""
    return _TwoTowers().eval(), (torch.rand(1, 3, 160, 160), torch.rand(1, 1, 160, 160))


NETWORKS = {"googlenet": googlenet, "two_towers": two_towers}


def by_flop(graph: Graph, rate_bytes_per_s: float, faster: float) -> tuple[Cluster, Profile]:
    """A device and a server `faster` times as fast, 2 ms apart; float32 on the wire; times from the blocks' FLOP."""
    names = (DeviceId("device"), DeviceId("server"))
    speeds = (DEVICE_FLOP_PER_S, DEVICE_FLOP_PER_S * faster)
    links = tuple(
        Link(source=a, target=b, latency_s=LATENCY_S, bandwidth_bytes_per_s=rate_bytes_per_s)
        for a, b in (names, names[::-1])
    )
    cluster = Cluster(
        name="by-flop", devices=tuple(Device(name=n, memory_bytes=1 << 33) for n in names), links=links, source=names[0],
        sink=names[0],
    )  # fmt: skip
    last = graph.num_blocks
    spans = [(0, c) for c in range(1, last + 1)] + [(c, last) for c in range(1, last)]
    segments = tuple(
        SegmentTime(
            device=name, executor="torch:fp32", start=a, stop=b, median_s=graph.segment_flop(a, b) / speed, spread_s=0.0,
            memory_bytes=0,
        )
        for name, speed in zip(names, speeds, strict=True) for a, b in spans
    )  # fmt: skip
    return cluster, Profile(
        graph_hash=graph.content_hash(), cluster_name="by-flop", num_blocks=last, cuts=tuple(range(last + 1)),
        segments=segments,
    )  # fmt: skip
