"""Plans over all orders of the blocks against every topological order, cut everywhere, enumerated one by one."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from dag_worlds import DagWorld, EveryChain, inception_world, random_dag, random_dag_world
from enumeration import random_world

from ecotone.accuracy import AccuracyTable, Cell, ExitPolicy
from ecotone.cluster import DeviceId
from ecotone.cost import CostError, CostModel, predict
from ecotone.graph import Block, Graph, Tensor, TensorIndex
from ecotone.plan import Plan, plan_violations
from ecotone.planner import Latency, PlannerError, Throughput, baselines, solve, solve_dag
from ecotone.planner.blockwise import Blockwise, blockwise, prices
from ecotone.planner.dads import light_load
from ecotone.planner.ideals import Programme, lattice_of
from ecotone.planner.ideals_in_memory import least_in_memory
from ecotone.planner.objective import Asked
from ecotone.planner.placement import Placement, least_placement, makespan_s
from ecotone.planner.reordering import profile_in_order, same_cuts, world_of
from ecotone.planner.rows import best_of_rows, cut_row
from ecotone.profile import ExecutorFailure
from ecotone.simulator import simulate

pytestmark = pytest.mark.pure


def tables_of(world: DagWorld, **asked: object) -> Blockwise:
    return blockwise(CostModel(world.graph, world.cluster, world.profile), Asked(**asked))  # type: ignore[arg-type]


def topological_prefixes(graph: Graph) -> set[frozenset[int]]:
    """All sets of blocks that some topological order begins with, by walking the orders."""
    found = {frozenset[int]()}
    waiting = [frozenset[int]()]
    while waiting:
        done = waiting.pop()
        for v, block in enumerate(graph.blocks):
            grown = done | {v}
            if v not in done and {graph.tensors[t].producer for t in block.inputs} - {-1} <= done and grown not in found:
                found.add(grown)
                waiting.append(grown)
    return found


# ---- ideals --------------------------------------------------------------------------------------------------------------


def test_the_lattice_holds_every_prefix_of_every_order_and_its_frontier() -> None:
    for seed in range(20):
        graph = random_dag(np.random.default_rng(seed), 7)
        lattice = lattice_of(graph, 10_000)
        assert lattice is not None
        found = {frozenset(v for v in range(7) if bits >> v & 1) for layer in lattice.ideals for bits in layer}
        assert found == topological_prefixes(graph)
        assert lattice.num_ideals == len(found)
        for layer, rows in zip(lattice.ideals, lattice.frontiers, strict=True):
            for bits, row in zip(layer, rows, strict=True):
                inside = [v for v in range(7) if bits >> v & 1]
                other = graph.reordered((*inside, *(v for v in range(7) if v not in inside)))
                assert tuple(np.nonzero(row)[0]) == other.frontier(len(inside))
        assert lattice_of(graph, lattice.num_ideals) is not None
        assert lattice_of(graph, lattice.num_ideals - 1) is None


@pytest.mark.parametrize("objective", ["latency", "bytes", "server", "money"])
def test_the_best_chain_of_ideals_equals_enumeration(objective: str) -> None:
    reordered = 0
    for seed in range(16 if objective == "latency" else 4):
        world = random_dag_world(seed)
        expected = EveryChain(world, objective).least()
        lattice = lattice_of(world.graph, 1000)
        assert lattice is not None
        found = Programme(prices(tables_of(world), objective), lattice).best()
        if found is None:
            assert math.isinf(expected)
            continue
        assert found.value == pytest.approx(expected, rel=1e-9, abs=1e-12)
        reordered += found.order != tuple(range(world.graph.num_blocks))
    assert reordered or objective != "latency"


def test_energy_with_idle_watts_equals_enumeration() -> None:
    """Over the sets of devices that take part; the objective of the planner's energy is not asked here."""
    for seed in range(4):
        world = random_dag_world(seed)
        lattice = lattice_of(world.graph, 1000)
        tables = tables_of(world)
        assert lattice is not None
        others = [d for d in range(tables.num_devices) if d not in (tables.source, tables.sink)]
        sets = [c for n in range(len(others) + 1) for c in itertools.combinations(others, n)]
        found = [Programme(prices(tables, "energy", chosen), lattice).best() for chosen in sets]
        expected = EveryChain(world, "energy").least()
        assert min((c.value for c in found if c), default=math.inf) == pytest.approx(expected, rel=1e-9)


def test_the_next_best_chains_ascend_and_are_what_they_add_up_to() -> None:
    for seed in range(10):
        world = random_dag_world(seed, blocks=6)
        lattice = lattice_of(world.graph, 1000)
        assert lattice is not None
        few = Programme(prices(tables_of(world, codecs=("fp32",)), "latency"), lattice).best_few(5)
        assert [c.value for c in few] == sorted(c.value for c in few)
        assert len({c.stages for c in few}) == len(few)
        for chained in few:
            other = world.graph.reordered(chained.order)
            cuts = list(itertools.accumulate(len(blocks) for _, blocks in chained.stages))
            profile = profile_in_order(world.graph, other, world.cluster, world.profile, cuts)
            names = [world.cluster.devices[m].name for m, _ in chained.stages]  # one executor: machines are devices
            plan = solve(other, world.cluster, profile, Latency(), ("codec=fp32",), num_runners_up=0)
            assert plan.value <= chained.value * (1 + 1e-9)
            if plan.value >= chained.value * (1 - 1e-9):
                assert [s.device for s in plan.plan.stages] == names


def test_memory_that_binds_equals_enumeration() -> None:
    found_some = 0
    for seed in range(20):
        world = random_dag_world(seed, tight=True)
        expected = EveryChain(world, "latency").least()
        lattice = lattice_of(world.graph, 1000)
        assert lattice is not None
        found = least_in_memory(Programme(prices(tables_of(world), "latency"), lattice), time.perf_counter() + 20)
        assert found.bound == pytest.approx(expected, rel=1e-9)
        if found.chained is None:
            assert math.isinf(expected)
            continue
        assert found.chained.value == pytest.approx(expected, rel=1e-9)
        found_some += 1
    assert found_some >= 5


# ---- rows of machines, direct sends --------------------------------------------------------------------------------------


def test_rows_of_machines_find_what_the_lattice_finds() -> None:
    for seed in range(15):
        world = random_dag_world(seed, blocks=7)
        tables, lattice = tables_of(world, codecs=("fp32",)), lattice_of(world.graph, 1000)
        assert lattice is not None
        for objective in ("latency", "money"):
            price = prices(tables, objective)
            best = Programme(price, lattice).best()
            found = best_of_rows(price, 4, time.perf_counter() + 20)
            if best is None:
                assert not found.found
            elif len(best.stages) <= 4:
                assert found.found[0].value == pytest.approx(best.value, rel=1e-9)
                assert found.bound == pytest.approx(best.value, rel=1e-9)


def test_a_row_of_two_machines_is_dads() -> None:
    for seed in range(15):
        world = random_dag_world(seed, blocks=7)
        tables = tables_of(world, codecs=("fp32",))
        price = prices(tables, "latency")
        for server in (d for d in range(tables.num_devices) if d != tables.source):
            try:
                cut = light_load(price, server, 0)
            except PlannerError:
                continue
            assert cut is not None
            rows = [cut_row(price, row) for row in ((tables.source,), (server,), (tables.source, server))]
            values = [row.chained.value for row in rows if row.chained]
            assert min(values) == pytest.approx(cut.value, rel=1e-9)


def test_direct_sends_equal_enumeration_and_their_relaxation_bounds_every_plan() -> None:
    for seed in range(8):
        world = random_dag_world(seed)
        price, lattice = prices(tables_of(world), "latency"), lattice_of(world.graph, 1000)
        assert lattice is not None
        expected = min(
            _direct(world, row) for row in itertools.product(world.cluster.devices, repeat=world.graph.num_blocks)
        )
        try:
            found = least_placement(price, 20.0)
        except PlannerError:
            assert math.isinf(expected)
            continue
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert found.bound == pytest.approx(expected, rel=1e-6)
        chain = Programme(price, lattice).best()
        assert chain is None or least_placement(price, 20.0, relaxed=True).bound <= chain.value * (1 + 1e-9)


def _direct(world: DagWorld, row: tuple) -> float:
    """Seconds of all blocks and of all tensors sent straight, latency once per pair, from the world's own tables."""
    links = {(k.source, k.target): k for k in world.cluster.links}
    total = sum(world.seconds[d.name, v] for v, d in enumerate(row)) + sum(world.overhead[d.name] for d in set(row))
    pairs = set()
    for t, tensor in enumerate(world.graph.tensors):
        here = world.cluster.source if tensor.producer < 0 else row[tensor.producer].name
        wanted = {row[v].name for v, block in enumerate(world.graph.blocks) if t in block.inputs}
        for there in (wanted | ({world.cluster.sink} if t in world.graph.outputs else set())) - {here}:
            if (here, there) not in links:
                return math.inf
            size = 4 * tensor.num_elements
            total += size * (world.codec[here, "fp32"][0] + world.codec[there, "fp32"][1])
            total += size / links[here, there].bandwidth_bytes_per_s
            pairs.add((here, there))
    return total + sum(links[pair].latency_s for pair in pairs)


def test_the_makespan_overlaps_branches() -> None:
    """Two branches of 4 and 5 s on two machines: 1 + 5 + 1, where one machine alone takes 11 s."""
    world = random_dag_world(0)
    graph = _diamond((1, 4, 5, 1))
    price = _price_of(world, graph, (1.0, 4.0, 5.0, 1.0))
    apart = Placement(machines=(0, 1, 0, 0), devices=(), value=0.0, bound=0.0)
    together = Placement(machines=(0, 0, 0, 0), devices=(), value=0.0, bound=0.0)
    assert makespan_s(price, together) == pytest.approx(11.0, abs=0.1)
    assert makespan_s(price, apart) == pytest.approx(7.0, abs=0.1)


def _diamond(sizes: tuple[int, ...]) -> Graph:
    tensors = [Tensor(name=f"t{i}", shape=(1, 4), dtype="float32", producer=i - 1) for i in range(5)]
    reads = ((0,), (1,), (1,), (2, 3))
    blocks = tuple(
        Block(name=f"b{i}", inputs=tuple(TensorIndex(t) for t in r), outputs=(TensorIndex(i + 1),), flop=float(sizes[i]))
        for i, r in enumerate(reads)
    )
    return Graph(name="diamond", blocks=blocks, tensors=tuple(tensors), inputs=(TensorIndex(0),), outputs=(TensorIndex(4),))


def _price_of(world: DagWorld, graph: Graph, seconds: tuple[float, ...]) -> object:
    cluster = replace(world.cluster, devices=world.cluster.devices[:2], links=(), source=world.cluster.devices[0].name,
                      sink=world.cluster.devices[0].name)  # fmt: skip
    pair = [d.name for d in cluster.devices]
    link = replace(world.cluster.links[0], source=pair[0], target=pair[1], latency_s=0.0, bandwidth_bytes_per_s=1e9)
    cluster = replace(cluster, links=(link, replace(link, source=pair[1], target=pair[0])))
    segment = world.profile.segments[0]
    spans = [(0, c) for c in range(1, 5)] + [(c, 4) for c in range(1, 4)]
    segments = tuple(
        replace(segment, device=name, start=a, stop=b, median_s=sum(seconds[a:b])) for name in pair for a, b in spans
    )
    profile = replace(
        world.profile, graph_hash=graph.content_hash(), num_blocks=4, cuts=(0, 1, 2, 3, 4), segments=segments, payloads=(),
        codecs=(),
    )  # fmt: skip
    return prices(blockwise(CostModel(graph, cluster, profile), Asked()), "latency")


# ---- solve_dag -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tight", [False, True])
def test_solve_dag_equals_enumeration_and_proves_it(tight: bool) -> None:
    gained = answered = 0
    for seed in range(14):
        world = random_dag_world(seed, tight=tight)
        expected = EveryChain(world, "latency").least()
        try:
            found = solve_dag(world.graph, world.cluster, world.profile, Latency())
        except PlannerError:
            assert math.isinf(expected)
            continue
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert found.bound == pytest.approx(expected, rel=1e-9)
        assert plan_violations(found.plan, world.graph, world.cluster) == ()
        assert plan_violations(found.plan, found.graph, world.cluster) == ()
        assert predict(found.plan, found.graph, world.cluster, found.profile) == found.cost
        assert found.order == found.plan.order
        answered += 1
        gained += found.gain > 1e-6
    assert answered >= 7
    assert gained >= 1


def test_on_a_chain_it_is_the_plain_answer() -> None:
    for seed in range(6):
        world = random_world(seed)
        try:
            plain = solve(world.graph, world.cluster, world.profile, Latency())
        except PlannerError:
            with pytest.raises(PlannerError):
                solve_dag(world.graph, world.cluster, world.profile, Latency())
            continue
        found = solve_dag(world.graph, world.cluster, world.profile, Latency())
        assert found.method == "chain"
        assert found.order == ()
        assert found.solution == plain
        assert found.bound == plain.bound


def test_on_inception_like_graphs_it_beats_the_best_cut() -> None:
    """The best cut at a single tensor, and the best cut anywhere in the captured order."""
    better = {"single": 0, "captured": 0}
    for seed in range(6):
        world = inception_world(seed)
        found = solve_dag(world.graph, world.cluster, world.profile, Latency())
        assert found.bound == pytest.approx(found.value, rel=1e-9)
        papers = replace(world.profile, cuts=(0, *world.graph.single_tensor_cuts(), world.graph.num_blocks))
        for name, profile in (("single", papers), ("captured", world.profile)):
            value = solve(world.graph, world.cluster, profile, Latency(), num_runners_up=0).value
            assert found.value <= value * (1 + 1e-9)
            better[name] += found.value < 0.99 * value
    assert better["single"] >= 1
    assert better["captured"] >= 1


def test_a_large_lattice_is_searched_by_rows_with_a_bound() -> None:
    for seed in range(6):
        world = random_dag_world(seed, blocks=7)
        try:
            exact = solve_dag(world.graph, world.cluster, world.profile, Latency())
        except PlannerError:
            continue
        if exact.method != "ideals":
            continue
        found = solve_dag(world.graph, world.cluster, world.profile, Latency(), most_ideals=3)
        assert found.method == "rows"
        assert found.bound <= exact.value * (1 + 1e-9)
        assert found.value >= exact.value * (1 - 1e-9)
        if len(exact.plan.stages) <= 3:
            assert found.value == pytest.approx(exact.value, rel=1e-9)


def test_of_many_devices_the_promising_ones_are_looked_at() -> None:
    """40 copies of a slow server beside the fast one: the answer is that without them, and no bound is claimed."""
    solved = ((w, solve_dag(w.graph, w.cluster, w.profile, Latency())) for w in map(inception_world, range(20)))
    world, few = next((w, found) for w, found in solved if found.order)
    slow = [replace(world.cluster.devices[0], name=DeviceId(f"slow{i}")) for i in range(40)]
    ends = [(DeviceId("device"), d.name) for d in slow] + [(d.name, DeviceId("device")) for d in slow]
    links = tuple(replace(world.cluster.links[0], source=a, target=b) for a, b in ends)
    many = replace(world.cluster, devices=(*slow, *world.cluster.devices), links=(*links, *world.cluster.links))
    copied = [replace(s, device=d.name) for d in slow for s in world.profile.segments if s.device == "device"]
    profile = replace(world.profile, segments=(*copied, *world.profile.segments))
    found = solve_dag(world.graph, many, profile, Latency())
    assert found.value == pytest.approx(few.value, rel=1e-9)
    assert found.bound == 0.0


def test_where_no_order_can_be_sought_the_captured_one_answers() -> None:
    """The executor failed on one block, so nothing is known of it elsewhere than in what was measured with it."""
    for seed in range(5):
        world = random_dag_world(seed)
        failed = tuple(
            ExecutorFailure(device=d.name, executor="torch:fp32", start=1, stop=2, reason="no")
            for d in world.cluster.devices
        )
        profile = replace(world.profile, failures=failed)
        try:
            plain = solve(world.graph, world.cluster, profile, Latency())
        except PlannerError:
            with pytest.raises(PlannerError):
                solve_dag(world.graph, world.cluster, profile, Latency())
            continue
        found = solve_dag(world.graph, world.cluster, profile, Latency())
        assert found.plan == plain.plan
        assert found.bound in (0.0, plain.bound)


def test_requirements_hold_in_every_order() -> None:
    for seed in range(4):
        world = random_dag_world(seed)
        try:
            found = solve_dag(world.graph, world.cluster, world.profile, Latency(), ("stages=1",))
        except PlannerError:
            continue
        assert len(found.plan.stages) == 1
        fast = solve_dag(world.graph, world.cluster, world.profile, Throughput(), (f"latency={2e6 * found.value:.3f}us",))
        assert fast.cost.latency_s <= 2 * found.value * (1 + 1e-6)
        assert fast.value <= solve(world.graph, world.cluster, world.profile, Throughput()).value * 1.5
        assert fast.bound == 0.0 or fast.method == "chain"


def test_a_score_decides_among_the_best() -> None:
    """A score that likes more stages gets them, and is asked for plans of several orders."""
    for seed in range(5):
        world = random_dag_world(seed, blocks=6)
        asked: list[Plan] = []

        def score(plan: Plan, seen: list[Plan] = asked) -> float:
            seen.append(plan)
            return -float(len(plan.stages))

        try:
            found = solve_dag(world.graph, world.cluster, world.profile, Latency(), score=score)
        except PlannerError:
            continue
        if found.method == "chain":
            continue
        assert [c.plan for c in found.candidates] == asked
        assert len({plan.order for plan in asked}) < len(asked)  # runners-up of an order among them
        assert len(found.plan.stages) == max(len(plan.stages) for plan in asked)
        assert found.bound <= found.value == found.cost.latency_s


def test_the_simulator_is_such_a_score() -> None:
    """One request alone takes what the cost model says, so its order of candidates is that of their values."""
    for seed in range(2):
        world = inception_world(seed)

        def mean_s(plan: Plan, world: DagWorld = world) -> float:
            return simulate(plan, world.graph, world.cluster, world.profile, requests=2, trace=False).mean_s

        found = solve_dag(world.graph, world.cluster, world.profile, Latency(), score=mean_s)
        assert found.method == "ideals"
        for candidate in found.candidates:
            assert candidate.score == pytest.approx(candidate.value, rel=0.02)
        assert found.value <= min(c.value for c in found.candidates) * 1.02


# ---- orders of a profile -------------------------------------------------------------------------------------------------


def test_a_profile_in_another_order_prices_what_adds_up_exactly() -> None:
    """The oracle's own seconds, for every segment of random orders."""
    for seed in range(10):
        world = random_dag_world(seed)
        order = topological(world.graph, seed)
        graph, profile = world_of(order, world.graph, world.cluster, world.profile)
        model = CostModel(graph, world.cluster, profile)
        assert profile.graph_hash == graph.content_hash()
        for device in world.cluster.devices:
            times = model.stage_times(device.name, "torch:fp32")
            assert times is not None
            for a, b in itertools.combinations(range(graph.num_blocks + 1), 2):
                wanted = world.overhead[device.name] + sum(world.seconds[device.name, order[i]] for i in range(a, b))
                assert times.seconds(a, b)[0] == pytest.approx(wanted)
        for p in range(graph.num_blocks + 1):
            known = {c for f, c in world.payload if f == graph.frontier(p)}
            assert {x.codec for x in profile.payloads if x.position == p} == known


def topological(graph: Graph, seed: int) -> tuple[int, ...]:
    rng, order = np.random.default_rng(seed), []
    while len(order) < graph.num_blocks:
        ready = [
            v for v, b in enumerate(graph.blocks)
            if v not in order and {graph.tensors[t].producer for t in b.inputs} - {-1} <= set(order)
        ]  # fmt: skip
        order.append(int(rng.choice(ready)))
    return tuple(order)


def test_measured_prefixes_and_the_accuracy_table_go_along() -> None:
    world = random_dag_world(1)
    graph, count = world.graph, world.graph.num_blocks
    cells = tuple(
        Cell(position=p, codec="int8", num_decisions=9, points=99.0, loss_points=1.0, low_points=0.0, high_points=2.0,
             fitted_points=float(p + 1))
        for p in (-1, *range(count))
    )  # fmt: skip
    policy = ExitPolicy(name="p", exits=("e",), thresholds=(0.5,), shares=(0.5,), loss_points=0.1)
    table = AccuracyTable(
        graph_hash=graph.content_hash(),
        data_hash="d",
        is_labelled=True,
        reference_points=100.0,
        cells=cells,
        policies=(policy,),
    )
    segments = tuple(replace(s, median_s=s.median_s + 1.0, spread_s=0.5) for s in world.profile.segments)
    profile = replace(world.profile, segments=segments, accuracy=table)
    other = graph.reordered(topological(graph, 3))
    kept = same_cuts(graph, other, range(count + 1))
    made = profile_in_order(graph, other, world.cluster, profile)
    assert {0, count} <= set(kept)
    for segment in made.segments:
        assert (segment.spread_s == 0.5) == ({segment.start, segment.stop} <= set(kept))
    assert made.accuracy is not None
    assert made.accuracy.graph_hash == other.content_hash()
    assert made.accuracy.policies == (policy,)
    for p in range(count + 1):
        cell = made.accuracy.cell(p, "int8")
        same = [q for q in range(count) if graph.frontier(q) == other.frontier(p)]
        assert (cell is None) == (not same)
    assert made.accuracy.cell(-1, "int8") is not None


def test_a_plan_is_not_priced_on_another_order() -> None:
    for seed in range(30):
        world = random_dag_world(seed)
        try:
            found = solve_dag(world.graph, world.cluster, world.profile, Latency())
        except PlannerError:
            continue
        if found.order:
            with pytest.raises(CostError, match="another order"):
                predict(found.plan, world.graph, world.cluster, world.profile)
            return
    raise AssertionError("no world gains by another order")


# ---- the baseline --------------------------------------------------------------------------------------------------------


def test_dads_is_never_behind_the_best_cut_and_equal_on_chains() -> None:
    """Both float32 between device and server; on the blocks' own times, which add up here."""
    better = 0
    for seed in range(20):
        world = random_dag_world(seed, blocks=10, devices=2)
        try:
            plan = baselines.place("dads", world.graph, world.cluster, world.profile)
            one_cut = baselines.place("neurosurgeon", world.graph, world.cluster, world.profile)
        except PlannerError:
            continue
        graph, profile = world_of(plan.order, world.graph, world.cluster, world.profile)
        ours = predict(plan, graph, world.cluster, profile).latency_s
        theirs = predict(one_cut, world.graph, world.cluster, world.profile).latency_s
        assert ours <= theirs * (1 + 1e-9)
        better += ours < theirs * (1 - 1e-6)
        assert plan_violations(plan, world.graph, world.cluster) == ()
    assert better >= 1
    for seed in range(4):
        chain = random_world(seed, additive=True)
        try:
            plans = [baselines.place(n, chain.graph, chain.cluster, chain.profile) for n in ("dads", "neurosurgeon")]
        except PlannerError:
            continue
        values = [predict(p, chain.graph, chain.cluster, chain.profile).latency_s for p in plans]
        assert values[0] == pytest.approx(values[1], rel=1e-9)
