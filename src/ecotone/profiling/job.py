"""A measuring job on disk: segments, weights and frontiers in a folder, so that a process of its own can do it.

Folder: `job.json` (what to do), `programs/START-STOP[-EXIT].json`, `blobs/SHA256` (weights once each) and
`frontiers.safetensors` (float32 values of every cut for every sample, by eager torch: inputs and the reference at once).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from ecotone import schema
from ecotone.model import Captured, Segment

__all__ = [
    "Frontiers",
    "Job",
    "Step",
    "frontier_values",
    "load_frontiers",
    "load_segment",
    "read_job",
    "write_job",
    "write_model",
]

SCHEMA, VERSION = "ecotone.job", 1

Frontiers = Mapping[int, Sequence[tuple[torch.Tensor, ...]]]
"""Per cut, per sample, the tensors that cross there, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Blocks [start, stop) by `executor`; with `exit` its head, and the decision, as well."""

    executor: str
    start: int
    stop: int
    exit: str = ""

    @property
    def program(self) -> str:
        """Name of its program's file."""
        return f"{self.start}-{self.stop}" + (f"-{self.exit}" if self.exit else "") + ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Steps to prepare, verify and then time in `rounds` interleaved rounds."""

    accelerator: str
    threads: int
    rounds: int
    steps: tuple[Step, ...]


def frontier_values(captured: Captured, samples: Sequence[Sequence[torch.Tensor]], cuts: Sequence[int]) -> Frontiers:
    """Eager float32 values at `cuts` (ascending, 0 first) for each sample: one run of the model in pieces per sample."""
    values: dict[int, list[tuple[torch.Tensor, ...]]] = {cut: [] for cut in cuts}
    modules = [captured.segment(a, b).module() for a, b in itertools.pairwise(cuts)]
    with torch.no_grad():
        for sample in samples:
            tensors = tuple(sample)
            values[cuts[0]].append(tensors)
            for cut, module in zip(cuts[1:], modules, strict=True):
                tensors = tuple(module(*tensors))
                values[cut].append(tensors)
    return values


def write_model(
    folder: Path, captured: Captured, ranges: Sequence[tuple[int, int] | tuple[int, int, str]], frontiers: Frontiers
) -> None:
    """Lay out programs, weights and frontiers for `ranges` (what Captured.segment takes) under `folder`."""
    (folder / "programs").mkdir(exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for piece in ranges:
        segment = captured.segment(*piece)
        (folder / "programs" / _step_of(piece).program).write_text(segment.program_json())
        for name, (sha256, _) in segment.manifest().items():
            path = folder / "blobs" / sha256
            if not path.exists():
                path.write_bytes(segment.blob(name))
    flat = {
        f"{cut}/{sample}/{i}": tensor.contiguous().clone()
        for cut, per_sample in frontiers.items()
        for sample, tensors in enumerate(per_sample)
        for i, tensor in enumerate(tensors)
    }
    safetensors.torch.save_file(flat, str(folder / "frontiers.safetensors"))


def _step_of(piece: tuple[int, int] | tuple[int, int, str]) -> Step:
    start, stop, *exit_name = piece
    return Step(executor="", start=start, stop=stop, exit="".join(exit_name))


def load_frontiers(folder: Path) -> Frontiers:
    """What write_model laid out; a cut that nothing crosses is absent."""
    found: dict[int, dict[int, dict[int, torch.Tensor]]] = {}
    for name, tensor in safetensors.torch.load_file(str(folder / "frontiers.safetensors")).items():
        cut, sample, i = map(int, name.split("/"))
        found.setdefault(cut, {}).setdefault(sample, {})[i] = tensor
    return {
        cut: [tuple(tensors[i] for i in sorted(tensors)) for _, tensors in sorted(samples.items())]
        for cut, samples in found.items()
    }


def load_segment(folder: Path, step: Step) -> Segment:
    """Rebuild the segment of a step from the folder; raises ModelError where the folder does not fit."""
    text = (folder / "programs" / step.program).read_text()
    return Segment.from_parts(text, lambda sha256: (folder / "blobs" / sha256).read_bytes())


def write_job(folder: Path, job: Job) -> None:
    """State what is to be done in `folder`."""
    schema.write_aside(folder / "job.json", schema.dump_json(job, SCHEMA, VERSION))


def read_job(folder: Path) -> Job:
    """What write_job stated; raises SchemaError."""
    return schema.load_json(Job, (folder / "job.json").read_bytes(), SCHEMA, VERSION, "job")
