"""The two loaders behind a shell: a node's, out of its store, and the asker's, out of the captured model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from ecotone import codec
from ecotone.graph import Graph
from ecotone.plan import Plan
from ecotone.protocol.message import Blob, BlobRange, StagePart
from ecotone.runtime.models import Models
from ecotone.runtime.stages import (
    Stages,
    StoredModel,
    codecs_from_store,
    content_of,
    learned_ids,
    make_from_model,
    missing_blobs,
    segment_from_store,
    weight_bytes,
)
from ecotone.runtime.store import Store, StoreCorrupted, StoreError
from ecotone.units import EcotoneError

__all__ = ["ModelLoader", "StoreLoader"]


class _Codecs:
    """The learned codecs that each plan of this node needs, held as long as the plan is loaded."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], tuple[codec.LearnedCodec, ...]] = {}

    def hold(self, session: int, epoch: int, codecs: Iterable[codec.LearnedCodec]) -> None:
        former, wanted = self._held.get((session, epoch), ()), tuple(codecs)
        for made in wanted:
            codec.hold(made)
        self._held[session, epoch] = wanted
        for made in former:
            codec.release(made)

    def release(self, session: int, epoch: int) -> None:
        for made in self._held.pop((session, epoch), ()):
            codec.release(made)


class StoreLoader:
    """Loads the stages of a node from its store; what is missing is named, then kept piece by piece."""

    def __init__(self, store: Store, stages: Stages):
        self._store, self._stages = store, stages
        self._wanted: dict[tuple[int, int], tuple[BlobRange, ...]] = {}
        self._failed: dict[tuple[int, int], StoreError] = {}
        self._parts: dict[tuple[int, int], tuple[StagePart, ...]] = {}
        self._plans: dict[tuple[int, int], Plan] = {}
        self._codecs = _Codecs()

    def prepare(self, session: int, epoch: int, plan: Plan, parts: tuple[StagePart, ...]) -> tuple[BlobRange, ...]:
        key = (session, epoch)
        failure = self._failed.pop(key, None)
        if failure is not None:
            raise failure
        self._store.pin(_owner(session, epoch), _contents(parts))
        missing = missing_blobs(self._store, parts)
        if missing:
            self._wanted[key] = missing
            return missing
        self._wanted.pop(key, None)
        self._parts[key], self._plans[key] = parts, plan
        try:
            self._load(session, epoch, plan, parts)
        except StoreCorrupted:  # the store removed it: fetched again like any other that is missing
            self._wanted[key] = missing_blobs(self._store, parts)
            return self._wanted[key]
        return ()

    def _load(self, session: int, epoch: int, plan: Plan, parts: tuple[StagePart, ...]) -> None:
        self._codecs.hold(session, epoch, codecs_from_store(self._store, parts))
        for part in parts:
            if not 0 <= part.stage < len(plan.stages):
                raise EcotoneError(f"the plan has no stage {part.stage}; make it again")
            make = partial(segment_from_store, self._store, part)
            self._stages.prepare(session, plan, part.stage, content_of(part), make, weight_bytes(part))

    def keep_piece(self, session: int, epoch: int, number: int, offset: int, piece: bytes) -> None:
        wanted = {blob.number: blob for blob in self._wanted.get((session, epoch), ())}
        blob = wanted.get(number)
        if blob is None:
            return
        try:
            self._store.append(blob.sha256, blob.offset + offset, piece, blob.size_bytes)
        except StoreError as error:
            self._failed.setdefault((session, epoch), error)

    def stored_model(self, session: int, epoch: int, graph: Graph) -> StoredModel:
        """The model of a plan loaded here, for profiling; raises EcotoneError where it is not."""
        parts = self._parts.get((session, epoch), ())
        if len(parts) != 1:
            raise EcotoneError("profiling needs a plan of one stage on this node; deploy it first")
        return StoredModel(self._store, parts[0], graph)

    def loaded(self) -> list[str]:
        """The plans that are loaded here, one a line, for a person."""
        return [f"plan {epoch} of {plan.source}: {plan}" for (_, epoch), plan in sorted(self._plans.items())]

    def unload(self, session: int, epoch: int) -> None:
        self._wanted.pop((session, epoch), None)
        self._parts.pop((session, epoch), None)
        self._plans.pop((session, epoch), None)
        self._codecs.release(session, epoch)
        self._stages.unload(session, epoch)
        self._store.unpin(_owner(session, epoch))

    def open_blob(self, blob: Blob) -> bytes:
        raise StoreError("only the asker of a session hands out its weights")


class ModelLoader:
    """Loads the asker's own stages straight from the captured models, and hands out what other nodes want."""

    def __init__(self, models: Models, stages: Stages):
        self._models, self._stages = models, stages
        self._codecs = _Codecs()

    def prepare(self, session: int, epoch: int, plan: Plan, parts: tuple[StagePart, ...]) -> tuple[BlobRange, ...]:
        known = self._models.of(plan).codecs
        self._codecs.hold(session, epoch, [known[name] for name in learned_ids(plan)])
        for part in parts:
            make = make_from_model(self._models.of(plan), plan.stages[part.stage])
            self._stages.prepare(session, plan, part.stage, content_of(part), make, weight_bytes(part))
        return ()

    def keep_piece(self, session: int, epoch: int, number: int, offset: int, piece: bytes) -> None:
        return  # the asker lacks nothing

    def unload(self, session: int, epoch: int) -> None:
        self._codecs.release(session, epoch)
        self._stages.unload(session, epoch)

    def open_blob(self, blob: Blob) -> bytes:
        return self._models.blob(blob.sha256)


def _owner(session: int, epoch: int) -> str:
    return f"{session}/{epoch}"


def _contents(parts: Iterable[StagePart]) -> set[str]:
    return {blob.sha256 for part in parts for blob in (part.program, *part.weights)}
