"""Trains AlexNet with five exits on CIFAR-10 and measures A(exit, cut, bits): how tables/branchy_alexnet.json was made.

    python -m benchmarks.branchy_training --train cifar10-train.parquet --test cifar10-test.parquet

About 40 minutes on one core; the weights are not kept, only the table. The loss is BranchyNet's weighted sum over exits, all
trained together from the start. Every frontier that crosses goes through Ecotone's own codecs, one range per item. Points of
all exits come from one pass over the same photographs, so losses are paired; their interval is normal, at 95 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.branchy_alexnet import CODECS, EXITS, TABLE, graph
from benchmarks.photographs import photographs
from ecotone.accuracy import NOWHERE, AccuracyTable, Cell, ExitPolicy
from ecotone.codec import decode, encode
from ecotone.schema import write_aside

MEAN, SPREAD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
EXIT_WEIGHTS = (0.6, 0.6, 0.6, 0.6, 1.0)
BATCH, PEAK_RATE, DECAY = 128, 0.05, 5e-4
TEST_BATCH = 250


def _convolution(inputs: int, outputs: int, kernel: int = 3, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def _head(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(features, 10))


class BranchyAlexNet(nn.Module):
    """[n, 3, 32, 32] pixels in [0, 1] -> logits of the five exits; blocks and heads as in branchy_alexnet.py."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                _convolution(3, 32, 5, pool=True),
                _convolution(32, 64, 5, pool=True),
                _convolution(64, 96),
                _convolution(96, 96),
                _convolution(96, 64, pool=True),
                nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(1024, 256), nn.ReLU()),
                nn.Sequential(nn.Dropout(0.5), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
            ]
        )
        self.heads = nn.ModuleList(
            [
                _head(_convolution(32, 32, pool=True), _convolution(32, 32, pool=True), features=512),
                _head(_convolution(64, 32, pool=True), features=512),
                _head(_convolution(96, 32, pool=True), features=512),
                _head(features=1024),
            ]
        )
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("spread", torch.tensor(SPREAD)[:, None, None])

    def forward(self, x: Tensor, start: int = 0) -> dict[str, Tensor]:
        """Logits of every exit behind block `start`, whose input x is; the end is called ""."""
        found, places = {}, {position: name for name, position in EXITS.items()}
        for i in range(start, len(self.blocks)):
            x = self.blocks[i]((x - self.mean) / self.spread if i == 0 else x)
            if i + 1 in places:
                found[places[i + 1]] = self.heads[list(EXITS).index(places[i + 1])](x)
        return {**found, "": x}

    def frontier(self, x: Tensor, position: int) -> Tensor:
        """What crosses before block `position`."""
        for i in range(position):
            x = self.blocks[i]((x - self.mean) / self.spread if i == 0 else x)
        return x


def _varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to 4 pixels and mirrored, alike for a whole batch of shifts but each picture mirrored on its own."""
    padded = nn.functional.pad(pictures.float() / 255, (4, 4, 4, 4), mode="reflect")
    dx, dy = torch.randint(9, (2,), generator=generator).tolist()
    shifted = padded[:, :, dy : dy + 32, dx : dx + 32]
    mirrored = torch.rand(len(shifted), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, shifted.flip(3), shifted)


def train(pictures: Tensor, labels: Tensor, epochs: int, seed: int) -> BranchyAlexNet:
    """SGD with Nesterov momentum, one cycle of the rate."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = BranchyAlexNet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), PEAK_RATE, momentum=0.9, weight_decay=DECAY, nesterov=True)
    steps = epochs * (len(pictures) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for epoch in range(epochs):
        began, right, order = time.perf_counter(), 0, torch.randperm(len(pictures), generator=generator)
        for part in order[: len(order) // BATCH * BATCH].split(BATCH):
            found = net.train()(_varied(pictures[part], generator).contiguous(memory_format=torch.channels_last))
            truth = labels[part]
            loss = sum(w * nn.functional.cross_entropy(x, truth) for w, x in zip(EXIT_WEIGHTS, found.values(), strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += int((found[""].argmax(1) == truth).sum())
        seconds = time.perf_counter() - began
        print(f"epoch {epoch}: {right / len(pictures):.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return net.eval()


@torch.inference_mode()
def decisions(net: BranchyAlexNet, pictures: Tensor, position: int, codec: str) -> dict[str, Tensor]:
    """Classes that every exit behind `position` names when the frontier there crosses in `codec` ("": as it is)."""
    found: dict[str, list[Tensor]] = {}
    for part in pictures.split(TEST_BATCH):
        x = net.frontier(part.float() / 255, position)
        if codec:
            x = decode(encode(x.contiguous(), codec), codec, tuple(x.shape), "float32")
        for name, logits in net(x, position).items():
            found.setdefault(name, []).append(logits.argmax(1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def measure(net: BranchyAlexNet, pictures: Tensor, labels: Tensor) -> AccuracyTable:
    """All cells; losses against the end of the network, nothing crossing."""
    plain = {name: found == labels for name, found in decisions(net, pictures, 0, "").items()}
    whole = plain[""]
    cells = [_cell(NOWHERE, "none", name, right, whole) for name, right in plain.items()]
    for position in range(graph().num_blocks):
        for bits, codec in CODECS.items():
            for name, found in decisions(net, pictures, position, codec).items():
                cells.append(_cell(position, codec, name, found == labels, whole))
            print(f"position {position}, {bits} bits", file=sys.stderr, flush=True)
    policies = [_policy(cell) for cell in cells if cell.position == NOWHERE and cell.policy]
    return AccuracyTable(
        graph_hash=graph().content_hash(), data_hash="cifar10-test", is_labelled=True,
        reference_points=100 * float(whole.float().mean()), cells=tuple(monotone(cells)), policies=tuple(policies),
    )  # fmt: skip


def _cell(position: int, codec: str, policy: str, right: Tensor, whole: Tensor) -> Cell:
    gap = (whole.float() - right.float()) * 100
    loss, half = float(gap.mean()), 1.96 * float(gap.std()) / len(gap) ** 0.5
    points = round(100 * float(right.float().mean()), 4)
    return Cell(
        position=position, codec=codec, policy=policy, num_decisions=len(gap), points=points,
        loss_points=round(loss, 4), low_points=round(loss - half, 4), high_points=round(loss + half, 4),
        fitted_points=max(0.0, round(loss, 4)),
    )  # fmt: skip


def _policy(cell: Cell) -> ExitPolicy:
    return ExitPolicy(
        name=cell.policy, exits=(cell.policy,), thresholds=(0.0,), shares=(1.0,), loss_points=cell.fitted_points,
        low_points=cell.low_points, high_points=cell.high_points, num_samples=cell.num_decisions,
    )  # fmt: skip


def monotone(cells: list[Cell]) -> list[Cell]:
    """`fitted_points` such that more bits never lose more, at each cut and exit; never below what the exit loses anyway."""
    floor = {cell.policy: cell.fitted_points for cell in cells if cell.position == NOWHERE}
    found = [cell for cell in cells if cell.position == NOWHERE]
    for key in sorted({(c.position, c.policy) for c in cells if c.position != NOWHERE}):
        ladder = {cell.codec: cell for cell in cells if (cell.position, cell.policy) == key}
        losses = [ladder[codec].loss_points for codec in CODECS.values()]
        blocks: list[list[float]] = []  # pool adjacent violators, falling with bits
        for value in losses:
            blocks.append([value, 1])
            while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
                (a, n), (b, m) = blocks[-2:]
                blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
        fitted = [value for value, count in blocks for _ in range(int(count))]
        for codec, value in zip(CODECS.values(), fitted, strict=True):
            found.append(replace(ladder[codec], fitted_points=round(max(value, floor[key[1]], 0.0), 4)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = train(*photographs(options.train), options.epochs, options.seed)
    table = measure(net, *photographs(options.test))
    write_aside(TABLE, table.to_json() + "\n")
    for cell in table.cells[: len(EXITS) + 1]:
        print(f"{cell.policy or 'end':8s} {cell.points:.2f} points")
    return 0


if __name__ == "__main__":
    sys.exit(main())
