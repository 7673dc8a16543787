"""The ledger against shards that carry out its orders: what it counts is what they hold, and what is reused is right."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.decoding.blocks import BlockTables, KvCacheFull
from ecotone.decoding.frame import Cut, Fork
from ecotone.decoding.ledger import Ledger

pytestmark = pytest.mark.pure
BLOCK = 4


class Shard:
    """Keys are the tokens themselves; carries out orders as a stage does."""

    def __init__(self, num_blocks: int):
        self.tables, self.keys = BlockTables(num_blocks, BLOCK), {}

    def carry_out(self, ledger: Ledger) -> None:
        for order in ledger.orders:
            match order:
                case Fork(source, target, length):
                    self.tables.fork(source, target, length)
                    self.keys[target] = self.keys[source][:length]
                case Cut(slot, length):
                    self.tables.truncate(slot, length)
                    del self.keys.get(slot, [])[length:]
        ledger.orders.clear()

    def compute(self, slot: int, start: int, tokens: list[int]) -> None:
        from_row = type("R", (), {"slot": slot, "start": start, "stop": start + len(tokens)})
        self.tables.extend([from_row])  # type: ignore[list-item]
        self.keys[slot] = [*self.keys.get(slot, [])[:start], *tokens]


class World:
    """A ledger, one shard, and requests that are worked on until they end."""

    def __init__(self, num_blocks: int):
        self.ledger, self.shard = Ledger(num_blocks, BLOCK), Shard(num_blocks)
        self.live: dict[int, list[int]] = {}
        self.slot = 0

    def begin(self, tokens: list[int]) -> int:
        self.slot += 1
        matched = self.ledger.matched(tokens)
        found = self.ledger.begin(self.slot, tokens)
        assert found == matched
        assert found % BLOCK == 0
        assert found < len(tokens)
        self.shard.carry_out(self.ledger)
        assert self.shard.keys.get(self.slot, []) == tokens[:found]  # reused keys are of the very same tokens
        self.live[self.slot] = tokens
        return found

    def send(self, slot: int, count: int) -> None:
        tokens, start = self.live[slot], self.shard.tables.length(slot)
        count = min(count, len(tokens) - start)
        if count < 1:
            return
        free_before = self.ledger.num_free_blocks
        try:
            self.ledger.extend(slot, start, count, len(tokens))
        except KvCacheFull:
            assert self.ledger.num_cached == 0
            assert -(-(start + count) // BLOCK) > -(-start // BLOCK) + free_before
            self.shard.carry_out(self.ledger)
            return
        self.shard.carry_out(self.ledger)
        self.shard.compute(slot, start, tokens[start : start + count])
        self.ledger.confirm(slot, start + count)

    def end(self, slot: int) -> None:
        del self.live[slot]
        self.ledger.finish(slot)
        self.shard.carry_out(self.ledger)

    def check(self) -> None:
        tables, mine = self.ledger.tables, self.shard.tables
        assert {s: tables.length(s) for s in tables.slots()} == {s: mine.length(s) for s in mine.slots()}
        assert tables.num_free == mine.num_free
        for parent, shared in ((p, n) for _, p, n in self.ledger.sharing() if n):
            assert parent in self.ledger.sequences
            assert shared % BLOCK == 0


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, 2), st.integers(0, 12), st.integers(1, 6)),
        st.tuples(st.just("send"), st.integers(0, 3), st.integers(1, 9)),
        st.tuples(st.just("end"), st.integers(0, 3)),
        st.tuples(st.just("lose")),
    ),
    max_size=30,
)


@given(st.integers(2, 12), ACTIONS)
@settings(max_examples=80, deadline=None)
def test_it_counts_what_a_shard_holds(num_blocks: int, actions: list) -> None:
    world = World(num_blocks)
    for kind, *values in actions:
        live = sorted(world.live)
        match kind, values:
            case "begin", (base, shared, own):
                if len(live) < 4:
                    world.begin([100 * base + i for i in range(shared)] + [1000 * world.slot + i for i in range(own)])
            case "send", (which, count) if live:
                world.send(live[which % len(live)], count)
            case "end", (which,) if live:
                world.end(live[which % len(live)])
            case "lose", _:  # all confirmed here; what is not begun has to go
                world.ledger.to_confirmed()
                keep = {s.slot: s.confirmed for s in world.ledger.sequences.values()}
                for slot in world.shard.tables.slots():
                    world.shard.tables.truncate(slot, keep.get(slot, 0))
                world.live = {slot: tokens for slot, tokens in world.live.items() if slot in keep}
        world.check()


def fill(world: World, tokens: list[int]) -> tuple[int, int]:
    found = world.begin(tokens)
    slot = world.slot
    world.send(slot, len(tokens))
    return slot, found


def test_whole_blocks_of_a_prefix_are_found_while_the_first_is_worked_on_and_after_it() -> None:
    world = World(20)
    prompt = list(range(10))
    first, found = fill(world, prompt)
    assert found == 0
    second, found = fill(world, [*prompt, 77])
    assert found == 8  # two blocks of four; the rest of the third is its own
    world.end(first)
    world.end(second)
    assert fill(world, [*prompt[:6], 5])[1] == 4
    assert fill(world, prompt[:8])[1] == 4  # the last token is always computed


def test_an_ended_sequence_is_kept_once_and_the_oldest_goes_first() -> None:
    world = World(6)
    for base in (0, 100):
        slot, _ = fill(world, [base + i for i in range(8)])
        world.end(slot)
    slot, found = fill(world, list(range(9)))  # uses the first again
    assert found == 8
    assert world.ledger.num_free_blocks == 1
    world.end(slot)
    assert world.ledger.num_cached == 2  # what the third held, the first holds too
    fill(world, [500 + i for i in range(16)])  # needs 4 blocks: two are free, two of the second go
    assert world.ledger.matched(list(range(9))) == 8
    assert world.ledger.matched([100 + i for i in range(9)]) == 0
    assert world.ledger.num_evicted_blocks == 2


def test_another_making_of_keys_is_not_reused() -> None:
    ledger = Ledger(20, BLOCK, b"one")
    ledger.begin(1, list(range(9)))
    ledger.extend(1, 0, 9, 9)
    ledger.confirm(1, 9)
    assert ledger.matched(list(range(9))) == 8
    ledger.reseed(b"other")
    assert ledger.matched(list(range(9))) == 0
    ledger.extend(1, 9, 4, 9)
    assert ledger.matched(list(range(9))) == 0  # made under two seeds


def test_a_smaller_stage_takes_cached_blocks_first() -> None:
    world = World(6)
    slot, _ = fill(world, list(range(8)))
    world.end(slot)
    slot, _ = fill(world, [50 + i for i in range(8)])
    assert not world.ledger.resize(1)
    assert world.ledger.resize(2)
    assert world.ledger.num_cached == 0
    assert world.ledger.num_free_blocks == 0
