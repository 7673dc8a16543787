"""The planning problem as plain numpy tables, made from a CostModel and what was asked; no formula of its own.

Legend: P cut positions (indices into `cuts`, 0 and P - 1 are the ends), D places (devices, or classes of alike ones: see
kinds.py), X executors, K codecs. A *path* is the answer in these indices. Impossible entries are inf. A stage that by itself
does not fit its device is impossible. Neighbouring stages are on unlike devices, but for those that an exit parts.

Exits: a chain is made for one exit policy or none. r(p) is the share of requests that goes on behind position p. Times,
bytes and energy of a stage or crossing count as often as it is reached, so the tables are multiplied by r once and every
sum over a path is a mean (equations 6, 7, 10, 12, 13). No stage reaches over an exit; one that ends at an exit runs the head
and pays, for the share that leaves, the exit's transfer to the sink.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.accuracy import ExitPolicy
from ecotone.cluster import Device, DeviceId
from ecotone.cost import BoolArray, CostModel, FloatArray
from ecotone.graph import Graph
from ecotone.plan import LOCAL, Plan, Stage, Transfer
from ecotone.planner.choices import codec_tables, executor_tables, fastest, undominated
from ecotone.planner.kinds import hand_out, places
from ecotone.planner.objective import TAIL, Asked, PlannerError

__all__ = ["Chain", "ExitAt", "Leaving", "Path", "build", "segment_weights"]


@dataclass(frozen=True, slots=True)
class Path:
    """Stages (place, start, stop) and the codecs round them (-1: local), all as indices.

    Per stage, `executors` (none given: the fastest of every stage) and `leaves`, the codec of the exit's transfer where it
    ends at an exit (none given: the fastest).
    """

    stages: tuple[tuple[int, int, int], ...]
    codecs: tuple[int, ...]
    executors: tuple[int, ...] = ()
    leaves: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ExitAt:
    """An exit of the policy: its position (index), name, threshold, and the share of all requests that leaves there."""

    position: int
    name: str
    threshold: float
    leaves: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leaving:
    """The transfers of exits to the sink, times the share that leaves; zeros where no exit is, and from the sink itself."""

    seconds: FloatArray  # (P, K, D); inf without a link or codec
    encode: FloatArray  # (P, K, D) seconds on the device that sends
    decode: FloatArray  # (P, K, D) seconds on the sink
    send: FloatArray  # (P, K, D) seconds of the link
    size: FloatArray  # (P, K, D) bytes
    loss: FloatArray  # (P, K, D) points
    sure_loss: FloatArray  # (P, K, D) points
    error: FloatArray  # (P, K, D) not times the share: equation 11


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """Tables by index: see the file's legend. `best[p, d, e]` is the least transfer time, `choice` its codec (-1: local)."""

    model: CostModel
    cuts: tuple[int, ...]
    devices: tuple[Device, ...]  # one of every place
    members: tuple[tuple[DeviceId, ...], ...]
    source: int
    sink: int
    executors: tuple[str, ...]
    codecs: tuple[str, ...]
    seconds: FloatArray  # (X, D, P, P)
    error: FloatArray  # (X, D, P, P), or (X, D, 1, 1)
    stage: FloatArray  # (D, P, P) seconds of the fastest executor
    executor: NDArray[np.int16]  # (D, P, P)
    weights: FloatArray  # (P, P) bytes
    own_weights: FloatArray  # (P, P) bytes of the weights that no other segment of a path can share
    working: FloatArray  # (P, P) bytes
    capacity: FloatArray  # (D,) bytes
    size: FloatArray  # (P, K) bytes
    encode: FloatArray  # (P, K, D) seconds
    decode: FloatArray  # (P, K, D) seconds
    loss: FloatArray  # (P, K) points
    sure_loss: FloatArray  # (P, K) points, by the upper end of the interval
    codec_error: FloatArray  # (P, K)
    send: FloatArray  # (P, K, D, D) bytes / rate; inf where there is no link or the codec is not admissible
    transfer: FloatArray  # (P, K, D, D) seconds
    best: FloatArray  # (P, D, D) seconds
    choice: NDArray[np.intp]  # (P, D, D)
    share: FloatArray  # (P,) of requests that go on behind a position
    policy: ExitPolicy | None = None
    exits: tuple[ExitAt, ...] = ()
    leaving: Leaving | None = None
    left_out: bool = False  # executors that were not measured on a segment, where others were
    tail: float = TAIL  # share of requests that a 95th percentile does not see

    @property
    def num_positions(self) -> int:
        return len(self.cuts)

    @property
    def num_devices(self) -> int:
        return len(self.capacity)

    @property
    def is_class(self) -> BoolArray:
        """(D,) True where a place stands for several devices."""
        return np.array([len(group) > 1 for group in self.members], dtype=np.bool_)

    @property
    def fixed_loss(self) -> float:
        """Points that the exit policy loses, whatever the path."""
        return self.policy.loss_points if self.policy else 0.0

    @property
    def fixed_sure_loss(self) -> float:
        """Points that the exit policy may lose, by the upper end of its interval."""
        return self.policy.high_points if self.policy else 0.0

    @property
    def all_weights(self) -> float:
        """Bytes of the whole model and the heads of the policy."""
        heads = [self.model.graph.exit(e.name) for e in self.exits]
        sizes = (self.model.graph.parameters[p].size_bytes for head in heads if head for p in set(head.parameters))
        return float(self.weights[0, -1]) + sum(sizes)

    @property
    def free(self) -> BoolArray:
        """(P,) True where a device may go on by itself: at the ends, and at exits."""
        found = np.zeros(self.num_positions, dtype=np.bool_)
        found[[0, -1, *(e.position for e in self.exits)]] = True
        return found

    def plan(self, path: Path) -> Plan:
        """The Plan of a path; raises PlannerError where a class has too few devices that hold its stages."""
        local = [c < 0 for c in path.codecs]
        names = hand_out(path.stages, local, self.members, self.weights, self.working, self.capacity)
        if names is None:
            raise PlannerError("memory: the stages do not fit on the devices of one kind")
        heads = {e.position: e for e in self.exits}
        executors = path.executors or tuple(int(self.executor[s]) for s in path.stages)
        stages = tuple(
            Stage(
                device=name, start=self.cuts[a], stop=self.cuts[b], executor=self.executors[x],
                exit=heads[b].name if b in heads else "", threshold=heads[b].threshold if b in heads else 0.0,
            )
            for name, (_, a, b), x in zip(names, path.stages, executors, strict=True)
        )  # fmt: skip
        sink = self.model.cluster.sink
        ends, at = [self.model.cluster.source, *names, sink], [0, *(b for _, _, b in path.stages)]
        transfers = tuple(
            self._transfer(ends[i], ends[i + 1], at[i], self.codecs[c] if c >= 0 else LOCAL)
            for i, c in enumerate(path.codecs)
        )
        leaves = path.leaves or tuple(self._fastest_leave(d, b) for d, _, b in path.stages)
        leaving = tuple(
            self._transfer(name, sink, self.num_positions - 1, self.codecs[k] if name != sink else LOCAL)
            for name, (_, _, b), k in zip(names, path.stages, leaves, strict=True)
            if b in heads
        )
        digest, order = self.model.profile.graph_hash, self.model.graph.order
        return Plan(graph_hash=digest, stages=stages, transfers=transfers, exit_transfers=leaving, order=order)

    def _transfer(self, source: DeviceId, target: DeviceId, at: int, codec: str) -> Transfer:
        return Transfer(source=source, target=target, position=self.cuts[at], codec=codec)

    def _fastest_leave(self, place: int, stop: int) -> int:
        return int(self.leaving.seconds[stop, :, place].argmin()) if self.leaving else 0

    def limited(self, load_s: float) -> Chain:
        """The same without stages and transfers that alone load a device or link for more than `load_s`."""
        if not math.isfinite(load_s):
            return self
        seconds = np.where(self.seconds <= load_s, self.seconds, math.inf)
        return self._changed(seconds, np.where(self.send <= load_s, self.transfer, math.inf))

    def thinned(self, step: int) -> Chain:
        """The same with every `step`-th cut alone, the ends and exits among them: fewer paths, all of them of this chain."""
        kept = np.unique(
            [*range(0, self.num_positions - 1, step), self.num_positions - 1, *(e.position for e in self.exits)]
        )
        square, line = np.ix_(kept, kept), kept
        leaving = self.leaving
        if leaving is not None:
            leaving = Leaving(**{f.name: getattr(leaving, f.name)[line] for f in fields(leaving)})
        along = {n: getattr(self, n)[line] for n in (
            "size", "encode", "decode", "loss", "sure_loss", "codec_error", "send", "transfer", "best", "choice", "share"
        )}  # fmt: skip
        across = {n: getattr(self, n)[square] for n in ("weights", "own_weights", "working")}
        varies = self.error.shape[-1] > 1
        return replace(
            self, cuts=tuple(self.cuts[i] for i in kept), seconds=self.seconds[:, :, line][..., line],
            error=self.error[:, :, line][..., line] if varies else self.error, stage=self.stage[:, line][..., line],
            executor=self.executor[:, line][..., line], leaving=leaving,
            exits=tuple(replace(e, position=int(np.searchsorted(kept, e.position))) for e in self.exits), **along, **across,
        )  # fmt: skip

    def at_cuts_of(self, other: Chain, path: Path) -> Path:
        """A path of `other`, whose cuts are among this chain's, in the positions of this one."""
        place = {cut: i for i, cut in enumerate(self.cuts)}
        at = [place[cut] for cut in other.cuts]
        return replace(path, stages=tuple((d, at[a], at[b]) for d, a, b in path.stages))

    def without(self, devices: Iterable[str], pairs: Iterable[tuple[str, ...]]) -> Chain:
        """The same where these devices compute nothing and these directed links carry nothing; of a class it goes away."""
        place: dict[str, int] = {name: i for i, group in enumerate(self.members) for name in group}
        gone = {name for name in devices if name in place}
        cut = [(a, b) for a, b in pairs if a in place and b in place]
        gone |= {name for pair in cut for name in pair if len(self.members[place[name]]) > 1}
        alone = [place[name] for name in gone if len(self.members[place[name]]) == 1]
        members = [tuple(n for n in group if n not in gone or len(group) == 1) for group in self.members]
        alone += [i for i, group in enumerate(members) if not group]
        members = [group or self.members[i][:1] for i, group in enumerate(members)]
        seconds, transfer, leaving = self.seconds.copy(), self.transfer.copy(), self.leaving
        seconds[:, alone] = math.inf
        for a, b in cut:
            source, target = place[a], place[b]
            transfer[:, :, source, target] = math.inf
            if leaving is not None and target == self.sink:
                table = leaving.seconds.copy()
                table[[e.position for e in self.exits], :, source] = math.inf
                leaving = replace(leaving, seconds=table)
        return replace(self._changed(seconds, transfer), leaving=leaving, members=tuple(members))

    def beginning_with(self, device: int, stop: int, executor: str) -> Chain:
        """The same where every path begins with this stage."""
        seconds = self.seconds.copy()
        seconds[:, :, 0, :] = math.inf
        x = self.executors.index(executor)
        seconds[x, device, 0, stop] = self.seconds[x, device, 0, stop]
        return self._changed(seconds, self.transfer)

    def along(self, stages: Iterable[tuple[int, int, int]]) -> Chain:
        """The same where a path takes none but these stages, by whichever executors."""
        seconds = np.full_like(self.seconds, math.inf)
        for d, a, b in stages:
            seconds[:, d, a, b] = self.seconds[:, d, a, b]
        return self._changed(seconds, self.transfer)

    def _changed(self, seconds: FloatArray, transfer: FloatArray) -> Chain:
        stage, executor = fastest(seconds)
        best, choice = _fastest(transfer, self.free)
        return replace(
            self, seconds=seconds, stage=stage, executor=executor, transfer=transfer, best=best, choice=choice
        )  # fmt: skip

    def with_fastest_codecs(self, stages: tuple[tuple[int, int, int], ...]) -> Path | None:
        """These stages with the fastest admissible codec on every crossing; None where a link or stage is impossible."""
        ends = [self.source, *(d for d, _, _ in stages), self.sink]
        at = [0, *(stop for _, _, stop in stages)]
        if any(not math.isfinite(self.stage[s]) for s in stages):
            return None
        codecs = [int(self.choice[p, ends[i], ends[i + 1]]) for i, p in enumerate(at)]
        times = [self.best[p, ends[i], ends[i + 1]] for i, p in enumerate(at)]
        if self.leaving is not None:
            times += [self.leaving.seconds[b, :, d].min() for d, _, b in stages]
        return Path(stages, tuple(codecs)) if np.isfinite(times).all() else None


def build(model: CostModel, asked: Asked, policy: ExitPolicy | None = None, *, guesses: bool = False) -> Chain:
    """Tables of what may be planned under `asked` with the exits of `policy`.

    `guesses`: executors that were not measured on a segment compete with those that were. Raises PlannerError where a
    device or codec asked for is not there, or an exit of the policy is not in the graph.
    """
    profile, graph = model.profile, model.graph
    if profile.num_blocks != graph.num_blocks or profile.graph_hash != graph.content_hash():
        raise PlannerError(f"profile of {profile.cluster_name}: made for another model (graph hash differs); profile again")
    unknown = sorted(set(asked.devices) - set(model.devices))
    if unknown:
        known = ", ".join(list(model.devices)[:20])
        raise PlannerError(f"device={unknown[0]}: no such device; devices are {known}")
    cuts = np.array(sorted({*profile.cuts, *_positions(graph, policy)}), dtype=np.intp)
    members = places(model, asked.devices)
    devices = tuple(model.devices[group[0]] for group in members)
    source, sink = (next(i for i, g in enumerate(members) if end in g) for end in (model.cluster.source, model.cluster.sink))
    exits, share = _exits(graph, policy, cuts)
    weights, own, working = _memory(model, cuts, exits)
    capacity = np.array([min(float(d.memory_bytes), asked.memory_bytes) for d in devices])
    names, seconds, error, left_out = executor_tables(model, asked, cuts, [d.name for d in devices], guesses=guesses)
    _with_heads(model, seconds, [d.name for d in devices], names, exits, share)
    seconds[:, (weights + working)[None] > capacity[:, None, None]] = math.inf
    undominated(seconds, error)
    tables = codec_tables(model, asked, cuts, members, policy)
    outputs, sending = tables.pop("outputs"), tables.pop("sending")
    leaving = _leaving(tables, exits, sink, outputs, sending[:, :, sink]) if exits else None
    for name in ("size", "encode", "decode", "send", "transfer"):
        tables[name] = _times(tables[name], share)
    stage, executor = fastest(seconds)
    chain = Chain(
        model=model, cuts=tuple(int(c) for c in cuts), devices=devices, members=members, source=source, sink=sink,
        executors=names, seconds=seconds, error=error, stage=stage, executor=executor, weights=weights, own_weights=own,
        working=working, capacity=capacity, share=share, policy=policy, exits=exits, leaving=leaving, left_out=left_out,
        tail=asked.p95.tail if asked.p95 else TAIL,
        best=np.empty(0), choice=np.empty(0, dtype=np.intp), **tables,
    )  # fmt: skip
    best, choice = _fastest(chain.transfer, chain.free)
    return replace(chain, best=best, choice=choice)


def _times(table: FloatArray, share: FloatArray) -> FloatArray:
    """(P, ...) times the share that goes on there; impossible stays impossible."""
    along = share.reshape(-1, *(1,) * (table.ndim - 1))
    found: FloatArray = np.where(np.isfinite(table), table, 0.0) * along
    found[~np.isfinite(table)] = math.inf
    return found


def _positions(graph: Graph, policy: ExitPolicy | None) -> list[int]:
    found = [graph.exit(name) for name in (policy.exits if policy else ())]
    if any(e is None for e in found):
        names = ", ".join(policy.exits) if policy else ""
        raise PlannerError(f"exit policy {policy.name if policy else ''}: {names}: not all are exits of {graph.name}")
    return [e.position for e in found if e is not None]


def _exits(graph: Graph, policy: ExitPolicy | None, cuts: NDArray[np.intp]) -> tuple[tuple[ExitAt, ...], FloatArray]:
    """The exits of the policy by position, and r (P,)."""
    share, found, left = np.ones(len(cuts)), [], 1.0
    if policy is None:
        return (), share
    rows = zip(_positions(graph, policy), policy.exits, policy.thresholds, policy.shares, strict=True)
    for position, name, threshold, wanted in sorted(rows):
        at, leaves = int(np.searchsorted(cuts, position)), min(left, wanted)
        left -= leaves
        share[at:] = left
        found.append(ExitAt(at, name, threshold, leaves))
    return tuple(found), share


def _with_heads(
    model: CostModel, seconds: FloatArray, devices: list[DeviceId], executors: tuple[str, ...], exits: tuple[ExitAt, ...],
    share: FloatArray,
) -> None:  # fmt: skip
    """In place: heads added, stages that reach over an exit struck out, everything times the share that reaches it."""
    for place in exits:
        at = place.position
        seconds[:, :, :at, at + 1 :] = math.inf
        for x, executor in enumerate(executors):
            for d, device in enumerate(devices):
                head = model.exit_s(device, executor, place.name)
                seconds[x, d, :at, at] += math.inf if head is None else head
    if exits:
        seconds *= np.where(share > 0, share, 1.0)[:, None].astype(seconds.dtype)
        seconds[:, :, share <= 0] = np.where(np.isfinite(seconds[:, :, share <= 0]), 0.0, math.inf)


def _leaving(
    tables: dict[str, Any], exits: tuple[ExitAt, ...], sink: int, outputs: FloatArray, sending: FloatArray
) -> Leaving:  # fmt: skip
    """From the tables of one request: those of the outputs, from every device to the sink."""
    shape = tables["encode"].shape
    names = ("seconds", "encode", "decode", "send", "size", "loss", "sure_loss", "error")
    found = {name: np.zeros(shape) for name in names}
    rows = {
        "size": tables["size"],
        "loss": tables["loss"],
        "sure_loss": tables["sure_loss"],
        "error": tables["codec_error"],
        "decode": tables["decode"][..., sink],
    }
    last = {name: np.repeat(table[-1][:, None], shape[2], axis=1) for name, table in rows.items()}
    last |= {"seconds": outputs[:, :, sink], "encode": tables["encode"][-1], "send": sending}
    possible = np.isfinite(last["seconds"])
    for place in exits:
        for name, table in last.items():
            times = 1.0 if name == "error" else place.leaves
            row = np.where(possible, np.where(possible, table, 0.0) * times, math.inf if name == "seconds" else 0.0)
            row[:, sink] = 0.0
            if name == "seconds":
                row[1:, sink] = math.inf  # one way to stay
            found[name][place.position] = row
    return Leaving(**found)


def _memory(
    model: CostModel, cuts: NDArray[np.intp], exits: tuple[ExitAt, ...]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weights, own weights and working sets (P, P), heads included in the stages that end at them."""
    weights, own, working = *segment_weights(model.graph, cuts), _working(model, cuts)
    for place in exits:
        head, at = model.graph.exit(place.name), place.position
        assert head is not None
        size = sum(model.graph.parameters[p].size_bytes for p in set(head.parameters))
        weights[:at, at] += size
        own[:at, at] += size
        working[:at, at] = np.maximum(working[:at, at], head.working_bytes)
    return weights, own, working


def segment_weights(graph: Graph, cuts: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    """Bytes of weights of every segment between cuts, shared ones once; and of those that no block outside it uses: (P, P).

    By inclusion and exclusion of neighbours: a parameter with uses u1 < u2 < ... lies in [a, b) as often as single uses do
    less pairs of neighbouring uses. O(L^2) for L blocks.
    """
    count = graph.num_blocks
    single, pairs, spans = np.zeros(count + 1), np.zeros((count + 1, count + 1)), np.zeros((count + 1, count + 1))
    uses: dict[int, list[int]] = {}
    for index, block in enumerate(graph.blocks):
        for parameter in set(block.parameters):
            uses.setdefault(parameter, []).append(index)
    for parameter, blocks in uses.items():
        size = graph.parameters[parameter].size_bytes
        spans[blocks[0], blocks[-1] + 1] += size
        for block_index in blocks:
            single[block_index + 1] += size
        for first, second in itertools.pairwise(blocks):
            pairs[first, second + 1] += size

    def inside(table: FloatArray) -> FloatArray:
        found: FloatArray = np.cumsum(np.cumsum(table[::-1], axis=0)[::-1], axis=1)[np.ix_(cuts, cuts)]
        return found

    upto = np.cumsum(single)[cuts]
    return np.triu(upto[None, :] - upto[:, None] - inside(pairs), 1), np.triu(inside(spans), 1)


def _working(model: CostModel, cuts: NDArray[np.intp]) -> FloatArray:
    size = len(cuts)
    found = np.zeros((size, size))
    if size > 1:
        between = np.array([model.working[a:b].max() for a, b in itertools.pairwise(cuts)], dtype=np.float64)
        for start in range(size - 1):
            found[start, start + 1 :] = np.maximum.accumulate(between[start:])
    return found


def _fastest(transfer: FloatArray, free: BoolArray) -> tuple[FloatArray, NDArray[np.intp]]:
    """Least transfer time over codecs and which codec; staying on a device costs nothing where it is `free` to."""
    best, choice = transfer.min(axis=1), transfer.argmin(axis=1)
    own = np.arange(transfer.shape[-1])
    for at in np.nonzero(free)[0]:
        best[at, own, own], choice[at, own, own] = 0.0, -1
    return best, choice
