"""Weights of a shard, read lazily: safetensors on disk, or random ones made from a seed. Nothing else is ever opened.

Only tensors of the asked span are read, through `safe_open`, straight from the file's pages. Pickle files are refused
with the way to convert them. File names in an index must be plain names beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ecotone.llm.config import DecoderConfig, ModelError
from ecotone.llm.families import load_config
from ecotone.llm.recipes import Recipe, span_recipes
from ecotone.llmplan import Span

__all__ = ["Checkpoint", "RandomWeights", "WeightSource", "content_key", "find_model", "read_all"]

PREFIXES = ("model.", "transformer.", "", "model.language_model.", "language_model.model.", "language_model.")
MAX_INDEX_BYTES = 64 << 20
CONVERT = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"


class WeightSource(Protocol):
    """`config` and canonical tensors by recipe, in the precision in which they are stored."""

    @property
    def config(self) -> DecoderConfig: ...

    def read(self, recipe: Recipe) -> torch.Tensor:
        """The tensor of `recipe`, in its shape; raises ModelError where it is missing or does not fit."""
        ...


def find_model(name: str) -> Path:
    """The directory of a model: `name` itself where it is one, else a hub id, downloaded or from the local hub cache.

    Raises ModelError where it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(f'{name} is not a directory; for hub ids install "ecotone[hub]"') from None
    try:
        patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client has no family of errors of its own for this
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ModelError(f"{name} is neither a directory nor a hub id that can be had: {reason}") from None


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """A Hugging Face directory. Open with `Checkpoint.open`; files stay closed until a tensor is read."""

    config: DecoderConfig
    folder: Path
    files: dict[str, Path]  # checkpoint's tensor name -> its file
    prefix: str
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """The checkpoint in `folder`; raises ModelError naming what is missing, unsupported or damaged."""
        config = load_config(folder)
        files = _files(folder)
        embedding = span_recipes(config, Span(start=0, stop=0, embedding=True))[0][0].sources[0]
        prefix = next((p for p in PREFIXES if p + embedding in files), None)
        if prefix is None:
            prefix = next((p for p in PREFIXES if any(n.startswith(f"{p}layers.") for n in files)), None)
        if prefix is None:
            raise ModelError(f"{folder}: no tensor {embedding}; these weights are not of a {config.family} model")
        return Checkpoint(config=config, folder=folder, files=files, prefix=prefix)

    def read(self, recipe: Recipe) -> torch.Tensor:
        parts = [self._tensor(source, None) for source in recipe.sources] if not self._is_stacked(recipe) else []
        if not parts and recipe.stacked is not None:
            name, index = recipe.stacked
            parts = [self._tensor(name, index)]
        if recipe.transposed and len(recipe.shape) == 2:
            parts = [p.t() for p in parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts) if len({p.shape[1:] for p in parts}) == 1 else None
        if whole is None or tuple(whole.shape) != recipe.shape:
            found = " + ".join(str(tuple(p.shape)) for p in parts)
            raise ModelError(f"{self.folder}: {recipe.sources[0]} has shape {found}, the configuration says {recipe.shape}")
        if not whole.dtype.is_floating_point or whole.dtype.itemsize < 2:
            raise ModelError(
                f"{self.folder}: {recipe.sources[0]} is {whole.dtype}; only float32, float16 and bfloat16 are read"
            )
        return whole.contiguous()

    def stored_bytes(self, span: Span) -> tuple[int, tuple[int, ...], int]:
        """Bytes on disk of (embedding, each layer, head) of `span`, from headers alone.

        Raises ModelError where a tensor is missing.
        """
        before, layers, after = span_recipes(self.config, span)
        return self._bytes(before), tuple(self._bytes(layer) for layer in layers), self._bytes(after)

    def _bytes(self, recipes: Iterable[Recipe]) -> int:
        sizes = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
        total = 0
        for recipe in recipes:
            name = recipe.stacked[0] if recipe.stacked is not None and self._is_stacked(recipe) else recipe.sources[0]
            kind = self._file(name).get_slice(self._found(name)).get_dtype()
            total += recipe.num_elements * sizes.get(kind, 4)
        return total

    def _is_stacked(self, recipe: Recipe) -> bool:
        return recipe.stacked is not None and self._located(recipe.stacked[0]) is not None

    def _located(self, name: str) -> str | None:
        return next((n for n in (self.prefix + name, name) if n in self.files), None)

    def _found(self, name: str) -> str:
        located = self._located(name)
        if located is None:
            raise ModelError(f"{self.folder}: tensor {self.prefix + name} is in no file; the download is not complete")
        return located

    def _file(self, name: str) -> Any:
        path = self.files[self._found(name)]
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]

    def _tensor(self, name: str, index: int | None) -> torch.Tensor:
        located = self._found(name)
        try:
            file = self._file(name)
            made: torch.Tensor = file.get_tensor(located) if index is None else file.get_slice(located)[index]
            return made
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise ModelError(f"{self.files[located]}: {located} cannot be read ({error}); download it again") from None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ModelError(f"{path} is not a whole safetensors file ({reason}); download it again") from None


def _files(folder: Path) -> dict[str, Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(index)
    if not single.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            pickled = next(iter([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]), None)
            if pickled is not None:
                raise ModelError(
                    f"{pickled} is a pickle, which is never opened; convert it once where you trust it: {CONVERT}"
                )
            raise ModelError(f"{folder} has no model.safetensors; give a directory with safetensors weights")
        single = found[0]
    return dict.fromkeys(_opened(single).keys(), single)


def _indexed(index: Path) -> dict[str, Path]:
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError("too large")
        mapping = json.loads(index.read_bytes())["weight_map"]
        pairs = [(str(name), str(file)) for name, file in mapping.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ModelError(f"{index} is not an index of safetensors files; download it again") from None
    for name in {file for _, file in pairs}:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index}: {name!r} is not the plain name of a safetensors file; this index is not to be trusted"
            )
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent / name} is missing; the download is not complete")
    return {tensor: index.parent / file for tensor, file in pairs}


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWeights:
    """Weights of `config` from `seed`: the same tensor whichever span asks for it. For benchmarks and tests.

    Matrices have variance 1/inputs, so that activations keep their size; norms are near one.
    """

    config: DecoderConfig
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def read(self, recipe: Recipe) -> torch.Tensor:
        name = ",".join(recipe.sources).encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=7, key=self.seed.to_bytes(8, "little")).digest(), "little")
        values = torch.randn(recipe.shape, generator=torch.Generator().manual_seed(key))
        if len(recipe.shape) == 2:
            # A tied table must make logits of size one, so it is drawn like a matrix.
            values *= 1.0 if recipe.name == "embedding.weight" and not self.config.tied else math.sqrt(1 / recipe.shape[1])
        elif recipe.name.endswith("weight") or recipe.name in ("q_norm", "k_norm"):
            values = 1 - self.config.norm_offset + 0.1 * values
        else:
            values *= 0.1
        return values.to(self.dtype)


def content_key(tensors: Iterable[torch.Tensor]) -> str:
    """Hex hash of the bytes, types and shapes of `tensors`: what a packed form on disk is keyed by."""
    digest = hashlib.blake2b(digest_size=20)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_all(source: WeightSource, recipes: Iterable[Recipe]) -> Iterator[tuple[Recipe, torch.Tensor]]:
    """Each recipe with its tensor, one after the other, so that only one is held here at a time."""
    for recipe in recipes:
        yield recipe, source.read(recipe)
