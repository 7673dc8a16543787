"""Samples: a sized collection of flat inputs that can be gone through more than once, and its content hash.

A list, or something that reads files anew each time it is gone through: a calibration set need not fit into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence, Sized
from itertools import islice

import torch

from ecotone.model import Captured, ModelError
from ecotone.units import EcotoneError

__all__ = ["FirstOf", "Samples", "checked", "contents_hash", "require_sized"]

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


def require_sized(samples: object) -> None:
    """Raises EcotoneError for what can be gone through only once, such as a generator."""
    if not isinstance(samples, Sized) or not isinstance(samples, Iterable):
        kind = type(samples).__name__
        raise EcotoneError(f"samples: are {kind}; give a list, or a collection with a length that reads them anew each time")


def checked(captured: Captured, samples: Samples, names: Sequence[str] = ()) -> Iterator[tuple[torch.Tensor, ...]]:
    """The samples, each held against the model's inputs; raises EcotoneError that says which one does not fit and how."""
    for index, sample in enumerate(samples):
        try:
            args, kwargs = captured.unflatten_inputs(tuple(sample))
            yield captured.flatten_inputs(args, kwargs)
        except (ModelError, TypeError) as error:
            where = f"sample {index}" + (f" ({names[index]})" if names else "")
            raise EcotoneError(f"{where}: {error}") from None


def contents_hash(samples: Iterable[Sequence[torch.Tensor]]) -> str:
    """Hex sha256 of dtypes, shapes and values, in order."""
    contents = hashlib.sha256()
    for tensor in (t for sample in samples for t in sample):
        contents.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        contents.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return contents.hexdigest()
