"""What the driver knows of every stage's key-value cache: which sequences there are, what is reused, what has to go.

All stages carry out the same orders in the same sequence, so one block table here, of the smallest stage's size, says in
advance what each of theirs will hold: if a step fits here, it fits there when it comes to be computed (rows that a stage
skips as stale only take less). Reuse is therefore of equal depth on all stages by construction.

A prefix is found by a chain of hashes over blocks of tokens, each with the `seed` of how its keys were made (model,
executors, context, codec of hidden states): keys that crossed a lossy wire never serve a request that wants exact ones.
A finished sequence stays as a cached one, in whole blocks, until room is needed; then the block goes that was used
longest ago among those that nothing continues: leaves first. O(blocks) per request, O(cached sequences) per block evicted.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from ecotone.decoding.blocks import BlockTables, KvCacheFull
from ecotone.decoding.frame import Cut, Fork, Order
from ecotone.decoding.step import Row

__all__ = ["Ledger", "Sequence"]


@dataclass(slots=True)
class Sequence:
    """One slot. `tokens`: the request's own list while it is worked on. `pieces`: (start, count) of rows as computed.

    `confirmed` positions are computed on all stages; 0 also means that it may not exist everywhere yet.
    """

    slot: int
    tokens: Tokens[int]
    is_active: bool = True
    confirmed: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    is_mixed: bool = False  # made under more than one seed: what comes from now on is not reused


@dataclass(slots=True)
class _Node:
    slots: dict[int, None] = field(default_factory=dict)  # an ordered set
    used: int = 0


class Ledger:
    """`num_blocks` of the smallest stage. Orders that the stages have to be given gather in `orders`."""

    def __init__(self, num_blocks: int, block_tokens: int, seed: bytes = b"", *, reuse: bool = True):
        self.tables = BlockTables(num_blocks, block_tokens)
        self.block_tokens, self.reuse = block_tokens, reuse
        self.orders: list[Order] = []
        self.sequences: dict[int, Sequence] = {}
        self.num_evicted_blocks = 0
        self._seed = seed
        self._nodes: dict[bytes, _Node] = {}
        self._clock = 0

    @property
    def num_free_blocks(self) -> int:
        return self.tables.num_free

    @property
    def num_cached(self) -> int:
        return sum(not each.is_active for each in self.sequences.values())

    def blocks_at_hand(self) -> int:
        """Free blocks, and those that eviction of every cached sequence would free."""
        mine = {b for s in self.sequences.values() if s.is_active for b in self.tables.table(s.slot)}
        cached = {b for s in self.sequences.values() if not s.is_active for b in self.tables.table(s.slot)}
        return self.tables.num_free + len(cached - mine)

    def begin(self, slot: int, tokens: Tokens[int]) -> int:
        """Make `slot` for a request of `tokens`; returns how many of its first ones need not be computed again.

        The last token is always computed, since its logits are wanted.
        """
        source, length, chain = self._match(tokens, len(tokens) - 1)
        mine = self.sequences[slot] = Sequence(slot, tokens)
        if length:
            self.tables.fork(source, slot, length)
            self.orders.append(Fork(source, slot, length))
            mine.pieces = _cut_pieces(self.sequences[source].pieces, length)
            mine.hashes = chain
            for key in chain:
                self._nodes[key].slots[slot] = None
        return length

    def matched(self, tokens: Tokens[int]) -> int:
        """How many of the first tokens a request would find here."""
        return self._match(tokens, len(tokens) - 1)[1]

    def extend(self, slot: int, start: int, count: int, num_certain: int) -> None:
        """Count a row that is about to be sent. `num_certain` of the sequence's tokens are settled: whole blocks of them
        may be found by others from now on, who come behind in the pipeline. Raises KvCacheFull after evicting all it can.
        """
        mine = self.sequences[slot]
        self._forget_hashes(mine, start)
        row = Row(slot=slot, start=start, count=count)
        while True:
            try:
                self.tables.extend([row])
                break
            except KvCacheFull as full:
                if not self._evict(full.needed - full.free):
                    raise
        mine.pieces = _cut_pieces(mine.pieces, start)
        mine.pieces.append((start, count))
        self._remember(mine, min(start + count, num_certain))

    def confirm(self, slot: int, stop: int) -> None:
        """All stages have computed positions below `stop`."""
        mine = self.sequences.get(slot)
        if mine is not None:
            mine.confirmed = max(mine.confirmed, stop)

    def roll_back(self, slot: int, length: int) -> None:
        """Rows beyond `length` will not count: the next row is to start there or before."""
        mine = self.sequences[slot]
        mine.confirmed = min(mine.confirmed, length)
        self._forget_hashes(mine, length)

    def finish(self, slot: int) -> None:
        """The request is over: whole blocks of what is confirmed stay to be found, unless another holds them anyway."""
        mine = self.sequences[slot]
        keep = len(mine.hashes) * self.block_tokens if self.reuse else 0
        keep = min(keep, mine.confirmed // self.block_tokens * self.block_tokens)
        mine.is_active, mine.tokens = False, tuple(mine.tokens[:keep])
        self._cut(mine, keep)
        if keep and len(self._nodes[mine.hashes[-1]].slots) > 1:
            self._cut(mine, 0)
        for key in mine.hashes[:-1]:
            ends_here = [s for s in self._nodes[key].slots if not (o := self.sequences[s]).is_active and o.hashes[-1] == key]
            for other in ends_here:
                self._cut(self.sequences[other], 0)

    def is_built_upon(self, slot: int) -> bool:
        """Whether another sequence began with blocks of `slot` that are not confirmed yet."""
        mine = self.sequences[slot]
        return any(len(self._nodes[key].slots) > 1 for key in mine.hashes[mine.confirmed // self.block_tokens :])

    def drop(self, slot: int) -> None:
        """Free `slot` and remember nothing of it."""
        self._cut(self.sequences[slot], 0)

    def reseed(self, seed: bytes) -> None:
        """Keys are made in another way from now on."""
        if seed != self._seed:
            self._seed = seed
            for each in self.sequences.values():
                each.is_mixed = each.is_mixed or each.is_active

    def to_confirmed(self) -> None:
        """Forget all that is not confirmed, orders not yet sent as well: what lost or re-routed stages may not know of."""
        self.orders.clear()
        for each in list(self.sequences.values()):
            if not each.confirmed:
                self._cut(each, 0)
                continue
            self._forget_hashes(each, each.confirmed)
            self.tables.truncate(each.slot, each.confirmed)
            each.pieces = _cut_pieces(each.pieces, each.confirmed)
        self.orders.clear()

    def resize(self, num_blocks: int) -> bool:
        """Another smallest stage; False where sequences that are worked on need more than `num_blocks`."""
        while True:
            try:
                self.tables.resize(num_blocks)
                return True
            except KvCacheFull as full:
                if not self._evict(full.needed - num_blocks):
                    return False

    def sharing(self) -> list[tuple[Sequence, int, int]]:
        """(sequence, parent slot, shared tokens) of every sequence, parents first: how to rebuild them elsewhere in as few
        blocks. A sequence without parent shares 0 tokens."""
        owner: dict[int, int] = {}
        found = []
        for slot in sorted(self.sequences):
            blocks = self.tables.table(slot)
            shared = next((i for i, block in enumerate(blocks) if block not in owner), len(blocks))
            found.append((self.sequences[slot], owner[blocks[shared - 1]] if shared else 0, shared * self.block_tokens))
            for block in blocks[shared:]:
                owner[block] = slot
        return found

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _match(self, tokens: Tokens[int], limit: int) -> tuple[int, int, list[bytes]]:
        """(slot, length, chain) of the longest known prefix of whole blocks below `limit`."""
        chain: list[bytes] = []
        if not self.reuse:
            return 0, 0, chain
        self._clock += 1
        for start in range(0, limit // self.block_tokens * self.block_tokens, self.block_tokens):
            key = self._key(chain, tokens, start)
            node = self._nodes.get(key)
            if node is None:
                break
            node.used = self._clock
            chain.append(key)
        slot = next(iter(self._nodes[chain[-1]].slots)) if chain else 0
        return slot, len(chain) * self.block_tokens, chain

    def _key(self, chain: list[bytes], tokens: Tokens[int], start: int) -> bytes:
        piece = tokens[start : start + self.block_tokens]
        digest = hashlib.blake2b(chain[-1] if chain else b"", digest_size=16, key=self._seed[:64])
        digest.update(struct.pack(f"<{len(piece)}I", *piece))
        return digest.digest()

    def _remember(self, mine: Sequence, length: int) -> None:
        if mine.is_mixed or not self.reuse:
            return
        self._clock += 1
        while (len(mine.hashes) + 1) * self.block_tokens <= length:
            key = self._key(mine.hashes, mine.tokens, len(mine.hashes) * self.block_tokens)
            node = self._nodes.setdefault(key, _Node())
            node.slots[mine.slot], node.used = None, self._clock
            mine.hashes.append(key)

    def _forget_hashes(self, mine: Sequence, length: int) -> None:
        while len(mine.hashes) * self.block_tokens > length:
            key = mine.hashes.pop()
            node = self._nodes[key]
            node.slots.pop(mine.slot, None)
            if not node.slots:
                del self._nodes[key]

    def _cut(self, mine: Sequence, length: int) -> None:
        self._forget_hashes(mine, length)
        self.tables.truncate(mine.slot, length)
        mine.confirmed = min(mine.confirmed, length)
        mine.pieces = _cut_pieces(mine.pieces, length)
        self.orders.append(Cut(mine.slot, length))
        if not length:
            del self.sequences[mine.slot]

    def _evict(self, num_blocks: int) -> bool:
        """Free at least `num_blocks`, or as many as there are; whether any was freed."""
        before = self.tables.num_free
        while self.tables.num_free - before < num_blocks:
            cached = [s for s in self.sequences.values() if not s.is_active]
            if not cached:
                break
            oldest = min(cached, key=lambda s: self._nodes[s.hashes[-1]].used)
            self._cut(oldest, (len(oldest.hashes) - 1) * self.block_tokens)
        freed = self.tables.num_free - before
        self.num_evicted_blocks += freed
        return freed > 0


def _cut_pieces(pieces: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    kept = [piece for piece in pieces if piece[0] < length]
    if kept and sum(kept[-1]) > length:
        kept[-1] = (kept[-1][0], length - kept[-1][0])
    return kept
