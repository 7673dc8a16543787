"""A Profile of a model on a cluster: measured here where devices are emulated, sent by the nodes where they are real.

Every emulated device runs on this machine, so one real measurement serves all devices with the same accelerator, threads
and executors, stretched by each one's slowdown. The profile file is reused while its key stays the same: the hash of
model, devices, options, samples, versions and processor. Link rates are not in the key: they never need a new profile.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ecotone import schema
from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.codec import ImageSpec
from ecotone.executors.cache import cache_root, key_of
from ecotone.executors.preparation import cpu_flags
from ecotone.graph import Graph
from ecotone.model import Captured
from ecotone.profile import LinkFit, Profile
from ecotone.profiling.codecs import payloads
from ecotone.profiling.device import profile_device
from ecotone.profiling.job import frontier_values
from ecotone.profiling.measurement import DeviceMeasurement, MeasureOptions, Progress
from ecotone.units import EcotoneError

__all__ = ["default_path", "measure", "profile_key", "software_versions"]

PACKAGES = ("ecotone", "torch", "openvino", "nncf", "onnxruntime")


def software_versions() -> dict[str, str]:
    """Versions that decide what a measurement is worth; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def profile_key(
    graph: Graph,
    cluster: Cluster,
    options: MeasureOptions | None = None,
    samples: Sequence[Sequence[torch.Tensor]] = (),
    measured: Sequence[DeviceMeasurement] = (),
    image: ImageSpec | None = None,
) -> str:
    """Hex hash of all that a profile depends on; links, addresses and power do not belong to it."""
    devices = [(d.name, d.executors, d.accelerator, d.threads, d.kind, d.slowdown) for d in cluster.devices]
    contents = hashlib.sha256()
    for tensor in (t for sample in samples for t in sample):
        contents.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        contents.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return key_of(
        graph.content_hash(), devices, schema.write(options or MeasureOptions()), contents.hexdigest(),
        [m.to_json() for m in measured], image, sorted(software_versions().items()), cpu_flags(),
    )  # fmt: skip


def default_path(key: str) -> Path:
    """Where a profile with this key is kept when the caller names no file."""
    return cache_root() / "profiles" / f"{key}.json"


def measure(
    captured: Captured,
    cluster: Cluster,
    *,
    samples: Sequence[Sequence[torch.Tensor]] = (),
    options: MeasureOptions | None = None,
    measured: Sequence[DeviceMeasurement] = (),
    links: Sequence[LinkFit] = (),
    image: ImageSpec | None = None,
    progress: Progress | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Profile:
    """Everything the planner needs of `captured` on `cluster`.

    `samples`: flat inputs (`captured.flatten_inputs`), real ones where accuracy matters; empty: the capture's examples.
    `measured`: what nodes sent; the other devices must be emulated or alike this machine and are measured here. `links`:
    fits over the real wire. `image`: how pixels became the input, where image codecs may carry it. `path`: the profile's
    file (None: in the cache), reused while its key is equal; with links given those are put into it anew. Raises
    EcotoneError where no executor runs the model on some device.
    """
    options = options or MeasureOptions()
    samples = [tuple(s) for s in (samples or [captured.example_inputs])][: options.max_samples]
    key = profile_key(captured.graph, cluster, options, samples, measured, image)
    target = Path(path) if path is not None else default_path(key)
    known = _reused(target, key)
    if known is not None:
        return replace(known, links=tuple(links)) if links else known
    torch.manual_seed(options.seed)
    cuts = options.cuts_of(captured.graph)
    values = frontier_values(captured, samples, cuts)
    device_measurement = partial(
        profile_device,
        captured,
        cuts=cuts,
        samples=samples,
        options=options,
        progress=progress,
        frontiers=values,
        image=image,
    )
    measurements = _of_devices(cluster, measured, device_measurement)
    profile = Profile(
        graph_hash=captured.graph.content_hash(),
        cluster_name=cluster.name,
        num_blocks=captured.graph.num_blocks,
        cuts=cuts,
        segments=tuple(s for m in measurements for s in m.segments),
        links=tuple(links),
        codecs=tuple(c for m in measurements for c in m.codecs),
        payloads=payloads(captured, samples, cuts, options.codecs, image=image, frontiers=values, progress=progress),
        failures=tuple(f for m in measurements for f in m.failures),
        key=key,
        versions=software_versions(),
        machine=f"{platform.machine()} {cpu_flags()} {os.cpu_count()} cores",
        seed=options.seed,
    )
    schema.write_aside(target, profile.to_json())
    return profile


def _of_devices(
    cluster: Cluster, measured: Sequence[DeviceMeasurement], measure_here: Callable[[Device], DeviceMeasurement]
) -> list[DeviceMeasurement]:
    """What was sent, and for the rest one measurement here for all devices alike, stretched by each one's slowdown."""
    found = {m.device: m for m in measured}
    here: dict[tuple[object, ...], DeviceMeasurement] = {}
    for device in cluster.devices:
        if device.name not in found:
            alike = (device.accelerator, device.threads, device.executors)
            if alike not in here:
                here[alike] = measure_here(_plain(device))
            found[device.name] = here[alike].for_device(device)
    return [found[device.name] for device in cluster.devices]


def _plain(device: Device) -> Device:
    """`device` as this machine really is."""
    return replace(device, name=DeviceId(device.name), slowdown=1.0)


def _reused(path: Path, key: str) -> Profile | None:
    """The profile in `path` if it is whole and has this key; anything else is measured again."""
    try:
        profile = Profile.from_json(path.read_bytes(), str(path))
    except (OSError, EcotoneError):
        return None
    return profile if profile.key == key else None
