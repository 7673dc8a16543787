"""Measured links written into the cluster, so that whoever changes a link changes what plans are priced with."""

from __future__ import annotations

from dataclasses import replace

from ecotone.cluster import Cluster
from ecotone.cost import CostModel
from ecotone.graph import Graph
from ecotone.profile import Profile

__all__ = ["with_measured_links"]


def with_measured_links(graph: Graph, cluster: Cluster, profile: Profile) -> tuple[Cluster, Profile]:
    """The cluster with the profile's links in place of its own, and the profile without them: the same costs."""
    model = CostModel(graph, cluster, profile)
    links = tuple(model.link(k.source, k.target) or k for k in cluster.links)
    return replace(cluster, links=links), replace(profile, links=())
