"""A segment: blocks [start, stop) of a captured model as a checked program with just its own weights.

It travels as two kinds of things: the program's JSON text, and one safetensors blob per weight, named by its sha256.
Rebuilding checks all of it before any operator runs, and imports nothing. No knowledge of where it runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property

import safetensors.torch
import torch

from ecotone.model.errors import ModelError
from ecotone.model.interpreter import ProgramModule, restore_layout
from ecotone.model.program import Program, TensorSpec, WeightSpec, dtype_of

__all__ = ["Segment", "TensorSpec", "weight_blob"]


class Segment:
    """Runnable blocks [start, stop): takes the tensors of `inputs` in order, returns those of `outputs` in order."""

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor]):
        self.program = program
        self.weights = dict(weights)

    @property
    def graph_hash(self) -> str:
        return self.program.graph_hash

    @property
    def start(self) -> int:
        return self.program.start

    @property
    def stop(self) -> int:
        return self.program.stop

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.program.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.program.outputs

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())

    def module(self, device: str = "cpu") -> torch.nn.Module:
        """A fresh module on `device`: forward(*inputs) -> tuple, eager, in the captured precision."""
        return ProgramModule(self.program, self.weights, device)

    def program_json(self) -> str:
        """The operator graph as JSON text; equal segments give equal text."""
        return self._json

    def manifest(self) -> dict[str, tuple[str, int]]:
        """Per weight name: sha256 and size of its blob."""
        return {spec.name: (spec.sha256, spec.size_bytes) for spec in self.program.weights}

    def blob(self, name: str) -> bytes:
        """The safetensors blob of one weight (made on demand)."""
        if name not in self.weights:
            raise ModelError(f"segment [{self.start}, {self.stop}) has no weight {name!r}; see its manifest")
        return weight_blob(self.weights[name])

    def content_hash(self) -> str:
        """Hex sha256 of program and weights: a key for caches."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    @cached_property
    def _json(self) -> str:
        return self.program.to_json()

    @staticmethod
    def from_parts(program_json: str | bytes, load_blob: Callable[[str], bytes]) -> Segment:
        """Rebuild a segment: `load_blob(sha256)` gives a blob. Raises ModelError for whatever does not fit."""
        program = Program.from_json(program_json)
        return Segment(program, {spec.name: _read_blob(spec, load_blob(spec.sha256)) for spec in program.weights})


def weight_blob(tensor: torch.Tensor) -> bytes:
    """One tensor as safetensors bytes; equal values of one shape and dtype give equal bytes."""
    return safetensors.torch.save({"t": tensor.detach().cpu().contiguous()})


def _read_blob(spec: WeightSpec, blob: bytes) -> torch.Tensor:
    where = f"weight {spec.name!r}"
    if len(blob) != spec.size_bytes or hashlib.sha256(blob).hexdigest() != spec.sha256:
        raise ModelError(f"{where}: {len(blob)} bytes do not have the sha256 {spec.sha256[:12]}…; fetch it again")
    try:
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        if set(header) - {"__metadata__"} != {"t"}:
            raise ValueError("it must hold just one tensor, named t")
        tensor = safetensors.torch.load(bytes(blob))["t"]
    except Exception as error:  # SafetensorError, or whatever broken JSON and sizes raise
        raise ModelError(f"{where}: not a safetensors blob ({str(error)[:120]}); make the segment again") from None
    if tuple(tensor.shape) != spec.shape or tensor.dtype != dtype_of(spec.dtype):
        found = f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
        raise ModelError(f"{where}: mismatched weights: the blob holds {found}, the program needs {spec.shape} {spec.dtype}")
    return restore_layout(tensor, spec.order)
