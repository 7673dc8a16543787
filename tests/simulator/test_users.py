"""Many users in one world: alone as simulate() has it, shares of wires, radio against the slotted cell, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from many import cell_of, closed_users, ends, offloading, open_users, seconds_of, star
from worlds import FRONTIER_BYTES

from ecotone.cluster import DeviceId
from ecotone.media import Tuning
from ecotone.offload import OffloadProfile
from ecotone.protocol.settings import WorkerSettings
from ecotone.simulator import ClosedLoop, Periodic, simulate, simulate_users
from ecotone.simulator.cell import Cell
from ecotone.units import EcotoneError
from ecotone.workload import User, Workload

pytestmark = pytest.mark.pure


def plans_of(graph, count: int, cut: int = 1):
    return {str(u): offloading(graph, u, cut) for u in ends(count)}


@pytest.mark.parametrize(("user", "arrivals"), [({"in_flight": 3}, ClosedLoop(in_flight=3)), ({"rate_per_s": 20.0}, None)])
def test_one_user_alone_fares_as_in_a_simulation_of_one_plan(user: dict[str, float], arrivals: ClosedLoop | None) -> None:
    """But for control frames: periodic users begin out of step, so reports fall elsewhere between their requests."""
    graph, cluster = star(1)
    profile, source = seconds_of(graph, 1, (0.005, 0.1), (0.005, 0.02)), DeviceId("u0")
    workload = Workload(name="w", users=(User(name="u0", source=source, arrivals="periodic", **user),))  # type: ignore[arg-type]
    many = simulate_users(workload, plans_of(graph, 1), cluster, [(graph, profile)], duration_s=2.0, warm_up_s=0.0)
    found = many.users["u0"]
    one = simulate(
        offloading(graph, "u0", 1), graph, cluster, profile, requests=len(found.outcomes),
        arrivals=arrivals or Periodic(period_s=0.05), ordered=False,
    )  # fmt: skip
    assert [o.latency_s for o in found.outcomes] == pytest.approx([o.latency_s for o in one.outcomes], rel=5e-4)
    assert len(found.outcomes) >= 39
    assert many.violations == ()


def test_two_users_halve_a_shared_wire_and_keep_it_full() -> None:
    """Each uplink alone could carry 10 MB/s, the wire 10 MB/s in all: 400 kB take 80 ms each instead of 40."""
    graph, cluster = star(2, shared=1e7)
    profile = seconds_of(graph, 2, (0.0001, 1.0), (1.0, 0.0001))
    found = simulate_users(
        closed_users(2, 2), plans_of(graph, 2), cluster, [(graph, profile)], duration_s=6.0, warm_up_s=1.0
    )  # fmt: skip
    per_s = 1e7 / FRONTIER_BYTES / 2
    for name in ("u0", "u1"):
        assert len(found.users[name].completed) / found.window_s == pytest.approx(per_s, rel=0.02)
    assert found.media["wire"] == pytest.approx(1.0, abs=0.01)
    alone = simulate_users(
        closed_users(2, 2), plans_of(graph, 1), cluster, [(graph, profile)], duration_s=6.0, warm_up_s=1.0
    )  # u1 has no plan: it is not there
    assert len(alone.users["u0"].completed) / alone.window_s == pytest.approx(2 * per_s, rel=0.02)
    assert list(alone.users) == ["u0"]


@pytest.mark.parametrize(
    ("distances", "watts", "channels"),
    [((50.0, 50.0, 50.0), (1.0, 0.02, 0.3), (0, 0, 1)), ((30.0, 60.0, 45.0, 80.0), (0.1, 1.0, 0.5, 0.7), (0, 1, 1, 0))],
)
def test_a_radio_cell_carries_what_the_slotted_cell_does(
    distances: tuple[float, ...], watts: tuple[float, ...], channels: tuple[int, ...]
) -> None:
    """Two programs for one channel model: devices compute 20 ms, upload 400 kB, begin again; the rest costs nothing.

    The protocol adds headers and acknowledgements, and its frames: within 4 % over a minute, and one task.
    """
    graph, cluster = cell_of(distances)
    count = len(distances)
    profile = seconds_of(graph, count, (0.02, 1.0), (1.0, 1e-6))
    # The result travels as a frontier of 400 kB over 10 GB/s: 0.04 ms.
    tunings = {str(u): Tuning(channel=c, watt=w) for u, c, w in zip(ends(count), channels, watts, strict=True)}
    found = simulate_users(
        closed_users(count), plans_of(graph, count), cluster, [(graph, profile)], tunings=tunings, duration_s=60.0,
        warm_up_s=0.0,
    )  # fmt: skip
    toy = OffloadProfile(
        name="toy", compute_s=(0.0, 0.02, 1.0), compute_watt=(0.0, 1.0, 1.0), norm_s=1.0,
        payload_bytes=(1.0, float(FRONTIER_BYTES), 0.0),
    )  # fmt: skip
    cell = Cell(toy, cluster.radios[0].radio, num_devices=count, slot_s=60.0, mean_tasks=1e6)
    cell.reset(0, test=True)
    cell.distance_m = list(distances)
    cell.fade(1.0)
    cell._start([1] * count, list(channels), list(watts))
    slot = cell.step([1] * count, channels, watts)
    done = np.array([len(found.users[str(u)].completed) for u in ends(count)])
    assert (np.abs(done - slot.finished) <= 1 + 0.04 * slot.finished).all()  # 1: under way at the end
    seconds = np.array([found.link_utilisation[f"{u}>s"] for u in ends(count)])
    assert [found.joule[str(u)] for u in ends(count)] == pytest.approx(list(seconds * watts * 60.0), rel=1e-6)


def test_a_server_that_promised_enough_refuses_and_the_others_go_on() -> None:
    graph, cluster = star(3)
    profile = seconds_of(graph, 3, (0.001, 1.0), (1.0, 0.02))
    found = simulate_users(
        open_users(3, 20.0), plans_of(graph, 3), cluster, [(graph, profile)], duration_s=2.0, warm_up_s=0.0,
        worker=WorkerSettings(max_load=0.9),
    )  # fmt: skip
    assert list(found.users) == ["u0", "u1"]
    assert found.refused["u2"].startswith("s: would be at 120%, 40% by this session, and promises at most 90%")
    assert all(report.completed for report in found.users.values())


def test_weights_are_shares_of_a_full_server() -> None:
    """Three users flood a server; it serves them 2 : 1 : 1."""
    graph, cluster = star(3, rate=1e9)
    profile = seconds_of(graph, 3, (1e-4, 1.0), (1.0, 0.01))
    flood = closed_users(3, 8)
    users = tuple(replace(u, weight=w) for u, w in zip(flood.users, (2.0, 1.0, 1.0), strict=True))
    found = simulate_users(
        replace(flood, users=users), plans_of(graph, 3), cluster, [(graph, profile)], duration_s=10.0, warm_up_s=1.0
    )  # fmt: skip
    done = [len(found.users[u].completed) for u in ("u0", "u1", "u2")]
    assert sum(done) == pytest.approx(900, rel=0.02)
    assert done == pytest.approx([450, 225, 225], rel=0.03)
    assert found.utilisation["s"] == pytest.approx(1.0, abs=0.01)


def test_the_same_seed_gives_the_same_and_traces_are_apart() -> None:
    graph, cluster = star(2, shared=1e7)
    profile = seconds_of(graph, 2, (0.002, 1.0), (1.0, 0.01))
    one, other = (
        simulate_users(
            open_users(2, 8.0), plans_of(graph, 2), cluster, [(graph, profile)], duration_s=3.0, warm_up_s=0.0, trace=True
        )
        for _ in range(2)
    )
    assert one == other
    for index, name in enumerate(("u0", "u1")):
        spans = one.users[name].trace.spans
        assert {span.epoch for span in spans} == {1000 * index}
        assert {s.request for s in spans if s.kind == "result"} == {o.request for o in one.users[name].outcomes}


def test_plans_that_do_not_fit_are_refused() -> None:
    graph, cluster = star(2)
    profile = seconds_of(graph, 2, (0.002, 1.0), (1.0, 0.01))
    two = open_users(2, 8.0)
    with pytest.raises(EcotoneError, match="user u1: its plan goes from u0 to u0, not from u1 to u1"):
        simulate_users(two, {"u1": offloading(graph, "u0", 1)}, cluster, [(graph, profile)])
    with pytest.raises(EcotoneError, match="plans of nobody"):
        simulate_users(two, {}, cluster, [(graph, profile)])
    with pytest.raises(EcotoneError, match="warm-up"):
        simulate_users(two, plans_of(graph, 2), cluster, [(graph, profile)], duration_s=1.0, warm_up_s=1.0)
