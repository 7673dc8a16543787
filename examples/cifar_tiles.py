"""Photographs of CIFAR-10 as tensors, and mosaics of 7x7 of them: what the other tile scripts share.

A data file is parquet with columns `image` (JPEG or PNG bytes) and `label` (0..9), in any order.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ecotone.cli.demo_model import frames

SIDE = 7  # tiles along a frame


def photographs(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Photographs [n, 3, 32, 32] uint8 and labels [n] of a parquet file, or of the shipped frames when path is empty."""
    if not path:
        print("no --data: training on the shipped frames, enough to see it run but not to make good weights")
        pixels, labels = frames()
        tiles = pixels.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
        return (tiles * 255).round().byte(), labels.flatten()
    if not Path(path).is_file():
        raise SystemExit(f"{path} is missing; give --data a parquet file of CIFAR-10, or leave it out")
    import pyarrow.parquet  # needed by nothing else here

    table = pyarrow.parquet.read_table(path)
    images = [np.asarray(Image.open(io.BytesIO(i)).convert("RGB")) for i in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(table["label"].to_pylist())


def mosaic(tiles: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """49 n tiles -> n frames [n, 3, 224, 224] in [0, 1], channels last, and their labels [n, 7, 7]."""
    rows = tiles.reshape(-1, SIDE, SIDE, 3, 32, 32).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE * 32, SIDE * 32)
    return rows.contiguous(memory_format=torch.channels_last) / 255, labels.reshape(-1, SIDE, SIDE)
