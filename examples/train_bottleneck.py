"""Train a learned bottleneck for one cut of the demo's network: those in ecotone/assets were made by this script.

    python examples/train_bottleneck.py --data cifar10-train.parquet --cut 5 --out tilenet-5.bottleneck.safetensors

Frames are mosaics of the photographs that the network was trained on; the last 1,960, which neither has seen, are measured
on. Without --data the frames shipped with Ecotone stand in: enough to see it run.
"""

import argparse
import sys
from pathlib import Path

import torch
from cifar_tiles import SIDE, mosaic, photographs

from ecotone.cli.demo_model import example_inputs, tilenet
from ecotone.model import capture
from ecotone.profiling import BottleneckOptions, train_bottleneck

HELD_OUT = 40  # frames, the last ones: the network was not trained on them either


def train(data: str, out: Path, cut: int, frames: int, name: str, **options: object) -> None:
    torch.set_num_threads(1)
    tiles, labels = photographs(data)
    in_all = len(tiles) // SIDE**2
    held_out = min(HELD_OUT, in_all // 4)
    count = min(frames, in_all - held_out)
    chosen = torch.cat((torch.arange(count * SIDE**2), torch.arange(len(tiles) - held_out * SIDE**2, len(tiles))))
    pixels, _ = mosaic(tiles[chosen], labels[chosen])
    samples = [(frame[None].contiguous(),) for frame in pixels]
    settings = BottleneckOptions(validation=held_out / len(samples), **options)  # type: ignore[arg-type]

    def progress(done: int, total: int, what: str) -> None:
        if done % 100 == 0 or done == total:
            print(f"step {done} of {total}: {what}", file=sys.stderr, flush=True)

    captured = capture(tilenet(), example_inputs(), name="tilenet")
    made = train_bottleneck(captured, cut, samples, name=name, options=settings, progress=progress)
    out.write_bytes(made.codec.data)
    print(f"{made.codec.id}: {made.bytes_per_sample:.0f} bytes a frame, {made.disagreement:.1%} of decisions changed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a learned bottleneck of TileNet.")
    parser.add_argument("--data", default="", help="parquet file of CIFAR-10 training photographs")
    parser.add_argument("--out", type=Path, default=Path("tilenet.bottleneck.safetensors"))
    parser.add_argument("--cut", type=int, default=5)
    parser.add_argument("--frames", type=int, default=980, help="train on so many mosaics of 49 photographs")
    parser.add_argument("--name", default="", help="name inside the codec's id; default: tilenet-CUT")
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--kernel", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--coding", default="prior", help="or an int codec such as int8+zstd: MAHPPO's plain autoencoder")
    parser.add_argument("--price", type=float, default=0.5, help="more makes the codec smaller")
    parser.add_argument("--epochs", type=int, default=12, help="passes with the second order of the answer")
    parser.add_argument("--final-epochs", type=int, default=2, help="passes through the rest of the network")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
