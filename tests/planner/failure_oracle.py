"""A second reckoning of what a plan set costs under failures: walks states and sets one by one, shares no code with ours.

Plans are sketches out of the tables that made the random problem (see enumeration.py); means over a moment of failure are
sums over many small steps instead of formulas. Prices of lost requests, rates and detection are those of the caller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from enumeration import World

CRASH_S, SILENCE_S, MARGIN, REROUTE_S, SPARE = 0.05, 0.15, 1.5, 0.005, 0.01
STEPS = 4000


@dataclass(frozen=True)
class Sketch:
    """A plan as rows: blocks [cuts[i], cuts[i + 1]) on row[i], crossings in codecs; figures; what it needs."""

    cuts: tuple[int, ...]
    row: tuple[str, ...]
    codecs: tuple[str | None, ...]
    latency_s: float
    waits_s: float  # of it, links' latency: nobody is busy
    first: tuple[float, float, float]  # compute on the source, encode, send of what first leaves it
    needs: frozenset[frozenset[str]]

    @property
    def stages(self) -> frozenset[tuple[str, int, int]]:
        return frozenset(zip(self.row, self.cuts, self.cuts[1:], strict=False))


def sketches(world: World) -> list[Sketch]:
    """Every plan with unlike neighbours, and every one of head and tail both on the source; of plans that differ only in
    codecs the fastest that keeps the default loss (the others cost more in every state and step)."""
    best: dict[tuple, Sketch] = {}
    blocks, names = world.graph.num_blocks, [d.name for d in world.cluster.devices]
    source = world.cluster.source
    for count in range(1, blocks + 1):
        for inner in itertools.combinations(range(1, blocks), count - 1):
            cuts = (0, *inner, blocks)
            for row in itertools.product(names, repeat=count):
                if any(a == b for a, b in itertools.pairwise(row)) and row != (source, source):
                    continue
                for sketch in _with_codecs(world, cuts, row):
                    key = (cuts, row)
                    if key not in best or sketch.latency_s < best[key].latency_s:
                        best[key] = sketch
    return list(best.values())


def _with_codecs(world: World, cuts: tuple[int, ...], row: tuple[str, ...]) -> Iterator[Sketch]:
    links = {(k.source, k.target): k for k in world.cluster.links}
    hops = list(zip((world.cluster.source, *row), (*row, world.cluster.sink), cuts, strict=True))
    if any(a != b and (a, b) not in links for a, b, _ in hops):
        return
    if any((d, a, b) not in world.seconds for d, a, b in zip(row, cuts, cuts[1:], strict=False)):
        return
    names = sorted({c for _, c in world.codec})
    for codecs in itertools.product(*([None] if a == b else names for a, b, _ in hops)):
        changed = sum(world.payload[p, c][1] for (_, _, p), c in zip(hops, codecs, strict=True) if c)
        if 100 * changed > 1 + 1e-9:
            continue
        latency, waits, own, first = 0.0, 0.0, 0.0, (0.0, 0.0, 0.0)
        has_left = False
        for i, ((a, b, p), codec) in enumerate(zip(hops, codecs, strict=True)):
            if codec is not None:
                raw = 4 * world.graph.tensors[p].num_elements
                encode, send = world.codec[a, codec][0] * raw, world.payload[p, codec][0] / links[a, b].bandwidth_bytes_per_s
                latency += encode + links[a, b].latency_s + send + world.codec[b, codec][1] * raw
                waits += links[a, b].latency_s
                if not has_left:
                    first, has_left = (own, encode, send), True
            if i < len(row):
                seconds = world.seconds[row[i], cuts[i], cuts[i + 1]]
                latency += seconds
                own += 0.0 if has_left else seconds
        if not has_left:
            first = (own, 0.0, 0.0)
        ends = {world.cluster.source, world.cluster.sink}
        needs = {frozenset((d,)) for d in row if d not in ends} | {frozenset((a, b)) for a, b, _ in hops if a != b}
        yield Sketch(cuts, row, codecs, latency, waits, first, frozenset(needs))


def resident(world: World, plans: Sequence[Sketch]) -> dict[str, int]:
    """Bytes on each device with all plans there: weights per unlike stage, plus the widest moment."""
    held: dict[str, set] = {}
    for device, a, b in {s for p in plans for s in p.stages}:
        held.setdefault(device, set()).add((a, b))
    sizes = [t.size_bytes for t in world.graph.tensors]
    weights = [p.size_bytes for p in world.graph.parameters]
    return {
        d: sum(sum(weights[a:b]) for a, b in spans) + max(sizes[i] + sizes[i + 1] for a, b in spans for i in range(a, b))
        for d, spans in held.items()
    }


def rates(world: World) -> dict[frozenset[str], tuple[float, float]]:
    """(mtbf, mttr) of everything that may fail."""
    ends = {world.cluster.source, world.cluster.sink}
    devices = [d for d in world.cluster.devices if d.name not in ends and d.mtbf_s > 0]
    found = {frozenset((d.name,)): (d.mtbf_s, d.mttr_s) for d in devices}
    for link in world.cluster.links:
        if link.mtbf_s > 0:
            pair = frozenset((link.source, link.target))
            mtbf, mttr = found.get(pair, (math.inf, 0.0))
            found[pair] = (min(mtbf, link.mtbf_s), max(mttr, link.mttr_s))
    return found


class Oracle:
    """Expected cost of sets of sketches of one world, with up to `survive` things down."""

    def __init__(self, world: World, survive: int, lost_s: float) -> None:
        self.world, self.lost_s = world, lost_s
        self.rates = rates(world)
        things = list(self.rates)
        self.states = [frozenset(c) for n in range(survive + 1) for c in itertools.combinations(things, n)]
        weight = {}
        for state in self.states:
            weight[state] = 1.0
            for thing in things:
                mtbf, mttr = self.rates[thing]
                weight[state] *= (mttr if thing in state else mtbf) / (mtbf + mttr)
        total = sum(weight.values())
        self.probability = {s: w / total for s, w in weight.items()}
        self._delay: dict = {}

    def head(self, p: Sketch, q: Sketch) -> float:
        """Seconds of the first stage, where both begin with it on the source."""
        source = self.world.cluster.source
        total = 0.0
        for i in range(min(len(p.row), len(q.row))):
            same = (p.row[i], p.cuts[i], p.cuts[i + 1]) == (q.row[i], q.cuts[i], q.cuts[i + 1])
            if not same or p.row[i] != source:
                break
            total += self.world.seconds[source, p.cuts[i], p.cuts[i + 1]]
        return total

    def delay(self, p: Sketch, q: Sketch, is_link: bool) -> float:
        """Seconds times requests: those under way when p stops, and those that come until that is noticed."""
        key = (p, q, is_link)
        if key not in self._delay:
            head, even = self.head(p, q), (np.arange(STEPS) + 0.5) / STEPS
            since = even * p.latency_s  # begun so long before the failure
            noticed = (MARGIN * p.latency_s + SILENCE_S if is_link else since + CRASH_S) + 0.0 * since
            ends = np.maximum(noticed + REROUTE_S, head) + q.latency_s - head
            under_way = p.latency_s * max(0.0, float(ends.mean()) - p.latency_s)
            window = SILENCE_S + (MARGIN - 0.5) * p.latency_s if is_link else CRASH_S
            left = even * window
            ends = np.maximum(left + REROUTE_S, head) - head
            self._delay[key] = under_way + window * float(ends.mean())
        return self._delay[key]

    def seconds(self, order: Sequence[Sketch], twin: Sketch | None = None) -> float:
        """Expected seconds of a request; `twin` runs beside the first of `order`."""
        total = 0.0
        first = order[0]
        pair = self.pair(first, twin) if twin else (0.0, 0.0)
        work = SPARE * (twin.latency_s - twin.waits_s - self.head(first, twin)) if twin else 0.0
        for state, chance in self.probability.items():
            serving = next((p for p in order if not p.needs & state), None)
            both = twin is not None and not first.needs & state and not twin.needs & state
            total += chance * (self.lost_s if serving is None else min(pair) + work if both else serving.latency_s)
            for thing, (mtbf, _) in self.rates.items():
                after = state | {thing}
                if serving is None or thing in state or after not in self.probability:
                    continue
                then = next((p for p in order if not p.needs & after), None)
                if both and not (thing in first.needs and thing in twin.needs):
                    late = pair[1] if thing in first.needs else pair[0] if thing in twin.needs else min(pair)
                    total += chance / mtbf * min(pair) * (late - min(pair))
                elif thing in serving.needs:
                    lost = serving.latency_s * max(0.0, self.lost_s - serving.latency_s)
                    step = lost if then is None else self.delay(serving, then, len(thing) == 2)
                    total += chance / mtbf * step
        return total

    def pair(self, p: Sketch, q: Sketch) -> tuple[float, float]:
        """Latencies of twins whose bodies share the source's uplink fairly, p's first: found by letting time pass."""
        head = self.head(p, q)
        (own_p, encode_p, send_p), (own_q, encode_q, send_q) = p.first, q.first
        lag = own_q - head + encode_q
        alone = min(send_p, lag)  # p has the uplink for itself
        rest = send_p - alone
        shared = min(rest, send_q)  # of each, sent while both send
        late = shared if rest > 0 else 0.0
        return p.latency_s + late, q.latency_s + own_p - head + encode_p + late

    def best(self, max_standbys: int, *, fits: bool = True) -> float:
        """The least over every set: any plan first, any others behind it in order of latency, any of the remote as twin."""
        plans = sketches(self.world)
        room = {d.name: d.memory_bytes for d in self.world.cluster.devices}
        source, least = self.world.cluster.source, math.inf
        leading = [p for p in plans if p.row != (source, source)]
        alone = [p for p in leading if all(n <= room[d] for d, n in resident(self.world, [p]).items())]
        for first in alone:
            others = [p for p in plans if p is not first and (p.latency_s >= first.latency_s or p not in leading)]
            others.sort(key=lambda p: p.latency_s)
            for count in range(max_standbys + 1):
                for rest in itertools.combinations(others, count):
                    order = (first, *rest)
                    if fits and any(n > room[d] for d, n in resident(self.world, order).items()):
                        continue
                    least = min(least, self.seconds(order))
                    for twin in rest:
                        if set(twin.row) != {source} and set(first.row) != {source} and first.needs - twin.needs:
                            least = min(least, self.seconds(order, twin))
        return least
