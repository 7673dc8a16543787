"""What split_latency and sim_vs_run share: models on real photographs, emulated nodes that stay, profiles, measured runs.

The end device is the slow one (its slowdown stretches each execution); the server is this computer as it is. Node processes
stay up while models, plans and link rates change; links are unlimited while a plan is deployed and get the cell's rate to
be measured.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.models import MODELS
from ecotone import profiling
from ecotone.cli.demo_model import frame_paths, read_frame
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.codec import ImageSpec
from ecotone.model import Captured, capture
from ecotone.plan import Plan
from ecotone.profile import Profile
from ecotone.runtime import Nodes, RequestTrace, Session, deploy

Sample = tuple[torch.Tensor, ...]

MEMORY_BYTES = 8 << 30
UNLIMITED_BYTES_PER_S = 1e11
IMAGE = ImageSpec(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True, slots=True)
class Measured:
    """One plan in one cell: seconds from hand-in to result, and the bound of each of those requests."""

    latencies_s: tuple[float, ...]
    bounds_s: tuple[float, ...]

    @property
    def latency_s(self) -> float:
        return statistics.median(self.latencies_s)

    @property
    def over_bound(self) -> float:
        return statistics.median(a / b for a, b in zip(self.latencies_s, self.bounds_s, strict=True))


def photographs(count: int) -> list[Sample]:
    """Flat inputs: the shipped frames (mosaics of CIFAR-10 photographs), normalised as image networks expect."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE.mean, IMAGE.std))
    return [((read_frame(path) - mean) / std,) for path in frame_paths()[:count]]


def captured_model(name: str, samples: Sequence[Sample]) -> Captured:
    """`name` of benchmarks.models, captured at 1x3x224x224."""
    module, _ = MODELS[name]()
    return capture(module, samples[0], name=name)


def star(names: Sequence[str], slowdowns: Sequence[float], bytes_per_s: float, latency_s: float) -> Cluster:
    """An emulated cluster: the first name is source and sink; all pairs are linked alike; one thread each."""
    ids = [DeviceId(name) for name in names]
    devices = tuple(
        Device(name=name, memory_bytes=MEMORY_BYTES, slowdown=slowdown)
        for name, slowdown in zip(ids, slowdowns, strict=True)
    )
    links = tuple(
        Link(source=a, target=b, latency_s=latency_s, bandwidth_bytes_per_s=bytes_per_s) for a in ids for b in ids if a != b
    )
    return Cluster(name="benchmark", emulate=True, devices=devices, links=links, source=ids[0], sink=ids[0])


def with_rate(cluster: Cluster, bytes_per_s: float) -> Cluster:
    """The same cluster with every link at this rate."""
    return replace(cluster, links=tuple(replace(k, bandwidth_bytes_per_s=bytes_per_s) for k in cluster.links))


def stretched(profile: Profile, slowdowns: dict[str, float]) -> Profile:
    """A profile measured at slowdown 1, as of devices that much slower: what profiling does for emulated devices."""

    def factor(device: str) -> float:
        return slowdowns.get(device, 1.0)

    segments = tuple(
        replace(s, median_s=s.median_s * factor(s.device), spread_s=s.spread_s * factor(s.device)) for s in profile.segments
    )
    costs = tuple(
        replace(
            c,
            encode_fixed_s=c.encode_fixed_s * factor(c.device),
            encode_s_per_raw_byte=c.encode_s_per_raw_byte * factor(c.device),
            decode_fixed_s=c.decode_fixed_s * factor(c.device),
            decode_s_per_raw_byte=c.decode_s_per_raw_byte * factor(c.device),
        )
        for c in profile.codecs
    )
    return replace(profile, segments=segments, codecs=costs)


def profile_of(
    captured: Captured,
    cluster: Cluster,
    samples: Sequence[Sample],
    executor: str,
    codecs: tuple[str, ...],
    quick: bool,
    max_cuts: int = 20,
) -> Profile:
    """A fresh profile at slowdown 1; nothing is taken from an earlier run."""
    options = profiling.MeasureOptions(
        executors=(executor,), codecs=codecs, keep=1, max_cuts=min(8, max_cuts) if quick else max_cuts,
        rounds=5 if quick else 11, max_samples=2 if quick else 3,
    )  # fmt: skip
    plain = replace(cluster, devices=tuple(replace(d, slowdown=1.0) for d in cluster.devices))
    with _no_file() as path:
        return profiling.measure(captured, plain, samples=samples, options=options, image=IMAGE, path=path)


def mean_profile(one: Profile, other: Profile) -> Profile:
    """Two profiles of the same things as one: the mean of each time."""
    later = {(s.device, s.executor, s.start, s.stop): s for s in other.segments}
    segments = []
    for s in one.segments:
        twin = later[s.device, s.executor, s.start, s.stop]
        segments.append(replace(s, median_s=(s.median_s + twin.median_s) / 2, spread_s=(s.spread_s + twin.spread_s) / 2))
    codecs = []
    for c, d in zip(one.codecs, other.codecs, strict=True):
        assert (c.device, c.codec) == (d.device, d.codec)
        names = ("encode_fixed_s", "encode_s_per_raw_byte", "decode_fixed_s", "decode_s_per_raw_byte")
        codecs.append(replace(c, **{n: (getattr(c, n) + getattr(d, n)) / 2 for n in names}))
    return replace(one, segments=tuple(segments), codecs=tuple(codecs))


def steady_rate(ends: Sequence[float], in_flight: int) -> float:
    """Results per second between their ends, the filling and draining of `in_flight` requests left out."""
    kept = sorted(ends)[in_flight:-in_flight]
    return (len(kept) - 1) / (kept[-1] - kept[0])


def bound_s(trace: RequestTrace, plan: Plan, cluster: Cluster) -> float:
    """Measured compute, encode and decode of this very request, plus bytes / rate plus latency of its links."""
    total = sum(stage.compute_s for stage in trace.stages)
    if len(trace.stages) != len(plan.stages) or len(trace.transfers) != sum(not t.is_local for t in plan.transfers):
        return math.nan
    for transfer in trace.transfers:
        link = cluster.link(transfer.source, transfer.target)
        assert link is not None
        total += transfer.encode_s + transfer.decode_s + link.transfer_s(transfer.size_bytes)
    return total


class Bench:
    """Runs plans of one model on nodes that stay up; `enter` opens the session of a model and a set of slowdowns."""

    def __init__(self, nodes: Nodes, latency_s: float, image: ImageSpec = IMAGE):
        self.nodes, self.latency_s, self.image = nodes, latency_s, image
        self._plan = ""
        self._first = 0  # request whose trace was not asked for yet
        self.session: Session | None = None

    def open(self, captured: Captured, cluster: Cluster, plan: Plan, samples: Sequence[Sample]) -> None:
        """A session of `captured` with the slowdowns of `cluster`, starting with `plan`."""
        self.close()
        self.nodes.cluster = replace(self.nodes.cluster, devices=cluster.devices)
        self._unlimited()
        self.session = deploy(
            plan, captured, self.nodes, samples=samples, timeout_s=180.0, max_in_flight=8, image=self.image
        )
        self._plan, self._first = plan.identity(), 0

    def close(self) -> None:
        if self.session is not None:
            self._unlimited()
            self.session.close()
            self.session = None

    def run(self, plan: Plan, cluster: Cluster, samples: Sequence[Sample]) -> Measured:
        """One request after another at the rates of `cluster`; the first two (one before a single one) are not counted."""
        session = self._ready(plan, cluster)
        for sample in [*samples[:2], *samples]:
            session.submit(sample).result(120.0)
        traces = self._traces(session)[-len(samples) :]
        bounds = tuple(bound_s(trace, session.plan, cluster) for trace in traces)
        return Measured(tuple(trace.total_s for trace in traces), bounds)

    def stream_rate(self, plan: Plan, cluster: Cluster, items: Iterable[Sample], in_flight: int) -> float:
        """Results per second of a stream with `in_flight` requests under way, its filling and draining left out."""
        return self.streamed(plan, cluster, items, in_flight)[0]

    def streamed(
        self, plan: Plan, cluster: Cluster, items: Iterable[Sample], in_flight: int
    ) -> tuple[float, list[Any], list[RequestTrace]]:
        """The same with what came out, in order, and the traces."""
        session = self._ready(plan, cluster)
        found = list(session.stream(items, in_flight=in_flight))
        traces = list(self._traces(session)[-len(found) :])
        return steady_rate([t.submitted_s + t.total_s for t in traces], in_flight), found, traces

    def _traces(self, session: Session) -> tuple[RequestTrace, ...]:
        """Of the requests since the last call."""
        traces = session.report(self._first)
        self._first = max((trace.request for trace in traces), default=self._first - 1) + 1
        return traces

    def _ready(self, plan: Plan, cluster: Cluster) -> Session:
        assert self.session is not None
        if plan.identity() != self._plan:
            self._unlimited()
            self.session.replan(plan)
            self._plan = plan.identity()
        self.nodes.set_links(cluster.links)
        return self.session

    def _unlimited(self) -> None:
        self.nodes.set_links(
            tuple(replace(k, bandwidth_bytes_per_s=UNLIMITED_BYTES_PER_S, latency_s=0.0) for k in self.nodes.cluster.links)
        )


@contextmanager
def _no_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ecotone-bench-") as folder:
        yield f"{folder}/profile.json"
