"""What a node offers to drivers of language models: shards are loaded, frames and keys carried, speed measured.

One per process and device, over the node's port: on a node that works, and likewise at the driver, whose own device may
hold stages too. Shards of this device are reached without the wire. Frames and keys travel as mail, each once and in
order; fences, probes and their answers as urgent mail, which may be lost. Loading and measuring are questions.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ecotone import schema
from ecotone.cluster import Device
from ecotone.decoding.frame import (
    Frame,
    GenerationFrameError,
    Kind,
    Payload,
    Result,
    build_frame,
    build_result,
    kind_of,
    parse_result,
)
from ecotone.decoding.frame import parse_frame as parse_step
from ecotone.decoding.messages import (
    Alive,
    Fence,
    KvPiece,
    Probe,
    build_kv,
    build_message,
    is_kv,
    parse_kv,
    parse_message,
)
from ecotone.llm.config import DecoderConfig, ModelError
from ecotone.llm.executors import by_id, cache_dtype
from ecotone.llm.grammar import Grammars
from ecotone.llm.host import Item, Loaded, ShardWork, StageHost, StageOrder
from ecotone.llm.recipes import Recipe
from ecotone.llm.sources import DTYPES, ModelRef, all_recipes, open_source, recipe_key
from ecotone.llm.text import TextModel
from ecotone.llm.timing import ShardTime, measure
from ecotone.llm.tokenizer_files import GrammarsSoon, has_tokenizer, read_files, write_files
from ecotone.llm.weights import RandomWeights, WeightSource
from ecotone.protocol.message import NodeId
from ecotone.protocol.settings import LinkSettings
from ecotone.runtime.incarnation import next_incarnation
from ecotone.runtime.port import Port
from ecotone.runtime.questions import QuestionError, Questions
from ecotone.units import EcotoneError
from ecotone.wire.mail import Mail
from ecotone.wire.wire import WireError

__all__ = ["ExecutorTimes", "GenerationService"]

TAG = b"EGLK"
LOAD, RELEASE, PROFILE, WEIGHTS, WORK = "llm-load", "llm-release", "llm-profile", "llm-weights", "llm-work"
TOKENIZER = "llm-tokenizer"
_ADDRESS = struct.Struct("<4sHI")  # magic, bytes of the driver's name, shard
_ADDRESSED, _WEIGHT_PIECE = b"EGNV", b"EGWP"
_PIECE = struct.Struct("<4sQQ")  # magic, transfer, offset
_PIECE_BYTES, _AHEAD_BYTES = 1 << 20, 64 << 20
_DRIVER_AWAY_S, _STALLED_S, _LIFE_S = 60.0, 60.0, 20.0
_URGENT = Probe | Alive | Fence


@dataclass(slots=True)
class _Transfer:
    """A tensor on its way here."""

    data: bytearray = field(default_factory=bytearray)
    got_bytes: int = 0
    moved: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorTimes:
    """What an executor takes on a device, or why it cannot be used there."""

    executor: str
    times: tuple[ShardTime, ...] = ()
    reason: str = ""


class GenerationService:
    """The service of `device` over `port`. `links`: settings of the links that leave it. `folder` keeps fetched weights.

    A driver in this process sets `on_item(node, item)`, `on_peer(node, is_up)`, `on_restarted(node)`, and `lend`s its model.
    """

    def __init__(self, port: Port, questions: Questions, device: Device, folder: Path, links: Mapping[NodeId, LinkSettings]):
        self.name, self.device, self.questions = str(port.name), device, questions
        self.on_item: Callable[[str, Item], None] | None = None
        self.on_peer: Callable[[str, bool], None] | None = None
        self.on_restarted: Callable[[str], None] | None = None
        self._folder = folder
        self._lent: dict[str, tuple[WeightSource, dict[str, Recipe]]] = {}
        self._tokenizers: dict[str, Path] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._numbers = itertools.count(1)
        self._shards = itertools.count(1)
        self._away: dict[str, threading.Timer] = {}
        self.host = StageHost(self.name, device, self.send)
        self._life = next_incarnation()
        self._mail = Mail(
            port.branch(TAG), port.name, self._life, on_message=self._arrived, on_urgent=self._arrived,
            on_peer=self._peer, on_restarted=self._restarted, links=links,
        )  # fmt: skip
        for topic, handler in (
            (LOAD, self._load),
            (PROFILE, self._profile),
            (WEIGHTS, self._weights),
            (TOKENIZER, self._tokenizer),
        ):
            questions.on(topic, handler, slow=True)
        questions.on(RELEASE, self._release)
        questions.on(WORK, lambda peer, body: schema.write(self.host.work(str(peer))))

    def start(self) -> None:
        self._mail.start()

    def stop(self) -> None:
        """End; shards are dropped. The port stays open."""
        for topic in (LOAD, PROFILE, WEIGHTS, TOKENIZER, RELEASE, WORK):
            self.questions.on(topic, None)
        for timer in tuple(self._away.values()):
            timer.cancel()
        self._mail.close()
        self.host.stop()

    @property
    def is_idle(self) -> bool:
        return self.host.is_idle

    def loaded(self) -> list[str]:
        """The shards here, a line each."""
        return [f"{driver}: {span.describe()} by {executor}" for driver, span, executor in self.host.shards()]

    def next_shard(self) -> int:
        """A number for a shard that this driver has not used yet."""
        return next(self._shards)

    def peers(self) -> frozenset[str]:
        """Nodes whose link answers, and this one."""
        return frozenset(str(peer) for peer in self._mail.peers()) | {self.name}

    def wait_for(self, nodes: Iterable[str], patience_s: float) -> list[str]:
        """Those of `nodes` whose link does not answer within `patience_s`, in order."""
        end_s, absent = time.monotonic() + patience_s, list[str]()
        for node in nodes:
            try:
                if node != self.name:
                    self._mail.wait_for(NodeId(node), max(end_s - time.monotonic(), 0.0))
            except WireError:
                absent.append(node)
        return absent

    # ---- sending ---------------------------------------------------------------------------------------------------------

    def send(self, node: str, driver: str, shard: int, item: Item) -> None:
        """Send `item` to a shard of `driver` on `node`, or to the driver (shard 0); never waits, lost with the link."""
        if node == self.name:
            self._deliver(self.name, driver, shard, item)
            return
        name = driver.encode()
        content = _ADDRESS.pack(_ADDRESSED, len(name), shard) + name + _bytes_of(item)
        if isinstance(item, _URGENT):
            self._mail.urge(NodeId(node), content)
            return
        with contextlib.suppress(WireError):  # a queue that is far too long, or closed: the driver's deadlines see to it
            self._mail.send(NodeId(node), content, background=isinstance(item, KvPiece))

    # ---- as a driver -----------------------------------------------------------------------------------------------------

    def lend(self, ref: ModelRef, source: WeightSource, tokenizer: Path | None = None) -> None:
        """Give tensors of `source`, and the tokenizer of that folder, to nodes that ask for them."""
        self._lent[ref.fingerprint] = (source, all_recipes(source.config))
        if tokenizer is not None and has_tokenizer(tokenizer):
            self._tokenizers[ref.fingerprint] = tokenizer

    def load_at(self, node: str, order: StageOrder, ref: ModelRef, deadline_s: float) -> Loaded:
        """Have `node` load a shard for this driver; raises EcotoneError (why it cannot), NodeUnreachable."""
        if node == self.name:
            return self._load_here(self.name, order, ref)
        body = {"order": schema.write(order), "model": schema.write(ref), "life": self._life}
        answer = self.questions.ask(NodeId(node), LOAD, body, deadline_s=deadline_s, repeat_s=5.0)
        loaded, life = schema.read(tuple[Loaded, int], answer, f"answer of {node}")
        self._mail.wait_for_life(NodeId(node), life, _LIFE_S)
        return loaded

    def release_at(self, node: str, shards: tuple[int, ...], deadline_s: float = 2.0) -> bool:
        """Have `node` drop shards of this driver; whether it answered (a node without its driver drops them by itself)."""
        if node == self.name:
            self._release(NodeId(node), {"shards": list(shards)})
            return True
        if node not in self.peers():
            return False
        try:
            self.questions.ask(NodeId(node), RELEASE, {"shards": list(shards)}, deadline_s=deadline_s)
        except EcotoneError:
            return False
        return True

    def abandon(self, node: str, reason: str) -> None:
        """What `node` was asked to load or to measure is not waited for any more."""
        self.questions.abandon(NodeId(node), (LOAD, PROFILE), reason)

    def work_at(self, node: str, deadline_s: float = 5.0) -> tuple[ShardWork, ...]:
        """What the shards of this driver on `node` have done; raises NodeUnreachable."""
        if node == self.name:
            return self.host.work(self.name)
        answer = self.questions.ask(NodeId(node), WORK, deadline_s=deadline_s)
        return schema.read(tuple[ShardWork, ...], answer, f"answer of {node}")

    def profile_at(
        self, node: str, config: DecoderConfig, executors: tuple[str, ...], deadline_s: float
    ) -> tuple[ExecutorTimes, ...]:
        """How fast `node` computes parts of such a model by each executor; weights are random, the shape is the model's."""
        if node == self.name:
            return tuple(self._measured(config, executor) for executor in executors)
        body = {"config": schema.write(config), "executors": list(executors)}
        answer = self.questions.ask(NodeId(node), PROFILE, body, deadline_s=deadline_s, repeat_s=5.0)
        return schema.read(tuple[ExecutorTimes, ...], answer, f"answer of {node}")

    # ---- arriving --------------------------------------------------------------------------------------------------------

    def _arrived(self, peer: NodeId, content: memoryview) -> None:
        try:
            magic = bytes(content[:4])
            if magic == _WEIGHT_PIECE:
                self._take_piece(content)
            elif magic == _ADDRESSED:
                _, length, shard = _ADDRESS.unpack_from(content)
                end = _ADDRESS.size + length
                driver = str(content[_ADDRESS.size : end], "utf-8")
                self._deliver(str(peer), driver, shard, _item_of(content[end:]))
        except (GenerationFrameError, struct.error, UnicodeDecodeError):
            return  # not of ours, or damaged: what matters is asked for again

    def _deliver(self, sender: str, driver: str, shard: int, item: Item) -> None:
        if driver == self.name and shard == 0 and not isinstance(item, Probe):
            if self.on_item is not None:
                self.on_item(sender, item)
        elif not isinstance(item, Result):
            self.host.post(driver, shard, item)

    def _peer(self, peer: NodeId, is_up: bool) -> None:
        timer = self._away.pop(str(peer), None)
        if timer is not None:
            timer.cancel()
        if not is_up:
            self.abandon(str(peer), "the link to it went down")
            timer = self._away[str(peer)] = threading.Timer(_DRIVER_AWAY_S, self.host.forget, (str(peer),))
            timer.daemon = True
            timer.start()
        if self.on_peer is not None:
            self.on_peer(str(peer), is_up)

    def _restarted(self, peer: NodeId) -> None:
        self.host.forget(str(peer))
        if self.on_restarted is not None:
            self.on_restarted(str(peer))

    # ---- questions -------------------------------------------------------------------------------------------------------

    def _load(self, peer: NodeId, body: dict[str, Any]) -> Any:
        order = schema.read(StageOrder, body["order"], "load question")
        ref = schema.read(ModelRef, body["model"], "load question")
        # A driver that began anew is noticed before its shards are loaded, or they would be dropped with its former ones.
        self._mail.wait_for_life(peer, int(body["life"]), _LIFE_S)
        return [schema.write(self._load_here(str(peer), order, ref)), self._life]

    def _load_here(self, driver: str, order: StageOrder, ref: ModelRef) -> Loaded:
        grammars = GrammarsSoon(lambda: self._grammars(ref, driver)) if order.span.head and ref.seed is None else None
        return self.host.load(driver, order, self._source(ref, driver), grammars)

    def _tokenizer(self, peer: NodeId, body: dict[str, Any]) -> Any:
        folder = self._tokenizers.get(str(body["model"]))
        return {} if folder is None else read_files(folder)

    def _grammars(self, ref: ModelRef, driver: str) -> Grammars:
        """Grammars of a model, whose tokenizer is here, or is asked for."""
        folder = self._tokenizers.get(ref.fingerprint)
        if folder is None and has_tokenizer(Path(ref.name)):
            folder = Path(ref.name)
        if folder is None:
            folder = self._folder / ref.fingerprint / "tokenizer"
            files = self.questions.ask(NodeId(driver), TOKENIZER, {"model": ref.fingerprint}, deadline_s=30.0)
            write_files(folder, {str(name): str(text) for name, text in files.items()})
        return Grammars(TextModel.open(folder), ref.config.vocabulary, ref.config.stop_tokens)

    def _release(self, peer: NodeId, body: dict[str, Any]) -> Any:
        from_driver = str(peer)
        for shard in body["shards"]:
            self.host.release(from_driver, int(shard))
        return None

    def _profile(self, peer: NodeId, body: dict[str, Any]) -> Any:
        config = schema.read(DecoderConfig, body["config"], "profile question")
        return schema.write(tuple(self._measured(config, str(executor)) for executor in body["executors"]))

    def _measured(self, config: DecoderConfig, executor: str) -> ExecutorTimes:
        """Measured in the compute lane, so that what is being served meanwhile is not computed beside it."""
        accelerator, threads = self.device.accelerator, self.device.threads
        try:
            factory = by_id(executor)
            reason = factory.available(accelerator) or factory.supports(config)
            if reason:
                return ExecutorTimes(executor=executor, reason=reason)
            source = RandomWeights(config=config)
            times = self.host.compute(
                lambda: measure(factory, source, cache_dtype(executor), accelerator=accelerator, threads=threads)
            )
        except (EcotoneError, RuntimeError, MemoryError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            return ExecutorTimes(executor=executor, reason=reason)
        return ExecutorTimes(
            executor=executor, times=tuple(replace(time, step_s=time.step_s * self.device.slowdown) for time in times)
        )

    # ---- weights ---------------------------------------------------------------------------------------------------------

    def _source(self, ref: ModelRef, driver: str) -> WeightSource:
        lent = self._lent.get(ref.fingerprint)
        if lent is not None:
            return lent[0]
        return open_source(ref, self._folder, lambda recipe: self._fetch(driver, ref, recipe))

    def _fetch(self, driver: str, ref: ModelRef, recipe: Recipe) -> torch.Tensor:
        """One tensor from the driver; raises ModelError where it does not come whole."""
        number = next(self._numbers)
        transfer = self._transfers[number] = _Transfer()
        try:
            body = {"model": ref.fingerprint, "key": recipe_key(recipe), "transfer": number}
            about = self.questions.ask(NodeId(driver), WEIGHTS, body, deadline_s=_STALLED_S, repeat_s=5.0)
            size, dtype = int(about["bytes"]), DTYPES[str(about["dtype"])]
            while transfer.got_bytes < size:
                transfer.moved.clear()
                if transfer.got_bytes < size and not transfer.moved.wait(_STALLED_S):
                    raise ModelError(f"{recipe.sources[0]} stopped coming from {driver}; is its link up?")
        except (QuestionError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{recipe.sources[0]} cannot be had from {driver}: {error}") from None
        finally:
            self._transfers.pop(number, None)
        if hashlib.blake2b(transfer.data, digest_size=20).hexdigest() != about["digest"]:
            raise ModelError(f"{recipe.sources[0]} came damaged from {driver}")
        return torch.frombuffer(transfer.data, dtype=dtype).view(recipe.shape)

    def _weights(self, peer: NodeId, body: dict[str, Any]) -> Any:
        """Say what a tensor of a lent model is, and send it in pieces behind everything else, however long that takes."""
        source, recipes = self._lent[str(body["model"])]
        tensor = source.read(recipes[str(body["key"])]).contiguous()
        data = memoryview(tensor.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        dtype = next(name for name, kind in DTYPES.items() if kind == tensor.dtype)
        digest = hashlib.blake2b(data, digest_size=20).hexdigest()
        arguments = (peer, int(body["transfer"]), data)
        threading.Thread(target=self._send_pieces, args=arguments, name="llm-weights", daemon=True).start()
        return {"dtype": dtype, "bytes": len(data), "digest": digest}

    def _send_pieces(self, peer: NodeId, transfer: int, data: memoryview) -> None:
        """In a thread; where the peer takes no more, it sees that nothing comes, and says so."""
        with contextlib.suppress(EcotoneError):
            for offset in range(0, len(data), _PIECE_BYTES):
                self._wait_for_room(peer)
                head = _PIECE.pack(_WEIGHT_PIECE, transfer, offset)
                self._mail.send(peer, head + data[offset : offset + _PIECE_BYTES], background=True)

    def _wait_for_room(self, peer: NodeId) -> None:
        end_s = time.monotonic() + _STALLED_S
        while self._mail.queued_bytes(peer) > _AHEAD_BYTES:
            if time.monotonic() > end_s:
                raise EcotoneError(f"node {peer} takes no more bytes")
            time.sleep(0.005)

    def _take_piece(self, content: memoryview) -> None:
        _, number, offset = _PIECE.unpack_from(content)
        transfer = self._transfers.get(number)
        if transfer is None or offset != len(transfer.data):  # mail is ordered: pieces come one after the other
            return
        transfer.data += content[_PIECE.size :]
        transfer.got_bytes = len(transfer.data)
        transfer.moved.set()


def _bytes_of(item: Item) -> bytes | bytearray:
    match item:
        case Frame():
            return build_frame(item)
        case Result():
            return build_result(item)
        case KvPiece():
            return build_kv(item)
    return build_message(item)


def _item_of(content: Payload) -> Item:
    kind = kind_of(content)
    if kind is Kind.RESULT:
        return parse_result(content)
    if kind is not None:
        return parse_step(content)
    return parse_kv(content) if is_kv(content) else parse_message(content)
