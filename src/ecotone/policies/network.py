"""Small networks of trained policies, and the file that holds one: safetensors, with what it was trained for in its header.

A file is read with suspicion: bounded size, known names, float tensors that are finite and whose shapes fit one another, and
a header that is a checked document (see schema.py). Only torch and safetensors are needed to use one.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ecotone import schema
from ecotone.units import EcotoneError

__all__ = ["LARGEST_BYTES", "mlp", "mlp_of", "read_file", "tensors_of", "write_file"]

LARGEST_BYTES = 8_000_000
MOST_LAYERS, WIDEST = 8, 4096
_HEADER = "ecotone"
T = TypeVar("T")


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers from sizes[0] inputs to sizes[-1] outputs, ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def tensors_of(network: nn.Sequential) -> dict[str, Tensor]:
    """Weights of an `mlp` by the names of the file: weight_0, bias_0, ..."""
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    found = {}
    for i, layer in enumerate(linear):
        found[f"weight_{i}"], found[f"bias_{i}"] = layer.weight.detach(), layer.bias.detach()
    return found


def mlp_of(tensors: Mapping[str, Tensor], inputs: int, outputs: int, where: str) -> nn.Sequential:
    """The `mlp` of a file's tensors, in evaluation mode; raises EcotoneError where they are none of that shape."""
    count = len(tensors) // 2
    if set(tensors) != {f"{kind}_{i}" for kind in ("weight", "bias") for i in range(count)} or not 1 <= count <= MOST_LAYERS:
        names = ", ".join(sorted(tensors)[:4])[:80]
        raise EcotoneError(f"{where}: holds {names}, ...: not the layers of a policy; train it again")
    sizes = [inputs, *(len(tensors[f"bias_{i}"]) if tensors[f"bias_{i}"].ndim == 1 else 0 for i in range(count))]
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        if not 0 < b <= WIDEST or tuple(tensors[f"weight_{i}"].shape) != (b, a):
            shape = tuple(tensors[f"weight_{i}"].shape)
            raise EcotoneError(f"{where}: layer {i} has weights {shape}, expected ({b}, {a}); train it again")
    if sizes[-1] != outputs:
        raise EcotoneError(f"{where}: answers {sizes[-1]} numbers, its actions are {outputs}; train it again")
    network = mlp(sizes)
    with torch.no_grad():
        for i, layer in enumerate(layer for layer in network if isinstance(layer, nn.Linear)):
            layer.weight.copy_(tensors[f"weight_{i}"])
            layer.bias.copy_(tensors[f"bias_{i}"])
    return network.eval().requires_grad_(False)


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    about: object,
    kind: str,
    version: int,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write tensors as `dtype` with `about` (a dataclass) in the header, whole or not at all; raises EcotoneError."""
    small = {name: value.detach().to(dtype).contiguous() for name, value in tensors.items()}
    schema.write_aside(path, save(small, {_HEADER: schema.dump_json(about, kind, version)}))


def read_file(path: str | os.PathLike[str], cls: type[T], kind: str, version: int) -> tuple[T, dict[str, Tensor]]:
    """What write_file wrote: (about, float32 tensors); raises EcotoneError or SchemaError for anything else."""
    where = f"policy {path}"
    try:
        size = Path(path).stat().st_size
        data = Path(path).read_bytes() if size <= LARGEST_BYTES else b""
    except OSError as error:
        raise EcotoneError(f"{where}: {error.strerror or error}; give the file that `ecotone policy train` wrote") from None
    if size > LARGEST_BYTES:
        raise EcotoneError(f"{where}: {size} bytes, a policy has at most {LARGEST_BYTES}; is it a model's weights?")
    header = _header(data, where)
    about = schema.load_json(cls, header, kind, version, where)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise EcotoneError(f"{where}: damaged: {error}; copy or train it again") from None
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise EcotoneError(f"{where}: tensor {name[:40]} is {value.dtype} or not finite; train it again")
    return about, {name: value.float() for name, value in tensors.items()}


def _header(data: bytes, where: str) -> str:
    """The document in the file's header: 8 bytes of length, then JSON with "__metadata__"."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise EcotoneError(f"{where}: is no safetensors file, or was cut; give the file that `ecotone policy train` wrote")
    try:
        document = json.loads(data[8 : 8 + length])
        text = document["__metadata__"][_HEADER]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise EcotoneError(f"{where}: its header says nothing of a policy; give what `ecotone policy train` wrote") from None
    return str(text)
