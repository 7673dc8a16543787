"""Random small problems of planning a language model, and an oracle that enumerates every plan and prices it on its own.

The oracle shares no code with llmcost.py or the planner: it walks stages device by device in every order, with every cut,
executor (pairs too) and codec, and adds up seconds token by token from the tables that made the world. Devices are
shuffled, links differ by direction and some are missing, some devices are alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ecotone.cluster import Cluster, Device, DeviceId, Link
from ecotone.llmcost import Shape
from ecotone.llmprofile import Curve, ExecutorFacts, LayerPart, LlmProfile, PartTime
from ecotone.planner.generation import Asked

CODEC_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
CHUNKS = (32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Stage:
    """Blocks [first, last) (0 the embedding, N + 1 the head) on `device`; `codec` of what it sends on."""

    device: str
    first: int
    last: int
    executor: str
    codec: str = ""


@dataclass(frozen=True)
class World:
    profile: LlmProfile
    cluster: Cluster
    asked: Asked


def random_world(seed: int, objective: str, *, tight: bool = False, limits: bool = False) -> World:
    """1 to 4 devices, 1 to 4 layers of 1 or 2 kinds, 1 or 2 executors and their pairs; `tight`: memory for a part only."""
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(1, 5))
    kinds = ("0", "1")[: int(rng.integers(1, 3))]
    executors = ("a:fp32", "b:int8")[: int(rng.integers(1, 3))]
    profile = LlmProfile(
        model_hash="random", width=int(rng.integers(8, 64)), max_positions=4096,
        kinds=tuple(LayerPart(part=kind, window=(0, 40)[index]) for index, kind in enumerate(kinds)),
        layers=tuple(str(rng.choice(kinds)) for _ in range(layers)),
        times=tuple(_times(rng, kinds, executors)),
        executors=tuple(
            ExecutorFacts(executor=e, kv_bytes_per_token=(8, 4)[i], loss=(0.0, 0.02)[i]) for i, e in enumerate(executors)
        ),
        codec_losses={"bf16": 0.004, "int8": 0.03},
    )  # fmt: skip
    shape = Shape(prompt=int(rng.choice([5, 40, 150])), answer=int(rng.integers(1, 60)), concurrency=int(rng.integers(1, 6)))
    cluster = _cluster(rng, profile, shape, tight)
    codecs = (("fp32",), ("fp32", "int8"), ("bf16",))[int(rng.integers(0, 3))] if layers < 4 else ("fp32",)
    asked = Asked(shape=shape, objective=objective, codecs=codecs, max_loss=float(rng.choice([0.0, 0.01, 0.015, 0.2])))
    if limits:
        limited = {"tpot_s": float(rng.uniform(0.02, 0.2)), "ttft_s": float(rng.uniform(0.05, 0.6))}
        if rng.random() < 0.3:
            limited["tokens_per_s"] = float(rng.uniform(3, 30))
        asked = replace(asked, **limited)
    return World(profile, cluster, asked)


def _times(rng: np.random.Generator, kinds: tuple[str, ...], executors: tuple[str, ...]) -> Iterator[PartTime]:
    for device in ("x", "y", "z", "w"):
        for executor in executors:
            speed = 10.0 ** rng.uniform(-0.5, 0.5)
            if rng.random() < 0.1 and device != "x":
                continue  # not measured here
            for part in ("embedding", "head", *kinds, *(["frame"] if rng.random() < 0.5 else [])):
                is_layer = part in kinds
                scale = speed * {"embedding": 0.1, "head": 1.5, "frame": 0.1}.get(part, 1.0)
                yield PartTime(
                    device=device, executor=executor, part=part, weight_bytes=int(rng.integers(20_000, 60_000)),
                    prefill=_curve(rng, scale * 1e-2, is_layer), decode=_curve(rng, scale * 1e-2, is_layer),
                )  # fmt: skip


def _curve(rng: np.random.Generator, scale: float, is_layer: bool) -> Curve:
    return Curve(
        fixed_s=scale * float(rng.uniform(0.2, 1)), token_s=scale * 0.05 * float(rng.uniform(0, 1)),
        pair_s=scale * 1e-3 * float(rng.uniform(0, 1)) if is_layer else 0.0,
    )  # fmt: skip


def _cluster(rng: np.random.Generator, profile: LlmProfile, shape: Shape, tight: bool) -> Cluster:
    count = int(rng.integers(1, 5)) if profile.num_layers < 4 else int(rng.integers(1, 4))
    alike = count > 2 and rng.random() < 0.5
    own = [str(n) for n in rng.permutation(["x", "y", "z", "w"])[:count]]
    kinds = [own[1] if alike and i == 2 else own[i] for i in range(count)]  # devices 1 and 2 are alike
    weights = 45_000 * (profile.num_layers + 2) + 8 * shape.prompt * profile.num_layers * shape.concurrency
    devices = []
    for index in range(count):
        share = float(rng.uniform(0.25, 0.9)) if tight else 100.0
        memory = devices[1].memory_bytes if alike and index == 2 else int(share * weights)
        devices.append(Device(name=DeviceId(f"m{rng.integers(1000)}-{index}"), kind=kinds[index], memory_bytes=memory))
    names = [device.name for device in devices]
    kind_of = dict(zip(names, kinds, strict=True))
    drawn: dict[tuple[str, str], tuple[float, float] | None] = {}
    links = []
    for a, b in itertools.permutations(names, 2):
        pair = (kind_of[a], kind_of[b])
        if pair not in drawn:
            missing = rng.random() < 0.1 and names[0] not in (a, b)
            drawn[pair] = None if missing else (float(rng.uniform(0, 0.02)), float(10 ** rng.uniform(4, 7)))
        if drawn[pair] is not None:
            latency, rate = drawn[pair]
            links.append(Link(source=a, target=b, latency_s=latency, bandwidth_bytes_per_s=rate))
    order = rng.permutation(count)
    return Cluster(
        name="random", devices=tuple(devices[i] for i in order), links=tuple(links), source=names[0], sink=names[0]
    )


# ---- the oracle ----------------------------------------------------------------------------------------------------------


def best(world: World) -> float:
    """The least value of any plan; inf where there is none."""
    oracle = _Oracle(world)
    return min((oracle.value(plan) for plan in oracle.plans()), default=math.inf)


class _Oracle:
    def __init__(self, world: World):
        self.profile, self.cluster, self.asked, self.shape = world.profile, world.cluster, world.asked, world.asked.shape
        self.blocks = ["embedding", *world.profile.layers, "head"]
        self.kind = {d.name: d.kind for d in world.cluster.devices}
        self.memory = {d.name: d.memory_bytes for d in world.cluster.devices}
        self.time = {(t.device, t.executor, t.part): t for t in world.profile.times}
        self.facts = {f.executor: f for f in world.profile.executors}
        self.window = {k.part: k.window for k in world.profile.kinds}
        self.link = {(k.source, k.target): k for k in world.cluster.links}
        self.driver = world.cluster.source
        single = [f.executor for f in world.profile.executors]
        self.executors = [*single, *(f"{a}+{b}" for a in single for b in single if a != b)]
        tokens = max(self.shape.context, self.shape.prompt + self.shape.answer)
        self.kept_tokens = -(-tokens // 32) * 32 * max(self.shape.max_slots, self.shape.concurrency)

    def plans(self) -> Iterator[tuple[Stage, ...]]:
        for stages in self._from(0, frozenset(), ()):
            remote = [i for i in range(len(stages) - 1) if stages[i].device != stages[i + 1].device]
            for codecs in itertools.product(self.asked.codecs, repeat=len(remote)):
                made = list(stages)
                for index, codec in zip(remote, codecs, strict=True):
                    made[index] = replace(made[index], codec=codec)
                yield tuple(made)

    def _from(self, block: int, used: frozenset[str], stages: tuple[Stage, ...]) -> Iterator[tuple[Stage, ...]]:
        end = len(self.blocks)
        if block == end:
            yield stages
            return
        for executor in self.executors:
            for device in self.memory:
                if device not in used and self._may(device):
                    for last in range(block + 1, end + 1):
                        if self._has(device, executor, block, last):
                            made = Stage(device, block, last, executor)
                            yield from self._from(last, used | {device}, (*stages, made))
            apart = {0: 1, end - 1: end}.get(block)  # the driver's second and third stage
            if apart and self._has(self.driver, executor, block, apart):
                yield from self._from(apart, used, (*stages, Stage(self.driver, block, apart, executor)))

    def _may(self, device: str) -> bool:
        d = self.driver
        return device == d or ((d, device) in self.link and (device, d) in self.link)

    def _has(self, device: str, executor: str, first: int, last: int) -> bool:
        kind = self.kind[device]
        return all((kind, e, part) in self.time for e in executor.split("+") for part in self.blocks[first:last])

    # ---- prices ----------------------------------------------------------------------------------------------------------

    def value(self, stages: tuple[Stage, ...]) -> float:
        if not self._fits(stages) or self._loss(stages) > self.asked.max_loss * (1 + 1e-9):
            return math.inf
        asked, shape = self.asked, self.shape
        tpot = self._loop(stages, 1)[0]
        sizes = [c for c in CHUNKS if c < shape.prompt] + ([shape.prompt] if shape.prompt <= 2048 else [])
        ttft = min(self._first(stages, size) for size in sizes)
        rate = 0.0
        for frames in range(1, shape.concurrency + 1):
            loop, tau = self._loop(stages, math.ceil(shape.concurrency / frames))
            rate = max(rate, shape.concurrency / max(loop, frames * tau))
        request = ttft + (shape.answer - 1) * tpot
        slack = 1 + 1e-9
        for value, limit in ((tpot, asked.tpot_s), (ttft, asked.ttft_s), (request, asked.request_s)):
            if limit and value > limit * slack:
                return math.inf
        if asked.tokens_per_s and rate * slack < asked.tokens_per_s:
            return math.inf
        return {"tpot": tpot, "ttft": ttft, "request": request, "throughput": 1 / rate if rate else math.inf}[
            asked.objective
        ]

    def _curve(self, stage: Stage, part: str, many: bool) -> Curve | None:
        names = stage.executor.split("+")
        found = self.time.get((self.kind[stage.device], names[0] if many else names[-1], part))
        return None if found is None else found.prefill if many else found.decode

    def _few(self, stage: Stage, rows: int) -> float:
        total = 0.0
        depth = self.shape.prompt + self.shape.answer / 2
        for part in ["frame", *self.blocks[stage.first : stage.last]]:
            curve = self._curve(stage, part, many=False)
            if curve is None:
                continue
            seen = 0.0
            if part in self.window:
                seen = min(depth + 1, self.window[part]) if self.window[part] else depth + 1
            total += curve.fixed_s + rows * (curve.token_s + curve.pair_s * seen)
        return total

    def _many(self, stage: Stage, chunks: int) -> tuple[float, float]:
        """(the mean chunk without the head, the head)."""
        body = head = 0.0
        prompt = self.shape.prompt
        for part in ["frame", *self.blocks[stage.first : stage.last]]:
            curve = self._curve(stage, part, many=prompt > 8 or part == "frame")
            if curve is None:
                continue
            if part == "head":
                head += curve.fixed_s + curve.token_s
                continue
            pairs = 0
            if part in self.window:
                window = self.window[part] or prompt
                pairs = sum(min(i + 1, window) for i in range(prompt))
            body += curve.fixed_s + (curve.token_s * prompt + curve.pair_s * pairs) / chunks
        return body, head

    def _ways(self, stages: tuple[Stage, ...]) -> Iterator[tuple[str, str, str]]:
        ends = [self.driver, *(s.device for s in stages), self.driver]
        what = ["ids", *(s.codec for s in stages[:-1]), "result"]
        yield from ((a, b, w) for a, b, w in zip(ends[:-1], ends[1:], what, strict=True) if a != b)

    def _bytes(self, what: str, tokens: float, rows: int) -> float:
        if what == "result":
            return 128 + 32 * rows
        own = 0 if what == "ids" else self.profile.width * CODEC_BYTES[what] + 4 * (what == "int8")
        return 128 + tokens * (4 + own)

    def _travel(self, stages: tuple[Stage, ...], tokens: float, rows: int) -> tuple[float, float]:
        """(sum with latency, longest occupancy); inf where a link is missing."""
        total = longest = 0.0
        for a, b, what in self._ways(stages):
            link = self.link.get((a, b))
            if link is None:
                return math.inf, math.inf
            occupied = self._bytes(what, tokens, rows) / link.bandwidth_bytes_per_s
            total, longest = total + link.latency_s + occupied, max(longest, occupied)
        return total, longest

    def _loop(self, stages: tuple[Stage, ...], rows: int) -> tuple[float, float]:
        travel, longest = self._travel(stages, rows, rows)
        busy: dict[str, float] = {}
        for stage in stages:
            busy[stage.device] = busy.get(stage.device, 0.0) + self._few(stage, rows)
        return sum(busy.values()) + travel, max(longest, *busy.values())

    def _first(self, stages: tuple[Stage, ...], chunk: int) -> float:
        chunks = math.ceil(self.shape.prompt / chunk)
        travel, longest = self._travel(stages, self.shape.prompt / chunks, 1)
        busy: dict[str, float] = {}
        heads = 0.0
        for stage in stages:
            body, head = self._many(stage, chunks)
            busy[stage.device], heads = busy.get(stage.device, 0.0) + body, heads + head
        behind = (chunks - 1) * max(longest, *busy.values()) if chunks > 1 else 0.0
        return sum(busy.values()) + heads + travel + behind

    def _loss(self, stages: tuple[Stage, ...]) -> float:
        each = len(self.profile.layers) + 1
        total = 0.0
        for stage in stages:
            own = max(self.facts[name].loss for name in stage.executor.split("+"))
            total += own * sum(block != "embedding" for block in self.blocks[stage.first : stage.last]) / each
            total += self.profile.codec_losses.get(stage.codec, 0.0)
        return total

    def _fits(self, stages: tuple[Stage, ...]) -> bool:
        used: dict[str, int] = {}
        for stage in stages:
            names = stage.executor.split("+")
            blocks = self.blocks[stage.first : stage.last]
            weights = sum(self.time[self.kind[stage.device], name, b].weight_bytes for name in names for b in blocks)
            num_layers = sum(block in self.window for block in blocks)
            keys = num_layers * self.facts[names[-1]].kv_bytes_per_token * self.kept_tokens
            sends = num_layers and "head" not in blocks
            kept = min(4 * self.profile.width * self.kept_tokens, 1 << 28) if sends else 0
            used[stage.device] = used.get(stage.device, 0) + weights + keys + kept
        return all(total <= self.memory[device] for device, total in used.items())
