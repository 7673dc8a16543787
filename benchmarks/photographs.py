"""CIFAR-10 photographs for benchmarks, from ../shared/data or a folder of the user's: one by one, or 49 of them as a frame.

The last HELD_OUT of the training file were used to train nothing that ships; those of the test file for nothing at all.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["HELD_OUT", "SHARED", "SIDE", "TEST", "TRAIN", "files_in", "frames_of", "mosaics", "offer_folder", "photographs"]

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TRAIN, TEST = "cifar10-train.parquet", "cifar10-test.parquet"
SIDE, HELD_OUT = 7, 1960


def offer_folder(parser: argparse.ArgumentParser) -> None:
    """--data."""
    parser.add_argument("--data", type=Path, default=SHARED, help=f"folder of {TRAIN} and {TEST}")


def files_in(folder: Path) -> tuple[Path, Path] | None:
    """The training and the test file; None where one is missing."""
    found = folder / TRAIN, folder / TEST
    return found if all(path.is_file() for path in found) else None


def photographs(path: Path, count: int = 0) -> tuple[Tensor, Tensor]:
    """The first `count` photographs (the last, if negative; 0: all): uint8 [n, 3, 32, 32], and labels [n].

    Pictures are bytes of the column "image", or lie in it as a structure with "bytes".
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    table = table.slice(0, count) if count > 0 else table.slice(max(0, table.num_rows + count) if count else 0)
    files = [data["bytes"] if isinstance(data, dict) else data for data in table["image"].to_pylist()]
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
    labels = torch.tensor(table["label"].to_pylist(), dtype=torch.int64)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), labels


def mosaics(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each 49 photographs as a frame, in their order, the rest left out: [n, 3, 224, 224] in [0, 1], labels [n, 7, 7]."""
    whole = len(pixels) // SIDE**2
    grid = pixels[: whole * SIDE**2].reshape(whole, SIDE, SIDE, 3, 32, 32).permute(0, 3, 1, 4, 2, 5)
    frames = grid.reshape(whole, 3, SIDE * 32, SIDE * 32).float() / 255
    return frames, labels[: whole * SIDE**2].reshape(whole, SIDE, SIDE)


def frames_of(pixels: Tensor, labels: Tensor) -> list[tuple[tuple[Tensor], Tensor]]:
    """The same one by one, as requests: ([1, 3, 224, 224],) and labels [1, 7, 7]."""
    frames, truth = mosaics(pixels, labels)
    return [((frame,), label) for frame, label in zip(frames.split(1), truth.split(1), strict=True)]
