"""Thresholds of exits: the search against enumeration, predicted rates against held-out data, budgets that nothing keeps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ecotone.graph import Block, Exit, Graph, Tensor, TensorIndex
from ecotone.model import Captured, ModelError, capture
from ecotone.model.exit_heads import capture_head, default_rule, make_head
from ecotone.profiling.calibration import best_rules, calibrate, judge, policy_table, spent_flop, usual_policies
from ecotone.profiling.exit_outcomes import CalibrationError, Outcomes, observe

pytestmark = pytest.mark.torch

NAMES = ("e1", "e2", "e3")


def graph_of(count: int) -> Graph:
    """Five blocks of 20 FLOP; exits of 2 FLOP behind the first ones."""
    tensors = tuple(Tensor(name=f"t{i}", shape=(1, 4), dtype="float32", producer=i - 1) for i in range(6))
    blocks = tuple(Block(name=f"b{i}", inputs=(TensorIndex(i),), outputs=(TensorIndex(i + 1),), flop=20.0) for i in range(5))
    exits = tuple(Exit(name=NAMES[i], position=i + 1, flop=2.0) for i in range(count))
    return Graph(
        name="five", blocks=blocks, tensors=tensors, inputs=(TensorIndex(0),), outputs=(TensorIndex(5),), exits=exits
    )


def drawn(size: int, count: int, seed: int, ties: bool = False) -> Outcomes:
    """Samples of some hardness: exits are surer and righter of easy ones, later exits more so."""
    random = np.random.default_rng(seed)
    hard = random.uniform(0, 1, size)
    sure, right = np.empty((size, count)), np.empty((size, count))
    for e in range(count):
        skill = 0.75 + 0.08 * e
        right[:, e] = random.uniform(0, 1, size) < np.clip(1.4 * skill - 0.8 * hard, 0, 1)
        sure[:, e] = np.clip(skill - 0.5 * hard + 0.1 * random.normal(size=size), 0.05, 0.999)
    final = (random.uniform(0, 1, size) < np.clip(1.35 - 0.8 * hard, 0, 1)).astype(float)
    return Outcomes(NAMES[:count], np.round(sure, 1) if ties else sure, right, final, True)


def by_hand(outcomes: Outcomes, graph: Graph, thresholds: tuple[float, ...]) -> tuple[float, float, list[float]]:
    """(share of FLOP saved, points lost, shares) of these thresholds, sample by sample."""
    whole, saved, lost, left = 100.0, 0.0, 0.0, [0] * len(thresholds)
    for row in range(len(outcomes)):
        spent = 0.0
        for e, threshold in enumerate(thresholds):
            spent += 2.0
            if outcomes.sure[row, e] >= threshold:
                left[e] += 1
                saved += 1 - (20.0 * (int(outcomes.exits[e][1:])) + spent) / whole
                lost += outcomes.final[row] - outcomes.right[row, e]
                break
        else:
            saved += 1 - (whole + spent) / whole
    size = len(outcomes)
    return saved / size, 100 * lost / size, [n / size for n in left]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 14), st.integers(1, 2), st.floats(0, 20), st.booleans())
def test_the_search_is_exact_where_the_grid_holds_every_sample(
    seed: int, size: int, count: int, budget: float, ties: bool
) -> None:
    outcomes, graph = drawn(size, count, seed, ties), graph_of(count)
    every = [sorted({0.0, 2.0, *outcomes.sure[:, e].tolist()}) for e in range(count)]
    best = max(
        (
            saved
            for t in itertools.product(*every)
            for saved, lost, _ in [by_hand(outcomes, graph, t)]
            if lost <= budget + 1e-9
        ),
        default=0.0,
    )
    try:
        policies = calibrate(outcomes, graph, budgets=(budget,), folds=1)
    except CalibrationError:
        policies = ()
    found = max((by_hand(outcomes.of(p.exits), graph, p.thresholds)[0] for p in policies), default=0.0)
    # Each subset of exits is searched as well, whose heads alone are spent: never worse than the whole set.
    subsets = [s for n in range(1, count + 1) for s in itertools.combinations(NAMES[:count], n)]
    for subset in subsets:
        own = outcomes.of(subset)
        grid = [sorted({0.0, 2.0, *own.sure[:, e].tolist()}) for e in range(len(subset))]
        values = (by_hand(own, graph, t) for t in itertools.product(*grid))
        best = max([best, *(saved for saved, lost, _ in values if lost <= budget + 1e-9)])
    assert found == pytest.approx(max(best, 0.0), abs=1e-9)
    for policy in policies:
        saved, lost, shares = by_hand(outcomes.of(policy.exits), graph, policy.thresholds)
        assert lost <= budget + 1e-9
        assert policy.shares == pytest.approx(shares)
        assert policy.loss_points == pytest.approx(lost)
        assert judge(outcomes, graph, policy.exits, policy.thresholds).saved == pytest.approx(saved)


def test_three_exits_on_a_grid_come_near_the_best_of_all_thresholds() -> None:
    outcomes, graph = drawn(24, 3, 5), graph_of(3)
    every = [sorted({0.0, 2.0, *outcomes.sure[:, e].tolist()}) for e in range(3)]
    values = (by_hand(outcomes, graph, t) for t in itertools.product(*every))
    best = max(saved for saved, lost, _ in values if lost <= 4.2)
    policies = calibrate(outcomes, graph, budgets=(4.2,), folds=1)
    assert max(judge(outcomes, graph, p.exits, p.thresholds).saved for p in policies) >= best - 1e-9


def test_more_budget_never_saves_less_and_all_of_it_lets_everyone_leave_first() -> None:
    outcomes, graph = drawn(200, 3, 1), graph_of(3)
    saved = []
    for budget in (0.5, 1.0, 2.0, 5.0, 100.0):
        policies = calibrate(outcomes, graph, budgets=(budget,), folds=1)
        saved.append(max(judge(outcomes, graph, p.exits, p.thresholds).saved for p in policies))
    assert saved == sorted(saved)
    assert saved[-1] == pytest.approx(1 - 22 / 100)
    assert spent_flop(graph, ("e1", "e3")).tolist() == [22.0, 64.0, 104.0]


def test_rates_and_losses_that_were_predicted_hold_on_other_data() -> None:
    errors, inside, excess, over, naive = [], [], [], [], []
    for seed in (11, 21, 31):
        graph, known, fresh = graph_of(3), drawn(400, 3, seed), drawn(20_000, 3, seed + 1)
        for policy in calibrate(known, graph, budgets=(2.0, 4.0)):
            seen = judge(fresh, graph, policy.exits, policy.thresholds)
            errors += [abs(a - b) for a, b in zip(policy.shares, seen.shares, strict=True)]
            inside.append(policy.low_points <= seen.loss_points <= policy.high_points)
            excess.append(seen.loss_points - policy.loss_points)
        for policy in calibrate(known, graph, budgets=(4.0,), bound="high"):
            over.append(judge(fresh, graph, policy.exits, policy.thresholds).loss_points > 4.0)
        for policy in calibrate(known, graph, budgets=(2.0, 4.0), folds=1):
            naive.append(judge(fresh, graph, policy.exits, policy.thresholds).loss_points - policy.loss_points)
    assert max(errors) < 0.1  # four standard errors of a share of 400
    assert float(np.mean(inside)) > 0.8  # of 95 %, less what choosing costs
    assert not any(over)
    # Judged on the very samples that they were chosen on, thresholds look better than they are; left-out folds mend that.
    assert float(np.mean(naive)) > float(np.mean(excess)) + 0.3
    assert abs(float(np.mean(excess))) < 0.6


def hopeless() -> Outcomes:
    """e1 is never right; e2 for the surest twelve of sixty, but for one of them."""
    outcomes = drawn(60, 2, 3)
    right, sure = np.zeros_like(outcomes.right), outcomes.sure.copy()
    sure[:, 1] = np.linspace(0.9, 0.1, 60)
    right[1:12, 1] = 1.0
    return replace(outcomes, right=right, sure=sure, final=np.ones(60))


def test_a_budget_that_nothing_keeps_names_the_nearest_that_something_does() -> None:
    outcomes, graph = hopeless(), graph_of(2)
    with pytest.raises(
        CalibrationError, match=r"no thresholds save compute .* lose at most 1 points; the nearest is"
    ) as told:
        calibrate(outcomes, graph, budgets=(1.0,), folds=1)
    nearest = float(str(told.value).rpartition(" ")[2])
    assert nearest == pytest.approx(100 / 60, rel=0.01)  # the surest of all is wrong, so nobody may leave before it
    assert calibrate(outcomes, graph, budgets=(nearest * 1.01,), folds=1)
    assert all(policy.exits == ("e2",) for policy in usual_policies(outcomes, graph))
    with pytest.raises(CalibrationError, match="no exit saves anything within any budget"):
        calibrate(replace(outcomes, sure=np.zeros((60, 2))).of(("e1",)).rows(np.arange(3)), hard(graph_of(1)))
    with pytest.raises(CalibrationError, match=r"budgets \[-1\]"):
        calibrate(outcomes, graph, budgets=(-1,))
    with pytest.raises(CalibrationError, match="give each exit one"):
        judge(outcomes, graph, ("e1",), (float("nan"),))


def hard(graph: Graph) -> Graph:
    """The same with heads dearer than what they save."""
    return replace(graph, exits=tuple(replace(e, flop=90.0) for e in graph.exits))


def test_few_samples_promise_little() -> None:
    graph, few, many = graph_of(1), drawn(20, 1, 2), drawn(5000, 1, 2)
    for outcomes, width in ((few, 4.0), (many, 0.3)):
        result = judge(outcomes, graph, ("e1",), (0.6,))
        assert result.high_points - result.low_points > width
        assert result.low_points <= result.loss_points <= result.high_points
    nobody = judge(many, graph, ("e1",), (2.0,))
    assert (nobody.shares, nobody.loss_points) == ((0.0,), 0.0)
    assert 0 < nobody.high_points < 0.1  # one event more would be 0.02


# ---- on a model --------------------------------------------------------------------------------------------------------


class Map(nn.Module):
    """A dense classifier: [n, 2, 8, 8] -> [n, 3, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1),
            nn.ReLU(), nn.Conv2d(32, 3, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layers(x)
        return made


@pytest.fixture(scope="module")
def mapped() -> Captured:
    torch.manual_seed(0)
    captured = capture(Map().eval(), (torch.randn(1, 2, 8, 8),), name="map", dynamic_batch=True)
    rule = default_rule(captured.graph)
    heads = [capture_head(captured, f"e{p}", p, make_head(captured.graph, p, 0.05), rule) for p in (1, 2)]
    return captured.with_exits(heads)


def samples(count: int, seed: int, batch: int = 3) -> list[tuple[tuple[torch.Tensor], torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        ((torch.randn(batch, 2, 8, 8, generator=random),), torch.randint(0, 3, (batch, 4, 4), generator=random))
        for _ in range(count)
    ]


def test_what_is_observed_is_what_exits_say_sample_by_sample(mapped: Captured) -> None:
    data = samples(4, 1)
    seen = observe(mapped, data)
    assert len(seen) == 12
    assert seen.decisions == 16
    row, variants = 0, [mapped.until_exit(head.name) for head in mapped.exits]
    for (x,), labels in data:
        for one, truth in zip(x, labels, strict=True):
            for number, head in enumerate(mapped.exits):
                answer = variants[number].reference((one[None],))[0]
                assert seen.sure[row, number] == pytest.approx(head.rule.of_request([answer]), abs=1e-5)
                assert seen.right[row, number] == pytest.approx(float((answer.argmax(1)[0] == truth).float().mean()))
            final = mapped.reference((one[None],))[0]
            assert seen.final[row] == pytest.approx(float((final.argmax(1)[0] == truth).float().mean()))
            row += 1
    unlabelled = observe(mapped, [(inputs, None) for inputs, _ in data])
    assert unlabelled.final.tolist() == [1.0] * 12
    assert not unlabelled.is_labelled


def test_each_exit_gets_the_rule_that_saves_the_most_with_it(mapped: Captured) -> None:
    data = [(inputs, None) for inputs, _ in samples(20, 2)]
    better, outcomes = best_rules(mapped, data, budget=5.0)
    assert observe(better, data).sure == pytest.approx(outcomes.sure)
    for number, head in enumerate(better.exits):
        for measure, over in itertools.product(("top", "entropy", "margin"), ("mean", "min")):
            heads = list(mapped.exits)
            heads[number] = replace(heads[number], rule=replace(head.rule, measure=measure, over=over))
            other = observe(mapped.with_exits(heads), data).of([head.name])
            best = [
                max(
                    r.saved
                    for t in (2.0, *o.sure[:, 0])
                    if (r := judge(o, better.graph, (head.name,), (t,))).loss_points < 5.01
                )
                for o in (other, outcomes.of([head.name]))
            ]
            assert best[1] >= best[0] - 1e-9


def test_policies_reach_a_profile_s_table_and_survive_a_file(mapped: Captured) -> None:
    outcomes = observe(mapped, [(inputs, None) for inputs, _ in samples(30, 4)])
    kept = Outcomes.from_tensors(outcomes.exits, outcomes.tensors())
    assert kept is not None
    assert kept.sure == pytest.approx(outcomes.sure, abs=1e-6)
    policies = calibrate(kept, mapped.graph, budgets=(60.0,))
    table = policy_table(mapped.graph, kept, policies)
    assert table.policy(policies[0].name) == policies[0]
    assert (table.graph_hash, table.reference_points) == (mapped.graph.content_hash(), 100.0)
    assert Outcomes.from_tensors(("e1",), outcomes.tensors()) is None
    assert Outcomes.from_tensors(outcomes.exits, {}) is None


def test_calibration_data_of_the_wrong_shape_are_refused(mapped: Captured) -> None:
    (inputs, labels), *_ = samples(1, 1)
    with pytest.raises(ModelError, match=r"labels \[3, 4\]: the model decides \[3, 4, 4\] times"):
        observe(mapped, [(inputs, labels[:, 0])])
    with pytest.raises(CalibrationError, match="some samples have labels and some have none"):
        observe(mapped, [(inputs, labels), (inputs, None)])
    with pytest.raises(CalibrationError, match="no samples to calibrate on"):
        observe(mapped, [])
    with pytest.raises(CalibrationError, match="has no exits to calibrate"):
        observe(mapped.with_exits([]), [(inputs, None)])
