"""The shards of one device: machines of decoding/stage.py behind one lock, and one thread that computes.

Theory of operation. Whoever brings something (the wire, the lane when it has computed) lets the stage's machine handle
it, under the lock, and then sends what came of it: a frame changes threads twice per device, which is most of what a
machine adds to a token. What is to be sent is queued in the order of the machines' answers, and sent by one thread at a
time without the lock, so the wire's own locks are never waited for while it is held. Nothing computes under the lock: probes
are answered at once whatever the shards do. The compute lane takes work in the order in which it was asked for, of all
stages alike, stretched where the device is emulated to be slow. A shard belongs to the driver that had it loaded, and goes
when that driver says so, is another process, or is away for long.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from ecotone.cluster import Device
from ecotone.decoding.frame import Frame, Result
from ecotone.decoding.messages import Alive, KvPiece, Message, Peer, Probe, Release
from ecotone.decoding.stage import Came, Finished, SendFrame, SendKv, SendResult, Stage, StageEffect, StartWork, Tell
from ecotone.decoding.work import Done as WorkDone
from ecotone.decoding.work import Work
from ecotone.llm.config import DecoderConfig, ModelError
from ecotone.llm.executors import by_id, cache_dtype
from ecotone.llm.kv import KvCache
from ecotone.llm.recipes import weight_bytes
from ecotone.llm.sampling import GrammarMasks, make_chooser
from ecotone.llm.weights import WeightSource
from ecotone.llm.worker import ShardWorker
from ecotone.llmplan import Span
from ecotone.runtime.lane import Done, Lane
from ecotone.units import EcotoneError, format_quantity

__all__ = ["Item", "Loaded", "Outbound", "ShardWork", "StageHost", "StageOrder"]

T = TypeVar("T")
Item = Frame | Result | Message | KvPiece
Outbound = Callable[[str, str, int, Item], None]
"""(node, driver, shard, item): send `item` for `shard` of `driver` to `node`; shard 0 is the driver itself."""
_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
_SMALL_CACHE_BYTES = 1 << 22  # of a shard without layers: nothing lies in it


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOrder:
    """What a driver wants loaded: shard `shard` with `span` by `executor`, and `kv_bytes` for keys and values.

    `boundary_bytes`: of outputs kept so that a lost successor can be rebuilt.
    """

    shard: int
    span: Span
    executor: str
    kv_bytes: int
    context: int
    boundary_bytes: int = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The shard is there: `num_blocks` of `block_bytes` for keys and values, `weight_bytes` in memory."""

    shard: int
    num_blocks: int
    block_bytes: int
    weight_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardWork:
    """What a shard has done since it was loaded: tokens through its layers, those among them that were dropped unfinished
    when the pipeline changed, and seconds of computing."""

    shard: int
    span: Span
    executor: str
    computed_tokens: int
    dropped_tokens: int
    seconds: float


@dataclass(slots=True)
class _Held:
    stage: Stage
    worker: ShardWorker
    num_bytes: int
    seconds: float = 0.0


class StageHost:
    """`send` must not wait."""

    def __init__(self, name: str, device: Device, send: Outbound):
        self.name, self.device = name, device
        self._send = send
        self._held: dict[tuple[str, int], _Held] = {}
        self._loading: dict[tuple[str, int], int] = {}  # bytes that what is being loaded will take
        self._memory = threading.Lock()
        self._lock, self._sending = threading.RLock(), threading.Lock()
        self._outbox: deque[tuple[str, str, int, Item]] = deque()
        self._lane = Lane(f"{name}-shards", slowdown=device.slowdown, threads=device.threads)
        self._is_stopped = False

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the lane; what the shards hold is dropped."""
        with self._lock:
            self._is_stopped = True
            self._held.clear()
        self._lane.close(timeout_s)

    @property
    def is_idle(self) -> bool:
        return not self._held

    # ---- loading, from any thread ----------------------------------------------------------------------------------------

    def load(
        self, driver: str, order: StageOrder, source: WeightSource, grammars: GrammarMasks | None = None
    ) -> Loaded:  # fmt: skip
        """Load a shard; raises EcotoneError where executor, weights or memory do not allow it. Harmless to repeat.

        `grammars`: for a stage with the head, so that answers can be kept to one.
        """
        known = self._held.get((driver, order.shard))
        if known is not None:
            return _loaded(order, known, 0.0)
        begin_s = time.monotonic()
        factory, config = by_id(order.executor), source.config
        refused = factory.available(self.device.accelerator) or factory.supports(config)
        if refused:
            raise EcotoneError(f"device {self.name}: executor {order.executor}: {refused}")
        cap_bytes = order.kv_bytes if order.span.num_layers else _SMALL_CACHE_BYTES
        self._reserve(driver, order, _least_bytes(config, order))
        try:
            cache = KvCache(config, order.span, cap_bytes, cache_dtype(order.executor), self.device.accelerator)
            shard = factory.load(
                source, order.span, cache, self.device.accelerator, self.device.threads, context=order.context
            )
            worker = ShardWorker(shard, lambda params, prompt: make_chooser(params, prompt, config.vocabulary, grammars))
            stage = Stage(order.shard, order.span.start, order.span.stop, boundary_bytes=order.boundary_bytes)
            held = _Held(stage, worker, shard.weight_bytes + (cache.capacity_bytes if order.span.num_layers else 0))
            self._reserve(driver, order, held.num_bytes, is_loaded=True)
            self._held[driver, order.shard] = held
        except (RuntimeError, MemoryError, OSError) as error:
            if isinstance(error, EcotoneError):
                raise
            raise ModelError(f"device {self.name} cannot load {order.span.describe()}: {error}") from None
        finally:
            with self._memory:
                self._loading.pop((driver, order.shard), None)
        return _loaded(order, held, time.monotonic() - begin_s)

    def _reserve(self, driver: str, order: StageOrder, num_bytes: int, *, is_loaded: bool = False) -> None:
        """Count what a shard takes; raises EcotoneError where that is too much, or nobody wants the shard any more."""
        key = (driver, order.shard)
        with self._memory:
            if is_loaded and self._loading.pop(key, None) is None:
                raise EcotoneError(f"device {self.name}: shard {order.shard} was released while it was being loaded")
            used = sum(held.num_bytes for held in tuple(self._held.values())) + sum(self._loading.values())
            if used + num_bytes > self.device.memory_bytes:
                have, need, others = (format_quantity(n, "bytes") for n in (self.device.memory_bytes, num_bytes, used))
                raise EcotoneError(
                    f"device {self.name} has {have} of memory: {order.span.describe()} by {order.executor} needs {need}, "
                    f"other shards {others}; use fewer bits, a shorter context, fewer layers there, or another machine"
                )
            self._loading[key] = num_bytes

    # ---- from any thread -------------------------------------------------------------------------------------------------

    def post(self, driver: str, shard: int, item: Item) -> None:
        """Something arrived for a shard, or a Probe or Release for this node."""
        self._do(partial(self._take, driver, shard, item))

    def release(self, driver: str, shard: int) -> None:
        """Drop a shard, also one that is being loaded; nothing where there is none."""
        with self._memory:
            self._loading.pop((driver, shard), None)
        self.post(driver, shard, Release(shard=shard))

    def forget(self, driver: str) -> None:
        """Drop every shard of a driver."""
        with self._memory:
            for key in [key for key in self._loading if key[0] == driver]:
                del self._loading[key]
        self._do(partial(self._forget, driver))

    def compute(self, work: Callable[[], T]) -> T:
        """Do `work` in the thread that computes, after what was asked for before, and give what it gives or raises."""
        future: Future[T] = Future()

        def end(done: Done) -> None:
            if done.error is not None:
                future.set_exception(done.error)
            else:
                future.set_result(done.value)

        self._lane.put(work, end)
        return future.result()

    def shards(self) -> tuple[tuple[str, Span, str], ...]:
        """(driver, span, executor) of what is loaded, for people."""
        return tuple((owner, h.worker.shard.span, h.worker.shard.id) for (owner, _), h in tuple(self._held.items()))

    def work(self, driver: str) -> tuple[ShardWork, ...]:
        """What the shards of `driver` have done."""
        return tuple(
            ShardWork(
                shard=number, span=held.worker.shard.span, executor=held.worker.shard.id, seconds=held.seconds,
                computed_tokens=held.worker.computed_tokens, dropped_tokens=held.worker.dropped_tokens,
            )
            for (owner, number), held in tuple(self._held.items()) if owner == driver
        )  # fmt: skip

    # ---- under the lock --------------------------------------------------------------------------------------------------

    def _do(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._is_stopped:
                return
            try:
                job()
            except Exception:  # a fault of ours: say so loudly; the driver's deadlines find the stage that is stuck
                traceback.print_exc(file=sys.stderr)
        self._flush()

    def _flush(self) -> None:
        """Send what is queued, in order; where another thread is at it, it sends this too."""
        while self._outbox and self._sending.acquire(blocking=False):
            try:
                while self._outbox:
                    self._send(*self._outbox.popleft())
            finally:
                self._sending.release()

    def _take(self, driver: str, shard: int, item: Item) -> None:
        if isinstance(item, Probe):
            now_s = time.monotonic()
            states = tuple(held.stage.state(now_s) for (d, _), held in self._held.items() if d == driver)
            self._outbox.append((driver, driver, 0, Alive(nonce=item.nonce, shards=states)))
        elif isinstance(item, Release):
            self._held.pop((driver, item.shard), None)
        elif isinstance(item, Result):
            return
        elif (held := self._held.get((driver, shard))) is not None:
            self._apply(driver, shard, held.stage.handle(Came(item), time.monotonic()))

    def _forget(self, driver: str) -> None:
        for key in [key for key in self._held if key[0] == driver]:
            del self._held[key]

    def _apply(self, driver: str, shard: int, effects: list[StageEffect]) -> None:
        for effect in effects:
            match effect:
                case StartWork(work):
                    held = self._held[driver, shard]
                    self._lane.put(partial(held.worker.do, work), partial(self._worked, driver, shard, work))
                case SendFrame(to, frame):
                    self._out(driver, to, frame)
                case SendKv(to, piece):
                    self._out(driver, to, piece)
                case SendResult(result):
                    self._outbox.append((driver, driver, 0, result))
                case Tell(message):
                    self._outbox.append((driver, driver, 0, message))

    def _out(self, driver: str, to: Peer, item: Item) -> None:
        self._outbox.append((to.node or driver, driver, to.shard, item))

    def _worked(self, driver: str, shard: int, work: Work, done: Done) -> None:
        """Called in the lane's thread."""
        if done.error is not None:
            what = WorkDone(work=work, error=f"{type(done.error).__name__}: {done.error}"[:300])
        else:
            what = replace(done.value, seconds=done.seconds)
        self._do(partial(self._finished, driver, shard, what))

    def _finished(self, driver: str, shard: int, done: WorkDone) -> None:
        held = self._held.get((driver, shard))
        if held is not None:
            held.seconds += done.seconds
            self._apply(driver, shard, held.stage.handle(Finished(done), time.monotonic()))


def _least_bytes(config: DecoderConfig, order: StageOrder) -> int:
    """What a shard takes at least, by the precision that its executor's id names: before anything is read."""
    bits = _BITS.get(order.executor.partition(":")[2], 0)
    kv_bytes = order.kv_bytes if order.span.num_layers else 0
    return kv_bytes + weight_bytes(config, order.span, bits, element_bytes=0)


def _loaded(order: StageOrder, held: _Held, seconds: float) -> Loaded:
    tables, cache = held.worker.shard.cache.tables, held.worker.shard.cache
    has_layers = order.span.num_layers > 0
    return Loaded(
        shard=order.shard, num_blocks=tables.num_blocks if has_layers else 0,
        block_bytes=cache.capacity_bytes // tables.num_blocks if has_layers else 0,
        weight_bytes=held.worker.shard.weight_bytes, seconds=seconds,
    )  # fmt: skip
