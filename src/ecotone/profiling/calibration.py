"""Thresholds for exits: what they would have done on a calibration set, and the cheapest ones within a budget of accuracy.

Per sample and exit the set keeps how sure the exit is and what share of its decisions is right (with labels; else alike the
model's own). From that any thresholds can be judged without running anything: who leaves where, what that costs in FLOP
(heads that were tried counted as spent) and what it loses against everyone going to the end.

    minimise  mean over samples of FLOP spent      over thresholds t_1..t_E of a subset of exits
    subject to  mean over samples of (right at the end - right where it left) <= budget       (100 x: points)

Exact on the grid: every combination of `grid` quantiles per exit but the last, and for the last every sample's own value by
one sorted pass (O(grid^(E-1) N log N); tests hold it against enumeration). A threshold is the middle between two samples.
The loss of a policy comes with a normal interval of the paired difference, one wrong decision added so that few samples
promise little. With `bound="high"` the upper end must keep the budget: what new data may lose, not only what this did.
Calibration data must not be data that exits or backbone learnt from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

from ecotone.accuracy import AccuracyTable, ExitPolicy
from ecotone.graph import Graph
from ecotone.model import Captured, ModelError
from ecotone.model.confidence import MEASURES, OVER, ExitRule
from ecotone.model.exit_training import Data, Progress
from ecotone.units import EcotoneError

__all__ = [
    "BUDGETS", "CalibrationError", "Outcomes", "Result", "best_rules", "calibrate", "judge", "observe", "policy_table",
    "spent_flop", "usual_policies",
]  # fmt: skip

Floats = NDArray[np.float64]
BUDGETS = (0.25, 0.5, 1.0, 2.0)
GRID = {1: 1, 2: 100, 3: 32, 4: 12}  # quantiles per exit but the last, by number of exits
MOST_EXITS = max(GRID)


class CalibrationError(EcotoneError):
    """No thresholds keep a budget, or the data says nothing of these exits."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a calibration set showed. `sure` and `right`: (samples, exits); `final`: (samples,); rights are shares in [0, 1].

    `is_labelled`: right means as labelled. `decisions` that a sample has.
    """

    exits: tuple[str, ...]
    sure: Floats
    right: Floats
    final: Floats
    is_labelled: bool
    decisions: int = 1

    def __len__(self) -> int:
        return len(self.final)

    def of(self, exits: Sequence[str]) -> Outcomes:
        """The same of some of the exits."""
        columns = [self.exits.index(name) for name in exits]
        return replace(self, exits=tuple(exits), sure=self.sure[:, columns], right=self.right[:, columns])

    def rows(self, chosen: NDArray[np.intp]) -> Outcomes:
        """The same of some of the samples."""
        return replace(self, sure=self.sure[chosen], right=self.right[chosen], final=self.final[chosen])

    def tensors(self) -> dict[str, torch.Tensor]:
        """As tensors for a file."""
        found = {"sure": self.sure, "right": self.right, "final": self.final}
        return {name: torch.from_numpy(values.astype(np.float32)) for name, values in found.items()} | {
            "labelled": torch.tensor([int(self.is_labelled), self.decisions])
        }

    @staticmethod
    def from_tensors(exits: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> Outcomes | None:
        """What `tensors` gave; None where they are not there or do not fit."""
        try:
            sure, right, final = (tensors[name].double().numpy() for name in ("sure", "right", "final"))
            labelled, decisions = tensors["labelled"].tolist()
        except (KeyError, RuntimeError, ValueError, TypeError):
            return None
        fits = sure.shape == right.shape == (len(final), len(exits)) and len(final) > 0
        return Outcomes(tuple(exits), sure, right, final, bool(labelled), max(1, decisions)) if fits else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What thresholds do on some outcomes. `saved`: mean share of the model's FLOP; shares by exit; losses in points."""

    shares: tuple[float, ...]
    saved: float
    loss_points: float
    low_points: float
    high_points: float


def observe(captured: Captured, data: Data, *, progress: Progress | None = None) -> Outcomes:
    """Run the exits of `captured` on samples that nobody learnt from; raises ModelError where one does not fit."""
    (outcomes,) = _observed(captured, data, [[head.rule for head in captured.exits]], progress)
    return outcomes


def best_rules(
    captured: Captured, data: Data, *, budget: float = 1.0, progress: Progress | None = None
) -> tuple[Captured, Outcomes]:
    """`captured` with, per exit, the rule (measure; mean or least over decisions) that alone saves the most within `budget`.

    With the outcomes under those rules.
    """
    own = captured.exits
    if not own:
        raise CalibrationError(f"{captured.graph.name}: has no exits to calibrate; attach or train some")
    kinds = [(measure, over) for measure in MEASURES for over in OVER]
    rules = [[replace(head.rule, measure=m, over=o) for head in own] for m, o in kinds]
    found = _observed(captured, data, rules, progress)
    chosen = []
    for head in own:
        saved = [
            best.saved if (best := _cheapest(each.of([head.name]), captured.graph, budget, "mean", 0.95)) else -math.inf
            for each in found
        ]
        chosen.append(int(np.argmax(saved)))
    better = captured.with_exits(
        [replace(head, rule=rules[c][i]) for i, (head, c) in enumerate(zip(own, chosen, strict=True))]
    )
    sure = np.stack([found[c].sure[:, i] for i, c in enumerate(chosen)], axis=1)
    return better, replace(found[0], sure=sure)


def calibrate(
    outcomes: Outcomes,
    graph: Graph,
    *,
    budgets: Sequence[float] = BUDGETS,
    confidence: float = 0.95,
    bound: str = "mean",
) -> tuple[ExitPolicy, ...]:
    """For each budget and each subset of the exits the thresholds that save the most FLOP, where they save any.

    Equal ones come once, under the least budget. Raises CalibrationError for a budget that no subset keeps with any saving, naming the nearest that one does.
    """
    if bound not in ("mean", "high") or any(not b >= 0 for b in budgets) or not budgets:
        raise CalibrationError(f"budgets {list(budgets)} by {bound!r}: points of 0 or more, by mean or high")
    known = [e.name for e in graph.exits if e.name in outcomes.exits]
    if not known or len(known) > MOST_EXITS:
        raise CalibrationError(f"{len(known)} exits to calibrate; must be 1 to {MOST_EXITS}")
    policies: dict[tuple[tuple[str, ...], tuple[float, ...]], ExitPolicy] = {}
    for budget in sorted(budgets):
        found = [_policy(outcomes.of(s), graph, budget, bound, confidence) for s in _subsets(known)]
        if not any(found):
            raise CalibrationError(_nearest(outcomes.of(known), graph, budget, bound, confidence))
        for policy in filter(None, found):
            policies.setdefault((policy.exits, policy.thresholds), policy)
    return tuple(policies.values())


def usual_policies(outcomes: Outcomes, graph: Graph) -> tuple[ExitPolicy, ...]:
    """calibrate() for the usual budgets, those left out that nothing keeps; raises CalibrationError where none is kept."""
    found: list[ExitPolicy] = []
    reason = None
    for budget in BUDGETS:
        try:
            found += calibrate(outcomes, graph, budgets=(budget,))
        except CalibrationError as error:
            reason = error
    if not found and reason is not None:
        raise reason
    return tuple(found)


def judge(
    outcomes: Outcomes, graph: Graph, exits: Sequence[str], thresholds: Sequence[float], confidence: float = 0.95
) -> Result:
    """What these thresholds do on `outcomes`; raises CalibrationError for one that is no number or names no exit."""
    unknown = [name for name in exits if name not in outcomes.exits]
    if unknown or len(exits) != len(thresholds) or any(math.isnan(t) or t < 0 for t in thresholds):
        raise CalibrationError(f"thresholds {list(thresholds)} for exits {list(exits)}: give each exit one, 0 or more")
    own = outcomes.of(exits)
    left = np.full(len(own), len(exits))
    for number in reversed(range(len(exits))):
        left[own.sure[:, number] >= thresholds[number]] = number
    return _result(own, graph, left, confidence)


def spent_flop(graph: Graph, exits: Sequence[str]) -> Floats:
    """FLOP of a request that leaves at each of `exits`, and of one that goes to the end; heads tried before included."""
    heads, spent = 0.0, []
    for name in exits:
        place = graph.exit(name)
        if place is None:
            raise CalibrationError(f"{graph.name}: has no exit {name!r}")
        heads += place.flop
        spent.append(graph.segment_flop(0, place.position) + heads)
    return np.array([*spent, graph.segment_flop(0, graph.num_blocks) + heads])


def policy_table(graph: Graph, outcomes: Outcomes, policies: Sequence[ExitPolicy], data_hash: str = "") -> AccuracyTable:
    """A table of policies alone, for a profile whose crossings were not measured."""
    points = 100.0 * float(outcomes.final.mean())
    return AccuracyTable(
        graph_hash=graph.content_hash(), data_hash=data_hash, is_labelled=outcomes.is_labelled, reference_points=points,
        cells=(), policies=tuple(policies),
    )  # fmt: skip


# ---- running -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    sure: list[Floats] = field(default_factory=list)  # per rule set: (samples, exits)
    right: list[Floats] = field(default_factory=list)
    final: list[Floats] = field(default_factory=list)
    decisions: int = 1


def _observed(
    captured: Captured, data: Data, rules: Sequence[Sequence[ExitRule]], progress: Progress | None
) -> list[Outcomes]:
    """One Outcomes per set of rules, from one pass over the data."""
    if not captured.exits:
        raise CalibrationError(f"{captured.graph.name}: has no exits to calibrate; attach or train some")
    stops = (0, *(head.position for head in captured.exits))
    exiting = [
        captured.segment(a, head.position, head.name).module()
        for a, head in zip(stops, captured.exits, strict=False)
    ]  # fmt: skip
    last = captured.segment(stops[-1], captured.graph.num_blocks).module()
    seen, labelled, samples = _Seen(), [], data() if callable(data) else data
    total = 0 if callable(data) else len(data)
    for number, (inputs, labels) in enumerate(samples):
        with torch.no_grad():
            tensors, exits = tuple(inputs), []
            for module in exiting:
                frontier, *outputs = module(*tensors)
                tensors = (frontier,)
                exits.append(outputs)
            final = list(last(*tensors))
        seen.sure.append(np.stack([_surest(exits, row) for row in rules]))
        rule = captured.exits[0].rule
        decided = final[rule.output]
        seen.decisions = max(1, decided.numel() // (len(decided) * decided.shape[rule.dim]))
        seen.right.append(np.stack([_right(outputs, final, labels, rule) for outputs in exits], axis=1))
        seen.final.append(_right(final, final, labels, rule))
        labelled.append(labels is not None)
        if progress:
            progress(number + 1, max(total, number + 1), "calibration")
    if not labelled:
        raise CalibrationError(f"exits of {captured.graph.name}: there are no samples to calibrate on")
    if any(labelled) != all(labelled):
        raise CalibrationError("some samples have labels and some have none; give all or none")
    sure, right, final_right = np.concatenate(seen.sure, axis=1), np.concatenate(seen.right), np.concatenate(seen.final)
    names = tuple(head.name for head in captured.exits)
    return [Outcomes(names, sure[i], right, final_right, all(labelled), seen.decisions) for i in range(len(rules))]


def _surest(exits: Sequence[Sequence[torch.Tensor]], rules: Sequence[ExitRule]) -> Floats:
    """(samples, exits)."""
    found = [rule.of_samples(outputs).double().numpy() for outputs, rule in zip(exits, rules, strict=True)]
    return np.stack(found, axis=1)


def _right(
    outputs: Sequence[torch.Tensor], final: Sequence[torch.Tensor], labels: torch.Tensor | None, rule: ExitRule
) -> Floats:
    """Per sample the share of its decisions that are right, or like the model's own: (samples,)."""
    chosen = outputs[rule.output].argmax(rule.dim)
    wanted = final[rule.output].argmax(rule.dim) if labels is None else labels
    if tuple(wanted.shape) != tuple(chosen.shape):
        raise ModelError(f"labels {list(wanted.shape)}: the model decides {list(chosen.shape)} times; give them so shaped")
    found: Floats = (chosen == wanted).reshape(len(chosen), -1).double().mean(1).numpy()
    return found


# ---- choosing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Best:
    thresholds: tuple[float, ...]
    saved: float


def _subsets(exits: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(exits, n) for n in range(1, len(exits) + 1))


def _policy(outcomes: Outcomes, graph: Graph, budget: float, bound: str, confidence: float) -> ExitPolicy | None:
    best = _cheapest(outcomes, graph, budget, bound, confidence)
    if best is None or not best.saved > 0:
        return None
    result = judge(outcomes, graph, outcomes.exits, best.thresholds, confidence)
    if min(result.shares) <= 0:
        return None  # an exit that nobody takes: a smaller subset does the same for less
    return ExitPolicy(
        name=f"{'+'.join(outcomes.exits)} within {budget:g}", exits=outcomes.exits, thresholds=best.thresholds,
        shares=result.shares, loss_points=result.loss_points, low_points=result.low_points,
        high_points=result.high_points, num_samples=len(outcomes),
    )  # fmt: skip


def _cheapest(outcomes: Outcomes, graph: Graph, budget: float, bound: str, confidence: float) -> _Best | None:
    """The thresholds of least FLOP that keep `budget`; None where none do."""
    spent = spent_flop(graph, outcomes.exits) / graph.segment_flop(0, graph.num_blocks)
    best: _Best | None = None
    for thresholds, left in _combinations(outcomes):
        found = _last_threshold(outcomes, spent, left, budget, bound, confidence)
        if found is not None and (best is None or found[1] > best.saved + 1e-12):
            best = _Best((*thresholds, found[0]), found[1])
    return best


def _combinations(outcomes: Outcomes) -> Iterator[tuple[tuple[float, ...], NDArray[np.intp]]]:
    """Thresholds of all exits but the last, and where each sample has left by then (the last exit's number: not yet)."""
    count = len(outcomes.exits)
    grids = [_grid(outcomes.sure[:, e], GRID[count]) for e in range(count - 1)]
    for thresholds in itertools.product(*grids):
        left = np.full(len(outcomes), count - 1)
        for number in reversed(range(count - 1)):
            left[outcomes.sure[:, number] >= thresholds[number]] = number
        yield tuple(float(t) for t in thresholds), left


def _grid(sure: Floats, size: int) -> Floats:
    """Middles between neighbouring samples at even quantiles; 0 lets everyone leave, and the last nobody."""
    ordered = np.unique(sure)
    between = np.concatenate([[0.0], (ordered[1:] + ordered[:-1]) / 2, [_above(ordered[-1])]])
    at = np.unique(np.linspace(0, len(between) - 1, min(size, len(between))).round().astype(int))
    grid: Floats = between[at]
    return grid


def _above(sure: float) -> float:
    return float(np.nextafter(max(1.0, sure), 2.0))


def _last_threshold(
    outcomes: Outcomes, spent: Floats, left: NDArray[np.intp], budget: float, bound: str, confidence: float
) -> tuple[float, float] | None:
    """The best threshold of the last exit, given where the others let samples leave: (threshold, saved); one sorted pass."""
    last, size = len(outcomes.exits) - 1, len(outcomes)
    reach = np.flatnonzero(left == last)
    gone = np.flatnonzero(left < last)
    lost_before = (outcomes.final - outcomes.right[np.arange(size), np.minimum(left, last)])[gone]
    spent_before = float(spent[left[gone]].sum())
    order = reach[np.argsort(-outcomes.sure[reach, last], kind="stable")]
    sure = outcomes.sure[order, last]
    lost = outcomes.final[order] - outcomes.right[order, last]
    counts = np.arange(len(order) + 1)  # so many leave at the last exit
    total = float(lost_before.sum()) + np.concatenate([[0.0], np.cumsum(lost)])
    squares = float((lost_before**2).sum()) + np.concatenate([[0.0], np.cumsum(lost**2)])
    saved = 1 - (spent_before + counts * spent[last] + (len(order) - counts) * spent[last + 1]) / size
    points = 100 * total / size
    if bound == "high":
        points = points + 100 * _half_width(total, squares, outcomes, confidence)
    allowed = points <= budget + 1e-9
    allowed[1:-1] &= sure[:-1] > sure[1:]  # samples equally sure leave together
    if not allowed.any():
        return None
    best = int(np.flatnonzero(allowed)[np.argmax(saved[allowed])])
    if best == 0:
        return _above(float(outcomes.sure[:, last].max())), float(saved[0])
    return (0.0 if best == len(order) else float((sure[best - 1] + sure[best]) / 2)), float(saved[best])


def _half_width(total: Floats | float, squares: Floats | float, outcomes: Outcomes, confidence: float) -> Floats:
    """Of the normal interval of a mean of paired differences, one wrong decision added to what was seen."""
    size, mean = len(outcomes), total / len(outcomes)
    variance = np.maximum((squares + outcomes.decisions**-2.0) / size - mean**2, 0.0)
    half: Floats = NormalDist().inv_cdf(0.5 + confidence / 2) * np.sqrt(variance / size)
    return half


def _result(outcomes: Outcomes, graph: Graph, left: NDArray[np.intp], confidence: float) -> Result:
    size, last = len(outcomes), len(outcomes.exits)
    spent = spent_flop(graph, outcomes.exits) / graph.segment_flop(0, graph.num_blocks)
    rights = np.concatenate([outcomes.right, outcomes.final[:, None]], axis=1)
    lost = outcomes.final - rights[np.arange(size), left]
    half = 100 * float(_half_width(float(lost.sum()), float((lost**2).sum()), outcomes, confidence))
    loss = 100 * float(lost.mean())
    return Result(
        shares=tuple(float((left == e).mean()) for e in range(last)), saved=1 - float(spent[left].mean()),
        loss_points=loss, low_points=loss - half, high_points=loss + half,
    )  # fmt: skip


def _nearest(outcomes: Outcomes, graph: Graph, budget: float, bound: str, confidence: float) -> str:
    """Why a budget is not kept, and the least one that would be."""
    low, high = budget, 100.0
    for _ in range(20):
        middle = (low + high) / 2
        kept = any(_policy(outcomes.of(s), graph, middle, bound, confidence) for s in _subsets(outcomes.exits))
        low, high = (low, middle) if kept else (middle, high)
    what = "surely" if bound == "high" else "on these samples"
    if high >= 100.0:
        return f"{graph.name}: no exit saves anything within any budget; train the exits longer, or put them elsewhere"
    return f"{graph.name}: no thresholds save compute and {what} lose at most {budget:g} points; the nearest is {high:.3g}"
