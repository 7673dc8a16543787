"""Random joint problems (executors, codecs, exit policies, prices, tiers, tied weights) and an oracle that enumerates them.

The oracle shares no code with planner or cost model. It walks every exit policy (and none), every split into stages, every
row of devices (neighbours differ, but where an exit parts them), and prices all combinations of executors and codecs of such
a row at once by adding up vectors along the axes of an array, straight from the tables that made the problem.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from enumeration import chain_graph

from ecotone.accuracy import AccuracyTable, Cell, ExitPolicy
from ecotone.cluster import Cluster, Device, DeviceId, Link, Power
from ecotone.graph import Exit, Graph, Parameter
from ecotone.plan import Plan, Stage, Transfer
from ecotone.planner import Requirement
from ecotone.profile import CodecCost, ExitTime, Payload, Profile, SegmentTime

EXECUTORS = ("ort:int8", "torch:fp32", "vino:bf16")
ERRORS = {"ort:int8": 0.03, "torch:fp32": 0.0, "vino:bf16": 0.008}
CODECS = ("fp32", "int4", "int8")
QUANTITIES = (
    "latency", "throughput", "energy", "bytes", "server", "money", "accuracy_loss", "accuracy_loss_sure", "error", "stages",
    "memory",
)  # fmt: skip


@dataclass(frozen=True)
class Joint:
    """A problem and the tables behind it."""

    graph: Graph
    cluster: Cluster
    profile: Profile
    seconds: dict[tuple[str, str, int, int], float]  # device, executor, blocks
    heads: dict[tuple[str, str, str], float]  # device, executor, exit
    errors: dict[tuple[str, str, int, int], float]
    payload: dict[tuple[int, str], tuple[float, float]]  # bytes, relative error
    loss: dict[tuple[int, str, str], float]  # position, codec, policy -> points beside the policy's own
    sure: dict[tuple[int, str, str], float]  # the same by upper ends of intervals
    codec: dict[tuple[str, str], tuple[float, float]]  # seconds per raw byte
    policies: tuple[ExitPolicy, ...]
    servers: frozenset[str]
    tables: list[Priced] = field(default_factory=list)


@dataclass(frozen=True)
class Priced:
    """All plans of one policy, split and row: quantity -> array over the choices (axes: see `axes`), all of one shape."""

    policy: ExitPolicy | None
    cuts: tuple[int, ...]
    row: tuple[str, ...]
    axes: tuple[tuple[str, int, tuple[str, ...]], ...]  # ("stage" | "hop" | "leave", index, names)
    values: dict[str, np.ndarray]
    over_memory: bool
    once: bool


@functools.lru_cache(maxsize=64)  # what was enumerated of a world is of use to other tests
def joint_world(seed: int, *, num_devices: int | None = None, tight: bool | None = None) -> Joint:
    """2 or 3 devices, 2 to 4 blocks, up to 3 executors, 3 codecs, 2 exits and 3 policies; links shuffled, some missing."""
    rng = np.random.default_rng([seed, 7])
    count, blocks = num_devices or int(rng.integers(2, 4)), int(rng.integers(2, 5))
    graph, exits = _graph(rng, blocks)
    names = [f"m{i}" for i in rng.permutation(count)]
    whole = sum(p.size_bytes for p in graph.parameters)
    is_tight = bool(rng.random() < 0.5) if tight is None else tight
    idle = float(rng.choice([0.0, 0.0, 1.5]))
    with_tiers = bool(rng.random() < 0.5)
    devices = tuple(
        Device(
            name=DeviceId(n), memory_bytes=int(whole * rng.uniform(0.45, 1.0)) + 5000 if is_tight else 10**9,
            tier=str(rng.choice(["end", "edge", "cloud"])) if with_tiers else "",
            power=Power(
                busy_watt=float(rng.uniform(2, 9)), idle_watt=idle * float(rng.random()),
                send_joule_per_byte=float(rng.choice([0.0, 1e-6])),
            ),
            price_money_per_s=float(rng.choice([0.0, 1.0, 5.0])),
        )
        for n in names
    )  # fmt: skip
    links = tuple(
        Link(
            source=DeviceId(a), target=DeviceId(b), latency_s=float(rng.choice([0.0, 1e-4, 1e-3])),
            bandwidth_bytes_per_s=float(10 ** rng.uniform(5, 7)), price_money_per_byte=float(rng.choice([0.0, 1e-6])),
        )
        for a, b in rng.permutation(np.array(list(itertools.permutations(names, 2)), dtype=object)).tolist()
        if rng.random() < 0.85
    )  # fmt: skip
    source = str(rng.choice(names))
    sink = source if rng.random() < 0.6 else str(rng.choice(names))
    cluster = Cluster(name="w", devices=devices, links=links, source=DeviceId(source), sink=DeviceId(sink))
    tables = _tables(rng, graph, exits, names)
    policies = _policies(rng, exits)
    cells, loss, sure = _cells(rng, graph, tables["payload"], policies)
    servers = {d.name for d in devices if (d.tier in ("edge", "cloud") if with_tiers else d.name not in (source, sink))}
    profile = _profile(graph, tables, cells, policies)
    return Joint(graph, cluster, profile, loss=loss, sure=sure, policies=policies, servers=frozenset(servers), **tables)


def _graph(rng: np.random.Generator, blocks: int) -> tuple[Graph, tuple[Exit, ...]]:
    graph = chain_graph(rng.integers(1, 400, blocks + 1).tolist(), rng.integers(10_000, 100_000, blocks).tolist())
    if blocks > 2 and rng.random() < 0.25:  # the last block shares the first one's weights
        last = replace(graph.blocks[-1], parameters=(blocks - 1, 0))
        graph = replace(graph, blocks=(*graph.blocks[:-1], last))
    positions = [p for p in range(1, blocks) if rng.random() < 0.5][:2]
    heads = tuple(Parameter(name=f"h{p}", size_bytes=int(rng.integers(500, 20_000))) for p in positions)
    exits = tuple(
        Exit(name=f"e{p}", position=p, flop=1.0, parameters=(blocks + i,), working_bytes=int(rng.integers(0, 4000)))
        for i, p in enumerate(positions)
    )
    return replace(graph, parameters=(*graph.parameters, *heads), exits=exits), exits


def _tables(rng: np.random.Generator, graph: Graph, exits: tuple[Exit, ...], names: list[str]) -> dict:
    blocks = graph.num_blocks
    work, executors = rng.uniform(1e-4, 4e-3, blocks), EXECUTORS[: int(rng.integers(1, 4))]
    speed = {n: rng.uniform(0.2, 3.0) for n in names}
    gain = {"ort:int8": 0.4, "torch:fp32": 1.0, "vino:bf16": 0.7}
    seconds, errors, heads = {}, {}, {}
    for n in names:
        for e in executors:
            if e != executors[0] and rng.random() < 0.2:
                continue  # not on this device
            for a, b in itertools.combinations(range(blocks + 1), 2):
                seconds[n, e, a, b] = float(work[a:b].sum() / speed[n] * gain[e] * rng.uniform(0.7, 1.3))
                errors[n, e, a, b] = ERRORS[e] * float(rng.choice([1.0, 1.0, 0.5]))
            for place in exits:
                if rng.random() < 0.95:
                    heads[n, e, place.name] = float(rng.uniform(1e-5, 4e-4))
    codecs = CODECS[: int(rng.integers(1, 4))]
    payload = {}
    for p in range(blocks + 1):
        size = graph.tensors[p].num_elements
        for c in codecs:
            share, error = {"fp32": (4.0, 0.0), "int8": (1.0, 0.004), "int4": (0.5, 0.02)}[c]
            if c == "fp32" or rng.random() < 0.9:
                payload[p, c] = (size * share + 8.0, error * float(rng.uniform(0.5, 1.5)))
    codec = {(n, c): tuple(float(v) for v in rng.uniform(1e-9, 4e-7, 2)) for n in names for c in codecs}
    return {"seconds": seconds, "errors": errors, "heads": heads, "payload": payload, "codec": codec}


def _policies(rng: np.random.Generator, exits: tuple[Exit, ...]) -> tuple[ExitPolicy, ...]:
    found = []
    for i in range(int(rng.integers(0, 4)) if exits else 0):
        chosen = [e for e in exits if rng.random() < 0.8] or [exits[0]]
        shares = rng.dirichlet(np.ones(len(chosen) + 1))[:-1].tolist()
        if rng.random() < 0.1:
            shares = [0.0] * len(chosen)
        loss = float(rng.choice([-0.1, 0.0, 0.2, 0.5, 0.9, 1.5]))
        found.append(
            ExitPolicy(
                name=f"x{i}", exits=tuple(e.name for e in chosen), thresholds=tuple(0.5 + 0.1 * i for _ in chosen),
                shares=tuple(float(s) for s in shares), loss_points=loss,
                low_points=loss - 0.1, high_points=loss + 0.15 * i,
            )
        )  # fmt: skip
    return tuple(found)


def _cells(rng: np.random.Generator, graph: Graph, payload: dict, policies: tuple) -> tuple[tuple[Cell, ...], dict, dict]:
    cells, loss, sure = [], {}, {}
    base = {"fp32": [0.0], "int8": [0.0, 0.1, 0.3], "int4": [0.2, 0.6, 1.2]}

    def doubt(p: int, c: str) -> float:
        return 0.0 if c == "fp32" else 0.2 * ((p + len(c)) % 3)

    def cell(p: int, c: str, policy: str, points: float) -> Cell:
        return Cell(
            position=p, codec=c, policy=policy, num_decisions=100, points=90.0, loss_points=points, low_points=points,
            high_points=points + doubt(p, c), fitted_points=max(0.0, points),
        )  # fmt: skip

    for p, c in payload:
        points = float(rng.choice(base[c]))
        cells.append(cell(p, c, "", points))
        for policy in ("", *(x.name for x in policies)):
            loss[p, c, policy], sure[p, c, policy] = points, points + doubt(p, c)
        for policy in policies:
            if rng.random() < 0.5:
                together = float(policy.loss_points + points * rng.uniform(0.5, 1.2))
                cells.append(cell(p, c, policy.name, together))
                already = max(0.0, policy.loss_points)
                loss[p, c, policy.name] = max(0.0, max(0.0, together) - already)
                sure[p, c, policy.name] = max(0.0, max(0.0, together, together + doubt(p, c)) - already)
    return tuple(cells), loss, sure


def _profile(graph: Graph, tables: dict, cells: tuple[Cell, ...], policies: tuple[ExitPolicy, ...]) -> Profile:
    digest = graph.content_hash()
    table = AccuracyTable(
        graph_hash=digest, data_hash="d", is_labelled=True, reference_points=90.0, cells=cells, policies=policies
    )  # fmt: skip
    return Profile(
        graph_hash=digest, cluster_name="w", num_blocks=graph.num_blocks, cuts=tuple(range(graph.num_blocks + 1)),
        segments=tuple(
            SegmentTime(
                device=DeviceId(d), executor=e, start=a, stop=b, median_s=t, spread_s=0.0, memory_bytes=0,
                relative_error=tables["errors"][d, e, a, b],
            )
            for (d, e, a, b), t in tables["seconds"].items()
        ),
        codecs=tuple(
            CodecCost(
                device=DeviceId(d), codec=c, encode_fixed_s=0.0, encode_s_per_raw_byte=one, decode_fixed_s=0.0,
                decode_s_per_raw_byte=other,
            )
            for (d, c), (one, other) in tables["codec"].items()
        ),
        payloads=tuple(
            Payload(position=p, codec=c, size_bytes=n, relative_error=e) for (p, c), (n, e) in tables["payload"].items()
        ),
        exits=tuple(
            ExitTime(device=DeviceId(d), executor=e, exit=x, median_s=t) for (d, e, x), t in tables["heads"].items()
        ),
        accuracy=table,
    )  # fmt: skip


class _Sums:
    """Vectors added up along the axes of one array."""

    def __init__(self, axes: list[tuple[str, int, tuple[str, ...]]]) -> None:
        self.axes = axes
        self.total: dict[object, np.ndarray] = {}

    def add(self, key: object, axis: int, vector: list[float] | np.ndarray) -> None:
        shape = [1] * len(self.axes)
        if axis >= 0:
            shape[axis] = -1
        self.total[key] = self.total.get(key, 0.0) + np.asarray(vector, dtype=float).reshape(shape)

    def get(self, key: object) -> np.ndarray:
        return np.broadcast_to(self.total.get(key, np.zeros(())), tuple(len(names) for _, _, names in self.axes))


def every_joint_plan(world: Joint) -> list[Priced]:
    """All plans, priced; worked out once."""
    if not world.tables:
        world.tables.extend(_every(world))
    return world.tables


def _every(world: Joint) -> Iterator[Priced]:
    blocks, names = world.graph.num_blocks, [d.name for d in world.cluster.devices]
    for policy in (None, *world.policies):
        at = {e.position: e.name for e in world.graph.exits if policy and e.name in policy.exits}
        for inner in itertools.chain.from_iterable(
            itertools.combinations(range(1, blocks), n) for n in range(len(at), blocks)
        ):
            if not set(at) <= set(inner):
                continue
            cuts = (0, *inner, blocks)
            for row in itertools.product(names, repeat=len(cuts) - 1):
                if any(row[i] == row[i + 1] and cuts[i + 1] not in at for i in range(len(row) - 1)):
                    continue
                priced = _price(world, policy, at, cuts, row)
                if priced is not None:
                    yield priced


def _price(
    world: Joint, policy: ExitPolicy | None, at: dict[int, str], cuts: tuple[int, ...], row: tuple[str, ...]
) -> Priced | None:  # fmt: skip
    links = {(k.source, k.target): k for k in world.cluster.links}
    devices = {d.name: d for d in world.cluster.devices}
    source, sink, last = world.cluster.source, world.cluster.sink, world.graph.num_blocks
    hops = [(a, b, p) for a, b, p in zip((source, *row), (*row, sink), cuts, strict=True)]
    leaves = [(i, row[i]) for i in range(len(row)) if cuts[i + 1] in at]
    axes: list[tuple[str, int, tuple[str, ...]]] = []
    for i, d in enumerate(row):
        runs = tuple(
            e for e in EXECUTORS
            if (d, e, cuts[i], cuts[i + 1]) in world.seconds
            and (cuts[i + 1] not in at or (d, e, at[cuts[i + 1]]) in world.heads)
        )  # fmt: skip
        axes.append(("stage", i, runs))
    for i, (a, b, p) in enumerate(hops):
        if a != b:
            axes.append(("hop", i, tuple(c for c in CODECS if (p, c) in world.payload) if (a, b) in links else ()))
    for i, d in leaves:
        if d != sink:
            known = tuple(c for c in CODECS if (last, c) in world.payload) if (d, sink) in links else ()
            axes.append(("leave", i, known))
    if any(not names for _, _, names in axes):
        return None
    shares = dict(zip(policy.exits, policy.shares, strict=True)) if policy else {}
    reach, out = [1.0], []
    for i in range(len(row)):
        gone = min(reach[-1], shares[at[cuts[i + 1]]]) if cuts[i + 1] in at else 0.0
        out.append(gone)
        reach.append(reach[-1] - gone)
    sums = _Sums(axes)
    for axis, (kind, i, names) in enumerate(axes):
        if kind == "stage":
            _add_stage(world, sums, axis, row[i], cuts[i], cuts[i + 1], at.get(cuts[i + 1]), names, reach[i])
        elif kind == "hop":
            a, b, p = hops[i]
            _add_hop(world, sums, axis, links[a, b], p, names, reach[i], policy.name if policy else "", counts=1.0)
        else:
            name = policy.name if policy else ""
            _add_hop(world, sums, axis, links[row[i], sink], last, names, out[i], name, counts=out[i])
    memory = _memory(world, at, cuts, row)
    values = _values(world, sums, devices, row, policy, memory)
    over = any(n > devices[d].memory_bytes for d, n in memory.items())
    runs = [d for i, d in enumerate(row) if i == 0 or row[i - 1] != d]
    return Priced(policy, cuts, row, tuple(axes), values, over, len(set(runs)) == len(runs))


def _add_stage(
    world: Joint, sums: _Sums, axis: int, d: str, a: int, b: int, head: str | None, names: tuple[str, ...], reach: float
) -> None:  # fmt: skip
    seconds = np.array([world.seconds[d, e, a, b] + (world.heads[d, e, head] if head else 0.0) for e in names]) * reach
    sums.add("latency", axis, seconds)
    sums.add(("busy", d), axis, seconds)
    sums.add("error", axis, [world.errors[d, e, a, b] for e in names])


def _add_hop(
    world: Joint, sums: _Sums, axis: int, link: Link, p: int, names: tuple[str, ...], share: float, policy: str, *,
    counts: float,
) -> None:  # fmt: skip
    raw = 4 * world.graph.tensors[p].num_elements
    size = np.array([world.payload[p, c][0] for c in names])
    encode = np.array([world.codec[link.source, c][0] for c in names]) * raw * share
    decode = np.array([world.codec[link.target, c][1] for c in names]) * raw * share
    send = size / link.bandwidth_bytes_per_s * share
    sums.add("latency", axis, encode + link.latency_s * share + send + decode)
    sums.add(("busy", link.source), axis, encode)
    sums.add(("busy", link.target), axis, decode)
    sums.add(("link", link.source, link.target), axis, send)
    sums.add("bytes", axis, size * share)
    sums.add(("sent", link.source), axis, size * share)
    sums.add("carriage", axis, size * share * link.price_money_per_byte)
    sums.add("error", axis, [world.payload[p, c][1] for c in names])
    sums.add("accuracy_loss", axis, [counts * world.loss[p, c, policy] for c in names])
    sums.add("accuracy_loss_sure", axis, [counts * world.sure[p, c, policy] for c in names])


def _memory(world: Joint, at: dict[int, str], cuts: tuple[int, ...], row: tuple[str, ...]) -> dict[str, int]:
    graph = world.graph
    used: dict[str, set[int]] = {}
    live: dict[str, int] = {}
    for d, a, b in zip(row, cuts, cuts[1:], strict=False):
        used.setdefault(d, set()).update(p for block in graph.blocks[a:b] for p in block.parameters)
        widest = max(graph.tensors[i].size_bytes + graph.tensors[i + 1].size_bytes for i in range(a, b))
        if b in at:
            head = next(e for e in graph.exits if e.position == b)
            used[d].update(head.parameters)
            widest = max(widest, head.working_bytes)
        live[d] = max(live.get(d, 0), widest)
    return {d: sum(graph.parameters[p].size_bytes for p in own) + live[d] for d, own in used.items()}


def _values(
    world: Joint, sums: _Sums, devices: dict, row: tuple[str, ...], policy: ExitPolicy | None, memory: dict[str, int]
) -> dict[str, np.ndarray]:  # fmt: skip
    latency = sums.get("latency")
    part = set(row) | {world.cluster.source, world.cluster.sink}
    energy, money, server = 0.0 * latency, sums.get("carriage") + 0.0, 0.0 * latency
    for d in part:
        power, busy = devices[d].power, sums.get(("busy", d))
        energy = energy + power.busy_watt * busy + power.idle_watt * (latency - busy)
        energy = energy + power.send_joule_per_byte * sums.get(("sent", d))
        money = money + devices[d].price_money_per_s * busy
        server = server + (busy if d in world.servers else 0.0)
    loads = [sums.get(key) for key in sums.total if isinstance(key, tuple) and key[0] in ("busy", "link")]
    return {
        "latency": latency, "throughput": np.max(loads, axis=0), "energy": energy, "bytes": sums.get("bytes"),
        "server": server, "money": money, "error": sums.get("error"),
        "accuracy_loss": sums.get("accuracy_loss") + (policy.loss_points if policy else 0.0),
        "accuracy_loss_sure": sums.get("accuracy_loss_sure") + (policy.high_points if policy else 0.0),
        "stages": np.full(latency.shape, float(len(row))), "memory": np.full(latency.shape, float(max(memory.values()))),
    }  # fmt: skip


def flat(world: Joint, *, once: bool = False) -> dict[str, np.ndarray]:
    """Every plan that fits, as one row per quantity; `once`: each device one row of stages at most."""
    chosen = [t for t in every_joint_plan(world) if not t.over_memory and (t.once or not once)]
    return {q: np.concatenate([t.values[q].ravel() for t in chosen]) if chosen else np.zeros(0) for q in QUANTITIES}


def least_value(world: Joint, objective: str, limits: dict[str, float]) -> float:
    """The least of a quantity over all plans that keep `limits` (of throughput: on the bottleneck); inf: there is none."""
    rows = flat(world, once=objective == "throughput")
    good = np.ones(len(rows["latency"]), dtype=bool)
    for name, limit in limits.items():
        good &= rows[name] <= limit * (1 + 1e-9) + 1e-15 if limit >= 0 else rows[name] <= limit
    return float(rows[objective][good].min()) if good.any() else math.inf


def plan_of(world: Joint, priced: Priced, index: tuple[int, ...]) -> Plan:
    """The plan at one place of a table, for what only a plan can be asked."""
    at = {e.position: e.name for e in world.graph.exits if priced.policy and e.name in priced.policy.exits}
    thresholds = dict(zip(priced.policy.exits, priced.policy.thresholds, strict=True)) if priced.policy else {}
    source, sink = world.cluster.source, world.cluster.sink
    chosen = {(kind, i): names[j] for (kind, i, names), j in zip(priced.axes, index, strict=True)}
    stages = tuple(
        Stage(
            device=DeviceId(d), start=a, stop=b, executor=chosen["stage", i], exit=at.get(b, ""),
            threshold=thresholds.get(at.get(b, ""), 0.0),
        )
        for i, (d, a, b) in enumerate(zip(priced.row, priced.cuts, priced.cuts[1:], strict=False))
    )  # fmt: skip
    ends = zip((source, *priced.row), (*priced.row, sink), priced.cuts, strict=True)
    transfers = tuple(
        Transfer(source=DeviceId(a), target=DeviceId(b), position=p, codec=chosen.get(("hop", i), "none"))
        for i, (a, b, p) in enumerate(ends)
    )
    leaving = tuple(
        Transfer(source=s.device, target=sink, position=priced.cuts[-1], codec=chosen.get(("leave", i), "none"))
        for i, s in enumerate(stages)
        if s.exit
    )
    digest = world.graph.content_hash()
    return Plan(graph_hash=digest, stages=stages, transfers=transfers, exit_transfers=leaving)


OBJECTIVES = ("latency", "throughput", "energy", "bytes", "server", "money", "accuracy_loss", "error", "accuracy_loss_sure")
LIMITED = (
    "latency", "throughput", "energy", "bytes", "server", "money", "accuracy_loss", "error", "stages", "accuracy_loss_sure",
)  # fmt: skip


def random_limits(world: Joint, objective: str, seed: int) -> tuple[list[Requirement], dict[str, float]]:
    """Requirements round what plans of the world reach, and the same as limits (of throughput: on the bottleneck), the
    planner's own default on accuracy among them."""
    rng = np.random.default_rng([seed, OBJECTIVES.index(objective), 9])
    rows = flat(world, once=objective == "throughput")
    require, limits = [], {}
    for name in LIMITED:
        if rng.random() >= 0.3 or not len(rows["latency"]):
            continue
        value = float(np.quantile(rows[name], rng.uniform(0, 0.6))) * float(rng.choice([1.0, 1.0, 0.97]))
        value = max(1.0, value) if name == "stages" else value
        if value < 0 or (name == "throughput" and value == 0):
            continue
        require.append(Requirement(name=name, limit=1.0 / value if name == "throughput" else value))
        limits[name] = value
    if not {"accuracy_loss", "error"} & set(limits) and objective != "accuracy_loss":
        limits["accuracy_loss"] = 1.0
    return require, limits
