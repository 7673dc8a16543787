"""Measuring a cluster: emulated devices here once, real ones by asking them, links over the wire of the tensors.

Links between two other nodes are timed by the node at their sending end. `discover` finds the nodes that run already.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import torch

from ecotone import profiling
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.codec import ImageSpec, LearnedCodec, holding
from ecotone.model import Captured
from ecotone.plan import Plan, Stage, Transfer
from ecotone.profile import LinkFit, Profile
from ecotone.profiling import AccuracyOptions, DeviceMeasurement, MeasureOptions, Progress, Samples
from ecotone.profiling.device import before_exits
from ecotone.protocol.message import NodeId
from ecotone.runtime.deployment import deploy
from ecotone.runtime.launch import Nodes, attach
from ecotone.runtime.probe import measure_link
from ecotone.runtime.stages import Piece
from ecotone.schema import read, write
from ecotone.trust.identity import Identity
from ecotone.units import EcotoneError

__all__ = ["discover", "measure", "measure_links"]

_GUESS_BYTES_PER_S, _GUESS_LATENCY_S = 2e6, 0.001
_WAIT_S = 2.0
_PROFILE_S = 1800.0


def measure(
    captured: Captured,
    nodes: Nodes | Cluster,
    *,
    samples: Samples = (),
    labels: Any = None,
    options: MeasureOptions | None = None,
    table: AccuracyOptions | None = None,
    image: ImageSpec | None = None,
    bottlenecks: Sequence[LearnedCodec] = (),
    progress: Progress | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Profile:
    """A profile of `captured` on a cluster. Emulated: measured here and stretched, links as stated. Real: nodes are asked.

    A real Cluster is attached to for the while. `bottlenecks`: learned codecs to measure beside the others, at their cuts.
    See ecotone.profiling.measure for `samples`, `labels`, `options`, `table`, `image` and `path`. Raises NodeUnreachable
    or EcotoneError in bounded time.
    """
    options = options or MeasureOptions()
    if bottlenecks:
        ids = [made.id for made in bottlenecks]
        options = replace(options, codecs=tuple(dict.fromkeys((*profiling.codec_ids(options.codecs), *ids))))
    given = partial(
        profiling.measure, captured, samples=samples, labels=labels, options=options, table=table, image=image,
        progress=progress, path=path,
    )  # fmt: skip
    few = [tuple(s) for s in itertools.islice(iter(samples), options.max_samples)] or [captured.example_inputs]

    def real(attached: Nodes) -> Profile:
        links = measure_links(attached, progress)
        others = [d for d in attached.cluster.devices if d.name != attached.cluster.source]
        asked = partial(_ask_node, captured, attached, samples=few, options=options, image=image, progress=progress)
        return given(attached.cluster, measured=[asked(d, bottlenecks=bottlenecks) for d in others], links=links)

    with holding(bottlenecks):
        cluster = nodes if isinstance(nodes, Cluster) else nodes.cluster
        if cluster.emulate or (isinstance(nodes, Cluster) and len(cluster.devices) == 1):
            return given(cluster)
        if isinstance(nodes, Nodes):
            return real(nodes)
        with attach(nodes) as attached:
            return real(attached)


def _ask_node(
    captured: Captured,
    nodes: Nodes,
    device: Device,
    samples: Sequence[Sequence[torch.Tensor]],
    options: MeasureOptions,
    image: ImageSpec | None,
    bottlenecks: Sequence[LearnedCodec],
    progress: Progress | None,
) -> DeviceMeasurement:
    """Send the model in pieces to a real node and let it measure them on itself."""
    graph, learned = captured.graph, profiling.learned_positions(options.codecs)
    cuts = options.cuts_of(graph, learned)
    length, source = graph.num_blocks, nodes.cluster.source
    pieces: set[Piece] = {(0, length), *itertools.pairwise(cuts)}
    pieces |= {span for cut in cuts[1:-1] for span in ((0, cut), (cut, length))}
    pieces |= {(start, place.position, place.name) for place, start in before_exits(graph, cuts)}
    whole = Plan(
        graph_hash=graph.content_hash(),
        stages=(Stage(device=device.name, start=0, stop=length),),
        transfers=(
            Transfer(source=source, target=device.name, position=0),
            Transfer(source=device.name, target=source, position=length),
        ),
    )

    def tell(peer: NodeId, body: dict[str, Any]) -> None:
        if progress and str(peer) == device.name:
            progress(int(body["done"]), int(body["total"]), f"{peer}: {body['what']}")

    nodes.questions.on("progress", tell)
    try:
        with deploy(
            whole, captured, nodes, samples=samples, pieces=sorted(pieces), timeout_s=_PROFILE_S, bottlenecks=bottlenecks
        ) as session:
            body = {
                "session": session.number, "epoch": session.plan.epoch, "graph": write(graph), "cuts": cuts,
                "options": write(options), "executors": device.executors,
                "image": None if image is None else write(image),
            }  # fmt: skip
            answer = nodes.questions.ask(NodeId(device.name), "profile", body, deadline_s=_PROFILE_S, repeat_s=10.0)
    finally:
        nodes.questions.on("progress", None)
    return DeviceMeasurement.from_json(answer, f"node {device.name}")


def measure_links(nodes: Nodes, progress: Progress | None = None) -> tuple[LinkFit, ...]:
    """Latency and bandwidth of every link of the cluster, measured over the wire in both directions of use."""
    fits = []
    links = nodes.cluster.links
    for index, link in enumerate(links):
        if progress:
            progress(index, len(links), f"link {link.source}>{link.target}")
        if link.source == nodes.cluster.source:
            fits.append(measure_link(nodes.questions, link))
        else:
            answer = nodes.questions.ask(NodeId(link.source), "link", {"link": write(link)}, deadline_s=120.0, repeat_s=5.0)
            fits.append(read(LinkFit, answer, f"link {link.source}>{link.target}"))
    return tuple(fits)


def discover(
    *,
    source: Device | None = None,
    connect: Sequence[str] = (),
    identity: Identity | None = None,
    name: str = "local",
    wait_s: float = _WAIT_S,
    progress: Progress | None = None,
) -> Cluster:
    """The cluster of nodes that run now (`ecotone up`), their links measured, this machine as source and sink.

    Members of a cluster (`identity`) find each other by multicast; otherwise give the addresses in `connect`. Waits `wait_s`
    for nodes to show. Raises EcotoneError where none does, WireError where an address does not answer.
    """
    here = source or Device(name=DeviceId("here"), memory_bytes=_memory_bytes())
    alone = Cluster(name=name, devices=(here,), links=(), source=here.name, sink=here.name)
    with attach(alone, identity=identity, multicast=identity is not None, connect=tuple(connect)) as nodes:
        threading.Event().wait(wait_s)  # who answers within this time is there
        peers = sorted(nodes.port.peers())
        if not peers:
            raise EcotoneError(f"no node of cluster {name} answers; start one (ecotone up), or give addresses to connect to")
        asked = {peer: nodes.questions.ask(peer, "device") for peer in peers}
        devices = (here, *(read(Device, answer, f"node {peer}") for peer, answer in asked.items()))
        links = tuple(
            Link(source=a.name, target=b.name, latency_s=_GUESS_LATENCY_S, bandwidth_bytes_per_s=_GUESS_BYTES_PER_S)
            for a in devices
            for b in devices
            if a.name != b.name
        )
        found = nodes.cluster = Cluster(name=name, devices=devices, links=links, source=here.name, sink=here.name)
        for fit in measure_links(nodes, progress):
            latency_s, rate = fit.latency_s, fit.bandwidth_bytes_per_s
            found = found.with_link(
                Link(source=fit.source, target=fit.target, latency_s=latency_s, bandwidth_bytes_per_s=rate)
            )
        return found


def _memory_bytes() -> int:
    return int(psutil.virtual_memory().total)
