"""The formulas of sharing and waiting against derivations: M/G/1, processor sharing, Erlang, on-off chains, conservation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.contention import Contention, Flow, Resource, visits_of
from ecotone.media import RadioCell, Sender, SharedWire, Tuning
from ecotone.plancost import PlanCost, StageCost, TransferCost
from ecotone.sharing import air_rates, on_off_law, room_beside, undrained, wire_share

pytestmark = pytest.mark.pure

SERVER = DeviceId("s")


def cluster(count: int, *, wires: tuple[SharedWire, ...] = (), radios: tuple[RadioCell, ...] = ()) -> Cluster:
    names = [DeviceId(f"u{i}") for i in range(count)]
    devices = tuple(Device(name=n, memory_bytes=1) for n in (*names, SERVER))
    links = tuple(Link(source=n, target=SERVER, latency_s=0.0, bandwidth_bytes_per_s=1e6) for n in names)
    return Cluster(name="c", devices=devices, links=links, source=names[0], sink=names[0], shared=wires, radios=radios)


def cost(user: int, *, server_s: float = 0.0, size: float = 0.0, rate: float = 1e6, share: float = 1.0) -> PlanCost:
    """An upload of `size` bytes from u<i> to the server, and `server_s` of work there for a share of the requests."""
    source = DeviceId(f"u{user}")
    stage = StageCost(device=SERVER, executor="x", start=0, stop=1, compute_s=server_s, relative_error=0.0, weight_bytes=0,
                      working_bytes=0, share=share)  # fmt: skip
    moves = (
        TransferCost(source=source, target=SERVER, position=0, codec="fp32", size_bytes=size, send_s=size / rate),
        TransferCost(source=SERVER, target=SERVER, position=1, codec="none"),
    )
    return PlanCost(latency_s=size / rate + share * server_s, bottleneck_s=0.0, energy_joule=0.0, disagreement=0.0,
                    relative_error=0.0, stages=(stage,), transfers=moves, devices=(), links=())  # fmt: skip


PROCESSOR = Resource("processor", "s")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 0.3), st.floats(0.001, 0.1)), min_size=1, max_size=5))
def test_open_users_of_a_server_wait_as_pollaczek_and_khinchine_say(users: list[tuple[float, float]]) -> None:
    """The mean over users, weighted by work, is that of M/G/1 whatever the order (conservation law); alone it is exact."""
    total = sum(rho for rho, _ in users)
    users = [(rho * min(1.0, 0.9 / total), s) for rho, s in users]
    flows = [Flow(name=str(i), cost=cost(i, server_s=s), rate_per_s=rho / s) for i, (rho, s) in enumerate(users)]
    found = Contention(cluster(len(users))).standing(flows)
    total = sum(rho for rho, _ in users)
    wait = sum(rho * s for rho, s in users) / 2 / (1 - total)
    assert found.utilisation[PROCESSOR] == pytest.approx(total)
    worked = sum(rho * found.user(str(i)).wait_s.get(PROCESSOR, 0.0) for i, (rho, _) in enumerate(users))
    assert worked == pytest.approx(total * wait, rel=1e-6)
    if len({s for _, s in users}) == 1 and len({rho for rho, _ in users}) == 1:
        assert found.users[0].mean_s - found.users[0].alone_s == pytest.approx(wait)


def test_a_light_user_waits_less_than_a_heavy_one_and_weight_helps() -> None:
    flows = [Flow(name="heavy", cost=cost(0, server_s=0.05), rate_per_s=14.0),
             Flow(name="light", cost=cost(1, server_s=0.02), rate_per_s=5.0)]  # fmt: skip
    world = Contention(cluster(2))
    plain = world.standing(flows)
    assert plain.user("light").wait_s[PROCESSOR] < plain.user("heavy").wait_s[PROCESSOR]
    favoured = world.standing([replace(flows[0], weight=9.0), flows[1]])
    assert favoured.user("heavy").wait_s[PROCESSOR] < plain.user("heavy").wait_s[PROCESSOR]


def test_requests_that_come_spaced_do_not_wait_for_their_own() -> None:
    """One user whose upload takes as long as the server's work: no request ever finds the one before it there."""
    flow = Flow(name="a", cost=cost(0, server_s=0.02, size=20_000), rate_per_s=30.0)
    found = Contention(cluster(1)).standing([flow])
    link = Resource("link", "u0>s")
    assert PROCESSOR not in found.users[0].wait_s
    assert found.users[0].wait_s[link] == pytest.approx(0.6 * 0.02 / 2 / 0.4)
    again = Contention(cluster(1)).standing([replace(flow, is_periodic=True)])
    assert again.users[0].mean_s == pytest.approx(again.users[0].alone_s)


@pytest.mark.parametrize(("in_flight", "users"), [(1, 1), (3, 1), (1, 4), (4, 3)])
def test_closed_users_keep_little_s_law_and_never_more_than_the_server_gives(in_flight: int, users: int) -> None:
    flows = [Flow(name=str(i), cost=cost(i, server_s=0.02, size=30_000), in_flight=in_flight) for i in range(users)]
    found = Contention(cluster(users)).standing(flows)
    assert not found.overloaded
    for user in found.users:
        assert user.rate_per_s * user.mean_s == pytest.approx(in_flight, rel=1e-4)
    total = sum(u.rate_per_s for u in found.users)
    # The bounds of operational analysis: no more than the server does, nor than each alone; no less than in a line.
    most = min(1 / 0.02, users * min(in_flight / 0.05, 1 / 0.03))
    assert 0.8 * most <= total <= most * (1 + 1e-6)


def test_an_overloaded_server_is_named_with_its_load() -> None:
    flows = [Flow(name=str(i), cost=cost(i, server_s=0.02), rate_per_s=r) for i, r in enumerate((40.0, 25.0))]
    found = Contention(cluster(2)).standing(flows)
    assert found.overloaded == (PROCESSOR,)
    assert found.utilisation[PROCESSOR] == pytest.approx(1.3)
    assert math.isinf(found.users[0].mean_s)
    assert math.isinf(found.users[0].p95_s)


def test_room_beside_others_is_what_sharing_by_weight_leaves() -> None:
    """By hand: who asks for less than the share by weight leaves the rest to the others, in proportion to their weights."""
    room = room_beside(np.array([1.0, 1.0, 2.0]), np.array([0.1, 1.0, 1.0]))
    assert room == pytest.approx([1 / 4, 0.9 / 3, 2 * 0.9 / 3])
    assert room_beside(np.ones(1), np.ones(1)) == pytest.approx([1.0])
    assert room_beside(np.ones(2), np.array([0.3, 0.4])) == pytest.approx([0.6, 0.7])


def test_an_open_user_has_no_more_than_its_share_beside_one_that_always_asks() -> None:
    """Work for 60 % of the server beside three requests always under way: half of it at equal weights, 3/4 at triple."""
    crowd = Flow(name="closed", cost=cost(1, server_s=0.02), in_flight=3)
    own = Flow(name="open", cost=cost(0, server_s=0.02), rate_per_s=30.0)
    world = Contention(cluster(2))
    found = world.standing([own, crowd])
    assert found.promised[PROCESSOR] == pytest.approx(0.6 / 0.5)
    assert math.isinf(found.user("open").mean_s)
    favoured = world.standing([replace(own, weight=3.0), crowd])
    assert favoured.promised[PROCESSOR] == pytest.approx(0.6 / 0.75)
    assert math.isfinite(favoured.user("open").mean_s)
    alone = world.standing([own])
    assert alone.promised[PROCESSOR] == pytest.approx(0.6)


def test_who_leaves_early_loads_the_server_less() -> None:
    half = Contention(cluster(1)).standing([Flow(name="a", cost=cost(0, server_s=0.02, share=0.5), rate_per_s=20.0)])
    assert half.utilisation[PROCESSOR] == pytest.approx(0.2)


def test_p95_of_an_exponential_tail_is_that_of_its_moments() -> None:
    """M/M/1-like: at a busy M/D/1 the wait is 0 with 1 - rho, else exponential: the gamma law keeps mean and variance."""
    flow = Flow(name="a", cost=cost(0, server_s=0.02), rate_per_s=40.0)
    user = Contention(cluster(1)).standing([flow]).users[0]
    wait, rho = user.mean_s - user.alone_s, 0.8
    draws = np.random.default_rng(0).gamma(rho / (2 - rho), wait * (2 - rho) / rho, 200_000)
    assert draws.mean() == pytest.approx(wait, rel=0.02)
    assert draws.var() == pytest.approx(wait * (2 * wait / rho - wait), rel=0.03)
    assert user.p95_s - user.alone_s == pytest.approx(np.quantile(draws, 0.95), rel=0.02)


# ---- wires -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [0.0, 0.3, 0.7])
def test_links_that_fill_a_wire_share_it_as_processor_sharing(others: float) -> None:
    assert wire_share(5.0, 1.0, others, 50, 1.0, 1.0, 0.1) == pytest.approx(max(1 - others, 1 / 50))


def test_a_link_that_cannot_fill_the_wire_keeps_its_rate_while_there_is_room() -> None:
    assert wire_share(1.0, 4.0, 0.0, 4, 1e-9, 1.0, 0.0) == pytest.approx(1.0)
    assert wire_share(1.0, 4.0, 0.9, 4, 100.0, 1.0, 0.9) == pytest.approx(1.0, rel=0.02)  # four of four always fit
    rates = [wire_share(1.0, 4.0, share, 12, share / 3, 1.0, share / 3) for share in (0.1, 0.5, 0.8, 0.95)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] >= 4.0 / 12


def test_two_closed_users_halve_a_wire() -> None:
    wire = SharedWire(name="w", bandwidth_bytes_per_s=1e6, links=("*>s",))
    flows = [Flow(name=str(i), cost=cost(i, size=10_000), in_flight=2) for i in range(2)]
    found = Contention(cluster(2, wires=(wire,))).standing(flows)
    assert [u.rate_per_s for u in found.users] == pytest.approx([50.0, 50.0], rel=0.03)
    assert found.utilisation[Resource("wire", "w")] == pytest.approx(1.0, rel=0.03)


# ---- radio -----------------------------------------------------------------------------------------------------------


def test_one_sender_on_and_off_by_hand() -> None:
    law = on_off_law(np.array([[0.0], [50.0]]), np.array([2.0]), np.array([1.0]), np.array([10.0]))
    assert law.tolist() == pytest.approx([5 / 7, 2 / 7])  # on at 2, off at 5 a second


def test_the_law_of_two_senders_balances_every_set() -> None:
    random = np.random.default_rng(3)
    rates = np.array([[0, 0], [4, 0], [0, 3], [1, 0.5]])
    on, off, size = random.uniform(0.1, 2, 2), random.uniform(0.3, 1, 2), random.uniform(0.5, 2, 2)
    law = on_off_law(rates, on, off, size)
    assert law.sum() == pytest.approx(1.0)
    for own in range(4):
        leaving = sum(off[i] * rates[own, i] / size[i] if own >> i & 1 else on[i] for i in range(2))
        coming = sum(
            law[own ^ (1 << i)] * (on[i] if own >> i & 1 else off[i] * rates[own ^ (1 << i), i] / size[i]) for i in range(2)
        )
        assert law[own] * leaving == pytest.approx(coming)


def cell(count: int, num_channels: int = 1) -> RadioCell:
    senders = tuple(Sender(device=f"u{i}", distance_m=50.0) for i in range(count))
    return RadioCell(name="r", receiver="s", sender=senders, num_channels=num_channels)


def test_equal_powers_do_not_recover_from_a_backlog_unequal_ones_do() -> None:
    """Two at 1 W have 73 kB/s each while both send. Below that both drain; above it neither does."""
    gain = 50.0**-3
    both = 1e6 / 8 * math.log2(1 + gain / (1e-9 + gain))
    size = np.array([1e5, 1e5])
    for share, is_stuck in ((0.9, False), (1.1, True)):
        stuck, _ = undrained(cell(2), np.array([gain, gain]), share * both / size, size)
        assert stuck.tolist() == [is_stuck] * 2
    stuck, rates = undrained(cell(2), np.array([gain, 0.01 * gain]), np.array([1.0, 1.0]), size)
    assert stuck.tolist() == [False, False]
    stuck, rates = undrained(cell(2), np.array([gain, 0.01 * gain]), np.array([8.0, 1.0]), size)
    assert stuck.tolist() == [False, True]  # the loud one still drains: beside 0.01 W it has most of its rate
    assert rates[1] < 1e5


def test_mean_rates_lie_between_alone_and_all_together() -> None:
    gain = 50.0**-3 * np.array([1.0, 0.1, 0.02])
    alone = 1e6 / 8 * np.log2(1 + gain / 1e-9)
    all_on = 1e6 / 8 * np.log2(1 + gain / (1e-9 + gain.sum() - gain))
    rates = air_rates(cell(3), gain, np.array([1.0, 1.0, 1.0]), np.full(3, 1e5), np.full(3, 0.2))
    assert (rates < alone).all()
    assert (rates > all_on).all()
    quiet = air_rates(cell(3), gain, np.full(3, 1e-6), np.full(3, 1e5), np.full(3, 1e-6))
    assert quiet == pytest.approx(alone, rel=1e-3)


def test_senders_on_other_channels_do_not_slow_a_user_down() -> None:
    radio = cell(2, num_channels=2)
    rate = radio.alone_bytes_per_s("u0")
    world = Contention(replace(cluster(2), radios=(radio,)))
    flows = [Flow(name=str(i), cost=cost(i, size=50_000, rate=rate), rate_per_s=4.0) for i in range(2)]
    apart = world.standing(flows, {"u0": Tuning(channel=0, watt=1.0), "u1": Tuning(channel=1, watt=1.0)})
    together = world.standing(flows, {"u0": Tuning(channel=0, watt=1.0), "u1": Tuning(channel=0, watt=0.01)})
    rho = 4.0 * 50_000 / rate
    assert apart.users[0].mean_s - apart.users[0].alone_s == pytest.approx(rho * 50_000 / rate / 2 / (1 - rho))
    assert together.users[0].mean_s > apart.users[0].mean_s


def test_visits_come_in_the_order_of_the_request() -> None:
    made = cost(0, server_s=0.02, size=1000.0)
    coded = replace(made, transfers=(replace(made.transfers[0], encode_s=0.001, decode_s=0.002), made.transfers[1]))
    assert [(str(r), s) for r, s, _, _ in visits_of(coded)] == [
        ("coder u0", 0.001), ("link u0>s", 0.001), ("coder s", 0.002), ("processor s", 0.02),
    ]  # fmt: skip
