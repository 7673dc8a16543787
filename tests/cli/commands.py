"""A small model, a cluster, and how a command ended: what the tests of the command line share."""

from __future__ import annotations

from dataclasses import dataclass

NET = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 8 * 8, 5)), (torch.rand(1, 3, 32, 32),)


class Stubborn(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x * 2


def stubborn():
    return Stubborn(), (torch.ones(3),)


def nothing():
    return 7


def broken():
    raise ValueError("the disk is full of eels")


def shapeless():
    return nn.Linear(3, 3)
"""

CLUSTER = """
schema = "ecotone.cluster"
version = 1
name = "pair"
emulate = true
[[device]]
name = "near"
memory = "1 GB"
slowdown = 4
executors = ["torch:fp32"]
[[device]]
name = "far"
memory = "1 GB"
executors = ["torch:fp32"]
[[link]]
source = "near"
target = "far"
latency = "1 ms"
bandwidth = "100 Mbit/s"
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
