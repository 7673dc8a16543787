"""The loaded shards of a driver: a plan becomes shards on nodes; what lives is kept, what is missing is loaded.

Several sets of stages may be loaded at a time, since machines are lost while others are being loaded for a move. One is in
force; the others wait for the engine to take them. `settle` says which it took: shards that no set holds are released then.
Shards of a node that was lost are never used again, and released when the node is heard of again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ecotone.cluster import DeviceId
from ecotone.decoding.messages import Peer
from ecotone.decoding.words import StageRef
from ecotone.llm.executors import cache_dtype
from ecotone.llm.host import Loaded, StageOrder
from ecotone.llm.service import GenerationService
from ecotone.llm.sources import ModelRef
from ecotone.llmplan import CODECS, LOCAL, LlmPlan, LlmStage
from ecotone.runtime.errors import NodeUnreachable
from ecotone.units import EcotoneError

__all__ = ["Pipeline", "Progress", "Stages"]

Progress = Callable[[int, int, str], None]
"""(stages that are loaded, of how many, what was loaded last)"""
Stages = tuple[StageRef, ...]
_INT8_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard that is loaded. `key`: what it is (device, span, executor, bytes for keys, context)."""

    key: tuple[object, ...]
    device: DeviceId
    loaded: Loaded


@dataclass(frozen=True, slots=True)
class _Set:
    """`plan` as loaded: `weight_bytes` of each stage, and the `shards` of stages and standbys."""

    plan: LlmPlan
    weight_bytes: tuple[int, ...]
    shards: frozenset[int]


class Pipeline:
    """Loads for `service`'s driver; every method may be called from any thread."""

    def __init__(self, service: GenerationService, ref: ModelRef, *, load_deadline_s: float = 900.0):
        self._service, self._ref, self._deadline_s = service, ref, load_deadline_s
        self._lock = threading.Lock()
        self._shards: dict[int, _Shard] = {}
        self._gone: dict[int, DeviceId] = {}  # not to be used any more, and perhaps still held over there
        self._claimed: dict[object, set[int]] = {}  # by loads that are under way
        self._waiting: dict[Stages, _Set] = {}
        self._in_force: _Set | None = None

    @property
    def plan(self) -> LlmPlan | None:
        """The plan in force."""
        in_force = self._in_force
        return in_force.plan if in_force is not None else None

    def in_force(self) -> tuple[LlmPlan, tuple[int, ...]]:
        """The plan in force and the bytes of each stage's weights; raises EcotoneError where none is."""
        found = self._in_force
        if found is None:
            raise EcotoneError("no stages are in force: the generator has not begun, or was closed")
        return found.plan, found.weight_bytes

    def load(self, plan: LlmPlan, progress: Progress | None = None) -> Stages:
        """The stages of `plan`, loaded where they are not there, its standbys as well; `settle` or `drop` them.

        Raises EcotoneError (of the first device that cannot; NodeUnreachable: it was lost) and keeps what was there before.
        """
        wanted = [(stage.device, stage) for stage in plan.stages]
        wanted += [(standby.device, plan.stages[standby.stage]) for standby in plan.standbys]
        claim = object()
        try:
            with self._lock:
                free, chosen, missing = dict(self._shards), dict[int, int](), dict[DeviceId, list[int]]()
                for index, (device, stage) in enumerate(wanted):
                    found = next((n for n, s in free.items() if s.key == _key(device, stage, plan)), None)
                    if found is None:
                        missing.setdefault(device, []).append(index)
                    else:
                        chosen[index] = found
                        del free[found]
                self._claimed[claim] = set(chosen.values())
            chosen |= self._load_missing(plan, wanted, missing, self._claimed[claim], progress)
            with self._lock:
                lost = {wanted[index][0] for index, number in chosen.items() if number not in self._shards}
                if lost:
                    raise NodeUnreachable(f"node {', '.join(sorted(lost))} was lost while others were loading")
                shards = [self._shards[chosen[index]] for index in range(len(plan.stages))]
                stages = tuple(self._ref_of(stage, shard) for stage, shard in zip(plan.stages, shards, strict=True))
                weights = tuple(shard.loaded.weight_bytes for shard in shards)
                self._waiting[stages] = _Set(plan, weights, frozenset(chosen.values()))
                return stages
        finally:
            with self._lock:
                self._claimed.pop(claim, None)

    def is_whole(self, stages: Stages) -> bool:
        """Whether none of them was lost since."""
        with self._lock:
            found = self._waiting.get(stages)
            return found is not None and found.shards <= self._shards.keys()

    def settle(self, stages: Stages) -> None:
        """The engine has taken these stages: their plan is in force now. Call `tidy` when there is time."""
        with self._lock:
            self._in_force = self._waiting.pop(stages, self._in_force)

    def drop(self, stages: Stages) -> None:
        """The engine has not taken these stages. Call `tidy` when there is time."""
        with self._lock:
            self._waiting.pop(stages, None)

    def lose(self, nodes: Collection[str]) -> None:
        """Shards on these nodes are not to be used any more."""
        with self._lock:
            for number in [n for n, shard in self._shards.items() if shard.device in nodes]:
                self._gone[number] = self._shards.pop(number).device

    def tidy(self) -> None:
        """Release what no set holds, at nodes that answer; waits for them a little."""
        with self._lock:
            kept = set[int]().union(*self._claimed.values(), *(each.shards for each in self._waiting.values()))
            kept |= self._in_force.shards if self._in_force is not None else frozenset()
            for number in [n for n in self._shards if n not in kept]:
                self._gone[number] = self._shards.pop(number).device
            gone = dict(self._gone)
        self._release(gone)

    def close(self) -> None:
        """Release all."""
        with self._lock:
            self._waiting.clear()
            self._in_force = None
        self.tidy()

    # ---- inside ----------------------------------------------------------------------------------------------------------

    def _load_missing(
        self, plan: LlmPlan, wanted: list[tuple[DeviceId, LlmStage]], missing: dict[DeviceId, list[int]], claimed: set[int],
        progress: Progress | None,
    ) -> dict[int, int]:  # fmt: skip
        made: dict[int, int] = {}
        total = sum(len(indices) for indices in missing.values())

        def load_device(device: DeviceId) -> None:
            for index in missing[device]:
                stage, number = wanted[index][1], self._service.next_shard()
                order = StageOrder(
                    shard=number, span=stage.span, executor=stage.executor, kv_bytes=stage.kv_bytes, context=plan.context
                )
                try:
                    loaded = self._service.load_at(device, order, self._ref, self._deadline_s)
                except EcotoneError:
                    with self._lock:
                        self._gone[number] = device  # it may be there, or come to be there, all the same
                    raise
                with self._lock:
                    self._shards[number] = _Shard(_key(device, stage, plan), device, loaded)
                    claimed.add(number)
                made[index] = number
                if progress is not None:
                    progress(len(made), total, f"{stage.span.describe()} on {device}")

        if not missing:
            return made
        with ThreadPoolExecutor(max_workers=len(missing), thread_name_prefix="llm-load") as pool:
            futures = [pool.submit(load_device, device) for device in missing]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return made

    def _release(self, numbers: dict[int, DeviceId]) -> None:
        by_device: dict[DeviceId, list[int]] = {}
        for number, device in numbers.items():
            by_device.setdefault(device, []).append(number)
        for device, shards in by_device.items():
            if self._service.release_at(device, tuple(shards)):
                with self._lock:
                    for number in shards:
                        self._gone.pop(number, None)

    def _ref_of(self, stage: LlmStage, shard: _Shard) -> StageRef:
        loaded, width = shard.loaded, self._ref.config.width
        per_number = CODECS.get(stage.codec, 4.0)
        scale = _INT8_SCALE_BYTES if stage.codec == "int8" else 0
        return StageRef(
            peer=Peer(node=shard.device, shard=loaded.shard), first=stage.span.start, last=stage.span.stop,
            num_blocks=loaded.num_blocks, codec="none" if stage.codec == LOCAL else stage.codec,
            makes=f"{stage.executor} {cache_dtype(stage.executor)}", block_bytes=loaded.block_bytes,
            boundary_bytes_per_token=math.ceil(width * per_number) + scale,
        )  # fmt: skip


def _key(device: DeviceId, stage: LlmStage, plan: LlmPlan) -> tuple[object, ...]:
    return (device, stage.span, stage.executor, stage.kv_bytes, plan.context)
