"""The training loop of a learned bottleneck: losses, the density of the latents, and weights ready for their file.

Loss, per decision: what the answer suffers + price * bits per element + reconstruction. What the answer suffers is taken
twice. First, many passes, by its second order: half of d' A d for the error d at each position, A the Fisher information of
the answer about the channels there (the mean of g g', g the gradient of the log-probability of a class drawn from the
model's own answer), which costs some passes through the rest of the model once. Then, few passes, truly: the cross-entropy
of the labels where there are some, else the divergence from the model's own uncompressed outputs (distillation), through the
frozen rest of the model.

MAHPPO (2205.11854) trains a 1x1 autoencoder of a fixed channel factor by reconstruction and cross-entropy; here the rate is
learned as well: bits are those of a density per latent (a mixture of three logistics, integrated over one step; Ballé
1802.01436 with a simpler density) at latents with uniform noise in place of rounding, while the decoder sees rounded ones,
their gradient passed straight through. Frontiers are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ecotone import codec, schema
from ecotone.codec.learned import PRIOR, Spec, down, up
from ecotone.model import Captured
from ecotone.profiling.measurement import Progress
from ecotone.units import EcotoneError

__all__ = ["BottleneckOptions", "Parameters", "Work", "about", "class_dim", "train"]

FISHER_SAMPLES = 32
FINAL = 0.5  # the learning rate of the last passes, of that of the first
SPREAD = 4.0  # levels that a latent's standard deviation takes before training
Samples = Sequence[Sequence[Tensor]]
Parameters = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckOptions:
    """How to train: `epochs` passes with the answer's second order, then `final_epochs` through the rest of the model, which
    cost far more. `latents` 0: as many as the tensor has channels, at most 32; sequences take stride and kernel 1.

    `coding` "prior": `price` is what a bit per element of the cut's tensor may cost the answer, in nats per decision; an int
    codec such as "int8+zstd": the rate follows from `latents`, as in MAHPPO. `validation`: share of the samples, the last
    ones, that are only measured on.
    """

    latents: int = 0
    stride: int = 2
    kernel: int = 2
    hidden: int = 32
    coding: str = PRIOR
    price: float = 0.5
    epochs: int = 20
    final_epochs: int = 1
    batch: int = 8
    learning_rate: float = 5e-3
    reconstruction: float = 0.1
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = []
        if min(self.latents, self.hidden, self.reconstruction, self.final_epochs) < 0:
            wrong.append("latents, hidden, reconstruction and final_epochs must not be negative")
        if min(self.stride, self.epochs, self.batch) < 1:
            wrong.append("stride, epochs and batch must be at least 1")
        if not (0 < self.validation < 1 and self.learning_rate > 0 and self.price > 0):
            wrong.append("validation must lie in (0, 1), learning_rate and price must be above zero")
        schema.check("bottleneck options", wrong)


class Work:
    """Cached frontiers and outputs, and the frozen rest of the model."""

    def __init__(
        self, captured: Captured, spec: Spec, samples: Samples, labels: Sequence[Tensor] | None, options: BottleneckOptions
    ):
        graph = captured.graph
        self.options, self.labels = options, labels
        head = captured.segment(0, spec.position).module()
        self.tail = captured.segment(spec.position, graph.num_blocks).module()
        for parameter in self.tail.parameters():
            parameter.requires_grad_(False)
        with torch.no_grad():
            self.values = [head(*sample)[0].float() for sample in samples]
            self.outputs = [tuple(self.tail(value)) for value in self.values]
        held_out = max(1, round(options.validation * len(samples)))
        self.num_training = len(samples) - held_out
        seen = torch.cat([v.reshape(-1)[:: max(1, v.numel() // 4096)] for v in self.values[: self.num_training]])
        if not torch.isfinite(seen).all() or not float(seen.std()) > 0:
            raise EcotoneError(
                f"bottleneck at {spec.position}: the samples give no finite, varying values there; give real ones"
            )
        floor = min(float(value.min()) for value in self.values)
        self.spec = replace(spec, is_nonnegative=floor >= 0, scale=float(seen.std()))
        self.is_fast_bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def maps(self, chosen: Sequence[int]) -> Tensor:
        """The frontiers of these samples, over the scale, as one batch (N, C, H, W)."""
        return self._as_map(torch.cat([self.values[i] for i in chosen]) / self.spec.scale)

    def _as_map(self, values: Tensor) -> Tensor:
        return values.transpose(1, 2).unsqueeze(2) if self.spec.is_sequence else values

    def back(self, maps: Tensor) -> list[Tensor]:
        """A batch of maps as frontiers, sample by sample."""
        shape = self.values[0].shape
        high, wide = (1, shape[-2]) if self.spec.is_sequence else (shape[-2], shape[-1])
        maps = maps[:, :, :high, :wide] * self.spec.scale
        if self.spec.is_sequence:
            maps = maps[:, :, 0].transpose(1, 2)
        return list(torch.split(maps, shape[0]))

    def truly(self, maps: Tensor, chosen: Sequence[int]) -> Tensor:
        """What a decision of these samples suffers, through the rest of the model."""
        return torch.stack([self._suffers(v, i) for v, i in zip(self.back(maps), chosen, strict=True)]).mean()

    def _suffers(self, value: Tensor, index: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_fast_bf16):
            made = self.tail(value)
        if self.labels is not None:
            classes = made[0].movedim(class_dim(made[0]), -1).float()
            return functional.cross_entropy(classes.reshape(-1, classes.shape[-1]), self.labels[index].reshape(-1).long())
        losses = [
            _divergence(a.float(), b.float())
            for a, b in zip(made, self.outputs[index], strict=True)
            if b.is_floating_point()
        ]
        return torch.stack(losses).sum()

    def information(self) -> Tensor:
        """A, [C, C]: half of d' A d summed over positions is about what a decision of one sample suffers from errors d."""
        total = torch.zeros(self.spec.channels, self.spec.channels)
        count = min(FISHER_SAMPLES, self.num_training)
        for i in range(count):
            value = self.values[i].clone().requires_grad_()
            for output in (o for o in self.tail(value) if o.is_floating_point()):
                (gradient,) = torch.autograd.grad(_drawn(output), value, retain_graph=True)
                g = self._as_map(gradient).movedim(1, 0).reshape(self.spec.channels, -1)
                total += g @ g.T / (g.shape[1] * _decisions(output))
        return total * self.spec.scale**2 / count

    def corrected(self, information: Tensor, made: Tensor, maps: Tensor, chosen: Sequence[int]) -> Tensor:
        """A, times what these errors truly cost over what it says of them: they are not small, nor alone at a position."""
        said = float(about(made - maps, information)) / len(chosen)
        with torch.no_grad():
            true = float(self.truly(made, chosen))
        return information * max(0.5, min(2.0, true / max(said, 1e-9)))


def class_dim(output: Tensor) -> int:
    """The dimension of the classes: 1 of four or more, else the last."""
    return 1 if output.dim() >= 4 else output.dim() - 1


def _divergence(made: Tensor, wanted: Tensor) -> Tensor:
    """Of two outputs: Kullback-Leibler per decision where there are classes, else squared error over the mean square."""
    if wanted.dim() and wanted.shape[class_dim(wanted)] > 1:
        classes = class_dim(wanted)
        mine, theirs = made.log_softmax(classes), wanted.log_softmax(classes)
        apart: Tensor = functional.kl_div(mine, theirs, log_target=True, reduction="sum")
        return apart * wanted.shape[classes] / wanted.numel()
    return (made - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)


def _decisions(output: Tensor) -> int:
    return output.numel() // max(1, output.shape[class_dim(output)] if output.dim() else 1)


def _drawn(output: Tensor) -> Tensor:
    """A sum whose gradient, squared, is on average the curvature of what _divergence says, times its decisions."""
    if _decisions(output) < output.numel():
        logs = output.movedim(class_dim(output), -1).float().log_softmax(-1).reshape(-1, output.shape[class_dim(output)])
        return logs.gather(1, torch.multinomial(logs.detach().exp(), 1)).sum()
    scale = (2 / output.detach().square().mean().clamp_min(1e-12)).sqrt()
    return (scale * torch.randn(output.shape) * output).sum()


class _Density(nn.Module):
    """Per latent a mixture of logistics: how many bits an integer, or a noisy value, takes."""

    def __init__(self, latents: int, kernels: int = 3):
        super().__init__()
        self.share = nn.Parameter(torch.zeros(latents, kernels))
        self.middle = nn.Parameter(torch.randn(latents, kernels))
        self.width = nn.Parameter(torch.full((latents, kernels), math.log(SPREAD / 2)))

    def forward(self, y: Tensor) -> Tensor:
        """Bits of all of (N, M, h, w)."""
        shape = (1, -1, 1, 1, self.share.shape[1])
        apart, sharp = y.unsqueeze(-1) - self.middle.view(shape), torch.exp(-self.width).view(shape)
        mass = torch.sigmoid((apart + 0.5) * sharp) - torch.sigmoid((apart - 0.5) * sharp)
        return -torch.log2((mass * self.share.softmax(-1).view(shape)).sum(-1).clamp_min(2.0**-20)).sum()


def train(work: Work, progress: Progress | None) -> Parameters:
    """The weights, rounded to float16, for frontiers over the spec's scale; the gain of the latents is put into them."""
    spec, options = work.spec, work.options
    weights = {name: nn.Parameter(_start(name, shape)) for name, shape in spec.shapes().items()}
    gain, density = nn.Parameter(torch.zeros(spec.latents)), _Density(spec.latents)
    with torch.no_grad():
        first = down(work.maps(range(min(options.batch, work.num_training))), weights, spec)
        gain.copy_(torch.log(SPREAD / first.std(dim=(0, 2, 3)).clamp_min(1e-6)))
    parameters = [*weights.values(), gain, *density.parameters()]
    information, a_pass = work.information(), -(-work.num_training // options.batch)
    phases = [
        (options.epochs * a_pass, options.learning_rate, False),
        (options.final_epochs * a_pass, FINAL * options.learning_rate, True),
    ]
    total = sum(steps for steps, _, _ in phases)
    for steps, rate, is_final in phases:
        optimiser = torch.optim.Adam(parameters, rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 1), pct_start=0.1)
        for step, chosen in enumerate(_batches(work, steps)):
            maps = work.maps(chosen)
            y = down(maps, weights, spec) * gain.exp().view(1, -1, 1, 1)
            bits = density(y + torch.rand_like(y) - 0.5) / maps.numel() if spec.coding == PRIOR else torch.zeros(())
            made = up(_rounded(y, spec) * (-gain).exp().view(1, -1, 1, 1), weights, replace(spec, is_nonnegative=False))
            made = _never_dead(made) if spec.is_nonnegative else made
            made = made[..., : maps.shape[-2], : maps.shape[-1]]
            if not is_final and step % a_pass == 0 and step:
                information = work.corrected(information, made.detach(), maps, chosen)
            suffered = work.truly(made, chosen) if is_final else about(made - maps, information) / len(chosen)
            loss = suffered + options.reconstruction * functional.smooth_l1_loss(made, maps) + options.price * bits
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            if progress:
                done = step + 1 + (phases[0][0] if is_final else 0)
                progress(done, total, f"suffers {float(suffered.detach()):.3f}, {float(bits.detach()):.3f} bits an element")
    weights["down.weight"].data *= gain.detach().exp().view(-1, 1, 1, 1)
    weights["down.bias"].data *= gain.detach().exp()
    for name in {"up.weight", "skip.weight"} & set(weights):
        weights[name].data *= (-gain.detach()).exp().view(1, -1, 1, 1)
    return {name: weight.detach().to(torch.float16).float() for name, weight in weights.items()}


def about(error: Tensor, information: Tensor) -> Tensor:
    """Half of d' A d over all positions of (N, C, H, W)."""
    return 0.5 * (error * torch.einsum("cd,ndhw->nchw", information, error)).sum()


def _start(name: str, shape: Sequence[int]) -> Tensor:
    tensor = torch.zeros(shape)
    return tensor if name.endswith("bias") else nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))


def _batches(work: Work, steps: int) -> Iterator[list[int]]:
    """Samples in a new random order each time all were seen."""
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(work.num_training).tolist()
        chosen, order = order[: work.options.batch], order[work.options.batch :]
        yield chosen


def _never_dead(x: Tensor) -> Tensor:
    """ReLU, but for a tenth of the gradient where it cuts off: else a channel that starts below zero stays there."""
    below: Tensor = 0.1 * x.clamp(max=0)
    return functional.relu(x) + (below - below.detach())


def _rounded(y: Tensor, spec: Spec) -> Tensor:
    """Latents as the receiver will see them, the gradient of the rounding passed straight through."""
    if spec.coding == PRIOR:
        return y + (y.round() - y).detach()
    levels = 2 ** codec.info(spec.coding).bits - 1
    step = (y.detach().amax((1, 2, 3), keepdim=True) - y.detach().amin((1, 2, 3), keepdim=True)).clamp_min(1e-9) / levels
    rounded: Tensor = (y / step).round() * step
    return y + (rounded - y).detach()
