"""What nodes measure of links and work, held against a simulated link whose rate and latency are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.cluster import DeviceId, Link
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.protocol import effects as fx
from ecotone.protocol import events as ev
from ecotone.protocol.message import PROBE_LIMIT_BYTES, BodyId, LinkSample, NodeId, NodeReport, WorkSample
from ecotone.protocol.node import Node
from ecotone.protocol.settings import CoordinatorSettings, LinkSettings, WorkerSettings, chunk_bytes_for
from ecotone.protocol.timing import LinkTiming
from ecotone.simulator.world import FRAME_BYTES, Machine, World

pytestmark = pytest.mark.pure

A, B = NodeId("a"), NodeId("b")
SESSION = 3
COMPUTE_S = {0: 0.003, 1: 0.001}


class Watched:
    """Two nodes, a at the asker. Stage 0 on a, stage 1 on b, outputs back to a; bodies of `up` and `down` bytes."""

    def __init__(
        self,
        *,
        rate: float = 5e6,
        latency_s: float = 0.01,
        up: int = 100_000,
        down: int = 100,
        in_flight: int = 1,
        report_s: float = 0.25,
        chunk_bytes: int = 0,
        believed: float = 0.0,
    ) -> None:
        self.up, self.down = up, down
        mind = CoordinatorSettings(session=SESSION, queue_limit=1000, max_in_flight=in_flight)
        link = LinkSettings(chunk_bytes=chunk_bytes or chunk_bytes_for(rate), bytes_per_s=believed)
        worker = WorkerSettings(report_s=report_s)
        machines = {
            n: Machine(Node(n, 1, links={A: link, B: link}, worker=worker, coordinator=mind if n == A else None))
            for n in (A, B)
        }
        ends = [DeviceId(n) for n in "aaba"]
        transfers = tuple(
            Transfer(source=x, target=y, position=i, codec=LOCAL if x == y else "fp32")
            for i, (x, y) in enumerate(pairwise(ends))
        )
        stages = tuple(Stage(device=d, start=i, stop=i + 1) for i, d in enumerate(ends[1:-1]))
        plan = Plan(graph_hash="0", stages=stages, transfers=transfers, epoch=7)
        links = tuple(
            Link(source=DeviceId(x), target=DeviceId(y), latency_s=latency_s, bandwidth_bytes_per_s=rate)
            for x, y in ((A, B), (B, A))
        )
        self.world = World(machines, links, self.seconds, self.size, self.took)
        self.reports: list[tuple[NodeId, NodeReport]] = []
        self.num_ended = 0
        self.world.connect_all()
        self.world.event(A, ev.DeployRequested(plan=plan))
        self.let_pass(1.0 + 10_000 / rate)
        self.reports.clear()

    def seconds(self, body: BodyId, work: str) -> float:
        return COMPUTE_S[body.edge] if work == "compute" else 0.0

    def size(self, body: BodyId) -> int:
        return self.up if body.edge == 1 else self.down

    def took(self, effect: fx.Effect, now_s: float) -> None:
        if isinstance(effect, fx.Observed):
            self.reports.append((effect.peer, effect.report))
        self.num_ended += isinstance(effect, fx.Deliver)

    def let_pass(self, seconds: float) -> None:
        until_s = self.world.now_s + seconds
        self.world.at(until_s, lambda: None)
        self.world.run(lambda: self.world.now_s >= until_s, until_s)

    def ask(self, count: int, gap_s: float = 0.0) -> None:
        for request in range(count):
            self.world.at(self.world.now_s + gap_s * request, lambda r=request: self.world.event(A, ev.Submit(request=r)))

    def samples(self, peer: NodeId) -> list[LinkSample]:
        return [sample for name, report in self.reports if name == peer for sample in report.links]


def rate_of(samples: list[LinkSample]) -> float:
    """The stated way to read samples."""
    return sum(s.size_bytes for s in samples) / sum(s.seconds - s.rtt_s for s in samples)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1e5, 1e6, 5e6, 1.25e8]),
    st.sampled_from([0.0, 0.001, 0.03]),
    st.sampled_from([5_000, 70_000, 1_500_000]),
    st.sampled_from([1, 4]),
    st.sampled_from([0.0, 0.004]),
)
def test_rate_and_round_trip_of_a_known_link(rate: float, latency_s: float, up: int, in_flight: int, gap_s: float) -> None:
    # A sample counts the bytes of bodies alone. Beside them the link carries, per body, a header for every 8 kB or more, the
    # acknowledgement of the result, and now and then a Ping.
    one = Watched(rate=rate, latency_s=latency_s, up=up, in_flight=in_flight)
    one.ask(12, gap_s)
    one.let_pass(15 * (up / rate + 0.2))
    assert one.num_ended == 12
    samples = one.samples(A)
    assert sum(s.size_bytes for s in samples) <= 12 * up
    assert rate_of(samples) == pytest.approx(rate, rel=0.01 + 3 * FRAME_BYTES / min(up, 8192))
    frame_s = 2 * (latency_s + FRAME_BYTES / rate)
    assert 0.999 * frame_s <= samples[-1].rtt_s <= frame_s + chunk_bytes_for(rate) / rate  # a Ping may wait for one chunk


@pytest.mark.parametrize("in_flight", [1, 6])
def test_traffic_the_other_way_does_not_spoil_the_rate(in_flight: int) -> None:
    # Results as large as the inputs: acknowledgements wait behind a chunk of the other direction, at most 8 kB of it.
    one = Watched(up=200_000, down=200_000, in_flight=in_flight, chunk_bytes=8192)
    one.ask(40)
    one.let_pass(10.0)
    assert one.num_ended == 40
    assert rate_of(one.samples(A)) == pytest.approx(5e6, rel=0.06)
    assert rate_of(one.samples(B)) == pytest.approx(5e6, rel=0.06)


def test_a_link_that_slows_down_is_seen_at_once() -> None:
    one = Watched(in_flight=2, up=50_000)
    one.ask(40, gap_s=0.02)
    one.let_pass(0.4)
    one.world.set_link(A, B, 0.05, 5e5)
    one.let_pass(1.0)
    one.reports.clear()
    one.let_pass(1.0)
    assert rate_of(one.samples(A)) == pytest.approx(5e5, rel=0.04)
    one.let_pass(3.0)
    assert 0.06 <= one.samples(A)[-1].rtt_s <= 0.06 + 50_000 / 5e5  # 0.05 there, 0.01 back, and a body ahead of a Ping


@settings(max_examples=40, deadline=None)
@given(st.floats(1e4, 1e8), st.floats(0, 0.1), st.integers(1, 2 * PROBE_LIMIT_BYTES))
def test_an_idle_link_is_timed_by_a_probe(rate: float, latency_s: float, size_bytes: int) -> None:
    one = Watched(rate=rate, latency_s=latency_s)
    one.world.event(A, ev.ProbeLink(peer=B, size_bytes=size_bytes))
    one.let_pass(1.0 + size_bytes / rate)
    padding = min(size_bytes, PROBE_LIMIT_BYTES)
    assert [s.size_bytes for s in one.samples(A)] == [padding]
    assert rate_of(one.samples(A)) == pytest.approx(rate, rel=0.01)
    assert not one.world.machines[A].timers.keys() & {("report",)}


def test_a_probe_beside_bodies_is_not_taken_for_a_measurement() -> None:
    one = Watched(in_flight=4, up=50_000)
    one.ask(40)
    for i in range(30):
        one.world.at(one.world.now_s + 0.013 * i, lambda: one.world.event(A, ev.ProbeLink(peer=B, size_bytes=100_000)))
    one.let_pass(5.0)
    assert one.num_ended == 40
    assert rate_of(one.samples(A)) == pytest.approx(5e6, rel=0.04)


def test_the_work_of_a_session_is_reported_as_it_was() -> None:
    one = Watched()
    one.ask(5, gap_s=0.1)
    one.let_pass(2.0)
    found: dict[tuple[NodeId, str, int], list[WorkSample]] = {}
    for name, report in one.reports:
        assert report.session == SESSION
        for sample in report.work:
            assert sample.epoch == 7
            found.setdefault((name, sample.work, sample.index), []).append(sample)
    keys = {(A, "compute", 0), (A, "encode", 1), (B, "decode", 1), (B, "compute", 1), (B, "encode", 2), (A, "decode", 2)}
    assert set(found) == keys
    assert {key: sum(s.count for s in samples) for key, samples in found.items()} == dict.fromkeys(keys, 5)
    for (_, work, index), samples in found.items():
        expected = COMPUTE_S[index] if work == "compute" else 0.0
        assert all(s.seconds == pytest.approx(expected) for s in samples)


def test_an_idle_node_is_silent_and_a_busy_one_reports_at_most_at_the_stated_pace() -> None:
    one = Watched(report_s=0.5)
    before = one.world.num_events
    one.let_pass(100.0)
    assert one.world.num_events - before <= 1
    one.ask(200, gap_s=0.05)
    one.let_pass(12.0)
    assert 2 * 10 <= len(one.reports) <= 2 * (12 / 0.5 + 1)
    silent = Watched(report_s=0)
    silent.ask(5)
    silent.let_pass(3.0)
    assert silent.reports == []


def test_what_was_sent_twice_is_not_timed() -> None:
    one = Watched(in_flight=4)
    one.ask(20)
    one.let_pass(0.1)
    one.world.cut(A, B, 0.05)
    one.let_pass(0.6)
    one.world.heal(A, B)
    one.let_pass(5.0)
    assert one.num_ended == 20
    assert rate_of(one.samples(A)) == pytest.approx(5e6, rel=0.04)


@pytest.mark.parametrize(("rate", "is_believed"), [(125.0, True), (2200.0, True), (2200.0, False)])
def test_a_thin_link_carries_bodies_and_not_repeats(rate: float, is_believed: bool) -> None:
    # 125 B/s is 1 kbit/s: the header of a frame alone takes a second.
    one = Watched(rate=rate, up=5000, in_flight=2, believed=rate if is_believed else 0.0)
    before = one.world.channels[A, B].num_bytes
    one.ask(10)
    one.let_pass(30 * 5000 / rate)
    assert one.num_ended == 10
    carried = one.world.channels[A, B].num_bytes - before
    assert carried < (1.7 if is_believed else 2.5) * 10 * 5000  # headers, letters, Pings; unbelieved also first repeats


def test_two_opens_under_way_time_no_round_trip() -> None:
    timing = LinkTiming(B)
    timing.open_sent(0.0)
    timing.open_sent(1.0)
    timing.open_answered(1.1)
    assert timing.rtt_s == 0
    timing.open_sent(2.0)
    timing.open_answered(2.3)
    assert timing.rtt_s == pytest.approx(0.3)


def test_a_clock_that_jumps_back_leaves_no_sample() -> None:
    timing = LinkTiming(B)
    ping = timing.ping(10.0)
    assert timing.ponged(ping.nonce, True, 9.0) is None
    timing.acknowledged([(10.0, 1000)], 0.0, 9.0)
    assert timing.take() is None
    assert timing.rtt_s == 0
