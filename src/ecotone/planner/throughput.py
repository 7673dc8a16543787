"""Least bottleneck of a chain where each device computes at most one stage: exact, by device classes.

A device's load is decode + T + encode of its one stage (the source's encode and the sink's decode of the ends included, with
their stage if they have one); a link's load is bytes / rate; the bottleneck is the greatest load: equations 7 and 8 of
cost.py. Devices are alike when swapping two changes no table, so a state needs a count per class, not a set of devices:
    state (counts used, class, cut, codec in)  --stage-->  (counts, class, cut, codec out)  --link-->  next state
For a threshold B, which states can be reached is a product of Boolean matrices; B is found by bisection over the loads
that can occur, so the answer is exact. One check costs O(prod(n_t + 1) * T * (P Q)^2) bit operations for Q codecs per cut.
What the source encodes and the sink decodes depends on the codecs at the two ends: these few pairs are enumerated.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.cost import FloatArray
from ecotone.planner.chain import Chain, Path

__all__ = ["Widest", "classes_of", "least_bottleneck", "relaxed_bottleneck"]

LARGEST_TABLE = 40_000_000  # cells of the reachability table beyond which the classes do not pay

Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Widest:
    """The path of least bottleneck (None: none, or `bound` is finite and the search was too large), and its proven bound."""

    path: Path | None
    value: float
    bound: float


def classes_of(chain: Chain) -> list[list[int]]:
    """Devices in classes of alike ones: same tables, same links to all others, and neither is source or sink.

    A place that is a class already (kinds.py) is one by itself.
    """
    found: list[list[int]] = []
    classes = np.nonzero(chain.is_class)[0].tolist()
    for device in range(chain.num_devices):
        if not np.isfinite(chain.stage[device]).any():
            continue
        pinned = (chain.source, chain.sink, *classes)
        for group in found:
            if device not in pinned and group[0] not in pinned and _alike(chain, group[0], device):
                group.append(device)
                break
        else:
            found.append([device])
    return found


def _alike(chain: Chain, d: int, e: int) -> bool:
    swapped = np.arange(chain.num_devices)
    swapped[[d, e]] = e, d
    if not np.array_equal(chain.stage[d], chain.stage[e]):
        return False
    if not (
        np.array_equal(chain.encode[:, :, d], chain.encode[:, :, e])
        and np.array_equal(chain.decode[:, :, d], chain.decode[:, :, e])
    ):
        return False
    for table in (chain.send, chain.transfer):
        for near, far in ((d, e), (e, d)):
            if not np.array_equal(table[:, :, near], table[:, :, far][:, :, swapped]):
                return False
            if not np.array_equal(table[:, :, :, near], table[:, :, :, far][:, :, swapped]):
                return False
    return True


def relaxed_bottleneck(chain: Chain) -> float:
    """A lower bound: the least bottleneck when a device's stages are not added up, exits' transfers left out.

    O(P^2 D Q + P D^2 Q).
    """
    size, count, num_codecs = chain.num_positions, chain.num_devices, len(chain.codecs)
    send = np.where(np.isfinite(chain.transfer), chain.send, math.inf)
    held = np.full((size, num_codecs + 1, count), math.inf)  # last option: local, at position 0 and at exits
    held[0, :-1] = np.maximum(send[0, :, chain.source, :], chain.encode[0, :, chain.source][:, None])
    held[0, -1, chain.source] = 0.0
    decode = np.concatenate([chain.decode, np.zeros((size, 1, count))], axis=1)
    exits = {e.position for e in chain.exits}
    for q in range(1, size):
        load = chain.stage[:, :q, q].T[:, None, :] + decode[:q]
        done = np.maximum(held[:q], load).min(axis=(0, 1))
        if q == size - 1:
            home = np.maximum(done[None], send[q, :, :, chain.sink]).min(axis=0)
            home[chain.sink] = done[chain.sink]
            return float(home.min())
        held[q, :-1] = np.maximum(done[None, :, None], send[q]).min(axis=1)
        if q in exits:  # it may go on by itself
            held[q, -1] = done
    return math.inf


def least_bottleneck(chain: Chain, deadline: float) -> Widest:
    """The exact answer; where the classes are too many, or time.perf_counter() passes `deadline`, only a bound."""
    search = _Classes(chain)
    if search.num_cells > LARGEST_TABLE:
        return Widest(None, math.inf, relaxed_bottleneck(chain))
    return search.run(deadline)


@dataclass(frozen=True, slots=True)
class _Ends:
    """A choice at the two ends: codecs (-1: the end's own device computes there), and whether the sink starts the chain
    (None: no matter; only where source and sink differ may one link carry both ends)."""

    first: int
    last: int
    sink_starts: bool | None


class _Classes:
    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.groups = classes_of(chain)
        self.admitted = np.where(np.isfinite(chain.transfer), chain.send, math.inf)
        self.speaker = np.array([group[0] for group in self.groups], dtype=np.intp)
        self.options = self._useful_codecs()
        self.num_options = max(1, *(len(o) for o in self.options))
        counts = [sum(len(chain.members[d]) for d in group) for group in self.groups]
        self.limit = np.array([min(n, chain.num_positions - 1) for n in counts], dtype=np.intp)
        self.num_counts = math.prod(int(n) + 1 for n in self.limit) if self.groups else 0
        self.width = chain.num_positions * self.num_options
        self.num_cells = self.num_counts * len(self.groups) * self.width
        if self.num_cells <= LARGEST_TABLE and self.groups:
            self.stride = np.concatenate([[1], np.cumprod(self.limit + 1)])[: len(self.groups)].astype(np.intp)
            self._tables()

    def _useful_codecs(self) -> list[list[int]]:
        """Per position the admissible codecs that no other one beats at once in bytes, encoding and decoding everywhere."""
        chain, found = self.chain, []
        for p in range(chain.num_positions):
            rows = np.concatenate([chain.size[p][:, None], chain.encode[p], chain.decode[p]], axis=1)
            usable = np.nonzero(np.isfinite(self.admitted[p]).any(axis=(1, 2)))[0].tolist()
            kept: list[int] = []
            for k in sorted(usable, key=lambda k: (float(chain.size[p, k]), k)):
                if not any((rows[j] <= rows[k]).all() for j in kept):
                    kept.append(k)
            found.append(kept)
        return found

    def _tables(self) -> None:
        """Loads by class, with a (position, option) pair flattened into one axis of P * Q."""
        chain, size, options = self.chain, self.chain.num_positions, self.num_options
        codec = np.full((size, options), -1, dtype=np.intp)
        for p, kept in enumerate(self.options):
            codec[p, : len(kept)] = kept
        self.codec = codec
        at, chosen = np.arange(size)[:, None], np.maximum(codec, 0)
        absent = (codec < 0)[None]
        decode = chain.decode[at, chosen][:, :, self.speaker].transpose(2, 0, 1)
        encode = chain.encode[at, chosen][:, :, self.speaker].transpose(2, 0, 1)
        self.decode = np.where(absent, math.inf, decode)
        self.encode = np.where(absent, math.inf, encode)
        send = self.admitted[at, chosen].transpose(2, 3, 0, 1)
        send = np.where(absent[None], math.inf, send)
        pairs = send[np.ix_(self.speaker, self.speaker)]
        for c, group in enumerate(self.groups):
            alike = group[1] if len(group) > 1 else group[0]  # of a class the diagonal is the link between two of it
            pairs[c, c] = send[group[0], alike]
        self.between, self.send = pairs, send
        compute = chain.stage[self.speaker]  # (T, P, P)
        self.load = self._loads(compute)
        self.level = np.zeros(self.num_counts, dtype=np.intp)
        self.counts = np.zeros((self.num_counts, len(self.groups)), dtype=np.intp)
        rest = np.arange(self.num_counts)
        for c in range(len(self.groups)):
            self.counts[:, c] = rest // self.stride[c] % (self.limit[c] + 1)
        self.level = self.counts.sum(axis=1)

    def _loads(self, compute: FloatArray) -> FloatArray:
        """(T, P Q, P Q): decode at (p, k) + stage [p, q) + encode at (q, k'); the two ends are put in later."""
        load = self.decode[:, :, :, None, None] + compute[:, :, None, :, None] + self.encode[:, None, None, :, :]
        return load.reshape(len(self.groups), self.width, self.width)

    def run(self, deadline: float) -> Widest:
        """Bisection for each pair of codecs at the ends, skipping pairs that cannot beat the best so far."""
        best, found = math.inf, None
        for ends in self._ends() if self.groups else []:
            if time.perf_counter() > deadline:
                return Widest(found, best, min(best, relaxed_bottleneck(self.chain)))
            problem = _Fixed(self, ends)
            if not problem.feasible(float(np.nextafter(best, 0.0)) if math.isfinite(best) else sys.float_info.max):
                continue
            values = problem.values(best)
            low, high = 0, len(values) - 1
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if problem.feasible(float(values[middle])) else (middle + 1, high)
            best, found = float(values[high]), problem.trace(float(values[high]))
        return Widest(found, best, best)

    def _ends(self) -> list[_Ends]:
        chain = self.chain
        firsts = [-1, *(k for k in range(len(self.options[0])))]
        lasts = [-1, *(k for k in range(len(self.options[-1])))]
        split = chain.source != chain.sink
        return [
            _Ends(f, k, s)
            for f in firsts
            for k in lasts
            for s in ((False, True) if split and f >= 0 and k >= 0 else (None,))
        ]


class _Fixed:
    """The problem with the choice at both ends fixed: loads, start row, final columns, and the Boolean reachability."""

    def __init__(self, classes: _Classes, ends: _Ends) -> None:
        self.classes, self.ends, chain = classes, ends, classes.chain
        speaker = classes.speaker
        options, size = classes.num_options, chain.num_positions
        self.entry = max(ends.first, 0)
        self.exit = (size - 1) * options + max(ends.last, 0)
        self.load = classes.load.copy()
        at_source, at_sink = speaker == chain.source, speaker == chain.sink
        sending = classes.codec[0, ends.first] if ends.first >= 0 else -1
        taking = classes.codec[-1, ends.last] if ends.last >= 0 else -1
        self.source_load = float(chain.encode[0, sending, chain.source]) if sending >= 0 else 0.0
        self.sink_load = float(chain.decode[-1, taking, chain.sink]) if taking >= 0 else 0.0
        self.own_load = (
            self.source_load + self.sink_load if chain.source == chain.sink else max(self.source_load, self.sink_load)
        )
        self._replace_ends()
        self.load[at_source] += self.source_load
        self.load[at_sink] += self.sink_load
        count = len(speaker)
        self.enter = np.where(at_source, 0.0, math.inf)
        self.leave = np.where(at_sink, 0.0, math.inf)
        if sending >= 0:
            self.enter = np.where(at_source, math.inf, classes.admitted[0, sending, chain.source, speaker])
        if taking >= 0:
            self.leave = np.where(at_sink, math.inf, classes.admitted[-1, taking, speaker, chain.sink])
        if ends.sink_starts is not None:
            self.enter = np.where(at_sink == ends.sink_starts, self.enter, math.inf)
            if ends.sink_starts:  # the link source > sink may carry both ends
                both = float(classes.admitted[0, sending, chain.source, chain.sink])
                both += float(classes.admitted[-1, taking, chain.source, chain.sink])
                self.leave = np.where(at_source, both, self.leave)
        self.between = classes.between.reshape(count, count, classes.width)

    def values(self, below: float) -> FloatArray:
        """Loads under `below` that can be the bottleneck, ascending."""
        every = np.concatenate([self.load.ravel(), self.between.ravel(), self.enter, self.leave, [self.own_load]])
        return np.unique(every[np.isfinite(every) & (every >= self.own_load) & (every < below)])

    def _replace_ends(self) -> None:
        """Rows at position 0 and columns at the last: only the chosen option, without codec where the end is local."""
        classes, options = self.classes, self.classes.num_options
        load, compute = self.load, classes.chain.stage[classes.speaker]
        inner_encode = classes.encode
        load[:, :options, :] = math.inf
        decode = classes.decode[:, 0, self.ends.first] if self.ends.first >= 0 else np.zeros(len(load))
        rows = decode[:, None, None] + compute[:, 0, :, None] + inner_encode
        load[:, self.entry, :] = rows.reshape(len(load), -1)
        load[:, :, -options:] = math.inf
        encode = classes.encode[:, -1, self.ends.last] if self.ends.last >= 0 else np.zeros(len(load))
        columns = classes.decode + compute[:, :, -1, None] + encode[:, None, None]
        load[:, options:, self.exit] = columns.reshape(len(load), -1)[:, options:]
        load[:, self.entry, self.exit] = decode + compute[:, 0, -1] + encode

    def _reach(self, threshold: float) -> tuple[Any, Any, tuple[int, int] | None]:
        """Start states and end states (counts, T, P Q) under `threshold`, and the first final (counts, class) if any."""
        classes = self.classes
        count = len(classes.groups)
        start = np.zeros((classes.num_counts, count, classes.width), dtype=np.bool_)
        done = np.zeros_like(start)
        allowed = (self.load <= threshold).astype(np.float32)
        link = self.between <= threshold
        leaving = self.leave <= threshold
        for first in np.nonzero(self.enter <= threshold)[0]:
            start[classes.stride[first], first, self.entry] = True
        for level in range(1, int(classes.level.max()) + 1):
            rows = np.nonzero(classes.level == level)[0]
            for c in range(count):
                now = start[rows, c]
                alive = now.any(axis=1)
                if not alive.any():
                    continue
                reached = (now[alive].astype(np.float32) @ allowed[c]) > 0
                at = rows[alive]
                done[at, c] = reached
                if leaving[c] and reached[:, self.exit].any():
                    return start, done, (int(at[int(reached[:, self.exit].argmax())]), c)
                for e in range(count):
                    room = classes.counts[at, e] < classes.limit[e]
                    if room.any():
                        start[at[room] + classes.stride[e], e] |= reached[room] & link[c, e]
        return start, done, None

    def feasible(self, threshold: float) -> bool:
        """True where some path has no load above `threshold`."""
        return self.own_load <= threshold and self._reach(threshold)[2] is not None

    def trace(self, threshold: float) -> Path | None:
        """The path that reaches the end first under `threshold`, with the devices of a class in order."""
        classes, options = self.classes, self.classes.num_options
        start, done, final = self._reach(threshold)
        if final is None:
            return None
        allowed, link = self.load <= threshold, self.between <= threshold
        (counts, c), cell = final, self.exit
        classes_used: list[int] = []
        stages: list[tuple[int, int, int]] = []
        codecs = [int(classes.codec[-1, self.ends.last]) if self.ends.last >= 0 else -1]
        while True:
            before = int(np.nonzero(start[counts, c] & allowed[c, :, cell])[0][0])
            stages.append((c, before // options, cell // options))
            classes_used.append(c)
            if before == self.entry:
                break
            codecs.append(int(classes.codec[before // options, before % options]))
            counts -= int(classes.stride[c])
            c, cell = next(d for d in range(len(classes.groups)) if done[counts, d, before] and link[d, c, before]), before
        codecs.append(int(classes.codec[0, self.ends.first]) if self.ends.first >= 0 else -1)
        taken = dict.fromkeys(range(len(classes.groups)), 0)
        found = []
        for c, a, b in reversed(stages):
            found.append((classes.groups[c][min(taken[c], len(classes.groups[c]) - 1)], a, b))
            taken[c] += 1
        return Path(tuple(found), tuple(reversed(codecs)))
