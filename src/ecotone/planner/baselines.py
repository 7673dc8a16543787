"""The planners that ours is measured against, named, behind one verb: `place(name, ...) -> Plan`.

Each decides by its published or common rule, on its own model of cost, with the executors ours would get. The plan is then
priced by cost.py like any other. Where the rule gives a plan that cannot run (memory, a missing link, a codec that was
not measured), PlannerError says so: a baseline does not repair itself.

Legend: "device" is the source, "server" the other device that computes the whole model soonest. EdgeShard: arXiv
2405.14371, both programmes on additive block times and bytes / rate, without latency, first block on the source;
PipeEdge: arXiv 2110.14895, the same recursion unpinned; both over sets of devices, at most MOST_DEVICES. DADS: INFOCOM 2019,
light load, on times block by block; its plan cuts an order of the blocks of its own (Plan.order), to be priced there.
"sequential" decides by the same solver as ours, but one thing after another: cut and placement in float32, precision, then
the exits.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ecotone.cluster import Cluster
from ecotone.cost import CostModel, FloatArray
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.planner.blockwise import blockwise, prices
from ecotone.planner.chain import Chain, Path, build
from ecotone.planner.dads import first_blocks_first, light_load
from ecotone.planner.objective import Asked, Latency, PlannerError, Requirement
from ecotone.planner.reordering import profile_in_order
from ecotone.planner.search import Task, broken, search
from ecotone.profile import Profile

__all__ = ["NAMES", "place"]

MOST_DEVICES = 8
SECONDS = 5.0  # for each search of "sequential"

Stages = tuple[tuple[int, int, int], ...]


def place(name: str, graph: Graph, cluster: Cluster, profile: Profile, require: Iterable[Requirement | str] = ()) -> Plan:
    """The plan of baseline `name` (one of NAMES); raises PlannerError where it has none that can run, and why."""
    if name not in NAMES:
        raise PlannerError(f"baseline {name!r} is not known; known are {', '.join(NAMES)}")
    asked = Asked.of(require)
    model = CostModel(graph, cluster, profile)
    if name == "sequential":
        return _one_after_another(model, asked)
    chain = build(_device_blocks_first(model, asked) if name == "dads" else model, asked)
    path = _RULES[name](chain)
    if path is None:
        raise PlannerError(f"baseline {name}: gives no plan here (a device, link or codec it needs is missing)")
    reasons = broken(chain, asked, path)
    if reasons:
        raise PlannerError(f"baseline {name}: its plan cannot be used: {'; '.join(reasons)}")
    return chain.plan(path)


def _one_after_another(model: CostModel, asked: Asked) -> Plan:
    """Cut and placement with float32 everywhere; then executors and codecs for these stages; then the exit policy that makes
    it quickest, its stages parted where exits are. Every step keeps all requirements."""
    plain = tuple(sorted({s.executor for s in model.profile.segments if s.executor.endswith(":fp32")}))
    first = replace(asked, codecs=("fp32",), executors=plain or asked.executors)
    until = time.perf_counter() + SECONDS
    found = search(build(model, first), Task.of(model, first, Latency(), until))
    if found.path is None:
        raise PlannerError("baseline sequential: no plan in float32 without exits keeps the requirements")
    chain = build(model, asked)
    second = search(chain.along(found.path.stages), Task.of(model, asked, Latency(), until))
    if second.path is None:
        raise PlannerError("baseline sequential: no executors and codecs for its cuts keep the requirements")
    best, table = second.plan, model.profile.accuracy
    assert best is not None
    for policy in table.policies if table else ():
        other = build(model, asked, policy)
        path = _parted(chain, other, second.path)
        if path is not None and not broken(other, asked, path):
            plan = other.plan(path)
            best = min(best, plan, key=lambda p: model.predict(p).latency_s)
    return best


def _parted(chain: Chain, other: Chain, path: Path) -> Path | None:
    """A path of a chain without exits in one with exits: the same devices, executors and codecs."""
    whole, exits = other.at_cuts_of(chain, path), [e.position for e in other.exits]
    stages, codecs, executors = [], [path.codecs[0]], []
    for (d, a, b), codec, x in zip(whole.stages, path.codecs[1:], path.executors, strict=True):
        at = [a, *(p for p in exits if a < p < b), b]
        stages += [(d, p, q) for p, q in itertools.pairwise(at)]
        executors += [other.executors.index(chain.executors[x])] * (len(at) - 1)
        codecs += [-1] * (len(at) - 2) + [codec]
    if any(not math.isfinite(other.seconds[x, *s]) for x, s in zip(executors, stages, strict=True)):
        return None
    return Path(tuple(stages), tuple(codecs), tuple(executors))


def _server(chain: Chain) -> int | None:
    whole = chain.stage[:, 0, -1].copy()
    whole[chain.source] = math.inf
    fits = math.isfinite(whole.min()) if len(whole) > 1 else False
    return int(whole.argmin()) if fits else None


def _codec(chain: Chain, position: int, names: tuple[str, ...], source: int, target: int) -> int | None:
    """The fastest admissible codec whose name begins with one of `names`."""
    found = [k for k, codec in enumerate(chain.codecs) if codec.startswith(names)]
    times = {k: float(chain.transfer[position, k, source, target]) for k in found}
    usable = [k for k in found if math.isfinite(times[k])]
    return min(usable, key=lambda k: times[k], default=None)


def _path(
    chain: Chain, stages: Stages, first: tuple[str, ...] = ("fp32",), inner: tuple[str, ...] = ("fp32",)
) -> Path | None:
    """These stages with the codecs named: `first` for the inputs, `inner` for the rest, fp32 for the outputs."""
    ends = [chain.source, *(d for d, _, _ in stages), chain.sink]
    at = [0, *(stop for _, _, stop in stages)]
    codecs = []
    for i, p in enumerate(at):
        names = first if i == 0 else ("fp32",) if i == len(stages) else inner
        codec = -1 if ends[i] == ends[i + 1] else _codec(chain, p, names, ends[i], ends[i + 1])
        if codec is None:
            return None
        codecs.append(codec)
    return Path(stages, tuple(codecs)) if all(math.isfinite(chain.stage[s]) for s in stages) else None


def _device_only(chain: Chain) -> Path | None:
    return _path(chain, ((chain.source, 0, chain.num_positions - 1),))


def _server_only(*codecs: str) -> Callable[[Chain], Path | None]:
    def rule(chain: Chain) -> Path | None:
        server = _server(chain)
        return None if server is None else _path(chain, ((server, 0, chain.num_positions - 1),), first=codecs)

    return rule


def _cuts(chain: Chain) -> list[Stages]:
    """Device up to a cut, server from there: every cut, both ends included."""
    last, server = chain.num_positions - 1, _server(chain)
    if server is None:
        return [((chain.source, 0, last),)]
    inner: list[Stages] = [((chain.source, 0, p), (server, p, last)) for p in range(1, last)]
    return [((chain.source, 0, last),), ((server, 0, last),), *inner]


def _best_fixed_cut(chain: Chain) -> Path | None:
    """The best of all cuts between device and server, each in its fastest codec."""
    return _quickest(chain, [chain.with_fastest_codecs(stages) for stages in _cuts(chain)])


def _neurosurgeon(chain: Chain) -> Path | None:
    """ASPLOS 2017: the best of all cuts between device and server, float32 on the wire."""
    return _quickest(chain, [_path(chain, stages) for stages in _cuts(chain)])


def _device_blocks_first(model: CostModel, asked: Asked) -> CostModel:
    """DADS: the order of the blocks in which the minimum cut between device and server is a cut, and only that one."""
    server = _server(build(model, asked))
    tables = blockwise(model, asked)
    codec = tables.codecs.index("fp32") if "fp32" in tables.codecs else None
    cut = None if server is None or codec is None else light_load(prices(tables, "latency"), server, codec)
    if cut is None:
        raise PlannerError("baseline dads: gives no plan here (a device, link or codec it needs is missing)")
    other = model.graph.reordered(first_blocks_first(cut, model.graph.num_blocks))
    profile = profile_in_order(model.graph, other, model.cluster, model.profile, (len(cut.first),))
    return CostModel(other, model.cluster, profile)


def _quickest(chain: Chain, paths: list[Path | None]) -> Path | None:
    asked = Asked(loss_points=math.inf)
    usable = [p for p in paths if p is not None and not broken(chain, asked, p)]
    return min(usable, key=lambda p: chain.model.predict(chain.plan(p)).latency_s, default=None)


def _fixed_int8_middle(chain: Chain) -> Path | None:
    """Half of the FLOP on each side, int8 between."""
    server, last = _server(chain), chain.num_positions - 1
    if server is None or last < 2:
        return None
    middle = int(np.abs(_flop(chain) - 0.5)[1:-1].argmin()) + 1
    return _path(chain, ((chain.source, 0, middle), (server, middle, last)), inner=("int8",))


def _flop(chain: Chain) -> FloatArray:
    """Share of FLOP before each cut, from 0 to 1; by position where the model counts none."""
    total = np.concatenate([[0.0], np.cumsum([b.flop for b in chain.model.graph.blocks])])[list(chain.cuts)]
    shares = np.array(chain.cuts) / chain.cuts[-1] if total[-1] <= 0 else total / total[-1]
    return shares.astype(np.float64)


def _edgeshard_latency(chain: Chain) -> Path | None:
    """Objective A: F(i, j) = min over k of F(i - 1, k) + c[i, j] + bytes / rate; no memory, no link latency."""
    last, count = chain.num_positions - 1, chain.num_devices
    block = chain.stage[:, np.arange(last), np.arange(1, last + 1)]  # (D, L)
    hop = _plain_send(chain)
    value, came = np.full((last, count), math.inf), np.zeros((last, count), dtype=np.intp)
    value[0, chain.source] = block[chain.source, 0]
    for i in range(1, last):
        arrived = value[i - 1][:, None] + hop[i]
        came[i] = arrived.argmin(axis=0)
        value[i] = arrived.min(axis=0) + block[:, i]
    device = int(value[-1].argmin())
    if not math.isfinite(value[-1, device]):
        return None
    row = [device]
    for i in range(last - 1, 0, -1):
        row.append(int(came[i, row[-1]]))
    return _path(chain, _merged(row[::-1]))


def _plain_send(chain: Chain) -> FloatArray:
    """Bytes of float32 over rate, (P, D, D), 0 on the diagonal, inf without a link."""
    if "fp32" not in chain.codecs:
        return np.full(chain.best.shape, math.inf)
    hop = chain.send[:, chain.codecs.index("fp32")].copy()
    hop[:, np.arange(chain.num_devices), np.arange(chain.num_devices)] = 0.0
    return hop


def _merged(row: list[int]) -> Stages:
    """Runs of one device as stages."""
    edges = [i for i in range(len(row)) if i == 0 or row[i] != row[i - 1]] + [len(row)]
    return tuple((row[a], a, b) for a, b in itertools.pairwise(edges))


def _edgeshard_throughput(chain: Chain) -> Path | None:
    """Objective B: a programme over (block, set of devices, last device), first block on the source."""
    return _over_sets(chain, pinned=True)


def _pipeedge(chain: Chain) -> Path | None:
    """The same recursion from any first device; bringing the inputs and taking the outputs costs nothing in its model."""
    return _over_sets(chain, pinned=False)


def _over_sets(chain: Chain, *, pinned: bool) -> Path | None:
    """g(j, S + u, u) = min over i, k of max(g(i, S, k), bytes / rate, c_u[i, j)), stages that fit; O(P^2 2^D D^2)."""
    count, last = chain.num_devices, chain.num_positions - 1
    if count > MOST_DEVICES:
        return None
    compute, hop = _additive(chain), _plain_send(chain)
    best = {(1 << d, d): compute[d, 0] for d in range(count) if not pinned or d == chain.source}
    came: dict[tuple[int, int], tuple[NDArray[np.intp], NDArray[np.intp]]] = {}
    for mask in range(1, 1 << count):
        for u in range(count):
            before = [k for k in range(count) if k != u and (mask ^ (1 << u), k) in best]
            if not mask >> u & 1 or not before or mask == 1 << u:
                continue
            ready = np.stack([np.maximum(best[mask ^ (1 << u), k], hop[:, k, u]) for k in before])  # (B, P)
            which = ready.argmin(axis=0)
            through = np.maximum(ready.min(axis=0)[:, None], compute[u])
            origin = through.argmin(axis=0)
            best[mask, u] = through.min(axis=0)
            came[mask, u] = (origin, np.array(before, dtype=np.intp)[which])
    ends = [(float(table[last]), mask, u) for (mask, u), table in best.items()]
    value, mask, u = min(ends, default=(math.inf, 0, 0))
    if not math.isfinite(value):
        return None
    stages, stop = [], last
    while (mask, u) in came:
        origin, which = came[mask, u]
        start = int(origin[stop])
        stages.append((u, start, stop))
        mask, u, stop = mask ^ (1 << u), int(which[start]), start
    return _path(chain, tuple(reversed([*stages, (u, 0, stop)])))


def _additive(chain: Chain) -> FloatArray:
    """Stage times as sums of block times, (D, P, P), inf where a stage does not fit its device."""
    last = chain.num_positions - 1
    block = chain.stage[:, np.arange(last), np.arange(1, last + 1)]
    upto = np.concatenate([np.zeros((chain.num_devices, 1)), np.cumsum(block, axis=1)], axis=1)
    with np.errstate(invalid="ignore"):
        summed = upto[:, None, :] - upto[:, :, None]
    usable = np.isfinite(chain.stage) & np.isfinite(summed)
    return np.where(usable, summed, math.inf)


def _divided(shares: list[float], num_layers: int) -> list[int]:
    """Layers in proportion to shares: largest remainder, at least one each."""
    total = sum(shares)
    exact = [num_layers * s / total for s in shares]
    counts = [max(1, int(e)) for e in exact]
    while sum(counts) < num_layers:
        counts[max(range(len(counts)), key=lambda i: (exact[i] - counts[i], -i))] += 1
    while sum(counts) > num_layers:
        candidates = [i for i in range(len(counts)) if counts[i] > 1]
        counts[min(candidates, key=lambda i: (exact[i] - counts[i], i))] -= 1
    return counts


def _laid_out(chain: Chain, devices: list[int], counts: list[int]) -> Path | None:
    edges = np.concatenate([[0], np.cumsum(counts)]).tolist()
    return _path(chain, tuple((d, a, b) for d, a, b in zip(devices, edges[:-1], edges[1:], strict=True)))


def _memory_proportional(chain: Chain) -> Path | None:
    """exo: the fewest devices (most memory first) that hold the weights, layers by their memory; no speed, no links."""
    order = sorted(range(chain.num_devices), key=lambda d: (-chain.capacity[d], d))
    need = float(chain.weights[0, -1])
    for size in range(1, min(len(order), chain.num_positions - 1) + 1):
        if float(chain.capacity[order[:size]].sum()) >= need:
            chosen = sorted(order[:size])
            return _laid_out(chain, chosen, _divided([float(chain.capacity[d]) for d in chosen], chain.num_positions - 1))
    return None


def _flop_proportional(chain: Chain) -> Path | None:
    """All devices, FLOP in proportion to measured speed."""
    last = chain.num_positions - 1
    seconds = _additive(replace(chain, capacity=np.full(chain.num_devices, math.inf)))[:, 0, -1]
    seconds = np.where(np.isfinite(seconds), seconds, chain.stage[:, 0, -1])
    devices = [d for d in range(chain.num_devices) if math.isfinite(seconds[d])][:last]
    if not devices:
        return None
    speed = 1.0 / np.maximum(seconds[devices], 1e-12)
    goals = np.cumsum(speed) / speed.sum()
    edges, flop = [0], _flop(chain)
    for i, goal in enumerate(goals[:-1]):
        nearest = int(np.abs(flop - goal).argmin())
        edges.append(min(max(nearest, edges[-1] + 1), last - (len(devices) - 1 - i)))
    return _laid_out(chain, devices, np.diff([*edges, last]).tolist())


def _even_split(chain: Chain) -> Path | None:
    """All devices, equally many layers, in the order of the cluster file."""
    devices = list(range(chain.num_devices))[: chain.num_positions - 1]
    return _laid_out(chain, devices, _divided([1.0] * len(devices), chain.num_positions - 1))


_RULES: dict[str, Callable[[Chain], Path | None]] = {
    "device_only": _device_only,
    "server_only_raw": _server_only("pixels", "fp32"),
    "server_only_jpeg": _server_only("jpeg"),
    "best_fixed_cut": _best_fixed_cut,
    "neurosurgeon": _neurosurgeon,
    "dads": _neurosurgeon,  # on an order of the blocks of its own
    "fixed_int8_middle": _fixed_int8_middle,
    "edgeshard_latency": _edgeshard_latency,
    "edgeshard_throughput": _edgeshard_throughput,
    "pipeedge": _pipeedge,
    "memory_proportional": _memory_proportional,
    "flop_proportional": _flop_proportional,
    "even_split": _even_split,
}
NAMES = (*_RULES, "sequential")
