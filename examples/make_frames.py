"""Make the demo's frames: 7x7 mosaics of CIFAR-10 test photographs as lossless WebP, and their labels.

    python examples/make_frames.py --data cifar10-test.parquet --out src/ecotone/assets/frames

Photographs are taken in the order of the file, row by row; none of them was used in training.
"""

import argparse
import json
from pathlib import Path

from cifar_tiles import SIDE, mosaic, photographs
from PIL import Image


def make(data: str, out: Path, count: int) -> None:
    tiles, labels = (part[: count * SIDE**2] for part in photographs(data))
    pixels, truth = mosaic(tiles, labels)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (frame, grid) in enumerate(zip(pixels, truth, strict=True)):
        name = f"frame-{number:02}.webp"
        picture = Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy())
        picture.save(out / name, lossless=True, quality=100, method=6)
        rows.append(f'"{name}": {json.dumps(grid.tolist())}')
    (out / "labels.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the demo's frames.")
    parser.add_argument(
        "--data", default="", help="parquet file of CIFAR-10 test photographs; empty: the shipped frames again"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the frames")
    parser.add_argument("--count", type=int, default=40)
    make(**vars(parser.parse_args()))
