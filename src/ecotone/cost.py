"""The one file of formulas: time, bytes, memory, energy and accuracy of a plan, from what was measured.

Legend: d, e devices; [a, b) blocks; p a cut; q a codec; P(b), S(a) measured times of the prefix [0, b) and the suffix
[a, L); o the fixed cost of a segment; alpha, beta latency and rate of a directed link; B(p, q) bytes of a frontier.

 (1) T_d(a, b)     = the measured median where this very segment was measured on d (or on a device of its kind), else
                     the mean of  P(b) - P(a) + o  and  S(a) - S(b) + o;  P and S made monotone by pool-adjacent-violators
 (2) o             = median over cuts c of  max(0, P(c) + S(c) - P(L)), at most the least P or S;   P(0) = S(L) = o
 (3) P(c)          = between measured cuts c0 < c < c1 by share of FLOP; such a time is flagged `extrapolated`
 (4) B(p, q)       = the measured payload, else exact: n * 4, 2, 2, ceil(n * b / 8) for fp32, fp16, bf16, int-b
 (5) x(p, q; d, e) = encode_d + alpha + B / beta + decode_e;  0 where d = e      (codec seconds: fixed + rate * raw bytes)
 (6) latency       = sum of all T and all x: one request alone
 (7) busy_d        = sum of the T, encode and decode that run on d;   busy_link = sum of B / beta (latency occupies nothing)
 (8) bottleneck    = max over devices and links of busy;   throughput = 1 / bottleneck
 (9) memory_d      = weights of all stages of d, shared ones once, + largest working set of activations among its blocks
(10) energy_d      = P_busy * busy_d + P_idle * (latency - busy_d) + e_tx * bytes sent: modelled, for each device that takes
                     part (source and sink included)
(11) disagreement  = min(1, sum over crossings);   relative error = sum over crossings + sum over stages (first order)

A link is the measured fit where the profile has one and the cluster is not emulated, else what the cluster states. Times
of a sibling of the same kind are scaled by the ratio of the two slowdowns, since a profile holds stretched times.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ecotone import schema
from ecotone.cluster import Cluster, DeviceId, Link
from ecotone.graph import Graph
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.profile import CodecCost, Payload, Profile, SegmentTime
from ecotone.units import EcotoneError

__all__ = [
    "CostError", "CostModel", "DeviceCost", "LinkCost", "PlanCost", "StageCost", "StageTimes", "TransferCost",
    "packed_bytes", "predict", "resident_bytes", "stage_s", "transfer_s", "working_set_bytes",
]  # fmt: skip

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
SCHEMA, VERSION = "ecotone.cost", 1
_FLOAT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}
_LARGEST_INT_BITS = 8


class CostError(EcotoneError):
    """A plan names something that was never measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage: seconds of compute, its error against eager float32, bytes of weights and of live activations."""

    device: DeviceId
    executor: str
    start: int
    stop: int
    compute_s: float
    relative_error: float
    weight_bytes: int
    working_bytes: int
    extrapolated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCost:
    """One transfer by its four parts; all zero where it is local."""

    source: DeviceId
    target: DeviceId
    position: int
    codec: str
    size_bytes: float = 0.0
    encode_s: float = 0.0
    latency_s: float = 0.0
    send_s: float = 0.0
    decode_s: float = 0.0
    disagreement: float = 0.0
    relative_error: float = 0.0

    @property
    def total_s(self) -> float:
        """Equation 5."""
        return self.encode_s + self.latency_s + self.send_s + self.decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCost:
    """A device that takes part: seconds busy per request, memory, modelled energy per request."""

    device: DeviceId
    busy_s: float
    memory_bytes: int
    energy_joule: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCost:
    """A directed link that carries something: bytes and seconds of occupancy per request."""

    source: DeviceId
    target: DeviceId
    size_bytes: float
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCost:
    """What a plan is predicted to cost per request; energy is modelled from constants, not metered."""

    latency_s: float
    bottleneck_s: float
    energy_joule: float
    disagreement: float
    relative_error: float
    stages: tuple[StageCost, ...]
    transfers: tuple[TransferCost, ...]
    devices: tuple[DeviceCost, ...]
    links: tuple[LinkCost, ...]

    @property
    def throughput_per_s(self) -> float:
        return 1.0 / self.bottleneck_s if self.bottleneck_s > 0 else math.inf

    @property
    def size_bytes(self) -> float:
        """Bytes over all links."""
        return sum(link.size_bytes for link in self.links)

    @property
    def accuracy_loss_points(self) -> float:
        return 100.0 * self.disagreement

    @property
    def extrapolated(self) -> bool:
        """True where any stage time comes from equation 3."""
        return any(stage.extrapolated for stage in self.stages)

    def to_json(self) -> str:
        return schema.dump_json(self, SCHEMA, VERSION)

    @staticmethod
    def from_json(text: str | bytes, where: str = "cost") -> PlanCost:
        """Read a cost; raises SchemaError naming every violation."""
        return schema.load_json(PlanCost, text, SCHEMA, VERSION, where)


class StageTimes:
    """Equations 1 to 3 for one device and one executor. `flop_before[i]`: FLOP of blocks [0, i), shape (L + 1,)."""

    def __init__(self, measured: Iterable[SegmentTime], flop_before: FloatArray, scale: float = 1.0) -> None:
        self.measured = {(m.start, m.stop): m for m in measured}
        self._flop, self._scale, self._last = flop_before, scale, len(flop_before) - 1
        median = {span: m.median_s for span, m in self.measured.items() if span[0] < span[1]}
        self._overhead = self._fixed_cost(median)
        self._prefix, after = self._curve(median, forward=True)
        self._suffix, before = self._curve(median, forward=False)
        self._cuts = after if self._suffix is None else before if self._prefix is None else after & before
        self.largest_error = max((m.relative_error for m in self.measured.values()), default=0.0)

    def _fixed_cost(self, median: Mapping[tuple[int, int], float]) -> float:
        last, whole = self._last, median.get((0, self._last))
        if whole is None:
            return 0.0
        pairs = [(median[(0, c)], median[(c, last)]) for c in range(1, last) if (0, c) in median and (c, last) in median]
        if not pairs:
            return 0.0
        found = float(np.median([max(0.0, p + s - whole) for p, s in pairs]))
        return min([found] + [min(pair) for pair in pairs])

    def _curve(self, median: Mapping[tuple[int, int], float], forward: bool) -> tuple[FloatArray | None, frozenset[int]]:
        """Times from block 0 up to each position (or from it to L), shape (L + 1,), and the positions measured."""
        first, final = (0, self._last) if forward else (self._last, 0)
        known = {first: self._overhead}
        for (start, stop), seconds in median.items():
            near, far = (start, stop) if forward else (stop, start)
            if near == first:
                known[far] = seconds
        spans = [(a, b, t) if forward else (b, a, t) for (a, b), t in median.items()]
        for near, far, seconds in sorted(spans, key=lambda s: abs(s[1] - first)):  # chains of measured pieces
            if near in known and far not in known:
                known[far] = known[near] + seconds - self._overhead
        if final not in known:
            return None, frozenset()
        order = sorted(known, key=lambda c: abs(c - first))
        levels = _isotonic(np.array([known[c] for c in order]))
        along = np.abs(self._flop - self._flop[first])
        index = np.abs(np.array(order) - first)
        walked = along if forward else along[::-1]
        curve = _by_share(index, levels, walked)
        return (curve if forward else curve[::-1]), frozenset(known)

    def table(self, cuts: Iterable[int]) -> tuple[FloatArray, BoolArray]:
        """Seconds of every segment between two of `cuts` (C of them), and which are extrapolated: two (C, C) arrays.

        Entry [i, j] is the segment [cuts[i], cuts[j]); inf where j <= i or nothing is known.
        """
        at = np.array(list(cuts), dtype=np.intp)
        estimates = []
        if self._prefix is not None:
            estimates.append(self._prefix[at][None, :] - self._prefix[at][:, None] + self._overhead)
        if self._suffix is not None:
            estimates.append(self._suffix[at][:, None] - self._suffix[at][None, :] + self._overhead)
        seconds = np.mean(estimates, axis=0) if estimates else np.full((len(at), len(at)), math.inf)
        unknown = np.array([int(c) not in self._cuts for c in at], dtype=np.bool_)
        flagged = unknown[:, None] | unknown[None, :]
        place = {int(c): i for i, c in enumerate(at)}
        for (start, stop), segment in self.measured.items():
            if start in place and stop in place:
                seconds[place[start], place[stop]] = segment.median_s
                flagged[place[start], place[stop]] = False
        seconds[np.arange(len(at))[:, None] >= np.arange(len(at))[None, :]] = math.inf
        return np.maximum(seconds, 0.0) * self._scale, flagged

    def seconds(self, start: int, stop: int) -> tuple[float, bool]:
        """Equation 1 for one segment, and whether it is extrapolated; inf where nothing is known."""
        values, flagged = self.table((start, stop))
        return float(values[0, 1]), bool(flagged[0, 1])

    def relative_error(self, start: int, stop: int) -> float:
        """Measured error of the segment, else the largest measured of this executor."""
        segment = self.measured.get((start, stop))
        return segment.relative_error if segment else self.largest_error


def _isotonic(values: FloatArray) -> FloatArray:
    """The nearest non-decreasing sequence in least squares: pool adjacent violators, O(n)."""
    blocks: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks]).astype(np.float64)


def _by_share(index: NDArray[np.intp], levels: FloatArray, walked: FloatArray) -> FloatArray:
    """Levels known at ascending `index`, spread over all positions by share of `walked`; by position where that stands."""
    positions = np.arange(len(walked))
    left = np.clip(np.searchsorted(index, positions, side="right") - 1, 0, max(0, len(index) - 2))
    right = np.minimum(left + 1, len(index) - 1)
    low, high = index[left], index[right]
    span = walked[high] - walked[low]
    steps = np.maximum(high - low, 1)
    share = np.where(span > 0, (walked - walked[low]) / np.where(span > 0, span, 1.0), (positions - low) / steps)
    spread: FloatArray = levels[left] + (levels[right] - levels[left]) * np.clip(share, 0.0, 1.0)
    return spread


def packed_bytes(graph: Graph, position: int, codec: str) -> float | None:
    """Equation 4's exact formula: fp32, fp16, bf16, int-b, int-b per channel ("int4c"); None for any other codec.

    Floating tensors take the codec, others travel as they are. Integers carry an 8-byte range per tensor or channel.
    """
    bits = _FLOAT_BITS.get(codec)
    per_channel, is_integer = codec.endswith("c"), codec.startswith("int")
    if is_integer:
        digits = codec[3:].removesuffix("c")
        bits = int(digits) if digits.isdigit() and 1 <= int(digits) <= _LARGEST_INT_BITS else None
    if bits is None:
        return None
    total = 0
    for index in graph.frontier(position):
        tensor = graph.tensors[index]
        if not tensor.dtype.startswith(("float", "bfloat")):
            total += tensor.size_bytes
            continue
        channels = tensor.shape[1] if per_channel and len(tensor.shape) > 1 else 1
        total += math.ceil(tensor.num_elements * bits / 8) + (8 * channels if is_integer else 0)
    return float(total)


def working_set_bytes(graph: Graph) -> NDArray[np.int64]:
    """Bytes of activations alive while each block runs, shape (L,): all that it or a later block still needs, and makes."""
    size = np.array([t.size_bytes for t in graph.tensors], dtype=np.int64)
    last = np.full(len(graph.tensors), -1)
    for index, block in enumerate(graph.blocks):
        last[list(block.inputs)] = index
    last[list(graph.outputs)] = graph.num_blocks
    made = np.array([t.producer for t in graph.tensors], dtype=np.int64)
    blocks = np.arange(graph.num_blocks)[:, None]
    alive = (made[None, :] <= blocks) & (np.maximum(last, made)[None, :] >= blocks)
    total: NDArray[np.int64] = alive.astype(np.int64) @ size
    return total


class CostModel:
    """The look-ups of one graph, cluster and profile, made once; `predict` and the planner share it."""

    def __init__(self, graph: Graph, cluster: Cluster, profile: Profile) -> None:
        self.graph, self.cluster, self.profile = graph, cluster, profile
        self.devices = {d.name: d for d in cluster.devices}
        self.working = working_set_bytes(graph)
        self._flop = np.concatenate([[0.0], np.cumsum([b.flop for b in graph.blocks])])
        self._segments: dict[str, dict[str, list[SegmentTime]]] = defaultdict(lambda: defaultdict(list))
        for segment in profile.segments:
            self._segments[segment.device][segment.executor].append(segment)
        self._codecs: dict[str, dict[str, CodecCost]] = defaultdict(dict)
        for cost in profile.codecs:
            self._codecs[cost.device][cost.codec] = cost
        self._payloads = {(p.position, p.codec): p for p in profile.payloads}
        self._raw: dict[int, int] = {}
        self._times: dict[tuple[str, str], StageTimes | None] = {}
        self._failed: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for failure in profile.failures:
            self._failed[(failure.device, failure.executor)].append((failure.start, failure.stop))
        self._links = {(k.source, k.target): k for k in cluster.links}
        if not cluster.emulate:
            for fit in profile.links:
                if (fit.source, fit.target) in self._links:
                    self._links[(fit.source, fit.target)] = Link(
                        source=fit.source, target=fit.target,
                        latency_s=fit.latency_s, bandwidth_bytes_per_s=fit.bandwidth_bytes_per_s,
                    )  # fmt: skip

    def measured_as(self, device: str, table: Mapping[str, object]) -> str | None:
        """The name under which `device` has entries in `table`: its own, else that of the first device of its kind."""
        if device in table:
            return device
        kind = self.devices[DeviceId(device)].kind if device in self.devices else ""
        alike = [d.name for d in self.cluster.devices if kind and d.kind == kind and d.name in table]
        return alike[0] if alike else None

    def _scale(self, device: str, measured: str) -> float:
        if device == measured:
            return 1.0
        return self.devices[DeviceId(device)].slowdown / self.devices[DeviceId(measured)].slowdown

    def executors(self, device: str) -> tuple[str, ...]:
        """Executors measured for `device` or its kind, and allowed there; sorted."""
        name = self.measured_as(device, self._segments)
        allowed = self.devices[DeviceId(device)].executors
        found = self._segments[name] if name is not None else {}
        return tuple(sorted(e for e in found if not allowed or e in allowed))

    def stage_times(self, device: str, executor: str) -> StageTimes | None:
        """Equations 1 to 3 for a device and an executor; None where nothing was measured for it or its kind."""
        key = (device, executor)
        if key not in self._times:
            name = self.measured_as(device, self._segments)
            found = self._segments[name].get(executor, []) if name is not None else []
            scale = self._scale(device, name) if name is not None else 1.0
            self._times[key] = StageTimes(found, self._flop, scale) if found else None
        return self._times[key]

    def failures(self, device: str, executor: str) -> list[tuple[int, int]]:
        """Segments that `executor` could not run on `device` or its kind."""
        name = self.measured_as(device, self._segments) or device
        return self._failed.get((name, executor), []) + (self._failed.get((device, executor), []) if name != device else [])

    def link(self, source: str, target: str) -> Link | None:
        """The directed link that counts (see the file's docstring), or None."""
        return self._links.get((DeviceId(source), DeviceId(target)))

    def raw_bytes(self, position: int) -> int:
        """Bytes of the frontier uncompressed."""
        if position not in self._raw:
            self._raw[position] = self.graph.frontier_bytes(position)
        return self._raw[position]

    def payload(self, position: int, codec: str) -> Payload | None:
        """Equation 4 with what the codec does to the answer; None for a codec that was not measured and has no formula."""
        found = self._payloads.get((position, codec))
        if found is None:
            size = packed_bytes(self.graph, position, codec)
            found = None if size is None else Payload(position=position, codec=codec, size_bytes=size)
        return found

    def is_measured(self, position: int, codec: str) -> bool:
        """True where the payload, and so its effect on the answer, was measured."""
        return (position, codec) in self._payloads

    def codec_s(self, device: str, codec: str, raw_bytes: float) -> tuple[float, float] | None:
        """Seconds to encode and to decode `raw_bytes` on `device`; None where not measured for it or its kind."""
        name = self.measured_as(device, self._codecs)
        cost = self._codecs[name].get(codec) if name is not None else None
        if cost is None or name is None:
            return None
        scale = self._scale(device, name)
        encode = cost.encode_fixed_s + cost.encode_s_per_raw_byte * raw_bytes
        decode = cost.decode_fixed_s + cost.decode_s_per_raw_byte * raw_bytes
        return encode * scale, decode * scale

    def stage(self, stage: Stage) -> StageCost:
        """What one stage costs; raises CostError where the device and executor were never measured."""
        times = self.stage_times(stage.device, stage.executor)
        seconds, flagged = times.seconds(stage.start, stage.stop) if times else (math.inf, True)
        if times is None or not math.isfinite(seconds):
            what = f"blocks [{stage.start}, {stage.stop}) by {stage.executor} on {stage.device}"
            raise CostError(f"profile of {self.profile.cluster_name}: nothing measured covers {what}; profile again")
        return StageCost(
            device=stage.device, executor=stage.executor, start=stage.start, stop=stage.stop, compute_s=seconds,
            relative_error=times.relative_error(stage.start, stage.stop),
            weight_bytes=self.graph.segment_parameter_bytes(stage.start, stage.stop),
            working_bytes=int(self.working[stage.start : stage.stop].max()), extrapolated=flagged,
        )  # fmt: skip

    def transfer(self, transfer: Transfer) -> TransferCost:
        """Equation 5 by parts; CostError: no link, or a codec of unknown size. Unmeasured codecs take 0 s."""
        ends = {"source": transfer.source, "target": transfer.target, "position": transfer.position}
        if transfer.is_local:
            return TransferCost(**ends, codec=LOCAL)  # type: ignore[arg-type]
        link = self.link(transfer.source, transfer.target)
        payload = self.payload(transfer.position, transfer.codec)
        if link is None:
            where = f"cluster {self.cluster.name}"
            raise CostError(f"{where}: no link from {transfer.source} to {transfer.target}; add it or plan again")
        if payload is None:
            what = f"codec {transfer.codec} at position {transfer.position}"
            raise CostError(f"profile of {self.profile.cluster_name}: {what} was not measured; profile again")
        raw = self.raw_bytes(transfer.position)
        encode = (self.codec_s(transfer.source, transfer.codec, raw) or (0.0, 0.0))[0]
        decode = (self.codec_s(transfer.target, transfer.codec, raw) or (0.0, 0.0))[1]
        return TransferCost(
            source=transfer.source, target=transfer.target, position=transfer.position, codec=transfer.codec,
            size_bytes=payload.size_bytes, encode_s=encode, latency_s=link.latency_s,
            send_s=payload.size_bytes / link.bandwidth_bytes_per_s, decode_s=decode,
            disagreement=payload.disagreement, relative_error=payload.relative_error,
        )  # fmt: skip

    def predict(self, plan: Plan) -> PlanCost:
        """Equations 6 to 11 for a plan of this graph on this cluster; raises CostError."""
        if plan.stages[-1].stop != self.graph.num_blocks:
            last = plan.stages[-1].stop
            raise CostError(f"plan: ends at block {last}, the model has {self.graph.num_blocks}; plan again")
        unknown = [n for n in (plan.source, plan.sink, *plan.devices) if n not in self.devices]
        if unknown:
            raise CostError(f"plan: device {unknown[0]!r} is not in cluster {self.cluster.name}; plan again")
        stages = tuple(self.stage(s) for s in plan.stages)
        transfers = tuple(self.transfer(t) for t in plan.transfers)
        latency = sum(s.compute_s for s in stages) + sum(t.total_s for t in transfers)
        links = _links(transfers)
        devices = self._devices(plan, stages, transfers, latency)
        return PlanCost(
            latency_s=latency,
            bottleneck_s=max([d.busy_s for d in devices] + [k.busy_s for k in links]),
            energy_joule=sum(d.energy_joule for d in devices),
            disagreement=min(1.0, sum(t.disagreement for t in transfers)),
            relative_error=sum(t.relative_error for t in transfers) + sum(s.relative_error for s in stages),
            stages=stages, transfers=transfers, devices=devices, links=links,
        )  # fmt: skip

    def _devices(
        self, plan: Plan, stages: tuple[StageCost, ...], transfers: tuple[TransferCost, ...], latency: float
    ) -> tuple[DeviceCost, ...]:
        found = []
        for name in dict.fromkeys((plan.source, *plan.devices, plan.sink)):
            own = [s for s in stages if s.device == name]
            busy = sum(s.compute_s for s in own)
            busy += sum(t.encode_s for t in transfers if t.source == name)
            busy += sum(t.decode_s for t in transfers if t.target == name)
            used = {p for s in own for b in self.graph.blocks[s.start : s.stop] for p in b.parameters}
            weights = sum(self.graph.parameters[p].size_bytes for p in used)
            memory = weights + max((s.working_bytes for s in own), default=0)
            sent = sum(t.size_bytes for t in transfers if t.source == name)
            power = self.devices[name].power
            energy = power.busy_watt * busy + power.idle_watt * max(0.0, latency - busy) + power.send_joule_per_byte * sent
            found.append(DeviceCost(device=name, busy_s=busy, memory_bytes=memory, energy_joule=energy))
        return tuple(found)


def _links(transfers: tuple[TransferCost, ...]) -> tuple[LinkCost, ...]:
    found: dict[tuple[DeviceId, DeviceId], tuple[float, float]] = {}
    for t in transfers:
        if t.codec != LOCAL:
            size, busy = found.get((t.source, t.target), (0.0, 0.0))
            found[(t.source, t.target)] = (size + t.size_bytes, busy + t.send_s)
    return tuple(LinkCost(source=s, target=t, size_bytes=n, busy_s=b) for (s, t), (n, b) in found.items())


def stage_s(profile: Profile, device: str, executor: str, start: int, stop: int, *, graph: Graph, cluster: Cluster) -> float:
    """Equation 1 in seconds; raises CostError where nothing covers it. For many look-ups keep a CostModel."""
    stage = Stage(device=DeviceId(device), start=start, stop=stop, executor=executor)
    return CostModel(graph, cluster, profile).stage(stage).compute_s


def transfer_s(
    profile: Profile, source: str, target: str, position: int, codec: str, *, graph: Graph, cluster: Cluster
) -> float:
    """Equation 5 in seconds, zero where source is target; raises CostError for a missing link or an unmeasured codec."""
    codec = LOCAL if source == target else codec
    transfer = Transfer(source=DeviceId(source), target=DeviceId(target), position=position, codec=codec)
    return CostModel(graph, cluster, profile).transfer(transfer).total_s


def predict(plan: Plan, graph: Graph, cluster: Cluster, profile: Profile) -> PlanCost:
    """What `plan` costs per request on `cluster`, one entry per stage and per transfer; raises CostError."""
    return CostModel(graph, cluster, profile).predict(plan)


def resident_bytes(graphs: Mapping[str, Graph], plans: Iterable[Plan]) -> dict[DeviceId, int]:
    """Bytes that each device holds while all `plans` are resident; `graphs` by content hash, CostError for one not there.

    Equation 9 over several plans. A device compiles equal stages (graph, blocks, executor) once, however many plans name
    them, and unlike ones apart: weights of overlapping stages lie in memory twice. One stage computes at a time, so the
    working set is the largest of all. Devices in order of first use; a source or sink that computes nothing has 0.
    """
    held: dict[DeviceId, set[tuple[str, int, int, str]]] = {}
    for plan in plans:
        if plan.graph_hash not in graphs:
            raise CostError(f"plan {plan}: its model {plan.graph_hash[:12]} is not among the graphs given; give it too")
        for device in (plan.source, *plan.devices, plan.sink):
            held.setdefault(device, set())
        for stage in plan.stages:
            held[stage.device].add((plan.graph_hash, stage.start, stage.stop, stage.executor))
    working = {name: working_set_bytes(graphs[name]) for name in {own[0] for stages in held.values() for own in stages}}
    found = {}
    for device, stages in held.items():
        weights = sum(graphs[name].segment_parameter_bytes(start, stop) for name, start, stop, _ in stages)
        found[device] = weights + max((int(working[n][a:b].max()) for n, a, b, _ in stages), default=0)
    return found
