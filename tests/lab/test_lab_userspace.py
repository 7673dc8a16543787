"""Without root the same verbs act on processes with shaped wires; what differs is said."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from lab_worlds import cluster, wait_until

from ecotone.lab import LabError, Laboratory
from ecotone.linktrace import LinkPoint, LinkTrace
from ecotone.protocol.message import NodeId
from ecotone.runtime import Nodes

pytestmark = pytest.mark.loopback

LATENCY_S = 0.004


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    world = cluster(("home", "edge", 1e7, LATENCY_S), ("home", "cloud", 1e7, LATENCY_S), edge=2.0)
    with Laboratory(world, fabric="user") as one:
        yield one


@pytest.fixture(scope="module")
def asker(laboratory: Laboratory) -> Nodes:
    return laboratory.nodes()


def trip_s(nodes: Nodes, device: str, deadline_s: float = 5.0) -> float:
    return nodes.questions.ask_timed(NodeId(device), "echo", deadline_s=deadline_s)[1]


def reaches(nodes: Nodes, device: str) -> bool:
    with contextlib.suppress(Exception):
        return trip_s(nodes, device, 0.5) > 0
    return False


def test_what_differs_is_said(laboratory: Laboratory) -> None:
    told = laboratory.status()
    assert told["fabric"] == "user"
    assert any("loopback without TLS" in remark for remark in told["remarks"])
    assert laboratory.state.machine("edge").process is not None


def test_links_have_their_latency_and_verbs_change_it(laboratory: Laboratory, asker: Nodes) -> None:
    assert min(trip_s(asker, "edge") for _ in range(5)) >= 2 * LATENCY_S
    laboratory.link("home", "edge", latency_s=0.05)
    assert min(trip_s(asker, "edge") for _ in range(3)) >= 0.1
    laboratory.link("home", "edge", latency_s=LATENCY_S)
    wait_until(lambda: trip_s(asker, "edge") < 0.05)


@pytest.mark.parametrize("ends", [("home", "edge"), ("edge", "home")])
def test_a_one_way_cut_and_its_heal(laboratory: Laboratory, asker: Nodes, ends: tuple[str, str]) -> None:
    wait_until(lambda: reaches(asker, "edge"))
    laboratory.cut(*ends, one_way=True)
    assert not reaches(asker, "edge")
    assert reaches(asker, "cloud")
    laboratory.heal()
    wait_until(lambda: reaches(asker, "edge"))


def test_kill_and_restart_stop_and_cont(laboratory: Laboratory, asker: Nodes) -> None:
    laboratory.kill("cloud")
    assert next(m["state"] for m in laboratory.status()["machines"] if m["device"] == "cloud").startswith("ended")
    assert not reaches(asker, "cloud")
    laboratory.restart("cloud")
    wait_until(lambda: reaches(asker, "cloud"))
    laboratory.stop("cloud")
    assert not reaches(asker, "cloud")
    laboratory.cont("cloud")
    wait_until(lambda: reaches(asker, "cloud"))
    with pytest.raises(LabError, match="set slowdown in the file"):
        laboratory.slow("cloud", 3)


def test_the_links_of_the_asker_follow_traces_too(laboratory: Laboratory, asker: Nodes) -> None:
    points = (
        LinkPoint(time_s=0, bytes_per_s=1e7, latency_s=0.001),
        LinkPoint(time_s=1, bytes_per_s=1e7, latency_s=0.05),
    )
    laboratory.trace("home", "edge", LinkTrace(name="steps", points=points, duration_s=600.0), one_way=True)
    wait_until(lambda: trip_s(asker, "edge") >= 0.05)
    laboratory.trace("home", "edge", None, one_way=True)
