"""Exits on disk: one safetensors file with the heads' programs and weights, and what calibration saw of them.

Metadata: `ecotone.exits` = version, `weights` = weights hash of the model they belong to, `heads` = JSON of names,
positions, rules and programs. Tensors: `head/NAME/WEIGHT`, `backbone/WEIGHT` where training changed the model as well,
`data/NAME` for numbers that others keep beside them (ecotone.profiling.calibration). A weight whose values float16 holds
lies there as such. Reading checks everything, programs before any runs; a model of other weights is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ecotone import schema
from ecotone.model.capture import Captured
from ecotone.model.confidence import ExitRule
from ecotone.model.errors import ModelError
from ecotone.model.exits import ExitHead
from ecotone.model.program import Program, dtype_of
from ecotone.model.segment import Segment, weight_blob

__all__ = ["ExitFile", "read_exits", "write_exits"]

FORMAT, VERSION = "ecotone.exits", "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    name: str
    position: int
    rule: ExitRule
    program: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entries:
    heads: tuple[_Entry, ...]


@dataclass(frozen=True, slots=True)
class ExitFile:
    """What a file holds; `attach` puts it on its model. `data`: numbers kept beside the heads."""

    path: Path
    weights_hash: str
    heads: tuple[ExitHead, ...]
    backbone: Mapping[str, torch.Tensor] = field(default_factory=dict)
    data: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def attach(self, captured: Captured) -> Captured:
        """`captured` with these exits; raises ModelError where they are of a model with other weights."""
        if captured.backbone.weights_hash != self.weights_hash:
            own = f"{captured.graph.name} (weights {captured.backbone.weights_hash[:12]})"
            raise ModelError(f"{self.path}: is for a model with weights {self.weights_hash[:12]}, not for {own}; train anew")
        if self.backbone:
            own_weights = captured.segment(0, captured.graph.num_blocks).weights
            kinds = {name: own_weights[name].dtype for name in self.backbone if name in own_weights}
            captured = captured.with_weights({n: t.to(kinds.get(n, t.dtype)) for n, t in self.backbone.items()})
        try:
            return captured.with_exits(self.heads)
        except RuntimeError as error:  # an operator that does not take tensors of this size
            text = " ".join(str(error).split())[:160]
            raise ModelError(f"{self.path}: its exits do not take what {captured.graph.name} makes ({text})") from None


def write_exits(
    path: Path, captured: Captured, original: Captured | None = None, data: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the exits of `captured` aside and rename; `original`: the model before joint training changed its weights."""
    base = original or captured
    tensors: dict[str, torch.Tensor] = {f"data/{name}": tensor for name, tensor in (data or {}).items()}
    for head in captured.exits:
        tensors |= {f"head/{head.name}/{name}": _small(tensor) for name, tensor in head.segment.weights.items()}
    if base.backbone.weights_hash != captured.backbone.weights_hash:
        whole = captured.segment(0, captured.graph.num_blocks)
        changed = captured.parameter_names & set(whole.weights)
        tensors |= {f"backbone/{name}": _small(whole.weights[name]) for name in sorted(changed)}
    entries = [
        _Entry(name=head.name, position=head.position, rule=head.rule, program=head.segment.program_json())
        for head in captured.exits
    ]
    metadata = {
        FORMAT: VERSION, "weights": base.backbone.weights_hash,
        "heads": json.dumps(schema.write(_Entries(heads=tuple(entries)))),
    }  # fmt: skip
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    schema.write_aside(path, safetensors.torch.save(contiguous, metadata))


def read_exits(path: Path) -> ExitFile:
    """Read and check a file of exits; raises ModelError naming what is wrong."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; make one with ecotone exits") from None
    except Exception as error:  # safetensors has its own exception type
        raise ModelError(f"{path}: is not a file of exits ({' '.join(str(error).split())[:120]})") from None
    if metadata.get(FORMAT) != VERSION:
        found = metadata.get(FORMAT, "none")
        raise ModelError(f"{path}: is not a file of exits of this version ({FORMAT} {found}, must be {VERSION}); train anew")
    try:
        document = json.loads(metadata.get("heads", ""))
        entries = schema.read(_Entries, document, str(path)).heads
    except (ValueError, RecursionError, schema.SchemaError) as error:
        raise ModelError(f"{path}: its heads cannot be read ({' '.join(str(error).split())[:200]}); train anew") from None
    heads = tuple(_head(path, entry, tensors) for entry in entries)
    return ExitFile(path, metadata.get("weights", ""), heads, _under("backbone/", tensors), _under("data/", tensors))


def _head(path: Path, entry: _Entry, tensors: Mapping[str, torch.Tensor]) -> ExitHead:
    """The program checked like one that came over the network; its weights by content."""
    own = _under(f"head/{entry.name}/", tensors)
    program = Program.from_json(entry.program, f"{path}: exit {entry.name}")
    blobs = {}
    for spec in program.weights:
        if spec.name not in own:
            raise ModelError(f"{path}: exit {entry.name} lacks its weight {spec.name}; train anew")
        blob = weight_blob(own[spec.name].to(dtype_of(spec.dtype)))
        blobs[hashlib.sha256(blob).hexdigest()] = blob
    missing = [spec.name for spec in program.weights if spec.sha256 not in blobs]
    if missing:
        raise ModelError(f"{path}: exit {entry.name}: weight {missing[0]} is not the one that its program names; train anew")
    return ExitHead(entry.name, entry.position, Segment.from_parts(entry.program, blobs.__getitem__), entry.rule)


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _small(tensor: torch.Tensor) -> torch.Tensor:
    """As float16 where that loses nothing."""
    half = tensor.detach().half()
    return half if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor) else tensor.detach()
