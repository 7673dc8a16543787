"""Block tables against a plain model in which every slot is a list of its own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.decoding.blocks import BlockTables, KvCacheFull, SlotError
from ecotone.decoding.step import Row

pytestmark = pytest.mark.pure

SLOTS = st.integers(0, 3)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), SLOTS, st.integers(0, 20), st.integers(1, 9)),
        st.tuples(st.just("truncate"), SLOTS, st.integers(0, 20)),
        st.tuples(st.just("free"), SLOTS),
        st.tuples(st.just("fork"), SLOTS, SLOTS, st.integers(0, 20)),
        st.tuples(st.just("private"), SLOTS, st.integers(0, 20), st.integers(1, 9)),
    ),
    max_size=25,
)


class Memory:
    """What `kv.py` does with numbers instead of tensors: a stamp per (block, place)."""

    def __init__(self, num_blocks: int, block_tokens: int):
        self.tables = BlockTables(num_blocks, block_tokens)
        self.cells = {block: [None] * block_tokens for block in range(num_blocks)}
        self.stamp = 0

    def copy(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            self.cells[target] = list(self.cells[source])

    def write(self, slot: int, start: int, stop: int) -> list[int]:
        made = []
        for position in range(start, stop):
            self.stamp += 1
            block = self.tables.table(slot)[position // self.tables.block_tokens]
            self.cells[block][position % self.tables.block_tokens] = self.stamp
            made.append(self.stamp)
        return made

    def read(self, slot: int) -> list[int]:
        size = self.tables.block_tokens
        return [self.cells[self.tables.table(slot)[p // size]][p % size] for p in range(self.tables.length(slot))]


def act(memory: Memory, slots: dict[int, list[int]], action: tuple) -> None:
    kind, slot, *rest = action
    tables = memory.tables
    if kind == "extend":
        start, count = rest
        memory.copy(tables.extend([Row(slot=slot, start=start, count=count)]))
        slots[slot] = slots.get(slot, [])[:start] + memory.write(slot, start, start + count)
    elif kind == "truncate":
        tables.truncate(slot, rest[0])
        slots[slot] = slots.get(slot, [])[: rest[0]]
    elif kind == "free":
        tables.free(slot)
        slots[slot] = []
    elif kind == "fork":
        tables.fork(slot, *rest)
        if slot != rest[0]:
            slots[rest[0]] = slots.get(slot, [])[: rest[1]]
    else:
        start, stop = rest[0], min(rest[0] + rest[1], tables.length(slot))
        if start < stop:
            memory.copy(tables.make_private(slot, start, stop))
            slots[slot][start:stop] = memory.write(slot, start, stop)


@settings(max_examples=300)
@given(st.integers(1, 9), st.integers(1, 4), ACTIONS)
def test_slots_never_see_each_other(num_blocks: int, block_tokens: int, actions: list[tuple]) -> None:
    memory, slots = Memory(num_blocks, block_tokens), {}
    for action in actions:
        try:
            act(memory, slots, action)
        except KvCacheFull:
            if action[0] == "extend":  # only the roll-back has happened
                slots[action[1]] = slots.get(action[1], [])[: action[2]]
        except SlotError:
            pass
        for slot in range(4):
            assert memory.read(slot) == slots.get(slot, [])
        used = {block for slot in range(4) for block in memory.tables.table(slot)}
        assert memory.tables.num_free == num_blocks - len(used)  # nothing leaks, nothing is given twice


def test_all_or_nothing_over_the_rows_of_a_step() -> None:
    tables = BlockTables(3, 4)
    tables.extend([Row(slot=0, start=0, count=4)])
    with pytest.raises(KvCacheFull, match="3 blocks of 4 tokens are needed, 2 of 3 are free"):
        tables.extend([Row(slot=0, start=4, count=1), Row(slot=1, start=0, count=8)])
    assert (tables.length(0), tables.length(1), tables.num_free) == (4, 0, 2)
    tables.extend([Row(slot=0, start=4, count=1), Row(slot=1, start=0, count=3)])


def test_two_forks_of_a_part_block_each_copy_it_once() -> None:
    tables = BlockTables(4, 4)
    tables.extend([Row(slot=0, start=0, count=6)])
    tables.fork(0, 1, 6)
    copies = tables.extend([Row(slot=0, start=6, count=1), Row(slot=1, start=6, count=1)])
    assert len(copies) == 1  # the last owner writes in place
    assert tables.table(0)[0] == tables.table(1)[0]
    assert tables.table(0)[1] != tables.table(1)[1]
    with pytest.raises(SlotError, match="would leave a gap"):
        tables.extend([Row(slot=1, start=9, count=1)])
