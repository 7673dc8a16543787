"""The request-level world by hand, against a slow simulation of the same rules, and what a device may know of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import small_world as world
from hypothesis import given
from hypothesis import strategies as st

from ecotone.policies.actions import ActionTable
from ecotone.policies.conditions import NAMES, TRAIN_SEED, Episodes, Scenario, episodes, scenario
from ecotone.policies.stream import Reward, Stream, ranges_of
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure

STEP_S = 0.05


def made(
    rates: list[float],
    arrivals: list[float],
    *,
    deadline_s: float = 0.1,
    device: float = 1.0,
    server: float = 1.0,
    **knobs: object,
) -> Episodes:
    """One episode; rates by step of 50 ms, latency 1 ms one way."""
    grid = np.array([rates])
    of = Scenario(name="stationary", num_requests=len(arrivals) - 1, one_way_s=0.001, **knobs)  # type: ignore[arg-type]
    ones = np.ones_like(grid)
    return Episodes(
        scenario=of, step_s=STEP_S, arrival_s=np.array([arrivals]), deadline_s=np.array([deadline_s]), rate_bytes_per_s=grid,
        one_way_s=0.001 * ones, device_load=device * ones, server_load=server * ones,
    )  # fmt: skip


def action(table: ActionTable, *key: object) -> int:
    return list(zip(table.exits, table.cuts, table.codecs, strict=True)).index(key)  # type: ignore[arg-type]


def one(stream: Stream, number: int) -> tuple[float, float]:
    found = stream.step(np.array([number]))
    return float(found.latency_s[0]), float(found.reward[0])


def test_three_requests_by_hand() -> None:
    """Cut at 1, int8: 10 ms here, 1008 bytes, 5 ms there, 40 bytes back; the whole here: 60 ms; loads 2 and 3.

    Request 0 (due at once): 20 ms, then 1008 bytes at 100 kB/s 10.08 ms, 1 ms, 3 * 5 ms, 1 ms and 40 bytes 0.4 ms. Request 1
    comes at 10 ms, waits until 20 ms, then computes 120 ms here. Request 2 comes at 50 ms, waits until 140 ms.
    """
    table = world.table()
    split, here = action(table, "", 1, "int8"), action(table, "", -1, "none")
    assert table.up_bytes[split] == 1008
    stream = Stream(table, made([1e5] * 4, [0.0, 0.010, 0.050, 9.0], device=2.0, server=3.0))
    latency, reward = one(stream, split)
    expected = 0.020 + 1008 / 1e5 + 0.001 + 0.015 + 0.001 + 40 / 1e5
    assert latency == pytest.approx(expected)
    assert reward == pytest.approx(0.89)
    assert stream.waited_s[0] == pytest.approx(0.010)
    latency, reward = one(stream, here)
    assert latency == pytest.approx(0.010 + 0.120)
    assert reward == pytest.approx(-0.3)  # 130 ms of 100 ms
    assert stream.now_s[0] == pytest.approx(0.140)
    assert one(stream, split)[0] == pytest.approx(0.090 + expected)
    assert stream.is_done


def test_requests_wait_for_link_and_server_in_turn() -> None:
    """Both send the input at once (nothing is computed here): the second's bytes wait for the first's, not the device."""
    table = world.table()
    raw = action(table, "", 0, "int8")
    size, tail = table.up_bytes[raw], table.tail_s[raw]
    stream = Stream(table, made([1e5] * 4, [0.0, 0.0, 9.0]))
    back = 0.002 + table.down_bytes[raw] / 1e5
    assert one(stream, raw)[0] == pytest.approx(size / 1e5 + tail + back)
    assert one(stream, raw)[0] == pytest.approx(2 * size / 1e5 + tail + back)
    slow = Stream(table, made([1e9] * 4, [0.0, 0.0, 9.0], server=50.0))
    first, second = one(slow, raw)[0], one(slow, raw)[0]
    assert second - first == pytest.approx(50 * tail, rel=1e-3)


@given(
    st.lists(st.sampled_from([0.0, 2e4, 1e5, 3e6]), min_size=2, max_size=6).filter(any),
    st.floats(0.0, 0.35), st.floats(1.0, 2e4),
)  # fmt: skip
def test_the_link_carries_the_integral_of_its_rate(rates: list[float], start: float, size: float) -> None:
    """Against summing up in steps of 0.1 ms; behind the grid the link goes on at the larger of its last and mean rate."""
    stream = Stream(world.table(), made(rates, [0.0, 9.0]))
    found = float(stream._carry(np.array([start]), np.array([size]))[0])
    dt, onward = 1e-4, max(rates[-1], sum(rates) / len(rates), 1.0)
    steps = np.floor((start + dt * np.arange(20_000)) / STEP_S + 1e-9).astype(int)
    speeds = np.where(steps < len(rates) - 1, np.array(rates)[np.minimum(steps, len(rates) - 1)], onward)
    carried = np.cumsum(speeds * dt)
    if carried[-1] > size:
        assert found == pytest.approx(start + dt * (np.searchsorted(carried, size) + 1), abs=3e-4)


def test_a_device_knows_of_the_link_what_answers_told_it() -> None:
    """The rate falls in the second step. Until an answer over the new rate is there, the device believes the old one."""
    table = world.table()
    raw, here = action(table, "", 0, "int8"), action(table, "early", -1, "none")
    rates = [4e5, 2e4, 2e4, 2e4, 2e4, 2e4, 2e4, 2e4]
    stream = Stream(table, made(rates, [0.0, 0.06, 0.10, 0.40, 9.0], noise=0.0, probe_s=5.0))
    believed = []
    for number in (raw, raw, here, here):
        believed.append(float(np.exp(stream.belief.last[0])))
        one(stream, number)
    assert believed[:3] == pytest.approx([4e5, 4e5, 4e5])
    assert believed[3] == pytest.approx(2e4, rel=0.01)
    probed = Stream(table, made(rates, [0.0, 0.06, 0.10, 0.40, 9.0], noise=0.0, probe_s=0.05))
    for number in (here, here):
        one(probed, number)
    assert float(np.exp(probed.belief.last[0])) == pytest.approx(2e4)


def test_the_queue_counts_who_has_no_answer() -> None:
    table = world.table()
    raw, here = action(table, "", 0, "int8"), action(table, "", -1, "none")
    stream = Stream(table, made([1e5] * 8, [0.0, 0.01, 0.02, 0.03, 0.5]))
    assert stream.queue[0] == 0
    one(stream, raw)  # 40 ms on the link
    assert stream.queue[0] == 1
    one(stream, here)  # until 70 ms
    assert stream.queue[0] == 1  # at 70 ms the first has its answer, request 3 waits
    one(stream, raw)
    assert stream.queue[0] == 1


def test_a_late_answer_costs_by_how_late_but_not_without_end() -> None:
    table = world.table()
    here = action(table, "", -1, "none")
    for deadline_s, expected in ((0.060, 0.9), (0.040, -0.5), (0.001, -4.0)):
        stream = Stream(table, made([1e5] * 4, [0.0, 9.0], deadline_s=deadline_s), Reward(k=1.0, worst=4.0))
        assert one(stream, here)[1] == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_scenarios_are_repeatable_and_in_range(name: str) -> None:
    of = replace(scenario(name), num_requests=20)
    first, again, other = episodes(of, 3, 4), episodes(of, 3, 4), episodes(of, TRAIN_SEED, 4)
    arrays = ("arrival_s", "deadline_s", "rate_bytes_per_s", "one_way_s", "device_load", "server_load")
    assert all(np.array_equal(getattr(first, a), getattr(again, a)) for a in arrays)
    assert not np.array_equal(first.rate_bytes_per_s[:, :5], other.rate_bytes_per_s[:, :5])
    assert first.arrival_s.shape == (4, 21)
    assert (np.diff(first.arrival_s, axis=1) > 0).all()
    assert (first.rate_bytes_per_s >= 0).all()
    assert (first.device_load >= 1).all()
    assert (first.server_load <= of.server_load).all()
    stream = Stream(world.table(), first)
    while not stream.is_done:
        seen = stream.observe()
        assert seen.shape == (4, 10)
        assert np.isfinite(seen).all()
        stream.step(np.zeros(4, dtype=np.intp))


def test_what_is_known_at_once_is_within_its_ranges() -> None:
    of = scenario("stationary")
    made_ = episodes(of, 1, 64)
    stream = Stream(world.table(), made_)
    raw = stream.belief.features(ranges_of((of,)), stream.now_s, made_.deadline_s, np.zeros(64), np.zeros(64))
    assert (raw >= -1e-6).all()
    assert (raw <= 1 + 1e-6).all()


def test_unknown_or_senseless_scenarios_are_refused() -> None:
    with pytest.raises(EcotoneError, match="fading"):
        scenario("rain")
    with pytest.raises(EcotoneError, match="above zero"):
        Scenario(name="stationary", period_s=0.0)
