"""Measured links written into the cluster, so that whoever changes a link changes what plans are priced with."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from ecotone.cluster import Cluster, KindLink, Link
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.profile import Profile

__all__ = ["with_measured_links"]

L = TypeVar("L", Link, KindLink)


def with_measured_links(graph: Graph, cluster: Cluster, profile: Profile) -> tuple[Cluster, Profile]:
    """The cluster with the profile's links in place of its own, and the profile without them: the same costs."""
    model = CostModel(graph, cluster, profile)
    links = tuple(_like(k, model.link(k.source, k.target)) for k in cluster.links)
    first, other = {d.kind: d.name for d in reversed(cluster.devices)}, {d.kind: d.name for d in cluster.devices}
    kinds = tuple(_like(k, model.link(first[k.source_kind], other[k.target_kind])) for k in cluster.kind_links)
    return replace(cluster, links=links, kind_links=kinds), replace(profile, links=())


def _like(stated: L, measured: Link | None) -> L:
    """The stated link with latency and rate as measured."""
    if measured is None:
        return stated
    return replace(
        stated, latency_s=measured.latency_s, bandwidth_bytes_per_s=measured.bandwidth_bytes_per_s
    )  # fmt: skip
