"""The actors of MAHPPO (arXiv:2205.11854): one network per device, whose action is a point, a channel and a power.

Legend: B states, N devices, K points, C channels. Device i: two hidden layers on the joint state, and heads: logits of the
point (K), of the channel (C), mean and deviation of a normal z; the power share is u = sigmoid(z), a bijection. So the
probability that PPO compares is that of the power that was used, not of one that the environment clipped:

 (1) log p(u) = log N(z; mean, deviation) - log(u (1 - u))

Where the published head gives watts, u here counts decades below the largest power (environment.watts_of), and the means
start on a ladder over the devices: two that send on one channel at equal power are both slow, unequal ones are not. Or the
actors start at a plan, `Actors.begin_at`: each device at its planned action, nearly always, and learning goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from ecotone import schema
from ecotone.policies.actions import FloatArray
from ecotone.policies.cells import IntArray
from ecotone.policies.network import WIDEST, read_file, write_file
from ecotone.units import EcotoneError

__all__ = ["Actors", "CellAbout", "Hybrid", "load_actors", "save_actors"]

SCHEMA, VERSION = "ecotone.policy.cell", 1
LEAST_DEVIATION = 0.05
_LADDER = (0.0, 3.0)  # means of z at first, over the devices
_WEIGHTS = ("weight_0", "bias_0", "weight_1", "bias_1", "weight_2", "bias_2")


class Hybrid(torch.distributions.Distribution):
    """Of joint actions (B, N, 3): point, channel, z. `log_prob` and `entropy` are (B, N, 3), a number for each part.

    `entropy` of the power is that of z (of u there is no closed form).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, point: Tensor, channel: Tensor, mean: Tensor, deviation: Tensor) -> None:
        """Logits (B, N, K) and (B, N, C); mean and deviation (B, N)."""
        self.point = torch.distributions.Categorical(logits=point, validate_args=False)
        self.channel = torch.distributions.Categorical(logits=channel, validate_args=False)
        self.power = torch.distributions.Normal(mean, deviation, validate_args=False)
        super().__init__(mean.shape[:-1], torch.Size((mean.shape[-1], 3)), validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        parts = (self.point.sample(sample_shape), self.channel.sample(sample_shape), self.power.sample(sample_shape))
        return torch.stack([part.float() for part in parts], dim=-1)

    @property
    def mode(self) -> Tensor:
        """The likeliest point and channel, and the mean of z."""
        parts = (self.point.logits.argmax(-1).float(), self.channel.logits.argmax(-1).float(), self.power.mean)
        return torch.stack(parts, dim=-1)

    deterministic_sample = mode

    def log_prob(self, value: Tensor) -> Tensor:
        point, channel, z = value.unbind(-1)
        squashed = self.power.log_prob(z) - logsigmoid(z) - logsigmoid(-z)
        return torch.stack([self.point.log_prob(point.long()), self.channel.log_prob(channel.long()), squashed], dim=-1)

    def entropy(self) -> Tensor:
        return torch.stack([self.point.entropy(), self.channel.entropy(), self.power.entropy()], dim=-1)


class Actors(nn.Module):
    """N actors at once, their weights stacked: (B, inputs) -> logits (B, N, K), (B, N, C), mean and deviation (B, N)."""

    weight_0: Tensor
    bias_0: Tensor
    weight_1: Tensor
    bias_1: Tensor
    weight_2: Tensor
    bias_2: Tensor

    def __init__(self, inputs: int, num_devices: int, num_points: int, num_channels: int, hidden: int = 64) -> None:
        super().__init__()
        self.num_devices, self.num_points, self.num_channels = num_devices, num_points, num_channels
        sizes = (inputs, hidden, hidden, num_points + num_channels + 2)
        for i, gain in enumerate((math.sqrt(2), math.sqrt(2), 0.01)):
            weight = torch.empty(num_devices, sizes[i], sizes[i + 1])
            for one in weight:
                nn.init.orthogonal_(one, gain)
            self.register_parameter(f"weight_{i}", nn.Parameter(weight))
            self.register_parameter(f"bias_{i}", nn.Parameter(torch.zeros(num_devices, 1, sizes[i + 1])))
        with torch.no_grad():
            self.bias_2[:, 0, -2] = torch.linspace(*_LADDER, num_devices)

    @torch.no_grad()
    def begin_at(
        self,
        points: Sequence[int],
        channels: Sequence[int],
        shares: Sequence[float],
        sure: float = 4.0,
        deviation: float = 0.2,
    ) -> None:
        """Make every device mostly take its point, channel and power share (in [0, 1]), whatever the state.

        `sure`: their logits, those of the rest are 0; `deviation` of z, above LEAST_DEVIATION.
        """
        self.weight_2.zero_()
        last, kinds = self.bias_2[:, 0], self.num_points
        last[:, : kinds + self.num_channels] = 0.0
        for i, (point, channel, share) in enumerate(zip(points, channels, shares, strict=True)):
            last[i, point], last[i, kinds + channel] = sure, sure
            last[i, -2] = math.log(max(share, 0.01) / (1 - min(share, 0.99)))
        last[:, -1] = math.log(math.expm1(deviation - LEAST_DEVIATION))  # softplus, turned round

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = state.unsqueeze(0).expand(self.num_devices, -1, -1)
        x = torch.tanh(torch.baddbmm(self.bias_0, x, self.weight_0))
        x = torch.tanh(torch.baddbmm(self.bias_1, x, self.weight_1))
        x = torch.baddbmm(self.bias_2, x, self.weight_2).transpose(0, 1)
        points, channels, mean, spread = x.split((self.num_points, self.num_channels, 1, 1), dim=-1)
        return points, channels, mean.squeeze(-1), softplus(spread.squeeze(-1)) + LEAST_DEVIATION

    @torch.no_grad()
    def decide(self, state: np.ndarray[Any, Any], sample: bool = True) -> tuple[IntArray, IntArray, FloatArray]:
        """Points, channels and power shares, (B, N) each, for observations (B, inputs); sampled, or the likeliest."""
        found = Hybrid(*self(torch.from_numpy(state)))
        action = found.sample() if sample else found.mode
        return shares_of(action)


def shares_of(action: Tensor) -> tuple[IntArray, IntArray, FloatArray]:
    """Joint actions (B, N, 3) as the environment takes them."""
    point, channel, z = action.unbind(-1)
    return point.long().numpy(), channel.long().numpy(), torch.sigmoid(z).double().numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class CellAbout:
    """What a policy of a cell was trained for."""

    model: str
    num_devices: int
    num_points: int
    num_channels: int
    decades: float
    sees_channels: bool
    slots: int
    seed: int
    about: str = ""

    def __post_init__(self) -> None:
        ok = 1 <= self.num_devices <= 1000 and 2 <= self.num_points <= WIDEST and 1 <= self.num_channels <= WIDEST
        wrong = [] if ok and 0 <= self.decades <= 30 else ["devices, points, channels or decades are out of range"]
        schema.check("policy of a cell", wrong)

    @property
    def num_inputs(self) -> int:
        return self.num_devices * (4 + (self.num_channels if self.sees_channels else 0))


def save_actors(path: str | Path, actors: Actors, about: CellAbout) -> None:
    """Write the actors; raises EcotoneError. As float32: some 0.1 % of power can throw alike devices out of step."""
    write_file(path, dict(actors.state_dict()), about, SCHEMA, VERSION, torch.float32)


def load_actors(path: str | Path) -> tuple[Actors, CellAbout]:
    """Read what save_actors wrote; raises EcotoneError or SchemaError for anything else."""
    about, tensors = read_file(path, CellAbout, SCHEMA, VERSION)
    if set(tensors) != set(_WEIGHTS) or tensors["weight_0"].ndim != 3 or not 0 < tensors["weight_0"].shape[2] <= WIDEST:
        raise EcotoneError(f"policy {path}: holds not the layers of a cell's policy; train it again")
    hidden = tensors["weight_0"].shape[2]
    expected = Actors(about.num_inputs, about.num_devices, about.num_points, about.num_channels, hidden)
    for name, value in expected.state_dict().items():
        if tensors[name].shape != value.shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
            raise EcotoneError(f"policy {path}: {name} is {shapes}; train it again")
    expected.load_state_dict(tensors)
    return expected.eval().requires_grad_(False), about
