"""Samples: a sized collection of flat inputs that can be gone through more than once, and its content hash.

A list, or something that reads files anew each time it is gone through: a calibration set need not fit into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice

import torch

__all__ = ["FirstOf", "Samples", "contents_hash"]

Samples = Collection[Sequence[torch.Tensor]]


class FirstOf:
    """The first `count` of `samples`."""

    def __init__(self, samples: Samples, count: int) -> None:
        self._samples, self._count = samples, min(count, len(samples))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence[torch.Tensor]]:
        return islice(iter(self._samples), self._count)

    def __contains__(self, sample: object) -> bool:
        return any(sample is one for one in self)


def contents_hash(samples: Iterable[Sequence[torch.Tensor]]) -> str:
    """Hex sha256 of dtypes, shapes and values, in order."""
    contents = hashlib.sha256()
    for tensor in (t for sample in samples for t in sample):
        contents.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        contents.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return contents.hexdigest()
