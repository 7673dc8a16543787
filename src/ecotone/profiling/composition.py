"""Do losses add? Whole plans with several crossings, measured, beside the sum that the planner reckons with.

Equation 11 of cost.py adds the losses of single crossings. That is a rule, not a theorem: a decision that two crossings
would flip is counted twice (the sum is then too high, the safe side), and two errors that each stay below the margin of a
decision may pass it together (then it is too low). So some plans are run as a whole, each frontier through its codec after
the one before, and both figures are kept in the table. Cost: one pass of the model per plan and sample.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ecotone import codec
from ecotone.accuracy import AccuracyTable, Composition, Crossing, ExitPolicy
from ecotone.codec import ImageSpec
from ecotone.graph import Graph
from ecotone.model import Captured
from ecotone.plan import Plan
from ecotone.profiling.accuracy import set_hash
from ecotone.profiling.crossings import Crossings, ExitRun, Tensors, batches
from ecotone.profiling.judge import Judge
from ecotone.profiling.labels import Labels
from ecotone.profiling.ladders import is_exact
from ecotone.profiling.measurement import Progress
from ecotone.profiling.paired import Tally, how_sure
from ecotone.profiling.samples import Samples
from ecotone.units import EcotoneError

__all__ = ["check_composition", "crossings_of", "predicted_points", "random_crossings"]

Chain = tuple[Crossing, ...]


def check_composition(
    captured: Captured,
    table: AccuracyTable,
    samples: Samples,
    labels: Any = None,
    plans: Sequence[Plan | Chain] = (),
    *,
    exits: Sequence[ExitRun] = (),
    image: ImageSpec | None = None,
    names: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Composition, ...]:
    """What each of `plans` (or chains of crossings) loses on the calibration set of `table`, beside the predicted sum.

    Plans with the same crossings and exits are measured once; those with nothing lossy are left out. Raises EcotoneError
    where samples and labels are not those of the table, or a crossing is not in it.
    """
    truth = None if labels is None else Labels(labels, samples, names)
    data = set_hash(captured, samples, truth, names)
    if data != table.data_hash or captured.graph.content_hash() != table.graph_hash:
        raise EcotoneError(
            "composed accuracy: the table is of another model or calibration set; measure it on these samples"
        )
    wanted: dict[tuple[Chain, str], tuple[Chain, ExitPolicy | None]] = {}
    for plan in plans:
        policy = _policy_of(plan, table) if isinstance(plan, Plan) else None
        chain = crossings_of(plan) if isinstance(plan, Plan) else plan
        if any(not is_exact(crossing.codec) for crossing in chain):
            wanted.setdefault((chain, policy.name if policy else ""), (chain, policy))
    predicted = [predicted_points(table, chain, policy) for chain, policy in wanted.values()]
    positions = sorted({crossing.position for chain, _ in wanted.values() for crossing in chain})
    runner = Crossings(captured, positions, (), image=image, exits=exits)
    tallies = [Tally() for _ in wanted]
    index = 0
    for group in batches(samples, runner.batch) if wanted else ():
        judges = [Judge(index + i, outputs, truth) for i, outputs in enumerate(runner.run(0, runner.length, group))]
        for tally, (chain, policy) in zip(tallies, wanted.values(), strict=True):
            for judge, outputs in zip(judges, _through(runner, group, chain, policy), strict=True):
                judge.add_to(tally, outputs)
        index += len(group)
        if progress:
            progress(index, len(samples), f"{len(wanted)} whole plans, sample {index}")
    return tuple(_compositions(wanted, predicted, tallies, table))


def crossings_of(plan: Plan) -> Chain:
    """The transfers of a plan that go over a link, in order; an exit's transfer carries outputs and is left out."""
    return tuple(Crossing(position=position, codec=codec_id) for position, codec_id in plan.crossings)


def predicted_points(table: AccuracyTable, chain: Chain, policy: ExitPolicy | None = None) -> float:
    """Equation 11: the loss of the policy, and of each crossing what it loses more; EcotoneError for an unknown cell."""
    total = policy.loss_points if policy else 0.0
    for crossing in chain:
        points = table.crossing_points(crossing.position, crossing.codec, policy)
        if points is None:
            where = f"{crossing.codec} at {crossing.position}"
            raise EcotoneError(f"composed accuracy: {where} is not in the table; measure that cut and codec too")
        total += points
    return total


def random_crossings(
    graph: Graph,
    table: AccuracyTable,
    count: int,
    *,
    seed: int = 0,
    limit_points: float = 5.0,
    is_wanted: Callable[[Chain], bool] | None = None,
) -> tuple[Chain, ...]:
    """At most `count` different chains of two or three lossy crossings, each of which alone loses at most `limit_points`.

    Those that a plan could have: positions ascend, pictures at cut 0 only. `is_wanted` leaves some out.
    """
    cells = [
        c for c in table.cells if c.position >= 0 and not c.policy and not c.variant and c.fitted_points <= limit_points
    ]
    known: dict[int, list[str]] = {}
    for cell in cells:
        if not is_exact(cell.codec) and "+" not in cell.codec and cell.position < graph.num_blocks:
            known.setdefault(cell.position, []).append(cell.codec)
    dice = random.Random(seed)
    found: dict[Chain, None] = {}
    for _ in range(20 * count):
        length = 2 if len(known) < 3 or dice.random() < 0.6 else 3
        if len(known) < length or len(found) >= count:
            break
        chain = tuple(Crossing(position=p, codec=dice.choice(known[p])) for p in sorted(dice.sample(sorted(known), length)))
        if is_wanted is None or is_wanted(chain):
            found[chain] = None
    return tuple(found)


def _policy_of(plan: Plan, table: AccuracyTable) -> ExitPolicy | None:
    leaving_at = [(stage.exit, stage.threshold) for stage in plan.stages if stage.exit]
    if not leaving_at:
        return None
    for policy in table.policies:
        if list(zip(policy.exits, policy.thresholds, strict=True)) == leaving_at:
            return policy
    what = ", ".join(f"{name} at {threshold:.3g}" for name, threshold in leaving_at)
    raise EcotoneError(f"composed accuracy: exits {what} are no policy of the table; calibrate them first")


def _through(runner: Crossings, group: list[Tensors], chain: Chain, policy: ExitPolicy | None) -> list[Tensors]:
    """The outputs of each sample where every frontier of `chain` goes through its codec, and policies leave on the way."""
    values, at, names = list(group), 0, list(policy.exits) if policy else []
    exits = {head.position: head for head in runner.exits if head.name in names}
    thresholds = dict(zip(names, policy.thresholds, strict=True)) if policy else {}
    left: dict[int, Tensors] = {}
    codecs = {crossing.position: crossing.codec for crossing in chain}
    for stop in sorted({*codecs, *exits, runner.length}):
        values, at = runner.run(at, stop, values), stop
        for index, tensors in enumerate(values):
            if stop in exits and index not in left:
                head = exits[stop]
                outputs = tuple(head.outputs(tensors))
                if head.confidence(outputs) >= thresholds[head.name]:
                    left[index] = outputs
        if stop in codecs:
            values = [tuple(codec.unpack(runner.pack(stop, tensors, codecs[stop]))) for tensors in values]
    return [left.get(index, tensors) for index, tensors in enumerate(values)]


def _compositions(
    wanted: dict[tuple[Chain, str], tuple[Chain, ExitPolicy | None]],
    predicted: Sequence[float],
    tallies: Sequence[Tally],
    table: AccuracyTable,
) -> Iterator[Composition]:
    sure = how_sure(tallies, table.confidence, is_labelled=table.is_labelled)
    for (chain, name), points, tally, own in zip(wanted, predicted, tallies, sure, strict=True):
        yield Composition(
            crossings=chain, policy=name, predicted_points=points, loss_points=100.0 * tally.loss,
            low_points=100.0 * own.low, high_points=100.0 * own.high, num_decisions=tally.num_decisions,
            disagreement=tally.differ / tally.num_decisions, disagreement_high=own.differ_high,
        )  # fmt: skip
