"""Which blocks of the key-value pool belong to which sequence: tables, reference counts, copy on write.

Pure bookkeeping over block numbers; `llm/kv.py` holds the memory and does the copies that are asked for here. One table
serves all layers of a shard; the driver keeps one of its own that counts what the shards' will have done. A block holds
`block_tokens` consecutive positions of one sequence, or of several that were
forked and agree on them: a shared block is copied before it is written. Every operation is O(blocks it touches).
"""

from __future__ import annotations

from collections.abc import Iterable

from ecotone.decoding.step import Row
from ecotone.units import EcotoneError

__all__ = ["BlockTables", "KvCacheFull", "SlotError"]


class KvCacheFull(EcotoneError):
    """There are not enough free blocks; nothing was changed but roll-backs. Free or shorten slots and try again."""

    def __init__(self, needed: int, free: int, total: int, block_tokens: int):
        self.needed, self.free, self.total = needed, free, total
        super().__init__(
            f"key-value cache is full: {needed} blocks of {block_tokens} tokens are needed, {free} of {total} are free; "
            "free a slot, shorten one, or give the shard more memory"
        )


class SlotError(EcotoneError):
    """A slot was used in a way that would leave a gap, or is not there."""


class BlockTables:
    """Tables of `num_blocks` blocks. Slots come into being when first written, imported to or forked to."""

    def __init__(self, num_blocks: int, block_tokens: int):
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def slots(self) -> tuple[int, ...]:
        return tuple(self._tables)

    def length(self, slot: int) -> int:
        """Tokens that `slot` holds; 0 where there is none."""
        return self._lengths.get(slot, 0)

    def table(self, slot: int) -> list[int]:
        """The blocks of `slot`, in order of position. Not to be changed by the caller."""
        return self._tables.get(slot, [])

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def extend(self, rows: Iterable[Row]) -> list[tuple[int, int]]:
        """Make the positions of all `rows` writable and count them as held; returns (from, to) blocks to copy first.

        Raises SlotError where a row would leave a gap, KvCacheFull where blocks are short; then only the roll-backs that
        the rows ask for have happened.
        """
        rows = list(rows)
        for row in rows:
            if row.start > self.length(row.slot):
                text = f"slot {row.slot} holds {self.length(row.slot)} tokens; position {row.start} would leave a gap"
                raise SlotError(f"{text}; send the tokens between first")
        for row in rows:
            if row.start < self.length(row.slot):
                self.truncate(row.slot, row.start)
        needed = sum(self._needed(row) for row in rows)
        if needed > len(self._free):
            raise KvCacheFull(needed, len(self._free), self.num_blocks, self.block_tokens)
        copies: list[tuple[int, int]] = []
        for row in rows:
            table = self._tables.setdefault(row.slot, [])
            if self._partly_shared(row):
                copies.append((table[-1], self._take()))
                self._release(table[-1])
                table[-1] = copies[-1][1]
            table.extend(self._take() for _ in range(self.blocks_for(row.stop) - len(table)))
            self._lengths[row.slot] = row.stop
        return copies

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens; nothing happens where the slot is no longer than that."""
        if slot not in self._tables or length >= self._lengths[slot]:
            return
        if length <= 0:
            self.free(slot)
            return
        table, keep = self._tables[slot], self.blocks_for(length)
        for block in table[keep:]:
            self._release(block)
        del table[keep:]
        self._lengths[slot] = length

    def free(self, slot: int) -> None:
        """Forget `slot`; nothing happens where there is none."""
        for block in self._tables.pop(slot, ()):
            self._release(block)
        self._lengths.pop(slot, None)

    def fork(self, source: int, target: int, length: int) -> None:
        """`target` becomes the first `length` tokens of `source`, sharing its blocks. Takes no memory until written."""
        if self.length(target):
            raise SlotError(f"slot {target} holds tokens; free it before forking to it")
        if not 0 <= length <= self.length(source):
            raise SlotError(f"slot {source} holds {self.length(source)} tokens; {length} cannot be forked")
        if source == target or length == 0:
            return
        shared = self._tables[source][: self.blocks_for(length)]
        for block in shared:
            self._users[block] += 1
        self._tables[target], self._lengths[target] = list(shared), length

    def make_private(self, slot: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Copies to make before held positions [start, stop) of `slot` may be overwritten; raises KvCacheFull."""
        table = self.table(slot)
        touched = range(start // self.block_tokens, min(self.blocks_for(stop), len(table)))
        shared = [i for i in touched if self._users[table[i]] > 1]
        if len(shared) > len(self._free):
            raise KvCacheFull(len(shared), len(self._free), self.num_blocks, self.block_tokens)
        copies = []
        for index in shared:
            copies.append((table[index], self._take()))
            self._release(table[index])
            table[index] = copies[-1][1]
        return copies

    def resize(self, num_blocks: int) -> None:
        """Have `num_blocks` in all from now on; for tables that only count. Raises KvCacheFull where more are in use."""
        used = self.num_blocks - len(self._free)
        if used > num_blocks:
            raise KvCacheFull(used, 0, num_blocks, self.block_tokens)
        for number in range(len(self._users), len(self._users) + max(0, num_blocks - self.num_blocks)):
            self._users.append(0)
            self._free.append(number)
        del self._free[num_blocks - used :]
        self.num_blocks = num_blocks

    def _partly_shared(self, row: Row) -> bool:
        table = self._tables.get(row.slot)
        return bool(table) and row.start % self.block_tokens != 0 and self._users[table[-1]] > 1  # type: ignore[index]

    def _needed(self, row: Row) -> int:
        return self.blocks_for(row.stop) - len(self.table(row.slot)) + self._partly_shared(row)

    def _take(self) -> int:
        block = self._free.pop()
        self._users[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._users[block] -= 1
        if self._users[block] == 0:
            self._free.append(block)
