"""Where a node gets a model's weights from: its own disk, a seed, or the driver, tensor by tensor, of its layers alone.

A ModelRef names the model on the wire. Its fingerprint covers configuration, names, types, shapes and a sample of every
tensor's bytes, so that two folders of one name are told apart without reading them whole. What a node fetched is kept as
safetensors under its folder by fingerprint, and checked by hash when it came.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ecotone import schema
from ecotone.llm.config import DecoderConfig, ModelError
from ecotone.llm.recipes import Recipe, span_recipes
from ecotone.llm.weights import Checkpoint, RandomWeights, WeightSource
from ecotone.llmplan import Span

__all__ = ["DTYPES", "Fetch", "FetchedWeights", "ModelRef", "all_recipes", "describe", "open_source", "recipe_key"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Fetch = Callable[[Recipe], torch.Tensor]
_SAMPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """`name`: a directory or hub id, as the driver knows it. `seed`: random weights of `dtype` instead of any file."""

    name: str
    fingerprint: str
    config: DecoderConfig
    seed: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        schema.check("model", [] if self.dtype in DTYPES else [f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}"])


def describe(source: Checkpoint | RandomWeights, name: str = "") -> ModelRef:
    """The reference of `source`; raises ModelError where a tensor is missing or damaged."""
    config = source.config
    digest = hashlib.blake2b(json.dumps(schema.write(config), sort_keys=True).encode(), digest_size=20)
    if isinstance(source, RandomWeights):
        dtype = next(key for key, value in DTYPES.items() if value == source.dtype)
        digest.update(f"random {source.seed} {dtype}".encode())
        return ModelRef(name=name or "random", fingerprint=digest.hexdigest(), config=config, seed=source.seed, dtype=dtype)
    for tensor, file in sorted(source.files.items()):
        _sample(digest, tensor, file)
    return ModelRef(name=name or str(source.folder), fingerprint=digest.hexdigest(), config=config)


def _sample(digest: hashlib.blake2b, tensor: str, file: Path) -> None:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            piece = opened.get_slice(tensor)
            shape = piece.get_shape()
            digest.update(f"{tensor} {piece.get_dtype()} {shape}".encode())
            if shape and min(shape):
                for index in (0, shape[0] - 1):
                    values = piece[index : index + 1].flatten()[:_SAMPLE].contiguous()
                    digest.update(values.view(torch.uint8).numpy().data)
    except (SafetensorError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise ModelError(f"{file}: {tensor} cannot be read ({reason}); download it again") from None


def recipe_key(recipe: Recipe) -> str:
    """Names one canonical tensor of a model, on the wire and on disk."""
    return hashlib.blake2b(f"{recipe.name} {recipe.sources}".encode(), digest_size=16).hexdigest()


def all_recipes(config: DecoderConfig) -> dict[str, Recipe]:
    """Every canonical tensor of a model by its key."""
    before, layers, after = span_recipes(config, Span(start=0, stop=config.num_layers, embedding=True, head=True))
    return {recipe_key(r): r for r in [*before, *(r for layer in layers for r in layer), *after]}


def open_source(ref: ModelRef, folder: Path, fetch: Fetch) -> WeightSource:
    """The weights of `ref` here: from its seed, from a directory of that name with this very content, else by `fetch`.

    `folder` keeps what was fetched.
    """
    if ref.seed is not None:
        return RandomWeights(config=ref.config, seed=ref.seed, dtype=DTYPES[ref.dtype])
    with contextlib.suppress(ModelError):  # not here, or another one: it is fetched then
        if Path(ref.name).is_dir():
            found = Checkpoint.open(Path(ref.name))
            if describe(found).fingerprint == ref.fingerprint:
                return found
    return FetchedWeights(config=ref.config, folder=folder / ref.fingerprint, fetch=fetch)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedWeights:
    """A WeightSource that asks for each tensor once and keeps it under `folder`."""

    config: DecoderConfig
    folder: Path
    fetch: Fetch = field(repr=False)

    def read(self, recipe: Recipe) -> torch.Tensor:
        path = self.folder / f"{recipe_key(recipe)}.safetensors"
        kept = _read_kept(path, recipe)
        if kept is not None:
            return kept
        tensor = self.fetch(recipe)
        if tuple(tensor.shape) != recipe.shape:
            raise ModelError(f"{recipe.sources[0]} came with shape {tuple(tensor.shape)}, {recipe.shape} expected")
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.part")
        save_file({"tensor": tensor.contiguous()}, aside)
        os.replace(aside, path)
        return tensor


def _read_kept(path: Path, recipe: Recipe) -> torch.Tensor | None:
    """What is kept at `path`; None where nothing is, or what is there is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            tensor: torch.Tensor = opened.get_tensor("tensor")
    except (SafetensorError, OSError, ValueError):
        return None
    return tensor if tuple(tensor.shape) == recipe.shape else None
