"""The simulator against hand derivations: sums, D/D/1 pipelines, conservation, order, determinism, scripted faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import FRONTIER_BYTES, chain, cluster_of, plan_of, profile_of

from ecotone import cost
from ecotone.cluster import DeviceId, Link
from ecotone.protocol.events import ErrorKind
from ecotone.simulator import (
    ClosedLoop,
    CutLink,
    HealLink,
    KillNode,
    Periodic,
    Poisson,
    Replan,
    Report,
    RestartNode,
    SetLink,
    simulate,
)
from ecotone.trace import Trace
from ecotone.units import EcotoneError

pytestmark = pytest.mark.pure


def abc(seconds: tuple[float, float, float] = (0.010, 0.020, 0.005), **kwargs: object) -> tuple:
    graph = chain(3)
    profile = profile_of(graph, {n: [s] * 3 for n, s in zip("abc", seconds, strict=True)}, coding_s=0.001)
    return plan_of(graph, "abc"), graph, cluster_of("abc", **kwargs), profile  # type: ignore[arg-type]


@settings(max_examples=25)
@given(st.text("abc", min_size=1, max_size=5), st.floats(1e6, 1e9), st.floats(0, 0.05), st.floats(1e-3, 0.1))
def test_one_request_takes_what_cost_predicts(stages: str, rate: float, latency_s: float, compute_s: float) -> None:
    graph = chain(len(stages))
    cluster = cluster_of("abc", rate=rate, latency_s=latency_s)
    profile = profile_of(graph, {n: [compute_s * (i + 1)] * len(stages) for i, n in enumerate("abc")}, coding_s=0.002)
    plan = plan_of(graph, stages)
    report = simulate(plan, graph, cluster, profile, requests=3)
    # The only difference is control: 128 bytes of header per chunk of at least 8 KiB, and acknowledgements.
    assert report.p50_s == pytest.approx(cost.predict(plan, graph, cluster, profile).latency_s, rel=0.02)


def test_a_pipeline_runs_at_its_bottleneck() -> None:
    # D/D/1 stages in a row: b computes 20 ms, every link and coder less, so a full pipeline gives 50 a second.
    report = simulate(*abc(), requests=200, arrivals=ClosedLoop(in_flight=8))
    assert report.throughput_per_s == pytest.approx(50, rel=1e-3)
    assert report.utilisation["b"] == pytest.approx(1, abs=0.03)
    assert report.utilisation["a"] == pytest.approx(0.5, abs=0.03)


def test_a_slow_link_is_the_bottleneck() -> None:
    # 400 kB at 10 MB/s is 40 ms a body; headers add 128 bytes per 500 kB chunk.
    report = simulate(*abc(rate=1e7), requests=100, arrivals=ClosedLoop(in_flight=8))
    assert report.throughput_per_s == pytest.approx(25, rel=2e-3)
    assert report.link_utilisation["a>b"] == pytest.approx(1, abs=0.05)


def test_two_in_flight_overlap_as_by_hand() -> None:
    # One device, 10 ms, closed loop of two: each waits for the other: latency 20 ms after the first, 100 a second.
    graph = chain(1)
    profile = profile_of(graph, {"a": [0.010]})
    report = simulate(plan_of(graph, "a"), graph, cluster_of("ab"), profile, requests=50, arrivals=ClosedLoop(in_flight=2))
    assert report.latencies_s[0] == pytest.approx(0.010)
    assert report.latencies_s[1:] == pytest.approx([0.020] * 49)
    assert report.throughput_per_s == pytest.approx(100)


def test_periodic_arrivals_below_capacity_never_wait() -> None:
    plan, graph, cluster, profile = abc()
    alone = simulate(plan, graph, cluster, profile, requests=1).p50_s
    report = simulate(plan, graph, cluster, profile, requests=60, arrivals=Periodic(period_s=0.025))
    assert max(report.latencies_s) == pytest.approx(alone, rel=0.01)
    assert not report.trace.of("wait")


def test_poisson_is_an_m_d_1_queue() -> None:
    # Pollaczek-Khinchine for one device: wait = rho s / (2 (1 - rho)); s = 10 ms, rho = 0.5: 5 ms, mean latency 15 ms.
    graph = chain(1)
    profile = profile_of(graph, {"a": [0.010]})
    plan, cluster = plan_of(graph, "a"), cluster_of("ab")
    many = [
        simulate(plan, graph, cluster, profile, requests=2000, arrivals=Poisson(rate_per_s=50), seed=s, trace=False)
        for s in range(4)
    ]
    assert sum(r.mean_s for r in many) / 4 == pytest.approx(0.015, rel=0.08)


def test_same_seed_same_run() -> None:
    one, two, other = (simulate(*abc(), requests=40, arrivals=Poisson(rate_per_s=40), seed=s) for s in (7, 7, 8))
    assert one == two
    assert one.latencies_s != other.latencies_s


@settings(max_examples=40)
@given(
    st.text("abcd", min_size=1, max_size=5),
    st.lists(st.floats(1e-4, 0.05), min_size=4, max_size=4),
    st.integers(1, 9),
    st.floats(1e6, 1e9),
)
def test_nothing_is_lost_and_results_keep_their_order(
    stages: str, compute_s: list[float], in_flight: int, rate: float
) -> None:
    graph = chain(len(stages))
    profile = profile_of(graph, dict(zip("abcd", ([s] * len(stages) for s in compute_s), strict=True)), coding_s=1e-3)
    plan, cluster = plan_of(graph, stages), cluster_of("abcd", rate=rate)
    report = simulate(plan, graph, cluster, profile, requests=25, arrivals=ClosedLoop(in_flight=in_flight))
    assert report.completion_order == tuple(range(25))
    predicted = cost.predict(plan, graph, cluster, profile)
    servers = Counter[str]()  # a processor and a coder per device, and the links: no server is busy more than all the time
    for stage in predicted.stages:
        servers[f"{stage.device} computes"] += stage.compute_s
    for transfer in predicted.transfers:
        servers[f"{transfer.source} codes"] += transfer.encode_s
        servers[f"{transfer.target} codes"] += transfer.decode_s
        servers[f"{transfer.source}>{transfer.target}"] += transfer.send_s
    assert report.makespan_s >= 25 * max(servers.values()) * 0.999
    for pair, size_bytes in report.link_bytes.items():  # conservation: each body crosses once, control is small
        crossings = sum(f"{t.source}>{t.target}" == pair for t in plan.transfers)
        assert 25 * crossings * FRONTIER_BYTES <= size_bytes <= 25 * (crossings * FRONTIER_BYTES * 1.03 + 20_000)
    busy = {s.device for s in report.trace.of("compute")}
    assert busy == set(plan.devices)
    for device in busy:  # one processor: its spans do not overlap
        spans = sorted((s.start_s, s.stop_s) for s in report.trace.of("compute", device))
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))


def test_a_full_queue_refuses_by_name() -> None:
    report = simulate(*abc(), requests=100, arrivals=Periodic(period_s=0.001), queue_limit=10)
    errors = [o.error for o in report.outcomes if o.error]
    assert errors
    assert set(errors) == {ErrorKind.BUSY.value}
    assert len(report.outcomes) == 100


def test_deadlines_end_requests_on_time() -> None:
    report = simulate(*abc(), requests=20, arrivals=ClosedLoop(in_flight=8), deadline_s=0.100)
    late = [o for o in report.outcomes if o.error]
    assert late
    assert all(o.error == "deadline" and o.latency_s == pytest.approx(0.100) for o in late)
    assert all(o.latency_s <= 0.100 for o in report.completed)


def test_a_cut_link_that_heals_loses_nothing() -> None:
    script = (
        CutLink(at_s=0.1, source=DeviceId("a"), target=DeviceId("b")),
        HealLink(at_s=2.1, source=DeviceId("a"), target=DeviceId("b")),
    )
    report = simulate(*abc(), requests=50, arrivals=ClosedLoop(in_flight=6), script=script)
    assert report.completion_order == tuple(range(50))
    assert max(report.latencies_s) > 2
    assert _leaks(report) == []


def test_without_a_killed_node_requests_end_by_name_and_its_restart_serves_them() -> None:
    dead = (KillNode(at_s=0.1, device=DeviceId("b")),)
    report = simulate(*abc(), requests=60, arrivals=ClosedLoop(in_flight=4), script=dead, until_s=100)
    assert report.num_unended == 0
    assert {o.error for o in report.outcomes} == {"", "node-lost"}
    again = (*dead, RestartNode(at_s=0.3, device=DeviceId("b")))
    report = simulate(*abc(), requests=60, arrivals=ClosedLoop(in_flight=4), script=again, until_s=100)
    assert report.num_unended == 0
    assert report.completion_order == tuple(range(60)), "those that ran over it run again"


def test_a_switch_of_plans_under_load_loses_nothing_and_keeps_the_order() -> None:
    plan, graph, cluster, profile = abc()
    script = tuple(Replan(at_s=0.2 * i, plan=plan_of(graph, "abc" if i % 2 else "acc", epoch=i)) for i in range(1, 6))
    report = simulate(plan, graph, cluster, profile, requests=100, arrivals=ClosedLoop(in_flight=5), script=script)
    assert report.completion_order == tuple(range(100))
    assert len({s.epoch for s in report.trace.of("compute")}) == 6


def test_a_link_that_slows_down_is_felt() -> None:
    slow = Link(source=DeviceId("a"), target=DeviceId("b"), latency_s=1e-4, bandwidth_bytes_per_s=1e6)
    report = simulate(*abc(), requests=20, script=(SetLink(at_s=0.5, link=slow),))
    assert report.latencies_s[-1] - report.latencies_s[0] == pytest.approx(0.4 - 0.004, rel=0.05)


def test_devices_without_a_path_cannot_be_deployed() -> None:
    plan, graph, cluster, profile = abc()
    island = replace(cluster, links=tuple(k for k in cluster.links if "c" not in (k.source, k.target)))
    with pytest.raises(EcotoneError, match="c"):
        simulate(plan, graph, island, profile)


def test_a_trace_is_a_file() -> None:
    trace = simulate(*abc(), requests=3).trace
    assert Trace.from_json(trace.to_json()) == trace


def _leaks(report: Report) -> list[int]:
    """Requests with more than one result."""
    order = list(report.completion_order)
    return [r for r in set(order) if order.count(r) != 1]
