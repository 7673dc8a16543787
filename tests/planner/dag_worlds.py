"""Random problems on models with branches, and oracles that enumerate all placements: they share no code with the planner.

Two machines (`random_problem`, `enumerated`): every set of blocks on the first machine, priced for all sets at once. Several
(`random_dag_world`, `EveryChain`): every topological order, cut everywhere, every row of devices and codecs, one by one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np

from ecotone.cluster import Cluster, Device, DeviceId, Link, Power
from ecotone.graph import Block, Graph, Parameter, Tensor, TensorIndex
from ecotone.planner.mincut import Parcel, TwoTier
from ecotone.profile import CodecCost, Payload, Profile, SegmentTime


def random_problem(rng: np.random.Generator, *, plain: bool = False) -> TwoTier:
    """A random DAG of 2 to 10 blocks with one or two inputs; `plain`: DADS's own problem, only the result comes home."""
    count = int(rng.integers(2, 11))
    speed = float(rng.choice([0.3, 1.0, 3.0, 10.0]))
    first = rng.uniform(0.1, 3.0, count).tolist()
    second = (rng.uniform(0.1, 3.0, count) / speed).tolist()
    scale = float(10 ** rng.uniform(-1.5, 0.8))
    readers: list[set[int]] = [set() for _ in range(count + 2)]  # tensors 0 and 1 are inputs, v + 2 is what block v makes
    num_inputs = int(rng.integers(1, 3))
    for v in range(count):
        for maker in rng.choice(v + num_inputs, min(v + num_inputs, int(rng.integers(1, 4))), replace=False):
            readers[maker if maker < num_inputs else maker - num_inputs + 2].add(v)
    parcels = []
    for tensor in range(count + 2):
        maker = tensor - 2 if tensor >= 2 else -1
        is_result = maker >= 0 and (not readers[tensor] or (not plain and rng.random() < 0.1))
        if readers[tensor] or is_result:
            send, home = float(rng.uniform(0, 2) * scale), float(rng.uniform(0, 2) * scale) if is_result else 0.0
            parcels.append(
                Parcel(maker=maker, readers=tuple(sorted(readers[tensor])), send=send, is_result=is_result, home=home)
            )
    problem = TwoTier(first=tuple(first), second=tuple(second), parcels=tuple(parcels), relayed=False)
    return problem if plain else _with_fixed_costs(rng, problem)


def _with_fixed_costs(rng: np.random.Generator, problem: TwoTier) -> TwoTier:
    """Latencies and other costs that are paid once, results wanted elsewhere, blocks that run on one side only."""
    fixed = [float(v) if rng.random() < 0.7 else 0.0 for v in rng.uniform(0, 2.0, 5)]
    ends_at_second, relayed = bool(rng.random() < 0.3), bool(rng.random() < 0.5)
    first, second = list(problem.first), list(problem.second)
    for side in (first, second):
        for v in range(len(side)):
            side[v] = math.inf if rng.random() < 0.03 else side[v]
    at_home = tuple(replace(p, home=0.0) for p in problem.parcels) if ends_at_second else problem.parcels
    return TwoTier(
        first=tuple(first), second=tuple(second), parcels=at_home, first_fixed=fixed[0], second_fixed=fixed[1],
        send_fixed=fixed[2], home_fixed=0.0 if ends_at_second else fixed[3],
        stay_fixed=fixed[4] if relayed and not ends_at_second else 0.0, ends_at_second=ends_at_second, relayed=relayed,
    )  # fmt: skip


def enumerated(problem: TwoTier) -> float:
    """The least value over all sets of blocks on the first machine, priced here for all sets at once."""
    count = len(problem.first)
    on_first = (np.arange(1 << count)[:, None] >> np.arange(count) & 1).astype(np.bool_)
    some_second, some_first = ~on_first.all(axis=1), on_first.any(axis=1)
    total = np.where(on_first, np.array(problem.first), np.array(problem.second)).sum(axis=1)
    total += np.where(some_first, problem.first_fixed, 0.0) + np.where(some_second, problem.second_fixed, 0.0)
    over = some_second | problem.ends_at_second
    total += np.where(over, problem.send_fixed, problem.stay_fixed)
    comes_home = over & problem.relayed
    for parcel in problem.parcels:
        here = on_first[:, parcel.maker] if parcel.maker >= 0 else np.ones(1 << count, dtype=np.bool_)
        readers = on_first[:, list(parcel.readers)]
        total[~here & readers.any(axis=1)] = math.inf
        needed = ~readers.all(axis=1)
        if parcel.is_result:
            needed |= problem.ends_at_second | (over & problem.relayed)
            total += parcel.home * (over if problem.relayed else ~here)
            comes_home |= ~here & (not problem.relayed)
        total += parcel.send * (here & needed)
    total += problem.home_fixed * comes_home
    return float(total.min())


@dataclass(frozen=True)
class DagWorld:
    """A model with branches on a few unlike machines, and the tables behind its profile, whose times add up over blocks."""

    graph: Graph
    cluster: Cluster
    profile: Profile
    seconds: dict[tuple[str, int], float]  # (device, block)
    overhead: dict[str, float]
    payload: dict[tuple[tuple[int, ...], str], float]  # (frontier, codec): bytes, of codecs that may be used there
    codec: dict[tuple[str, str], tuple[float, float]]  # (device, codec): seconds per raw byte to encode and to decode


def random_dag(rng: np.random.Generator, blocks: int) -> Graph:
    """Blocks that read one to three earlier tensors; one or two inputs and outputs, some block with two results."""
    tensors: list[Tensor] = []
    for i in range(int(rng.integers(1, 3))):
        tensors.append(Tensor(name=f"x{i}", shape=(1, int(rng.integers(1, 400))), dtype="float32", producer=-1))
    inputs, made, read = tuple(range(len(tensors))), [], set()
    for b in range(blocks):
        picked = rng.choice(len(tensors), min(len(tensors), int(rng.integers(1, 4))), replace=False)
        unread = [t for t in inputs if t not in read and t not in picked]
        picked = np.array([*picked, *unread[: b >= blocks // 2]], dtype=np.intp)  # every input has a reader in the end
        read |= {int(t) for t in picked}
        outputs = []
        for k in range(2 if rng.random() < 0.2 else 1):
            outputs.append(len(tensors))
            shape = (1, int(rng.integers(1, 400)))
            tensors.append(Tensor(name=f"b{b}.{k}", shape=shape, dtype="float32", producer=b))
        made.append(
            Block(
                name=f"b{b}", inputs=tuple(sorted(TensorIndex(int(t)) for t in picked)),
                outputs=tuple(TensorIndex(t) for t in outputs), flop=1.0, parameters=(b,),
            )
        )  # fmt: skip
    results = [t for t in range(len(inputs), len(tensors)) if t not in read or rng.random() < 0.08]
    parameters = tuple(Parameter(name=f"w{b}", size_bytes=int(rng.integers(10_000, 100_000))) for b in range(blocks))
    return Graph(
        name="dag", blocks=tuple(made), tensors=tuple(tensors), inputs=tuple(TensorIndex(i) for i in inputs),
        outputs=tuple(TensorIndex(t) for t in results), parameters=parameters,
    )  # fmt: skip


def inception_like(rng: np.random.Generator, modules: int = 3) -> Graph:
    """A stem, then modules as Inception has them: two to four branches of a reduction and what follows it, joined again."""
    sizes: list[tuple[int, int]] = [(int(rng.integers(40, 120)) * 100, -1)]  # elements, producer
    blocks: list[tuple[list[int], int]] = []  # tensors read; the number of the tensor made

    def add(reads: list[int], elements: int) -> int:
        sizes.append((elements, len(blocks)))
        blocks.append((reads, len(sizes) - 1))
        return len(sizes) - 1

    x = add([0], int(rng.integers(20, 50)) * 100)
    for _ in range(modules):
        wide, ends = sizes[x][0], []
        for _ in range(int(rng.integers(2, 5))):
            end = add([x], int(wide * rng.uniform(0.05, 0.3)))
            for _ in range(int(rng.integers(0, 3))):
                end = add([end], int(wide * rng.uniform(0.1, 0.5)))
            ends.append(end)
        x = add(ends, int(wide * rng.uniform(0.6, 1.1)))
    last = add([x], 10)
    return Graph(
        name="inception", inputs=(TensorIndex(0),), outputs=(TensorIndex(last),),
        tensors=tuple(Tensor(name=f"t{i}", shape=(1, n), dtype="float32", producer=p) for i, (n, p) in enumerate(sizes)),
        blocks=tuple(
            Block(
                name=f"b{i}", inputs=tuple(TensorIndex(t) for t in reads), outputs=(TensorIndex(made),), flop=1.0,
                parameters=(i,),
            )
            for i, (reads, made) in enumerate(blocks)
        ),
        parameters=tuple(Parameter(name=f"w{i}", size_bytes=1000) for i in range(len(blocks))),
    )  # fmt: skip


def inception_world(seed: int) -> DagWorld:
    """An Inception-like graph between a device and a server five to twenty times as fast, over a slow link."""
    rng = np.random.default_rng(seed)
    graph = inception_like(rng)
    names = ["device", "server"]
    work = rng.uniform(5e-4, 3e-3, graph.num_blocks)
    faster = float(rng.uniform(5, 20))
    seconds = {(n, b): float(work[b] / (faster if n == "server" else 1)) for n in names for b in range(graph.num_blocks)}
    payload = {
        (graph.frontier(p), "fp32"): 4.0 * sum(graph.tensors[t].num_elements for t in graph.frontier(p))
        for p in range(graph.num_blocks + 1)
    }
    per_byte = {(n, "fp32"): (1e-9, 1e-9) for n in names}
    rate = float(10 ** rng.uniform(5.7, 6.7))
    cluster = Cluster(
        name="two", source=DeviceId("device"), sink=DeviceId("device"),
        devices=tuple(Device(name=DeviceId(n), memory_bytes=10**9) for n in names),
        links=tuple(
            Link(source=DeviceId(a), target=DeviceId(b), latency_s=5e-4, bandwidth_bytes_per_s=rate)
            for a, b in (("device", "server"), ("server", "device"))
        ),
    )  # fmt: skip
    overhead = dict.fromkeys(names, 0.0)
    return DagWorld(
        graph, cluster, _profile(graph, seconds, overhead, payload, per_byte), seconds, overhead, payload, per_byte
    )


def random_dag_world(seed: int, *, tight: bool = False, blocks: int = 5, devices: int = 3) -> DagWorld:
    """2 to `devices` machines in random order, links unlike by direction and partly missing, int8 on the captured frontiers.

    `tight`: memory for 40 to 80 % of the weights on every machine.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, devices + 1))
    graph = random_dag(rng, int(rng.integers(3, blocks + 1)))
    names = [f"m{i}" for i in rng.permutation(count)]
    whole = sum(p.size_bytes for p in graph.parameters)
    machines = tuple(
        Device(
            name=DeviceId(n), memory_bytes=int(whole * rng.uniform(0.4, 0.8)) + 6000 if tight else 10**9,
            power=Power(busy_watt=float(rng.uniform(3, 9)), idle_watt=float(rng.uniform(0, 2)), send_joule_per_byte=1e-6),
            price_money_per_s=float(rng.uniform(0, 1)),
        )
        for n in names
    )  # fmt: skip
    links = tuple(
        Link(
            source=DeviceId(a), target=DeviceId(b), latency_s=float(rng.choice([0.0, 1e-4, 5e-4])),
            bandwidth_bytes_per_s=float(10 ** rng.uniform(5.5, 7)), price_money_per_byte=float(rng.uniform(0, 1e-6)),
        )
        for a, b in rng.permutation(np.array(list(itertools.permutations(names, 2)), dtype=object)).tolist()
        if rng.random() < 0.85
    )  # fmt: skip
    work = rng.uniform(1e-4, 5e-3, graph.num_blocks)
    speed = {n: rng.choice([0.3, 1.0, 3.0]) for n in names}
    seconds = {(n, b): float(work[b] / speed[n] * rng.uniform(0.3, 2.0)) for n in names for b in range(graph.num_blocks)}
    overhead = {n: float(rng.choice([0.0, 1e-4])) for n in names}
    payload = {}
    for p in range(graph.num_blocks + 1):
        frontier = graph.frontier(p)
        elements = sum(graph.tensors[t].num_elements for t in frontier)
        payload[frontier, "fp32"] = 4.0 * elements
        if rng.random() < 0.7:
            payload[frontier, "int8"] = elements + 8.0 * len(frontier)
    per_byte = {(n, c): tuple(float(v) for v in rng.uniform(1e-9, 2e-7, 2)) for n in names for c in ("fp32", "int8")}
    source = str(rng.choice(names))
    sink = source if rng.random() < 0.6 else str(rng.choice(names))
    cluster = Cluster(name="w", devices=machines, links=links, source=DeviceId(source), sink=DeviceId(sink))
    profile = _profile(graph, seconds, overhead, payload, per_byte)
    return DagWorld(graph, cluster, profile, seconds, overhead, payload, per_byte)


def _profile(graph: Graph, seconds: dict, overhead: dict, payload: dict, per_byte: dict) -> Profile:
    """Prefixes and suffixes at every cut, as the profiler measures them."""
    last, segments = graph.num_blocks, []
    for device, once in overhead.items():
        for start, stop in {(0, c) for c in range(1, last + 1)} | {(c, last) for c in range(last)}:
            median_s = once + sum(seconds[device, b] for b in range(start, stop))
            segments.append(
                SegmentTime(
                    device=DeviceId(device), executor="torch:fp32", start=start, stop=stop, median_s=median_s,
                    spread_s=0.0, memory_bytes=0,
                )
            )  # fmt: skip
    codecs = tuple(
        CodecCost(
            device=DeviceId(d), codec=c, encode_fixed_s=0.0, encode_s_per_raw_byte=e, decode_fixed_s=0.0,
            decode_s_per_raw_byte=f,
        )
        for (d, c), (e, f) in per_byte.items()
    )  # fmt: skip
    payloads = tuple(
        Payload(position=p, codec=c, size_bytes=payload[graph.frontier(p), c])
        for p in range(last + 1)
        for c in ("fp32", "int8")
        if (graph.frontier(p), c) in payload
    )
    return Profile(
        graph_hash=graph.content_hash(), cluster_name="w", num_blocks=last, cuts=tuple(range(last + 1)),
        segments=tuple(segments), codecs=codecs, payloads=payloads,
    )  # fmt: skip


class EveryChain:
    """Walks every plan in every topological order: block after block, each on the same machine or on another one."""

    def __init__(self, world: DagWorld, objective: str) -> None:
        self.world, self.objective, self.best = world, objective, math.inf
        self.links = {(k.source, k.target): k for k in world.cluster.links}
        self.device = {d.name: d for d in world.cluster.devices}
        self.number_seen = 0

    def least(self) -> float:
        """The least value over all of them, memory kept; inf where there is none."""
        self._extend(frozenset(), None, _Sums())
        return self.best

    def _frontier(self, done: frozenset[int]) -> tuple[int, ...]:
        graph = self.world.graph
        if not done:
            return tuple(sorted(graph.inputs))
        readers = [{b for b, block in enumerate(graph.blocks) if t in block.inputs} for t in range(len(graph.tensors))]
        return tuple(
            t
            for t, tensor in enumerate(graph.tensors)
            if (tensor.producer < 0 or tensor.producer in done) and (t in graph.outputs or readers[t] - done)
        )

    def _extend(self, done: frozenset[int], here: str | None, sums: _Sums) -> None:
        graph, world = self.world.graph, self.world
        if self.objective == "latency" and sums.latency_s >= self.best:
            return
        frontier = self._frontier(done)
        if len(done) == graph.num_blocks:
            for arrived in self._moved(frontier, here, world.cluster.sink, sums):
                self.number_seen += 1
                self.best = min(self.best, self._value(arrived))
            return
        for v, block in enumerate(graph.blocks):
            if v in done or not {graph.tensors[t].producer for t in block.inputs} - {-1} <= done:
                continue
            alive = sum(4 * graph.tensors[t].num_elements for t in {*frontier, *block.outputs})
            for name in self.device:
                if name == here:
                    options = [sums]
                else:
                    begun = self._moved(frontier, here or world.cluster.source, name, sums)
                    options = [s.busy(name, world.overhead[name]) for s in begun]
                for one in options:
                    after = one.busy(name, world.seconds[name, v]).holds(name, graph.parameters[v].size_bytes, alive)
                    if sum(after.memory[name]) <= self.device[name].memory_bytes:
                        self._extend(done | {v}, name, after)

    def _moved(self, frontier: tuple[int, ...], a: str | None, b: str, sums: _Sums) -> list[_Sums]:
        """The frontier on its way from a to b, in every codec that may be used; unmoved where they are the same."""
        assert a is not None
        if a == b:
            return [sums]
        link = self.links.get((DeviceId(a), DeviceId(b)))
        if link is None:
            return []
        raw, found = 4 * sum(self.world.graph.tensors[t].num_elements for t in frontier), []
        for codec in ("fp32", "int8"):
            size = self.world.payload.get((frontier, codec), raw if codec == "fp32" else None)
            if size is None:
                continue
            encode, decode = self.world.codec[a, codec][0] * raw, self.world.codec[b, codec][1] * raw
            on_link = sums.busy(a, encode).busy(b, decode).sent(a, b, size)
            found.append(on_link.waits(link.latency_s + size / link.bandwidth_bytes_per_s))
        return found

    def _value(self, sums: _Sums) -> float:
        cluster, device = self.world.cluster, self.device
        if self.objective == "latency":
            return sums.latency_s
        if self.objective == "bytes":
            return sum(sums.bytes.values())
        if self.objective == "server":
            return sum(s for name, s in sums.work.items() if name not in (cluster.source, cluster.sink))
        if self.objective == "money":
            total = sum(device[name].price_money_per_s * s for name, s in sums.work.items())
            return total + sum(self.links[pair].price_money_per_byte * n for pair, n in sums.bytes.items())
        total = 0.0
        for name in {cluster.source, cluster.sink, *sums.work, *sums.memory}:
            power, busy = device[name].power, sums.work.get(name, 0.0)
            sent = sum(n for (a, _), n in sums.bytes.items() if a == name)
            total += power.busy_watt * busy + power.idle_watt * (sums.latency_s - busy) + power.send_joule_per_byte * sent
        return total


@dataclass(frozen=True)
class _Sums:
    """What a plan has cost so far; `memory`: weights, and the largest working set."""

    latency_s: float = 0.0
    work: dict = field(default_factory=dict)
    bytes: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)

    def busy(self, name: str, seconds: float) -> _Sums:
        work = self.work | {name: self.work.get(name, 0.0) + seconds}
        return replace(self, latency_s=self.latency_s + seconds, work=work)

    def waits(self, seconds: float) -> _Sums:
        return replace(self, latency_s=self.latency_s + seconds)

    def sent(self, a: str, b: str, size: float) -> _Sums:
        pair = (DeviceId(a), DeviceId(b))
        return replace(self, bytes=self.bytes | {pair: self.bytes.get(pair, 0.0) + size})

    def holds(self, name: str, weights: int, alive: int) -> _Sums:
        before, peak = self.memory.get(name, (0, 0))
        return replace(self, memory=self.memory | {name: (before + weights, max(peak, alive))})
