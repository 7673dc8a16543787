"""Blocks that follow the branches of a model: groups of operators such that parallel branches stay apart.

`blocks.py` cuts one row of operators, so a block may hold the end of one branch and the start of the next, and no order of
blocks can then run the branches differently. Here every operator starts as a group, and groups merge only where no two
parallel ones come to depend on each other. Legend: a *series* pair G -> H has H read G, every other group that reads G come
after H, and every other group that H reads come before G, so both have the same groups beside them. before(G) and after(G)
are the bytes alive round G that G or what it reads decides; a cut is better on the side with fewer.
 1. A value that cannot cross joins its maker, its readers and whatever lies between.
 2. A group without a heavy operator, or too small to matter, joins its series neighbour on the side of more bytes.
 3. Groups that read the very same tensors join while they are small together: a cut between them keeps what they read.
 4. A series pair with more bytes between than on both sides joins while it is small.
Quadratic in operators.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ecotone.model.blocks import BIG_SHARE, NEARLY_EQUAL, SMALL_SHARE, Item

__all__ = ["branch_groups"]

END = -1
"""Reads what the model returns, after everything."""


def branch_groups(
    items: Sequence[Item], inputs: Sequence[Item], results: Sequence[int], *, need_batch: bool
) -> tuple[tuple[int, ...], ...]:
    """Item numbers of each block, ascending, blocks in a topological order; the arguments are those of `choose_cuts`.

    With `need_batch` every tensor between two blocks tells the batch.
    """
    groups = _Groups(items, inputs, results, need_batch)
    groups.join_what_cannot_part()
    while groups.join_light() or groups.join_twins() or groups.join_ridges():
        pass
    return groups.in_order()


@dataclass(slots=True)
class _Group:
    """`anc`: bits of the groups before it. `reads`: values from outside; `makes`: values that others read or END does."""

    members: list[int]
    cost: float
    heavy: bool
    anc: int
    reads: set[int]


class _Groups:
    """The partition in the making; a group goes by the number of one of its items."""

    def __init__(self, items: Sequence[Item], inputs: Sequence[Item], results: Sequence[int], need_batch: bool) -> None:
        self.items, self.total = items, sum(item.cost for item in items) or 1.0
        every = dict(enumerate(items)) | {-1 - i: item for i, item in enumerate(inputs)}
        self.size = {value: item.size_bytes for value, item in every.items()}
        wanted = [item.size_bytes < float("inf") and (item.has_batch or not need_batch) for item in items]
        self.fixed = [value for value, can_cross in enumerate(wanted) if not can_cross]
        self.home = list(range(len(items)))
        self.readers: dict[int, set[int]] = {value: set() for value in every}  # item numbers, END
        for number, item in enumerate(items):
            for value in item.reads:
                self.readers[value].add(number)
        for value in results:
            self.readers[value].add(END)
        self.groups: dict[int, _Group] = {}
        for number, item in enumerate(items):
            anc = 0
            for value in item.reads:
                anc |= (self.groups[value].anc | 1 << value) if value >= 0 else 0
            self.groups[number] = _Group([number], item.cost, item.heavy, anc, set(item.reads))

    # ---- the shape around a group ------------------------------------------------------------------------------------

    def _readers(self, value: int, outside: int) -> set[int]:
        """Groups (or END) other than `outside` that read a value."""
        return {self.home[r] if r != END else END for r in self.readers[value]} - {outside}

    def _after(self, group: int) -> set[int]:
        return {r for member in self.groups[group].members for r in self._readers(member, group)}

    def _before(self, group: int) -> set[int]:
        return {self.home[value] for value in self.groups[group].reads if value >= 0}

    def _comes_before(self, one: int, other: int) -> bool:
        return other == END or bool(self.groups[other].anc >> one & 1)

    def _is_series(self, one: int, other: int) -> bool:
        """`other` reads `one`, and both have the same groups beside them."""
        return all(r == other or self._comes_before(other, r) for r in self._after(one)) and all(
            p == one or self._comes_before(p, one) for p in self._before(other)
        )

    def _next(self, group: int) -> int | None:
        """The group that makes a series pair with this one, which comes first."""
        return next((r for r in sorted(self._after(group)) if r != END and self._is_series(group, r)), None)

    def _previous(self, group: int) -> int | None:
        return next((p for p in sorted(self._before(group)) if self._is_series(p, group)), None)

    def _change(self, group: int) -> tuple[float, float]:
        """before(G) and after(G)."""
        own = self.groups[group]
        before = sum(self.size[value] for value in own.reads)
        kept = sum(
            self.size[value]
            for value in own.reads
            if any(r == END or not own.anc >> r & 1 for r in self._readers(value, group))
        )
        return before, kept + sum(self.size[member] for member in own.members if self._readers(member, group))

    # ---- merging -----------------------------------------------------------------------------------------------------

    def _merge(self, kept: int, gone: int) -> None:
        one, other = self.groups[kept], self.groups.pop(gone)
        one.anc |= other.anc
        one.anc &= ~(1 << kept | 1 << gone)
        for member in other.members:
            self.home[member] = kept
        one.members += other.members
        one.cost, one.heavy = one.cost + other.cost, one.heavy or other.heavy
        one.reads = {value for value in one.reads | other.reads if value < 0 or self.home[value] != kept}
        for group in self.groups.values():
            if group is not one and group.anc >> gone & 1:
                group.anc = (group.anc | 1 << kept | one.anc) & ~(1 << gone)

    def join_what_cannot_part(self) -> None:
        """Rule 1."""
        for value in self.fixed:
            maker = self.home[value]
            for reader in sorted(self._readers(value, maker) - {END}):
                if reader in self.groups and reader != self.home[value]:
                    self._join_all(self.home[value], reader)

    def _join_all(self, first: int, last: int) -> None:
        """Two groups, one before the other, and all that lies between."""
        between = [g for g, own in self.groups.items() if own.anc >> first & 1 and self.groups[last].anc >> g & 1]
        for group in (*between, last):
            self._merge(first, group)
        merged = self.groups[first]
        for own in self.groups.values():  # all that comes after any part comes after the whole
            if own.anc >> first & 1:
                own.anc |= merged.anc

    def join_light(self) -> bool:
        """Rule 2, until nothing more joins; True where something did."""
        done = False
        for group in sorted(self.groups):
            own = self.groups.get(group)
            if own is None or (own.heavy and own.cost >= self.total * SMALL_SHARE):
                continue
            before, after = self._change(group)
            back, onward = before * NEARLY_EQUAL >= after, after * NEARLY_EQUAL >= before
            previous, following = (self._previous(group) if back else None), (self._next(group) if onward else None)
            if previous is not None:
                self._merge(previous, group)
            elif following is not None:
                self._merge(group, following)
            done |= previous is not None or following is not None
        return done

    def join_twins(self) -> bool:
        """Rule 3 for the pair that costs least; True where there was one."""
        alike: dict[frozenset[int], list[int]] = {}
        for group, own in self.groups.items():
            alike.setdefault(frozenset(own.reads), []).append(group)
        pairs: list[tuple[float, int, int]] = []
        for reads, twins in alike.items():
            if reads and len(twins) > 1:
                one, other = sorted(sorted(twins, key=lambda g: (self.groups[g].cost, g))[:2])
                pairs.append((self.groups[one].cost + self.groups[other].cost, one, other))
        cost, kept, gone = min(pairs, default=(float("inf"), 0, 0))
        if cost > self.total * BIG_SHARE:
            return False
        self._merge(kept, gone)
        return True

    def join_ridges(self) -> bool:
        """Rule 4 for the widest ridge; True where there was one."""
        found = []
        for group, following in self._series_pairs():
            (before, between), (_, after) = self._change(group), self._change(following)
            is_ridge = between >= before and between >= after and (between > before or between > after)
            if is_ridge and self.groups[group].cost + self.groups[following].cost <= self.total * BIG_SHARE:
                found.append((between, -group, following))
        if not found:
            return False
        _, negative, following = max(found)
        self._merge(-negative, following)
        return True

    def _series_pairs(self) -> Iterator[tuple[int, int]]:
        for group in sorted(self.groups):
            following = self._next(group)
            if following is not None:
                yield group, following

    def in_order(self) -> tuple[tuple[int, ...], ...]:
        """The groups in topological order, the one with the earliest first item first."""
        waiting = {group: self._before(group) for group in self.groups}
        ready = [(min(self.groups[g].members), g) for g, before in waiting.items() if not before]
        heapq.heapify(ready)
        found = []
        while ready:
            _, group = heapq.heappop(ready)
            found.append(tuple(sorted(self.groups[group].members)))
            for reader in self._after(group) - {END}:
                waiting[reader].discard(group)
                if not waiting[reader]:
                    heapq.heappush(ready, (min(self.groups[reader].members), reader))
        assert len(found) == len(self.groups), "groups form a cycle"
        return tuple(found)
