"""Plan sets under failures: against every set of every plan, against drawn failures, and the cases a person would check."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from enumeration import World, chain_graph, random_world
from failure_oracle import CRASH_S, REROUTE_S, SILENCE_S, Oracle, Sketch, sketches
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solve import camera_and_server

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.cost import predict, resident_bytes
from ecotone.plan import plan_violations
from ecotone.planner import (
    Detection,
    FailoverSolution,
    Latency,
    PlannerError,
    Throughput,
    Variant,
    Weights,
    assume,
    choose,
    solve,
)
from ecotone.planner.expectation import mean_max
from ecotone.planner.failover import TIE
from ecotone.planner.failures import elements_of, states_of
from ecotone.planset import shared_edge
from ecotone.profile import Profile, SegmentTime
from ecotone.protocol.settings import CoordinatorSettings

pytestmark = pytest.mark.pure

LOST_S = 10.0


def fragile(seed: int, *, tight: bool = False, most_blocks: int = 3, most_devices: int = 3) -> World | None:
    """A random world of few plans whose devices and links fail at random rates, some never; None where it is larger."""
    world = random_world(seed, tight=tight)
    if world.graph.num_blocks > most_blocks or len(world.cluster.devices) > most_devices:
        return None
    rng = np.random.default_rng(seed)

    def rate() -> tuple[float, float]:
        return (0.0 if rng.random() < 0.2 else float(10 ** rng.uniform(1, 4))), float(10 ** rng.uniform(-1, 1.5))

    devices = tuple(replace(d, mtbf_s=r[0], mttr_s=r[1]) for d in world.cluster.devices for r in [rate()])
    links = tuple(replace(k, mtbf_s=r[0], mttr_s=r[1]) for k in world.cluster.links for r in [rate()])
    return replace(world, cluster=replace(world.cluster, devices=devices, links=links))


def chosen(world: World, **options: object) -> FailoverSolution | None:
    try:
        return choose(world.graph, world.cluster, world.profile, weights=Weights(lost_s=LOST_S), **options)  # type: ignore[arg-type]
    except PlannerError:
        return None


def worlds(count: int, start: int = 0, **options: int | bool) -> list[World]:
    found = (fragile(seed, **options) for seed in range(start, start + 100_000))  # type: ignore[arg-type]
    return [w for w, _ in zip((w for w in found if w is not None), range(count), strict=False)]


@pytest.mark.parametrize(("survive", "standbys"), [(1, 1), (1, 2), (2, 2)])
def test_no_set_of_any_plans_is_better(survive: int, standbys: int) -> None:
    """Memory aside the pool holds the best set, but for twins that some plan outside it fits a little better."""
    ratios = []
    for world in worlds(8, start=1000 * survive + standbys):
        expected = Oracle(world, survive, LOST_S).best(standbys, fits=False)
        found = chosen(world, survive=survive, max_standbys=standbys)
        assert (found is None) == math.isinf(expected)
        if found is None:
            continue
        assert found.bound_s <= expected * (1 + 1e-9)
        ratios.append(found.expected_s / expected)
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) <= 1.01
    assert sum(r <= 1 + 1.01 * TIE for r in ratios) >= 0.75 * len(ratios)


def test_where_memory_is_short_the_bound_still_holds_and_the_choice_is_near() -> None:
    """The pool is not all plans, so under a memory limit another set may be a little better: never below the bound."""
    exact, tried = 0, 0
    for world in worlds(25, start=50_000, tight=True):
        expected = Oracle(world, 1, LOST_S).best(1)
        found = chosen(world, max_standbys=1)
        if math.isinf(expected):
            assert found is None
            continue
        assert found is not None
        room = {d.name: d.memory_bytes for d in world.cluster.devices}
        held = resident_bytes({world.graph.content_hash(): world.graph}, found.planset.plans)
        assert all(n <= room[d] for d, n in held.items())
        assert found.expected_s >= expected * (1 - 1e-9)
        assert found.bound_s <= expected * (1 + 1e-9)
        tried += 1
        exact += found.expected_s <= expected * (1 + 1.01 * TIE)
    assert tried >= 10
    assert exact >= 0.8 * tried


def sketch_of(world: World, plan: object) -> Sketch:
    row, stages = tuple(s.device for s in plan.stages), plan.stages  # type: ignore[attr-defined]
    cuts = (*(s.start for s in stages), stages[-1].stop)
    return next(s for s in sketches(world) if (s.cuts, s.row) == (cuts, row))


@pytest.mark.parametrize("survive", [1, 2, 3])
def test_the_stated_cost_is_that_of_the_second_reckoning(survive: int) -> None:
    """Every topology forced in turn, so that twins and standbys are priced too."""
    seen = set()
    for world in worlds(10, start=7000, most_blocks=4, most_devices=4):
        for kind in ("local", "passive", "active"):
            found = chosen(world, survive=survive, topologies=frozenset({kind}), max_standbys=1)
            if found is None:
                continue
            order = [sketch_of(world, p) for p in found.planset.plans]
            twin = order[1] if found.topology == "active" else None
            assert found.expected_s == pytest.approx(Oracle(world, survive, LOST_S).seconds(order, twin), rel=1e-5)
            seen.add(found.topology)
    assert seen >= {"none", "local", "passive", "active"}


def test_against_requests_that_meet_drawn_failures() -> None:
    """400,000 requests at random moments of a camera and server that fail often, each followed to its end."""
    rng = np.random.default_rng(5)
    mtbf, mttr, count = 3.0, 0.4, 400_000
    world = camera_and_server()
    devices = tuple(replace(d, mtbf_s=mtbf, mttr_s=mttr) for d in world.cluster.devices)
    world = replace(world, cluster=replace(world.cluster, devices=devices))
    found = choose(world.graph, world.cluster, world.profile, topologies=frozenset({"local"}))
    remote, local = (predict(p, world.graph, world.cluster, world.profile) for p in found.planset.plans)
    assert [s.device for s in remote.stages] == ["camera", "server"]
    head = remote.stages[0].compute_s if shared_edge(*found.planset.plans) else 0.0
    down = rng.random(count) < mttr / (mtbf + mttr)
    since, until = rng.exponential(mttr, count), rng.exponential(mtbf, count)
    left = np.where(down, np.maximum(CRASH_S - since, 0.0), until + CRASH_S)  # until it is noticed
    again = np.maximum(left + REROUTE_S, head) + local.latency_s - head
    seen = down & (since > CRASH_S)
    took = np.where(seen, local.latency_s, np.where(down | (until < remote.latency_s), again, remote.latency_s))
    assert found.expected_s == pytest.approx(took.mean(), rel=0.01)
    assert took.mean() > 1.03 * remote.latency_s  # the failures are felt


@settings(max_examples=50, deadline=None)
@given(span=st.floats(0, 3), shift=st.floats(0, 3), floor=st.floats(0, 3))
def test_mean_max_is_the_mean(span: float, shift: float, floor: float) -> None:
    steps = (np.arange(20_000) + 0.5) / 20_000 * span
    assert mean_max(span, shift, floor) == pytest.approx(float(np.maximum(steps + shift, floor).mean()), rel=1e-3, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), tight=st.booleans(), throughput=st.booleans(), survive=st.integers(1, 2))
def test_what_holds_of_every_choice(seed: int, tight: bool, throughput: bool, survive: int) -> None:
    world = fragile(seed, tight=tight, most_blocks=5, most_devices=4)
    objective = Throughput() if throughput else None
    found = chosen(world, objective=objective, survive=survive) if world else None
    if world is None or found is None:
        return
    room = {d.name: d.memory_bytes for d in world.cluster.devices}
    assert all(m.need_bytes <= room[m.device] for m in found.memory if found.planset.standbys)
    for plan in found.planset.plans:
        assert plan_violations(plan, world.graph, world.cluster) == ()
    assert found.bound_s <= found.expected_s <= found.plain_expected_s * (1 + TIE)
    assert found.overhead_fraction >= -1e-9
    assert FailoverSolution.from_json(found.to_json()) == found
    for kind in ("none", "local", "passive", "active"):
        one = chosen(world, objective=objective, survive=survive, topologies=frozenset({kind}))
        assert one is None or found.expected_s <= one.expected_s * (1 + 1.01 * TIE)
    assert chosen(world, objective=objective, survive=survive) == found


def three(memory: int = 10**9, server: float = 1e-3, other: float = 1.2e-3, cut_bytes: int = 500) -> World:
    """Four blocks of 10 ms on the camera; edge1 and edge2 compute one in `server` and `other`; alike links; one cut."""
    graph = chain_graph([10_000, 5_000, cut_bytes, 250, 250], [1000, 1000, 400_000, 400_000], [1.0] * 4)
    names = [DeviceId(n) for n in ("camera", "edge1", "edge2")]
    sizes = (memory, 10**9, 10**9)
    devices = tuple(Device(name=n, memory_bytes=m, mtbf_s=28800.0, mttr_s=60.0) for n, m in zip(names, sizes, strict=True))
    pairs = [(a, b) for e in names[1:] for a, b in ((names[0], e), (e, names[0]))]
    links = tuple(
        Link(source=a, target=b, latency_s=1e-3, bandwidth_bytes_per_s=1e6, mtbf_s=3600.0, mttr_s=5.0) for a, b in pairs
    )
    segments = tuple(
        SegmentTime(device=d, executor="torch:fp32", start=a, stop=b, median_s=(b - a) * t, spread_s=0, memory_bytes=0)
        for d, t in zip(names, (10e-3, server, other), strict=True)
        for a in range(4)
        for b in range(a + 1, 5)
    )
    profile = Profile(graph_hash=graph.content_hash(), cluster_name="c", num_blocks=4, cuts=(0, 2, 4), segments=segments)
    cluster = Cluster(name="c", devices=devices, links=links, source=names[0], sink=names[0])
    return World(graph, cluster, profile, {}, {}, {})


def test_the_expected_cost_by_hand() -> None:
    """Camera [0, 2), edge1 [2, 4): 20 + (1 + 2) + 2 + (1 + 1) = 27 ms; edge2 2.4 ms for its part: 27.4 ms; local 40 ms.

    Passive on edge2 shares the head of 20 ms. Unavailable: edge1 60 / 28860, its link 5 / 3605 (all others up), likewise
    for edge2. Steps: edge1 dies, 27 ms under way, noticed after 50 ms, 5 ms to reroute: mean of max(y + 55, 20) over
    [0, 27] is 68.5; + 27.4 - 20 - 27 = 48.9 ms late; until noticed max(y + 5, 20) - 20 over [0, 50]: 35 ^ 2 / 2 / 50.
    The link dies: noticed 1.5 * 27 + 150 ms after a run began, so 13.5 + 155 + 7.4 ms late; until then 150 + 27 ms.
    """
    world = three()
    found = choose(world.graph, world.cluster, world.profile, topologies=frozenset({"passive"}), max_standbys=1)
    assert [p.devices for p in found.planset.plans] == [("camera", "edge1"), ("camera", "edge2")]
    assert shared_edge(*found.planset.plans) == 1
    u, v = 60 / 28860, 5 / 3605
    all_up = (1 - u) ** 2 * (1 - v) ** 2
    odds = {"up": 1.0, "device": u / (1 - u), "link": v / (1 - v)}
    total = 1 + 2 * odds["device"] + 2 * odds["link"]
    degraded = 27e-3 * (1 + odds["device"] + odds["link"]) + 27.4e-3 * (odds["device"] + odds["link"])
    device = 27e-3 * 48.9e-3 + 50e-3 * (35e-3**2 / 2 / 50e-3)
    window = 150e-3 + 27e-3
    link = 27e-3 * (13.5e-3 + 155e-3 + 27.4e-3 - 20e-3) + window * ((window - 15e-3) ** 2 / 2 / window)
    assert all_up > 0
    expected = (degraded + device / 28800 + link / 3600) / total
    assert found.expected_s == pytest.approx(expected, rel=1e-9)
    assert found.overhead_fraction == pytest.approx(0.0)
    effects = {e.element: e for e in found.effects}
    assert effects["edge1"].recover_s == pytest.approx(55e-3 + 7.4e-3)
    assert effects["camera - edge1"].recover_s == pytest.approx(1.5 * 27e-3 + 155e-3 + 7.4e-3)
    assert effects["edge1"].served_by == "standby on edge2"


def test_local_fallback_needs_the_memory_of_the_tail() -> None:
    """Camera: the head has 2 kB of weights, the tail 800 kB. With 500 kB there is no T1, and the refusal says so."""
    roomy = three()
    assert choose(roomy.graph, roomy.cluster, roomy.profile, topologies=frozenset({"local"})).topology == "local"
    small = three(memory=500_000)
    with pytest.raises(PlannerError, match="local: camera has 500 kB, the plans together need 8"):
        choose(small.graph, small.cluster, small.profile, topologies=frozenset({"local"}))
    found = choose(small.graph, small.cluster, small.profile)
    assert found.topology == "passive"
    assert any(line.startswith("local rejected: camera has 500 kB") for line in found.lines())


def test_the_fallback_reuses_the_head() -> None:
    found = choose(*_parts(three()), topologies=frozenset({"local"}))
    primary, fallback = found.planset.plans
    assert shared_edge(primary, fallback) == 1
    assert [s.device for s in fallback.stages] == ["camera", "camera"]


def _parts(world: World) -> tuple:
    return world.graph, world.cluster, world.profile


def test_a_tight_recovery_asks_for_the_twin() -> None:
    """A link is doubted only after the deadline of a run, so only a twin answers within 100 ms of a cut."""
    world = three()
    found = choose(*_parts(world), recover_s=0.1)
    assert "active" in found.topology
    assert found.planset.standbys[0].mode == "active" or found.planset.standbys[1].mode == "active"
    assert all(e.recover_s is not None and e.recover_s <= 0.1 for e in found.effects)
    assert any("answers come" in line for line in found.lines())
    alone = choose(*_parts(world), recover_s=1e-3)  # nothing is fast enough but what cannot fail
    assert alone.planset.primary.devices == ("camera",)
    with pytest.raises(PlannerError, match="asked 1 ms"):
        choose(*_parts(three(memory=500_000)), recover_s=1e-3)


def test_twins_share_the_uplink_or_not() -> None:
    """2 kB at 1 MB/s take 2 ms; no time to encode, so both bodies start together and each takes 4 ms on one uplink."""
    shared = choose(*_parts(three()), topologies=frozenset({"active"}), max_standbys=1)
    assert shared.value_s == pytest.approx(27e-3 + 2e-3)
    assert shared.overhead_fraction == pytest.approx(2 / 27)
    apart = choose(*_parts(three()), topologies=frozenset({"active"}), max_standbys=1, separate_uplinks=True)
    assert apart.value_s == pytest.approx(27e-3)


def test_twins_halve_the_rate_of_one_uplink() -> None:
    """Throughput: 10 kB of the cut take 40 ms at 1 MB/s ... per frame and link; two of them 80 ms of one uplink."""
    world = three(cut_bytes=10_000)
    found = choose(*_parts(world), Throughput(), topologies=frozenset({"active"}), max_standbys=1)
    costs = [predict(p, *_parts(world)) for p in found.planset.plans]
    sent = [k.busy_s for c in costs for k in c.links if k.source == "camera"]
    assert found.value_s == pytest.approx(max(sum(sent), *(c.bottleneck_s for c in costs)))


def test_requirements_bind_the_primary_and_not_the_fallback() -> None:
    found = choose(*_parts(three()), require=("latency=30ms",))
    costs = [predict(p, *_parts(three())).latency_s for p in found.planset.plans]
    assert costs[0] <= 30e-3
    forced = choose(*_parts(three()), require=("latency=30ms",), topologies=frozenset({"local"}))
    assert predict(forced.planset.plans[1], *_parts(three())).latency_s == pytest.approx(40e-3)
    with pytest.raises(PlannerError, match="latency"):
        choose(*_parts(three()), require=("latency=28ms",), topologies=frozenset({"active"}), max_standbys=1)


def tiny(world: World, loss_points: float, seconds: float) -> Variant:
    """One block for the same inputs and outputs, on the camera alone."""
    graph = chain_graph([10_000, 250], [2000], [1.0], name="tiny")
    segment = SegmentTime(
        device=DeviceId("camera"), executor="torch:fp32", start=0, stop=1, median_s=seconds, spread_s=0, memory_bytes=0
    )
    profile = Profile(graph_hash=graph.content_hash(), cluster_name="c", num_blocks=1, cuts=(0, 1), segments=(segment,))
    return Variant(name="tiny", graph=graph, profile=profile, loss_points=loss_points)


def test_a_variant_stands_in_where_the_model_does_not_fit_or_is_slow() -> None:
    """Camera alone takes 40 ms; tiny 5 ms and 3 points. A point at 1 ms: 8 ms beat 40; at 100 ms the full model stays."""
    world = replace(three(), cluster=replace(three().cluster, links=three().cluster.links[:2]))  # edge1 only
    variant = tiny(world, 3.0, 5e-3)
    cheap = choose(*_parts(world), variants=[variant], weights=Weights(point_s=1e-3), max_standbys=1)
    assert cheap.topology == "variant"
    assert cheap.planset.primary.graph_hash == world.graph.content_hash()
    assert cheap.planset.standbys[0].label == "tiny on camera"
    assert choose(*_parts(world), variants=[variant], max_standbys=1).topology == "local"
    small = replace(
        world,
        cluster=replace(
            world.cluster, devices=(replace(world.cluster.devices[0], memory_bytes=500_000), *world.cluster.devices[1:])
        ),
    )
    assert choose(*_parts(small), variants=[variant], max_standbys=1).topology == "variant"


def test_where_nothing_fails_nothing_stands_by() -> None:
    world = camera_and_server()
    found = choose(*_parts(world))
    assert found.topology == "none"
    assert found.planset.primary == solve(*_parts(world), require=(), objective=Latency()).plan
    assert found.expected_s == found.value_s == found.plain_s


def test_rarer_failures_cost_less() -> None:
    world = camera_and_server()
    hours = [choose(world.graph, assume(world.cluster, h * 3600.0), world.profile).expected_s for h in (0.1, 1, 10, 100)]
    assert hours == sorted(hours, reverse=True)


def test_detection_is_what_the_coordinator_does() -> None:
    asker = CoordinatorSettings(session=1)
    assert Detection().silence_s == pytest.approx(asker.suspect_after_s + asker.pong_timeout_s) == pytest.approx(SILENCE_S)


def test_states_and_elements() -> None:
    """Ends do not count; of two directions the worse counts; odds of independent things."""
    world = three()
    elements = elements_of(world.cluster)
    assert [str(e) for e in elements] == ["edge1", "edge2", "camera - edge1", "camera - edge2"]
    states = states_of(elements, 1)
    assert states.probability.sum() == pytest.approx(1.0)
    assert states.probability[1] / states.probability[0] == pytest.approx(60 / 28800)
    worse = world.cluster.with_link(replace(world.cluster.links[1], mtbf_s=600.0, mttr_s=1.0))
    assert next(e for e in elements_of(worse) if str(e).endswith("camera - edge1") or "edge1 -" in str(e)).mtbf_s == 600.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topologies": frozenset({"prayer"})}, "prayer; known are none, local"),
        ({"topologies": frozenset()}, "none given"),
        ({"survive": 0}, "survive=0: from 1 to 3"),
        ({"topologies": frozenset({"variant"})}, "variant: no such plan was measured"),
    ],
)
def test_bad_questions_are_one_line(options: dict, message: str) -> None:
    with pytest.raises(PlannerError) as caught:
        choose(*_parts(three(memory=500_000)), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rates_in_a_cluster_file(tmp_path) -> None:
    file = tmp_path / "home.toml"
    file.write_text(
        'schema = "ecotone.cluster"\nversion = 1\nname = "home"\nsource = "a"\n'
        '[[device]]\nname = "a"\nmemory = "1 GB"\n[[device]]\nname = "b"\nmemory = "1 GB"\nmtbf = "8h"\nmttr = "30 s"\n'
        '[[link]]\nsource = "a"\ntarget = "b"\nlatency = "1 ms"\nbandwidth = "1 MB/s"\nmtbf = "20 min"\n'
    )
    cluster = Cluster.load(file)
    assert (cluster.device("b").mtbf_s, cluster.device("b").mttr_s) == (28800.0, 30.0)
    assert {(k.mtbf_s, k.mttr_s) for k in cluster.links} == {(1200.0, 10.0)}
    assert assume(cluster, 60.0).device("a").mtbf_s == 60.0
    assert assume(cluster, 60.0).device("b").mtbf_s == 28800.0
