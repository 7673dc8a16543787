"""The loaded stages of a driver: a plan becomes shards on nodes; what lives is kept, what is missing is loaded."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable
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

__all__ = ["Pipeline", "Progress"]

Progress = Callable[[int, int, str], None]
"""(stages that are loaded, of how many, what was loaded last)"""
_INT8_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard that is loaded. `key`: what it is (device, span, executor, bytes for keys, context)."""

    key: tuple[object, ...]
    device: DeviceId
    loaded: Loaded


class Pipeline:
    """Loads for `service`'s driver. One load at a time; `release` from any thread."""

    def __init__(self, service: GenerationService, ref: ModelRef, *, load_deadline_s: float = 900.0):
        self._service, self._ref, self._deadline_s = service, ref, load_deadline_s
        self._shards: dict[int, _Shard] = {}
        self._lock = threading.Lock()
        self.plan: LlmPlan | None = None
        self.loaded: tuple[Loaded, ...] = ()

    def load(
        self, plan: LlmPlan, lost: Collection[str] = (), progress: Progress | None = None
    ) -> tuple[StageRef, ...]:  # fmt: skip
        """The stages of `plan`, loaded where they are not there; shards on `lost` nodes are forgotten.

        Standbys are loaded as well. Raises EcotoneError (of the first device that cannot) and keeps what was loaded before.
        """
        with self._lock:
            for number in [n for n, shard in self._shards.items() if shard.device in lost]:
                del self._shards[number]
            wanted = [(stage.device, stage) for stage in plan.stages]
            wanted += [(standby.device, plan.stages[standby.stage]) for standby in plan.standbys]
            free, chosen, missing = dict(self._shards), dict[int, int](), dict[DeviceId, list[int]]()
            for index, (device, stage) in enumerate(wanted):
                found = next((n for n, s in free.items() if s.key == _key(device, stage, plan)), None)
                if found is None:
                    missing.setdefault(device, []).append(index)
                else:
                    chosen[index] = found
                    del free[found]
            chosen |= self._load_missing(plan, wanted, missing, len(wanted) - len(chosen), progress)
            self.plan, numbers = plan, [chosen[index] for index in range(len(plan.stages))]
            self.loaded = tuple(self._shards[number].loaded for number in numbers)
            return tuple(
                self._ref_of(stage, self._shards[number]) for stage, number in zip(plan.stages, numbers, strict=True)
            )

    def _load_missing(
        self, plan: LlmPlan, wanted: list[tuple[DeviceId, LlmStage]], missing: dict[DeviceId, list[int]], total: int,
        progress: Progress | None,
    ) -> dict[int, int]:  # fmt: skip
        made: dict[int, int] = {}

        def load_device(device: DeviceId) -> None:
            for index in missing[device]:
                stage, number = wanted[index][1], self._service.next_shard()
                order = StageOrder(
                    shard=number, span=stage.span, executor=stage.executor, kv_bytes=stage.kv_bytes, context=plan.context
                )
                loaded = self._service.load_at(device, order, self._ref, self._deadline_s)
                self._shards[number] = _Shard(_key(device, stage, plan), device, loaded)
                made[index] = number
                if progress is not None:
                    progress(len(made), total, f"{stage.span.describe()} on {device}")

        if not missing:
            return made
        with ThreadPoolExecutor(max_workers=len(missing), thread_name_prefix="llm-load") as pool:
            futures = [pool.submit(load_device, device) for device in missing]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            self._release(made.values())
            raise errors[0]
        return made

    def release(self, peers: Iterable[Peer]) -> None:
        """These shards are not needed any more."""
        with self._lock:
            self._release([peer.shard for peer in peers])

    def close(self) -> None:
        """Release all."""
        with self._lock:
            self._release(list(self._shards))

    def _release(self, numbers: Iterable[int]) -> None:
        by_device: dict[DeviceId, list[int]] = {}
        for number in list(numbers):
            shard = self._shards.pop(number, None)
            if shard is not None:
                by_device.setdefault(shard.device, []).append(number)
        for device, shards in by_device.items():
            self._service.release_at(device, tuple(shards))

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
