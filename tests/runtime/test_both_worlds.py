"""One plan in both worlds: the simulator's virtual clock and real threads on shaped links carry out the same effects.

The links are slow enough to decide the times (a body takes tens of milliseconds, a stage well under one), so what must
agree does not depend on how busy the computer is: the order of completion, the latency of each request under load, and
the time for all of them.
"""

from __future__ import annotations

import statistics
import time

import pytest
from small_nets import cluster, even, lines

from ecotone.profile import CodecCost, Profile, SegmentTime
from ecotone.runtime import deploy, in_memory
from ecotone.simulator import ClosedLoop, simulate

pytestmark = pytest.mark.loopback

REQUESTS, IN_FLIGHT = 16, 3


@pytest.mark.parametrize("devices", [("a", "b"), ("b", "c"), ("a", "b", "c")])
def test_completion_order_and_times_agree(devices: tuple[str, ...]) -> None:
    captured, x = lines()
    graph = captured.graph
    slow = cluster("a", "b", "c", rate=2.5e4, latency_s=0.01)  # 1 KiB of activations: about 40 ms, and 10 ms
    chosen = even(graph, *devices)
    whole = range(graph.num_blocks + 1)
    profile = Profile(
        graph_hash=graph.content_hash(), cluster_name=slow.name, num_blocks=graph.num_blocks, cuts=tuple(whole),
        segments=tuple(
            SegmentTime(device=d.name, executor="torch:fp32", start=a, stop=b, median_s=3e-4, spread_s=0.0, memory_bytes=0)
            for d in slow.devices for a in whole for b in whole if a < b
        ),
        codecs=tuple(
            CodecCost(
                device=d.name, codec="fp32", encode_fixed_s=1e-4, encode_s_per_raw_byte=0.0, decode_fixed_s=1e-4,
                decode_s_per_raw_byte=0.0,
            )
            for d in slow.devices
        ),
    )  # fmt: skip
    simulated = simulate(chosen, graph, slow, profile, requests=REQUESTS, arrivals=ClosedLoop(in_flight=IN_FLIGHT))
    ended: list[int] = []
    with in_memory(slow) as nodes, deploy(chosen, captured, nodes, max_in_flight=IN_FLIGHT, ordered=True) as session:
        session(x)  # the first request of a plan meets cold segments
        start = time.perf_counter()
        futures = []
        for number in range(REQUESTS):
            future = session.submit((x,))
            future.add_done_callback(lambda _, number=number: ended.append(number))
            futures.append(future)
            if number + 1 >= IN_FLIGHT:
                futures[number + 1 - IN_FLIGHT].result(60)
        for future in futures:
            future.result(60)
        makespan_s = time.perf_counter() - start
        latencies_s = [trace.total_s for trace in session.report()[-REQUESTS:]]
    assert tuple(ended) == simulated.completion_order == tuple(range(REQUESTS))
    assert makespan_s == pytest.approx(simulated.makespan_s, rel=0.25)
    assert statistics.median(latencies_s) == pytest.approx(simulated.p50_s, rel=0.25)
