"""Clusters for the tests of the laboratory, and what they share: why a test is skipped, and waiting on a condition."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.lab import Abilities, abilities

FOUND: Abilities = abilities()
needs_machines = pytest.mark.skipif(not FOUND.has_machines, reason=f"no emulated machines here: {FOUND.missing}")
needs_relay = pytest.mark.skipif(not (FOUND.has_machines and FOUND.tun), reason="no TUN devices here")


def cluster(*links: tuple[str, str, float, float], name: str = "trio", **slowdown: float) -> Cluster:
    """Both directions of every (source, target, bytes per second, latency); the first source is the cluster's."""
    names = list(dict.fromkeys(end for link in links for end in link[:2]))
    devices = tuple(
        Device(name=DeviceId(one), memory_bytes=10**9, slowdown=slowdown.get(one, 1.0), executors=("torch:fp32",))
        for one in names
    )
    both = [
        Link(source=DeviceId(a), target=DeviceId(b), bandwidth_bytes_per_s=rate, latency_s=latency)
        for one, other, rate, latency in links
        for a, b in ((one, other), (other, one))
    ]
    source = DeviceId(names[0])
    return Cluster(name=name, devices=devices, links=tuple(both), source=source, sink=source, emulate=True)


def wait_until(condition: Callable[[], bool], deadline_s: float = 15.0) -> None:
    """Return when `condition` holds; fails the test when it has not by the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.02)
