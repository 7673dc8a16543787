"""Train the demo's network: 224x224 frames of 7x7 CIFAR-10 photographs, one label per tile.

    python examples/train_tiles.py --data cifar10-train.parquet --out tilenet.safetensors

The last 1,960 photographs are held out. Without --data the frames shipped with Ecotone stand in: enough to see it run.
"""

import argparse

import torch
from cifar_tiles import SIDE, mosaic, photographs
from safetensors.torch import load_file, save_file

from ecotone.cli.demo_model import TileNet, tile_accuracy

HELD_OUT = 40 * SIDE**2  # photographs kept for validation: 40 frames


def shifted(tiles: torch.Tensor) -> torch.Tensor:
    """Every tile moved by up to 4 pixels (reflected at its border) and mirrored half of the time."""
    padded = torch.nn.functional.pad(tiles.float(), (4, 4, 4, 4), mode="reflect").byte()
    down, right = torch.randint(0, 9, (2, len(tiles), 1)) + torch.arange(32)
    right = torch.where(torch.rand(len(tiles), 1) < 0.5, right, right.flip(1))
    return padded[torch.arange(len(tiles))[:, None, None], :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def rounded(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
    """While training, noise as large as rounding to 4 bits, so that the maps may later travel in few bits."""
    step = output.detach().amax((1, 2, 3), keepdim=True) / 15
    return output + (torch.rand_like(output) - 0.5) * step if module.training else output


def train(data: str, out: str, steps: int, start: str, peak: float, batch: int = 4 * SIDE**2) -> None:
    torch.manual_seed(0)
    tiles, labels = photographs(data)
    keep, order = max(len(tiles) - HELD_OUT, batch), torch.empty(0, dtype=torch.long)
    net = TileNet().to(memory_format=torch.channels_last)
    if start:
        net.load_state_dict(load_file(start))  # halves become float32 as they are copied
    for name in ("start", "narrow", "middle.0", "middle.1", "middle.2", "waist", "end.0"):
        net.get_submodule(name).register_forward_hook(rounded)
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps, pct_start=0.15)
    for step in range(1, steps + 1):
        order = order if len(order) >= batch else torch.randperm(keep)
        chosen, order = order[:batch], order[batch:]
        frame, truth = mosaic(shifted(tiles[chosen]), labels[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net.train()(frame).float(), truth, label_smoothing=0.1)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 1000 == 0 or step == steps:
            accuracy = tile_accuracy(net.eval(), *mosaic(tiles[-HELD_OUT:], labels[-HELD_OUT:]))
            print(f"step {step} of {steps}: loss {loss.item():.3f}, held-out accuracy {accuracy:.4f}", flush=True)
    small = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in net.state_dict().items()}
    save_file(small, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train TileNet.")
    parser.add_argument("--data", default="", help="parquet file of CIFAR-10 training photographs")
    parser.add_argument("--out", default="tilenet.safetensors")
    parser.add_argument("--steps", type=int, default=14_700, help="batches of 4 frames; 245 are one pass over the data")
    parser.add_argument("--start", default="", help="go on from these weights")
    parser.add_argument("--peak", type=float, default=0.15, help="highest learning rate")
    train(**vars(parser.parse_args()))
