"""Make the demo's frames: 7x7 mosaics of CIFAR-10 test photographs as lossless WebP, and their labels.

    python examples/make_frames.py --data cifar10-test.parquet --out src/ecotone/assets/frames

Photographs are taken in the order of the file, row by row; none of them was used in training.
"""

import argparse
import io
import json
from pathlib import Path

from PIL import Image

SIDE, TILE = 7, 32


def make(data: str, out: Path, count: int) -> None:
    import pyarrow.parquet  # only this script needs it

    table = pyarrow.parquet.read_table(data).slice(0, count * SIDE * SIDE)
    pictures = [Image.open(io.BytesIO(blob)).convert("RGB") for blob in table["image"].to_pylist()]
    classes, labels = table["label"].to_pylist(), {}
    out.mkdir(parents=True, exist_ok=True)
    for number in range(len(pictures) // SIDE**2):
        frame, first = Image.new("RGB", (SIDE * TILE, SIDE * TILE)), number * SIDE**2
        for tile in range(SIDE**2):
            frame.paste(pictures[first + tile], (tile % SIDE * TILE, tile // SIDE * TILE))
        name = f"frame-{number:02}.webp"
        frame.save(out / name, lossless=True, quality=100, method=6)
        labels[name] = [classes[first + SIDE * row : first + SIDE * (row + 1)] for row in range(SIDE)]
    rows = (f'"{name}": {json.dumps(grid)}' for name, grid in labels.items())
    (out / "labels.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the demo's frames.")
    parser.add_argument("--data", required=True, help="parquet file of CIFAR-10 test photographs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the frames")
    parser.add_argument("--count", type=int, default=40)
    args = parser.parse_args()
    make(args.data, args.out, args.count)
