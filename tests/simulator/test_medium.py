"""Shared wires and radio cells in the virtual world: shares by an independent definition, frames by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.media import RadioCell, Sender, SharedWire, Tuning
from ecotone.protocol.message import NodeId
from ecotone.simulator.channel import Channel
from ecotone.simulator.medium import Airwaves, Wires, fair_rates, media_of
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_shares_are_max_min_fair(num_flows: int, num_wires: int, seed: int) -> None:
    """The definition: feasible, and every flow is stopped by its own rate or by a full wire on which none has more."""
    random = np.random.default_rng(seed)
    own, capacity = random.uniform(1, 10, num_flows), random.uniform(1, 20, num_wires)
    passes = random.random((num_flows, num_wires)) < 0.5
    rate = np.array(fair_rates(own.tolist(), [np.flatnonzero(row).tolist() for row in passes], capacity.tolist()))
    used = rate @ passes
    assert (used <= capacity * (1 + 1e-9)).all()
    for flow in range(num_flows):
        is_own = rate[flow] >= own[flow] * (1 - 1e-9)
        stopping = [
            w for w in range(num_wires)
            if passes[flow, w] and used[w] >= capacity[w] * (1 - 1e-9) and rate[flow] >= rate[passes[:, w]].max() - 1e-9
        ]  # fmt: skip
        assert is_own or stopping


class Bench:
    """A clock, channels and a medium without nodes: frames started by hand, and when each has left."""

    def __init__(self) -> None:
        self.now_s, self.due, self.left, self.order = 0.0, [], {}, 0

    def at(self, time_s: float, action: object, *args: object) -> None:
        self.order += 1
        self.due.append((time_s, self.order, action, args))

    def run(self) -> dict[str, float]:
        while self.due:
            self.due.sort(key=lambda item: item[:2])
            self.now_s, _, action, args = self.due.pop(0)
            action(*args)
        return self.left

    def note(self, name: str) -> None:
        self.left[name] = self.now_s


PAIRS = [(NodeId(n), NodeId("s")) for n in "abc"]


def test_frames_on_a_wire_share_it_as_they_come_and_go() -> None:
    """100 bytes/s for all. a sends 100 from 0 s; b 100 from 0.5 s, at most 30 bytes/s; c 40 from 1 s.

    0 to 0.5: a alone, 50 sent. 0.5 to 1: b 30, a 70: a has sent 85, b 15. From 1: b 30, and 35 each for a and c: a's 15 are
    out after 15/35 s. Then c 70: it has 25 left, out after 25/70 s. b sends 30 throughout: 85 left at 1 s, out at 1 + 85/30.
    """
    bench, wire = Bench(), SharedWire(name="w", bandwidth_bytes_per_s=100.0, links=("*>s",))
    channels = {pair: Channel(0.0, rate) for pair, rate in zip(PAIRS, (1e6, 30.0, 1e6), strict=True)}
    medium = Wires((wire,), PAIRS)
    medium.join(bench, channels)
    for pair, at_s, size in zip(PAIRS, (0.0, 0.5, 1.0), (100, 100, 40), strict=True):
        bench.at(at_s, partial(medium.send, pair, size, partial(bench.note, pair[0])))
    left = bench.run()
    assert left == pytest.approx({"a": 1 + 15 / 35, "c": 1 + 15 / 35 + 25 / 70, "b": 1 + 85 / 30})
    assert medium.busy_s == pytest.approx(1 + 85 / 30)


def test_a_lost_frame_frees_its_share_and_a_new_rate_counts_at_once() -> None:
    bench, wire = Bench(), SharedWire(name="w", bandwidth_bytes_per_s=100.0, links=("*>s",))
    channels = {pair: Channel(0.0, 1e6) for pair in PAIRS}
    medium = Wires((wire,), PAIRS)
    medium.join(bench, channels)
    for pair in PAIRS[:2]:
        bench.at(0.0, partial(medium.send, pair, 100, partial(bench.note, pair[0])))
    bench.at(1.0, partial(channels[PAIRS[1]].block, "cut", 1.0))  # both have sent 50

    def slow() -> None:
        channels[PAIRS[0]].rate_bytes_per_s = 10.0
        medium.changed()

    bench.at(1.2, slow)  # a has sent 70
    assert bench.run() == pytest.approx({"a": 1.2 + 3.0})


def test_frames_of_one_instant_leave_in_the_order_in_which_they_came() -> None:
    bench, wire = Bench(), SharedWire(name="w", bandwidth_bytes_per_s=90.0, links=("*>s",))
    medium = Wires((wire,), PAIRS)
    medium.join(bench, {pair: Channel(0.0, 1e6) for pair in PAIRS})
    for pair in reversed(PAIRS):
        bench.at(0.0, partial(medium.send, pair, 30, partial(bench.note, pair[0])))
    assert list(bench.run()) == ["c", "b", "a"]
    assert set(bench.left.values()) == {1.0}


def test_uploads_in_a_cell_disturb_one_another_only_on_one_channel() -> None:
    """a and b on channel 0, c on 1, from 50 m: the rates of equation 1 while they overlap, alone afterwards."""
    cell = RadioCell(name="r", receiver="s", sender=tuple(Sender(device=n, distance_m=50.0) for n in "abc"))
    tunings = {"a": Tuning(channel=0, watt=1.0), "b": Tuning(channel=0, watt=0.01), "c": Tuning(channel=1, watt=1.0)}
    bench, air = Bench(), Airwaves(cell, tunings)
    air.join(bench, {pair: Channel(0.0, 1.0) for pair in PAIRS})
    alone = 1e6 / 8 * math.log2(1 + 50**-3 / 1e-9)
    heard = {n: t.watt * 50**-3 for n, t in tunings.items()}
    both = {n: 1e6 / 8 * math.log2(1 + heard[n] / (1e-9 + heard[m])) for n, m in ("ab", "ba")}
    for pair in PAIRS:
        bench.at(0.0, partial(air.send, pair, alone, partial(bench.note, pair[0])))
    left = bench.run()
    a_s = alone / both["a"]
    b_alone = 1e6 / 8 * math.log2(1 + heard["b"] / 1e-9)
    assert left["c"] == pytest.approx(1.0)
    assert left["a"] == pytest.approx(a_s)
    assert left["b"] == pytest.approx(a_s + (alone - a_s * both["b"]) / b_alone)


def gate(**more: object) -> Cluster:
    names = [DeviceId(n) for n in "as"]
    cell = RadioCell(name="r", receiver="s", sender=(Sender(device="a", distance_m=50.0),))
    rate = cell.alone_bytes_per_s("a")
    link = Link(source=names[0], target=names[1], latency_s=0.0, bandwidth_bytes_per_s=rate, **more)  # type: ignore[arg-type]
    devices = tuple(Device(name=n, memory_bytes=1) for n in names)
    return Cluster(name="g", devices=devices, links=(link,), source=names[0], sink=names[0], radios=(cell,))


@pytest.mark.parametrize("tuning", [Tuning(channel=2, watt=1.0), Tuning(channel=0, watt=2.0), Tuning(channel=0, watt=0.0)])
def test_a_tuning_that_the_cell_does_not_have_is_refused(tuning: Tuning) -> None:
    with pytest.raises(EcotoneError, match="channel must be below 2, power at most 1 W"):
        media_of(gate(), [PAIRS[0]], {"a": tuning})


def test_a_link_in_a_medium_follows_no_trace() -> None:
    with pytest.raises(EcotoneError, match="link a>s follows a trace and is part of r"):
        media_of(gate(trace="stable_wifi"), [PAIRS[0]])
    assert media_of(gate(trace="stable_wifi"), [PAIRS[1]]) == ()
