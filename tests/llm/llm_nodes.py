"""A pc that drives and a few nodes with the shipped tiny model, and the same text by the whole model in one process."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import ecotone
from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.decoding.answer import Piece
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.step import Row, Step
from ecotone.decoding.words import Ending, Settings
from ecotone.llm.deploy import deploy_llm, join, settings_for
from ecotone.llm.executors import by_id, cache_dtype
from ecotone.llm.generator import Generator
from ecotone.llm.kv import KvCache
from ecotone.llm.sampling import make_chooser
from ecotone.llm.service import GenerationService
from ecotone.llm.weights import Checkpoint
from ecotone.llmplan import EXACT, LOCAL, LlmPlan, LlmStage, Span, Standby
from ecotone.runtime.launch import Nodes, in_memory

TINY = Path(ecotone.__file__).parent / "assets" / "tiny-llm"
KV_BYTES, CONTEXT, PATIENCE_S = 1 << 22, 512, 60.0


def cluster(*names: str, memory_bytes: int = 1 << 30, emulate: bool = False) -> Cluster:
    """ "pc" and `names`, all linked."""
    devices = tuple(Device(name=DeviceId(n), memory_bytes=memory_bytes, threads=1) for n in ("pc", *names))
    links = tuple(
        Link(source=a.name, target=b.name, bandwidth_bytes_per_s=1.25e8, latency_s=0.0)
        for a in devices for b in devices if a != b
    )  # fmt: skip
    pc = devices[0].name
    return Cluster(name="test", devices=devices, links=links, source=pc, sink=pc, emulate=emulate)


def plan(
    *parts: tuple[str, int, int], executor: str = "native:fp32", kv_bytes: int = KV_BYTES, context: int = CONTEXT,
    standbys: Sequence[tuple[str, int]] = (),
) -> LlmPlan:  # fmt: skip
    """The tiny model's four layers as (device, first, last), the embedding with the first, the head with the last."""
    stages = tuple(
        LlmStage(
            device=DeviceId(device), span=Span(start=a, stop=b, embedding=i == 0, head=i == len(parts) - 1),
            executor=executor, kv_bytes=kv_bytes if b > a else 0,
            codec=LOCAL if i == len(parts) - 1 or parts[i + 1][0] == device else EXACT,
        )
        for i, (device, a, b) in enumerate(parts)
    )  # fmt: skip
    return LlmPlan(
        model_hash="tiny", num_layers=4, driver=DeviceId("pc"), context=context, stages=stages,
        standbys=tuple(Standby(device=DeviceId(d), stage=s) for d, s in standbys),
    )  # fmt: skip


@functools.cache
def source() -> Checkpoint:
    return Checkpoint.open(TINY)


@functools.cache
def whole(prompt: tuple[int, ...], params: SamplingParams, executor: str = "native:fp32") -> tuple[int, ...]:
    """What the whole model says, token by token in this process, without engine or network."""
    config = source().config
    cache = KvCache(config, Span(start=0, stop=4, embedding=True, head=True), KV_BYTES * 4, cache_dtype(executor))
    shard = by_id(executor).load(source(), cache.span, cache, "cpu", 1, context=CONTEXT)
    chooser = make_chooser(params, len(prompt), config.vocabulary)
    tokens, start = list(prompt), 0
    while len(tokens) < len(prompt) + params.max_tokens:
        row = Row(slot=0, start=start, count=len(tokens) - start, num_logits=1)
        logits = shard.forward(Step(rows=(row,)), torch.tensor(tokens[start:]))
        start = len(tokens)
        tokens.append(chooser.choose(logits[-1], tokens).token)
    return tuple(tokens[len(prompt) :])


@dataclass
class Asked:
    """One request: what came, in order; `until(n)` waits for n tokens, `ended` for the end."""

    generator: Generator
    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    number: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, piece: Piece) -> None:
        with self._changed:
            self.tokens += piece.tokens
            self.pieces.append(piece)
            self._changed.notify_all()

    def until(self, count: int) -> Asked:
        self._wait(lambda: len(self.tokens) >= count or self._is_over())
        return self

    def ended(self) -> Piece:
        self._wait(self._is_over)
        return self.pieces[-1]

    def text(self) -> tuple[int, ...]:
        """All tokens of a request that ended at its length."""
        end = self.ended()
        assert end.ending is Ending.LENGTH, end
        return tuple(self.tokens)

    def _is_over(self) -> bool:
        return bool(self.pieces) and self.pieces[-1].ending is not None

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S), (len(self.tokens), self.generator.measured())


def ask(
    generator: Generator, prompt: Sequence[int], max_tokens: int = 40, *, deadline_s: float | None = None, **params: object
) -> Asked:  # fmt: skip
    asked = Asked(generator, tuple(prompt), SamplingParams(max_tokens=max_tokens, **params))  # type: ignore[arg-type]
    asked.number = generator.submit(asked.prompt, asked.params, asked.take, deadline_s=deadline_s)
    return asked


def is_whole(asked: Asked, executor: str = "native:fp32") -> None:
    assert asked.text() == whole(asked.prompt, asked.params, executor)


@contextlib.contextmanager
def deployed(
    of: Cluster, the_plan: LlmPlan, *, nodes: Nodes | None = None, **options: object
) -> Iterator[tuple[Nodes, GenerationService, Generator]]:
    """A generator over `nodes`, in memory by default; its patience is short."""
    with contextlib.ExitStack() as stack:
        nodes = nodes or stack.enter_context(in_memory(of, services=(GenerationService,)))
        service = stack.enter_context(join(nodes))
        settings = options.pop("settings", None) or quick_settings(the_plan, of)
        generator = stack.enter_context(
            deploy_llm(service, of, the_plan, source(), settings=settings, **options)  # type: ignore[arg-type]
        )
        yield nodes, service, generator


def quick_settings(the_plan: LlmPlan, of: Cluster) -> Settings:
    return settings_for(the_plan, of, "tiny")
