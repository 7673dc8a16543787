"""The planning problem block by block, for models whose branches are placed apart: what each block, stage and crossing adds.

A measured profile knows prefixes and suffixes of one order of the blocks. Another order has other segments, so here a
stage takes o + the sum of its blocks (equation 1 of cost.py taken apart), and the bytes of a frontier are the sum over
its tensors. That is an estimate where the profile measured segments whole; it is exact where times add up. Legend: D
devices, M machines (a device with one executor), L blocks, N tensors, K codecs; a set of blocks or tensors is an int of
bits.

`Prices` makes one number of it for any additive objective: a second of work on d costs busy[d], a second on a link elapsed,
a byte from d to e byte[d, e]. Energy's idle watts depend on which devices take part: that set is given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import CostModel, FloatArray, packed_tensors
from ecotone.graph import Graph
from ecotone.planner.choices import IMAGE_CODECS, UNMEASURED_CODEC
from ecotone.planner.objective import Asked, PlannerError

__all__ = ["ADDITIVE", "Blockwise", "Prices", "alone", "bits_of", "blockwise", "prices"]

ADDITIVE = ("latency", "energy", "bytes", "server", "money")

MOST_CELLS = 2_000_000  # of a table that is held at once

BoolMatrix = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blockwise:
    """Tables by index, see the legend; inf: impossible. `size[bits]`: bytes (K,) of a frontier that was measured as such."""

    model: CostModel
    asked: Asked
    device: NDArray[np.intp]  # (M,)
    executors: tuple[str, ...]  # (M,)
    seconds: FloatArray  # (M, L)
    overhead: FloatArray  # (M,)
    capacity: FloatArray  # (D,) bytes
    weight: FloatArray  # (L,) bytes, shared ones at each of their blocks
    least_weight: FloatArray  # (L,) bytes, shared ones divided among their blocks: a device never holds less
    codecs: tuple[str, ...]
    encode: FloatArray  # (K, D, 2): seconds once, and per raw byte
    decode: FloatArray  # (K, D, 2)
    latency: FloatArray  # (D, D)
    rate: FloatArray  # (D, D)
    raw: FloatArray  # (N,) bytes
    coded: FloatArray  # (K, N) bytes of one tensor; inf where its codec is not to be used in a frontier not measured
    size: dict[int, FloatArray]
    source: int
    sink: int

    @property
    def graph(self) -> Graph:
        return self.model.graph

    @property
    def num_devices(self) -> int:
        return len(self.capacity)

    def sizes(self, frontiers: BoolMatrix) -> FloatArray:
        """Bytes of frontiers (n, N) in every codec: (n, K)."""
        usable = np.where(np.isfinite(self.coded), self.coded, 0.0)
        found = np.asarray(frontiers @ usable.T, dtype=np.float64)
        found[frontiers @ ~np.isfinite(self.coded).T] = math.inf
        for row, bits in enumerate(_as_ints(frontiers)):
            if bits in self.size:
                found[row] = self.size[bits]
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prices:
    """A Blockwise problem in the unit of an objective."""

    tables: Blockwise
    block: FloatArray  # (M, L)
    fixed: FloatArray  # (M,)
    busy: FloatArray  # (D,)
    elapsed: float
    byte: FloatArray  # (D, D)

    def options(self, frontiers: BoolMatrix) -> FloatArray:
        """What a crossing of each frontier (n, N) adds, by codec and devices: (n, K, D, D); inf where it cannot be."""
        tables = self.tables
        size, raw = tables.sizes(frontiers), (frontiers @ tables.raw)[:, None, None]
        linked, sent = np.isfinite(tables.latency), np.isfinite(size)
        latency, moved = np.where(linked, tables.latency, 0.0), np.where(sent, size, 0.0)[:, :, None, None]
        coder = [t[:, :, 0] + raw * t[:, :, 1] for t in (tables.encode, tables.decode)]  # (n, K, D) each
        known = np.isfinite(coder[0])[:, :, :, None] & np.isfinite(coder[1])[:, :, None, :] & sent[:, :, None, None] & linked
        encode, decode = (np.where(np.isfinite(t), t, 0.0) * self.busy for t in coder)
        total: FloatArray = encode[:, :, :, None] + decode[:, :, None, :] + self.elapsed * latency
        total = total + moved * (self.elapsed / tables.rate + self.byte)
        return np.where(known, total, math.inf)

    def crossings(self, frontiers: BoolMatrix) -> FloatArray:
        """The least of these over codecs, (n, D, D); inf on the diagonal."""
        step = max(1, MOST_CELLS // max(1, len(self.tables.codecs) * self.tables.num_devices**2))
        parts = [self.options(frontiers[low : low + step]).min(axis=1) for low in range(0, len(frontiers), step)]
        return np.concatenate(parts)

    def by_tensor(self, codec: int, source: int, target: int, coded: FloatArray | None = None) -> tuple[float, FloatArray]:
        """A crossing from device to device taken apart: what it adds once, and for each tensor (N,).

        `coded`: bytes of each tensor, where they are not those of the tables.
        """
        tables = self.tables
        coded = tables.coded[codec] if coded is None else coded
        coder = np.stack([tables.encode[codec, source], tables.decode[codec, target]])
        if not (np.isfinite(coder).all() and math.isfinite(tables.latency[source, target])):
            return math.inf, np.zeros(len(tables.raw))
        once, per_raw = self.busy[[source, target]] @ coder
        per_byte = self.elapsed / tables.rate[source, target] + self.byte[source, target]
        sent = np.isfinite(coded)
        each: FloatArray = np.where(sent, per_raw * tables.raw + per_byte * np.where(sent, coded, 0.0), math.inf)
        return float(once + self.elapsed * tables.latency[source, target]), each


def blockwise(model: CostModel, asked: Asked, *, guess: bool = False) -> Blockwise:
    """The tables of what may be planned under `asked`; raises PlannerError where nothing may.

    A lossy codec counts where its effect was measured: on the frontiers of the captured order. With `guess` it also
    counts on frontiers whose tensors each crossed in some of those, which is to be measured before it is believed.
    """
    devices, profile = model.cluster.devices, model.profile
    if profile.num_blocks != model.graph.num_blocks or profile.graph_hash != model.graph.content_hash():
        raise PlannerError(f"profile of {profile.cluster_name}: made for another model (graph hash differs); profile again")
    names = [d.name for d in devices]
    machines, seconds, overhead = _machines(model, asked)
    if not machines:
        raise PlannerError("no device that may be used has an executor measured for the whole model within the error asked")
    latency, rate = np.full((len(devices), len(devices)), math.inf), np.ones((len(devices), len(devices)))
    for d, source in enumerate(devices):
        for e, target in enumerate(devices):
            link = model.link(source.name, target.name) if d != e else None
            if link is not None:
                latency[d, e], rate[d, e] = link.latency_s, link.bandwidth_bytes_per_s
    weight, least_weight = _weights(model.graph)
    return Blockwise(
        model=model, asked=asked, device=np.array([d for d, _ in machines]), executors=tuple(e for _, e in machines),
        seconds=seconds, overhead=overhead, capacity=np.array([min(d.memory_bytes, asked.memory_bytes) for d in devices]),
        weight=weight, least_weight=least_weight,
        latency=latency, rate=rate, source=names.index(model.cluster.source), sink=names.index(model.cluster.sink),
        raw=np.array([t.size_bytes for t in model.graph.tensors], float), **_codecs(model, asked, guess),
    )  # fmt: skip


def _weights(graph: Graph) -> tuple[FloatArray, FloatArray]:
    uses = Counter(p for block in graph.blocks for p in set(block.parameters))
    rows = [[(graph.parameters[p].size_bytes, uses[p]) for p in set(block.parameters)] for block in graph.blocks]
    whole = np.array([sum(size for size, _ in row) for row in rows], dtype=np.float64)
    return whole, np.array([sum(size / count for size, count in row) for row in rows], dtype=np.float64)


def _machines(model: CostModel, asked: Asked) -> tuple[list[tuple[int, str]], FloatArray, FloatArray]:
    """Devices with each executor that runs every block there within the error asked: seconds (M, L) and overheads (M,)."""
    machines, seconds, overhead = [], [], []
    for d, device in enumerate(model.cluster.devices):
        for name in model.executors(device.name):
            times = model.stage_times(device.name, name)
            named = (not asked.devices or device.name in asked.devices) and (not asked.executors or name in asked.executors)
            if times is None or not named or times.largest_error > asked.executor_error or model.failures(device.name, name):
                continue
            each, once = times.per_block()
            if np.isfinite(each).all():
                machines.append((d, name))
                seconds.append(each)
                overhead.append(once)
    return machines, np.array(seconds).reshape(len(machines), model.graph.num_blocks), np.array(overhead)


def _codecs(model: CostModel, asked: Asked, guess: bool) -> dict[str, Any]:
    """Names, seconds (K, D, 2), bytes per tensor (K, N), and bytes of the frontiers that were measured."""
    graph, devices = model.graph, model.cluster.devices
    names = {UNMEASURED_CODEC} | {p.codec for p in model.profile.payloads}
    codecs = tuple(sorted(n for n in names if not asked.codecs or n in asked.codecs))
    encode, decode = np.full((2, len(codecs), len(devices), 2), math.inf)
    for k, codec in enumerate(codecs):
        for d, device in enumerate(devices):
            fixed, one = (model.codec_s(device.name, codec, raw) for raw in (0.0, 1.0))
            if fixed is not None and one is not None:
                encode[k, d], decode[k, d] = (fixed[0], one[0] - fixed[0]), (fixed[1], one[1] - fixed[1])
            elif codec == UNMEASURED_CODEC:
                encode[k, d] = decode[k, d] = 0.0
    size = {bits_of(graph.frontier(p)): _measured(model, asked, p, codecs) for p in model.profile.cuts}
    coded = np.full((len(codecs), len(graph.tensors)), math.inf)
    for k, codec in enumerate(codecs):
        if codec == UNMEASURED_CODEC:
            coded[k] = alone(graph, codec)
        elif guess and not codec.startswith(IMAGE_CODECS):
            coded[k] = _guessed(model, k, codec, size)
    return {"codecs": codecs, "encode": encode, "decode": decode, "coded": coded, "size": size}


def _measured(model: CostModel, asked: Asked, position: int, codecs: Sequence[str]) -> FloatArray:
    """Bytes of the frontier at a position in every codec (K,), inf where its loss was not measured or is too much."""
    found = np.full(len(codecs), math.inf)
    for k, codec in enumerate(codecs):
        payload = model.payload(position, codec)
        if payload is None or not (codec == UNMEASURED_CODEC or model.is_measured(position, codec)):
            continue
        if model.loss_points(position, codec) <= asked.loss_points and payload.relative_error <= asked.error:
            found[k] = payload.size_bytes
    return found


def alone(graph: Graph, codec: str) -> FloatArray:
    """Bytes of each tensor (N,) by equation 4's formula; inf where the codec has none."""
    sizes = (packed_tensors(graph, (t,), codec) for t in range(len(graph.tensors)))
    return np.array([math.inf if size is None else size for size in sizes], dtype=np.float64)


def _guessed(model: CostModel, k: int, codec: str, size: dict[int, FloatArray]) -> FloatArray:
    """Bytes of each tensor (N,): by formula, else by the mean ratio where it crossed; inf where it never may."""
    graph = model.graph
    by_formula, found = alone(graph, codec), np.full(len(graph.tensors), math.inf)
    for t, tensor in enumerate(graph.tensors):
        ratios = []
        for bits, sizes in size.items():
            if bits >> t & 1 and math.isfinite(sizes[k]):
                whole = sum(graph.tensors[i].size_bytes for i in range(len(graph.tensors)) if bits >> i & 1)
                ratios.append(float(sizes[k]) / max(1, whole))
        if ratios:
            found[t] = by_formula[t] if math.isfinite(by_formula[t]) else tensor.size_bytes * float(np.mean(ratios))
    return found


def prices(tables: Blockwise, objective: str, taking_part: Iterable[int] = ()) -> Prices:
    """Prices for one of ADDITIVE. For energy, `taking_part`: devices beside source and sink whose idle watts count; others
    that idle at a price may not be used.
    """
    devices, count = tables.model.cluster.devices, tables.num_devices
    busy, elapsed, byte = np.zeros(count), 0.0, np.zeros((count, count))
    out: list[int] = []
    if objective == "latency":
        busy, elapsed = np.ones(count), 1.0
    elif objective == "energy":
        power = [d.power for d in devices]
        ends = {tables.source, tables.sink, *taking_part}
        elapsed = sum(power[d].idle_watt for d in ends)
        out = [d for d, p in enumerate(power) if p.idle_watt > 0 and d not in ends]
        busy = np.array([p.busy_watt - p.idle_watt + elapsed for p in power])
        byte += np.array([p.send_joule_per_byte for p in power])[:, None]
    elif objective == "bytes":
        byte += 1.0
    elif objective == "server":
        busy = np.array([float(tables.model.is_server(d.name)) for d in devices])
    elif objective == "money":
        busy = np.array([d.price_money_per_s for d in devices])
        for d, source in enumerate(devices):
            for e, target in enumerate(devices):
                link = tables.model.cluster.link(source.name, target.name)
                byte[d, e] = link.price_money_per_byte if link else 0.0
    else:
        raise PlannerError(f"objective {objective}: does not add up over blocks; {', '.join(ADDITIVE)} do")
    rate = busy[tables.device]
    block = np.where(np.isin(tables.device, out)[:, None], math.inf, tables.seconds * rate[:, None])
    return Prices(tables=tables, block=block, fixed=tables.overhead * rate, busy=busy, elapsed=elapsed, byte=byte)


def bits_of(members: Iterable[int]) -> int:
    """A set of indices as an int."""
    return sum(1 << int(i) for i in members)


def _as_ints(rows: BoolMatrix) -> list[int]:
    packed = np.packbits(rows, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]
