"""The planning problem of a language model as numpy tables: segments and hops by class of device, under one View.

The chain has N+2 blocks: the embedding, N layers, the head. A *segment* [b, e) on a class by an executor has one row of
sums and maxima. Devices that a swap cannot tell apart form a class with a count (EdgeShard's machine types): a plan names
classes, each used at most as often as it has devices. *Fixed* stages stand where they stand: what is kept of a former plan,
or an embedding or head that stays with the driver; their device may take one segment more.

Rows that another executor of the same class and blocks beats in every column are left out, so what remains is exact.
Memory: equation (12) of llmcost.py, per segment, beside what is fixed on the device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ecotone.cluster import Cluster, Device, DeviceId
from ecotone.llmcost import LlmCostModel
from ecotone.llmplan import EXACT, LOCAL, LlmStage, Span
from ecotone.llmprofile import EMBEDDING, FRAME, HEAD, Curve, LlmProfile, Measured
from ecotone.planner.generation.asked import LOSS, PROMPT, Asked, View
from ecotone.planner.objective import PlannerError

__all__ = ["Fixed", "Hop", "Problem", "Segments", "World", "span_of"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
NUM_SUMS, NUM_MAXIMA = 4, 2


def span_of(first: int, last: int, num_layers: int) -> Span:
    """Blocks [first, last) as a span."""
    return Span(
        start=min(max(first - 1, 0), num_layers), stop=min(max(last - 1, 0), num_layers), embedding=first == 0,
        head=last == num_layers + 2,
    )  # fmt: skip


def blocks_of(span: Span, num_layers: int) -> tuple[int, int]:
    """The inverse of `span_of`."""
    first = 0 if span.embedding else span.start + 1 if span.num_layers else num_layers + 1
    last = num_layers + 2 if span.head else span.stop + 1
    return first, last


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """A stage that stays: `stage` as it will stand in the plan, its device's class, its blocks, its sums and maxima."""

    stage: LlmStage
    place: int
    first: int
    last: int
    sums: FloatArray
    maxima: FloatArray
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows sorted by first block; those of block b are [start[b], start[b + 1]). `option` indexes the class's executors."""

    first: IntArray
    last: IntArray
    option: IntArray
    sums: FloatArray
    maxima: FloatArray
    num_bytes: IntArray
    start: IntArray

    def where(self, good: NDArray[np.bool_]) -> Segments:
        """Only the rows that are good."""
        first = self.first[good]
        return Segments(
            first, self.last[good], self.option[good], self.sums[good], self.maxima[good], self.num_bytes[good],
            np.searchsorted(first, np.arange(len(self.start))),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hop:
    """One way over a link in one codec."""

    codec: str
    sums: FloatArray
    maxima: FloatArray


class World:
    """What does not depend on the View: devices that may be used, in classes, and executors that they may run."""

    def __init__(self, model: LlmCostModel, asked: Asked, kept: Sequence[LlmStage] = ()):
        self.model, self.asked = model, asked
        self.cluster, self.profile = model.cluster, model.profile
        self.driver = asked.driver_of(self.cluster)
        self.kept = tuple(kept)
        self.refused: dict[str, str] = {}
        for codec in asked.codecs:
            if codec != EXACT and codec not in self.profile.codec_losses:
                raise PlannerError(f"the profile does not say what codec {codec} loses; plan without it or state it there")
        usable = [device for device in self.cluster.devices if self._usable(device)]
        special = {self.driver, *(stage.device for stage in kept)}
        self.classes = _classes(usable, self.cluster, self.profile, special)
        self.options = [self._options(group[0]) for group in self.classes]

    def _usable(self, device: Device) -> bool:
        reason = ""
        pairs = ((self.driver, device.name), (device.name, self.driver))
        if self.asked.devices and device.name not in self.asked.devices:
            reason = "is not among the devices asked for"
        elif not self.profile.executors_of(device):
            reason = "was not measured"
        elif device.name != self.driver and any(self.cluster.link(*pair) is None for pair in pairs):
            reason = f"has no link to and from the driver {self.driver}"
        if reason:
            self.refused[device.name] = reason
        return not reason

    def _options(self, device: Device) -> dict[str, Measured]:
        """Executors that the device may use, pairs for two phases among them."""
        single = [e for e in self.profile.executors_of(device) if "+" not in e]
        every = [*single, *(f"{a}+{b}" for a in single for b in single if a != b)]
        allowed = [e for e in every if not device.executors or e in device.executors]
        wanted = self.asked.executors
        allowed = [e for e in allowed if not wanted or e in wanted or set(e.split("+")) <= set(wanted)]
        made = ((e, self.model.measured(device.name, e)) for e in allowed)
        return {e: m for e, m in made if m is not None}

    @property
    def num_blocks(self) -> int:
        return self.profile.num_layers + 2

    def place_of(self, device: str) -> int | None:
        return next((k for k, group in enumerate(self.classes) if any(d.name == device for d in group)), None)

    def stage(self, device: DeviceId, first: int, last: int, executor: str) -> LlmStage:
        """A stage of blocks [first, last) with room for its keys; its codec is put in when the plan is made."""
        span = span_of(first, last, self.profile.num_layers)
        kv_bytes = self.model.kv_bytes(device, executor, span.num_layers)
        return LlmStage(device=device, span=span, executor=executor, kv_bytes=kv_bytes)


@dataclass(slots=True)
class Problem:
    """The tables under `view`. `capacity`: bytes that a device of each class has for a segment."""

    world: World
    view: View
    fixed: tuple[Fixed, ...] = field(init=False, default=())
    segments: list[Segments] = field(init=False)
    names: list[list[str]] = field(init=False)  # executors by class and option
    counts: tuple[int, ...] = field(init=False)
    busy: FloatArray = field(init=False)  # maxima that fixed stages put on each class
    hops: dict[tuple[int, int], tuple[Hop, ...]] = field(init=False)
    entry: list[Hop | None] = field(init=False)
    exit: list[Hop | None] = field(init=False)
    floor: FloatArray = field(init=False)  # maxima count as no less

    tables: list[dict[str, _Blocks]] = field(init=False)

    def __post_init__(self) -> None:
        world = self.world
        self.floor = np.zeros(NUM_MAXIMA)
        self.counts = tuple(len(group) for group in world.classes)
        self.busy = np.zeros((len(self.counts), NUM_MAXIMA))
        self.tables = [self._tables(k) for k in range(len(self.counts))]
        self.names = [list(tables) for tables in self.tables]
        self.segments = [self._segments(k, group[0].memory_bytes) for k, group in enumerate(world.classes)]
        self.hops = {(a, b): self._hops(a, b) for a in range(len(self.counts)) for b in range(len(self.counts))}
        self.entry = [self._end(k, forward=True) for k in range(len(self.counts))]
        self.exit = [self._end(k, forward=False) for k in range(len(self.counts))]

    def with_fixed(self, fixed: Sequence[Fixed]) -> Problem:
        """The same, which has nothing fixed, with these stages fixed."""
        made = copy.copy(self)
        made.fixed = tuple(fixed)
        made.busy = self.busy.copy()
        held: dict[int, int] = {}
        for stage in made.fixed:
            made.busy[stage.place] += stage.maxima
            held[stage.place] = held.get(stage.place, 0) + stage.num_bytes
        free = made.free_blocks()
        made.segments = [s.where(free[s.first] - free[s.last] == s.last - s.first) for s in self.segments]
        made.hops = dict(self.hops)
        for place, used in held.items():
            made.segments[place] = made._segments(place, self.world.classes[place][0].memory_bytes - used)
            made.hops[place, place] = (Hop(LOCAL, np.zeros(NUM_SUMS), np.zeros(NUM_MAXIMA)),)
        return made

    @property
    def num_blocks(self) -> int:
        return self.world.num_blocks

    @property
    def driver_place(self) -> int | None:
        return self.world.place_of(self.world.driver)

    def at(self, block: int) -> Fixed | None:
        """The fixed stage that begins at `block`."""
        return next((f for f in self.fixed if f.first == block), None)

    def free_blocks(self) -> IntArray:
        """Blocks from each position on that no fixed stage holds; of length num_blocks + 1."""
        free = np.ones(self.num_blocks, dtype=np.int64)
        for stage in self.fixed:
            free[stage.first : stage.last] = 0
        return np.append(np.cumsum(free[::-1])[::-1], 0)

    def fix(self, stage: LlmStage) -> Fixed | None:
        """`stage` with its figures; None where its device or executor cannot be had any more."""
        place = self.world.place_of(stage.device)
        if place is None:
            return None
        found = self.world.model.measured(stage.device, stage.executor)
        first, last = blocks_of(stage.span, self.world.profile.num_layers)
        if found is None:
            return None
        table = self._blocks(found)
        part = table.sums[first:last].sum(axis=0) + table.frame_sums
        most = table.maxima[first:last].sum(axis=0) + table.frame_maxima
        if not np.isfinite(part).all():
            return None
        weights = int(table.weights[first:last].sum())
        num_bytes = weights + stage.kv_bytes + self.world.model.boundary_bytes(stage.span)
        return Fixed(stage=stage, place=place, first=first, last=last, sums=part, maxima=most, num_bytes=num_bytes)

    def between(self, column: int, low: float, high: float) -> Problem:
        """The same with maximum `column` at most `high`, and counted as no less than `low`."""
        made = copy.copy(self)
        made.floor = self.floor.copy()
        made.floor[column] = low
        made.segments = [segments.where(segments.maxima[:, column] <= high) for segments in self.segments]
        made.hops = {ends: tuple(h for h in hops if h.maxima[column] <= high) for ends, hops in self.hops.items()}
        made.entry = [hop if hop is not None and hop.maxima[column] <= high else None for hop in self.entry]
        made.exit = [hop if hop is not None and hop.maxima[column] <= high else None for hop in self.exit]
        return made

    @property
    def least_maxima(self) -> FloatArray:
        """What every plan's maxima are at least, by what is fixed."""
        made: FloatArray = np.maximum(self.busy.max(axis=0, initial=0.0), self.floor)
        return made

    # ---- segments --------------------------------------------------------------------------------------------------------

    def _blocks(self, found: Measured) -> _Blocks:
        """Sums, maxima and bytes of every block by one executor; inf where it was not measured."""
        model, view = self.world.model, self.view
        parts = [EMBEDDING, *self.world.profile.layers, HEAD]
        rows: dict[str, tuple[list[float], list[float], int, int]] = {}
        each = self.world.profile.num_layers + 1
        for part in dict.fromkeys(parts):
            if part not in found.decode:
                rows[part] = ([math.inf] * NUM_SUMS, [math.inf] * NUM_MAXIMA, 0, 0)
                continue
            one, many = model.few_s(found.decode[part], part, 1), model.many_s(found, part, view.chunk)
            several = model.few_s(found.decode[part], part, view.rows)
            loss = 0.0 if part == EMBEDDING else found.loss / each
            is_layer = part in self.world.profile.windows
            kv = found.kv_bytes_per_token * model.shape.kept_tokens if is_layer else 0
            sums = [one, many, several, loss]
            rows[part] = (sums, [0.0 if part == HEAD else many, several], found.weight_bytes[part], kv)
        frame_sums, frame_maxima = np.zeros(NUM_SUMS), np.zeros(NUM_MAXIMA)
        tokens = model.shape.prompt / model.shape.num_chunks(view.chunk)
        few, many = found.decode.get(FRAME, Curve()), found.prefill.get(FRAME, Curve()).at_s(tokens, 0.0)
        frame_sums[:3] = few.at_s(1, 0.0), many, few.at_s(view.rows, 0.0)
        frame_maxima[:] = many, frame_sums[2]
        return _Blocks(
            np.array([rows[p][0] for p in parts]), np.array([rows[p][1] for p in parts]),
            np.array([rows[p][2] for p in parts], dtype=np.int64), np.array([rows[p][3] for p in parts], dtype=np.int64),
            frame_sums, frame_maxima,
        )  # fmt: skip

    def _tables(self, place: int) -> dict[str, _Blocks]:
        """The executors of a class that are worth looking at, block by block."""
        options = self.world.options[place]
        if not self.view.uses(PROMPT):  # a second copy of the weights is for prompts only
            options = {e: m for e, m in options.items() if e.partition("+")[2] not in options}
        return self._undominated({e: self._blocks(m) for e, m in options.items()})

    def _segments(self, place: int, room: int) -> Segments:
        """All segments of a class that fit into `room` bytes and are not beaten by another executor."""
        tables = self.tables[place]
        first, last = self._ranges()
        kept = self._kept_bytes(first, last)
        made = [table.over(first, last, self.busy[place], kept) for table in tables.values()]
        if not made:
            none = np.zeros(0, dtype=np.int64)
            start = np.zeros(self.num_blocks + 1, dtype=np.int64)
            return Segments(none, none, none, np.zeros((0, NUM_SUMS)), np.zeros((0, NUM_MAXIMA)), none, start)
        sums, maxima = np.stack([m[0] for m in made]), np.stack([m[1] for m in made])  # (option, range, column)
        num_bytes = np.stack([m[2] for m in made])
        good = np.isfinite(sums).all(axis=2) & (num_bytes <= room) & self._within_limits(sums)
        columns = self.columns(sums, maxima)
        for i in range(len(made)):
            for j in range(len(made)):
                if i != j:
                    at_most, less = (columns[j] <= columns[i]).all(axis=1), (columns[j] < columns[i]).any(axis=1)
                    good[i] &= ~(good[j] & at_most & (less | (j < i)))
        option, index = np.nonzero(good)
        order = np.argsort(first[index], kind="stable")
        option, index = option[order], index[order]
        start = np.searchsorted(first[index], np.arange(self.num_blocks + 1))
        return Segments(
            first[index], last[index], option, sums[option, index], maxima[option, index], num_bytes[option, index], start
        )

    def _ranges(self) -> tuple[IntArray, IntArray]:
        """Every [first, last) that no fixed stage overlaps."""
        free = self.free_blocks()
        first, last = np.triu_indices(self.num_blocks + 1, k=1)
        inside = free[first] - free[last] == last - first
        return first[inside].astype(np.int64), last[inside].astype(np.int64)

    def _kept_bytes(self, first: IntArray, last: IntArray) -> IntArray:
        """What a segment keeps of its outputs: nothing without layers, nor with the head."""
        layers = self.world.profile.num_layers
        bytes_each = self.world.model.boundary_bytes(Span(start=0, stop=1))
        has_layers = (np.minimum(last, layers + 1) - np.maximum(first, 1)) > 0
        return np.where(has_layers & (last <= layers + 1), bytes_each, 0).astype(np.int64)

    def _within_limits(self, sums: FloatArray) -> NDArray[np.bool_]:
        """Rows that do not break a limit by themselves."""
        good = np.ones(sums.shape[:-1], dtype=bool)
        for form in self.view.forms:
            if form.limit is not None and any(form.sums):
                good &= _weighed(sums, form.sums) <= form.limit * (1 + 1e-9)
        return good

    def columns(self, sums: FloatArray, maxima: FloatArray) -> FloatArray:
        """The columns that the view's forms look at: their sums, and the maxima that one of them weighs."""
        made = np.stack([_weighed(sums, weights) for weights in self.view.sums], axis=-1)
        return np.concatenate([made, maxima[..., self.view.maxima]], axis=-1)

    def _undominated(self, tables: dict[str, _Blocks]) -> dict[str, _Blocks]:
        """Executors that no other one beats on every block in time, loss and bytes: the cheap test before the exact one."""
        if not tables:
            return {}
        made = []
        for table in tables.values():
            frame = self.columns(table.frame_sums, table.frame_maxima)
            columns = self.columns(table.sums, table.maxima)
            made.append(np.concatenate([columns.ravel(), frame, (table.weights + table.keys).astype(float)]))
        rows = np.stack(made)
        order = np.arange(len(rows))
        kept = []
        for index, row in enumerate(rows):
            at_most, less = (rows <= row).all(axis=1), (rows < row).any(axis=1)
            if not (at_most & (less | (order < index)) & (order != index)).any():
                kept.append(index)
        names = list(tables)
        return {names[index]: tables[names[index]] for index in kept}

    # ---- hops ------------------------------------------------------------------------------------------------------------

    def _hops(self, source: int, target: int) -> tuple[Hop, ...]:
        """From a stage on `source` to another on `target`, by codec; () where there is none."""
        classes, same = self.world.classes, source == target
        if same and len(classes[source]) < 2:
            return ()
        ends = (classes[source][0].name, classes[target][1 if same else 0].name)
        codecs = self.world.asked.codecs
        if not self.view.uses(LOSS):  # then the one of fewest bytes is never worse
            codecs = (min(codecs, key=lambda codec: self.world.model.state_bytes(1, codec)),)
        state = self.world.model.state_bytes
        made = (self._hop(ends, [state(t, codec) for t in self._tokens()], codec) for codec in codecs)
        return tuple(hop for hop in made if hop is not None)

    def _tokens(self) -> tuple[float, float, float]:
        shape = self.world.model.shape
        return 1.0, shape.prompt / shape.num_chunks(self.view.chunk), float(self.view.rows)

    def _end(self, place: int, *, forward: bool) -> Hop | None:
        """From the driver with token ids, or back to it with the result; None where there is no link."""
        driver, device, model = self.world.driver, self.world.classes[place][0].name, self.world.model
        if driver == device:
            return Hop(LOCAL, np.zeros(NUM_SUMS), np.zeros(NUM_MAXIMA))
        if forward:
            return self._hop((driver, device), [model.ids_bytes(tokens) for tokens in self._tokens()], EXACT)
        sizes = [model.result_bytes(1), model.result_bytes(1), model.result_bytes(self.view.rows)]
        return self._hop((device, driver), sizes, EXACT)

    def _hop(self, ends: tuple[DeviceId, DeviceId], sizes: Sequence[float], codec: str) -> Hop | None:
        link = self.world.cluster.link(*ends)
        if link is None:
            return None
        occupied = [size / link.bandwidth_bytes_per_s for size in sizes]
        loss = 0.0 if codec == EXACT else self.world.profile.codec_losses[codec]
        sums = np.array([*(link.latency_s + t for t in occupied), loss])
        return Hop(codec, sums, np.array([occupied[1], occupied[2]]))


@dataclass(frozen=True, slots=True)
class _Blocks:
    sums: FloatArray
    maxima: FloatArray
    weights: IntArray
    keys: IntArray
    frame_sums: FloatArray
    frame_maxima: FloatArray

    def over(
        self, first: IntArray, last: IntArray, busy: FloatArray, kept: IntArray
    ) -> tuple[FloatArray, FloatArray, IntArray]:
        """Sums, maxima and bytes of every range; inf where a block was not measured."""
        sums, maxima = _ranges(self.sums, first, last), _ranges(self.maxima, first, last)
        own = np.concatenate([[0], np.cumsum(self.weights + self.keys)])
        return sums + self.frame_sums, maxima + self.frame_maxima + busy, own[last] - own[first] + kept


def _weighed(sums: FloatArray, weights: Sequence[float]) -> FloatArray:
    """sums . weights, where a weight of 0 also makes nothing of inf."""
    used = [index for index, weight in enumerate(weights) if weight]
    made: FloatArray = sums[..., used] @ np.array([weights[index] for index in used])
    return made


def _ranges(rows: FloatArray, first: IntArray, last: IntArray) -> FloatArray:
    known = np.isfinite(rows)
    upto = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(np.where(known, rows, 0.0), axis=0)])
    gaps = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(~known, axis=0)])
    made: FloatArray = np.where(gaps[last] > gaps[first], np.inf, upto[last] - upto[first])
    return made


def _classes(devices: Sequence[Device], cluster: Cluster, profile: LlmProfile, special: set[DeviceId]) -> list[list[Device]]:
    """Devices that may be swapped: alike in all but name, with equal links to everyone and each other."""
    groups: list[list[Device]] = []
    for device in devices:
        for group in groups:
            if _is_alike(group[0], device, profile, special) and _may_swap(group[0], device, devices, cluster):
                group.append(device)
                break
        else:
            groups.append([device])
    return groups


def _is_alike(one: Device, other: Device, profile: LlmProfile, special: set[DeviceId]) -> bool:
    same = (one.memory_bytes, set(one.executors)) == (other.memory_bytes, set(other.executors))
    return same and profile.key_of(one) == profile.key_of(other) and not {one.name, other.name} & special


def _may_swap(one: Device, other: Device, devices: Sequence[Device], cluster: Cluster) -> bool:
    if not _is_equal(cluster, (one.name, other.name), (other.name, one.name)):
        return False
    return all(
        _is_equal(cluster, (one.name, third.name), (other.name, third.name))
        and _is_equal(cluster, (third.name, one.name), (third.name, other.name))
        for third in devices
        if third.name not in (one.name, other.name)
    )


def _is_equal(cluster: Cluster, pair: tuple[DeviceId, DeviceId], other: tuple[DeviceId, DeviceId]) -> bool:
    return set(_rates(cluster, pair)) == set(_rates(cluster, other))


def _rates(cluster: Cluster, pair: tuple[DeviceId, DeviceId]) -> Iterator[tuple[float, float]]:
    link = cluster.link(*pair)
    if link is not None:
        yield link.latency_s, link.bandwidth_bytes_per_s
