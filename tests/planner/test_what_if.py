"""Another world priced and solved: against clusters and profiles changed by hand, and text that is not understood."""

from __future__ import annotations

from dataclasses import replace

import pytest
from enumeration import World, random_world

from ecotone.cluster import Cluster
from ecotone.cost import predict
from ecotone.planner import Latency, PlannerError, solve, what_if

pytestmark = pytest.mark.pure

FAST = 12.5e6


@pytest.fixture
def world() -> World:
    """Several devices with links both ways between source and another, and results wanted at the source."""
    for seed in range(200):
        found = random_world(seed)
        ends = {(k.source, k.target) for k in found.cluster.links}
        here = found.cluster.source
        both = [d.name for d in found.cluster.devices if (here, d.name) in ends and (d.name, here) in ends]
        if found.cluster.sink == here and len(found.cluster.devices) > 2 and both:
            return found
    raise AssertionError("no such world")


def neighbour(world: World) -> str:
    here = world.cluster.source
    ends = {(k.source, k.target) for k in world.cluster.links}
    return next(str(d.name) for d in world.cluster.devices if (here, d.name) in ends and (d.name, here) in ends)


def linked(cluster: Cluster, pairs: set[tuple[str, str]], rate: float) -> Cluster:
    links = (replace(k, bandwidth_bytes_per_s=rate) if (k.source, k.target) in pairs else k for k in cluster.links)
    return replace(cluster, links=tuple(links))


@pytest.mark.parametrize("text", ["link={}", "{a}-{b}={}", "{b}-{a}={}", "{a}>{b}={}"])
def test_a_link_of_another_rate(world: World, text: str) -> None:
    here, other = str(world.cluster.source), neighbour(world)
    change = text.replace("{}", "100Mbit/s").format(a=here, b=other)
    every = {(k.source, k.target) for k in world.cluster.links}
    one = {(here, other)} if ">" in text else {(here, other), (other, here)}
    by_hand = linked(world.cluster, every if "link" in text else one, FAST)  # type: ignore[arg-type]
    today = solve(world.graph, world.cluster, world.profile, Latency()).plan
    found = what_if(world.graph, world.cluster, world.profile, today, change, Latency())
    assert found.best is not None
    assert found.today is not None
    assert found.best.value == pytest.approx(solve(world.graph, by_hand, world.profile, Latency()).value)
    assert found.today.latency_s == pytest.approx(predict(today, world.graph, by_hand, world.profile).latency_s)


def test_other_latencies(world: World) -> None:
    by_hand = replace(world.cluster, links=tuple(replace(k, latency_s=0.02) for k in world.cluster.links))
    today = solve(world.graph, world.cluster, world.profile, Latency()).plan
    found = what_if(world.graph, world.cluster, world.profile, today, "latency = 20 ms", Latency())
    assert found.best is not None
    assert found.best.value == pytest.approx(solve(world.graph, by_hand, world.profile, Latency()).value)


def test_a_device_that_takes_longer_computes_and_codes_longer(world: World) -> None:
    here = world.cluster.source
    only = solve(world.graph, world.cluster, world.profile, Latency(), (f"device={here}",))
    found = what_if(world.graph, world.cluster, world.profile, only.plan, f"{here}=3x", Latency(), (f"device={here}",))
    assert found.today is not None
    assert found.today.latency_s == pytest.approx(3 * only.value)


def test_a_device_that_is_gone(world: World) -> None:
    other = neighbour(world)
    over = solve(world.graph, world.cluster, world.profile, Latency(), (f"device={other}",)).plan
    found = what_if(world.graph, world.cluster, world.profile, over, f"{other}=gone", Latency())
    assert found.today is None
    assert found.best is not None
    assert other not in found.best.plan.devices


def test_nothing_left_that_keeps_the_requirement_is_told(world: World) -> None:
    today = solve(world.graph, world.cluster, world.profile, Latency()).plan
    found = what_if(world.graph, world.cluster, world.profile, today, "link=1Mbit/s", Latency(), ("latency=1ns",))
    assert found.best is None
    assert "latency" in found.refusal


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("faster", "write for example link=10Mbit/s"),
        ("link=", "write for example"),
        ("moon=2x", "no device or link 'moon'"),
        ("link=-3Mbit/s", "link=-3Mbit/s"),
        ("link=7Mb", "link=7Mb"),
        ("{here}=0x", "takes twice as long"),
        ("{here}=fast", "takes twice as long"),
        ("{here}=gone", "cannot go"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(world: World, change: str, said: str) -> None:
    today = solve(world.graph, world.cluster, world.profile, Latency()).plan
    with pytest.raises(PlannerError, match=said):
        what_if(world.graph, world.cluster, world.profile, today, change.format(here=world.cluster.source), Latency())
