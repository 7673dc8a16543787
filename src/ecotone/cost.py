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
(11) loss          = loss of the exit policy + sum over crossings of loss(p, q), an exit's transfer as often as it is taken;
                     loss(p, q) is that of the accuracy table (fitted; under the policy where that was measured, less the
                     policy's own), else 100 * disagreement.
                     disagreement = min(1, sum over crossings);   relative error = sum over crossings + sum over stages
                     sure loss: the same by upper ends of intervals, at most 100; 100 per crossing that was not calibrated
(12) server seconds = sum of busy_d over servers: tier "edge" or "cloud"; with no tier stated, all but source and sink
(13) money         = sum of price_d * busy_d + sum over links of price * bytes
With exits, r_i is the share of requests that reach stage i: r_0 = 1, r_(i+1) = r_i less the share that leaves at its end.
Then (6), (7), (10), (12), (13) are means: stage i and transfer i count r_i times, an exit's transfer as often as taken.

A link is the measured fit where the profile has one and the cluster is not emulated, else what the cluster states; a fit
between two devices that are linked by kind stands for their kinds. Times of a sibling of the same kind are scaled by the
ratio of the two slowdowns, since a profile holds stretched times.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ecotone.accuracy import Crossing, ExitPolicy
from ecotone.cluster import Cluster, DeviceId, Link
from ecotone.graph import Graph
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.plancost import DeviceCost, LinkCost, PlanCost, StageCost, TransferCost
from ecotone.profile import CodecCost, LinkFit, Payload, Profile, SegmentTime
from ecotone.units import EcotoneError

__all__ = [
    "CostError", "CostModel", "DeviceCost", "LinkCost", "PlanCost", "StageCost", "StageTimes", "TransferCost",
    "packed_bytes", "packed_tensors", "predict", "resident_bytes", "stage_s", "transfer_s", "working_set_bytes",
]  # fmt: skip

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
_FLOAT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}
_LARGEST_INT_BITS = 8


class CostError(EcotoneError):
    """A plan names something that was never measured."""


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
        curves = [self._prefix[at]] if self._prefix is not None else []
        curves += [-self._suffix[at]] if self._suffix is not None else []
        along = np.mean(curves, axis=0) if curves else np.full(len(at), math.inf)
        seconds = along[None, :] - along[:, None] + self._overhead if curves else np.full((len(at), len(at)), math.inf)
        np.maximum(seconds, 0.0, out=seconds)
        unknown = np.array([int(c) not in self._cuts for c in at], dtype=np.bool_)
        flagged = unknown[:, None] | unknown[None, :]
        place = {int(c): i for i, c in enumerate(at)}
        for (start, stop), segment in self.measured.items():
            if start in place and stop in place:
                seconds[place[start], place[stop]] = segment.median_s
                flagged[place[start], place[stop]] = False
        seconds *= self._scale
        seconds[np.tri(len(at), dtype=np.bool_)] = math.inf
        return seconds, flagged

    def seconds(self, start: int, stop: int) -> tuple[float, bool]:
        """Equation 1 for one segment, and whether it is extrapolated; inf where nothing is known."""
        values, flagged = self.table((start, stop))
        return float(values[0, 1]), bool(flagged[0, 1])

    def per_block(self) -> tuple[FloatArray, float]:
        """Equation 1 taken apart: what each block adds to a segment (L,), inf where unknown, and o, which a segment adds."""
        curves = [self._prefix] if self._prefix is not None else []
        curves += [-self._suffix] if self._suffix is not None else []
        if not curves:
            return np.full(self._last, math.inf), 0.0
        steps: FloatArray = np.maximum(np.diff(np.mean(curves, axis=0)), 0.0)
        return steps * self._scale, self._overhead * self._scale

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
    return packed_tensors(graph, graph.frontier(position), codec)


def packed_tensors(graph: Graph, tensors: Iterable[int], codec: str) -> float | None:
    """The same for any tensors, by index."""
    bits = _FLOAT_BITS.get(codec)
    per_channel, is_integer = codec.endswith("c"), codec.startswith("int")
    if is_integer:
        digits = codec[3:].removesuffix("c")
        bits = int(digits) if digits.isdigit() and 1 <= int(digits) <= _LARGEST_INT_BITS else None
    if bits is None:
        return None
    total = 0
    for index in tensors:
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
        self._exits = {(e.device, e.executor, e.exit): e for e in profile.exits}
        stated = any(d.tier for d in cluster.devices)
        ends = (cluster.source, cluster.sink)
        self._servers = {d.name for d in cluster.devices if (d.tier in ("edge", "cloud") if stated else d.name not in ends)}
        self._raw: tuple[int, ...] = ()
        self._times: dict[tuple[str | None, str, float], StageTimes | None] = {}
        self._failed: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for failure in profile.failures:
            self._failed[(failure.device, failure.executor)].append((failure.start, failure.stop))
        self._links: dict[tuple[str, str], Link | None] = {(k.source, k.target): k for k in cluster.links}
        self._fits_by_kind: dict[tuple[str, str], LinkFit] = {}
        for fit in profile.links if not cluster.emulate else ():
            if (fit.source, fit.target) in self._links:
                self._links[(fit.source, fit.target)] = _fitted(fit, fit.source, fit.target)
            elif cluster.link(fit.source, fit.target) is not None:
                self._fits_by_kind.setdefault((self._kind(fit.source), self._kind(fit.target)), fit)
        self._alike: dict[str, list[str]] = defaultdict(list)
        for device in cluster.devices:
            self._alike[device.kind].append(device.name)

    def _kind(self, device: str) -> str:
        return self.devices[DeviceId(device)].kind if device in self.devices else ""

    def measured_as(self, device: str, table: Mapping[str, object]) -> str | None:
        """The name under which `device` has entries in `table`: its own, else that of the first device of its kind."""
        if device in table:
            return device
        kind = self._kind(device)
        return next((name for name in self._alike[kind] if name in table), None) if kind else None

    def measured_names(self, device: str) -> tuple[str | None, str | None]:
        """Under which names the segments and the codecs of `device` were measured."""
        return self.measured_as(device, self._segments), self.measured_as(device, self._codecs)

    def is_server(self, device: str) -> bool:
        """Whether its work counts in equation 12."""
        return device in self._servers

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
        name = self.measured_as(device, self._segments)
        scale = self._scale(device, name) if name is not None else 1.0
        key = (name, executor, scale)
        if key not in self._times:
            found = self._segments[name].get(executor, []) if name is not None else []
            self._times[key] = StageTimes(found, self._flop, scale) if found else None
        return self._times[key]

    def failures(self, device: str, executor: str) -> list[tuple[int, int]]:
        """Segments that `executor` could not run on `device` or its kind."""
        name = self.measured_as(device, self._segments) or device
        return self._failed.get((name, executor), []) + (self._failed.get((device, executor), []) if name != device else [])

    def link(self, source: str, target: str) -> Link | None:
        """The directed link that counts (see the file's docstring), or None."""
        key = (source, target)
        if key not in self._links and self.cluster.kind_links:
            fit = self._fits_by_kind.get((self._kind(source), self._kind(target)))
            stated = self.cluster.link(source, target)
            fitted = _fitted(fit, source, target) if fit and stated else stated
            self._links[key] = fitted
        return self._links.get(key)

    def raw_bytes(self, position: int) -> int:
        """Bytes of the frontier uncompressed."""
        if not self._raw:
            self._raw = self.graph.every_frontier_bytes()
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

    def loss_points(self, position: int, codec: str, policy: ExitPolicy | None = None) -> float:
        """Points that a crossing loses (equation 11), beside what `policy` loses; 0 for an unknown codec."""
        points = self.profile.accuracy.crossing_points(position, codec, policy) if self.profile.accuracy else None
        if points is not None:
            return points
        payload = self.payload(position, codec)
        return 100.0 * payload.disagreement if payload else 0.0

    def sure_points(self, position: int, codec: str, policy: ExitPolicy | None = None) -> float:
        """Points that a crossing loses at most, by the upper end of its interval; 100 where it was not calibrated."""
        points = self.profile.accuracy.sure_points(position, codec, policy) if self.profile.accuracy else None
        return points if points is not None else 0.0 if codec.partition("+")[0] == "fp32" else 100.0

    def expected_disagreement(self, plan: Plan) -> float | None:
        """The largest share of decisions that `plan` was calibrated to change; None where the table does not hold it."""
        table = self.profile.accuracy
        if table is None:
            return None
        chain = tuple(Crossing(position=p, codec=q) for p, q in plan.crossings)
        if plan.graph_hash != table.graph_hash:
            return table.differing(chain, variant=plan.graph_hash)
        policy = self.policy_of(plan)
        return table.differing(chain, policy.name if policy else "")

    def exit_s(self, device: str, executor: str, exit_name: str) -> float | None:
        """Seconds of an exit's head with its decision; None where it was not measured for the device or its kind."""
        name = self.measured_as(device, {d: None for d, e, x in self._exits if (e, x) == (executor, exit_name)})
        if name is None:
            return None
        return self._exits[DeviceId(name), executor, exit_name].median_s * self._scale(device, name)

    def policy_of(self, plan: Plan) -> ExitPolicy | None:
        """The calibrated policy that `plan` follows, None where it has no exits; CostError where it was not calibrated."""
        leaving = [s for s in plan.stages if s.exit]
        if not leaving:
            return None
        wanted = (tuple(s.exit for s in leaving), tuple(s.threshold for s in leaving))
        table = self.profile.accuracy
        for policy in table.policies if table else ():
            if (policy.exits, policy.thresholds) == wanted:
                return policy
        what = ", ".join(f"{s.exit} at {s.threshold:.3g}" for s in leaving)
        raise CostError(f"profile of {self.profile.cluster_name}: exits {what} were not calibrated; calibrate or plan again")

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
        place, working = self.graph.exit(stage.exit), int(self.working[stage.start : stage.stop].max())
        exit_s = self.exit_s(stage.device, stage.executor, stage.exit) if stage.exit else 0.0
        if exit_s is None:
            what = f"exit {stage.exit} by {stage.executor} on {stage.device}"
            raise CostError(f"profile of {self.profile.cluster_name}: {what} was not measured; profile again")
        return StageCost(
            device=stage.device, executor=stage.executor, start=stage.start, stop=stage.stop, compute_s=seconds + exit_s,
            relative_error=times.relative_error(stage.start, stage.stop),
            weight_bytes=self.graph.segment_parameter_bytes(stage.start, stage.stop, stage.exit),
            working_bytes=max(working, place.working_bytes if place else 0), extrapolated=flagged,
            exit=stage.exit, exit_s=exit_s,
        )  # fmt: skip

    def transfer(self, transfer: Transfer, policy: ExitPolicy | None = None) -> TransferCost:
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
            loss_points=self.loss_points(transfer.position, transfer.codec, policy),
            sure_points=self.sure_points(transfer.position, transfer.codec, policy),
        )  # fmt: skip

    def predict(self, plan: Plan) -> PlanCost:
        """Equations 6 to 11 for a plan of this graph on this cluster; raises CostError."""
        if plan.order != self.graph.order:
            raise CostError("plan: cuts the model in another order of its blocks; price it on graph.in_order(plan.order)")
        if plan.stages[-1].stop != self.graph.num_blocks:
            last = plan.stages[-1].stop
            raise CostError(f"plan: ends at block {last}, the model has {self.graph.num_blocks}; plan again")
        unknown = [n for n in (plan.source, plan.sink, *plan.devices) if n not in self.devices]
        if unknown:
            raise CostError(f"plan: device {unknown[0]!r} is not in cluster {self.cluster.name}; plan again")
        policy = self.policy_of(plan)
        stages = _shared_out(tuple(self.stage(s) for s in plan.stages), plan, policy)
        reach = [*(s.share for s in stages), stages[-1].share - stages[-1].leaves]
        transfers = tuple(replace(self.transfer(t, policy), share=r) for t, r in zip(plan.transfers, reach, strict=True))
        leaving = [s.leaves for s, stage in zip(stages, plan.stages, strict=True) if stage.exit]
        exits = tuple(replace(self.transfer(t, policy), share=r) for t, r in zip(plan.exit_transfers, leaving, strict=True))
        edges = (*transfers, *exits)
        latency = sum(s.share * s.compute_s for s in stages) + sum(t.share * t.total_s for t in edges)
        links = _links(edges)
        devices = self._devices(plan, stages, edges, latency)
        prices = {(k.source, k.target): self.cluster.link(k.source, k.target) for k in links}
        money = sum(self.devices[d.device].price_money_per_s * d.busy_s for d in devices)
        return PlanCost(
            latency_s=latency,
            bottleneck_s=max([d.busy_s for d in devices] + [k.busy_s for k in links]),
            energy_joule=sum(d.energy_joule for d in devices),
            disagreement=min(1.0, sum(t.disagreement for t in edges)),
            relative_error=sum(t.relative_error for t in edges) + sum(s.relative_error for s in stages),
            stages=stages, transfers=transfers, devices=devices, links=links, exit_transfers=exits,
            loss_points=(policy.loss_points if policy else 0.0) + sum(t.loss_points for t in transfers)
            + sum(t.share * t.loss_points for t in exits),
            sure_points=min(
                100.0,
                (policy.high_points if policy else 0.0) + sum(t.sure_points for t in transfers)
                + sum(t.share * t.sure_points for t in exits),
            ),
            server_s=sum(d.busy_s for d in devices if d.device in self._servers),
            money=money + sum(p.price_money_per_byte * k.size_bytes for k in links if (p := prices[k.source, k.target])),
        )  # fmt: skip

    def _devices(
        self, plan: Plan, stages: tuple[StageCost, ...], transfers: tuple[TransferCost, ...], latency: float
    ) -> tuple[DeviceCost, ...]:
        found = []
        for name in dict.fromkeys((plan.source, *plan.devices, plan.sink)):
            own = [s for s in stages if s.device == name]
            busy = sum(s.share * s.compute_s for s in own)
            busy += sum(t.share * t.encode_s for t in transfers if t.source == name)
            busy += sum(t.share * t.decode_s for t in transfers if t.target == name)
            names = {s.exit for s in plan.stages if s.device == name}
            used = {p for s in own for p in self.graph.segment_parameters(s.start, s.stop)}
            used |= {p for place in self.graph.exits if place.name in names for p in place.parameters}
            weights = sum(self.graph.parameters[p].size_bytes for p in used)
            memory = weights + max((s.working_bytes for s in own), default=0)
            sent = sum(t.share * t.size_bytes for t in transfers if t.source == name)
            power = self.devices[name].power
            energy = power.busy_watt * busy + power.idle_watt * max(0.0, latency - busy) + power.send_joule_per_byte * sent
            found.append(DeviceCost(device=name, busy_s=busy, memory_bytes=memory, energy_joule=energy))
        return tuple(found)


def _shared_out(stages: tuple[StageCost, ...], plan: Plan, policy: ExitPolicy | None) -> tuple[StageCost, ...]:
    """Stages with the share of requests that reaches each, and that leaves at its end."""
    if policy is None:
        return stages
    leaves, share, found = dict(zip(policy.exits, policy.shares, strict=True)), 1.0, []
    for cost, stage in zip(stages, plan.stages, strict=True):
        out = min(share, leaves[stage.exit]) if stage.exit else 0.0
        found.append(replace(cost, share=share, leaves=out))
        share -= out
    return tuple(found)


def _fitted(fit: LinkFit, source: str, target: str) -> Link:
    return Link(
        source=DeviceId(source), target=DeviceId(target), latency_s=fit.latency_s,
        bandwidth_bytes_per_s=fit.bandwidth_bytes_per_s,
    )  # fmt: skip


def _links(transfers: tuple[TransferCost, ...]) -> tuple[LinkCost, ...]:
    found: dict[tuple[DeviceId, DeviceId], tuple[float, float]] = {}
    for t in transfers:
        if t.codec != LOCAL:
            size, busy = found.get((t.source, t.target), (0.0, 0.0))
            found[(t.source, t.target)] = (size + t.share * t.size_bytes, busy + t.share * t.send_s)
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
    held: dict[DeviceId, set[tuple[str, int, int, str, str]]] = {}
    for plan in plans:
        if plan.graph_hash not in graphs:
            raise CostError(f"plan {plan}: its model {plan.graph_hash[:12]} is not among the graphs given; give it too")
        for device in (plan.source, *plan.devices, plan.sink):
            held.setdefault(device, set())
        for stage in plan.stages:
            held[stage.device].add((plan.graph_hash, stage.start, stage.stop, stage.executor, stage.exit))
    working = {name: working_set_bytes(graphs[name]) for name in {own[0] for stages in held.values() for own in stages}}
    found = {}
    for device, stages in held.items():
        weights = sum(graphs[name].segment_parameter_bytes(a, b, exit_name) for name, a, b, _, exit_name in stages)
        found[device] = weights + max((int(working[n][a:b].max()) for n, a, b, _, _ in stages), default=0)
    return found
