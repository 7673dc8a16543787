"""Named planners of language models that ours is measured against, behind one verb: `place(name, ...) -> LlmPlan`.

Each cuts by its published or common rule; then every stage gets the executor that is fastest there of those that fit and
are within the loss asked, and the plan is priced by llmcost.py like any other. The embedding lies with the first layers,
the head with the last ones.

    one_device      the device that alone serves the whole model best
    proportional    exo: layers by memory, largest remainder, at least one each, over the fewest devices (most memory
                    first) whose memory holds the weights; keys do not enter. Repaired: while that breaks a memory, one more
    even            vLLM: equal numbers of layers. Repaired: while a device cannot hold its share, the smallest is left out
    water_filling   Parallax: the fewest devices that hold the model, layers by speed up to each one's memory
    edgeshard_latency     EdgeShard A (arXiv 2405.14371): sum of compute and bytes/rate, layer 0 on the source; no latency,
                    no way back, no memory, so its plan may break caps: that is said, never repaired
    edgeshard_throughput  EdgeShard B: least maximum of compute and outgoing transfer over sets, with memory per stage

The driver is the source. Orders: the driver first, then by memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ecotone.cluster import Cluster, Device
from ecotone.llmcost import LlmCostModel
from ecotone.llmplan import EXACT, LOCAL, LlmPlan, LlmStage
from ecotone.llmprofile import EMBEDDING, HEAD, LlmProfile
from ecotone.planner.generation.asked import Asked, View, value_of, views
from ecotone.planner.generation.problem import FloatArray, Problem, World
from ecotone.planner.objective import PlannerError

__all__ = ["NAMES", "place"]

MOST_STATES = 1 << 14  # of sets of devices, for EdgeShard B

_State = tuple[tuple[int, ...], int]  # devices left by class, class of the last stage
Pieces = list[tuple[Device, int, int]]  # device, first block, last block


def place(name: str, profile: LlmProfile, cluster: Cluster, asked: Asked) -> LlmPlan:
    """The plan of baseline `name` (one of NAMES); raises PlannerError where it has none. EdgeShard A's may break memory
    caps: ask LlmCost.violations."""
    if name not in _RULES:
        raise PlannerError(f"baseline {name!r} is not known; known are {', '.join(NAMES)}")
    asked = replace(asked, tpot_s=0.0, ttft_s=0.0, request_s=0.0, tokens_per_s=0.0, codecs=(EXACT,))
    world = World(LlmCostModel(profile, cluster, asked.shape), asked)
    if not world.classes:
        raise PlannerError(f"baseline {name}: no device can be used")
    plan = _RULES[name](_Baseline(world, asked))
    if plan is None:
        raise PlannerError(f"baseline {name}: its rule gives no plan that fits here")
    return plan


class _Baseline:
    """What the rules share: devices in order, their speed and room, and plans from cuts."""

    def __init__(self, world: World, asked: Asked):
        self.world, self.asked, self.model = world, asked, world.model
        world.options = [{e: m for e, m in own.items() if m.loss <= asked.max_loss} for own in world.options]
        every = [device for group in world.classes for device in group]
        self.devices = sorted(every, key=lambda d: (d.name != world.driver, -d.memory_bytes, d.name))
        self.num_layers = world.profile.num_layers
        self._problems: dict[tuple[int, int], Problem] = {}

    @property
    def by_memory(self) -> list[Device]:
        return sorted(self.devices, key=lambda device: (-device.memory_bytes, device.name))

    def stages(self, device: Device, first: int, last: int) -> Iterator[LlmStage]:
        """A stage of these blocks by every executor within the loss asked that was measured on them."""
        place = self.world.place_of(device.name)
        assert place is not None
        parts = [EMBEDDING, *self.world.profile.layers, HEAD][first:last]
        for executor, found in self.world.options[place].items():
            if all(part in found.decode for part in parts):
                yield self.world.stage(device.name, first, last, executor)

    def plan(self, pieces: Pieces, *, with_memory: bool = True) -> LlmPlan | None:
        """Contiguous pieces with the executor that makes each quickest under the objective; None where one does not fit."""
        stages: list[LlmStage] = []
        for device, first, last in pieces:
            found = [(self._seconds(stage), self._bytes(stage), stage) for stage in self.stages(device, first, last)]
            if with_memory:
                found = [entry for entry in found if entry[1] <= device.memory_bytes]
            if not found:
                return None
            stages.append(min(found, key=lambda entry: entry[:2])[2])
        for index, stage in enumerate(stages[:-1]):
            is_local = stage.device == stages[index + 1].device
            stages[index] = replace(stage, codec=LOCAL if is_local else EXACT)
        shape = self.asked.shape
        return LlmPlan(
            model_hash=self.world.profile.model_hash, num_layers=self.num_layers, driver=self.world.driver,
            stages=tuple(stages), context=shape.longest, max_slots=shape.slots,
        )  # fmt: skip

    def _seconds(self, stage: LlmStage) -> float:
        """What the objective's sum counts of a stage, in the first View."""
        view = views(self.asked, limit_loss=False)[-1]
        fixed = self.problem(view).fix(stage)
        if fixed is None:
            return math.inf
        return float(max(np.dot(weights, fixed.sums) for weights in view.sums))

    def problem(self, view: View) -> Problem:
        key = (view.chunk, view.rows)
        found = self._problems.get(key)
        if found is None:
            found = self._problems[key] = Problem(self.world, view)
        return found

    def _bytes(self, stage: LlmStage) -> int:
        found = self.model.measured(stage.device, stage.executor)
        assert found is not None
        weights = sum(found.weight_bytes[part] for part in self.model.parts_of(stage.span))
        return weights + stage.kv_bytes + self.model.boundary_bytes(stage.span)

    def weights(self) -> int:
        """Bytes of the whole model by its smallest executor within the loss."""
        parts = [EMBEDDING, *self.world.profile.layers, HEAD]
        found = [
            sum(m.weight_bytes[part] for part in parts)
            for options in self.world.options
            for m in options.values()
            if all(part in m.weight_bytes for part in parts)
        ]
        return min(found, default=0)

    def layer_s(self, device: Device) -> float:
        """Seconds of a layer in decoding, the mean over the model, by the device's fastest executor."""
        stages = list(self.stages(device, 1, self.num_layers + 1))
        times = [self._few(stage) for stage in stages]
        return min(times, default=math.inf) / self.num_layers

    def _few(self, stage: LlmStage) -> float:
        found = self.model.measured(stage.device, stage.executor)
        assert found is not None
        return sum(self.model.few_s(found.decode[part], part, 1) for part in self.model.parts_of(stage.span))

    def room(self, device: Device, *, is_first: bool, is_last: bool) -> int:
        """How many layers a device can hold, with the ends where it has them."""
        count, end = 0, self.num_layers + 2
        for layers in range(1, self.num_layers + 1):
            if is_last:
                first, last = (0 if is_first and layers == self.num_layers else end - 1 - layers), end
            else:
                first, last = (0 if is_first else 1), layers + 1
            stages = self.stages(device, first, last)
            if min((self._bytes(stage) for stage in stages), default=math.inf) > device.memory_bytes:
                break
            count = layers
        return count

    def pieces(self, devices: Sequence[Device], layers: Sequence[int]) -> Pieces:
        """Numbers of layers as blocks: the embedding with the first, the head with the last; who has none falls out."""
        used = [(device, count) for device, count in zip(devices, layers, strict=True) if count]
        made, at = [], 1
        for index, (device, count) in enumerate(used):
            first = 0 if index == 0 else at
            last = at + count + (index == len(used) - 1)
            made.append((device, first, last))
            at += count
        return made


# ---- the rules -----------------------------------------------------------------------------------------------------------


def _one_device(own: _Baseline) -> LlmPlan | None:
    plans = [own.plan([(device, 0, own.num_layers + 2)]) for device in own.devices]
    fitting = [plan for plan in plans if plan is not None]
    return min(fitting, key=lambda plan: value_of(own.asked, own.model.predict(plan)), default=None)


def _proportional(own: _Baseline) -> LlmPlan | None:
    need, order = own.weights(), own.by_memory
    for count in range(1, min(len(order), own.num_layers) + 1):
        chosen = order[:count]
        if sum(device.memory_bytes for device in chosen) < need:
            continue
        ring = [device for device in own.devices if device in chosen]
        plan = own.plan(own.pieces(ring, _shares([float(d.memory_bytes) for d in ring], own.num_layers)))
        if plan is not None:
            return plan
    return None


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` by weight: largest remainder, at least one each."""
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [max(1, math.floor(share)) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: exact[i] - math.floor(exact[i]), reverse=True)
    at = 0
    while sum(shares) < total:
        shares[order[at % len(order)]] += 1
        at += 1
    while sum(shares) > total:
        shares[max(range(len(shares)), key=lambda i: shares[i])] -= 1
    return shares


def _even(own: _Baseline) -> LlmPlan | None:
    chosen = own.by_memory[: own.num_layers]
    while chosen:
        ring = [device for device in own.devices if device in chosen]
        least, more = divmod(own.num_layers, len(ring))
        plan = own.plan(own.pieces(ring, [least + (index < more) for index in range(len(ring))]))
        if plan is not None:
            return plan
        chosen = chosen[:-1]
    return None


def _water_filling(own: _Baseline) -> LlmPlan | None:
    order = own.by_memory
    for count in range(1, len(order) + 1):
        ring = [device for device in own.devices if device in order[:count]]
        caps = [own.room(d, is_first=i == 0, is_last=i == len(ring) - 1) for i, d in enumerate(ring)]
        if sum(caps) < own.num_layers:
            continue
        layers = _filled([1.0 / own.layer_s(device) for device in ring], caps, own.num_layers)
        plan = own.plan(own.pieces(ring, layers))
        if plan is not None:
            return plan
    return None


def _filled(speeds: Sequence[float], caps: Sequence[int], total: int) -> list[int]:
    """Layers one by one to where the stage stays quickest."""
    layers = [0] * len(speeds)
    for _ in range(total):
        open_ = [i for i in range(len(speeds)) if layers[i] < caps[i]]
        best = min(open_, key=lambda i: ((layers[i] + 1) / speeds[i], i))
        layers[best] += 1
    return layers


def _edgeshard_latency(own: _Baseline) -> LlmPlan | None:
    """F(i, j) = min over k of F(i-1, k) + c(i, j) + bytes / rate(k, j); the embedding stays on the source."""
    world, devices = own.world, own.devices
    if devices[0].name != world.driver:
        return None
    cost = np.array([_block_times(own, device) for device in devices])
    size = own.model.state_bytes(1, EXACT)
    move = np.full((len(devices), len(devices)), math.inf)
    for a, one in enumerate(devices):
        for b, other in enumerate(devices):
            link = world.cluster.link(one.name, other.name)
            move[a, b] = 0.0 if a == b else math.inf if link is None else size / link.bandwidth_bytes_per_s
    value = np.where(np.arange(len(devices)) == 0, cost[:, 0], math.inf)
    choices = []
    for block in range(1, own.num_layers + 2):
        total = value[:, None] + move + cost[None, :, block]
        choices.append(total.argmin(axis=0))
        value = total.min(axis=0)
    if not np.isfinite(value).any():
        return None
    at = int(value.argmin())
    path = [at]
    for choice in reversed(choices):
        at = int(choice[at])
        path.append(at)
    path.reverse()
    starts = [0, *(i for i in range(1, len(path)) if path[i] != path[i - 1]), len(path)]
    pieces = [(devices[path[a]], a, b) for a, b in pairwise(starts)]
    return own.plan(pieces, with_memory=False)


def _block_times(own: _Baseline, device: Device) -> list[float]:
    """Seconds of each block for one token, by the executor that is fastest over all of them."""
    model, parts = own.model, [EMBEDDING, *own.world.profile.layers, HEAD]
    best: list[float] = [math.inf] * len(parts)
    for stage in own.stages(device, 0, len(parts)):
        found = model.measured(device.name, stage.executor)
        assert found is not None
        times = [model.few_s(found.decode[part], part, 1) for part in parts]
        best = times if sum(times) < sum(best) else best
    return best


def _edgeshard_throughput(own: _Baseline) -> LlmPlan | None:
    """g(i, S, k): the least maximum with the first i blocks on the set S, the last on k; sets by class counts."""
    world = own.world
    view = views(replace(own.asked, objective="tpot"), limit_loss=False)[0]
    problem = own.problem(view)
    counts, start = problem.counts, world.place_of(world.driver)
    if start is None or math.prod(count + 1 for count in counts) > MOST_STATES:
        return None
    num, hop = problem.num_blocks, _occupied(problem)
    steps = [_stage_table(problem, place) for place in range(len(counts))]
    first = np.full(num + 1, math.inf)
    first[0] = 0.0
    layer = {(counts, -1): first}
    back: dict[_State, list[tuple[_State, FloatArray]]] = {}
    best, end = math.inf, None
    while layer:
        following: dict[_State, FloatArray] = {}
        for state, reached in layer.items():
            for place in [start] if state[1] < 0 else range(len(counts)):
                if not state[0][place]:
                    continue
                left = tuple(c - (k == place) for k, c in enumerate(state[0]))
                sent = 0.0 if state[1] < 0 else hop[state[1], place]
                total = np.maximum(np.maximum(reached, sent)[:, None], steps[place])
                into = (left, place)
                back.setdefault(into, []).append((state, total))
                former = following.get(into)
                least = total.min(axis=0)
                following[into] = least if former is None else np.minimum(former, least)
        for state, reached in following.items():
            if reached[num] < best:
                best, end = float(reached[num]), state
        layer = following
    return None if end is None else own.plan(_walked(world, back, end, num))


def _walked(
    world: World,
    back: dict[_State, list[tuple[_State, FloatArray]]],
    end: _State,
    num: int,
) -> Pieces:
    pieces, state, block = [], end, num
    left = [list(group) for group in world.classes]
    while state[1] >= 0:
        tried = [(float(total[:, block].min()), index) for index, (_, total) in enumerate(back[state])]
        former, total = back[state][min(tried)[1]]
        first = int(total[:, block].argmin())
        pieces.append((left[state[1]].pop(), first, block))
        state, block = former, first
    return pieces[::-1]


def _occupied(problem: Problem) -> FloatArray:
    """Seconds that a token's hidden state takes on the wire, by classes, without latency."""
    world, size = problem.world, problem.world.model.state_bytes(1, EXACT)
    made = np.full((len(problem.counts),) * 2, math.inf)
    for a, one in enumerate(world.classes):
        for b, other in enumerate(world.classes):
            target = other[1] if a == b and len(other) > 1 else other[0]
            link = world.cluster.link(one[0].name, target.name)
            if link is not None:
                made[a, b] = size / link.bandwidth_bytes_per_s
    return made


def _stage_table(problem: Problem, place: int) -> FloatArray:
    """Seconds of one token for blocks [a, b) on a class, by its fastest executor that fits; inf where none does."""
    segments, num = problem.segments[place], problem.num_blocks
    made = np.full((num + 1, num + 1), math.inf)
    np.minimum.at(made, (segments.first, segments.last), segments.sums[:, 0])
    return made


_RULES: dict[str, Callable[[_Baseline], LlmPlan | None]] = {
    "one_device": _one_device,
    "proportional": _proportional,
    "even": _even,
    "water_filling": _water_filling,
    "edgeshard_latency": _edgeshard_latency,
    "edgeshard_throughput": _edgeshard_throughput,
}
NAMES = tuple(_RULES)
