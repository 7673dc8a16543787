"""Learned codecs with random weights, for tests that need one and no training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ecotone.codec import LearnedCodec, read_learned
from ecotone.codec.learned import PRIOR, Spec, write_learned
from ecotone.codec.rans import Tables

SYMBOLS = 24


def random_spec(**changes: Any) -> Spec:
    values: dict[str, Any] = {
        "name": "random", "position": 3, "head": "0" * 64, "channels": 6, "latents": 5, "stride": 2, "kernel": 2,
        "hidden": 7,
    }  # fmt: skip
    return Spec(**(values | changes))


def random_file(spec: Spec, seed: int = 0) -> bytes:
    """Weights of a sensible size; tables that prefer integers near 0."""
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    weights = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in spec.shapes().items()}
    weights["down.weight"] *= 4
    if spec.coding != PRIOR:
        return write_learned(spec, weights, None, None)
    widths = random.integers(3, SYMBOLS + 1, spec.latents)
    table = np.where(np.arange(SYMBOLS) < widths[:, None], 40 - np.abs(np.arange(SYMBOLS) - widths[:, None] // 2), 0)
    return write_learned(spec, weights, Tables.of_weights(table).frequency, -(widths // 2))


def random_codec(seed: int = 0, **changes: Any) -> LearnedCodec:
    return read_learned(random_file(random_spec(**changes), seed))
