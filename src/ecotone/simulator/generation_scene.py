"""Random scenes of generation by seed: unequal nodes, a chain of spans, requests that share prefixes, and several faults.

A scene is a value, so it can be printed, changed and run again; same seed, same scene. generation_chaos.py runs and judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecotone.decoding.params import SamplingParams
from ecotone.decoding.speculation import Window
from ecotone.simulator.generation import DRIVER, SpanSpec
from ecotone.simulator.hashmodel import POISON, hash_text

__all__ = ["FAULTS", "Ask", "Fault", "GenerationScene", "draw_generation_scene"]

FAULTS = ("kill", "stop", "cut", "slow", "start", "fail", "reshard")
_SPAN_S = 6.0
Random = np.random.Generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request at `at_s`; cancelled at `cancel_s`, to be ended by `deadline_s`, where these are given."""

    at_s: float
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None
    cancel_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to `node` (or to the link from it to `to`), for `for_s`, `factor` times as slow; or a move to `spans`."""

    at_s: float
    kind: str
    node: str = ""
    to: str = ""
    for_s: float = 0.0
    factor: float = 1.0
    spans: tuple[SpanSpec, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationScene:
    """`token_s` by node for each layer and token, `fixed_s` for each layer and step. `window` and `accuracy` are of drafts.

    `idle` nodes are there without a stage. All links are alike but those from and to the first node, `far` times as slow.
    """

    seed: int
    num_layers: int
    spans: tuple[SpanSpec, ...]
    idle: tuple[str, ...]
    token_s: tuple[tuple[str, float], ...]
    fixed_s: float
    latency_s: float
    bytes_per_s: float
    far: float
    context: int
    block_tokens: int
    max_slots: int
    window: Window | None
    accuracy: float
    draft_s: float
    reuse: bool
    load_s: float
    detect_s: float
    boundary_bytes: int
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    vocabulary: int = 997

    @property
    def nodes(self) -> tuple[str, ...]:
        named = [s.node for s in self.spans if s.node != DRIVER]
        return tuple(dict.fromkeys([*named, *self.idle]))


def draw_generation_scene(seed: int) -> GenerationScene:
    """The scene of this seed."""
    random = np.random.default_rng(seed)
    names = tuple("abcdef"[: int(random.integers(1, 5))])
    layers, block = int(random.integers(2, 7)), int(random.choice([4, 8, 16]))
    context = int(random.choice([64, 128, 256]))
    spans = _spans(random, names, layers, context // block)
    scene = GenerationScene(
        seed=seed, num_layers=layers, spans=spans, idle=tuple("xyz"[: int(random.integers(0, 3))]),
        token_s=tuple((name, _log(random, 1e-4, 1e-2)) for name in (DRIVER, *names, *"xyz")),
        fixed_s=_log(random, 1e-4, 5e-3), latency_s=_log(random, 1e-4, 0.1), bytes_per_s=_log(random, 1e4, 1e9),
        far=float(random.choice([1.0, 1.0, 5.0])), context=context, block_tokens=block,
        max_slots=int(random.choice([1, 2, 4, 16])),
        window=_window(random), accuracy=float(random.choice([0.0, 0.5, 0.9, 1.0])),
        draft_s=float(random.choice([0.0, 1e-3, 0.05])), reuse=bool(random.random() < 0.8),
        load_s=_log(random, 0.01, 3.0), detect_s=_log(random, 1e-3, 0.5),
        boundary_bytes=int(random.choice([1 << 24, 1 << 24, 2000])), asks=(), faults=(),
    )  # fmt: skip
    scene = replace(scene, asks=_asks(random, scene))
    return replace(scene, faults=_faults(random, scene))


def _log(random: Random, low: float, high: float) -> float:
    return float(f"{np.exp(random.uniform(np.log(low), np.log(high))):.3g}")


def _spans(random: Random, names: Sequence[str], layers: int, blocks: int) -> tuple[SpanSpec, ...]:
    """A chain over some of the nodes, in any order, some of them twice; at times with embedding or head at the driver."""
    count = int(random.integers(1, min(layers, len(names) + 1) + 1))
    cuts = sorted(int(x) for x in random.choice(np.arange(1, layers), count - 1, replace=False)) if layers > 1 else []
    ends = [0, *cuts, layers]
    order = [str(n) for n in random.permutation(np.array([*names, *names]))]
    room = int(blocks * random.choice([1.1, 1.5, 3.0, 20.0])) + 1
    spans = [SpanSpec(order[i], ends[i], ends[i + 1], num_blocks=room) for i in range(len(ends) - 1)]
    if random.random() < 0.3:
        spans.insert(0, SpanSpec(DRIVER, 0, 0))
    if random.random() < 0.3:
        spans.append(SpanSpec(DRIVER, layers, layers))
    return tuple(spans)


def _window(random: Random) -> Window | None:
    if random.random() < 0.4:
        return None
    return Window(frames=int(random.choice([1, 2, 4, 12])), rows=int(random.choice([1, 1, 2, 5])))


def _asks(random: Random, scene: GenerationScene) -> tuple[Ask, ...]:
    bases = [tuple(int(t) for t in random.integers(0, scene.vocabulary, scene.context)) for _ in range(2)]
    asks = []
    for _ in range(int(random.integers(1, 9))):
        base, most = bases[int(random.integers(2))], scene.context - 2
        shared = int(random.integers(0, most // 2 + 1))
        own = tuple(int(t) for t in random.integers(0, scene.vocabulary, int(random.integers(1, most // 2))))
        prompt = (base[:shared] + own)[:most]
        at_s = round(float(random.uniform(0, _SPAN_S)), 3)
        tokens = int(random.integers(1, 60))
        poison = POISON if random.random() < 0.03 else None
        stop: tuple[int, ...] = ()
        if random.random() < 0.2:
            text = hash_text(prompt, scene.num_layers, scene.vocabulary, tokens)
            stop = (text[int(random.integers(len(text)))],)
        asks.append(
            Ask(
                at_s=at_s, prompt=prompt,
                params=SamplingParams(max_tokens=tokens, stop_tokens=stop, temperature=0.0, seed=poison),
                priority=int(random.integers(-1, 2)),
                deadline_s=round(at_s + _log(random, 0.05, 20), 3) if random.random() < 0.15 else None,
                cancel_s=round(at_s + _log(random, 0.01, 5), 3) if random.random() < 0.15 else None,
            )
        )  # fmt: skip
    return tuple(asks)


def _faults(random: Random, scene: GenerationScene) -> tuple[Fault, ...]:
    """Several faults, often a second one while the first is being healed. Who was killed mostly comes back."""
    faults: list[Fault] = []
    at_s, has_failed = 0.0, False
    for _ in range(int(random.integers(0, 6))):
        close = bool(faults) and random.random() < 0.5
        at_s = round(at_s + _log(random, 1e-3, 2.0) if close else float(random.uniform(0, _SPAN_S)), 3)
        kind = str(random.choice(["kill", "kill", "kill", "stop", "cut", "slow", "fail", "reshard", "start"]))
        node, for_s = str(random.choice(scene.nodes)), _log(random, 0.01, 12.0)
        if kind == "fail" and has_failed:
            continue
        has_failed = has_failed or kind == "fail"
        if kind == "cut":
            ends = [str(n) for n in random.permutation(np.array([DRIVER, *scene.nodes]))]
            faults.append(Fault(at_s=at_s, kind="cut", node=ends[0], to=ends[1], for_s=for_s))
        elif kind == "reshard":
            blocks = scene.context // scene.block_tokens
            faults.append(Fault(at_s=at_s, kind=kind, spans=_spans(random, scene.nodes, scene.num_layers, blocks)))
        elif kind == "slow":
            faults.append(Fault(at_s=at_s, kind=kind, node=node, factor=_log(random, 2.0, 50.0), for_s=for_s))
        elif kind == "start":
            faults.append(Fault(at_s=at_s, kind=kind, node="n"))
        else:
            faults.append(Fault(at_s=at_s, kind=kind, node=node, for_s=for_s))
            if kind == "kill" and (random.random() < 0.8 or not scene.idle):
                faults.append(Fault(at_s=round(at_s + _log(random, 0.01, 10.0), 3), kind="start", node=node))
    return tuple(sorted(faults, key=lambda f: f.at_s))
