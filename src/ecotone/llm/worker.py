"""Carries out what a stage asks for (decoding/work.py) on a real shard: steps, trims, keys out and in. One thread at a time.

The shard's cache holds the sequences, `Tail` at the last stage the requests' tokens and choosers. What goes wrong is an
answer too: Done with an error, and the shard stays usable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ecotone.decoding.frame import Cut, Fork, Open
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.step import Step
from ecotone.decoding.tail import Chooser, Tail
from ecotone.decoding.work import Done, ExportWork, ImportWork, StepWork, TrimWork, Work
from ecotone.llm.executors.executor import ShardExecutor
from ecotone.llm.hidden import pack_hidden, unpack_hidden
from ecotone.llm.kv_wire import pack_kv, unpack_kv
from ecotone.units import EcotoneError

__all__ = ["ShardWorker"]


class ShardWorker:
    """The worker of one shard. `make_chooser`: (parameters, prompt's length), for a stage with the head.

    `computed_tokens` went through its layers; `dropped_tokens` of them were not wanted when the pipeline changed, since they
    had not come through all stages.
    """

    def __init__(self, shard: ShardExecutor, make_chooser: Callable[[SamplingParams, int], Chooser]):
        self.shard = shard
        self.computed_tokens = self.dropped_tokens = 0
        self._tables = shard.cache.tables
        self._tail = Tail(make_chooser)

    def do(self, work: Work) -> Done:
        """The work's end; never raises for what a peer or a full cache may cause."""
        try:
            match work:
                case StepWork():
                    return self._step(work)
                case TrimWork():
                    return self._trim(work)
                case ExportWork():
                    return self._export(work)
                case ImportWork():
                    return self._import(work)
        except (EcotoneError, RuntimeError, MemoryError) as error:  # torch raises RuntimeError for what it cannot allocate
            return Done(work=work, error=(str(error).strip().splitlines() or [type(error).__name__])[0][:300])

    def _step(self, work: StepWork) -> Done:
        for order in work.orders:
            self._carry_out(order, is_last=work.is_last)
        if not work.rows:
            return Done(work=work)
        step = Step(rows=tuple(row.row() for row in work.rows))
        if work.is_first:
            x = torch.tensor([token for row in work.rows for token in row.tokens], dtype=torch.long)
        else:
            x = unpack_hidden(work.payload, work.codec, step.num_tokens, self.shard.config.width)
        made = self.shard.forward(step, x)
        self.computed_tokens += step.num_tokens
        if work.is_last:
            return Done(work=work, results=self._tail.judge(work.rows, made))  # type: ignore[arg-type]
        return Done(work=work, payload=pack_hidden(made, work.answer_codec))

    def _carry_out(self, order: Open | Fork | Cut, *, is_last: bool) -> None:
        match order:
            case Open():
                self._tail.open(order)
            case Fork(source, target, length):
                if self.shard.span.num_layers and not self._tables.length(target):
                    self._tables.fork(source, target, length)
            case Cut(slot, length):
                self._tables.truncate(slot, length)
                if is_last:
                    self._tail.cut(slot, length)

    def _trim(self, work: TrimWork) -> Done:
        keep = dict(work.keep)
        for slot in self._tables.slots():
            self.dropped_tokens += max(self._tables.length(slot) - keep.get(slot, 0), 0)
            self._tables.truncate(slot, keep.get(slot, 0))
        self._tail.clear()
        return Done(work=work)

    def _export(self, work: ExportWork) -> Done:
        layers, piece = range(work.export.first, work.export.last), work.piece
        keys, values = self.shard.cache.export(piece.slot, layers, piece.start, piece.stop)
        return Done(work=work, payload=pack_kv(keys, values, work.export.codec))

    def _import(self, work: ImportWork) -> Done:
        came, piece, config = work.piece, work.piece.piece, self.shard.config
        assert piece is not None
        layers, count = range(came.first, came.last), piece.stop - piece.start
        keys, values = unpack_kv(came.payload, len(layers), config.num_kv_heads, count, config.head_size)
        if piece.parent and not self._tables.length(piece.slot):
            self._tables.fork(piece.parent, piece.slot, piece.shared)
        # Layers of one shard may come from several machines: those of a shared prefix also after it was forked here.
        self.shard.cache.import_(piece.slot, layers, piece.start, keys, values, for_all=True)
        return Done(work=work)
