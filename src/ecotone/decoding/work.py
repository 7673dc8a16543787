"""What a stage asks its shell to do in its one thread for computing, and how that ends. Values; carried out elsewhere.

One piece of work at a time per stage, in the order in which it was asked for. `ecotone.llm.worker` carries it out on a
real shard, `ecotone.simulator.generation` on a model made of hashes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ecotone.decoding.frame import Cut, Fork, FrameRow, Open, Payload, RowResult
from ecotone.decoding.messages import Export, ExportPiece, KvPiece

__all__ = ["Done", "ExportWork", "ImportWork", "StepWork", "TrimWork", "Work"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Carry out `orders`, then compute `rows`: token ids at the first stage, else `payload`, hidden states in `codec`.

    Ends with hidden states in `answer_codec`, at the last stage with what became of the rows. A fork to a slot that exists
    does nothing.
    """

    epoch: int
    number: int
    orders: tuple[Open | Fork | Cut, ...]
    rows: tuple[FrameRow, ...]
    codec: str
    payload: Payload
    answer_codec: str
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimWork:
    """Cut every sequence to its length in `keep`, free the others, and clear the tail: requests are opened again."""

    keep: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportWork:
    """Read keys and values of `export.first` to `export.last` at `piece`, in `export.codec`; ends with their bytes."""

    export: Export
    piece: ExportPiece


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportWork:
    """Put `piece` into the cache, forked from its parent first where it has one and is not there yet."""

    piece: KvPiece


Work = StepWork | TrimWork | ExportWork | ImportWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Work ended: with `error`, or with what it gives: hidden states or keys (`payload`), or `results` of rows."""

    work: Work
    seconds: float = 0.0
    payload: Payload = b""
    results: tuple[RowResult, ...] = ()
    error: str = ""
