"""A Profile of a model on a cluster: measured here where devices are emulated, sent by the nodes where they are real.

Every emulated device runs on this machine, so one real measurement serves all devices with the same accelerator, threads
and executors, stretched by each one's slowdown. The profile file is reused while its key stays the same: the hash of
model, devices, options, samples, versions and processor. Link rates are not in the key: they never need a new profile.
Times need few samples, accuracy all of them: the first `max_samples` are timed and are in the key; the accuracy table is
made of all, has a key and a file of its own, and is put into the profile anew where only it has changed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ecotone import schema
from ecotone.accuracy import AccuracyTable
from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.codec import ImageSpec
from ecotone.executors.cache import cache_root, key_of
from ecotone.executors.preparation import cpu_flags
from ecotone.graph import Graph
from ecotone.model import Captured
from ecotone.profile import LinkFit, Profile
from ecotone.profiling.accuracy import setup_of, tabulate
from ecotone.profiling.cells import Calibration
from ecotone.profiling.codecs import learned_positions, payloads
from ecotone.profiling.decisions import decides
from ecotone.profiling.device import profile_device
from ecotone.profiling.job import frontier_values
from ecotone.profiling.labels import Labels
from ecotone.profiling.measurement import AccuracyOptions, DeviceMeasurement, MeasureOptions, Progress
from ecotone.profiling.samples import FirstOf, Samples, contents_hash, require_sized
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
    samples_hash: str = "",
) -> str:
    """Hex hash of all that a profile depends on; links, addresses and power do not belong to it.

    `samples_hash`: the content hash of samples that are not at hand.
    """
    devices = [(d.name, d.executors, d.accelerator, d.threads, d.kind, d.slowdown) for d in cluster.devices]
    return key_of(
        graph.content_hash(), devices, schema.write(options or MeasureOptions()), samples_hash or contents_hash(samples),
        [m.to_json() for m in measured], image, sorted(software_versions().items()), cpu_flags(),
    )  # fmt: skip


def default_path(key: str) -> Path:
    """Where a profile with this key is kept when the caller names no file."""
    return cache_root() / "profiles" / f"{key}.json"


def measure(
    captured: Captured,
    cluster: Cluster,
    *,
    samples: Samples = (),
    labels: Any = None,
    options: MeasureOptions | None = None,
    table: AccuracyOptions | None = None,
    measured: Sequence[DeviceMeasurement] = (),
    links: Sequence[LinkFit] = (),
    image: ImageSpec | None = None,
    progress: Progress | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Profile:
    """Everything the planner needs of `captured` on `cluster`.

    `samples`: flat inputs (`captured.flatten_inputs`), real ones where accuracy matters, as many as there are; `labels`: one
    for each (see measure_accuracy); `table`: what else its table holds. Without samples: the capture's examples, and no
    table but the one given. `measured`: what nodes sent; the other devices must be emulated or alike this machine and are
    measured here. `links`: fits over the real wire. `image`: how pixels became the input, where image codecs may carry it.
    `path`: the profile's file (None: in the cache), reused while its key is equal (without samples: that of whatever
    samples it has); with links given those are put into it anew. Raises EcotoneError where no executor runs the model on
    some device, or labels do not fit.
    """
    require_sized(samples)
    options = options or MeasureOptions()
    few = [tuple(s) for s in islice(iter(samples), options.max_samples)] or [captured.example_inputs]
    key_of_samples = partial(profile_key, captured.graph, cluster, options, measured=measured, image=image)
    key, table = key_of_samples(few), table or AccuracyOptions()
    target = Path(path) if path is not None else default_path(key)
    cuts = options.cuts_of(captured.graph, learned_positions(options.codecs))
    calibration = _calibration(captured, cuts, samples, labels, options, table, image, progress)
    known = _reused(target, lambda found: key if len(samples) else key_of_samples(samples_hash=found.samples_hash), key)
    if known is None:
        calibration = calibration or (None if len(samples) else _kept(target, captured.graph, cuts))
        profile = _timed(captured, cluster, cuts, few, options, measured, calibration, image, progress)
        profile = replace(profile, key=key, links=tuple(links))
    elif calibration and (known.accuracy is None or known.accuracy.key != calibration.table.key):
        profile = replace(known, accuracy=calibration.table, payloads=calibration.payloads)
    else:
        profile = known
    if calibration is None and table.given is not None and not _covers(profile.accuracy, table.given):
        profile = replace(profile, accuracy=table.given)
    if profile is not known:
        schema.write_aside(target, profile.to_json())
    return replace(profile, links=tuple(links)) if links else profile


def _timed(
    captured: Captured,
    cluster: Cluster,
    cuts: tuple[int, ...],
    samples: list[tuple[torch.Tensor, ...]],
    options: MeasureOptions,
    measured: Sequence[DeviceMeasurement],
    calibration: Calibration | None,
    image: ImageSpec | None,
    progress: Progress | None,
) -> Profile:
    """A profile made anew, but for its key and links: all devices on `samples`, payloads where no calibration has them."""
    torch.manual_seed(options.seed)
    values = frontier_values(captured, samples, cuts)
    here = partial(
        profile_device, captured, cuts=cuts, samples=samples, options=options, progress=progress, frontiers=values,
        image=image,
    )  # fmt: skip
    measurements = _of_devices(cluster, measured, here)
    sizes = calibration.payloads if calibration else payloads(
        captured, samples, cuts, options.codecs, image=image, frontiers=values, progress=progress
    )  # fmt: skip
    return Profile(
        graph_hash=captured.graph.content_hash(), cluster_name=cluster.name, num_blocks=captured.graph.num_blocks,
        cuts=cuts, segments=tuple(s for m in measurements for s in m.segments),
        codecs=tuple(c for m in measurements for c in m.codecs), payloads=sizes,
        failures=tuple(f for m in measurements for f in m.failures),
        exits=tuple(e for m in measurements for e in m.exits),
        accuracy=calibration.table if calibration else None, samples_hash=contents_hash(samples),
        versions=software_versions(), machine=f"{platform.machine()} {cpu_flags()} {os.cpu_count()} cores",
        seed=options.seed,
    )  # fmt: skip


def _calibration(
    captured: Captured,
    cuts: tuple[int, ...],
    samples: Samples,
    labels: Any,
    options: MeasureOptions,
    asked: AccuracyOptions,
    image: ImageSpec | None,
    progress: Progress | None,
) -> Calibration | None:
    """The accuracy table and payloads on the samples; None without samples, or where the model decides nothing."""
    count = len(samples) if asked.limit is None else min(asked.limit, len(samples))
    if labels is not None and not count:
        raise EcotoneError("labels: there are no samples that they are for; give --samples, or samples=, as well")
    if not count or (labels is None and not decides(captured.graph)):
        return None
    setup = setup_of(
        captured, cuts, options.codecs, policies=asked.policies, exits=asked.exits, variants=asked.variants, image=image,
        confidence=asked.confidence,
    )  # fmt: skip
    if labels is not None and count < len(samples):
        Labels(labels, samples, asked.names)  # their number is checked before some are left out
        labels = labels[:count]
    return tabulate(setup, FirstOf(samples, count), labels, names=asked.names, progress=progress)


def _covers(table: AccuracyTable | None, given: AccuracyTable) -> bool:
    """Whether `table` was measured, crossings and all, with every policy of `given`, at the same thresholds."""
    if table is None or not table.cells:
        return False
    return {(p.name, p.exits, p.thresholds) for p in given.policies} <= {
        (p.name, p.exits, p.thresholds) for p in table.policies
    }


def _kept(path: Path, graph: Graph, cuts: tuple[int, ...]) -> Calibration | None:
    """What the profile that is in `path` now says of accuracy: it holds on whatever devices, so it is not lost with them."""
    try:
        former = Profile.from_json(path.read_bytes(), str(path))
    except (OSError, EcotoneError):
        return None
    if former.accuracy is None or former.cuts != cuts or former.graph_hash != graph.content_hash():
        return None
    return Calibration(table=former.accuracy, payloads=former.payloads)


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


def _reused(path: Path, key_of_found: Callable[[Profile], str], key: str) -> Profile | None:
    """The profile in `path` if it is whole and has one of these keys; anything else is measured again."""
    try:
        profile = Profile.from_json(path.read_bytes(), str(path))
    except (OSError, EcotoneError):
        return None
    return profile if profile.key in (key, key_of_found(profile)) else None
