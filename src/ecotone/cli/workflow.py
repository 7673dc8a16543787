"""The steps that several commands share: model -> captured graph -> cluster -> profile -> plan. Each says what it does.

A step that took long leaves a file that the next run reuses: compiled segments and profiles in the cache folder.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.markup import escape

from ecotone.accuracy import AccuracyTable
from ecotone.cli.asked import parse_objective, parse_require
from ecotone.cli.calibrating import FileSamples, likely_chains, read_labels
from ecotone.cli.console import err, progress_bar
from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.codec import LearnedCodec, hold, read_learned
from ecotone.executors import by_id
from ecotone.model import Captured, LoadedModel, capture, load_model
from ecotone.model.exit_file import read_exits
from ecotone.plan import Plan, plan_violations
from ecotone.planner import TIE, Assignment, FailoverSolution, Solution, assume, choose, solve
from ecotone.planset import PlanSet
from ecotone.profile import Profile
from ecotone.profiling import (
    AccuracyOptions,
    MeasureOptions,
    Progress,
    check_bottleneck,
    check_composition,
    codec_ids,
    default_path,
    profile_key,
)
from ecotone.profiling.calibration import policy_table, usual_policies
from ecotone.profiling.crossings import exit_run
from ecotone.profiling.exit_outcomes import CalibrationError, Outcomes
from ecotone.profiling.samples import FirstOf
from ecotone.runtime import Nodes, attach, launch
from ecotone.runtime.launch import NODE_PROGRAM
from ecotone.runtime.measure_cluster import measure
from ecotone.schema import write_aside
from ecotone.serving.prepare import Preparation
from ecotone.units import EcotoneError, parse_quantity

__all__ = [
    "Survival", "Work", "here", "load_work", "make_failover", "make_plan", "make_profile", "open_nodes", "reach",
    "read_plan_set", "write_file",
]  # fmt: skip

MOST_SPELLED = 64
PLAN_SET, ASSIGNMENT = "ecotone.planset", "ecotone.assignment"
DEFAULT_MTBF_S = 8 * 3600.0  # assumed where neither the cluster file nor --mtbf says more
TOPOLOGIES = {
    "auto": frozenset({"none", "local", "passive", "active"}),
    "none": frozenset({"none"}),
    "local": frozenset({"local"}),
    "standby": frozenset({"passive"}),
    "active": frozenset({"active"}),
}


@dataclass(slots=True)
class Work:
    """A model, captured, on its way to a plan."""

    loaded: LoadedModel
    captured: Captured
    cluster: Cluster
    preparation: Preparation
    quiet: bool = False
    samples: FileSamples | tuple[()] = ()
    labels: list[Any] | None = None
    max_calibration: int | None = None  # of the samples, for the accuracy table
    policies: AccuracyTable | None = None  # the policies of its exits, as their file calibrated them
    bottlenecks: tuple[LearnedCodec, ...] = ()


def here() -> Cluster:
    """A cluster of one: this machine, with the memory that it has."""
    name = DeviceId(socket.gethostname().split(".")[0] or "here")
    accelerator = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = Device(name=name, memory_bytes=psutil.virtual_memory().available, accelerator=accelerator)
    return Cluster(name="here", devices=(device,), links=(), source=name, sink=name)


def load_cluster(path: Path | None) -> Cluster:
    """The cluster of a TOML file, or this machine alone where none is given.

    Links by kind become those of the devices where these are at most MOST_SPELLED; a larger cluster can be planned for.
    """
    found = Cluster.load(path) if path else here()
    return found.spelled_out() if len(found.devices) <= MOST_SPELLED else found


def load_work(
    model: str,
    cluster: Path | None,
    *,
    input_shape: str = "",
    samples: str = "",
    labels: Path | None = None,
    max_calibration: int = -1,
    exits: str = "",
    bottlenecks: Sequence[Path] | None = None,
    branches: bool = True,
    quiet: bool = False,
) -> Work:
    """Load and capture `model`, read the cluster, find samples, labels, exits; raises EcotoneError naming what is wrong.

    `max_calibration`: at most so many samples are for the accuracy table; below 0: all. `bottlenecks`: files of learned
    codecs, which must be of this model; they can be used from then on. `branches`: blocks follow branches, but not with
    exits or bottlenecks, whose files count the blocks of one row.
    """
    if labels and not samples:
        raise EcotoneError("--labels says what is right for --samples; give both")
    if labels and max_calibration == 0:
        raise EcotoneError("--calibration 0 makes no accuracy table, which --labels are for; leave one of them out")
    machines = load_cluster(cluster)
    branches = branches and not exits and not bottlenecks
    with nullcontext() if quiet else err.status(f"capturing {model}"):
        loaded = load_model(model, input_shape=input_shape)
        if not loaded.args and not loaded.kwargs:
            raise EcotoneError(
                f"{model}: does not say what it takes; return (module, example args), or give --input-shape 3x224x224"
            )
        captured = capture(loaded.module, loaded.args, loaded.kwargs, name=loaded.name, branches=branches)
    policies = None
    if exits:
        captured, policies = _attached(loaded, captured, exits, quiet)
    graph = captured.graph
    if not quiet:
        work_flop, weights = graph.segment_flop(0, graph.num_blocks), graph.segment_parameter_bytes(0, graph.num_blocks)
        size = f"{work_flop / 1e9:.3g} GFLOP, {weights / 1e6:.3g} MB of weights"
        err.print(f"[dim]{graph.name}: {graph.num_blocks} blocks, {size}")
    preparation = Preparation.of(loaded, captured)
    work = Work(
        loaded, captured, machines, preparation, quiet, policies=policies,
        max_calibration=None if max_calibration < 0 else max_calibration,
    )  # fmt: skip
    work.bottlenecks = tuple(_read_bottleneck(path, captured) for path in bottlenecks or ())
    if samples:
        work.samples = FileSamples(samples, preparation)
        work.labels = read_labels(labels, work.samples.names, preparation.labels) if labels else None
    return work


def _attached(loaded: LoadedModel, captured: Captured, exits: str, quiet: bool) -> tuple[Captured, AccuracyTable | None]:
    """The model with the exits of a file, and the policies that its calibration gives, if any."""
    if exits == "own" and not loaded.exits:
        raise EcotoneError(f"{loaded.name}: brings no exits of its own; make some with ecotone exits, then give the file")
    file = read_exits(Path(loaded.exits if exits == "own" else exits))
    captured = file.attach(captured)
    outcomes = Outcomes.from_tensors([head.name for head in captured.exits], file.data)
    if outcomes is None:
        return captured, None
    try:
        return captured, policy_table(captured.graph, outcomes, usual_policies(outcomes, captured.graph))
    except CalibrationError as error:  # plans of a file may still name its exits
        if not quiet:
            err.print(f"[dim]no exit policy: {escape(str(error))}", soft_wrap=True)
        return captured, None


def _read_bottleneck(path: Path, captured: Captured) -> LearnedCodec:
    made = read_learned(read_file(path), f"bottleneck {path}")
    check_bottleneck(captured, made, f"bottleneck {path}")
    hold(made)
    return made


def open_nodes(work: Work, needed: Collection[DeviceId] | None = None) -> Nodes:
    """The nodes of the work's cluster; see `reach`."""
    return reach(work.cluster, needed, quiet=work.quiet)


def reach(
    cluster: Cluster, needed: Collection[DeviceId] | None = None, *, quiet: bool = False, program: str = NODE_PROGRAM
) -> Nodes:  # fmt: skip
    """Reach the cluster's nodes (`needed`: those that must answer now, all by default).

    An emulated cluster without addresses is started here, of processes that run `program`, and stopped by closing it.
    """
    started_here = cluster.emulate and not any(device.address for device in cluster.devices)
    with nullcontext() if quiet else err.status("reaching the nodes"):
        return launch(cluster, program=program) if started_here else attach(cluster, needed=needed)


def make_profile(
    work: Work,
    nodes: Nodes | None,
    *,
    executors: Sequence[str] = (),
    path: Path | None = None,
    max_error: float = 0.2,
    fresh: bool = False,
    cuts: Sequence[int] = (),
    codecs: Sequence[str] = (),
) -> Profile:
    """Measure what is not measured yet, at `cuts` or where it promises most, in `codecs` or all usual ones.

    The file is reused while model, devices, samples and versions stay the same.
    """
    for name in executors:
        by_id(name)
    learned = [made.id for made in work.bottlenecks]
    wanted = (*(codecs or codec_ids(())), *learned) if learned else tuple(codecs)
    options = MeasureOptions(executors=tuple(executors), max_error=max_error, cuts=tuple(cuts), codecs=wanted)
    image = work.preparation.image
    few = [sample for sample, _ in zip(work.samples, range(options.max_samples), strict=False)] or [
        work.captured.example_inputs
    ]
    file = path or default_path(profile_key(work.captured.graph, work.cluster, options, few, image=image))
    if fresh:
        file.unlink(missing_ok=True)
    former = _key_of(file)
    names = work.samples.names if isinstance(work.samples, FileSamples) else ()
    table = AccuracyOptions(
        limit=work.max_calibration, names=names, given=work.policies,
        policies=work.policies.policies if work.policies else (),
        exits=tuple(exit_run(head) for head in work.captured.exits) if work.policies else (),
    )  # fmt: skip
    with progress_bar("profiling", work.quiet) as report:
        made = measure(
            work.captured, nodes or work.cluster, samples=work.samples, labels=work.labels, options=options,
            table=table, bottlenecks=work.bottlenecks, image=image, path=file, progress=report,
        )  # fmt: skip
        made = _with_compositions(work, made, file, report)
    if former and former != made.key and not work.quiet:
        err.print(f"[dim]{escape(str(file))} was of another model, cluster, version or --executor: measured again")
    return made


def _key_of(file: Path) -> str:
    """The key of the profile in `file`; "" where none is there that can be read."""
    try:
        return Profile.from_json(file.read_bytes(), str(file)).key
    except (OSError, EcotoneError):
        return ""


def _with_compositions(work: Work, made: Profile, file: Path, report: Progress) -> Profile:
    """The profile with some whole plans measured beside the sum of their crossings, where a new table came with it."""
    table, count = made.accuracy, len(work.samples) if work.max_calibration is None else work.max_calibration
    if table is None or table.compositions or not work.samples or not count:
        return made
    samples = FirstOf(work.samples, count)
    labels = None if work.labels is None else work.labels[: len(samples)]
    found = check_composition(
        work.captured, table, samples, labels, likely_chains(work.captured.graph, work.cluster, made),
        image=work.preparation.image, progress=report,
    )  # fmt: skip
    made = replace(made, accuracy=replace(table, compositions=found))
    write_aside(file, made.to_json())
    return made


def make_plan(
    work: Work, profile: Profile, objective: str, require: Sequence[str], time_limit_s: float = 10.0, arrivals: str = ""
) -> Solution:
    """The best plan; raises PlannerError naming the requirement that cannot be met. `arrivals`: for a p95."""
    asked, kept = parse_objective(objective, arrivals), parse_require(require, arrivals)
    return solve(work.captured.graph, work.cluster, profile, asked, kept, time_limit_s=time_limit_s, tie=TIE)


@dataclass(frozen=True, slots=True)
class Survival:
    """What `--survive`, `--mtbf` and `--recover` ask for."""

    topologies: frozenset[str]
    mtbf_s: float = DEFAULT_MTBF_S
    recover_s: float = math.inf

    @staticmethod
    def parse(survive: str, mtbf: str = "", recover: str = "") -> Survival | None:
        """Read the options; None for "none" or nothing. Raises EcotoneError for what is not understood."""
        if survive not in ("", *TOPOLOGIES):
            raise EcotoneError(f"--survive {survive!r} is not known; {', '.join(TOPOLOGIES)} are")
        if survive in ("", "none"):
            if mtbf or recover:
                raise EcotoneError("--mtbf and --recover are for a plan that survives failures; add --survive auto")
            return None
        mtbf_s = parse_quantity(mtbf, "s", "--mtbf") if mtbf else DEFAULT_MTBF_S
        recover_s = parse_quantity(recover, "s", "--recover") if recover else math.inf
        if not (mtbf_s > 0 and recover_s > 0):
            raise EcotoneError("--mtbf and --recover must be above zero; write for example --mtbf 8h --recover 200ms")
        return Survival(TOPOLOGIES[survive], mtbf_s, recover_s)


def make_failover(
    work: Work, profile: Profile, objective: str, require: Sequence[str], survival: Survival, arrivals: str = ""
) -> FailoverSolution:
    """The plan set of least expected cost; a device or link that states no mtbf has the one of `survival`."""
    cluster = assume(work.cluster, survival.mtbf_s)
    return choose(
        work.captured.graph, cluster, profile, parse_objective(objective, arrivals), parse_require(require, arrivals),
        topologies=survival.topologies, recover_s=survival.recover_s, tie=TIE,
    )  # fmt: skip


def read_plan_set(path: Path, work: Work) -> PlanSet:
    """A plan set from a file, or a plan as a set of one, every plan checked against model and cluster.

    Of a joint plan (`ecotone plan --workload FILE --out`) the plan of the user at the cluster's source. `work.captured` is
    put in the order of the blocks that the first plan cuts.
    """
    text = read_file(path)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None  # the reader below says what is wrong
    schema, where = document.get("schema") if isinstance(document, dict) else None, f"plan {path}"
    if schema == PLAN_SET:
        found = PlanSet.from_json(text, where)
    elif schema == ASSIGNMENT:
        plans = Assignment.from_json(text, where).plans
        own = next((plan for plan in plans.values() if plan.source == work.cluster.source), None)
        if own is None:
            named = ", ".join(f"{name} at {plan.source}" for name, plan in plans.items()) or "nobody"
            raise EcotoneError(f"{where}: no plan for a user at {work.cluster.source}, source of the cluster; for {named}")
        found = PlanSet(primary=own)
    else:
        found = PlanSet(primary=Plan.from_json(text, where))
    _cut_as(work, found.primary)
    for plan in found.plans:
        wrong = plan_violations(plan, work.captured.graph, work.cluster)
        if wrong:
            raise EcotoneError(f"{where}: {plan}: " + "; ".join(wrong))
    return found


def _cut_as(work: Work, plan: Plan) -> None:
    """Put `work.captured` in the order of blocks that a plan cuts; plans of a capture in one row are known too."""
    for branches in (True,) if work.captured.exits or work.bottlenecks else (True, False):
        with suppress(EcotoneError):  # an order of another model
            captured = work.captured
            if not branches:
                captured = capture(work.loaded.module, work.loaded.args, work.loaded.kwargs, name=work.loaded.name)
            other = captured.in_order(plan.order)
            if other.graph.content_hash() == plan.graph_hash:
                work.captured = other
                return


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EcotoneError(f"{path}: {error.strerror or error}; give the path of a file that is there") from None


def write_file(path: Path, content: str | bytes) -> None:
    """Text gets a last line break. Says where it wrote; raises EcotoneError."""
    write_aside(path, content + "\n" if isinstance(content, str) else content)
    err.print(f"[dim]wrote {path}")
