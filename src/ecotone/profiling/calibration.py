"""Thresholds for exits: what they would have done on a calibration set, and the cheapest ones within a budget of accuracy.

Per sample and exit the set keeps how sure the exit is and what share of its decisions is right (with labels; else alike the
model's own). From that any thresholds can be judged without running anything: who leaves where, what that costs in FLOP
(heads that were tried counted as spent) and what it loses against everyone going to the end.

    minimise  mean over samples of FLOP spent      over thresholds t_1..t_E of a subset of exits
    subject to  mean over samples of (right at the end - right where it left) <= budget       (100 x: points)

Exact on the grid: every combination of `grid` quantiles per exit but the last, and for the last every sample's own value by
one sorted pass (O(grid^(E-1) N log N); tests hold it against enumeration). A threshold is the middle between two samples.

Thresholds chosen on a set look better there than elsewhere, since the search finds its lucky stretches. So each is chosen
for several *nominal* budgets on all folds but one and judged on that one; the loss of a policy and its interval are those of
the folds left out, and the nominal budget is the one whose loss there keeps the real one (with `bound="high"`: whose upper
end does, which is what new data may lose). The interval is normal, of the paired difference, one wrong decision added so
that few samples promise little. Calibration data must not be data that exits or backbone learnt from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ecotone.accuracy import AccuracyTable, ExitPolicy
from ecotone.graph import Graph
from ecotone.model import Captured
from ecotone.model.confidence import MEASURES, OVER
from ecotone.model.exit_training import Data, Progress
from ecotone.profiling.exit_outcomes import CalibrationError, Floats, Outcomes, observed

__all__ = [
    "BUDGETS", "Result", "best_rules", "calibrate", "judge", "policy_table", "spent_flop", "usual_policies",
]  # fmt: skip

BUDGETS = (0.25, 0.5, 1.0, 2.0)
GRID = {1: 1, 2: 100, 3: 32, 4: 12}  # quantiles per exit but the last, by number of exits
MOST_EXITS = max(GRID)
NOMINAL = 8  # nominal budgets that are tried for each real one
FOLDS, FEWEST_IN_FOLD = 5, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What thresholds do on some outcomes. `saved`: mean share of the model's FLOP; shares by exit; losses in points."""

    shares: tuple[float, ...]
    saved: float
    loss_points: float
    low_points: float
    high_points: float


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
    found = observed(captured, data, rules, progress)
    chosen = []
    for head in own:
        saved = [_search(each.of([head.name]), captured.graph, [budget])[0].saved for each in found]
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
    folds: int = FOLDS,
) -> tuple[ExitPolicy, ...]:
    """For each budget and each subset of the exits the thresholds that save the most FLOP, where they save any.

    Equal ones come once, under the least budget. `folds` 1: judged on the data that they were chosen on. Raises
    CalibrationError for a budget that no subset keeps with any saving, naming the nearest that one does.
    """
    if bound not in ("mean", "high") or any(not 0 <= b <= 100 for b in budgets) or not budgets or folds < 1:
        raise CalibrationError(
            f"budgets {list(budgets)} by {bound!r} over {folds} folds: points of 0 to 100, by mean or high"
        )
    known = [e.name for e in graph.exits if e.name in outcomes.exits]
    if not known or len(known) > MOST_EXITS:
        raise CalibrationError(f"{len(known)} exits to calibrate; must be 1 to {MOST_EXITS}")
    policies, unkept = _calibrated(outcomes, graph, known, sorted(set(budgets)), confidence, bound, folds)
    if unkept:
        raise CalibrationError(_nearest(outcomes.of(known), graph, unkept[0], confidence, bound, folds))
    return policies


def usual_policies(outcomes: Outcomes, graph: Graph) -> tuple[ExitPolicy, ...]:
    """calibrate() for the usual budgets, those left out that nothing keeps; raises CalibrationError where none is kept."""
    known = [e.name for e in graph.exits if e.name in outcomes.exits]
    policies, _ = _calibrated(outcomes, graph, known, BUDGETS, 0.95, "mean", FOLDS)
    return policies or calibrate(outcomes, graph)


def judge(
    outcomes: Outcomes, graph: Graph, exits: Sequence[str], thresholds: Sequence[float], confidence: float = 0.95
) -> Result:
    """What these thresholds do on `outcomes`; raises CalibrationError for one that is no number or names no exit."""
    unknown = [name for name in exits if name not in outcomes.exits]
    if unknown or len(exits) != len(thresholds) or any(math.isnan(t) or t < 0 for t in thresholds):
        raise CalibrationError(f"thresholds {list(thresholds)} for exits {list(exits)}: give each exit one, 0 or more")
    own = outcomes.of(exits)
    return _result(own, graph, _where(own, thresholds), confidence)


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


# ---- choosing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Best:
    thresholds: tuple[float, ...]
    saved: float


@dataclass(frozen=True, slots=True)
class _Tried:
    """Thresholds of all samples, and what those of the other folds lost on each fold."""

    exits: tuple[str, ...]
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    saved: float
    loss_points: float
    half_points: float

    def points(self, bound: str) -> float:
        return self.loss_points + (self.half_points if bound == "high" else 0.0)

    def policy(self, budget: float, num_samples: int) -> ExitPolicy:
        return ExitPolicy(
            name=f"{'+'.join(self.exits)} within {budget:g}", exits=self.exits, thresholds=self.thresholds,
            shares=self.shares, loss_points=self.loss_points, low_points=self.loss_points - self.half_points,
            high_points=self.loss_points + self.half_points, num_samples=num_samples,
        )  # fmt: skip


def _subsets(exits: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(exits, n) for n in range(1, len(exits) + 1))


def _calibrated(
    outcomes: Outcomes,
    graph: Graph,
    exits: Sequence[str],
    budgets: Sequence[float],
    confidence: float,
    bound: str,
    folds: int,
) -> tuple[tuple[ExitPolicy, ...], list[float]]:
    """Policies within ascending `budgets`, and the budgets that nothing keeps."""
    levels = sorted({b * i / NOMINAL for b in budgets for i in range(NOMINAL + 1)})
    tried = [t for s in _subsets(exits) for t in _tried(outcomes.of(s), graph, levels, confidence, folds)]
    policies: dict[tuple[tuple[str, ...], tuple[float, ...]], ExitPolicy] = {}
    unkept = []
    for budget in budgets:
        best: dict[tuple[str, ...], _Tried] = {}
        for each in tried:
            if each.points(bound) <= budget + 1e-9 and (each.exits not in best or each.saved > best[each.exits].saved):
                best[each.exits] = each
        for each in best.values():
            policies.setdefault((each.exits, each.thresholds), each.policy(budget, len(outcomes)))
        unkept += [] if best else [budget]
    return tuple(policies.values()), unkept


def _tried(outcomes: Outcomes, graph: Graph, levels: Sequence[float], confidence: float, folds: int) -> Iterator[_Tried]:
    """For each nominal budget what was chosen for it, where that saves something and every exit is taken by someone."""
    size = len(outcomes)
    folds = min(folds, max(1, size // FEWEST_IN_FOLD))
    fold = np.random.default_rng(size).permutation(size) % folds
    lost = np.zeros((len(levels), size))
    for number in range(folds):
        others = outcomes.rows(np.flatnonzero(fold != number)) if folds > 1 else outcomes
        rows = np.flatnonzero(fold == number)
        part = outcomes.rows(rows)
        for level, best in enumerate(_search(others, graph, levels)):
            lost[level, rows] = _lost(part, _where(part, best.thresholds))
    for level, best in enumerate(_search(outcomes, graph, levels)):
        left = _where(outcomes, best.thresholds)
        shares = tuple(float((left == e).mean()) for e in range(len(outcomes.exits)))
        if best.saved > 0 and min(shares) > 0:  # else a smaller subset does the same for less
            total, squares = float(lost[level].sum()), float((lost[level] ** 2).sum())
            half = 100 * float(_half_width(total, squares, outcomes, confidence))
            yield _Tried(outcomes.exits, best.thresholds, shares, best.saved, 100 * total / size, half)


def _search(outcomes: Outcomes, graph: Graph, budgets: Sequence[float]) -> list[_Best]:
    """For each budget the thresholds of least FLOP that keep it on these samples; at worst those at which nobody leaves."""
    spent = spent_flop(graph, outcomes.exits) / graph.segment_flop(0, graph.num_blocks)
    nobody = _Best((_above(1.0),) * len(outcomes.exits), float(1 - spent[-1]))
    best, limits = [nobody] * len(budgets), np.array(budgets, dtype=np.float64)
    most = np.full(len(budgets), nobody.saved)
    for thresholds, left in _combinations(outcomes):
        saved, counts, sure = _last_exit(outcomes, spent, left, limits)
        for number in np.flatnonzero(saved > most + 1e-12).tolist():
            most[number] = saved[number]
            best[number] = _Best((*thresholds, _between(sure, int(counts[number]))), float(saved[number]))
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


def _last_exit(
    outcomes: Outcomes, spent: Floats, left: NDArray[np.intp], budgets: Floats
) -> tuple[Floats, NDArray[np.intp], Floats]:
    """Given where the other exits let samples leave, what the last one can save within each budget (-inf: it is not kept).

    With how many leave there then, and how sure it is of those who reach it, falling: one sorted pass for all budgets.
    """
    last, size = len(outcomes.exits) - 1, len(outcomes)
    gone, reach = np.flatnonzero(left < last), np.flatnonzero(left == last)
    lost_before = float((outcomes.final[gone] - outcomes.right[gone, left[gone]]).sum())
    order = reach[np.argsort(-outcomes.sure[reach, last], kind="stable")]
    sure = outcomes.sure[order, last]
    lost = lost_before + np.concatenate([[0.0], np.cumsum(outcomes.final[order] - outcomes.right[order, last])])
    apart = np.ones(len(order) + 1, dtype=bool)
    apart[1:-1] = sure[:-1] > sure[1:]  # samples equally sure leave together
    allowed = apart & (100 * lost / size <= budgets[:, None] + 1e-9)
    counts = len(order) - np.argmax(allowed[:, ::-1], axis=1)  # the most: who leaves earlier spends less
    total = float(spent[left[gone]].sum()) + counts * spent[last] + (len(order) - counts) * spent[last + 1]
    return np.where(allowed.any(axis=1), 1 - total / size, -math.inf), counts, sure


def _between(sure: Floats, count: int) -> float:
    """A threshold at which the first `count` of these, which fall, leave."""
    if count == 0:
        return _above(float(sure[0]) if len(sure) else 1.0)
    return 0.0 if count == len(sure) else float((sure[count - 1] + sure[count]) / 2)


def _where(outcomes: Outcomes, thresholds: Sequence[float]) -> NDArray[np.intp]:
    """The number of the exit at which each sample leaves; that of exits: at the end."""
    left = np.full(len(outcomes), len(thresholds))
    for number in reversed(range(len(thresholds))):
        left[outcomes.sure[:, number] >= thresholds[number]] = number
    return left


def _lost(outcomes: Outcomes, left: NDArray[np.intp]) -> Floats:
    """Right at the end less right where it left, per sample."""
    rights = np.concatenate([outcomes.right, outcomes.final[:, None]], axis=1)
    lost: Floats = outcomes.final - rights[np.arange(len(outcomes)), left]
    return lost


def _half_width(total: float, squares: float, outcomes: Outcomes, confidence: float) -> float:
    """Of the normal interval of a mean of paired differences, one wrong decision added to what was seen."""
    size, mean = len(outcomes), total / len(outcomes)
    variance = max((squares + outcomes.decisions**-2.0) / size - mean**2, 0.0)
    return NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(variance / size)


def _result(outcomes: Outcomes, graph: Graph, left: NDArray[np.intp], confidence: float) -> Result:
    spent = spent_flop(graph, outcomes.exits) / graph.segment_flop(0, graph.num_blocks)
    lost = _lost(outcomes, left)
    half = 100 * _half_width(float(lost.sum()), float((lost**2).sum()), outcomes, confidence)
    loss = 100 * float(lost.mean())
    return Result(
        shares=tuple(float((left == e).mean()) for e in range(len(outcomes.exits))), saved=1 - float(spent[left].mean()),
        loss_points=loss, low_points=loss - half, high_points=loss + half,
    )  # fmt: skip


def _nearest(outcomes: Outcomes, graph: Graph, budget: float, confidence: float, bound: str, folds: int) -> str:
    """Why a budget is not kept, and the least one that would be."""
    levels = [0.0, *np.geomspace(max(budget, 0.01), 100.0, 24).tolist()]
    tried = [t for s in _subsets(outcomes.exits) for t in _tried(outcomes.of(s), graph, levels, confidence, folds)]
    if not tried:
        return f"{graph.name}: no exit saves anything within any budget; train the exits longer, or put them elsewhere"
    nearest = min(each.points(bound) for each in tried)
    what = "surely" if bound == "high" else "on samples left out"
    return (
        f"{graph.name}: no thresholds save compute and {what} lose at most {budget:g} points; the nearest is {nearest:.3g}"
    )
