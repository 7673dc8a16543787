"""The steps that several commands share: model -> captured graph -> cluster -> profile -> plan. Each says what it does.

A step that took long leaves a file that the next run reuses: compiled segments and profiles in the cache folder.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from ecotone.cli.console import err, progress_bar
from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.executors import by_id
from ecotone.model import Captured, LoadedModel, capture, load_model
from ecotone.plan import Plan, plan_violations
from ecotone.planner import TIE, Latency, Requirement, Solution, Throughput, solve
from ecotone.profile import Profile
from ecotone.profiling import MeasureOptions, default_path, profile_key
from ecotone.runtime import Nodes, attach, launch
from ecotone.runtime.measure_cluster import measure
from ecotone.schema import write_aside
from ecotone.serving.prepare import Preparation
from ecotone.serving.sources import open_source
from ecotone.units import EcotoneError

__all__ = ["Work", "check_asked", "here", "load_work", "make_plan", "make_profile", "open_nodes", "read_plan", "write_file"]

MAX_SAMPLES = 16


@dataclass(slots=True)
class Work:
    """A model, captured, on its way to a plan."""

    loaded: LoadedModel
    captured: Captured
    cluster: Cluster
    preparation: Preparation
    quiet: bool = False
    samples: tuple[tuple[torch.Tensor, ...], ...] = field(default=())


def here() -> Cluster:
    """A cluster of one: this machine, with the memory that it has."""
    name = DeviceId(socket.gethostname().split(".")[0] or "here")
    accelerator = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = Device(name=name, memory_bytes=psutil.virtual_memory().available, accelerator=accelerator)
    return Cluster(name="here", devices=(device,), links=(), source=name, sink=name)


def load_cluster(path: Path | None) -> Cluster:
    """The cluster of a TOML file, or this machine alone where none is given."""
    return Cluster.load(path) if path else here()


def load_work(
    model: str,
    cluster: Path | None,
    *,
    input_shape: str = "",
    samples: str = "",
    quiet: bool = False,
) -> Work:
    """Load and capture `model`, read the cluster, prepare the samples; raises EcotoneError naming what is wrong."""
    machines = load_cluster(cluster)
    with nullcontext() if quiet else err.status(f"capturing {model}"):
        loaded = load_model(model, input_shape=input_shape)
        if not loaded.args and not loaded.kwargs:
            raise EcotoneError(f"{model}: does not say what it takes; give --input-shape, for example 3x224x224")
        captured = capture(loaded.module, loaded.args, loaded.kwargs, name=loaded.name)
    graph = captured.graph
    if not quiet:
        work_flop, weights = graph.segment_flop(0, graph.num_blocks), graph.segment_parameter_bytes(0, graph.num_blocks)
        size = f"{work_flop / 1e9:.3g} GFLOP, {weights / 1e6:.3g} MB of weights"
        err.print(f"[dim]{graph.name}: {graph.num_blocks} blocks, {size}")
    preparation = Preparation.of(loaded, captured)
    work = Work(loaded, captured, machines, preparation, quiet)
    if samples:
        items = [item for item, _ in zip(open_source(samples, "all"), range(MAX_SAMPLES), strict=False)]
        work.samples = tuple(preparation.flat(item) for item in items)
    return work


def open_nodes(work: Work) -> Nodes:
    """Reach the cluster's nodes; an emulated cluster is started here, and stopped when the caller closes it."""
    with nullcontext() if work.quiet else err.status("reaching the nodes"):
        return launch(work.cluster) if work.cluster.emulate else attach(work.cluster)


def make_profile(
    work: Work,
    nodes: Nodes | None,
    *,
    executors: Sequence[str] = (),
    path: Path | None = None,
    max_error: float = 0.2,
    fresh: bool = False,
) -> Profile:
    """Measure what is not measured yet; the file is reused while model, devices and versions stay the same."""
    for name in executors:
        by_id(name)
    options = MeasureOptions(executors=tuple(executors), max_error=max_error)
    image = work.preparation.image
    inputs = work.samples or (work.captured.example_inputs,)
    file = path or default_path(profile_key(work.captured.graph, work.cluster, options, inputs, image=image))
    if fresh:
        file.unlink(missing_ok=True)
    with progress_bar("profiling", work.quiet) as report:
        return measure(
            work.captured, nodes or work.cluster, samples=inputs, options=options, image=image, path=file, progress=report
        )


def make_plan(work: Work, profile: Profile, objective: str, require: Sequence[str], time_limit_s: float = 10.0) -> Solution:
    """The best plan; raises PlannerError naming the requirement that cannot be met."""
    asked = parse_objective(objective)
    return solve(work.captured.graph, work.cluster, profile, asked, tuple(require), time_limit_s=time_limit_s, tie=TIE)


def read_plan(path: Path, work: Work) -> Plan:
    """A plan from a file, checked against model and cluster."""
    plan = Plan.from_json(read_file(path), f"plan {path}")
    wrong = plan_violations(plan, work.captured.graph, work.cluster)
    if wrong:
        raise EcotoneError(f"plan {path}: " + "; ".join(wrong))
    return plan


def check_asked(objective: str, require: Sequence[str], cluster: Cluster) -> None:
    """Refuse what cannot be understood before anything is measured; raises EcotoneError naming it."""
    parse_objective(objective)
    for text in require:
        Requirement.parse(text)
        name, _, value = text.partition("=")
        if name.strip() == "device":
            for device in value.split(","):
                cluster.device(device.strip())


def parse_objective(text: str) -> Latency | Throughput:
    """ "latency" or "throughput"."""
    if text == "latency":
        return Latency()
    if text == "throughput":
        return Throughput()
    raise EcotoneError(f"objective {text!r} is not known; latency and throughput are")


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EcotoneError(f"{path}: {error.strerror or error}; give the path of a file that is there") from None


def write_file(path: Path, content: str) -> None:
    write_aside(path, content + "\n")
    err.print(f"[dim]wrote {path}")
