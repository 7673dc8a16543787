"""A language model made of hashes, to be run in shards: every number depends on every earlier token of its sequence.

Layer l at position p holds key(l, p) = mix(key(l, p - 1), x(l, p)) and gives x(l + 1, p) = mix(l, key(l, p)). A key that is
stale, missing or of another sequence changes all that follows, so the text is an oracle for everything that moves keys.
It does the work of ecotone.decoding.work, with block tables as real shards have them: no room is an error here too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ecotone.decoding.blocks import BlockTables
from ecotone.decoding.frame import Cut, Fork, FrameRow, Open
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import DraftAsk
from ecotone.decoding.tail import Choice, Tail
from ecotone.decoding.work import Done, ExportWork, ImportWork, StepWork, TrimWork, Work
from ecotone.units import EcotoneError

__all__ = ["POISON", "HashDrafter", "HashShard", "hash_text", "mix"]

_MASK = (1 << 64) - 1
POISON = 666
"""A request with this seed fails wherever the last stage opens it."""


def mix(a: int, b: int) -> int:
    """64 well mixed bits of two numbers (splitmix64's finaliser)."""
    x = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True, slots=True)
class _HashChooser:
    """The next token is the last position's number modulo the vocabulary; `seed` and penalties do not matter."""

    vocabulary: int

    def choose(self, logits: Any, tokens: Sequence[int]) -> Choice:
        return Choice(int(logits) % self.vocabulary)


def hash_text(prompt: Sequence[int], num_layers: int, vocabulary: int, count: int) -> list[int]:
    """The answer of `count` tokens, computed at once without shards, frames or caches."""
    keys = [0] * num_layers
    answer: list[int] = []
    x = 0
    for position in range(len(prompt) + count - 1):
        token = prompt[position] if position < len(prompt) else answer[position - len(prompt)]
        x = mix(1, token)
        for layer in range(num_layers):
            keys[layer] = mix(keys[layer], x)
            x = mix(layer + 2, keys[layer])
        if position >= len(prompt) - 1:
            answer.append(x % vocabulary)
    return answer


@dataclass(slots=True)
class HashDrafter:
    """Names the right token at each position with probability `accuracy`, drawn by `seed`, request and position.

    `texts`: prompt and whole answer of every request, by number. Beyond the end of a text it has nothing.
    """

    texts: Mapping[int, Sequence[int]]
    accuracy: float
    seed: int = 0
    num_asks: int = 0

    def draft(self, asks: Sequence[DraftAsk]) -> Sequence[Sequence[int]]:
        self.num_asks += len(asks)
        return [self._one(ask) for ask in asks]

    def end(self, request: int) -> None:
        return

    def _one(self, ask: DraftAsk) -> list[int]:
        text = self.texts.get(ask.request, ())
        first = len(ask.tokens)
        return [
            t if self._is_right(ask.request, first + i) else t + 1 for i, t in enumerate(text[first : first + ask.count])
        ]

    def _is_right(self, request: int, position: int) -> bool:
        return mix(mix(self.seed + 1, request), position) < self.accuracy * 2.0**64


@dataclass(slots=True)
class HashShard:
    """Layers [first, last) with room for `num_blocks` blocks."""

    first: int
    last: int
    num_blocks: int
    vocabulary: int = 1000
    block_tokens: int = 32
    tables: BlockTables = field(init=False)
    tail: Tail = field(init=False)
    num_computed: int = 0  # tokens times layers
    _blocks: dict[int, dict[int, list[int]]] = field(default_factory=dict)  # block -> layer -> key of every place

    def __post_init__(self) -> None:
        self.tables = BlockTables(max(self.num_blocks, 1), self.block_tokens)
        self.tail = Tail(self._chooser)

    def _chooser(self, params: SamplingParams, prompt_length: int) -> _HashChooser:
        if params.seed == POISON:
            raise EcotoneError("a request that no stage can open")
        return _HashChooser(self.vocabulary)

    def do(self, work: Work) -> Done:
        """The work, done at once; errors are told as a shell tells them."""
        try:
            match work:
                case StepWork():
                    return self._step(work)
                case TrimWork():
                    return self._trim(work)
                case ExportWork():
                    return Done(work=work, payload=self._export(work))
                case ImportWork():
                    self._import(work)
                    return Done(work=work)
        except EcotoneError as error:
            return Done(work=work, error=str(error))

    def _step(self, work: StepWork) -> Done:
        for order in work.orders:
            self._carry_out(order, is_last=work.is_last)
        if self.first < self.last:
            self._copy(self.tables.extend([row.row() for row in work.rows]))
        values, at = [], 0
        for row in work.rows:
            count = len(row.tokens)
            if work.is_first:
                x = [mix(1, token) for token in row.tokens]
            else:
                x = list(struct.unpack_from(f"<{count}Q", work.payload, 8 * at))
            values.append(self._layers(row, x))
            at += count
        if work.is_last:
            logits = [x for row, xs in zip(work.rows, values, strict=True) for x in xs[len(xs) - row.num_logits :]]
            return Done(work=work, results=self.tail.judge(work.rows, logits))
        flat = [x for xs in values for x in xs]
        return Done(work=work, payload=struct.pack(f"<{len(flat)}Q", *flat))

    def _layers(self, row: FrameRow, x: list[int]) -> list[int]:
        for layer in range(self.first, self.last):
            key = self._read(layer, row.slot, row.start - 1, row.start)[0] if row.start else 0
            keys = []
            for index, value in enumerate(x):
                key = mix(key, value)
                keys.append(key)
                x[index] = mix(layer + 2, key)
            self._write(layer, row.slot, row.start, keys)
            self.num_computed += len(x)
        return x

    def _copy(self, copies: Iterable[tuple[int, int]]) -> None:
        for source, target in copies:
            self._blocks[target] = {layer: list(keys) for layer, keys in self._blocks.get(source, {}).items()}

    def _read(self, layer: int, slot: int, start: int, stop: int) -> list[int]:
        table, size = self.tables.table(slot), self.block_tokens
        empty = [0] * size
        return [self._blocks.get(table[p // size], {}).get(layer, empty)[p % size] for p in range(start, stop)]

    def _write(self, layer: int, slot: int, start: int, keys: Sequence[int]) -> None:
        table, size = self.tables.table(slot), self.block_tokens
        for position, key in enumerate(keys, start):
            held = self._blocks.setdefault(table[position // size], {}).setdefault(layer, [0] * size)
            held[position % size] = key

    def _carry_out(self, order: Open | Fork | Cut, *, is_last: bool) -> None:
        match order:
            case Open():
                self.tail.open(order)
            case Fork(source, target, length):
                if self.first < self.last and not self.tables.length(target):
                    self.tables.fork(source, target, length)
            case Cut(slot, length):
                self.tables.truncate(slot, length)
                self.tail.cut(slot, length)

    def _trim(self, work: TrimWork) -> Done:
        keep = dict(work.keep)
        for slot in self.tables.slots():
            self.tables.truncate(slot, keep.get(slot, 0))
        self.tail.clear()
        return Done(work=work)

    def _export(self, work: ExportWork) -> bytes:
        piece, export = work.piece, work.export
        if piece.stop > self.tables.length(piece.slot):
            raise EcotoneError(f"slot {piece.slot} holds {self.tables.length(piece.slot)} tokens, not {piece.stop}")
        found = [self._read(n, piece.slot, piece.start, piece.stop) for n in range(export.first, export.last)]
        return b"".join(struct.pack(f"<{len(keys)}Q", *keys) for keys in found)

    def _import(self, work: ImportWork) -> None:
        """Blocks that slots share are written for all of them: layers may come from several shards, one after the other."""
        came, piece = work.piece, work.piece.piece
        assert piece is not None
        if piece.parent and not self.tables.length(piece.slot):
            self.tables.fork(piece.parent, piece.slot, piece.shared)
        held, count = self.tables.length(piece.slot), piece.stop - piece.start
        if piece.stop > held:
            self._copy(self.tables.extend([FrameRow(piece.slot, held, (0,) * (piece.stop - held)).row()]))
        for index, layer in enumerate(range(came.first, came.last)):
            self._write(layer, piece.slot, piece.start, struct.unpack_from(f"<{count}Q", came.payload, 8 * count * index))
