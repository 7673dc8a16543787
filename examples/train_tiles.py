"""Train the demo's network: 224x224 frames of 7x7 CIFAR-10 photographs, one label per tile.

    python examples/train_tiles.py --data cifar10-train.parquet --out tilenet.safetensors

The file holds columns `image` (JPEG or PNG bytes) and `label` (0..9). The last 1,960 photographs are held out. Without
--data the tiles of the frames shipped with Ecotone stand in: enough to see it run, not to make good weights.
"""

import argparse
import io
import time

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from ecotone.cli.demo_model import TileNet, frames, tile_accuracy

SIDE, HELD_OUT = 7, 40 * 49  # tiles along a frame; photographs kept for validation: 40 frames


def photographs(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Photographs [n, 3, 32, 32] uint8 and labels [n] of a parquet file, or of the shipped frames when path is empty."""
    if not path:
        pixels, labels = frames()
        tiles = pixels.reshape(-1, 3, SIDE, 32, SIDE, 32).permute(0, 2, 4, 1, 3, 5)
        return (tiles.reshape(-1, 3, 32, 32) * 255).round().byte(), labels.reshape(-1)
    import pyarrow.parquet  # only this script needs it

    table = pyarrow.parquet.read_table(path)
    images = [np.asarray(Image.open(io.BytesIO(i)).convert("RGB")) for i in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(table["label"].to_numpy().copy()).long()


def mosaic(tiles: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """49 n tiles -> n frames [n, 3, 224, 224] in [0, 1] and their labels [n, 7, 7]."""
    rows = tiles.reshape(-1, SIDE, SIDE, 3, 32, 32).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE * 32, SIDE * 32)
    return rows.float().div(255).contiguous(memory_format=torch.channels_last), labels.reshape(-1, SIDE, SIDE)


def shifted(tiles: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Every tile moved by up to 4 pixels (reflected at its border) and mirrored half of the time."""
    padded = torch.nn.functional.pad(tiles.float(), (4, 4, 4, 4), mode="reflect").byte()
    down, right = torch.randint(0, 9, (2, len(tiles), 1), generator=random) + torch.arange(32)
    right = torch.where(torch.rand(len(tiles), 1, generator=random) < 0.5, right, right.flip(1))
    item = torch.arange(len(tiles))[:, None, None]
    return padded[item, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    random = torch.Generator().manual_seed(args.seed)
    tiles, labels = photographs(args.data)
    keep = max(len(tiles) - HELD_OUT, args.batch * SIDE * SIDE)
    check = mosaic(tiles[-HELD_OUT:], labels[-HELD_OUT:])
    net = TileNet().to(memory_format=torch.channels_last)
    steps = args.steps or args.epochs * (keep // (args.batch * SIDE * SIDE))
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.15, total_steps=steps, pct_start=0.15)
    order, began, report = torch.empty(0, dtype=torch.long), time.monotonic(), max(1, min(500, steps // 3))
    for step in range(1, steps + 1):
        order = order if len(order) >= args.batch * SIDE * SIDE else torch.randperm(keep, generator=random)
        chosen, order = order[: args.batch * SIDE * SIDE], order[args.batch * SIDE * SIDE :]
        batch, truth = mosaic(shifted(tiles[chosen], random), labels[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            logits = net.train()(batch)
        loss = torch.nn.functional.cross_entropy(logits.float(), truth, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % report == 0 or step == steps:
            accuracy = tile_accuracy(net.eval(), *check)
            spent = time.monotonic() - began
            print(f"step {step}/{steps} loss {loss.item():.3f} held-out accuracy {accuracy:.4f} {spent:.0f} s", flush=True)
            half = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
            save_file({k: v.contiguous() for k, v in half.items()}, args.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train TileNet.")
    parser.add_argument("--data", default="", help="parquet file of CIFAR-10 training photographs")
    parser.add_argument("--out", default="tilenet.safetensors")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps, whatever --epochs says")
    parser.add_argument("--batch", type=int, default=4, help="frames in a batch")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
