"""Random planning problems, and an oracle that enumerates every plan: shares no code with the planner.

The oracle walks the plans themselves (stages, devices, codecs) and prices them by its own few lines from the tables that
made the problem. Devices and links are shuffled, links differ by direction and some are missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ecotone.cluster import Cluster, Device, DeviceId, Link, Power
from ecotone.graph import Block, Graph, Parameter, Tensor, TensorIndex
from ecotone.profile import CodecCost, Payload, Profile, SegmentTime


@dataclass(frozen=True)
class World:
    """A problem and the tables behind it; `seconds[d, a, b]` of blocks [a, b), `payload[p, codec]` (bytes, disagreement)."""

    graph: Graph
    cluster: Cluster
    profile: Profile
    seconds: dict[tuple[str, int, int], float]
    payload: dict[tuple[int, str], tuple[float, float]]
    codec: dict[tuple[str, str], tuple[float, float]]  # (device, codec) -> (encode, decode) seconds per raw byte


def chain_graph(sizes: list[int], weights: list[int], flop: list[float] | None = None, name: str = "chain") -> Graph:
    """A chain of blocks: `sizes` elements of float32 before each block and at the end, `weights` bytes per block."""
    count = len(weights)
    tensors = tuple(Tensor(name=f"t{i}", shape=(1, n), dtype="float32", producer=i - 1) for i, n in enumerate(sizes))
    blocks = tuple(
        Block(
            name=f"b{i}", inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),),
            flop=flop[i] if flop else 1.0, parameters=(i,),
        )
        for i in range(count)
    )  # fmt: skip
    parameters = tuple(Parameter(name=f"w{i}", size_bytes=w) for i, w in enumerate(weights))
    return Graph(
        name=name,
        blocks=blocks,
        tensors=tensors,
        inputs=(TensorIndex(0),),
        outputs=(TensorIndex(count),),
        parameters=parameters,
    )


def random_world(seed: int, *, tight: bool = False, additive: bool = False) -> World:
    """2 to 4 devices, 2 to 5 blocks, 1 or 2 codecs; `tight`: memory for 40 to 90 % of the weights on every device."""
    rng = np.random.default_rng(seed)
    count, blocks = int(rng.integers(2, 5)), int(rng.integers(2, 6))
    graph = chain_graph(rng.integers(1, 400, blocks + 1).tolist(), rng.integers(10_000, 100_000, blocks).tolist())
    names = [f"m{i}" for i in rng.permutation(count)]
    whole = sum(p.size_bytes for p in graph.parameters)
    speed = rng.uniform(0.2, 3.0, count)
    if seed % 3 == 0 and count > 2:  # two alike
        speed[1] = speed[0]
    memory = {n: int(whole * rng.uniform(0.4, 0.9)) + 4000 if tight else 10**9 for n in names}
    devices = tuple(
        Device(
            name=DeviceId(n), memory_bytes=memory[n], power=Power(busy_watt=float(rng.uniform(1, 9)), idle_watt=0.5)
        )
        for n in names
    )  # fmt: skip
    links = tuple(
        Link(
            source=DeviceId(a), target=DeviceId(b), latency_s=float(rng.choice([0.0, 1e-4, 1e-3])),
            bandwidth_bytes_per_s=float(10 ** rng.uniform(5, 7)),
        )
        for a, b in rng.permutation(np.array(list(itertools.permutations(names, 2)), dtype=object)).tolist()
        if rng.random() < 0.8
    )  # fmt: skip
    work = rng.uniform(1e-4, 4e-3, blocks)
    seconds = {}
    for d, name in enumerate(names):
        for a, b in itertools.combinations(range(blocks + 1), 2):
            noise = 1.0 if additive or (seed % 3 == 0 and d < 2) else rng.uniform(0.6, 1.4)
            seconds[name, a, b] = float(work[a:b].sum() / speed[d] * noise)
    codecs = ["fp32", "int8"][: int(rng.integers(1, 3))]
    payload = {(p, "fp32"): (4.0 * graph.tensors[p].num_elements, 0.0) for p in range(blocks + 1)}
    if "int8" in codecs:
        for p in range(blocks + 1):
            payload[p, "int8"] = (graph.tensors[p].num_elements + 8.0, float(rng.choice([0.0, 0.002, 0.006])))
    per_byte = {(n, c): tuple(float(v) for v in rng.uniform(1e-9, 4e-7, 2)) for n in names for c in codecs}
    source = str(rng.choice(names))
    sink = source if rng.random() < 0.6 else str(rng.choice(names))
    cluster = Cluster(name="w", devices=devices, links=links, source=DeviceId(source), sink=DeviceId(sink))
    return World(graph, cluster, _profile(graph, seconds, payload, per_byte), seconds, payload, per_byte)


def _profile(graph: Graph, seconds: dict, payload: dict, per_byte: dict) -> Profile:
    segments = tuple(
        SegmentTime(
            device=DeviceId(d), executor="torch:fp32", start=a, stop=b, median_s=t, spread_s=0.0, memory_bytes=0
        )
        for (d, a, b), t in seconds.items()
    )  # fmt: skip
    return Profile(
        graph_hash=graph.content_hash(), cluster_name="w", num_blocks=graph.num_blocks,
        cuts=tuple(range(graph.num_blocks + 1)), segments=segments,
        codecs=tuple(
            CodecCost(
                device=DeviceId(d), codec=c, encode_fixed_s=0.0, encode_s_per_raw_byte=e, decode_fixed_s=0.0,
                decode_s_per_raw_byte=f,
            )
            for (d, c), (e, f) in per_byte.items()
        ),
        payloads=tuple(Payload(position=p, codec=c, size_bytes=n, disagreement=g) for (p, c), (n, g) in payload.items()),
    )  # fmt: skip


@dataclass(frozen=True)
class Priced:
    """One enumerated plan with its figures."""

    latency_s: float
    bottleneck_s: float
    disagreement: float
    size_bytes: float
    memory: dict[str, int]
    devices: tuple[str, ...]


def every_plan(world: World, *, once: bool) -> Iterator[Priced]:
    """Each split into stages x each row of devices (neighbours differ; `once`: all differ) x each row of codecs."""
    blocks = world.graph.num_blocks
    names = [d.name for d in world.cluster.devices]
    links = {(k.source, k.target): k for k in world.cluster.links}
    for num_stages in range(1, blocks + 1):
        for inner in itertools.combinations(range(1, blocks), num_stages - 1):
            cuts = (0, *inner, blocks)
            for row in itertools.product(names, repeat=num_stages):
                if (once and len(set(row)) < num_stages) or any(a == b for a, b in itertools.pairwise(row)):
                    continue
                ends = zip((world.cluster.source, *row), (*row, world.cluster.sink), cuts, strict=True)
                hops = [(a, b, p) for a, b, p in ends if a != b]
                if all((a, b) in links for a, b, _ in hops):
                    yield from _priced(world, cuts, row, [_crossings(world, links[a, b], p) for a, b, p in hops])


def _crossings(world: World, link: Link, position: int) -> list[tuple[str, str, float, float, float, float, float, float]]:
    """Per codec: the two ends, seconds to encode, send and decode, all of them with the link's own, disagreement, bytes."""
    found = []
    raw = 4 * world.graph.tensors[position].num_elements
    for codec in sorted({c for _, c in world.codec}):
        size, disagreement = world.payload[position, codec]
        encode, decode = world.codec[link.source, codec][0] * raw, world.codec[link.target, codec][1] * raw
        send = size / link.bandwidth_bytes_per_s
        total = encode + link.latency_s + send + decode
        found.append((link.source, link.target, encode, send, decode, total, disagreement, size))
    return found


def _priced(world: World, cuts: tuple[int, ...], row: tuple[str, ...], hops: list) -> Iterator[Priced]:
    """One row of devices with each row of codecs."""
    computing: dict[str, float] = {}
    memory: dict[str, int] = {}
    live: dict[str, int] = {}
    for d, a, b in zip(row, cuts, cuts[1:], strict=False):
        computing[d] = computing.get(d, 0.0) + world.seconds[d, a, b]
        memory[d] = memory.get(d, 0) + sum(p.size_bytes for p in world.graph.parameters[a:b])
        tensors = world.graph.tensors
        live[d] = max(live.get(d, 0), *(tensors[i].size_bytes + tensors[i + 1].size_bytes for i in range(a, b)))
    memory = {d: n + live[d] for d, n in memory.items()}
    for chosen in itertools.product(*hops):
        latency, changed, total = sum(computing.values()), 0.0, 0.0
        busy, wire = dict(computing), {}
        for a, b, encode, send, decode, seconds, disagreement, size in chosen:
            latency, changed, total = latency + seconds, changed + disagreement, total + size
            busy[a], busy[b] = busy.get(a, 0.0) + encode, busy.get(b, 0.0) + decode
            wire[a, b] = wire.get((a, b), 0.0) + send
        yield Priced(latency, max(*busy.values(), *wire.values(), 0.0), changed, total, memory, row)


def best(world: World, objective: str, *, loss_points: float = 1.0, latency_s: float = math.inf) -> float:
    """The least value of `objective` ("latency" or "throughput") over all plans that fit memory and the loss; inf: none."""
    room = {d.name: d.memory_bytes for d in world.cluster.devices}
    values = [
        p.latency_s if objective == "latency" else p.bottleneck_s
        for p in every_plan(world, once=objective == "throughput")
        if all(n <= room[d] for d, n in p.memory.items())
        and 100 * p.disagreement <= loss_points * (1 + 1e-9)
        and p.latency_s <= latency_s * (1 + 1e-9)
    ]
    return min(values, default=math.inf)
