"""What the planner says of a failure beside what the machines of the protocol do on the virtual clock.

A request is under way when the server dies or its link is cut, at moments spread over the request. The planner's figures
are upper ones by the few milliseconds that it allows for rerouting, which the simulator does in no time.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_failover_choice import three

from ecotone.cluster import DeviceId
from ecotone.planner import Detection, FailoverSolution, choose
from ecotone.protocol import suspicion
from ecotone.simulator import CutLink, KillNode, simulate

pytestmark = pytest.mark.pure

HIT = 3  # the request that meets the failure
MOMENTS = 15
SMALL_S = 2e-3  # letters and acknowledgements that the cost model leaves out


def chosen(kind: str) -> FailoverSolution:
    world = three()
    return choose(
        world.graph, world.cluster, world.profile, topologies=frozenset({kind}), max_standbys=1, separate_uplinks=True
    )


def answered_after(found: FailoverSolution, fault: str) -> tuple[list[float], list[float]]:
    """Seconds from the failure to the result of the request that it hits, and of that request's whole life."""
    world = three()
    problem = (world.graph, world.cluster, world.profile)
    usual = simulate(found.planset, *problem, requests=5).p50_s
    after, took = [], []
    for moment in (np.arange(MOMENTS) + 0.5) / MOMENTS:
        at_s = (HIT + float(moment)) * usual
        edge, camera = DeviceId("edge1"), DeviceId("camera")
        kill = KillNode(at_s=at_s, device=edge, detect_s=Detection().crash_s)
        cut = CutLink(at_s=at_s, source=camera, target=edge, detect_s=60.0)
        report = simulate(found.planset, *problem, requests=8, script=(kill if fault == "kill" else cut,))
        assert len(report.completed) == 8
        outcome = report.outcomes[HIT]
        after.append(outcome.ended_s - at_s)
        took.append(outcome.ended_s - outcome.submitted_s)
    return after, took


@pytest.mark.parametrize("kind", ["local", "passive", "active"])
@pytest.mark.parametrize(("fault", "element"), [("kill", "edge1"), ("cut", "camera - edge1")])
def test_the_time_to_recover(kind: str, fault: str, element: str) -> None:
    found = chosen(kind)
    assert found.topology == kind
    stated = next(e.recover_s for e in found.effects if e.element == element)
    after, _ = answered_after(found, fault)
    assert stated is not None
    assert max(after) <= stated + SMALL_S
    assert max(after) >= stated - Detection().reroute_s - 0.1 * found.value_s - SMALL_S


@pytest.mark.parametrize("kind", ["local", "passive", "active"])
def test_the_cost_while_nothing_fails(kind: str) -> None:
    world, found = three(), chosen(kind)
    report = simulate(found.planset, world.graph, world.cluster, world.profile, requests=10)
    assert report.mean_s == pytest.approx(found.value_s, abs=SMALL_S / 2)


def test_patience_is_the_coordinators() -> None:
    assert Detection().margin == suspicion._MARGIN
