"""What the benchmarks of language models over nodes share: machines, plans that cut evenly, and answers with their times."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.decoding.answer import Piece
from ecotone.decoding.params import SamplingParams
from ecotone.decoding.words import Ending
from ecotone.llm.generator import Generator
from ecotone.llmplan import EXACT, LOCAL, LlmPlan, LlmStage, Span

__all__ = ["Timeline", "ask", "even_plan", "greedy", "machines", "prompt_of", "start", "wait"]


def machines(
    names: Sequence[str], *, bytes_per_s: float = 1.25e9, latency_s: float = 0.0, memory_bytes: int = 4 << 30,
    slowdown: Sequence[float] = (), threads: int = 1, emulate: bool = True,
) -> Cluster:  # fmt: skip
    """A cluster of equal links between all; the first device drives."""
    slow = tuple(slowdown) or (1.0,) * len(names)
    devices = tuple(
        Device(name=DeviceId(name), memory_bytes=memory_bytes, threads=threads, slowdown=factor)
        for name, factor in zip(names, slow, strict=True)
    )
    links = tuple(
        Link(source=one.name, target=other.name, bandwidth_bytes_per_s=bytes_per_s, latency_s=latency_s)
        for one in devices
        for other in devices
        if one is not other
    )
    return Cluster(name="llm", devices=devices, links=links, source=devices[0].name, sink=devices[0].name, emulate=emulate)


def even_plan(
    num_layers: int, devices: Sequence[str], executor: str, *, driver: str, context: int, kv_bytes: int = 1 << 28,
    max_slots: int = 16, codec: str = EXACT,
) -> LlmPlan:  # fmt: skip
    """Layers in equal shares, the embedding with the first and the head with the last device."""
    bounds = [round(i * num_layers / len(devices)) for i in range(len(devices) + 1)]
    stages = tuple(
        LlmStage(
            device=DeviceId(name), executor=executor, kv_bytes=kv_bytes,
            span=Span(
                start=bounds[i], stop=bounds[i + 1], embedding=i == 0, head=i == len(devices) - 1
            ),
            codec=codec if i + 1 < len(devices) and devices[i + 1] != name else LOCAL,
        )
        for i, name in enumerate(devices)
    )  # fmt: skip
    return LlmPlan(
        model_hash="benchmark", num_layers=num_layers, driver=DeviceId(driver), stages=stages, context=context,
        max_slots=max_slots,
    )  # fmt: skip


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0)


def prompt_of(length: int, vocabulary: int, seed: int) -> list[int]:
    """Random token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, length)]


@dataclass(slots=True)
class Timeline:
    """An answer under way. `times_s`: when each token came, from the moment of asking."""

    begin_s: float
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    last: Piece | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def first_s(self) -> float:
        return self.times_s[0]

    @property
    def gap_s(self) -> float:
        """Median seconds from one token to the next."""
        return float(np.median(np.diff(self.times_s)))

    @property
    def per_token_s(self) -> float:
        """Mean seconds per token after the first."""
        return (self.times_s[-1] - self.times_s[0]) / max(len(self.times_s) - 1, 1)


def start(generator: Generator, prompt: Sequence[int], params: SamplingParams) -> Timeline:
    """Ask, and go on."""
    made = Timeline(time.perf_counter())

    def take(piece: Piece) -> None:
        made.tokens.extend(piece.tokens)
        made.times_s.extend([time.perf_counter() - made.begin_s] * len(piece.tokens))
        if piece.ending is not None:
            made.last = piece
            made.done.set()

    generator.submit(prompt, params, take)
    return made


def wait(timelines: Sequence[Timeline], deadline_s: float = 300.0) -> list[Timeline]:
    """Return when all have ended; raises RuntimeError where one fails or takes too long."""
    end_s = time.monotonic() + deadline_s
    for each in timelines:
        if not each.done.wait(max(end_s - time.monotonic(), 0.0)):
            raise RuntimeError(f"an answer has not ended after {deadline_s:g} s; {len(each.tokens)} tokens came")
        assert each.last is not None
        if each.last.ending not in (Ending.STOP, Ending.LENGTH):
            raise RuntimeError(f"an answer ended as {each.last.ending}: {each.last.reason}")
    return list(timelines)


def ask(generator: Generator, prompt: Sequence[int], params: SamplingParams) -> Timeline:
    """One answer."""
    return wait([start(generator, prompt, params)])[0]
