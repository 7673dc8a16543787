"""A calibration set from files: samples that are read when they are needed, their labels, and the plans worth checking.

Labels name samples by their file (JSON object, CSV, safetensors with a tensor per sample), or come in the order of the files
(JSON list, .npy, one tensor in safetensors). A label is a class number, the class's name where the model has names, or an
array of numbers in the shape of the decisions.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ecotone.accuracy import Crossing
from ecotone.cluster import Cluster
from ecotone.graph import Graph
from ecotone.planner import Latency, Objective, PlannerError, Throughput, solve
from ecotone.profile import Profile
from ecotone.profiling import random_crossings
from ecotone.profiling.labels import LabelError
from ecotone.profiling.ladders import is_exact
from ecotone.serving.prepare import Preparation
from ecotone.serving.sources import open_source

__all__ = ["FileSamples", "likely_chains", "read_labels"]

MAX_LIVE_SAMPLES = 16  # of standard input and cameras, which can be read only once
LINK_FACTORS = (1.0, 0.25, 4.0)
LOSS_LIMITS = (1.0, 5.0)
SOLVE_S = 2.0
NUM_CHAINS = 12


class FileSamples:
    """The inputs of a source (see open_source) as flat tensors, read anew each time they are gone through."""

    def __init__(self, spec: str, preparation: Preparation) -> None:
        self._spec, self._preparation = spec, preparation
        self._kept: list[tuple[torch.Tensor, ...]] | None = None
        if spec == "-" or spec.startswith(("camera:", "rtsp://", "rtsps://")):
            items = [item for item, _ in zip(open_source(spec, "all"), range(MAX_LIVE_SAMPLES), strict=False)]
            self._kept, self.names = [preparation.flat(item) for item in items], tuple(item.name for item in items)
        else:
            self.names = tuple(item.name for item in open_source(spec, "all"))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        if self._kept is not None:
            return iter(self._kept)
        return (self._preparation.flat(item) for item in open_source(self._spec, "all"))

    def __contains__(self, sample: object) -> bool:
        return any(sample is one for one in self)


def read_labels(path: Path, names: Sequence[str], classes: Sequence[str] = ()) -> list[Any]:
    """The label of each sample of `names`, in order; `classes`: the model's names of its classes.

    Raises LabelError for a file that cannot be read and for a sample that has no label in it.
    """
    readers: Mapping[str, Callable[[bytes], Any]] = {
        ".json": json.loads, ".csv": _rows, ".npy": lambda data: np.load(io.BytesIO(data), allow_pickle=False),
        ".safetensors": safetensors.torch.load,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise LabelError(f"labels {path}: suffix {path.suffix or 'none'} is not known; {', '.join(readers)} are")
    try:
        found = reader(path.read_bytes())
    except OSError as error:
        raise LabelError(f"labels {path}: {error.strerror or error}; give the path of a file that is there") from None
    except (ValueError, RecursionError, EOFError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LabelError(f"labels {path}: cannot be read as {path.suffix[1:]}: {reason}") from None
    if isinstance(found, dict) and path.suffix.lower() == ".safetensors" and len(found) == 1 and len(names) != 1:
        (found,) = found.values()
    if isinstance(found, dict):
        found = _by_name(path, found, names)
    elif not isinstance(found, list | np.ndarray | torch.Tensor) or np.ndim(found) == 0:
        raise LabelError(f"labels {path}: hold {type(found).__name__}; give a label for each name, or a list in order")
    if len(found) != len(names):
        raise LabelError(f"labels {path}: {len(found)} for {len(names)} samples; give one label per sample, in their order")
    numbers = {name: number for number, name in enumerate(classes)}
    return [_number(path, label, numbers) for label in found]


def _rows(data: bytes) -> dict[str, str]:
    """CSV with two columns, name and label; a first row whose label is no number and whose name is `name` is a header."""
    rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8"))) if row]
    wrong = next((number for number, row in enumerate(rows) if len(row) != 2), None)
    if wrong is not None:
        raise ValueError(f"row {wrong + 1} has {len(rows[wrong])} columns; write name,label")
    if rows and rows[0][0].strip().lower() in ("name", "file", "filename", "image", "sample"):
        rows = rows[1:]
    return {name.strip(): label.strip() for name, label in rows}


def _by_name(path: Path, found: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """In the order of the samples; a name counts with its folders or without, with its suffix or without."""
    short = {Path(name).name: label for name, label in found.items()}
    stems = {Path(name).stem: label for name, label in found.items()}
    chosen, missing = [], []
    for name in names:
        places = [(table, key) for table, key in ((short, name), (stems, Path(name).stem)) if key in table]
        if places:
            chosen.append(places[0][0][places[0][1]])
        else:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        known = ", ".join(list(found)[:3]) or "nothing"
        raise LabelError(f"labels {path}: no label for sample {missing[0]}{more}; the file names {known}, ...")
    return chosen


def _number(path: Path, label: Any, classes: Mapping[str, int]) -> Any:
    """A text as a class number; everything else as it is, to be checked against the model."""
    if not isinstance(label, str):
        return label
    if label in classes:
        return classes[label]
    try:
        return int(label)
    except ValueError:
        known = f"; the model's are {', '.join(list(classes)[:12])}" if classes else ""
        raise LabelError(f"labels {path}: {label!r:.40} is neither a class number nor a class of the model{known}") from None


def likely_chains(graph: Graph, cluster: Cluster, profile: Profile, seed: int = 0) -> tuple[tuple[Crossing, ...], ...]:
    """What to check: the crossings of the planner's plans at several link rates and limits, then random ones.

    Only chains of two or more lossy crossings; with one the sum is the measured cell.
    """
    assert profile.accuracy is not None
    found: dict[tuple[Crossing, ...], None] = {}
    objectives: tuple[Objective, ...] = (Throughput(), Latency())
    for factor, limit, objective in itertools.product(LINK_FACTORS, LOSS_LIMITS, objectives):
        state, require = cluster.scaled_links(factor), (f"accuracy_loss={limit:g}",)
        try:
            solution = solve(graph, state, profile, objective, require, time_limit_s=SOLVE_S)
        except PlannerError:
            continue
        for plan in (solution.plan, *(other.plan for other in solution.runners_up)):
            chain = tuple(Crossing(position=position, codec=codec) for position, codec in plan.crossings)
            if sum(not is_exact(crossing.codec) for crossing in chain) >= 2 and len(found) < NUM_CHAINS // 2:
                found.setdefault(chain)
    others = random_crossings(graph, profile.accuracy, NUM_CHAINS - len(found), seed=seed)
    return tuple(dict.fromkeys((*found, *others)))
