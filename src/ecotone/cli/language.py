"""What the commands share for language models: the model, its cluster, the nodes reached, how fast each device is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ecotone.cli.console import err, progress_bar
from ecotone.cli.workflow import load_cluster, reach
from ecotone.cluster import Cluster, Device
from ecotone.llm.deploy import NODES, join
from ecotone.llm.executors import IDS
from ecotone.llm.service import ExecutorTimes, GenerationService
from ecotone.llm.sources import ModelRef, describe
from ecotone.llm.text import TextModel
from ecotone.llm.weights import Checkpoint, find_model
from ecotone.runtime.errors import NodeUnreachable
from ecotone.units import EcotoneError

__all__ = ["PRECISIONS", "LlmWork", "candidates", "load_llm", "measured_on", "reached"]

PRECISIONS = ("fp32", "bf16", "int8", "int4")
_PROFILE_S, _PATIENCE_S = 1800.0, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmWork:
    """A language model and the machines that may run it. `name`: what clients call it."""

    name: str
    source: Checkpoint
    text: TextModel
    ref: ModelRef
    cluster: Cluster
    quiet: bool = False


def load_llm(model: str, cluster: Path | None, name: str = "", quiet: bool = False) -> LlmWork:
    """Open a model directory or hub id; raises ModelError naming what is missing, and EcotoneError for the cluster."""
    with contextlib.nullcontext() if quiet else err.status(f"opening {model}"):
        folder = find_model(model)
        source = Checkpoint.open(folder)
        text = TextModel.open(folder)
        ref = describe(source, str(folder.resolve()))
    machines = load_cluster(cluster)
    return LlmWork(name=name or folder.resolve().name, source=source, text=text, ref=ref, cluster=machines, quiet=quiet)


@contextlib.contextmanager
def reached(work: LlmWork) -> Iterator[GenerationService]:
    """The driver's own service among the cluster's nodes. Those that do not answer are named, and may come later."""
    with reach(work.cluster, (), quiet=work.quiet, program=NODES) as nodes, join(nodes) as service:
        for name in service.wait_for((device.name for device in work.cluster.devices), _PATIENCE_S):
            err.print(f"[yellow]{name} does not answer; it is used when it comes", highlight=False)
        yield service


def candidates(precisions: Sequence[str]) -> tuple[str, ...]:
    """Executors worth measuring in these precisions: each alone, and OpenVINO for prompts beside own kernels to decode."""
    unknown = [p for p in precisions if p not in PRECISIONS]
    if unknown or not precisions:
        raise EcotoneError(f"precision {', '.join(unknown) or 'none'} is not known; there are {', '.join(PRECISIONS)}")
    single = [id for id in IDS if id.partition(":")[2] in precisions]
    return (*single, *(f"openvino:{p}+native:{p}" for p in PRECISIONS if p in precisions))


def measured_on(
    work: LlmWork, service: GenerationService, executors: Sequence[str], devices: Sequence[Device]
) -> dict[str, tuple[ExecutorTimes, ...]]:
    """What each device takes for the parts of such a model; random weights of its shape, so nothing is sent.

    Devices of this computer (an emulated cluster) take turns, real ones measure side by side. One that is lost meanwhile is
    left out, saying so.
    """
    found: dict[str, tuple[ExecutorTimes, ...]] = {}
    single = tuple(executor for executor in executors if "+" not in executor)  # a pair is made of its parts
    with progress_bar("measuring", quiet=work.quiet) as report:
        done = 0

        def ask(device: Device) -> None:
            nonlocal done
            try:
                found[device.name] = service.profile_at(device.name, work.source.config, single, _PROFILE_S)
            except NodeUnreachable as error:
                err.print(f"[yellow]{device.name} is left out: {error}", highlight=False)
            done += 1
            report(done, len(devices), device.name)

        with ThreadPoolExecutor(max_workers=1 if work.cluster.emulate else max(len(devices), 1)) as pool:
            list(pool.map(ask, devices))
    return found
