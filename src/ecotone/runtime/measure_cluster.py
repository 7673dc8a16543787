"""Measuring a cluster: emulated devices here once, real ones by asking them, links over the wire that will carry the tensors.

A link is timed by questions padded to several sizes whose answers are empty: half of an empty question's round trip is the
way back, the rest the way there. Links between two other nodes are timed by the node at their sending end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from ecotone import profiling
from ecotone.cluster import Cluster, Link
from ecotone.model import Captured
from ecotone.profile import LinkFit, Profile
from ecotone.profiling import LinkSample, MeasureOptions, Progress
from ecotone.protocol.message import NodeId, Priority
from ecotone.runtime.launch import Nodes, attach
from ecotone.runtime.questions import Questions
from ecotone.schema import read, write

__all__ = ["measure", "measure_link", "measure_links"]

_ROUNDS = 5
_GUESS_BYTES_PER_S = 2e6


def measure(
    captured: Captured,
    nodes: Nodes | Cluster,
    *,
    samples: Sequence[Sequence[torch.Tensor]] = (),
    options: MeasureOptions | None = None,
    progress: Progress | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Profile:
    """A profile of `captured` on a cluster. Emulated: measured here and stretched, links as stated. Real: nodes are asked.

    A real Cluster is attached to for the while. See ecotone.profiling.measure for `samples`, `options` and `path`. Raises
    NodeUnreachable or EcotoneError in bounded time.
    """
    if isinstance(nodes, Cluster):
        if nodes.emulate or len(nodes.devices) == 1:
            return profiling.measure(captured, nodes, samples=samples, options=options, progress=progress, path=path)
        with attach(nodes) as attached:
            return measure(captured, attached, samples=samples, options=options, progress=progress, path=path)
    cluster = nodes.cluster
    links = () if cluster.emulate else measure_links(nodes, progress)
    return profiling.measure(
        captured, cluster, samples=samples, options=options, links=links, progress=progress, path=path
    )


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


def measure_link(questions: Questions, link: Link) -> LinkFit:
    """Time `link`, which leaves this node; sizes follow its stated rate, so that a slow link takes seconds, not minutes."""
    peer = NodeId(link.target)
    empty = sorted(_round_trip(questions, peer, 0) for _ in range(2 * _ROUNDS))[_ROUNDS]
    back = empty / 2
    sizes = profiling.probe_sizes(min(link.bandwidth_bytes_per_s, 1e9) or _GUESS_BYTES_PER_S)
    samples = [
        LinkSample(size_bytes=size, seconds=max(1e-6, _round_trip(questions, peer, size) - back))
        for _ in range(_ROUNDS)
        for size in sizes
    ]
    return profiling.fit_link(link.source, link.target, samples)


def _round_trip(questions: Questions, peer: NodeId, size_bytes: int) -> float:
    priority = Priority.DATA if size_bytes else Priority.CONTROL
    _, seconds = questions.ask_timed(
        peer, "echo", padding=bytes(size_bytes), priority=priority, deadline_s=60.0, repeat_s=60.0
    )
    return seconds
