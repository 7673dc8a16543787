"""What is timed: each kind of layer once, with the cache filled as the load says, the fastest run counted."""

from __future__ import annotations

import itertools

import pytest
import torch
from decoder_families import Made

from ecotone.decoding.step import Step
from ecotone.llm import timing
from ecotone.llm.executors.torch_shard import TorchShards
from ecotone.llm.kv import KvCache
from ecotone.llm.timing import REPEATS, Load, layer_kinds, measure
from ecotone.llm.weights import WeightSource
from ecotone.llmplan import Span

pytestmark = pytest.mark.torch


class Watched:
    """A factory whose shards note every step and compute nothing."""

    id = "watched:fp32"

    def __init__(self) -> None:
        self.steps: list[tuple[Span, Step]] = []

    def available(self, accelerator: str) -> str:
        return ""

    def supports(self, config: object) -> str:
        return ""

    def load(self, source: WeightSource, span: Span, cache: KvCache, *_: object) -> object:
        shard = TorchShards("torch:fp32").load(source, span, cache)
        forward = shard.forward

        def noted(step: Step, x: torch.Tensor) -> torch.Tensor:
            self.steps.append((span, step))
            return forward(step, x)

        shard.forward = noted  # type: ignore[method-assign]
        return shard


def test_parts_loads_and_the_least_of_several_runs(family: Made) -> None:
    source = family("gemma3")[1]  # windows of 6 in layers 0 and 2, none in layer 1
    loads = (Load(rows=2, count=1, context=40), Load(rows=1, count=9, context=0), Load(rows=1, count=9, context=10_000))
    ticks = itertools.accumulate(itertools.cycle((0.0, 5.0, 0.0, 3.0, 0.0, 4.0, 0.0, 8.0, 0.0, 6.0)))
    watched = Watched()
    times = measure(watched, source, torch.float32, loads, clock=lambda: next(ticks))  # type: ignore[arg-type]
    assert list(layer_kinds(source.config).values()) == [0, 1]
    assert [(t.part, t.load) for t in times] == [
        (part, load) for part in ("0", "1", "embedding", "head") for load in loads[:2]
    ]
    assert {t.step_s for t in times} == {3.0}
    assert all(t.weight_bytes > 0 for t in times)
    decoding = [step for span, step in watched.steps if span.num_layers and len(step.rows) == 2]
    assert len(decoding) == 2 * (REPEATS + 1)
    assert all(row.start == 40 for step in decoding for row in step.rows)


def test_a_part_is_timed_behind_as_many_bytes_as_the_other_layers_hold(
    family: Made, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Or a layer would be read from the processor's cache, where it does not stay in a stage of many."""
    source, sizes, layers = family("gemma3")[1], list[int](), list[int]()
    least_s = timing._least_s

    def watched(shard, load, others, clock):  # type: ignore[no-untyped-def]
        sizes.append(others.nbytes)
        layers.append(shard.weight_bytes if shard.span.num_layers else layers[-1])
        return least_s(shard, load, others, clock)

    monkeypatch.setattr(timing, "_least_s", watched)
    measure(Watched(), source, torch.float32, (Load(rows=1, count=1, context=8),))  # type: ignore[arg-type]
    expected = [(source.config.num_layers - 1) * each for each in layers]
    assert len(sizes) == 4
    assert all(abs(size - right) < 8 for size, right in zip(sizes, expected, strict=True))
