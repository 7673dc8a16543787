"""Train the early exits of the demo's network, its own weights left as they are, and calibrate them.

    python examples/train_tile_exits.py --data cifar10-train.parquet --out tilenet.exits.safetensors

The 1,960 photographs that train_tiles.py holds out choose thresholds, and nothing learns from them. Without --data the
frames shipped with Ecotone stand in: enough to see it run.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from cifar_tiles import SIDE, mosaic, photographs
from train_tiles import HELD_OUT, shifted

from ecotone.cli.demo_model import tilenet
from ecotone.model import capture
from ecotone.model.exit_file import write_exits
from ecotone.model.exit_heads import make_head
from ecotone.model.exit_training import Sample, TrainOptions, train_exits
from ecotone.profiling.calibration import best_rules, calibrate, judge

FRAMES = 4  # in a batch
HEADS = {2: 0.05, 6: 0.02, 8: 0.01}  # position: at most this share of the network's FLOP


def samples(
    tiles: torch.Tensor, labels: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> Iterator[Sample]:
    """Frames of photographs in random order, some at a time."""
    for chosen in torch.randperm(len(tiles) // SIDE**2 * SIDE**2).split(FRAMES * SIDE**2):
        frame, truth = mosaic(change(tiles[chosen]), labels[chosen])
        yield (frame.contiguous(),), truth


def train(data: str, out: Path, epochs: int, bf16: bool) -> None:
    torch.manual_seed(0)
    tiles, labels = photographs(data)
    held, keep = tiles[-HELD_OUT:], max(len(tiles) - HELD_OUT, FRAMES * SIDE**2)
    captured = capture(tilenet(), (torch.rand(2, 3, 224, 224),), name="TileNet", dynamic_batch=True)

    still = list(samples(held, labels[-HELD_OUT:]))
    moving = partial(samples, tiles[:keep], labels[:keep], shifted)
    heads = {position: make_head(captured.graph, position, share) for position, share in HEADS.items()}
    options = TrainOptions(epochs=epochs, batch=FRAMES, rate=5e-3, bf16=bf16)
    told = {
        "progress": lambda done, total, what: print(f"{done} of {total}: {what}", flush=True) if done % 500 == 0 else None
    }
    trained = train_exits(captured, moving, heads=heads, held_out=still, options=options, **told)
    trained, outcomes = best_rules(trained, still)
    print(", ".join(f"{name} {right:.4f}" for name, right in zip(outcomes.exits, outcomes.right.mean(0), strict=True)))
    print(f"the end {outcomes.final.mean():.4f}, all on held-out photographs")
    for policy in calibrate(outcomes, trained.graph, budgets=(0.5, 1.0)) if data else ():
        saved = judge(outcomes, trained.graph, policy.exits, policy.thresholds).saved
        print(f"{policy.name}: {saved:.3f} of the FLOP saved, {policy.loss_points:.2f} points lost")
    write_exits(out, trained, data=outcomes.tensors())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the exits of TileNet.")
    parser.add_argument("--data", default="", help="parquet file of CIFAR-10 training photographs")
    parser.add_argument("--out", type=Path, default=Path("tilenet.exits.safetensors"))
    parser.add_argument("--epochs", type=int, default=20, help="passes over the photographs, 245 batches each")
    parser.add_argument(
        "--bf16", action="store_true", help="products in bfloat16, quick where the processor has units for it"
    )
    train(**vars(parser.parse_args()))
